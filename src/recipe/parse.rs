//! TOML in, typed value out, with errors that point at the wrong key.
//!
//! Generic machinery: it knows no recipe. The document is kept with the position of every key and
//! value, `--set` overrides are written into it, and the type is read from the result. An override
//! gets positions past the end of the text, so the position of an error alone says whether the file
//! or the command line is to blame.

use std::borrow::Cow;
use std::ops::Range;

use serde::Serialize;
use serde::de::{Deserialize as _, DeserializeOwned};
use toml::Spanned;
use toml::de::{DeTable, DeValue, ValueDeserializer};

use crate::error::{Error, Result};

/// Known names listed in one error before the list is cut.
const LISTED_NAMES: usize = 24;
/// Characters of a wrong string shown in an error.
const SHOWN_CHARS: usize = 40;
/// What to try where nothing better is known.
const EXPLAINED: &str = "`fewbit recipes show upq_int2` explains each key";
/// Jaro-Winkler similarity from which a known name counts as what was meant.
const SIMILAR: f64 = 0.88;

/// Parses `text` as TOML, applies `overrides` (`a.b.0.c=value`) and reads a `T` from the result.
///
/// Returns the value and the table it was read from, overrides included. An override's value is
/// TOML, or else a plain string; missing tables on its way are created, list entries are not.
/// `file` only names the text in errors.
///
/// # Errors
/// Usage errors naming the line with an excerpt, or the override: broken TOML, an override that
/// leads nowhere, and everything `T` refuses.
pub fn parse<T: DeserializeOwned>(
    text: &str,
    file: &str,
    overrides: &[String],
) -> Result<(T, toml::Table)> {
    let source = Source::new(text, file, overrides);
    let document = DeTable::parse(text).map_err(|error| source.broken_toml(&error))?;
    let mut root = Spanned::new(0..0, DeValue::Table(document.into_inner()));
    for set in &source.overrides {
        set.apply(&mut root)?;
    }
    let refused = |error: toml::de::Error| explain(&error, &root, &source);
    let value = T::deserialize(ValueDeserializer::from(root.clone())).map_err(refused)?;
    let table = toml::Table::deserialize(ValueDeserializer::from(root.clone())).map_err(refused)?;
    Ok((value, table))
}

/// Writes `value` as TOML text that [`parse`] reads back.
///
/// # Errors
/// If the value has no TOML form, such as a number beyond 64 bits.
pub fn to_toml<T: Serialize>(value: &T) -> Result<String> {
    toml::to_string_pretty(value)
        .map_err(|error| Error::failed(format!("cannot be written as TOML: {error}")))
}

/// The file's text followed, in positions only, by each override.
struct Source<'a> {
    text: &'a str,
    file: &'a str,
    overrides: Vec<Override<'a>>,
}

impl<'a> Source<'a> {
    fn new(text: &'a str, file: &'a str, overrides: &'a [String]) -> Self {
        // One position between neighbours keeps an empty range at an end unambiguous.
        let mut base = text.len() + 1;
        let place = |raw: &'a String| {
            let set = Override { raw, base };
            base += raw.len() + 1;
            set
        };
        Self { text, file, overrides: overrides.iter().map(place).collect() }
    }

    fn override_at(&self, position: usize) -> Option<&Override<'a>> {
        self.overrides.iter().rev().find(|set| position >= set.base)
    }

    /// Where `span` lies: the override, or the line with carets under it. The document as a whole
    /// has an empty span at 0 and is named by its file alone.
    fn place(&self, span: &Range<usize>) -> String {
        match self.override_at(span.start) {
            Some(set) => format!("--set {}", set.raw),
            None if *span == (0..0) => self.file.to_owned(),
            None => format!("{} {}", self.file, excerpt(self.text, span)),
        }
    }

    fn broken_toml(&self, error: &toml::de::Error) -> Error {
        // An error at the very start must keep its excerpt, hence at least one position wide.
        let span = error.span().map_or(0..1, |span| span.start..span.end.max(span.start + 1));
        let (what, fix) = match error.message() {
            "duplicate key" => {
                let name = self.text.get(span.clone()).unwrap_or_default();
                (format!("the key `{name}` is set twice"), "keep one of them")
            }
            message => (
                format!("not valid TOML: {message}"),
                "put strings in double quotes, and check the brackets and `=` here and just before",
            ),
        };
        Error::usage(what).at(self.place(&span)).fix(fix)
    }
}

/// One `--set a.b=c`, its positions starting at `base`.
struct Override<'a> {
    raw: &'a str,
    base: usize,
}

impl<'a> Override<'a> {
    fn apply(&self, root: &mut Spanned<DeValue<'a>>) -> Result<()> {
        let Some((key, value)) = self.raw.split_once('=') else {
            return Err(self.refuse(format!("`{}` has no `=`", self.raw), "write --set key=value"));
        };
        let path = self.path(key)?;
        let start = self.raw.len() - value.trim_start().len();
        let value = value.trim();
        let plain = || Spanned::new(0..value.len(), DeValue::String(Cow::Borrowed(value)));
        let parsed = DeValue::parse(value).unwrap_or_else(|_| plain());
        *self.descend(root, &path)? = moved(parsed, self.base + start);
        Ok(())
    }

    /// The key's segments, read by TOML's own rules for dotted and quoted keys.
    fn path(&self, key: &str) -> Result<Vec<Spanned<String>>> {
        let probe = format!("{key} = 0");
        let mut path = Vec::new();
        if let Ok(document) = DeTable::parse(&probe) {
            let mut next = Some(document.get_ref());
            while let Some((name, value)) = next.and_then(|table| table.iter().next()) {
                let span = name.span().start + self.base..name.span().end + self.base;
                path.push(Spanned::new(span, name.get_ref().to_string()));
                next = value.get_ref().as_table();
            }
        }
        if path.is_empty() {
            let what = format!("`{}` does not start with a key", self.raw);
            return Err(self.refuse(what, "write --set key=value, as in stage.0.distill.steps=100"));
        }
        Ok(path)
    }

    /// The place `path` leads to, tables created on the way.
    fn descend<'t>(
        &self,
        root: &'t mut Spanned<DeValue<'a>>,
        path: &[Spanned<String>],
    ) -> Result<&'t mut Spanned<DeValue<'a>>> {
        let mut node = root;
        let names: Vec<_> = path.iter().map(|key| key.get_ref().as_str()).collect();
        for (depth, key) in path.iter().enumerate() {
            let (span, key) = (key.span(), key.get_ref());
            let parent = || names[..depth].join(".");
            node = match node.get_mut() {
                DeValue::Table(table) => {
                    let name = Spanned::new(span.clone(), Cow::Owned(key.clone()));
                    let empty = || Spanned::new(span, DeValue::Table(DeTable::new()));
                    table.entry(name).or_insert_with(empty)
                }
                DeValue::Array(list) => {
                    let length = list.len();
                    let index = key.parse().unwrap_or(usize::MAX);
                    list.get_mut(index).ok_or_else(|| self.no_entry(&parent(), key, length))?
                }
                leaf => {
                    let what = format!("`{}` is {}, not a table", parent(), found_words(leaf));
                    return Err(self.refuse(what, format!("--set {}=… replaces it", parent())));
                }
            };
        }
        Ok(node)
    }

    fn no_entry(&self, list: &str, key: &str, length: usize) -> Error {
        let entries = if length == 1 { "1 entry".to_owned() } else { format!("{length} entries") };
        if key.parse::<usize>().is_err() {
            let what = format!("`{list}` is a list with {entries}, and `{key}` is not an index");
            return self.refuse(what, format!("put the index first: {list}.0.{key}"));
        }
        let fix = match length {
            0 => "add the entry to the file".to_owned(),
            _ => format!("an index from 0 to {}, or add an entry to the file", length - 1),
        };
        self.refuse(format!("`{list}` has {entries}, so there is no `{list}.{key}`"), fix)
    }

    fn refuse(&self, what: impl Into<String>, fix: impl Into<String>) -> Error {
        Error::usage(what).at(format!("--set {}", self.raw)).fix(fix)
    }
}

/// The same value with every position moved by `by`.
fn moved(value: Spanned<DeValue<'_>>, by: usize) -> Spanned<DeValue<'_>> {
    let shift = |span: Range<usize>| span.start + by..span.end + by;
    let span = shift(value.span());
    let inner = match value.into_inner() {
        DeValue::Array(list) => {
            DeValue::Array(list.into_iter().map(|entry| moved(entry, by)).collect())
        }
        DeValue::Table(table) => {
            let entries = table.into_iter().map(|(key, value)| {
                (Spanned::new(shift(key.span()), key.into_inner()), moved(value, by))
            });
            DeValue::Table(entries.collect())
        }
        scalar => scalar,
    };
    Spanned::new(span, inner)
}

/// What an error's position points at.
struct Found<'d, 'a> {
    /// Keys and list indices from the root.
    path: Vec<String>,
    value: &'d DeValue<'a>,
    /// The position is the key's, not the value's.
    is_key: bool,
}

impl<'d> Found<'d, '_> {
    /// The last key, with the indices after it: what the reader sees in the line.
    fn name(&self) -> String {
        last_key(&self.path)
    }

    /// The word found there: the string, where it is a value, or else the key.
    fn written(&self) -> &str {
        let word: Option<&'d str> = self.value.as_str().filter(|_| !self.is_key);
        word.or(self.path.last().map(String::as_str)).unwrap_or_default()
    }
}

fn last_key(path: &[String]) -> String {
    let is_index = |segment: &String| segment.bytes().all(|byte| byte.is_ascii_digit());
    let start = path.iter().rposition(|segment| !is_index(segment)).unwrap_or(0);
    path[start..].join(".")
}

/// The innermost key or value at exactly `span`.
fn locate<'d, 'a>(
    node: &'d Spanned<DeValue<'a>>,
    span: &Range<usize>,
    path: &mut Vec<String>,
) -> Option<Found<'d, 'a>> {
    for (name, key_span, child) in children(node.get_ref()) {
        path.push(name);
        if key_span.as_ref() == Some(span) {
            return Some(Found { path: path.clone(), value: child.get_ref(), is_key: true });
        }
        let found = locate(child, span, path);
        if found.is_some() {
            return found;
        }
        path.pop();
    }
    let found = || Found { path: path.clone(), value: node.get_ref(), is_key: false };
    (node.span() == *span).then(found)
}

/// A table's or list's entries: the key or index, the key's position, and the value.
type Child<'d, 'a> = (String, Option<Range<usize>>, &'d Spanned<DeValue<'a>>);

fn children<'d, 'a>(value: &'d DeValue<'a>) -> Vec<Child<'d, 'a>> {
    let list = value.as_array().into_iter().flatten().enumerate();
    let table = value.as_table().into_iter().flatten();
    list.map(|(index, value)| (index.to_string(), None, value))
        .chain(table.map(|(key, value)| (key.get_ref().to_string(), Some(key.span()), value)))
        .collect()
}

/// Puts serde's sentence into the product's words.
fn explain(error: &toml::de::Error, root: &Spanned<DeValue<'_>>, source: &Source<'_>) -> Error {
    let mut span = error.span().unwrap_or(0..0);
    let root_found = Found { path: Vec::new(), value: root.get_ref(), is_key: false };
    let found = locate(root, &span, &mut Vec::new()).unwrap_or(root_found);
    let message = error.message();
    let name = found.name();
    let (what, fix) = if message.starts_with("unknown field ") {
        unknown("key", found.written(), &known_names(message))
    } else if message.starts_with("unexpected keys in table: ") {
        let known = message.rsplit_once(", available keys: ").map_or("", |(_, known)| known);
        let known: Vec<_> = known.split(", ").filter(|name| !name.is_empty()).collect();
        unknown("key", found.written(), &known)
    } else if message.starts_with("unknown variant ") {
        let owner = if found.is_key { last_key(&found.path[..found.path.len() - 1]) } else { name };
        let (what, fix) = unknown("choice", found.written(), &known_names(message));
        (format!("{what} for `{owner}`"), fix)
    } else if let Some(field) = message.strip_prefix("missing field ") {
        missing(field.trim_matches('`'), &found)
    } else if message.starts_with("wanted exactly 1 element") {
        let (blamed, advice) = not_one_choice(&found, source);
        span = blamed.unwrap_or(span);
        advice
    } else if message.starts_with("invalid type: unit variant, ") {
        bare_choice(&found, source.override_at(span.start))
    } else if message == "expected empty table" {
        (format!("`{name}` takes no settings"), format!("`{name} = {{}}`"))
    } else {
        wrong_value(message, &found, source, &span)
    };
    Error::usage(what).at(source.place(&span)).fix(fix)
}

/// The names serde lists; from the right, because the wrong name before them is the user's text.
fn known_names(message: &str) -> Vec<&str> {
    let list = message.rsplit_once(", expected ").map_or("", |(_, list)| list);
    list.split('`').skip(1).step_by(2).collect()
}

/// What happened and what to try.
type Advice = (String, String);

fn unknown(kind: &str, name: &str, known: &[&str]) -> Advice {
    let mut sorted = known.to_vec();
    sorted.sort_unstable();
    let more = if sorted.len() > LISTED_NAMES { ", …" } else { "" };
    let list = sorted.iter().take(LISTED_NAMES).copied().collect::<Vec<_>>().join(", ") + more;
    let fix = match nearest(name, &sorted) {
        Some(near) => format!("`{near}` (known here: {list})"),
        None if sorted.is_empty() => "remove it, there is nothing to set here".to_owned(),
        None => format!("one of: {list}"),
    };
    (format!("unknown {kind} `{name}`"), fix)
}

/// The known name that was probably meant: few edits away, or alike from its beginning.
pub(super) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let name = name.to_lowercase().replace('-', "_");
    let edits = |known: &str| strsim::damerau_levenshtein(&name, &known.to_lowercase());
    let near = known.iter().copied().min_by_key(|known| edits(known))?;
    if edits(near) <= (name.chars().count() / 3).max(1) {
        return Some(near);
    }
    let scored = known.iter().map(|known| (strsim::jaro_winkler(&name, known), *known));
    let (score, alike) = scored.max_by(|left, right| left.0.total_cmp(&right.0))?;
    (score >= SIMILAR).then_some(alike)
}

fn missing(key: &str, found: &Found<'_, '_>) -> Advice {
    if found.path.is_empty() {
        return (format!("missing key `{key}`"), format!("add `{key}` to the file"));
    }
    let what = format!("missing key `{key}` in `{}`", found.name());
    (what, format!("add it to this table, or --set {}.{key}=…", found.path.join(".")))
}

/// The position to blame, where it is not the table's own, and the advice.
fn not_one_choice(found: &Found<'_, '_>, source: &Source<'_>) -> (Option<Range<usize>>, Advice) {
    let name = found.name();
    let keys: Vec<_> = found.value.as_table().into_iter().flat_map(DeTable::keys).collect();
    let choices: Vec<_> = keys.iter().map(|key| key.get_ref().as_ref()).collect();
    // The override that added a choice is to blame, though the table itself is in the file.
    let added = keys.iter().find(|key| source.override_at(key.span().start).is_some());
    let fix = match (added, name.rsplit_once('.')) {
        _ if keys.is_empty() => "name the choice as a key of this table".to_owned(),
        (Some(key), _) => {
            format!(
                "replace the whole table: --set '{}={{ {key} = {{ … }} }}'",
                found.path.join(".")
            )
        }
        (None, Some((list, _))) => format!("give each its own `[[{list}]]` entry"),
        (None, None) => "keep one of them".to_owned(),
    };
    let (count, list) = (choices.len(), choices.join(", "));
    let what = match count {
        0 => format!("`{name}` is empty, expected exactly one choice"),
        _ => format!("`{name}` has {count} choices ({list}), expected exactly one"),
    };
    (added.map(|key| key.span()), (what, fix))
}

/// `method = "lrq"` where the choice holds a table.
fn bare_choice(found: &Found<'_, '_>, set: Option<&Override<'_>>) -> Advice {
    let choice = found.value.as_str().unwrap_or_default();
    let fix = match set {
        Some(_) => format!("--set '{}={{ {choice} = {{}} }}'", found.path.join(".")),
        None => format!("`{}.{choice} = {{}}`", found.name()),
    };
    (format!("`{choice}` has settings, so it is written as a table"), fix)
}

fn wrong_value(
    message: &str,
    found: &Found<'_, '_>,
    source: &Source<'_>,
    span: &Range<usize>,
) -> Advice {
    let header = source.text.get(span.clone()).filter(|text| text.starts_with("[["));
    if let Some(header) = header.filter(|_| message.starts_with("invalid ")) {
        let name = header.trim_matches(['[', ']', ' ']);
        return (format!("`{name}` is one table, not a list"), format!("write [{name}]"));
    }
    let name = found.name();
    let named = |sentence: String| {
        // A type's own sentence may open with the key.
        let again = sentence.strip_prefix(&name).is_some_and(|rest| rest.starts_with(' '));
        if again || name.is_empty() { sentence } else { format!("`{name}`: {sentence}") }
    };
    let expected = match message.strip_prefix("invalid ") {
        _ if message == "wanted string or table" => Some("a name or a table".to_owned()),
        // From the right: the part before may quote any text of the user's.
        Some(invalid) if !invalid.starts_with("length") => {
            invalid.rsplit_once(", expected ").map(|(_, expected)| {
                expected_words(expected, found.value, invalid.starts_with("value"))
            })
        }
        _ => None,
    };
    let Some(expected) = expected else { return (named(message.to_owned()), remedy(message)) };
    let quotes = ["a string", "a path"].contains(&&*expected);
    let fix = match (source.override_at(span.start), found.value) {
        (_, DeValue::Array(_) | DeValue::Table(_)) => format!("write {expected}"),
        (Some(set), _) if quotes => {
            let (key, value) = set.raw.split_once('=').unwrap_or((set.raw, ""));
            format!("--set '{key}=\"{}\"'", value.trim())
        }
        (None, _) if quotes => "put the value in double quotes".to_owned(),
        (None, DeValue::String(_)) => format!("write {expected}, without quotes"),
        _ => format!("write {expected}"),
    };
    let sentence = format!("expected {expected}, found {}", found_words(found.value));
    (named(sentence), fix)
}

/// What to try after a type's own sentence, read from the sentence where it tells.
fn remedy(message: &str) -> String {
    let range = message.rsplit_once(" is not in ").and_then(|(_, range)| range.split_once("..="));
    match range {
        Some((low, high)) => format!("write a number from {low} to {high}"),
        None if message.ends_with(" is not a rate") => "write a number of at least 0".to_owned(),
        None => EXPLAINED.to_owned(),
    }
}

/// A value in an error: its type, and the value where it is short.
fn found_words(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if text.chars().count() > SHOWN_CHARS => {
            format!("string {:?}…", text.chars().take(SHOWN_CHARS).collect::<String>())
        }
        DeValue::String(text) => format!("string {text:?}"),
        DeValue::Integer(number) => format!("integer {number}"),
        DeValue::Float(number) => format!("float {number}"),
        DeValue::Boolean(value) => format!("boolean {value}"),
        DeValue::Datetime(date) => format!("date {date}"),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// A Rust type's name in serde's message, in the words of a TOML file. Where the type fits but the
/// value does not, the range matters.
fn expected_words(expected: &str, found: &DeValue<'_>, out_of_range: bool) -> String {
    let words = match expected {
        "u8" if out_of_range => "an integer from 0 to 255",
        "u32" if out_of_range => "an integer from 0 to 4294967295",
        "u64" | "usize" if out_of_range => "an integer of at least 0",
        // An integer where one is wanted: it passed the 64 bits that serde asks for first.
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => {
            if found.is_integer() { "a 64-bit integer" } else { "an integer" }
        }
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "path string" => "a path",
        "a sequence" => "a list",
        "a map" => "a table",
        _ if expected.starts_with("struct ") => "a table",
        _ if expected.starts_with("a nonzero u") => "an integer of at least 1",
        _ => expected,
    };
    words.to_owned()
}

/// `line N:`, and below it that line with carets under the part of `span` that is on it.
fn excerpt(text: &str, span: &Range<usize>) -> String {
    let start = text.floor_char_boundary(span.start);
    let before = &text[..start];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let number = 1 + before.matches('\n').count();
    // Tabs stay tabs, so that the carets stand right at any tab width.
    let column = before[line_start..].chars();
    let indent: String = column.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    let marked = text[start..]
        .char_indices()
        .take_while(|(offset, c)| start + offset < span.end && !matches!(c, '\n' | '\r'));
    let carets = "^".repeat(marked.count().max(1));
    let gutter = " ".repeat(number.to_string().len());
    format!("line {number}:\n       {number} | {line}\n       {gutter} | {indent}{carets}")
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::path::PathBuf;

    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Recipe {
        seed: u64,
        output: PathBuf,
        model: Model,
        #[serde(default)]
        quant: Option<Quant>,
        #[serde(default)]
        stage: Vec<Stage>,
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Model {
        path: String,
        #[serde(default)]
        compute: Compute,
        #[serde(default)]
        packed: bool,
    }

    #[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
    #[serde(rename_all = "lowercase")]
    enum Compute {
        F32,
        #[default]
        Bf16,
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Quant {
        bits: u8,
        #[serde(default, rename = "override")]
        overrides: Vec<QuantOverride>,
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct QuantOverride {
        r#match: String,
        group_size: Option<NonZeroUsize>,
        width: Option<Width>,
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(rename_all = "snake_case")]
    enum Stage {
        Reconstruct(Training),
        Distill(Training),
        TuneScales { steps: usize },
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Training {
        method: Method,
        steps: usize,
        #[serde(default)]
        learning_rate: f64,
        #[serde(default)]
        betas: Vec<f64>,
    }

    /// A width with a sentence of its own.
    #[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
    #[serde(try_from = "i64", into = "i64")]
    struct Width(i64);

    impl TryFrom<i64> for Width {
        type Error = String;

        fn try_from(width: i64) -> std::result::Result<Self, String> {
            match width {
                1..=8 => Ok(Self(width)),
                0 => Err("width = 0 holds nothing".to_owned()),
                ..0 => Err("a width below 0".to_owned()),
                _ => Err(format!("width = {width} is not in 1..=8")),
            }
        }
    }

    impl From<Width> for i64 {
        fn from(width: Width) -> Self {
            width.0
        }
    }

    #[derive(Debug, Deserialize, PartialEq, Serialize)]
    #[serde(rename_all = "lowercase")]
    enum Method {
        Flexround(Flexround),
        Lrq { rank: usize },
        Seq,
    }

    #[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
    #[serde(deny_unknown_fields)]
    struct Flexround {
        #[serde(default)]
        clip: bool,
    }

    const RECIPE: &str = r#"seed = 0
output = "runs/x"

[model]
path = "toy"

[quant]
bits = 4
[[quant.override]]
match = "*.down_proj"
group_size = 32

[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 100

[[stage]]
[stage.distill]
method.seq = {}
steps = 7
learning_rate = 1
"#;

    fn read(text: &str, sets: &[&str]) -> Result<(Recipe, toml::Table)> {
        let sets: Vec<_> = sets.iter().map(ToString::to_string).collect();
        parse(text, "r.toml", &sets)
    }

    /// The whole error for the recipe with `from` replaced by `to`.
    #[track_caller]
    fn assert_error(from: &str, to: &str, expected: &[&str]) {
        assert!(RECIPE.contains(from), "the recipe has no {from:?}");
        let error = read(&RECIPE.replacen(from, to, 1), &[]).unwrap_err();
        assert_eq!(error.to_string(), expected.join("\n"));
        assert_eq!(error.kind().exit_code(), 2);
    }

    /// The whole error for the recipe with one override; the `at` line is always the override.
    #[track_caller]
    fn assert_set_error(set: &str, what: &str, fix: &str) {
        let error = read(RECIPE, &["seed=1", set, "model.packed=true"]).unwrap_err();
        assert_eq!(error.to_string(), format!("{what}\n  at   --set {set}\n  try  {fix}"));
        assert_eq!(error.kind().exit_code(), 2);
    }

    #[test]
    fn reads_a_recipe_and_its_table_in_order() {
        let (recipe, table) = read(RECIPE, &[]).unwrap();
        assert_eq!(recipe.stage.len(), 2);
        assert_eq!(table.keys().collect::<Vec<_>>(), ["seed", "output", "model", "quant", "stage"]);
        assert_eq!(table["stage"][1]["distill"]["steps"].as_integer(), Some(7));
    }

    #[test]
    fn what_is_written_reads_back() {
        let (recipe, _) =
            read(RECIPE, &["stage.0.reconstruct.method={ lrq = { rank = 4 } }"]).unwrap();
        let text = to_toml(&recipe).unwrap();
        assert_eq!(read(&text, &[]).unwrap().0, recipe);
        assert!(to_toml(&u128::MAX).is_err());
    }

    #[test]
    fn unknown_keys_show_line_caret_and_nearest() {
        assert_error(
            "steps",
            "stpes",
            &[
                "unknown key `stpes`",
                "  at   r.toml line 16:",
                "       16 | stpes = 100",
                "          | ^^^^^",
                "  try  `steps` (known here: betas, learning_rate, method, steps)",
            ],
        );
        assert_error(
            "[model]",
            "[model]\n\tcolour = 1 # ä",
            &[
                "unknown key `colour`",
                "  at   r.toml line 5:",
                "       5 | \tcolour = 1 # ä",
                "         | \t^^^^^^",
                "  try  one of: compute, packed, path",
            ],
        );
        assert_error(
            "[model]",
            "[modle]",
            &[
                "unknown key `modle`",
                "  at   r.toml line 4:",
                "       4 | [modle]",
                "         |  ^^^^^",
                "  try  `model` (known here: model, output, quant, seed, stage)",
            ],
        );
        assert_error(
            "{}",
            "{ clop = true }",
            &[
                "unknown key `clop`",
                "  at   r.toml line 15:",
                "       15 | method.flexround = { clop = true }",
                "          |                      ^^^^",
                "  try  `clip` (known here: clip)",
            ],
        );
        assert_error(
            "flexround = {}",
            "lrq = { \"r`k\" = 1 }",
            &[
                "unknown key `r`k`",
                "  at   r.toml line 15:",
                "       15 | method.lrq = { \"r`k\" = 1 }",
                "          |                ^^^^^",
                "  try  one of: rank",
            ],
        );
    }

    #[test]
    fn unknown_choices_name_what_they_are_for() {
        assert_error(
            "flexround",
            "flexrond",
            &[
                "unknown choice `flexrond` for `method`",
                "  at   r.toml line 15:",
                "       15 | method.flexrond = {}",
                "          |        ^^^^^^^^",
                "  try  `flexround` (known here: flexround, lrq, seq)",
            ],
        );
        assert_error(
            "stage.distill",
            "stage.distil",
            &[
                "unknown choice `distil` for `stage.1`",
                "  at   r.toml line 19:",
                "       19 | [stage.distil]",
                "          |        ^^^^^^",
                "  try  `distill` (known here: distill, reconstruct, tune_scales)",
            ],
        );
        assert_error(
            "\"toy\"",
            "\"toy\"\ncompute = \"bf61\"",
            &[
                "unknown choice `bf61` for `compute`",
                "  at   r.toml line 6:",
                "       6 | compute = \"bf61\"",
                "         |           ^^^^^^",
                "  try  `bf16` (known here: bf16, f32)",
            ],
        );
    }

    #[test]
    fn missing_keys_name_the_line_of_their_table() {
        assert_error(
            "steps = 100\n",
            "",
            &[
                "missing key `steps` in `reconstruct`",
                "  at   r.toml line 14:",
                "       14 | [stage.reconstruct]",
                "          | ^^^^^^^^^^^^^^^^^^^",
                "  try  add it to this table, or --set stage.0.reconstruct.steps=…",
            ],
        );
        assert_error(
            "flexround = {}",
            "lrq = {}",
            &[
                "missing key `rank` in `lrq`",
                "  at   r.toml line 15:",
                "       15 | method.lrq = {}",
                "          |              ^^",
                "  try  add it to this table, or --set stage.0.reconstruct.method.lrq.rank=…",
            ],
        );
        assert_error(
            "seed = 0",
            "",
            &["missing key `seed`", "  at   r.toml", "  try  add `seed` to the file"],
        );
    }

    #[test]
    fn wrong_types_say_expected_and_found() {
        let line_16 = |value: &str, what: &str, fix: &str| {
            let line = format!("       16 | steps = {value}");
            let carets = format!("          |         {}", "^".repeat(value.len()));
            let what = format!("`steps`: {what}");
            let fix = format!("  try  {fix}");
            let expected = [&what, "  at   r.toml line 16:", &line, &carets, &fix];
            assert_error("100", value, &expected);
        };
        let fix = "write an integer";
        line_16(
            "\"a, expected b\"",
            "expected an integer, found string \"a, expected b\"",
            "write an integer, without quotes",
        );
        line_16("1.5", "expected an integer, found float 1.5", fix);
        line_16("true", "expected an integer, found boolean true", fix);
        line_16("[1]", "expected an integer, found a list", fix);
        line_16("{ a = 1 }", "expected an integer, found a table", fix);
        line_16("2024-01-01", "expected an integer, found date 2024-01-01", fix);
        line_16(
            "-1",
            "expected an integer of at least 0, found integer -1",
            "write an integer of at least 0",
        );
        line_16(
            "99999999999999999999",
            "expected a 64-bit integer, found integer 99999999999999999999",
            "write a 64-bit integer",
        );
    }

    #[test]
    fn wrong_values_of_other_types() {
        assert_error(
            "32",
            "0",
            &[
                "`group_size`: expected an integer of at least 1, found integer 0",
                "  at   r.toml line 11:",
                "       11 | group_size = 0",
                "          |              ^",
                "  try  write an integer of at least 1",
            ],
        );
        assert_error(
            "= 4",
            "= 300",
            &[
                "`bits`: expected an integer from 0 to 255, found integer 300",
                "  at   r.toml line 8:",
                "       8 | bits = 300",
                "         |        ^^^",
                "  try  write an integer from 0 to 255",
            ],
        );
        assert_error(
            "\"toy\"",
            "5",
            &[
                "`path`: expected a string, found integer 5",
                "  at   r.toml line 5:",
                "       5 | path = 5",
                "         |        ^",
                "  try  put the value in double quotes",
            ],
        );
        assert_error(
            "steps = 100",
            "steps = 100\nbetas = [1, \"x\"]",
            &[
                "`betas.1`: expected a number, found string \"x\"",
                "  at   r.toml line 17:",
                "       17 | betas = [1, \"x\"]",
                "          |             ^^^",
                "  try  write a number, without quotes",
            ],
        );
        assert_error(
            "[quant]",
            "[[quant]]",
            &[
                "`quant` is one table, not a list",
                "  at   r.toml line 7:",
                "       7 | [[quant]]",
                "         | ^^^^^^^^^",
                "  try  write [quant]",
            ],
        );
    }

    #[test]
    fn a_types_own_sentence_gets_a_place_and_advice() {
        let at_11 = |value: &str, what: &str, fix: &str| {
            let line = format!("       11 | width = {value}");
            let carets = format!("          |         {}", "^".repeat(value.len()));
            let fix = format!("  try  {fix}");
            let expected = [what, "  at   r.toml line 11:", &line, &carets, &fix];
            assert_error("group_size = 32", &format!("width = {value}"), &expected);
        };
        at_11("9", "width = 9 is not in 1..=8", "write a number from 1 to 8");
        at_11("0", "width = 0 holds nothing", EXPLAINED);
        at_11("-1", "`width`: a width below 0", EXPLAINED);
        assert_eq!(remedy("learning_rate = -1 is not a rate"), "write a number of at least 0");
    }

    #[test]
    fn a_choice_is_exactly_one_table() {
        assert_error(
            "[[stage]]\n[stage.distill]",
            "[stage.distill]",
            &[
                "`stage.0` has 2 choices (reconstruct, distill), expected exactly one",
                "  at   r.toml line 13:",
                "       13 | [[stage]]",
                "          | ^^^^^^^^^",
                "  try  give each its own `[[stage]]` entry",
            ],
        );
        let at_15 = |method: &str, what: &str, carets: &str, fix: &str| {
            let line = format!("       15 | {method}");
            let carets = format!("          | {carets}");
            let fix = format!("  try  {fix}");
            let expected = [what, "  at   r.toml line 15:", &line, &carets, &fix];
            assert_error("method.flexround = {}", method, &expected);
        };
        at_15(
            "method = { lrq = {}, seq = {} }",
            "`method` has 2 choices (lrq, seq), expected exactly one",
            "         ^^^^^^^^^^^^^^^^^^^^^^",
            "keep one of them",
        );
        at_15(
            "method = {}",
            "`method` is empty, expected exactly one choice",
            "         ^^",
            "name the choice as a key of this table",
        );
        at_15(
            "method = \"lrq\"",
            "`lrq` has settings, so it is written as a table",
            "         ^^^^^",
            "`method.lrq = {}`",
        );
        at_15("method.seq.x = 1", "`seq` takes no settings", "       ^^^", "`seq = {}`");
        at_15(
            "method = 5",
            "`method`: expected a name or a table, found integer 5",
            "         ^",
            "write a name or a table",
        );
    }

    #[test]
    fn broken_toml_points_at_the_place() {
        let quotes = "  try  put strings in double quotes, and check the brackets and `=` here and just before";
        assert_error(
            "[stage.distill]",
            "[stage.distill",
            &[
                "not valid TOML: unclosed table, expected `]`",
                "  at   r.toml line 19:",
                "       19 | [stage.distill",
                "          |               ^",
                quotes,
            ],
        );
        assert_error(
            "seed = 0",
            "= 0",
            &[
                "not valid TOML: unquoted keys cannot be empty, expected letters, numbers, `-`, `_`",
                "  at   r.toml line 1:",
                "       1 | = 0",
                "         | ^",
                quotes,
            ],
        );
        assert_error(
            "steps = 100",
            "steps = 100\r\nsteps = 2",
            &[
                "the key `steps` is set twice",
                "  at   r.toml line 17:",
                "       17 | steps = 2",
                "          | ^^^^^",
                "  try  keep one of them",
            ],
        );
    }

    #[test]
    fn overrides_of_every_kind() {
        let (recipe, table) = read(
            RECIPE,
            &[
                "stage.0.reconstruct.steps=5",
                "stage.0.reconstruct.method.flexround.clip = true",
                "stage.1.distill.method={ lrq = { rank = 3 } }",
                "stage.1.\"distill\".betas=[0.9, 0.95]",
                "quant.override.0.match=*.up_proj",
                "model.path=runs/x=y",
                "model.compute=f32",
                "output=\"2024\"",
                "seed=1",
                "seed=2",
            ],
        )
        .unwrap();
        let flexround = Method::Flexround(Flexround { clip: true });
        let Stage::Reconstruct(first) = &recipe.stage[0] else { panic!("{recipe:?}") };
        assert_eq!((first.steps, &first.method), (5, &flexround));
        let Stage::Distill(second) = &recipe.stage[1] else { panic!("{recipe:?}") };
        assert_eq!((&second.method, second.steps), (&Method::Lrq { rank: 3 }, 7));
        assert_eq!(second.betas, [0.9, 0.95]);
        assert_eq!(recipe.model.path, "runs/x=y");
        assert_eq!(recipe.model.compute, Compute::F32);
        assert_eq!(recipe.quant.unwrap().overrides[0].r#match, "*.up_proj");
        assert_eq!((recipe.output, recipe.seed), (PathBuf::from("2024"), 2));
        assert_eq!(table["model"]["compute"].as_str(), Some("f32"));
        assert_eq!(table["stage"][1]["distill"]["method"]["lrq"]["rank"].as_integer(), Some(3));
    }

    #[test]
    fn overrides_create_missing_tables() {
        let text = "seed = 0\noutput = \"x\"\n[model]\npath = \"toy\"\n";
        let (recipe, _) = read(text, &["quant.bits=3"]).unwrap();
        assert_eq!(recipe.quant, Some(Quant { bits: 3, overrides: Vec::new() }));
        // A key the override brought may lack another: that, too, is the override's doing.
        let error = read(text, &["quant.override=[]"]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing key `bits` in `quant`\n  at   --set quant.override=[]\n  \
             try  add it to this table, or --set quant.bits=…"
        );
    }

    #[test]
    fn an_override_that_does_not_fit_is_named() {
        let known = "`steps` (known here: betas, learning_rate, method, steps)";
        assert_set_error("stage.0.reconstruct.stpes=100", "unknown key `stpes`", known);
        let keys = "one of: model, output, quant, seed, stage";
        assert_set_error("extra.a.b=1", "unknown key `extra`", keys);
        assert_set_error(
            "stage.1.distill.method={ lqr = {} }",
            "unknown choice `lqr` for `method`",
            "`lrq` (known here: flexround, lrq, seq)",
        );
        assert_set_error(
            "stage.1.distill.method=lrq",
            "`lrq` has settings, so it is written as a table",
            "--set 'stage.1.distill.method={ lrq = {} }'",
        );
        assert_set_error(
            "stage.1.distill.method.lrq.rank=3",
            "`method` has 2 choices (seq, lrq), expected exactly one",
            "replace the whole table: --set 'stage.1.distill.method={ lrq = { … } }'",
        );
        assert_set_error(
            "stage.0.reconstruct.steps=many",
            "`steps`: expected an integer, found string \"many\"",
            "write an integer",
        );
        assert_set_error(
            "output=2024-01-01",
            "`output`: expected a path, found date 2024-01-01",
            "--set 'output=\"2024-01-01\"'",
        );
    }

    #[test]
    fn an_override_that_leads_nowhere_is_named() {
        assert_set_error(
            "stage.2.distill.steps=1",
            "`stage` has 2 entries, so there is no `stage.2`",
            "an index from 0 to 1, or add an entry to the file",
        );
        assert_set_error(
            "quant.override.1.match=x",
            "`quant.override` has 1 entry, so there is no `quant.override.1`",
            "an index from 0 to 0, or add an entry to the file",
        );
        assert_set_error(
            "stage.distill.steps=1",
            "`stage` is a list with 2 entries, and `distill` is not an index",
            "put the index first: stage.0.distill",
        );
        assert_set_error(
            "output.a=1",
            "`output` is string \"runs/x\", not a table",
            "--set output=… replaces it",
        );
        let example = "write --set key=value, as in stage.0.distill.steps=100";
        assert_set_error("=5", "`=5` does not start with a key", example);
        assert_set_error("a b=5", "`a b=5` does not start with a key", example);
        assert_set_error("seed", "`seed` has no `=`", "write --set key=value");
    }

    #[test]
    fn errors_of_the_file_stay_errors_of_the_file_beside_overrides() {
        let error = read(&RECIPE.replacen("steps", "stpes", 1), &["seed=1"]).unwrap_err();
        assert!(error.to_string().contains("at   r.toml line 16:"), "{error}");
    }

    #[test]
    fn long_lists_and_long_values_are_cut() {
        let known: Vec<String> = (10..40).map(|i| format!("key_{i}")).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let fix = unknown("key", "zzz", &known).1;
        assert!(fix.ends_with("key_32, key_33, …"), "{fix}");
        let error = read(RECIPE, &[&format!("seed={}", "x".repeat(500))]).unwrap_err();
        assert!(error.what().len() < 100, "{error}");
    }

    #[test]
    fn nearest_accepts_slips_and_refuses_guesses() {
        let known = ["learning_rate", "steps", "batch", "bits"];
        assert_eq!(nearest("learning-rate", &known), Some("learning_rate"));
        assert_eq!(nearest("learn_rate", &known), Some("learning_rate"));
        assert_eq!(nearest("Batch", &known), Some("batch"));
        assert_eq!(nearest("momentum", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
