//! Least squares with the codes fixed: codebooks by conjugate gradients, scales row by row.

use rayon::prelude::*;

use super::state::{Problem, State, dot};

/// Rows whose gradients one task adds up: a function of nothing, so that sums are always the same.
const ROWS: usize = 64;
/// Keeps least squares of scales solvable, relative to the diagonal.
const RIDGE: f64 = 1e-7;

/// Codebooks of less output error, by `steps` of preconditioned conjugate gradients. What is left of the
/// weight, times the Hessian, is `gradient`.
pub(super) fn books(problem: &Problem<'_>, state: &mut State, gradient: &[f32], steps: usize) {
    let diagonal = diagonal(problem, state);
    let precondition = |residual: &[f64]| -> Vec<f64> {
        residual.iter().zip(&diagonal).map(|(r, d)| if *d > 0.0 { r / d } else { 0.0 }).collect()
    };
    let inner = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut residual = gathered(problem, state, gradient);
    let mut direction = precondition(&residual);
    let mut size = inner(&residual, &direction);
    let first = size;
    for _ in 0..steps {
        if size.is_nan() || size <= first * 1e-9 {
            return;
        }
        let short: Vec<f32> = direction.iter().map(|d| *d as f32).collect();
        let moved = problem.values(&state.codes, &short, &state.scale);
        let curved = problem.times_hessian(&moved, 0, problem.inputs);
        let curvature: f64 = problem.losses(&moved, &curved).into_iter().sum();
        if curvature.is_nan() || curvature <= 0.0 {
            return;
        }
        let step = size / curvature;
        for (book, direction) in state.books.iter_mut().zip(&short) {
            *book += step as f32 * direction;
        }
        let taken = gathered(problem, state, &curved);
        for (residual, taken) in residual.iter_mut().zip(taken) {
            *residual -= step * taken;
        }
        let conditioned = precondition(&residual);
        let next = inner(&residual, &conditioned);
        for (direction, conditioned) in direction.iter_mut().zip(conditioned) {
            *direction = conditioned + next / size * *direction;
        }
        size = next;
    }
}

/// Adds up what belongs to each centroid: `Σ a gradient`, of all places that have its code.
fn gathered(problem: &Problem<'_>, state: &State, gradient: &[f32]) -> Vec<f64> {
    let (inputs, vector, count) = (problem.inputs, problem.additive.vector, problem.additive.books);
    over_rows(problem, state, |row, codes, sums| {
        let each = sums.len() / count;
        let gradient = gradient[row * inputs..][..inputs].chunks_exact(vector);
        for (chunk, (codes, gradient)) in codes.chunks_exact(count).zip(gradient).enumerate() {
            let scale = state.scale[(row * inputs + chunk * vector) / problem.group];
            for (book, code) in codes.iter().enumerate() {
                let at = book * each + usize::from(*code) * vector;
                for (sum, gradient) in sums[at..][..vector].iter_mut().zip(gradient) {
                    *sum += f64::from(scale * gradient);
                }
            }
        }
    })
}

/// The curvature of each centroid's numbers alone.
fn diagonal(problem: &Problem<'_>, state: &State) -> Vec<f64> {
    let (inputs, vector, count) = (problem.inputs, problem.additive.vector, problem.additive.books);
    over_rows(problem, state, |row, codes, sums| {
        let each = sums.len() / count;
        for (chunk, codes) in codes.chunks_exact(count).enumerate() {
            let scale = state.scale[(row * inputs + chunk * vector) / problem.group];
            for (book, code) in codes.iter().enumerate() {
                let at = book * each + usize::from(*code) * vector;
                for (t, sum) in sums[at..][..vector].iter_mut().enumerate() {
                    let place = chunk * vector + t;
                    let own = problem.hessian[place * inputs + place];
                    *sum += f64::from(scale * scale * own);
                }
            }
        }
    })
}

/// Sums over rows in the shape of the codebooks, in the same order whatever the number of threads.
fn over_rows(
    problem: &Problem<'_>,
    state: &State,
    add: impl Fn(usize, &[u8], &mut [f64]) + Sync,
) -> Vec<f64> {
    let codes = problem.codes();
    let parts: Vec<Vec<f64>> = state
        .codes
        .par_chunks(ROWS * codes)
        .enumerate()
        .map(|(part, rows)| {
            let mut sums = vec![0.0; state.books.len()];
            for (row, codes) in rows.chunks_exact(codes).enumerate() {
                add(part * ROWS + row, codes, &mut sums);
            }
            sums
        })
        .collect();
    let mut total = vec![0.0; state.books.len()];
    for part in parts {
        for (total, part) in total.iter_mut().zip(part) {
            *total += part;
        }
    }
    total
}

/// Scales of least output error; `aim` is the weight times the Hessian.
pub(super) fn scales(problem: &Problem<'_>, state: &mut State, aim: &[f32]) {
    let (inputs, groups, len) = (problem.inputs, problem.groups(), problem.group);
    let sums = problem.sums(&state.codes, &state.books);
    // `u_gᵀ H_gh u_h` of each row and pair of groups.
    let mut products = vec![0.0f64; problem.out * groups * groups];
    for group in 0..groups {
        let curved = problem.times_hessian(&sums, group * len, len);
        let rows = products.par_chunks_exact_mut(groups * groups);
        rows.enumerate().with_min_len(16).for_each(|(row, products)| {
            for (other, product) in products[group * groups..][..groups].iter_mut().enumerate() {
                let at = row * inputs + other * len;
                *product = dot(&curved[at..][..len], &sums[at..][..len]);
            }
        });
    }
    let rows = state
        .scale
        .par_chunks_exact_mut(groups)
        .zip(products.par_chunks_exact_mut(groups * groups));
    rows.enumerate().with_min_len(16).for_each(|(row, (scale, matrix))| {
        let mut right: Vec<f64> = (0..groups)
            .map(|group| {
                let at = row * inputs + group * len;
                dot(&aim[at..][..len], &sums[at..][..len])
            })
            .collect();
        if solved(matrix, &mut right) {
            for (scale, found) in scale.iter_mut().zip(right) {
                *scale = found as f32;
            }
        }
    });
}

/// Solves a symmetric positive definite system in place (Cholesky); whether it could.
fn solved(matrix: &mut [f64], right: &mut [f64]) -> bool {
    let n = right.len();
    let largest = (0..n).map(|i| matrix[i * n + i]).fold(0.0, f64::max);
    for i in 0..n {
        matrix[i * n + i] += RIDGE * largest;
    }
    for i in 0..n {
        for j in 0..=i {
            let sum: f64 = (0..j).map(|k| matrix[i * n + k] * matrix[j * n + k]).sum();
            let left = matrix[i * n + j] - sum;
            if i != j {
                matrix[i * n + j] = left / matrix[j * n + j];
            } else if left > 0.0 {
                matrix[i * n + i] = left.sqrt();
            } else {
                return false;
            }
        }
    }
    for i in 0..n {
        let sum: f64 = (0..i).map(|k| matrix[i * n + k] * right[k]).sum();
        right[i] = (right[i] - sum) / matrix[i * n + i];
    }
    for i in (0..n).rev() {
        let sum: f64 = (i + 1..n).map(|k| matrix[k * n + i] * right[k]).sum();
        right[i] = (right[i] - sum) / matrix[i * n + i];
    }
    right.iter().all(|value| value.is_finite())
}
