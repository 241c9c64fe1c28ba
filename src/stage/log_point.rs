//! What a log point of a training tells: the step's numbers, how near the student is to its teacher, how
//! far the step went, speed and memory.

use std::time::{Duration, Instant};

use super::context::StageContext;
use super::motion::Moved;
use crate::device;
use crate::ops::{Closeness, Numbers};
use crate::report::{Event, Reporter, memory};
use crate::train::StepStats;

/// Times between log points, and of the training in this process.
pub(super) struct Timer {
    since: Instant,
    /// Time that steps waited for data.
    pub data: Duration,
    /// Tokens read.
    pub tokens: usize,
    /// When this process took up the training, and behind which step.
    began: (Instant, u64),
}

impl Timer {
    /// Of a training that is taken up behind `step`.
    pub(super) fn new(step: u64) -> Self {
        let now = Instant::now();
        Self { since: now, data: Duration::ZERO, tokens: 0, began: (now, step) }
    }

    /// The next log point's time begins now.
    pub(super) fn restart(&mut self) {
        *self = Self { began: self.began, ..Self::new(0) };
    }

    /// Seconds until `of` steps are done, by the mean of those that this process has done.
    fn left(&self, step: u64, of: u64) -> f64 {
        let (since, from) = self.began;
        let each = since.elapsed().as_secs_f64() / step.saturating_sub(from).max(1) as f64;
        each * of.saturating_sub(step) as f64
    }
}

/// What a log point tells beside the numbers of its step; they may be waited for.
#[derive(Default)]
pub(super) struct LogPoint {
    /// How near the student is to its teacher.
    pub closeness: Option<Numbers>,
    /// How far the step went.
    pub moved: Moved,
}

impl LogPoint {
    /// Everything that may be waited for.
    pub(super) fn numbers_mut(&mut self) -> impl Iterator<Item = &mut Numbers> {
        self.closeness.iter_mut().chain(self.moved.numbers_mut())
    }

    /// Says so behind a step, whose numbers are `stats`, at the base rate `rate`.
    pub(super) fn report(
        &self,
        (verb, [step, of]): (&'static str, [u64; 2]),
        stats: &StepStats,
        rate: f64,
        timer: &mut Timer,
        ctx: &mut StageContext<'_>,
    ) {
        let seconds = timer.since.elapsed().as_secs_f64().max(1e-9);
        let mut values = vec![
            ("train/loss", stats.loss),
            ("train/learning_rate", rate),
            ("train/grad_norm", stats.grad_norm),
        ];
        if let Some(numbers) = &self.closeness {
            let c = Closeness::of(&numbers.values());
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
        let held = ctx.device.discrete.then(|| device::held(&ctx.device.device)).flatten();
        let gib = held.map(|[_, reserved]| reserved as f64 / f64::from(1 << 30));
        values.extend(gib.map(|gib| ("memory/device_gib", gib)));
        let (stage, global_step) = (ctx.stage, ctx.first_step + step);
        ctx.report.emit(&Event::Step {
            stage,
            verb: verb.to_owned(),
            step,
            of,
            global_step,
            values: values.into_iter().map(|(tag, value)| (tag.to_owned(), value)).collect(),
        });
        let mut values = self.moved.values();
        values.push(("perf/seconds_left", timer.left(step, of)));
        let blocks = self.moved.by_block();
        ctx.report.emit(&Event::Details { stage, step, global_step, values, blocks });
        timer.restart();
    }
}
