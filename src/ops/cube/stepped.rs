//! Codes of a weight in units of a step, by rule: an element for each unit on the way forward, a group for each
//! plane on the way back.

use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{by_element, by_row, clamped, contiguous, empty, launch, round_even, row_of_plane};
use crate::ops::bridge::{Plain, tensor};
use crate::ops::fake_quant::{Output, Rule, TieRule};

/// Inputs of [`stepped`]: the weight `[groups, group_len]`, and by group step, zero point and, in the weight's
/// shape or absent, offsets of the rounding.
pub(in crate::ops) struct SteppedInputs {
    pub(in crate::ops) weight: Plain,
    pub(in crate::ops) step: Plain,
    pub(in crate::ops) zero_point: Plain,
    pub(in crate::ops) rounding: Option<Plain>,
    pub(in crate::ops) rule: Rule,
}

impl SteppedInputs {
    fn parts(self) -> ([Plain; 4], [usize; 2], Form) {
        let shape = tensor::<2>(self.weight.clone()).dims();
        let offsets = self.rounding.is_some();
        // A stand-in keeps the number of inputs fixed.
        let rounding = self.rounding.unwrap_or_else(|| self.zero_point.clone());
        let form = Form::new(self.rule, offsets);
        ([self.weight, self.step, self.zero_point, rounding], shape, form)
    }
}

/// A rule as kernels are compiled for it.
#[derive(Clone, Copy)]
struct Form {
    rule: u32,
    offsets: bool,
    limit: f32,
}

const AFFINE: u32 = 0;
const LSQ: u32 = 1;
const SEQ: u32 = 2;
const SEQ_UP: u32 = 3;
const TERNARY: u32 = 4;
const SIGN: u32 = 5;

impl Form {
    fn new(rule: Rule, offsets: bool) -> Self {
        let (rule, limit) = match rule {
            Rule::Affine { max_code } => (AFFINE, max_code),
            Rule::Lsq { middle } => (LSQ, middle),
            Rule::Seq { margin, ties: TieRule::HalfEven } => (SEQ, 1.0 - margin),
            Rule::Seq { margin, ties: TieRule::HalfUp } => (SEQ_UP, 1.0 - margin),
            Rule::Ternary { margin } => (TERNARY, 1.0 - margin),
            Rule::Sign => (SIGN, 1.0),
        };
        Self { rule, offsets, limit }
    }
}

/// Codes or values of [`Stepped`](crate::ops::Stepped), `[groups, group_len]`.
pub(in crate::ops) fn stepped(inputs: SteppedInputs, output: Output) -> Plain {
    let (inputs, shape, form) = inputs.parts();
    let codes = output == Output::Codes;
    let [out] = launch("fewbit_stepped", inputs, [shape.into()], move |inputs| {
        let [weight, step, zero, rounding] = contiguous(inputs);
        let out = empty(&weight, shape);
        let (count, dim) = by_element(&weight, shape[0] * shape[1]);
        stepped_kernel::launch(
            &out.client,
            count,
            dim,
            weight.into_buffer_arg(),
            step.into_buffer_arg(),
            zero.into_buffer_arg(),
            rounding.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            shape[1],
            form.limit,
            form.rule,
            form.offsets,
            codes,
        );
        [out]
    });
    out
}

/// Gradients of [`stepped`]'s values: of weight, step (by `step_gradient`), zero point and offsets. That of the
/// weight is `passing`, that of the offsets the same times the step.
pub(in crate::ops) fn stepped_backward(
    inputs: SteppedInputs,
    gradient: Plain,
    step_gradient: f32,
) -> [Plain; 4] {
    let ([weight, step, zero, rounding], shape, form) = inputs.parts();
    let groups = vec![shape[0], 1];
    let inputs = [weight, step, zero, rounding, gradient];
    let outputs = [shape.into(), groups.clone(), groups, shape.into()];
    launch("fewbit_stepped_backward", inputs, outputs, move |inputs| {
        let [weight, step, zero, rounding, gradient] = contiguous(inputs);
        let passing = empty(&weight, shape);
        // Without offsets nobody reads their gradient.
        let of_offsets = empty(&weight, if form.offsets { shape } else { [1, 1] });
        let of_step = empty(&weight, [shape[0], 1]);
        let of_zero = empty(&weight, [shape[0], 1]);
        let (count, dim) = by_row(&weight, shape[0]);
        stepped_backward_kernel::launch(
            &passing.client,
            count,
            dim,
            weight.into_buffer_arg(),
            step.into_buffer_arg(),
            zero.into_buffer_arg(),
            rounding.into_buffer_arg(),
            gradient.into_buffer_arg(),
            passing.clone().into_buffer_arg(),
            of_step.clone().into_buffer_arg(),
            of_zero.clone().into_buffer_arg(),
            of_offsets.clone().into_buffer_arg(),
            shape[0],
            shape[1],
            form.limit,
            step_gradient,
            form.rule,
            form.offsets,
        );
        let of_offsets = if form.offsets { of_offsets } else { passing.clone() };
        [passing, of_step, of_zero, of_offsets]
    })
}

/// The code at `u`.
#[cube]
fn code_at(u: f32, zero: f32, limit: f32, #[comptime] rule: u32) -> f32 {
    if comptime!(rule == AFFINE) {
        clamped(round_even(u) + zero, 0.0f32, limit)
    } else if comptime!(rule == LSQ) {
        round_even(clamped(u, -limit, limit - 1.0f32)) + limit
    } else if comptime!(rule == SEQ) {
        round_even(clamped(u, -limit, limit) * 2.0f32 - 0.5f32) + 2.0f32
    } else if comptime!(rule == SEQ_UP) {
        (clamped(u, -limit, limit) * 2.0f32 - 0.5f32 + 0.5f32).floor() + 2.0f32
    } else if comptime!(rule == TERNARY) {
        round_even(clamped(u, -limit, limit) * 1.5f32) + 1.0f32
    } else {
        select(u >= 0.0f32, 1.0f32, 0.0f32)
    }
}

/// Whether the gradient stops at `u`.
#[cube]
fn is_outside(u: f32, zero: f32, limit: f32, #[comptime] rule: u32) -> bool {
    if comptime!(rule == AFFINE) {
        let code = round_even(u) + zero;
        code < 0.0f32 || code > limit
    } else if comptime!(rule == LSQ) {
        u < -limit || u > limit - 1.0f32
    } else {
        u < -limit || u > limit
    }
}

/// The distance of neighbouring levels.
#[cube]
fn spacing(step: f32, #[comptime] rule: u32) -> f32 {
    if comptime!(rule == SEQ || rule == SEQ_UP) {
        step * 0.5f32
    } else if comptime!(rule == TERNARY) {
        step / 1.5f32
    } else if comptime!(rule == SIGN) {
        step * 2.0f32
    } else {
        step
    }
}

#[cube(launch)]
fn stepped_kernel(
    weight: &[f32],
    step: &[f32],
    zero: &[f32],
    rounding: &[f32],
    out: &mut [f32],
    group_len: usize,
    limit: f32,
    #[comptime] rule: u32,
    #[comptime] offsets: bool,
    #[comptime] codes: bool,
) {
    let at = ABSOLUTE_POS as usize;
    if at >= out.len() {
        terminate!();
    }
    let group = at / group_len;
    let delta = step[group];
    let zero = zero[group];
    let mut u = weight[at] / delta;
    if comptime!(offsets) {
        u += rounding[at];
    }
    let code = code_at(u, zero, limit, rule);
    if comptime!(codes) {
        out[at] = code;
    } else {
        out[at] = spacing(delta, rule) * (code - zero);
    }
}

#[cube(launch)]
fn stepped_backward_kernel(
    weight: &[f32],
    step: &[f32],
    zero: &[f32],
    rounding: &[f32],
    gradient: &[f32],
    passing: &mut [f32],
    of_step: &mut [f32],
    of_zero: &mut [f32],
    of_offsets: &mut [f32],
    groups: usize,
    group_len: usize,
    limit: f32,
    step_gradient: f32,
    #[comptime] rule: u32,
    #[comptime] offsets: bool,
) {
    let group = row_of_plane();
    if group >= groups {
        terminate!();
    }
    let delta = step[group];
    let zero = zero[group];
    let mut through_value = 0.0f32;
    let mut through_code = 0.0f32;
    let mut at_fixed_u = 0.0f32;
    let mut column = UNIT_POS_X as usize;
    while column < group_len {
        let at = group * group_len + column;
        let g = gradient[at];
        let ratio = weight[at] / delta;
        let mut u = ratio;
        if comptime!(offsets) {
            u += rounding[at];
        }
        let outside = is_outside(u, zero, limit, rule);
        let passed = select(outside, 0.0f32, g);
        passing[at] = passed;
        if comptime!(offsets) {
            of_offsets[at] = passed * delta;
        }
        through_value += g * (code_at(u, zero, limit, rule) - zero);
        if comptime!(rule != SIGN) {
            // Outside the ratio may be infinite: no product with a zero.
            through_code += select(outside, 0.0f32, g * ratio);
        }
        if comptime!(rule == AFFINE) {
            at_fixed_u += passed - g;
        } else {
            at_fixed_u -= g;
        }
        column += CUBE_DIM_X as usize;
    }
    let through_value = plane_sum(through_value);
    let through_code = plane_sum(through_code);
    let at_fixed_u = plane_sum(at_fixed_u);
    if UNIT_POS_X == 0 {
        let factor = spacing(1.0f32, rule);
        of_step[group] = (through_value * factor - through_code) * step_gradient;
        of_zero[group] = at_fixed_u * spacing(delta, rule);
    }
}
