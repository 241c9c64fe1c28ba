//! A scratch folder and the real binary: what the black-box tests share.
#![allow(dead_code)] // each test file uses a part of it
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

pub(crate) mod story;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

/// What stands before the stages of [`Place::with_small_run`].
const SMALL_RUN: &str = r#"output = "run"
device = "cpu"
model.path = "model"
quant.bits = 4

[data]
validation.path = "few.json"
[data.calibration]
path = "text.json"
samples = 8
length = 64
[data.train]
path = "text.json"
length = 64

"#;

/// Runs what [`Place::with_small_run`] wrote.
pub(crate) const TRAIN: [&str; 3] = ["train", "--recipe", "recipe.toml"];

/// A folder that is the working directory of every command run in it.
pub(crate) struct Place(TempDir);

/// What a command left.
#[derive(Debug)]
pub(crate) struct Ended {
    /// Exit code.
    pub(crate) code: i32,
    /// Standard output.
    pub(crate) out: String,
    /// Standard error.
    pub(crate) err: String,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        std::fs::write(self.path(name), content).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    /// A place with a small run: stages on stories260k in `recipe.toml`, with text of its own.
    pub(crate) fn with_small_run(stages: &str) -> Self {
        let place = Self::new();
        place.write("recipe.toml", format!("{SMALL_RUN}{stages}"));
        place.write("few.json", few_stories(4));
        place.write("text.json", few_stories(40));
        place.copy_model("stories260k", "model");
        place
    }

    /// Copies a folder of `datasets/`, writable, to `name`.
    pub(crate) fn copy_model(&self, model: &str, name: &str) {
        copy_folder(&datasets().join(model), &self.path(name));
    }

    /// A command that has not begun.
    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(assert_cmd::cargo::cargo_bin!("fewbit"));
        command.args(args).current_dir(self.0.path());
        command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
        command.env("NO_COLOR", "1").env("HF_HUB_OFFLINE", "1").env_remove("RUST_LOG");
        command
    }

    /// Runs to the end, whatever that is; only a panic shown to the user is never right.
    pub(crate) fn run(&self, args: &[&str]) -> Ended {
        let mut command = assert_cmd::Command::from_std(self.command(args));
        let ended = Ended::from(&command.timeout(Duration::from_mins(4)).output().unwrap());
        assert!(!ended.err.contains("panicked"), "{args:?}: {}", ended.err);
        assert!(!ended.err.contains("internal error"), "{args:?}: {}", ended.err);
        ended
    }

    /// Standard output of a command that succeeds.
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let ended = self.run(args);
        assert_eq!(ended.code, 0, "{args:?}: {}", ended.err);
        ended.out
    }

    /// The one JSON object that a command prints.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let out = self.ok(args);
        assert_eq!(out.lines().count(), 1, "{out}");
        serde_json::from_str(&out).unwrap()
    }

    /// Exit code and error of a command that refuses: nothing on stdout, no file touched, and the
    /// error in the three lines that the product promises.
    pub(crate) fn refused(&self, args: &[&str]) -> String {
        let text = self.refused_briefly(args);
        let error: Vec<&str> = text.lines().skip(1).collect();
        let [what, at, middle @ .., fix] = &error[..] else { panic!("not three lines: {text}") };
        let form = what.starts_with("error: ") && at.starts_with("  at   ");
        assert!(form && fix.starts_with("  try  "), "not the three-line form: {text}");
        // Between them only the excerpt that belongs to `at`.
        assert!(middle.iter().all(|line| line.starts_with("       ")), "{text}");
        text
    }

    /// Exit code and error of a run that began and did not end well.
    pub(crate) fn failed(&self, args: &[&str]) -> String {
        let Ended { code, err, .. } = self.run(args);
        assert_ne!(code, 0, "{args:?} ended well: {err}");
        let start = err.find("error: ").unwrap_or_else(|| panic!("no error in {err:?}"));
        format!("exit {code}\n{}", &err[start..])
    }

    /// Like [`Place::refused`], for errors that have no place to name, or nothing to try.
    pub(crate) fn refused_briefly(&self, args: &[&str]) -> String {
        let before = self.tree("");
        let Ended { code, out, err } = self.run(args);
        assert_ne!(code, 0, "{args:?} was not refused");
        assert_eq!(out, "", "{args:?} printed a result");
        assert!(self.tree("") == before, "{args:?} changed files");
        let start = err.find("error: ").unwrap_or_else(|| panic!("no error in {err:?}"));
        format!("exit {code}\n{}", &err[start..])
    }

    /// Every file below `name` with its bytes.
    pub(crate) fn tree(&self, name: &str) -> BTreeMap<String, Vec<u8>> {
        let root = self.path(name);
        let mut files = BTreeMap::new();
        collect(&root, &root, &mut files);
        files
    }
}

impl From<&Output> for Ended {
    fn from(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Self {
            code: output.status.code().unwrap_or(-1),
            out: text(&output.stdout),
            err: text(&output.stderr),
        }
    }
}

fn collect(root: &Path, folder: &Path, files: &mut BTreeMap<String, Vec<u8>>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(root, &path, files);
        } else {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            files.insert(name, std::fs::read(&path).unwrap());
        }
    }
}

pub(crate) fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            // Bytes alone: a read-only source must not make a read-only copy.
            std::fs::write(target, std::fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

pub(crate) fn datasets() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets")
}

/// The first `count` texts of `datasets/tinystories/validation.json`, as a data file.
pub(crate) fn few_stories(count: usize) -> String {
    let text = std::fs::read_to_string(datasets().join("tinystories/validation.json")).unwrap();
    let stories: Vec<String> = serde_json::from_str(&text).unwrap();
    serde_json::to_string(&stories[..count]).unwrap()
}

/// The events of a run's `metrics.jsonl`; every line must be valid JSON.
pub(crate) fn events(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A safetensors file as its parsed header and its values.
pub(crate) fn split_safetensors(path: &Path) -> (Value, Vec<u8>) {
    let bytes = std::fs::read(path).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    (serde_json::from_slice(&rest[..length]).unwrap(), rest[length..].to_vec())
}

/// Where in the values of [`split_safetensors`] tensor `name` lies.
pub(crate) fn range_of(header: &Value, name: &str) -> std::ops::Range<usize> {
    let at = |index: usize| header[name]["data_offsets"][index].as_u64().unwrap() as usize;
    at(0)..at(1)
}

pub(crate) fn join_safetensors(path: &Path, header: &Value, values: &[u8]) {
    let text = header.to_string().into_bytes();
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.extend(text);
    bytes.extend(values);
    std::fs::write(path, bytes).unwrap();
}
