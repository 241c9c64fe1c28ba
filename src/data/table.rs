//! Rows of a table: objects of JSONL or of a JSON list, lines of CSV, and with the `parquet` feature rows of
//! Parquet. The content decides between JSON and CSV, the first bytes tell Parquet.

use std::path::Path;

use serde_json::{Map, Value};

use super::documents::{bare, decode_utf8, kind_of, refused};
use crate::error::{Error, Result};

/// First bytes of a Parquet file.
const PARQUET: &[u8] = b"PAR1";

/// One row, and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Values by column; those of CSV are strings.
    pub fields: Map<String, Value>,
    /// `line 3`, `entry 3` of a list, `row 3`.
    pub place: String,
}

/// The columns of CSV files that have no line of names.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Their names, in order.
    pub names: &'static [&'static str],
    /// The one of them that only a line of names holds as a value.
    pub telling: &'static str,
}

/// Reads the rows of `path`, in file order.
///
/// # Errors
/// If the file cannot be read, holds no row, or breaks its own form; the error names file and line.
pub fn read_rows(path: &Path, columns: Columns) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, &source))?;
    if bytes.starts_with(PARQUET) {
        return parquet::read(path);
    }
    let text = decode_utf8(bytes, path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let is_csv = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("csv"));
    let rows = match text.trim_start().chars().next() {
        None => return Err(refused("the file is empty", path).fix(SHAPES)),
        Some('[') if !is_csv => list(text, path)?,
        Some('{') if !is_csv => lines(text, path)?,
        Some(_) => table(text, path, columns)?,
    };
    if rows.is_empty() {
        return Err(refused("the file holds no rows", path).fix(SHAPES));
    }
    Ok(rows)
}

const SHAPES: &str = "one object a line (JSONL), a JSON list of objects, CSV, or Parquet";

fn list(text: &str, path: &Path) -> Result<Vec<Row>> {
    let entries: Vec<Value> = serde_json::from_str(text).map_err(|error| {
        refused(format!("the file is not valid JSON: {}", bare(&error)), path)
            .at(format!("line {}", error.line()))
            .fix(SHAPES)
    })?;
    let rows = entries.into_iter().enumerate().map(|(index, entry)| {
        let place = format!("entry {}", index + 1);
        object(entry, "entry")
            .map_err(|what| refused(what, path).at(&place).fix(SHAPES))
            .map(|fields| Row { fields, place: place.clone() })
    });
    rows.collect()
}

fn lines(text: &str, path: &Path) -> Result<Vec<Row>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let rows = lines.map(|(index, line)| {
        let place = format!("line {}", index + 1);
        let fields = serde_json::from_str(line)
            .map_err(|error| format!("the line is not valid JSON: {}", bare(&error)))
            .and_then(|value| object(value, "line"));
        match fields {
            Ok(fields) => Ok(Row { fields, place }),
            Err(what) => Err(refused(what, path).at(place).fix(SHAPES)),
        }
    });
    rows.collect()
}

fn object(value: Value, unit: &str) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(fields) => Ok(fields),
        other => Err(format!("the {unit} is {}, expected an object", kind_of(&other))),
    }
}

fn table(text: &str, path: &Path, columns: Columns) -> Result<Vec<Row>> {
    let mut reader =
        csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut names: Vec<String> = columns.names.iter().map(|name| (*name).to_owned()).collect();
    let mut rows = Vec::new();
    for (index, record) in reader.records().enumerate() {
        let record = record.map_err(|error| {
            refused(format!("the file is not valid CSV: {error}"), path).fix(SHAPES)
        })?;
        let line = record.position().map_or(0, csv::Position::line);
        if index == 0 && record.iter().any(|cell| cell.trim() == columns.telling) {
            names = record.iter().map(|cell| cell.trim().to_owned()).collect();
            continue;
        }
        if record.len() != names.len() {
            let (found, listed) = (record.len(), names.join(", "));
            let what = format!("the line has {found} columns, expected {}: {listed}", names.len());
            return Err(refused(what, path).at(format!("line {line}")).fix(SHAPES));
        }
        let cells = record.iter().map(|cell| Value::String(cell.to_owned()));
        let fields = names.iter().cloned().zip(cells).collect();
        rows.push(Row { fields, place: format!("line {line}") });
    }
    Ok(rows)
}

#[cfg(not(feature = "parquet"))]
mod parquet {
    use super::{Path, Result, Row, refused};

    pub(super) fn read(path: &Path) -> Result<Vec<Row>> {
        Err(refused("this fewbit was built without Parquet", path)
            .fix("the same rows as JSONL or CSV, or a build with --features parquet"))
    }
}

#[cfg(feature = "parquet")]
mod parquet {
    use ::parquet::file::reader::{FileReader, SerializedFileReader};
    use ::parquet::record::{Field, Row as Record};
    use serde_json::{Map, Value};

    use super::{Error, Path, Result, Row, SHAPES, refused};

    pub(super) fn read(path: &Path) -> Result<Vec<Row>> {
        let broken = |error: ::parquet::errors::ParquetError| {
            refused(format!("the file is not valid Parquet: {error}"), path).fix(SHAPES)
        };
        let file = std::fs::File::open(path).map_err(|e| Error::io("read", path, &e))?;
        let reader = SerializedFileReader::new(file).map_err(broken)?;
        let rows = reader.get_row_iter(None).map_err(broken)?;
        let rows = rows.enumerate().map(|(index, record)| {
            Ok(Row {
                fields: object(&record.map_err(broken)?),
                place: format!("row {}", index + 1),
            })
        });
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        if rows.is_empty() {
            return Err(refused("the file holds no rows", path).fix(SHAPES));
        }
        Ok(rows)
    }

    fn object(record: &Record) -> Map<String, Value> {
        record.get_column_iter().map(|(name, field)| (name.clone(), value(field))).collect()
    }

    fn value(field: &Field) -> Value {
        match field {
            Field::Bool(value) => (*value).into(),
            Field::Byte(value) => (*value).into(),
            Field::Short(value) => (*value).into(),
            Field::Int(value) => (*value).into(),
            Field::Long(value) => (*value).into(),
            Field::UByte(value) => (*value).into(),
            Field::UShort(value) => (*value).into(),
            Field::UInt(value) => (*value).into(),
            Field::ULong(value) => (*value).into(),
            Field::Float(value) => f64::from(*value).into(),
            Field::Double(value) => (*value).into(),
            Field::Str(text) => text.clone().into(),
            Field::Group(record) => Value::Object(object(record)),
            Field::ListInternal(list) => list.elements().iter().map(value).collect(),
            _ => Value::Null,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COLUMNS: Columns = Columns { names: &["question", "A", "answer"], telling: "question" };

    fn read(name: &str, content: &str) -> Result<Vec<Row>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_rows(&path, COLUMNS).map_err(|error| {
            assert_eq!(error.kind().exit_code(), 3);
            error.to_string().replace(&format!("{}/", folder.path().display()), "")
        })
    }

    fn cells(rows: &[Row]) -> Vec<String> {
        rows.iter().map(|row| Value::Object(row.fields.clone()).to_string() + &row.place).collect()
    }

    #[test]
    fn every_form_gives_rows() {
        let lines = "{\"a\": 1}\n\n{\"a\": [\"x\"]}\n";
        assert_eq!(
            cells(&read("r.jsonl", lines).unwrap()),
            ["{\"a\":1}line 1", "{\"a\":[\"x\"]}line 3"]
        );
        let list = "[{\"a\": 1},\n {\"a\": null}]";
        assert_eq!(cells(&read("r.json", list).unwrap())[1], "{\"a\":null}entry 2");
        let named = "A,question,answer\n1,\"two\nlines\",x\n";
        let row = "{\"A\":\"1\",\"question\":\"two\\nlines\",\"answer\":\"x\"}line 2";
        assert_eq!(cells(&read("r.csv", named).unwrap()), [row]);
        // A question may open with a bracket.
        let bare = read("r.csv", "[x] is,\"a, b\",A\n").unwrap();
        assert_eq!(bare[0].fields["question"], "[x] is");
        assert_eq!((bare[0].fields["A"].as_str(), &bare[0].place[..]), (Some("a, b"), "line 1"));
    }

    #[test]
    fn what_is_no_row_is_named() {
        let head = |name: &str, content: &str| {
            let message = read(name, content).unwrap_err();
            message.lines().take(2).collect::<Vec<_>>().join("\n")
        };
        assert_eq!(
            head("r.json", "[1]"),
            "the entry is a number, expected an object\n  at   r.json, entry 1"
        );
        assert_eq!(head("r.json", "[]"), "the file holds no rows\n  at   r.json");
        assert_eq!(head("r.jsonl", ""), "the file is empty\n  at   r.jsonl");
        assert_eq!(
            head("r.csv", "a,b,c\nd\n"),
            "the line has 1 columns, expected 3: question, A, answer\n  at   r.csv, line 2"
        );
        #[cfg(not(feature = "parquet"))]
        assert_eq!(head("r", "PAR1"), "this fewbit was built without Parquet\n  at   r");
    }
}
