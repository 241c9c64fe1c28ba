//! The small files of a Hugging Face folder, out of a GGUF file that another program wrote.
//!
//! Nothing is guessed: what a plain Llama does not have (experts, other norms, tensors of unknown
//! names, scalings that no `config.json` of the family expresses) is refused in a sentence.

use std::collections::BTreeMap;
use std::io::{Read, Seek};

use serde_json::{Value as Json, json};

use super::keys::{Keys, missing};
use super::llama::ROPE_FACTORS;
use super::reader::{Reader, TensorInfo};
use super::rotation;
use super::special::Special;
use super::vocabulary::Vocabulary;
use crate::error::{Error, Result};
use crate::model::RopeScaling;

const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";
/// Parts of a block that may carry biases: attention's, then the MLP's.
const ATTENTION: [&str; 4] = ["attn_q", "attn_k", "attn_v", "attn_output"];
const MLP: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];
/// Names of a block's parts.
const BLOCK_NAMES: [&str; 9] = [
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_output",
    "ffn_gate",
    "ffn_up",
    "ffn_down",
    "attn_norm",
    "ffn_norm",
];
const EPS: &str = "llama.attention.layer_norm_rms_epsilon";
const THETA: &str = "llama.rope.freq_base";
const PLAIN: &str = "a file of a plain Llama model";

/// The texts of `config.json`, `generation_config.json` and, where the file has a tokenizer,
/// `tokenizer.json` and `tokenizer_config.json`, by name. Which names stand in the map tells whether
/// there is a tokenizer: a file without one is not refused here.
///
/// The reader is mutable because a scaling of rotations may be stored as a tensor.
///
/// # Errors
/// When the model is not of llama.cpp's architecture `llama` or has something that a plain Llama
/// does not have, the tokenizer is of another kind than byte-pair encoding, or a metadata key is
/// missing or unusable: the key or the tensor is named.
pub fn folder_files<R: Read + Seek>(reader: &mut Reader<R>) -> Result<BTreeMap<String, String>> {
    let path = reader.path().to_owned();
    files(reader).map_err(|error| error.at(path.display()))
}

fn files<R: Read + Seek>(reader: &mut Reader<R>) -> Result<BTreeMap<String, String>> {
    check_kind(Keys(reader.metadata()))?;
    let has_factors = reader.tensors().contains_key(ROPE_FACTORS);
    let factors = has_factors.then(|| reader.read_f32(ROPE_FACTORS)).transpose()?;
    let (keys, tensors) = (Keys(reader.metadata()), reader.tensors());
    let sizes = Sizes::read(keys, tensors)?;
    let biases = check_tensors(tensors, sizes.blocks)?;
    let special = Special::read(keys, sizes.vocab)?;
    let scaling = scaling(keys, factors.as_deref(), &sizes)?;
    let tokenizer = Vocabulary::read(keys, &special, sizes.vocab)?;
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": sizes.context,
        "rms_norm_eps": sizes.eps,
        "rope_theta": sizes.theta,
        "rope_scaling": scaling_json(&scaling),
        "attention_bias": biases.attention,
        "mlp_bias": biases.mlp,
        "tie_word_embeddings": !tensors.contains_key(HEAD),
        "torch_dtype": "float32",
    });
    let mut generation = json!({});
    for file in [&mut config, &mut generation] {
        file["bos_token_id"] = json!(special.bos);
        file["eos_token_id"] = special.ends();
    }
    let mut files = vec![("config.json", config), ("generation_config.json", generation)];
    if let Some(tokenizer) = tokenizer {
        files.push(("tokenizer_config.json", tokenizer.settings(keys, sizes.context)?));
        files.push(("tokenizer.json", tokenizer.tokenizer()));
    }
    Ok(files.into_iter().map(|(name, file)| (name.to_owned(), pretty(name, &file))).collect())
}

/// A tokenizer is too long to be looked at.
fn pretty(name: &str, file: &Json) -> String {
    if name == "tokenizer.json" { file.to_string() } else { format!("{file:#}\n") }
}

/// Whether the file is a whole language model of the one supported architecture.
fn check_kind(keys: Keys<'_>) -> Result<()> {
    const ARCHITECTURE: &str = "general.architecture";
    let architecture = keys.text(ARCHITECTURE)?.ok_or_else(|| missing(ARCHITECTURE))?;
    if architecture != "llama" {
        return Err(Error::preflight(format!(
            "the file is of architecture `{}` ({ARCHITECTURE}); fewbit reads `llama`",
            architecture.escape_debug()
        ))
        .fix(PLAIN));
    }
    if let Some(kind) = keys.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(Error::preflight(format!(
            "the file is no model but of type `{}` (general.type)",
            kind.escape_debug()
        ))
        .fix(PLAIN));
    }
    if let Some(parts) = keys.count_or_zero("split.count")?.filter(|parts| *parts > 1) {
        return Err(Error::preflight(format!("the file is one of {parts} parts (split.count)"))
            .fix(
                "join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART JOINED_FILE",
            ));
    }
    // Settings that change what the model computes, with the value that changes nothing.
    for (key, neutral) in [
        ("expert_count", 0.0),
        ("attention.scale", 0.0),
        ("attention.sliding_window", 0.0),
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("logit_scale", 1.0),
        ("embedding_scale", 1.0),
        ("residual_scale", 1.0),
        ("rope.scaling.attn_factor", 1.0),
    ] {
        let key = format!("llama.{key}");
        // llama.cpp takes 0 as absent for every one of them.
        let changes = |value: &f64| *value != 0.0 && (value - neutral).abs() > 0.0;
        if let Some(value) = keys.number(&key)?.filter(changes) {
            return Err(Error::preflight(format!(
                "`{key}` is {value}, which a plain Llama does not have"
            ))
            .fix(PLAIN));
        }
    }
    match keys.truth("llama.attention.causal")? {
        Some(false) => Err(Error::preflight(
            "`llama.attention.causal` is false: the file is no language model",
        )
        .fix(PLAIN)),
        _ => Ok(()),
    }
}

struct Sizes {
    width: usize,
    inner: usize,
    blocks: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    context: usize,
    eps: f64,
    theta: f64,
}

impl Sizes {
    fn read(keys: Keys<'_>, tensors: &BTreeMap<String, TensorInfo>) -> Result<Self> {
        let width = keys.needed_count("llama.embedding_length")?;
        let heads = keys.needed_count("llama.attention.head_count")?;
        let kv_heads = keys.count("llama.attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::preflight(format!(
                "`llama.attention.head_count_kv` is {kv_heads}, which does not divide the {heads} \
                 heads of `llama.attention.head_count`"
            )));
        }
        let head_dim = match keys.count("llama.attention.key_length")? {
            Some(size) => size,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                return Err(Error::preflight(format!(
                    "`llama.embedding_length` is {width}, no multiple of the {heads} heads of \
                     `llama.attention.head_count`, and there is no `llama.attention.key_length`"
                )));
            }
        };
        for key in ["llama.attention.value_length", "llama.rope.dimension_count"] {
            if let Some(other) = keys.count(key)?.filter(|other| *other != head_dim) {
                return Err(Error::preflight(format!(
                    "`{key}` is {other}, but heads are {head_dim} wide; a Llama's are the same"
                ))
                .fix(PLAIN));
            }
        }
        let [vocab, columns] = matrix(tensors, EMBEDDING)?;
        if columns != width {
            return Err(Error::preflight(format!(
                "the tensor has rows of {columns}, but `llama.embedding_length` is {width}"
            ))
            .at(EMBEDDING));
        }
        let inner = match keys.count("llama.feed_forward_length")? {
            Some(inner) => inner,
            None => matrix(tensors, "blk.0.ffn_up.weight")?[0],
        };
        Ok(Self {
            width,
            inner,
            blocks: keys.needed_count("llama.block_count")?,
            heads,
            kv_heads,
            head_dim,
            vocab,
            context: keys.needed_count("llama.context_length")?,
            eps: positive(EPS, keys.number(EPS)?.ok_or_else(|| missing(EPS))?)?,
            theta: positive(THETA, keys.number(THETA)?.unwrap_or(10_000.0))?,
        })
    }
}

fn positive(key: &str, value: f64) -> Result<f64> {
    if value > 0.0 {
        return Ok(value);
    }
    Err(Error::preflight(format!("`{key}` is {value}; a number above 0 is needed")))
}

fn matrix(tensors: &BTreeMap<String, TensorInfo>, name: &str) -> Result<[usize; 2]> {
    let info = tensors.get(name).ok_or_else(|| lacks(name))?;
    <[usize; 2]>::try_from(info.shape.as_slice()).map_err(|_| {
        Error::preflight(format!("the tensor has shape {:?}, which is no matrix", info.shape))
            .at(name)
    })
}

fn lacks(name: &str) -> Error {
    Error::preflight("the file lacks this tensor, which every Llama has").at(name).fix(PLAIN)
}

/// Which linear layers have biases.
struct Biases {
    attention: bool,
    mlp: bool,
}

/// Every tensor of a plain Llama must be there, and no other.
fn check_tensors(tensors: &BTreeMap<String, TensorInfo>, blocks: usize) -> Result<Biases> {
    for name in [EMBEDDING, "output_norm.weight"] {
        tensors.get(name).ok_or_else(|| lacks(name))?;
    }
    // Ends at the first missing one, however many blocks are claimed.
    for block in 0..blocks {
        for inner in BLOCK_NAMES {
            let name = format!("blk.{block}.{inner}.weight");
            tensors.get(&name).ok_or_else(|| lacks(&name))?;
        }
    }
    let (mut attention, mut mlp) = (0, 0);
    for name in tensors.keys() {
        match place(name, blocks) {
            Some(Place::Weight) => {}
            Some(Place::AttentionBias) => attention += 1,
            Some(Place::MlpBias) => mlp += 1,
            None => {
                return Err(Error::preflight(format!(
                    "a plain Llama of {blocks} blocks has no such tensor, and fewbit does not know \
                     what it does"
                ))
                .at(name)
                .fix(PLAIN));
            }
        }
    }
    let all_or_none = |parts: &[&str], found: usize| {
        let all = parts.len() * blocks;
        if found != 0 && found != all {
            return Err(Error::preflight(format!(
                "{found} of {all} biases of {} are there; fewbit's Llama has all of them or none",
                parts.join(", ")
            ))
            .fix(PLAIN));
        }
        Ok(found > 0)
    };
    Ok(Biases { attention: all_or_none(&ATTENTION, attention)?, mlp: all_or_none(&MLP, mlp)? })
}

enum Place {
    Weight,
    AttentionBias,
    MlpBias,
}

fn place(name: &str, blocks: usize) -> Option<Place> {
    if [EMBEDDING, HEAD, "output_norm.weight", ROPE_FACTORS].contains(&name) {
        return Some(Place::Weight);
    }
    let (block, inner) = name.strip_prefix("blk.")?.split_once('.')?;
    // Written back, so that 007 is no block.
    let known = block.parse::<usize>().is_ok_and(|b| b < blocks && b.to_string() == block);
    let (inner, part) = inner.split_once('.').filter(|_| known)?;
    match part {
        "weight" if BLOCK_NAMES.contains(&inner) => Some(Place::Weight),
        "bias" if ATTENTION.contains(&inner) => Some(Place::AttentionBias),
        "bias" if MLP.contains(&inner) => Some(Place::MlpBias),
        _ => None,
    }
}

fn scaling(keys: Keys<'_>, factors: Option<&[f32]>, sizes: &Sizes) -> Result<RopeScaling> {
    const KIND: &str = "llama.rope.scaling.type";
    const FACTOR: &str = "llama.rope.scaling.factor";
    const OLD_FACTOR: &str = "llama.rope.scale_linear";
    let stretch = match keys.number(FACTOR)? {
        Some(factor) => (FACTOR, factor),
        None => (OLD_FACTOR, keys.number(OLD_FACTOR)?.unwrap_or(0.0)),
    };
    let linear = match keys.text(KIND)? {
        // llama.cpp reads a factor without a kind as linear, and a factor of 0 as none.
        None | Some("linear") if matches!(stretch.1, 0.0 | 1.0) => RopeScaling::Default,
        None | Some("linear") => RopeScaling::Linear { factor: positive(stretch.0, stretch.1)? },
        Some("none") => RopeScaling::Default,
        Some(other) => {
            return Err(Error::preflight(format!(
                "the file scales its rotations by `{}` ({KIND}); fewbit knows none, linear, and \
                 Llama 3.1's",
                other.escape_debug()
            ))
            .fix("a model with one of these"));
        }
    };
    let Some(factors) = factors else { return Ok(linear) };
    if linear != RopeScaling::Default {
        return Err(Error::preflight(format!(
            "the file scales its rotations twice, by `{}` and by this tensor",
            stretch.0
        ))
        .at(ROPE_FACTORS));
    }
    rotation::scaling(factors, sizes.theta, sizes.head_dim).map_err(|error| error.at(ROPE_FACTORS))
}

fn scaling_json(scaling: &RopeScaling) -> Json {
    match scaling {
        RopeScaling::Default
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Yarn { .. }
        | RopeScaling::Long { .. } => Json::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low, high, original } => json!({
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": whole(*original),
        }),
    }
}

/// A number of positions is written without a point where it is whole.
fn whole(value: f64) -> Json {
    if value.fract() == 0.0 && (0.0..9e15).contains(&value) {
        json!(value as u64)
    } else {
        json!(value)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::path::Path;

    use super::super::file::Header;
    use super::super::types::BlockType;
    use super::super::value::{Value, ValueKind};
    use super::*;

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
            for inner in BLOCK_NAMES {
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
            ("general.architecture", Some("qwen2".into()), "`qwen2` (general.architecture)"),
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
