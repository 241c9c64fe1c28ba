//! AdamW's update of one parameter, in place where the buffer is not shared: nothing of the
//! parameter's size is allocated. (burn's keeps three such transients.)

#[cfg(feature = "flex")]
use std::sync::Arc;

use burn::tensor::{DType, Tensor};

use super::bridge::tensor;
#[cfg(feature = "flex")]
use super::bridge::{self, Rows, in_memory, reads};
#[cfg(feature = "gpu")]
use super::cube;
#[cfg(feature = "flex")]
use super::kernel::{adamw as kernel, moments as kernel8};
#[cfg(feature = "flex")]
use super::moments::Half;
use super::moments::{Int8Moments, Moments};
#[cfg(feature = "flex")]
use super::numbers::read;
use super::numbers::{Numbers, Restraint};

/// One step's numbers (Loshchilov and Hutter 2019, algorithm 2).
#[derive(Clone, Debug)]
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
    /// What more gradients and rates are multiplied by, where that is known on a device alone.
    pub restraint: Option<Restraint>,
}

impl AdamWStep {
    /// What the moments have to be divided by, for they start at zero.
    pub(super) fn corrections(&self) -> [f64; 2] {
        let steps = self.step as f64;
        [1.0 - self.beta1.powf(steps), 1.0 - self.beta2.powf(steps)]
    }

    pub(super) fn keep(&self) -> f64 {
        1.0 - self.rate * self.weight_decay
    }

    /// With what a restraint says, which is at hand; `None` where nothing may change.
    #[cfg(feature = "flex")]
    fn at_hand(&self) -> Option<Self> {
        let Some(restraint) = &self.restraint else { return Some(self.clone()) };
        let [shrink, damping, go]: [f32; 3] = read(restraint.tensor().clone()).try_into().ok()?;
        let (shrink, rate) = (self.shrink * f64::from(shrink), self.rate * f64::from(damping));
        (go > 0.0).then(|| Self { shrink, rate, restraint: None, ..self.clone() })
    }

    /// What a parameter is multiplied by, composed.
    pub(super) fn kept<const D: usize>(&self, parameter: Tensor<D>) -> Tensor<D> {
        match &self.restraint {
            Some(restraint) if self.weight_decay > 0.0 => {
                parameter * (restraint.damping() * (-self.rate * self.weight_decay) + 1.0)
            }
            _ => parameter * self.keep(),
        }
    }

    #[cfg(feature = "flex")]
    fn numbers(&self) -> kernel::AdamW {
        let [correction1, correction2] = self.corrections();
        kernel::AdamW {
            shrink: self.shrink as f32,
            beta1: self.beta1 as f32,
            beta2: self.beta2 as f32,
            new: [(1.0 - self.beta1) as f32, (1.0 - self.beta2) as f32],
            epsilon: self.epsilon as f32,
            rate: (self.rate / correction1) as f32,
            correction2: (1.0 / correction2) as f32,
            keep: self.keep() as f32,
        }
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
    let moments = match moments {
        Moments::Int8(moments) => {
            let (parameter, moments) = int8(step, units, parameter, gradient, moments);
            return (parameter, Moments::Int8(moments));
        }
        Moments::F32(_) => moments.tensors::<D>(),
    };
    #[cfg(feature = "flex")]
    if reads(&parameter) {
        // A transposed view of a row-major matrix is updated as that matrix.
        let flip = units.is_some() || D == 2 && is_transposed(&parameter);
        let orient = |tensor: Tensor<D>| if flip { tensor.transpose() } else { tensor };
        let rows = |tensor: Tensor<D>| Rows::of(bridge::frozen(orient(tensor)));
        let Some(step) = step.at_hand() else {
            let [first, second] = moments;
            return (parameter, Moments::new(first, second));
        };
        let [mut first, mut second] = moments.map(rows);
        let gradient = rows(gradient);
        let mut parameter = rows(parameter);
        let numbers = step.numbers();
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
    #[cfg(feature = "gpu")]
    if [&parameter, &gradient].iter().all(|&x| cube::reads(&x.clone().into_dispatch())) {
        return on_device(step, units, parameter, gradient, moments);
    }
    composed(step, units, parameter, gradient, moments)
}

/// As [`adamw`], by a kernel of a device.
#[cfg(feature = "gpu")]
fn on_device<const D: usize>(
    step: &AdamWStep,
    units: Option<Tensor<2>>,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
) -> (Tensor<D>, Moments) {
    let restraint = match &step.restraint {
        Some(restraint) => restraint.tensor().clone(),
        None => Tensor::ones([3], &parameter.device()),
    };
    let shape = parameter.dims();
    let [first, second] = moments;
    let tensors = [parameter, gradient, first, second].map(Tensor::into_dispatch);
    let units = units.map(Tensor::into_dispatch);
    let found = cube::adamw(step, &shape, units, tensors, restraint.into_dispatch());
    let [parameter, first, second] = found.map(tensor::<D>);
    (parameter, Moments::new(first, second))
}

/// As [`adamw`], composed from burn's operations.
fn composed<const D: usize>(
    step: &AdamWStep,
    units: Option<Tensor<2>>,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: [Tensor<D>; 2],
) -> (Tensor<D>, Moments) {
    let gradient = gradient * step.shrink;
    let gradient = match &step.restraint {
        Some(restraint) => restraint.shrink(gradient),
        None => gradient,
    };
    let [old_first, old_second] = moments;
    let first = old_first.clone() * step.beta1 + gradient.clone() * (1.0 - step.beta1);
    let second = old_second.clone() * step.beta2 + gradient.square() * (1.0 - step.beta2);
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
    let Some(restraint) = &step.restraint else {
        return (parameter * step.keep() - delta, Moments::new(first, second));
    };
    let next = step.kept(parameter.clone()) - delta * restraint.damping();
    let moments =
        Moments::new(restraint.choose(first, old_first), restraint.choose(second, old_second));
    (restraint.choose(next, parameter), moments)
}

/// As [`adamw`], with moments in 8 bits.
fn int8<const D: usize>(
    step: &AdamWStep,
    units: Option<Tensor<2>>,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Int8Moments,
) -> (Tensor<D>, Int8Moments) {
    #[cfg(feature = "flex")]
    if reads(&parameter) {
        let Some(step) = step.at_hand() else { return (parameter, moments) };
        let mut moments = moments;
        let transposed = moments.transposed;
        let orient = |tensor: Tensor<D>| if transposed { tensor.transpose() } else { tensor };
        let rows = |tensor: Tensor<D>| Rows::of(bridge::frozen(orient(tensor)));
        let (mut parameter, gradient) = (rows(parameter), rows(gradient));
        let units = units.map(|units| Rows::of(bridge::frozen(units)));
        let units = units.as_ref().map_or(&[1.0][..], Rows::values);
        let len = gradient.values().len();
        let [mut first, mut second] = moments.halves.map(|half| half.on_host(len));
        // Copied where a state that is being saved holds them too.
        let codes = [&mut first.0, &mut second.0].map(|codes| Arc::make_mut(codes).as_mut_slice());
        let scales =
            [&mut first.1, &mut second.1].map(|scales| Arc::make_mut(scales).as_mut_slice());
        let (values, gradient) = (parameter.values_mut(), gradient.values());
        kernel8::step(step.numbers(), units, values, gradient, codes, scales);
        moments.halves = [first, second].map(|(codes, scales)| Half::Host { codes, scales });
        return (orient(tensor::<D>(parameter.plain())), moments);
    }
    moments.step(step, units, parameter, gradient)
}

/// The sum of squares: in f64 where it is known, in f32 on a device.
pub fn squared_norm<const D: usize>(x: Tensor<D>) -> Numbers {
    #[cfg(feature = "flex")]
    if reads(&x) {
        let x = if D == 2 && is_transposed(&x) { x.transpose() } else { x };
        return Numbers::one(kernel::squared_norm(Rows::of(x.into_dispatch()).values()));
    }
    Numbers::of(x.cast(DType::F32).square().sum())
}

/// The squared Euclidean distance of two tensors of the same shape and layout, off the tape, one number.
pub fn squared_distance<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> Numbers {
    if lies_transposed(&a) && lies_transposed(&b) {
        return squared_norm(a.transpose() - b.transpose());
    }
    squared_norm(a - b)
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

/// Whether a tensor is a matrix in this machine's memory that lies there as the transposed view of a row-major
/// one, whatever form computes.
pub fn lies_transposed<const D: usize>(x: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    if D == 2 && in_memory(x) {
        return is_transposed(x);
    }
    let _ = x;
    false
}

/// Whether a matrix is the transposed view of a row-major one.
#[cfg(feature = "flex")]
fn is_transposed<const D: usize>(x: &Tensor<D>) -> bool {
    let contiguous = |x: Tensor<D>| Rows::is_row_major(&x.into_dispatch());
    !contiguous(x.clone()) && contiguous(x.clone().transpose())
}
