//! The messages of TensorBoard's event files, and the frames they stand in.
//!
//! Field numbers are those of tensorflow's event.proto, summary.proto and tensor.proto.

use prost::{Message, Oneof};

use crate::report::log::unix_seconds;

/// One record.
#[derive(Clone, Message, PartialEq)]
pub(super) struct Record {
    /// Seconds since 1970.
    #[prost(double, tag = "1")]
    pub wall_time: f64,
    #[prost(int64, tag = "2")]
    pub step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    pub what: Option<What>,
}

#[derive(Clone, Oneof, PartialEq)]
pub(super) enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Summary {
    #[prost(message, repeated, tag = "1")]
    pub value: Vec<Value>,
}

#[derive(Clone, Copy, Message, PartialEq)]
pub(super) struct SessionLog {
    /// 1: a start.
    #[prost(int32, tag = "1")]
    pub status: i32,
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Value {
    #[prost(string, tag = "1")]
    pub tag: String,
    #[prost(oneof = "Shown", tags = "2, 5, 8")]
    pub shown: Option<Shown>,
    #[prost(message, optional, tag = "9")]
    pub metadata: Option<Metadata>,
}

#[derive(Clone, Oneof, PartialEq)]
pub(super) enum Shown {
    #[prost(float, tag = "2")]
    Scalar(f32),
    #[prost(message, tag = "5")]
    Histogram(Histogram),
    #[prost(message, tag = "8")]
    Tensor(Tensor),
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Histogram {
    #[prost(double, tag = "1")]
    pub min: f64,
    #[prost(double, tag = "2")]
    pub max: f64,
    #[prost(double, tag = "3")]
    pub num: f64,
    #[prost(double, tag = "4")]
    pub sum: f64,
    #[prost(double, tag = "5")]
    pub sum_squares: f64,
    #[prost(double, repeated, tag = "6")]
    pub bucket_limit: Vec<f64>,
    #[prost(double, repeated, tag = "7")]
    pub bucket: Vec<f64>,
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Tensor {
    /// 1: numbers; 7: strings.
    #[prost(int32, tag = "1")]
    pub dtype: i32,
    #[prost(message, optional, tag = "2")]
    pub shape: Option<Shape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    pub strings: Vec<Vec<u8>>,
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Shape {
    #[prost(message, repeated, tag = "2")]
    pub dim: Vec<Dim>,
}

#[derive(Clone, Copy, Message, PartialEq)]
pub(super) struct Dim {
    #[prost(int64, tag = "1")]
    pub size: i64,
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Metadata {
    #[prost(message, optional, tag = "1")]
    pub plugin: Option<Plugin>,
    /// 2: a tensor.
    #[prost(int32, tag = "4")]
    pub class: i32,
}

#[derive(Clone, Message, PartialEq)]
pub(super) struct Plugin {
    #[prost(string, tag = "1")]
    pub name: String,
    /// A message of the plugin's own.
    #[prost(bytes = "vec", tag = "2")]
    pub content: Vec<u8>,
}

impl Record {
    /// With the time of now.
    pub(super) fn at(step: u64, what: What) -> Self {
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        Self { wall_time: unix_seconds(), step, what: Some(what) }
    }

    /// Values at a step.
    pub(super) fn of(step: u64, values: impl IntoIterator<Item = Value>) -> Self {
        Self::at(step, What::Summary(Summary { value: values.into_iter().collect() }))
    }

    /// The mark from which on TensorBoard drops what it has: events of that step and later ones.
    pub(super) fn restart(step: u64) -> Self {
        Self::at(step, What::SessionLog(SessionLog { status: 1 }))
    }
}

impl Value {
    fn of(tag: &str, shown: Shown) -> Self {
        Self { tag: tag.to_owned(), shown: Some(shown), metadata: None }
    }

    /// A point of a curve.
    pub(super) fn scalar(tag: &str, number: f64) -> Self {
        Self::of(tag, Shown::Scalar(number as f32))
    }

    /// A histogram.
    pub(super) fn histogram(tag: &str, histogram: Histogram) -> Self {
        Self::of(tag, Shown::Histogram(histogram))
    }

    /// Strings that a plugin knows how to show, with the shape that it expects.
    pub(super) fn strings(tag: &str, plugin: &str, dim: Vec<Dim>, strings: Vec<Vec<u8>>) -> Self {
        let tensor = Tensor { dtype: 7, shape: Some(Shape { dim }), strings };
        Self::of_plugin(tag, plugin, Vec::new(), tensor)
    }

    /// A message for a plugin, beside a tensor without numbers.
    pub(super) fn message(tag: &str, plugin: &str, content: Vec<u8>) -> Self {
        let shape = Some(Shape { dim: vec![Dim { size: 0 }] });
        Self::of_plugin(tag, plugin, content, Tensor { dtype: 1, shape, strings: Vec::new() })
    }

    fn of_plugin(tag: &str, plugin: &str, content: Vec<u8>, tensor: Tensor) -> Self {
        let plugin = Some(Plugin { name: plugin.to_owned(), content });
        let metadata = Some(Metadata { plugin, class: 2 });
        Self { metadata, ..Self::of(tag, Shown::Tensor(tensor)) }
    }
}

/// Appends a record in its frame: length and contents, each with its checksum.
pub(super) fn frame(record: &Record, bytes: &mut Vec<u8>) {
    let contents = record.encode_to_vec();
    let length = (contents.len() as u64).to_le_bytes();
    for part in [&length[..], &contents] {
        bytes.extend_from_slice(part);
        bytes.extend(masked(crc32c::crc32c(part)).to_le_bytes());
    }
}

/// A checksum as tensorflow stores it, so that a checksum of data with checksums in it is no weak one.
fn masked(crc: u32) -> u32 {
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_tensorflows() {
        // The first record of any event file, at 0 seconds, as tensorflow writes it.
        let what = Some(What::FileVersion("brain.Event:2".to_owned()));
        let mut bytes = Vec::new();
        frame(&Record { what, ..Record::default() }, &mut bytes);
        assert_eq!(bytes[..8], 15u64.to_le_bytes());
        assert_eq!(bytes[12..14], [0x1a, 13]);
        assert_eq!(&bytes[14..27], b"brain.Event:2");
        assert_eq!(bytes.len(), 8 + 4 + 15 + 4);
        // RFC 3720's check value of 32 zero bytes, and its mask.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(masked(0x8a91_36aa), 0x0fd7_fffa);
    }
}
