//! Additive codebooks from the recipe to a text: solved, learned on, stored, read back.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, TRAIN, few_stories};
use serde_json::Value;

const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"

[data]
validation.path = "few.json"
train = { path = "text.json", length = 64 }
calibration = { path = "text.json", samples = 8, length = 64 }

[quant]
bits = 2
group_size = 64
scales = "f16"

[[stage]]
[stage.calibrate]
method.aqlm = { vector = 2, code_bits = 4, rounds = 2, beam = 1 }
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.tune_scales]
method.aqlm_ft = {}
objective.kl_forward = {}
steps = 6
batch = 4
learning_rate = 1e-2
rate_unit = "grid"
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

const NAME: &str = "model.layers.0.self_attn.q_proj";

fn place() -> Place {
    let place = Place::new();
    place.write("recipe.toml", RECIPE);
    place.write("few.json", few_stories(12));
    place.write("text.json", few_stories(40));
    place
}

fn logits(place: &Place, args: &[&str]) -> Vec<u8> {
    let all = [&["logits", "--tokens", "1,80,90", "--output", "l.safetensors"], args].concat();
    place.ok(&all);
    std::fs::read(place.path("l.safetensors")).unwrap()
}

#[test]
fn what_was_trained_is_stored_and_read_everywhere() {
    let place = place();
    place.ok(&TRAIN);
    let events = common::events(&place.path("run/metrics.jsonl"));
    let measured: Vec<f64> = events
        .iter()
        .filter(|event| event["event"] == "evaluation" && event["what"] != "float")
        .map(|event| event["perplexity"].as_f64().unwrap())
        .collect();
    assert!(matches!(&measured[..], [solved, learned] if learned < solved), "{measured:?}");

    place.ok(&["verify", "run"]);
    place.ok(&["verify", "run/export/fewbit"]);
    let read = |path: &str| -> Value { serde_json::from_str(&place.read(path)).unwrap() };
    let manifest = read("run/export/fewbit/manifest.json");
    let linear = &manifest["linears"][NAME];
    let grid = serde_json::json!({"codebook": {"books": 1, "vector": 2, "code_bits": 4}});
    assert_eq!((&linear["grid"], &linear["bits"]), (&grid, &serde_json::json!(2)));
    let inspected: Value = serde_json::from_str(&place.ok(&["inspect", "run", "--json"])).unwrap();
    let linear =
        &inspected["linears"].as_array().unwrap().iter().find(|l| l["name"] == NAME).unwrap();
    // Codes, a short scale for 64 inputs, and 16 centroids of two short numbers in 128 x 128 weights.
    let bits = 2.0 + 16.0 / 64.0 + (16.0 * 16.0 * 2.0) / (128.0 * 128.0);
    assert!((linear["bits_per_weight"].as_f64().unwrap() - bits).abs() < 1e-9, "{linear}");
    assert_eq!(linear["histogram"].as_array().unwrap().len(), 16);
    assert!(place.ok(&["inspect", "run"]).contains("1 x 4 for 2"));

    // The folder, the dense one, and the base with the adapter are one model.
    let packed = logits(&place, &["--model", "run/export/fewbit"]);
    assert!(packed == logits(&place, &["--model", "run/export/dequantized"]));
    let eval = ["eval", "--model", "run/export/fewbit", "--task", "ppl", "--data", "few.json"];
    let eval = [&eval[..], &["--context", "64", "--json"]].concat();
    let told: Value = serde_json::from_str(&place.ok(&eval)).unwrap();
    assert!((told["perplexity"].as_f64().unwrap() / measured[1] - 1.0).abs() < 1e-6, "{told}");
    let solved = RECIPE.split("[[stage]]\n").collect::<Vec<_>>();
    place.write("solved.toml", [solved[0], solved[1], solved[5]].join("[[stage]]\n"));
    place.ok(&["train", "--recipe", "solved.toml", "--output", "solved"]);
    let adapter = ["--adapter", "run/adapters/aqlm_ft.safetensors"];
    let base = ["--model", "solved/export/fewbit"];
    assert!(packed != logits(&place, &base));
    assert!(packed == logits(&place, &[&base[..], &adapter[..]].concat()));

    // Text looks products up, and is what the dense folder writes.
    let text = |model: &str| {
        place.ok(&["generate", "--model", model, "--prompt", "Once upon", "--max-new-tokens", "12"])
    };
    assert_eq!(text("run/export/fewbit"), text("run/export/dequantized"));

    // Other formats say who holds it.
    for format in ["gguf", "gptq", "mlx", "bcq", "compressed_tensors"] {
        let ended = place.run(&["export", "--run", "run", "--format", format, "--output", "x"]);
        assert_eq!(ended.code, 3, "{format}: {}", ended.err);
        assert!(ended.err.contains("centroids of codebooks"), "{format}: {}", ended.err);
        assert!(ended.err.contains("format.fewbit"), "{format}: {}", ended.err);
        assert!(ended.err.contains("model.layers.0."), "{format}: {}", ended.err);
    }
}

#[test]
fn what_does_not_fit_is_refused_before_a_weight_is_read() {
    let place = place();
    let refused = |set: &[&str], words: &[&str]| {
        let sets = set.iter().flat_map(|key| ["--set", key]);
        let args: Vec<&str> =
            ["check", "--recipe", "recipe.toml"].into_iter().chain(sets).collect();
        let ended = place.run(&args);
        assert!([2, 3].contains(&ended.code), "{set:?}: {}", ended.err);
        assert!(words.iter().all(|word| ended.err.contains(word)), "{set:?}: {}", ended.err);
    };
    let key = |key: &str| format!("stage.0.calibrate.method.aqlm.{key}");
    let [bits, long, odd, none] = ["code_bits=8", "vector=16", "vector=3", "codebooks=0"].map(key);
    refused(&[&bits], &["1 codes of 8 bits for 2 weights are not bits = 2", "try  bits = 4"]);
    refused(&[&long], &["1 codes of 4 bits for 16 weights"]);
    refused(
        &[&odd, &key("code_bits=6")],
        &["vector = 3 does not divide group_size 64", "group_size = 66"],
    );
    refused(
        &[&odd, &key("code_bits=6"), "quant.group_size=\"channel\""],
        &["vector = 3 does not divide in_features 128", "vector = 2"],
    );
    refused(&[&none], &["codebooks = 0 is not in 1..=8"]);
    refused(&[&key("beam=17")], &["beam = 17"]);
    refused(&["quant.group_size=\"tensor\""], &["a scale for the whole matrix"]);
    refused(&["stage.4.export.format.gguf={}"], &["centroids of codebooks", "format.fewbit"]);
    refused(&["stage.2.tune_scales.method={peqa={}}"], &["peqa"]);
}
