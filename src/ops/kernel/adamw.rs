//! AdamW in place.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::parallel;
use crate::ops::vector::{self, Level, at};

/// Entries that one thread takes at a time; sums over them are added in order.
const CHUNK: usize = 1 << 14;

/// One step's numbers (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamW {
    /// By what gradients are multiplied first (clipping).
    pub shrink: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Learning rate over the first moment's bias correction.
    pub rate: f32,
    /// One over the second moment's bias correction.
    pub correction2: f32,
    /// What weight decay leaves of the parameter.
    pub keep: f32,
}

/// One step; the moments are those of the gradient and of its square.
pub(crate) fn step(
    adamw: AdamW,
    parameter: &mut [f32],
    gradient: &[f32],
    [first, second]: [&mut [f32]; 2],
) {
    if !parallel(parameter.len()) {
        return at!(Level::best(), step_chunk(adamw, parameter, gradient, first, second));
    }
    let both = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    let means = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    both.zip(means).for_each(|((parameter, gradient), (first, second))| {
        at!(Level::best(), step_chunk(adamw, parameter, gradient, first, second));
    });
}

#[inline(always)]
fn step_chunk(adamw: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let AdamW { shrink, beta1, beta2, epsilon, rate, correction2, keep } = adamw;
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * shrink;
        *m = beta1 * *m + (1.0 - beta1) * g;
        *v = beta2 * *v + (1.0 - beta2) * (g * g);
        *p = *p * keep - rate * *m / ((*v * correction2).sqrt() + epsilon);
    }
}

/// The sum of squares.
pub(crate) fn squared_norm(values: &[f32]) -> f64 {
    let level = Level::best();
    let chunk = |part: &[f32]| at!(level, vector::dot(part, part));
    let parts: Vec<f64> = if parallel(values.len()) {
        values.par_chunks(CHUNK).map(chunk).collect()
    } else {
        values.chunks(CHUNK).map(chunk).collect()
    };
    parts.into_iter().sum()
}
