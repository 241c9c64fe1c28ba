//! Products of activations rounded to 8 bits with packed codes, in integers.
//!
//! The inputs of a token are rounded in runs of 32, `x ≈ a r` with `a = max |x| / 127` and whole `r`, as
//! llama.cpp rounds them for its types of 8 bits. What a run adds to an output is then
//! `s a Σ (q - z) r`, whose sum of codes and rounded inputs is exact in integers, four products to a
//! lane of a register. A run ends where a group of weights ends.
//!
//! Sums of runs are f32, added in one order at every instruction set: all give the same bits.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set
#![allow(clippy::many_single_char_names)] // n activations x of the product y

use half::f16;
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::coded::Coded;
use super::lanes::LANES;
use crate::ops::coded::PackedCodes;
use crate::ops::vector::{Level, at};

mod block;

/// Inputs that a lane multiplies at once.
const QUAD: usize = 4;
/// Such in a run.
const QUADS: usize = 8;
/// Inputs that are rounded together.
const RUN: usize = QUAD * QUADS;
/// The largest rounded input.
const TOP: f32 = 127.0;
/// Widths that codes are cut into: so many that fill a byte together.
const WIDTHS: [usize; 4] = [8, 4, 2, 1];

/// Words of 16 rows read, times activations, below which the work of other threads costs more than it saves: they
/// are [awake](crate::ops::awake) where texts are continued.
const SERIAL: usize = 1 << 9;

/// A number for each of 16 rows, as a register holds them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(align(64))]
struct Lanes<T>([T; LANES]);

/// The codes of a matrix, in the order in which a product reads them.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    /// Of 16 rows and of 32 columns: for each width of [`WIDTHS`] that is in the number of bits, as many words
    /// as that width. A byte of a word holds bits of one column's code for each of its fields, so that a shift
    /// and a mask leave the codes of four columns in the bytes of a lane.
    words: Vec<Lanes<u32>>,
    rows: usize,
    columns: usize,
    bits: usize,
}

/// A uniform grid in the order in which a product reads it.
#[derive(Clone, Debug)]
pub(crate) struct Steps {
    /// Of 16 rows and a part of a row.
    scale: Numbers,
    /// Half of the number of codes, less the zero point; absent where all are 0.
    shift: Option<Numbers>,
    /// Parts of a row: groups, or the whole row where a group is several rows.
    runs: Runs,
}

/// Numbers in half precision where all of them are of it.
#[derive(Clone, Debug)]
enum Numbers {
    Half(Vec<Lanes<u16>>),
    Single(Vec<Lanes<f32>>),
}

/// Runs of inputs: each begins and ends at a quad, within 32 columns and within a part.
#[derive(Clone, Debug)]
struct Runs {
    /// First quad and the quad behind the last one.
    quads: Vec<[usize; 2]>,
    /// Runs before and with each part.
    ends: Vec<usize>,
}

/// Activations as products read them.
struct Rounded {
    /// Four rounded inputs to a number, the first one lowest; zeros behind the last. `[n, quads]`.
    quads: Vec<i32>,
    /// What those of a run are multiplied by, `[n, runs]`.
    scales: Vec<f32>,
    /// Less half the number of codes times the sum of a run, `[n, runs]`.
    starts: Vec<i32>,
    /// Sums of the rounded inputs of each part, `[n, parts]`.
    sums: Vec<f32>,
}

/// Whether matrices with such groups have a kernel here: groups end between quads.
pub(crate) fn reads(columns: usize, group_len: usize) -> bool {
    group_len >= columns || group_len.is_multiple_of(QUAD)
}

impl Codes {
    /// Codes in the kernel's order.
    pub(crate) fn of(codes: &PackedCodes) -> Self {
        let (rows, columns, bits) = (codes.rows(), codes.columns(), usize::from(codes.bits()));
        let stride = columns.div_ceil(RUN) * bits;
        let mut words = vec![Lanes::default(); rows.div_ceil(LANES) * stride];
        words.par_chunks_mut(stride.max(1)).enumerate().for_each(|(block, words)| {
            let mut row = vec![0; columns];
            for lane in 0..LANES.min(rows - block * LANES) {
                codes.unpack_row(block * LANES + lane, &mut row);
                for (words, codes) in words.chunks_exact_mut(bits).zip(row.chunks(RUN)) {
                    for (place, codes) in codes.chunks(QUAD).enumerate() {
                        set(words, lane, place, codes);
                    }
                }
            }
        });
        Self { words, rows, columns, bits }
    }

    /// `X Wᵀ` of activations, `[n, columns]`, rounded: `[n, rows]`.
    pub(crate) fn times(&self, grid: &Steps, x: &[f32], n: usize) -> Vec<f32> {
        self.times_at(Level::best(), grid, x, n)
    }

    fn times_at(&self, level: Level, grid: &Steps, x: &[f32], n: usize) -> Vec<f32> {
        let x = Rounded::new(level, x, (n, self.columns), self.bits, &grid.runs);
        let job = block::Job { codes: self, grid, x: &x };
        let mut blocks = vec![Lanes::default(); self.rows.div_ceil(LANES) * n];
        let fill = |(index, out): (usize, &mut [Lanes<f32>])| job.block(level, index, out);
        if self.words.len() * n < SERIAL {
            blocks.chunks_mut(n.max(1)).enumerate().for_each(fill);
        } else {
            blocks.par_chunks_mut(n.max(1)).enumerate().for_each(fill);
        }
        let mut y = vec![0.0; n * self.rows];
        for (block, first) in blocks.chunks(n.max(1)).zip((0..).step_by(LANES)) {
            let rows = LANES.min(self.rows - first);
            for (i, block) in block.iter().enumerate() {
                y[i * self.rows + first..][..rows].copy_from_slice(&block.0[..rows]);
            }
        }
        y
    }
}

/// Puts the codes of quad `place` of a run in its words.
fn set(words: &mut [Lanes<u32>], lane: usize, place: usize, codes: &[u8]) {
    let mut bytes = [0; QUAD];
    bytes[..codes.len()].copy_from_slice(codes);
    let (bits, mut before, codes) = (words.len(), 0, u32::from_le_bytes(bytes));
    for width in WIDTHS.into_iter().filter(|width| bits & width != 0) {
        let fields = 8 / width;
        let field = (codes >> before) & (((1 << width) - 1) * 0x0101_0101);
        words[before + place / fields].0[lane] |= field << (width * (place % fields));
        before += width;
    }
}

impl Steps {
    /// The grid of `coded`, which is uniform.
    pub(crate) fn of(coded: &Coded<'_>) -> Self {
        let (rows, columns) = (coded.codes.rows(), coded.codes.columns());
        let part = coded.group_len.min(columns);
        let parts = columns / part.max(1);
        let middle = f32::from(1u16 << (coded.codes.bits() - 1));
        let numbers = |of: &dyn Fn(usize) -> f32| {
            let mut all = vec![Lanes::default(); rows.div_ceil(LANES) * parts];
            for row in 0..rows {
                let lanes = &mut all[row / LANES * parts..][..parts];
                for (index, lanes) in lanes.iter_mut().enumerate() {
                    lanes.0[row % LANES] = of(coded.group(row, index));
                }
            }
            all
        };
        let shift = numbers(&|group| middle - coded.shift[group]);
        let shifted = shift.iter().any(|lanes| lanes.0.iter().any(|shift| *shift != 0.0));
        Self {
            scale: Numbers::of(numbers(&|group| coded.scale[group])),
            shift: shifted.then(|| Numbers::of(shift)),
            runs: Runs::new(columns, part),
        }
    }
}

impl Numbers {
    fn of(all: Vec<Lanes<f32>>) -> Self {
        let half = |lanes: &Lanes<f32>| Lanes(lanes.0.map(|x| f16::from_f32(x).to_bits()));
        let exact = |x: &f32| f16::from_f32(*x).to_f32().to_bits() == x.to_bits();
        if all.iter().all(|lanes| lanes.0.iter().all(exact)) {
            Self::Half(all.iter().map(half).collect())
        } else {
            Self::Single(all)
        }
    }
}

impl Runs {
    fn new(columns: usize, part: usize) -> Self {
        let (mut quads, mut ends) = (Vec::new(), Vec::new());
        for first in (0..columns).step_by(part.max(1)) {
            let end = (first + part).div_ceil(QUAD);
            let mut quad = first / QUAD;
            while quad < end {
                let next = end.min((quad / QUADS + 1) * QUADS);
                quads.push([quad, next]);
                quad = next;
            }
            ends.push(quads.len());
        }
        Self { quads, ends }
    }
}

impl Rounded {
    fn new(
        level: Level,
        x: &[f32],
        (n, columns): (usize, usize),
        bits: usize,
        runs: &Runs,
    ) -> Self {
        let quads = columns.div_ceil(RUN) * QUADS;
        let count = runs.quads.len();
        let mut all = Self {
            quads: vec![0; n * quads],
            scales: Vec::with_capacity(n * count),
            starts: Vec::with_capacity(n * count),
            sums: Vec::with_capacity(n * runs.ends.len()),
        };
        for (x, out) in x.chunks(columns.max(1)).zip(all.quads.chunks_mut(quads.max(1))) {
            let mut run = 0;
            for end in &runs.ends {
                let mut sum = 0.0;
                for [first, end] in &runs.quads[run..*end] {
                    let x = &x[first * QUAD..columns.min(end * QUAD)];
                    let out = &mut out[*first..*end];
                    let (scale, whole) = at!(level, round(x, out));
                    all.scales.push(scale);
                    all.starts.push(-(whole << (bits - 1)));
                    sum += scale * whole as f32;
                }
                all.sums.push(sum);
                run = *end;
            }
        }
        all
    }
}

/// Rounds the inputs of a run: their scale, and the sum of the whole numbers that they become. What holds a number that
/// is none gets one for a scale.
#[inline(always)]
fn round(x: &[f32], out: &mut [i32]) -> (f32, i32) {
    /// Added to a small number, it leaves the nearest whole one in the low bits, ties to even.
    const WHOLE: f32 = 12_582_912.0;
    // All of a run, so that registers hold it.
    let mut run = [0.0; RUN];
    run[..x.len()].copy_from_slice(x);
    // Sizes are ordered as their bits are, with what is no number above all.
    let top = run.iter().fold(0, |top, x| x.abs().to_bits().max(top));
    let top = f32::from_bits(top);
    if !top.is_finite() {
        return (f32::NAN, 0);
    }
    if top < f32::MIN_POSITIVE {
        return (0.0, 0);
    }
    let whole = run.map(|x| (x / top * TOP + WHOLE).to_bits().wrapping_sub(WHOLE.to_bits()));
    for (whole, out) in whole.chunks_exact(QUAD).zip(out) {
        let byte = |place: usize| (whole[place] & 0xff) << (8 * place);
        *out = (byte(0) | byte(1) | byte(2) | byte(3)).cast_signed();
    }
    (top / TOP, whole.iter().fold(0, |sum: u32, whole| sum.wrapping_add(*whole)).cast_signed())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::coded::CodedKind;

    /// Inputs as products see them, rounded by the definition.
    fn rounded(x: &[f32], part: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(x.len());
        for (index, x) in x.chunks(part).enumerate() {
            let (mut first, end) = (index * part, index * part + x.len());
            while first < end {
                let next = end.min((first / 32 + 1) * 32);
                let run = &x[first - index * part..next - index * part];
                let top = run.iter().fold(0.0f32, |top, x| top.max(x.abs()));
                let whole = |x: &f32| (x / top * 127.0).round_ties_even() * (top / 127.0);
                out.extend(run.iter().map(|x| if top == 0.0 { 0.0 } else { whole(x) }));
                first = next;
            }
        }
        out
    }

    fn check([rows, columns]: [usize; 2], group_len: usize, bits: u8, half: bool) {
        let value = |i: usize, modulus: usize| (i.wrapping_mul(2_654_435_761) >> 7) % modulus;
        let codes: Vec<u8> = (0..rows * columns).map(|i| value(i, 1 << bits) as u8).collect();
        let codes = PackedCodes::pack(&codes, columns, bits);
        let groups = rows * columns / group_len;
        let third = if half { 1.0 } else { 1.0 / 3.0 };
        let scale: Vec<f32> = (0..groups).map(|i| (value(i, 5) + 1) as f32 / 4.0 * third).collect();
        let middle = f32::from(1u16 << (bits - 1));
        let shift: Vec<f32> =
            (0..groups).map(|i| if half { middle } else { value(i, 7) as f32 * third }).collect();
        let kind = CodedKind::Uniform;
        let held = Coded { codes: &codes, group_len, kind, scale: &scale, shift: &shift };
        let (codes, grid) = (Codes::of(&codes), Steps::of(&held));
        assert_eq!(grid.shift.is_none(), half);
        assert_eq!(matches!(grid.scale, Numbers::Half(_)), half);
        let weight = held.weight();
        for n in [1, 2, 3, 4, 7] {
            let x: Vec<f32> =
                (0..n * columns).map(|i| ((i * 31) % 13) as f32 / 7.0 - 0.75).collect();
            let found = codes.times_at(Level::Portable, &grid, &x, n);
            for (i, found) in found.iter().enumerate() {
                let x = rounded(&x[i / rows * columns..][..columns], group_len.min(columns));
                let weight = &weight[i % rows * columns..][..columns];
                let terms = || x.iter().zip(weight).map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                // A zero point far from the middle makes terms that cancel.
                let error = (f64::from(*found) - exact).abs();
                assert!(error <= 3e-6 * size, "{found} for {exact}, {bits} bits");
            }
            for level in Level::available() {
                let other = codes.times_at(level, &grid, &x, n);
                let bits_of = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                let what = format!("{level:?}, {bits} bits, {rows} x {columns}, n {n}");
                assert_eq!(bits_of(&other), bits_of(&found), "{what}");
            }
        }
    }

    #[test]
    fn products_are_those_of_rounded_inputs_at_every_level() {
        for bits in 1..=8 {
            for ([rows, columns], group_len) in [
                ([3, 7], 7),     // rows that fill no register, columns that fill no quad
                ([16, 32], 32),  // exactly one block and run
                ([21, 96], 32),  // a rest of rows
                ([40, 80], 16),  // groups of half a run
                ([17, 96], 48),  // groups that end inside runs
                ([6, 33], 198),  // one group for all rows
                ([33, 132], 4),  // a quad to a group
                ([18, 256], 64), // two runs to a group
            ] {
                for half in [false, true] {
                    check([rows, columns], group_len, bits, half);
                }
            }
        }
    }

    #[test]
    fn inputs_at_their_ends() {
        let codes = PackedCodes::pack(&[3; 32], 32, 2);
        let kind = CodedKind::Uniform;
        let held = Coded { codes: &codes, group_len: 32, kind, scale: &[1.0], shift: &[1.0] };
        let (codes, grid) = (Codes::of(&codes), Steps::of(&held));
        let times = |x: [f32; 32]| codes.times(&grid, &x, 1)[0];
        assert_eq!(times([0.0; 32]).to_bits(), 0.0f32.to_bits());
        assert_eq!(times([1e-42; 32]).to_bits(), 0.0f32.to_bits());
        assert!((times([-2.0; 32]) + 128.0).abs() < 1e-4);
        for wrong in [f32::NAN, f32::INFINITY] {
            let mut x = [1.0; 32];
            x[5] = wrong;
            assert!(times(x).is_nan());
        }
    }
}
