//! Keys and values as they were computed, in buffers with room behind them.

use burn::tensor::{Int, Tensor};

/// Positions that a buffer gets room for when it is full. It is copied once in so many tokens, which is that
/// share of what attention itself reads, at any length, and the room stays small beside what is held.
const ROOM: usize = 128;

/// Keys and values, each `[batch, kv_heads, capacity, head_dim]`, of which the first `len` positions count.
#[derive(Clone, Debug)]
pub(super) struct Plain {
    k: Tensor<4>,
    v: Tensor<4>,
    len: usize,
}

impl Plain {
    /// Those of the first positions, without room: a text that is not continued needs none.
    pub(super) fn new(k: Tensor<4>, v: Tensor<4>) -> Self {
        let len = k.dims()[2];
        Self { k, v, len }
    }

    /// The same with those of new positions at their end.
    pub(super) fn extended(self, k: Tensor<4>, v: Tensor<4>) -> Self {
        let len = self.len + k.dims()[2];
        Self { k: behind(self.k, self.len, k), v: behind(self.v, self.len, v), len }
    }

    /// Keys and values, each `[batch, kv_heads, len, head_dim]`: views, to be let go of before the next
    /// positions come, which are written into the buffers where nobody else holds them.
    pub(super) fn views(&self) -> [Tensor<4>; 2] {
        [&self.k, &self.v].map(|buffer| buffer.clone().narrow(2, 0, self.len))
    }

    /// Numbers of keys and values that count, and their bytes.
    pub(super) fn sizes(&self) -> [usize; 2] {
        let [batch, heads, _, head_dim] = self.k.dims();
        let numbers = 2 * batch * heads * self.len * head_dim;
        [numbers, numbers * self.k.dtype().size()]
    }

    /// The same without what lies behind the first `len` positions; `None` where nothing remains.
    pub(super) fn truncated(self, len: usize) -> Option<Self> {
        (len > 0).then(|| Self { len: len.min(self.len), ..self })
    }

    /// Some sequences of the batch, in this order.
    pub(super) fn selected(&self, rows: &[usize]) -> Self {
        let ids: Vec<i32> = rows.iter().map(|row| (*row as u32).cast_signed()).collect();
        let ids = Tensor::<1, Int>::from_data(&ids[..], &self.k.device());
        let [k, v] = self.views().map(|x| x.select(0, ids.clone()));
        Self::new(k, v)
    }

    /// The same without the first `count` positions; `None` where nothing remains.
    pub(super) fn skipped(self, count: usize) -> Option<Self> {
        if count == 0 {
            return Some(self);
        }
        let len = self.len.checked_sub(count).filter(|len| *len > 0)?;
        let [k, v] = self.views().map(|x| x.narrow(2, count, len));
        Some(Self::new(k, v))
    }

    /// The same with positions of zeros before the first one.
    pub(super) fn padded(&self, count: usize) -> Self {
        let [k, v] = self.views().map(|x| {
            let [batch, heads, _, head_dim] = x.dims();
            let zeros = Tensor::zeros([batch, heads, count, head_dim], (&x.device(), x.dtype()));
            Tensor::cat(vec![zeros, x], 2)
        });
        Self::new(k, v)
    }

    /// The sequences of several, of as many positions each; `None` of none.
    pub(super) fn joined(all: Vec<Self>) -> Option<Self> {
        if all.len() < 2 {
            return all.into_iter().next();
        }
        let (keys, values) = all.iter().map(|one| <(_, _)>::from(one.views())).unzip();
        Some(Self::new(Tensor::cat(keys, 0), Tensor::cat(values, 0)))
    }
}

/// A buffer of which `len` positions count, with new ones behind them; it grows where they do not fit.
fn behind(buffer: Tensor<4>, len: usize, new: Tensor<4>) -> Tensor<4> {
    let [batch, heads, capacity, head_dim] = buffer.dims();
    let total = len + new.dims()[2];
    let buffer = if total <= capacity {
        buffer
    } else {
        let room = [batch, heads, total + ROOM - len, head_dim];
        let room = Tensor::zeros(room, (&buffer.device(), buffer.dtype()));
        Tensor::cat(vec![buffer.narrow(2, 0, len), room], 2)
    };
    buffer.slice_assign([0..batch, 0..heads, len..total, 0..head_dim], new)
}
