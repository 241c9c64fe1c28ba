//! The steps that fit a block, or a piece of it: from a state in the middle where there is one, and
//! again at a lower rate where they lead nowhere.

use burn::module::Module;
use serde::{Deserialize, Serialize};

use super::keys::ReconstructConfig;
use super::task::Task;
use crate::data::Order;
use crate::error::{Error, Result};
use crate::export::activations::InputGrids;
use crate::method::{self, Moment};
use crate::ops::Numbers;
use crate::report::{Event, Reporter};
use crate::stage::context::StageContext;
use crate::stage::inputs::{self, Piece, Student};
use crate::stage::states::States;
use crate::stage::training_state::{PARAMETERS, Snapshot, State};
use crate::train::{self, Optimizer, RateUnit, Role, Stepped};

/// How often a block is fitted again, each time at half the rate.
const RETRIES: i32 = 3;
/// A block has diverged when its loss on the first batch is this many times what it was before the first
/// step. Of 450 blocks of SmolLM2, stories260k and TinyStories-656K none ended at so much more of its error.
const DIVERGED: f64 = 2.0;
/// The parameters of the best step so far, where that is what is kept.
const BEST: &str = "best:";

/// How far the fitting of a block is.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(super) struct Course {
    /// Which piece of the block.
    pub piece: usize,
    /// Steps done.
    pub step: u64,
    /// How often the rate was halved.
    halvings: i32,
    /// The least loss so far, where its parameters are kept.
    best: Option<f64>,
    /// The loss before the first step.
    start: f64,
}

/// A saved state in the middle of a block.
pub(super) struct Halfway {
    state: State,
    pub course: Course,
}

impl Halfway {
    /// The state as one of block `index`; `None` where it is another block's.
    ///
    /// # Errors
    /// When it is none of a block.
    pub(super) fn of(state: &State, index: usize) -> Result<Option<Self>> {
        if state.fact::<usize>("block")? != index {
            return Ok(None);
        }
        let course: String = state.fact("course")?;
        let course = serde_json::from_str(&course)
            .map_err(|e| Error::failed(format!("the training state cannot be used: {e}")))?;
        Ok(Some(Self { state: state.clone(), course }))
    }
}

/// The steps of one piece of a block.
pub(super) struct Descent<'a> {
    config: &'a ReconstructConfig,
    states: &'a mut States,
    halfway: Option<Halfway>,
    course: Course,
    optimizer: Optimizer,
    /// The student of the best step.
    best: Option<Student>,
    /// Steps, by number, whose losses nobody has waited for yet: a device goes on meanwhile.
    waiting: Vec<(u64, Stepped)>,
    /// The loss that was last seen.
    last_loss: f64,
}

impl<'a> Descent<'a> {
    /// Those of the piece of this number, from its start or from a state in the middle of it.
    pub(super) fn new(
        config: &'a ReconstructConfig,
        piece: usize,
        states: &'a mut States,
        halfway: Option<Halfway>,
    ) -> Self {
        let course = Course { piece, ..Course::default() };
        let optimizer = Optimizer::new(&config.optimizer);
        Self {
            config,
            states,
            halfway,
            course,
            optimizer,
            best: None,
            waiting: Vec::new(),
            last_loss: f64::NAN,
        }
    }

    /// Trains `student`; `grids` are where the learned grids start. `start` makes the student as it comes:
    /// a copy of it for the case that it is needed again would take as much as what is trained.
    pub(super) fn run(
        &mut self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        mut student: Student,
        start: &dyn Fn(&StageContext<'_>) -> Result<Student>,
        grids: &InputGrids,
    ) -> Result<Student> {
        if let Some(Halfway { state, course }) = self.halfway.take() {
            self.course = course;
            state.optimizer(&mut self.optimizer, "", &ctx.device.device)?;
            if state.has(BEST) {
                self.best = Some(state.parameters(BEST, start(ctx)?)?);
            }
            student = state.parameters(PARAMETERS, student)?;
        }
        loop {
            let fault = match self.steps(ctx, task, student, grids)? {
                Err(fault) => fault,
                Ok(student) => {
                    let left = self.end(task, student);
                    let Some(fault) = self.fault(ctx, task, &left)? else { return Ok(left) };
                    if self.course.halvings == RETRIES {
                        // Numbers all the same: the quality gate says what they are worth.
                        let text = format!("block {}: {fault}, at every rate", task.index + 1);
                        ctx.report.emit(&Event::Warning { text });
                        return Ok(left);
                    }
                    fault
                }
            };
            self.begin_again(ctx, task.index, &fault)?;
            student = start(ctx)?;
        }
    }

    /// What is wrong with what the steps left, if anything.
    fn fault(
        &self,
        ctx: &StageContext<'_>,
        task: &Task<'_>,
        left: &Student,
    ) -> Result<Option<String>> {
        let (order, stream) = self.drawn(ctx, task)?;
        let start = self.course.start;
        let end = task.loss(ctx, left, &order.batch(0), &stream, 0)?;
        let end = Numbers::of(end).values().into_iter().sum::<f64>();
        let diverged = self.config.steps > 0 && (end.is_nan() || end > DIVERGED * start);
        Ok(diverged.then(|| {
            format!("it diverged: its loss on the first batch rose from {start:.3e} to {end:.3e}")
        }))
    }

    /// The order of the batches, and what their randomness is drawn from.
    fn drawn(&self, ctx: &StageContext<'_>, task: &Task<'_>) -> Result<(Order, String)> {
        let mut stream = format!("stage {} block {}", ctx.stage, task.index);
        if task.piece != Piece::Whole {
            stream = format!("{stream} {:?}", task.piece);
        }
        let order = Order::new(ctx.seed, stream.as_str(), task.target.len(), self.config.batch)?;
        Ok((order, stream))
    }

    /// What the last step leaves, or the best one.
    fn end(&mut self, task: &Task<'_>, student: Student) -> Student {
        let mut student = self.best.take().unwrap_or(student).valid();
        task.between_steps(&mut student.block, Moment::End);
        student
    }

    /// Goes back to the start, at half the rate.
    fn begin_again(&mut self, ctx: &mut StageContext<'_>, index: usize, fault: &str) -> Result<()> {
        let Course { piece, step, halvings, .. } = self.course;
        if halvings == RETRIES {
            return Err(Error::failed(format!(
                "the block cannot be fitted, after {RETRIES} retries: {fault}"
            ))
            .at(format!("stage {}, block {index}, step {step}", ctx.stage))
            .fix("a smaller learning_rate, or optimizer.clip_norm = 1.0"));
        }
        let rate = 0.5f64.powi(halvings + 1);
        let text = format!(
            "block {}, step {step}: {fault}; it is fitted again from its start, at {rate} of the rate",
            index + 1
        );
        ctx.report.emit(&Event::Warning { text });
        self.course = Course { piece, halvings: halvings + 1, ..Course::default() };
        self.optimizer = Optimizer::new(&self.config.optimizer);
        self.best = None;
        self.waiting.clear();
        Ok(())
    }

    /// The steps that are left; the inner error is what became of the numbers.
    fn steps(
        &mut self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        mut student: Student,
        grids: &InputGrids,
    ) -> Result<Result<Student, String>> {
        let config = self.config;
        let (order, stream) = self.drawn(ctx, task)?;
        let rates = config.learning_rate;
        let base = |path: &str| match inputs::highest_rate(path, grids) {
            Some(highest) => rates.of(Role::Activation).min(highest),
            None => method::role_of(path).map_or(0.0, |role| rates.of(role)),
        };
        let schedule = config.schedule.resolved(config.rate_unit, config.steps);
        let shortens_at = ctx.shortens_at(config.steps);
        let mut shortened = false;
        while self.course.step < config.steps {
            let step = self.course.step;
            if let Err(stopped) = ctx.stop.check() {
                if let Some(fault) = self.losses(ctx, task, None) {
                    return Ok(Err(fault));
                }
                self.save(ctx, task, &student)?;
                self.states.finish()?;
                return Err(stopped);
            }
            self.states.check()?;
            if step >= shortens_at && !shortened {
                method::shorten_all(task.linears_mut(&mut student.block), ctx.scales);
                shortened = true;
                if step == shortens_at {
                    // A loss with other scales is none of what will be left.
                    (self.best, self.course.best) = (None, None);
                }
            }
            let factor = schedule.factor(step, config.steps) * 0.5f64.powi(self.course.halvings);
            let rate_of = |path: &str| base(path) * factor;
            let batch = order.batch(step);
            let start = config.keep_best.then(|| student.clone());
            if config.rate_unit == RateUnit::Grid {
                let linears = student.block.linears();
                let measures = linears.flat_map(|(_, linear)| method::measures(&linear.weight));
                self.optimizer.measure_by(measures.collect());
            }
            let stepped =
                train::checked_step(student, &mut self.optimizer, 1, &rate_of, |student, _| {
                    let loss = task.loss(ctx, student, &batch, &stream, step)?;
                    if step + 1 < config.steps {
                        task.ahead(&order.batch(step + 1))?;
                    }
                    Ok(loss)
                });
            let (trained, stepped) = stepped.map_err(|e| {
                e.at(format!("stage {}, block {}, step {step}", ctx.stage, task.index))
            })?;
            self.waiting.push((step, stepped));
            if self.losses_are_due(step)
                && let Some(fault) = self.losses(ctx, task, start)
            {
                return Ok(Err(fault));
            }
            student = trained;
            task.between_steps(&mut student.block, Moment::Step(step + 1));
            self.note(ctx, task);
            if (step + 1).is_multiple_of(config.checkpoint_every) && step + 1 < config.steps {
                self.save(ctx, task, &student)?;
            }
        }
        Ok(Ok(student))
    }

    /// Whether the losses of the steps so far are wanted behind this one: for the curve, for a saved state, to
    /// know the best step; on this machine's processor they are there already.
    fn losses_are_due(&self, step: u64) -> bool {
        let config = self.config;
        self.waiting.iter().all(|(_, stepped)| stepped.is_known())
            || config.keep_best
            || step == 0
            || self.is_on_curve(step)
            || (step + 1).is_multiple_of(config.checkpoint_every)
            || step + 1 == config.steps
    }

    /// The number of a step among those of all pieces, and how many there are.
    fn number(&self, step: u64) -> [u64; 2] {
        let pieces = self.config.within.pieces().len() as u64;
        [self.course.piece as u64 * self.config.steps + step, self.config.steps * pieces]
    }

    fn is_on_curve(&self, step: u64) -> bool {
        let [step, steps] = self.number(step);
        step.is_multiple_of((steps / 50).max(1)) || step + 1 == steps
    }

    /// Takes note of the losses that wait for it, reading the device once; gives what is wrong with one.
    /// `start` is the student before the last of them, where that may be kept.
    fn losses(
        &mut self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        start: Option<Student>,
    ) -> Option<String> {
        let mut waiting = std::mem::take(&mut self.waiting);
        Numbers::read_all(waiting.iter_mut().flat_map(|(_, stepped)| stepped.numbers_mut()));
        for (step, stepped) in waiting {
            let stats = stepped.stats();
            if let Some(fault) = stats.fault() {
                self.course.step = step;
                return Some(fault);
            }
            if step == 0 {
                self.course.start = stats.loss;
            }
            // The curve is always the plain mean, whatever the reduction, so that recipes compare.
            let length = task.places.length();
            let sums = self.config.sum_sequence();
            self.last_loss = stats.loss;
            let loss = if sums { stats.loss / length as f64 } else { stats.loss };
            if self.is_on_curve(step) {
                let (stage, block, [step, _]) = (ctx.stage, task.index, self.number(step));
                ctx.report.emit(&Event::BlockLoss { stage, block, step, loss });
            }
        }
        if let Some(start) = start
            && self.course.best.is_none_or(|least| self.last_loss < least)
        {
            (self.best, self.course.best) = (Some(start), Some(self.last_loss));
        }
        None
    }

    /// A step is done, and says so.
    fn note(&mut self, ctx: &mut StageContext<'_>, task: &Task<'_>) {
        let [step, steps] = self.number(self.course.step);
        self.course.step += 1;
        let length = task.places.length();
        let sums = self.config.sum_sequence();
        let loss = if sums { self.last_loss / length as f64 } else { self.last_loss };
        ctx.report.emit(&Event::Progress {
            verb: format!("block {:>2}/{}", task.index + 1, ctx.model.config.n_blocks),
            done: step + 1,
            of: steps,
            detail: format!("mse {loss:.3e}"),
        });
    }

    fn save(
        &mut self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        student: &Student,
    ) -> Result<()> {
        let course = serde_json::to_string(&self.course)
            .map_err(|e| Error::failed(format!("cannot encode how far a block is: {e}")))?;
        let facts = [("block", task.index.to_string()), ("course", course)];
        let mut state = Snapshot::of(student, &self.optimizer, facts);
        if let Some(best) = &self.best {
            state = state.with(BEST, best);
        }
        self.states.write(state, ctx.report)
    }
}
