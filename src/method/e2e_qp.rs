//! E2E-QP, the second phase of EfficientQAT (Chen et al., ACL 2025, arXiv 2407.11062): only the
//! steps of a quantized model learn.
//!
//! *What it learns:* one step per group; codes and zero points stay as an earlier stage left them.
//! *Formula:* `W_hat = Δ (code - z)`, whose derivative by Δ is `code - z` (methods-core 8.2). *Start:*
//! exactly the quantized weight. *Recipe keys:* none of its own; `bits` and `group_size` have to be
//! those of the earlier stage. *Export:* uniform grid with the zero points it came with.

use burn::module::{Module, Param};
use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{Quantizer, Start, WeightMethod};
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::{
    Grid, GroupAxis, GroupLayout, QuantParams, QuantSpec, QuantizedWeight, Repr, SCALE_FLOOR,
    ZeroKind,
};
use crate::train::Role;

/// `method.e2e_qp`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct E2eQpConfig {}

/// The learned steps on frozen codes.
#[derive(Debug, Module)]
pub struct E2eQp {
    /// Δ, `[groups, 1]`.
    pub step: Param<Tensor<2>>,
    codes: Tensor<2>,
    zero_point: Tensor<2>,
    #[module(skip)]
    zero_kind: ZeroKind,
}

impl WeightMethod for E2eQp {
    type Config = E2eQpConfig;

    const TAKES: Repr = Repr::Uniform;
    const LEAVES: Repr = Repr::Uniform;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] = &[("step", Role::Scale)];

    fn accepts(_: &E2eQpConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn init(_: &E2eQpConfig, start: &Start<'_>) -> Result<Self> {
        let quantized = start.quantized.ok_or_else(no_codes)?;
        let Grid::Uniform { scale, zero_point, zero_kind } = &quantized.grid else {
            return Err(no_codes());
        };
        same_shape(quantized, start)?;
        let device = start.weight.device();
        let matrix = |values: Vec<f32>, shape: [usize; 2]| {
            Tensor::<2>::from_data(TensorData::new(values, shape), &device)
        };
        let GroupLayout { groups, .. } = start.layout;
        let codes = quantized.codes.iter().map(|code| f32::from(*code)).collect();
        Ok(Self {
            step: Param::from_tensor(matrix(scale.clone(), [groups, 1])),
            codes: matrix(codes, start.layout.grouped()),
            zero_point: matrix(zero_point.clone(), [groups, 1]),
            zero_kind: *zero_kind,
        })
    }

    fn quantizer(&self, _: Tensor<2>) -> Quantizer {
        let (codes, zero_kind) = (self.codes.clone(), self.zero_kind);
        Quantizer::Frozen { codes, grid: self.grid(), zero_kind }
    }
}

impl E2eQp {
    fn grid(&self) -> QuantParams {
        // A step that a large update drove below zero has to find its way back: gradient 1.
        let scale = ops::clamp_ste(self.step.val(), SCALE_FLOOR, f32::MAX);
        QuantParams { scale, zero_point: self.zero_point.clone() }
    }
}

fn no_codes() -> Error {
    Error::preflight("method.e2e_qp trains the steps of uniform codes, and there are none")
        .fix("a stage before this one that leaves a uniform grid, such as method.block_ap")
}

/// Refuses codes that this stage's `bits` or `group_size` would regroup.
fn same_shape(quantized: &QuantizedWeight, start: &Start<'_>) -> Result<()> {
    let describe = |bits, layout: GroupLayout| {
        let along = match layout.axis {
            GroupAxis::In => "inputs",
            GroupAxis::Out => "outputs",
        };
        format!("{bits} bits in {} groups of {} {along}", layout.groups, layout.group_len)
    };
    let found = describe(quantized.bits, quantized.layout);
    let wanted = describe(start.spec.bits, start.layout);
    if (quantized.bits, quantized.layout) == (start.spec.bits, start.layout) {
        return Ok(());
    }
    Err(Error::preflight(format!("the codes have {found}, but this stage asks for {wanted}"))
        .fix("in this stage the bits and group_size of the stage that made the codes"))
}
