//! Fake-quantization of the uniform family: codes, values, and the gradients of what learns, one
//! pass over the weight each, group by group.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

mod divided;
#[cfg(test)]
mod sample;
mod stepped;

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

pub(in crate::ops) use self::divided::Divided;
pub(super) use self::stepped::code_of;
pub(in crate::ops) use self::stepped::{InPlace, Stepped};
use super::{parallel, rows};
use crate::ops::vector::{self, Level, at};

/// `e^x` of each.
pub(crate) fn exp(x: &[f32]) -> Vec<f32> {
    exp_at(Level::best(), x)
}

fn exp_at(level: Level, x: &[f32]) -> Vec<f32> {
    let mut out = x.to_vec();
    rows(&mut out, x.len().clamp(1, 1 << 12), |(_, part)| {
        at!(level, {
            for x in part {
                *x = vector::exp(*x);
            }
        });
    });
    out
}

/// Runs `group` on every row of `matrix`, with its index and a buffer of its length; the results in
/// the order of the rows.
fn reduce_rows<R: Send>(
    matrix: &mut [f32],
    len: usize,
    group: impl Fn(&mut [f32], usize, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let scratch = || vec![0.0; len];
    if parallel(matrix.len()) {
        let rows = matrix.par_chunks_exact_mut(len).enumerate();
        rows.map_init(scratch, |scratch, (index, row)| group(scratch, index, row)).collect()
    } else {
        let mut scratch = scratch();
        let rows = matrix.chunks_exact_mut(len).enumerate();
        rows.map(|(index, row)| group(&mut scratch, index, row)).collect()
    }
}

#[inline(always)]
fn affine_code(u: f32, z: f32, top: f32) -> f32 {
    (u.round_ties_even() + z).clamp(0.0, top)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::sample::SHAPES;
    use super::*;

    #[test]
    fn exp_gives_the_same_bits_at_every_level_and_number_of_threads() {
        for [groups, len] in SHAPES {
            let x = noise(groups * len, 0.3, 100.0);
            assert_same("exp", |level| vec![bits(&exp_at(level, &x))]);
        }
    }
}
