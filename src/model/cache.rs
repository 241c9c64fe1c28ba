//! Keys and values of positions that were computed before.

use burn::tensor::{Int, Tensor};

/// Keys and values of earlier positions of one block, each `[batch, kv_heads, past, head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct KvCache(Option<(Tensor<4>, Tensor<4>)>);

impl KvCache {
    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// All keys and values, with those of new positions at their end.
    pub(super) fn extended(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let (k, v) = match self.0.take() {
            None => (k, v),
            Some((past_k, past_v)) => {
                (Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2))
            }
        };
        self.0 = Some((k.clone(), v.clone()));
        (k, v)
    }

    /// Forgets what lies behind the first `len` positions.
    pub fn truncate(&mut self, len: usize) {
        self.0 = self.0.take().filter(|_| len > 0).map(|(k, v)| {
            let len = len.min(k.dims()[2]);
            (k.narrow(2, 0, len), v.narrow(2, 0, len))
        });
    }

    /// Keeps some sequences of the batch, in this order; one may come several times.
    pub fn select(&mut self, rows: &[usize]) {
        self.0 = self.0.take().map(|(k, v)| {
            let ids: Vec<i32> = rows.iter().map(|row| (*row as u32).cast_signed()).collect();
            let ids = Tensor::<1, Int>::from_data(&ids[..], &k.device());
            (k.select(0, ids.clone()), v.select(0, ids))
        });
    }

    /// Forgets the first `count` positions.
    pub fn skip(&mut self, count: usize) {
        self.0 = self.0.take().and_then(|(k, v)| {
            let len = k.dims()[2].checked_sub(count).filter(|len| *len > 0)?;
            Some((k.narrow(2, count, len), v.narrow(2, count, len)))
        });
    }

    /// Puts positions of zeros before the first one.
    pub fn pad(&mut self, count: usize) {
        let padded = |x: Tensor<4>| {
            let [batch, heads, _, head_dim] = x.dims();
            let zeros = Tensor::zeros([batch, heads, count, head_dim], (&x.device(), x.dtype()));
            Tensor::cat(vec![zeros, x], 2)
        };
        if count > 0 {
            self.0 = self.0.take().map(|(k, v)| (padded(k), padded(v)));
        }
    }

    /// Takes in the sequences of other caches, of as many positions.
    pub fn join(&mut self, others: impl IntoIterator<Item = Self>) {
        let all = self.0.take().into_iter().chain(others.into_iter().filter_map(|other| other.0));
        let (mut keys, mut values): (Vec<_>, Vec<_>) = all.unzip();
        self.0 = match (keys.len(), keys.pop(), values.pop()) {
            (1, Some(k), Some(v)) => Some((k, v)),
            (_, Some(k), Some(v)) => {
                keys.push(k);
                values.push(v);
                Some((Tensor::cat(keys, 0), Tensor::cat(values, 0)))
            }
            _ => None,
        };
    }
}
