//! `distill`: the whole quantized model at once, against a frozen float teacher.
//!
//! UPQ's second half is this stage with `method.seq` at 2 bits and `objective.jsd` (methods-core
//! 6.1): latent weights start at the current (for instance INT4) values, latents and steps learn
//! together. With `objective.cross_entropy` it is plain quantization-aware training.
//!
//! The head is frozen, so the loss's gradient is brought back to the hidden state chunk by chunk,
//! and nothing of size `[tokens, vocab]` outlives its chunk.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::{Data, StageContext, training_state};
use crate::data::{Order, TokenStream};
use crate::error::{Error, Result};
use crate::method::{self, MethodConfig};
use crate::model::{Block, CausalLm, Loader, Positions, WeightSource, block_prefix, weight_name};
use crate::objective::{ObjectiveConfig, Targets};
use crate::ops::{self, Closeness};
use crate::quant::{Bits, GroupSize, ObserverConfig, Symmetry};
use crate::report::{Event, Reporter, memory};
use crate::train::{
    self, LearningRate, Optimizer, OptimizerConfig, ScheduleConfig, StepStats, Still,
};

/// Logits held at once, student's and teacher's each.
const LOGITS_PER_CHUNK: usize = 1 << 23;

/// Keys of `[stage.distill]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// How weights are quantized and what is learned.
    pub method: MethodConfig,
    /// Instead of `quant.bits`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Instead of `quant.group_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Instead of `quant.symmetric`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<Symmetry>,
    /// Instead of `quant.observer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observer: Option<ObserverConfig>,
    /// What student and teacher are compared by.
    pub objective: ObjectiveConfig,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences in a micro-batch.
    #[serde(default = "eight")]
    pub batch: usize,
    /// Micro-batches in a step.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Base learning rates.
    pub learning_rate: LearningRate,
    /// How the rate moves over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants and gradient clipping.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Steps between saves of the whole training state.
    #[serde(default = "hundred")]
    pub checkpoint_every: u64,
    /// Steps between log points.
    #[serde(default = "ten")]
    pub log_every: u64,
}

fn one() -> usize {
    1
}

fn eight() -> usize {
    8
}

fn ten() -> u64 {
    10
}

fn hundred() -> u64 {
    100
}

impl DistillConfig {
    pub(super) fn check(&self) -> Result<()> {
        self.objective.check()?;
        if matches!(self.objective, ObjectiveConfig::Mse(_)) {
            return Err(Error::usage("objective.mse compares block outputs, and distill logits")
                .fix("objective.jsd = {}"));
        }
        for (key, value) in [
            ("batch", self.batch as u64),
            ("accumulate", self.accumulate as u64),
            ("checkpoint_every", self.checkpoint_every),
            ("log_every", self.log_every),
        ] {
            if value == 0 {
                return Err(Error::usage(format!("{key} = 0")).fix(format!("{key} = 1")));
            }
        }
        if !self.method.learns() {
            return Err(Error::usage(format!("method.{} learns nothing", self.method.name()))
                .fix("method.seq = {} here, or [stage.calibrate]"));
        }
        if self.method.has_hook() {
            // Its state between steps is not part of a saved training state.
            return Err(Error::usage(format!(
                "method.{} learns block by block",
                self.method.name()
            ))
            .fix("[stage.reconstruct]"));
        }
        Ok(())
    }
}

pub(super) fn run(config: &DistillConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let mut session = Session::start(config, ctx)?;
    while session.step < config.steps {
        if let Err(stopped) = ctx.stop.check() {
            session.save(ctx)?;
            return Err(stopped);
        }
        session.advance(config, ctx)?;
        if session.step.is_multiple_of(config.checkpoint_every) && session.step < config.steps {
            session.save(ctx)?;
        }
    }
    session.finish(config, ctx)
}

/// Everything a step needs. What a checkpoint holds is `student`'s learned parameters,
/// `optimizer`'s state and `step`; the data order is a function of the step.
struct Session {
    student: Option<CausalLm>,
    teacher: Option<CausalLm>,
    objective: ObjectiveConfig,
    optimizer: Optimizer,
    order: Order,
    positions: Positions,
    start_scales: Vec<f32>,
    step: u64,
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
    fn start(config: &DistillConfig, ctx: &mut StageContext<'_>) -> Result<Self> {
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let windows = corpus.stream.windows(corpus.length);
        let windows = corpus.samples.map_or(windows, |samples| samples.min(windows));
        let order = Order::new(
            ctx.seed,
            format!("stage {}", ctx.stage),
            windows,
            config.batch * config.accumulate,
        )?;
        let device = &ctx.device.device;
        let positions = Positions::new(&ctx.model.config, 0, corpus.length, ctx.compute, device);
        let load = |source: &dyn WeightSource| {
            Loader { config: &ctx.model.config, source, device, dtype: ctx.compute }.model()
        };
        let teacher =
            config.objective.needs_teacher().then(|| load(&ctx.model.checkpoint)).transpose()?;
        let mut student = load(ctx.model)?.with_tap(ctx.model.activations.tap());
        attach_all(&mut student, config, ctx)?;
        let start_scales = scales(&student)?;
        let objective = confident(config, ctx, teacher.as_ref(), &order, &positions)?;
        let mut session = Self {
            student: Some(student.train()),
            teacher,
            objective,
            optimizer: Optimizer::new(&config.optimizer),
            order,
            positions,
            start_scales,
            step: 0,
            timer: Timer::new(),
        };
        session.load(config, ctx)?;
        Ok(session)
    }

    /// One optimizer step.
    fn advance(&mut self, config: &DistillConfig, ctx: &mut StageContext<'_>) -> Result<()> {
        let step = self.step;
        let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
        let factor = config.schedule.factor(step, config.steps);
        let base = config.learning_rate;
        let rate_of = |path: &str| method::role_of(path).map_or(0.0, |role| base.of(role) * factor);
        let drawn = self.order.batch(step);
        let (teacher, positions, timer) = (&self.teacher, &self.positions, &mut self.timer);
        let objective = &self.objective;
        let log_point = (step + 1).is_multiple_of(config.log_every) || step + 1 == config.steps;
        let mut closeness = None;
        let student = self.student.take().ok_or_else(|| Error::failed("the student is gone"))?;
        let (student, stats) = train::accumulated_step(
            student,
            &mut self.optimizer,
            config.accumulate,
            &rate_of,
            still,
            |student, part| {
                let waiting = Instant::now();
                let windows = &drawn[part * config.batch..][..config.batch];
                let batch = Batch::new(&corpus.stream, windows, corpus.length, &ctx.device.device);
                timer.data += waiting.elapsed();
                timer.tokens += windows.len() * corpus.length;
                let compare = log_point && part == 0;
                let (loss, measured) =
                    batch.loss(student, teacher.as_ref(), positions, objective, compare)?;
                closeness = closeness.take().or(measured);
                Ok(loss)
            },
        )
        .map_err(|e| e.at(format!("stage {}, step {step}", ctx.stage)))?;
        self.student = Some(student);
        self.step += 1;
        if log_point {
            self.report(config, ctx, stats, closeness, base.weight.max(base.scale) * factor);
        } else {
            ctx.report.emit(&Event::Progress {
                verb: "distill".to_owned(),
                done: self.step,
                of: config.steps,
                detail: format!("loss {:.4}", stats.loss),
            });
        }
        Ok(())
    }

    fn report(
        &mut self,
        config: &DistillConfig,
        ctx: &mut StageContext<'_>,
        stats: StepStats,
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
            verb: "distill".to_owned(),
            step: self.step,
            of: config.steps,
            global_step: ctx.first_step + self.step,
            values: values.into_iter().map(|(tag, value)| (tag.to_owned(), value)).collect(),
        });
    }

    /// Folds, saves the codes, and removes the training state.
    fn finish(mut self, config: &DistillConfig, ctx: &mut StageContext<'_>) -> Result<()> {
        let student = self.student.take().ok_or_else(|| Error::failed("the student is gone"))?;
        drop(self.teacher.take());
        let student = student.valid();
        let changes: Vec<f32> = scales(&student)?
            .iter()
            .zip(&self.start_scales)
            .map(|(end, start)| (end / start).ln())
            .collect();
        ctx.report_scale_change(&changes, ctx.first_step + self.step);
        let mut linears = Vec::new();
        for (index, block) in student.blocks.iter().enumerate() {
            for (name, linear) in block.linears() {
                let name = format!("{}.{name}", block_prefix(index));
                if ctx.specs.contains_key(&name) {
                    let folded = ctx.fold(&name, linear)?;
                    linears.push((name, folded, config.method.name().to_owned()));
                }
            }
        }
        ctx.save_linears(linears)?;
        ctx.report_codes();
        let state = state_file(ctx);
        if state.exists() {
            std::fs::remove_file(&state).map_err(|e| Error::io("remove", &state, &e))?;
        }
        Ok(())
    }

    fn save(&self, ctx: &StageContext<'_>) -> Result<()> {
        match &self.student {
            Some(student) => {
                training_state::save(&state_file(ctx), student, &self.optimizer, self.step)
            }
            None => Ok(()),
        }
    }

    /// Goes on from a saved state, if there is one.
    fn load(&mut self, config: &DistillConfig, ctx: &mut StageContext<'_>) -> Result<()> {
        let path = state_file(ctx);
        let Some(student) = self.student.take_if(|_| path.exists()) else { return Ok(()) };
        let device = &ctx.device.device;
        let (student, step) = training_state::load(&path, student, &mut self.optimizer, device)?;
        self.student = Some(student);
        self.step = step;
        ctx.report.emit(&Event::Resumed {
            stage: "distill".to_owned(),
            position: format!("step {}/{}", self.step, config.steps),
        });
        Ok(())
    }
}

fn state_file(ctx: &StageContext<'_>) -> PathBuf {
    ctx.dir.join("state.safetensors")
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

/// Puts the method on every linear of the plan. Latents are f32 whatever the model's type.
fn attach_all(
    student: &mut CausalLm,
    config: &DistillConfig,
    ctx: &StageContext<'_>,
) -> Result<()> {
    for (index, block) in student.blocks.iter_mut().enumerate() {
        for (name, linear) in block.linears_mut() {
            let name = format!("{}.{name}", block_prefix(index));
            if !ctx.specs.contains_key(&name) {
                continue;
            }
            if ctx.compute != DType::F32 {
                let [inputs, out] = linear.weight.dims();
                let values = ctx.model.weight(&weight_name(&name), &[out, inputs])?;
                let latent = TensorData::new(values, [out, inputs]);
                let latent = Tensor::<2>::from_data(latent, &ctx.device.device).transpose();
                linear.weight = Param::initialized(linear.weight.id, latent);
            }
            ctx.attach(&name, linear, &config.method, ctx.compute)?;
        }
    }
    Ok(())
}

/// The objective with the teacher's confidence on the first batches, where it asks for that. A
/// function of the data and the teacher, so a resumed run finds the same number.
fn confident(
    config: &DistillConfig,
    ctx: &StageContext<'_>,
    teacher: Option<&CausalLm>,
    order: &Order,
    positions: &Positions,
) -> Result<ObjectiveConfig> {
    let batches = config.objective.confidence_batches();
    let (Some(teacher), 1..) = (teacher, batches) else { return Ok(config.objective.clone()) };
    let corpus = Data::need(ctx.data.train.as_ref(), "train")?;
    let mut sum = 0.0;
    for step in 0..batches {
        ctx.stop.check()?;
        let drawn = order.batch(step);
        let windows = &drawn[..config.batch];
        let batch = Batch::new(&corpus.stream, windows, corpus.length, &ctx.device.device);
        let hidden = flat(teacher.hidden(batch.tokens.clone(), positions));
        for range in chunks(hidden.dims()[0], teacher.vocab()) {
            let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
            let logits = teacher.logits(part(&hidden));
            sum += ops::confidence(logits, part(&batch.weights));
        }
    }
    Ok(config.objective.clone().with_confidence(sum / batches as f64))
}

/// `[batch, seq, d_model]` as `[tokens, d_model]`.
fn flat(hidden: Tensor<3>) -> Tensor<2> {
    let [batch, seq, d_model] = hidden.dims();
    hidden.reshape([batch * seq, d_model])
}

/// Runs of tokens whose logits are held together.
fn chunks(tokens: usize, vocab: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let chunk = (LOGITS_PER_CHUNK / vocab).clamp(1, tokens.max(1));
    (0..tokens).step_by(chunk).map(move |start| start..(start + chunk).min(tokens))
}

/// How coarse the grid of every group is, in order.
fn scales(model: &CausalLm) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (_, linear) in model.blocks.iter().flat_map(Block::linears) {
        if let Some(folded) = method::fold(&linear.weight) {
            all.extend(folded?.grid.coarseness());
        }
    }
    Ok(all)
}

/// Token windows on the device.
struct Batch {
    tokens: Tensor<2, Int>,
    next: Tensor<2, Int>,
    next_weights: Tensor<2>,
    weights: Tensor<2>,
}

impl Batch {
    fn new(stream: &TokenStream, windows: &[u32], length: usize, device: &Device) -> Self {
        let rows: Vec<&[u32]> =
            windows.iter().map(|w| stream.window(*w as usize, length)).collect();
        let count = rows.len() * length;
        let last = |i: usize| i % length == length - 1;
        let flat: Vec<i32> =
            rows.iter().flat_map(|row| row.iter().map(|id| id.cast_signed())).collect();
        let next = (0..count).map(|i| if last(i) { 0 } else { flat[i + 1] }).collect();
        let predicted = (rows.len() * (length - 1)).max(1) as f32;
        let weights = (0..count).map(|i| if last(i) { 0.0 } else { 1.0 / predicted }).collect();
        let column = |values: Vec<f32>| TensorData::new(values, [count, 1]);
        Self {
            tokens: CausalLm::tokens(&rows, device),
            next: Tensor::from_data(TensorData::new::<i32, _>(next, [count, 1]), device),
            next_weights: Tensor::from_data(column(weights), device),
            weights: Tensor::from_data(column(vec![1.0 / count as f32; count]), device),
        }
    }

    /// The objective on this batch, joined to the student's tape at its hidden state.
    fn loss(
        &self,
        student: &CausalLm,
        teacher: Option<&CausalLm>,
        positions: &Positions,
        objective: &ObjectiveConfig,
        compare: bool,
    ) -> Result<(Tensor<1>, Option<Closeness>)> {
        let hidden = flat(student.hidden(self.tokens.clone(), positions));
        let free = hidden.clone().inner();
        let goal = teacher.map(|teacher| flat(teacher.hidden(self.tokens.clone(), positions)));
        let [count, _] = free.dims();
        let mut value: Option<Tensor<1>> = None;
        let mut gradients = Vec::new();
        let mut closeness = (compare && teacher.is_some()).then(Closeness::default);
        for range in chunks(count, student.vocab()) {
            let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
            let logits = student.logits(part(&free)).inner();
            let targets = Targets {
                teacher: teacher.zip(goal.as_ref()).map(|(t, goal)| t.logits(part(goal))),
                next: self.next.clone().slice_dim(0, range.clone()),
                next_weights: part(&self.next_weights),
                weights: part(&self.weights),
            };
            if let (Some(sum), Some(teacher)) = (closeness.as_mut(), targets.teacher.clone()) {
                add(sum, ops::compare(logits.clone(), teacher, targets.weights.clone()));
            }
            let loss = objective.on_logits(logits, &targets)?;
            value = Some(match value {
                Some(sum) => sum + loss.value,
                None => loss.value,
            });
            gradients.push(student.head_gradient(loss.gradient).inner());
        }
        let value = value.ok_or_else(|| Error::failed("an empty batch"))?;
        let loss = ops::with_gradient(hidden, value, Tensor::cat(gradients, 0));
        Ok((loss, closeness))
    }
}

/// Adds what was measured on a part of the tokens.
fn add(sum: &mut Closeness, part: Closeness) {
    sum.jsd += part.jsd;
    sum.kl_forward += part.kl_forward;
    sum.kl_reverse += part.kl_reverse;
    sum.top1 += part.top1;
}
