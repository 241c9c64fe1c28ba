//! What is solved for, and what has been found of it so far.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use crate::ops::Additive;
use crate::quant::{GroupLayout, Hessian};

/// Weights that a task computes at least.
const TASK: usize = 1 << 14;

/// A weight whose output error is to be small.
pub(super) struct Problem<'a> {
    /// `[out, inputs]`.
    pub(super) weight: &'a [f32],
    pub(super) out: usize,
    pub(super) inputs: usize,
    /// Inputs that share a scale.
    pub(super) group: usize,
    pub(super) additive: Additive,
    /// Centroids of a codebook.
    pub(super) centroids: usize,
    /// Damped second moments of the inputs, with a mean of 1 on the diagonal, `[inputs, inputs]`.
    pub(super) hessian: Vec<f32>,
}

/// Codes, codebooks and scales.
#[derive(Clone, Debug)]
pub(super) struct State {
    /// `[out, inputs / vector, books]`.
    pub(super) codes: Vec<u8>,
    /// `[books, centroids, vector]`.
    pub(super) books: Vec<f32>,
    /// `[out, inputs / group]`.
    pub(super) scale: Vec<f32>,
}

impl<'a> Problem<'a> {
    pub(super) fn new(
        weight: &'a [f32],
        layout: &GroupLayout,
        (additive, centroids): (Additive, usize),
        inputs: &Hessian,
        damping: f64,
    ) -> Self {
        let size = layout.inputs;
        let diagonal = inputs.diagonal();
        let mean = diagonal.iter().sum::<f64>() / size.max(1) as f64;
        let matrix = inputs.matrix();
        let entry = |at: usize| {
            let (row, column) = (at / size, at % size);
            // No token was seen, or none had anything to say: every weight counts alike.
            let measured = if mean > 0.0 { matrix[(row, column)] / mean } else { 0.0 };
            let damped = if mean > 0.0 { damping } else { 1.0 };
            (measured + if row == column { damped } else { 0.0 }) as f32
        };
        let hessian = (0..size * size).map(entry).collect();
        let (out, group) = (layout.out, layout.group_len.min(size));
        Self { weight, out, inputs: size, group, additive, centroids, hessian }
    }

    /// Groups of a row.
    pub(super) fn groups(&self) -> usize {
        self.inputs / self.group
    }

    /// Codes of a row.
    pub(super) fn codes(&self) -> usize {
        self.additive.codes(self.inputs)
    }

    /// The weights without their scales, `[out, inputs]`.
    pub(super) fn sums(&self, codes: &[u8], books: &[f32]) -> Vec<f32> {
        let mut sums = vec![0.0; self.out * self.inputs];
        let rows = sums.par_chunks_exact_mut(self.inputs).zip(codes.par_chunks_exact(self.codes()));
        rows.with_min_len(TASK.div_ceil(self.inputs))
            .for_each(|(sums, codes)| self.additive.sums(codes, books, sums));
        sums
    }

    /// The weights, `[out, inputs]`.
    pub(super) fn values(&self, codes: &[u8], books: &[f32], scale: &[f32]) -> Vec<f32> {
        let mut values = self.sums(codes, books);
        let groups = values.par_chunks_exact_mut(self.group).zip(scale);
        groups.with_min_len(TASK.div_ceil(self.group)).for_each(|(values, scale)| {
            for value in values {
                *value *= scale;
            }
        });
        values
    }

    /// Rows times the Hessian's rows from `start` on, as many as a row has numbers: `[out, inputs]`.
    pub(super) fn times_hessian(&self, rows: &[f32], start: usize, len: usize) -> Vec<f32> {
        let size = self.inputs;
        let mut product = vec![0.0; self.out * size];
        let hessian = MatRef::from_row_major_slice(&self.hessian, size, size);
        let rows = MatRef::from_row_major_slice(rows, self.out, size);
        matmul(
            MatMut::from_row_major_slice_mut(&mut product, self.out, size),
            Accum::Replace,
            rows.subcols(start, len),
            hessian.subrows(start, len),
            1.0,
            Par::rayon(0),
        );
        product
    }

    /// What is left of the weight, and that times the Hessian: both `[out, inputs]`.
    pub(super) fn left(&self, state: &State) -> (Vec<f32>, Vec<f32>) {
        let mut left = self.values(&state.codes, &state.books, &state.scale);
        left.par_iter_mut()
            .with_min_len(TASK)
            .zip(self.weight)
            .for_each(|(value, weight)| *value = weight - *value);
        let gradient = self.times_hessian(&left, 0, self.inputs);
        (left, gradient)
    }

    /// Squared output error of each row, `[out]`.
    pub(super) fn losses(&self, left: &[f32], gradient: &[f32]) -> Vec<f64> {
        let rows = left.chunks_exact(self.inputs).zip(gradient.chunks_exact(self.inputs));
        rows.map(|(left, gradient)| dot(left, gradient)).collect()
    }
}

/// `Σ a b`.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
}
