//! Causal attention with grouped key and value heads: rotated or not, over all earlier positions or a
//! window of them. One operation on the tape.

use burn::tensor::{Tensor, activation};

#[cfg(feature = "flex")]
use {
    super::bridge::{self, Operation, Plain, Rows, reads, tensor},
    super::kernel::attention as attention_kernel,
    std::sync::Arc,
};

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
    /// `[1, 1, seq, rotated / 2]`; the features behind the rotated ones pass.
    pub cos: Tensor<4>,
    /// `[1, 1, seq, rotated / 2]`.
    pub sin: Tensor<4>,
    /// Factors of the queries, `[1, seq, 1]`.
    pub query_factors: Option<Tensor<3>>,
    /// 0 or -inf, `[1, 1, heads per kv head * seq, past + seq]`.
    pub mask: Tensor<4>,
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
        let weights = activation::softmax(scores + self.mask.clone(), 3);
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
    if reads(&q) {
        let operation = Attention {
            cos: bridge::frozen(attending.cos.clone()),
            sin: bridge::frozen(attending.sin.clone()),
            scores: attending.scores,
        };
        return tensor(bridge::apply(operation, [q, k, v].map(Tensor::into_dispatch)));
    }
    let [q, k, v] = [q, k, v].map(|x| attending.heads(x));
    attending.attend(attending.rotate(q), attending.rotate(k), v)
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct Attention {
    cos: Plain,
    sin: Plain,
    scores: Scores,
}

#[cfg(feature = "flex")]
impl Attention {
    fn shape(&self, q: &Rows, k: &Rows) -> attention_kernel::Shape {
        let Scores { head_dim, neighbours, window, scale, cap } = self.scores;
        let (queries, keys) = (q.shape(), k.shape());
        attention_kernel::Shape {
            batch: queries[0],
            seq: queries[1],
            heads: queries[2] / head_dim,
            kv_heads: keys[2] / head_dim,
            head_dim,
            neighbours,
            window: window.unwrap_or(usize::MAX),
            scale: scale.map_or((head_dim as f32).sqrt().recip(), |scale| scale as f32),
            cap: cap.map(|cap| cap as f32),
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
        let [cos, sin] = [&self.cos, &self.sin].map(|table| Rows::of(table.clone()));
        let mut out = vec![0.0; q.values().len()];
        let log_sums = attention_kernel::attention(
            &self.shape(&q, &k),
            q.values(),
            k.values(),
            v.values(),
            cos.values(),
            sin.values(),
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
        let [cos, sin] = [&self.cos, &self.sin].map(|table| Rows::of(table.clone()));
        let (out, gradient) = (Rows::of(out), Rows::of(gradient));
        let mut dq = vec![0.0; q.values().len()];
        let mut dk = vec![0.0; k.values().len()];
        let mut dv = vec![0.0; v.values().len()];
        attention_kernel::attention_backward(
            &self.shape(&q, &k),
            gradient.values(),
            q.values(),
            k.values(),
            v.values(),
            cos.values(),
            sin.values(),
            out.values(),
            &log_sums,
            &mut dq,
            &mut dk,
            &mut dv,
        );
        [(q, dq), (k, dk), (v, dv)].map(|(like, values)| Some(like.like(values).plain()))
    }
}
