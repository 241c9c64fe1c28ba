//! Event files for TensorBoard.
//!
//! What the lines of `metrics.jsonl` look like in it is `curves.rs`, the files themselves `events.rs`;
//! `hparams.rs` and `layout.rs` are for the pages of those names. The run as a whole has its file in
//! the folder itself, each stage one in a folder below, with an axis that begins at 0. A run that goes
//! on writes its curves anew from those lines, so that both tell the same story.

mod curves;
mod events;
mod hparams;
mod layout;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process;

use serde_json::Value as Json;

use self::curves::{Curves, Point, text};
use self::events::{Record, Summary, What, frame};
use super::log::{Appender, unix_seconds};
use super::{Event, Reporter};
use crate::error::{Error, Result};

/// Writes scalars, histograms, texts and settings to event files; TensorBoard reads them at once.
///
/// Each start of a run has files of its own. Every event is handed to the system as it comes, so there
/// is nothing to flush.
pub struct TensorBoard {
    /// By folder below `folder`; none where one cannot be made.
    files: BTreeMap<String, Option<Appender>>,
    folder: PathBuf,
    /// What a run that goes on tells again; already cut back when [`Event::Resumed`] comes here.
    metrics: PathBuf,
    curves: Curves,
}

impl TensorBoard {
    /// Starts an event file in `folder`, usually `tensorboard/`, and makes the folder if need be.
    /// `metrics` is the run's `metrics.jsonl`, whose reporter has to come before this one.
    /// If that fails it warns and every event is ignored: monitoring is not worth a run.
    pub fn open(folder: &Path, metrics: &Path) -> Self {
        let (folder, metrics) = (folder.to_owned(), metrics.to_owned());
        let curves = Curves::default();
        let mut board = Self { files: BTreeMap::new(), folder, metrics, curves };
        let front = board.curves.front.clone();
        board.write("", &front);
        board
    }

    /// Starts a file in the folder `below`.
    fn start(&mut self, below: &str) {
        let file = self.new_file(below);
        // Of a folder that cannot be made the folders in it say nothing new.
        let file = file
            .inspect_err(|error| {
                if self.files.is_empty() {
                    tracing::warn!("no TensorBoard events: {error}");
                }
            })
            .ok();
        self.files.insert(below.to_owned(), file);
        let what = Some(What::FileVersion("brain.Event:2".to_owned()));
        self.write(below, &[Record { wall_time: unix_seconds(), step: 0, what }]);
    }

    /// TensorBoard reads files in the order of their names.
    fn new_file(&self, below: &str) -> Result<Appender> {
        let mut time = unix_seconds() as u64;
        loop {
            let name = format!("{EVENTS}{time:010}.fewbit.{}", process::id());
            let path = self.folder.join(below).join(name);
            if !path.exists() {
                return Appender::open(&path);
            }
            time += 1;
        }
    }

    /// Replaces all files by those with what `metrics.jsonl` has.
    fn rebuild(&mut self) {
        let told = self.told().map_err(|e| Error::io("read", &self.metrics, &e));
        let mut told = match told {
            Ok(told) => told,
            Err(error) => {
                tracing::warn!("TensorBoard shows what is new only: {error}");
                return;
            }
        };
        let mut old = Vec::new();
        event_files(&self.folder, "", &mut old);
        let folders: BTreeSet<String> = old.iter().map(|(below, _)| below.clone()).collect();
        for below in folders {
            // Where nothing is left, TensorBoard has to be told so.
            told.entry(below).or_default();
        }
        self.files.clear();
        for (below, records) in &told {
            self.start(below);
            self.write(below, &[Record::restart(0)]);
            self.write(below, records);
        }
        for (_, path) in old {
            // TensorBoard would show its curves beside the new ones; nothing else is lost.
            let _ = fs::remove_file(&path);
        }
    }

    /// The records of `metrics.jsonl` by folder, each point once.
    fn told(&mut self) -> io::Result<BTreeMap<String, Vec<Record>>> {
        self.curves.again();
        let mut told = BTreeMap::from([(String::new(), self.curves.front.clone())]);
        for line in BufReader::new(File::open(&self.metrics)?).lines() {
            let Ok(event) = serde_json::from_str::<Json>(&line?) else { continue };
            let time = event["time"].as_f64();
            for (below, mut record) in self.curves.records(&event) {
                let records: &mut Vec<Record> = told.entry(below).or_default();
                if matches!(record.what, Some(What::SessionLog(_))) {
                    records.retain(|known| known.step < record.step);
                    continue;
                }
                record.wall_time = time.unwrap_or(record.wall_time);
                records.push(record);
            }
        }
        told.values_mut().for_each(keep_last);
        Ok(told)
    }

    fn tell(&mut self, points: Vec<Point>) {
        for (below, record) in points {
            self.write(&below, &[record]);
        }
    }

    fn write(&mut self, below: &str, records: &[Record]) {
        if records.is_empty() {
            return;
        }
        if !self.files.contains_key(below) {
            self.start(below);
        }
        let Some(Some(file)) = self.files.get_mut(below) else { return };
        let mut bytes = Vec::new();
        for record in records {
            frame(record, &mut bytes);
        }
        file.write(&bytes);
    }
}

/// How the names of event files begin.
const EVENTS: &str = "events.out.tfevents.";

/// Our event files in `folder` and below it, each with the folder that it is in.
fn event_files(folder: &Path, below: &str, found: &mut Vec<(String, PathBuf)>) {
    let Ok(entries) = fs::read_dir(folder.join(below)) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            let below =
                if below.is_empty() { name.into_owned() } else { format!("{below}/{name}") };
            event_files(folder, &below, found);
        } else if name.starts_with(EVENTS) && name.contains(".fewbit.") {
            found.push((below.to_owned(), path));
        }
    }
}

/// Drops points that come again later: a stage of which something was lost tells of its steps twice.
fn keep_last(records: &mut Vec<Record>) {
    let mut known = HashSet::new();
    for record in records.iter_mut().rev() {
        let step = record.step;
        if let Some(What::Summary(Summary { value })) = &mut record.what {
            value.retain(|value| known.insert((value.tag.clone(), step)));
        }
    }
    records.retain(|record| match &record.what {
        Some(What::Summary(summary)) => !summary.value.is_empty(),
        _ => true,
    });
}

impl Reporter for TensorBoard {
    fn emit(&mut self, event: &Event) {
        let front = match event {
            Event::Progress { .. } => return,
            Event::Resumed { .. } => return self.rebuild(),
            Event::Text { tag, text: content } => Record::of(0, [text(tag, content)]),
            Event::Settings { settings } => Record::of(0, hparams::start(settings)),
            // Strings and numbers always have a JSON form.
            event => {
                let told = serde_json::to_value(event).unwrap_or_default();
                let points = self.curves.records(&told);
                return self.tell(points);
            }
        };
        self.curves.front.push(front.clone());
        self.write("", &[front]);
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::events::Value;
    use super::*;
    use crate::report::jsonl::JsonLines;

    /// Payloads of the records in the only event file of `folder`.
    fn payloads(folder: &Path) -> Vec<Vec<u8>> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<PathBuf> = entries.filter(|path| path.is_file()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        let bytes = fs::read(&files[0]).unwrap();
        let mut rest = &bytes[..];
        let mut payloads = Vec::new();
        while !rest.is_empty() {
            let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
            payloads.push(rest[12..12 + length].to_vec());
            rest = &rest[12 + length + 4..];
        }
        payloads
    }

    fn contains(haystack: &[u8], needle: &[u8]) -> bool {
        haystack.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn encodes_a_scalar() {
        let mut record = Record::of(300, [Value::scalar("a", 1.0)]);
        record.wall_time = 2.0;
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0, 0x40];
        expected.extend([0x10, 0xac, 0x02]);
        expected.extend([0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0x3f]);
        assert_eq!(record.encode_to_vec(), expected);
    }

    #[test]
    fn records_are_in_the_files_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tensorboard");
        let mut board = TensorBoard::open(&folder, &dir.path().join("metrics.jsonl"));
        board.emit(&Event::Text { tag: "recipe".into(), text: "# a\nb = 1".into() });
        board.emit(&Event::StageStart { stage: 1, of: 2, name: "reconstruct".into() });
        board.emit(&Event::BlockLoss { stage: 1, block: 3, step: 7, loss: 0.5 });
        board.emit(&Event::BlockLoss { stage: 1, block: 103, step: 7, loss: 0.5 });
        board.emit(&Event::Note { text: "not for TensorBoard".into() });
        let own = payloads(&folder);
        assert_eq!(own.len(), 3);
        assert!(contains(&own[0], b"brain.Event:2"));
        assert!(contains(&own[1], b"custom_scalars__config__"));
        assert!(contains(&own[2], b"    # a\n    b = 1\n"));
        let blocks = payloads(&folder.join("01-reconstruct/blocks"));
        assert_eq!(blocks.len(), 3);
        assert!(contains(&blocks[0], b"brain.Event:2"));
        assert!(contains(&blocks[1], b"block/03/loss"));
        assert!(contains(&blocks[2], b"block/103/loss"));
    }

    fn step(step: u64) -> Event {
        Event::Step {
            stage: 0,
            verb: "distill".into(),
            step,
            of: 9,
            global_step: step + 100,
            values: vec![("train/loss".into(), f64::NAN)],
        }
    }

    /// The steps of the stage's curves after these attempts, and of the run as a whole.
    fn after(attempts: &[Vec<Event>]) -> [Vec<i64>; 2] {
        let dir = tempfile::tempdir().unwrap();
        let (folder, metrics) = (dir.path().join("tensorboard"), dir.path().join("metrics.jsonl"));
        for events in attempts {
            let mut lines = JsonLines::open(&metrics).unwrap();
            let mut board = TensorBoard::open(&folder, &metrics);
            for event in events {
                lines.emit(event);
                board.emit(event);
            }
        }
        [folder.join("00-distill"), folder].map(|folder| {
            let payloads = payloads(&folder);
            let records = payloads.iter().map(|bytes| Record::decode(&bytes[..]).unwrap());
            let records: Vec<Record> = records.collect();
            assert!(matches!(records[1].what, Some(What::SessionLog(_))));
            records.iter().skip(2).map(|record| record.step).collect()
        })
    }

    #[test]
    fn a_run_that_goes_on_tells_its_story_anew_each_folder_in_one_file() {
        let mark = || "00-distill/state-000001".to_owned();
        let start = || Event::StageStart { stage: 0, of: 1, name: "distill".into() };
        let resumed =
            |mark| Event::Resumed { stage: "distill".into(), position: "step 1/9".into(), mark };
        let text = || Event::Text { tag: "recipe".into(), text: "seed = 0".into() };
        let saved = Event::Saved { mark: mark() };
        let first = vec![text(), start(), step(1), saved, step(2)];
        let [stage, run] = after(&[first, vec![text(), start(), resumed(mark()), step(2)]]);
        assert_eq!(stage, [1, 2], "every step once");
        assert_eq!(run, [0, 0, 101, 102], "the layout and a text, and the run's own axis");
        // Something was lost and is made again: what the file has twice is shown once.
        let first = vec![start(), step(1), step(2), start(), step(2)];
        let [stage, _] = after(&[first, vec![resumed(String::new())]]);
        assert_eq!(stage, [1, 2]);
        // A training that went back, told again.
        let retry = Event::Retry {
            stage: 0,
            verb: "distill".into(),
            step: 3,
            back_to: 1,
            global_step: 101,
            reason: String::new(),
            rate_factor: 0.5,
            attempt: 1,
            of: 3,
        };
        let first = vec![start(), step(1), step(2), step(3), retry, step(2)];
        let [stage, _] = after(&[first, vec![resumed(String::new())]]);
        assert_eq!(stage, [1, 2]);
    }

    #[test]
    fn a_folder_of_which_nothing_is_left_says_so() {
        let mark = || "start".to_owned();
        let start = Event::StageStart { stage: 0, of: 1, name: "distill".into() };
        let resumed =
            Event::Resumed { stage: "distill".into(), position: String::new(), mark: mark() };
        let [stage, _] =
            after(&[vec![Event::Saved { mark: mark() }, start, step(1)], vec![resumed]]);
        assert!(stage.is_empty());
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "x").unwrap();
        let mut board = TensorBoard::open(&file.join("tensorboard"), &file);
        board.emit(&Event::BlockLoss { stage: 0, block: 0, step: 0, loss: 1.0 });
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    }
}
