//! How much longer the steps of a `tokenizer.json` can make a text. A few hundred bytes of them, each
//! doubling what the one before gave, would fill any memory and never end.

use serde::Deserialize;
use serde_json::Value;

/// Most steps of all pipelines together; real ones have a dozen.
const MOST_STEPS: usize = 64;
/// How much longer a text may become; spaces as `▁` are 3 times, bytes as letters 2.
const MOST_GROWTH: f64 = 1024.0;

/// The parts of a `tokenizer.json` through which a text goes.
#[derive(Deserialize)]
struct Pipelines {
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    decoder: Value,
}

/// Says what is wrong with the steps of a `tokenizer.json`, if anything is. One that is no JSON is for
/// others to refuse.
pub(super) fn excess(json: &[u8]) -> Option<String> {
    let Pipelines { normalizer, pre_tokenizer, decoder } = serde_json::from_slice(json).ok()?;
    let [mut into, mut back] = [Vec::new(), Vec::new()];
    collect(&normalizer, &mut into);
    collect(&pre_tokenizer, &mut into);
    collect(&decoder, &mut back);
    let steps = into.len() + back.len();
    if steps > MOST_STEPS {
        return Some(format!("it has {steps} steps"));
    }
    let growth = |steps: &[&Value]| -> f64 { steps.iter().map(|step| growth(step)).product() };
    let most = growth(&into).max(growth(&back));
    (most > MOST_GROWTH).then(|| format!("it makes a text {most} times as long"))
}

/// The single steps of a sequence of sequences.
fn collect<'a>(step: &'a Value, steps: &mut Vec<&'a Value>) {
    let lists = ["normalizers", "pretokenizers", "decoders"].map(|key| step.get(key));
    match lists.into_iter().flatten().find_map(Value::as_array) {
        Some(list) => list.iter().for_each(|step| collect(step, steps)),
        None if step.is_object() => steps.push(step),
        None => {}
    }
}

fn growth(step: &Value) -> f64 {
    let kind = step.get("type").and_then(Value::as_str).unwrap_or_default();
    let content = step.get("content").and_then(Value::as_str).map_or(0, str::len) as f64;
    match kind {
        // The latter two put a space between any two letters where what they replace is empty.
        "ByteLevel" | "BPEDecoder" | "CTC" => 2.0,
        // A table of its own: one is usual, two pass.
        "Precompiled" => 32.0,
        "Replace" => match step.get("pattern").and_then(|pattern| pattern.get("String")) {
            Some(Value::String(pattern)) if !pattern.is_empty() => {
                (content / pattern.len() as f64).max(1.0)
            }
            // An expression may find nothing, between any two letters.
            _ => content + 1.0,
        },
        _ => 1.0,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn told(value: &Value) -> Option<String> {
        excess(value.to_string().as_bytes())
    }

    #[test]
    fn real_pipelines_pass_and_bombs_do_not() {
        let space = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let bytes = json!({"type": "ByteLevel"});
        let split = json!({"type": "Split", "pattern": {"Regex": "\\s+"}});
        let llama = json!({"type": "Sequence", "normalizers": [{"type": "Prepend"}, space]});
        let gpt = json!({"type": "Sequence", "pretokenizers": [split, split, split, bytes]});
        assert_eq!(told(&json!({"normalizer": llama, "pre_tokenizer": gpt})), None);
        assert_eq!(told(&json!({"normalizer": null, "model": {"vocab": {"a": 1}}})), None);
        assert_eq!(excess(b"{"), None);

        let twice = json!({"type": "Sequence", "pretokenizers": vec![bytes; 11]});
        assert!(told(&json!({"pre_tokenizer": twice})).unwrap().contains("2048 times"));
        let nested = json!({"type": "Sequence", "decoders": vec![twice; 6]});
        assert!(told(&json!({"decoder": nested})).unwrap().contains("66 steps"));
        let long =
            json!({"type": "Replace", "pattern": {"Regex": ""}, "content": "x".repeat(1024)});
        assert!(told(&json!({"normalizer": long})).unwrap().contains("1025 times"));
    }
}
