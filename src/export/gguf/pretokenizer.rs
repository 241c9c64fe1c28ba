//! llama.cpp's names for the ways in which byte-level tokenizers cut text before merging.
//!
//! A GGUF file holds no expression, only a name that llama.cpp looks up; a way that has none cannot
//! be exported, and a name that fewbit does not know cannot be read, or text would silently be cut
//! differently.

use serde_json::{Value as Json, json};

use crate::error::{Error, Result};

/// How the contractions of English start the expressions of Llama 3 and its kin.
const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
/// Llama 3's expression for words, in front of the one for digits.
const WORDS: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
/// The rest of Llama 3's expression, after the one for digits.
const REST: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// One way of cutting, under all its names.
pub(super) struct Way {
    /// The first is the one that fewbit writes.
    names: &'static [&'static str],
    cut: Cut,
    /// Whether a whole word that is a piece is taken as it is, before merging.
    pub(super) whole_words: bool,
    /// Whether a text begins with the piece for it unless the file says otherwise.
    pub(super) begins: bool,
}

enum Cut {
    /// GPT-2's expression, which the byte-level step has built in.
    Gpt2,
    /// Digits one by one, then as GPT-2.
    Digits,
    /// Llama 3's expression with this part for digits.
    Llama3(&'static str),
}

static WAYS: [Way; 5] = [
    Way {
        names: &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "exaone4",
            "gigachat",
            "mellum",
            "a.x-4.0",
            "granite-docling",
        ],
        cut: Cut::Gpt2,
        whole_words: false,
        begins: false,
    },
    Way {
        names: &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        cut: Cut::Llama3(r"\p{N}{1,3}"),
        whole_words: true,
        begins: true,
    },
    Way {
        names: &["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"],
        cut: Cut::Llama3(r"\p{N}{1,3}"),
        whole_words: false,
        begins: false,
    },
    Way {
        names: &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "kormo",
            "grok-2",
        ],
        cut: Cut::Llama3(r"\p{N}"),
        whole_words: false,
        begins: false,
    },
    Way {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        cut: Cut::Digits,
        whole_words: false,
        begins: false,
    },
];

/// The name for a byte-level tokenizer's `pre_tokenizer`.
///
/// # Errors
/// When llama.cpp has none that fewbit knows.
pub(super) fn pre_name(tokenizer: &Json) -> Result<&'static str> {
    let pre = &tokenizer["pre_tokenizer"];
    let single = std::slice::from_ref(pre);
    let parts = pre["pretokenizers"].as_array().map_or(single, Vec::as_slice);
    let whole_words = tokenizer["model"]["ignore_merges"].as_bool().unwrap_or(false);
    let steps: Option<Vec<Step>> = parts.iter().map(Step::read).collect();
    let found = steps.and_then(|steps| {
        WAYS.iter().find(|way| way.whole_words == whole_words && way.steps() == steps)
    });
    found.map(|way| way.names[0]).ok_or_else(|| {
        let merging = if whole_words { ", whole words first" } else { "" };
        Error::preflight(format!(
            "llama.cpp has no name for the way this tokenizer cuts text ({}{merging})",
            types(pre).join(", ")
        ))
        .fix("a tokenizer that cuts text as GPT-2, Llama 3, Qwen 2 or SmolLM does")
    })
}

/// The way of a name in a file.
///
/// # Errors
/// When fewbit does not know the name: lists those it knows.
pub(super) fn way(name: &str) -> Result<&'static Way> {
    WAYS.iter().find(|way| way.names.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = WAYS.iter().flat_map(|way| way.names).copied().collect();
        Error::preflight(format!(
            "the file cuts text in a way named `{}` (tokenizer.ggml.pre), which fewbit does not know",
            name.escape_debug()
        ))
        .fix(format!("a file with one of these: {}", known.join(", ")))
    })
}

impl Way {
    /// The `pre_tokenizer` of a tokenizer.json.
    pub(super) fn pre_tokenizer(&self) -> Json {
        let mut steps: Vec<Json> = self.steps().iter().map(Step::json).collect();
        match steps.len() {
            1 => steps.swap_remove(0),
            _ => json!({ "type": "Sequence", "pretokenizers": steps }),
        }
    }

    fn steps(&self) -> Vec<Step> {
        let split = |expression: &str| Step::Split(expression.to_owned());
        match self.cut {
            Cut::Gpt2 => vec![Step::Bytes { splits: true }],
            Cut::Digits => vec![Step::Digits, Step::Bytes { splits: true }],
            Cut::Llama3(digits) => vec![
                split(&format!("{CONTRACTIONS}|{WORDS}|{digits}|{REST}")),
                Step::Bytes { splits: false },
            ],
        }
    }
}

/// One step of cutting, as far as these ways use them.
#[derive(Debug, Eq, PartialEq)]
enum Step {
    /// At every match of an expression, matches and gaps alike.
    Split(String),
    /// Every digit by itself.
    Digits,
    /// Stand-in letters for bytes, at the end; `splits` as GPT-2 does.
    Bytes { splits: bool },
}

impl Step {
    /// `None` for a step that no name of llama.cpp's covers, such as a space put in front.
    fn read(part: &Json) -> Option<Self> {
        match part["type"].as_str()? {
            "ByteLevel" if part["add_prefix_space"].as_bool() != Some(true) => {
                Some(Self::Bytes { splits: part["use_regex"].as_bool().unwrap_or(true) })
            }
            "Digits" if part["individual_digits"].as_bool() == Some(true) => Some(Self::Digits),
            "Split" if part["behavior"] == "Isolated" && part["invert"].as_bool() != Some(true) => {
                part["pattern"]["Regex"]
                    .as_str()
                    .map(|expression| Self::Split(expression.to_owned()))
            }
            _ => None,
        }
    }

    fn json(&self) -> Json {
        match self {
            Self::Split(expression) => json!({
                "type": "Split",
                "pattern": { "Regex": expression },
                "behavior": "Isolated",
                "invert": false,
            }),
            Self::Digits => json!({ "type": "Digits", "individual_digits": true }),
            Self::Bytes { splits } => json!({
                "type": "ByteLevel",
                "add_prefix_space": false,
                "trim_offsets": true,
                "use_regex": splits,
            }),
        }
    }
}

/// The types of a normalizer, pre-tokenizer, decoder or post-processor and of everything in it,
/// `Sequence` aside.
pub(super) fn types(part: &Json) -> Vec<&str> {
    let inner = ["normalizers", "pretokenizers", "decoders", "processors"];
    let own = part["type"].as_str().filter(|kind| *kind != "Sequence");
    let below = inner.iter().filter_map(|key| part[*key].as_array()).flatten().flat_map(types);
    own.into_iter().chain(below).collect()
}

#[cfg(test)]
mod tests {
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
            (vec![split(r"\p{N}{1,3}"), byte_level(false)], false, "smaug-bpe"),
            (vec![split(r"\p{N}"), byte_level(false)], false, "qwen2"),
            (vec![digits, byte_level(true)], false, "smollm"),
        ] {
            assert_eq!(pre_name(&tokenizer(&parts, ignores_merges)).unwrap(), name);
        }
        let alone = json!({ "pre_tokenizer": byte_level(true), "model": {} });
        assert_eq!(pre_name(&alone).unwrap(), "gpt-2");
    }

    #[test]
    fn names_lead_back() {
        let mut all: Vec<&str> = Vec::new();
        for known in &WAYS {
            let made = json!({
                "pre_tokenizer": known.pre_tokenizer(),
                "model": { "ignore_merges": known.whole_words },
            });
            assert_eq!(pre_name(&made).unwrap(), known.names[0]);
            all.extend(known.names);
            assert_eq!(way(known.names[known.names.len() - 1]).unwrap().names, known.names);
        }
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
        let error = way("default").err().unwrap().to_string();
        for part in ["`default`", "tokenizer.ggml.pre", "gpt-2, phi-2", "smollm"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn unknown_ways_are_refused() {
        let prefix = json!({ "type": "ByteLevel", "add_prefix_space": true });
        for (parts, ignores_merges) in [
            (vec![prefix], false),
            (vec![byte_level(false)], false),
            (vec![byte_level(true)], true),
            (vec![split(r"\p{N}+"), byte_level(false)], false),
            (vec![json!({ "type": "Whitespace" }), byte_level(true)], false),
        ] {
            let error = pre_name(&tokenizer(&parts, ignores_merges)).unwrap_err().to_string();
            assert!(error.contains("no name") && error.contains("GPT-2"), "{error}");
        }
    }
}
