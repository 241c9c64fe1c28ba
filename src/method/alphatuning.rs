//! AlphaTuning (Kwon et al., Findings of EMNLP 2022, arXiv 2210.03858): a binary-coded model adapts
//! to a task by the scales of its first plane.
//!
//! *What it learns:* the largest scale of each group, or all of them, or all and the offsets; the
//! sign planes stay as an earlier stage left them, packed. *Formula:* `W_hat = Σ alpha_i B_i + o`,
//! `d alpha_i = Σ G B_i` over the group, `d o = Σ G`. *Start:* exactly
//! the quantized weight. *Recipe keys:* `learn` (`"largest"`, `"all"`, `"all_and_offset"`),
//! `divide_by_group` (gradients divided by the group's length, the paper's stabilizer: under AdamW
//! it changes little but global-norm clipping), `relative` (as PEQA's). *Export:* binary coding; the
//! learned scales alone are an adapter.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tuner;
use crate::quant::{Learned, LearnedScales, Repr};

/// Keys of `method.alphatuning`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AlphaTuningConfig {
    /// What learns.
    pub learn: LearnedAlphas,
    /// Divide gradients by the number of weights in a group.
    pub divide_by_group: bool,
    /// Learn the logarithm of each scale's ratio to its start instead of the scale.
    pub relative: bool,
}

/// Which parameters of a binary-coding group learn.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LearnedAlphas {
    /// The largest scale, as published.
    #[default]
    Largest,
    /// Every plane's scale.
    All,
    /// Every plane's scale, and the offset.
    AllAndOffset,
}

/// Scales on frozen sign planes.
#[derive(Clone, Copy, Debug)]
pub struct AlphaTuning;

impl Tuner for AlphaTuning {
    type Config = AlphaTuningConfig;

    const TAKES: Repr = Repr::BinaryCoding;

    fn learned(config: &AlphaTuningConfig) -> Learned {
        Learned {
            scales: match config.learn {
                LearnedAlphas::Largest => LearnedScales::Largest,
                LearnedAlphas::All | LearnedAlphas::AllAndOffset => LearnedScales::All,
            },
            offsets: config.learn == LearnedAlphas::AllAndOffset,
            relative: config.relative,
            divide_by_group: config.divide_by_group,
        }
    }
}
