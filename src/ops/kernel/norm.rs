//! RMS norm over rows, with its gradients.

use rayon::prelude::*;

use super::min_tasks;
use crate::ops::vector::{self, Level, at};

/// Rows of one task. It fixes the order in which the gain's gradient is summed.
const ROWS: usize = 32;

/// `y = x / sqrt(mean(x²) + eps) * gain` over rows of the gain's width. Returns 1 / rms of each
/// row, for the backward.
///
/// # Shapes
/// - x, y: `[rows, width]`; gain: `[width]`; result: `[rows]`
pub(crate) fn rms_norm(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) -> Vec<f32> {
    forward(Level::best(), x, gain, eps, y)
}

/// The gradient of `x`, and that of the gain where one is wanted. Both are overwritten.
///
/// # Shapes
/// - dy, x, dx: `[rows, width]`; gain, dgain: `[width]`; inverse_rms: `[rows]`
pub(crate) fn rms_norm_backward(
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
    inverse_rms: &[f32],
    dx: &mut [f32],
    dgain: Option<&mut [f32]>,
) {
    let partials = backward(Level::best(), dy, x, gain, inverse_rms, dx, dgain.is_some());
    if let Some(dgain) = dgain {
        let mut totals = vec![0.0f64; gain.len()];
        for partial in &partials {
            for (total, part) in totals.iter_mut().zip(partial) {
                *total += f64::from(*part);
            }
        }
        for (out, total) in dgain.iter_mut().zip(&totals) {
            *out = *total as f32;
        }
    }
}

fn forward(level: Level, x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) -> Vec<f32> {
    let width = gain.len().max(1);
    debug_assert!(x.len() == y.len() && x.len().is_multiple_of(width));
    let mut inverse_rms = vec![0.0; x.len() / width];
    y.par_chunks_mut(ROWS * width)
        .zip(x.par_chunks(ROWS * width))
        .zip(inverse_rms.par_chunks_mut(ROWS))
        .with_min_len(min_tasks(x.len()))
        .for_each(|((y, x), inverse_rms)| {
            at!(level, {
                let rows = y.chunks_exact_mut(width).zip(x.chunks_exact(width));
                for ((y, x), inverse) in rows.zip(inverse_rms) {
                    *inverse = forward_row(x, gain, eps, y);
                }
            });
        });
    inverse_rms
}

#[inline(always)]
#[allow(clippy::inline_always)] // compiled for the caller's instruction set
fn forward_row(x: &[f32], gain: &[f32], eps: f32, y: &mut [f32]) -> f32 {
    let mean = vector::dot(x, x) / x.len() as f64;
    let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
    for ((y, x), gain) in y.iter_mut().zip(x).zip(gain) {
        *y = x * inverse * gain;
    }
    inverse
}

/// Each task's part of the gain's gradient, empty where it is not wanted.
fn backward(
    level: Level,
    dy: &[f32],
    x: &[f32],
    gain: &[f32],
    inverse_rms: &[f32],
    dx: &mut [f32],
    wants_gain: bool,
) -> Vec<Vec<f32>> {
    let width = gain.len().max(1);
    debug_assert!(x.len() == dy.len() && x.len() == dx.len());
    debug_assert_eq!(x.len(), inverse_rms.len() * width);
    dx.par_chunks_mut(ROWS * width)
        .zip(dy.par_chunks(ROWS * width).zip(x.par_chunks(ROWS * width)))
        .zip(inverse_rms.par_chunks(ROWS))
        .with_min_len(min_tasks(x.len()))
        .map(|((dx, (dy, x)), inverse_rms)| {
            let mut dgain = vec![0.0; if wants_gain { width } else { 0 }];
            at!(level, {
                let inputs = dy.chunks_exact(width).zip(x.chunks_exact(width));
                let rows = dx.chunks_exact_mut(width).zip(inputs);
                for ((dx, (dy, x)), inverse) in rows.zip(inverse_rms) {
                    backward_row(dy, x, gain, *inverse, dx);
                    for ((sum, dy), x) in dgain.iter_mut().zip(dy).zip(x) {
                        *sum += dy * (x * inverse);
                    }
                }
            });
            dgain
        })
        .collect()
}

#[inline(always)]
#[allow(clippy::inline_always)] // compiled for the caller's instruction set
fn backward_row(dy: &[f32], x: &[f32], gain: &[f32], inverse: f32, dx: &mut [f32]) {
    for ((dx, dy), gain) in dx.iter_mut().zip(dy).zip(gain) {
        *dx = dy * gain;
    }
    let dot = vector::sum_pairs(
        dx,
        x,
        #[inline(always)]
        |a, b| a * (b * inverse),
    ) / x.len() as f64;
    let along = (dot * f64::from(inverse)) as f32;
    for (dx, x) in dx.iter_mut().zip(x) {
        *dx = *dx * inverse - x * inverse * along;
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    const SHAPES: [[usize; 2]; 9] =
        [[0, 5], [1, 1], [3, 7], [5, 15], [2, 16], [33, 17], [65, 33], [400, 100], [2, 3000]];

    #[track_caller]
    fn assert_close(found: &[f32], exact: &[f64], floor: f64) {
        let size = exact.iter().fold(floor, |a, b| a.max(b.abs()));
        for (found, exact) in found.iter().zip(exact) {
            assert!((f64::from(*found) - exact).abs() <= 2e-6 * size, "{found} for {exact}");
        }
    }

    /// y, 1 / rms, dx and dgain in f64.
    fn reference(x: &[f32], gain: &[f32], eps: f32, dy: &[f32]) -> [Vec<f64>; 4] {
        let [mut y, mut inverses, mut dx] = [vec![], vec![], vec![]];
        let mut dgain = vec![0.0; gain.len()];
        for (x, dy) in x.chunks(gain.len()).zip(dy.chunks(gain.len())) {
            let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
            let (x, dy, gain) = (wide(x), wide(dy), wide(gain));
            let mean = |f: &dyn Fn(usize) -> f64| (0..x.len()).map(f).sum::<f64>() / x.len() as f64;
            let inverse = (mean(&|i| x[i] * x[i]) + f64::from(eps)).sqrt().recip();
            let dot = mean(&|i| x[i] * dy[i] * gain[i]);
            inverses.push(inverse);
            for i in 0..x.len() {
                y.push(x[i] * inverse * gain[i]);
                dx.push(dy[i] * gain[i] * inverse - x[i] * inverse.powi(3) * dot);
                dgain[i] += dy[i] * x[i] * inverse;
            }
        }
        [y, inverses, dx, dgain]
    }

    #[test]
    fn values_and_gradients_are_exact_enough() {
        for [rows, width] in SHAPES {
            for (size, eps) in [(1.0, 1e-5), (1e-3, 1e-6), (1e4, 1e-5), (0.0, 1e-5)] {
                let x = noise(rows * width, 0.1, size);
                let dy = noise(rows * width, 0.7, 1.0);
                let gain = noise(width, 0.3, 2.0);
                let [y, inverse, dx, dgain] = reference(&x, &gain, eps, &dy);
                let mut found = vec![f32::NAN; x.len()];
                let found_inverse = rms_norm(&x, &gain, eps, &mut found);
                assert_close(&found, &y, 1e-30);
                assert_close(&found_inverse, &inverse, 1e-30);
                let mut found_gain = vec![f32::NAN; width];
                found.fill(f32::NAN);
                let wanted = Some(&mut found_gain[..]);
                rms_norm_backward(&dy, &x, &gain, &found_inverse, &mut found, wanted);
                // A row of one is all direction and no slope: what is left is rounding.
                let terms = inverse.iter().fold(0.0f64, |a, b| a.max(*b));
                assert_close(&found, &dx, terms);
                assert_close(&found_gain, &dgain, 1e-30);
                let mut alone = vec![f32::NAN; x.len()];
                rms_norm_backward(&dy, &x, &gain, &found_inverse, &mut alone, None);
                assert_eq!(bits(&alone), bits(&found));
            }
        }
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for [rows, width] in SHAPES {
            let x = noise(rows * width, 0.1, 3.0);
            let dy = noise(rows * width, 0.7, 1.0);
            let gain = noise(width, 0.3, 2.0);
            assert_same(&format!("{rows} rows of {width}"), |level| {
                let (mut y, mut dx) = (vec![0.0; x.len()], vec![0.0; x.len()]);
                let inverse = forward(level, &x, &gain, 1e-5, &mut y);
                let partials = backward(level, &dy, &x, &gain, &inverse, &mut dx, true);
                [bits(&y), bits(&inverse), bits(&dx), bits(&partials.concat())]
            });
        }
    }
}
