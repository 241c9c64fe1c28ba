//! Round-to-nearest: the baseline, and the reference of the tests.
//!
//! *What it learns:* nothing. *Formula:* `W_hat = Δ (clamp(round(W/Δ) + z, 0, L) - z)`. *Start:*
//! the observer's grid, which is also where it ends. *Recipe keys:* none of its own;
//! `quant.observer` chooses Δ and z. *Export:* uniform grid, integer zero.

use burn::module::Module;
use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Quantizer, Start, WeightMethod};
use crate::error::Result;
use crate::ops::{Rule, Stepped};
use crate::quant::{QuantParams, QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// `method.rtn`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RtnConfig {}

/// Round-to-nearest on a frozen grid.
#[derive(Debug, Module)]
pub struct Rtn {
    scale: Tensor<2>,
    zero_point: Tensor<2>,
    max_code: u8,
}

impl WeightMethod for Rtn {
    type Config = RtnConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] = &[];

    fn accepts(_: &RtnConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn init(_: &RtnConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, observer, weight, .. } = *start;
        let QuantParams { scale, zero_point } =
            observer.observe(weight, spec.bits, spec.symmetry)?;
        Ok(Self { scale, zero_point, max_code: spec.bits.max_code() })
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let rule = Rule::Affine { max_code: f32::from(self.max_code) };
        let (step, zero_point) = (self.scale.clone(), self.zero_point.clone());
        Quantizer::Stepped(Stepped::new(weight, step, zero_point, rule), ZeroKind::Integer)
    }
}
