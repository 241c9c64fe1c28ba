//! The inner step loop shared by every training stage: gradients, clipping, AdamW, learning rate.
//!
//! Nothing here is hidden: a step is a pure function of the module, the optimizer state and the
//! step number, so a checkpoint of the first two and the third resumes bit for bit.

mod optim;
mod schedule;

use burn::module::{Module, ParamId};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

pub use optim::{
    LatentsIn, Later, Measure, MomentsIn, NormOf, Noted, Optimizer, OptimizerConfig, Rule, Scales,
    Squares, Values, culprit, later,
};
pub use schedule::{ACTIVATION_RATE, LearningRate, RateUnit, Role, ScheduleConfig};

use crate::error::{Error, Result};
use crate::ops::{self, Numbers};

/// What a step reports.
#[derive(Clone, Debug)]
pub struct StepStats {
    /// Mean loss over the micro-batches.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
    /// Where the first number of a gradient stands that is not finite, if there is one.
    pub culprit: Option<String>,
}

/// What a step leaves before anybody waits for its numbers.
#[derive(Clone, Debug)]
pub struct Stepped {
    /// Mean loss over the micro-batches, one number.
    pub loss: Numbers,
    /// Global norm of the gradients, before clipping, one number.
    pub grad_norm: Numbers,
    /// As in [`StepStats`], where it is known.
    pub culprit: Option<String>,
}

impl Stepped {
    /// Whether nothing has to be waited for.
    pub fn is_known(&self) -> bool {
        self.loss.is_known() && self.grad_norm.is_known()
    }

    /// Both numbers.
    pub fn numbers_mut(&mut self) -> [&mut Numbers; 2] {
        [&mut self.loss, &mut self.grad_norm]
    }

    /// What it reports; waits for the device if need be.
    pub fn stats(mut self) -> StepStats {
        Numbers::read_all(self.numbers_mut().into_iter());
        let value = |numbers: &Numbers| numbers.values().first().copied().unwrap_or_default();
        let (loss, grad_norm) = (value(&self.loss), value(&self.grad_norm));
        StepStats { loss, grad_norm, culprit: self.culprit }
    }
}

/// Runs `accumulate` micro-batches through `loss`, and one optimizer step on the mean of their
/// gradients. `rate_of` gives the learning rate of a parameter by its path.
///
/// # Errors
/// Whatever `loss` returns; and a loss or gradient that is not finite, before the module changes.
pub fn step<M: Module>(
    module: M,
    optimizer: &mut Optimizer,
    accumulate: usize,
    rate_of: &dyn Fn(&str) -> f64,
    loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<(M, StepStats)> {
    let (module, stepped) = checked_step(module, optimizer, accumulate, rate_of, loss)?;
    let stats = stepped.stats();
    stats.finite()?;
    Ok((module, stats))
}

/// As [`step`], but a loss or gradient that is not finite is no error: the module comes back as it
/// was, beside the numbers. On a device nothing is waited for: what a gradient that is not finite would
/// change is left as it is there.
///
/// # Errors
/// Whatever `loss` returns.
pub fn checked_step<M: Module>(
    module: M,
    optimizer: &mut Optimizer,
    accumulate: usize,
    rate_of: &dyn Fn(&str) -> f64,
    loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<(M, Stepped)> {
    let (gradients, loss) = mean_gradients(&module, accumulate, loss)?;
    Ok(update(module, optimizer, rate_of, gradients, loss))
}

/// A module whose quantized weights stand still, see [`accumulated_step`].
pub struct Still<M> {
    /// The module with a leaf in the place of each weight that a method makes.
    pub module: M,
    /// What each leaf is a copy of, on the tape of the method's parameters.
    pub weights: Vec<(ParamId, Tensor<2>)>,
}

/// As [`checked_step`], but weights are fake-quantized once for all micro-batches: those run on what `still`
/// makes of the module, and the sum of their gradients goes back through the methods at the end.
/// Nothing else of the module may learn.
///
/// # Errors
/// As [`checked_step`].
pub fn accumulated_step<M: Module>(
    module: M,
    optimizer: &mut Optimizer,
    accumulate: usize,
    rate_of: &dyn Fn(&str) -> f64,
    still: impl FnOnce(&M) -> Still<M>,
    loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<(M, Stepped)> {
    if accumulate == 1 {
        return checked_step(module, optimizer, accumulate, rate_of, loss);
    }
    let still = still(&module);
    let (gradients, loss) = mean_gradients(&still.module, accumulate, loss)?;
    let gradients = through_methods(&module, still.weights, gradients);
    Ok(update(module, optimizer, rate_of, gradients, loss))
}

/// The gradients of a module's parameters, from those of its quantized weights: leaf by leaf, what each
/// is a copy of, see [`Still`].
pub fn through_methods<M: Module>(
    module: &M,
    weights: Vec<(ParamId, Tensor<2>)>,
    mut gradients: GradientsParams,
) -> GradientsParams {
    let terms = weights.into_iter().filter_map(|(leaf, weight)| {
        let gradient = gradients.remove::<2>(leaf)?;
        let nothing = Tensor::zeros([1], &gradient.device());
        Some(ops::with_gradient(weight, nothing, gradient))
    });
    match terms.reduce(|sum, term| sum + term) {
        Some(sum) => GradientsParams::from_grads(sum.backward(), module),
        None => GradientsParams::new(),
    }
}

/// The mean of the micro-batches' gradients, and of their losses.
fn mean_gradients<M: Module>(
    module: &M,
    accumulate: usize,
    mut loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<(GradientsParams, Numbers)> {
    let mut total = Numbers::one(0.0);
    let mut sum = GradientsAccumulator::new();
    for micro in 0..accumulate {
        let value = loss(module, micro)?;
        let gradients = (value.clone() / accumulate as f64).backward();
        sum.accumulate(module, GradientsParams::from_grads(gradients, module));
        total = Numbers::sum([total, Numbers::of(value.inner())]);
    }
    Ok((sum.grads(), total.divided_by(accumulate as f64)))
}

fn update<M: Module>(
    module: M,
    optimizer: &mut Optimizer,
    rate_of: &dyn Fn(&str) -> f64,
    gradients: GradientsParams,
    loss: Numbers,
) -> (M, Stepped) {
    let squares = optimizer.squares(&[], &module, &gradients);
    let grad_norm = squares.norm();
    if loss.is_bad() || grad_norm.is_bad() {
        let culprit = optim::culprit(&[], &module, &gradients);
        return (module, Stepped { loss, grad_norm, culprit });
    }
    let module = optimizer.step(module, gradients, &squares, rate_of);
    (module, Stepped { loss, grad_norm, culprit: None })
}

impl StepStats {
    /// Refuses numbers that are not finite.
    ///
    /// # Errors
    /// A failure that names the number.
    pub fn finite(&self) -> Result<()> {
        self.fault().map_or(Ok(()), |fault| {
            Err(Error::failed(fault).fix("a smaller learning_rate, or clip_norm = 1.0"))
        })
    }

    /// Which number is not finite, and where it came from.
    pub fn fault(&self) -> Option<String> {
        let numbers = [("the loss", self.loss), ("the gradient norm", self.grad_norm)];
        let (what, value) = numbers.into_iter().find(|(_, value)| !value.is_finite())?;
        let at = self.culprit.as_ref().map_or(String::new(), |at| format!(" (gradient of {at})"));
        Some(format!("{what} became {value}{at}"))
    }
}
