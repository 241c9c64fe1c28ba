//! The inner step loop shared by every training stage: gradients, clipping, AdamW, learning rate.
//!
//! Nothing here is hidden: a step is a pure function of the module, the optimizer state and the
//! step number, so a checkpoint of the first two and the third resumes bit for bit.

mod optim;
mod schedule;

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

pub use optim::{Optimizer, OptimizerConfig, Rule};
pub use schedule::{ACTIVATION_RATE, LearningRate, Role, ScheduleConfig};

use crate::error::{Error, Result};

/// What a step reports.
#[derive(Clone, Copy, Debug)]
pub struct StepStats {
    /// Mean loss over the micro-batches.
    pub loss: f64,
    /// Global norm of the gradients, before clipping.
    pub grad_norm: f64,
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
    mut loss: impl FnMut(&M, usize) -> Result<Tensor<1>>,
) -> Result<(M, StepStats)> {
    let mut total = 0.0;
    let mut sum = GradientsAccumulator::new();
    for micro in 0..accumulate {
        let value = loss(&module, micro)?;
        let gradients = (value.clone() / accumulate as f64).backward();
        sum.accumulate(&module, GradientsParams::from_grads(gradients, &module));
        total += f64::from(value.into_scalar::<f32>());
    }
    let loss = total / accumulate as f64;
    if !loss.is_finite() {
        return Err(not_finite("the loss", loss));
    }
    let gradients = sum.grads();
    let grad_norm = optimizer.global_norm(&module, &gradients);
    if !grad_norm.is_finite() {
        return Err(not_finite("the gradient norm", grad_norm));
    }
    let module = optimizer.step(module, gradients, grad_norm, rate_of);
    Ok((module, StepStats { loss, grad_norm }))
}

fn not_finite(what: &str, value: f64) -> Error {
    Error::failed(format!("{what} became {value}"))
        .fix("a smaller learning_rate, or clip_norm = 1.0")
}
