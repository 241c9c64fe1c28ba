//! A file's metadata under the keys of its architecture, and its tensors.

use std::collections::BTreeMap;

use super::keys::{Keys, missing};
use crate::error::{Error, Result};
use crate::model::Gguf;

const ARCHITECTURE: &str = "general.architecture";

/// The shapes of a file's tensors by name.
pub(super) type Shapes = BTreeMap<String, Vec<usize>>;

/// What a file says, for its family.
pub(super) struct File<'a> {
    pub(super) keys: Keys<'a>,
    pub(super) shapes: &'a Shapes,
    /// Its family.
    pub(super) gguf: &'static Gguf,
}

impl<'a> File<'a> {
    /// Of an open file, or of one that is to be.
    pub(super) fn of(keys: Keys<'a>, shapes: &'a Shapes) -> Result<Self> {
        Ok(Self { keys, shapes, gguf: architecture(keys)? })
    }

    /// A key with its prefix.
    pub(super) fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.gguf.architecture)
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.keys.number(&self.key(key))
    }

    /// A number of a key that only some families read.
    pub(super) fn own_number(&self, key: &str) -> Result<Option<f64>> {
        if self.gguf.keys.contains(&key) { self.number(key) } else { Ok(None) }
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        self.keys.text(&self.key(key))
    }

    /// A count of at least 1.
    pub(super) fn count(&self, key: &str) -> Result<Option<usize>> {
        self.keys.count(&self.key(key))
    }

    /// One that every file has.
    pub(super) fn needed_count(&self, key: &str) -> Result<usize> {
        self.keys.needed_count(&self.key(key))
    }

    /// A family that is refused something; `what` is the end of a sentence.
    pub(super) fn refused(&self, what: String) -> Error {
        Error::preflight(what).fix(plain(self.gguf))
    }

    /// A family that is refused because a tensor is not there.
    pub(super) fn lacks(&self, name: &str) -> Error {
        self.refused(format!("the file lacks this tensor, which every {} has", title(self.gguf)))
            .at(name)
    }
}

/// The family of a file.
pub(super) fn architecture(keys: Keys<'_>) -> Result<&'static Gguf> {
    let architecture = keys.text(ARCHITECTURE)?.ok_or_else(|| missing(ARCHITECTURE))?;
    Gguf::of(architecture).ok_or_else(|| {
        let known: Vec<String> = Gguf::architectures().map(|name| format!("`{name}`")).collect();
        Error::preflight(format!(
            "the file is of architecture `{}` ({ARCHITECTURE}); fewbit reads {}",
            architecture.escape_debug(),
            known.join(", ")
        ))
        .fix("a file of one of these")
    })
}

/// A family's name in a sentence.
pub(super) fn title(gguf: &Gguf) -> String {
    let mut letters = gguf.architecture.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

/// What to try instead.
pub(super) fn plain(gguf: &Gguf) -> String {
    format!("a file of a plain {} model", title(gguf))
}

/// A number that must be above 0.
pub(super) fn positive(key: &str, value: f64) -> Result<f64> {
    if value > 0.0 {
        return Ok(value);
    }
    Err(Error::preflight(format!("`{key}` is {value}; a number above 0 is needed")))
}
