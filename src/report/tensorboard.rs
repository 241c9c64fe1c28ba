//! Event files for TensorBoard.
//!
//! What the events of a run look like in it; the files themselves are `events.rs`.

use std::path::Path;
use std::process;

use super::events::{
    Dim, Histogram, Metadata, Plugin, Record, SessionLog, Shape, Shown, Summary, Tensor, Value,
    What, frame,
};
use super::log::{Appender, unix_seconds};
use super::{Event, Reporter};

/// Writes scalars, histograms and texts to one event file; TensorBoard reads them at once.
///
/// Each start of a run has its own file; TensorBoard joins the files of a folder. Every event is
/// handed to the system as it comes, so there is nothing to flush.
pub struct TensorBoard {
    file: Option<Appender>,
}

impl TensorBoard {
    /// Starts an event file in `folder`, usually `tensorboard/`, and makes the folder if need be.
    /// If that fails it warns and every event is ignored: monitoring is not worth a run.
    pub fn open(folder: &Path) -> Self {
        let time = unix_seconds();
        let name = format!("events.out.tfevents.{:010}.fewbit.{}", time as u64, process::id());
        let file = Appender::open(&folder.join(name))
            .inspect_err(|error| tracing::warn!("no TensorBoard events: {error}"))
            .ok();
        let mut board = Self { file };
        let what = Some(What::FileVersion("brain.Event:2".to_owned()));
        board.write(&[Record { wall_time: time, step: 0, what }]);
        board
    }

    /// Says that a run goes on behind `step`: TensorBoard drops what an earlier attempt wrote of later
    /// steps.
    pub fn resume(&mut self, step: u64) {
        self.write(&[restart(step + 1)]);
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

impl Reporter for TensorBoard {
    fn emit(&mut self, event: &Event) {
        self.write(&records(event));
    }
}

/// What TensorBoard shows of an event, which may be nothing.
fn records(event: &Event) -> Vec<Record> {
    match event {
        Event::Block { index, mse_before, mse_after, .. } => vec![record(
            *index as u64,
            [scalar("block/mse_before", *mse_before), scalar("block/mse_after", *mse_after)],
        )],
        Event::BlockLoss { block, step, loss } => {
            vec![record(*step, [scalar(&format!("block/{block:02}/loss"), *loss)])]
        }
        Event::Step { global_step, values, .. } => {
            vec![record(*global_step, values.iter().map(|(tag, v)| scalar(tag, *v)))]
        }
        Event::Evaluation { global_step, numbers, track: true, .. } => {
            vec![record(*global_step, numbers.iter().map(|n| scalar(&n.tag, n.value)))]
        }
        Event::Validation {
            global_step,
            perplexity,
            nll_per_token,
            kl_forward,
            top1_agreement,
            ..
        } => {
            let mut values =
                vec![scalar("eval/perplexity", *perplexity), scalar("eval/loss", *nll_per_token)];
            values.extend(kl_forward.map(|kl| scalar("eval/kl_forward", kl)));
            values.extend(top1_agreement.map(|top1| scalar("eval/top1_agreement", top1)));
            vec![record(*global_step, values)]
        }
        Event::Retry { global_step, .. } => vec![restart(global_step + 1)],
        Event::Histogram { tag, global_step, edges, counts } => histogram(tag, edges, counts)
            .map(|value| record(*global_step, [value]))
            .into_iter()
            .collect(),
        Event::Text { tag, text: content } => vec![record(0, [text(tag, content)])],
        _ => Vec::new(),
    }
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
    use std::fs;

    use prost::Message as _;

    use super::*;
    use crate::report::Number;

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
        let mut board = TensorBoard::open(&folder);
        board.emit(&Event::BlockLoss { block: 3, step: 7, loss: 0.5 });
        board.emit(&Event::BlockLoss { block: 103, step: 7, loss: 0.5 });
        board.emit(&Event::Note { text: "not for TensorBoard".into() });
        board.emit(&Event::Text { tag: "recipe".into(), text: "# a\nb = 1".into() });
        let payloads = payloads(&folder);
        assert_eq!(payloads.len(), 4);
        assert!(contains(&payloads[0], b"brain.Event:2"));
        assert!(contains(&payloads[1], b"block/03/loss"));
        assert!(contains(&payloads[2], b"block/103/loss"));
        assert!(contains(&payloads[3], b"    # a\n    b = 1\n"));
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
        assert!(records(&evaluation(false)).is_empty());
        let Some(What::Summary(summary)) = &records(&evaluation(true))[0].what else { panic!() };
        assert_eq!(summary.value.len(), 2);
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
        let mut board = TensorBoard::open(&file.join("tensorboard"));
        board.emit(&Event::BlockLoss { block: 0, step: 0, loss: 1.0 });
        assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    }
}
