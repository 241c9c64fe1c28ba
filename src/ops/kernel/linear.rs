//! Matrix products of row-major slices, by faer: its kernels use every vector width that the
//! machine has, chosen at run time.

#![allow(clippy::many_single_char_names)] // m, k and n are what everybody calls them

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

/// Multiplications below which waking other threads costs more than they save.
const SERIAL: usize = 1 << 19;

pub(super) fn threads(m: usize, k: usize, n: usize) -> Par {
    if m * k * n < SERIAL { Par::Seq } else { Par::rayon(0) }
}

fn rows(values: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(values, rows, columns)
}

fn product(a: MatRef<'_, f32>, b: MatRef<'_, f32>) -> Vec<f32> {
    let (m, k, n) = (a.nrows(), a.ncols(), b.ncols());
    let mut out = vec![0.0; m * n];
    let to = MatMut::from_row_major_slice_mut(&mut out, m, n);
    matmul(to, Accum::Replace, a, b, 1.0, threads(m, k, n));
    out
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
        for [m, k, n] in [[1, 1, 1], [3, 5, 2], [17, 33, 9], [130, 64, 128]] {
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
}
