//! The small files of a Hugging Face folder, out of a GGUF file that another program wrote.
//!
//! Nothing is guessed: what a family does not have (experts, other norms, tensors of unknown names,
//! scalings that no `config.json` of the family expresses) is refused in a sentence. What the families
//! have of their own stands in `model::Gguf`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek};

use fewbit_gguf::{Reader, Value};
use serde_json::{Map, Value as Json, json};

use super::check::check_kind;
use super::error::DAMAGED;
use super::generation;
use super::keys::Keys;
use super::own::{File, Shapes};
use super::scaling::{Scaled, scaling};
use super::sizes::Sizes;
use super::special::Special;
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::model::{GgufKeys, LONG_FACTORS, ModelConfig, ROPE_FACTORS};

/// The texts of `config.json`, `generation_config.json` and, where the file has a tokenizer,
/// `tokenizer.json` and `tokenizer_config.json`, by name. Which names stand in the map tells whether
/// there is a tokenizer: a file without one is not refused here.
///
/// The reader is mutable because a scaling of rotations may be stored as a tensor.
///
/// # Errors
/// When the model is of an architecture that no family has, or has something that its family does not
/// have, the tokenizer is of another kind than byte-pair encoding, or a metadata key is missing or
/// unusable: the key or the tensor is named.
pub fn folder_files<R: Read + Seek>(reader: &mut Reader<R>) -> Result<BTreeMap<String, String>> {
    let path = reader.path().to_owned();
    files(reader).map_err(|error| error.at(path.display()).of_input(DAMAGED))
}

fn files<R: Read + Seek>(reader: &mut Reader<R>) -> Result<BTreeMap<String, String>> {
    check_kind(Keys(reader.metadata()))?;
    let mut divisors = Vec::new();
    for name in [ROPE_FACTORS, LONG_FACTORS[0], LONG_FACTORS[1]] {
        if reader.tensors().contains_key(name) {
            divisors.push((name, reader.read_f32(name)?));
        }
    }
    let keys = Keys(reader.metadata());
    let shapes = reader.tensors().iter().map(|(name, info)| (name.clone(), info.shape.clone()));
    let described = describe(keys, &shapes.collect(), &divisors)?;
    let tokenizer = Vocabulary::read(keys, &described.special, described.vocab)?;
    let mut config = described.config();
    let mut generation = json!({});
    for file in [&mut config, &mut generation] {
        file["bos_token_id"] = json!(described.special.bos);
        file["eos_token_id"] = described.special.ends();
    }
    generation::read(keys, &mut generation)?;
    let mut files = vec![("config.json", config), ("generation_config.json", generation)];
    if let Some(tokenizer) = tokenizer {
        files.push(("tokenizer_config.json", tokenizer.settings(keys, described.context)?));
        files.push(("tokenizer.json", tokenizer.tokenizer()));
    }
    Ok(files.into_iter().map(|(name, file)| (name.to_owned(), pretty(name, &file))).collect())
}

/// A tokenizer is too long to be looked at.
fn pretty(name: &str, file: &Json) -> String {
    if name == "tokenizer.json" { file.to_string() } else { format!("{file:#}\n") }
}

/// What a file says of its model.
pub(super) struct Described {
    config: Map<String, Json>,
    special: Special,
    vocab: usize,
    context: usize,
}

impl Described {
    /// The `config.json`, without the tokens at the ends of a text.
    pub(super) fn config(&self) -> Json {
        Json::Object(self.config.clone())
    }
}

/// The model of a file with this metadata and tensors; `divisors` are the values of those that scale
/// its rotations.
///
/// # Errors
/// As [`folder_files`].
pub(super) fn describe(
    keys: Keys<'_>,
    shapes: &Shapes,
    divisors: &[(&str, Vec<f32>)],
) -> Result<Described> {
    let file = File::of(keys, shapes)?;
    file.check_settings()?;
    let sizes = Sizes::read(&file)?;
    let biased = file.check_parts(sizes.blocks)?;
    let special = Special::read(keys, sizes.vocab)?;
    let scaled = Scaled { theta: sizes.theta, dims: sizes.rotated, context: sizes.context as f64 };
    let scaling = scaling(&file, divisors, &scaled)?;
    let mut config = sizes.config(&file);
    config.insert("rope_scaling".to_owned(), scaling);
    let said = Said { file: &file, biased, blocks: sizes.blocks };
    (file.gguf.read)(&said, &mut config)?;
    let model = ModelConfig::parse(&Json::Object(config.clone()).to_string())?;
    file.check_names(&model)?;
    Ok(Described { config, special, vocab: sizes.vocab, context: sizes.context })
}

/// What a family reads of a file.
struct Said<'a> {
    file: &'a File<'a>,
    biased: BTreeSet<&'static str>,
    blocks: usize,
}

impl GgufKeys for Said<'_> {
    fn number(&self, key: &str) -> Result<Option<f64>> {
        self.file.number(key)
    }

    fn count(&self, key: &str) -> Result<Option<usize>> {
        let count = self.file.keys.count_or_zero(&self.file.key(key))?;
        Ok(count.and_then(|count| usize::try_from(count).ok()).filter(|count| *count > 0))
    }

    fn truth(&self, key: &str) -> Result<Option<bool>> {
        self.file.keys.truth(&self.file.key(key))
    }

    fn pattern(&self, key: &str) -> Result<Option<Vec<bool>>> {
        let key = self.file.key(key);
        let Some(Value::List(_, values)) = self.file.keys.get(&key) else {
            let every = self.file.keys.count_or_zero(&key)?;
            let slides = |every: u64| {
                (0..self.blocks as u64).map(|b| every == 0 || b % every < every - 1).collect()
            };
            return Ok(every.map(slides));
        };
        let truth = |value: &Value| match value {
            Value::Bool(truth) => Some(*truth),
            other => other.as_u64().map(|number| number != 0),
        };
        let all: Option<Vec<bool>> = values.iter().map(truth).collect();
        match all.filter(|all| all.len() == self.blocks) {
            Some(all) => Ok(Some(all)),
            None => Err(Error::preflight(format!(
                "`{key}` is a list of {} values; a truth value for each of the {} blocks is needed",
                values.len(),
                self.blocks
            ))),
        }
    }

    fn biased(&self, part: &str) -> bool {
        self.biased.contains(part)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::path::Path;

    use fewbit_gguf::{BlockType, Header, Value, ValueKind};

    use super::*;
    use crate::model::Gguf;

    type Entries = Vec<(String, Value)>;
    type Shapes = Vec<(String, Vec<usize>)>;

    /// Two blocks, 12 pieces, heads of 4; a tokenizer of the kind with scores.
    fn plain() -> (Entries, Shapes) {
        let texts =
            ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "b", "ab", "▁a", "▁ab", "<t>", "c"];
        let kinds = [2, 3, 3, 6, 1, 1, 1, 1, 1, 1, 4, 1];
        let scores = [0.0, 0.0, 0.0, 0.0, -3.0, -4.0, -5.0, 0.0, -1.0, -2.0, 0.0, -6.0];
        let entries = [
            ("general.architecture", "llama".into()),
            ("llama.context_length", Value::U32(64)),
            ("llama.embedding_length", Value::U32(8)),
            ("llama.block_count", Value::U32(2)),
            ("llama.feed_forward_length", Value::U32(16)),
            ("llama.attention.head_count", Value::U32(2)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
            ("tokenizer.ggml.model", "llama".into()),
            ("tokenizer.ggml.tokens", Value::texts(texts.map(str::to_owned))),
            ("tokenizer.ggml.token_type", Value::integers(kinds)),
            ("tokenizer.ggml.scores", Value::floats(scores)),
        ];
        let mut shapes = vec![("token_embd.weight".to_owned(), vec![12, 8])];
        shapes.push(("output_norm.weight".to_owned(), vec![8]));
        for block in 0..2 {
            for (_, inner) in Gguf::of("llama").unwrap().parts() {
                let shape = match inner {
                    "attn_norm" | "ffn_norm" => vec![8],
                    "ffn_gate" | "ffn_up" => vec![16, 8],
                    "ffn_down" => vec![8, 16],
                    _ => vec![8, 8],
                };
                shapes.push((format!("blk.{block}.{inner}.weight"), shape));
            }
        }
        (entries.map(|(key, value)| (key.to_owned(), value)).into(), shapes)
    }

    /// The bytes of a file; every tensor is zero, except rotation factors.
    fn bytes(entries: Entries, shapes: &Shapes, factors: &[f32]) -> Vec<u8> {
        let mut header = Header::new();
        for (key, value) in entries {
            header.set(&key, value).unwrap();
        }
        for (name, shape) in shapes {
            header.announce(name, shape, BlockType::F32).unwrap();
        }
        let mut writer = header.start(Vec::new(), Path::new("x")).unwrap();
        for (name, shape) in shapes {
            let zeros = vec![0.0; shape.iter().product()];
            let values = if name == ROPE_FACTORS { factors } else { &zeros };
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            writer.write(name, &bytes).unwrap();
        }
        writer.finish().unwrap()
    }

    fn read(bytes: Vec<u8>) -> Result<BTreeMap<String, String>> {
        folder_files(&mut Reader::new(Cursor::new(bytes), Path::new("m.gguf"))?)
    }

    /// The files after a change; `None` for a value takes the key away.
    fn changed(
        keys: &[(&str, Option<Value>)],
        more: &[(&str, &[usize])],
        factors: &[f32],
    ) -> Result<BTreeMap<String, String>> {
        let (mut entries, mut shapes) = plain();
        for (key, value) in keys {
            entries.retain(|(name, _)| name != key);
            entries.extend(value.clone().map(|value| ((*key).to_owned(), value)));
        }
        for (name, shape) in more {
            shapes.retain(|(other, _)| other != name);
            if !shape.is_empty() {
                shapes.push(((*name).to_owned(), shape.to_vec()));
            }
        }
        read(bytes(entries, &shapes, factors))
    }

    fn config(files: &BTreeMap<String, String>) -> Json {
        serde_json::from_str(&files["config.json"]).unwrap()
    }

    #[test]
    fn a_plain_file_becomes_a_folder() {
        let (entries, shapes) = plain();
        let files = read(bytes(entries, &shapes, &[])).unwrap();
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
        );
        let config = config(&files);
        for (key, value) in [
            ("model_type", json!("llama")),
            ("intermediate_size", json!(16)),
            ("num_key_value_heads", json!(2)),
            ("head_dim", json!(4)),
            ("vocab_size", json!(12)),
            ("rms_norm_eps", json!(1e-5)),
            ("rope_theta", json!(1e4)),
            ("rope_scaling", Json::Null),
            ("tie_word_embeddings", json!(true)),
            ("attention_bias", json!(false)),
            ("bos_token_id", json!(1)),
            ("eos_token_id", json!(2)),
        ] {
            assert_eq!(config[key], value, "{key}");
        }
    }

    #[test]
    fn what_a_file_may_leave_out_or_add() {
        let u32s = |values: [u32; 2]| {
            Value::List(ValueKind::U32, values.into_iter().map(Value::U32).collect())
        };
        let files = changed(
            &[
                ("llama.feed_forward_length", None),
                ("llama.attention.head_count_kv", Some(u32s([1, 1]))),
                ("llama.rope.scaling.factor", Some(Value::F32(4.0))),
                ("llama.rope.freq_base", Some(Value::F32(5e5))),
                ("llama.expert_count", Some(Value::U32(0))),
                ("llama.some_new_note", Some("x".into())),
                ("tokenizer.ggml.eot_token_id", Some(Value::U32(10))),
                ("tokenizer.ggml.model", None),
            ],
            &[
                ("output.weight", &[12, 8]),
                ("blk.0.ffn_gate.bias", &[16]),
                ("blk.0.ffn_up.bias", &[16]),
                ("blk.0.ffn_down.bias", &[8]),
                ("blk.1.ffn_gate.bias", &[16]),
                ("blk.1.ffn_up.bias", &[16]),
                ("blk.1.ffn_down.bias", &[8]),
            ],
            &[],
        )
        .unwrap();
        assert_eq!(files.len(), 2, "no tokenizer");
        let config = config(&files);
        for (key, value) in [
            ("intermediate_size", json!(16)),
            ("num_key_value_heads", json!(1)),
            ("rope_theta", json!(5e5)),
            ("rope_scaling", json!({ "rope_type": "linear", "factor": 4.0 })),
            ("tie_word_embeddings", json!(false)),
            ("mlp_bias", json!(true)),
            ("bos_token_id", Json::Null),
            ("eos_token_id", json!(10)),
        ] {
            assert_eq!(config[key], value, "{key}");
        }
    }

    #[test]
    fn rotation_factors_become_a_scaling() {
        let files = changed(&[], &[(ROPE_FACTORS, &[2])], &[1.0, 8.0]).unwrap();
        let scaling = &config(&files)["rope_scaling"];
        assert_eq!((&scaling["rope_type"], &scaling["factor"]), (&json!("llama3"), &json!(8.0)));
        let linear = ("llama.rope.scaling.factor", Some(Value::F32(4.0)));
        for (keys, factors, part) in [
            (&[linear][..], [1.0, 8.0], "twice, by `llama.rope.scaling.factor`"),
            (&[], [8.0, 1.0], "factors of its own"),
        ] {
            let error = changed(keys, &[(ROPE_FACTORS, &[2])], &factors).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains(ROPE_FACTORS), "{error}");
            assert!(error.contains("m.gguf"), "{error}");
        }
    }

    #[test]
    fn keys_that_are_refused() {
        for (key, value, part) in [
            ("general.architecture", Some("mamba".into()), "`mamba` (general.architecture)"),
            ("general.architecture", None, "`general.architecture`"),
            ("general.type", Some("adapter".into()), "`adapter`"),
            ("split.count", Some(Value::U16(3)), "one of 3 parts"),
            ("llama.expert_count", Some(Value::U32(8)), "`llama.expert_count` is 8"),
            ("llama.attention.causal", Some(false.into()), "llama.attention.causal"),
            ("llama.block_count", None, "`llama.block_count`"),
            ("llama.block_count", Some(Value::U64(u64::MAX)), "lacks this tensor"),
            ("llama.block_count", Some(Value::U32(1)), "Llama of 1 blocks"),
            ("llama.attention.head_count", Some(Value::U32(3)), "no multiple of the 3 heads"),
            (
                "llama.attention.head_count_kv",
                Some(Value::U32(3)),
                "`llama.attention.head_count_kv`",
            ),
            ("llama.attention.value_length", Some(Value::U32(2)), "value_length` is 2"),
            ("llama.rope.dimension_count", Some(Value::U32(2)), "heads are 4 wide"),
            ("llama.embedding_length", Some(Value::U32(16)), "rows of 8"),
            ("llama.attention.layer_norm_rms_epsilon", Some(Value::F32(0.0)), "above 0"),
            ("llama.rope.scaling.type", Some("yarn".into()), "`yarn` (llama.rope.scaling.type)"),
            ("llama.rope.scaling.factor", Some(Value::F32(-2.0)), "factor` is -2"),
            ("tokenizer.ggml.model", Some("bert".into()), "`bert` (tokenizer.ggml.model)"),
            ("tokenizer.ggml.bos_token_id", Some(Value::U32(12)), "bos_token_id` is 12, beyond"),
        ] {
            let error = changed(&[(key, value)], &[], &[]).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("m.gguf"), "{key}: {error}");
        }
    }

    #[test]
    fn tensors_that_are_refused() {
        for (name, shape, part) in [
            ("token_embd.weight", &[][..], "lacks this tensor"),
            ("token_embd.weight", &[96], "no matrix"),
            ("token_embd.weight", &[4, 8], "has 12 pieces, but the model's vocabulary is 4"),
            ("blk.1.ffn_up.weight", &[], "lacks this tensor"),
            ("blk.0.attn_q_norm.weight", &[4], "no such tensor"),
            ("blk.2.attn_q.weight", &[8, 8], "no such tensor"),
            ("blk.00.attn_q.bias", &[8], "no such tensor"),
            ("blk.0.attn_q.scale", &[1], "no such tensor"),
            ("blk.0.attn_q.bias", &[8], "1 of 8 biases of attn_q, attn_k"),
        ] {
            let error = changed(&[], &[(name, shape)], &[]).unwrap_err().to_string();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    /// Whatever a byte of the metadata becomes, nothing panics.
    #[test]
    fn damaged_bytes_are_survived() {
        let (entries, shapes) = plain();
        let file = bytes(entries, &shapes, &[]);
        let end = file.windows(9).position(|w| w == b"blk.0.att").unwrap();
        for at in 0..end {
            for byte in [0, 1, 4, 9, 0x7f, 0x80, 0xff] {
                let mut damaged = file.clone();
                damaged[at] = byte;
                if let Err(error) = read(damaged) {
                    assert!(error.to_string().contains("m.gguf"), "{error}");
                }
            }
        }
    }
}
