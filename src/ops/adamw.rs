//! AdamW's update of one parameter, in place where the buffer is not shared: nothing of the
//! parameter's size is allocated. (burn's keeps three such transients.)

use burn::tensor::Tensor;

#[cfg(feature = "flex")]
use super::bridge::{self, Rows, reads};
use super::bridge::{Plain, tensor};
#[cfg(feature = "flex")]
use super::kernel::adamw as kernel;

/// One step's numbers (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Clone, Copy, Debug)]
pub struct AdamWStep {
    /// By what gradients are multiplied first (clipping).
    pub shrink: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub epsilon: f64,
    /// Learning rate.
    pub rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The number of this step, from 1.
    pub step: u64,
}

impl AdamWStep {
    /// What the moments have to be divided by, for they start at zero.
    fn corrections(&self) -> [f64; 2] {
        let steps = self.step as f64;
        [1.0 - self.beta1.powf(steps), 1.0 - self.beta2.powf(steps)]
    }

    fn keep(&self) -> f64 {
        1.0 - self.rate * self.weight_decay
    }
}

/// The running means of a parameter's gradient and of its square, shaped as the parameter.
#[derive(Clone, Debug)]
pub struct Moments {
    first: Plain,
    second: Plain,
}

impl Moments {
    /// Both, for saving.
    pub fn tensors<const D: usize>(&self) -> [Tensor<D>; 2] {
        [&self.first, &self.second].map(|moment| tensor::<D>(moment.clone()))
    }

    /// From two tensors of the parameter's shape.
    pub fn new<const D: usize>(first: Tensor<D>, second: Tensor<D>) -> Self {
        Self { first: first.into_dispatch(), second: second.into_dispatch() }
    }
}

/// The parameter and its moments after a step; without moments they start at zero.
///
/// # Shapes
/// - parameter, gradient, result: the same, off the tape
pub fn adamw_step<const D: usize>(
    step: &AdamWStep,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Option<Moments>,
) -> (Tensor<D>, Moments) {
    adamw(step, None, parameter, gradient, moments)
}

/// As [`adamw_step`] for a linear's weight, with the learning rate in units that each group of the
/// weight has for itself.
///
/// # Shapes
/// - units: `[groups, 1]`, off the tape; groups are equal runs of the row-major `[out, in]` weight
/// - parameter, gradient, result: `[in, out]`, off the tape
pub fn adamw_step_in_units(
    step: &AdamWStep,
    units: Tensor<2>,
    parameter: Tensor<2>,
    gradient: Tensor<2>,
    moments: Option<Moments>,
) -> (Tensor<2>, Moments) {
    adamw(step, Some(units), parameter, gradient, moments)
}

fn adamw<const D: usize>(
    step: &AdamWStep,
    units: Option<Tensor<2>>,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Option<Moments>,
) -> (Tensor<D>, Moments) {
    let moments = moments.unwrap_or_else(|| {
        // As the parameter lies in memory, so that a transposed one is never copied.
        Moments::new(zeros(&parameter), zeros(&parameter))
    });
    let Moments { first, second } = moments;
    #[cfg(feature = "flex")]
    if reads(&parameter) {
        // A transposed view of a row-major matrix is updated as that matrix.
        let flip = units.is_some() || D == 2 && is_transposed(&parameter);
        let orient = |tensor: Tensor<D>| if flip { tensor.transpose() } else { tensor };
        let rows = |tensor: Tensor<D>| Rows::of(bridge::frozen(orient(tensor)));
        let [mut first, mut second] = [first, second].map(|moment| rows(tensor(moment)));
        let gradient = rows(gradient);
        let mut parameter = rows(parameter);
        let [correction1, correction2] = step.corrections();
        let numbers = kernel::AdamW {
            shrink: step.shrink as f32,
            beta1: step.beta1 as f32,
            beta2: step.beta2 as f32,
            new: [(1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32],
            epsilon: step.epsilon as f32,
            rate: (step.rate / correction1) as f32,
            correction2: (1.0 / correction2) as f32,
            keep: step.keep() as f32,
        };
        let means = [first.values_mut(), second.values_mut()];
        match units {
            None => kernel::step(numbers, parameter.values_mut(), gradient.values(), means),
            Some(units) => {
                let units = Rows::of(bridge::frozen(units));
                let (values, gradient) = (parameter.values_mut(), gradient.values());
                kernel::step_in_units(numbers, units.values(), values, gradient, means);
            }
        }
        let back = |rows: Rows| orient(tensor::<D>(rows.plain()));
        return (back(parameter), Moments::new(back(first), back(second)));
    }
    let gradient = gradient * step.shrink;
    let first = tensor::<D>(first) * step.beta1 + gradient.clone() * (1.0 - step.beta1);
    let second = tensor::<D>(second) * step.beta2 + gradient.square() * (1.0 - step.beta2);
    let [correction1, correction2] = step.corrections();
    let root = (second.clone() / correction2).sqrt() + step.epsilon;
    let delta = first.clone() / root * (step.rate / correction1);
    let delta = match units {
        None => delta,
        Some(units) => {
            // `[in, out]` seen as `[groups, group_len]` of its transpose.
            let [groups, _] = units.dims();
            let shape = delta.dims();
            let transposed =
                delta.transpose().reshape([groups, shape.iter().product::<usize>() / groups]);
            let scaled = transposed * units;
            scaled.reshape([shape[1], shape[0]]).transpose().reshape(shape)
        }
    };
    (parameter * step.keep() - delta, Moments::new(first, second))
}

/// The sum of squares, in f64.
pub fn squared_norm<const D: usize>(x: Tensor<D>) -> f64 {
    #[cfg(feature = "flex")]
    if reads(&x) {
        let x = if D == 2 && is_transposed(&x) { x.transpose() } else { x };
        return kernel::squared_norm(Rows::of(x.into_dispatch()).values());
    }
    f64::from(x.square().sum().into_scalar::<f32>())
}

/// Zeros in the layout of `like`.
fn zeros<const D: usize>(like: &Tensor<D>) -> Tensor<D> {
    if lies_transposed(like) {
        return like.clone().transpose().zeros_like().transpose();
    }
    like.zeros_like()
}

/// `x` as `like` lies in memory, row-major or as the transposed view of a row-major matrix: a weight
/// that was read again is as fast as the one that it replaces.
///
/// # Shapes
/// - like, x, result: the same, off the tape
pub fn laid_out_like<const D: usize>(like: &Tensor<D>, x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "flex")]
    if D == 2 && reads(like) && is_transposed(like) {
        let rows = Rows::of(x.transpose().into_dispatch());
        return tensor::<D>(rows.plain()).transpose();
    }
    let _ = like;
    x
}

/// Whether a tensor is a matrix that lies in memory as the transposed view of a row-major one; never where
/// layouts are the device's own affair.
pub fn lies_transposed<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    if D == 2 && reads(x) {
        return is_transposed(x);
    }
    let _ = x;
    false
}

#[cfg(feature = "flex")]
fn is_transposed<const D: usize>(x: &Tensor<D>) -> bool {
    let contiguous = |x: Tensor<D>| Rows::is_row_major(&x.into_dispatch());
    !contiguous(x.clone()) && contiguous(x.clone().transpose())
}
