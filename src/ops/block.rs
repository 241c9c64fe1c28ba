//! What a decoder block does besides its linears and attention: norms, gated activation; and the
//! squared error of its output.

use burn::tensor::{DType, Tensor, activation};

#[cfg(feature = "flex")]
use {
    super::bridge::{self, Operation, Plain, Rows, reads, tensor},
    super::kernel::{mse, norm, swiglu as swiglu_kernel},
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

/// Layer norm: [`rms_norm`] of what is left without the mean, plus a bias.
///
/// # Shapes
/// - x, result: `[.., d_model]`
/// - gain, bias: `[d_model]`
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    gain: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let mean = x.clone().mean_dim(D - 1);
    let normed = rms_norm(x - mean, gain, eps);
    match bias {
        Some(bias) => normed + bias.unsqueeze(),
        None => normed,
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
