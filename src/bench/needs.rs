//! What a part needs of memory, before it starts; and what would fit where it does not.

use burn::tensor::DType;
use serde::Serialize;

use super::parts::{Part, Settings};
use super::subject::Subject;
use crate::device::NamedDevice;
use crate::error::Error;
use crate::report::size;
use crate::run;
use crate::stage::{TRAINED_WEIGHT_BYTES, tape_bytes};

/// Bytes per weight that FlexRound or SEQ learns in f32 on the CPU: the weight, what learns, its gradient
/// and two moments, what the forward sees, and a reserve. Measured: 19 to 24.
const KERNEL_BYTES: u64 = 28;

/// Memory of the process itself: code, buffers, what was measured for the ceiling.
const BASE_BYTES: u64 = 300 << 20;

/// A part that would not fit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Refusal {
    /// The part.
    pub part: Part,
    /// Bytes that it needs, an estimate.
    pub needs: u64,
    /// Bytes that are free.
    pub free: u64,
    /// What would fit.
    pub fits: String,
}

impl Refusal {
    /// Why a part does not fit into main memory; `None` where it does, or nobody can say.
    pub fn of(
        subject: &Subject,
        part: Part,
        settings: &Settings,
        device: &NamedDevice,
    ) -> Option<Self> {
        let free = run::memory_available().filter(|_| !device.discrete)?;
        let (batch, length) = (settings.batch as u64, settings.length as u64);
        let of = |batch, length| bytes(subject, part, settings, batch, length);
        let needs = of(batch, length);
        if needs <= free {
            return None;
        }
        let smaller = (1..batch).rev().find(|batch| of(*batch, length) <= free);
        let shorter =
            || (1..=length / 16).rev().map(|n| 16 * n).find(|length| of(1, *length) <= free);
        let fits = match (smaller, part) {
            (Some(batch), _) => format!("--batch {batch}"),
            (None, _) if shorter().is_some() => {
                format!("--batch 1 --length {}", shorter().unwrap_or_default())
            }
            (None, Part::Block | Part::Export) => "a smaller model, or more memory".to_owned(),
            _ => {
                let whole = "--part block,export, which need one block at a time";
                let one_block = [Part::Block, Part::Export];
                let fit =
                    one_block.iter().all(|part| bytes(subject, *part, settings, 1, 16) <= free);
                if fit { whole.to_owned() } else { "a smaller model, or more memory".to_owned() }
            }
        };
        Some(Self { part, needs, free, fits })
    }

    /// As an error before the run.
    pub fn error(&self) -> Error {
        let (needs, free) = (size(self.needs), size(self.free));
        let name = self.part.name();
        Error::preflight(format!("{name} needs about {needs} of memory, and {free} are free"))
            .at(format!("--part {name}"))
            .fix(self.fits.clone())
    }
}

/// Bytes that a part needs with so many texts of so many tokens.
pub(super) fn bytes(
    subject: &Subject,
    part: Part,
    settings: &Settings,
    batch: u64,
    length: u64,
) -> u64 {
    let config = &subject.config;
    let held = if settings.dtype == DType::F32 { 4 } else { 2 };
    let (block, linears) = (subject.block_weights(), subject.linear_weights());
    let heads = if config.tied { 1 } else { 2 };
    let model = held * (linears + heads * subject.head_weights());
    // A tensor is read in f32 before it gets its type.
    let read =
        4 * config.tensors().iter().map(|(_, s)| s.iter().product::<usize>()).max().unwrap_or(0);
    // Another method may hold more, and so do operations without kernels.
    let known = settings.method.is_none() && settings.dtype == DType::F32;
    let trained = if known { KERNEL_BYTES } else { TRAINED_WEIGHT_BYTES };
    let tokens = batch * length;
    let tape = tape_bytes(config, tokens, length, settings.dtype != DType::F32);
    let (d, blocks) = (config.d_model as u64, config.n_blocks as u64);
    let cache = |rows: u64, length: u64| {
        2 * held * rows * length * blocks * (config.n_kv_heads * config.head_dim) as u64
    };
    BASE_BYTES
        + match part {
            Part::Block => trained * block + tape + 12 * tokens * d,
            Part::Distill => {
                let logits = (tokens * config.vocab as u64).min(1 << 23);
                trained * linears + model + blocks * tape + 48 * logits
            }
            Part::Load => model + read as u64,
            Part::Prompt => model + read as u64 + tape + cache(batch, length),
            Part::Generate => model + read as u64 + cache(8.max(batch), 64),
            Part::Export => trained * block,
        }
}
