//! Values, and the law that every vector width and number of threads gives the same bits.

use crate::ops::vector::Level;

pub(super) fn noise(len: usize, seed: f32, size: f32) -> Vec<f32> {
    (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin() * size).collect()
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

#[track_caller]
pub(super) fn assert_same<R: PartialEq + Send>(what: &str, results: impl Fn(Level) -> R + Sync) {
    let portable = results(Level::Portable);
    for level in Level::available() {
        assert!(results(level) == portable, "{what}, {level:?}");
    }
    for threads in [1, 2, 3] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let found = pool.install(|| results(Level::best()));
        assert!(found == portable, "{what}, {threads} threads");
    }
}
