//! `metrics.jsonl`: one event a line, written as it happens.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::log::{Appender, unix_seconds};
use super::{Event, Reporter};
use crate::error::{Error, Result};

/// Writes every event except [`Event::Progress`], [`Event::Text`] and [`Event::Settings`] as a line of
/// JSON with `time` in seconds since 1970.
pub struct JsonLines {
    file: Appender,
}

impl JsonLines {
    /// Opens `path`, usually `metrics.jsonl`, at its end; makes the file and its folder if need be.
    /// A last line cut short by a crash is dropped, a whole one is ended.
    ///
    /// # Errors
    /// If the folder or the file cannot be made, read or written.
    pub fn open(path: &Path) -> Result<Self> {
        mend(path).map_err(|e| Error::io("mend", path, &e))?;
        Ok(Self { file: Appender::open(path)? })
    }
}

impl Reporter for JsonLines {
    fn emit(&mut self, event: &Event) {
        if matches!(event, Event::Progress { .. } | Event::Text { .. } | Event::Settings { .. }) {
            return;
        }
        if let Event::Resumed { mark, .. } = event
            && !mark.is_empty()
        {
            self.file.edit(|path| cut_back(path, mark));
        }
        if let Some(line) = text(event) {
            self.file.write(line.as_bytes());
        }
    }
}

/// An event as a line of JSON, with the time.
pub(super) fn text(event: &Event) -> Option<String> {
    match serde_json::to_string(&Timed { time: unix_seconds(), event }) {
        Ok(line) => Some(line + "\n"),
        // Strings and numbers always have a JSON form; said all the same if one day they don't.
        Err(error) => {
            tracing::warn!("cannot write an event as JSON: {error}");
            None
        }
    }
}

#[derive(Serialize)]
struct Timed<'a> {
    time: f64,
    #[serde(flatten)]
    event: &'a Event,
}

/// Drops from the file at `path` what stands behind its last [`Event::Saved`] of this mark: an attempt
/// that was cut off reported it, and it comes again. A file without that mark stays as it is.
fn cut_back(path: &Path, mark: &str) -> io::Result<()> {
    let mut lines = BufReader::new(File::open(path)?);
    let (mut line, mut position, mut end) = (Vec::new(), 0, None);
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line)?;
        if read == 0 {
            break;
        }
        position += read as u64;
        let found: Option<Value> = serde_json::from_slice(&line).ok();
        if found.is_some_and(|event| event["event"] == "saved" && event["mark"] == mark) {
            end = Some(position);
        }
    }
    end.map_or(Ok(()), |end| OpenOptions::new().write(true).open(path)?.set_len(end))
}

/// Makes sure that a file left by a crash ends with a whole line.
fn mend(path: &Path) -> io::Result<()> {
    let mut file = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let length = file.seek(SeekFrom::End(0))?;
    let mut tail = Vec::new();
    let mut start = length;
    let newline = loop {
        if let Some(at) = tail.iter().rposition(|&byte| byte == b'\n') {
            break Some(at);
        }
        if start == 0 {
            break None;
        }
        // Twice as much each time: the last line is short, unless it is a histogram.
        start = length.saturating_sub((tail.len() as u64 * 2).max(4096));
        tail.resize((length - start) as usize, 0);
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut tail)?;
    };
    let line = newline.map_or(0, |at| at + 1);
    if line == tail.len() {
        return Ok(());
    }
    if serde_json::from_slice::<Value>(&tail[line..]).is_ok_and(|value| value.is_object()) {
        file.seek(SeekFrom::End(0))?;
        file.write_all(b"\n")
    } else {
        file.set_len(start + line as u64)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn note(text: &str) -> Event {
        Event::Note { text: text.into() }
    }

    /// The file's text after opening it with `before` inside.
    fn mended(before: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, before).unwrap();
        JsonLines::open(&path).unwrap();
        fs::read_to_string(&path).unwrap()
    }

    #[test]
    fn writes_a_line_for_each_event() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/metrics.jsonl");
        let mut file = JsonLines::open(&path).unwrap();
        file.emit(&note("a\nb"));
        file.emit(&Event::Progress { verb: "x".into(), done: 1, of: 2, detail: String::new() });
        file.emit(&Event::Text { tag: "recipe".into(), text: String::new() });
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        let value: Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(value["event"], "note");
        assert_eq!(value["text"], "a\nb");
        assert!(value["time"].as_f64().unwrap() > 1.6e9);
    }

    #[test]
    fn drops_a_cut_line_and_ends_a_whole_one() {
        assert_eq!(mended(""), "");
        assert_eq!(mended("{\"a\":1}\n"), "{\"a\":1}\n");
        assert_eq!(mended("{\"a\":1}\n{\"b\":"), "{\"a\":1}\n");
        assert_eq!(mended("{\"a\":1}\n{\"b\":2}"), "{\"a\":1}\n{\"b\":2}\n");
        assert_eq!(mended("{\"a\""), "");
        assert_eq!(mended("{\"a\":1}\n12"), "{\"a\":1}\n");
        assert_eq!(mended("{}\n\0\0\0\0"), "{}\n");
    }

    #[test]
    fn finds_the_start_of_a_long_cut_line() {
        let whole = "{\"a\":1}\n".repeat(3000);
        let cut = format!("{whole}{{\"counts\":[{}", "1,".repeat(30_000));
        assert_eq!(mended(&cut), whole);
    }

    #[test]
    fn is_cut_back_to_the_last_state_of_that_name() {
        let saved = |mark: &str| Event::Saved { mark: mark.into() };
        let resumed = |mark: &str| Event::Resumed {
            stage: "distill".into(),
            position: "step 10/20".into(),
            mark: mark.into(),
        };
        let kept = |events: &[Event]| {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("metrics.jsonl");
            let mut file = JsonLines::open(&path).unwrap();
            for event in events {
                file.emit(event);
            }
            file.emit(&note("end"));
            let text = fs::read_to_string(&path).unwrap();
            let names = text.lines().map(|line| {
                let event: Value = serde_json::from_str(line).unwrap();
                let name = event["text"].as_str().or(event["mark"].as_str()).unwrap();
                name.to_owned()
            });
            names.collect::<Vec<_>>()
        };
        let (a, b) = (note("a"), note("b"));
        assert_eq!(kept(&[saved("s"), a.clone(), resumed("s")]), ["s", "s", "end"]);
        let twice = [saved("s"), a.clone(), saved("t"), saved("s"), b.clone(), resumed("s")];
        assert_eq!(kept(&twice), ["s", "a", "t", "s", "s", "end"]);
        // Of a run whose metrics are not from its start.
        assert_eq!(kept(&[a, resumed("s"), b]), ["a", "s", "b", "end"]);
    }

    #[test]
    fn goes_on_after_a_resume() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        JsonLines::open(&path).unwrap().emit(&note("one"));
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"ev").unwrap();
        JsonLines::open(&path).unwrap().emit(&note("two"));
        let text = fs::read_to_string(&path).unwrap();
        let texts: Vec<Value> = text
            .lines()
            .map(|l| serde_json::from_str::<Value>(l).unwrap()["text"].clone())
            .collect();
        assert_eq!(texts, ["one", "two"]);
    }
}
