//! AQLM's fine-tuning (Egiazarian et al., arXiv 2401.06118): codebooks and scales learn, codes stay.
//!
//! *What it learns:* the centroids of every codebook, and the scales; the codes stay as an earlier stage left
//! them, packed. *Formula:* `d C_i[k] = Σ a G[run]` over the runs whose code is `k`, `d a = Σ G Σ_i C_i[code_i]`
//! over the group. *Start:* exactly the quantized weight. *Recipe keys:* `codebooks`, `scales` (which of the two
//! learn). Centroids are rounded to half precision in every forward, as they are stored. *Export:* codebooks;
//! what learned alone is an adapter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tuner;
use crate::quant::{Learned, LearnedScales, Repr};

/// Keys of `method.aqlm_ft`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AqlmFtConfig {
    /// Whether centroids learn.
    pub codebooks: bool,
    /// Whether scales learn.
    pub scales: bool,
}

impl Default for AqlmFtConfig {
    fn default() -> Self {
        Self { codebooks: true, scales: true }
    }
}

/// Codebooks and scales on frozen codes.
#[derive(Clone, Copy, Debug)]
pub struct AqlmFt;

impl Tuner for AqlmFt {
    type Config = AqlmFtConfig;

    const TAKES: Repr = Repr::Codebook;

    fn learned(config: &AqlmFtConfig) -> Learned {
        let scales = if config.scales { LearnedScales::All } else { LearnedScales::Frozen };
        Learned { scales, offsets: config.codebooks, ..Learned::default() }
    }
}
