//! The tokenizer's metadata, from `tokenizer.json` and `tokenizer_config.json`.
//!
//! llama.cpp knows two kinds of byte-pair encoding. `gpt2` works on bytes under stand-in letters
//! with a list of merges, after a split that is known by name only; `llama` works on characters with
//! `▁` for a space, and instead of merges it has a score per piece: two neighbours merge when their
//! union is a piece, best score first. Scores made from the order of merges give the same result as
//! long as every way to build a piece from two is a merge. Where something of the kind does not
//! carry over, `TokenizerMetadata::notes` says so.

use std::path::Path;

use fewbit_gguf::Value;
use serde_json::Value as Json;

use super::generation;
use super::pieces::{Merges, Pieces, TokenizerMetadata};
use super::pretokenizer::{pre_name, types};
use super::special::{put_special, put_templates};
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// Reads the tokenizer of the model folder `dir`.
///
/// # Errors
/// When a file cannot be read or is not JSON, and as [`from_json`].
pub fn read(dir: &Path, config: &ModelConfig) -> Result<TokenizerMetadata> {
    let path = dir.join("tokenizer.json");
    let tokenizer = read_json(&path)?;
    let settings_path = dir.join("tokenizer_config.json");
    let mut settings = if settings_path.exists() { read_json(&settings_path)? } else { Json::Null };
    // Newer folders keep the template in a file of its own, which wins.
    let template = dir.join("chat_template.jinja");
    if template.exists() {
        let text = std::fs::read_to_string(&template)
            .map_err(|source| Error::io("read", &template, &source))?;
        match &mut settings {
            Json::Object(map) => _ = map.insert("chat_template".to_owned(), Json::String(text)),
            other => *other = serde_json::json!({ "chat_template": text }),
        }
    }
    let mut made =
        from_json(&tokenizer, &settings, config).map_err(|error| error.at(path.display()))?;
    let generation = dir.join("generation_config.json");
    let generation = if generation.exists() { read_json(&generation)? } else { Json::Null };
    let eos = made.entries.iter().find(|(key, _)| key == EOS);
    let eos = eos.and_then(|(_, value)| u32::try_from(value.as_u64()?).ok());
    let (entries, notes) = generation::entries(&generation, config, eos);
    made.entries.extend(entries);
    made.notes.extend(notes);
    Ok(made)
}

/// The key of the token that ends a text.
const EOS: &str = "tokenizer.ggml.eos_token_id";

fn read_json(path: &Path) -> Result<Json> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::io("read", path, &source))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::preflight(format!("the file is not valid JSON: {error}")).at(path.display())
    })
}

/// The metadata of a parsed `tokenizer.json`; `settings` is `tokenizer_config.json` or null. The
/// vocabulary is filled up to the model's with unused pieces.
///
/// # Errors
/// When the tokenizer is not byte-pair encoding of one of the two kinds, has more ids than the
/// model, or splits text in a way that llama.cpp has no name for.
pub fn from_json(
    tokenizer: &Json,
    settings: &Json,
    config: &ModelConfig,
) -> Result<TokenizerMetadata> {
    let model = &tokenizer["model"];
    let kind = model["type"].as_str().unwrap_or("BPE");
    if kind != "BPE" || !model["merges"].is_array() {
        return Err(Error::preflight(format!(
            "the tokenizer is of type {kind}; GGUF export knows byte-pair encoding (BPE)"
        ))
        .fix("a model whose tokenizer.json is of type BPE"));
    }
    let mut pieces = Pieces::read(tokenizer, config.vocab)?;
    let merges = merges(&model["merges"])?;
    let mut made = TokenizerMetadata { entries: Vec::new(), notes: Vec::new() };
    if uses(tokenizer, "ByteLevel") {
        let pre = pre_name(tokenizer)?;
        made.set("model", "gpt2");
        made.set("pre", pre);
        pieces.put(&mut made);
        made.set("merges", joined(&merges)?);
        made.note_normalizers(tokenizer, &[]);
    } else if is_spaced(tokenizer) {
        made.set("model", "llama");
        made.set("pre", "default");
        pieces.mark_bytes(model);
        pieces.put(&mut made);
        made.set("scores", pieces.scores(&merges));
        made.set("add_space_prefix", adds_space(tokenizer));
        made.note_normalizers(tokenizer, &["Prepend", "Replace"]);
        made.note_splits(tokenizer);
        made.notes.extend(pieces.spaced_notes(&merges));
    } else {
        return Err(Error::preflight(
            "the tokenizer is neither byte-level (GPT-2, Llama 3) nor one with `▁` for spaces \
             (Llama 2)",
        )
        .fix("a model with one of these tokenizers"));
    }
    put_special(&mut made, tokenizer, settings, config, &pieces);
    put_templates(&mut made, settings);
    Ok(made)
}

impl TokenizerMetadata {
    /// Normalizers that llama.cpp does not apply.
    fn note_normalizers(&mut self, tokenizer: &Json, known: &[&str]) {
        let normalizer = &tokenizer["normalizer"];
        for kind in types(normalizer).into_iter().filter(|kind| !known.contains(kind)) {
            self.notes.push(format!(
                "llama.cpp does not apply the tokenizer's {kind} normalization: text that it \
                 changes is tokenized differently"
            ));
        }
    }

    /// Splits before merging, which the kind with scores does not have.
    fn note_splits(&mut self, tokenizer: &Json) {
        let splits = types(&tokenizer["pre_tokenizer"]);
        for kind in splits.into_iter().filter(|kind| *kind != "Metaspace") {
            self.notes.push(format!(
                "llama.cpp does not apply the tokenizer's {kind} split: some text may be cut \
                 differently there"
            ));
        }
    }
}

/// Pairs, best first, from either spelling: `["a", "b"]` or `"a b"`.
fn merges(list: &Json) -> Result<Merges<'_>> {
    let list = list.as_array().into_iter().flatten().enumerate();
    list.map(|(rank, merge)| {
        let pair = match merge {
            Json::String(text) => text.split_once(' '),
            Json::Array(parts) => match parts.as_slice() {
                [Json::String(left), Json::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        pair.ok_or_else(|| {
            Error::preflight(format!("merge {rank} of the tokenizer is no pair: {merge}"))
        })
    })
    .collect()
}

/// The one spelling of a GGUF file.
fn joined(merges: &Merges<'_>) -> Result<Value> {
    if let Some((left, right)) = merges.iter().find(|(l, r)| l.contains(' ') || r.contains(' ')) {
        return Err(Error::preflight(format!(
            "the merge of `{left}` and `{right}` has a space in it, which GGUF takes as the end of \
             the first"
        ))
        .fix("a tokenizer whose pieces have no plain spaces"));
    }
    Ok(Value::texts(merges.iter().map(|(left, right)| format!("{left} {right}"))))
}

fn uses(tokenizer: &Json, kind: &str) -> bool {
    ["pre_tokenizer", "decoder"].iter().any(|part| types(&tokenizer[*part]).contains(&kind))
}

/// Whether spaces become `▁`.
fn is_spaced(tokenizer: &Json) -> bool {
    let metaspace = uses(tokenizer, "Metaspace");
    metaspace || types(&tokenizer["normalizer"]).contains(&"Replace")
}

/// Whether a space is put before the text.
fn adds_space(tokenizer: &Json) -> bool {
    let prepends = types(&tokenizer["normalizer"]).contains(&"Prepend");
    let pre = &tokenizer["pre_tokenizer"];
    let single = std::slice::from_ref(pre);
    let mut parts = pre["pretokenizers"].as_array().map_or(single, Vec::as_slice).iter();
    prepends
        || parts.any(|part| {
            // Files of older versions say `add_prefix_space` instead.
            part["type"] == "Metaspace"
                && part["prepend_scheme"].as_str().map_or_else(
                    || part["add_prefix_space"].as_bool().unwrap_or(true),
                    |scheme| scheme != "never",
                )
        })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(vocab: usize) -> ModelConfig {
        let text = json!({
            "model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": vocab,
            "bos_token_id": 1, "eos_token_id": 2,
        });
        ModelConfig::parse(&text.to_string()).unwrap()
    }

    fn spaced() -> Json {
        json!({
            "added_tokens": [
                { "id": 0, "content": "<unk>", "special": true },
                { "id": 1, "content": "<s>", "special": true },
                { "id": 8, "content": "<tool>", "special": false },
            ],
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            ] },
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    { "SpecialToken": { "id": "<s>", "type_id": 0 } },
                    { "Sequence": { "id": "A", "type_id": 0 } },
                ],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
            },
            "model": {
                "type": "BPE", "byte_fallback": true, "unk_token": "<unk>",
                "vocab": {
                    "<unk>": 0, "<s>": 1, "<0x0A>": 2, "a": 3, "b": 4, "ab": 5, "aba": 6, "ba": 7,
                },
                "merges": [["a", "b"], ["b", "a"], ["ab", "a"], ["a", "ba"]],
            },
        })
    }

    fn get<'a>(made: &'a TokenizerMetadata, key: &str) -> Option<&'a Value> {
        let key = format!("tokenizer.ggml.{key}");
        made.entries.iter().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    #[test]
    fn characters_with_scores() {
        let made = from_json(&spaced(), &Json::Null, &config(10)).unwrap();
        assert_eq!(made.notes, [""; 0]);
        assert_eq!(get(&made, "model").unwrap().as_text(), Some("llama"));
        let tokens = get(&made, "tokens").unwrap().as_list().unwrap();
        assert_eq!((tokens.len(), tokens[9].as_text()), (10, Some("[PAD9]")));
        assert_eq!(
            get(&made, "token_type"),
            Some(&Value::integers([2, 3, 6, 1, 1, 1, 1, 1, 4, 5]))
        );
        let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.0, -1.0, 0.0, 0.0];
        assert_eq!(get(&made, "scores"), Some(&Value::floats(scores)));
        for (key, value) in [
            ("bos_token_id", Value::U32(1)),
            ("eos_token_id", Value::U32(2)),
            ("unknown_token_id", Value::U32(0)),
            ("add_bos_token", true.into()),
            ("add_eos_token", false.into()),
            ("add_space_prefix", true.into()),
        ] {
            assert_eq!(get(&made, key), Some(&value), "{key}");
        }
        assert_eq!(get(&made, "merges"), None);
    }

    #[test]
    fn what_scores_cannot_say_is_noted() {
        let mut tokenizer = spaced();
        tokenizer["model"]["merges"] = json!(["a b", "b a", "ab a"]);
        tokenizer["model"]["byte_fallback"] = json!(false);
        tokenizer["normalizer"]["normalizers"][0]["type"] = json!("NFKC");
        tokenizer["pre_tokenizer"] = json!({ "type": "Punctuation" });
        let made = from_json(&tokenizer, &Json::Null, &config(9)).unwrap();
        let notes = made.notes.join("\n");
        for part in ["NFKC", "Punctuation", "merge 1 pairs", "no byte pieces"] {
            assert!(notes.contains(part), "{part}: {notes}");
        }
        assert_eq!(get(&made, "add_space_prefix"), Some(&false.into()));
    }

    #[test]
    fn metaspace_may_prepend() {
        for (scheme, adds) in [("first", true), ("always", true), ("never", false)] {
            let mut tokenizer = spaced();
            tokenizer["normalizer"] = Json::Null;
            tokenizer["pre_tokenizer"] = json!({ "type": "Metaspace", "prepend_scheme": scheme });
            let made = from_json(&tokenizer, &Json::Null, &config(9)).unwrap();
            assert_eq!(get(&made, "add_space_prefix"), Some(&adds.into()), "{scheme}");
        }
    }

    #[test]
    fn bytes_with_merges() {
        let mut tokenizer = spaced();
        tokenizer["normalizer"] = Json::Null;
        tokenizer["post_processor"] = json!({ "type": "ByteLevel" });
        tokenizer["pre_tokenizer"] = json!({ "type": "ByteLevel", "add_prefix_space": false });
        let settings = json!({
            "add_bos_token": false, "add_eos_token": true, "bos_token": { "content": "<s>" },
            "eos_token": "ab", "pad_token": "<unk>",
        });
        let made = from_json(&tokenizer, &settings, &config(9)).unwrap();
        assert_eq!(get(&made, "model").unwrap().as_text(), Some("gpt2"));
        assert_eq!(get(&made, "pre").unwrap().as_text(), Some("gpt-2"));
        let merges = ["a b", "b a", "ab a", "a ba"].map(str::to_owned);
        assert_eq!(get(&made, "merges"), Some(&Value::texts(merges)));
        assert_eq!(get(&made, "scores"), None);
        for (key, value) in [
            ("eos_token_id", Value::U32(5)),
            ("padding_token_id", Value::U32(0)),
            ("add_bos_token", false.into()),
            ("add_eos_token", true.into()),
        ] {
            assert_eq!(get(&made, key), Some(&value), "{key}");
        }
        tokenizer["model"]["merges"][0] = json!(["a ", "b"]);
        assert!(
            from_json(&tokenizer, &settings, &config(9)).unwrap_err().to_string().contains("a ")
        );
    }

    #[test]
    fn what_is_no_pair_encoding_of_this_model_is_refused() {
        let refusal = |change: fn(&mut Json), vocab| {
            let mut tokenizer = spaced();
            change(&mut tokenizer);
            from_json(&tokenizer, &Json::Null, &config(vocab)).unwrap_err().to_string()
        };
        assert!(refusal(|t| t["model"]["type"] = json!("Unigram"), 9).contains("Unigram"));
        assert!(refusal(|_| (), 8).contains("`<tool>` is beyond the model's vocabulary of 8"));
        assert!(refusal(|t| t["model"]["merges"][1] = json!(["a"]), 9).contains("merge 1"));
        assert!(refusal(|t| t["normalizer"] = Json::Null, 9).contains("neither"));
        assert!(refusal(|t| *t = json!([]), 9).contains("BPE"));
    }
}
