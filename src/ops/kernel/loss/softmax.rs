//! A row's softmax, whose exponentials come block by block.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use crate::ops::vector::{self, LANES};

/// Logits that share a maximum and a partial sum.
pub(super) const BLOCK: usize = 64 * LANES;

/// The buffers of one thread.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) student: Softmax,
    pub(super) teacher: Softmax,
}

/// A row's softmax: entry `i` is `exponentials[i] * total.factors[i / BLOCK]`.
#[derive(Default)]
pub(super) struct Softmax {
    pub(super) exponentials: Vec<f32>,
    pub(super) total: Total,
}

/// The sum of a row's exponentials, as its blocks come.
#[derive(Default)]
pub(super) struct Total {
    /// Of each block: what its exponentials are relative to and, once finished, what makes
    /// probabilities of them.
    pub(super) factors: Vec<f32>,
    /// Largest logit so far.
    pub(super) max: f32,
    /// Sum of `e^((x - max)/τ)`.
    pub(super) sum: f64,
}

impl Scratch {
    /// Finishes both totals.
    #[inline(always)]
    pub(super) fn finish(&mut self, inverse: f32) {
        self.student.total.finish(inverse);
        self.teacher.total.finish(inverse);
    }
}

impl Softmax {
    /// Of logits divided by a temperature; what is less than `least` has probability zero.
    #[inline(always)]
    pub(super) fn load(&mut self, logits: &[f32], inverse: f32, least: f32) {
        self.exponentials.resize(logits.len(), 0.0);
        self.total.clear();
        for (block, logits) in self.exponentials.chunks_mut(BLOCK).zip(logits.chunks(BLOCK)) {
            for (to, from) in block.iter_mut().zip(logits) {
                *to = if *from < least { f32::NEG_INFINITY } else { *from }; // NaN stays
            }
            self.total.add(block, inverse);
        }
    }
}

impl Total {
    pub(super) fn clear(&mut self) {
        self.factors.clear();
        self.max = f32::MIN; // finite, for logits of negative infinity
        self.sum = 0.0;
    }

    /// Turns a block of logits into exponentials and adds them.
    #[inline(always)]
    pub(super) fn add(&mut self, block: &mut [f32], inverse: f32) {
        let max = self.max.max(block_max(block));
        let mut lanes = [0.0; LANES];
        let (whole, rest) = block.as_chunks_mut::<LANES>();
        for chunk in whole {
            for (x, lane) in chunk.iter_mut().zip(&mut lanes) {
                *x = vector::exp((*x - max) * inverse);
                *lane += *x;
            }
        }
        for (x, lane) in rest.iter_mut().zip(&mut lanes) {
            *x = vector::exp((*x - max) * inverse);
            *lane += *x;
        }
        let shrink = f64::from(vector::exp((self.max - max) * inverse));
        self.sum = self.sum * shrink + vector::fold_lanes(lanes);
        self.max = max;
        self.factors.push(max);
    }

    /// Takes a whole row without keeping its exponentials, at temperature one.
    #[inline(always)]
    pub(super) fn measure(&mut self, logits: &[f32]) {
        self.clear();
        let mut buffer = [0.0; BLOCK];
        for logits in logits.chunks(BLOCK) {
            let block = &mut buffer[..logits.len()];
            block.copy_from_slice(logits);
            self.add(block, 1.0);
        }
    }

    /// Turns a whole row into `weight * q`, at temperature one.
    #[inline(always)]
    pub(super) fn replace(&mut self, logits: &mut [f32], weight: f32) {
        self.clear();
        for block in logits.chunks_mut(BLOCK) {
            self.add(block, 1.0);
        }
        self.finish(1.0);
        for (block, factor) in logits.chunks_mut(BLOCK).zip(&self.factors) {
            for e in block {
                *e = *e * *factor * weight;
            }
        }
    }

    /// Makes the factors that turn exponentials into probabilities.
    #[inline(always)]
    pub(super) fn finish(&mut self, inverse: f32) {
        let normal = (1.0 / self.sum) as f32;
        for factor in &mut self.factors {
            *factor = vector::exp((*factor - self.max) * inverse) * normal;
        }
    }

    /// Where the largest logit is, before `finish`: in the first block that knew it.
    pub(super) fn first_max(&self, logits: &[f32]) -> Option<usize> {
        let start = self.factors.iter().position(|max| *max >= self.max)? * BLOCK;
        Some(start + logits[start..].iter().position(|x| *x >= self.max)?)
    }

    /// `-ln` of the probability of a logit of the row, at temperature one.
    pub(super) fn surprise(&self, logit: Option<f32>) -> f64 {
        ln(self.sum) + (f64::from(self.max) - logit.map_or(f64::NAN, f64::from))
    }
}

/// [`vector::max`] with four times the lanes, which a short slice needs to hide the latency.
#[inline(always)]
fn block_max(values: &[f32]) -> f32 {
    let mut lanes = [[f32::NEG_INFINITY; LANES]; 4];
    let (whole, rest) = values.as_chunks::<{ 4 * LANES }>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[0][i] = lanes[0][i].max(chunk[i]);
            lanes[1][i] = lanes[1][i].max(chunk[i + LANES]);
            lanes[2][i] = lanes[2][i].max(chunk[i + 2 * LANES]);
            lanes[3][i] = lanes[3][i].max(chunk[i + 3 * LANES]);
        }
    }
    vector::max(lanes.as_flattened()).max(vector::max(rest))
}

/// `ln x` in f64 of basic arithmetic only, because the system's differs between machines. NaN
/// unless `x > 0`.
pub(super) fn ln(x: f64) -> f64 {
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    const MANTISSA: u64 = (1 << 52) - 1;
    if x > 0.0 {
        // x = 2^n m with m in sqrt(1/2)..sqrt(2), and ln m = 2 artanh((m - 1)/(m + 1)).
        let bits = x.to_bits().wrapping_sub(SQRT_HALF);
        let n = (bits.cast_signed() >> 52) as f64;
        let m = f64::from_bits((bits & MANTISSA) + SQRT_HALF);
        let z = (m - 1.0) / (m + 1.0);
        let series = (0..9).rev().fold(0.0, |sum, k| sum * z * z + 1.0 / f64::from(2 * k + 1));
        n * std::f64::consts::LN_2 + 2.0 * z * series
    } else {
        f64::NAN
    }
}
