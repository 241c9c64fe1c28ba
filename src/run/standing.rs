//! Where a run stands, seen from outside: by its record, its lock and the end of its metrics.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::Serialize;
use serde_json::Value;

use super::folder::{Holder, holder};
use super::record::{RECORD_FILE, RunRecord, Status};
use crate::error::{Error, Result, Told};
use crate::store::folder::entries;

/// Bytes at the end of `metrics.jsonl` that are read: the last log points and results.
const TAIL: u64 = 256 << 10;

/// How a run stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not begun.
    Pending,
    /// A process works on it.
    Running,
    /// Stopped by a signal after a clean save.
    Stopped,
    /// Ended by an error.
    Failed,
    /// Its process is gone without a word: killed, or the machine went away.
    Killed,
    /// Complete.
    Done,
}

impl State {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
            Self::Killed => "killed",
            Self::Done => "done",
        }
    }
}

/// A run, as its folder tells it.
#[derive(Clone, Debug, Serialize)]
pub struct Standing {
    /// The folder.
    pub path: PathBuf,
    /// How it stands.
    pub state: State,
    /// The process that works on it, and its machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub process: Option<(u32, String)>,
    /// The stage it is in or goes on with, from one, and how many there are; absent when complete.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stage: Option<(usize, usize)>,
    /// What it does there: `distill 253/1500`, `reconstruct block 4/30`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub position: String,
    /// The last perplexity: of the result, or of the last validation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub perplexity: Option<f64>,
    /// That by the float model's, of a complete run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ratio_to_float: Option<f64>,
    /// Bits per quantized weight of the export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits_per_weight: Option<f64>,
    /// Bytes of the export.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Wall-clock seconds, over all attempts that came to an end.
    pub seconds: f64,
    /// What ended it, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub failure: Option<Told>,
    /// Seconds since 1970 of its last sign.
    pub changed: u64,
}

impl Standing {
    /// Looks at a run's folder.
    ///
    /// # Errors
    /// If it is none, or its record is damaged.
    pub fn of(path: &Path) -> Result<Self> {
        let record = RunRecord::read(path)?.ok_or_else(|| {
            Error::usage("this is no run's folder: there is no run.json")
                .at(path.display())
                .fix("a folder that `fewbit train` wrote, runs/NAME for instance")
        })?;
        let at_work = holder(path);
        let state = match record.status {
            _ if at_work.is_some() => State::Running,
            Status::Pending => State::Pending,
            Status::Running => State::Killed,
            Status::Stopped => State::Stopped,
            Status::Failed => State::Failed,
            Status::Done | Status::Trained => State::Done,
        };
        let metrics = path.join("metrics.jsonl");
        let told = last_events(&metrics);
        let last = |kind: &str| told.iter().rev().find(|event| event["event"] == kind);
        let open = record.stages.iter().position(|stage| stage.status != Status::Done);
        let number = |event: Option<&Value>, key: &str| event.and_then(|event| event[key].as_f64());
        let done = last("done").filter(|_| state == State::Done);
        let perplexity = number(done, "perplexity_final")
            .or_else(|| number(last("validation"), "perplexity").filter(|_| done.is_none()));
        let float = number(done, "perplexity_float").filter(|float| *float != 0.0);
        let export = record.results.exports.first();
        let changed =
            [metrics, path.join(RECORD_FILE)].iter().filter_map(|file| modified(file)).max();
        Ok(Self {
            path: path.to_owned(),
            state,
            process: at_work.map(|Holder { pid, host }| (pid, host)),
            stage: open.map(|index| (index + 1, record.stages.len())),
            position: open.map_or_else(String::new, |index| {
                position(&told, index, &record.stages[index].name)
            }),
            perplexity,
            ratio_to_float: perplexity.zip(float).map(|(found, float)| found / float),
            bits_per_weight: export.map(|export| export.bits_per_weight),
            bytes: export.map(|export| export.bytes),
            seconds: record.seconds,
            failure: record.failure.filter(|_| state == State::Failed),
            changed: changed.unwrap_or_default(),
        })
    }

    /// The runs in a folder and in the folders of it, or the one that it is; in the order of their last sign.
    /// What cannot be read is left out.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn all(folder: &Path) -> Result<Vec<Self>> {
        let mut runs = Vec::new();
        let mut folders = vec![(folder.to_owned(), 0)];
        while let Some((path, depth)) = folders.pop() {
            if path.join(RECORD_FILE).is_file() {
                runs.extend(Self::of(&path));
            } else if depth < 2 {
                let inside =
                    entries(&path).or_else(|e| if depth == 0 { Err(e) } else { Ok(Vec::new()) })?;
                folders.extend(
                    inside.into_iter().filter(|path| path.is_dir()).map(|path| (path, depth + 1)),
                );
            }
        }
        runs.sort_by(|a, b| b.changed.cmp(&a.changed).then_with(|| a.path.cmp(&b.path)));
        Ok(runs)
    }
}

/// What a stage was doing when it last said something.
fn position(told: &[Value], stage: usize, name: &str) -> String {
    let of_stage = told.iter().rev().filter(|event| event["stage"] == stage);
    let found = of_stage.into_iter().find_map(|event| {
        let number = |key: &str| event[key].as_u64();
        match event["event"].as_str()? {
            "step" | "validation" => Some(format!("{name} {}/{}", number("step")?, number("of")?)),
            "block" => Some(format!("{name} block {}/{}", number("index")? + 1, number("of")?)),
            "block_loss" => Some(format!("{name} block {}", number("block")? + 1)),
            _ => None,
        }
    });
    found.unwrap_or_else(|| name.to_owned())
}

/// The events at the end of `metrics.jsonl`; none where it cannot be read.
fn last_events(path: &Path) -> Vec<Value> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = read().unwrap_or_default();
    // The first line may be a part of one, the last one may be in the making.
    bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

fn modified(path: &Path) -> Option<u64> {
    let time = std::fs::metadata(path).ok()?.modified().ok()?;
    Some(time.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_position_is_the_last_one_of_its_stage() {
        let told = [
            json!({ "event": "block", "stage": 0, "index": 3, "of": 30 }),
            json!({ "event": "step", "stage": 1, "step": 10, "of": 20 }),
            json!({ "event": "note", "text": "x" }),
        ];
        assert_eq!(position(&told, 1, "distill"), "distill 10/20");
        assert_eq!(position(&told, 0, "reconstruct"), "reconstruct block 4/30");
        assert_eq!(position(&told, 2, "export"), "export");
    }

    #[test]
    fn the_end_of_the_metrics_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        assert!(last_events(&path).is_empty());
        let line = json!({ "event": "step", "pad": "x".repeat(1000) }).to_string();
        let text = (line + "\n").repeat(1000) + "{\"event\": \"do";
        std::fs::write(&path, text).unwrap();
        let events = last_events(&path);
        assert!((200..300).contains(&events.len()), "{}", events.len());
    }

    #[test]
    fn runs_are_found_below_and_others_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        std::fs::write(dir.path().join("a/run.json"), "{}").unwrap();
        assert!(Standing::all(dir.path()).unwrap().is_empty());
        Standing::all(&dir.path().join("missing")).unwrap_err();
        let error = Standing::of(dir.path()).unwrap_err();
        assert!(error.to_string().contains("no run.json"), "{error}");
    }
}
