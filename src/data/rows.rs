//! The records of a data file, one after another: lines of JSON, entries of a JSON list, rows of Parquet.
//!
//! Nothing of a file is held but the record at hand, so that files may be larger than memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

use serde::Deserializer as _;
use serde::de::{DeserializeSeed, IgnoredAny, SeqAccess, Visitor};
use serde_json::Value;

use super::documents::{COMPRESSED, bare, not_text, not_utf8, refused};
use crate::error::{Error, Result};

/// Bytes by which a file's kind is told.
const HEAD: usize = 4096;
/// What a Parquet file begins with.
const PARQUET: &[u8] = b"PAR1";

/// A record and what it is called in messages.
pub(super) struct Row {
    /// What it holds.
    pub(super) value: Value,
    /// `line`, `entry` or `row`.
    pub(super) unit: &'static str,
    /// From 1.
    pub(super) number: usize,
}

impl Row {
    /// `line 7`.
    pub(super) fn place(&self) -> String {
        format!("{} {}", self.unit, self.number)
    }
}

/// What a file holds by its first bytes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    /// No byte but white space.
    Empty,
    /// A JSON list, or prose that opens like one.
    List,
    /// Something that opens with a brace.
    Object,
    /// Other text.
    Text,
    /// Parquet.
    Parquet,
}

/// Gives each record of `path` to `take`, in order; its text is JSON, or it is Parquet.
///
/// # Errors
/// When the file cannot be read or is no such file; `fix` says what would be. And what `take` refuses.
pub(super) fn each(path: &Path, fix: &str, take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    match kind(path)? {
        Kind::Empty => Err(refused("the file is empty", path).fix(fix)),
        Kind::Parquet => parquet(path, take),
        Kind::List => list(path, fix, take),
        Kind::Object | Kind::Text => lines(path, fix, take),
    }
}

/// What a file holds, by its beginning.
///
/// # Errors
/// When it cannot be read, is compressed, or is no UTF-8 text where it begins.
pub(super) fn kind(path: &Path) -> Result<Kind> {
    let mut file = open(path)?;
    loop {
        let head = file.fill_buf().map_err(|e| Error::io("read", path, &e))?;
        let head = &head[..head.len().min(HEAD)];
        if head.is_empty() {
            return Ok(Kind::Empty);
        }
        if head.starts_with(PARQUET) {
            return Ok(Kind::Parquet);
        }
        check_head(head, path)?;
        let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head);
        match text.iter().find(|byte| !byte.is_ascii_whitespace()) {
            Some(b'[') => return Ok(Kind::List),
            Some(b'{') => return Ok(Kind::Object),
            Some(_) => return Ok(Kind::Text),
            None => {
                let length = head.len();
                file.consume(length);
            }
        }
    }
}

/// Refuses what is compressed.
fn check_head(head: &[u8], path: &Path) -> Result<()> {
    let packed = COMPRESSED.iter().find(|(start, ..)| head.starts_with(start));
    // Prose may begin with the letters of a signature, and the head may end within a letter.
    let whole = std::str::from_utf8(head).err().is_none_or(|error| error.error_len().is_none());
    let prose = whole && head.iter().all(|byte| *byte > 8);
    match packed.filter(|_| !prose) {
        Some((_, how, undo)) => Err(refused(format!("the file is compressed ({how})"), path)
            .fix(format!("the text in it: `{undo} {}`", path.display()))),
        None if [b"\xff\xfe", b"\xfe\xff"].iter().any(|mark| head.starts_with(*mark)) => {
            Err(not_text(path))
        }
        None => Ok(()),
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).map_err(|source| Error::io("read", path, &source))?;
    Ok(BufReader::with_capacity(1 << 16, file))
}

/// The records of lines.
fn lines(path: &Path, fix: &str, take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    let mut file = open(path)?;
    let (mut line, mut number) = (Vec::new(), 0);
    loop {
        line.clear();
        let read = file.read_until(b'\n', &mut line).map_err(|e| Error::io("read", path, &e))?;
        if read == 0 {
            return Ok(());
        }
        number += 1;
        if line.contains(&0) {
            return Err(not_text(path));
        }
        let text = std::str::from_utf8(&line).map_err(|_| not_utf8(path, number))?;
        let text = if number == 1 { text.strip_prefix('\u{feff}').unwrap_or(text) } else { text };
        if text.trim().is_empty() {
            continue;
        }
        let value = serde_json::from_str(text).map_err(|error| {
            let what = format!("the line is not valid JSON: {}", bare(&error));
            refused(what, path).at(format!("line {number}")).fix(fix)
        })?;
        take(Row { value, unit: "line", number })?;
    }
}

/// The entries of a list.
fn list(path: &Path, fix: &str, take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    let mut refusal = None;
    let mut entries = Entries { take, refusal: &mut refusal };
    let mut reader = serde_json::Deserializer::from_reader(without_mark(path)?);
    let read = reader.deserialize_seq(&mut entries).and_then(|()| reader.end());
    match (refusal, read) {
        (Some(refusal), _) => Err(refusal),
        (None, Err(error)) if error.is_io() => {
            Err(Error::failed(format!("cannot read the file: {error}")).at(path.display()))
        }
        (None, Err(error)) => {
            Err(refused(format!("the file is not valid JSON: {}", bare(&error)), path)
                .at(format!("line {}", error.line()))
                .fix(fix))
        }
        (None, Ok(())) => Ok(()),
    }
}

/// A file behind the mark that some programs put before UTF-8.
fn without_mark(path: &Path) -> Result<BufReader<File>> {
    let mut file = open(path)?;
    let head = file.fill_buf().map_err(|e| Error::io("read", path, &e))?;
    if head.starts_with(b"\xef\xbb\xbf") {
        file.consume(3);
    }
    Ok(file)
}

/// Whether a whole file is JSON.
pub(super) fn is_json(path: &Path) -> Result<bool> {
    let mut reader = serde_json::Deserializer::from_reader(without_mark(path)?);
    let read = <IgnoredAny as serde::Deserialize>::deserialize(&mut reader);
    Ok(read.is_ok() && reader.end().is_ok())
}

/// Whether the first line that is not blank is a JSON object.
pub(super) fn opens_with_an_object(path: &Path) -> Result<bool> {
    let mut file = without_mark(path)?;
    let mut line = Vec::new();
    loop {
        line.clear();
        // No record is as long, and a text of one line need not be held twice.
        let mut limited = file.by_ref().take(1 << 30);
        let read = limited.read_until(b'\n', &mut line).map_err(|e| Error::io("read", path, &e))?;
        if read == 0 || !line.iter().all(u8::is_ascii_whitespace) {
            return Ok(matches!(serde_json::from_slice(&line), Ok(Value::Object(_))));
        }
    }
}

/// Takes a list entry by entry.
struct Entries<'a> {
    take: &'a mut dyn FnMut(Row) -> Result<()>,
    refusal: &'a mut Option<Error>,
}

impl<'de> Visitor<'de> for &mut Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(value) = list.next_element_seed(Entry)? {
            number += 1;
            if let Err(refusal) = (self.take)(Row { value, unit: "entry", number }) {
                *self.refusal = Some(refusal);
                return Err(serde::de::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

struct Entry;

impl<'de> DeserializeSeed<'de> for Entry {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        serde::Deserialize::deserialize(from)
    }
}

/// The rows of a Parquet file.
#[cfg(feature = "parquet")]
fn parquet(path: &Path, take: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    super::parquet::each(path, take)
}

/// This build does not read them.
#[cfg(not(feature = "parquet"))]
fn parquet(path: &Path, _: &mut dyn FnMut(Row) -> Result<()>) -> Result<()> {
    Err(refused("the file is Parquet, which this build does not read", path)
        .fix("a build with `cargo build --release --features parquet`, or the same data as JSONL"))
}
