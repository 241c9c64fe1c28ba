//! LWC, learnable weight clipping (OmniQuant; Shao et al., ICLR 2024, arXiv 2308.13137).
//!
//! *What it learns:* how much of each end of a group's range is kept, two numbers per group
//! (`clip_high`, `clip_low`); the weight stays frozen. *Formula:* with γ = sigmoid(`clip_high`) and
//! β = sigmoid(`clip_low`), `Δ = (γ max W - β min W) / L`, `z = round(-β min W / Δ)` and
//! `W_hat = Δ (clamp(round(W/Δ) + z, 0, L) - z)`; on a symmetric grid
//! `Δ = max(γ max W, β |min W|) / (2^(bits-1) - 1)` (half of L below it for `"full_range"`) and z in
//! the middle. z gets no gradient and may lie outside `0..=L`: a one-sided group
//! keeps all its levels on its side. *Start:* both at 4, where sigmoid is 0.982: not
//! round-to-nearest, but a range 2 % shorter. *Recipe keys:* `start`. The observer is not asked.
//! *Export:* uniform grid, integer zero.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Quantizer, Start, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{Rule, Stepped};
use crate::quant::{Bits, QuantParams, QuantSpec, Repr, Symmetry, ZeroKind};
use crate::train::Role;

/// OmniQuant's bounds of the step.
const STEP_BOUNDS: [f32; 2] = [1e-5, 1e4];

/// `method.lwc`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LwcConfig {
    /// Where `clip_high` and `clip_low` start; 20 is round-to-nearest without clipping, but gets
    /// next to no gradient.
    pub start: f32,
}

impl Default for LwcConfig {
    fn default() -> Self {
        Self { start: 4.0 }
    }
}

/// LWC's learned state for one weight.
#[derive(Debug, Module)]
pub struct Lwc {
    /// Logit of the part of the maximum that is kept, `[groups, 1]`.
    pub clip_high: Param<Tensor<2>>,
    /// Logit of the part of the minimum that is kept, `[groups, 1]`.
    pub clip_low: Param<Tensor<2>>,
    high: Tensor<2>,
    low: Tensor<2>,
    #[module(skip)]
    bits: Bits,
    #[module(skip)]
    symmetry: Symmetry,
}

impl WeightMethod for Lwc {
    type Config = LwcConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] =
        &[("clip_high", Role::Scale), ("clip_low", Role::Scale)];

    fn accepts(config: &LwcConfig, _: &QuantSpec) -> Result<()> {
        if config.start.is_finite() {
            return Ok(());
        }
        Err(Error::usage(format!("start = {} is not a finite number", config.start))
            .fix("start = 4.0"))
    }

    fn init(config: &LwcConfig, start: &Start<'_>) -> Result<Self> {
        let high = start.weight.clone().max_dim(1);
        let low = start.weight.clone().min_dim(1);
        Ok(Self {
            clip_high: Param::from_tensor(high.full_like(config.start)),
            clip_low: Param::from_tensor(low.full_like(config.start)),
            high,
            low,
            bits: start.spec.bits,
            symmetry: start.spec.symmetry,
        })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let QuantParams { scale, zero_point } = self.grid();
        let rule = Rule::Affine { max_code: f32::from(self.bits.max_code()) };
        Quantizer::Stepped(Stepped::new(weight, scale, zero_point, rule), ZeroKind::Integer)
    }
}

impl Lwc {
    fn grid(&self) -> QuantParams {
        let high = sigmoid(self.clip_high.val()) * self.high.clone();
        let low = sigmoid(self.clip_low.val()) * self.low.clone();
        let [floor, ceiling] = STEP_BOUNDS;
        if self.symmetry.is_symmetric() {
            let reach = high.max_pair(low.abs());
            let grid = QuantParams::symmetric(&reach, self.bits, self.symmetry);
            return QuantParams { scale: grid.scale.clamp(floor, ceiling), ..grid };
        }
        let range = high - low.clone();
        let scale = (range / f32::from(self.bits.max_code())).clamp(floor, ceiling);
        let zero_point = (low / scale.clone()).detach().round().neg();
        QuantParams { scale, zero_point }
    }
}
