//! What a decoder block does besides its linears: RMS norm, rotary causal attention, gated
//! activation; and the squared error of its output. One operation each on the tape.

use burn::tensor::{DType, Tensor, activation};

#[cfg(feature = "flex")]
use {
    super::bridge::{self, Operation, Plain, Rows, reads, tensor},
    super::kernel::{attention as attention_kernel, mse, norm, swiglu as swiglu_kernel},
    std::sync::Arc,
};

/// `x / sqrt(mean(x^2) + eps)`, normalized in f32, times the gain in `x`'s own type.
///
/// # Shapes
/// - x, result: `[.., d_model]`
/// - gain: `[d_model]`
pub fn rms_norm<const D: usize>(x: Tensor<D>, gain: Tensor<1>, eps: f64) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if reads(&x) && reads(&gain) {
        let inputs = [x.into_dispatch(), gain.into_dispatch()];
        return tensor(bridge::apply(RmsNorm { eps: eps as f32 }, inputs));
    }
    let dtype = x.dtype();
    let wide = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
    let rms = (wide.clone().square().mean_dim(D - 1) + eps).sqrt();
    let normalized = wide / rms;
    let normalized = if dtype == DType::F32 { normalized } else { normalized.cast(dtype) };
    normalized * gain.unsqueeze()
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct RmsNorm {
    eps: f32,
}

#[cfg(feature = "flex")]
impl Operation<2> for RmsNorm {
    /// One over the root of each row's mean square.
    type Saved = Arc<Vec<f32>>;
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 2]) -> (Plain, Self::Saved) {
        let [x, gain] = inputs.map(Rows::of);
        let mut y = vec![0.0; x.values().len()];
        let inverse = norm::rms_norm(x.values(), gain.values(), self.eps, &mut y);
        (x.like(y).plain(), Arc::new(inverse))
    }

    fn backward(
        &self,
        inputs: [Plain; 2],
        inverse: Self::Saved,
        gradient: Plain,
        wanted: [bool; 2],
    ) -> [Option<Plain>; 2] {
        let ([x, gain], gradient) = (inputs.map(Rows::of), Rows::of(gradient));
        let mut dx = vec![0.0; x.values().len()];
        let mut dgain = wanted[1].then(|| vec![0.0; gain.values().len()]);
        norm::rms_norm_backward(
            gradient.values(),
            x.values(),
            gain.values(),
            &inverse,
            &mut dx,
            dgain.as_deref_mut(),
        );
        [Some(x.like(dx).plain()), dgain.map(|dgain| gain.like(dgain).plain())]
    }
}

/// `silu(gate) * up`.
///
/// # Shapes
/// - gate, up, result: the same
pub fn swiglu<const D: usize>(gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if reads(&gate) {
        return tensor(bridge::apply(SwiGlu, [gate, up].map(Tensor::into_dispatch)));
    }
    activation::silu(gate) * up
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct SwiGlu;

#[cfg(feature = "flex")]
impl Operation<2> for SwiGlu {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 2]) -> (Plain, ()) {
        let [gate, up] = inputs.map(Rows::of);
        let mut out = vec![0.0; gate.values().len()];
        swiglu_kernel::swiglu(gate.values(), up.values(), &mut out);
        (gate.like(out).plain(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 2],
        (): (),
        gradient: Plain,
        _: [bool; 2],
    ) -> [Option<Plain>; 2] {
        let ([gate, up], gradient) = (inputs.map(Rows::of), Rows::of(gradient));
        let mut dgate = vec![0.0; gate.values().len()];
        let mut dup = vec![0.0; gate.values().len()];
        let (d, g, u) = (gradient.values(), gate.values(), up.values());
        swiglu_kernel::swiglu_backward(d, g, u, &mut dgate, &mut dup);
        [Some(gate.like(dgate).plain()), Some(up.like(dup).plain())]
    }
}

/// Rotary tables and the causal mask of a run of positions.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[1, 1, seq, head_dim / 2]`.
    pub cos: Tensor<4>,
    /// `[1, 1, seq, head_dim / 2]`.
    pub sin: Tensor<4>,
    /// 0 or -inf, `[1, 1, heads per kv head * seq, past + seq]`.
    pub mask: Tensor<4>,
}

impl Rotary {
    /// `[batch, seq, heads * head_dim]` as `[batch, heads, seq, head_dim]`.
    pub fn heads(x: Tensor<3>, head_dim: usize) -> Tensor<4> {
        let [batch, seq, width] = x.dims();
        x.reshape([batch, seq, width / head_dim, head_dim]).swap_dims(1, 2)
    }

    /// Rotates `[batch, heads, seq, head_dim]`: half of the features against the other half.
    pub fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let first = x.clone().narrow(3, 0, half);
        let second = x.narrow(3, half, half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
        let rotated_second = second * cos + first * sin;
        Tensor::cat(vec![rotated_first, rotated_second], 3)
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
        let scale = (head_dim as f64).powf(-0.5);
        let scores = (q * scale).reshape(stacked).matmul(k.swap_dims(2, 3));
        let weights = activation::softmax(scores + self.mask.clone(), 3);
        let mixed = weights.matmul(v).reshape([batch, heads, seq, head_dim]).swap_dims(1, 2);
        mixed.reshape([batch, seq, heads * head_dim])
    }
}

/// Rotary causal attention with grouped key and value heads, over one run of positions from 0.
///
/// # Shapes
/// - q, result: `[batch, seq, heads * head_dim]`
/// - k, v: `[batch, seq, kv_heads * head_dim]`
pub fn causal_attention(
    q: Tensor<3>,
    k: Tensor<3>,
    v: Tensor<3>,
    rotary: &Rotary,
    head_dim: usize,
) -> Tensor<3> {
    #[cfg(feature = "flex")]
    if reads(&q) {
        let operation = Attention {
            cos: bridge::frozen(rotary.cos.clone()),
            sin: bridge::frozen(rotary.sin.clone()),
            head_dim,
        };
        return tensor(bridge::apply(operation, [q, k, v].map(Tensor::into_dispatch)));
    }
    let q = rotary.rotate(Rotary::heads(q, head_dim));
    let k = rotary.rotate(Rotary::heads(k, head_dim));
    rotary.attend(q, k, Rotary::heads(v, head_dim))
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct Attention {
    cos: Plain,
    sin: Plain,
    head_dim: usize,
}

#[cfg(feature = "flex")]
impl Attention {
    fn shape(&self, q: &Rows, k: &Rows) -> attention_kernel::Shape {
        let (queries, keys) = (q.shape(), k.shape());
        attention_kernel::Shape {
            batch: queries[0],
            seq: queries[1],
            heads: queries[2] / self.head_dim,
            kv_heads: keys[2] / self.head_dim,
            head_dim: self.head_dim,
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

/// Mean over all entries of the squared difference, `[1]`; with `sum_sequence` it is summed over
/// the sequence instead (the FlexRound code's form, `T` times as large).
///
/// # Shapes
/// - output, target: `[batch, seq, d_model]`
pub fn block_mse(output: Tensor<3>, target: Tensor<3>, sum_sequence: bool) -> Tensor<1> {
    let [_, seq, _] = output.dims();
    #[cfg(feature = "flex")]
    if reads(&output) {
        let factor = if sum_sequence { seq as f64 } else { 1.0 };
        let factor = factor / output.shape().num_elements() as f64;
        let operation = SquaredError { target: bridge::frozen(target), factor };
        return tensor(bridge::apply(operation, [output.into_dispatch()]));
    }
    let mse = (output - target).square().mean();
    if sum_sequence { mse * seq as f64 } else { mse }
}

#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct SquaredError {
    target: Plain,
    factor: f64,
}

#[cfg(feature = "flex")]
impl Operation<1> for SquaredError {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, [output]: [Plain; 1]) -> (Plain, ()) {
        let (output, target) = (Rows::of(output), Rows::of(self.target.clone()));
        let sum = mse::squared_error(output.values(), target.values());
        (Rows::new(vec![(sum * self.factor) as f32], [1]).plain(), ())
    }

    fn backward(
        &self,
        [output]: [Plain; 1],
        (): (),
        gradient: Plain,
        _: [bool; 1],
    ) -> [Option<Plain>; 1] {
        let (output, target) = (Rows::of(output), Rows::of(self.target.clone()));
        let upstream = Rows::of(gradient).values().first().copied().unwrap_or_default();
        let mut out = vec![0.0; output.values().len()];
        let factor = (2.0 * self.factor * f64::from(upstream)) as f32;
        mse::squared_error_gradient(output.values(), target.values(), factor, &mut out);
        [Some(output.like(out).plain())]
    }
}
