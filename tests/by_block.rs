//! Where a training keeps its state changes no number: one tape through the model, or one block at a time
//! with the others on the device or in a file.
#![cfg(unix)] // runs are stopped by a signal
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use common::{Place, TRAIN};
use rustix::process::{Pid, Signal, kill_process};

const MODES: [&str; 4] = ["tape", "device", "host", "disk"];

/// A distillation on stories260k, with `keys` of its own.
fn stages(keys: &str) -> String {
    format!(
        r#"[[stage]]
[stage.distill]
bits = 2
method.seq = {{ start = "mse" }}
steps = 6
log_every = 1
checkpoint_every = 2
allow_worse = true
{keys}
"#
    )
}

/// What a run in this mode leaves: its codes and latents, and what it said of its steps.
fn left(keys: &str, memory: &str) -> (BTreeMap<String, Vec<u8>>, Vec<String>) {
    let place = Place::with_small_run(&stages(keys));
    let set = format!("stage.0.distill.memory=\"{memory}\"");
    let args: Vec<&str> = TRAIN.into_iter().chain(["--set", &set]).collect();
    place.ok(&args);
    let said = common::events(&place.path("run/metrics.jsonl"));
    let said =
        said.iter().filter(|event| event["event"] == "step" || event["event"] == "validation");
    let said = said.map(|event| {
        let mut event = event.clone();
        // What differs is how fast it was, and in how much memory.
        if let Some(values) = event["values"].as_object_mut() {
            values.retain(|tag, _| !tag.starts_with("perf/") && !tag.starts_with("memory/"));
        }
        event.as_object_mut().unwrap().retain(|key, _| key != "time" && key != "seconds");
        event.to_string()
    });
    (place.tree("run/checkpoints/00-distill"), said.collect())
}

fn same_everywhere(keys: &str) {
    let (codes, said) = left(keys, MODES[0]);
    assert!(!codes.is_empty() && said.iter().any(|line| line.contains("train/loss")), "{said:?}");
    for memory in &MODES[1..] {
        let (other, others) = left(keys, memory);
        assert_eq!(others, said, "{memory}, {keys}");
        assert!(other == codes, "{memory}, {keys}: other codes");
    }
}

#[test]
fn one_batch_a_step_gives_the_same_bits_everywhere() {
    same_everywhere(
        "objective.jsd = {}\nbatch = 3\nlearning_rate = 0.02\nrate_unit = \"grid\"\n\
         optimizer = { clip_norm = 0.05 }",
    );
}

#[test]
fn accumulated_batches_and_norms_of_blocks_give_the_same_bits_everywhere() {
    same_everywhere(
        "objective.kl_forward = {}\nbatch = 2\naccumulate = 3\nlearning_rate = 1e-3\n\
         optimizer = { clip_norm = 0.05, norm = \"block\", weight_decay = 0.01 }",
    );
}

#[test]
fn moments_in_8_bits_give_the_same_bits_everywhere() {
    same_everywhere(
        "objective.cakld = {}\nbatch = 2\nlearning_rate = 0.02\nrate_unit = \"grid\"\n\
         optimizer = { moments = \"int8\" }",
    );
}

/// Ends a run by SIGKILL behind its second saved state, and gives that.
fn killed(place: &Place, args: &[&str]) -> Vec<u8> {
    let mut run = place.command(args).stderr(std::process::Stdio::null()).spawn().unwrap();
    let second = place.path("run/checkpoints/00-distill/state-000002.safetensors");
    let began = Instant::now();
    while !second.exists() && run.try_wait().unwrap().is_none() {
        assert!(began.elapsed() < Duration::from_mins(2));
        std::thread::sleep(Duration::from_millis(1));
    }
    let _ = kill_process(Pid::from_child(&run), Signal::KILL);
    run.wait().unwrap();
    std::fs::read(second).unwrap()
}

#[test]
fn a_run_killed_in_one_mode_goes_on_in_another() {
    let stages = stages(
        "objective.jsd = {}\nbatch = 2\nlearning_rate = 0.02\nrate_unit = \"grid\"\nkeep = 99\n\
         optimizer = { moments = \"int8\" }",
    );
    let stages = stages.replace("steps = 6\n", "steps = 60\n");
    let whole = Place::with_small_run(&stages);
    whole.ok(&TRAIN);
    let expected = whole.tree("run/checkpoints/00-distill");
    let names: Vec<&String> = expected.keys().collect();
    assert!(names.iter().all(|name| name.starts_with("block-")), "{names:?}");
    let mut second = Vec::new();
    for (memory, then) in [("tape", "disk"), ("disk", "tape"), ("device", "disk")] {
        let place = Place::with_small_run(&stages);
        let set = [memory, then].map(|memory| format!("stage.0.distill.memory=\"{memory}\""));
        let args =
            |which: usize| TRAIN.into_iter().chain(["--set", &set[which]]).collect::<Vec<_>>();
        second.push(killed(&place, &args(0)));
        place.ok(&args(1));
        // A file without a name leaves nothing, however its process ended.
        assert!(place.tree("run/checkpoints/00-distill") == expected, "{memory}, then {then}");
    }
    assert!(second.windows(2).all(|pair| pair[0] == pair[1]), "a state is another one elsewhere");
}

#[test]
fn what_cannot_be_is_refused_before_it_begins() {
    let place = Place::with_small_run(&stages(
        "objective.jsd = {}\nlearning_rate = 0.02\nmemory = \"disk\"\non_policy = { share = 0.5 }",
    ));
    let error = place.refused(&["check", "--recipe", "recipe.toml"]);
    assert!(error.contains("on_policy needs the student whole"), "{error}");
    let place = Place::with_small_run(&stages(
        "objective.jsd = {}\nlearning_rate = 0.02\nmemory = \"dick\"",
    ));
    let error = place.refused(&["check", "--recipe", "recipe.toml"]);
    assert!(error.contains("disk"), "{error}");
}

/// The stages that look at calibration text, fitted in pieces and with inputs of both streams, so that every stream
/// there is gets read.
const STREAMS: &str = r#"[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 5
batch = 2
learning_rate = 1e-3
input_prob = 0.5
within = "staged"
allow_worse = true
[[stage]]
[stage.reconstruct]
bits = 2
method.seq = {}
objective.mse = { augmented = true }
steps = 3
learning_rate = 1e-3
allow_worse = true
"#;

/// The blocks that a run leaves with these settings of all its stages.
fn blocks(stages: &str, sets: &[&str]) -> BTreeMap<String, Vec<u8>> {
    let place = Place::with_small_run(stages);
    let sets = sets.iter().flat_map(|set| ["--set", *set]);
    place.ok(&TRAIN.into_iter().chain(sets).collect::<Vec<_>>());
    let left = place.tree("run/checkpoints");
    assert!(left.keys().all(|name| name.contains("block-")), "{:?}", left.keys());
    left
}

#[test]
fn hidden_states_in_a_file_give_the_same_bits_as_in_memory() {
    let places = |stage: usize, kind: &str, memory: &str| {
        format!("stage.{stage}.{kind}.memory=\"{memory}\"")
    };
    let of = |memory: &str, streams: &str| {
        let set = [0, 1].map(|stage| places(stage, "reconstruct", memory));
        let types = [0, 1].map(|stage| format!("stage.{stage}.reconstruct.streams=\"{streams}\""));
        let sets: Vec<&str> = set.iter().chain(&types).map(String::as_str).collect();
        blocks(STREAMS, &sets)
    };
    let (memory, disk) = (of("host", "f32"), of("disk", "f32"));
    assert!(!memory.is_empty() && memory == disk);
    let (short, short_disk) = (of("host", "bf16"), of("disk", "bf16"));
    assert!(short == short_disk && short != memory);
    for method in ["awq", "adadim", "gptq"] {
        let stage = format!("[[stage]]\n[stage.calibrate]\nmethod.{method} = {{}}\n");
        let of = |memory| blocks(&stage, &[places(0, "calibrate", memory).as_str()]);
        assert!(of("host") == of("disk"), "{method}");
    }
}

#[test]
fn hidden_states_have_two_places() {
    let stage = "[[stage]]\n[stage.calibrate]\nmethod.gptq = {}\nmemory = \"tape\"\n";
    let error = Place::with_small_run(stage).refused(&["check", "--recipe", "recipe.toml"]);
    assert!(error.contains("is for stages that train the whole model"), "{error}");
    assert!(error.contains("memory = \"host\" or \"disk\""), "{error}");
}
