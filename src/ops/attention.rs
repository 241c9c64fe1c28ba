//! Causal attention with grouped key and value heads: rotated or not, over all earlier positions or a
//! window of them. One operation on the tape.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Device, Int, Tensor, TensorData, activation};

use super::forest::Forest;
#[cfg(feature = "flex")]
use {
    super::bridge::{self, Heads, Operation, Plain, Rows, reads, reads_plain, tensor},
    super::kernel::attention as attention_kernel,
};

/// Queries up to which a kernel reads held keys and values where they lie; more are products of matrices.
#[cfg(feature = "flex")]
const FEW: usize = 4;

/// How scores are made, whatever the positions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scores {
    /// Width of a head.
    pub head_dim: usize,
    /// Whether neighbours are rotated against each other, not one half against the other.
    pub neighbours: bool,
    /// Keys that a query sees, its own among them; absent: all before it.
    pub window: Option<usize>,
    /// What scores are multiplied by; absent: one over the root of `head_dim`.
    pub scale: Option<f64>,
    /// Scores become `c tanh(score / c)`.
    pub cap: Option<f64>,
}

/// Attention over a run of positions: their rotations, and who sees whom.
#[derive(Clone, Debug)]
pub struct Attending {
    /// How scores are made.
    pub scores: Scores,
    /// `[1 or batch, 1, seq, rotated / 2]`; the features behind the rotated ones pass.
    pub cos: Tensor<4>,
    /// As `cos`.
    pub sin: Tensor<4>,
    /// Factors of the queries, `[1 or batch, seq, 1]`.
    pub query_factors: Option<Tensor<3>>,
    /// Whom they see.
    pub sight: Sight,
}

/// Which keys the queries of a run of positions see: those of their window up to their own, where
/// sequences are packed not before their own document.
#[derive(Clone, Debug)]
pub struct Sight {
    /// Positions in the cache before the run.
    pub past: usize,
    /// Positions of the run.
    pub seq: usize,
    /// Query heads that share a key head.
    pub copies: usize,
    /// Keys that a query sees, its own among them.
    pub window: usize,
    /// The first key that a query may see, not falling along a sequence and not behind the query's
    /// own, `[batch, seq]`; absent: 0.
    pub starts: Option<Arc<Vec<u32>>>,
    /// Which tokens stand behind which, where it is not each behind the one before it.
    pub forest: Option<Arc<Forest>>,
    /// Made when first asked for: the kernel does without.
    mask: OnceLock<Tensor<4>>,
}

impl Sight {
    /// As its fields.
    pub fn new(
        [past, seq, copies]: [usize; 3],
        window: Option<usize>,
        starts: Option<Arc<Vec<u32>>>,
    ) -> Self {
        let window = window.unwrap_or(usize::MAX);
        Self { past, seq, copies, window, starts, forest: None, mask: OnceLock::new() }
    }

    /// Of sequences that share their beginnings.
    pub fn of_forest(forest: Arc<Forest>, copies: usize, window: Option<usize>) -> Self {
        let sizes = [0, forest.len, copies];
        Self { forest: Some(forest), ..Self::new(sizes, window, None) }
    }

    /// 0 or -inf, `[1 or batch, 1, heads per kv head * seq, past + seq]`, of the type and on the device
    /// of `like`.
    fn mask<const D: usize>(&self, like: &Tensor<D>) -> Tensor<4> {
        let make = || {
            if let Some(forest) = &self.forest {
                let mask = forest.mask(self.copies, self.window, &like.device());
                return mask.cast(like.dtype());
            }
            self.made_there(&like.device()).cast(like.dtype())
        };
        self.mask.get_or_init(make).clone()
    }
}

impl Sight {
    /// The mask computed on a device, from the starts of documents alone.
    fn made_there(&self, device: &Device) -> Tensor<4> {
        let Self { past, seq, copies, window, .. } = *self;
        let total = past + seq;
        let count = |n: usize| Tensor::<1, Int>::arange(0..n.cast_signed() as i64, device);
        // Of each query: its place, and the first one that it sees.
        let query = count(seq).reshape([1, seq, 1]) + past.cast_signed() as i64;
        let mut first = match &self.starts {
            None => query.zeros_like(),
            Some(starts) => {
                let starts: Vec<i32> = starts.iter().map(|start| start.cast_signed()).collect();
                let shape = [starts.len().checked_div(seq).unwrap_or(1), seq, 1];
                Tensor::<3, Int>::from_data(TensorData::new(starts, shape), device)
            }
        };
        if window < total {
            let seen = query.clone() - (window.cast_signed() as i64 - 1);
            let seen = seen.expand(first.dims());
            first = first.max_pair(seen);
        }
        let sequences = first.dims()[0];
        let key = count(total).reshape([1, 1, total]).expand([sequences, seq, total]);
        let query = query.expand([sequences, seq, total]);
        let first = first.expand([sequences, seq, total]);
        let hidden = key.clone().greater(query).bool_or(key.lower(first));
        let mask = Tensor::<3>::zeros([sequences, seq, total], device);
        let mask = mask.mask_fill(hidden, f32::NEG_INFINITY);
        mask.repeat_dim(1, copies).reshape([sequences, 1, copies * seq, total])
    }
}

impl Attending {
    /// `[batch, seq, heads * head_dim]` as `[batch, heads, seq, head_dim]`.
    pub fn heads(&self, x: Tensor<3>) -> Tensor<4> {
        let [batch, seq, width] = x.dims();
        let head_dim = self.scores.head_dim;
        x.reshape([batch, seq, width / head_dim, head_dim]).swap_dims(1, 2)
    }

    /// Rotates `[batch, heads, seq, head_dim]`.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let [batch, heads, seq, head_dim] = x.dims();
        #[cfg(feature = "flex")]
        if reads_plain(&x) && reads_plain(&self.cos) {
            let [x, cos, sin] =
                [x, self.cos.clone(), self.sin.clone()].map(|x| Rows::of(x.into_dispatch()));
            let tables = attention_kernel::Tables {
                each: cos.shape()[0] > 1,
                cos: cos.values(),
                sin: sin.values(),
                starts: None,
            };
            let sizes = [batch, heads, seq, head_dim];
            let neighbours = self.scores.neighbours;
            let out = attention_kernel::rotated(x.values(), sizes, tables, neighbours);
            return tensor(x.like(out).plain());
        }
        let half = self.cos.dims()[3];
        let rotated = x.clone().narrow(3, 0, 2 * half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let turn = |first: Tensor<4>, second: Tensor<4>| {
            let turned = first.clone() * cos.clone() - second.clone() * sin.clone();
            [turned, second * cos.clone() + first * sin.clone()]
        };
        let rotated = if self.scores.neighbours {
            let pairs = rotated.reshape([batch, heads, seq, half, 2]);
            let side = |i| pairs.clone().narrow(4, i, 1).squeeze_dim::<4>(4);
            let turned = turn(side(0), side(1)).map(|x| x.unsqueeze_dim::<5>(4));
            Tensor::cat(turned.into(), 4).reshape([batch, heads, seq, 2 * half])
        } else {
            let turned = turn(rotated.clone().narrow(3, 0, half), rotated.narrow(3, half, half));
            Tensor::cat(turned.into(), 3)
        };
        if 2 * half == head_dim {
            return rotated;
        }
        Tensor::cat(vec![rotated, x.narrow(3, 2 * half, head_dim - 2 * half)], 3)
    }

    /// Softmax attention of rotated queries over rotated keys.
    ///
    /// # Shapes
    /// - q: `[batch, heads, seq, head_dim]`; k, v: `[batch, kv_heads, past + seq, head_dim]`
    /// - result: `[batch, seq, heads * head_dim]`
    pub fn attend(&self, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<3> {
        #[cfg(feature = "flex")]
        if self.sight.seq <= FEW && self.sight.forest.is_none() {
            let operands = [&q, &k, &v];
            if operands.iter().all(|x| reads_plain(*x)) {
                return self.attend_by_few(operands.map(Tensor::clone));
            }
        }
        let mask = self.sight.mask(&self.cos);
        let [_, heads, ..] = q.dims();
        self.mixed(self.weights(q, k, mask), v, heads)
    }

    /// As [`Attending::attend`], of few queries off the tape; keys and values are read where they lie.
    #[cfg(feature = "flex")]
    fn attend_by_few(&self, [q, k, v]: [Tensor<4>; 3]) -> Tensor<3> {
        let [batch, heads, seq, head_dim] = q.dims();
        let q = Rows::of(q.into_dispatch());
        let [k, v] = [k, v].map(|x| Heads::of(x.into_dispatch()));
        let shape = self.scores.sizes([batch, seq, heads, k.heads()]);
        let held: [&attention_kernel::Held<'_>; 2] = [&|b, h| k.head(b, h), &|b, h| v.head(b, h)];
        let (past, starts) = (self.sight.past, self.sight.starts.as_deref().map(Vec::as_slice));
        let out = attention_kernel::few_attention(&shape, past, q.values(), held, starts);
        tensor(Rows::new(out, [batch, seq, heads * head_dim]).plain())
    }

    /// What each query gives to each key, of rotated ones; rows sum to 1.
    ///
    /// # Shapes
    /// - q: `[batch, heads, seq, head_dim]`; k: `[batch, kv_heads, keys, head_dim]`
    /// - mask: 0 or -inf, `[1 or batch, 1 or kv_heads, heads per kv head * seq, keys]`
    /// - result: `[batch, kv_heads, heads per kv head * seq, keys]`
    pub fn weights(&self, q: Tensor<4>, k: Tensor<4>, mask: Tensor<4>) -> Tensor<4> {
        let [batch, heads, seq, head_dim] = q.dims();
        let kv_heads = k.dims()[1];
        // The query heads that share a key head are stacked along the sequence, so that keys and
        // values are used as they are, never repeated.
        let stacked = [batch, kv_heads, heads / kv_heads * seq, head_dim];
        let scale = self.scores.scale.unwrap_or((head_dim as f64).powf(-0.5));
        let scores = (q * scale).reshape(stacked).matmul(k.swap_dims(2, 3));
        let scores = match self.scores.cap {
            Some(cap) => (scores / cap).tanh() * cap,
            None => scores,
        };
        activation::softmax(scores + mask, 3)
    }

    /// The values that [`Attending::weights`] mix.
    ///
    /// # Shapes
    /// - weights: as they are given; v: `[batch, kv_heads, keys, head_dim]`
    /// - result: `[batch, seq, heads * head_dim]`
    pub fn mixed(&self, weights: Tensor<4>, v: Tensor<4>, heads: usize) -> Tensor<3> {
        let [batch, kv_heads, rows, _] = weights.dims();
        let (seq, head_dim) = (rows * kv_heads / heads, v.dims()[3]);
        let mixed = weights.matmul(v).reshape([batch, heads, seq, head_dim]).swap_dims(1, 2);
        mixed.reshape([batch, seq, heads * head_dim])
    }

    /// The queries with their factors.
    pub fn scaled(&self, q: Tensor<3>) -> Tensor<3> {
        match &self.query_factors {
            Some(factors) => q * factors.clone(),
            None => q,
        }
    }
}

/// Causal attention over one run of positions from 0.
///
/// # Shapes
/// - q, result: `[batch, seq, heads * head_dim]`
/// - k, v: `[batch, seq, kv_heads * head_dim]`
pub fn causal_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    attending: &Attending,
) -> Tensor<3> {
    let q = attending.scaled(q);
    #[cfg(feature = "flex")]
    if let Some(forest) = attending.sight.forest.as_deref().filter(|_| reads(&q)) {
        return forest_attention([q, k, v], attending, forest);
    }
    #[cfg(feature = "flex")]
    if reads(&q) {
        let operation = Attention {
            cos: bridge::frozen(attending.cos.clone()),
            sin: bridge::frozen(attending.sin.clone()),
            scores: attending.scores,
            starts: attending.sight.starts.clone(),
        };
        return tensor(bridge::apply(operation, [q, k, v].map(Tensor::into_dispatch)));
    }
    let [q, k, v] = [q, k, v].map(|x| attending.heads(x));
    attending.attend(attending.rotate(q), attending.rotate(k), v)
}

/// Whether an operation on this tensor runs as a kernel of ours.
pub fn has_kernel<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    return reads(x);
    #[cfg(not(feature = "flex"))]
    {
        let _ = x;
        false
    }
}

/// Causal attention of one packed sequence, off the tape.
#[cfg(feature = "flex")]
fn forest_attention(operands: [Tensor<3>; 3], attending: &Attending, forest: &Forest) -> Tensor<3> {
    let [q, k, v] = operands.map(|x| Rows::of(bridge::frozen(x)));
    let [cos, sin] =
        [&attending.cos, &attending.sin].map(|table| Rows::of(bridge::frozen(table.clone())));
    let mut out = vec![0.0; q.values().len()];
    attention_kernel::forest_attention(
        &shape_of(attending.scores, &q, &k),
        forest,
        [q.values(), k.values(), v.values()],
        attention_kernel::Tables {
            each: false,
            cos: cos.values(),
            sin: sin.values(),
            starts: None,
        },
        &mut out,
    );
    tensor(q.like(out).plain())
}

#[cfg(feature = "flex")]
fn shape_of(scores: Scores, q: &Rows, k: &Rows) -> attention_kernel::Shape {
    let (queries, keys) = (q.shape(), k.shape());
    let [heads, kv_heads] = [queries[2], keys[2]].map(|width| width / scores.head_dim);
    scores.sizes([queries[0], queries[1], heads, kv_heads])
}

#[cfg(feature = "flex")]
impl Scores {
    /// Of sequences, positions, query heads and key heads.
    fn sizes(self, [batch, seq, heads, kv_heads]: [usize; 4]) -> attention_kernel::Shape {
        let Self { head_dim, neighbours, window, scale, cap } = self;
        attention_kernel::Shape {
            batch,
            seq,
            heads,
            kv_heads,
            head_dim,
            neighbours,
            window: window.unwrap_or(usize::MAX),
            scale: scale.map_or((head_dim as f32).sqrt().recip(), |scale| scale as f32),
            cap: cap.map(|cap| cap as f32),
        }
    }
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct Attention {
    cos: Plain,
    sin: Plain,
    scores: Scores,
    starts: Option<Arc<Vec<u32>>>,
}

#[cfg(feature = "flex")]
impl Attention {
    /// Cosines and sines.
    fn angles(&self) -> [Rows; 2] {
        [&self.cos, &self.sin].map(|table| Rows::of(table.clone()))
    }

    fn tables<'a>(&'a self, [cos, sin]: &'a [Rows; 2]) -> attention_kernel::Tables<'a> {
        attention_kernel::Tables {
            each: cos.shape()[0] > 1,
            cos: cos.values(),
            sin: sin.values(),
            starts: self.starts.as_deref().map(Vec::as_slice),
        }
    }
}

#[cfg(feature = "flex")]
impl Operation<3> for Attention {
    /// The output, and the logarithm of each row's sum of exponentials.
    type Saved = (Plain, Arc<Vec<f32>>);
    const CHEAP: bool = false;

    fn forward(&self, inputs: [Plain; 3]) -> (Plain, Self::Saved) {
        let [q, k, v] = inputs.map(Rows::of);
        let angles = self.angles();
        let mut out = vec![0.0; q.values().len()];
        let log_sums = attention_kernel::attention(
            &shape_of(self.scores, &q, &k),
            q.values(),
            k.values(),
            v.values(),
            self.tables(&angles),
            &mut out,
        );
        let out = q.like(out).plain();
        (out.clone(), (out, Arc::new(log_sums)))
    }

    fn backward(
        &self,
        inputs: [Plain; 3],
        (out, log_sums): Self::Saved,
        gradient: Plain,
        _: [bool; 3],
    ) -> [Option<Plain>; 3] {
        let [q, k, v] = inputs.map(Rows::of);
        let angles = self.angles();
        let (out, gradient) = (Rows::of(out), Rows::of(gradient));
        let mut dq = vec![0.0; q.values().len()];
        let mut dk = vec![0.0; k.values().len()];
        let mut dv = vec![0.0; v.values().len()];
        attention_kernel::attention_backward(
            &shape_of(self.scores, &q, &k),
            gradient.values(),
            q.values(),
            k.values(),
            v.values(),
            self.tables(&angles),
            out.values(),
            &log_sums,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        [(q, dq), (k, dk), (v, dv)].map(|(like, values)| Some(like.like(values).plain()))
    }
}
