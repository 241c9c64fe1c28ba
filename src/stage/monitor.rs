//! How a training of the whole model is doing: validations, the best state so far, and what is done
//! when it fails.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::results::{Quality, Setback};
use super::student::Student;
use super::teacher::Teacher;
use super::validate::{Point, Slice, ValidateConfig};
use super::watch::{self, Failure, Watch};
use crate::error::{Error, Result};
use crate::objective::ObjectiveConfig;
use crate::report::{Event, Reporter};

/// What a saved training state says about how the training went, so that a resumed run goes on alike.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub(super) struct Progress {
    /// What the rules remember.
    watch: Watch,
    /// The validation before the first step.
    start: Option<Point>,
    /// The latest validation.
    last: Option<Point>,
    /// The step of the best state, and its validation where there was one.
    best: Option<(u64, Option<Point>)>,
    /// Validations since the best one.
    #[serde(default)]
    since_best: u32,
    /// The step of the last validation, whatever it found.
    #[serde(default)]
    validated: Option<u64>,
    /// Failures so far.
    setbacks: Vec<Setback>,
    /// Length, windows and tokens of what the validations were measured on; none in older files.
    #[serde(default)]
    slice: Option<[u64; 3]>,
    /// Whether the recipe has moved to other windows since the start.
    #[serde(default)]
    moved: bool,
}

/// Watches a training.
pub(super) struct Monitor {
    config: ValidateConfig,
    /// Steps between validations; 0: none.
    every: u64,
    steps: u64,
    verb: &'static str,
    /// The largest value of the objective.
    bound: Option<f64>,
    /// From which step on scales are short; earlier states are another model's.
    shortens_at: u64,
    slice: Option<Slice>,
    /// The teacher's final hidden states on the slice.
    teacher: Option<Vec<Tensor<2>>>,
    pub progress: Progress,
}

impl Monitor {
    /// Watches `steps` steps towards `objective`.
    ///
    /// # Errors
    /// When the teacher cannot be computed, or a signal came.
    pub(super) fn new(
        config: &ValidateConfig,
        (verb, steps, objective): (&'static str, u64, &ObjectiveConfig),
        ctx: &mut StageContext<'_>,
        teacher: Option<&Teacher>,
    ) -> Result<Self> {
        let every = config.interval(steps);
        let corpus = ctx.data.validation.as_ref().filter(|_| every > 0 && steps > 0);
        let slice = corpus.and_then(|corpus| Slice::new(corpus, config, &ctx.model.config));
        let mut monitor = Self {
            config: config.clone(),
            every,
            steps,
            verb,
            bound: watch::bound(objective),
            shortens_at: ctx.shortens_at(steps),
            slice,
            teacher: None,
            progress: Progress::default(),
        };
        monitor.progress.slice = monitor.measured_on();
        if let (Some(slice), Some(teacher)) = (&monitor.slice, teacher) {
            let (config, device, stop) = (&ctx.model.config, &ctx.device.device, ctx.stop);
            let hidden = teacher
                .with(ctx, |model| slice.hidden(model, config, device, (stop, &|_, _| ())))?;
            monitor.teacher = Some(hidden);
            let mut float = slice.quality(ctx, "float", 0.0);
            let known = |q: &Quality| q.what == "float" && q.compares_with(&float);
            if ctx.model.tuned.is_empty() && !ctx.results.quality.iter().any(known) {
                let point = teacher.with(ctx, |model| {
                    slice.measure(model, None, config, device, (stop, &|_, _| ()))
                });
                let nll = point?.nll;
                float.nll_per_token = Some(nll).filter(|nll| nll.is_finite());
                ctx.results.quality.push(float);
            }
        }
        Ok(monitor)
    }

    fn measured_on(&self) -> Option<[u64; 3]> {
        self.slice.as_ref().map(|s| [s.length as u64, s.windows as u64, s.tokens])
    }

    /// The factor of the recipe's learning rate, after the failures so far.
    pub(super) fn rate_factor(&self) -> f64 {
        0.5f64.powi(i32::try_from(self.progress.setbacks.len()).unwrap_or(i32::MAX))
    }

    /// Judges a step; see [`Watch::step`].
    pub(super) fn step(&mut self, seen: &watch::Seen) -> Option<Failure> {
        self.progress.watch.step(seen, self.bound)
    }

    /// Whether there is a validation after `step` steps.
    pub(super) fn is_due(&self, step: u64) -> bool {
        self.slice.is_some() && (step.is_multiple_of(self.every) || step == self.steps)
    }

    /// Whether the state after `step` steps has had its validation.
    pub(super) fn has_validated(&self, step: u64) -> bool {
        self.progress.validated.is_some_and(|validated| validated >= step)
    }

    /// Whether there is a state to go back to.
    pub(super) fn has_best(&self) -> bool {
        self.progress.best.is_some()
    }

    /// Whether the state at the start has to be kept.
    pub(super) fn keeps_start(&self) -> bool {
        self.steps > 0
            && (self.config.retries > 0 || (self.slice.is_some() && self.config.keep_best))
    }

    /// Notes that the state at `step` is the one to go back to.
    pub(super) fn keep(&mut self, step: u64) {
        self.progress.best = Some((step, self.progress.last));
    }

    /// Measures `student` after `step` steps, and says so. Gives whether it is the best so far, or
    /// what failed.
    ///
    /// # Errors
    /// When a signal came: then nothing is measured.
    pub(super) fn validate(
        &mut self,
        student: &Student,
        teacher: Option<&Teacher>,
        step: u64,
        ctx: &mut StageContext<'_>,
    ) -> Result<std::result::Result<bool, Failure>> {
        let Some(slice) = &self.slice else { return Ok(Ok(false)) };
        let goal = teacher.map(Teacher::ends).zip(self.teacher.as_deref());
        let (config, device) = (&ctx.model.config, &ctx.device.device);
        let point = student
            .off_tape(|model| slice.measure(model, goal, config, device, (ctx.stop, &|_, _| ())))?;
        self.progress.validated = Some(step);
        let failure = self.progress.watch.validation(step, point.nll);
        let best = failure.is_none() && self.keeps_start() && self.is_best(step, &point);
        ctx.report.emit(&Event::Validation {
            stage: ctx.stage,
            verb: self.verb.to_owned(),
            step,
            of: self.steps,
            global_step: ctx.first_step + step,
            perplexity: point.nll.exp(),
            nll_per_token: point.nll,
            kl_forward: point.kl_forward,
            top1_agreement: point.top1,
            tokens: slice.tokens,
            best,
        });
        if let Some(failure) = failure {
            return Ok(Err(failure));
        }
        if !self.progress.moved {
            self.progress.start.get_or_insert(point);
        }
        self.progress.last = Some(point);
        self.progress.since_best = if best { 0 } else { self.progress.since_best + 1 };
        Ok(Ok(best))
    }

    /// Whether the training has been long enough without a better state.
    pub(super) fn is_out_of_patience(&self) -> bool {
        self.config.patience.is_some_and(|most| self.progress.since_best >= most)
    }

    fn is_best(&self, step: u64, point: &Point) -> bool {
        match &self.progress.best {
            Some((best, Some(known))) if self.counts(*best) || !self.counts(step) => {
                point.value() < known.value()
            }
            _ => true,
        }
    }

    /// Whether the state after `step` steps has the scales that the stage leaves.
    fn counts(&self, step: u64) -> bool {
        self.shortens_at >= self.steps || step > self.shortens_at
    }

    /// The step whose state the stage leaves instead of the last one.
    pub(super) fn better_than_last(&self) -> Option<u64> {
        let (step, best) = self.progress.best?;
        let (last, best) = (self.progress.last?, best?);
        // A training that ends before its scales are short leaves a state with long ones anyhow.
        let counts = self.counts(step) || self.is_out_of_patience();
        let better = step < self.steps && counts && last.is_worse_than(&best);
        (self.config.keep_best && better).then_some(step)
    }

    /// Says that the state at `step` is left, and notes what the gate will ask for.
    pub(super) fn finish(&mut self, left: Option<u64>, ctx: &mut StageContext<'_>) {
        if let (Some(step), Some(last), Some((_, Some(best)))) =
            (left, self.progress.last, self.progress.best)
        {
            let what = if best.kl_forward.is_some() { "kl_forward" } else { "loss" };
            let text = format!(
                "the state after step {step} is kept: {what} {:.4} on the validation text, {:.4} at \
                 the end",
                best.value(),
                last.value()
            );
            let event = if step == 0 {
                Event::Warning { text: format!("no step helped; {text}") }
            } else {
                Event::Note { text }
            };
            ctx.report.emit(&event);
        }
        if let (Some(slice), Some(start)) = (&self.slice, self.progress.start) {
            let start = slice.quality(ctx, "start", start.nll);
            ctx.results.quality.push(start);
        }
    }

    /// Takes note of a failure after `step` steps, and says from which step on it is tried again.
    ///
    /// # Errors
    /// The failure itself, when there is nothing to go back to or it has been tried often enough.
    pub(super) fn go_back(
        &mut self,
        (failure, culprit): (&Failure, Option<String>),
        step: u64,
        ctx: &mut StageContext<'_>,
    ) -> Result<u64> {
        let tried = self.progress.setbacks.len();
        let again = tried < self.config.retries as usize;
        let back_to = self.progress.best.map(|(step, _)| step).filter(|_| again);
        let culprit = culprit.map_or(String::new(), |at| format!(" (gradient of {at})"));
        let reason = format!("{failure}{culprit}");
        let before = self.rate_factor();
        let mut setback = Setback { stage: ctx.stage, step, reason, back_to, rate_factor: before };
        let Some(back_to) = back_to else {
            let reason = setback.reason.clone();
            ctx.results.setbacks.push(setback);
            let times = if tried > 0 { format!(", after {tried} retries") } else { String::new() };
            return Err(Error::failed(format!("{reason}{times}"))
                .at(format!("stage {}, {}, step {step}", ctx.stage, self.verb))
                .fix(failure.remedy()));
        };
        setback.rate_factor = before / 2.0;
        ctx.results.setbacks.push(setback.clone());
        ctx.report.emit(&Event::Retry {
            stage: ctx.stage,
            verb: self.verb.to_owned(),
            step,
            back_to,
            global_step: ctx.first_step + back_to,
            reason: setback.reason.clone(),
            rate_factor: setback.rate_factor,
            attempt: tried as u64 + 1,
            of: u64::from(self.config.retries),
        });
        self.progress.setbacks.push(setback);
        self.progress.watch.go_back();
        self.progress.validated = Some(back_to);
        self.progress.since_best = 0;
        // What was measured after the state that it goes back to is another training's.
        self.progress.last = self.progress.best.and_then(|(_, point)| point);
        Ok(back_to)
    }

    /// The progress as text, for a saved state.
    ///
    /// # Errors
    /// Never for numbers that are finite.
    pub(super) fn saved(&self) -> Result<String> {
        serde_json::to_string(&self.progress)
            .map_err(|e| Error::failed(format!("cannot encode how the training went: {e}")))
    }

    /// Goes on from what [`Monitor::saved`] gave.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn restore(&mut self, text: &str, ctx: &mut StageContext<'_>) -> Result<()> {
        self.progress = serde_json::from_str(text).map_err(|e| Error::failed(e.to_string()))?;
        ctx.results.setbacks.extend(self.progress.setbacks.iter().cloned());
        let (was, is) = (self.progress.slice, self.measured_on());
        if was.is_some() && was != is {
            // What was measured on other windows compares with nothing to come.
            self.progress.start = None;
            self.progress.last = None;
            self.progress.best = self.progress.best.map(|(step, _)| (step, None));
            self.progress.moved = true;
            self.progress.watch.forget_validations();
        }
        self.progress.slice = is;
        Ok(())
    }
}
