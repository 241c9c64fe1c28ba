//! Documents from a data file, and the hash that names the data in a report.
//!
//! Three shapes are read: JSONL with a `text` key on each line, a JSON list of strings or of such objects, and
//! plain text (the whole file is one document); Parquet with a column `text` where it is built in. The content decides; the extension only settles whether
//! a file that opens like JSON but does not parse is broken JSON or prose.

use std::path::Path;

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use super::examples::{DataFormat, Fields, other_format};
use super::rows::{self, Kind, Row};
use crate::error::{Error, Result};
use crate::store::folder::sha256_file;
use crate::store::hex;

const SHAPES: &str = "give {\"text\": \"…\"} on each line, a JSON list of strings, or plain text";

/// Reads the documents of `path`, in file order.
///
/// Documents keep their text exactly; an empty document stays, so that counts match the file.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, holds no document, or breaks its own shape; the
/// error names the file and the line.
pub fn read_documents(path: &Path) -> Result<Vec<String>> {
    let mut all = Vec::new();
    each(path, &mut |text| {
        all.push(text);
        Ok(())
    })?;
    Ok(all)
}

/// Gives each document of `path` to `take`, in file order; only the one at hand is held.
///
/// # Errors
/// As [`read_documents`], and what `take` refuses.
pub(super) fn each(path: &Path, take: &mut dyn FnMut(String) -> Result<()>) -> Result<()> {
    let named = is_named_json(path);
    let prose = match rows::kind(path)? {
        Kind::Text => !named,
        // Valid JSON of another shape is a mistake under any name.
        Kind::List => !named && !rows::is_json(path)?,
        Kind::Object => !named && !rows::opens_with_an_object(path)?,
        Kind::Empty | Kind::Parquet => false,
    };
    if prose {
        let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, &source))?;
        let text = decode_utf8(bytes, path)?;
        return take(text.strip_prefix('\u{feff}').unwrap_or(&text).to_owned());
    }
    let mut any = false;
    rows::each(path, SHAPES, &mut |row| {
        any = true;
        let text = text_of(&row).map_err(|what| {
            let fix = other_format(&row, DataFormat::Text).unwrap_or_else(|| SHAPES.to_owned());
            refused(what, path).at(row.place()).fix(fix)
        })?;
        take(text)
    })?;
    if any {
        return Ok(());
    }
    Err(refused("the file holds no documents", path).fix(SHAPES))
}

/// The text of a record: a string of a list, or an object with `text`.
fn text_of(row: &Row) -> Result<String, String> {
    match &row.value {
        Value::String(text) if row.unit == "entry" => Ok(text.clone()),
        Value::Object(object) => {
            Fields { object, unit: row.unit }.required("text").map(str::to_owned)
        }
        other => Err(format!("the {} is {}, expected an object", row.unit, kind_of(other))),
    }
}

/// SHA-256 of data files as lower-case hexadecimal.
///
/// For one path this is the file's own digest, as `sha256sum` prints it. For several it is the
/// digest of their digests in the order given, so that moving bytes between files changes it.
///
/// # Errors
/// If a file cannot be read.
pub fn sha256_of<P: AsRef<Path>>(paths: &[P]) -> Result<String> {
    if let [path] = paths {
        return sha256_file(path.as_ref());
    }
    let mut all = Sha256::new();
    for path in paths {
        all.update(sha256_file(path.as_ref())?);
    }
    Ok(hex(&all.finalize()))
}

/// First bytes of compressed files, and what undoes them.
pub(super) const COMPRESSED: [(&[u8], &str, &str); 5] = [
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"\x28\xb5\x2f\xfd", "Zstandard", "unzstd"),
    (b"\xfd7zXZ\0", "xz", "unxz"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"PK\x03\x04", "zip", "unzip"),
];

/// A file's bytes as text.
///
/// # Errors
/// When they are compressed, hold zeros as UTF-16 does, or are no UTF-8.
pub(super) fn decode_utf8(bytes: Vec<u8>, path: &Path) -> Result<String> {
    let packed = COMPRESSED.iter().find(|(start, ..)| bytes.starts_with(start));
    // Prose may begin with the letters of a signature.
    let prose = || std::str::from_utf8(&bytes).is_ok() && bytes.iter().all(|byte| *byte > 8);
    let packed = packed.filter(|_| !prose());
    if let Some((_, how, undo)) = packed {
        return Err(refused(format!("the file is compressed ({how})"), path)
            .fix(format!("the text in it: `{undo} {}`", path.display())));
    }
    let wide = [b"\xff\xfe", b"\xfe\xff"].iter().any(|mark| bytes.starts_with(*mark));
    if wide || bytes.contains(&0) {
        return Err(not_text(path));
    }
    String::from_utf8(bytes).map_err(|error| {
        let valid = error.utf8_error().valid_up_to();
        not_utf8(path, error.as_bytes()[..valid].split(|byte| *byte == b'\n').count())
    })
}

/// A file with zero bytes in it.
pub(super) fn not_text(path: &Path) -> Error {
    let what = "the file is no UTF-8 text: it holds zero bytes, as UTF-16 and binary files do";
    let iconv = format!("`iconv -f UTF-16 -t UTF-8 {}` if it is UTF-16", path.display());
    refused(what, path).fix(iconv)
}

/// A file whose line `line` is in no UTF-8.
pub(super) fn not_utf8(path: &Path, line: usize) -> Error {
    refused("the file is not valid UTF-8", path)
        .at(format!("line {line}"))
        .fix("convert it to UTF-8 text first")
}

/// Whether a file's name says that it is JSON.
pub(super) fn is_named_json(path: &Path) -> bool {
    path.extension().and_then(|extension| extension.to_str()).is_some_and(|extension| {
        ["json", "jsonl", "ndjson"].iter().any(|known| extension.eq_ignore_ascii_case(known))
    })
}

/// The parser's message without its position: the line in it counts within one JSONL line.
pub(super) fn bare(error: &serde_json::Error) -> String {
    let message = error.to_string();
    match message.rfind(" at line ") {
        Some(end) => message[..end].to_owned(),
        None => message,
    }
}

pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

pub(super) fn refused(what: impl Into<String>, path: &Path) -> Error {
    Error::preflight(what).at(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, content: impl AsRef<[u8]>) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        read_documents(&path).map_err(|error| {
            assert_eq!(error.kind().exit_code(), 3);
            error.to_string().replace(&format!("{}/", folder.path().display()), "")
        })
    }

    fn refusal(name: &str, content: impl AsRef<[u8]>) -> String {
        let message = read(name, content).unwrap_err();
        message.lines().take(2).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn reads_the_three_shapes_by_content() {
        let lines = "{\"text\": \"one\\n\", \"id\": 1}\r\n\n{\"text\": \"two\"}\n";
        for name in ["a.jsonl", "a.json", "a.txt", "a"] {
            assert_eq!(read(name, lines).unwrap(), ["one\n", "two"], "{name}");
            assert_eq!(read(name, "[\"one\",\n \"\"]").unwrap(), ["one", ""], "{name}");
        }
        assert_eq!(read("a.txt", "two\nlines\n").unwrap(), ["two\nlines\n"]);
        assert_eq!(read("a", "\u{feff}[\"one\"]").unwrap(), ["one"]);
    }

    #[test]
    fn prose_that_opens_like_json_is_prose_unless_named_json() {
        assert_eq!(read("a.txt", "[Enter a ghost]\nBoo.").unwrap(), ["[Enter a ghost]\nBoo."]);
        assert_eq!(read("a.txt", "{sic} he said").unwrap(), ["{sic} he said"]);
        assert_eq!(
            refusal("a.json", "[Enter a ghost]"),
            "the file is not valid JSON: expected value\n  at   a.json, line 1"
        );
        // Valid JSON of another shape is a mistake under any name.
        assert_eq!(
            refusal("a.txt", "[\"one\",\n{\"text\": 1}]"),
            "`text` is a number, expected a string\n  at   a.txt, entry 2"
        );
    }

    #[test]
    fn a_broken_line_is_named() {
        let good = "{\"text\": \"x\"}\n".repeat(11);
        assert_eq!(
            read("a.jsonl", format!("{good}{{\"text\": \"x\"")).unwrap_err(),
            "the line is not valid JSON: EOF while parsing an object\n  at   a.jsonl, line 12\n  \
             try  give {\"text\": \"…\"} on each line, a JSON list of strings, or plain text"
        );
        assert_eq!(
            refusal("a.jsonl", format!("{good}\n{{\"messages\": [], \"id\": 1}}")),
            "the line has no `text` key (found: messages, id)\n  at   a.jsonl, line 13"
        );
        assert_eq!(
            refusal("a.jsonl", format!("{good}{{\"text\": 5}}")),
            "`text` is a number, expected a string\n  at   a.jsonl, line 12"
        );
        assert_eq!(
            refusal("a.jsonl", format!("{good}\"x\"")),
            "the line is a string, expected an object\n  at   a.jsonl, line 12"
        );
    }

    #[test]
    fn empty_and_undecodable_files_are_refused() {
        assert_eq!(refusal("a.txt", " \n"), "the file is empty\n  at   a.txt");
        assert_eq!(refusal("a.json", "[]"), "the file holds no documents\n  at   a.json");
        assert_eq!(
            refusal("a.txt", b"one\ntwo \xff"),
            "the file is not valid UTF-8\n  at   a.txt, line 2"
        );
        let missing = read_documents(Path::new("no/such/file")).unwrap_err();
        assert!(missing.to_string().contains("no/such/file"), "{missing}");
    }

    #[test]
    fn hashes_one_file_as_itself_and_several_in_order() {
        let folder = tempfile::tempdir().unwrap();
        let [abc, empty] = ["abc", "empty"].map(|name| folder.path().join(name));
        std::fs::write(&abc, "abc").unwrap();
        std::fs::write(&empty, "").unwrap();
        assert_eq!(
            sha256_of(&[&abc]).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let pair = sha256_of(&[&abc, &empty]).unwrap();
        assert_ne!(pair, sha256_of(&[&empty, &abc]).unwrap());
        assert_ne!(pair, sha256_of(&[&abc]).unwrap());
        assert!(sha256_of(&[folder.path().join("none")]).is_err());
    }
}
