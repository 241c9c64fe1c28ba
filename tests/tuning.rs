//! `tune_scales` as a user runs it: on codes of an earlier stage or of a packed folder, on text and
//! on examples, with and without a teacher.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, datasets, events, few_stories};
use serde_json::Value;

const HEAD: &str = r#"output = "run"
device = "cpu"
model.path = "model"
quant.bits = 4
[data]
validation.path = "few.json"
[data.train]
path = "text.json"
length = 64
"#;

const CALIBRATE: &str = "[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
const TUNE: &str = "[[stage]]\n[stage.tune_scales]\nmethod.peqa = {}\nsteps = 6\nbatch = 4\n\
                    learning_rate = 1e-3\nlog_every = 1\n";
const END: &str = "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 64 }\n\
                   [[stage]]\n[stage.export]\nformat.fewbit = {}\n";

fn place(stages: &[&str]) -> Place {
    let place = Place::new();
    place.write("recipe.toml", [&[HEAD], stages].concat().concat());
    place.write("few.json", few_stories(4));
    place.write("text.json", few_stories(30));
    place.copy_model("stories260k", "model");
    place
}

fn train(place: &Place, args: &[&str]) -> Vec<Value> {
    place.ok(&[&["train", "--recipe", "recipe.toml"], args].concat());
    events(&place.path("run/metrics.jsonl"))
}

fn losses(events: &[Value]) -> Vec<f64> {
    let steps = events.iter().filter(|event| event["event"] == "step");
    steps.map(|event| event["values"]["train/loss"].as_f64().unwrap()).collect()
}

fn perplexities(events: &[Value]) -> Vec<(String, f64)> {
    let measured = events.iter().filter(|event| event["event"] == "evaluation");
    measured
        .map(|e| (e["what"].as_str().unwrap().to_owned(), e["perplexity"].as_f64().unwrap()))
        .collect()
}

#[test]
fn a_packed_folder_is_a_base_as_good_as_the_stage_that_made_it() {
    let whole = place(&[CALIBRATE, TUNE, END]);
    let in_one_run = train(&whole, &[]);
    assert_eq!(losses(&in_one_run).len(), 6);

    let base = place(&[CALIBRATE, END]);
    train(&base, &[]);
    std::fs::rename(base.path("run/export/fewbit"), base.path("packed")).unwrap();
    base.write("recipe.toml", [HEAD, TUNE, END].concat());
    let on_base = train(&base, &["--fresh", "--set", "model.path=packed"]);
    // Data order depends on the stage's place in the recipe.
    assert_eq!(losses(&in_one_run).len(), losses(&on_base).len());
    // Without a float model there is nothing to compare with, and no baseline is measured.
    let names: Vec<String> = perplexities(&on_base).into_iter().map(|(what, _)| what).collect();
    assert_eq!(names, ["after tune_scales"]);
    base.ok(&["verify", "run"]);
    // The codes are the base's.
    let [codes, kept] = ["packed", "run/export/fewbit"].map(|dir| {
        let manifest: Value =
            serde_json::from_str(&base.read(&format!("{dir}/manifest.json"))).unwrap();
        let name = "model.layers.0.self_attn.q_proj";
        manifest["linears"][name]["sha256"][format!("{name}.codes")].clone()
    });
    assert!(codes.is_string() && codes == kept);

    // A teacher is found where it is named, and missed where it is not.
    let text = base.read("recipe.toml").replace("steps = 6", "objective.jsd = {}\nsteps = 2");
    base.write("jsd.toml", text);
    let packed = ["--set", "model.path=packed", "--output", "other"];
    let refused = base.run(&[&["train", "--recipe", "jsd.toml"], &packed[..]].concat());
    assert_eq!(refused.code, 2, "{}", refused.err);
    assert!(refused.err.contains("model.teacher"), "{}", refused.err);
    let teacher = ["--set", "model.teacher=model", "--fresh"];
    base.ok(&[&["train", "--recipe", "jsd.toml"], &packed[..], &teacher].concat());
    let events = events(&base.path("other/metrics.jsonl"));
    assert!(events.iter().any(|e| e["values"]["distill/jsd"].is_number()));
    assert!(perplexities(&events).iter().any(|(what, _)| what == "float"));
}

#[test]
fn micro_batches_add_up() {
    let one = losses(&train(&place(&[CALIBRATE, TUNE, END]), &[]));
    let key = |name: &str, value: u8| format!("stage.1.tune_scales.{name}={value}");
    let split = [key("batch", 2), key("accumulate", 2)];
    let split = ["--set", &split[0], "--set", &split[1]];
    let two = losses(&train(&place(&[CALIBRATE, TUNE, END]), &split));
    for (a, b) in one.iter().zip(&two) {
        assert!((a - b).abs() < 1e-4 * a, "{one:?} {two:?}");
    }
}

#[test]
fn adapters_carry_what_learned() {
    let place = place(&[CALIBRATE, TUNE, END]);
    let events = train(&place, &[]);
    let notes: Vec<&str> = events.iter().filter_map(|event| event["text"].as_str()).collect();
    // Seven linears of five blocks: 3000 output channels.
    assert!(notes.iter().any(|note| note.starts_with("3000 scales learn")), "{notes:?}");
    let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    assert_eq!(record["results"]["trainable"]["1"], 3000);
    let bytes = std::fs::metadata(place.path("run/adapters/peqa.safetensors")).unwrap().len();
    assert!((12_000..40_000).contains(&bytes), "{bytes}");
}

#[test]
fn examples_are_learned_where_they_are_supervised() {
    let place = place(&[CALIBRATE, TUNE, END]);
    let data = datasets().join("e2e_nlg");
    let text = std::fs::read_to_string(data.join("train.jsonl")).unwrap();
    let few: Vec<&str> = text.lines().take(40).collect();
    place.write("examples.jsonl", few.join("\n"));
    let [train_path, length, format] =
        ["data.train.path=examples.jsonl", "data.train.length=256", "data.train.format=completion"];
    let events = train(&place, &["--set", train_path, "--set", length, "--set", format]);
    let completions = losses(&events);
    assert!(completions[5] < completions[0], "{completions:?}");
}

#[test]
fn stages_that_cannot_follow_say_so() {
    let check =
        |stages: &[&str]| place(stages).refused_briefly(&["check", "--recipe", "recipe.toml"]);
    let text = check(&[TUNE, END]);
    assert!(text.starts_with("exit 2") && text.contains("goes on from uniform codes"), "{text}");
    let alpha = TUNE.replace("peqa", "alphatuning");
    let text = check(&[CALIBRATE, &alpha, END]);
    assert!(text.contains("binary_coding codes") && text.contains("uniform here"), "{text}");
    let rtn = TUNE.replace("peqa", "rtn");
    let text = check(&[CALIBRATE, &rtn, END]);
    assert!(text.contains("method.rtn makes codes"), "{text}");
    let name = format!("{TUNE}adapter.name = \"../x\"\n");
    let text = check(&[CALIBRATE, &name, END]);
    assert!(text.contains("is no name of a file"), "{text}");
    let mse = TUNE.replace("steps = 6", "objective.mse = {}\nsteps = 6");
    let text = check(&[CALIBRATE, &mse, END]);
    assert!(text.contains("compares block outputs"), "{text}");
}
