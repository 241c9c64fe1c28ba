//! One error type: what went wrong, where, and what to do about it.
//!
//! Product contract: an error is at most three lines on stderr (`error:`, `at`, `try`), and its
//! [`Kind`] decides the exit code. Errors are built where the facts are known, with the file, the
//! tensor, and the expected and found values in the sentence.

use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// Result with fewbit's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the lines of an excerpt begin with.
const EXCERPT: &str = "       ";

/// What kind of failure this is; decides the process's exit code.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Failed while running: exit code 1.
    Failed,
    /// The command line or the recipe is wrong: exit code 2.
    Usage,
    /// A check before the run refused it (shapes, data, disk): exit code 3.
    Preflight,
    /// Out of memory or disk: exit code 4.
    Resources,
    /// A parity or quality gate failed: exit code 5.
    Gate,
    /// A checkpoint belongs to another recipe, model or data: exit code 6.
    Mismatch,
    /// Stopped by SIGINT (130) or SIGTERM (143) after a clean save.
    Stopped(i32),
}

impl Kind {
    /// The process exit code of this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Preflight => 3,
            Self::Resources => 4,
            Self::Gate => 5,
            Self::Mismatch => 6,
            Self::Stopped(signal) => 128 + signal,
        }
    }
}

/// An error in the product's three-line form.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    what: String,
    at: Option<String>,
    fix: Option<String>,
}

impl Error {
    /// A new error of `kind`; `what` is one sentence without a full stop.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, what: what.into(), at: None, fix: None }))
    }

    /// Failed while running (exit code 1).
    pub fn failed(what: impl Into<String>) -> Self {
        Self::new(Kind::Failed, what)
    }

    /// Wrong usage or recipe (exit code 2).
    pub fn usage(what: impl Into<String>) -> Self {
        Self::new(Kind::Usage, what)
    }

    /// Refused before the run (exit code 3).
    pub fn preflight(what: impl Into<String>) -> Self {
        Self::new(Kind::Preflight, what)
    }

    /// A file that was given cannot be used as it is: the same exit code (3) for every kind of file.
    pub fn damaged(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::preflight(what).fix(fix)
    }

    /// A gate failed (exit code 5).
    pub fn gate(what: impl Into<String>) -> Self {
        Self::new(Kind::Gate, what)
    }

    /// A checkpoint of something else (exit code 6).
    pub fn mismatch(what: impl Into<String>) -> Self {
        Self::new(Kind::Mismatch, what)
    }

    /// An I/O error on `path` while doing `verb` ("read", "write", ...).
    /// A full disk becomes [`Kind::Resources`].
    pub fn io(verb: &str, path: &Path, source: &std::io::Error) -> Self {
        Self::of_io(format!("cannot {verb} the file: {source}"), source).at(path.display())
    }

    /// An I/O error in words of its own; `source` decides the kind and what to do.
    pub(crate) fn of_io(what: impl Into<String>, source: &std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let (kind, fix) = match source.kind() {
            Io::StorageFull | Io::QuotaExceeded | Io::FileTooLarge => {
                (Kind::Resources, Some("free some disk space and run the same command again"))
            }
            Io::OutOfMemory => (Kind::Resources, Some("free some memory")),
            Io::NotFound => (Kind::Failed, Some("check the path")),
            Io::PermissionDenied => (Kind::Failed, Some("check the permissions")),
            // No text where text is read, or an end that comes too early.
            Io::InvalidData | Io::UnexpectedEof => {
                (Kind::Preflight, Some("another copy of the file: this one is damaged"))
            }
            Io::IsADirectory => (Kind::Failed, Some("a file in place of this folder")),
            _ => {
                (Kind::Failed, Some("check the disk and the path, then run the same command again"))
            }
        };
        let error = Self::new(kind, what);
        match fix {
            Some(fix) => error.fix(fix),
            None => error,
        }
    }

    /// The same error about what a given file holds: exit code 3, and `fix` where nothing was advised.
    #[must_use]
    pub fn of_input(mut self, fix: &str) -> Self {
        if self.0.kind == Kind::Failed {
            self.0.kind = Kind::Preflight;
        }
        self.0.fix.get_or_insert_with(|| fix.to_owned());
        self
    }

    /// Says where: a file, a tensor, a recipe line. A second call adds to the first.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.at = Some(match self.0.at.take() {
            Some(inner) => format!("{inner}, {place}"),
            None => place.to_string(),
        });
        self
    }

    /// Says where, if nothing has said it.
    #[must_use]
    pub fn or_at(mut self, path: &Path) -> Self {
        self.0.at.get_or_insert_with(|| path.display().to_string());
        self
    }

    /// Says what to do.
    #[must_use]
    pub fn fix(mut self, fix: impl Into<String>) -> Self {
        self.0.fix = Some(fix.into());
        self
    }

    /// The same error with another kind.
    #[must_use]
    pub fn with_kind(mut self, kind: Kind) -> Self {
        self.0.kind = kind;
        self
    }

    /// The kind.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The first line's text, without `error:`.
    pub fn what(&self) -> &str {
        &self.0.what
    }

    /// Where.
    pub fn place(&self) -> Option<&str> {
        self.0.at.as_deref()
    }

    /// What, where and what to do, as it is kept in files.
    pub fn told(&self) -> Told {
        Told {
            what: self.0.what.clone(),
            at: self.0.at.clone(),
            advice: self.0.fix.clone(),
            exit_code: self.kind().exit_code(),
        }
    }

    /// What to do.
    pub fn advice(&self) -> Option<&str> {
        self.0.fix.as_deref()
    }
}

/// An error as data: of a run that failed in its files, and in lines of JSON. Shown as at most three lines.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Told {
    /// What went wrong.
    pub what: String,
    /// Where.
    pub at: Option<String>,
    /// What to do.
    #[serde(rename = "try")]
    pub advice: Option<String>,
    /// The process's exit code.
    pub exit_code: i32,
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", shown(&self.what))?;
        if let Some(at) = &self.at {
            write!(f, "\n  at   {}", shown(at))?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "\n  try  {advice}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.told().fmt(f)
    }
}

impl std::error::Error for Error {}

/// A text that may quote a file: nothing in it begins another line, but for the lines of an excerpt, or
/// speaks to the terminal.
fn shown(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for (at, letter) in text.char_indices() {
        let excerpt = letter == '\n' && text[at + 1..].starts_with(EXCERPT);
        if letter.is_control() && letter != '\t' && !excerpt {
            shown.extend(letter.escape_default());
        } else {
            shown.push(letter);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_three_lines() {
        let error = Error::preflight("group_size 128 does not divide in_features 172")
            .at("model.layers.0.mlp.down_proj.weight")
            .at("quant.group_size")
            .fix("group_size = 4");
        assert_eq!(
            error.to_string(),
            "group_size 128 does not divide in_features 172\n  \
             at   model.layers.0.mlp.down_proj.weight, quant.group_size\n  try  group_size = 4"
        );
        assert_eq!(error.kind().exit_code(), 3);
    }

    #[test]
    fn what_a_file_says_stays_in_its_line() {
        let error = Error::damaged("no `a\nb`", "another copy").at("x\u{1b}[2J\r").at("y");
        let told = "no `a\\nb`\n  at   x\\u{1b}[2J\\r, y\n  try  another copy";
        assert_eq!(error.to_string(), told);
        let excerpt = Error::usage("w").at("r.toml, line 3\n       bits = 9\n              ^");
        assert_eq!(excerpt.to_string().lines().count(), 4);
    }

    #[test]
    fn a_full_disk_is_exit_code_four() {
        let io = std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert_eq!(Error::io("write", Path::new("x"), &io).kind().exit_code(), 4);
        assert_eq!(Kind::Stopped(2).exit_code(), 130);
        assert_eq!(Kind::Stopped(15).exit_code(), 143);
    }
}
