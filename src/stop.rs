//! The stop flag: SIGINT and SIGTERM ask every loop to save and leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

use crate::error::{Error, Kind, Result};

/// Set by a signal; polled between steps by everything that takes time.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicUsize>);

impl StopFlag {
    /// A flag that SIGINT and SIGTERM set. A second signal ends the process at once.
    ///
    /// # Errors
    /// When the handlers cannot be installed.
    pub fn from_signals() -> Result<Self> {
        let flag = Self::default();
        let armed = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            let install = || -> std::io::Result<()> {
                // In this order: the first signal finds `armed` unset, sets it, and only the
                // second one takes the default action.
                signal_hook::flag::register_conditional_default(signal, Arc::clone(&armed))?;
                signal_hook::flag::register(signal, Arc::clone(&armed))?;
                signal_hook::flag::register_usize(signal, Arc::clone(&flag.0), signal as usize)?;
                Ok(())
            };
            install()
                .map_err(|e| Error::failed(format!("cannot install a signal handler: {e}")))?;
        }
        Ok(flag)
    }

    /// An error of kind [`Kind::Stopped`] once a signal has come.
    ///
    /// # Errors
    /// That error.
    pub fn check(&self) -> Result<()> {
        match i32::try_from(self.0.load(Ordering::Relaxed)).unwrap_or(SIGTERM) {
            0 => Ok(()),
            signal => Err(Error::new(Kind::Stopped(signal), "stopped by a signal")
                .fix("the same command to go on from the last checkpoint")),
        }
    }

    /// Sets the flag as `signal` would; for tests of the save-and-leave path.
    pub fn set(&self, signal: i32) {
        self.0.store(signal as usize, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_flag_is_an_error_with_the_shell_exit_code() {
        let flag = StopFlag::default();
        assert!(flag.check().is_ok());
        flag.set(SIGTERM);
        assert_eq!(flag.check().unwrap_err().kind().exit_code(), 143);
    }
}
