//! `run.log`, and the file under it and under `metrics.jsonl` and TensorBoard's events: one that
//! is only ever appended to and that a full disk does not turn into an error of the run.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::terminal::line;
use super::{Event, Reporter, Thinning};
use crate::error::{Error, Result};

/// Writes the terminal's lines, unshortened and with the time in UTC, to a file.
pub struct LogFile {
    file: Appender,
    thinning: Thinning,
}

impl LogFile {
    /// Opens `path`, usually `run.log`, at its end; makes the file and its folder if need be.
    ///
    /// # Errors
    /// If the folder or the file cannot be made or opened for writing.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { file: Appender::open(path)?, thinning: Thinning::default() })
    }
}

impl Reporter for LogFile {
    fn emit(&mut self, event: &Event) {
        if !self.thinning.passes(event) {
            return;
        }
        if let Some(line) = line(event, usize::MAX) {
            self.file.write(format!("{}  {line}\n", utc(unix_seconds())).as_bytes());
        }
    }
}

/// An append-only file that warns on the first failed write and goes on.
#[derive(Debug)]
pub(super) struct Appender {
    file: File,
    path: PathBuf,
    /// Length up to the last whole write, for cutting off a partial one.
    length: u64,
    warned: bool,
}

impl Appender {
    pub(super) fn open(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|e| Error::io("make the folder of", path, &e))?;
        }
        let open = || -> io::Result<(File, u64)> {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let length = file.metadata()?.len();
            Ok((file, length))
        };
        let (file, length) = open().map_err(|e| Error::io("open", path, &e))?;
        Ok(Self { file, path: path.to_owned(), length, warned: false })
    }

    /// Lets `edit` shorten the file.
    pub(super) fn edit(&mut self, edit: impl FnOnce(&Path) -> io::Result<()>) {
        let edited = edit(&self.path).and_then(|()| Ok(self.file.metadata()?.len()));
        match edited {
            Ok(length) => self.length = length,
            Err(error) => self.warn(&error),
        }
    }

    fn warn(&mut self, error: &io::Error) {
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(
                "cannot write {}: {error}; the run goes on, entries will be missing there",
                self.path.display()
            );
        }
    }

    /// Appends `bytes` as one piece: all of it, or (after a failure) none of it.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        match self.file.write_all(bytes) {
            Ok(()) => self.length += bytes.len() as u64,
            Err(error) => {
                // A half line or record would spoil what comes after it. Should the cut fail too,
                // there is nothing left to try.
                let _ = self.file.set_len(self.length);
                self.warn(&error);
            }
        }
    }
}

/// Seconds since 1970, zero if the clock is set before that.
pub(super) fn unix_seconds() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}

/// `2026-05-09T07:29:33Z` for seconds since 1970.
fn utc(unix: f64) -> String {
    let seconds = unix as u64;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Year, month and day, `days` after 1970-01-01.
fn civil(mut days: u64) -> (u64, usize, u64) {
    let leap = |year: u64| year.is_multiple_of(if year.is_multiple_of(100) { 400 } else { 4 });
    let mut year = 1970;
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_the_calendar() {
        assert_eq!(utc(0.0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399.0), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_868_799.5), "2000-02-29T23:59:59Z");
        assert_eq!(utc(1_704_067_199.0), "2023-12-31T23:59:59Z");
        assert_eq!(utc(1_735_603_200.0), "2024-12-31T00:00:00Z");
    }

    #[test]
    fn appends_timed_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/run.log");
        for text in ["first", "second"] {
            LogFile::open(&path).unwrap().emit(&Event::Note { text: text.into() });
        }
        let text = fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().map(|l| l.split_once("Z  ").unwrap().1).collect();
        assert_eq!(lines, ["note      first", "note      second"]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_full_disk_is_no_error() {
        // Every write to this device fails with "no space left on device".
        let mut file = Appender::open(Path::new("/dev/full")).unwrap();
        file.write(b"x");
        file.write(b"y");
        assert!(file.warned);
        assert_eq!(file.length, 0);
    }
}
