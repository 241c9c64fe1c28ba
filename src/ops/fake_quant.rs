//! Straight-through rounding and the fake-quantizers of the uniform family. Weights are in grouped
//! form `[groups, group_len]`, with per-group parameters `[groups, 1]`.
//!
//! A quantizer gives codes (off the tape, to be stored) or the values they stand for (on it). Both
//! come from one function, so what is trained is what is exported. On this machine's processor it
//! is one pass over the weight each way; elsewhere it is composed. Either way the tape holds the
//! inputs alone.

mod divided;
mod stepped;

use burn::tensor::Tensor;

pub use self::divided::Divided;
pub use self::stepped::{Rule, Stepped, TieRule};
use super::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use super::bridge::{Rows, fused};
#[cfg(feature = "flex")]
use super::kernel::fake_quant as kernel;

/// `round(x)`, ties to even, with gradient 1 (straight-through estimator).
///
/// The forward value is exactly the integer: `x + (round(x) - x)` cancels without a rounding
/// error (Sterbenz).
pub fn round_ste<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let rounding = (x.clone().round() - x.clone()).detach();
    x + rounding
}

/// `x` unchanged, with its gradient multiplied by `factor` (LSQ's step-size gradient scale).
///
/// Adds an exact zero, so the forward value keeps every bit.
pub fn scale_gradient<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    let scaled = x.clone() * factor;
    x.detach() + (scaled.clone() - scaled.detach())
}

/// `clamp(x, low, high)` with gradient 1 everywhere: what lies outside can come back.
///
/// The forward value is exactly the clamp's.
pub fn clamp_ste<const D: usize>(x: Tensor<D>, low: f32, high: f32) -> Tensor<D> {
    x.clone().clamp(low, high).detach() + (x.clone() - x.detach())
}

/// The nearest numbers of `significant` bits, fewer than f32's 24 (Veltkamp's splitting); the
/// gradient is 1.
pub fn shorten_ste<const D: usize>(x: Tensor<D>, significant: u32) -> Tensor<D> {
    let factor = f64::from(1_u32 << (f32::MANTISSA_DIGITS - significant)) + 1.0;
    let split = x.clone() * factor;
    let short = split.clone() - (split - x.clone());
    // The difference is exact, and so is the sum.
    x.clone() + (short - x).detach()
}

/// The values of a tensor that may be on the tape, off it.
pub fn off_tape(x: Tensor<2>) -> Tensor<2> {
    tensor(bridge::off_tape(x.into_dispatch()))
}

/// A weight in any float rank-2 layout as `[groups, group_len]`; free when it is contiguous.
pub fn reshape_grouped(weight: Tensor<2>, grouped: [usize; 2]) -> Tensor<2> {
    if weight.dims() == grouped { weight } else { weight.reshape(grouped) }
}

/// Of every so many rows the first; what is left over at the end has none.
///
/// # Shapes
/// - x: `[rows, len]`
/// - result: `[rows / every, len]`
pub fn every_row(x: Tensor<2>, every: usize) -> Tensor<2> {
    let [rows, len] = x.dims();
    let some = rows / every.max(1);
    if every <= 1 || some == 0 {
        return x;
    }
    // No indices to bring to a device.
    x.narrow(0, 0, some * every).reshape([some, every * len]).narrow(1, 0, len)
}

/// `e^x`: the step of a quantizer from its logarithm. The same function as inside the quantizers,
/// bit for bit.
///
/// # Shapes
/// - x, result: any of rank 2
pub fn exp(x: Tensor<2>) -> Tensor<2> {
    tensor(bridge::apply(Exp, [x.into_dispatch()]))
}

#[derive(Clone, Debug)]
struct Exp;

impl Operation<1> for Exp {
    type Saved = Plain;
    const CHEAP: bool = true;

    fn forward(&self, [x]: [Plain; 1]) -> (Plain, Plain) {
        #[cfg(feature = "flex")]
        if fused(&x) {
            let x = Rows::of(x);
            let y = x.like(kernel::exp(x.values())).plain();
            return (y.clone(), y);
        }
        let y = tensor::<2>(x).exp().into_dispatch();
        (y.clone(), y)
    }

    fn backward(&self, _: [Plain; 1], y: Plain, g: Plain, _: [bool; 1]) -> [Option<Plain>; 1] {
        [Some((tensor::<2>(g) * tensor::<2>(y)).into_dispatch())]
    }
}

/// What a quantizer gives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Output {
    /// Integer codes.
    Codes,
    /// The values they stand for.
    Values,
}
