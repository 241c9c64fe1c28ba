//! FlexRound (Lee et al., ICML 2023, arXiv 2306.00317): rounding learned by element-wise division.
//!
//! *What it learns:* the step `exp(log_scale)`, a division factor for every weight
//! (`log_division`) and one per group (`log_row`); the weight and the zero point stay frozen.
//! *Formula:* `W_hat = exp(δ) · clamp(round(W / exp(δ + D + d)), -z, L - z)` with δ = `log_scale`,
//! D = `log_division`, d = `log_row` (log form of the released code).
//! *Start:* `D = d = 0`, so the codes are round-to-nearest's; behind a stage of the same grid δ is
//! relative to the steps it left, and W is its latent weight. *Recipe keys:* none of its own.
//! *Export:* uniform grid, integer zero; the division factors only chose the integers.

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, LeftGrid, Quantizer, Start, WeightMethod};
use crate::error::Result;
use crate::ops;
use crate::quant::{QuantParams, QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// `method.flexround`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FlexRoundConfig {}

/// FlexRound's learned state for one weight.
#[derive(Debug, Module)]
pub struct FlexRound {
    /// `ln Δ`, `[groups, 1]`.
    pub log_scale: Param<Tensor<2>>,
    /// Element-wise log division, `[groups, group_len]`.
    pub log_division: Param<Tensor<2>>,
    /// Group-wise log division, `[groups, 1]`.
    pub log_row: Param<Tensor<2>>,
    /// What `log_scale` is relative to; 1 where absent.
    base: Option<Tensor<2>>,
    zero_point: Tensor<2>,
    max_code: u8,
}

impl WeightMethod for FlexRound {
    type Config = FlexRoundConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] = &[
        ("log_scale", Role::Scale),
        ("log_division", Role::Rounding),
        ("log_row", Role::Rounding),
    ];

    fn accepts(_: &FlexRoundConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn init(_: &FlexRoundConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, observer, weight, .. } = *start;
        let QuantParams { scale, zero_point } =
            observer.observe(weight, spec.bits, spec.symmetry)?;
        Ok(Self {
            log_row: Param::from_tensor(scale.zeros_like()),
            log_scale: Param::from_tensor(scale.log()),
            log_division: Param::from_tensor(weight.zeros_like()),
            base: None,
            zero_point,
            max_code: spec.bits.max_code(),
        })
    }

    fn resume(_: &FlexRoundConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        if grid.zero_kind != ZeroKind::Integer {
            return Ok(None);
        }
        Ok(Some(Self {
            log_row: Param::from_tensor(grid.scale.zeros_like()),
            log_scale: Param::from_tensor(grid.scale.zeros_like()),
            log_division: Param::from_tensor(start.weight.zeros_like()),
            base: Some(grid.scale.clone()),
            zero_point: grid.zero_point.clone(),
            max_code: start.spec.bits.max_code(),
        }))
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        Quantizer::Divided(ops::Divided {
            weight,
            base: self.base.clone(),
            log_scale: self.log_scale.val(),
            log_division: self.log_division.val(),
            log_row: self.log_row.val(),
            log_column: None,
            zero_point: self.zero_point.clone(),
            max_code: self.max_code,
        })
    }
}
