//! How often a training waits for its device: once for every log point, whatever the number of steps.
//!
//! Checked on the CPU in the form that devices without kernels of ours compute in, where a read counts as
//! theirs would (`ops::device_reads`).
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "common/mod.rs"]
mod common;

use std::fs;
use std::path::Path;

use fewbit::ops;
use fewbit::report::Reporters;
use fewbit::run::{self, Options};
use fewbit::stop::StopFlag;

/// Steps between log points.
const LOG_EVERY: u64 = 4;

const HEAD: &str = r#"
seed = 0
device = "cpu"
[model]
path = "embedded:tinystories-656k"
[data.calibration]
path = "embedded:tinystories/calibration.json"
samples = 8
length = 32
[data.train]
path = "embedded:tinystories/train.json"
length = 32
[data.validation]
path = "embedded:tinystories/validation.json"
[quant]
bits = 4
group_size = "channel"
"#;

/// The reads of a whole run of `stages` with so many steps.
fn reads(stages: &str, steps: u64) -> u64 {
    let dir = tempfile::tempdir().unwrap();
    let recipe = dir.path().join("recipe.toml");
    let stages = stages.replace("STEPS", &steps.to_string());
    let output = dir.path().join("run");
    let text = format!("output = '{}'\n{HEAD}{stages}", output.display());
    fs::write(&recipe, text).unwrap();
    let options = Options {
        recipe: recipe.display().to_string(),
        set: Vec::new(),
        output: None,
        device: None,
        fresh: false,
        probe: false,
        reuse: None,
        price_per_hour: None,
    };
    let before = ops::device_reads();
    ops::composed(|| run::train(&options, Reporters::new(Vec::new()), &StopFlag::default()))
        .unwrap();
    ops::device_reads() - before
}

/// What 12 more steps read.
fn more(stages: &str) -> u64 {
    reads(stages, 24) - reads(stages, 12)
}

const TRAINING: &str = "
batch = 2
checkpoint_every = 1000
log_every = 4
allow_worse = true
validate.every = 1000
optimizer.clip_norm = 1.0
";

#[test]
fn a_distillation_reads_once_for_every_log_point() {
    let stage = |keys: &str| {
        format!(
            "[[stage]]\n[stage.distill]\nbits = 2\nmethod.seq = {{}}\nobjective.jsd = {{}}\n\
             steps = STEPS\nlearning_rate = 1e-4\n{TRAINING}{keys}"
        )
    };
    assert_eq!(more(&stage("memory = \"tape\"")), 12 / LOG_EVERY);
    assert_eq!(more(&stage("memory = \"device\"")), 12 / LOG_EVERY);
    assert_eq!(more(&stage("optimizer.moments = \"int8\"\naccumulate = 2")), 12 / LOG_EVERY);
}

#[test]
fn tuned_scales_and_low_rank_factors_do_alike() {
    let tuned = "[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n[[stage]]\n[stage.tune_scales]\n\
                 method.peqa = {}\nobjective.cross_entropy = {}\nsteps = STEPS\nlearning_rate = 1e-4\n";
    assert_eq!(more(&format!("{tuned}{TRAINING}")), 12 / LOG_EVERY);
    let factors = "[[stage]]\n[stage.finetune]\nmethod.lora = { rank = 2 }\n\
                   objective.cross_entropy = {}\nsteps = STEPS\nlearning_rate = 1e-4\n";
    assert_eq!(more(&format!("{factors}{TRAINING}")), 12 / LOG_EVERY);
}

/// The curve of a block has fifty points; a step between two of them reads nothing.
#[test]
fn a_reconstruction_reads_once_for_every_point_of_its_curve() {
    let stage = "[[stage]]\n[stage.reconstruct]\nmethod.flexround = {}\nsteps = STEPS\nbatch = 2\n\
                 learning_rate = 1e-3\ncheckpoint_every = 1000\n";
    let blocks = 2;
    // Of 100 steps every other one is on it, and the last; of 150 every third.
    let points =
        |steps: u64| (0..steps).filter(|s| s % (steps / 50) == 0 || s + 1 == steps).count();
    let expected = blocks * (points(150) as u64 - points(100) as u64);
    assert_eq!(reads(stage, 150) - reads(stage, 100), expected);
}

/// Where numbers of a tensor come to the host, and why that is not inside of a step on a device.
const ALLOWED: [(&str, &str); 11] = [
    ("ops/numbers.rs", "the one place that counts"),
    ("ops/bridge.rs", "tensors that are this machine's memory"),
    ("ops/loss.rs", "targets, and upstream scalars, that are this machine's memory"),
    ("ops/moments.rs", "a state that is saved"),
    ("ops/forest.rs", "a test"),
    ("ops/stochastic.rs", "a test"),
    ("ops/likely.rs", "a teacher that is asked once, before the first step"),
    ("train/optim.rs", "where a gradient is no number, which is known on the CPU alone"),
    ("stage/step.rs", "none"),
    ("stage/batch.rs", "none"),
    ("stage/session.rs", "none"),
];

#[test]
fn nothing_else_of_a_step_reads() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    for layer in ["ops", "train", "objective"] {
        visit(&src.join(layer), &mut found);
    }
    for file in ["step", "batch", "session", "motion", "reconstruct/descent", "reconstruct/task"] {
        found.push(src.join("stage").join(file).with_extension("rs"));
    }
    for path in found {
        let name = path.strip_prefix(&src).unwrap().display().to_string();
        let text = fs::read_to_string(&path).unwrap();
        let reads =
            ["into_scalar", "into_data", "to_data()"].iter().any(|call| text.contains(call));
        let allowed = ALLOWED.iter().any(|(file, _)| name == *file);
        assert!(
            !reads || allowed,
            "{name} reads a tensor: by ops::Numbers it counts, and may wait"
        );
    }
}

fn visit(dir: &Path, found: &mut Vec<std::path::PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { visit(&path, found) } else { found.push(path) }
    }
}
