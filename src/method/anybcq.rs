//! AnyBCQ (ICLR 2026, arXiv 2510.10467): binary coding at several widths that share their planes.
//!
//! *What it learns:* nothing. *Formula:* `W_hat_p = Σ_{i<p} α_{p,i} b_i + o_p` at each width `p` from
//! `lowest` to `bits`, the planes `b_i` the same for all. *Start:* binary coding at the lowest width,
//! alternating; then for each further plane the signs of what is left, and all scales of that width by
//! least squares, so that the squared error never grows with the width. *Recipe keys:* `lowest`,
//! `rounds`. Scales of a width learn by `[stage.tune_scales]` with `bits`, and `--bits` reads a model at
//! one. *Export:* fewbit's folder holds all widths, other formats the one that is read.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Needs, Problem, Solver};
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::bcq::solve_all_nested;
use crate::quant::{Bits, Grid, QuantSpec, QuantizedWeight, Repr};

/// Keys of `method.anybcq`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AnyBcqConfig {
    /// The narrowest width; the widest is `bits`.
    pub lowest: Bits,
    /// Rounds of alternation at most, at each width.
    pub rounds: u32,
}

impl Default for AnyBcqConfig {
    fn default() -> Self {
        Self { lowest: Bits::TWO, rounds: 20 }
    }
}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct AnyBcq;

impl Solver for AnyBcq {
    type Config = AnyBcqConfig;

    const LEAVES: Repr = Repr::BinaryCoding;
    const GRID: GridKind = GridKind::Planes;
    const NEEDS: Needs = Needs::Weight;

    fn accepts(config: &AnyBcqConfig, spec: &QuantSpec) -> Result<()> {
        if config.rounds == 0 {
            return Err(Error::usage("rounds = 0 alternates nothing").fix("rounds = 20"));
        }
        if config.lowest >= spec.bits {
            let (lowest, bits) = (config.lowest, spec.bits);
            let what = format!(
                "lowest = {lowest} is not below bits = {bits}: one width is nested in none"
            );
            return Err(
                Error::usage(what).fix("bits = 4 and lowest = 2, or method.bcq for one width")
            );
        }
        Ok(())
    }

    fn solve(config: &AnyBcqConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let Problem { spec, layout, observer, weight, .. } = *problem;
        let grouped = ops::reshape_grouped(weight.clone(), layout.grouped());
        let uniform = observer.observe(&grouped, config.lowest, spec.symmetry)?;
        let (scale, zero) = (uniform.scale.into_data(), uniform.zero_point.into_data());
        let uniform: Vec<(f32, f32)> = scale.iter::<f32>().zip(zero.iter::<f32>()).collect();
        let values: Vec<f32> = weight.to_data().iter::<f32>().collect();
        let widths = [config.lowest, spec.bits];
        let groups = solve_all_nested(&values, &layout, widths, config.rounds, &uniform);
        let codes: Vec<u8> = groups.iter().flat_map(|group| group.codes.iter().copied()).collect();
        let count = usize::from(spec.bits.get() - config.lowest.get()) + 1;
        let mut grids: Vec<Grid> = (0..count)
            .map(|width| Grid::BinaryCoding {
                alpha: groups.iter().flat_map(|group| group.grids[width].0.clone()).collect(),
                offset: groups.iter().map(|group| group.grids[width].1).collect(),
            })
            .collect();
        let grid = grids.pop().ok_or_else(|| Error::failed("no width"))?;
        let weight = QuantizedWeight::new(&codes, grid, spec.bits, layout)?;
        QuantizedWeight { nested: grids, ..weight }.checked()
    }
}
