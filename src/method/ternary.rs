//! Ternary weights in ParetoQ's form (Liu et al., arXiv 2502.02631; its "1.58 bits").
//!
//! *What it learns:* the latent weight and one step per group (per output row by default).
//! *Formula:* `W_hat = (2Δ/3) · round(3/2 clamp(W/Δ, ±(1-ε)))`: three levels, 0 and ±2Δ/3. *Start:*
//! `Δ = max |W|`, or the fraction of it with the smallest squared error. *Recipe keys:* `start`,
//! `gradient_scale`. *Export:* uniform grid in 2-bit codes, of which the highest is unused, integer
//! zero 1 and scale 2Δ/3.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::seq::{self, EPSILON, STEP_FLOOR, SeqStart};
use super::{GridKind, LeftGrid, Quantizer, Start, Units, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Rule, Stepped};
use crate::quant::{QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// `method.ternary`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct TernaryConfig {
    /// Where the step starts: `"max"` or `"mse"`.
    pub start: SeqStart,
    /// Multiply the step's gradient by `1/sqrt(numel)`, as ParetoQ does. Adam does not see the
    /// factor; global-norm clipping does.
    pub gradient_scale: bool,
}

impl Default for TernaryConfig {
    fn default() -> Self {
        Self { start: SeqStart::Max, gradient_scale: true }
    }
}

/// The learned step for one weight; the latent weight is the stored parameter itself.
#[derive(Debug, Module)]
pub struct Ternary {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    gradient_factor: f64,
}

impl WeightMethod for Ternary {
    type Config = TernaryConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Ternary;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = true;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Step)];

    fn accepts(_: &TernaryConfig, spec: &QuantSpec) -> Result<()> {
        if spec.bits.get() == 2 {
            return Ok(());
        }
        Err(Error::preflight(format!(
            "method.ternary stores three levels in 2 bits, not {}",
            spec.bits
        ))
        .fix("bits = 2 in this stage"))
    }

    fn init(config: &TernaryConfig, start: &Start<'_>) -> Result<Self> {
        let weight = start.weight;
        let step = seq::start_step(config.start, weight, Rule::Ternary { margin: EPSILON }, 1.0);
        Ok(Self {
            step: Param::from_tensor(step),
            gradient_factor: seq::gradient_factor(config.gradient_scale, weight),
        })
    }

    fn resume(config: &TernaryConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        // Another method's codes may be any of four.
        if grid.method != "ternary" {
            return Ok(None);
        }
        Ok(Some(Self {
            step: Param::from_tensor(grid.steps(RULE)),
            gradient_factor: seq::gradient_factor(config.gradient_scale, start.weight),
        }))
    }

    fn units(&self) -> Option<Units<'_>> {
        let spacing = RULE.scales(ops::off_tape(self.step.val()).clamp_min(STEP_FLOOR));
        Some(Units { step: &self.step, shift: None, spacing })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let step = self.step.val().clamp_min(STEP_FLOOR);
        Quantizer::Stepped(grid(weight, step, self.gradient_factor), ZeroKind::Integer)
    }
}

const RULE: Rule = Rule::Ternary { margin: EPSILON };

fn grid(weight: Tensor<2>, step: Tensor<2>, step_gradient: f64) -> Stepped {
    let zero_point = step.ones_like();
    Stepped { step_gradient, ..Stepped::new(weight, step, zero_point, RULE) }
}
