//! E2E-QP, the second phase of EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062): only the
//! steps of a quantized model learn.
//!
//! *What it learns:* one step per group; codes and zero points stay as an earlier stage left them,
//! and packed. *Formula:* `W_hat = Δ (code - z)`, whose derivative by Δ is `code - z`. *Start:*
//! exactly the quantized weight. *Recipe keys:* none of its own; in `[stage.distill]`, `bits` and
//! `group_size` have to be those of the earlier stage. *Export:* uniform grid with the zero points
//! it came with.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Tuner;
use crate::quant::{Learned, LearnedScales, Repr};

/// `method.e2e_qp`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct E2eQpConfig {}

/// Steps on frozen codes.
#[derive(Clone, Copy, Debug)]
pub struct E2eQp;

impl Tuner for E2eQp {
    type Config = E2eQpConfig;

    const TAKES: Repr = Repr::Uniform;

    fn learned(_: &E2eQpConfig) -> Learned {
        Learned { scales: LearnedScales::All, ..Learned::default() }
    }
}
