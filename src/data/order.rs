//! Seeded data order as a pure function of the step.
//!
//! No generator state is kept: the permutation of each epoch comes from a key made of the seed, the
//! stream's name and the epoch number, so the only thing a resumed run has to know is its step.

use std::sync::{Arc, Mutex, PoisonError};

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// The order of `0..n` in one epoch of the named stream.
///
/// A Fisher-Yates shuffle of our own over ChaCha8, so that no update of a crate changes the order
/// of a resumed run. `n` is at most `u32::MAX`.
pub fn permutation(seed: u64, stream: &str, epoch: u64, n: usize) -> Vec<u32> {
    let mut random = generator(seed, stream, epoch);
    let mut order: Vec<u32> = (0..n as u32).collect();
    for last in (1..order.len()).rev() {
        let other = below(&mut random, last as u32 + 1);
        order.swap(last, other as usize);
    }
    order
}

/// Which items each training step sees: the endless row of per-epoch permutations, `batch` at a time.
#[derive(Debug)]
pub struct Order {
    seed: u64,
    stream: String,
    items: usize,
    batch: usize,
    /// The permutation used last, with its epoch: neighbouring steps mostly share it.
    recent: Mutex<Option<(u64, Arc<Vec<u32>>)>>,
}

impl Order {
    /// The order of `items` items in batches of `batch`; `stream` names what is ordered, so that
    /// two stages with the same seed do not see the same order.
    ///
    /// # Errors
    /// If there are no items, more than `u32::MAX` of them, or a batch is empty.
    pub fn new(seed: u64, stream: impl Into<String>, items: usize, batch: usize) -> Result<Self> {
        let stream = stream.into();
        if items == 0 || u32::try_from(items).is_err() {
            return Err(Error::preflight(format!(
                "{items} items cannot be ordered, expected 1 to {}",
                u32::MAX
            ))
            .at(format!("the data of {stream}")));
        }
        if batch == 0 {
            return Err(Error::preflight("a batch of 0 items trains nothing")
                .at(format!("the data of {stream}"))
                .fix("set batch to at least 1"));
        }
        Ok(Self { seed, stream, items, batch, recent: Mutex::new(None) })
    }

    /// The item indices of step `step`, `[batch]`. A batch may straddle two epochs or more.
    pub fn batch(&self, step: u64) -> Vec<u32> {
        // u128: step and batch come from a recipe, and their product must not wrap.
        let first = u128::from(step) * self.batch as u128;
        let mut batch = Vec::with_capacity(self.batch);
        while batch.len() < self.batch {
            let position = first + batch.len() as u128;
            let epoch = (position / self.items as u128) as u64;
            let within = (position % self.items as u128) as usize;
            let order = self.epoch(epoch);
            batch.extend(order[within..].iter().take(self.batch - batch.len()));
        }
        batch
    }

    fn epoch(&self, epoch: u64) -> Arc<Vec<u32>> {
        // The cache holds a finished value or none, so a panic elsewhere cannot have spoilt it.
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        match &*recent {
            Some((cached, order)) if *cached == epoch => Arc::clone(order),
            _ => {
                let order = Arc::new(permutation(self.seed, &self.stream, epoch, self.items));
                *recent = Some((epoch, Arc::clone(&order)));
                order
            }
        }
    }
}

/// A seed for something that has a name, from the run's seed.
pub fn seed_of(seed: u64, name: &str) -> u64 {
    generator(seed, name, 0).next_u64()
}

/// `n` independent draws that are 1 with `probability`, else 0: a function of its arguments.
pub fn coin_flips(seed: u64, stream: &str, step: u64, n: usize, probability: f64) -> Vec<f32> {
    let mut random = generator(seed, stream, step);
    // 2^32 itself is "always": no draw reaches it.
    let limit = (probability * 4_294_967_296.0) as u64;
    (0..n).map(|_| f32::from(u8::from(u64::from(random.next_u32()) < limit))).collect()
}

fn generator(seed: u64, stream: &str, epoch: u64) -> ChaCha8Rng {
    // The name goes last: the fields before it have fixed widths, so no two keys share their bytes.
    let key = Sha256::new()
        .chain_update(b"fewbit data order 1")
        .chain_update(seed.to_le_bytes())
        .chain_update(epoch.to_le_bytes())
        .chain_update(stream.as_bytes());
    ChaCha8Rng::from_seed(key.finalize().into())
}

/// A uniform draw from `0..bound`, `bound > 0`.
///
/// The high word of `draw * bound` is biased only through the few draws whose low word falls under
/// `2^32 mod bound`; those are drawn again.
fn below(random: &mut ChaCha8Rng, bound: u32) -> u32 {
    let biased = bound.wrapping_neg() % bound;
    loop {
        let product = u64::from(random.next_u32()) * u64::from(bound);
        if product as u32 >= biased {
            return (product >> 32) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_permutation(order: &[u32]) -> bool {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        sorted.iter().copied().eq(0..order.len() as u32)
    }

    #[test]
    fn each_epoch_is_another_permutation() {
        for n in [0, 1, 2, 3, 257] {
            assert!(is_permutation(&permutation(1, "train", 0, n)), "{n}");
        }
        let base = permutation(1, "train", 0, 64);
        assert_eq!(base, permutation(1, "train", 0, 64));
        for other in [
            permutation(2, "train", 0, 64),
            permutation(1, "calibration", 0, 64),
            permutation(1, "train", 1, 64),
        ] {
            assert_ne!(base, other);
            assert!(is_permutation(&other));
        }
    }

    /// Resumed runs depend on these numbers: a change here breaks every checkpoint in the field. They
    /// agree with an independent ChaCha8 written from its definition.
    #[test]
    fn the_order_is_fixed_for_good() {
        assert_eq!(permutation(0, "train", 0, 10), [0, 6, 2, 9, 3, 7, 5, 4, 1, 8]);
        assert_eq!(permutation(0, "train", 1, 10), [0, 9, 8, 1, 2, 5, 3, 6, 4, 7]);
        // Past the first 16-word block of the generator.
        let long = permutation(1, "train", 0, 200);
        assert_eq!(long[195..], [191, 112, 26, 59, 167]);
        assert_eq!(permutation(7, "stage.0", 3, 10), [5, 3, 6, 7, 2, 9, 1, 8, 4, 0]);
    }

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(permutation(0, "fair", epoch, 3)).or_insert(0_i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Five standard deviations of a binomial count with p = 1/6.
        assert!(counts.values().all(|count| (count - 1000).abs() < 145), "{counts:?}");
    }

    #[test]
    fn bounded_draws_stay_below() {
        let mut random = generator(0, "draws", 0);
        for bound in [1, 2, 3, 1 << 31, (1 << 31) + 1, u32::MAX] {
            assert!((0..100).all(|_| below(&mut random, bound) < bound));
        }
    }

    #[test]
    fn a_batch_depends_on_nothing_but_its_step() {
        let order = Order::new(3, "train", 10, 4).unwrap();
        let forward: Vec<_> = (0..20).map(|step| order.batch(step)).collect();
        for step in (0..20).rev() {
            assert_eq!(order.batch(step), forward[step as usize]);
            let fresh = Order::new(3, "train", 10, 4).unwrap();
            assert_eq!(fresh.batch(step), forward[step as usize]);
        }
    }

    #[test]
    fn batches_walk_the_epochs_without_a_gap() {
        for batch in [1, 3, 4, 10, 25] {
            let order = Order::new(3, "train", 10, batch).unwrap();
            let walked: Vec<u32> = (0..50).flat_map(|step| order.batch(step)).collect();
            for (epoch, items) in walked.chunks_exact(10).enumerate() {
                assert_eq!(items, permutation(3, "train", epoch as u64, 10), "batch {batch}");
            }
        }
        assert_eq!(Order::new(3, "train", 10, 4).unwrap().batch(u64::MAX).len(), 4);
    }

    #[test]
    fn nothing_to_order_is_an_error() {
        assert!(Order::new(0, "train", 0, 1).is_err());
        assert!(Order::new(0, "train", 1 << 32, 1).is_err());
        let error = Order::new(0, "distill", 1, 0).unwrap_err();
        assert_eq!(error.kind().exit_code(), 3);
        assert!(error.to_string().contains("distill"));
    }
}
