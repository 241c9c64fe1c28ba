//! Writing to stdout and stderr. A reader that went away (`fewbit ... | head`) is no error.

use std::fmt;
use std::io::{ErrorKind, IsTerminal, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::error::{Error, Result};
use crate::report::terminal::Manner;

/// Whether nobody reads stdout any more.
static CLOSED: AtomicBool = AtomicBool::new(false);

/// Writes to stdout and flushes.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write", Path::new("stdout"), &e))
        }
        Err(_) => {
            CLOSED.store(true, Ordering::Relaxed);
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Whether a write to stdout found that its reader went away.
pub(super) fn is_closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

/// Whether stdout takes no colours: it is no terminal, or nobody wants them.
pub(super) fn is_plain() -> bool {
    !std::io::stdout().is_terminal() || std::env::var_os("NO_COLOR").is_some()
}

/// Writes a line to stdout.
pub(super) fn line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Writes one JSON object to stdout.
pub(super) fn json(value: &serde_json::Value) -> Result<()> {
    line(&value.to_string())
}

/// Writes to stderr, for who sits at it.
pub(super) fn aside(text: &str) {
    if Manner::chosen() == Manner::Json {
        let text = text.trim();
        if !text.is_empty() {
            let line = json!({ "event": "note", "text": text });
            let _ = writeln!(std::io::stderr().lock(), "{line}");
        }
        return;
    }
    // A closed stderr must not end the work.
    let _ = write!(std::io::stderr().lock(), "{text}");
}

/// Writes an error to stderr.
pub(super) fn error(error: &Error) {
    let text = match Manner::chosen() {
        Manner::Json => {
            let mut line = json!({ "event": "error" });
            if let (Some(line), Value::Object(told)) = (line.as_object_mut(), json!(error.told())) {
                line.extend(told);
            }
            line.to_string()
        }
        Manner::Lines | Manner::Quiet => format!("error: {error}"),
    };
    // Nowhere is left to report a failure to.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Columns side by side, as wide as what is in them; the last ones are left out where a terminal has no room.
/// The first row is the heading.
pub(super) fn table(rows: &[Vec<String>]) -> Result<()> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let cell =
        |row: &[String], column: usize| row.get(column).map_or(0, |text| text.chars().count());
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().map(|row| cell(row, column)).max().unwrap_or(0))
        .collect();
    let room = room();
    let mut shown = columns;
    while shown > 1 && widths[..shown].iter().sum::<usize>() + 2 * (shown - 1) > room {
        shown -= 1;
    }
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().take(shown).zip(&widths);
        let line: Vec<String> = cells.map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    print(&text)
}

/// A text in lines of a width, broken between words.
pub(super) fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let last = lines.last().map_or(0, |line| line.chars().count());
        if last > 0 && last + 1 + word.chars().count() > width {
            lines.push(String::new());
        }
        if let Some(line) = lines.last_mut() {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// Columns of the terminal that stdout is; no end of them where it is none.
pub(super) fn room() -> usize {
    if !std::io::stdout().is_terminal() {
        return usize::MAX;
    }
    let columns = std::env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
    columns.filter(|&columns| columns >= 40).unwrap_or(80)
}

/// What the log says, as an object a line.
pub(super) struct JsonLine;

impl<S, N> FormatEvent<S, N> for JsonLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let level = event.metadata().level().as_str().to_lowercase();
        writeln!(out, "{}", json!({ "event": "log", "level": level, "text": message.0 }))
    }
}

/// The fields of a log event as one text.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        // Nothing fails to be written to a string.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, "{name}={value:?}"),
        };
    }
}
