//! The few numbers that a step leaves: known at once where the device's memory is this machine's, and
//! elsewhere on the device until somebody asks for them.
//!
//! Every read of a device inside a step goes through [`read`], which counts.

use std::cell::Cell;

use burn::tensor::{Int, Tensor, TensorData};

use super::bridge::at_hand;

thread_local! {
    static READS: Cell<u64> = const { Cell::new(0) };
}

/// How often this thread has waited for numbers of a device. On this machine's processor there is nothing
/// to wait for, so nothing counts; under [`composed`](super::composed) it counts as a device would.
pub fn device_reads() -> u64 {
    READS.get()
}

/// The values of a tensor, row-major; waits for the device.
pub(super) fn read<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    if !at_hand(&x) {
        READS.set(READS.get() + 1);
    }
    x.into_data().iter::<f32>().collect()
}

/// Some numbers, the same ones wherever they are.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // handles, a few for each parameter
pub enum Numbers {
    /// At hand.
    Known(Vec<f64>),
    /// On a device, in f32, `[count]`.
    There(Tensor<1>),
}

impl Numbers {
    /// One that is known.
    pub fn one(value: f64) -> Self {
        Self::Known(vec![value])
    }

    /// The values of a tensor, `[count]`, off the tape: read at once where that is for nothing.
    pub fn of(x: Tensor<1>) -> Self {
        if at_hand(&x) {
            return Self::Known(read(x).into_iter().map(f64::from).collect());
        }
        Self::There(x)
    }

    /// Whether nothing has to be waited for.
    pub fn is_known(&self) -> bool {
        matches!(self, Self::Known(_))
    }

    /// Whether one is known not to be finite.
    pub fn is_bad(&self) -> bool {
        matches!(self, Self::Known(values) if values.iter().any(|x| !x.is_finite()))
    }

    /// Elementwise sum of as many numbers.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        match (self, other) {
            (Self::Known(a), Self::Known(b)) => {
                Self::Known(a.iter().zip(b).map(|(a, b)| a + b).collect())
            }
            (Self::There(a), b) => {
                let b = b.on_device_of(&a);
                Self::There(a + b)
            }
            (a, Self::There(b)) => {
                let a = a.on_device_of(&b);
                Self::There(a + b)
            }
        }
    }

    /// Each divided by a number.
    #[must_use]
    pub fn divided_by(self, divisor: f64) -> Self {
        match self {
            Self::Known(values) => Self::Known(values.iter().map(|x| x / divisor).collect()),
            Self::There(values) => Self::There(values / divisor),
        }
    }

    /// The root of each.
    #[must_use]
    pub fn root(self) -> Self {
        match self {
            Self::Known(values) => Self::Known(values.into_iter().map(f64::sqrt).collect()),
            Self::There(values) => Self::There(values.sqrt()),
        }
    }

    /// The sum of several of one number each; 0 of none.
    pub fn sum(several: impl IntoIterator<Item = Self>) -> Self {
        let (mut known, mut there) = (0.0, Vec::new());
        for numbers in several {
            match numbers {
                Self::Known(values) => values.into_iter().for_each(|x| known += x),
                Self::There(values) => there.push(values),
            }
        }
        let Some(first) = there.first() else { return Self::one(known) };
        if known != 0.0 {
            there.push(Self::one(known).on_device_of(first));
        }
        Self::There(Tensor::cat(there, 0).sum())
    }

    /// The values, waiting for a device if need be.
    pub fn values(&self) -> Vec<f64> {
        let mut own = [self.clone()];
        Self::read_all(own.iter_mut());
        let [own] = own;
        match own {
            Self::Known(values) => values,
            Self::There(_) => Vec::new(), // all are known now
        }
    }

    /// Makes all of them known by reading the device once.
    pub fn read_all<'a>(several: impl Iterator<Item = &'a mut Self>) {
        let waiting: Vec<&mut Self> = several.filter(|numbers| !numbers.is_known()).collect();
        let tensors: Vec<Tensor<1>> = waiting
            .iter()
            .filter_map(|numbers| match numbers {
                Self::There(tensor) => Some(tensor.clone()),
                Self::Known(_) => None,
            })
            .collect();
        if tensors.is_empty() {
            return;
        }
        let counts: Vec<usize> = tensors.iter().map(|tensor| tensor.dims()[0]).collect();
        let all = read(Tensor::cat(tensors, 0));
        let mut rest = all.as_slice();
        for (numbers, count) in waiting.into_iter().zip(counts) {
            let (own, others) = rest.split_at(count);
            rest = others;
            *numbers = Self::Known(own.iter().copied().map(f64::from).collect());
        }
    }

    /// The values on the device of `like`, `[count]`.
    pub fn on_device_of<const D: usize>(self, like: &Tensor<D>) -> Tensor<1> {
        match self {
            Self::There(values) => values,
            Self::Known(values) => {
                let values: Vec<f32> = values.into_iter().map(|x| x as f32).collect();
                let count = values.len();
                Tensor::from_data(TensorData::new(values, [count]), &like.device())
            }
        }
    }
}

/// What a step makes of its gradients' norm where that is on a device: `[3]`, by what gradients are
/// multiplied, by what rates are, and 1, or 0 where the norm is no number and nothing may change.
#[derive(Clone, Debug)]
pub struct Restraint(Tensor<1>);

impl Restraint {
    /// From the norm `[1]` of the gradients and the largest one before it, with that norm or a larger one as the
    /// new largest. Gradients shrink to the norm `clip`; rates shrink with a norm below `collapsed` times the
    /// largest.
    pub fn new(
        norm: &Tensor<1>,
        largest: Tensor<1>,
        clip: Option<f64>,
        collapsed: f64,
    ) -> (Self, Tensor<1>) {
        let finite = norm.clone().is_finite();
        let largest =
            largest.clone().max_pair(norm.clone()).mask_where(finite.clone().bool_not(), largest);
        let shrink = match clip {
            // PyTorch's clip_grad_norm_: the small constant keeps a zero norm from dividing.
            Some(clip) => ((norm.clone() + 1e-6).recip() * clip).clamp_max(1.0),
            None => norm.ones_like(),
        };
        let least = largest.clone() * collapsed;
        let low = norm.clone().lower(least.clone());
        let damping = norm.ones_like().mask_where(low, norm.clone() / least);
        (Self(Tensor::cat(vec![shrink, damping, finite.float()], 0)), largest)
    }

    /// The three numbers, `[3]`.
    pub(super) fn tensor(&self) -> &Tensor<1> {
        &self.0
    }

    fn part<const D: usize>(&self, index: usize) -> Tensor<D> {
        self.0.clone().narrow(0, index, 1).reshape([1; D])
    }

    /// A gradient, clipped.
    #[must_use]
    pub(super) fn shrink<const D: usize>(&self, gradient: Tensor<D>) -> Tensor<D> {
        gradient * self.part(0)
    }

    /// What rates are multiplied by, `[1, ..]`.
    pub(super) fn damping<const D: usize>(&self) -> Tensor<D> {
        self.part(1)
    }

    /// `new`, or `old` where nothing may change.
    #[must_use]
    pub fn choose<const D: usize>(&self, new: Tensor<D>, old: Tensor<D>) -> Tensor<D> {
        let stop = self.part::<D>(2).equal_elem(0.0).expand(new.dims());
        new.mask_where(stop, old)
    }

    /// As [`Restraint::choose`], of words.
    pub(super) fn choose_words(&self, new: Tensor<2, Int>, old: Tensor<2, Int>) -> Tensor<2, Int> {
        let stop = self.part::<2>(2).equal_elem(0.0).expand(new.dims());
        new.mask_where(stop, old)
    }

    /// A change of a parameter as it may be made.
    #[must_use]
    pub fn damp<const D: usize>(&self, change: Tensor<D>) -> Tensor<D> {
        let nothing = change.zeros_like();
        self.choose(change * self.damping(), nothing)
    }
}
