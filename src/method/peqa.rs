//! PEQA (Kim et al., NeurIPS 2023, arXiv 2305.14152): a quantized model adapts to a task by its
//! scales alone.
//!
//! *What it learns:* one scale per group; integer codes and zero points stay as an earlier stage
//! left them, packed, and are shared by every task. *Formula:* `W_hat = s (code - z)`; with one
//! scale per output channel `ds_j = Σ_n dY Y / s_j`, which needs no gradient of the weight's size.
//! *Start:* exactly the quantized weight. *Recipe keys:* `relative` (fewbit's own: `s = s_0 exp(δ)`
//! with δ learned, so that a learning rate means the same for scales of any size). *Export:*
//! uniform grid with the zero points it came with; the scales alone are an adapter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tuner;
use crate::quant::{Learned, LearnedScales, Repr};

/// Keys of `method.peqa`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct PeqaConfig {
    /// Learn the logarithm of each scale's ratio to its start instead of the scale.
    pub relative: bool,
}

/// Scales on frozen codes.
#[derive(Clone, Copy, Debug)]
pub struct Peqa;

impl Tuner for Peqa {
    type Config = PeqaConfig;

    const TAKES: Repr = Repr::Uniform;

    fn learned(config: &PeqaConfig) -> Learned {
        let relative = config.relative;
        Learned { scales: LearnedScales::All, relative, ..Learned::default() }
    }
}
