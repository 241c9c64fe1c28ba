//! How fast the disk of a folder is.

use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::error::Result;
use crate::stop::StopFlag;
use crate::store::Scratch;
use crate::store::folder::free_bytes;

/// Bytes that are written and read.
const BYTES: u64 = 96 << 20;
/// At once.
const CHUNK: usize = 4 << 20;

/// What a disk does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Disk {
    /// Bytes per second written, until they were on the disk.
    pub write: f64,
    /// Bytes per second read.
    pub read: f64,
    /// Whether the system was asked to forget what was written before it was read, so that the disk and not
    /// the memory was read.
    pub uncached: bool,
    /// Bytes that are free.
    pub free: Option<u64>,
}

impl Disk {
    /// Of the disk of `dir`, with a file without a name, which is gone however the process ends.
    ///
    /// # Errors
    /// When nothing can be written there; a signal.
    pub fn measure(dir: &Path, stop: &StopFlag) -> Result<Self> {
        let scratch = Scratch::new(dir)?;
        // Nothing that compresses.
        let mut state: u64 = 1;
        let bytes: Vec<u8> = (0..CHUNK / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_le_bytes()
            })
            .collect();
        let start = Instant::now();
        for at in (0..BYTES).step_by(CHUNK) {
            stop.check()?;
            scratch.write(at, &bytes)?;
        }
        scratch.sync()?;
        let write = BYTES as f64 / start.elapsed().as_secs_f64();
        let uncached = scratch.forget();
        let start = Instant::now();
        for at in (0..BYTES).step_by(CHUNK) {
            stop.check()?;
            scratch.read(at, CHUNK)?;
        }
        let read = BYTES as f64 / start.elapsed().as_secs_f64();
        Ok(Self { write, read, uncached, free: free_bytes(dir) })
    }
}
