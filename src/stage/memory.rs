//! Where the state of a training is kept, and how far its tape reaches.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// `memory = "..."` of a stage that trains the whole model. Each of them gives the same numbers, on a
/// CPU to the last bit, and a run may go on with another one.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Memory {
    /// Everything on the device, with one tape through all blocks: the fastest.
    Tape,
    /// Everything on the device, with the tape of one block at a time: inputs of blocks are kept, and
    /// what is between them is computed again on the way back.
    Device,
    /// As `device`, but of the student's weights and optimizer state only one block is on the device,
    /// the others wait in main memory; the teacher is read from its files block by block.
    Host,
    /// As `host`, but what waits is in a file in the run's folder.
    Disk,
}

impl Memory {
    /// From the fastest to the smallest.
    pub const ALL: [Self; 4] = [Self::Tape, Self::Device, Self::Host, Self::Disk];

    /// As recipes write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tape => "tape",
            Self::Device => "device",
            Self::Host => "host",
            Self::Disk => "disk",
        }
    }
}
