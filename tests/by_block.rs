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

#[test]
fn latents_in_bf16_give_the_same_bits_everywhere() {
    same_everywhere(
        "objective.jsd = {}\nbatch = 2\nlearning_rate = 0.02\nrate_unit = \"grid\"\n\
         optimizer = { latents = \"bf16\", moments = \"int8\", norm = \"block\" }",
    );
    same_everywhere(
        "objective.kl_forward = {}\nbatch = 2\naccumulate = 2\nlearning_rate = 1e-3\n\
         optimizer = { latents = \"bf16\", clip_norm = 0.05 }",
    );
}

#[test]
fn a_teacher_that_was_asked_once_gives_the_same_bits_everywhere() {
    same_everywhere(
        "objective.jsd = { top_k = 16, tail = true }\nbatch = 3\nlearning_rate = 0.02\n\
         rate_unit = \"grid\"\nteacher = \"cached\"",
    );
}

/// The objective is the same whoever says what the teacher says.
#[test]
fn a_teacher_that_was_asked_once_says_what_it_says_at_each_step() {
    let objectives = [
        "jsd = { top_k = 16, tail = true }",
        "kl_forward = { top_k = 16, temperature = 2.0, tail = true }",
        "kl_reverse = { top_k = 16, tail = true }",
        "adaptive = { top_k = 16, tail = true }",
        "sum = [{ weight = 0.5, objective.cross_entropy = {} }, \
         { weight = 1.0, objective.cakld = { gamma = 0.5, top_k = 8 } }]",
    ];
    for objective in objectives {
        let keys = format!("objective.{objective}\nbatch = 3\nlearning_rate = 1e-4\n");
        let losses = |teacher: &str| -> Vec<f64> {
            let (_, said) = left(&format!("{keys}teacher = \"{teacher}\""), "device");
            let said = said.iter().map(|line| serde_json::from_str(line).unwrap());
            said.filter_map(|event: serde_json::Value| event["values"]["train/loss"].as_f64())
                .collect()
        };
        let (model, cached) = (losses("model"), losses("cached"));
        assert_eq!(model.len(), 6, "{objective}");
        for (step, (model, cached)) in model.iter().zip(&cached).enumerate() {
            // A weight may be rounded the other way behind a last bit, and steps go on from that.
            let near = if step == 0 { 1e-5 } else { 1e-2 };
            let far = (model - cached).abs() / model.abs();
            assert!(far < near, "{objective}, step {step}: {model} {cached}");
        }
    }
}

/// dtype and shape of each tensor of a safetensors file.
fn tensors(bytes: &[u8]) -> BTreeMap<String, (String, usize)> {
    let (len, rest) = bytes.split_at(8);
    let len = u64::from_le_bytes(len.try_into().unwrap()) as usize;
    let head: serde_json::Value = serde_json::from_slice(&rest[..len]).unwrap();
    let tensors = head.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__");
    let of = |(name, info): (&String, &serde_json::Value)| {
        let at = |i: usize| info["data_offsets"][i].as_u64().unwrap() as usize;
        (name.clone(), (info["dtype"].as_str().unwrap().to_owned(), at(1) - at(0)))
    };
    tensors.map(of).collect()
}

/// What a later stage goes on from, beside the codes.
fn is_latent(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("latent" | "step"))
}

/// What is trained in bf16 is saved so, steps stay f32, and a stage that learns nothing more leaves the codes
/// that it found.
#[test]
fn latents_in_bf16_are_saved_in_two_bytes_and_gone_on_from() {
    let keys = "objective.jsd = {}\nbatch = 2\nrate_unit = \"grid\"\n\
                optimizer = { latents = \"bf16\" }\n";
    let first = stages(&format!("{keys}learning_rate = 0.02"));
    let second = stages(&format!("{keys}learning_rate = 0.0")).replace("steps = 6", "steps = 1");
    let place = Place::with_small_run(&format!("{first}{second}"));
    place.ok(&TRAIN);
    let [first, second] = ["00-distill", "01-distill"].map(|stage| {
        std::fs::read(place.path("run/checkpoints").join(stage).join("block-0000.safetensors"))
            .unwrap()
    });
    let latents: Vec<_> = tensors(&first).into_iter().filter(|(name, _)| is_latent(name)).collect();
    let of = |dtype: &str| latents.iter().filter(|(_, (found, _))| found == dtype).count();
    assert_eq!((of("BF16"), of("F32")), (7, 7), "{latents:?}");
    let codes = |bytes: &[u8]| -> Vec<u8> {
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let head: serde_json::Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
        let named = head.as_object().unwrap().iter();
        let codes = named.filter(|(name, _)| *name != "__metadata__" && !is_latent(name));
        let ranges = codes.map(|(_, info)| {
            [0, 1].map(|i| info["data_offsets"][i].as_u64().unwrap() as usize + 8 + len)
        });
        ranges.flat_map(|[start, end]| bytes[start..end].to_vec()).collect()
    };
    assert!(codes(&first) == codes(&second), "other codes");
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
    killed_anywhere("objective.jsd = {}\noptimizer = { moments = \"int8\" }");
}

#[test]
fn a_run_with_latents_in_bf16_and_a_cached_teacher_goes_on_too() {
    let second = killed_anywhere(
        "objective.jsd = { top_k = 16, tail = true }\nteacher = \"cached\"\n\
         optimizer = { latents = \"bf16\", moments = \"int8\" }",
    );
    let latents = tensors(&second).into_iter().filter(|(name, _)| name.ends_with(".weight"));
    let latents: Vec<_> = latents.filter(|(name, _)| name.starts_with("param:")).collect();
    assert!(!latents.is_empty());
    assert!(latents.iter().all(|(_, (dtype, _))| dtype == "BF16"), "{latents:?}");
}

/// Gives a state that is saved on the way.
fn killed_anywhere(keys: &str) -> Vec<u8> {
    let stages = stages(&format!(
        "{keys}\nbatch = 2\nlearning_rate = 0.02\nrate_unit = \"grid\"\nkeep = 99",
    ));
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
        // A cache that lost its end, or was changed, is no obstacle.
        let cache = place.path("run/checkpoints/00-distill/teacher.cache");
        if let Ok(mut bytes) = std::fs::read(&cache) {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            bytes.truncate(middle + if memory == "tape" { 99 } else { middle });
            std::fs::write(&cache, bytes).unwrap();
        }
        place.ok(&args(1));
        // A file without a name leaves nothing, however its process ended.
        assert!(place.tree("run/checkpoints/00-distill") == expected, "{memory}, then {then}");
    }
    assert!(second.windows(2).all(|pair| pair[0] == pair[1]), "a state is another one elsewhere");
    second.swap_remove(0)
}

#[test]
fn what_cannot_be_is_refused_before_it_begins() {
    let place = Place::with_small_run(&stages(
        "objective.jsd = {}\nlearning_rate = 0.02\nmemory = \"disk\"\non_policy = { share = 0.5 }",
    ));
    let error = place.refused(&["check", "--recipe", "recipe.toml"]);
    assert!(error.contains("on_policy needs the student whole"), "{error}");
    let whole = "objective.jsd = {}\nlearning_rate = 0.02\nteacher = \"cached\"";
    let kept = "objective.jsd = { top_k = 8 }\nlearning_rate = 0.02\nteacher = \"cached\"";
    for (keys, said) in [
        (whole.to_owned(), "objective.jsd compares with all that the teacher knows"),
        (whole.replace("jsd = {}", "cakld = { top_k = 8 }"), "objective.cakld without gamma"),
        (whole.replace("jsd", "cross_entropy"), "has no teacher to keep"),
        (format!("{kept}\non_policy = {{}}"), "on_policy asks the teacher"),
    ] {
        let place = Place::with_small_run(&stages(&keys));
        let error = place.refused(&["check", "--recipe", "recipe.toml"]);
        assert!(error.contains(said), "{error}");
    }
    let bf16 = "objective.jsd = {}\nlearning_rate = 0.02\noptimizer = { latents = \"bf16\" }";
    for (stage, said) in [
        (stages(bf16).replace("seq = { start = \"mse\" }", "rtn = {}"), "learn"),
        (
            "[[stage]]\n[stage.reconstruct]\nbits = 2\nmethod.flexround = {}\nsteps = 2\n\
          optimizer = { latents = \"bf16\" }\nlearning_rate = 0.01\n"
                .to_owned(),
            "reconstruct keeps what it learns in f32",
        ),
    ] {
        let place = Place::with_small_run(&stage);
        let error = place.refused(&["check", "--recipe", "recipe.toml"]);
        assert!(error.contains(said), "{error}");
    }
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
