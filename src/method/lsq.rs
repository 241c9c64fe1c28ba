//! LSQ, learned step size (Esser et al., ICLR 2020, arXiv 1902.08153), with LSQ+'s shift (Bhalgat et
//! al., arXiv 2004.09576) as an option; ParetoQ's grid for 3 and 4 bits.
//!
//! *What it learns:* the latent weight and one step per group; with `offset = true` a shift β too.
//! *Formula:* `W_hat = Δ · round(clamp(W/Δ, -Q_n, Q_p))` with `Q_n = 2^(bits-1)`, `Q_p = Q_n - 1`;
//! shifted `Δ · round(clamp((W - β)/Δ, -Q_n, Q_p)) + β`. The grid has zero in the
//! middle whatever `quant.symmetric` says, and the observer is not asked. *Start:* `Δ = max |W| / Q_p`
//! (ParetoQ), `2 mean |W| / sqrt(Q_p)` (LSQ) or from three standard deviations (LSQ+); β = 0. *Recipe
//! keys:* `start`, `offset`, `gradient_scale`. *Export:* uniform grid, integer zero `Q_n`; with a
//! shift a real zero, `Q_n - β/Δ`.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, LeftGrid, Quantizer, Start, Units, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Rule, Stepped};
use crate::quant::{Bits, QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// ParetoQ's floor of the step.
const STEP_FLOOR: f32 = 1e-5;

/// Where the step starts.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LsqStart {
    /// `max |W| / Q_p`, where nothing is clipped: ParetoQ's choice.
    #[default]
    Max,
    /// `2 mean |W| / sqrt(Q_p)`: LSQ's choice.
    Mean,
    /// `max(|μ - 3σ|, |μ + 3σ|) / Q_n`: LSQ+'s choice for weights.
    Sigma,
}

/// By what the step's gradient is multiplied. Adam does not see the factor; plain gradient descent
/// and global-norm clipping do.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LsqGradientScale {
    /// `1 / sqrt(N Q_p)`, N all weights of the matrix: LSQ's and ParetoQ's.
    #[default]
    Tensor,
    /// `1 / sqrt(N Q_p)`, N the weights that share the step.
    Group,
    /// 1.
    None,
}

/// `method.lsq`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LsqConfig {
    /// Where the step starts: `"max"`, `"mean"` or `"sigma"`.
    pub start: LsqStart,
    /// Learn a shift of the grid too (LSQ+).
    pub offset: bool,
    /// The factor of the step's gradient: `"tensor"`, `"group"` or `"none"`.
    pub gradient_scale: LsqGradientScale,
}

/// LSQ's learned grid for one weight; the latent weight is the stored parameter itself.
#[derive(Debug, Module)]
pub struct Lsq {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    /// β, `[groups, 1]`, where it is learned.
    pub shift: Option<Param<Tensor<2>>>,
    gradient_factor: f64,
    #[module(skip)]
    bits: Bits,
}

impl WeightMethod for Lsq {
    type Config = LsqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Centred;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = true;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Step), ("shift", Role::Shift)];

    fn accepts(config: &LsqConfig, spec: &QuantSpec) -> Result<()> {
        if spec.bits.get() < 2 {
            return Err(Error::preflight("method.lsq needs a level on each side of zero")
                .fix("bits = 2 or more in this stage, or method.sign"));
        }
        if config.offset && spec.symmetry.is_symmetric() {
            return Err(Error::preflight("offset = true moves zero out of the middle")
                .fix("symmetric = false, or offset = false"));
        }
        Ok(())
    }

    fn init(config: &LsqConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, weight, .. } = *start;
        let lowest = (spec.bits.levels() / 2) as f32;
        let highest = lowest - 1.0;
        let step = match config.start {
            LsqStart::Max => weight.clone().abs().max_dim(1) / highest,
            LsqStart::Mean => weight.clone().abs().mean_dim(1) * 2.0 / highest.sqrt(),
            LsqStart::Sigma => {
                let (variance, mean) = weight.clone().var_mean_bias(1);
                (mean.abs() + variance.sqrt() * 3.0) / lowest
            }
        };
        Ok(Self::on(config, start, step.clamp_min(STEP_FLOOR)))
    }

    fn resume(config: &LsqConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        let middle = (start.spec.bits.levels() / 2) as f32;
        // A shifted grid's zero points come out of a division: not to the last bit.
        if config.offset || !grid.all_zeros_at(middle) {
            return Ok(None);
        }
        Ok(Some(Self::on(config, start, grid.scale.clone())))
    }

    fn units(&self) -> Option<Units<'_>> {
        let spacing = ops::off_tape(self.step.val()).clamp_min(STEP_FLOOR);
        Some(Units { step: &self.step, shift: self.shift.as_ref(), spacing })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let step = self.step.val().clamp_min(STEP_FLOOR);
        let middle = (self.bits.levels() / 2) as f32;
        // The shift is a part of the zero point, so that the grid alone gives the values; the step
        // inside it has the factor of its gradient too.
        let (weight, zero_point, zero_kind) = match &self.shift {
            Some(shift) => {
                let step = ops::scale_gradient(step.clone(), self.gradient_factor);
                let zero_point = (shift.val() / step).neg() + middle;
                (weight - shift.val(), zero_point, ZeroKind::Real)
            }
            None => (weight, step.full_like(middle), ZeroKind::Integer),
        };
        let rule = Rule::Lsq { middle };
        let step_gradient = self.gradient_factor;
        let stepped = Stepped { step_gradient, ..Stepped::new(weight, step, zero_point, rule) };
        Quantizer::Stepped(stepped, zero_kind)
    }
}

impl Lsq {
    fn on(config: &LsqConfig, start: &Start<'_>, step: Tensor<2>) -> Self {
        let Start { spec, weight, .. } = *start;
        let highest = (spec.bits.levels() / 2) as f32 - 1.0;
        let [groups, len] = weight.dims();
        let sharing = match config.gradient_scale {
            LsqGradientScale::Tensor => Some(groups * len),
            LsqGradientScale::Group => Some(len),
            LsqGradientScale::None => None,
        };
        Self {
            shift: config.offset.then(|| Param::from_tensor(step.zeros_like())),
            step: Param::from_tensor(step),
            gradient_factor: sharing
                .map_or(1.0, |count| (count as f64 * f64::from(highest)).powf(-0.5)),
            bits: spec.bits,
        }
    }
}
