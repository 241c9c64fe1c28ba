//! AQLM's fine-tuning (Egiazarian et al., arXiv 2401.06118): codebooks and scales learn, codes stay; block by
//! block in `[stage.reconstruct]`, the whole model in `[stage.tune_scales]` or `[stage.distill]`.
//!
//! *What it learns:* the centroids of every codebook, and the scales; the codes stay as an earlier stage left
//! them, packed. *Formula:* `d C_i[k] = Σ a G[run]` over the runs whose code is `k`, `d a = Σ G Σ_i C_i[code_i]`
//! over the group. *Start:* exactly the quantized weight. *Recipe keys:* `learn` (`"codebooks_and_scales"`,
//! `"codebooks"`, `"scales"`). Centroids are rounded to half precision in every forward, as they are stored.
//! *Export:* codebooks; what learned in `tune_scales` alone is an adapter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tuner;
use crate::quant::{Learned, LearnedScales, Repr};

/// Keys of `method.aqlm_ft`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AqlmFtConfig {
    /// What learns.
    pub learn: LearnedCodebooks,
}

/// What of codebooks learns.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LearnedCodebooks {
    /// Centroids and scales.
    #[default]
    CodebooksAndScales,
    /// Centroids alone.
    Codebooks,
    /// Scales alone.
    Scales,
}

/// Codebooks and scales on frozen codes.
#[derive(Clone, Copy, Debug)]
pub struct AqlmFt;

impl Tuner for AqlmFt {
    type Config = AqlmFtConfig;

    const TAKES: Repr = Repr::Codebook;

    fn learned(config: &AqlmFtConfig) -> Learned {
        let scales = match config.learn {
            LearnedCodebooks::Codebooks => LearnedScales::Frozen,
            LearnedCodebooks::CodebooksAndScales | LearnedCodebooks::Scales => LearnedScales::All,
        };
        let offsets = config.learn != LearnedCodebooks::Scales;
        Learned { scales, offsets, ..Learned::default() }
    }
}
