//! `fewbit watch`: the screen of a run that goes on somewhere else.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::report::Event;
use crate::report::terminal::Terminal;
use crate::run::{Standing, State};
use crate::stop::StopFlag;

/// Time between two looks at the run's files.
const PAUSE: Duration = Duration::from_millis(250);

/// Arguments of `watch`.
#[derive(Args, Debug)]
pub(super) struct WatchArgs {
    /// The run's folder
    #[arg(value_name = "RUN")]
    run: PathBuf,
    /// Lines of the past to begin with
    #[arg(long, value_name = "N", default_value_t = 20)]
    lines: usize,
}

pub(super) fn run(args: &WatchArgs, stop: &StopFlag) -> Result<()> {
    let mut standing = Standing::of(&args.run)?;
    let mut screen = Terminal::new();
    let mut log = Tail::new(&args.run.join("run.log"));
    let mut past = VecDeque::new();
    log.read(|line| {
        past.push_back(line.to_owned());
        // A line of the log that goes on in the next ones belongs to it; a few more do no harm.
        if past.len() > args.lines {
            past.pop_front();
        }
    })?;
    for line in past {
        screen.replay(message(&line));
    }
    // The bar's numbers; what happened before is told by the log.
    let mut metrics = Tail::new(&args.run.join("metrics.jsonl"));
    metrics.read(|_| {})?;
    while standing.state == State::Running {
        stop.check()
            .map_err(|error| error.fix("the same command to look on; the run itself goes on"))?;
        std::thread::sleep(PAUSE);
        // First the state: a run that ends now has written its last line before.
        standing = Standing::of(&args.run)?;
        log.read(|line| screen.replay(message(line)))?;
        metrics.read(|line| {
            if let Some(event) = bar(line) {
                screen.show(&event);
            }
        })?;
    }
    ended(&standing, &args.run)
}

/// Whether the run came to its end.
fn ended(standing: &Standing, run: &Path) -> Result<()> {
    let why = standing.failure.as_ref().map(|told| format!(": {}", told.what)).unwrap_or_default();
    let how = match standing.state {
        State::Done | State::Running => return Ok(()),
        State::Pending => "the run has not begun",
        State::Stopped => "the run was stopped",
        State::Failed => &format!("the run failed{why}"),
        State::Killed => "the run's process is gone without a word: killed, or out of memory",
    };
    Err(Error::failed(how)
        .at(run.display())
        .fix("its `fewbit train` command goes on from the last checkpoint"))
}

/// A line of `run.log` without its time.
fn message(line: &str) -> &str {
    match line.split_once("Z  ") {
        Some((time, text)) if time.starts_with(|digit: char| digit.is_ascii_digit()) => text,
        _ => line,
    }
}

/// What moves the bar in a line of `metrics.jsonl`.
fn bar(line: &str) -> Option<Event> {
    let event: Value = serde_json::from_str(line).ok()?;
    let number = |key: &str| event[key].as_u64();
    match event["event"].as_str()? {
        "step" => Some(Event::Step {
            stage: usize::try_from(number("stage")?).ok()?,
            verb: event["verb"].as_str()?.to_owned(),
            step: number("step")?,
            of: number("of")?,
            global_step: number("global_step")?,
            values: event["values"]
                .as_object()?
                .iter()
                .map(|(tag, value)| (tag.clone(), value.as_f64().unwrap_or(f64::NAN)))
                .collect(),
        }),
        "block" => Some(Event::Progress {
            verb: event["verb"].as_str()?.to_owned(),
            done: number("index")? + 1,
            of: number("of")?,
            detail: String::new(),
        }),
        _ => None,
    }
}

/// A file that grows, read line by line.
struct Tail {
    path: PathBuf,
    /// Bytes that were read.
    read: u64,
}

impl Tail {
    fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), read: 0 }
    }

    /// Hands over the whole lines that came since. A file that is not there has none; one that became
    /// shorter (a run that went back) is read on from its end.
    fn read(&mut self, mut take: impl FnMut(&str)) -> Result<()> {
        let Ok(mut file) = File::open(&self.path) else { return Ok(()) };
        let io = |e: std::io::Error| Error::io("read", &self.path, &e);
        self.read = self.read.min(file.metadata().map_err(io)?.len());
        file.seek(SeekFrom::Start(self.read)).map_err(io)?;
        let mut lines = BufReader::new(file);
        let mut line = Vec::new();
        loop {
            line.clear();
            let length = lines.read_until(b'\n', &mut line).map_err(io)?;
            if !line.ends_with(b"\n") {
                return Ok(());
            }
            self.read += length as u64;
            take(String::from_utf8_lossy(&line).trim_end_matches('\n'));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_growing_file_gives_whole_lines_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.log");
        let mut tail = Tail::new(&path);
        let new = |tail: &mut Tail| {
            let mut lines = Vec::new();
            tail.read(|line| lines.push(line.to_owned())).unwrap();
            lines
        };
        assert!(new(&mut tail).is_empty());
        let mut file = File::create(&path).unwrap();
        file.write_all(b"one\ntw").unwrap();
        assert_eq!(new(&mut tail), ["one"]);
        file.write_all(b"o\nthree\n").unwrap();
        assert_eq!(new(&mut tail), ["two", "three"]);
        file.set_len(4).unwrap();
        assert!(new(&mut tail).is_empty());
    }

    #[test]
    fn lines_of_the_log_lose_their_time_only() {
        assert_eq!(message("2026-05-09T07:29:33Z  note      a"), "note      a");
        assert_eq!(message("          a line that goes on"), "          a line that goes on");
    }
}
