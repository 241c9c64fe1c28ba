//! Codes of a weight divided by learned factors.

use burn::tensor::Tensor;

use super::{Output, exp, off_tape};
use crate::ops::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use crate::ops::bridge::{Rows, fused};
#[cfg(feature = "gpu")]
use crate::ops::cube;
#[cfg(feature = "flex")]
use crate::ops::kernel::fake_quant as kernel;

/// FlexRound's quantizer (Lee et al. 2023, eq. 2, in the log form of the released code) and LRQ's
/// (Lee et al. 2024): `Δ (clamp(round(W / (base exp(θ))) + z, 0, L) - z)` with
/// `Δ = base exp(log_scale)` and `θ = log_division + (log_scale + log_row) (+ log_column)`.
///
/// Gradients: true clamp (1 inside and on the bounds, 0 outside), straight-through round. The
/// paper's bounds `[-z, L - z]` on the integer differ by row; with `z` added they do not.
#[derive(Clone, Debug)]
pub struct Divided {
    /// The weight, `[groups, group_len]`; frozen.
    pub weight: Tensor<2>,
    /// What steps are relative to, `[groups, 1]`; frozen. Absent: 1. A grid that is there already is
    /// met exactly so, which the exponential of a logarithm is not.
    pub base: Option<Tensor<2>>,
    /// `[groups, 1]`.
    pub log_scale: Tensor<2>,
    /// `[groups, group_len]`.
    pub log_division: Tensor<2>,
    /// `[groups, 1]`, or `[out, 1]`: one for all groups of an output row.
    pub log_row: Tensor<2>,
    /// `[1, in]`, where every input has a factor.
    pub log_column: Option<Tensor<2>>,
    /// Integers, `[groups, 1]`; frozen.
    pub zero_point: Tensor<2>,
    /// L.
    pub max_code: u8,
}

impl Divided {
    /// Integers in `0..=max_code`, `[groups, group_len]`, off the tape.
    pub fn codes(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Codes);
        tensor(operation.forward(inputs.map(bridge::off_tape)).0)
    }

    /// The values they stand for, `[groups, group_len]`.
    pub fn values(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Values);
        tensor(bridge::apply(operation, inputs))
    }

    /// Steps, `[groups, 1]`: the same bits as inside.
    pub fn scales(&self) -> Tensor<2> {
        let scale = exp(self.log_scale.clone());
        match &self.base {
            Some(base) => base.clone() * scale,
            None => scale,
        }
    }

    /// The weight as it is divided by all but the step, `[groups, group_len]`, off the tape: what
    /// rounding to the step gives the codes, but for the order of operations.
    pub fn latent(self) -> Tensor<2> {
        let [groups, len] = self.weight.dims();
        let mut theta = self.log_division;
        let [out, _] = self.log_row.dims();
        let sharing = groups / out;
        theta = theta + self.log_row.repeat_dim(1, sharing).reshape([groups, 1]);
        if let Some(column) = self.log_column {
            theta = theta + column.reshape([sharing, len]).repeat_dim(0, out);
        }
        off_tape(self.weight) / off_tape(theta).exp()
    }

    fn prepare(self, output: Output) -> (DividedOperation, [Plain; 4]) {
        let operation = DividedOperation {
            weight: bridge::frozen(self.weight),
            base: self.base.map(bridge::frozen),
            zero_point: bridge::frozen(self.zero_point),
            max_code: f32::from(self.max_code),
            columns: self.log_column.is_some(),
            output,
        };
        // A stand-in keeps the number of inputs fixed.
        let column = self.log_column.unwrap_or_else(|| tensor(operation.zero_point.clone()));
        let inputs = [self.log_scale, self.log_division, self.log_row, column];
        (operation, inputs.map(Tensor::into_dispatch))
    }
}

#[derive(Clone, Debug)]
struct DividedOperation {
    weight: Plain,
    base: Option<Plain>,
    zero_point: Plain,
    max_code: f32,
    columns: bool,
    output: Output,
}

impl Operation<4> for DividedOperation {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 4]) -> (Plain, ()) {
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = DividedRows::new(self, inputs);
            let out = rows.kernel().forward(self.output);
            return (Rows::new(out, rows.weight.shape()).plain(), ());
        }
        #[cfg(feature = "gpu")]
        if cube::reads(&self.weight) {
            return (cube::divided(self.on_device(inputs), self.output), ());
        }
        let parts = self.composed(inputs);
        let out = match self.output {
            Output::Codes => parts.code,
            Output::Values => parts.scale * (parts.code - parts.zero_point),
        };
        (out.into_dispatch(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 4],
        (): (),
        gradient: Plain,
        wanted: [bool; 4],
    ) -> [Option<Plain>; 4] {
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = DividedRows::new(self, inputs);
            let mut gradient = Rows::of(gradient);
            let found = rows.kernel().backward(gradient.values_mut(), wanted[3]);
            return [
                Some(rows.log_scale.like(found.log_scale).plain()),
                Some(gradient.plain()),
                Some(rows.log_row.like(found.log_row).plain()),
                wanted[3].then(|| rows.log_column.like(found.log_column).plain()),
            ];
        }
        #[cfg(feature = "gpu")]
        if cube::reads_rows(&self.weight) {
            return self.device_backward(inputs, gradient, wanted[3]);
        }
        let [out, _] = tensor::<2>(inputs[2].clone()).dims();
        let parts = self.composed(inputs);
        let [groups, len] = parts.code.dims();
        let gradient = tensor::<2>(gradient);
        let outside = parts
            .ratio_code
            .clone()
            .lower_elem(0.0)
            .bool_or(parts.ratio_code.greater_elem(self.max_code));
        let division = (gradient.clone() * parts.scale.clone() * parts.ratio).neg();
        let division = division.mask_fill(outside, 0.0);
        let value = (gradient * (parts.code - parts.zero_point)).sum_dim(1) * parts.scale;
        let through_division = division.clone().sum_dim(1);
        let row = through_division.clone().reshape([out, groups / out]).sum_dim(1);
        let column =
            wanted[3].then(|| division.clone().reshape([out, groups / out * len]).sum_dim(0));
        [
            Some((value + through_division).into_dispatch()),
            Some(division.into_dispatch()),
            Some(row.into_dispatch()),
            column.map(Tensor::into_dispatch),
        ]
    }
}

/// Intermediate results of the composed form.
struct DividedParts {
    ratio: Tensor<2>,
    /// Before the clamp.
    ratio_code: Tensor<2>,
    code: Tensor<2>,
    scale: Tensor<2>,
    zero_point: Tensor<2>,
}

#[cfg(feature = "gpu")]
impl DividedOperation {
    fn on_device(&self, inputs: [Plain; 4]) -> cube::DividedInputs {
        let [log_scale, log_division, log_row, log_column] = inputs;
        cube::DividedInputs {
            weight: self.weight.clone(),
            base: self.base.clone(),
            zero_point: self.zero_point.clone(),
            log_scale,
            log_division,
            log_row,
            log_column: self.columns.then_some(log_column),
            max_code: self.max_code,
        }
    }

    fn device_backward(
        &self,
        inputs: [Plain; 4],
        gradient: Plain,
        columns: bool,
    ) -> [Option<Plain>; 4] {
        let [out, _] = tensor::<2>(inputs[2].clone()).dims();
        let found = cube::divided_backward(self.on_device(inputs), gradient);
        let [division, sums, value] = found.map(tensor::<2>);
        let [groups, len] = division.dims();
        let row = sums.clone().reshape([out, groups / out]).sum_dim(1);
        let column =
            columns.then(|| division.clone().reshape([out, groups / out * len]).sum_dim(0));
        [
            Some((value + sums).into_dispatch()),
            Some(division.into_dispatch()),
            Some(row.into_dispatch()),
            column.map(Tensor::into_dispatch),
        ]
    }
}

impl DividedOperation {
    fn composed(&self, inputs: [Plain; 4]) -> DividedParts {
        let [log_scale, log_division, log_row, log_column] = inputs.map(tensor::<2>);
        let weight = tensor::<2>(self.weight.clone());
        let zero_point = tensor::<2>(self.zero_point.clone());
        let ([groups, len], [out, _]) = (weight.dims(), log_row.dims());
        let sharing = groups / out;
        let log_row = log_row.repeat_dim(1, sharing).reshape([groups, 1]);
        let mut theta = log_scale.clone() + log_row;
        if self.columns {
            theta = theta + log_column.reshape([sharing, len]).repeat_dim(0, out);
        }
        let base = self.base.clone().map(tensor::<2>);
        let based = |x: Tensor<2>| match &base {
            Some(base) => x * base.clone(),
            None => x,
        };
        let ratio = weight / based((log_division + theta).exp());
        let ratio_code = ratio.clone().round() + zero_point.clone();
        let code = ratio_code.clone().clamp(0.0, self.max_code);
        DividedParts { ratio, ratio_code, code, scale: based(log_scale.exp()), zero_point }
    }
}

#[cfg(feature = "flex")]
struct DividedRows {
    weight: Rows,
    base: Option<Rows>,
    zero_point: Rows,
    log_scale: Rows,
    log_division: Rows,
    log_row: Rows,
    log_column: Rows,
    max_code: f32,
    columns: bool,
}

#[cfg(feature = "flex")]
impl DividedRows {
    fn new(operation: &DividedOperation, inputs: [Plain; 4]) -> Self {
        let [log_scale, log_division, log_row, log_column] = inputs.map(Rows::of);
        Self {
            weight: Rows::of(operation.weight.clone()),
            base: operation.base.clone().map(Rows::of),
            zero_point: Rows::of(operation.zero_point.clone()),
            log_scale,
            log_division,
            log_row,
            log_column,
            max_code: operation.max_code,
            columns: operation.columns,
        }
    }

    fn kernel(&self) -> kernel::Divided<'_> {
        kernel::Divided {
            weight: self.weight.values(),
            base: self.base.as_ref().map_or(&[], Rows::values),
            log_division: self.log_division.values(),
            log_scale: self.log_scale.values(),
            log_row: self.log_row.values(),
            log_column: if self.columns { self.log_column.values() } else { &[] },
            zero_point: self.zero_point.values(),
            max_code: self.max_code,
        }
    }
}
