//! When there is no more memory: what a process says, in the three lines of every error, and the exit
//! code. An allocation that fails has no caller to return an error to, so the allocator asks for it here.

use std::fmt;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, PoisonError};

use crate::error::{Error, Kind};

/// Where the work is, and what would need less; kept ready, because nothing can be allocated later.
static WORK: Mutex<[String; 2]> = Mutex::new([String::new(), String::new()]);

/// Notes what is being done, and what of a recipe would need less memory, where that is known.
pub fn working_on(place: impl Into<String>, smaller: impl Into<String>) {
    // What a panic left half written is written again here.
    *WORK.lock().unwrap_or_else(PoisonError::into_inner) = [place.into(), smaller.into()];
}

/// As [`working_on`], of a part of the work that was noted last.
pub fn part(place: &str) {
    let mut work = WORK.lock().unwrap_or_else(PoisonError::into_inner);
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
    let work = work.as_deref().unwrap_or(&unknown);
    if !work[0].is_empty() {
        let _ = writeln!(stderr, "  at   {}", work[0]);
    }
    let _ = writeln!(stderr, "  try  {}", Remedy(work));
    signal_hook::low_level::exit(Kind::Resources.exit_code())
}

/// What to do, of the work that was noted.
struct Remedy<'a>(&'a [String; 2]);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [place, smaller] = self.0;
        match (place.is_empty(), smaller.is_empty()) {
            (true, _) => f.write_str("more memory, a smaller model or shorter windows"),
            (_, true) => f.write_str("more memory: the same command goes on from what is saved"),
            // Another recipe is another run.
            _ => write!(
                f,
                "more memory: the same command goes on from what is saved; or {smaller} in a new run"
            ),
        }
    }
}

/// The error of a panic whose text says that a device or this machine had no more memory.
pub fn error_of(panic: &str) -> Option<Error> {
    if !is_said_by(panic) {
        return None;
    }
    let work = WORK.lock().unwrap_or_else(PoisonError::into_inner);
    let what = format!("out of memory: {}", panic.lines().next().unwrap_or_default());
    let error = Error::new(Kind::Resources, what).fix(Remedy(&work).to_string());
    Some(if work[0].is_empty() { error } else { error.at(&work[0]) })
}

/// Whether the text of a panic says that a device or this machine had no more memory.
fn is_said_by(panic: &str) -> bool {
    let text = panic.to_lowercase();
    ["out of memory", "outofmemory", "out_of_memory", "cannot allocate memory", "memory allocation"]
        .iter()
        .any(|words| text.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_replaces_the_one_before_it() {
        working_on("stage 1 (distill)", "batch = 1");
        part("step 3");
        part("step 4");
        let error = error_of("wgpu error: Out of Memory\nat x").unwrap();
        assert_eq!(error.kind().exit_code(), 4);
        let told = "out of memory: wgpu error: Out of Memory\n  at   stage 1 (distill), step 4\n  try  \
                    more memory: the same command goes on from what is saved; or batch = 1 in a new run";
        assert_eq!(error.to_string(), told);
    }

    #[test]
    fn what_devices_say() {
        assert!(is_said_by("CUDA_ERROR_OUT_OF_MEMORY"));
        assert!(is_said_by("wgpu error: Out of Memory"));
        assert!(!is_said_by("index out of bounds"));
    }
}
