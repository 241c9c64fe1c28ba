//! A run that takes over the first stages of another ends in the same bytes as one that does all of them.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, TRAIN, events};
use serde_json::Value;

const STAGES: &str = r#"
[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 5
batch = 2
learning_rate = 1e-2
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
baselines = ["float"]
[[stage]]
[stage.distill]
bits = 2
method.seq = {}
objective.jsd = {}
steps = 4
batch = 2
learning_rate = 1e-3
[[stage]]
[stage.export]
format.fewbit = {}
"#;
const OTHER_RATE: &str = "stage.2.distill.learning_rate=2e-3";

fn train(place: &Place, more: &[&str]) -> String {
    let arguments = [&TRAIN[..], more].concat();
    let out = place.command(&arguments).output().unwrap();
    format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr))
}

fn record(place: &Place, run: &str) -> Value {
    serde_json::from_slice(&std::fs::read(place.path(run).join("run.json")).unwrap()).unwrap()
}

#[test]
fn what_is_taken_over_is_what_would_have_been_made() {
    let place = Place::with_small_run(STAGES);
    train(&place, &["--output", "a"]);
    let from_start = ["--set", OTHER_RATE, "--output", "b"];
    train(&place, &from_start);
    let reusing = ["--set", OTHER_RATE, "--output", "c", "--reuse", "a"];
    let said = train(&place, &reusing);
    assert!(said.contains("stages 0 (reconstruct), 1 (evaluate) are those of a"), "{said}");
    assert!(said.contains("done"), "{said}");

    let files = ["model.safetensors", "manifest.json"].map(|name| format!("export/fewbit/{name}"));
    for file in files {
        let [b, c] = ["b", "c"].map(|run| std::fs::read(place.path(run).join(&file)).unwrap());
        assert!(b == c, "{file}");
    }
    let [mut b, mut c] = ["b", "c"].map(|run| record(&place, run));
    for (record, run) in [(&mut b, "b"), (&mut c, "c")] {
        let path = record["results"]["exports"][0]["path"].take();
        assert_eq!(path, format!("{run}/export/fewbit"));
    }
    assert_eq!(b["results"], c["results"]);
    assert_eq!((c["status"].as_str(), c["reused_from"].as_str()), (Some("done"), Some("a")));
    // Its story is the whole one, with each step once.
    let steps = |run: &str| -> Vec<Value> {
        let told = events(&place.path(run).join("metrics.jsonl"));
        let of = |event: &Value| matches!(event["event"].as_str(), Some("block" | "step"));
        let told = told.into_iter().filter(of);
        told.map(|event| serde_json::json!([event["event"], event["index"], event["step"]]))
            .collect()
    };
    assert_eq!(steps("b"), steps("c"));
    // The other run is as it was.
    assert_eq!(record(&place, "a")["status"], "done");
    assert!(train(&place, &["--output", "a"]).contains("already complete"));
    // And the same command says that it is complete.
    assert!(train(&place, &reusing).contains("already complete"));
}

#[test]
fn a_run_killed_while_it_takes_over_does_it_again() {
    let place = Place::with_small_run(STAGES);
    train(&place, &["--output", "a"]);
    let reusing = ["--set", OTHER_RATE, "--output", "c", "--reuse", "a"];
    train(&place, &reusing);
    let whole = record(&place, "c");
    // As it was before anything was taken over.
    let mut begun = whole.clone();
    begun["status"] = "pending".into();
    begun.as_object_mut().unwrap().remove("reused_from");
    begun["results"] = serde_json::json!({
        "measured": [], "exports": [], "block_mse": {}, "fold_difference": 0.0
    });
    for stage in begun["stages"].as_array_mut().unwrap() {
        stage["status"] = "pending".into();
        stage.as_object_mut().unwrap().remove("files");
    }
    std::fs::write(place.path("c").join("run.json"), begun.to_string()).unwrap();
    std::fs::remove_dir_all(place.path("c").join("export")).unwrap();
    std::fs::remove_dir_all(place.path("c").join("checkpoints/02-distill")).unwrap();
    std::fs::remove_file(place.path("c").join("checkpoints/00-reconstruct/block-0000.safetensors"))
        .unwrap();
    train(&place, &reusing);
    assert_eq!(record(&place, "c")["results"], whole["results"]);
}

#[test]
fn latent_weights_that_nobody_asks_for_are_in_nobodys_way_and_scales_are_taken_over() {
    let place = Place::with_small_run(STAGES);
    let scales = STAGES
        .replace(
            "[stage.distill]\nbits = 2\nmethod.seq = {}",
            "[stage.tune_scales]\nmethod.e2e_qp = {}",
        )
        .replace("steps = 4", "steps = 4\nallow_worse = true");
    let recipe = place.read("recipe.toml").replace(STAGES, &scales);
    place.write("scales.toml", recipe);
    train(&place, &["--output", "a"]);
    let scales = |more: &[&str]| {
        place.ok(&[&["train", "--recipe", "scales.toml", "--output"], more].concat());
        std::fs::read(place.path(more[0]).join("export/fewbit/model.safetensors")).unwrap()
    };
    assert!(scales(&["b"]) == scales(&["c", "--reuse", "a"]));
    // So are scales, with the adapter.
    let longer =
        ["train", "--recipe", "scales.toml", "--set", "stage.3.export.format.dequantized={}"];
    let ended = place.run(&[&longer[..], &["--output", "e", "--reuse", "b"]].concat());
    let said = ended.err;
    assert!(said.contains("2 (tune_scales) are those of b"), "{said}");
    let of = |run: &str, file: &str| std::fs::read(place.path(run).join(file)).unwrap();
    for file in ["export/fewbit/model.safetensors", "adapters/e2e_qp.safetensors"] {
        assert!(of("b", file) == of("e", file), "{file}");
    }
    // The other way round they are missing.
    let said = train(&place, &["--output", "d", "--reuse", "b"]);
    assert!(said.contains("latent weights, which its first stage did not leave"), "{said}");
}

#[test]
fn what_cannot_be_reused_is_refused_and_nothing_is_written() {
    let place = Place::with_small_run(STAGES);
    train(&place, &["--output", "a"]);
    let refused = |more: &[&str], what: &str| {
        let said = train(&place, more);
        assert!(said.contains(what), "{said}");
        assert!(!place.path("c").exists());
    };
    let reuse_a = ["--output", "c", "--reuse", "a", "--set"];
    let with = |set: &'static str| [&reuse_a[..], &[set]].concat();
    refused(&with("stage.0.reconstruct.steps=6"), "`steps = 5` became `steps = 6`");
    refused(&with("seed=1"), "nothing of that run can be reused: the recipe changed: `seed = 0`");
    refused(&["--output", "c", "--reuse", "nowhere"], "there is no run to reuse");
    let said = train(&place, &["--output", "a", "--fresh", "--reuse", "a"]);
    assert!(said.contains("a run cannot reuse itself"), "{said}");
    assert_eq!(record(&place, "a")["status"], "done");
}
