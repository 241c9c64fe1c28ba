//! What goes wrong with a file.

use std::fmt;
use std::io;
use std::path::Path;

/// Result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a file cannot be read or written: what, where, and what to do about it.
#[derive(Debug)]
pub struct Error {
    what: String,
    place: Option<String>,
    advice: Option<String>,
    io: Option<io::Error>,
}

impl Error {
    pub(crate) fn failed(what: impl Into<String>) -> Self {
        Self { what: what.into(), place: None, advice: None, io: None }
    }

    /// An I/O error on `path` while doing `verb`.
    pub(crate) fn io_on(path: &Path, verb: &str, source: io::Error) -> Self {
        let error = Self::failed(format!("cannot {verb} the file: {source}")).at(path.display());
        Self { io: Some(source), ..error }
    }

    /// A second call adds to the first.
    pub(crate) fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = Some(match self.place {
            Some(inner) => format!("{inner}, {place}"),
            None => place.to_string(),
        });
        self
    }

    pub(crate) fn fix(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// One sentence without a full stop.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Where: the file, the tensor, or both from the inside out.
    pub fn place(&self) -> Option<&str> {
        self.place.as_deref()
    }

    /// What to do, where something can be done.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }

    /// The error of the file system, where it was one. Its text is part of [`Error::what`].
    pub fn io(&self) -> Option<&io::Error> {
        self.io.as_ref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if let Some(place) = &self.place {
            write!(f, " ({place})")?;
        }
        if let Some(advice) = &self.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_where_and_what_to_do() {
        let error = Error::failed("the tensor occurs twice").at("w").at("m.gguf").fix("copy it");
        assert_eq!(error.to_string(), "the tensor occurs twice (w, m.gguf); copy it");
        assert!(error.io().is_none());
        let full = io::Error::from(io::ErrorKind::StorageFull);
        let error = Error::io_on(Path::new("m.gguf"), "write", full);
        assert!(error.what().starts_with("cannot write the file: "), "{error}");
        assert_eq!((error.place(), error.advice()), (Some("m.gguf"), None));
        assert_eq!(error.io().map(io::Error::kind), Some(io::ErrorKind::StorageFull));
    }
}
