//! llama.cpp's names for the ways in which byte-level tokenizers cut text before merging.
//!
//! A GGUF file holds no expression, only a name that llama.cpp looks up; a way that has none cannot
//! be exported, or text would silently be cut differently.

use serde_json::Value as Json;

use super::tokenizer::types;
use crate::error::{Error, Result};

/// How the contractions of English start the expressions of Llama 3 and its kin.
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/// Llama 3's expression for words, in front of the one for digits.
const WORDS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
/// The rest of Llama 3's expression, after the one for digits.
const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The name for a byte-level tokenizer's `pre_tokenizer`.
///
/// # Errors
/// When llama.cpp has none that fewbit knows.
pub(super) fn pre_name(tokenizer: &Json) -> Result<&'static str> {
    let pre = &tokenizer["pre_tokenizer"];
    let single = std::slice::from_ref(pre);
    let parts = pre["pretokenizers"].as_array().map_or(single, Vec::as_slice);
    let ignores_merges = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
    // Only the byte-level part's own expression counts as a split; a space in front is a thing
    // that no name of llama.cpp's covers.
    let plain = |part: &Json| part["add_prefix_space"].as_bool() != Some(true);
    let byte_level = |part: &Json, splits: bool| {
        part["type"] == "ByteLevel"
            && plain(part)
            && part["use_regex"].as_bool().unwrap_or(true) == splits
    };
    let name = match parts {
        [only] if byte_level(only, true) && !ignores_merges => Some("gpt-2"),
        [digits, last] if is_single_digits(digits) && byte_level(last, true) => {
            (!ignores_merges).then_some("smollm")
        }
        [split, last] if byte_level(last, false) => match digits_of_split(split) {
            // llama.cpp takes whole words that are pieces before merging for this name alone.
            Some(r"\p{N}{1,3}") if ignores_merges => Some("llama-bpe"),
            Some(r"\p{N}") if !ignores_merges => Some("qwen2"),
            _ => None,
        },
        _ => None,
    };
    name.ok_or_else(|| {
        let merging = if ignores_merges { ", whole words first" } else { "" };
        Error::preflight(format!(
            "llama.cpp has no name for the way this tokenizer cuts text ({}{merging})",
            types(pre).join(", ")
        ))
        .fix("a tokenizer that cuts text as GPT-2, Llama 3, Qwen 2 or SmolLM does")
    })
}

fn is_single_digits(part: &Json) -> bool {
    part["type"] == "Digits" && part["individual_digits"].as_bool() == Some(true)
}

/// The expression for digits within one of Llama 3's shape.
fn digits_of_split(part: &Json) -> Option<&str> {
    let isolated = part["type"] == "Split"
        && part["behavior"] == "Isolated"
        && part["invert"].as_bool() != Some(true);
    let expression = part["pattern"]["Regex"].as_str().filter(|_| isolated)?;
    let expression = expression.strip_prefix(CONTRACTIONS)?.strip_prefix('|')?;
    let expression = expression.strip_prefix(WORDS)?.strip_prefix('|')?;
    expression.strip_suffix(REST)?.strip_suffix('|')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn split(digits: &str) -> Json {
        let expression = format!("{CONTRACTIONS}|{WORDS}|{digits}|{REST}");
        json!({ "type": "Split", "behavior": "Isolated", "pattern": { "Regex": expression } })
    }

    fn byte_level(use_regex: bool) -> Json {
        json!({ "type": "ByteLevel", "add_prefix_space": false, "use_regex": use_regex })
    }

    fn tokenizer(parts: &[Json], ignores_merges: bool) -> Json {
        json!({
            "pre_tokenizer": { "type": "Sequence", "pretokenizers": parts },
            "model": { "ignore_merges": ignores_merges },
        })
    }

    #[test]
    fn known_ways() {
        let digits = json!({ "type": "Digits", "individual_digits": true });
        for (parts, ignores_merges, name) in [
            (vec![byte_level(true)], false, "gpt-2"),
            (vec![split(r"\p{N}{1,3}"), byte_level(false)], true, "llama-bpe"),
            (vec![split(r"\p{N}"), byte_level(false)], false, "qwen2"),
            (vec![digits, byte_level(true)], false, "smollm"),
        ] {
            assert_eq!(pre_name(&tokenizer(&parts, ignores_merges)).unwrap(), name);
        }
        let alone = json!({ "pre_tokenizer": byte_level(true), "model": {} });
        assert_eq!(pre_name(&alone).unwrap(), "gpt-2");
    }

    #[test]
    fn unknown_ways_are_refused() {
        let prefix = json!({ "type": "ByteLevel", "add_prefix_space": true });
        for (parts, ignores_merges) in [
            (vec![prefix], false),
            (vec![byte_level(false)], false),
            (vec![byte_level(true)], true),
            (vec![split(r"\p{N}{1,3}"), byte_level(false)], false),
            (vec![split(r"\p{N}+"), byte_level(false)], false),
            (vec![json!({ "type": "Whitespace" }), byte_level(true)], false),
        ] {
            let error = pre_name(&tokenizer(&parts, ignores_merges)).unwrap_err().to_string();
            assert!(error.contains("no name") && error.contains("GPT-2"), "{error}");
        }
    }
}
