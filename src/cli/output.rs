//! Writing to stdout and stderr. A reader that went away (`fewbit ... | head`) is no error.

use std::io::{ErrorKind, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes to stdout and flushes.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(Error::io("write", Path::new("stdout"), &e))
        }
        _ => Ok(()),
    }
}

/// Writes a line to stdout.
pub(super) fn line(text: &str) -> Result<()> {
    print(&format!("{text}\n"))
}

/// Writes one JSON object to stdout.
pub(super) fn json(value: &serde_json::Value) -> Result<()> {
    line(&value.to_string())
}

/// Writes an error to stderr.
pub(super) fn error(error: &Error) {
    // Nowhere is left to report a failure to.
    let _ = writeln!(std::io::stderr().lock(), "error: {error}");
}
