//! The crash test: a run that is killed, stopped, starved of disk and robbed of its newest state at
//! random instants ends in the bytes, and tells the story, of a run that nothing disturbed.
//!
//! 50 faults; `FEWBIT_CRASHES=500 cargo test --release --test crash -- --nocapture` for more.
#![cfg(unix)] // signals, and a shell that limits the size of files
#![allow(clippy::unwrap_used, clippy::print_stdout)] // may fail by panicking, and says what it saw

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use common::{Place, TRAIN, story};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Every way of training, in the small.
const STAGES: &str = r#"
[[stage]]
[stage.reconstruct]
method.uniquanf = { period = 3 }
within = "staged"
steps = 16
batch = 4
learning_rate = 1e-3
checkpoint_every = 5
[[stage]]
[stage.reconstruct]
method.signround = {}
keep_best = true
steps = 30
batch = 4
learning_rate = 1e-3
checkpoint_every = 7
[[stage]]
[stage.distill]
bits = 2
method.seq = {}
objective.jsd = {}
steps = 48
batch = 4
learning_rate = 1e-3
checkpoint_every = 5
log_every = 1
validate.every = 8
on_policy = { share = 0.5, every = 6, max_new_tokens = 8, prompt_tokens = 8 }
memory = "device"
[[stage]]
[stage.tune_scales]
method.peqa = {}
steps = 30
batch = 4
learning_rate = 1e-3
checkpoint_every = 4
log_every = 1
[[stage]]
[stage.evaluate]
tasks = [
    { ppl = { context = 64 } },
    { kl = { context = 64 } },
    { choice = { benchmark = "openbookqa", data = "rows.json" } },
    { gsm8k = { data = "problems.jsonl", shots = 0, limit = 6, max_new_tokens = 12, batch = 2 } },
]
baselines = ["float", "rtn"]
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

/// Time for a run to end once it is asked to.
const PATIENCE: Duration = Duration::from_mins(1);

fn prepared() -> Place {
    let place = Place::with_small_run(STAGES);
    for (from, to) in
        [("choice/openbookqa.json", "rows.json"), ("gsm8k/sample.jsonl", "problems.jsonl")]
    {
        std::fs::copy(common::datasets().join(from), place.path(to)).unwrap();
    }
    place
}

/// What a run leaves that another run of the recipe leaves too.
#[derive(PartialEq)]
struct Left {
    files: BTreeMap<String, Vec<u8>>,
    metrics: Vec<Value>,
    curves: Vec<story::Point>,
    record: Value,
}

impl Left {
    fn by(place: &Place) -> Self {
        let mut files = place.tree("run");
        // These have times in them, and are compared by what they say.
        files.retain(|name, _| {
            !name.starts_with("tensorboard/")
                && !["metrics.jsonl", "report.html", "run.json", "run.log", ".lock"]
                    .contains(&name.as_str())
        });
        let (metrics, curves, record) =
            (story::metrics(place), story::curves(place), story::record(place));
        Self { files, metrics, curves, record }
    }

    fn assert_is(&self, expected: &Self, history: &[String]) {
        let names = |left: &Self| left.files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(self), names(expected), "other files after {history:#?}");
        for (name, bytes) in &self.files {
            assert!(*bytes == expected.files[name], "{name} differs after {history:#?}");
        }
        first_difference("metrics.jsonl", &self.metrics, &expected.metrics, history);
        first_difference("TensorBoard", &self.curves, &expected.curves, history);
        assert_eq!(self.record, expected.record, "run.json after {history:#?}");
    }
}

fn first_difference<T: PartialEq + std::fmt::Debug>(
    what: &str,
    found: &[T],
    expected: &[T],
    history: &[String],
) {
    let at = found.iter().zip(expected).position(|(a, b)| a != b);
    let at = at.unwrap_or_else(|| found.len().min(expected.len()));
    assert!(
        found.len() == expected.len() && at == found.len(),
        "{what} differs at {at}: {:?} where {:?} belongs, after {history:#?}",
        found.get(at),
        expected.get(at)
    );
}

/// Numbers that differ from one start of the test to the next: the instants do so anyway.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        // Knuth's MMIX generator.
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// What happens to a run.
#[derive(Clone, Copy, Debug)]
enum Fault {
    /// It gets a signal.
    Signal(Signal),
    /// No file may become longer than so many KiB.
    Disk(u64),
}

/// A start of the run, with its errors in a file.
fn start(place: &Place, fault: Fault) -> Child {
    let run = place.command(&TRAIN);
    let mut command = match fault {
        Fault::Signal(_) => run,
        Fault::Disk(kib) => {
            let mut shell = Command::new("sh");
            // In blocks of 512 bytes, where the shell is POSIX's.
            let script = format!("ulimit -f {}; exec \"$0\" \"$@\"", 2 * kib);
            shell.args(["-c", &script]).arg(run.get_program()).args(run.get_args());
            shell.current_dir(run.get_current_dir().unwrap());
            for (key, value) in run.get_envs() {
                match value {
                    Some(value) => shell.env(key, value),
                    None => shell.env_remove(key),
                };
            }
            shell
        }
    };
    let errors = std::fs::File::create(place.path("errors.txt")).unwrap();
    command.stdout(Stdio::null()).stderr(errors).spawn().unwrap()
}

fn ended(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if start.elapsed() > within {
            return None;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The stage that a run is in, as its record says.
fn stage(place: &Place) -> String {
    let text = std::fs::read_to_string(place.path("run/run.json")).unwrap_or_default();
    let record: Value = serde_json::from_str(&text).unwrap_or_default();
    let stages = record["stages"].as_array().cloned().unwrap_or_default();
    let open = stages.iter().find(|stage| stage["status"] != "done");
    open.map_or("none", |stage| stage["name"].as_str().unwrap()).to_owned()
}

/// The states that lie there, the newest last.
fn states(place: &Place) -> Vec<PathBuf> {
    // A run may be stopped before it has a folder for them.
    if !place.path("run/checkpoints").exists() {
        return Vec::new();
    }
    let names = place.tree("run/checkpoints").into_keys();
    names
        .filter(|name| name.contains("/state-"))
        .map(|name| place.path("run/checkpoints").join(name))
        .collect()
}

/// Damages the newest of several states of one stage; gives whether there are several.
fn tear(place: &Place, random: &mut Random) -> bool {
    let states = states(place);
    let [.., before, newest] = &states[..] else { return false };
    if before.parent() != newest.parent() {
        return false;
    }
    let mut bytes = std::fs::read(newest).unwrap();
    let at = random.below(bytes.len() as u64) as usize;
    if random.below(2) == 0 {
        bytes.truncate(at);
    } else {
        bytes[at] ^= 1 << random.below(8);
    }
    std::fs::write(newest, bytes).unwrap();
    true
}

#[test]
fn however_often_a_run_is_disturbed_it_ends_as_if_nothing_had_happened() {
    let faults = std::env::var("FEWBIT_CRASHES").map_or(50, |text| text.parse().unwrap());
    let undisturbed = prepared();
    let begun = Instant::now();
    undisturbed.ok(&TRAIN);
    let whole = begun.elapsed().as_millis() as u64;
    let expected = Left::by(&undisturbed);

    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let mut random = Random(now.as_nanos() as u64);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut slowest: BTreeMap<String, Duration> = BTreeMap::new();
    let (mut place, mut history, mut runs) = (prepared(), Vec::new(), 0);
    let mut count = 0;
    while count < faults {
        let fault = match random.below(10) {
            0..4 => Fault::Signal(Signal::KILL),
            4..6 => Fault::Signal(Signal::TERM),
            6 => Fault::Signal(Signal::INT),
            7 => Fault::Signal(Signal::HUP),
            _ => Fault::Disk(256 + random.below(3000)),
        };
        let mut run = start(&place, fault);
        let instant = Duration::from_millis(random.below(whole / 2));
        let status = match fault {
            Fault::Disk(_) => ended(&mut run, PATIENCE),
            Fault::Signal(signal) => ended(&mut run, instant).or_else(|| {
                let (at, sent) = (stage(&place), Instant::now());
                kill_process(Pid::from_child(&run), signal).unwrap();
                let status = ended(&mut run, PATIENCE);
                let slow = slowest.entry(at).or_default();
                *slow = (*slow).max(sent.elapsed());
                status
            }),
        };
        let status = status.unwrap_or_else(|| panic!("it does not end after {fault:?}"));
        let errors = place.read("errors.txt");
        history.push(format!("{fault:?} at {instant:?} in {}: {status}", stage(&place)));
        assert!(!errors.contains("panicked") && !errors.contains("internal"), "{errors}");
        match (fault, status.code()) {
            (_, Some(0)) => {
                Left::by(&place).assert_is(&expected, &history);
                (place, history, runs) = (prepared(), Vec::new(), runs + 1);
                continue;
            }
            (Fault::Signal(Signal::KILL), None) => {}
            // Before its handlers are there a signal does what it always does.
            (Fault::Signal(signal), None) => {
                assert!(signal != Signal::KILL && instant.as_millis() < 500);
            }
            (Fault::Signal(signal), Some(code)) => {
                assert_eq!(code, 128 + signal.as_raw(), "{errors}");
            }
            (Fault::Disk(_), code) => assert_eq!(code, Some(4), "{errors}"),
        }
        count += 1;
        let kind =
            if let Fault::Disk(_) = fault { "Disk".to_owned() } else { format!("{fault:?}") };
        *counts.entry(kind).or_default() += 1;
        if random.below(4) == 0 && tear(&place, &mut random) {
            history.push("the newest state torn".to_owned());
            *counts.entry("torn states".to_owned()).or_default() += 1;
        }
    }
    place.ok(&TRAIN);
    Left::by(&place).assert_is(&expected, &history);
    println!("{count} faults in {} runs of {whole} ms: {counts:?}", runs + 1);
    println!("from signal to exit at most: {slowest:?}");
}
