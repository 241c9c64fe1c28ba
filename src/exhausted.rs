//! When there is no more memory: what a process says, in the three lines of every error, and the exit
//! code. An allocation that fails has no caller to return an error to, so the allocator asks for it here.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;

use crate::error::Kind;

/// Where the work is, and what would need less; kept ready, because nothing can be allocated later.
static WORK: Mutex<[String; 2]> = Mutex::new([String::new(), String::new()]);

/// Notes what is being done, and what would need less memory.
pub fn working_on(place: impl Into<String>, fix: impl Into<String>) {
    // What a panic left half written is written again here.
    *WORK.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = [place.into(), fix.into()];
}

/// As [`working_on`], of a part of the work that was noted last.
pub fn part(place: &str) {
    let mut work = WORK.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let whole = work[0].find(PART).unwrap_or(work[0].len());
    work[0].truncate(whole);
    work[0].extend([PART, place]);
}

/// What stands between the work and its part.
const PART: &str = ", ";

/// Ends the process because `bytes` could not be allocated. Allocates nothing.
pub fn end(bytes: usize) -> ! {
    let mut stderr = std::io::stderr();
    let mib = bytes.div_ceil(1 << 20);
    // Away from a bar that stands there.
    let away = if stderr.is_terminal() { "\n" } else { "" };
    let _ = writeln!(stderr, "{away}error: out of memory: {mib} MiB more were asked for");
    let unknown = [const { String::new() }; 2];
    let work = WORK.try_lock();
    let [place, fix] = work.as_deref().unwrap_or(&unknown);
    if !place.is_empty() {
        let _ = writeln!(stderr, "  at   {place}");
    }
    let fix = if fix.is_empty() { "a smaller model or shorter windows" } else { fix };
    let _ = writeln!(stderr, "  try  {fix}, or a larger machine; what was saved is kept");
    signal_hook::low_level::exit(Kind::Resources.exit_code())
}

/// Whether the text of a panic says that a device or this machine had no more memory.
pub fn is_said_by(panic: &str) -> bool {
    let text = panic.to_lowercase();
    ["out of memory", "outofmemory", "out_of_memory", "cannot allocate memory", "memory allocation"]
        .iter()
        .any(|words| text.contains(words))
}

/// The place and the remedy of the work that ran out of memory.
pub(crate) fn work() -> [String; 2] {
    WORK.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_replaces_the_one_before_it() {
        working_on("stage 1 (distill)", "batch = 1");
        part("step 3");
        part("step 4");
        assert_eq!(work(), ["stage 1 (distill), step 4", "batch = 1"]);
    }

    #[test]
    fn what_devices_say() {
        assert!(is_said_by("CUDA_ERROR_OUT_OF_MEMORY"));
        assert!(is_said_by("wgpu error: Out of Memory"));
        assert!(!is_said_by("index out of bounds"));
    }
}
