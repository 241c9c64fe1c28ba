//! The keys and values of one text at two precisions: MiKV (arXiv 2402.18096), and beside it the two things it
//! stands between, dropping tokens (H2O, arXiv 2306.14048) and one low precision for all.
//!
//! A token's importance is the attention it received so far. Each key head has its own important tokens; a
//! token that is no longer one of them is rounded, or dropped, and stays so. The first run of positions attends
//! to itself in full precision, later ones to what is held and in full precision to themselves. Keys are held
//! as they are rotated. What is held lies in this machine's memory, whatever the device.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rayon::prelude::*;

use super::head::{Head, balance};
use super::setting::{KvMode, KvSetting};
use crate::ops::{self, Attending};

/// Queries whose attention is summed at once.
const QUERIES: usize = 128;

/// The position of a row that no query sees.
const NOWHERE: u32 = u32::MAX;

/// Keys and values of one text in one block.
#[derive(Clone, Debug)]
pub(super) struct Mixed {
    setting: KvSetting,
    /// One for each key head; none before the first positions.
    heads: Vec<Head>,
    /// Positions of the text.
    seen: usize,
}

/// Sizes of a run of positions.
#[derive(Clone, Copy)]
struct Run {
    kv_heads: usize,
    /// Query heads of a key head.
    copies: usize,
    seq: usize,
    head_dim: usize,
}

impl Mixed {
    pub(super) fn new(setting: KvSetting) -> Self {
        Self { setting, heads: Vec::new(), seen: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.seen == 0
    }

    /// As [`super::KvCache::attend`], of one text.
    pub(super) fn attend(&mut self, attending: &Attending, [q, k, v]: [Tensor<3>; 3]) -> Tensor<3> {
        let plain = [q.clone(), k.clone(), v.clone()];
        let q = attending.rotate(attending.heads(attending.scaled(q)));
        let [k, v] = [attending.rotate(attending.heads(k)), attending.heads(v)];
        let ([_, heads, seq, head_dim], [_, kv_heads, ..]) = (q.dims(), k.dims());
        let run = Run { kv_heads, copies: heads / kv_heads, seq, head_dim };
        let own = [&k, &v].map(|x| read(x.clone()));
        if self.is_empty() {
            self.begin(run, &q, &k);
            let weighs = self.setting.mode.weighs();
            let received = weighs.then(|| received(attending, run, &q, &k));
            self.take_in(run, &own, received.as_deref());
            let [q, k, v] = plain;
            return ops::causal_attention(q, k, v, attending);
        }
        let (device, dtype) = (q.device(), q.dtype());
        let [keys, values] = self.held(run, &own).map(|numbers| {
            let keys = numbers.len() / (kv_heads * head_dim);
            let data = TensorData::new(numbers, [1, kv_heads, keys, head_dim]);
            Tensor::<4>::from_data(data, (&device, DType::F32)).cast(dtype)
        });
        let positions = self.columns(seq);
        let mask = mask(&positions, self.seen, run, attending.sight.window, &device).cast(dtype);
        let weights = attending.weights(q, keys, mask);
        let received = self.setting.mode.weighs().then(|| read(weights.clone().sum_dim(2)));
        self.take_in(run, &own, received.as_deref());
        attending.mixed(weights, values, heads)
    }

    /// Forgets what lies behind the first `len` positions.
    pub(super) fn truncate(&mut self, len: usize) {
        if len == 0 {
            *self = Self::new(self.setting);
        }
        if len < self.seen {
            self.seen = len;
            for head in &mut self.heads {
                head.truncate(len);
            }
        }
    }

    /// Bytes of numbers, grids, positions, importance and balancers.
    pub(super) fn bytes(&self) -> usize {
        self.heads.iter().map(Head::bytes).sum()
    }

    /// Numbers of keys and values that the text's positions have.
    pub(super) fn numbers(&self) -> usize {
        self.heads.iter().map(|head| 2 * head.width() * self.seen).sum()
    }

    /// Empty heads, with balancers from the first positions' rotated queries and keys.
    fn begin(&mut self, run: Run, q: &Tensor<4>, k: &Tensor<4>) {
        let Run { kv_heads, copies, seq, head_dim } = run;
        let largest = |x: Tensor<4>| read(x.abs().max_dim(2));
        let balances = (self.setting.mode == KvMode::Mikv).then(|| {
            let stacked = [1, kv_heads, copies * seq, head_dim];
            let (q, k) = (largest(q.clone().reshape(stacked)), largest(k.clone()));
            q.into_iter().zip(k).map(|(q, k)| balance(q, k)).collect::<Vec<f32>>()
        });
        let head = |index: usize| {
            let of_head = |all: &Vec<f32>| all[index * head_dim..][..head_dim].to_vec();
            let balance = balances.as_ref().map_or_else(Vec::new, of_head);
            Head::new(&self.setting, head_dim, balance)
        };
        self.heads = (0..kv_heads).map(head).collect();
    }

    /// Positions of the keys that a run attends to, for each head.
    fn columns(&self, seq: usize) -> Vec<Vec<u32>> {
        let own = self.seen as u32..(self.seen + seq) as u32;
        let of = |head: &Head| -> Vec<u32> {
            if !self.evicts() {
                return (0..own.end).collect();
            }
            let mut positions = head.important().to_vec();
            positions.resize(self.columns_before(), NOWHERE);
            positions.extend(own.clone());
            positions
        };
        self.heads.iter().map(of).collect()
    }

    /// How many of [`Mixed::columns`] stand before the run's own.
    fn columns_before(&self) -> usize {
        if self.evicts() {
            // Heads of a text that was cut may hold different numbers of tokens.
            self.heads.iter().map(|head| head.important().len()).max().unwrap_or(0)
        } else {
            self.seen
        }
    }

    fn evicts(&self) -> bool {
        self.setting.mode == KvMode::Evict
    }

    /// Keys and values of [`Mixed::columns`], `[kv_heads, keys, head_dim]` each.
    fn held(&self, run: Run, own: &[Vec<f32>; 2]) -> [Vec<f32>; 2] {
        let Run { seq, head_dim, .. } = run;
        let (past, evicts) = (self.columns_before(), self.evicts());
        let size = (past + seq) * head_dim;
        let [mut keys, mut values] = [(); 2].map(|()| vec![0.0; self.heads.len() * size]);
        let heads = keys.par_chunks_mut(size).zip(values.par_chunks_mut(size));
        heads.zip(&self.heads).enumerate().for_each(|(index, ((keys, values), head))| {
            let own = own.each_ref().map(|all| &all[index * seq * head_dim..][..seq * head_dim]);
            keys[past * head_dim..].copy_from_slice(own[0]);
            values[past * head_dim..].copy_from_slice(own[1]);
            head.read_into(evicts, head_dim, keys, values);
        });
        [keys, values]
    }

    /// Holds a run's keys and values, and what it gave to each of [`Mixed::columns`]; rounds or drops the
    /// tokens that are no longer important.
    fn take_in(&mut self, run: Run, own: &[Vec<f32>; 2], received: Option<&[f32]>) {
        let Run { seq, head_dim, .. } = run;
        let (before, evicts) = (self.columns_before(), self.evicts());
        let (seen, setting) = (self.seen, self.setting);
        self.seen += seq;
        let important = setting.important(self.seen);
        let size = seq * head_dim;
        let columns = received.map_or(0, |all| all.len() / self.heads.len().max(1));
        self.heads.par_iter_mut().enumerate().for_each(|(index, head)| {
            let received = received.map(|all| &all[index * columns..][..columns]);
            head.weigh(received, evicts);
            let own = own.each_ref().map(|all| &all[index * size..][..size]);
            for new in 0..seq {
                let sum = received.and_then(|all| all.get(before + new)).copied();
                let row = own.map(|all| &all[new * head_dim..][..head_dim]);
                head.add((seen + new) as u32, row, sum.unwrap_or(0.0));
            }
            head.demote(&setting, important, seen + seq);
        });
    }
}

/// What every key of the first run received, summed over queries and the query heads of its head,
/// `[kv_heads, seq]`.
fn received(attending: &Attending, run: Run, q: &Tensor<4>, k: &Tensor<4>) -> Vec<f32> {
    let Run { kv_heads, seq, .. } = run;
    let mut sums = vec![0.0; kv_heads * seq];
    for first in (0..seq).step_by(QUERIES) {
        let count = QUERIES.min(seq - first);
        let (keys, part) = (first + count, Run { seq: count, ..run });
        let columns = [(0..keys as u32).collect()];
        let mask = mask(&columns, first, part, attending.sight.window, &q.device());
        let queries = q.clone().narrow(2, first, count);
        let seen = k.clone().narrow(2, 0, keys);
        let weights = attending.weights(queries, seen, mask.cast(q.dtype()));
        let given = read(weights.sum_dim(2));
        for (sums, given) in sums.chunks_exact_mut(seq).zip(given.chunks_exact(keys)) {
            for (sum, given) in sums.iter_mut().zip(given) {
                *sum += given;
            }
        }
    }
    sums
}

/// 0 where a query sees a key and -inf elsewhere, `[1, heads, copies * seq, keys]`, of queries from position
/// `first` on and the positions of each head's keys, or of all heads'.
fn mask(keys: &[Vec<u32>], first: usize, run: Run, window: usize, device: &Device) -> Tensor<4> {
    let Run { copies, seq, .. } = run;
    let count = keys.first().map_or(0, Vec::len);
    let mut rows = Vec::with_capacity(keys.len() * copies * seq * count);
    for positions in keys {
        for query in (0..copies).flat_map(|_| first..first + seq) {
            rows.extend(positions.iter().map(|key| {
                let key = *key as usize;
                if key <= query && query - key < window { 0.0 } else { f32::NEG_INFINITY }
            }));
        }
    }
    Tensor::from_data(TensorData::new(rows, [1, keys.len(), copies * seq, count]), device)
}

/// The numbers of a tensor.
fn read(x: Tensor<4>) -> Vec<f32> {
    x.cast(DType::F32).into_data().iter::<f32>().collect()
}
