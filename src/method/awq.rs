//! AWQ (Lin et al., MLSys 2024, arXiv 2306.00978): input channels that see large activations get
//! finer grids, and every group's range is clipped where that helps the output.
//!
//! *What it learns:* nothing; it searches on calibration text. *Formula:* per group of linears with
//! one input, `s = (mean |x|)^ρ` for ρ on a grid, `W·diag(s)` is quantized and `1/s` goes into the
//! preceding norm or linear; then per group of weights the range is shrunk by up to half, for the
//! least `Σ (x·(W - W_hat))²`. *Start:* the observer's grid of the scaled weight.
//! *Recipe keys:* `ratios`, `clip`. *Export:* uniform grid, integer zero; norms (and linears that
//! feed others) are changed too.

use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{MethodConfig, Needs, Problem, RtnConfig, Solver, quantize};
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::{
    Grid, GroupSize, Hessian, QuantParams, QuantSpec, QuantizedWeight, Repr, Symmetry, ZeroKind,
};

/// Steps of the clip search over the first half of the range.
const CLIP_STEPS: usize = 10;
/// Steps that the whole range would have.
const CLIP_GRID: f32 = 20.0;

/// `method.awq`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwqConfig {
    /// Exponents ρ tried, evenly from 0 on below 1.
    pub ratios: usize,
    /// Search each group's clipping (queries and keys aside).
    pub clip: bool,
}

impl Default for AwqConfig {
    fn default() -> Self {
        Self { ratios: 20, clip: true }
    }
}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct Awq;

impl Solver for Awq {
    type Config = AwqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const NEEDS: Needs = Needs::Moments;

    fn accepts(config: &AwqConfig, spec: &QuantSpec) -> Result<()> {
        if config.ratios == 0 {
            return Err(Error::usage("ratios = 0").fix("ratios = 20, or method.rtn"));
        }
        if config.clip && spec.group_size == GroupSize::PerTensor {
            return Err(Error::preflight("the clip search needs groups within a row")
                .fix("clip = false, or group_size = \"channel\""));
        }
        Ok(())
    }

    fn balance_exponents(config: &AwqConfig) -> Vec<f64> {
        (0..config.ratios).map(|i| i as f64 / config.ratios as f64).collect()
    }

    fn solve(config: &AwqConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        match problem.inputs {
            Some(inputs) if config.clip && !problem.feeds_scores => clipped(problem, inputs),
            _ => {
                let rtn = MethodConfig::Rtn(RtnConfig {});
                let Problem { spec, observer, layout, weight, .. } = *problem;
                quantize(&rtn, spec, observer, layout, weight)
            }
        }
    }
}

/// The best of the shrunken ranges, per group, by the output error that its inputs make.
fn clipped(problem: &Problem<'_>, inputs: &Hessian) -> Result<QuantizedWeight> {
    let Problem { spec, layout, observer, weight, .. } = *problem;
    let max_code = spec.bits.max_code();
    let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
    let per_row = layout.inputs / layout.group_len;
    let blocks: Vec<Hessian> =
        (0..per_row).map(|i| inputs.block(i * layout.group_len, layout.group_len)).collect();
    let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
    let mut best: Vec<Option<(f64, f32, f32)>> = vec![None; layout.groups];
    for step in 0..CLIP_STEPS {
        let keep = 1.0 - step as f32 / CLIP_GRID;
        let limit = clip(&grouped, keep, spec.symmetry);
        let grid = observer.observe(&limit, spec.bits, spec.symmetry)?;
        let codes = grid.codes(grouped.clone(), max_code);
        let change = host(grid.dequantize(codes) - grouped.clone());
        let (scale, zero) = (host(grid.scale), host(grid.zero_point));
        for (column, block) in blocks.iter().enumerate() {
            let rows: Vec<f32> = (0..layout.out)
                .flat_map(|row| {
                    let group = row * per_row + column;
                    change[group * layout.group_len..][..layout.group_len].iter().copied()
                })
                .collect();
            for (row, error) in block.row_errors(&rows, layout.out).into_iter().enumerate() {
                let group = row * per_row + column;
                if best[group].is_none_or(|(least, ..)| error < least) {
                    best[group] = Some((error, scale[group], zero[group]));
                }
            }
        }
    }
    let (scale, zero_point): (Vec<f32>, Vec<f32>) =
        best.into_iter().flatten().map(|(_, scale, zero)| (scale, zero)).unzip();
    let column = |values: &[f32]| {
        Tensor::<1>::from_data(values, &weight.device()).reshape([layout.groups, 1])
    };
    let grid = QuantParams { scale: column(&scale), zero_point: column(&zero_point) };
    let codes: Vec<u8> =
        host(grid.codes(grouped, max_code)).into_iter().map(|code| code as u8).collect();
    let grid = Grid::Uniform { scale, zero_point, zero_kind: ZeroKind::Integer };
    QuantizedWeight::new(&codes, grid, spec.bits, layout)
}

/// The weight with each group's extremes pulled in to `keep` of what they are.
fn clip(grouped: &Tensor<2>, keep: f32, symmetry: Symmetry) -> Tensor<2> {
    let (low, high) = if symmetry.is_symmetric() {
        let reach = grouped.clone().abs().max_dim(1) * keep;
        (reach.clone().neg(), reach)
    } else {
        (grouped.clone().min_dim(1) * keep, grouped.clone().max_dim(1) * keep)
    };
    grouped.clone().max_pair(low).min_pair(high)
}
