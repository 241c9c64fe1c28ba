//! Squared error and its gradient.

use rayon::prelude::*;

use super::min_tasks;
use crate::ops::vector::{self, Level, at};

/// Elements of one task. It fixes the order of the sum.
const CHUNK: usize = 1 << 13;

/// The sum of squared differences of two slices of one length.
pub(crate) fn squared_error(a: &[f32], b: &[f32]) -> f64 {
    sum(Level::best(), a, b)
}

/// `out = factor * (a - b)`.
pub(crate) fn squared_error_gradient(a: &[f32], b: &[f32], factor: f32, out: &mut [f32]) {
    gradient(Level::best(), a, b, factor, out);
}

fn sum(level: Level, a: &[f32], b: &[f32]) -> f64 {
    debug_assert_eq!(a.len(), b.len());
    let parts: Vec<f64> = a
        .par_chunks(CHUNK)
        .zip(b.par_chunks(CHUNK))
        .with_min_len(min_tasks(a.len()))
        .map(|(a, b)| {
            at!(
                level,
                vector::sum_pairs(
                    a,
                    b,
                    #[inline(always)]
                    |a, b| (a - b) * (a - b)
                )
            )
        })
        .collect();
    parts.iter().sum()
}

fn gradient(level: Level, a: &[f32], b: &[f32], factor: f32, out: &mut [f32]) {
    debug_assert!(a.len() == out.len() && b.len() == out.len());
    let small = min_tasks(out.len());
    out.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .with_min_len(small)
        .for_each(|(out, (a, b))| {
            at!(level, gradient_chunk(a, b, factor, out));
        });
}

#[inline(always)]
#[allow(clippy::inline_always)] // compiled for the caller's instruction set
fn gradient_chunk(a: &[f32], b: &[f32], factor: f32, out: &mut [f32]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = factor * (a - b);
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    const LENGTHS: [usize; 10] = [0, 1, 7, 15, 16, 17, 33, 100, 8193, 100_001];

    #[test]
    fn values_and_gradients_are_exact_enough() {
        for len in LENGTHS {
            let (a, b) = (noise(len, 0.1, 3.0), noise(len, 0.6, 3.0));
            let exact: f64 =
                a.iter().zip(&b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum();
            let found = squared_error(&a, &b);
            assert!((found - exact).abs() <= 5e-7 * exact, "{found} for {exact}");
            let mut out = vec![f32::NAN; len];
            squared_error_gradient(&a, &b, 0.25, &mut out);
            let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| 0.25 * (a - b)).collect();
            assert_eq!(out, expected);
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for len in LENGTHS {
            let (a, b) = (noise(len, 0.1, 3.0), noise(len, 0.6, 3.0));
            assert_same(&format!("{len} entries"), |level| {
                let mut out = vec![0.0; len];
                gradient(level, &a, &b, 0.3, &mut out);
                (sum(level, &a, &b).to_bits(), bits(&out))
            });
        }
    }
}
