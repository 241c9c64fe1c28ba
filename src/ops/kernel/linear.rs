//! Matrix products of row-major slices, by faer: its kernels use every vector width that the
//! machine has, chosen at run time.

#![allow(clippy::many_single_char_names)] // m, k and n are what everybody calls them

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Multiplications below which waking other threads costs more than they save.
const SERIAL: usize = 1 << 19;
/// Columns of the output that its widest kernel takes at once.
const COLUMN_TILE: usize = 96;
/// Rows of the output below which a cut is not worth packing the right operand twice.
const ROW_TILE: usize = 32;

fn rows(values: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, rows, columns)
}

fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let (m, n) = (a.nrows(), b.ncols());
    let mut out = vec![0.0; m * n];
    multiply(MatMut::from_row_major_slice_mut(&mut out, m, n), Accum::Replace, a, b);
    out
}

/// `out (+)= A B`.
pub(super) fn multiply(
    out: MatMut<'_, f32>,
    accumulate: Accum,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
) {
    in_pieces(out, accumulate, a, b, 2 * rayon::current_num_threads());
}

/// As [`multiply`], the output cut into pieces that threads take as they come. The product's own
/// threads meet at a barrier for every block of it, and wait there whenever one of them has lost
/// its core to another program.
fn in_pieces(
    out: MatMut<'_, f32>,
    accumulate: Accum,
    a: MatRef<'_, f32>,
    b: MatRef<'_, f32>,
    pieces: usize,
) {
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    let half = |length: usize, tile: usize| (length / 2).next_multiple_of(tile).min(length);
    let (rows, columns) = (half(m, ROW_TILE), half(n, COLUMN_TILE));
    let pieces = if m * k * n < SERIAL { 1 } else { pieces };
    if pieces > 1 && columns < n && (n >= m || rows == m) {
        let (left, right) = out.split_at_col_mut(columns);
        let (b_left, b_right) = b.split_at_col(columns);
        rayon::join(
            || in_pieces(left, accumulate, a, b_left, pieces / 2),
            || in_pieces(right, accumulate, a, b_right, pieces / 2),
        );
    } else if pieces > 1 && rows < m {
        let (top, bottom) = out.split_at_row_mut(rows);
        let (a_top, a_bottom) = a.split_at_row(rows);
        rayon::join(
            || in_pieces(top, accumulate, a_top, b, pieces / 2),
            || in_pieces(bottom, accumulate, a_bottom, b, pieces / 2),
        );
    } else {
        matmul(out, accumulate, a, b, 1.0, Par::Seq);
    }
}

/// `A B`: `[m, k]` times `[k, n]`.
pub(crate) fn times(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    product(rows(a, m, k), rows(b, k, n))
}

/// `A Bᵀ`: `[m, k]` times the transpose of `[n, k]`.
pub(crate) fn times_transposed(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    product(rows(a, m, k), rows(b, n, k).transpose())
}

/// `Aᵀ B`: the transpose of `[k, m]` times `[k, n]`.
pub(crate) fn transposed_times(a: &[f32], b: &[f32], [m, k, n]: [usize; 3]) -> Vec<f32> {
    product(rows(a, k, m).transpose(), rows(b, k, n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_every_orientation() {
        for [m, k, n] in
            [[1, 1, 1], [3, 5, 2], [17, 33, 9], [130, 64, 128], [700, 40, 130], [3, 99, 3001]]
        {
            let value = |i: usize, seed: usize| ((i * 31 + seed * 17) % 13) as f32 - 6.0;
            let a: Vec<f32> = (0..m * k).map(|i| value(i, 1)).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i, 2)).collect();
            let transposed = |x: &[f32], rows: usize, columns: usize| -> Vec<f32> {
                (0..rows * columns).map(|i| x[i % rows * columns + i / rows]).collect()
            };
            // Small integers: every sum is exact.
            let expected: Vec<f32> = (0..m * n)
                .map(|i| (0..k).map(|j| a[i / n * k + j] * b[j * n + i % n]).sum())
                .collect();
            assert_eq!(times(&a, &b, [m, k, n]), expected);
            assert_eq!(times_transposed(&a, &transposed(&b, k, n), [m, k, n]), expected);
            assert_eq!(transposed_times(&transposed(&a, m, k), &b, [m, k, n]), expected);
        }
    }

    #[test]
    fn every_number_of_threads_gives_the_same_bits() {
        for [m, k, n] in [[1, 576, 1536], [512, 600, 576], [700, 1536, 192], [40, 49, 3000]] {
            let value = |i: usize| ((i as f32 + 0.3) * 12.9898).sin();
            let a: Vec<f32> = (0..m * k).map(value).collect();
            let b: Vec<f32> = (0..k * n).map(|i| value(i + 7)).collect();
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let out = pool.install(|| times_transposed(&a, &b, [m, k, n]));
                out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            assert!(on(1) == on(2) && on(1) == on(5), "{m} x {k} x {n}");
        }
    }
}
