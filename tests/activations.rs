//! Quantized activations and KV cache from the recipe to a re-opened export, with the real binary.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, TRAIN, events, few_stories};
use serde_json::Value;

/// Around `[quant]` and a stage: embedded model, little data, both export formats.
const FRAME: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"

[data]
validation.path = "few.json"
calibration = { path = "text.json", samples = 8, length = 64 }
train = { path = "text.json", length = 64 }

[quant]
QUANT

[[stage]]
STAGE
[[stage]]
[stage.evaluate]
task.ppl = { context = 128 }
baselines = ["float", "rtn"]
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

const RTN: &str = "[stage.calibrate]\nmethod.rtn = {}";
const FLEXROUND: &str = "[stage.reconstruct]\nmethod.flexround = {}\nsteps = 12\nbatch = 4\n\
                         learning_rate = 1e-3";
const STATIC: &str = "activations.scheme = \"tensor\"";
const TOKEN: &str = "activations = { bits = 8, scheme = \"token\" }";

fn place(quant: &str, stage: &str) -> Place {
    let place = Place::new();
    place.write("recipe.toml", FRAME.replace("QUANT", quant).replace("STAGE", stage));
    place.write("few.json", few_stories(12));
    place.write("text.json", few_stories(40));
    place
}

fn trained(quant: &str, stage: &str) -> Place {
    let place = place(quant, stage);
    place.ok(&TRAIN);
    place
}

/// Perplexity of `what` in a run.
fn perplexity(place: &Place, what: &str) -> f64 {
    let events = events(&place.path("run/metrics.jsonl"));
    let found = events.iter().find(|event| event["event"] == "evaluation" && event["what"] == what);
    found.unwrap_or_else(|| panic!("no {what}"))["perplexity"].as_f64().unwrap()
}

fn manifest(place: &Place, format: &str) -> Value {
    serde_json::from_str(&place.read(&format!("run/export/{format}/manifest.json"))).unwrap()
}

fn eval(place: &Place, model: &str) -> f64 {
    let args = ["eval", "--model", model, "--data", "few.json", "--context", "128", "--json"];
    place.json(&[&args[..], &["--device", "cpu"]].concat())["perplexity"].as_f64().unwrap()
}

/// Every command that opens the run's exports does to activations what the run did.
fn exports_agree(place: &Place, trained: f64) {
    for format in ["fewbit", "dequantized"] {
        let folder = format!("run/export/{format}");
        assert_eq!(eval(place, &folder).to_bits(), trained.to_bits(), "{format}");
        let verified =
            place.json(&["verify", &folder, "--data", "few.json", "--device", "cpu", "--json"]);
        assert_eq!(verified["ok"], true, "{format}");
    }
}

#[test]
fn w8a8_on_fixed_grids_is_near_float_from_rtn_and_learned() {
    let rtn = trained(&format!("bits = 8\n{STATIC}\nkv_cache = {{}}"), RTN);
    let float = perplexity(&rtn, "float");
    let after = perplexity(&rtn, "after calibrate");
    assert!((after / float - 1.0).abs() < 0.02, "float {float}, rtn w8a8kv8 {after}");
    assert_eq!(perplexity(&rtn, "rtn w8a8kv8").to_bits(), after.to_bits());
    exports_agree(&rtn, after);

    let record = &manifest(&rtn, "fewbit")["activations"];
    assert_eq!(record, &manifest(&rtn, "dequantized")["activations"]);
    assert_eq!(record["activations"], serde_json::json!({ "bits": 8, "scheme": "tensor" }));
    assert_eq!(record["kv_cache"], serde_json::json!({ "bits": 8 }));
    let grids = record["grids"].as_array().unwrap();
    assert!(grids.iter().all(|grids| grids.as_object().unwrap().len() == 4), "{record}");
    let notes = rtn.read("run/metrics.jsonl");
    assert_eq!(notes.matches("as a dense model with float activations").count(), 1, "{notes}");

    let learned = trained(&format!("bits = 8\n{STATIC}\nkv_cache = {{}}"), FLEXROUND);
    let after = perplexity(&learned, "after reconstruct");
    assert!((after / float - 1.0).abs() < 0.02, "float {float}, flexround w8a8kv8 {after}");
    exports_agree(&learned, after);
    // The first block has the same inputs in both runs, and its first grid starts on their extremes.
    let first = |place: &Place| -> f64 {
        manifest(place, "fewbit")["activations"]["grids"][0]["attention"]["scale"].as_f64().unwrap()
    };
    let (started, ended) = (first(&rtn), first(&learned));
    assert_ne!(started.to_bits(), ended.to_bits(), "a learned grid does not move");
    assert!((ended / started - 1.0).abs() < 0.12, "{started} became {ended}: beyond 12 steps");
}

#[test]
fn w4a8_per_token_with_kv8_is_close_to_w4() {
    let plain = trained("bits = 4", RTN);
    let both = trained(&format!("bits = 4\n{TOKEN}\nkv_cache.bits = 8"), RTN);
    let float = perplexity(&both, "float");
    assert_eq!(float.to_bits(), perplexity(&plain, "float").to_bits(), "the float baseline moved");
    let [w4, w4a8] = [&plain, &both].map(|place| perplexity(place, "after calibrate"));
    assert_ne!(w4.to_bits(), w4a8.to_bits(), "activations stayed float");
    assert!((w4a8 / w4 - 1.0).abs() < 0.02, "w4 {w4}, w4a8kv8 {w4a8}");
    exports_agree(&both, w4a8);
    assert!(manifest(&plain, "fewbit").get("activations").is_none());

    // The KV cache alone, so coarse that it shows.
    let kv = trained("bits = 8\nkv_cache.bits = 2", RTN);
    let coarse = perplexity(&kv, "after calibrate");
    assert!(coarse > float * 1.02, "float {float}, kv2 {coarse}");
    exports_agree(&kv, coarse);
    // Token by token through the cache or in one pass: the text is the same model's.
    let prompt = ["--prompt", "Once upon a time", "--max-new-tokens", "12", "--device", "cpu"];
    let with = kv.ok(&[&["generate", "--model", "run"][..], &prompt].concat());
    let without = plain.ok(&[&["generate", "--model", "run"][..], &prompt].concat());
    assert!(!with.trim().is_empty() && with != without);
}

#[test]
fn weights_learn_without_token_grids_unless_asked() {
    let weights = |quant: &str, more: &str| -> (Value, f64) {
        let place = trained(quant, &format!("{FLEXROUND}\n{more}"));
        let after = perplexity(&place, "after reconstruct");
        exports_agree(&place, after);
        let manifest = manifest(&place, "fewbit");
        let last = &manifest["linears"]["model.layers.0.mlp.down_proj"]["weights_sha256"];
        (last.clone(), after)
    };
    // Coarse activations, so that learning with them differs in a few steps.
    let quant = "bits = 4\nactivations = { bits = 4, scheme = \"token\" }\nkv_cache.bits = 4";
    let (plain, w4) = weights("bits = 4", "");
    let (off, unaware) = weights(quant, "");
    let (on, aware) = weights(quant, "quantize_activations = true");
    assert_eq!(plain, off, "the first block learned with quantized activations");
    assert_ne!(plain, on, "quantize_activations = true did nothing");
    assert!(unaware > w4 && aware > w4);
}

#[test]
fn distillation_sees_the_grids_of_an_earlier_stage() {
    let distill = "[stage.distill]\nbits = 2\nmethod.seq = {}\nobjective.jsd = {}\nsteps = 4\n\
                   batch = 4\nlearning_rate = 1e-3";
    for quant in [STATIC, TOKEN] {
        let quant = format!("bits = 4\n{quant}\nkv_cache = {{}}");
        let place = trained(&quant, &format!("{RTN}\n[[stage]]\n{distill}"));
        exports_agree(&place, perplexity(&place, "after distill"));
    }
    let alone = place(&format!("bits = 4\n{STATIC}"), distill);
    let error = alone.refused(&TRAIN);
    assert!(error.contains("fixed grids of activations from an earlier stage"), "{error}");
}

#[cfg(unix)]
#[test]
fn learned_grids_survive_a_stop() {
    use std::process::Stdio;
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, Signal, kill_process};

    let quant = format!("bits = 8\n{STATIC}\nkv_cache = {{}}");
    let prepared = || {
        let place = place(&quant, &FLEXROUND.replace("= 12", "= 40"));
        let recipe = place.read("recipe.toml").replace("embedded:tinystories-656k", "model");
        place.write("recipe.toml", recipe);
        place.copy_model("stories260k", "model");
        place
    };
    let whole = prepared();
    whole.ok(&TRAIN);

    let stopped = prepared();
    let mut command = stopped.command(&TRAIN);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !stopped.path("run/checkpoints/00-reconstruct/block-0001.safetensors").exists() {
        assert!(start.elapsed() < Duration::from_mins(2), "no second block");
        std::thread::sleep(Duration::from_millis(2));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!stopped.path("run/checkpoints/00-reconstruct/block-0004.safetensors").exists());
    // The rest of the blocks, then an export that fails, then one from the saved grids alone.
    stopped.write("run/export", "in the way");
    assert_ne!(stopped.run(&TRAIN).code, 0);
    assert!(stopped.path("run/checkpoints/00-reconstruct/block-0004.safetensors").exists());
    std::fs::remove_file(stopped.path("run/export")).unwrap();
    stopped.ok(&TRAIN);
    assert!(whole.tree("run/export") == stopped.tree("run/export"), "resuming changed the export");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let refused = |quant: &str, stage: &str, code: u8, sentence: &str| {
        let error = place(quant, stage).refused_briefly(&TRAIN);
        assert!(error.starts_with(&format!("exit {code}\n")), "{error}");
        assert!(error.contains(sentence), "{error}");
    };
    refused("bits = 8\nactivations.scheme = \"tokn\"", RTN, 2, "token");
    refused("bits = 8\nactivations = { bits = 8 }", RTN, 2, "scheme");
    refused("bits = 8\nkv_cache.bits = 9", RTN, 2, "1..=8");
    refused("bits = 8\nkv_cache.scheme = \"token\"", RTN, 2, "scheme");
    let asked = format!("{FLEXROUND}\nquantize_activations = true");
    refused("bits = 8", &asked, 2, "quantize_activations = true");

    let without = place(&format!("bits = 8\n{STATIC}"), RTN);
    let recipe = without.read("recipe.toml");
    let recipe = recipe.lines().filter(|line| !line.starts_with("calibration"));
    without.write("recipe.toml", recipe.collect::<Vec<_>>().join("\n"));
    let error = without.refused_briefly(&TRAIN);
    assert!(error.contains("calibration"), "{error}");

    let check = place(&format!("bits = 8\n{STATIC}\nkv_cache = {{}}"), FLEXROUND);
    let plan = check.json(&["check", "--recipe", "recipe.toml", "--json"])["plan"].clone();
    assert!(plan.as_str().unwrap().contains("reconstruct(flexround, w8a8kv8)"), "{plan}");
}

#[test]
fn a_damaged_grid_is_found() {
    let place = trained(&format!("bits = 8\n{STATIC}"), RTN);
    let path = "run/export/fewbit/manifest.json";
    let mut whole = manifest(&place, "fewbit");
    let grids = whole["activations"]["grids"].as_array_mut().unwrap();
    grids[1].as_object_mut().unwrap().remove("mlp").unwrap();
    // As an earlier version would have written it, without a hash over itself.
    whole.as_object_mut().unwrap().remove("sha256").unwrap();
    place.write(path, whole.to_string());
    let error = place.refused(&["eval", "--model", "run", "--data", "few.json"]);
    assert!(error.contains("no usable grid") && error.contains("model.layers.1, mlp"), "{error}");
}
