//! Matrix products on the tape. On this machine's processor they run on faer, which has wider vector
//! code than the backend and takes either orientation without a copy; elsewhere on the backend's own.

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use super::bridge::{self, Operation, Plain, Rows, reads, tensor};
#[cfg(feature = "flex")]
use super::kernel::linear as kernel;

/// `x W`, as burn's linear has it.
///
/// # Shapes
/// - x: `[.., in]`
/// - weight: `[in, out]`; fastest as the transposed view of a row-major `[out, in]`
/// - result: `[.., out]`
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if reads(&x) && reads(&weight) {
        let inputs = [x.into_dispatch(), weight.transpose().into_dispatch()];
        return tensor(bridge::apply(Linear, inputs));
    }
    x.matmul(weight.unsqueeze())
}

/// `A B`.
///
/// # Shapes
/// - left: `[m, k]`, right: `[k, n]`, result: `[m, n]`
pub fn matmul(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if reads(&left) && reads(&right) {
        return tensor(bridge::apply(Product, [left, right].map(Tensor::into_dispatch)));
    }
    left.matmul(right)
}

/// `x Wᵀ` with both row-major: `[.., in]` and `[out, in]`.
#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct Linear;

#[cfg(feature = "flex")]
impl Operation<2> for Linear {
    type Saved = ();
    const CHEAP: bool = false;

    fn forward(&self, inputs: [Plain; 2]) -> (Plain, ()) {
        let [x, weight] = inputs.map(Rows::of);
        let ([rows, inputs], [out, _]) = (x.matrix(), weight.matrix());
        let y = kernel::times_transposed(x.values(), weight.values(), [rows, inputs, out]);
        let mut shape = x.shape();
        if let Some(last) = shape.last_mut() {
            *last = out;
        }
        (Rows::new(y, shape).plain(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 2],
        (): (),
        gradient: Plain,
        wanted: [bool; 2],
    ) -> [Option<Plain>; 2] {
        let ([x, weight], gradient) = (inputs.map(Rows::of), Rows::of(gradient));
        let ([rows, inputs], [out, _]) = (x.matrix(), weight.matrix());
        let of_x = || kernel::times(gradient.values(), weight.values(), [rows, out, inputs]);
        let of_weight =
            || kernel::transposed_times(gradient.values(), x.values(), [out, rows, inputs]);
        [
            wanted[0].then(|| x.like(of_x()).plain()),
            wanted[1].then(|| weight.like(of_weight()).plain()),
        ]
    }
}

/// `A B`.
#[cfg(feature = "flex")]
#[derive(Clone, Debug)]
struct Product;

#[cfg(feature = "flex")]
impl Operation<2> for Product {
    type Saved = ();
    const CHEAP: bool = false;

    fn forward(&self, inputs: [Plain; 2]) -> (Plain, ()) {
        let [left, right] = inputs.map(Rows::of);
        let ([m, k], [_, n]) = (left.matrix(), right.matrix());
        (Rows::new(kernel::times(left.values(), right.values(), [m, k, n]), [m, n]).plain(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 2],
        (): (),
        gradient: Plain,
        wanted: [bool; 2],
    ) -> [Option<Plain>; 2] {
        let ([left, right], gradient) = (inputs.map(Rows::of), Rows::of(gradient));
        let ([m, k], [_, n]) = (left.matrix(), right.matrix());
        let of_left = || kernel::times_transposed(gradient.values(), right.values(), [m, n, k]);
        let of_right = || kernel::transposed_times(left.values(), gradient.values(), [k, m, n]);
        [
            wanted[0].then(|| left.like(of_left()).plain()),
            wanted[1].then(|| right.like(of_right()).plain()),
        ]
    }
}
