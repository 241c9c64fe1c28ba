//! Losses over logits: a plane for each token, which reads the row three times and writes the gradient.

use burn::tensor::{Int, Tensor};
use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{by_row, clamped, contiguous, empty, launch, row_of_plane};
use crate::ops::bridge::Plain;
use crate::ops::loss::{Divergence, NEAR_WEIGHT};

/// A divergence as kernels are compiled for it.
#[derive(Clone, Copy)]
struct Form {
    kind: u32,
    /// The number that the divergence has, if any: β, γ, or where [`ADAPTIVE`] begins.
    first: f32,
    /// Where [`ADAPTIVE`] ends.
    second: f32,
    temperature: f32,
}

const KL_FORWARD: u32 = 0;
const KL_REVERSE: u32 = 1;
const JSD: u32 = 2;
const CAKLD: u32 = 3;
const ADAPTIVE: u32 = 4;

impl Form {
    fn new(divergence: Divergence, temperature: f64) -> Self {
        let (kind, first, second) = match divergence {
            Divergence::KlForward => (KL_FORWARD, 0.0, 0.0),
            Divergence::KlReverse => (KL_REVERSE, 0.0, 0.0),
            Divergence::Jsd { beta } => (JSD, beta, 0.0),
            Divergence::Cakld { gamma } => (CAKLD, gamma, 0.0),
            Divergence::Adaptive { near, far } => (ADAPTIVE, near, far),
        };
        let [first, second, temperature] = [first, second, temperature].map(|x| x as f32);
        Self { kind, first, second, temperature }
    }
}

/// Value of each token times its weight, `[tokens, 1]`, and the gradient to the student's logits.
pub(in crate::ops) fn divergence(
    divergence: Divergence,
    temperature: f64,
    [student, teacher, weights]: [Tensor<2>; 3],
) -> [Plain; 2] {
    let (shape, form) = (student.dims(), Form::new(divergence, temperature));
    let inputs = [student, teacher, weights].map(Tensor::into_dispatch);
    let outputs = [vec![shape[0], 1], shape.into()];
    launch("fewbit_divergence", inputs, outputs, move |inputs| {
        let [student, teacher, weights] = contiguous(inputs);
        let (values, gradient) = (empty(&student, [shape[0], 1]), empty(&student, shape));
        let (count, dim) = by_row(&student, shape[0]);
        divergence_kernel::launch(
            &values.client,
            count,
            dim,
            student.into_buffer_arg(),
            teacher.into_buffer_arg(),
            weights.into_buffer_arg(),
            values.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            shape[0],
            shape[1],
            form.temperature,
            form.first,
            form.second,
            form.kind,
        );
        [values, gradient]
    })
}

/// As [`divergence`], of the next token's cross-entropy; targets are i32.
pub(in crate::ops) fn cross_entropy(
    logits: Tensor<2>,
    targets: Tensor<2, Int>,
    weights: Tensor<2>,
) -> [Plain; 2] {
    let shape = logits.dims();
    let inputs = [logits.into_dispatch(), targets.into_dispatch(), weights.into_dispatch()];
    let outputs = [vec![shape[0], 1], shape.into()];
    launch("fewbit_cross_entropy", inputs, outputs, move |inputs| {
        let [logits, targets, weights] = contiguous(inputs);
        let (values, gradient) = (empty(&logits, [shape[0], 1]), empty(&logits, shape));
        let (count, dim) = by_row(&logits, shape[0]);
        cross_entropy_kernel::launch(
            &values.client,
            count,
            dim,
            logits.into_buffer_arg(),
            targets.into_buffer_arg(),
            weights.into_buffer_arg(),
            values.clone().into_buffer_arg(),
            gradient.clone().into_buffer_arg(),
            shape[0],
            shape[1],
        );
        [values, gradient]
    })
}

/// The largest number of a row over a temperature.
#[cube]
fn row_max(row: &[f32], start: usize, len: usize, temperature: f32) -> f32 {
    let mut largest = row[start] / temperature;
    let mut column = UNIT_POS_X as usize;
    while column < len {
        let x = row[start + column] / temperature;
        largest = select(x > largest, x, largest);
        column += CUBE_DIM_X as usize;
    }
    plane_max(largest)
}

/// The sum of a row's exponentials, each relative to the largest number.
#[cube]
fn row_sum(row: &[f32], start: usize, len: usize, temperature: f32, largest: f32) -> f32 {
    let mut sum = 0.0f32;
    let mut column = UNIT_POS_X as usize;
    while column < len {
        sum += (row[start + column] / temperature - largest).exp();
        column += CUBE_DIM_X as usize;
    }
    plane_sum(sum)
}

/// `ln(β p + (1 - β) q)`.
#[cube]
fn log_mixture(log_q: f32, log_p: f32, beta: f32) -> f32 {
    let a = log_p + beta.ln();
    let b = log_q + (1.0f32 - beta).ln();
    let gap = -(a - b).abs();
    select(a > b, a, b) + gap.exp().log1p()
}

#[cube(launch)]
fn divergence_kernel(
    student: &[f32],
    teacher: &[f32],
    weights: &[f32],
    values: &mut [f32],
    gradient: &mut [f32],
    tokens: usize,
    vocab: usize,
    temperature: f32,
    first: f32,
    second: f32,
    #[comptime] kind: u32,
) {
    let token = row_of_plane();
    if token >= tokens {
        terminate!();
    }
    let start = token * vocab;
    let max_q = row_max(student, start, vocab, temperature);
    let max_p = row_max(teacher, start, vocab, temperature);
    let log_sum_q = row_sum(student, start, vocab, temperature, max_q).ln();
    let log_sum_p = row_sum(teacher, start, vocab, temperature, max_p).ln();
    // β, where there is a mixture.
    let mut beta = 0.5f32;
    if comptime!(kind == JSD) {
        beta = first;
    }
    let mut forward = 0.0f32;
    let mut reverse = 0.0f32;
    let mut from_q = 0.0f32;
    let mut from_p = 0.0f32;
    let mut column = UNIT_POS_X as usize;
    while column < vocab {
        let log_q = student[start + column] / temperature - max_q - log_sum_q;
        let log_p = teacher[start + column] / temperature - max_p - log_sum_p;
        let q = log_q.exp();
        let p = log_p.exp();
        if comptime!(kind == KL_FORWARD || kind == CAKLD || kind == ADAPTIVE) {
            forward += p * (log_p - log_q);
        }
        if comptime!(kind == KL_REVERSE || kind == CAKLD) {
            reverse += q * (log_q - log_p);
        }
        if comptime!(kind == JSD || kind == ADAPTIVE) {
            let log_m = log_mixture(log_q, log_p, beta);
            from_q += q * (log_q - log_m);
            from_p += p * (log_p - log_m);
        }
        column += CUBE_DIM_X as usize;
    }
    let forward = plane_sum(forward);
    let reverse = plane_sum(reverse);
    let from_q = plane_sum(from_q);
    let from_p = plane_sum(from_p);
    let jsd = beta * from_p + (1.0f32 - beta) * from_q;
    // What each of the three weighs in the value.
    let mut of_forward = 0.0f32;
    let mut of_reverse = 0.0f32;
    let mut of_jsd = 0.0f32;
    if comptime!(kind == KL_FORWARD) {
        of_forward = 1.0f32;
    } else if comptime!(kind == KL_REVERSE) {
        of_reverse = 1.0f32;
    } else if comptime!(kind == JSD) {
        of_jsd = 1.0f32;
    } else if comptime!(kind == CAKLD) {
        of_forward = 1.0f32 - first;
        of_reverse = first;
    } else {
        let share = (jsd / comptime!(std::f32::consts::LN_2) - first) / (second - first);
        let share = clamped(share, 0.0f32, 1.0f32);
        of_forward = share;
        of_jsd = (1.0f32 - share) * comptime!(NEAR_WEIGHT as f32);
    }
    let weight = weights[token];
    if UNIT_POS_X == 0 {
        values[token] = (of_forward * forward + of_reverse * reverse + of_jsd * jsd) * weight;
    }
    let scale = weight / temperature;
    let mut column = UNIT_POS_X as usize;
    while column < vocab {
        let log_q = student[start + column] / temperature - max_q - log_sum_q;
        let log_p = teacher[start + column] / temperature - max_p - log_sum_p;
        let q = log_q.exp();
        let mut slope = 0.0f32;
        if comptime!(kind == KL_FORWARD || kind == CAKLD || kind == ADAPTIVE) {
            slope += of_forward * (q - log_p.exp());
        }
        if comptime!(kind == KL_REVERSE || kind == CAKLD) {
            slope += of_reverse * q * (log_q - log_p - reverse);
        }
        if comptime!(kind == JSD || kind == ADAPTIVE) {
            let log_m = log_mixture(log_q, log_p, beta);
            slope += of_jsd * (1.0f32 - beta) * q * (log_q - log_m - from_q);
        }
        gradient[start + column] = slope * scale;
        column += CUBE_DIM_X as usize;
    }
}

#[cube(launch)]
fn cross_entropy_kernel(
    logits: &[f32],
    targets: &[i32],
    weights: &[f32],
    values: &mut [f32],
    gradient: &mut [f32],
    tokens: usize,
    vocab: usize,
) {
    let token = row_of_plane();
    if token >= tokens {
        terminate!();
    }
    let start = token * vocab;
    let largest = row_max(logits, start, vocab, 1.0f32);
    let log_sum = row_sum(logits, start, vocab, 1.0f32, largest).ln();
    let weight = weights[token];
    let target = targets[token] as usize;
    if UNIT_POS_X == 0 {
        values[token] = -(logits[start + target] - largest - log_sum) * weight;
    }
    let mut column = UNIT_POS_X as usize;
    while column < vocab {
        let q = (logits[start + column] - largest - log_sum).exp();
        let hit = select(column == target, 1.0f32, 0.0f32);
        gradient[start + column] = (q - hit) * weight;
        column += CUBE_DIM_X as usize;
    }
}
