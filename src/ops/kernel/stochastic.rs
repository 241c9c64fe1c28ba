//! Rounding to bf16 up or down by chance, in place.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::parallel;
use crate::ops::stochastic::{Chance, LEAST};
use crate::ops::vector::{Level, at};

/// Entries that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// Rounds each value; the place decides by what chance.
pub(crate) fn round(values: &mut [f32], chance: &Chance) {
    round_at(Level::best(), values, chance);
}

fn round_at(level: Level, values: &mut [f32], chance: &Chance) {
    if !parallel(values.len()) {
        return at!(level, round_chunk(values, 0, chance));
    }
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        at!(level, round_chunk(values, chunk * CHUNK, chance));
    });
}

#[inline(always)]
fn round_chunk(values: &mut [f32], start: usize, chance: &Chance) {
    for (place, value) in values.iter_mut().enumerate() {
        *value = rounded(*value, chance.at((start + place) as u32));
    }
}

/// A value between two neighbours in bf16 becomes the larger one where the sixteen bits that bf16 does not
/// have, and those of `draw`, are 2^16 together or more.
#[inline(always)]
fn rounded(value: f32, draw: u32) -> f32 {
    let bits = value.to_bits();
    let magnitude = bits & 0x7fff_ffff;
    let moved = (magnitude + draw) & 0xffff_0000;
    // Infinite stays so, and what is no number gets its quiet bit.
    let moved = if magnitude > 0x7f80_0000 { 0x7fc0_0000 } else { moved };
    let moved = moved | (bits & 0x8000_0000);
    f32::from_bits(if magnitude < LEAST.to_bits() { 0 } else { moved })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for len in [0, 1, 7, 16, 33, 33_001, 100_003] {
            assert_same(&format!("{len} entries"), |level| {
                let mut values = noise(len, 0.4, 3.0);
                round_at(level, &mut values, &Chance::new(7));
                bits(&values)
            });
        }
    }

    #[test]
    fn what_bf16_holds_stays_and_all_else_becomes_a_neighbour() {
        for value in [0.0, 1.0, -0.007_812_5, f32::INFINITY, f32::NEG_INFINITY] {
            for draw in [0, 1, 0xffff] {
                assert_eq!(rounded(value, draw).to_bits(), value.to_bits());
            }
        }
        assert!(rounded(f32::NAN, 0xffff).is_nan() && rounded(-f32::NAN, 0xffff).is_nan());
        assert_eq!(rounded(-1e-40, 0xffff).to_bits(), 0);
        let value = f32::from_bits(0x3f80_4000); // a quarter of the way from 1 to the next
        assert_eq!(bits(&[0, 0xbfff].map(|draw| rounded(value, draw))), bits(&[1.0; 2]));
        let up = [0xc000, 0xffff].map(|draw| rounded(-value, draw));
        assert_eq!(bits(&up), bits(&[-1.007_812_5; 2]));
    }
}
