//! Binary coding (BCQ; Xu et al., arXiv 1802.00150): sign planes with a scale each, fitted to the
//! weight.
//!
//! *What it learns:* nothing. *Formula:* `W_hat = Σ_i α_i b_i + o` with `b_i ∈ {-1, +1}` per weight,
//! `α_i` and `o` per group. *Start:* greedy; refined by least squares; or
//! alternating between least squares and nearest levels, also from the image of the uniform grid,
//! the better kept. *Recipe keys:* `solve`, `rounds`, `offset`, `uniform_start`. *Export:* binary
//! coding.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Needs, Problem, Solver};
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::bcq::{BcqOptions, BcqSolver, solve_all};
use crate::quant::{Grid, QuantSpec, QuantizedWeight, Repr};

/// How scales and signs are found.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BcqSolve {
    /// One plane after another, from what the earlier ones leave.
    Greedy,
    /// Greedy, then all scales by least squares.
    Refined,
    /// Least squares and nearest levels in turn.
    #[default]
    Alternating,
}

/// `method.bcq`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct BcqConfig {
    /// `"greedy"`, `"refined"` or `"alternating"`.
    pub solve: BcqSolve,
    /// Rounds of alternation at most.
    pub rounds: u32,
    /// Whether groups have an offset; without one, levels are symmetric about zero.
    pub offset: bool,
    /// Start the alternation from the observer's uniform grid too, and keep the better end.
    pub uniform_start: bool,
}

impl Default for BcqConfig {
    fn default() -> Self {
        Self { solve: BcqSolve::Alternating, rounds: 15, offset: true, uniform_start: true }
    }
}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct Bcq;

impl Solver for Bcq {
    type Config = BcqConfig;

    const LEAVES: Repr = Repr::BinaryCoding;
    const GRID: GridKind = GridKind::Planes;
    const NEEDS: Needs = Needs::Weight;

    fn accepts(config: &BcqConfig, _: &QuantSpec) -> Result<()> {
        if config.solve == BcqSolve::Alternating && config.rounds == 0 {
            return Err(Error::usage("rounds = 0 alternates nothing").fix("rounds = 15"));
        }
        Ok(())
    }

    fn solve(config: &BcqConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let Problem { spec, layout, observer, weight, .. } = *problem;
        let options = BcqOptions {
            bits: spec.bits,
            solver: match config.solve {
                BcqSolve::Greedy => BcqSolver::Greedy,
                BcqSolve::Refined => BcqSolver::Refined,
                BcqSolve::Alternating => BcqSolver::Alternating { rounds: config.rounds },
            },
            offset: config.offset,
        };
        let uniform = if config.uniform_start && config.solve == BcqSolve::Alternating {
            let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
            let grid = observer.observe(&grouped, spec.bits, spec.symmetry)?;
            let (scale, zero) = (grid.scale.into_data(), grid.zero_point.into_data());
            Some(scale.iter::<f32>().zip(zero.iter::<f32>()).collect::<Vec<(f32, f32)>>())
        } else {
            None
        };
        let values: Vec<f32> = weight.to_data().iter::<f32>().collect();
        let groups = solve_all(&values, &layout, &options, uniform.as_deref());
        let codes: Vec<u8> = groups.iter().flat_map(|group| group.codes.iter().copied()).collect();
        let grid = Grid::BinaryCoding {
            alpha: groups.iter().flat_map(|group| group.alpha.iter().copied()).collect(),
            offset: groups.iter().map(|group| group.offset).collect(),
        };
        QuantizedWeight::new(&codes, grid, spec.bits, layout)
    }
}
