//! Matrix products on the tape. On this machine's processor they run on faer, which has wider vector
//! code than the backend and takes either orientation without a copy; elsewhere on the backend's own.

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use super::bridge::{self, Operation, Plain, Rows, fused, tensor};
#[cfg(feature = "flex")]
use super::kernel::linear as kernel;

/// `x W`, as burn's linear has it.
///
/// # Shapes
/// - x: `[.., in]`
/// - weight: `[in, out]`; fastest as the transposed view of a row-major `[out, in]`
/// - result: `[.., out]`
pub fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>) -> Tensor<D> {
    let shape = x.dims();
    let [inputs, out] = weight.dims();
    let rows = shape[..D - 1].iter().product();
    #[cfg(feature = "flex")]
    if fused(&x.clone().into_dispatch()) && fused(&weight.clone().into_dispatch()) {
        let x = flatten(x, [rows, inputs]).into_dispatch();
        let product = bridge::apply(Linear, [x, weight.transpose().into_dispatch()]);
        let mut shape = shape;
        shape[D - 1] = out;
        return unflatten(tensor(product), shape);
    }
    let _ = (rows, inputs, out);
    x.matmul(weight.unsqueeze())
}

fn flatten<const D: usize>(x: Tensor<D>, shape: [usize; 2]) -> Tensor<2> {
    if D == 2 { Tensor::from_dispatch(x.into_dispatch()) } else { x.reshape(shape) }
}

fn unflatten<const D: usize>(x: Tensor<2>, shape: [usize; D]) -> Tensor<D> {
    if D == 2 { Tensor::from_dispatch(x.into_dispatch()) } else { x.reshape(shape) }
}

/// `A B`.
///
/// # Shapes
/// - left: `[m, k]`, right: `[k, n]`, result: `[m, n]`
pub fn matmul(left: Tensor<2>, right: Tensor<2>) -> Tensor<2> {
    #[cfg(feature = "flex")]
    if fused(&left.clone().into_dispatch()) && fused(&right.clone().into_dispatch()) {
        return tensor(bridge::apply(Product, [left, right].map(Tensor::into_dispatch)));
    }
    left.matmul(right)
}

/// `x Wᵀ` with both row-major: `[rows, in]` and `[out, in]`.
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
        (Rows::new(y, [rows, out]).plain(), ())
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
