//! Products with a matrix of packed codes, and the gradient of its grid. A few rows of weights at a
//! time exist as floats: the codes stay packed, and no matrix of gradients is ever whole.
//!
//! The stored matrix `S` is `[rows, columns]`, its groups run along the rows (a group may also span
//! several whole rows). Each parameter of a group is a column of `scale`, `[groups, planes]`, or the
//! one of `shift`, `[groups]`.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set
#![allow(clippy::many_single_char_names)] // n, a and b of matrix products

use std::ops::Range;

use faer::{Accum, MatMut, MatRef};
use rayon::iter::{IndexedParallelIterator, IntoParallelRefMutIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::linear::multiply;
use super::{min_tasks, parallel};
use crate::ops::additive::Additive;
use crate::ops::coded::{CodedKind, PackedCodes};
use crate::ops::vector::{self, Level, at};

/// Weights that exist as floats at once.
const TILE: usize = 1 << 20;

/// Codes on a grid.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Coded<'a> {
    /// `[rows, columns]`.
    pub codes: &'a PackedCodes,
    /// Weights in a group.
    pub group_len: usize,
    /// What the grid is.
    pub kind: CodedKind,
    /// Steps, `[groups, 1]`, or scales of the planes, `[groups, bits]`.
    pub scale: &'a [f32],
    /// Zero points or offsets, `[groups]`; or codebooks, `[books, centroids, vector]`.
    pub shift: &'a [f32],
}

/// Gradients of a grid, laid out as the grid is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct GridGradient {
    /// Of `scale`.
    pub scale: Vec<f32>,
    /// Of `shift`; zeros on a uniform grid, whose zero points are frozen.
    pub shift: Vec<f32>,
}

impl Coded<'_> {
    /// The weights, `[rows, columns]`.
    pub(crate) fn weight(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.codes.rows() * self.columns()];
        self.fill(0, &mut out, Level::best());
        out
    }

    /// `A Sᵀ`: `[n, columns]` to `[n, rows]`.
    pub(crate) fn times_transposed(&self, a: &[f32], n: usize) -> Vec<f32> {
        let (rows, columns) = (self.codes.rows(), self.columns());
        let mut out = vec![0.0; n * rows];
        let a = MatRef::from_row_major_slice(a, n, columns);
        self.tiles(|range, tile| {
            let weight = MatRef::from_row_major_slice(tile, range.len(), columns);
            let to = MatMut::from_row_major_slice_mut(&mut out, n, rows);
            let to = to.subcols_mut(range.start, range.len());
            multiply(to, Accum::Replace, a, weight.transpose());
        });
        out
    }

    /// `B S`: `[n, rows]` to `[n, columns]`.
    pub(crate) fn times(&self, b: &[f32], n: usize) -> Vec<f32> {
        let (rows, columns) = (self.codes.rows(), self.columns());
        let mut out = vec![0.0; n * columns];
        let b = MatRef::from_row_major_slice(b, n, rows);
        self.tiles(|range, tile| {
            let weight = MatRef::from_row_major_slice(tile, range.len(), columns);
            let to = MatMut::from_row_major_slice_mut(&mut out, n, columns);
            let accum = if range.start == 0 { Accum::Replace } else { Accum::Add };
            multiply(to, accum, b.subcols(range.start, range.len()), weight);
        });
        out
    }

    /// The gradient of the grid, when that of the weights is `leftᵀ right`.
    ///
    /// # Shapes
    /// - left: `[n, rows]`
    /// - right: `[n, columns]`
    pub(crate) fn grid_gradient(&self, left: &[f32], right: &[f32], n: usize) -> GridGradient {
        self.grid_gradient_at(Level::best(), left, right, n)
    }

    fn grid_gradient_at(
        &self,
        level: Level,
        left: &[f32],
        right: &[f32],
        n: usize,
    ) -> GridGradient {
        if let CodedKind::Codebook(additive) = self.kind {
            return self.codebook_gradient(additive, left, right, n);
        }
        let (rows, columns) = (self.codes.rows(), self.columns());
        // Of a row and the part of a group in it: every plane's sum, and the plain sum.
        let width = self.planes() + 1;
        let parts = columns.div_ceil(self.group_len);
        let mut sums = vec![0.0f64; rows * parts * width];
        let left = MatRef::from_row_major_slice(left, n, rows);
        let right = MatRef::from_row_major_slice(right, n, columns);
        let tile_rows = self.tile_rows();
        let mut gradient = vec![0.0; tile_rows * columns];
        for start in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - start);
            let gradient = &mut gradient[..count * columns];
            let to = MatMut::from_row_major_slice_mut(gradient, count, columns);
            let from = left.subcols(start, count).transpose();
            multiply(to, Accum::Replace, from, right);
            let sums = &mut sums[start * parts * width..][..count * parts * width];
            sums.par_chunks_exact_mut(parts * width)
                .zip(gradient.par_chunks_exact(columns))
                .enumerate()
                .with_min_len(min_tasks(count * columns))
                .for_each(|(row, (sums, gradient))| {
                    self.row_sums(level, start + row, gradient, sums);
                });
        }
        self.gathered(&sums, parts, width)
    }

    /// The sums of one row's gradient that its groups need.
    fn row_sums(&self, level: Level, row: usize, gradient: &[f32], sums: &mut [f64]) {
        let columns = self.codes.columns();
        let mut codes = vec![0u8; columns];
        self.codes.unpack_row(row, &mut codes);
        let len = self.group_len.min(columns);
        let groups = codes.chunks_exact(len).zip(gradient.chunks_exact(len));
        for (part, (sums, (codes, gradient))) in
            sums.chunks_exact_mut(self.planes() + 1).zip(groups).enumerate()
        {
            match self.kind {
                CodedKind::Uniform => {
                    let zero = self.shift[self.group(row, part)];
                    sums[0] = at!(level, centered_dot(gradient, codes, zero));
                }
                CodedKind::BinaryCoding => at!(level, signed_sums(gradient, codes, sums)),
                CodedKind::Codebook(_) => {}
            }
        }
    }

    /// Sums of rows and parts as gradients of groups.
    fn gathered(&self, sums: &[f64], parts: usize, width: usize) -> GridGradient {
        let planes = self.planes();
        let groups = self.shift.len();
        let mut totals = vec![0.0f64; groups * width];
        for (index, sums) in sums.chunks_exact(width).enumerate() {
            let group = self.group(index / parts, index % parts);
            for (total, sum) in totals[group * width..][..width].iter_mut().zip(sums) {
                *total += sum;
            }
        }
        let mut found =
            GridGradient { scale: Vec::with_capacity(groups * planes), shift: Vec::new() };
        for totals in totals.chunks_exact(width) {
            found.scale.extend(totals[..planes].iter().map(|sum| *sum as f32));
            found.shift.push(totals[planes] as f32);
        }
        found
    }

    /// Calls `use_tile` with every run of rows and its weights, from the first to the last.
    fn tiles(&self, mut use_tile: impl FnMut(Range<usize>, &[f32])) {
        let (rows, columns) = (self.codes.rows(), self.columns());
        let tile_rows = self.tile_rows();
        let mut tile = vec![0.0; tile_rows * columns];
        for start in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - start);
            let tile = &mut tile[..count * columns];
            self.fill(start, tile, Level::best());
            use_tile(start..start + count, tile);
        }
    }

    /// Rows in a tile: a function of the shape alone, so that results are too.
    fn tile_rows(&self) -> usize {
        let rows = self.codes.rows();
        let fit = TILE / self.columns().max(1);
        if fit >= rows { rows.max(1) } else { (fit / 16 * 16).max(16).min(rows) }
    }

    /// The weights of the rows from `start` on.
    fn fill(&self, start: usize, out: &mut [f32], level: Level) {
        let columns = self.columns();
        let row = |codes: &mut Vec<u8>, (row, out): (usize, &mut [f32])| {
            codes.resize(self.codes.columns(), 0);
            self.codes.unpack_row(start + row, codes);
            self.fill_row(level, start + row, codes, out);
        };
        if parallel(out.len()) {
            out.par_chunks_exact_mut(columns).enumerate().for_each_init(Vec::new, row);
        } else {
            let mut codes = Vec::new();
            out.chunks_exact_mut(columns).enumerate().for_each(|next| row(&mut codes, next));
        }
    }

    fn fill_row(&self, level: Level, row: usize, codes: &[u8], out: &mut [f32]) {
        let len = self.group_len.min(self.columns());
        let planes = self.planes();
        if let CodedKind::Codebook(additive) = self.kind {
            additive.sums(codes, self.shift, out);
            for (part, out) in out.chunks_exact_mut(len).enumerate() {
                let scale = self.scale[self.group(row, part)];
                for value in out {
                    *value *= scale;
                }
            }
            return;
        }
        for (part, (codes, out)) in
            codes.chunks_exact(len).zip(out.chunks_exact_mut(len)).enumerate()
        {
            let group = self.group(row, part);
            let (scale, shift) = (&self.scale[group * planes..][..planes], self.shift[group]);
            match self.kind {
                CodedKind::Uniform => at!(level, uniform(out, codes, scale[0], shift)),
                CodedKind::BinaryCoding => at!(level, signed(out, codes, scale, shift)),
                CodedKind::Codebook(_) => {}
            }
        }
    }

    /// Weights in a row.
    fn columns(&self) -> usize {
        self.kind.weights(self.codes.columns())
    }

    /// [`Coded::grid_gradient`] of codebooks: what belongs to a centroid is added up in parts of as many rows, so
    /// that the order of sums is a function of the shape alone.
    fn codebook_gradient(
        &self,
        additive: Additive,
        left: &[f32],
        right: &[f32],
        n: usize,
    ) -> GridGradient {
        const ROWS: usize = 64;
        let (rows, columns) = (self.codes.rows(), self.columns());
        let left = MatRef::from_row_major_slice(left, n, rows);
        let right = MatRef::from_row_major_slice(right, n, columns);
        let tile_rows = self.tile_rows();
        let mut gradient = vec![0.0; tile_rows * columns];
        let mut scale = vec![0.0f64; self.scale.len()];
        let mut books = vec![0.0f64; self.shift.len()];
        for start in (0..rows).step_by(tile_rows) {
            let count = tile_rows.min(rows - start);
            let gradient = &mut gradient[..count * columns];
            let to = MatMut::from_row_major_slice_mut(gradient, count, columns);
            multiply(to, Accum::Replace, left.subcols(start, count).transpose(), right);
            let parts: Vec<(Vec<f64>, Vec<f64>)> = gradient
                .par_chunks(ROWS * columns)
                .enumerate()
                .map(|(part, gradient)| {
                    let first = start + part * ROWS;
                    self.codebook_part(additive, first, gradient)
                })
                .collect();
            for (part, (of_scale, of_books)) in parts.into_iter().enumerate() {
                let first = self.group(start + part * ROWS, 0);
                for (sum, part) in scale[first..].iter_mut().zip(of_scale) {
                    *sum += part;
                }
                for (sum, part) in books.iter_mut().zip(of_books) {
                    *sum += part;
                }
            }
        }
        let short = |sums: Vec<f64>| sums.into_iter().map(|sum| sum as f32).collect();
        GridGradient { scale: short(scale), shift: short(books) }
    }

    /// What some rows' gradient gives: of the scales of their groups, and of the codebooks.
    fn codebook_part(
        &self,
        additive: Additive,
        first: usize,
        gradient: &[f32],
    ) -> (Vec<f64>, Vec<f64>) {
        let (columns, Additive { books: count, vector }) = (self.columns(), additive);
        let (len, each) = (self.group_len.min(columns), self.shift.len() / count);
        let mut codes = vec![0; self.codes.columns()];
        let mut sums = vec![0.0; columns];
        let mut of_scale = Vec::with_capacity(gradient.len() / len);
        let mut of_books = vec![0.0; self.shift.len()];
        for (row, gradient) in (first..).zip(gradient.chunks_exact(columns)) {
            self.codes.unpack_row(row, &mut codes);
            additive.sums(&codes, self.shift, &mut sums);
            let groups = gradient.chunks_exact(len).zip(sums.chunks_exact(len));
            of_scale.extend(groups.map(|(gradient, sums)| vector::dot(gradient, sums)));
            let runs = gradient.chunks_exact(vector).zip(codes.chunks_exact(count)).enumerate();
            for (run, (gradient, codes)) in runs {
                let scale = self.scale[self.group(row, run * vector / len)];
                for (book, code) in codes.iter().enumerate() {
                    let at = book * each + usize::from(*code) * vector;
                    for (sum, gradient) in of_books[at..][..vector].iter_mut().zip(gradient) {
                        *sum += f64::from(scale * gradient);
                    }
                }
            }
        }
        (of_scale, of_books)
    }

    fn planes(&self) -> usize {
        match self.kind {
            CodedKind::Uniform | CodedKind::Codebook(_) => 1,
            CodedKind::BinaryCoding => usize::from(self.codes.bits()),
        }
    }

    /// The group of the `part`th run of a row.
    pub(super) fn group(&self, row: usize, part: usize) -> usize {
        let columns = self.columns();
        (row * columns + part * self.group_len.min(columns)) / self.group_len
    }
}

/// `Σ_n a[n, j] b[n, j]` of every column, `[columns]`.
pub(crate) fn column_dots(a: &[f32], b: &[f32], columns: usize) -> Vec<f32> {
    /// Columns that one task takes, wide enough for whole cache lines.
    const RUN: usize = 64;
    let mut out = vec![0.0; columns];
    let run = |(index, out): (usize, &mut [f32])| {
        let mut sums = [0.0f64; RUN];
        let sums = &mut sums[..out.len()];
        for (a, b) in a.chunks_exact(columns).zip(b.chunks_exact(columns)) {
            let from = index * RUN;
            for ((sum, a), b) in sums.iter_mut().zip(&a[from..]).zip(&b[from..]) {
                *sum += f64::from(a * b);
            }
        }
        for (out, sum) in out.iter_mut().zip(sums) {
            *out = *sum as f32;
        }
    };
    if parallel(a.len()) {
        out.par_chunks_mut(RUN).enumerate().for_each(run);
    } else {
        out.chunks_mut(RUN).enumerate().for_each(run);
    }
    out
}

/// Divides each of `values` by the step it belongs to.
pub(crate) fn divide(values: &mut [f32], by: &[f32]) {
    values.par_iter_mut().with_min_len(4096).zip(by).for_each(|(value, by)| *value /= by);
}

#[inline(always)]
fn uniform(out: &mut [f32], codes: &[u8], scale: f32, zero: f32) {
    for (out, code) in out.iter_mut().zip(codes) {
        *out = scale * (f32::from(*code) - zero);
    }
}

/// The order of the additions is the format's.
#[inline(always)]
fn signed(out: &mut [f32], codes: &[u8], alpha: &[f32], offset: f32) {
    for (plane, alpha) in alpha.iter().enumerate() {
        for (out, code) in out.iter_mut().zip(codes) {
            // The sign bit of alpha, turned over where the plane's bit is 0.
            let flip = (u32::from(!*code >> plane) & 1) << 31;
            let term = f32::from_bits(alpha.to_bits() ^ flip);
            *out = if plane == 0 { term } else { *out + term };
        }
    }
    for out in out {
        *out += offset;
    }
}

/// `Σ gradient (code - zero)`.
#[inline(always)]
fn centered_dot(gradient: &[f32], codes: &[u8], zero: f32) -> f64 {
    const RUN: usize = 256;
    let mut total = 0.0;
    let mut centered = [0.0f32; RUN];
    for (gradient, codes) in gradient.chunks(RUN).zip(codes.chunks(RUN)) {
        let centered = &mut centered[..codes.len()];
        for (centered, code) in centered.iter_mut().zip(codes) {
            *centered = f32::from(*code) - zero;
        }
        total += vector::dot(gradient, centered);
    }
    total
}

/// `Σ gradient (±1)` of every plane, then `Σ gradient`.
#[inline(always)]
fn signed_sums(gradient: &[f32], codes: &[u8], sums: &mut [f64]) {
    const RUN: usize = 256;
    let mut turned = [0.0f32; RUN];
    let (planes, plain) = sums.split_at_mut(sums.len() - 1);
    plain[0] = vector::sum(gradient);
    for (plane, sum) in planes.iter_mut().enumerate() {
        let mut total = 0.0;
        for (gradient, codes) in gradient.chunks(RUN).zip(codes.chunks(RUN)) {
            let turned = &mut turned[..codes.len()];
            for ((turned, gradient), code) in turned.iter_mut().zip(gradient).zip(codes) {
                let flip = (u32::from(!*code >> plane) & 1) << 31;
                *turned = f32::from_bits(gradient.to_bits() ^ flip);
            }
            total += vector::sum(turned);
        }
        *sum = total;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Case {
        codes: PackedCodes,
        group_len: usize,
        kind: CodedKind,
        scale: Vec<f32>,
        shift: Vec<f32>,
        plain: Vec<u8>,
    }

    impl Case {
        fn new([rows, columns]: [usize; 2], group_len: usize, bits: u8, kind: CodedKind) -> Self {
            let mut state = 7u32;
            let mut next = move || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state >> 8
            };
            let plain: Vec<u8> =
                (0..rows * columns).map(|_| (next() % (1 << bits)) as u8).collect();
            let codes = PackedCodes::pack(&plain, columns, bits);
            let groups = rows * columns / group_len;
            let planes = if kind == CodedKind::Uniform { 1 } else { usize::from(bits) };
            let scale = (0..groups * planes).map(|_| (next() % 97 + 1) as f32 / 64.0).collect();
            let shift = (0..groups).map(|_| (next() % 7) as f32 - 2.0).collect();
            Self { codes, group_len, kind, scale, shift, plain }
        }

        fn coded(&self) -> Coded<'_> {
            let Self { codes, group_len, kind, scale, shift, .. } = self;
            Coded { codes, group_len: *group_len, kind: *kind, scale, shift }
        }

        fn sign(code: u8, plane: usize) -> f32 {
            if code >> plane & 1 == 1 { 1.0 } else { -1.0 }
        }

        fn value(&self, i: usize) -> f32 {
            let (code, group) = (self.plain[i], i / self.group_len);
            match self.kind {
                CodedKind::Uniform => self.scale[group] * (f32::from(code) - self.shift[group]),
                CodedKind::BinaryCoding | CodedKind::Codebook(_) => {
                    let planes = self.scale.len() / self.shift.len();
                    let alpha = &self.scale[group * planes..][..planes];
                    let terms = alpha.iter().enumerate().map(|(p, a)| Self::sign(code, p) * a);
                    terms.reduce(|sum, term| sum + term).unwrap() + self.shift[group]
                }
            }
        }
    }

    fn cases() -> Vec<Case> {
        let mut cases = Vec::new();
        for kind in [CodedKind::Uniform, CodedKind::BinaryCoding] {
            for bits in [1, 2, 3, 4, 5, 8] {
                for (shape, group_len) in
                    [([3, 7], 7), ([5, 96], 32), ([4, 40], 10), ([6, 33], 198), ([8, 64], 64)]
                {
                    cases.push(Case::new(shape, group_len, bits, kind));
                }
            }
        }
        cases
    }

    fn wave(len: usize, seed: usize) -> Vec<f32> {
        // Eighths, so that every sum of products is exact in f32.
        (0..len).map(|i| ((i * 31 + seed * 17) % 13) as f32 / 8.0 - 0.75).collect()
    }

    #[test]
    fn weights_are_the_formulas_at_every_level() {
        for case in cases() {
            let expected: Vec<f32> = (0..case.plain.len()).map(|i| case.value(i)).collect();
            assert_eq!(case.coded().weight(), expected);
            for level in Level::available() {
                let mut out = vec![0.0; expected.len()];
                case.coded().fill(0, &mut out, level);
                assert_eq!(out, expected, "{level:?}");
            }
        }
    }

    #[test]
    fn products_and_gradients_are_the_dense_ones() {
        const N: usize = 5;
        for case in cases() {
            let (rows, columns) = (case.codes.rows(), case.codes.columns());
            let weight = case.coded().weight();
            let (a, b) = (wave(N * columns, 1), wave(N * rows, 2));
            let close = |found: &[f32], expected: &dyn Fn(usize) -> f64| {
                for (i, found) in found.iter().enumerate() {
                    let expected = expected(i);
                    assert!(
                        (f64::from(*found) - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                        "{found} for {expected}"
                    );
                }
            };
            let dot = |a: &dyn Fn(usize) -> f32, b: &dyn Fn(usize) -> f32, n: usize| -> f64 {
                (0..n).map(|i| f64::from(a(i)) * f64::from(b(i))).sum()
            };
            close(&case.coded().times_transposed(&a, N), &|i| {
                let (n, r) = (i / rows, i % rows);
                dot(&|k| a[n * columns + k], &|k| weight[r * columns + k], columns)
            });
            close(&case.coded().times(&b, N), &|i| {
                let (n, c) = (i / columns, i % columns);
                dot(&|k| b[n * rows + k], &|k| weight[k * columns + c], rows)
            });
            let dense = |i: usize| {
                let (r, c) = (i / columns, i % columns);
                dot(&|n| b[n * rows + r], &|n| a[n * columns + c], N)
            };
            let found = case.coded().grid_gradient(&b, &a, N);
            let len = case.group_len;
            let planes = case.scale.len() / case.shift.len();
            close(&found.scale, &|i| {
                let (group, plane) = (i / planes, i % planes);
                (group * len..(group + 1) * len)
                    .map(|i| {
                        dense(i)
                            * f64::from(match case.kind {
                                CodedKind::Uniform => f32::from(case.plain[i]) - case.shift[group],
                                CodedKind::BinaryCoding | CodedKind::Codebook(_) => {
                                    Case::sign(case.plain[i], plane)
                                }
                            })
                    })
                    .sum()
            });
            if case.kind == CodedKind::BinaryCoding {
                close(&found.shift, &|g| (g * len..(g + 1) * len).map(dense).sum());
            }
            for level in Level::available() {
                assert_eq!(case.coded().grid_gradient_at(level, &b, &a, N), found, "{level:?}");
            }
        }
    }

    #[test]
    fn a_matrix_of_several_tiles_is_the_one_of_its_rows() {
        // 4100 columns: 240 rows to a tile.
        let case = Case::new([500, 4100], 4100, 2, CodedKind::Uniform);
        let weight = case.coded().weight();
        let (a, b) = (wave(2 * 4100, 3), wave(2 * 500, 4));
        let close = |found: &[f32], expected: &[f32]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() <= 1e-4 * (1.0 + expected.abs()));
            }
        };
        let dense = super::super::linear::times_transposed(&a, &weight, [2, 4100, 500]);
        close(&case.coded().times_transposed(&a, 2), &dense);
        close(
            &case.coded().times(&b, 2),
            &super::super::linear::times(&b, &weight, [2, 500, 4100]),
        );
        let gradient = super::super::linear::transposed_times(&b, &a, [500, 2, 4100]);
        let expected: Vec<f32> = (0..500)
            .map(|r| {
                let row = r * 4100..(r + 1) * 4100;
                let zero = case.shift[r];
                row.map(|i| gradient[i] * (f32::from(case.plain[i]) - zero)).sum()
            })
            .collect();
        close(&case.coded().grid_gradient(&b, &a, 2).scale, &expected);
    }

    #[test]
    fn column_sums() {
        let (a, b) = (wave(3 * 130, 5), wave(3 * 130, 6));
        let found = column_dots(&a, &b, 130);
        for (j, found) in found.iter().enumerate() {
            let exact: f32 = (0..3).map(|n| a[n * 130 + j] * b[n * 130 + j]).sum();
            assert!((found - exact).abs() < 1e-6, "{found} {exact}");
        }
    }
}
