//! Block-AP, the first phase of EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062): everything in
//! a block learns.
//!
//! *What it learns:* the latent weight, and per group a step and a zero point. *Formula:*
//! `W_hat = Δ (clamp(round(W/Δ) + z, 0, L) - z)` with `z = clamp(round(zero), 0, L)`; rounding `zero`
//! and bounding it and the step have gradient 1, the clamp of the codes is a true one. *Start:* `Δ
//! = (max W - min W) / L` within `1e-4..1e4`, `zero = round(-min W / Δ)`: EfficientQAT's, without
//! zero in range; or the observer's grid. *Recipe keys:* `start`. *Export:* uniform grid, integer
//! zero.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, LeftGrid, Quantizer, Start, Units, WeightMethod};
use crate::error::{Error, Result};
use crate::ops::{self, Rule, Stepped};
use crate::quant::{QuantParams, QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// EfficientQAT's bounds of the step. The lower one is felt: a group at 4 bits whose range is
/// below 0.0015 loses levels.
const STEP_BOUNDS: [f32; 2] = [1e-4, 1e4];
/// EfficientQAT's bound of the zero point at the start.
const ZERO_BOUND: f32 = 1e4;

/// Where step and zero point start.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum BlockApStart {
    /// Smallest and largest weight of the group: EfficientQAT's choice.
    #[default]
    #[serde(rename = "minmax")]
    MinMax,
    /// The grid of `quant.observer`.
    Observer,
}

/// `method.block_ap`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct BlockApConfig {
    /// Where step and zero point start: `"minmax"` or `"observer"`.
    pub start: BlockApStart,
}

/// Block-AP's learned grid for one weight; the latent weight is the stored parameter itself.
#[derive(Debug, Module)]
pub struct BlockAp {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    /// The zero point before rounding, `[groups, 1]`.
    pub zero: Param<Tensor<2>>,
    max_code: u8,
    /// The least step.
    floor: f32,
    /// Bounds of the zero point.
    zeros: [f32; 2],
}

impl WeightMethod for BlockAp {
    type Config = BlockApConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = true;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Step), ("zero", Role::Scale)];

    fn accepts(_: &BlockApConfig, spec: &QuantSpec) -> Result<()> {
        if spec.symmetry.is_symmetric() {
            return Err(Error::preflight("method.block_ap learns where zero lies")
                .fix("symmetric = false, or method.lsq"));
        }
        Ok(())
    }

    fn init(config: &BlockApConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, observer, weight, .. } = *start;
        let max_code = spec.bits.max_code();
        let QuantParams { scale, zero_point } = match config.start {
            BlockApStart::Observer => observer.observe(weight, spec.bits, spec.symmetry)?,
            BlockApStart::MinMax => min_max(weight, max_code),
        };
        let [floor, _] = STEP_BOUNDS;
        Ok(Self::on(scale, zero_point, max_code, floor))
    }

    fn resume(_: &BlockApConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        if grid.zero_kind != ZeroKind::Integer {
            return Ok(None);
        }
        let number = |tensor: Tensor<1>| tensor.into_scalar::<f32>();
        let (scale, zero_point) = (grid.scale.clone(), grid.zero_point.clone());
        // Steps that other methods made smaller stay, and zeros that they put outside the codes.
        let [floor, _] = STEP_BOUNDS;
        let floor = floor.min(number(scale.clone().min()));
        let [low, high] = [number(zero_point.clone().min()), number(zero_point.clone().max())];
        let resumed = Self::on(scale, zero_point, start.spec.bits.max_code(), floor);
        let zeros = [low.min(resumed.zeros[0]), high.max(resumed.zeros[1])];
        Ok(Some(Self { zeros, ..resumed }))
    }

    fn units(&self) -> Option<Units<'_>> {
        let [_, ceiling] = STEP_BOUNDS;
        let spacing = ops::off_tape(self.step.val()).clamp(self.floor, ceiling);
        Some(Units { step: &self.step, shift: None, spacing })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let QuantParams { scale, zero_point } = self.grid();
        let rule = Rule::Affine { max_code: f32::from(self.max_code) };
        Quantizer::Stepped(Stepped::new(weight, scale, zero_point, rule), ZeroKind::Integer)
    }
}

impl BlockAp {
    fn on(scale: Tensor<2>, zero_point: Tensor<2>, max_code: u8, floor: f32) -> Self {
        let (step, zero) = (Param::from_tensor(scale), Param::from_tensor(zero_point));
        Self { step, zero, max_code, floor, zeros: [0.0, f32::from(max_code)] }
    }

    fn grid(&self) -> QuantParams {
        let [_, ceiling] = STEP_BOUNDS;
        let zero = ops::round_ste(self.zero.val());
        QuantParams {
            scale: ops::clamp_ste(self.step.val(), self.floor, ceiling),
            zero_point: ops::clamp_ste(zero, self.zeros[0], self.zeros[1]),
        }
    }
}

fn min_max(weight: &Tensor<2>, max_code: u8) -> QuantParams {
    let [floor, ceiling] = STEP_BOUNDS;
    let low = weight.clone().min_dim(1);
    let range = weight.clone().max_dim(1) - low.clone();
    let scale = (range / f32::from(max_code)).clamp(floor, ceiling);
    let zero_point = (low / scale.clone()).round().neg().clamp(-ZERO_BOUND, ZERO_BOUND);
    QuantParams { scale, zero_point }
}
