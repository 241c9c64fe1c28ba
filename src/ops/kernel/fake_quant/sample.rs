//! Weights with every kind of ratio, and the law that all vector widths and threads give the same bits.

use crate::ops::vector::Level;

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

pub(super) fn noise(len: usize, seed: f32, size: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin() * size).collect()
}

/// In units of the step: zeros, ties, bounds and far outliers among ordinary ones.
pub(super) fn ratios(len: usize) -> Vec<f32> {
    let ordinary = noise(len, 0.3, 6.0);
    let special = [0.0, -0.0, 0.5, -1.5, 2.5, 7.0, -8.0, 1e4, -1e4, 0.99, 1e30];
    let pick = |(i, x)| if i % 3 == 0 { special[i / 3 % special.len()] } else { x };
    ordinary.into_iter().enumerate().map(pick).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
pub(super) fn assert_same(what: &str, results: impl Fn(Level) -> Vec<Vec<u32>> + Sync) {
    let portable = results(Level::Portable);
    for level in Level::available() {
        assert!(results(level) == portable, "{what}, {level:?}");
    }
    for threads in [1, 2] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| results(Level::best()));
        assert!(found == portable, "{what}, {threads} threads");
    }
}
