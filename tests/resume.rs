//! The resume law: stopped, killed and resumed in any way, a run ends in the same bytes.
#![cfg(unix)] // the law is about signals
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use std::path::PathBuf;
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use common::{Ended, Place, TRAIN, events, few_stories};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Five blocks to reconstruct, then a distillation, then scales to tune; long enough for a signal to
/// land inside.
const STAGES: &str = r#"
[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 25
batch = 4
learning_rate = 1e-2
[[stage]]
[stage.distill]
bits = 2
method.seq = {}
objective.jsd = {}
steps = 48
batch = 4
learning_rate = 1e-3
optimizer.moments = "int8"
checkpoint_every = 4
log_every = 1
[[stage]]
[stage.tune_scales]
method.peqa = {}
steps = 40
batch = 4
learning_rate = 1e-3
checkpoint_every = 4
log_every = 1
[[stage]]
[stage.evaluate]
task.ppl = { context = 64 }
[[stage]]
[stage.export]
format.fewbit = {}
"#;

/// Time for anything to happen in a run.
const PATIENCE: Duration = Duration::from_mins(2);
const STATE: &str = "run/checkpoints/01-distill/state-000001.safetensors";
const TUNING: &str = "run/checkpoints/02-tune_scales/state-000001.safetensors";

/// A place with the recipe, its model and its text.
fn prepared() -> Place {
    Place::with_small_run(STAGES)
}

/// A run in the background; killed when dropped, so that a failing test leaves nothing behind.
struct Background(Option<Child>);

impl Background {
    fn start(place: &Place) -> Self {
        let mut command = place.command(&TRAIN);
        Self(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// Waits until `ready`; fails when the run ends before.
    fn wait_for(&mut self, what: &str, mut ready: impl FnMut() -> bool) {
        let start = Instant::now();
        while !ready() {
            let ended = self.0.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() || ready(), "the run ended before {what}");
            assert!(start.elapsed() < PATIENCE, "no {what} in {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn signal(&self, signal: Signal) {
        let child = self.0.as_ref().unwrap();
        kill_process(Pid::from_child(child), signal).unwrap();
    }

    fn end(mut self) -> Output {
        self.0.take().unwrap().wait_with_output().unwrap()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Events of the run so far. The last line may be half written while the run goes on.
fn so_far(place: &Place) -> Vec<Value> {
    let text = std::fs::read_to_string(place.path("run/metrics.jsonl")).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Blocks that are reconstructed.
fn blocks(place: &Place) -> usize {
    so_far(place).iter().filter(|event| event["event"] == "block").count()
}

/// Steps of the distillation that are done.
fn steps(place: &Place) -> u64 {
    steps_of(place, 1)
}

fn steps_of(place: &Place, stage: usize) -> u64 {
    let steps = so_far(place);
    steps
        .iter()
        .filter(|event| event["event"] == "step" && event["stage"] == stage)
        .filter_map(|e| e["step"].as_u64())
        .max()
        .unwrap_or(0)
}

/// The steps of a stage in the order in which a run reported them.
fn all_steps(place: &Place, stage: usize) -> Vec<u64> {
    let events = so_far(place);
    let steps = events.iter().filter(|event| event["event"] == "step" && event["stage"] == stage);
    steps.filter_map(|event| event["step"].as_u64()).collect()
}

#[test]
fn a_training_that_fails_fails_alike_after_a_resume() {
    // A rate that no training survives: it goes back three times, then the run ends.
    let absurd = STAGES.replacen("learning_rate = 1e-3", "learning_rate = 1e30", 1);
    let place = || Place::with_small_run(&absurd);
    let setbacks = |place: &Place| {
        let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
        record["results"]["setbacks"].clone()
    };
    let undisturbed = place();
    let refused = undisturbed.failed(&TRAIN);
    assert!(refused.starts_with("exit 1\n"), "{refused}");
    assert!(refused.contains("after 3 retries\n  at   stage 1, distill, step "), "{refused}");
    let expected = setbacks(&undisturbed);
    assert_eq!(expected.as_array().unwrap().len(), 4, "{expected}");
    let factors = expected.as_array().unwrap().iter().map(|s| s["rate_factor"].as_f64().unwrap());
    assert_eq!(factors.collect::<Vec<_>>(), [0.5, 0.25, 0.125, 0.125]);

    // Why is kept, and once, however often it is tried.
    undisturbed.failed(&TRAIN);
    let told: Vec<Value> =
        so_far(&undisturbed).into_iter().filter(|event| event["event"] == "failed").collect();
    assert_eq!((told.len(), &told[0]["exit_code"]), (1, &Value::from(1)), "{told:?}");
    let record: Value = serde_json::from_str(&undisturbed.read("run/run.json")).unwrap();
    let why = record["failure"]["what"].as_str().unwrap();
    assert!(why.contains("after 3 retries") && told[0]["what"] == why, "{why}");
    assert!(undisturbed.read("run/run.log").contains(&format!("error: {why}\n  at ")));
    assert!(undisturbed.failed(&["watch", "run"]).contains(&format!("the run failed: {why}\n")));

    let stopped = place();
    let mut run = Background::start(&stopped);
    let retries = || so_far(&stopped).iter().filter(|event| event["event"] == "retry").count();
    run.wait_for("a retry", || retries() >= 1);
    run.signal(Signal::KILL);
    run.end();
    let refused = stopped.failed(&TRAIN);
    assert!(refused.contains("after 3 retries\n"), "{refused}");
    assert_eq!(setbacks(&stopped), expected);
    let state = |place: &Place| {
        let mut states = place.tree("run/checkpoints/01-distill").into_iter();
        states.rfind(|(name, _)| name.starts_with("state-")).unwrap().1
    };
    assert!(state(&stopped) == state(&undisturbed), "the training states differ");
}

fn block_file(place: &Place, index: usize) -> PathBuf {
    place.path(&format!("run/checkpoints/00-reconstruct/block-{index:04}.safetensors"))
}

/// The text a stopped run ends with.
fn stopped(output: &Output, code: i32) {
    let Ended { code: found, err, .. } = Ended::from(output);
    assert_eq!(found, code, "{err}");
    let lines: Vec<&str> = err.lines().rev().take(2).collect();
    assert_eq!(lines[1], "error: stopped by a signal");
    let advice = "  try  the same command to go on from the last checkpoint";
    assert_eq!(lines[0], advice, "{err}");
}

fn status(place: &Place) -> Value {
    serde_json::from_str::<Value>(&place.read("run/run.json")).unwrap()["status"].take()
}

/// The whole export of a finished run, byte for byte, manifest and adapter included.
fn exported(place: &Place) -> std::collections::BTreeMap<String, Vec<u8>> {
    assert_eq!(status(place), "done");
    let export = place.tree("run/export/fewbit");
    assert!(export.contains_key("model.safetensors") && export.contains_key("manifest.json"));
    let adapters = place.tree("run/adapters");
    assert!(adapters.contains_key("peqa.safetensors"));
    export.into_iter().chain(adapters).collect()
}

/// Positions from which a run said that it went on.
fn resumed(place: &Place) -> Vec<String> {
    let events = events(&place.path("run/metrics.jsonl"));
    let resumed = events.iter().filter(|event| event["event"] == "resumed");
    resumed.map(|event| event["position"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn however_a_run_is_stopped_it_ends_in_the_same_bytes() {
    let undisturbed = prepared();
    undisturbed.ok(&TRAIN);
    let expected = exported(&undisturbed);

    let twin = prepared();
    twin.ok(&TRAIN);
    assert!(exported(&twin) == expected, "two runs of one recipe differ");

    let asked = prepared();
    stop_in_reconstruct(&asked);
    stop_in_distill(&asked);
    stop_in_tuning(&asked);
    asked.ok(&TRAIN);
    assert!(exported(&asked) == expected, "SIGINT, SIGTERM and resuming changed the export");
    assert!(!asked.path(TUNING).exists(), "the training state is gone when it is not needed");
    assert!(!asked.path(STATE).exists(), "the training state is gone when it is not needed");

    let killed = prepared();
    kill_in_distill(&killed);
    // As a run leaves it that was killed before this was written.
    std::fs::remove_file(killed.path("run/recipe.toml")).unwrap();
    killed.ok(&TRAIN);
    assert_eq!(killed.read("run/recipe.toml"), undisturbed.read("run/recipe.toml"));
    assert!(exported(&killed) == expected, "SIGKILL and resuming changed the export");
    assert_eq!(all_steps(&killed, 1), (1..=48).collect::<Vec<_>>(), "a step stands there twice");
    assert_eq!(all_steps(&asked, 2), (1..=40).collect::<Vec<_>>(), "a step stands there twice");
    let position = resumed(&killed).pop().unwrap();
    let step: u64 = position["step ".len()..].split('/').next().unwrap().parse().unwrap();
    assert!(
        step > 0 && step.is_multiple_of(4),
        "resumed at {position}, no checkpoint stands there"
    );
}

/// Codebooks and scales that learn by block, long enough for a signal to land inside of one.
const CODEBOOKS: &str = r#"
[[stage]]
[stage.calibrate]
method.aqlm = { vector = 1, code_bits = 4, rounds = 1, beam = 1 }
[[stage]]
[stage.reconstruct]
method.aqlm_ft = {}
steps = 60
batch = 4
learning_rate = 1e-2
rate_unit = "grid"
checkpoint_every = 4
keep_best = true
[[stage]]
[stage.export]
format.fewbit = {}
"#;

#[test]
fn codebooks_go_on_in_the_middle_of_a_block() {
    let place = || Place::with_small_run(CODEBOOKS);
    let block = |place: &Place, index: usize| {
        place.path(&format!("run/checkpoints/01-reconstruct/block-{index:04}.safetensors"))
    };
    let whole = place();
    whole.ok(&TRAIN);

    let asked = place();
    let has_state = || {
        let files = asked.tree("run/checkpoints/01-reconstruct");
        files.keys().any(|name| name.starts_with("state-"))
    };
    let mut run = Background::start(&asked);
    run.wait_for("a fitted block", || block(&asked, 0).exists() && !has_state());
    run.wait_for("a state of the next", has_state);
    run.signal(Signal::TERM);
    stopped(&run.end(), 143);
    assert!(!block(&asked, 4).exists(), "the stage ended before the signal");
    asked.ok(&TRAIN);
    let position = resumed(&asked).pop().unwrap();
    assert!(position.starts_with("block ") && position.contains("/5, step "), "{position}");
    for index in 0..5 {
        let [asked, whole] = [&asked, &whole].map(|place| std::fs::read(block(place, index)));
        assert!(asked.unwrap() == whole.unwrap(), "block {index} differs");
    }
    assert!(asked.tree("run/export") == whole.tree("run/export"));
}

fn stop_in_reconstruct(place: &Place) {
    let mut run = Background::start(place);
    run.wait_for("two blocks", || blocks(place) >= 2);
    run.signal(Signal::INT);
    stopped(&run.end(), 130);
    assert_eq!(status(place), "stopped");
    assert!(block_file(place, 1).exists() && !block_file(place, 4).exists());
}

fn stop_in_distill(place: &Place) {
    let mut run = Background::start(place);
    run.wait_for("distillation steps", || steps(place) >= 6);
    run.signal(Signal::TERM);
    stopped(&run.end(), 143);
    assert_eq!(status(place), "stopped");
    assert!(place.path(STATE).exists() && steps(place) < 48);
    let state = std::fs::read(place.path(STATE)).unwrap();
    let holds = |name: &str| state.windows(name.len()).any(|window| window == name.as_bytes());
    assert!(holds(".moment_1_codes") && holds(".moment_2\""), "large parameters alone have codes");
    let resumed = resumed(place);
    assert!(matches!(&resumed[..], [one] if one.starts_with("block ") && one.ends_with("/5")));
}

fn stop_in_tuning(place: &Place) {
    let mut run = Background::start(place);
    run.wait_for("steps of tuning", || steps_of(place, 2) >= 6);
    run.signal(Signal::INT);
    stopped(&run.end(), 130);
    assert!(place.path(TUNING).exists() && steps_of(place, 2) < 40);
}

fn kill_in_distill(place: &Place) {
    let mut run = Background::start(place);
    run.wait_for("a checkpoint and steps after it", || {
        place.path(STATE).exists() && steps(place) % 4 == 2
    });
    run.signal(Signal::KILL);
    assert!(run.end().status.code().is_none(), "the run ended before the signal");
    assert_eq!(status(place), "running");
}

#[test]
fn a_finished_run_says_so_and_refuses_what_changed() {
    let short = STAGES.replace("= 25", "= 1").replace("= 48", "= 1").replace("= 40", "= 1");
    let place = Place::with_small_run(&short);
    place.ok(&TRAIN);
    let before = place.tree("run/export");

    let again = place.run(&TRAIN);
    assert_eq!(again.code, 0);
    assert!(again.err.contains("already complete"), "{}", again.err);
    assert!(again.err.contains("--fresh") && again.err.contains("\ndone "), "{}", again.err);

    // What only says how closely a run is watched goes on with it.
    for set in ["log_every=7", "checkpoint_every=9", "validate.windows=2"] {
        let set = format!("stage.1.distill.{set}");
        let watched = place.run(&[&TRAIN[..], &["--set", &set]].concat());
        assert!(watched.code == 0 && watched.err.contains("already complete"), "{}", watched.err);
    }
    // So does a record of an older fewbit, whose tasks had no name and whose recipe says how often.
    let record = place.read("run/run.json");
    let name = record.find(",\n          \"name\": \"ppl\"").unwrap();
    let mut old = record;
    old.replace_range(name..name + ",\n          \"name\": \"ppl\"".len(), "");
    place.write("run/run.json", old.replacen("log_every = 10", "log_every = 1", 1));
    let again = place.run(&TRAIN);
    assert!(again.code == 0 && again.err.contains("already complete"), "{}", again.err);

    let changed = |args: &[&str], sentence: &str| {
        let error = place.refused(&[&TRAIN[..], args].concat());
        assert!(error.starts_with("exit 6\n") && error.contains(sentence), "{error}");
    };
    changed(&["--set", "seed=1"], "the recipe changed: `seed = 0` became `seed = 1`");
    let f32 = "stage.1.distill.optimizer.moments=\"f32\"";
    changed(&["--set", f32], "the recipe changed: `moments = \"int8\"`");
    changed(&["--set", "stage.1.distill.steps=2"], "`steps = 1` became `steps = 2`");
    place.write("text.json", few_stories(41));
    changed(&[], "the calibration data changed since this run began");
    place.write("text.json", few_stories(40));
    place.write("few.json", few_stories(5));
    changed(&[], "the validation data changed");
    place.write("few.json", few_stories(4));
    let config = place.read("model/config.json");
    place.write("model/config.json", format!("{config}\n"));
    changed(&[], "the model's files changed");
    place.write("model/config.json", config);
    assert!(place.tree("run/export") == before);

    // Starting over is the one way on, and removes only what a run writes.
    place.write("run/notes.txt", "mine");
    let fresh = place.run(&[&TRAIN[..], &["--set", "seed=1", "--fresh"]].concat());
    assert_eq!(fresh.code, 0, "{}", fresh.err);
    assert!(place.tree("run/export") != before && place.read("run/notes.txt") == "mine");
    changed(&[], "`seed = 1` became `seed = 0`");
}

#[test]
fn one_folder_has_one_process_and_damaged_checkpoints_are_named() {
    let place = prepared();
    let mut run = Background::start(&place);
    run.wait_for("the run's record", || place.path("run/run.json").exists());
    let second = place.run(&TRAIN);
    assert_eq!(second.code, 2, "{}", second.err);
    let sentence = "error: another fewbit process is working in this folder: process ";
    assert!(second.err.contains(sentence), "{}", second.err);
    assert!(second.err.contains("\n  at   run\n  try  "), "{}", second.err);
    run.wait_for("distillation steps", || steps(&place) >= 2);
    run.signal(Signal::TERM);
    stopped(&run.end(), 143);
    events(&place.path("run/metrics.jsonl"));

    for damaged in [STATE, "run/checkpoints/00-reconstruct/block-0001.safetensors", "run/run.json"]
    {
        let whole = std::fs::read(place.path(damaged)).unwrap();
        place.write(damaged, &whole[..whole.len() / 2]);
        let ended = place.run(&TRAIN);
        assert!([1, 3, 6].contains(&ended.code), "{}", ended.err);
        assert!(ended.err.contains("\n  at   ") && ended.err.contains(damaged), "{}", ended.err);
        place.write(damaged, whole);
    }

    // A crash may cut the last line of the metrics.
    let metrics = place.read("run/metrics.jsonl");
    place.write("run/metrics.jsonl", format!("{metrics}{{\"time\":17"));
    place.ok(&TRAIN);
    assert!(events(&place.path("run/metrics.jsonl")).iter().any(|event| event["event"] == "done"));
    assert_eq!(exported(&place).len(), place.tree("run/export/fewbit").len() + 1);
}
