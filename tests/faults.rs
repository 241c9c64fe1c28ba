//! What goes wrong while a run goes on: numbers, memory, lost checkpoints, two processes in one folder.
#![cfg(unix)] // a shell that limits memory
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::{Ended, Place, TRAIN, events, few_stories, story};
use rustix::process::{Pid, Signal, kill_process};

const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4

[data]
validation.path = "few.json"
[data.calibration]
path = "embedded:tinystories/calibration.json"
samples = 8
length = 64
[data.train]
path = "embedded:tinystories/calibration.json"
length = 64

[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 24
learning_rate = 1e-2
[[stage]]
[stage.distill]
bits = 2
method.seq = { start = "mse" }
objective.kl_forward = {}
steps = 12
batch = 4
rate_unit = "grid"
learning_rate = 1e-2
[[stage]]
[stage.export]
format.fewbit = {}
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
"#;

fn prepared() -> Place {
    let place = Place::new();
    place.write("recipe.toml", RECIPE);
    place.write("few.json", few_stories(12));
    place
}

#[test]
fn a_block_that_diverges_is_fitted_again_at_lower_rates_and_then_named() {
    let place = prepared();
    let absurd = [&TRAIN[..], &["--set", "stage.0.reconstruct.learning_rate=1e30"]].concat();
    let refused = place.failed(&absurd);
    assert!(refused.starts_with("exit 1\n"), "{refused}");
    assert!(refused.contains("error: the block cannot be fitted, after 3 retries: "), "{refused}");
    assert!(refused.contains("became NaN (gradient of block."), "no tensor: {refused}");
    assert!(refused.contains(", row "), "no row: {refused}");
    assert!(refused.contains("\n  at   stage 0, block 0, step "), "{refused}");
    let warnings = events(&place.path("run/metrics.jsonl")).into_iter();
    let warnings: Vec<_> = warnings.filter(|event| event["event"] == "warning").collect();
    assert_eq!(warnings.len(), 3, "{warnings:?}");
    let last = warnings[2]["text"].as_str().unwrap();
    assert!(last.starts_with("block 1, step ") && last.ends_with("at 0.125 of the rate"), "{last}");
}

#[test]
fn a_block_that_got_worse_is_fitted_again_and_at_last_left_with_a_warning() {
    let told = |rate: &str| {
        let place = prepared();
        let rate = format!("stage.0.reconstruct.learning_rate={rate}");
        let worse = "stage.0.reconstruct.allow_worse=true";
        place.run(&[&TRAIN[..], &["--set", &rate, "--set", worse]].concat());
        let events = events(&place.path("run/metrics.jsonl")).into_iter();
        let texts = events.filter(|event| event["event"] == "warning");
        let texts = texts.map(|event| event["text"].as_str().unwrap().to_owned());
        texts.filter(|text| text.starts_with("block ")).collect::<Vec<_>>()
    };
    assert!(told("1e-2").is_empty(), "a healthy rate");
    let again = told("0.3");
    assert!(again[0].contains("it diverged: its loss on the first batch rose from"), "{again:?}");
    assert!(again[0].ends_with("fitted again from its start, at 0.5 of the rate"), "{again:?}");
    let left = told("3");
    assert!(left.iter().any(|text| text.ends_with(", at every rate")), "{left:?}");
}

#[test]
fn a_checkpoint_that_is_lost_or_damaged_costs_its_own_work_alone() {
    let place = prepared();
    place.ok(&TRAIN);
    let (files, told) = (place.tree("run/export"), story::metrics(&place));
    let measured = || story::record(&place)[1]["measured"].clone();
    let before = measured();
    let checkpoints = place.tree("run/checkpoints");
    let lost = "run/checkpoints/00-reconstruct/block-0001.safetensors";
    for lost in [lost, "run/checkpoints/01-distill/block-0000.safetensors"] {
        std::fs::remove_file(place.path(lost)).unwrap();
        place.ok(&TRAIN);
        assert!(place.tree("run/checkpoints") == checkpoints, "{lost}");
        assert!(place.tree("run/export") == files, "{lost}");
        assert_eq!(measured(), before, "{lost}");
        let again = story::metrics(&place);
        assert_eq!(again[..told.len()], told, "what was told before {lost} was lost stays");
    }
    // A damaged one is named, and the advice works.
    std::fs::remove_dir_all(place.path("run/export")).unwrap();
    let bytes = std::fs::read(place.path(lost)).unwrap();
    place.write(lost, &bytes[..bytes.len() - 9]);
    let refused = place.failed(&TRAIN);
    assert!(refused.contains(lost) && refused.contains("remove that file to repeat"), "{refused}");
    std::fs::remove_file(place.path(lost)).unwrap();
    place.ok(&TRAIN);
    assert!(place.tree("run/checkpoints") == checkpoints && place.tree("run/export") == files);
}

#[test]
fn memory_that_is_not_there_is_three_lines() {
    let place = prepared();
    let text = "embedded:tinystories/validation.json";
    let eval = ["eval", "--model", "embedded:tinystories-656k", "--data", text];
    let run = place.command(&eval);
    let mut shell = Command::new("sh");
    shell.args(["-c", "ulimit -v 250000; exec \"$0\" \"$@\""]).arg(run.get_program());
    shell.args(eval).env("HF_HUB_OFFLINE", "1").current_dir(place.path(""));
    let Ended { code, err, .. } = Ended::from(&shell.stdout(Stdio::null()).output().unwrap());
    assert_eq!(code, 4, "{err}");
    assert!(err.starts_with("error: out of memory: "), "{err}");
    assert!(err.contains(" MiB more were asked for\n") && err.contains("\n  try  "), "{err}");
}

#[test]
fn a_second_process_is_told_which_one_is_at_work_and_a_dead_one_is_none() {
    let place = prepared();
    std::fs::create_dir(place.path("run")).unwrap();
    // What a process of another machine or of an older fewbit left does not matter where locks work.
    place.write("run/.lock", r#"{"pid":1,"host":"elsewhere"}"#);
    let long = [&TRAIN[..], &["--set", "stage.0.reconstruct.steps=100000"]].concat();
    let mut command = place.command(&long);
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let pid = run.id();
    while !place.path("run/run.json").exists() {
        assert!(run.try_wait().unwrap().is_none(), "the run ended");
        std::thread::sleep(Duration::from_millis(2));
    }
    let second = place.run(&long);
    run.kill().unwrap();
    run.wait().unwrap();
    let who = format!("another fewbit process is working in this folder: process {pid} on ");
    assert!(second.code == 2 && second.err.contains(&who), "{}", second.err);
    // Killed: the next one takes the folder over.
    let next = place.run(&[&long[..], &["--dry-run"]].concat());
    assert_eq!(next.code, 0, "{}", next.err);
}

#[test]
fn a_signal_that_is_sent_twice_is_one_request_and_a_later_one_ends_at_once() {
    let long = "stage.0.reconstruct.steps=100000";
    let started = |place: &Place| {
        let mut command = place.command(&[&TRAIN[..], &["--set", long]].concat());
        let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let metrics = place.path("run/metrics.jsonl");
        let fits = || std::fs::read_to_string(&metrics).is_ok_and(|t| t.contains("block_loss"));
        while !fits() {
            assert!(run.try_wait().unwrap().is_none(), "the run ended");
            std::thread::sleep(Duration::from_millis(2));
        }
        run
    };
    let send = |run: &Child, signal| kill_process(Pid::from_child(run), signal);
    // As `timeout` does: to the process, and to its group.
    let place = prepared();
    let mut run = started(&place);
    for pause in [0, 0, 1, 5] {
        std::thread::sleep(Duration::from_millis(pause));
        // It may have ended before the last ones.
        let _ = send(&run, Signal::INT);
    }
    assert_eq!(run.wait().unwrap().code(), Some(130));
    assert!(place.path("run/checkpoints/00-reconstruct/state-000001.safetensors").exists());

    // One that does not get to look at its flag is ended by a second signal.
    std::fs::create_dir(place.path("model")).unwrap();
    let fifo = place.path("model/config.json");
    assert!(Command::new("mkfifo").arg(fifo).status().unwrap().success());
    let mut command = place.command(&["eval", "--model", "model", "--data", "few.json"]);
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(800));
    send(&run, Signal::INT).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    assert!(run.try_wait().unwrap().is_none(), "it waits for a config that never comes");
    send(&run, Signal::INT).unwrap();
    assert_eq!(run.wait().unwrap().signal(), Some(Signal::INT.as_raw()));
}
