//! Sixteen rows of a product, in each instruction set.

#![allow(unsafe_code)] // loads of whole registers, and calls of what the processor was found to have

use super::{Codes, Lanes, Numbers, QUADS, Rounded, Steps};
use crate::ops::vector::Level;

/// Sums of a run that are independent of each other, so that additions need not wait.
const SUMS: usize = 2;

/// A product.
pub(super) struct Job<'a> {
    pub(super) codes: &'a Codes,
    pub(super) grid: &'a Steps,
    pub(super) x: &'a Rounded,
}

/// What one activation of a product is.
#[derive(Clone, Copy)]
struct Row<'a> {
    quads: &'a [i32],
    scales: &'a [f32],
    starts: &'a [i32],
    sums: &'a [f32],
}

impl Job<'_> {
    /// The outputs of 16 rows, for every activation.
    pub(super) fn block(&self, level: Level, block: usize, out: &mut [Lanes<f32>]) {
        match self.codes.bits {
            1 => self.of_width::<1>(level, block, out),
            2 => self.of_width::<2>(level, block, out),
            3 => self.of_width::<3>(level, block, out),
            4 => self.of_width::<4>(level, block, out),
            5 => self.of_width::<5>(level, block, out),
            6 => self.of_width::<6>(level, block, out),
            7 => self.of_width::<7>(level, block, out),
            _ => self.of_width::<8>(level, block, out),
        }
    }

    fn of_width<const B: usize>(&self, level: Level, block: usize, out: &mut [Lanes<f32>]) {
        let mut done = 0;
        while done < out.len() {
            let out = &mut out[done..];
            done += match out.len() {
                1 => self.some::<B, 1>(level, block, done, out),
                2 | 3 => self.some::<B, 2>(level, block, done, out),
                _ => self.some::<B, 4>(level, block, done, out),
            };
        }
    }

    /// `N` activations from the one at `first` on; gives `N`.
    fn some<const B: usize, const N: usize>(
        &self,
        level: Level,
        block: usize,
        first: usize,
        out: &mut [Lanes<f32>],
    ) -> usize {
        let rows: [Row<'_>; N] = std::array::from_fn(|i| self.row(first + i));
        let found = match level {
            Level::Portable => portable::block::<B, N>(self, block, &rows),
            // SAFETY: a level is handed out only after the processor was found to have it, and what it does not
            // promise is asked for.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 if is_x86_feature_detected!("avx512vnni") => unsafe {
                vnni::block::<B, N>(self, block, &rows)
            },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 if is_x86_feature_detected!("f16c") => unsafe {
                avx2::block::<B, N>(self, block, &rows)
            },
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx512 => portable::block::<B, N>(self, block, &rows),
        };
        out[..N].copy_from_slice(&found);
        N
    }

    fn row(&self, index: usize) -> Row<'_> {
        let quads = self.codes.columns.div_ceil(super::RUN) * QUADS;
        let (runs, parts) = (self.grid.runs.quads.len(), self.grid.runs.ends.len());
        let x = self.x;
        Row {
            quads: &x.quads[index * quads..][..quads],
            scales: &x.scales[index * runs..][..runs],
            starts: &x.starts[index * runs..][..runs],
            sums: &x.sums[index * parts..][..parts],
        }
    }
}

/// `block`, over the vectors of the module it stands in: `F` of 16 floats, `W` of 16 words, and
/// what is done with them.
macro_rules! block {
    ($(#[$attribute:meta])*) => {
        $(#[$attribute])*
        #[inline]
        fn numbers(numbers: &Numbers, index: usize) -> F {
            match numbers {
                Numbers::Half(all) => load_half(&all[index].0),
                Numbers::Single(all) => load(&all[index].0),
            }
        }

        /// Those bits of the codes of quad `P` that lie in fields of `WIDTH` bits, one code in each byte.
        $(#[$attribute])*
        #[inline]
        fn field<const B: usize, const WIDTH: usize, const P: usize>(
            all: W,
            words: &[Lanes<u32>; B],
        ) -> W {
            if B & WIDTH == 0 {
                return all;
            }
            // The wider fields before it, in bits of a code and in words.
            let before = B & !(2 * WIDTH - 1);
            let fields = 8 / WIDTH;
            let word = load_words(&words[(before + P / fields) % B].0);
            let from = WIDTH * (P % fields);
            let word = if from >= before {
                right(word, (from - before) as u32)
            } else {
                left(word, (before - from) as u32)
            };
            let mask = (((1u32 << WIDTH) - 1) << before) * 0x0101_0101;
            or(all, and(word, whole(mask.cast_signed())))
        }

        /// Adds the products of quad `P`, whose place is constant so that shifts and masks are.
        $(#[$attribute])*
        #[inline]
        fn add_one<const B: usize, const N: usize, const P: usize>(
            dots: &mut [[W; SUMS]; N],
            words: &[Lanes<u32>; B],
            inputs: &[&[i32; QUADS]; N],
        ) {
            let codes = field::<B, 8, P>(whole(0), words);
            let codes = field::<B, 4, P>(codes, words);
            let codes = field::<B, 2, P>(codes, words);
            let codes = field::<B, 1, P>(codes, words);
            for (dots, inputs) in dots.iter_mut().zip(inputs) {
                let dot = &mut dots[P % SUMS];
                *dot = multiply_codes::<B>(*dot, codes, inputs[P]);
            }
        }

        /// Adds the products of a run, or of some of its quads.
        $(#[$attribute])*
        #[inline]
        fn add_run<const B: usize, const N: usize>(
            dots: &mut [[W; SUMS]; N],
            words: &[Lanes<u32>; B],
            inputs: &[&[i32; QUADS]; N],
            [first, last]: [usize; 2],
        ) {
            if last - first == QUADS {
                add_one::<B, N, 0>(dots, words, inputs);
                add_one::<B, N, 1>(dots, words, inputs);
                add_one::<B, N, 2>(dots, words, inputs);
                add_one::<B, N, 3>(dots, words, inputs);
                add_one::<B, N, 4>(dots, words, inputs);
                add_one::<B, N, 5>(dots, words, inputs);
                add_one::<B, N, 6>(dots, words, inputs);
                add_one::<B, N, 7>(dots, words, inputs);
                return;
            }
            for place in first..last {
                match place % QUADS {
                    0 => add_one::<B, N, 0>(dots, words, inputs),
                    1 => add_one::<B, N, 1>(dots, words, inputs),
                    2 => add_one::<B, N, 2>(dots, words, inputs),
                    3 => add_one::<B, N, 3>(dots, words, inputs),
                    4 => add_one::<B, N, 4>(dots, words, inputs),
                    5 => add_one::<B, N, 5>(dots, words, inputs),
                    6 => add_one::<B, N, 6>(dots, words, inputs),
                    _ => add_one::<B, N, 7>(dots, words, inputs),
                }
            }
        }

        $(#[$attribute])*
        pub(super) fn block<const B: usize, const N: usize>(
            job: &Job<'_>,
            block: usize,
            rows: &[Row<'_>; N],
        ) -> [Lanes<f32>; N] {
            let Job { codes, grid, .. } = job;
            let runs = &grid.runs;
            let stride = codes.columns.div_ceil(super::super::RUN);
            let (words, _) = codes.words[block * stride * B..][..stride * B].as_chunks::<B>();
            let inputs = rows.map(|row| row.quads.as_chunks::<QUADS>().0);
            let mut y = [zero(); N];
            let mut run = 0;
            for (part, end) in runs.ends.iter().enumerate() {
                let mut sums = [zero(); N];
                while run < *end {
                    let quads = runs.quads[run];
                    let place = quads[0] / QUADS;
                    let mut dots = [[whole(0); SUMS]; N];
                    let mut inputs_of_run = [&[0; QUADS]; N];
                    for i in 0..N {
                        dots[i][0] = whole(rows[i].starts[run]);
                        inputs_of_run[i] = &inputs[i][place];
                    }
                    add_run::<B, N>(&mut dots, &words[place], &inputs_of_run, quads);
                    for ((sum, row), [a, b]) in sums.iter_mut().zip(rows).zip(dots) {
                        let dot = to_float(add_words(a, b));
                        *sum = add(*sum, multiply(splat(row.scales[run]), dot));
                    }
                    run += 1;
                }
                let index = block * runs.ends.len() + part;
                if let Some(shift) = &grid.shift {
                    let shift = numbers(shift, index);
                    for (sum, row) in sums.iter_mut().zip(rows) {
                        *sum = add(*sum, multiply(shift, splat(row.sums[part])));
                    }
                }
                let scale = numbers(&grid.scale, index);
                for (y, sum) in y.iter_mut().zip(sums) {
                    *y = add(*y, multiply(scale, sum));
                }
            }
            y.map(|y| Lanes(store(y)))
        }
    };
}

mod portable {
    use super::{Job, Lanes, Numbers, QUADS, Row, SUMS};
    use crate::ops::kernel::lanes::portable::{
        F, W, add, add_words, and, left, load, load_half, load_words, multiply, or, right, splat,
        store, to_float, whole, zero,
    };

    /// Adds the products of the four bytes of a lane with those of `inputs`.
    fn multiply_codes<const B: usize>(sum: W, codes: W, inputs: i32) -> W {
        let inputs = inputs.to_le_bytes().map(|x| i32::from(x.cast_signed()));
        std::array::from_fn(|i| {
            let codes = codes[i].to_le_bytes().map(i32::from);
            let dot: i32 = codes.iter().zip(inputs).map(|(code, input)| code * input).sum();
            sum[i].wrapping_add_signed(dot)
        })
    }

    block!();
}

#[cfg(target_arch = "x86_64")]
mod vnni {
    use std::arch::x86_64 as x86;

    use super::{Job, Lanes, Numbers, QUADS, Row, SUMS};
    use crate::ops::kernel::lanes::avx512::{
        F, W, add, add_words, and, left, load, load_half, load_words, multiply, or, right, splat,
        store, to_float, whole, zero,
    };

    /// Adds the products of the four bytes of a lane with those of `inputs`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    fn multiply_codes<const B: usize>(sum: W, codes: W, inputs: i32) -> W {
        x86::_mm512_dpbusd_epi32(sum, codes, whole(inputs))
    }

    block!(#[target_feature(enable = "avx512f,avx512vnni")]);
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64 as x86;

    use super::{Job, Lanes, Numbers, QUADS, Row, SUMS};
    use crate::ops::kernel::lanes::avx2::{
        F, W, add, add_words, and, left, load, load_half, load_words, multiply, or, right, splat,
        store, to_float, whole, zero,
    };

    /// Adds the products of the four bytes of a lane with those of `inputs`. Pairs of products are added in 16
    /// bits, which hold those of 7 bits: codes of 8 are multiplied half by half.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn multiply_codes<const B: usize>(sum: W, codes: W, inputs: i32) -> W {
        let [inputs, _] = whole(inputs);
        let dot = |codes, times| {
            let pairs = x86::_mm256_maddubs_epi16(codes, inputs);
            x86::_mm256_madd_epi16(pairs, x86::_mm256_set1_epi16(times))
        };
        if B < 8 {
            return add_words(sum, codes.map(|codes| dot(codes, 1)));
        }
        let low = and(codes, whole(0x0f0f_0f0f));
        let high = and(right(codes, 4), whole(0x0f0f_0f0f));
        let sum = add_words(sum, low.map(|codes| dot(codes, 1)));
        add_words(sum, high.map(|codes| dot(codes, 16)))
    }

    block!(#[target_feature(enable = "avx2,f16c")]);
}
