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
    /// What a gradient and its square weigh in the moments: one minus the decays, which in f32
    /// would be off by a hundred thousandth.
    pub new: [f32; 2],
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
    moments: [&mut [f32]; 2],
) {
    step_at(Level::best(), adamw, parameter, gradient, moments);
}

/// As [`step`], with the rate multiplied by the entry of `units` that belongs to a parameter's group;
/// groups are equal runs of parameters.
pub(crate) fn step_in_units(
    adamw: AdamW,
    units: &[f32],
    parameter: &mut [f32],
    gradient: &[f32],
    [first, second]: [&mut [f32]; 2],
) {
    let level = Level::best();
    let len = (parameter.len() / units.len().max(1)).max(1);
    let of = |unit: f32| AdamW { rate: adamw.rate * unit, ..adamw };
    if !parallel(parameter.len()) {
        let both = parameter.chunks_mut(len).zip(gradient.chunks(len));
        let means = first.chunks_mut(len).zip(second.chunks_mut(len));
        for ((both, means), unit) in both.zip(means).zip(units) {
            at!(level, step_chunk(of(*unit), both.0, both.1, means.0, means.1));
        }
        return;
    }
    // Whole groups at a time, about as many entries as in a chunk.
    let some = (CHUNK / len).max(1);
    let both = parameter.par_chunks_mut(some * len).zip(gradient.par_chunks(some * len));
    let means = first.par_chunks_mut(some * len).zip(second.par_chunks_mut(some * len));
    both.zip(means).zip(units.par_chunks(some)).for_each(|((both, means), units)| {
        let both = both.0.chunks_mut(len).zip(both.1.chunks(len));
        let means = means.0.chunks_mut(len).zip(means.1.chunks_mut(len));
        for ((both, means), unit) in both.zip(means).zip(units) {
            at!(level, step_chunk(of(*unit), both.0, both.1, means.0, means.1));
        }
    });
}

fn step_at(
    level: Level,
    adamw: AdamW,
    parameter: &mut [f32],
    gradient: &[f32],
    [first, second]: [&mut [f32]; 2],
) {
    if !parallel(parameter.len()) {
        return at!(level, step_chunk(adamw, parameter, gradient, first, second));
    }
    let both = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    let means = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    both.zip(means).for_each(|((parameter, gradient), (first, second))| {
        at!(level, step_chunk(adamw, parameter, gradient, first, second));
    });
}

#[inline(always)]
pub(super) fn step_chunk(adamw: AdamW, p: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32]) {
    let AdamW { shrink, beta1, beta2, new, epsilon, rate, correction2, keep } = adamw;
    for (((p, g), m), v) in p.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * shrink;
        *m = beta1 * *m + new[0] * g;
        *v = beta2 * *v + new[1] * (g * g);
        *p = *p * keep - rate * *m / ((*v * correction2).sqrt() + epsilon);
    }
}

/// The sum of squares.
pub(crate) fn squared_norm(values: &[f32]) -> f64 {
    squared_norm_at(Level::best(), values)
}

fn squared_norm_at(level: Level, values: &[f32]) -> f64 {
    let chunk = |part: &[f32]| at!(level, vector::dot(part, part));
    let parts: Vec<f64> = if parallel(values.len()) {
        values.par_chunks(CHUNK).map(chunk).collect()
    } else {
        values.chunks(CHUNK).map(chunk).collect()
    };
    parts.into_iter().sum()
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    /// The last two are worth a second thread, and more than two chunks.
    const LENGTHS: [usize; 10] = [0, 1, 7, 15, 16, 17, 33, 100, 33_001, 100_003];

    /// Parameter and moments after three steps, and the squared norm of the parameter.
    fn trained(level: Level, len: usize) -> ([Vec<u32>; 3], u64) {
        let mut parameter = noise(len, 0.2, 0.5);
        let [mut first, mut second] = [vec![0.0; len], vec![0.0; len]];
        for i in 1..=3u8 {
            // Some gradients are zero, some far too small for their square, some large.
            let size = [0.1, 1e-25, 50.0][usize::from(i) - 1];
            let mut gradient = noise(len, f32::from(i), size);
            gradient.iter_mut().step_by(5).for_each(|g| *g = 0.0);
            let adamw = AdamW {
                shrink: 0.7,
                beta1: 0.9,
                beta2: 0.95,
                new: [0.1, 0.05],
                epsilon: 1e-8,
                rate: 0.01 / (1.0 - 0.9f32.powi(i.into())),
                correction2: 1.0 / (1.0 - 0.95f32.powi(i.into())),
                keep: 0.999,
            };
            step_at(level, adamw, &mut parameter, &gradient, [&mut first, &mut second]);
        }
        let norm = squared_norm_at(level, &parameter).to_bits();
        ([parameter, first, second].map(|values| bits(&values)), norm)
    }

    /// Groups that are shorter and longer than a chunk, in one and in several threads.
    #[test]
    fn a_rate_in_units_is_the_rate_times_the_unit() {
        let adamw = AdamW {
            shrink: 1.0,
            beta1: 0.9,
            beta2: 0.99,
            new: [0.1, 0.01],
            epsilon: 1e-8,
            rate: 0.25,
            correction2: 100.0,
            keep: 1.0,
        };
        for (groups, len) in [(1, 5), (3, 7), (40, 1_000), (2, 40_000), (3_000, 17)] {
            let units: Vec<f32> = (0..groups).map(|g| [0.5, 2.0, 0.125][g % 3]).collect();
            let start = noise(groups * len, 0.3, 1.0);
            let gradient = noise(groups * len, 5.0, 0.1);
            let fresh = || [vec![0.0; groups * len], vec![0.0; groups * len]];
            let (mut together, [mut m, mut v]) = (start.clone(), fresh());
            step_in_units(adamw, &units, &mut together, &gradient, [&mut m, &mut v]);
            let (mut apart, [mut m, mut v]) = (start, fresh());
            for (group, unit) in units.iter().enumerate() {
                let at = group * len..(group + 1) * len;
                let adamw = AdamW { rate: adamw.rate * unit, ..adamw };
                let moments = [&mut m[at.clone()], &mut v[at.clone()]];
                step(adamw, &mut apart[at.clone()], &gradient[at], moments);
            }
            assert!(bits(&together) == bits(&apart), "{groups} groups of {len}");
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for len in LENGTHS {
            assert_same(&format!("{len} entries"), |level| trained(level, len));
        }
    }
}
