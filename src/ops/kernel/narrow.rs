//! Products of few activations with a matrix whose numbers are those of bfloat16, held as such: half the bytes
//! to read for each token.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use half::bf16;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use crate::ops::vector::{Level, at};

/// Numbers that are added independently of each other.
const LANES: usize = 64;
/// Rows of the matrix that a thread takes at once.
const ROWS: usize = 64;

/// A matrix of bfloat16 numbers.
#[derive(Clone, Debug)]
pub(crate) struct Narrow {
    /// `[rows, columns]`.
    bits: Vec<u16>,
    columns: usize,
}

impl Narrow {
    /// The matrix `values`, `[rows, columns]`, where each of its numbers is one of bfloat16.
    pub(crate) fn of(values: &[f32], columns: usize) -> Option<Self> {
        // What bfloat16 lacks of f32 is the lower half.
        let exact =
            |values: &[f32]| values.iter().fold(0, |all, x| all | x.to_bits() & 0xffff) == 0;
        if columns == 0 || !values.par_chunks(columns).all(exact) {
            return None;
        }
        let mut bits = vec![0; values.len()];
        bits.par_chunks_mut(columns).zip(values.par_chunks(columns)).for_each(|(bits, values)| {
            for (bits, value) in bits.iter_mut().zip(values) {
                *bits = bf16::from_f32(*value).to_bits();
            }
        });
        Some(Self { bits, columns })
    }

    /// `X Wᵀ` of activations, `[n, columns]`: `[n, rows]`.
    pub(crate) fn times(&self, x: &[f32]) -> Vec<f32> {
        self.times_at(Level::best(), x)
    }

    fn times_at(&self, level: Level, x: &[f32]) -> Vec<f32> {
        let (n, rows) = (x.len() / self.columns, self.bits.len() / self.columns);
        // Rows outside, so that each is read once.
        let mut outputs = vec![0.0; n * rows];
        outputs
            .par_chunks_mut(ROWS * n.max(1))
            .zip(self.bits.par_chunks(ROWS * self.columns))
            .for_each(|(outputs, weights)| {
                let weights = weights.chunks_exact(self.columns);
                for (outputs, weights) in outputs.chunks_exact_mut(n).zip(weights) {
                    for (output, x) in outputs.iter_mut().zip(x.chunks_exact(self.columns)) {
                        *output = at!(level, dot(weights, x));
                    }
                }
            });
        if n == 1 {
            return outputs;
        }
        (0..n * rows).map(|i| outputs[i % rows * n + i / rows]).collect()
    }
}

#[inline(always)]
fn dot(weights: &[u16], x: &[f32]) -> f32 {
    let wide = |bits: u16| f32::from_bits(u32::from(bits) << 16);
    let mut lanes = [0.0f32; LANES];
    let (weights, weights_rest) = weights.as_chunks::<LANES>();
    let (x, x_rest) = x.as_chunks::<LANES>();
    for (weights, x) in weights.iter().zip(x) {
        for ((lane, weight), x) in lanes.iter_mut().zip(weights).zip(x) {
            *lane += wide(*weight) * x;
        }
    }
    for ((lane, weight), x) in lanes.iter_mut().zip(weights_rest).zip(x_rest) {
        *lane += wide(*weight) * x;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_matrix_at_every_level() {
        for (rows, columns) in [(1, 1), (3, 63), (65, 64), (130, 200), (64, 576)] {
            let number = |i: usize| ((i * 37) % 101) as f32 / 16.0 - 3.0;
            let weight: Vec<f32> = (0..rows * columns).map(number).collect();
            let narrow = Narrow::of(&weight, columns).unwrap();
            for n in [1, 2, 5] {
                let x: Vec<f32> =
                    (0..n * columns).map(|i| ((i * 13) % 29) as f32 / 7.0 - 2.0).collect();
                let found = narrow.times_at(Level::Portable, &x);
                for (i, found) in found.iter().enumerate() {
                    let x = &x[i / rows * columns..][..columns];
                    let weight = &weight[i % rows * columns..][..columns];
                    let terms = || x.iter().zip(weight).map(|(x, w)| f64::from(x * w));
                    let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                    let error = (f64::from(*found) - exact).abs();
                    assert!(error <= 1e-6 * size, "{found} for {exact}");
                }
                for level in Level::available() {
                    let other = narrow.times_at(level, &x);
                    let same = other.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
                    assert!(same, "{level:?}, {rows} x {columns}, n {n}");
                }
            }
        }
    }

    #[test]
    fn numbers_that_bfloat16_has_not_are_left() {
        assert!(Narrow::of(&[1.0, 0.5, -3.0], 3).is_some());
        assert!(Narrow::of(&[1.0, 0.1, -3.0], 3).is_none());
    }
}
