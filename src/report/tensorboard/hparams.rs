//! What TensorBoard's HParams page compares runs by: settings at the start, numbers at the end.
//!
//! Field numbers are those of TensorBoard's plugin_data.proto and api.proto, and of struct.proto.

use std::collections::BTreeMap;

use prost::{Message, Oneof};

use super::events::Value;
use crate::report::Setting;
use crate::report::log::unix_seconds;

/// What a run is judged by: tag, heading, and what it is.
pub(super) const RESULTS: [(&str, &str, &str); 7] = [
    ("result/perplexity", "perplexity", "On the validation text, at the end"),
    ("result/times_float", "× float", "That divided by the float model's"),
    ("result/kl_forward", "KL", "From the teacher to what was trained, nats a token"),
    ("result/top1_agreement", "top-1", "Share of tokens that both find likeliest"),
    ("result/bits_per_weight", "bits/weight", "Of the first export, scales included"),
    ("result/gigabytes", "GB", "Of the first export"),
    ("result/seconds", "seconds", "Of the whole run"),
];

/// Settings that the page shows without being asked: it has room for five columns.
const SHOWN: [&str; 5] = ["bits", "learning_rate", "method", "objective", "steps"];

#[derive(Clone, Message, PartialEq)]
struct PluginData {
    #[prost(oneof = "Data", tags = "2, 3, 4")]
    data: Option<Data>,
}

#[derive(Clone, Oneof, PartialEq)]
enum Data {
    #[prost(message, tag = "2")]
    Experiment(Experiment),
    #[prost(message, tag = "3")]
    Start(Start),
    #[prost(message, tag = "4")]
    End(End),
}

#[derive(Clone, Message, PartialEq)]
struct Experiment {
    #[prost(message, repeated, tag = "4")]
    settings: Vec<About>,
    #[prost(message, repeated, tag = "5")]
    metrics: Vec<Metric>,
    #[prost(string, tag = "6")]
    name: String,
}

/// One column of settings.
#[derive(Clone, Message, PartialEq)]
struct About {
    #[prost(string, tag = "1")]
    name: String,
    /// 1: a string; 3: a number.
    #[prost(int32, tag = "4")]
    kind: i32,
    /// Whether it comes first.
    #[prost(bool, tag = "7")]
    differs: bool,
}

/// One column of results.
#[derive(Clone, Message, PartialEq)]
struct Metric {
    #[prost(message, optional, tag = "1")]
    name: Option<MetricName>,
    #[prost(string, tag = "3")]
    heading: String,
    #[prost(string, tag = "4")]
    about: String,
}

#[derive(Clone, Message, PartialEq)]
struct MetricName {
    #[prost(string, tag = "2")]
    tag: String,
}

#[derive(Clone, Message, PartialEq)]
struct Start {
    #[prost(btree_map = "string, message", tag = "1")]
    settings: BTreeMap<String, Any>,
    /// Seconds since 1970.
    #[prost(double, tag = "5")]
    time: f64,
}

#[derive(Clone, Message, PartialEq)]
struct Any {
    #[prost(oneof = "Kind", tags = "2, 3")]
    kind: Option<Kind>,
}

#[derive(Clone, Oneof, PartialEq)]
enum Kind {
    #[prost(double, tag = "2")]
    Number(f64),
    #[prost(string, tag = "3")]
    Text(String),
}

#[derive(Clone, Message, PartialEq)]
struct End {
    /// 1: success.
    #[prost(int32, tag = "1")]
    status: i32,
    /// Seconds since 1970.
    #[prost(double, tag = "2")]
    time: f64,
}

fn value(name: &str, data: Data) -> Value {
    let data = PluginData { data: Some(data) };
    Value::message(&format!("_hparams_/{name}"), "hparams", data.encode_to_vec())
}

/// What a run begins with: the columns, which are those of any other run, and its own settings.
pub(super) fn start(settings: &[(String, Setting)]) -> [Value; 2] {
    let about = |(name, setting): &(String, Setting)| About {
        name: name.clone(),
        kind: if matches!(setting, Setting::Text(_)) { 1 } else { 3 },
        differs: SHOWN.contains(&name.as_str()),
    };
    let metric = |(tag, heading, about): (&str, &str, &str)| Metric {
        name: Some(MetricName { tag: tag.to_owned() }),
        heading: heading.to_owned(),
        about: about.to_owned(),
    };
    let experiment = Experiment {
        settings: settings.iter().map(about).collect(),
        metrics: RESULTS.into_iter().map(metric).collect(),
        name: "fewbit".to_owned(),
    };
    let known = settings.iter().filter_map(|(name, setting)| {
        let kind = match setting {
            Setting::Number(number) => Kind::Number((*number)?),
            Setting::Text(text) => Kind::Text(text.clone()),
        };
        Some((name.clone(), Any { kind: Some(kind) }))
    });
    let start = Start { settings: known.collect(), time: unix_seconds() };
    [
        value("experiment", Data::Experiment(experiment)),
        value("session_start_info", Data::Start(start)),
    ]
}

/// How a run ended; the numbers are those of TensorBoard's `Status`.
#[derive(Clone, Copy)]
pub(super) enum Ending {
    Complete = 1,
    Failed = 2,
}

/// What a run ends with.
pub(super) fn end(ending: Ending) -> Value {
    value("session_end_info", Data::End(End { status: ending as i32, time: unix_seconds() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_a_run_does_not_have_is_a_column_without_a_value() {
        let settings = [
            ("bits".to_owned(), Setting::Number(Some(2.0))),
            ("method".to_owned(), Setting::Text("seq".to_owned())),
            ("steps".to_owned(), Setting::Number(None)),
        ];
        let [experiment, start] = start(&settings);
        let data = |value: &Value| {
            let plugin = value.metadata.clone().unwrap().plugin.unwrap();
            assert_eq!(plugin.name, "hparams");
            PluginData::decode(&plugin.content[..]).unwrap().data.unwrap()
        };
        let Data::Experiment(experiment) = data(&experiment) else { panic!() };
        let kinds: Vec<i32> = experiment.settings.iter().map(|about| about.kind).collect();
        assert_eq!(kinds, [3, 1, 3]);
        assert!(experiment.settings.iter().all(|about| about.differs));
        assert_eq!(experiment.metrics.len(), RESULTS.len());
        assert_eq!(start.tag, "_hparams_/session_start_info");
        let Data::Start(start) = data(&start) else { panic!() };
        assert_eq!(start.settings.len(), 2);
        assert_eq!(start.settings["bits"].kind, Some(Kind::Number(2.0)));
        assert!(matches!(data(&end(Ending::Complete)), Data::End(End { status: 1, .. })));
    }

    #[test]
    fn a_number_is_encoded_as_protobuf_says() {
        let any = Any { kind: Some(Kind::Number(1.0)) };
        assert_eq!(any.encode_to_vec(), [0x11, 0, 0, 0, 0, 0, 0, 0xf0, 0x3f]);
        let name = MetricName { tag: "a".to_owned() };
        assert_eq!(name.encode_to_vec(), [0x12, 1, b'a']);
    }
}
