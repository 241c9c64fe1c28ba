//! What templates take from Python beside what minijinja has: how values print, `tojson` as
//! transformers has it, and methods of strings and lists.

#![allow(clippy::needless_pass_by_value)] // minijinja gives arguments by value

use std::fmt::Write as _;

use minijinja::value::{Kwargs, Rest, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat;

/// Levels of lists in lists that are written.
const DEEPEST: usize = 128;
/// Bytes that one unit of fuel pays for.
const BYTES_PER_FUEL: usize = 64;

/// Gives an environment all of it.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_formatter(print);
    environment.set_unknown_method_callback(method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |state: &State, value: &Value| shown(state, value));
    environment.add_filter("trim", trimmed);
    environment.add_filter("int", to_int);
    environment.add_filter("float", to_float);
    environment.add_filter("escape", escaped);
    environment.add_filter("e", escaped);
    environment.add_filter("wordcount", |state: &State, value: &Value| {
        let text = shown(state, value)?;
        let words = text.split(|c: char| !c.is_alphanumeric() && c != '_');
        Ok::<_, Error>(words.filter(|word| !word.is_empty()).count())
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
}

/// Writes a value as Python's `str` gives it.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    let written = match value.as_str() {
        Some(text) => out.write_str(text),
        None => out.write_str(&shown(state, value)?),
    };
    written.map_err(|_| Error::from(ErrorKind::WriteFailure))
}

/// Python's `str` of a value.
pub(super) fn shown(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut text = String::new();
    represent(state, &mut text, value, 0)?;
    Ok(text)
}

/// Python's `repr` of a value.
fn represent(state: &State, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    visit(state, value, depth)?;
    match kind_of(value) {
        ValueKind::String => quoted(out, value.as_str().unwrap_or_default()),
        ValueKind::Number if !value.is_integer() => out.push_str(&float(value)),
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                represent(state, out, &key, depth + 1)?;
                out.push_str(": ");
                represent(state, out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                represent(state, out, &item, depth + 1)?;
            }
            if value.is_tuple() && value.len() == Some(1) {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Invalid => {
            return Err(Error::new(ErrorKind::InvalidOperation, value.to_string()));
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => _ = write!(out, "{value}"),
    }
    Ok(())
}

/// The kind of a value as Python has it: two lists joined are a list.
fn kind_of(value: &Value) -> ValueKind {
    match value.kind() {
        ValueKind::Iterable if value.len().is_some() => ValueKind::Seq,
        kind => kind,
    }
}

/// Takes the fuel for writing a value. Lists that hold each other many times are small until they are
/// written.
fn visit(state: &State, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > DEEPEST {
        let what = format!("a value is nested over {DEEPEST} levels deep");
        return Err(Error::new(ErrorKind::InvalidOperation, what));
    }
    let bytes = value.as_str().map_or(0, str::len);
    state.consume_fuel(4 + (bytes / BYTES_PER_FUEL) as u64)
}

/// A string in the quotes that Python would choose.
fn quoted(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => _ = write!(out, "\\{c}"),
            c if c < ' ' || ('\x7f'..='\u{a0}').contains(&c) || c == '\u{ad}' => {
                _ = write!(out, "\\x{:02x}", u32::from(c));
            }
            c if c > '\u{ff}' && c != '\u{3000}' && c.is_whitespace() => {
                _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            '\u{3000}' | '\u{200b}'..='\u{200f}' | '\u{feff}' => {
                _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A float as Python prints it: the shortest digits that read back as the same, with an exponent from
/// 1e16 on and below 1e-4.
fn float(value: &Value) -> String {
    let number: f64 = value.clone().try_into().unwrap_or(f64::NAN);
    if number.is_nan() {
        return "nan".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.to_owned();
    }
    let written = format!("{number:e}");
    let (digits, exponent) = written.split_once('e').unwrap_or((&written, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if number != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.unsigned_abs());
    }
    let plain = number.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// `json.dumps(value, ensure_ascii=…, indent=…, separators=…, sort_keys=…)`, with transformers' default of
/// `ensure_ascii=False`.
fn to_json(
    state: &State,
    value: &Value,
    args: Rest<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    const NAMES: [&str; 4] = ["ensure_ascii", "indent", "separators", "sort_keys"];
    if args.len() > NAMES.len() {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let argument = |index: usize| -> Result<Value, Error> {
        let named: Option<Value> = kwargs.get(NAMES[index])?;
        Ok(args.get(index).cloned().or(named).unwrap_or_else(|| Value::from(())))
    };
    let indent = argument(1)?;
    let indent = match (indent.as_i64(), indent.as_str()) {
        (Some(spaces), _) => Some(" ".repeat(usize::try_from(spaces).unwrap_or(0).min(64))),
        (None, Some(text)) => Some(text.to_owned()),
        (None, None) => None,
    };
    let given = argument(2)?;
    let mut separators =
        if indent.is_some() { [",", ": "] } else { [", ", ": "] }.map(str::to_owned);
    if !given.is_none() {
        for (index, separator) in separators.iter_mut().enumerate() {
            *separator = given.get_item_by_index(index)?.to_string();
        }
    }
    let (ascii, sorted) = (argument(0)?.is_true(), argument(3)?.is_true());
    kwargs.assert_all_used()?;
    let mut json = Json { out: String::new(), ascii, indent, separators, sorted, state };
    json.write(value, 0)?;
    Ok(json.out)
}

struct Json<'a, 's, 'e> {
    out: String,
    ascii: bool,
    indent: Option<String>,
    separators: [String; 2],
    sorted: bool,
    state: &'a State<'s, 'e>,
}

impl Json<'_, '_, '_> {
    fn write(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        visit(self.state, value, depth)?;
        match kind_of(value) {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let number = number(value);
                self.out.push_str(&number);
            }
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Map if value.as_object().is_some_and(is_plain) => {
                let mut pairs = Vec::new();
                for key in value.try_iter()? {
                    pairs.push((key_of(&key)?, value.get_item(&key)?));
                }
                if self.sorted {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.out.push('{');
                for (index, (key, value)) in pairs.iter().enumerate() {
                    self.begin_item(index, depth);
                    self.string(key);
                    self.out.push_str(&self.separators[1].clone());
                    self.write(value, depth + 1)?;
                }
                self.end(pairs.is_empty(), depth, '}');
            }
            ValueKind::Seq => {
                self.out.push('[');
                let mut empty = true;
                for (index, item) in value.try_iter()?.enumerate() {
                    self.begin_item(index, depth);
                    self.write(&item, depth + 1)?;
                    empty = false;
                }
                self.end(empty, depth, ']');
            }
            kind => {
                let what = format!("a value of type {kind} is not JSON");
                return Err(Error::new(ErrorKind::InvalidOperation, what));
            }
        }
        Ok(())
    }

    fn begin_item(&mut self, index: usize, depth: usize) {
        if index > 0 {
            self.out.push_str(&self.separators[0]);
        }
        self.new_line(depth + 1);
    }

    fn end(&mut self, empty: bool, depth: usize, close: char) {
        if !empty {
            self.new_line(depth);
        }
        self.out.push(close);
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\x08' => self.out.push_str("\\b"),
                '\x0c' => self.out.push_str("\\f"),
                c if c < ' ' => _ = write!(self.out, "\\u{:04x}", u32::from(c)),
                c if self.ascii && (!c.is_ascii() || c == '\x7f') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Whether an object is a mapping of the template's data, not one of its tools such as a namespace.
fn is_plain(object: &minijinja::value::DynObject) -> bool {
    !object.type_name().contains("Namespace")
}

fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match float(value).as_str() {
        "nan" => "NaN".to_owned(),
        "inf" => "Infinity".to_owned(),
        "-inf" => "-Infinity".to_owned(),
        plain => plain.to_owned(),
    }
}

/// A key as JSON has it: always a string.
fn key_of(key: &Value) -> Result<String, Error> {
    Ok(match key.kind() {
        ValueKind::String => key.as_str().unwrap_or_default().to_owned(),
        ValueKind::None => "null".to_owned(),
        ValueKind::Bool => key.is_true().to_string(),
        ValueKind::Number => number(key),
        kind => {
            let what = format!("a key of type {kind} is not JSON");
            return Err(Error::new(ErrorKind::InvalidOperation, what));
        }
    })
}

/// White space as Python's strings know it.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Python's `strip` on the ends that are asked for.
fn strip(text: &str, chars: Option<&str>, [start, end]: [bool; 2]) -> String {
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(goes) } else { text };
    let text = if end { text.trim_end_matches(goes) } else { text };
    text.to_owned()
}

/// Jinja's `trim`: of whatever prints.
fn trimmed(state: &State, value: &Value, chars: Option<String>) -> Result<String, Error> {
    Ok(strip(&shown(state, value)?, chars.as_deref(), [true; 2]))
}

/// Jinja's `int`: what is no number is `default`.
fn to_int(value: &Value, default: Option<Value>) -> Value {
    let whole = |number: f64| (number.is_finite() && number.abs() < 9e18).then_some(number as i64);
    let found = match (value.as_str(), value.kind()) {
        (Some(text), _) => {
            let text = text.trim();
            text.parse::<i64>().ok().or_else(|| whole(text.parse().ok()?))
        }
        (None, ValueKind::Number) if value.is_integer() => return value.clone(),
        (None, ValueKind::Number) => value.clone().try_into().ok().and_then(whole),
        (None, ValueKind::Bool) => Some(i64::from(value.is_true())),
        _ => None,
    };
    found.map_or_else(|| default.unwrap_or_else(|| Value::from(0)), Value::from)
}

/// Jinja's `float`: what is no number is `default`.
fn to_float(value: &Value, default: Option<Value>) -> Value {
    let found: Option<f64> = match (value.as_str(), value.kind()) {
        (Some(text), _) => text.trim().parse().ok(),
        (None, ValueKind::Number) => value.clone().try_into().ok(),
        (None, ValueKind::Bool) => Some(f64::from(u8::from(value.is_true()))),
        _ => None,
    };
    found.map_or_else(|| default.unwrap_or_else(|| Value::from(0.0)), Value::from)
}

/// Jinja's `escape`.
fn escaped(state: &State, value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    for c in shown(state, value)?.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&#34;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    Ok(out)
}

/// Whatever has a length and items, as in Python: strings and mappings too.
fn is_sequence(value: &Value) -> bool {
    matches!(
        kind_of(value),
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined
    )
}

/// What a loop takes, as in Python: strings too.
fn is_iterable(value: &Value) -> bool {
    is_sequence(value) || value.kind() == ValueKind::Iterable
}

/// A method of a string, a mapping or a list.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    match (value.as_str(), value.kind()) {
        (Some(text), _) => match string_method(state, text, name, args)? {
            Some(found) => Ok(found),
            None => pycompat::unknown_method_callback(state, value, name, args),
        },
        (None, ValueKind::Seq | ValueKind::Iterable) if name == "index" => {
            let (wanted,): (&Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == *wanted);
            place.map(Value::from).ok_or_else(|| {
                Error::new(ErrorKind::InvalidOperation, format!("{wanted} is not in the list"))
            })
        }
        _ => pycompat::unknown_method_callback(state, value, name, args),
    }
}

/// The methods of strings that minijinja lacks, or has with another idea of white space.
fn string_method(
    state: &State,
    text: &str,
    name: &str,
    args: &[Value],
) -> Result<Option<Value>, Error> {
    let strings = |parts: Vec<String>| parts.into_iter().map(Value::from).collect::<Value>();
    let found = match name {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<Value>,) = from_args(args)?;
            let chars = chars.filter(|chars| !chars.is_none());
            let chars = chars.as_ref().map(characters).transpose()?;
            Value::from(strip(text, chars, [name != "rstrip", name != "lstrip"]))
        }
        "removeprefix" | "removesuffix" => {
            let (part,): (&str,) = from_args(args)?;
            let rest = match name {
                "removeprefix" => text.strip_prefix(part),
                _ => text.strip_suffix(part),
            };
            Value::from(rest.unwrap_or(text))
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = match (separator, name) {
                ("", _) => return Err(Error::new(ErrorKind::InvalidOperation, "empty separator")),
                (_, "partition") => text.split_once(separator),
                _ => text.rsplit_once(separator),
            };
            let parts = match (parts, name) {
                (Some((before, after)), _) => [before, separator, after],
                (None, "partition") => [text, "", ""],
                (None, _) => ["", "", text],
            };
            Value::from(Tuple::from(parts.map(Value::from)))
        }
        "split" | "rsplit" => {
            let (separator, most): (Option<Value>, Option<i64>) = from_args(args)?;
            let separator = separator.filter(|separator| !separator.is_none());
            let separator = separator.as_ref().map(characters).transpose()?;
            if separator == Some("") {
                return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
            }
            let most = most.and_then(|most| usize::try_from(most).ok());
            state.consume_fuel((text.len() / BYTES_PER_FUEL) as u64)?;
            strings(split(text, separator, most, name == "rsplit"))
        }
        "splitlines" => {
            let (keep,): (Option<bool>,) = from_args(args)?;
            strings(lines(text, keep.unwrap_or(false)))
        }
        "isspace" => {
            let () = from_args(args)?;
            Value::from(!text.is_empty() && text.chars().all(is_space))
        }
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let at = text
                .find(part)
                .ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn characters(value: &Value) -> Result<&str, Error> {
    value.as_str().ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, format!("{} is no string", value.kind()))
    })
}

/// Python's `split` and `rsplit`.
fn split(text: &str, separator: Option<&str>, most: Option<usize>, from_end: bool) -> Vec<String> {
    let limit = most.map_or(usize::MAX, |most| most.saturating_add(1));
    let mut parts: Vec<String> = match (separator, from_end) {
        (Some(separator), false) => text.splitn(limit, separator).map(str::to_owned).collect(),
        (Some(separator), true) => text.rsplitn(limit, separator).map(str::to_owned).collect(),
        (None, _) => return words(text, most, from_end),
    };
    if from_end {
        parts.reverse();
    }
    parts
}

/// Words between white space, at most `most` of them apart from the rest.
fn words(text: &str, most: Option<usize>, from_end: bool) -> Vec<String> {
    let most = most.unwrap_or(usize::MAX);
    let mut parts = Vec::new();
    let mut rest =
        if from_end { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        let cut = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        match cut.filter(|_| parts.len() < most) {
            Some(at) if from_end => {
                let after = at + rest[at..].chars().next().map_or(1, char::len_utf8);
                parts.push(rest[after..].to_owned());
                rest = rest[..at].trim_end_matches(is_space);
            }
            Some(at) => {
                parts.push(rest[..at].to_owned());
                rest = rest[at..].trim_start_matches(is_space);
            }
            None => {
                let whole = if from_end { rest.trim_start_matches(is_space) } else { rest };
                // A rest keeps its white space towards the middle alone.
                let whole = if parts.len() < most { whole.trim_matches(is_space) } else { rest };
                parts.push(whole.to_owned());
                break;
            }
        }
    }
    if from_end {
        parts.reverse();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// Python's `splitlines`.
fn lines(text: &str, keep: bool) -> Vec<String> {
    const ENDS: [char; 10] =
        ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut found, mut rest) = (Vec::new(), text);
    while let Some(at) = rest.find(ENDS) {
        let end = &rest[at..];
        let length =
            if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(1, char::len_utf8) };
        found.push(rest[..at + if keep { length } else { 0 }].to_owned());
        rest = &rest[at + length..];
    }
    if !rest.is_empty() {
        found.push(rest.to_owned());
    }
    found
}
