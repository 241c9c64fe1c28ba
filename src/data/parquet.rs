//! Rows of Parquet files as the JSON that they stand for.

use std::fs::File;
use std::path::Path;

use parquet::file::reader::{FileReader as _, SerializedFileReader};
use parquet::record::{Field, Row as Record};
use serde_json::{Map, Value};

use super::documents::refused;
use super::rows::Row;
use crate::error::{Error, Result};

/// Gives each row to `take`, in order; a row group at a time is read.
///
/// # Errors
/// When the file is damaged, or packed in a way that this build does not know; and what `take` refuses.
pub(super) fn each(path: &Path, take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(|source| Error::io("read", path, &source))?;
    let damaged = |error: &dyn std::fmt::Display| {
        refused(format!("the Parquet file cannot be read: {error}"), path)
            .fix("another copy of it, or the same data as JSONL")
    };
    // The crate panics over some damaged files.
    let walk = std::panic::AssertUnwindSafe(|| -> Result<()> {
        let reader = SerializedFileReader::new(file).map_err(|error| damaged(&error))?;
        let rows = reader.get_row_iter(None).map_err(|error| damaged(&error))?;
        for (index, record) in rows.enumerate() {
            let record = record.map_err(|error| damaged(&error))?;
            take(Row { value: of_record(&record), unit: "row", number: index + 1 })?;
        }
        Ok(())
    });
    std::panic::catch_unwind(walk).unwrap_or_else(|_| Err(damaged(&"it is damaged")))
}

fn of_record(record: &Record) -> Value {
    let pairs = record.get_column_iter().map(|(name, field)| (name.clone(), of_field(field)));
    Value::Object(pairs.collect())
}

fn of_field(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(truth) => Value::from(*truth),
        Field::Byte(number) => Value::from(*number),
        Field::Short(number) => Value::from(*number),
        Field::Int(number) | Field::Date(number) | Field::TimeMillis(number) => {
            Value::from(*number)
        }
        Field::Long(number)
        | Field::TimeMicros(number)
        | Field::TimestampMillis(number)
        | Field::TimestampMicros(number) => Value::from(*number),
        Field::UByte(number) => Value::from(*number),
        Field::UShort(number) => Value::from(*number),
        Field::UInt(number) => Value::from(*number),
        Field::ULong(number) => Value::from(*number),
        Field::Float16(number) => Value::from(number.to_f64()),
        Field::Float(number) => Value::from(*number),
        Field::Double(number) => Value::from(*number),
        Field::Str(text) => Value::from(text.as_str()),
        Field::Bytes(bytes) => Value::from(String::from_utf8_lossy(bytes.data()).into_owned()),
        Field::Group(record) => of_record(record),
        Field::ListInternal(list) => list.elements().iter().map(of_field).collect(),
        Field::MapInternal(map) => {
            let key = |key: &Field| match of_field(key) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            let pairs = map.entries().iter().map(|(k, v)| (key(k), of_field(v)));
            Value::Object(pairs.collect::<Map<String, Value>>())
        }
        other => Value::from(other.to_string()),
    }
}
