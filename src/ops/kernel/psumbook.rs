//! Products of few activations with codes of codebooks, on the codes: CodeGEMM (arXiv 2512.17970).
//!
//! The inner product of every centroid with every run of an activation, the Psumbook, is made once for each
//! activation; a row of the matrix then only looks its codes up in it: an addition for each code in the place
//! of a multiplication for each weight. The Psumbook of a group at a time stays in the first cache for a run of
//! rows. All instruction sets add the same numbers in the same order and so give the same bits.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::coded::Coded;
use crate::ops::additive::Additive;
use crate::ops::coded::PackedCodes;
use crate::ops::vector::{Level, at};

/// Rows that a task computes: few enough for every thread to have some.
const ROWS: usize = 32;
/// Sums of a row that are independent of each other.
const SUMS: usize = 4;
/// Codes below which the work of other threads costs more than it saves: they are [awake](crate::ops::awake).
const SERIAL: usize = 1 << 11;

/// Codes a byte each, `[rows, codes of a row]`.
#[derive(Clone, Debug)]
pub(crate) struct Codes {
    bytes: Vec<u8>,
    rows: usize,
    /// Centroids of a codebook.
    centroids: usize,
}

/// Scales and codebooks in the order in which a product reads them.
#[derive(Clone, Debug)]
pub(crate) struct Books {
    additive: Additive,
    /// `[books, vector, centroids]`.
    columns: Vec<f32>,
    /// `[rows, groups]`.
    scale: Vec<f32>,
    group_len: usize,
}

impl Codes {
    pub(crate) fn of(codes: &PackedCodes) -> Self {
        let centroids = 1 << codes.bits();
        Self { bytes: codes.to_vec(), rows: codes.rows(), centroids }
    }
}

impl Books {
    /// The grid of `coded`, whose groups lie within rows.
    pub(crate) fn of(coded: &Coded<'_>, additive: Additive) -> Self {
        let Additive { books, vector } = additive;
        let each = coded.shift.len() / books;
        let centroids = each / vector;
        let column = |at: usize| {
            let (book, t, k) = (at / each, at % each / centroids, at % centroids);
            coded.shift[book * each + k * vector + t]
        };
        let columns = (0..coded.shift.len()).map(column).collect();
        Self { additive, columns, scale: coded.scale.to_vec(), group_len: coded.group_len }
    }
}

/// The Psumbook of one activation: `[inputs / vector, books, centroids]`.
#[cfg(test)]
fn psumbook(codes: &Codes, books: &Books, x: &[f32]) -> Vec<f32> {
    psumbook_at(Level::best(), codes, books, x)
}

fn psumbook_at(level: Level, codes: &Codes, books: &Books, x: &[f32]) -> Vec<f32> {
    let Additive { books: count, vector } = books.additive;
    let mut sums = vec![0.0; x.len() / vector * count * codes.centroids];
    at!(level, fill(&mut sums, &books.columns, x, (vector, codes.centroids)));
    sums
}

#[inline(always)]
fn fill(sums: &mut [f32], columns: &[f32], x: &[f32], (vector, centroids): (usize, usize)) {
    let count = columns.len() / vector;
    for (sums, x) in sums.chunks_exact_mut(count).zip(x.chunks_exact(vector)) {
        let books = columns.chunks_exact(vector * centroids);
        for (sums, columns) in sums.chunks_exact_mut(centroids).zip(books) {
            for (t, (column, x)) in columns.chunks_exact(centroids).zip(x).enumerate() {
                for (sum, value) in sums.iter_mut().zip(column) {
                    let term = value * x;
                    *sum = if t == 0 { term } else { *sum + term };
                }
            }
        }
    }
}

impl Codes {
    /// `x Wᵀ` of activations, `[n, inputs]`: `[n, rows]`.
    pub(crate) fn times(&self, books: &Books, x: &[f32], n: usize) -> Vec<f32> {
        self.times_at(Level::best(), books, x, n)
    }

    fn times_at(&self, level: Level, books: &Books, x: &[f32], n: usize) -> Vec<f32> {
        let mut y = vec![0.0; n * self.rows];
        let rows = y.chunks_exact_mut(self.rows.max(1)).zip(x.chunks_exact(x.len() / n.max(1)));
        for (y, x) in rows {
            let sums = psumbook_at(level, self, books, x);
            let task = |(index, y): (usize, &mut [f32])| {
                at!(level, self.rows_of(books, &sums, index * ROWS, y));
            };
            if self.bytes.len() < SERIAL {
                y.chunks_mut(ROWS).enumerate().for_each(task);
            } else {
                y.par_chunks_mut(ROWS).enumerate().for_each(task);
            }
        }
        y
    }

    /// Rows from `first` on.
    #[inline(always)]
    fn rows_of(&self, books: &Books, sums: &[f32], first: usize, y: &mut [f32]) {
        let codes = self.bytes.len() / self.rows.max(1);
        let group = books.additive.codes(books.group_len);
        let groups = codes / group;
        for (index, sums) in sums.chunks_exact(group * self.centroids).enumerate() {
            for (row, y) in (first..).zip(y.iter_mut()) {
                let codes = &self.bytes[row * codes + index * group..][..group];
                let sum = match self.centroids {
                    // Of a known size, so that no place needs to be checked.
                    256 => looked_up::<256>(codes, sums),
                    16 => looked_up::<16>(codes, sums),
                    centroids => any_looked_up(codes, sums, centroids),
                };
                *y += books.scale[row * groups + index] * sum;
            }
        }
    }
}

#[inline(always)]
fn looked_up<const CENTROIDS: usize>(codes: &[u8], sums: &[f32]) -> f32 {
    let (tables, _) = sums.as_chunks::<CENTROIDS>();
    let mut totals = [0.0f32; SUMS];
    let (fours, rest) = codes.as_chunks::<SUMS>();
    let (tables_of_fours, tables_of_rest) = tables.split_at(fours.len() * SUMS);
    for (codes, tables) in fours.iter().zip(tables_of_fours.as_chunks::<SUMS>().0) {
        for ((total, code), table) in totals.iter_mut().zip(codes).zip(tables) {
            *total += table[usize::from(*code) % CENTROIDS];
        }
    }
    for ((total, code), table) in totals.iter_mut().zip(rest).zip(tables_of_rest) {
        *total += table[usize::from(*code) % CENTROIDS];
    }
    (totals[0] + totals[1]) + (totals[2] + totals[3])
}

#[inline(always)]
fn any_looked_up(codes: &[u8], sums: &[f32], centroids: usize) -> f32 {
    let mut totals = [0.0f32; SUMS];
    for (place, (code, table)) in codes.iter().zip(sums.chunks_exact(centroids)).enumerate() {
        totals[place % SUMS] += table[usize::from(*code)];
    }
    (totals[0] + totals[1]) + (totals[2] + totals[3])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::coded::CodedKind;

    /// `codes` of `bits` in rows of so many, and a grid of these scales and codebooks.
    fn product(
        (codes, columns, bits): (&[u8], usize, u8),
        (scale, group_len): (&[f32], usize),
        (books, additive): (&[f32], Additive),
        (x, n): (&[f32], usize),
    ) -> (Vec<f32>, Vec<f32>) {
        let packed = PackedCodes::pack(codes, columns, bits);
        let kind = CodedKind::Codebook(additive);
        let held = Coded { codes: &packed, group_len, kind, scale, shift: books };
        let (codes, books) = (Codes::of(&packed), Books::of(&held, additive));
        let found = codes.times(&books, x, n);
        for level in Level::available() {
            let other = codes.times_at(level, &books, x, n);
            assert!(other.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits()), "{level:?}");
        }
        (found, held.weight())
    }

    #[test]
    fn psumbook_toy() {
        let additive = Additive { books: 1, vector: 2 };
        let books = [1.0, 0.0, 0.5, -0.5];
        let packed = PackedCodes::pack(&[1], 1, 1);
        let kind = CodedKind::Codebook(additive);
        let held = Coded { codes: &packed, group_len: 2, kind, scale: &[3.0], shift: &books };
        let (codes, grid) = (Codes::of(&packed), Books::of(&held, additive));
        assert_eq!(psumbook(&codes, &grid, &[2.0, 4.0]), [2.0, -1.0]);
        assert_eq!(codes.times(&grid, &[2.0, 4.0], 1), [-3.0]);
    }

    #[test]
    fn psumbook_equals_dense() {
        for (bits, additive, [rows, inputs], group_len) in [
            (8, Additive { books: 1, vector: 4 }, [37, 64], 32),
            (8, Additive { books: 2, vector: 8 }, [16, 96], 96),
            (4, Additive { books: 2, vector: 4 }, [5, 20], 4),
            (3, Additive { books: 3, vector: 3 }, [70, 27], 9),
            (8, Additive { books: 1, vector: 4 }, [300, 512], 128),
        ] {
            let value = |i: usize, modulus: usize| (i.wrapping_mul(2_654_435_761) >> 7) % modulus;
            let columns = additive.codes(inputs);
            let codes: Vec<u8> = (0..rows * columns).map(|i| value(i, 1 << bits) as u8).collect();
            let numbers = (additive.books * additive.vector) << bits;
            let books: Vec<f32> = (0..numbers).map(|i| value(i, 31) as f32 / 8.0 - 2.0).collect();
            let groups = rows * inputs / group_len;
            let scale: Vec<f32> = (0..groups).map(|i| (value(i, 5) + 1) as f32 / 4.0).collect();
            for n in [1, 3] {
                let x: Vec<f32> =
                    (0..n * inputs).map(|i| value(i, 13) as f32 / 8.0 - 0.7).collect();
                let (found, weight) = product(
                    (&codes, columns, bits),
                    (&scale, group_len),
                    (&books, additive),
                    (&x, n),
                );
                for (i, found) in found.iter().enumerate() {
                    let x = &x[i / rows * inputs..][..inputs];
                    let weight = &weight[i % rows * inputs..][..inputs];
                    let terms = || x.iter().zip(weight).map(|(x, w)| f64::from(x * w));
                    let (exact, size): (f64, f64) = (terms().sum(), terms().map(f64::abs).sum());
                    assert!(
                        (f64::from(*found) - exact).abs() <= 1e-6 * size,
                        "{found} for {exact}"
                    );
                }
            }
        }
    }
}
