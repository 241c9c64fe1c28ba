//! Products of few activations with packed codes, on the packed codes: LUT-GEMM (arXiv 2206.09557).
//!
//! A code of `b` bits is `b` signs, whatever the grid: binary coding is that by definition, and
//! `s (q - z)` is `Σ_p s 2^(p-1) sign_p + s ((2^b - 1) / 2 - z)`. Four inputs have sixteen sums of
//! signs. They are made once for each activation and then looked up, in registers, for sixteen rows
//! of the matrix at a time. The work of a weight is a quarter of an addition for each of its bits.
//!
//! Of two sign patterns that are each other's complement, one sum is the other's negative: a table
//! has eight entries, and the fourth bit of an index is a sign. All instruction sets add the same
//! numbers in the same order and so give the same bits.

#![allow(clippy::many_single_char_names)] // n activations x of the product y

use rayon::iter::{IndexedParallelIterator, IntoParallelRefMutIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::coded::Coded;
use super::lanes::LANES;
use crate::ops::coded::{CodedKind, PackedCodes};
use crate::ops::vector::Level;

mod block;

/// Inputs of a table.
const CHUNK: usize = 4;
/// Tables whose indices a word holds.
const CHUNKS: usize = 8;
/// Inputs of a word.
const WORD: usize = CHUNK * CHUNKS;

/// Words of 16 rows read, for each activation, below which the work of other threads costs more than it saves: they
/// are [awake](crate::ops::awake).
const SERIAL: usize = 1 << 8;

/// Sums of four inputs by their signs; entry `8 + i` is the negative of entry `i`.
type Table = [f32; LANES];

/// The signs of a matrix of codes, in the order in which a product reads them.
#[derive(Clone, Debug)]
pub(crate) struct Planes {
    /// Of 16 rows, of 32 columns, of a plane: each row's eight indices, the first one lowest.
    words: Vec<[u32; LANES]>,
    rows: usize,
    columns: usize,
    bits: usize,
}

/// A grid in the order in which a product reads it.
#[derive(Clone, Debug)]
pub(crate) struct Coefficients {
    /// Of 16 rows and a part of a row: the scale of each plane, or the one step, then what the plain
    /// sum of the inputs is multiplied by.
    values: Vec<[f32; LANES]>,
    /// What the grid is.
    kind: CodedKind,
    /// Scales of a group.
    scales: usize,
    /// Columns of a part: a group, or the whole row where a group is several rows.
    part: usize,
}

/// Whether matrices with such groups have a kernel here: boundaries of groups fall between tables.
pub(crate) fn reads(columns: usize, group_len: usize) -> bool {
    group_len >= columns || group_len.is_multiple_of(CHUNK)
}

impl Planes {
    /// The signs of codes; bit `p` of a code is the sign of plane `p`, 1 for plus.
    pub(crate) fn of(codes: &PackedCodes) -> Self {
        let (rows, columns, planes) = (codes.rows(), codes.columns(), usize::from(codes.bits()));
        let stride = columns.div_ceil(WORD) * planes;
        let mut words = vec![[0; LANES]; rows.div_ceil(LANES) * stride];
        words.par_chunks_mut(stride.max(1)).enumerate().for_each(|(block, words)| {
            let mut row = vec![0; columns];
            for lane in 0..LANES.min(rows - block * LANES) {
                codes.unpack_row(block * LANES + lane, &mut row);
                for (words, codes) in words.chunks_exact_mut(planes).zip(row.chunks(WORD)) {
                    for (plane, word) in words.iter_mut().enumerate() {
                        word[lane] = indices(codes, plane);
                    }
                }
            }
        });
        Self { words, rows, columns, bits: planes }
    }

    /// `X Sᵀ` of activations, `[n, columns]`: `[n, rows]`.
    pub(crate) fn times(&self, grid: &Coefficients, x: &[f32], n: usize) -> Vec<f32> {
        self.times_at(Level::best(), grid, x, n)
    }

    fn times_at(&self, level: Level, grid: &Coefficients, x: &[f32], n: usize) -> Vec<f32> {
        let mut y = vec![0.0; n * self.rows];
        let mut done = 0;
        while done < n {
            let x = &x[done * self.columns..];
            let y = &mut y[done * self.rows..];
            done += match n - done {
                1 => self.some::<1>(level, grid, x, y),
                2 | 3 => self.some::<2>(level, grid, x, y),
                _ => self.some::<4>(level, grid, x, y),
            };
        }
        y
    }

    /// The product with the first `N` activations of `x`; gives `N`.
    fn some<const N: usize>(
        &self,
        level: Level,
        grid: &Coefficients,
        x: &[f32],
        y: &mut [f32],
    ) -> usize {
        let x: [&[f32]; N] = std::array::from_fn(|i| &x[i * self.columns..][..self.columns]);
        let tables = tables(x);
        let sums: Vec<[f32; N]> = (0..self.columns.div_ceil(grid.part))
            .map(|part| x.map(|x| block::sum(&x[part * grid.part..][..grid.part])))
            .collect();
        let job = block::Job { planes: self, grid, tables: &tables, sums: &sums };
        let mut blocks = vec![[[0.0; LANES]; N]; self.rows.div_ceil(LANES)];
        let fill =
            |(index, block): (usize, &mut [[f32; LANES]; N])| *block = job.block(level, index);
        if self.words.len() * N < SERIAL {
            blocks.iter_mut().enumerate().for_each(fill);
        } else {
            blocks.par_iter_mut().enumerate().for_each(fill);
        }
        for (block, first) in blocks.iter().zip((0..).step_by(LANES)) {
            let rows = LANES.min(self.rows - first);
            for (i, block) in block.iter().enumerate() {
                y[i * self.rows + first..][..rows].copy_from_slice(&block[..rows]);
            }
        }
        N
    }
}

/// Up to eight indices of one row and plane.
fn indices(codes: &[u8], plane: usize) -> u32 {
    let mut signs = 0;
    for (place, code) in codes.iter().enumerate() {
        signs |= u32::from(code >> plane & 1) << place;
    }
    // Where the fourth sign is a plus, the other three are turned over.
    signs ^ ((signs >> 3 & 0x1111_1111) * 7)
}

impl Coefficients {
    /// The grid of `coded`.
    pub(crate) fn of(coded: &Coded<'_>) -> Self {
        let (rows, columns) = (coded.codes.rows(), coded.codes.columns());
        let part = coded.group_len.min(columns);
        let parts = columns / part.max(1);
        let scales = coded.scale.len() / coded.shift.len().max(1);
        let middle = f32::from((1u16 << coded.codes.bits()) - 1) / 2.0;
        let width = scales + 1;
        let mut values = vec![[0.0; LANES]; rows.div_ceil(LANES) * parts * width];
        for row in 0..rows {
            let values = &mut values[row / LANES * parts * width..][..parts * width];
            for (index, values) in values.chunks_exact_mut(width).enumerate() {
                let group = coded.group(row, index);
                let (scale, shift) = (&coded.scale[group * scales..][..scales], coded.shift[group]);
                for (value, scale) in values.iter_mut().zip(scale) {
                    value[row % LANES] = *scale;
                }
                values[scales][row % LANES] = match coded.kind {
                    CodedKind::Uniform => scale[0] * (middle - shift),
                    CodedKind::BinaryCoding | CodedKind::Codebook(_) => shift,
                };
            }
        }
        Self { values, kind: coded.kind, scales, part }
    }
}

/// The tables of `N` activations, those of one chunk beside each other; zeros behind the last input.
fn tables<const N: usize>(x: [&[f32]; N]) -> Vec<[Table; N]> {
    let columns = x.first().map_or(0, |x| x.len());
    let mut tables = vec![[[0.0; LANES]; N]; columns.div_ceil(WORD) * CHUNKS];
    for (i, x) in x.into_iter().enumerate() {
        let (whole, rest) = x.as_chunks::<CHUNK>();
        for (table, x) in tables.iter_mut().zip(whole) {
            table[i] = table_of(*x);
        }
        if !rest.is_empty() {
            let mut last = [0.0; CHUNK];
            last[..rest.len()].copy_from_slice(rest);
            tables[whole.len()][i] = table_of(last);
        }
    }
    tables
}

/// The sums of `±x0 ±x1 ±x2 - x3`, bit `i` of an entry's place being the sign of `xi`, and their
/// negatives.
#[inline]
fn table_of([x0, x1, x2, x3]: [f32; CHUNK]) -> Table {
    let mut table = [0.0; LANES];
    for (place, entry) in table[..LANES / 2].iter_mut().enumerate() {
        let signed = |x: f32, bit: usize| if place >> bit & 1 == 1 { x } else { -x };
        *entry = (signed(x0, 0) + signed(x1, 1)) + (signed(x2, 2) - x3);
    }
    for place in 0..LANES / 2 {
        table[LANES / 2 + place] = -table[place];
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_holds_every_sum_of_signs() {
        let x = [1.0, 2.0, -1.0, 0.5];
        let table = table_of(x);
        for signs in 0..16u32 {
            let exact: f32 = (0..4).map(|i| if signs >> i & 1 == 1 { x[i] } else { -x[i] }).sum();
            let codes: Vec<u8> = (0..4).map(|i| (signs >> i & 1) as u8).collect();
            let index = indices(&codes, 0) & 15;
            assert!((table[index as usize] - exact).abs() < 1e-6, "{signs:04b}");
        }
    }

    /// Codes with every value, and a grid whose products are exact in f32 for inputs in eighths.
    struct Case {
        codes: PackedCodes,
        group_len: usize,
        kind: CodedKind,
        scale: Vec<f32>,
        shift: Vec<f32>,
    }

    impl Case {
        fn new([rows, columns]: [usize; 2], group_len: usize, bits: u8, kind: CodedKind) -> Self {
            let value = |i: usize, modulus: usize| (i.wrapping_mul(2_654_435_761) >> 7) % modulus;
            let codes: Vec<u8> = (0..rows * columns).map(|i| value(i, 1 << bits) as u8).collect();
            let groups = rows * columns / group_len;
            let planes = if kind == CodedKind::Uniform { 1 } else { usize::from(bits) };
            Self {
                codes: PackedCodes::pack(&codes, columns, bits),
                group_len,
                kind,
                scale: (0..groups * planes).map(|i| (value(i, 5) + 1) as f32 / 4.0).collect(),
                shift: (0..groups).map(|i| value(i, 7) as f32 - 2.5).collect(),
            }
        }

        fn coded(&self) -> Coded<'_> {
            let Self { codes, group_len, kind, scale, shift } = self;
            Coded { codes, group_len: *group_len, kind: *kind, scale, shift }
        }
    }

    #[test]
    fn products_are_those_of_the_decoded_weights_at_every_level() {
        for kind in [CodedKind::Uniform, CodedKind::BinaryCoding] {
            for bits in [1, 2, 3, 4, 8] {
                for ([rows, columns], group_len) in [
                    ([3, 7], 7),     // rows that fill no register, columns that fill no table
                    ([16, 32], 32),  // exactly one block and word
                    ([21, 96], 32),  // a rest of rows
                    ([40, 80], 16),  // groups of half a word
                    ([17, 60], 20),  // groups that end inside words
                    ([6, 33], 198),  // one group for all rows
                    ([33, 1028], 4), // a table to a group
                ] {
                    let case = Case::new([rows, columns], group_len, bits, kind);
                    let (planes, grid) = (Planes::of(&case.codes), Coefficients::of(&case.coded()));
                    let weight = case.coded().weight();
                    for n in [1, 2, 3, 4, 7] {
                        let x: Vec<f32> =
                            (0..n * columns).map(|i| ((i * 31) % 13) as f32 / 8.0 - 0.75).collect();
                        let found = planes.times_at(Level::Portable, &grid, &x, n);
                        for (i, found) in found.iter().enumerate() {
                            let x = &x[i / rows * columns..][..columns];
                            let weight = &weight[i % rows * columns..][..columns];
                            let terms = || x.iter().zip(weight).map(|(x, w)| f64::from(x * w));
                            let (exact, size): (f64, f64) =
                                (terms().sum(), terms().map(f64::abs).sum());
                            let error = (f64::from(*found) - exact).abs();
                            assert!(error <= 1e-6 * size, "{found} for {exact}");
                        }
                        for level in Level::available() {
                            let other = planes.times_at(level, &grid, &x, n);
                            let same = other
                                .iter()
                                .map(|x| x.to_bits())
                                .eq(found.iter().map(|x| x.to_bits()));
                            assert!(
                                same,
                                "{level:?}, {kind:?}, {bits} bits, {rows} x {columns}, n {n}"
                            );
                        }
                    }
                }
            }
        }
    }
}
