//! The keys that every stage has which trains the whole model.

use super::validate::ValidateConfig;
use crate::error::{Error, Result};
use crate::objective::ObjectiveConfig;
use crate::train::{LatentsIn, OptimizerConfig, RateUnit, Rule, ScheduleConfig};

/// What may help where a training of the whole model makes it worse.
pub(super) const ADVICE: &str = "a smaller learning_rate, more steps, objective.adaptive, or a \
                                 stage.reconstruct at these bits before it; or ";

/// Defaults that the training stages share.
pub(super) fn one() -> usize {
    1
}

pub(super) fn two() -> usize {
    2
}

pub(super) fn eight() -> usize {
    8
}

pub(super) fn ten() -> u64 {
    10
}

pub(super) fn hundred() -> u64 {
    100
}

/// The keys that every stage has which trains the whole model.
pub(super) struct Keys<'a> {
    /// What is minimized.
    pub objective: &'a ObjectiveConfig,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences in a micro-batch.
    pub batch: usize,
    /// Micro-batches in a step.
    pub accumulate: usize,
    /// How rates move over the steps.
    pub schedule: &'a ScheduleConfig,
    /// AdamW's constants and gradient clipping.
    pub optimizer: &'a OptimizerConfig,
    /// Steps between saves of the whole training state.
    pub checkpoint_every: u64,
    /// How many of the saved states are kept; 0: none is saved.
    pub keep: usize,
    /// Steps between log points.
    pub log_every: u64,
    /// How it is validated, and what is done when it fails.
    pub validate: &'a ValidateConfig,
}

/// The [`Keys`] of a stage's configuration.
macro_rules! keys {
    ($config:expr) => {
        $crate::stage::keys::Keys {
            objective: &$config.objective,
            steps: $config.steps,
            batch: $config.batch,
            accumulate: $config.accumulate,
            schedule: &$config.schedule,
            optimizer: &$config.optimizer,
            checkpoint_every: $config.checkpoint_every,
            keep: $config.keep,
            log_every: $config.log_every,
            validate: &$config.validate,
        }
    };
}
pub(super) use keys;

/// Sets the keys of a training stage that change no result to their defaults.
macro_rules! neutralize {
    ($config:expr) => {
        $config.allow_worse = false;
        $config.checkpoint_every = $crate::stage::keys::hundred();
        $config.keep = $crate::stage::keys::two();
        $config.log_every = $crate::stage::keys::ten();
        $config.validate = $crate::stage::validate::ValidateConfig::default();
    };
}
pub(super) use neutralize;

impl Keys<'_> {
    /// How many states there may be on the disk at once: those that are kept, the one to go back to, and one
    /// that is being written. With `keep = 0` none but the one to go back to.
    pub(super) fn states(&self) -> u64 {
        if self.keep == 0 {
            return 2 * u64::from(self.validate.keeps());
        }
        let kept = (self.steps / self.checkpoint_every.max(1)).min(self.keep as u64);
        kept + u64::from(self.validate.keeps()) + 1
    }

    /// Refuses counts of zero and what does not train a whole model.
    pub(super) fn check(&self, stage: &str) -> Result<()> {
        check_objective(self.objective, stage)?;
        if stage != "distill" {
            check_latents(self.optimizer, stage)?;
        }
        check_counts(&[
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("checkpoint_every", self.checkpoint_every),
            ("log_every", self.log_every),
        ])?;
        self.validate.check()
    }
}

/// Refuses an objective that does not compare logits.
pub(super) fn check_objective(objective: &ObjectiveConfig, stage: &str) -> Result<()> {
    objective.check()?;
    if matches!(objective, ObjectiveConfig::Mse(_)) {
        return Err(Error::usage(format!(
            "objective.mse compares block outputs, and {stage} logits"
        ))
        .fix("objective.jsd = {} or objective.cross_entropy = {}"));
    }
    Ok(())
}

/// Refuses a unit that the optimizer's rule does not have.
pub(super) fn check_rate_unit(unit: RateUnit, optimizer: &OptimizerConfig) -> Result<()> {
    if unit == RateUnit::Grid && optimizer.rule == Rule::Sign {
        return Err(Error::usage("rate_unit = \"grid\" is for optimizer.rule = \"adamw\"")
            .fix("rate_unit = \"absolute\", or optimizer.rule = \"adamw\""));
    }
    Ok(())
}

/// Refuses bf16 latents in a stage that keeps them in f32.
pub(super) fn check_latents(optimizer: &OptimizerConfig, stage: &str) -> Result<()> {
    if optimizer.latents == LatentsIn::F32 {
        return Ok(());
    }
    Err(Error::usage(format!("{stage} keeps what it learns in f32"))
        .at("optimizer.latents")
        .fix("latents = \"bf16\" in a stage.distill, or no latents here"))
}

/// Refuses counts of zero.
pub(super) fn check_counts(counts: &[(&str, u64)]) -> Result<()> {
    match counts.iter().find(|(_, count)| *count == 0) {
        Some((key, _)) => Err(Error::usage(format!("{key} = 0")).fix(format!("{key} = 1"))),
        None => Ok(()),
    }
}
