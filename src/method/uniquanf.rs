//! UniQuanF (Park et al., ACL 2025, arXiv 2506.03781): FlexRound's transform in front of a learned
//! binary-coding grid.
//!
//! *What it learns:* the step `exp(log_scale)`, a division factor for every weight
//! (`log_division`) and one per group (`log_row`), and the levels of each group through the scales
//! of its sign planes (`alpha`). *Formula:* `w~ = W / exp(δ + D + d) + z_U`; the nearest level
//! `ℓ ∈ {Σ ±α_i}` to `w~ - c`, `c = (2^k - 1)/2`; `W_hat = exp(δ) (ℓ + c - z_U)`.
//! The unification theorem folds it into plain binary coding with `exp(δ) α_i` and the offset
//! `exp(δ) (c - z_U)`, and that folded form is what every forward evaluates. *Start:* unified: for
//! each of `grid_points` shrunken ranges anchored at the minimum, `alternations` rounds of
//! binary-coding fit in unit steps; the best kept. *Recipe keys:* `grid_points`, `alternations`,
//! `period`, `gradient_filter`. *Export:* binary coding.
//!
//! Codes are kept between steps and moved only every `period` steps, to the nearest of the present
//! level and its two neighbours in order of value; before folding the nearest of all levels is
//! taken once more. The gradient of a weight that lies further from its level than the smallest
//! plane is dropped, as a clamp would.

use burn::module::{Module, Param, ParamId};
use burn::tensor::{Tensor, TensorData};
use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Moment, Quantizer, Start, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::Unified;
use crate::quant::bcq::{self, BcqOptions, BcqSolver};
use crate::quant::{QuantSpec, Repr, SCALE_FLOOR};
use crate::train::Role;

/// Exponent of the error that chooses among grid points, as in the released code.
const ERROR_POWER: f64 = 2.4;

/// `method.uniquanf`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct UniQuanFConfig {
    /// Shrunken ranges that the start tries; 1 is the released script's.
    pub grid_points: u32,
    /// Rounds of alternation in the start.
    pub alternations: u32,
    /// Steps between moves of the codes.
    pub period: u64,
    /// Drop the gradient of weights that lie beyond their level's reach.
    pub gradient_filter: bool,
}

impl Default for UniQuanFConfig {
    fn default() -> Self {
        Self { grid_points: 1, alternations: 15, period: 2, gradient_filter: true }
    }
}

/// UniQuanF's learned state for one weight.
#[derive(Debug, Module)]
pub struct UniQuanF {
    /// `ln Δ`, `[groups, 1]`.
    pub log_scale: Param<Tensor<2>>,
    /// Element-wise log division, `[groups, group_len]`.
    pub log_division: Param<Tensor<2>>,
    /// Group-wise log division, `[groups, 1]`.
    pub log_row: Param<Tensor<2>>,
    /// Scales of the sign planes in unit steps, `[groups, bits]`.
    pub alpha: Param<Tensor<2>>,
    /// `z_U`, `[groups, 1]`: where the transform puts a zero weight.
    pub zero_unified: Tensor<2>,
    /// `z_B`, `[groups, 1]`: the middle of the levels, from `c`.
    pub zero_binary: Tensor<2>,
    /// The present codes as floats, `[groups, group_len]`.
    codes: Param<Tensor<2>>,
    bits: u8,
    period: u64,
    gradient_filter: bool,
}

impl WeightMethod for UniQuanF {
    type Config = UniQuanFConfig;

    const LEAVES: Repr = Repr::BinaryCoding;
    const GRID: GridKind = GridKind::Planes;
    const TRAINS_BASE: bool = false;
    const HAS_HOOK: bool = true;
    const CARRIED: &'static [&'static str] = &["codes"];
    const ROLES: &'static [(&'static str, Role)] = &[
        ("log_scale", Role::Scale),
        ("log_division", Role::Rounding),
        ("log_row", Role::Rounding),
        ("alpha", Role::Levels),
    ];

    fn accepts(config: &UniQuanFConfig, spec: &QuantSpec) -> Result<()> {
        for (key, value) in [
            ("grid_points", u64::from(config.grid_points)),
            ("alternations", u64::from(config.alternations)),
            ("period", config.period),
        ] {
            if value == 0 {
                return Err(Error::usage(format!("{key} = 0")).fix(format!("{key} = 1")));
            }
        }
        if spec.symmetry.is_symmetric() {
            return Err(Error::preflight("method.uniquanf anchors its grid at the minimum")
                .fix("symmetric = false"));
        }
        Ok(())
    }

    fn init(config: &UniQuanFConfig, start: &Start<'_>) -> Result<Self> {
        let weight = start.weight;
        let [groups, group_len] = weight.dims();
        let values: Vec<f32> = weight.to_data().iter::<f32>().collect();
        let unified = unified_start(config, start, &values);
        let device = weight.device();
        let tensor = |values: Vec<f32>, columns: usize| -> Tensor<2> {
            Tensor::from_data(TensorData::new(values, [groups, columns]), &device)
        };
        let scale = tensor(unified.iter().map(|g| g.scale).collect(), 1);
        let bits = start.spec.bits;
        let alpha = unified.iter().flat_map(|g| g.alpha.iter().copied()).collect();
        let zero_unified = tensor(unified.iter().map(|g| g.zero).collect(), 1);
        let method = Self {
            log_row: Param::from_tensor(scale.zeros_like()),
            log_scale: Param::from_tensor(scale.log()),
            log_division: Param::from_tensor(weight.zeros_like()),
            alpha: Param::from_tensor(tensor(alpha, usize::from(bits.get()))),
            zero_binary: zero_unified.zeros_like(),
            zero_unified,
            codes: unlearned(tensor(vec![0.0; groups * group_len], group_len)),
            bits: bits.get(),
            period: config.period,
            gradient_filter: config.gradient_filter,
        };
        Ok(method.between_steps(weight.clone(), Moment::End))
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let (codes, filter) = (self.codes.val(), self.gradient_filter);
        Quantizer::Unified { unified: self.unified(), weight, codes, filter }
    }

    fn between_steps(mut self, weight: Tensor<2>, moment: Moment) -> Self {
        let local = match moment {
            Moment::Step(step) if !step.is_multiple_of(self.period) => return self,
            Moment::Step(_) => true,
            Moment::End => false,
        };
        let present = self.codes.val();
        self.codes = unlearned(self.unified().nearest(weight, local.then_some(&present)));
        self
    }
}

impl UniQuanF {
    /// The present codes as floats, `[groups, group_len]`.
    pub fn codes(&self) -> Tensor<2> {
        self.codes.val()
    }

    fn unified(&self) -> Unified {
        let middle = f32::from(u8::MAX >> (8 - self.bits)) * 0.5;
        Unified {
            log_scale: self.log_scale.val(),
            log_division: self.log_division.val(),
            log_row: self.log_row.val(),
            alpha: self.alpha.val(),
            zero_unified: self.zero_unified.clone(),
            middle: self.zero_binary.clone() + middle,
        }
    }
}

/// A parameter that moves between steps only.
fn unlearned(tensor: Tensor<2>) -> Param<Tensor<2>> {
    Param::initialized(ParamId::new(), tensor)
}

/// One group's start.
#[derive(Clone, Debug)]
struct GroupStart {
    scale: f32,
    zero: f32,
    alpha: Vec<f32>,
    error: f64,
}

/// The unified start of every group (the paper's "min" strategy).
fn unified_start(config: &UniQuanFConfig, start: &Start<'_>, values: &[f32]) -> Vec<GroupStart> {
    let bits = start.spec.bits;
    let top = f32::from(bits.max_code());
    let solver = BcqSolver::Alternating { rounds: config.alternations };
    let options = BcqOptions { bits, solver, offset: false };
    values
        .par_chunks_exact(start.layout.group_len)
        .map(|group| {
            let (low, high) = group
                .iter()
                .fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), w| (l.min(*w), h.max(*w)));
            let of = |i: u32| {
                let share = i as f32 / config.grid_points as f32;
                let scale = ((high - low) / top * share).max(SCALE_FLOOR);
                fit(group, scale, -low / scale, &options)
            };
            // The whole range comes last and is always there; the first of equals wins.
            (1..config.grid_points).map(of).fold(of(config.grid_points), |best, next| {
                if next.error < best.error { next } else { best }
            })
        })
        .collect()
}

/// The binary-coding fit of a group in unit steps.
fn fit(group: &[f32], scale: f32, zero: f32, options: &BcqOptions) -> GroupStart {
    let middle = f32::from(options.bits.max_code()) * 0.5;
    let shift = zero - middle;
    let position: Vec<f32> = group.iter().map(|w| w / scale + shift).collect();
    let code = bcq::solve(&position, options, None);
    let error = group.iter().zip(&code.codes).map(|(w, c)| {
        let w_hat = scale * (bcq::level(*c, &code.alpha, 0.0) - shift);
        f64::from((w - w_hat).abs()).powf(ERROR_POWER)
    });
    let error = error.sum();
    GroupStart { scale, zero, alpha: code.alpha, error }
}
