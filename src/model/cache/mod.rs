//! Keys and values of positions that were computed before.

mod head;
mod mixed;
mod plain;
mod rows;
mod setting;

use std::iter::Sum;

use burn::tensor::Tensor;

use self::mixed::Mixed;
use self::plain::Plain;
pub use self::setting::{KvMode, KvSetting};
use crate::ops::{self, Attending};

/// Keys and values of earlier positions of one block.
#[derive(Clone, Debug)]
pub struct KvCache(Held);

#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // one for each block, and nearly all of them plain
enum Held {
    Plain(Option<Plain>),
    Mixed(Box<Mixed>),
}

/// What caches hold.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KvHeld {
    /// Numbers that keys and values of the text have.
    pub numbers: usize,
    /// Bytes that they are held in, all that belongs to them included, spare room aside.
    pub bytes: usize,
}

impl KvHeld {
    /// Of all the caches of a model.
    pub fn of(caches: &[KvCache]) -> Self {
        caches.iter().map(KvCache::held).sum()
    }

    /// Bits of a number, on average; 0 where nothing is held.
    pub fn bits(self) -> f64 {
        if self.numbers == 0 { 0.0 } else { 8.0 * self.bytes as f64 / self.numbers as f64 }
    }
}

impl Sum for KvHeld {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| Self {
            numbers: sum.numbers + one.numbers,
            bytes: sum.bytes + one.bytes,
        })
    }
}

impl Default for KvCache {
    fn default() -> Self {
        Self(Held::Plain(None))
    }
}

impl KvCache {
    /// An empty one that holds by a setting; by none as computed. One that is [mixed](KvSetting::is_mixed) is for
    /// one text: what is done to sequences of a batch leaves it as it is.
    pub fn by(setting: Option<KvSetting>) -> Self {
        match setting.filter(KvSetting::is_mixed) {
            None => Self::default(),
            Some(setting) => Self(Held::Mixed(Box::new(Mixed::new(setting)))),
        }
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        match &self.0 {
            Held::Plain(held) => held.is_none(),
            Held::Mixed(held) => held.is_empty(),
        }
    }

    /// What it holds.
    pub fn held(&self) -> KvHeld {
        let [numbers, bytes] = match &self.0 {
            Held::Plain(held) => held.as_ref().map_or([0; 2], Plain::sizes),
            Held::Mixed(held) => [held.numbers(), held.bytes()],
        };
        KvHeld { numbers, bytes }
    }

    /// Attention of new positions over those and the ones that are held, which they then are, too.
    ///
    /// # Shapes
    /// - q, result: `[batch, seq, heads * head_dim]`; k, v: `[batch, seq, kv_heads * head_dim]`
    pub(super) fn attend(&mut self, attending: &Attending, [q, k, v]: [Tensor<3>; 3]) -> Tensor<3> {
        let slot = match &mut self.0 {
            Held::Plain(slot) => slot,
            Held::Mixed(held) => return held.attend(attending, [q, k, v]),
        };
        let Some(held) = slot.take() else {
            let [keys, values] = [k.clone(), v.clone()].map(|x| attending.heads(x));
            *slot = Some(Plain::new(attending.rotate(keys), values));
            return ops::causal_attention(q, k, v, attending);
        };
        let q = attending.scaled(q);
        let [q, k, v] = [q, k, v].map(|x| attending.heads(x));
        let held = held.extended(attending.rotate(k), v);
        let [k, v] = held.views();
        *slot = Some(held);
        attending.attend(attending.rotate(q), k, v)
    }

    /// Forgets what lies behind the first `len` positions.
    pub fn truncate(&mut self, len: usize) {
        match &mut self.0 {
            Held::Plain(held) => *held = held.take().and_then(|held| held.truncated(len)),
            Held::Mixed(held) => held.truncate(len),
        }
    }

    /// Keeps some sequences of the batch, in this order; one may come several times.
    pub fn select(&mut self, rows: &[usize]) {
        self.change(|held| Some(held.selected(rows)));
    }

    /// Forgets the first `count` positions.
    pub fn skip(&mut self, count: usize) {
        self.change(|held| held.skipped(count));
    }

    /// Puts positions of zeros before the first one.
    pub fn pad(&mut self, count: usize) {
        if count > 0 {
            self.change(|held| Some(held.padded(count)));
        }
    }

    /// Takes in the sequences of other caches, of as many positions.
    pub fn join(&mut self, others: impl IntoIterator<Item = Self>) {
        let plain = |other: Self| match other.0 {
            Held::Plain(held) => held,
            Held::Mixed(_) => None,
        };
        if let Held::Plain(held) = &mut self.0 {
            let all = held.take().into_iter().chain(others.into_iter().filter_map(plain));
            *held = Plain::joined(all.collect());
        }
    }

    fn change(&mut self, how: impl FnOnce(Plain) -> Option<Plain>) {
        if let Held::Plain(held) = &mut self.0 {
            *held = held.take().and_then(how);
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, Int, TensorData};
    use proptest::prelude::*;

    use super::*;

    /// What is done to a cache.
    #[derive(Clone, Debug)]
    enum Step {
        Extend(usize),
        Truncate(usize),
        Select(Vec<usize>),
        Skip(usize),
        Pad(usize),
        Join(usize),
        Copy,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1usize..4).prop_map(Step::Extend),
            1 => (100usize..300).prop_map(Step::Extend),
            2 => (0usize..200).prop_map(Step::Truncate),
            1 => proptest::collection::vec(0usize..8, 1..4).prop_map(Step::Select),
            1 => (0usize..6).prop_map(Step::Skip),
            1 => (0usize..6).prop_map(Step::Pad),
            1 => (1usize..3).prop_map(Step::Join),
            1 => Just(Step::Copy),
        ]
    }

    /// The plain thing: concatenated at every step.
    type Oracle = Option<[Tensor<4>; 2]>;

    const HEADS: usize = 2;
    const WIDTH: usize = 3;

    fn values(tensor: Tensor<4>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    /// Numbers that never come twice.
    fn fresh(next: &mut f32, batch: usize, len: usize) -> Tensor<4> {
        let count = batch * HEADS * len * WIDTH;
        let numbers: Vec<f32> = (0..count).map(|i| *next + i as f32).collect();
        *next += count as f32;
        let data = TensorData::new(numbers, [batch, HEADS, len, WIDTH]);
        Tensor::from_data(data, &Device::flex())
    }

    fn extend(cache: &mut KvCache, [k, v]: [Tensor<4>; 2]) {
        let Held::Plain(slot) = &mut cache.0 else { panic!("a plain cache") };
        *slot = Some(match slot.take() {
            None => Plain::new(k, v),
            Some(held) => held.extended(k, v),
        });
    }

    fn check(cache: &KvCache, oracle: &Oracle) -> Result<(), TestCaseError> {
        prop_assert_eq!(cache.is_empty(), oracle.is_none());
        if let (Held::Plain(Some(held)), Some(expected)) = (&cache.0, oracle) {
            for (found, expected) in held.views().into_iter().zip(expected) {
                prop_assert_eq!(found.dims(), expected.dims());
                prop_assert_eq!(values(found), values(expected.clone()));
            }
        }
        Ok(())
    }

    /// Where a tensor's buffer lies.
    #[cfg(feature = "flex")]
    fn address(tensor: &Tensor<4>) -> usize {
        use burn::backend::{DispatchKindConversion, DispatchTensor, Flex};
        let tensor = tensor.clone().into_dispatch();
        let plain = <DispatchTensor as DispatchKindConversion<Flex>>::try_into_backend(tensor);
        plain.unwrap().float().storage::<f32>().as_ptr() as usize
    }

    #[test]
    #[cfg(feature = "flex")]
    fn a_token_is_written_where_the_buffer_lies_unless_somebody_looks_at_it() {
        let mut next = 1.0;
        let mut cache = KvCache::default();
        let mut extend_by = |cache: &mut KvCache, count| {
            let new = [(); 2].map(|()| fresh(&mut next, 1, count));
            extend(cache, new);
        };
        let views = |cache: &KvCache| match &cache.0 {
            Held::Plain(Some(held)) => held.views(),
            _ => panic!("a plain cache"),
        };
        extend_by(&mut cache, 40);
        extend_by(&mut cache, 1);
        let first = views(&cache).map(|x| address(&x));
        for _ in 0..100 {
            extend_by(&mut cache, 1);
            assert_eq!(views(&cache).map(|x| address(&x)), first);
        }
        cache.truncate(60);
        extend_by(&mut cache, 2);
        assert_eq!(views(&cache).map(|x| address(&x)), first);
        let held = views(&cache);
        let before = held.clone().map(values);
        extend_by(&mut cache, 1);
        assert_eq!(held.map(values), before);
        assert_ne!(views(&cache).map(|x| address(&x)), first);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn whatever_is_done_it_holds_what_concatenation_would(
            steps in proptest::collection::vec(step(), 1..40),
        ) {
            let (mut cache, mut oracle): (KvCache, Oracle) = (KvCache::default(), None);
            let (mut copy, mut copied): (KvCache, Oracle) = (KvCache::default(), None);
            let mut next = 1.0;
            for step in steps {
                let [batch, len] = oracle.as_ref().map_or([1, 0], |[k, _]| [k.dims()[0], k.dims()[2]]);
                match step {
                    Step::Extend(count) => {
                        let new = [(); 2].map(|()| fresh(&mut next, batch, count));
                        extend(&mut cache, new.clone());
                        oracle = Some(match oracle.take() {
                            None => new,
                            Some([k, v]) => {
                                let [new_k, new_v] = new;
                                [(k, new_k), (v, new_v)].map(|(a, b)| Tensor::cat(vec![a, b], 2))
                            }
                        });
                    }
                    Step::Truncate(to) => {
                        cache.truncate(to);
                        oracle = oracle.filter(|_| to > 0).map(|all| {
                            all.map(|x| x.narrow(2, 0, to.min(len)))
                        });
                    }
                    Step::Select(rows) => {
                        let rows: Vec<usize> = rows.into_iter().map(|row| row % batch).collect();
                        cache.select(&rows);
                        let ids: Vec<i32> = rows.iter().map(|row| (*row as u32).cast_signed()).collect();
                        let ids = Tensor::<1, Int>::from_data(&ids[..], &Device::flex());
                        oracle = oracle.map(|all| all.map(|x| x.select(0, ids.clone())));
                    }
                    Step::Skip(count) => {
                        cache.skip(count);
                        oracle = oracle.filter(|_| count < len).map(|all| {
                            all.map(|x| x.narrow(2, count, len - count))
                        });
                    }
                    Step::Pad(count) => {
                        cache.pad(count);
                        let zeros = || Tensor::zeros([batch, HEADS, count, WIDTH], &Device::flex());
                        if count > 0 {
                            oracle = oracle.map(|all| all.map(|x| Tensor::cat(vec![zeros(), x], 2)));
                        }
                    }
                    Step::Join(more) => {
                        if len == 0 {
                            continue;
                        }
                        let new = [(); 2].map(|()| fresh(&mut next, more, len));
                        let mut other = KvCache::default();
                        extend(&mut other, new.clone());
                        cache.join([other, KvCache::default()]);
                        let [new_k, new_v] = new;
                        oracle = oracle.map(|[k, v]| {
                            [(k, new_k), (v, new_v)].map(|(a, b)| Tensor::cat(vec![a, b], 0))
                        });
                    }
                    // Both go on by themselves: the room is written by one of them alone.
                    Step::Copy => {
                        (copy, copied) = (cache.clone(), oracle.clone());
                        let new = [(); 2].map(|()| fresh(&mut next, batch, 1));
                        extend(&mut cache, new.clone());
                        oracle = Some(match oracle.take() {
                            None => new,
                            Some([k, v]) => {
                                let [new_k, new_v] = new;
                                [(k, new_k), (v, new_v)].map(|(a, b)| Tensor::cat(vec![a, b], 2))
                            }
                        });
                    }
                }
                check(&cache, &oracle)?;
                check(&copy, &copied)?;
            }
        }
    }
}
