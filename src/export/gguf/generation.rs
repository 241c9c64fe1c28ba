//! How a model generates: the tokens that end a text besides the first, and the defaults of sampling; the
//! `generation_config.json` of a folder, and `general.sampling.*` of a file.

use std::collections::BTreeSet;

use fewbit_gguf::Value;
use serde_json::{Value as Json, json};

use super::keys::Keys;
use crate::error::Result;
use crate::model::{ModelConfig, end_tokens};

/// Our keys and llama.cpp's, and whether a value is a whole number there.
const SAMPLING: [(&str, &str, bool); 5] = [
    ("temperature", "general.sampling.temp", false),
    ("top_k", "general.sampling.top_k", true),
    ("top_p", "general.sampling.top_p", false),
    ("min_p", "general.sampling.min_p", false),
    ("repetition_penalty", "general.sampling.penalty_repeat", false),
];

/// Where llama.cpp looks for further tokens that end a text.
const ENDS: [&str; 2] = ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"];

/// The metadata that a folder's `generation_config.json` comes to; `eos` is what the tokenizer ends a text
/// with. Notes say what a file has no place for.
pub(super) fn entries(
    generation: &Json,
    config: &ModelConfig,
    eos: Option<u32>,
) -> (Vec<(String, Value)>, Vec<String>) {
    let (mut entries, mut notes) = (Vec::new(), Vec::new());
    let ids = end_tokens(generation).into_iter();
    let ends: BTreeSet<u32> =
        ids.chain(config.eos.iter().copied()).filter(|id| (*id as usize) < config.vocab).collect();
    let mut others = ends.into_iter().filter(|id| Some(*id) != eos);
    for key in ENDS {
        entries.extend(others.next().map(|id| (key.to_owned(), Value::U32(id))));
    }
    let left: Vec<String> = others.map(|id| id.to_string()).collect();
    if !left.is_empty() {
        notes.push(format!(
            "a GGUF file has room for three tokens that end a text: {} is left out",
            left.join(", ")
        ));
    }
    if generation["do_sample"] == Json::Bool(false) {
        return (entries, notes);
    }
    for (ours, theirs, whole) in SAMPLING {
        let Some(number) = generation[ours].as_f64().filter(|number| number.is_finite()) else {
            continue;
        };
        let value = if whole { Value::I32(number as i32) } else { Value::F32(number as f32) };
        entries.push((theirs.to_owned(), value));
    }
    (entries, notes)
}

/// Puts what a file says of sampling into a `generation_config.json`.
///
/// # Errors
/// When a value is no number.
pub(super) fn read(keys: Keys<'_>, generation: &mut Json) -> Result<()> {
    for (ours, theirs, whole) in SAMPLING {
        let Some(number) = keys.number(theirs)? else { continue };
        generation[ours] = if whole { json!(number as i64) } else { json!(number) };
        generation["do_sample"] = json!(true);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        ModelConfig::parse(
            r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 20,
                "num_hidden_layers": 1, "num_attention_heads": 2, "eos_token_id": [7, 9]}"#,
        )
        .unwrap()
    }

    #[test]
    fn ends_and_sampling_come_back() {
        let generation = json!({
            "eos_token_id": [9, 12, 7], "do_sample": true, "temperature": 0.6, "top_k": 20,
            "top_p": 0.95, "repetition_penalty": 1.1,
        });
        let (entries, notes) = entries(&generation, &config(), Some(9));
        let key = |key: &str, value: Value| (key.to_owned(), value);
        assert_eq!(entries[0], key("tokenizer.ggml.eot_token_id", Value::U32(7)));
        assert_eq!(entries[1], key("tokenizer.ggml.eom_token_id", Value::U32(12)));
        assert_eq!(entries[2], key("general.sampling.temp", Value::F32(0.6)));
        assert_eq!(entries[3], key("general.sampling.top_k", Value::I32(20)));
        assert!(notes.is_empty());
        let mut back = json!({});
        read(Keys(&entries), &mut back).unwrap();
        for name in ["temperature", "top_k", "top_p", "repetition_penalty", "do_sample"] {
            assert_eq!(back[name], generation[name], "{name}");
        }
    }

    #[test]
    fn what_has_no_place_is_said() {
        let greedy =
            json!({ "eos_token_id": [1, 2, 3, 90], "do_sample": false, "temperature": 0.6 });
        let (entries, notes) = entries(&greedy, &config(), Some(9));
        assert_eq!(entries.len(), 2, "{entries:?}");
        assert!(notes[0].ends_with("3, 7 is left out"), "{notes:?}");
    }
}
