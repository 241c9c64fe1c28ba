//! The stop flag: SIGINT and SIGTERM, a terminal that is closed (SIGHUP) and a scheduler's warning
//! (SIGUSR1) ask every loop to save and leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
#[cfg(unix)]
use std::time::{Duration, Instant};

#[cfg(unix)]
use signal_hook::consts::{SIGHUP, SIGUSR1, SIGXFSZ};
use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Kind, Result};

/// `timeout` and some schedulers send a signal to the process and once more to its group, which is one
/// request to stop.
#[cfg(unix)]
const SAME: Duration = Duration::from_millis(500);

/// Set by a signal; polled between steps by everything that takes time.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicUsize>);

impl StopFlag {
    /// A flag that those signals set. One that comes half a second after the first or later ends the
    /// process at once. A SIGHUP that is ignored (`nohup`) stays so.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn from_signals() -> Result<Self> {
        let flag = Self::default();
        flag.install()
            .map_err(|e| Error::failed(format!("cannot install a signal handler: {e}")))?;
        Ok(flag)
    }

    #[cfg(unix)]
    fn install(&self) -> std::io::Result<()> {
        let signals = signals();
        for &signal in &signals {
            signal_hook::flag::register_usize(signal, Arc::clone(&self.0), signal as usize)?;
        }
        // A file beyond the shell's limit is then an error of the write, with a path and a remedy.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
        let mut coming = signal_hook::iterator::Signals::new(&signals)?;
        let watch = move || {
            let mut first: Option<Instant> = None;
            for signal in coming.forever() {
                if first.get_or_insert_with(Instant::now).elapsed() > SAME {
                    // Only a signal without a default action is refused here.
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(watch).map(drop)
    }

    #[cfg(not(unix))]
    fn install(&self) -> std::io::Result<()> {
        let armed = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            // In this order: the first signal finds `armed` unset, sets it, and only the second one takes
            // the default action.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&armed))?;
            signal_hook::flag::register(signal, Arc::clone(&armed))?;
            signal_hook::flag::register_usize(signal, Arc::clone(&self.0), signal as usize)?;
        }
        Ok(())
    }

    /// An error of kind [`Kind::Stopped`] once a signal has come.
    ///
    /// # Errors
    /// That error.
    pub fn check(&self) -> Result<()> {
        match i32::try_from(self.0.load(Ordering::Relaxed)).unwrap_or(SIGTERM) {
            0 => Ok(()),
            signal => Err(Error::new(Kind::Stopped(signal), "stopped by a signal")
                .fix("the same command again")),
        }
    }

    /// Sets the flag as `signal` would; for tests of the save-and-leave path.
    pub fn set(&self, signal: i32) {
        self.0.store(signal as usize, Ordering::Relaxed);
    }
}

/// The signals that ask to stop.
#[cfg(unix)]
fn signals() -> Vec<i32> {
    let mut signals = vec![SIGINT, SIGTERM, SIGUSR1];
    if !is_ignored(SIGHUP) {
        signals.push(SIGHUP);
    }
    signals
}

/// Whether this process was started with a signal ignored, where the system tells (Linux).
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal - 1) & 1 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_flag_is_an_error_with_the_shell_exit_code() {
        let flag = StopFlag::default();
        assert!(flag.check().is_ok());
        flag.set(SIGTERM);
        let stopped = flag.check().unwrap_err();
        assert_eq!(stopped.kind().exit_code(), 143);
        // A run alone has a checkpoint, and says so itself.
        assert_eq!(stopped.advice(), Some("the same command again"));
    }
}
