//! SEQ, stretched elastic quantization for 2 bits (ParetoQ, arXiv 2502.02631; UPQ's INT2 grid).
//!
//! *What it learns:* the latent weight and one step per group (per output row by default).
//! *Formula:* `W_hat = (Δ/2) · (round(2 clamp(W/Δ, ±(1-ε)) - 1/2) + 1/2)`: four levels,
//! ±Δ/4 and ±3Δ/4, none of them zero. *Start:* `Δ = max |W|` of the weight
//! being quantized, or the fraction of it with the smallest squared error. *Recipe keys:* `start`,
//! `ties`, `gradient_scale`. *Export:* uniform grid with half-integer zero point 1.5 and scale Δ/2.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, LeftGrid, Quantizer, Start, Units, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Candidate, Rule, Stepped, TieRule};
use crate::quant::{QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// ParetoQ's margin: a weight beyond `(1 - ε) Δ` counts as clipped.
pub(super) const EPSILON: f32 = 0.01;
/// ParetoQ's floor of the step.
pub(super) const STEP_FLOOR: f32 = 1e-5;
/// Fractions of `max |W|` that the MSE start tries.
const START_GRID: u32 = 100;

/// Where the step starts.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SeqStart {
    /// `Δ = max |W|`: ParetoQ's and UPQ's choice.
    #[default]
    Max,
    /// The fraction `i/100` of `max |W|` with the smallest squared error.
    Mse,
}

/// `method.seq`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct SeqConfig {
    /// Where the step starts: `"max"` or `"mse"`.
    pub start: SeqStart,
    /// Where an exact tie (a zero weight) goes: `"half_even"` or `"half_up"`.
    pub ties: TieRule,
    /// Multiply the step's gradient by `1/sqrt(numel)`, as ParetoQ does. Adam does not see the
    /// factor; global-norm clipping does: without it the row sums drown the weights' gradients.
    pub gradient_scale: bool,
}

impl Default for SeqConfig {
    fn default() -> Self {
        Self { start: SeqStart::Max, ties: TieRule::HalfEven, gradient_scale: true }
    }
}

/// SEQ's learned step for one weight; the latent weight is the stored parameter itself.
#[derive(Debug, Module)]
pub struct Seq {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    gradient_factor: f64,
    half_up: bool,
}

impl WeightMethod for Seq {
    type Config = SeqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Stretched;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = true;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Step)];

    fn accepts(_: &SeqConfig, spec: &QuantSpec) -> Result<()> {
        if spec.bits.get() == 2 {
            return Ok(());
        }
        Err(Error::preflight(format!("method.seq is a 2-bit grid, not {} bits", spec.bits))
            .fix("bits = 2 in this stage"))
    }

    fn init(config: &SeqConfig, start: &Start<'_>) -> Result<Self> {
        let weight = start.weight;
        let step = start_step(config.start, weight, rule(config.ties), 1.5);
        Ok(Self::on(config, start, step))
    }

    fn resume(config: &SeqConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        if grid.zero_kind != ZeroKind::Half || !grid.all_zeros_at(1.5) {
            return Ok(None);
        }
        let step = grid.steps(rule(config.ties));
        Ok(Some(Self::on(config, start, step)))
    }

    fn units(&self) -> Option<Units<'_>> {
        let step = ops::off_tape(self.step.val()).clamp_min(STEP_FLOOR);
        let spacing = rule(TieRule::HalfEven).scales(step);
        Some(Units { step: &self.step, shift: None, spacing })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let ties = if self.half_up { TieRule::HalfUp } else { TieRule::HalfEven };
        let step = self.step.val().clamp_min(STEP_FLOOR);
        Quantizer::Stepped(grid(weight, step, ties, self.gradient_factor), ZeroKind::Half)
    }
}

impl Seq {
    fn on(config: &SeqConfig, start: &Start<'_>, step: Tensor<2>) -> Self {
        Self {
            step: Param::from_tensor(step),
            gradient_factor: gradient_factor(config.gradient_scale, start.weight),
            half_up: config.ties == TieRule::HalfUp,
        }
    }
}

fn rule(ties: TieRule) -> Rule {
    Rule::Seq { margin: EPSILON, ties }
}

fn grid(weight: Tensor<2>, step: Tensor<2>, ties: TieRule, step_gradient: f64) -> Stepped {
    let zero_point = step.full_like(1.5);
    let rule = rule(ties);
    Stepped { step_gradient, ..Stepped::new(weight, step, zero_point, rule) }
}

/// `1/sqrt(numel)`, ParetoQ's factor of the step's gradient, or 1.
pub(super) fn gradient_factor(scaled: bool, weight: &Tensor<2>) -> f64 {
    let [groups, len] = weight.dims();
    if scaled { ((groups * len) as f64).powf(-0.5) } else { 1.0 }
}

/// The step of each group, `[groups, 1]`, on a grid of `rule` around a fixed zero point.
pub(super) fn start_step(
    start: SeqStart,
    weight: &Tensor<2>,
    rule: Rule,
    zero_point: f32,
) -> Tensor<2> {
    let max = weight.clone().abs().max_dim(1).clamp_min(STEP_FLOOR);
    if start == SeqStart::Max {
        return max;
    }
    let fractions = (1..=START_GRID).map(|i| i as f32 / START_GRID as f32);
    // Comparisons that leave a damaged weight's NaN where it is.
    let floored = |step: f32| if step < STEP_FLOOR { STEP_FLOOR } else { step };
    let found = ops::nearest_grids(weight, rule, 2.0, |extent, candidates| {
        let max = floored(extent.reach());
        let step = |fraction| Candidate { step: floored(max * fraction), zero_point };
        candidates.extend(fractions.clone().map(step));
    });
    if let Some((step, _)) = found {
        return step;
    }
    // The best of the fractions, per group; the first one wins a tie.
    let mut best: Option<(Tensor<2>, Tensor<2>)> = None;
    for fraction in fractions {
        let step = (max.clone() * fraction).clamp_min(STEP_FLOOR);
        let zero_point = step.full_like(zero_point);
        let w_hat = Stepped::new(weight.clone(), step.clone(), zero_point, rule).values();
        let error = (weight.clone() - w_hat).square().mean_dim(1);
        best = Some(match best {
            None => (error, step),
            Some((best_error, best_step)) => {
                let better = error.clone().lower(best_error.clone());
                (best_error.mask_where(better.clone(), error), best_step.mask_where(better, step))
            }
        });
    }
    best.map_or(max, |(_, step)| step)
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    #[test]
    fn the_search_in_one_pass_finds_no_worse_steps() {
        let (groups, len) = (24, 200);
        let wave = |i: usize| ((i as f32 + 0.3) * 12.9898).sin().powi(3) * 0.1;
        let values: Vec<f32> = (0..groups * len).map(wave).collect();
        let device = Device::default();
        let weight = Tensor::<2>::from_data(TensorData::new(values, [groups, len]), &device);
        let seq = |ties| (Rule::Seq { margin: EPSILON, ties }, 1.5);
        let ternary = (Rule::Ternary { margin: EPSILON }, 1.0);
        for (rule, zero) in [seq(TieRule::HalfEven), seq(TieRule::HalfUp), ternary] {
            let search = || start_step(SeqStart::Mse, &weight, rule, zero);
            let errors = |step: Tensor<2>| -> Vec<f32> {
                let zero = step.full_like(zero);
                let w_hat = Stepped::new(weight.clone(), step, zero, rule).values();
                (weight.clone() - w_hat).square().mean_dim(1).into_data().iter().collect()
            };
            let (found, composed) = (errors(search()), errors(ops::composed(search)));
            for (found, composed) in found.iter().zip(&composed) {
                assert!(*found <= composed * (1.0 + 1e-6), "{found} for {composed}, {rule:?}");
            }
        }
    }
}
