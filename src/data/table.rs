//! Rows of a table: objects of JSONL or of a JSON list, lines of CSV, and with the `parquet` feature rows of
//! Parquet. The content decides between JSON and CSV, the first bytes tell Parquet.

use std::path::Path;

use serde_json::{Map, Value};

use super::documents::{decode_utf8, kind_of, refused};
use super::rows::{self, Kind};
use crate::error::{Error, Result};

const SHAPES: &str = "one object a line (JSONL), a JSON list of objects, CSV, or Parquet";

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
    // What is called so is a table whatever its first letter.
    let is_csv = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("csv"));
    let rows = match rows::kind(path)? {
        Kind::Empty => return Err(refused("the file is empty", path).fix(SHAPES)),
        Kind::Text => table(path, columns)?,
        Kind::List | Kind::Object if is_csv => table(path, columns)?,
        Kind::List | Kind::Object | Kind::Parquet => records(path)?,
    };
    if rows.is_empty() {
        return Err(refused("the file holds no rows", path).fix(SHAPES));
    }
    Ok(rows)
}

fn records(path: &Path) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    rows::each(path, SHAPES, &mut |row| {
        let place = row.place();
        let Value::Object(fields) = row.value else {
            let what = format!("the {} is {}, expected an object", row.unit, kind_of(&row.value));
            return Err(refused(what, path).at(place).fix(SHAPES));
        };
        all.push(Row { fields, place });
        Ok(())
    })?;
    Ok(all)
}

fn table(path: &Path, columns: Columns) -> Result<Vec<Row>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, &source))?;
    let text = decode_utf8(bytes, path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
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
        assert_eq!(
            head("r", "PAR1"),
            "the file is Parquet, which this build does not read\n  at   r"
        );
    }
}
