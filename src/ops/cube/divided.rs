//! Codes of a weight divided by learned factors: an element for each unit on the way forward, a group for each
//! plane on the way back.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{by_element, by_row, clamped, contiguous, empty, launch, round_even, row_of_plane};
use crate::ops::bridge::{Plain, tensor};
use crate::ops::fake_quant::Output;

/// Inputs of [`divided`], as the fields of [`Divided`](crate::ops::Divided) that they are.
pub(in crate::ops) struct DividedInputs {
    pub(in crate::ops) weight: Plain,
    pub(in crate::ops) base: Option<Plain>,
    pub(in crate::ops) zero_point: Plain,
    pub(in crate::ops) log_scale: Plain,
    pub(in crate::ops) log_division: Plain,
    pub(in crate::ops) log_row: Plain,
    pub(in crate::ops) log_column: Option<Plain>,
    pub(in crate::ops) max_code: f32,
}

/// What a kernel has to know besides.
#[derive(Clone, Copy)]
struct DividedForm {
    shape: [usize; 2],
    /// Groups that share an entry of the rows.
    sharing: usize,
    base: bool,
    columns: bool,
    max_code: f32,
}

impl DividedInputs {
    fn parts(self) -> ([Plain; 7], DividedForm) {
        let shape = tensor::<2>(self.weight.clone()).dims();
        let [out, _] = tensor::<2>(self.log_row.clone()).dims();
        let form = DividedForm {
            shape,
            sharing: shape[0] / out,
            base: self.base.is_some(),
            columns: self.log_column.is_some(),
            max_code: self.max_code,
        };
        let stand_in = || self.zero_point.clone();
        let base = self.base.unwrap_or_else(stand_in);
        let column = self.log_column.unwrap_or_else(stand_in);
        let rest = [self.zero_point.clone(), self.log_scale, self.log_division, self.log_row];
        let [zero, scale, division, row] = rest;
        ([self.weight, base, zero, scale, division, row, column], form)
    }
}

/// Codes or values of [`Divided`](crate::ops::Divided), `[groups, group_len]`.
pub(in crate::ops) fn divided(inputs: DividedInputs, output: Output) -> Plain {
    let (inputs, form) = inputs.parts();
    let codes = output == Output::Codes;
    let [out] = launch("fewbit_divided", inputs, [form.shape.into()], move |inputs| {
        let [weight, base, zero, scale, division, row, column] = contiguous(inputs);
        let out = empty(&weight, form.shape);
        let (count, dim) = by_element(&weight, form.shape[0] * form.shape[1]);
        divided_kernel::launch(
            &out.client,
            count,
            dim,
            weight.into_buffer_arg(),
            base.into_buffer_arg(),
            zero.into_buffer_arg(),
            scale.into_buffer_arg(),
            division.into_buffer_arg(),
            row.into_buffer_arg(),
            column.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            form.shape[1],
            form.sharing,
            form.max_code,
            form.base,
            form.columns,
            codes,
        );
        [out]
    });
    out
}

/// Gradients of [`divided`]'s values: of the division, and by group the sums of its gradient and of the
/// step's through the value.
pub(in crate::ops) fn divided_backward(inputs: DividedInputs, gradient: Plain) -> [Plain; 3] {
    let ([weight, base, zero, scale, division, row, column], form) = inputs.parts();
    let groups = vec![form.shape[0], 1];
    let inputs = [weight, base, zero, scale, division, row, column, gradient];
    let outputs = [form.shape.into(), groups.clone(), groups];
    launch("fewbit_divided_backward", inputs, outputs, move |inputs| {
        let [weight, base, zero, scale, division, row, column, gradient] = contiguous(inputs);
        let [of_division, sums, of_value] =
            [form.shape, [form.shape[0], 1], [form.shape[0], 1]].map(|shape| empty(&weight, shape));
        let (count, dim) = by_row(&weight, form.shape[0]);
        divided_backward_kernel::launch(
            &of_division.client,
            count,
            dim,
            weight.into_buffer_arg(),
            base.into_buffer_arg(),
            zero.into_buffer_arg(),
            scale.into_buffer_arg(),
            division.into_buffer_arg(),
            row.into_buffer_arg(),
            column.into_buffer_arg(),
            gradient.into_buffer_arg(),
            of_division.clone().into_buffer_arg(),
            sums.clone().into_buffer_arg(),
            of_value.clone().into_buffer_arg(),
            form.shape[0],
            form.shape[1],
            form.sharing,
            form.max_code,
            form.base,
            form.columns,
        );
        [of_division, sums, of_value]
    })
}

#[cube(launch)]
fn divided_kernel(
    weight: &[f32],
    base: &[f32],
    zero: &[f32],
    log_scale: &[f32],
    log_division: &[f32],
    log_row: &[f32],
    log_column: &[f32],
    out: &mut [f32],
    group_len: usize,
    sharing: usize,
    max_code: f32,
    #[comptime] based: bool,
    #[comptime] columns: bool,
    #[comptime] codes: bool,
) {
    let at = ABSOLUTE_POS as usize;
    if at >= out.len() {
        terminate!();
    }
    let group = at / group_len;
    let mut theta = log_scale[group] + log_row[group / sharing];
    if comptime!(columns) {
        theta += log_column[at % (group_len * sharing)];
    }
    let mut divisor = (log_division[at] + theta).exp();
    let mut scale = log_scale[group].exp();
    if comptime!(based) {
        divisor *= base[group];
        scale *= base[group];
    }
    let zero = zero[group];
    let code = clamped(round_even(weight[at] / divisor) + zero, 0.0f32, max_code);
    if comptime!(codes) {
        out[at] = code;
    } else {
        out[at] = scale * (code - zero);
    }
}

#[cube(launch)]
fn divided_backward_kernel(
    weight: &[f32],
    base: &[f32],
    zero: &[f32],
    log_scale: &[f32],
    log_division: &[f32],
    log_row: &[f32],
    log_column: &[f32],
    gradient: &[f32],
    of_division: &mut [f32],
    sums: &mut [f32],
    of_value: &mut [f32],
    groups: usize,
    group_len: usize,
    sharing: usize,
    max_code: f32,
    #[comptime] based: bool,
    #[comptime] columns: bool,
) {
    let group = row_of_plane();
    if group >= groups {
        terminate!();
    }
    let theta = log_scale[group] + log_row[group / sharing];
    let zero = zero[group];
    let mut scale = log_scale[group].exp();
    if comptime!(based) {
        scale *= base[group];
    }
    let mut value = 0.0f32;
    let mut through = 0.0f32;
    let mut column = UNIT_POS_X as usize;
    while column < group_len {
        let at = group * group_len + column;
        let g = gradient[at];
        let mut theta_here = theta;
        if comptime!(columns) {
            theta_here += log_column[at % (group_len * sharing)];
        }
        let mut divisor = (log_division[at] + theta_here).exp();
        if comptime!(based) {
            divisor *= base[group];
        }
        let ratio = weight[at] / divisor;
        let code = round_even(ratio) + zero;
        let outside = code < 0.0f32 || code > max_code;
        value += g * (clamped(code, 0.0f32, max_code) - zero);
        // Outside the ratio may be infinite: no product with a zero.
        let division = select(outside, 0.0f32, -(g * scale) * ratio);
        of_division[at] = division;
        through += division;
        column += CUBE_DIM_X as usize;
    }
    let value = plane_sum(value);
    let through = plane_sum(through);
    if UNIT_POS_X == 0 {
        sums[group] = through;
        of_value[group] = value * scale;
    }
}
