//! Sixteen rows of a product, in each instruction set.

#![allow(unsafe_code)] // loads of whole registers, and calls of what the processor was found to have

use super::{CHUNK, CHUNKS, Coefficients, LANES, Planes, Table};
use crate::ops::coded::CodedKind;
use crate::ops::vector::{self, Level, at};

/// Sums of a row that are independent of each other, so that additions need not wait.
const SUMS: usize = 4;

/// A product of a matrix with `N` activations.
pub(super) struct Job<'a, const N: usize> {
    pub(super) planes: &'a Planes,
    pub(super) grid: &'a Coefficients,
    /// Of each chunk.
    pub(super) tables: &'a [[Table; N]],
    /// The plain sums of the inputs of each part.
    pub(super) sums: &'a [[f32; N]],
}

impl<const N: usize> Job<'_, N> {
    /// The outputs of 16 rows.
    pub(super) fn block(&self, level: Level, block: usize) -> [[f32; LANES]; N] {
        match level {
            Level::Portable => portable::block(self, block),
            // SAFETY: a level is handed out only after the processor was found to have it.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::block(self, block) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::block(self, block) },
        }
    }
}

/// The sum of inputs, the same at every level.
pub(super) fn sum(x: &[f32]) -> f32 {
    at!(Level::best(), vector::sum(x)) as f32
}

/// `block`, over the vectors of the module it stands in: `F` of 16 floats, `W` of 16 words, and
/// what is done with them.
macro_rules! block {
    ($(#[$attribute:meta])*) => {
        /// Adds what the index at a place of 16 words says.
        $(#[$attribute])*
        #[inline]
        fn add_one<const N: usize>(
            partial: &mut [[F; SUMS]; N],
            words: W,
            place: usize,
            tables: &[Table; N],
        ) {
            let index = right(words, 4 * place as u32);
            for (sums, table) in partial.iter_mut().zip(tables) {
                let sum = &mut sums[place % SUMS];
                *sum = add(*sum, look_up(index, table));
            }
        }

        $(#[$attribute])*
        pub(super) fn block<const N: usize>(job: &Job<'_, N>, block: usize) -> [[f32; LANES]; N] {
            let Job { planes, grid, tables, sums } = job;
            let count = planes.bits;
            let stride = planes.columns.div_ceil(CHUNK * CHUNKS) * count;
            let words = &planes.words[block * stride..][..stride];
            let width = grid.scales + 1;
            let parts = sums.len();
            let grids = &grid.values[block * parts * width..][..parts * width];
            let mut y = [zero(); N];
            for (part, (values, sums)) in grids.chunks_exact(width).zip(*sums).enumerate() {
                let first = part * grid.part / CHUNK;
                let last = ((part + 1) * grid.part).div_ceil(CHUNK);
                for plane in 0..count {
                    let mut partial = [[zero(); SUMS]; N];
                    let mut chunk = first;
                    while chunk < last {
                        let word = load_words(&words[chunk / CHUNKS * count + plane]);
                        let from = chunk % CHUNKS;
                        let to = CHUNKS.min(from + last - chunk);
                        let tables = &tables[chunk - from..][..CHUNKS];
                        if to - from == CHUNKS {
                            // Of a known length, so that shifts become constants.
                            for (place, tables) in tables.iter().enumerate() {
                                add_one(&mut partial, word, place, tables);
                            }
                        } else {
                            for (place, tables) in tables.iter().enumerate().take(to).skip(from) {
                                add_one(&mut partial, word, place, tables);
                            }
                        }
                        chunk += to - from;
                    }
                    let alpha = match grid.kind {
                        CodedKind::Uniform => {
                            multiply(load(&values[0]), splat(0.5 * (1u32 << plane) as f32))
                        }
                        CodedKind::BinaryCoding | CodedKind::Codebook(_) => load(&values[plane]),
                    };
                    for (y, [a, b, c, d]) in y.iter_mut().zip(partial) {
                        *y = add(*y, multiply(alpha, add(add(a, b), add(c, d))));
                    }
                }
                let offset = load(&values[grid.scales]);
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = add(*y, multiply(offset, splat(*sum)));
                }
            }
            y.map(|y| store(y))
        }
    };
}

mod portable {
    use super::{CHUNK, CHUNKS, CodedKind, Job, LANES, SUMS, Table};
    use crate::ops::kernel::lanes::portable::{
        F, W, add, load, load_words, multiply, right, splat, store, zero,
    };

    fn look_up(index: W, table: &Table) -> F {
        index.map(|index| table[(index & 15) as usize])
    }

    block!();
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64 as x86;

    use super::{CHUNK, CHUNKS, CodedKind, Job, LANES, SUMS, Table};
    use crate::ops::kernel::lanes::avx512::{
        F, W, add, load, load_words, multiply, right, splat, store, zero,
    };

    /// Reads the lowest four bits of an index.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn look_up(index: W, table: &Table) -> F {
        x86::_mm512_permutexvar_ps(index, load(table))
    }

    block!(#[target_feature(enable = "avx512f")]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64 as x86;

    use super::{CHUNK, CHUNKS, CodedKind, Job, LANES, SUMS, Table};
    use crate::ops::kernel::lanes::avx2::{
        F, W, add, load, load_words, multiply, right, splat, store, zero,
    };

    /// The lowest three bits of an index say which entry, the fourth whether it is turned over.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn look_up(index: W, table: &Table) -> F {
        // SAFETY: sixteen floats are there.
        let table = unsafe { x86::_mm256_loadu_ps(table.as_ptr()) };
        let minus = x86::_mm256_set1_epi32(i32::MIN);
        let half = |index| {
            let sign = x86::_mm256_and_si256(x86::_mm256_slli_epi32::<28>(index), minus);
            let entry = x86::_mm256_permutevar8x32_ps(table, index);
            x86::_mm256_xor_ps(entry, x86::_mm256_castsi256_ps(sign))
        };
        [half(index[0]), half(index[1])]
    }

    block!(#[target_feature(enable = "avx2")]);
}
