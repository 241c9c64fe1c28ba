//! `metrics.jsonl`: one event a line, written as it happens.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use super::log::{Appender, unix_seconds};
use super::{At, Event, Position, Reporter};
use crate::error::{Error, Result};

/// Writes every event except [`Event::Progress`] and [`Event::Text`] as a line of JSON with
/// `time` in seconds since 1970.
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
        if matches!(event, Event::Progress { .. } | Event::Text { .. }) {
            return;
        }
        match serde_json::to_vec(&Timed { time: unix_seconds(), event }) {
            Ok(mut line) => {
                line.push(b'\n');
                self.file.write(&line);
            }
            // Strings and numbers always have a JSON form; said all the same if one day they don't.
            Err(error) => tracing::warn!("cannot write an event as JSON: {error}"),
        }
    }
}

#[derive(Serialize)]
struct Timed<'a> {
    time: f64,
    #[serde(flatten)]
    event: &'a Event,
}

/// Drops from `path` what an attempt that was cut off reported beyond `position`: it comes again. What
/// a failure led to stays, and so do notes and warnings.
///
/// # Errors
/// If the file cannot be read or written.
pub fn cut_back(path: &Path, position: &Position) -> Result<()> {
    mend(path).map_err(|e| Error::io("mend", path, &e))?;
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        // Bytes of something else: nothing of it is ours to drop.
        Err(error) if error.kind() == ErrorKind::InvalidData => return Ok(()),
        Err(error) => return Err(Error::io("read", path, &error)),
    };
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let known =
        |line: &&str| serde_json::from_str(line).map_or(Known::Beside, |e| place(&e, position));
    let tail = lines.iter().rposition(|line| known(line) == Known::Saved).map_or(0, |at| at + 1);
    let dropped = |line: &&&str| known(line) == Known::Beyond;
    let Some(first) = lines[tail..].iter().position(|line| dropped(&line)) else { return Ok(()) };
    let start: usize = lines[..tail + first].iter().map(|line| line.len()).sum();
    let kept: String =
        lines[tail + first..].iter().filter(|line| !dropped(line)).copied().collect();
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.set_len(start as u64)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(kept.as_bytes())
    };
    write().map_err(|e| Error::io("write", path, &e))
}

/// Where an event stands beside the position that a run goes on from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Known {
    /// Not behind it: nothing earlier is dropped.
    Saved,
    /// Behind it.
    Beyond,
    /// No part of the order.
    Beside,
}

fn place(event: &Value, position: &Position) -> Known {
    let kind = event["event"].as_str().unwrap_or_default();
    let stage = event["stage"].as_u64().map(|stage| stage as usize);
    let of_stage = stage == Some(position.stage);
    let after = |key: &str, saved: u64| match event[key].as_u64() {
        Some(at) if at > saved => Known::Beyond,
        _ => Known::Saved,
    };
    match (kind, position.at) {
        ("stage_start" | "retry", _) if of_stage => Known::Saved,
        ("evaluation" | "gate" | "stage_end", _) if of_stage => Known::Beyond,
        ("exported" | "histogram", _) => Known::Beyond,
        ("step" | "validation", At::Step(step)) if of_stage => after("step", step),
        ("block", At::Block(blocks)) if of_stage => match event["index"].as_u64() {
            Some(index) if index >= blocks as u64 => Known::Beyond,
            _ => Known::Saved,
        },
        ("block_loss", At::Block(blocks)) => match event["block"].as_u64() {
            Some(block) if block >= blocks as u64 => Known::Beyond,
            _ => Known::Beside,
        },
        // Whatever an earlier stage reported is saved.
        _ if stage.is_some_and(|stage| stage < position.stage) => Known::Saved,
        _ => Known::Beside,
    }
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
    fn is_cut_back_to_what_is_saved() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let cut = |lines: &[&str], position: Position| {
            fs::write(&path, lines.join("\n") + "\n").unwrap();
            cut_back(&path, &position).unwrap();
            let text = fs::read_to_string(&path).unwrap();
            text.lines().map(str::to_owned).collect::<Vec<_>>()
        };
        let step = |step: u64| format!(r#"{{"event":"step","stage":1,"step":{step}}}"#);
        let (s10, s20, s30) = (step(10), step(20), step(30));
        let start = r#"{"event":"stage_start","stage":1}"#;
        let note = r#"{"event":"note","text":"x"}"#;
        let retry = r#"{"event":"retry","stage":1,"step":30,"back_to":10}"#;
        let earlier = r#"{"event":"block","stage":0,"index":7}"#;
        let at = |step| Position { stage: 1, at: At::Step(step), global_step: 0 };
        assert_eq!(
            cut(&[earlier, start, &s10, &s20, note, &s30], at(10)),
            [earlier, start, &s10, note]
        );
        assert_eq!(cut(&[earlier, start, &s10], at(0)), [earlier, start]);
        // What was before a failure stays, though its steps are later.
        let lines = [start, &s10, &s20, &s30, retry, &s20, &s30];
        assert_eq!(cut(&lines, at(20)), lines[..6]);
        assert_eq!(cut(&lines, at(10)), lines[..5]);
        let block = |index: u64| format!(r#"{{"event":"block","stage":1,"index":{index}}}"#);
        let loss = |block: u64| format!(r#"{{"event":"block_loss","block":{block},"step":1}}"#);
        let (b0, l0, l1) = (block(0), loss(0), loss(1));
        let at = Position { stage: 1, at: At::Block(1), global_step: 0 };
        assert_eq!(cut(&[start, &l0, &b0, &l1], at), [start, &l0, &b0]);
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
