//! SignRound (Cheng et al., EMNLP 2024 Findings, arXiv 2309.05516; auto-round): a bounded shift of
//! every weight's rounding, and of each group's range.
//!
//! *What it learns:* an offset V for every weight (`rounding`, in units of the step) and per group
//! what part of its maximum and minimum is kept (`max_factor`, `min_factor`); the weight stays
//! frozen. *Formula:* with `hi = max(W, 0) · max_factor` and `lo = min(W, 0) · min_factor`,
//! `Δ = (hi - lo) / L`, `z = clamp(round(-lo / Δ), 0, L)` and
//! `W_hat = Δ (clamp(round(W/Δ + V) + z, 0, L) - z)`; on a symmetric grid Δ is that of the larger of
//! hi and -lo, and z the middle. Rounding and bounding z have gradient 1. *Start:* V = 0, both
//! factors 1: round-to-nearest with zero in range. *Recipe keys:* `bound`. Between steps V is brought
//! back within ±`bound` and the factors within 0..1; the method's own optimizer is
//! `optimizer.rule = "sign"`, whose learning rate is then a part of the step. *Export:* uniform grid,
//! integer zero; the offsets only chose the integers.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Moment, Quantizer, Start, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Rule, Stepped};
use crate::quant::{Bits, QuantParams, QuantSpec, Repr, SCALE_FLOOR, Symmetry, ZeroKind};
use crate::train::Role;

/// `method.signround`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SignRoundConfig {
    /// How far, in steps, a weight may be moved before it is rounded.
    pub bound: f32,
}

impl Default for SignRoundConfig {
    fn default() -> Self {
        Self { bound: 0.5 }
    }
}

/// SignRound's learned state for one weight.
#[derive(Debug, Module)]
pub struct SignRound {
    /// Rounding offsets in units of the step, `[groups, group_len]`.
    pub rounding: Param<Tensor<2>>,
    /// Part of the maximum that is kept, `[groups, 1]`.
    pub max_factor: Param<Tensor<2>>,
    /// Part of the minimum that is kept, `[groups, 1]`.
    pub min_factor: Param<Tensor<2>>,
    high: Tensor<2>,
    low: Tensor<2>,
    bound: f32,
    #[module(skip)]
    bits: Bits,
    #[module(skip)]
    symmetry: Symmetry,
}

impl WeightMethod for SignRound {
    type Config = SignRoundConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] =
        &[("rounding", Role::Rounding), ("max_factor", Role::Scale), ("min_factor", Role::Scale)];
    const HAS_HOOK: bool = true;

    fn accepts(config: &SignRoundConfig, _: &QuantSpec) -> Result<()> {
        if config.bound.is_finite() && config.bound > 0.0 {
            return Ok(());
        }
        Err(Error::usage(format!("bound = {} is not a positive number", config.bound))
            .fix("bound = 0.5"))
    }

    fn init(config: &SignRoundConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, weight, .. } = *start;
        let high = weight.clone().max_dim(1).clamp_min(0.0);
        let low = weight.clone().min_dim(1).clamp_max(0.0);
        Ok(Self {
            rounding: Param::from_tensor(weight.zeros_like()),
            max_factor: Param::from_tensor(high.ones_like()),
            min_factor: Param::from_tensor(low.ones_like()),
            high,
            low,
            bound: config.bound,
            bits: spec.bits,
            symmetry: spec.symmetry,
        })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let QuantParams { scale, zero_point } = self.grid();
        let rule = Rule::Affine { max_code: f32::from(self.bits.max_code()) };
        let rounding = Some(self.rounding.val());
        let stepped = Stepped { rounding, ..Stepped::new(weight, scale, zero_point, rule) };
        Quantizer::Stepped(stepped, ZeroKind::Integer)
    }

    fn between_steps(self, _: Tensor<2>, _: Moment) -> Self {
        Self {
            rounding: within(self.rounding, -self.bound, self.bound),
            max_factor: within(self.max_factor, 0.0, 1.0),
            min_factor: within(self.min_factor, 0.0, 1.0),
            ..self
        }
    }
}

impl SignRound {
    fn grid(&self) -> QuantParams {
        let high = self.high.clone() * self.max_factor.val();
        let low = self.low.clone() * self.min_factor.val();
        if self.symmetry.is_symmetric() {
            return QuantParams::symmetric(&high.max_pair(low.neg()), self.bits, self.symmetry);
        }
        let max_code = f32::from(self.bits.max_code());
        let scale = ((high - low.clone()) / max_code).clamp_min(SCALE_FLOOR);
        let zero_point = ops::clamp_ste(ops::round_ste(low.neg() / scale.clone()), 0.0, max_code);
        QuantParams { scale, zero_point }
    }
}

/// The parameter with its values brought within bounds; it keeps its id and stays a leaf.
fn within(param: Param<Tensor<2>>, low: f32, high: f32) -> Param<Tensor<2>> {
    param.map(|tensor| {
        let learns = tensor.is_require_grad();
        let tensor = tensor.clamp(low, high).detach();
        if learns { tensor.require_grad() } else { tensor }
    })
}
