//! Event files for TensorBoard.
//!
//! What the lines of `metrics.jsonl` look like in it; the files themselves are `events.rs`. A run that
//! goes on writes its curves anew from those lines, so that both tell the same story.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process;

use serde_json::Value as Json;

use super::events::{
    Dim, Histogram, Metadata, Plugin, Record, SessionLog, Shape, Shown, Summary, Tensor, Value,
    What, frame,
};
use super::log::{Appender, unix_seconds};
use super::{Event, Reporter};
use crate::error::{Error, Result};

/// Writes scalars, histograms and texts to one event file; TensorBoard reads them at once.
///
/// Each start of a run has its own file. Every event is handed to the system as it comes, so there is
/// nothing to flush.
pub struct TensorBoard {
    file: Option<Appender>,
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
        let mut board = Self { file: None, folder, metrics, curves: Curves::default() };
        board.start(&[]);
        board
    }

    /// Starts a file with these records.
    fn start(&mut self, records: &[Record]) {
        self.file = self
            .new_file()
            .inspect_err(|error| tracing::warn!("no TensorBoard events: {error}"))
            .ok();
        let what = Some(What::FileVersion("brain.Event:2".to_owned()));
        self.write(&[Record { wall_time: unix_seconds(), step: 0, what }]);
        self.write(records);
    }

    /// TensorBoard reads files in the order of their names.
    fn new_file(&self) -> Result<Appender> {
        let mut time = unix_seconds() as u64;
        loop {
            let name = format!("{EVENTS}{time:010}.fewbit.{}", process::id());
            let path = self.folder.join(name);
            if !path.exists() {
                return Appender::open(&path);
            }
            time += 1;
        }
    }

    /// Replaces all files by one with what `metrics.jsonl` has.
    fn rebuild(&mut self) {
        let Ok(old) = fs::read_dir(&self.folder) else { return };
        let told = self.told().map_err(|e| Error::io("read", &self.metrics, &e));
        let told = match told {
            Ok(told) => told,
            Err(error) => {
                tracing::warn!("TensorBoard shows what is new only: {error}");
                return;
            }
        };
        let old: Vec<PathBuf> = old.flatten().map(|entry| entry.path()).collect();
        self.start(&told);
        for path in old {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(EVENTS) && name.contains(".fewbit.") {
                // TensorBoard would show its curves beside the new ones; nothing else is lost.
                let _ = fs::remove_file(&path);
            }
        }
    }

    /// The records of `metrics.jsonl`, behind the mark on which TensorBoard drops what it has read.
    fn told(&mut self) -> io::Result<Vec<Record>> {
        let texts = std::mem::take(&mut self.curves.texts);
        self.curves = Curves { texts, ..Curves::default() };
        let mut records = vec![restart(0)];
        records.extend(self.curves.texts.iter().cloned());
        for line in BufReader::new(File::open(&self.metrics)?).lines() {
            let Ok(event) = serde_json::from_str::<Json>(&line?) else { continue };
            let time = event["time"].as_f64();
            records.extend(self.curves.records(&event).into_iter().map(|mut record| {
                record.wall_time = time.unwrap_or(record.wall_time);
                record
            }));
        }
        Ok(records)
    }

    fn write(&mut self, records: &[Record]) {
        let Some(file) = &mut self.file else { return };
        let mut bytes = Vec::new();
        for record in records {
            frame(record, &mut bytes);
        }
        if !bytes.is_empty() {
            file.write(&bytes);
        }
    }
}

/// How the names of event files begin.
const EVENTS: &str = "events.out.tfevents.";

impl Reporter for TensorBoard {
    fn emit(&mut self, event: &Event) {
        match event {
            Event::Progress { .. } => {}
            Event::Resumed { .. } => self.rebuild(),
            Event::Text { tag, text: content } => {
                let record = record(0, [text(tag, content)]);
                self.curves.texts.push(record.clone());
                self.write(&[record]);
            }
            // Strings and numbers always have a JSON form.
            event => {
                let told = serde_json::to_value(event).unwrap_or_default();
                let records = self.curves.records(&told);
                self.write(&records);
            }
        }
    }
}

/// What TensorBoard shows of events in their JSON form.
#[derive(Default)]
struct Curves {
    /// The stage whose blocks came first: the curves of later ones have tags of their own, for their
    /// axis begins anew.
    blocks_of: Option<u64>,
    /// Texts so far, which `metrics.jsonl` does not have.
    texts: Vec<Record>,
}

impl Curves {
    /// What TensorBoard shows of an event, which may be nothing.
    fn records(&mut self, event: &Json) -> Vec<Record> {
        let number = |key: &str| event[key].as_f64();
        let step = |key: &str| event[key].as_u64().unwrap_or_default();
        let scalars = |step: u64, pairs: &[(&str, &str)]| {
            let found = pairs.iter().filter_map(|(tag, key)| Some(scalar(tag, number(key)?)));
            let values: Vec<Value> = found.collect();
            if values.is_empty() { Vec::new() } else { vec![record(step, values)] }
        };
        match event["event"].as_str().unwrap_or_default() {
            "block" => {
                let tags = ["mse_before", "mse_after"].map(|key| (self.of_block(event, key), key));
                let pairs = tags.each_ref().map(|(tag, key)| (tag.as_str(), *key));
                scalars(step("index"), &pairs)
            }
            "block_loss" => {
                let tag = self.of_block(event, &format!("{:02}/loss", step("block")));
                scalars(step("step"), &[(&tag, "loss")])
            }
            "step" => {
                let values = event["values"].as_object().into_iter().flatten();
                let values =
                    values.map(|(tag, value)| scalar(tag, value.as_f64().unwrap_or(f64::NAN)));
                vec![record(step("global_step"), values)]
            }
            "evaluation" if event["track"] == true => {
                let tags = event["tags"].as_object().into_iter().flatten();
                let tags = tags.filter_map(|(name, tag)| Some((tag.as_str()?, name.as_str())));
                scalars(step("global_step"), &tags.collect::<Vec<_>>())
            }
            "validation" => scalars(
                step("global_step"),
                &[
                    ("eval/perplexity", "perplexity"),
                    ("eval/loss", "nll_per_token"),
                    ("eval/kl_forward", "kl_forward"),
                    ("eval/top1_agreement", "top1_agreement"),
                ],
            ),
            "retry" => vec![restart(step("global_step") + 1)],
            "histogram" => {
                let edges: Vec<f64> = numbers(&event["edges"]).collect();
                let counts: Vec<u64> =
                    numbers(&event["counts"]).map(|count| count as u64).collect();
                let shown = histogram(event["tag"].as_str().unwrap_or_default(), &edges, &counts);
                shown.map(|value| record(step("global_step"), [value])).into_iter().collect()
            }
            _ => Vec::new(),
        }
    }

    /// The tag of a number of a block.
    fn of_block(&mut self, event: &Json, what: &str) -> String {
        let stage = event["stage"].as_u64().unwrap_or_default();
        match *self.blocks_of.get_or_insert(stage) {
            first if first == stage => format!("block/{what}"),
            _ => format!("stage_{stage}/block/{what}"),
        }
    }
}

/// The numbers of a list.
fn numbers(list: &Json) -> impl Iterator<Item = f64> {
    list.as_array().into_iter().flatten().filter_map(Json::as_f64)
}

/// The mark from which on TensorBoard drops what it has: events of that step and later ones.
fn restart(step: u64) -> Record {
    at(step, What::SessionLog(SessionLog { status: 1 }))
}

fn record(step: u64, values: impl IntoIterator<Item = Value>) -> Record {
    at(step, What::Summary(Summary { value: values.into_iter().collect() }))
}

fn at(step: u64, what: What) -> Record {
    let step = i64::try_from(step).unwrap_or(i64::MAX);
    Record { wall_time: unix_seconds(), step, what: Some(what) }
}

fn value(tag: &str, shown: Shown) -> Value {
    Value { tag: tag.to_owned(), shown: Some(shown), metadata: None }
}

fn scalar(tag: &str, number: f64) -> Value {
    value(tag, Shown::Scalar(number as f32))
}

/// Sums are taken at the middle of each bucket. Nothing for edges and counts that do not match.
fn histogram(tag: &str, edges: &[f64], counts: &[u64]) -> Option<Value> {
    let (&first, &last) = (edges.first()?, edges.last()?);
    if counts.is_empty() || edges.len() != counts.len() + 1 {
        tracing::warn!(
            "histogram {tag} has {} edges for {} counts; it is left out",
            edges.len(),
            counts.len()
        );
        return None;
    }
    let buckets: Vec<f64> = counts.iter().map(|&count| count as f64).collect();
    let middles = edges.windows(2).map(|pair| f64::midpoint(pair[0], pair[1]));
    let (sum, squares) = middles
        .zip(&buckets)
        .fold((0.0, 0.0), |(sum, squares), (x, count)| (sum + x * count, squares + x * x * count));
    let histogram = Histogram {
        min: first,
        max: last,
        num: buckets.iter().sum(),
        sum,
        sum_squares: squares,
        bucket_limit: edges[1..].to_vec(),
        bucket: buckets,
    };
    Some(value(tag, Shown::Histogram(histogram)))
}

/// TensorBoard reads texts as Markdown; four spaces make each line a line of code.
fn text(tag: &str, text: &str) -> Value {
    let mut code = String::new();
    for line in text.lines() {
        code.push_str("    ");
        code.push_str(line);
        code.push('\n');
    }
    let shape = Some(Shape { dim: vec![Dim { size: 1 }] });
    // Strings.
    let tensor = Tensor { dtype: 7, shape, strings: vec![code.into_bytes()] };
    let metadata = Metadata { plugin: Some(Plugin { name: "text".to_owned() }) };
    Value { metadata: Some(metadata), ..value(tag, Shown::Tensor(tensor)) }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::report::Number;
    use crate::report::jsonl::JsonLines;

    /// Payloads of the records in the only event file of `folder`.
    fn payloads(folder: &Path) -> Vec<Vec<u8>> {
        let path = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
        let bytes = fs::read(path).unwrap();
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
        let mut record = record(300, [scalar("a", 1.0)]);
        record.wall_time = 2.0;
        let mut expected = vec![0x09, 0, 0, 0, 0, 0, 0, 0, 0x40];
        expected.extend([0x10, 0xac, 0x02]);
        expected.extend([0x2a, 10, 0x0a, 8, 0x0a, 1, b'a', 0x15, 0, 0, 0x80, 0x3f]);
        assert_eq!(record.encode_to_vec(), expected);
    }

    #[test]
    fn records_are_in_the_file_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tensorboard");
        let mut board = TensorBoard::open(&folder, &dir.path().join("metrics.jsonl"));
        board.emit(&Event::BlockLoss { stage: 1, block: 3, step: 7, loss: 0.5 });
        board.emit(&Event::BlockLoss { stage: 1, block: 103, step: 7, loss: 0.5 });
        board.emit(&Event::BlockLoss { stage: 2, block: 3, step: 7, loss: 0.5 });
        board.emit(&Event::Note { text: "not for TensorBoard".into() });
        board.emit(&Event::Text { tag: "recipe".into(), text: "# a\nb = 1".into() });
        let payloads = payloads(&folder);
        assert_eq!(payloads.len(), 5);
        assert!(contains(&payloads[0], b"brain.Event:2"));
        assert!(contains(&payloads[1], b"block/03/loss"));
        assert!(contains(&payloads[2], b"block/103/loss"));
        assert!(contains(&payloads[3], b"stage_2/block/03/loss"));
        assert!(contains(&payloads[4], b"    # a\n    b = 1\n"));
    }

    #[test]
    fn only_the_trained_model_is_tracked() {
        let evaluation = |track| Event::Evaluation {
            stage: 0,
            what: "float".into(),
            task: "ppl".into(),
            numbers: ["eval/perplexity", "eval/loss"]
                .map(|tag| Number { name: tag.into(), tag: tag.into(), value: 2.0 })
                .into(),
            tokens: 1,
            protocol: serde_json::Map::new(),
            marks: Vec::new(),
            bos: true,
            data: String::new(),
            ratio_to_float: None,
            global_step: 0,
            track,
        };
        let shown =
            |track| Curves::default().records(&serde_json::to_value(evaluation(track)).unwrap());
        assert!(shown(false).is_empty());
        let Some(What::Summary(summary)) = &shown(true)[0].what else { panic!() };
        assert_eq!(summary.value.len(), 2);
    }

    #[test]
    fn a_run_that_goes_on_tells_its_story_anew_in_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, metrics) = (dir.path().join("tensorboard"), dir.path().join("metrics.jsonl"));
        let step = |global_step: u64| Event::Step {
            stage: 0,
            verb: "distill".into(),
            step: global_step,
            of: 9,
            global_step,
            values: vec![("train/loss".into(), f64::NAN)],
        };
        let mark = || "00-distill/state-000001".to_owned();
        let (saved, resumed) = (
            Event::Saved { mark: mark() },
            Event::Resumed { stage: "distill".into(), position: "step 1/9".into(), mark: mark() },
        );
        let text = Event::Text { tag: "recipe".into(), text: "seed = 0".into() };
        for events in [vec![&text, &step(1), &saved, &step(2)], vec![&text, &resumed, &step(2)]] {
            let mut lines = JsonLines::open(&metrics).unwrap();
            let mut board = TensorBoard::open(&folder, &metrics);
            for event in events {
                lines.emit(event);
                board.emit(event);
            }
        }
        let records: Vec<Record> =
            payloads(&folder).iter().map(|bytes| Record::decode(&bytes[..]).unwrap()).collect();
        assert!(matches!(records[1].what, Some(What::SessionLog(_))));
        let steps: Vec<i64> = records.iter().skip(2).map(|record| record.step).collect();
        assert_eq!(steps, [0, 1, 2], "a text, and every step once");
    }

    #[test]
    fn histogram_sums_and_mismatch() {
        let value = histogram("codes/a", &[-0.5, 0.5, 1.5], &[3, 5]).unwrap();
        let Some(Shown::Histogram(found)) = value.shown else { panic!() };
        assert_eq!((found.num, found.sum), (8.0, 5.0));
        assert_eq!((found.min, found.max), (-0.5, 1.5));
        assert_eq!(found.bucket_limit, [0.5, 1.5]);
        assert!(histogram("codes/a", &[0.0, 1.0], &[3, 5]).is_none());
        assert!(histogram("codes/a", &[], &[]).is_none());
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
