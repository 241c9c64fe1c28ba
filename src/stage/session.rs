//! Training a whole model on windows of text: steps, log points, saved states. What learns of the
//! model, and what becomes of it, is the stages' affair.

use std::time::{Duration, Instant};

use burn::module::Module;
use burn::tensor::Tensor;

use super::batch::Feed;
use super::context::StageContext;
use super::corpus::{Corpus, Data};
use super::keys::Keys;
use super::monitor::Monitor;
use super::on_policy::{OnPolicy, Samples, Writing};
use super::states::States;
use super::training_state::{PARAMETERS, Snapshot, State};
use super::watch::{Failure, Seen};
use crate::data::{Order, seed_of};
use crate::error::{Error, Kind, Result};
use crate::exhausted;
use crate::method;
use crate::model::{Block, CausalLm, Loader, Positions};
use crate::objective::ObjectiveConfig;
use crate::ops::Closeness;
use crate::quant::ScaleDigits;
use crate::report::{Event, Reporter, memory};
use crate::train::{self, Optimizer, OptimizerConfig, RateUnit, StepStats, Still};

/// How a whole model is trained.
pub(super) struct Training<'a> {
    /// The stage's verb in reports.
    pub verb: &'static str,
    /// What its stage's keys say.
    pub keys: Keys<'a>,
    /// The base rate that is reported.
    pub rate: f64,
    /// The base rate of a parameter, by its path.
    pub rate_of: &'a dyn Fn(&str) -> f64,
    /// What the rates of latent weights and steps are measured in.
    pub rate_unit: RateUnit,
    /// Whether weights are fake-quantized, once for all micro-batches of a step.
    pub fake_quant: bool,
    /// What the student writes itself, and is compared with its teacher on.
    pub on_policy: Option<&'a OnPolicy>,
}

impl Training<'_> {
    /// Trains what learns of `student`, off the tape before and after; goes on from a saved state
    /// where there is one.
    ///
    /// # Errors
    /// Whatever goes wrong; a signal, after a save.
    pub(super) fn run(&self, student: CausalLm, ctx: &mut StageContext<'_>) -> Result<CausalLm> {
        let mut session = Session::start(self, student, ctx)?;
        while session.step < self.keys.steps && !session.monitor.is_out_of_patience() {
            if let Err(stopped) = ctx.stop.check().and_then(|()| session.write(self, ctx)) {
                if !matches!(stopped.kind(), Kind::Stopped(_)) {
                    return Err(stopped);
                }
                session.save(ctx)?;
                session.states.finish()?;
                return Err(stopped);
            }
            session.states.check()?;
            session.advance(self, ctx)?;
            if session.step.is_multiple_of(self.keys.checkpoint_every)
                && session.step < self.keys.steps
            {
                session.save(ctx)?;
            }
        }
        if session.step < self.keys.steps {
            let (step, of) = (session.step, self.keys.steps);
            let text =
                format!("ended at step {step} of {of}: no better state since validate.patience");
            ctx.report.emit(&Event::Note { text });
        }
        session.leave_best(self, ctx)?;
        Ok(session.taken()?.valid())
    }
}

/// Everything a step needs. What a checkpoint holds is `student`'s learned parameters,
/// `optimizer`'s state, `step` and what `monitor` knows; the data order is a function of the step.
struct Session {
    student: Option<CausalLm>,
    teacher: Option<CausalLm>,
    objective: ObjectiveConfig,
    optimizer: Optimizer,
    order: Order,
    positions: Positions,
    /// What the student wrote last.
    samples: Option<Samples>,
    step: u64,
    /// Whether scales have few digits already.
    shortened: bool,
    monitor: Monitor,
    states: States,
    timer: Timer,
}

/// Times between log points.
struct Timer {
    since: Instant,
    data: Duration,
    tokens: usize,
}

impl Timer {
    fn new() -> Self {
        Self { since: Instant::now(), data: Duration::ZERO, tokens: 0 }
    }
}

impl Session {
    fn start(
        training: &Training<'_>,
        student: CausalLm,
        ctx: &mut StageContext<'_>,
    ) -> Result<Self> {
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let windows = corpus.stream.windows(corpus.length);
        let windows = corpus.samples.map_or(windows, |samples| samples.min(windows));
        let order = Order::new(
            ctx.seed,
            format!("stage {}", ctx.stage),
            windows,
            training.keys.batch * training.keys.accumulate,
        )?;
        let device = &ctx.device.device;
        let positions = Positions::new(&ctx.model.config, 0, corpus.length, ctx.compute, device);
        let compares = training.keys.objective.needs_teacher() || training.on_policy.is_some();
        let teacher = compares.then(|| teacher(ctx)).transpose()?;
        let feed = feed(ctx, corpus, &positions);
        let objective = confident(training, ctx, teacher.as_ref(), &order, &feed)?;
        let watched = (training.verb, training.keys.steps, training.keys.objective);
        let monitor = Monitor::new(training.keys.validate, watched, ctx, teacher.as_ref())?;
        let mut session = Self {
            student: Some(student.train()),
            teacher,
            objective,
            optimizer: Optimizer::new(training.keys.optimizer),
            order,
            positions,
            samples: None,
            step: 0,
            shortened: false,
            monitor,
            states: States::of(ctx.dir, training.keys.keep)?,
            timer: Timer::new(),
        };
        if !session.load(training, ctx)? {
            session.begin(ctx)?;
        }
        Ok(session)
    }

    fn taken(&mut self) -> Result<CausalLm> {
        self.student.take().ok_or_else(|| Error::failed("the student is gone"))
    }

    /// One optimizer step.
    fn advance(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let step = self.step;
        exhausted::part(&format!("step {step}"));
        if step >= ctx.shortens_at(training.keys.steps) && !self.shortened {
            self.shorten(ctx.scales)?;
        }
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let schedule = training.keys.schedule.resolved(training.rate_unit, training.keys.steps);
        let scheduled = schedule.factor(step, training.keys.steps);
        let factor = scheduled * self.monitor.rate_factor();
        let rate_of = |path: &str| (training.rate_of)(path) * factor;
        let drawn = self.order.batch(step);
        let student = self.taken()?;
        let (teacher, timer) = (self.teacher.as_ref(), &mut self.timer);
        let feed = feed(ctx, corpus, &self.positions);
        let objective = &self.objective;
        let own = training.on_policy.zip(self.samples.as_ref());
        let log_point =
            (step + 1).is_multiple_of(training.keys.log_every) || step + 1 == training.keys.steps;
        let mut closeness = None;
        let loss = |student: &CausalLm, part: usize| {
            let waiting = Instant::now();
            let size = training.keys.batch;
            let windows = &drawn[part * size..][..size];
            let compare = log_point && part == 0;
            let written = own.map_or(0, |(keys, _)| keys.rows(size));
            let mut parts = Vec::new();
            if let Some((keys, samples)) = own {
                let samples = samples.of(step, [part, training.keys.accumulate], written);
                let batch = feed.written(&samples);
                parts.push((batch, keys.objective.as_ref().unwrap_or(objective), written));
            }
            if written < size {
                parts.push((feed.windows(&windows[written..]), objective, size - written));
            }
            timer.data += waiting.elapsed();
            let mut sum: Option<Tensor<1>> = None;
            for (batch, objective, rows) in parts {
                timer.tokens += batch.len();
                let (loss, measured) = batch.loss(student, teacher, objective, compare)?;
                closeness = closeness.take().or(measured);
                let share = rows as f64 / size as f64;
                let loss = if rows == size { loss } else { loss * share };
                sum = Some(match sum {
                    None => loss,
                    Some(sum) => sum + loss,
                });
            }
            sum.ok_or_else(|| Error::failed("an empty batch"))
        };
        let (optimizer, accumulate) = (&mut self.optimizer, training.keys.accumulate);
        if training.rate_unit == RateUnit::Grid {
            let linears = student.blocks.iter().flat_map(Block::linears);
            optimizer.measure_by(linears.flat_map(|(_, l)| method::measures(&l.weight)).collect());
        }
        let stepped = if training.fake_quant {
            train::accumulated_step(student, optimizer, accumulate, &rate_of, still, loss)
        } else {
            train::checked_step(student, optimizer, accumulate, &rate_of, loss)
        };
        let (student, stats) =
            stepped.map_err(|e| e.at(format!("stage {}, step {step}", ctx.stage)))?;
        self.student = Some(student);
        let StepStats { loss, grad_norm, ref culprit } = stats;
        let culprit = culprit.clone();
        let seen = Seen { step: step + 1, loss, grad_norm, factor: scheduled };
        // At no rate nothing is to be expected, but numbers.
        if training.rate > 0.0 {
            if let Some(failure) = self.monitor.step(&seen) {
                return self.go_back(training, (&failure, culprit), step + 1, ctx);
            }
        } else {
            stats.finite().map_err(|e| e.at(format!("stage {}, step {step}", ctx.stage)))?;
        }
        self.step += 1;
        if log_point {
            self.report(training, ctx, &stats, closeness, training.rate * factor);
        } else {
            ctx.report.emit(&Event::Progress {
                verb: training.verb.to_owned(),
                done: self.step,
                of: training.keys.steps,
                detail: format!("loss {:.4}", stats.loss),
            });
        }
        self.validate_where_due(training, ctx)
    }

    /// Has the student write what the next steps compare it by, where that is due.
    fn write(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let Some(keys) = training.on_policy else { return Ok(()) };
        let at = Samples::written_at(self.step, keys);
        if self.samples.as_ref().is_some_and(|samples| samples.step == at && at < self.step) {
            return Ok(());
        }
        if at < self.step
            && let Some(samples) = Samples::read(ctx.dir, at)
        {
            self.samples = Some(samples);
            return Ok(());
        }
        let Some(student) = &self.student else { return Ok(()) };
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let Keys { batch, accumulate, steps, .. } = training.keys;
        let rows = keys.rows(batch);
        let windows: Vec<u32> = (at..(at + keys.every).min(steps))
            .flat_map(|step| {
                let drawn = self.order.batch(step);
                let parts = (0..accumulate).map(|part| drawn[part * batch..][..rows].to_vec());
                parts.flatten().collect::<Vec<u32>>()
            })
            .collect();
        let student = if training.fake_quant {
            still(student).module.valid()
        } else {
            student.clone().valid()
        };
        let writing = Writing {
            keys,
            student: &student,
            text: &corpus.stream,
            length: corpus.length,
            ends: &ctx.data.ends,
            device: &ctx.device.device,
            stop: ctx.stop,
            seed: seed_of(ctx.seed, &format!("stage {}", ctx.stage)),
        };
        let (verb, done) = (training.verb, self.step);
        let report = &mut *ctx.report;
        let samples = writing.write(at, &windows, &mut |written, of| {
            report.emit(&Event::Progress {
                verb: verb.to_owned(),
                done,
                of: steps,
                detail: format!("the student writes {written}/{of}"),
            });
        });
        let samples = samples.map_err(|e| e.at(format!("stage {}, step {done}", ctx.stage)))?;
        samples.save(ctx.dir)?;
        self.samples = Some(samples);
        Ok(())
    }

    /// The validation behind the last step, if there is one, and what follows from it.
    fn validate_where_due(
        &mut self,
        training: &Training<'_>,
        ctx: &mut StageContext<'_>,
    ) -> Result<()> {
        if !self.monitor.is_due(self.step) {
            return Ok(());
        }
        let validated = self.validate(ctx).or_else(|error| match error.kind() {
            // A run that goes on begins with this validation.
            Kind::Stopped(_) => self.save(ctx).and_then(|()| self.states.finish()).and(Err(error)),
            _ => Err(error),
        });
        match validated? {
            Err(failure) => self.go_back(training, (&failure, None), self.step, ctx),
            // The last state is at hand.
            Ok(true) if self.step == training.keys.steps => {
                self.monitor.keep(self.step);
                Ok(())
            }
            Ok(true) => self.keep(),
            Ok(false) => Ok(()),
        }
    }

    /// What there is to do before the first step of all.
    fn begin(&mut self, ctx: &mut StageContext<'_>) -> Result<()> {
        if self.monitor.is_due(0) {
            // A start that gives no numbers is no failure of a training that has not begun.
            let _start = self.validate(ctx)?;
        }
        if self.monitor.keeps_start() {
            self.keep()?;
        }
        Ok(())
    }

    fn validate(&mut self, ctx: &mut StageContext<'_>) -> Result<Result<bool, Failure>> {
        let Some(student) = &self.student else { return Ok(Ok(false)) };
        let validated = self.monitor.validate(student, self.teacher.as_ref(), self.step, ctx);
        // What a validation takes is no part of the next step's speed.
        self.timer = Timer::new();
        validated
    }

    /// Keeps the current state as the one to go back to.
    fn keep(&mut self) -> Result<()> {
        self.monitor.keep(self.step);
        match &self.student {
            Some(student) => self.states.write_best(self.snapshot(student, String::new())),
            None => Ok(()),
        }
    }

    fn snapshot(&self, student: &CausalLm, progress: String) -> Snapshot {
        let facts = [("step", self.step.to_string()), ("progress", progress)];
        Snapshot::of(student, &self.optimizer, facts)
    }

    /// Goes on from the state that was kept, with half the rate.
    fn go_back(
        &mut self,
        training: &Training<'_>,
        failure: (&Failure, Option<String>),
        step: u64,
        ctx: &mut StageContext<'_>,
    ) -> Result<()> {
        self.monitor.go_back(failure, step, ctx)?;
        self.take_kept(training.keys.optimizer, ctx)?;
        self.timer = Timer::new();
        self.save(ctx)
    }

    /// The state that was kept becomes the current one.
    fn take_kept(&mut self, optimizer: &OptimizerConfig, ctx: &StageContext<'_>) -> Result<()> {
        // A resumed run would find the scales long, and shorten them when it is time.
        if self.shortened {
            self.shorten(ScaleDigits::F32)?;
            self.shortened = false;
        }
        self.states.finish()?;
        self.take(&State::open(&self.states.best_file())?, optimizer, ctx)
    }

    /// A saved state becomes the current one.
    fn take(
        &mut self,
        state: &State,
        optimizer: &OptimizerConfig,
        ctx: &StageContext<'_>,
    ) -> Result<()> {
        let student = self.taken()?;
        self.optimizer = Optimizer::new(optimizer);
        state.optimizer(&mut self.optimizer, &ctx.device.device)?;
        self.student = Some(state.parameters(PARAMETERS, student)?);
        self.step = state.fact("step")?;
        Ok(())
    }

    /// What the stage leaves: the last state, or the best one where the last is worse.
    fn leave_best(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let left = self.monitor.better_than_last();
        if let Some(step) = left {
            self.take_kept(training.keys.optimizer, ctx)?;
            if step > ctx.shortens_at(training.keys.steps) {
                self.shorten(ctx.scales)?;
            }
        }
        self.monitor.finish(left, ctx);
        Ok(())
    }

    /// Scales have as many digits as `digits` from now on.
    fn shorten(&mut self, digits: ScaleDigits) -> Result<()> {
        let mut student = self.taken()?;
        let linears = student.blocks.iter_mut().flat_map(Block::linears_mut).map(|(_, l)| l);
        method::shorten_all(linears, digits);
        self.student = Some(student);
        self.shortened = true;
        Ok(())
    }

    fn report(
        &mut self,
        training: &Training<'_>,
        ctx: &mut StageContext<'_>,
        stats: &StepStats,
        closeness: Option<Closeness>,
        rate: f64,
    ) {
        let timer = std::mem::replace(&mut self.timer, Timer::new());
        let seconds = timer.since.elapsed().as_secs_f64().max(1e-9);
        let mut values = vec![
            ("train/loss", stats.loss),
            ("train/learning_rate", rate),
            ("train/grad_norm", stats.grad_norm),
        ];
        if let Some(c) = closeness {
            values.extend([
                ("distill/jsd", c.jsd),
                ("distill/kl_forward", c.kl_forward),
                ("distill/kl_reverse", c.kl_reverse),
                ("distill/top1_agreement", c.top1),
            ]);
        }
        values.extend([
            ("perf/tokens_per_second", timer.tokens as f64 / seconds),
            ("perf/data_wait_fraction", timer.data.as_secs_f64() / seconds),
        ]);
        values.extend(memory::peak_gib().map(|gib| ("memory/peak_gib", gib)));
        ctx.report.emit(&Event::Step {
            stage: ctx.stage,
            verb: training.verb.to_owned(),
            step: self.step,
            of: training.keys.steps,
            global_step: ctx.first_step + self.step,
            values: values.into_iter().map(|(tag, value)| (tag.to_owned(), value)).collect(),
        });
    }

    fn save(&mut self, ctx: &mut StageContext<'_>) -> Result<()> {
        match &self.student {
            Some(student) => {
                let state = self.snapshot(student, self.monitor.saved()?);
                self.states.write(state, ctx.report)
            }
            None => Ok(()),
        }
    }

    /// Goes on from a saved state; gives whether there is one.
    fn load(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<bool> {
        let Some(found) = self.states.newest()? else { return Ok(false) };
        let state = &found.state;
        self.take(state, training.keys.optimizer, ctx)?;
        self.monitor.restore(&state.fact::<String>("progress")?, ctx).map_err(|e| {
            Error::failed(format!("the training state cannot be used: {}", e.what()))
                .at(ctx.dir.display())
                .fix("--fresh to start over")
        })?;
        let position = format!("step {}/{}", self.step, training.keys.steps);
        ctx.say_resumed(training.verb, position, &found.mark);
        found.warn(ctx.report);
        if self.monitor.has_best()
            && let Err(error) = State::open(&self.states.best_file())
        {
            let text = format!("{}; what it goes back to is the present state", error.what());
            ctx.report.emit(&Event::Warning { text });
            self.keep()?;
        }
        if !self.monitor.has_validated(self.step) {
            self.validate_where_due(training, ctx)?;
        }
        Ok(true)
    }
}

/// What the batches of a stage are made from.
fn feed<'a>(ctx: &'a StageContext<'_>, corpus: &'a Corpus, positions: &'a Positions) -> Feed<'a> {
    Feed {
        stream: &corpus.stream,
        length: corpus.length,
        positions,
        config: &ctx.model.config,
        dtype: ctx.compute,
        device: &ctx.device.device,
    }
}

/// The student with its weights as they are quantized now.
fn still(student: &CausalLm) -> Still<CausalLm> {
    let mut module = student.clone();
    let mut weights = Vec::new();
    for (_, linear) in module.blocks.iter_mut().flat_map(Block::linears_mut) {
        if let Some((leaf, value)) = method::materialize(&linear.weight) {
            weights.push((leaf.id, value));
            linear.weight = leaf;
        }
    }
    Still { module, weights }
}

/// The float model, as an earlier stage may have fine-tuned it.
fn teacher(ctx: &StageContext<'_>) -> Result<CausalLm> {
    let (config, device) = (&ctx.model.config, &ctx.device.device);
    let source = &ctx.model.tuned_on(ctx.model.float()?);
    Loader { config, source, device, dtype: ctx.compute }.model()
}

/// The objective with the teacher's confidence on the first batches, where it asks for that. A
/// function of the data and the teacher, so a resumed run finds the same number.
fn confident(
    training: &Training<'_>,
    ctx: &StageContext<'_>,
    teacher: Option<&CausalLm>,
    order: &Order,
    feed: &Feed<'_>,
) -> Result<ObjectiveConfig> {
    let batches = training.keys.objective.confidence_batches();
    let (Some(teacher), 1..) = (teacher, batches) else {
        return Ok(training.keys.objective.clone());
    };
    let mut sum = 0.0;
    for step in 0..batches {
        ctx.stop.check()?;
        let drawn = order.batch(step);
        let batch = feed.windows(&drawn[..training.keys.batch]);
        sum = batch.confidences(teacher).fold(sum, |sum, part| sum + part);
    }
    Ok(training.keys.objective.clone().with_confidence(sum / batches as f64))
}
