//! One bit: the sign of every weight times a learned step (ParetoQ, arXiv 2502.02631).
//!
//! *What it learns:* the latent weight and one step per group (per output row by default).
//! *Formula:* `W_hat = Δ sgn(W)` with `sgn(0) = +1`; the latent's gradient passes where `|W| <= Δ`,
//! the step's is the sum of `sgn(W)` times what arrives. *Start:*
//! `Δ = mean |W|`, the best step for given signs. *Recipe keys:* `gradient_scale`. *Export:* uniform
//! grid in 1-bit codes with half-integer zero point 0.5 and scale 2Δ.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::seq::{self, STEP_FLOOR};
use super::{GridKind, LeftGrid, Quantizer, Start, Units, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Rule, Stepped};
use crate::quant::{QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// `method.sign`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SignConfig {
    /// Multiply the step's gradient by `1/sqrt(numel)`, as ParetoQ does. Adam does not see the
    /// factor; global-norm clipping does.
    pub gradient_scale: bool,
}

impl Default for SignConfig {
    fn default() -> Self {
        Self { gradient_scale: true }
    }
}

/// The learned step for one weight; the latent weight is the stored parameter itself.
#[derive(Debug, Module)]
pub struct Sign {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    gradient_factor: f64,
}

impl WeightMethod for Sign {
    type Config = SignConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Signs;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = true;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Step)];

    fn accepts(_: &SignConfig, spec: &QuantSpec) -> Result<()> {
        if spec.bits.get() == 1 {
            return Ok(());
        }
        Err(Error::preflight(format!("method.sign is a 1-bit grid, not {} bits", spec.bits))
            .fix("bits = 1 in this stage"))
    }

    fn init(config: &SignConfig, start: &Start<'_>) -> Result<Self> {
        let weight = start.weight;
        let step = weight.clone().abs().mean_dim(1).clamp_min(STEP_FLOOR);
        Ok(Self {
            step: Param::from_tensor(step),
            gradient_factor: seq::gradient_factor(config.gradient_scale, weight),
        })
    }

    fn resume(config: &SignConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        if grid.zero_kind != ZeroKind::Half {
            return Ok(None);
        }
        Ok(Some(Self {
            step: Param::from_tensor(grid.steps(Rule::Sign)),
            gradient_factor: seq::gradient_factor(config.gradient_scale, start.weight),
        }))
    }

    fn units(&self) -> Option<Units<'_>> {
        let spacing = Rule::Sign.scales(ops::off_tape(self.step.val()).clamp_min(STEP_FLOOR));
        Some(Units { step: &self.step, shift: None, spacing })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let step = self.step.val().clamp_min(STEP_FLOOR);
        let (zero_point, rule) = (step.full_like(0.5), Rule::Sign);
        let step_gradient = self.gradient_factor;
        let stepped = Stepped { step_gradient, ..Stepped::new(weight, step, zero_point, rule) };
        Quantizer::Stepped(stepped, ZeroKind::Half)
    }
}
