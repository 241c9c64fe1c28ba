//! Weights with every kind of ratio to their step.

use crate::ops::kernel::sample::noise;

/// Groups and their length; the last two are worth a second thread.
pub(super) const SHAPES: [[usize; 2]; 10] = [
    [4, 1],
    [2, 7],
    [2, 15],
    [4, 16],
    [6, 17],
    [4, 33],
    [2, 100],
    [8, 128],
    [300, 113],
    [1024, 33],
];

/// In units of the step: zeros, ties, bounds and far outliers among ordinary ones.
pub(super) fn ratios(len: usize) -> Vec<f32> {
    let ordinary = noise(len, 0.3, 6.0);
    let special = [0.0, -0.0, 0.5, -1.5, 2.5, 7.0, -8.0, 1e4, -1e4, 0.99, 1e30];
    let pick = |(i, x)| if i % 3 == 0 { special[i / 3 % special.len()] } else { x };
    ordinary.into_iter().enumerate().map(pick).collect()
}
