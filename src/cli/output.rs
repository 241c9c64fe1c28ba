//! Writing to stdout and stderr. A reader that went away (`fewbit ... | head`) is no error.

use std::io::{ErrorKind, IsTerminal, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};

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
    // A closed stderr must not end the work.
    let _ = write!(std::io::stderr().lock(), "{text}");
}

/// Writes an error to stderr.
pub(super) fn error(error: &Error) {
    // Nowhere is left to report a failure to.
    let _ = writeln!(std::io::stderr().lock(), "error: {error}");
}
