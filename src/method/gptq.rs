//! GPTQ (Frantar et al., arXiv 2210.17323): each column's rounding error is made up for by the
//! columns after it, weighted by the second moments of the inputs.
//!
//! *What it learns:* nothing; it looks at the inputs of each linear once. *Formula:* with
//! `H = 2/N Σ x xᵀ + λI` and `U` the upper factor of `H⁻¹`, column `j` is rounded, and
//! `(w_j - q_j) / U_jj · U_jk` is taken off every later column `k`. *Start:* the
//! observer's grid, per group from the updated weights, or from the original ones with
//! `static_groups`. *Recipe keys:* `damping`, `act_order`, `static_groups`, `block`. *Export:*
//! uniform grid, integer zero.

use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Needs, Problem, Solver};
use crate::error::{Error, Result};
use crate::quant::gptq::{GptqOptions, gptq};
use crate::quant::{Grid, GroupSize, QuantSpec, QuantizedWeight, Repr, ZeroKind};

/// `method.gptq`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqConfig {
    /// Added to the Hessian's diagonal, as a share of its mean.
    pub damping: f64,
    /// Columns in order of falling second moment of their inputs.
    pub act_order: bool,
    /// Grids of all groups from the original weights; `act_order` inside groups needs it, because a
    /// file keeps the members of a group side by side.
    pub static_groups: bool,
    /// Columns between updates of the rest of the matrix; changes speed alone.
    pub block: usize,
}

impl Default for GptqConfig {
    fn default() -> Self {
        Self { damping: 0.01, act_order: false, static_groups: false, block: 128 }
    }
}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct Gptq;

impl Solver for Gptq {
    type Config = GptqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const NEEDS: Needs = Needs::Moments;

    fn accepts(config: &GptqConfig, spec: &QuantSpec) -> Result<()> {
        if !(config.damping.is_finite() && config.damping >= 0.0) {
            return Err(Error::usage(format!("damping = {} is not a share", config.damping))
                .fix("damping = 0.01"));
        }
        if config.block == 0 {
            return Err(Error::usage("block = 0").fix("block = 128"));
        }
        let grouped = matches!(spec.group_size, GroupSize::Of(_));
        if config.act_order && grouped && !config.static_groups {
            return Err(Error::usage("act_order would scatter the members of a group")
                .fix("static_groups = true"));
        }
        Ok(())
    }

    fn solve(config: &GptqConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let Problem { spec, layout, observer, weight, .. } = *problem;
        let device = weight.device();
        let observe = |values: Vec<f32>, shape: [usize; 2]| {
            let grouped = Tensor::<2>::from_data(TensorData::new(values, shape), &device);
            let grid = observer.observe(&grouped, spec.bits, spec.symmetry)?;
            let host = |t: Tensor<2>| t.into_data().iter::<f32>().collect::<Vec<f32>>();
            Ok((host(grid.scale), host(grid.zero_point)))
        };
        let options = GptqOptions {
            damping: config.damping,
            act_order: config.act_order,
            static_groups: config.static_groups,
            block: config.block,
        };
        let values: Vec<f32> = weight.to_data().iter::<f32>().collect();
        let max_code = spec.bits.max_code();
        let solved = gptq(&values, &layout, max_code, problem.need_inputs()?, &options, &observe)?;
        let grid = Grid::Uniform {
            scale: solved.scale,
            zero_point: solved.zero_point,
            zero_kind: ZeroKind::Integer,
        };
        QuantizedWeight::new(&solved.codes, grid, spec.bits, layout)
    }
}
