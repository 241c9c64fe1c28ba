//! What a run tells of itself, without what differs between two runs of one recipe: times, speed,
//! memory, and where it was interrupted.

use std::path::Path;

use prost::Message;
use serde_json::Value;

use super::Place;

/// The events of the run in `run/`.
pub(crate) fn metrics(place: &Place) -> Vec<Value> {
    let events = super::events(&place.path("run/metrics.jsonl")).into_iter();
    let told = |event: &Value| {
        let torn = event["text"].as_str().is_some_and(|text| text.ends_with("before it is used"));
        !torn && !["saved", "resumed"].map(Value::from).contains(&event["event"])
    };
    events.filter(told).map(timeless).collect()
}

/// The results in the record of the run in `run/`, and how far it got.
pub(crate) fn record(place: &Place) -> Value {
    let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    serde_json::json!([record["status"], timeless(record["results"].clone())])
}

fn timeless(mut value: Value) -> Value {
    let changes = |key: &str| {
        ["time", "seconds", "memory_gib"].contains(&key)
            || ["perf/", "memory/"].iter().any(|group| key.starts_with(group))
    };
    match &mut value {
        Value::Object(map) => {
            map.retain(|key, _| !changes(key));
            map.values_mut().for_each(|value| *value = timeless(value.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|value| *value = timeless(value.take())),
        _ => {}
    }
    value
}

/// A point of a curve: tag behind the folder that it is in, step, value.
pub(crate) type Point = (String, i64, f32);

/// The curves that TensorBoard shows of the run in `run/`, each in the order of its points.
pub(crate) fn curves(place: &Place) -> Vec<Point> {
    let mut points = Vec::new();
    curves_below(&place.path("run/tensorboard"), "", &mut points);
    points.sort_by(|a, b| a.0.cmp(&b.0));
    points
}

/// Those of the event files in a folder, and in the folders in it.
fn curves_below(folder: &Path, name: &str, all: &mut Vec<Point>) {
    let mut paths: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let (folders, files): (Vec<_>, Vec<_>) = paths.into_iter().partition(|path| path.is_dir());
    let mut points: Vec<Point> = Vec::new();
    for record in files.iter().flat_map(|file| records(file)) {
        if record.session.is_some() {
            points.retain(|(_, step, _)| *step < record.step);
        }
        for value in record.summary.unwrap_or_default().value {
            let changes = ["perf/", "memory/", "result/seconds"];
            let changes = changes.iter().any(|group| value.tag.starts_with(group));
            if let (Some(number), false) = (value.number, changes) {
                points.push((format!("{name}{}", value.tag), record.step, number));
            }
        }
    }
    all.extend(points);
    for folder in folders {
        let name = format!("{name}{}/", folder.file_name().unwrap().to_string_lossy());
        curves_below(&folder, &name, all);
    }
}

/// The records of an event file; the last one may be cut.
fn records(file: &Path) -> Vec<Record> {
    let bytes = std::fs::read(file).unwrap();
    let (mut rest, mut records) = (&bytes[..], Vec::new());
    while rest.len() > 12 {
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        let Some(payload) = rest.get(12..12 + length) else { break };
        records.push(Record::decode(payload).unwrap());
        rest = rest.get(12 + length + 4..).unwrap_or_default();
    }
    records
}

/// Of tensorflow's event.proto what is asked for here.
#[derive(Clone, Message, PartialEq)]
struct Record {
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
    #[prost(message, optional, tag = "7")]
    session: Option<Session>,
}

#[derive(Clone, Message, PartialEq)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<Number>,
}

#[derive(Clone, Message, PartialEq)]
struct Number {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    number: Option<f32>,
}

#[derive(Clone, Copy, Message, PartialEq)]
struct Session {}
