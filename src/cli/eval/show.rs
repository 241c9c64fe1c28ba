//! What was found, as text and as JSON.

use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{Ready, Text};
use crate::data::{DataFormat, Marks, Reading, TokenStream, TrainOn};
use crate::task::Score;

/// A task and its score.
pub(super) struct Found<'a> {
    pub(super) ready: &'a Ready,
    pub(super) score: Score,
    /// The reference model's.
    pub(super) reference: Option<Score>,
}

/// What was measured.
pub(super) struct Model<'a> {
    pub(super) name: &'a str,
    pub(super) device: &'a str,
    pub(super) adapter: Option<Adapter>,
}

/// The adapter that was measured with the model.
#[derive(Serialize)]
pub(super) struct Adapter {
    pub(super) name: String,
    pub(super) path: PathBuf,
    pub(super) sha256: String,
}

impl Adapter {
    fn line(&self) -> String {
        let Self { name, path, sha256 } = self;
        format!("\nadapter    {name} {} sha256 {}", path.display(), &sha256[..12])
    }
}

/// One object of a single task; of several one with a list of them.
pub(super) fn json(all: &[Found<'_>], model: &Model<'_>) -> Value {
    let rest = json!({ "model": model.name, "adapter": model.adapter, "device": model.device });
    let Value::Object(rest) = rest else { return rest };
    if let [one] = all {
        let mut object = one.object();
        object.extend(rest);
        return Value::Object(object);
    }
    let tasks: Vec<Value> = all.iter().map(|found| Value::Object(found.object())).collect();
    let mut object = Map::from_iter([("tasks".to_owned(), Value::Array(tasks))]);
    object.extend(rest);
    Value::Object(object)
}

/// A block of lines for each task, and what was measured.
pub(super) fn text(all: &[Found<'_>], model: &Model<'_>) -> String {
    let blocks: Vec<String> = all.iter().map(Found::lines).collect();
    let between = if all.len() > 1 { "\n\n" } else { "\n" };
    format!(
        "{}{between}model      {} on {}{}",
        blocks.join("\n\n"),
        model.name,
        model.device,
        model.adapter.as_ref().map_or_else(String::new, Adapter::line),
    )
}

/// What was found row by row, one object a line, with the task's name.
pub(super) fn samples(all: &[Found<'_>]) -> String {
    let mut lines = String::new();
    for found in all {
        for sample in &found.score.samples {
            let mut line = Map::from_iter([("task".to_owned(), found.ready.task.label().into())]);
            line.extend(sample.as_object().cloned().unwrap_or_default());
            lines.push_str(&Value::Object(line).to_string());
            lines.push('\n');
        }
    }
    lines
}

impl Found<'_> {
    /// Numbers, protocol and data, by name.
    fn object(&self) -> Map<String, Value> {
        let mut object = Map::from_iter([("task".to_owned(), self.ready.task.name().into())]);
        object.extend(self.score.entries());
        if let Some(reference) = &self.reference {
            let numbers =
                reference.numbers.iter().map(|(name, value)| (name.clone(), (*value).into()));
            object.insert("reference".to_owned(), Value::Object(numbers.collect()));
        }
        let rest = match &self.ready.text {
            Some(text) => {
                let mut rest = json!({
                    "bos": text.marks.bos.is_some(),
                    "documents": text.stream.documents,
                    "cut": text.stream.cut,
                    "data_sha256": text.sha256,
                });
                if let (Some(rest), Value::Object(reading)) =
                    (rest.as_object_mut(), json!(text.reading))
                {
                    rest.extend(reading);
                }
                rest
            }
            None => json!({ "data_sha256": self.ready.files.sha256 }),
        };
        object.extend(rest.as_object().cloned().unwrap_or_default());
        object
    }

    fn lines(&self) -> String {
        let Ready { task, text, files, names } = self.ready;
        let task = task.task();
        let (counted, sha256) = match text {
            Some(Text { stream, marks, reading, sha256 }) => {
                (format!(",\n           {}", counted(stream, reading, *marks)), sha256)
            }
            None => (String::new(), &files.sha256),
        };
        let reference = self.reference.as_ref().map_or_else(String::new, |score| {
            let result = task.result(score);
            format!("\nreference  {}", result.lines().next().unwrap_or_default())
        });
        format!(
            "{}{reference}\n\
             {}\n\
             data       {} sha256 {}",
            task.result(&self.score),
            folded(&format!("protocol   {}{counted}", task.protocol(&self.score))),
            names.join(" + "),
            &sha256[..12],
        )
    }
}

/// Lines that fit, broken behind commas and indented.
fn folded(text: &str) -> String {
    const WIDTH: usize = 80;
    const MARGIN: &str = "           ";
    let mut out = String::new();
    for (index, line) in text.lines().enumerate() {
        let mut column = 0;
        for part in line.split_inclusive(", ") {
            let width = part.trim_end().chars().count();
            if column > 0 && column + width > WIDTH {
                out.truncate(out.trim_end().len());
                out = format!("{out}\n{MARGIN}");
                column = MARGIN.len();
            } else if column == 0 && index > 0 {
                out.push('\n');
            }
            out += part;
            column += part.chars().count();
        }
    }
    out
}

/// Which tokens of the windows count, and what stands around documents.
fn counted(stream: &TokenStream, reading: &Reading, marks: Marks) -> String {
    let bos = if marks.bos.is_some() { "BOS before each document" } else { "no BOS" };
    let Some(length) = stream.packed else {
        return format!("first token of a window not predicted, {bos}");
    };
    let bos = bos.replace("document", "example");
    let eos = if marks.eos.is_some() { "EOS behind it" } else { "no EOS" };
    let cut = match stream.cut {
        0 => String::new(),
        cut => format!(", {cut} of them cut at {length} tokens"),
    };
    let documents = stream.documents;
    if reading.is_chat() {
        let what = match reading.train_on {
            TrainOn::All => "every token of",
            TrainOn::Last => "the last answer of",
            TrainOn::Assistant | TrainOn::Each => "the answers of",
        };
        return format!(
            "only {what} conversations counts, by the chat template,\n           {documents} \
             conversations packed whole{cut}"
        );
    }
    if reading.format == DataFormat::Tokens {
        return format!("tokens with a label only, {documents} examples packed whole{cut}");
    }
    format!(
        "completion tokens only, {bos}, {eos},\n           {documents} examples packed whole{cut}"
    )
}
