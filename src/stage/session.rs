//! Training a whole model on windows of text: steps, log points, saved states. What learns of the
//! model, and what becomes of it, is the stages' affair.

use std::time::Instant;

use super::batch::Feed;
use super::context::StageContext;
use super::corpus::Data;
use super::keys::Keys;
use super::log_point::{LogPoint, Timer};
use super::memory::Memory;
use super::monitor::Monitor;
use super::motion::{self, Motion};
use super::on_policy::{OnPolicy, Samples, Writing};
use super::states::States;
use super::step::{ByBlockStep, OnTape, Part};
use super::student::Student;
use super::teacher::Teacher;
use super::teacher_cache::{Kept, TeacherCache};
use super::training_state::{Snapshot, State};
use super::watch::{Failure, Seen};
use crate::data::{Order, seed_of};
use crate::error::{Error, Kind, Result};
use crate::exhausted;
use crate::method;
use crate::model::{CausalLm, Positions};
use crate::objective::ObjectiveConfig;
use crate::ops::Numbers;
use crate::quant::ScaleDigits;
use crate::report::{Event, Reporter};
use crate::train::{Optimizer, RateUnit, Role, StepStats, Stepped};

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
    /// Where what is trained is kept.
    pub memory: Memory,
    /// What is kept of a teacher that is asked once, before the first step.
    pub cached: Option<Kept>,
}

impl Training<'_> {
    fn optimizer(&self, ctx: &StageContext<'_>) -> Optimizer {
        let (seed, stage) = (ctx.seed, ctx.stage);
        let seeds = move |step, path: &str| {
            let is_latent = method::role_of(path) == Some(Role::Weight);
            is_latent.then(|| seed_of(seed, &format!("stage {stage} step {step} {path}")))
        };
        let optimizer = Optimizer::new(self.keys.optimizer).of_blocks(ctx.model.config.n_blocks);
        optimizer.rounding(seeds)
    }

    /// Trains what learns of `student`, off the tape before and after; goes on from a saved state
    /// where there is one.
    ///
    /// # Errors
    /// Whatever goes wrong; a signal, after a save.
    pub(super) fn run(&self, student: Student, ctx: &mut StageContext<'_>) -> Result<Student> {
        let mut session = Session::start(self, student, ctx)?;
        while session.step < self.keys.steps && !session.monitor.is_out_of_patience() {
            if let Err(stopped) = ctx.stop.check().and_then(|()| session.write(self, ctx)) {
                if !matches!(stopped.kind(), Kind::Stopped(_)) {
                    return Err(stopped);
                }
                session.save_judged(self, ctx)?;
                session.states.finish()?;
                return Err(stopped);
            }
            session.states.check()?;
            session.advance(self, ctx)?;
            if session.step.is_multiple_of(self.keys.checkpoint_every)
                && session.step < self.keys.steps
            {
                session.save(self, ctx)?;
            }
        }
        if session.step < self.keys.steps {
            let (step, of) = (session.step, self.keys.steps);
            let text =
                format!("ended at step {step} of {of}: no better state since validate.patience");
            ctx.report.emit(&Event::Note { text });
        }
        session.leave_best(self, ctx)?;
        session.states.finish()?;
        session.student.rest()?;
        Ok(session.student)
    }
}

/// Everything a step needs. What a checkpoint holds is `student`'s learned parameters,
/// `optimizer`'s state, `step` and what `monitor` knows; the data order is a function of the step.
struct Session {
    student: Student,
    teacher: Option<Teacher>,
    source: Source,
    optimizer: Optimizer,
    step: u64,
    /// Whether scales have few digits already.
    shortened: bool,
    monitor: Monitor,
    states: States,
    timer: Timer,
    /// Steps whose numbers nobody has waited for yet: a device goes on to the next one meanwhile.
    waiting: Vec<Waiting>,
    /// The loss that was last seen.
    last_loss: f64,
    /// What log points tell of how far steps go.
    motion: Motion,
}

/// A step that nobody has judged yet.
struct Waiting {
    /// Its number, from 1.
    step: u64,
    /// The schedule's share of the base rate.
    factor: f64,
    stepped: Stepped,
}

/// What steps are made of: a function of the step.
struct Source {
    objective: ObjectiveConfig,
    order: Order,
    positions: Positions,
    /// What the student wrote last.
    samples: Option<Samples>,
    /// What the teacher said of all windows, where it is not asked again.
    cache: Option<TeacherCache>,
}

impl Source {
    /// The micro-batches of a step.
    fn micros<'a>(
        &'a self,
        step: u64,
        training: &'a Training<'_>,
        ctx: &'a StageContext<'_>,
    ) -> Result<Vec<Vec<Part<'a>>>> {
        let Keys { batch: size, accumulate, .. } = training.keys;
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let feed = Feed::new(ctx, corpus, &self.positions);
        let drawn = self.order.batch(step);
        let own = training.on_policy.zip(self.samples.as_ref());
        let written = own.map_or(0, |(keys, _)| keys.rows(size));
        let share = |rows: usize| rows as f64 / size as f64;
        let micro = |micro: usize| {
            let windows = &drawn[micro * size..][..size];
            let mut parts = Vec::new();
            if let Some((keys, samples)) = own {
                let samples = samples.of(step, [micro, accumulate], written);
                let objective = keys.objective.as_ref().unwrap_or(&self.objective);
                let batch = feed.written(&samples);
                parts.push(Part { batch, objective, share: share(written) });
            }
            if written < size {
                let batch = feed.windows(&windows[written..]);
                let batch = match &self.cache {
                    None => batch,
                    Some(cache) => batch.with_said(cache.of(windows)?),
                };
                let objective = &self.objective;
                parts.push(Part { batch, objective, share: share(size - written) });
            }
            Ok(parts)
        };
        (0..accumulate).map(micro).collect()
    }
}

impl Session {
    fn start(
        training: &Training<'_>,
        student: Student,
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
        // One that is asked once is read block by block.
        let memory = training.cached.map_or(training.memory, |_| Memory::Disk);
        let teacher = compares.then(|| Teacher::new(ctx, memory, student.ends())).transpose()?;
        let cache = training.cached.zip(teacher.as_ref());
        let cache = cache.map(|(kept, teacher)| {
            let steps = training.keys.steps;
            TeacherCache::filled(kept, (training.verb, steps), &order, teacher, ctx)
        });
        let cache = cache.transpose()?;
        let feed = Feed::new(ctx, corpus, &positions);
        let objective = confident(training, ctx, teacher.as_ref(), &order, &feed)?;
        let watched = (training.verb, training.keys.steps, training.keys.objective);
        let monitor = Monitor::new(training.keys.validate, watched, ctx, teacher.as_ref())?;
        let motion = Motion::of(&student)?;
        let mut session = Self {
            student: student.train(),
            teacher,
            source: Source { objective, order, positions, samples: None, cache },
            optimizer: training.optimizer(ctx),
            step: 0,
            shortened: false,
            monitor,
            states: States::of(ctx.dir, training.keys.keep)?,
            timer: Timer::new(0),
            waiting: Vec::new(),
            last_loss: f64::NAN,
            motion,
        };
        if !session.load(training, ctx)? {
            session.begin(ctx)?;
        }
        session.timer = Timer::new(session.step);
        Ok(session)
    }

    /// Gradients and update of one step; a log point asks for more numbers.
    fn update(
        &mut self,
        training: &Training<'_>,
        ctx: &StageContext<'_>,
        rate_of: &dyn Fn(&str) -> f64,
        log_point: bool,
    ) -> Result<(Stepped, LogPoint)> {
        let waiting = Instant::now();
        let micros = self.source.micros(self.step, training, ctx)?;
        self.timer.data += waiting.elapsed();
        self.timer.tokens += micros.iter().flatten().map(|part| part.batch.len()).sum::<usize>();
        let in_units = training.rate_unit == RateUnit::Grid;
        let (fake_quant, optimizer) = (training.fake_quant, &mut self.optimizer);
        let teacher = self.teacher.as_ref().filter(|_| self.source.cache.is_none());
        let motion = &mut self.motion;
        if log_point {
            optimizer.note();
        }
        let (stepped, closeness) = match &mut self.student {
            Student::Whole(model) => {
                let on_tape = OnTape { in_units, fake_quant, teacher: teacher.map(Teacher::ends) };
                let before = model.blocks.iter().filter(|_| log_point).map(motion::codes);
                let before: Vec<_> = before.collect();
                // Moved, not cloned: what is held once is updated in place.
                let blocks = std::mem::take(&mut model.blocks);
                let whole = CausalLm { blocks, ..model.clone() };
                let (whole, stepped, closeness) =
                    on_tape.step(whole, optimizer, &micros, rate_of, log_point)?;
                *model = whole;
                for (block, before) in model.blocks.iter().zip(&before) {
                    motion.note(block.index, before, block);
                }
                (stepped, closeness)
            }
            Student::ByBlock(rack) => {
                let motion = log_point.then_some(motion);
                let mut step =
                    ByBlockStep { rack, optimizer, rate_of, in_units, fake_quant, motion };
                match teacher {
                    None => step.step(&micros, None, log_point)?,
                    Some(teacher) => teacher.with(ctx, |model| {
                        step.step(&micros, Some((model, teacher.ends())), log_point)
                    })?,
                }
            }
        };
        let moved = self.motion.take(self.optimizer.take_noted());
        Ok((stepped, LogPoint { closeness, moved }))
    }

    /// One optimizer step.
    fn advance(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let step = self.step;
        exhausted::part(&format!("step {step}"));
        if step >= ctx.shortens_at(training.keys.steps) && !self.shortened {
            self.shorten(ctx.scales);
        }
        let schedule = training.keys.schedule.resolved(training.rate_unit, training.keys.steps);
        let scheduled = schedule.factor(step, training.keys.steps);
        let factor = scheduled * self.monitor.rate_factor();
        let rate_of = |path: &str| (training.rate_of)(path) * factor;
        let log_point =
            (step + 1).is_multiple_of(training.keys.log_every) || step + 1 == training.keys.steps;
        let stepped = self.update(training, ctx, &rate_of, log_point);
        let (stepped, told) =
            stepped.map_err(|e| e.at(format!("stage {}, step {step}", ctx.stage)))?;
        self.waiting.push(Waiting { step: step + 1, factor: scheduled, stepped });
        if !(log_point || self.numbers_are_due(training)) {
            self.step += 1;
            self.say_progress(training, ctx);
            return Ok(());
        }
        let (stats, told) = match self.judge(training, ctx, told)? {
            Ok(seen) => seen,
            Err((failure, culprit)) => {
                return self.go_back(training, (&failure, culprit), step + 1, ctx);
            }
        };
        self.step += 1;
        if log_point {
            let at = (training.verb, [self.step, training.keys.steps]);
            told.report(at, &stats, training.rate * factor, &mut self.timer, ctx);
        } else {
            self.say_progress(training, ctx);
        }
        self.validate_where_due(training, ctx)
    }

    /// Whether the numbers of the steps so far are wanted behind the one that comes: a validation or a saved
    /// state knows them, and on this machine's processor they are there already.
    fn numbers_are_due(&self, training: &Training<'_>) -> bool {
        let step = self.step + 1;
        self.waiting.iter().all(|waiting| waiting.stepped.is_known())
            || self.monitor.is_due(step)
            || step.is_multiple_of(training.keys.checkpoint_every)
    }

    /// Judges the steps that wait for it, reading the device once; gives the last one's numbers, or what is
    /// wrong with one of them and where.
    #[allow(clippy::type_complexity)] // what it gives is taken apart at once
    fn judge(
        &mut self,
        training: &Training<'_>,
        ctx: &StageContext<'_>,
        mut told: LogPoint,
    ) -> Result<Result<(StepStats, LogPoint), (Failure, Option<String>)>> {
        let mut waiting = std::mem::take(&mut self.waiting);
        let steps = waiting.iter_mut().flat_map(|waiting| waiting.stepped.numbers_mut());
        Numbers::read_all(steps.chain(told.numbers_mut()));
        let mut last = StepStats { loss: f64::NAN, grad_norm: f64::NAN, culprit: None };
        for Waiting { step, factor, stepped } in waiting {
            last = stepped.stats();
            let StepStats { loss, grad_norm, .. } = last;
            // At no rate nothing is to be expected, but numbers.
            if training.rate > 0.0 {
                if let Some(failure) = self.monitor.step(&Seen { step, loss, grad_norm, factor }) {
                    return Ok(Err((failure, last.culprit)));
                }
            } else {
                last.finite()
                    .map_err(|e| e.at(format!("stage {}, step {}", ctx.stage, step - 1)))?;
            }
        }
        self.last_loss = last.loss;
        Ok(Ok((last, told)))
    }

    fn say_progress(&self, training: &Training<'_>, ctx: &mut StageContext<'_>) {
        ctx.report.emit(&Event::Progress {
            verb: training.verb.to_owned(),
            done: self.step,
            of: training.keys.steps,
            detail: format!("loss {:.4}", self.last_loss),
        });
    }

    /// Has the student write what the next steps compare it by, where that is due.
    fn write(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let Some(keys) = training.on_policy else { return Ok(()) };
        let at = Samples::written_at(self.step, keys);
        if self.source.samples.as_ref().is_some_and(|samples| samples.step == at && at < self.step)
        {
            return Ok(());
        }
        if at < self.step
            && let Some(samples) = Samples::read(ctx.dir, at)
        {
            self.source.samples = Some(samples);
            return Ok(());
        }
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let Keys { batch, accumulate, steps, .. } = training.keys;
        let rows = keys.rows(batch);
        let windows: Vec<u32> = (at..(at + keys.every).min(steps))
            .flat_map(|step| {
                let drawn = self.source.order.batch(step);
                let parts = (0..accumulate).map(|part| drawn[part * batch..][..rows].to_vec());
                parts.flatten().collect::<Vec<u32>>()
            })
            .collect();
        let Some(student) = self.student.whole() else {
            return Err(Error::failed("a student that waits elsewhere cannot write"));
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
        self.source.samples = Some(samples);
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
            Kind::Stopped(_) => {
                self.save(training, ctx).and_then(|()| self.states.finish()).and(Err(error))
            }
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
        let validated = self.monitor.validate(&self.student, self.teacher.as_ref(), self.step, ctx);
        // What a validation takes is no part of the next step's speed.
        self.timer.restart();
        validated
    }

    /// Keeps the current state as the one to go back to.
    fn keep(&mut self) -> Result<()> {
        self.monitor.keep(self.step);
        self.states.write_best(self.snapshot(String::new()))?;
        self.settle()
    }

    fn snapshot(&self, progress: String) -> Snapshot {
        let facts = [("step", self.step.to_string()), ("progress", progress)];
        self.student.snapshot(&self.optimizer, facts)
    }

    /// Waits for a state that is being written, where it reads what the next step changes.
    fn settle(&mut self) -> Result<()> {
        if self.student.waits() { self.states.finish() } else { Ok(()) }
    }

    /// Goes on from the state that was kept, with half the rate.
    fn go_back(
        &mut self,
        training: &Training<'_>,
        failure: (&Failure, Option<String>),
        step: u64,
        ctx: &mut StageContext<'_>,
    ) -> Result<()> {
        self.waiting.clear();
        self.monitor.go_back(failure, step, ctx)?;
        self.take_kept(training, ctx)?;
        self.timer = Timer::new(self.step);
        self.save(training, ctx)
    }

    /// The state that was kept becomes the current one.
    fn take_kept(&mut self, training: &Training<'_>, ctx: &StageContext<'_>) -> Result<()> {
        // A resumed run would find the scales long, and shorten them when it is time.
        if self.shortened {
            self.shorten(ScaleDigits::F32);
            self.shortened = false;
        }
        self.states.finish()?;
        self.take(&State::open(&self.states.best_file())?, training, ctx)
    }

    /// A saved state becomes the current one.
    fn take(
        &mut self,
        state: &State,
        training: &Training<'_>,
        ctx: &StageContext<'_>,
    ) -> Result<()> {
        self.optimizer = training.optimizer(ctx);
        self.student.restore(state, &mut self.optimizer)?;
        self.step = state.fact("step")?;
        Ok(())
    }

    /// What the stage leaves: the last state, or the best one where the last is worse.
    fn leave_best(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let left = self.monitor.better_than_last();
        if let Some(step) = left {
            self.take_kept(training, ctx)?;
            if step > ctx.shortens_at(training.keys.steps) {
                self.shorten(ctx.scales);
            }
        }
        self.monitor.finish(left, ctx);
        Ok(())
    }

    /// Scales have as many digits as `digits` from now on.
    fn shorten(&mut self, digits: ScaleDigits) {
        self.student.shorten(digits);
        self.shortened = true;
    }

    /// Saves behind a step whose numbers may be waited for still.
    fn save_judged(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        let step = self.step;
        match self.judge(training, ctx, LogPoint::default())? {
            Ok(_) => self.save(training, ctx),
            Err((failure, culprit)) => self.go_back(training, (&failure, culprit), step, ctx),
        }
    }

    fn save(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
        if training.keys.keep == 0 {
            return Ok(());
        }
        let state = self.snapshot(self.monitor.saved()?);
        self.states.write(state, ctx.report)?;
        self.settle()
    }

    /// Goes on from a saved state; gives whether there is one.
    fn load(&mut self, training: &Training<'_>, ctx: &mut StageContext<'_>) -> Result<bool> {
        let Some(found) = self.states.newest()? else { return Ok(false) };
        let state = &found.state;
        self.take(state, training, ctx)?;
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

/// The objective with the teacher's confidence on the first batches, where it asks for that. A
/// function of the data and the teacher, so a resumed run finds the same number.
fn confident(
    training: &Training<'_>,
    ctx: &StageContext<'_>,
    teacher: Option<&Teacher>,
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
        sum += teacher.with(ctx, |model| {
            let hidden = model.hidden(vec![batch.tokens()], batch.positions())?;
            let hidden = hidden.into_iter().map(|hidden| batch.confidence(teacher.ends(), hidden));
            Ok(hidden.sum::<f64>())
        })?;
    }
    Ok(training.keys.objective.clone().with_confidence(sum / batches as f64))
}
