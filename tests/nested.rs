//! One set of sign planes read at several widths, from the recipe to `--bits`.
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

[quant]
bits = 4
group_size = 64

[[stage]]
[stage.calibrate]
method.anybcq = { lowest = 2, rounds = 3 }
[[stage]]
[stage.evaluate]
bits = 2
task.ppl = { context = 64 }
[[stage]]
[stage.tune_scales]
bits = 2
method.alphatuning = { learn = "all_and_offset", relative = true }
objective.kl_forward = {}
steps = 6
batch = 4
learning_rate = 2e-2
[[stage]]
[stage.evaluate]
bits = 2
task.ppl = { context = 64 }
[[stage]]
[stage.evaluate]
bits = 3
task.ppl = { context = 64 }
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.export]
format.fewbit = {}
"#;

fn place() -> Place {
    let place = Place::new();
    place.write("recipe.toml", RECIPE);
    place.write("few.json", few_stories(12));
    place.write("text.json", few_stories(40));
    place
}

/// `[what, perplexity]` of every evaluation of the trained model.
fn measured(place: &Place) -> Vec<(String, f64)> {
    let events = common::events(&place.path("run/metrics.jsonl"));
    let all = events.iter().filter(|event| event["event"] == "evaluation");
    let all =
        all.map(|e| (e["what"].as_str().unwrap().to_owned(), e["perplexity"].as_f64().unwrap()));
    all.filter(|(what, _)| what != "float").collect()
}

fn logits(place: &Place, args: &[&str]) -> Vec<u8> {
    let all = [&["logits", "--tokens", "1,80,90", "--output", "l.safetensors"], args].concat();
    place.ok(&all);
    std::fs::read(place.path("l.safetensors")).unwrap()
}

#[test]
fn one_file_is_read_at_every_width() {
    let place = place();
    place.ok(&TRAIN);
    let found = measured(&place);
    let names: Vec<&str> = found.iter().map(|(what, _)| what.as_str()).collect();
    let tuned = "after tune_scales";
    assert_eq!(
        names,
        ["w2 after calibrate", "w2 after tune_scales", "w3 after tune_scales", tuned]
    );
    // Learning helps its width, and a wider model is a better one.
    assert!(found.windows(2).all(|pair| pair[1].1 < pair[0].1), "{found:?}");

    // What learned is the scales of two planes alone, and everything is as the manifest says.
    place.ok(&["verify", "run"]);
    let read = |path: &str| -> Value { serde_json::from_str(&place.read(path)).unwrap() };
    let manifest = read("run/export/fewbit/manifest.json");
    let name = "model.layers.0.self_attn.q_proj";
    let linear = &manifest["linears"][name];
    assert_eq!(linear["nested"], serde_json::json!([2, 3]));
    let stored = linear["sha256"].as_object().unwrap();
    for part in ["codes", "alphas", "offsets", "alphas_2", "offsets_2", "alphas_3", "offsets_3"] {
        assert!(stored.contains_key(&format!("{name}.{part}")), "{part}");
    }
    let inspected: Value = serde_json::from_str(&place.ok(&["inspect", "run", "--json"])).unwrap();
    assert_eq!(inspected["linears"][0]["widths"], serde_json::json!([2, 3, 4]));

    // A width alone is the same model, written as one.
    let model = "run/export/fewbit";
    let args = ["--bits", "2", "--format", "fewbit", "--output", "two"];
    place.ok(&[&["export", "--model", model], &args[..]].concat());
    place.ok(&["verify", "two"]);
    let [two, alone, four] = [
        logits(&place, &["--model", model, "--bits", "2"]),
        logits(&place, &["--model", "two"]),
        logits(&place, &["--model", model]),
    ];
    assert!(two == alone && two != four);

    // An adapter of that width is what the stage left.
    let adapter = "run/adapters/alphatuning_w2.safetensors";
    let with = logits(&place, &["--model", model, "--bits", "2", "--adapter", adapter]);
    assert!(with == two);
    let wider = ["logits", "--tokens", "1", "--output", "x", "--model", model];
    let refused = place.run(&[&wider[..], &["--adapter", adapter]].concat());
    assert_eq!(refused.code, 6, "{}", refused.err);

    // Evaluation sees the width, and the run's number.
    let eval = ["eval", "--model", model, "--task", "ppl", "--data", "few.json"];
    let eval = [&eval[..], &["--context", "64", "--bits", "2", "--json"]].concat();
    let told: Value = serde_json::from_str(&place.ok(&eval)).unwrap();
    assert!((told["perplexity"].as_f64().unwrap() / found[1].1 - 1.0).abs() < 1e-6, "{told}");

    // A packed folder goes on with one of its widths.
    let text = RECIPE.split("[[stage]]\n").collect::<Vec<_>>();
    let text = [text[0], text[3], text[5], text[7]].join("[[stage]]\n");
    let text = text.replace("objective.kl_forward = {}\n", "").replace("bits = 2", "bits = 3");
    place.write("more.toml", text);
    let model = format!("model.path={model}");
    let more = ["train", "--recipe", "more.toml", "--output", "more", "--set", &model];
    place.ok(&more);
    place.ok(&["verify", "more"]);
    let after = read("more/export/fewbit/manifest.json");
    let of = |manifest: &Value, part: &str| {
        manifest["linears"][name]["sha256"][format!("{name}.{part}")].clone()
    };
    for part in ["codes", "alphas", "alphas_2", "offsets_2"] {
        assert_eq!(of(&manifest, part), of(&after, part), "{part}");
    }
    assert_ne!(of(&manifest, "alphas_3"), of(&after, "alphas_3"));
}

#[test]
fn widths_that_are_not_there_are_refused() {
    let place = place();
    let refused = |set: &[&str], words: &[&str]| {
        let sets = set.iter().flat_map(|key| ["--set", key]);
        let args: Vec<&str> =
            ["check", "--recipe", "recipe.toml"].into_iter().chain(sets).collect();
        let ended = place.run(&args);
        assert_eq!(ended.code, 2, "{}", ended.err);
        assert!(words.iter().all(|word| ended.err.contains(word)), "{}", ended.err);
    };
    refused(&["stage.2.tune_scales.bits=1"], &["planes serve 2, 3, 4", "stage.2.tune_scales.bits"]);
    refused(&["stage.1.evaluate.bits=8"], &["one of 2, 3, 4"]);
    refused(&["stage.0.calibrate.method.anybcq.lowest=4"], &["lowest = 4 is not below bits = 4"]);
    let place = Place::new();
    place.write("recipe.toml", RECIPE.replace("anybcq = { lowest = 2, rounds = 3 }", "bcq = {}"));
    let ended = place.run(&["check", "--recipe", "recipe.toml"]);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("method.anybcq"), "{}", ended.err);
    // Linears of fewer widths are read at their widest beside the others.
    let place = self::place();
    let mixed =
        "\n[[quant.override]]\nmatch = \"attention\"\nbits = 3\n\n[[stage]]\n[stage.calibrate]";
    place.write("recipe.toml", RECIPE.replacen("\n[[stage]]\n[stage.calibrate]", mixed, 1));
    place.ok(&TRAIN);
    let model = "run/export/fewbit";
    assert!(
        logits(&place, &["--model", model, "--bits", "4"]) == logits(&place, &["--model", model])
    );
    assert!(
        logits(&place, &["--model", model, "--bits", "3"]) != logits(&place, &["--model", model])
    );
    let model = ["logits", "--tokens", "1", "--output", "x", "--bits", "2"];
    let model = [&model[..], &["--model", "embedded:tinystories-656k"]].concat();
    let ended = place.run(&model);
    assert_eq!(ended.code, 2, "{}", ended.err);
    assert!(ended.err.contains("there is one"), "{}", ended.err);
}
