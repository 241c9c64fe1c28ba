//! `reconstruct`: block by block, each quantized block is fitted to the float block's output.
//!
//! For each block in order: the float block on the float stream gives the target; the quantized
//! block is trained on the quantized stream (the output of the already quantized blocks), or on a
//! random mixture of both streams; its codes are folded and saved; both streams move on. One block
//! is resident at a time, and the teacher block is released before the next one is read. Parameters
//! and losses are f32 whatever the model's type (methods-core 3.3 and 12).
//!
//! Activations on fixed grids are quantized in training, and the grids learn together with the
//! weights; grids that are chosen for each token are left out of it (methods-core 4.4).

use std::time::Instant;

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::activations::Activations;
use super::inputs::{StaticInputs, Student};
use super::streams::{Streams, loader};
use super::{StageContext, inputs, saved_mse, with_mse};
use crate::data::{Order, coin_flips};
use crate::error::{Error, Result};
use crate::export::activations::{self, InputGrids};
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig, Moment};
use crate::model::{Block, block_prefix};
use crate::objective::{ObjectiveConfig, Reduction};
use crate::ops;
use crate::quant::{ActivationQuant, Bits, GroupSize, ObserverConfig, Symmetry};
use crate::report::{Event, Reporter, memory};
use crate::train::{self, LearningRate, Optimizer, OptimizerConfig, Role, ScheduleConfig};

/// Keys of `[stage.reconstruct]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReconstructConfig {
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
    /// `objective.mse`.
    #[serde(default = "mse")]
    pub objective: ObjectiveConfig,
    /// Optimizer steps for each block.
    pub steps: u64,
    /// Sequences in a step.
    #[serde(default = "two")]
    pub batch: usize,
    /// Share of the block's input entries that come from the quantized stream, the others from the
    /// float stream, drawn anew for every step (QDrop, UniQuanF). 1: the quantized stream alone.
    /// Default: 1, or 0.5 when training quantizes activations on fixed grids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_prob: Option<f64>,
    /// Whether training quantizes activations, keys and values as `[quant.activations]` and
    /// `[quant.kv_cache]` say. Default: `true` on fixed grids (`scheme = "tensor"`), else `false`.
    /// Grids that do not learn here are calibrated on the finished block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize_activations: Option<bool>,
    /// Go on, with a warning, when the quality gate finds the model worse than plain rounding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_worse: bool,
    /// Keep the parameters of the step with the lowest loss instead of the last (SignRound's).
    #[serde(default)]
    pub keep_best: bool,
    /// Base learning rates.
    pub learning_rate: LearningRate,
    /// How the rate moves over a block's steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

fn mse() -> ObjectiveConfig {
    ObjectiveConfig::Mse(crate::objective::MseObjective::default())
}

fn two() -> usize {
    2
}

impl ReconstructConfig {
    pub(super) fn check(&self) -> Result<()> {
        if !matches!(self.objective, ObjectiveConfig::Mse(_)) {
            return Err(Error::usage(format!(
                "reconstruct compares block outputs, and its objective, {}, compares logits",
                self.objective.name()
            ))
            .fix("objective.mse = {}, or [stage.distill]"));
        }
        if self.batch == 0 {
            return Err(Error::usage("batch = 0").fix("batch = 2"));
        }
        if let Some(prob) = self.input_prob
            && !(0.0..=1.0).contains(&prob)
        {
            return Err(Error::usage(format!("input_prob = {prob} is not in 0..=1"))
                .fix("input_prob = 1.0: the quantized stream alone"));
        }
        if !self.method.learns() {
            return Err(Error::usage(format!("method.{} learns nothing", self.method.name()))
                .fix("method.flexround = {} here, or [stage.calibrate]"));
        }
        Ok(())
    }

    /// What training does to activations when the model does `quant`.
    fn activations(&self, quant: ActivationQuant) -> ActivationQuant {
        let quantizes = self.quantize_activations.unwrap_or(quant.fixed().is_some());
        if quantizes { quant } else { ActivationQuant::default() }
    }

    fn sum_sequence(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.reduction == Reduction::SequenceSum)
    }

    fn augmented(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.augmented)
    }
}

pub(super) fn run(config: &ReconstructConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let mut streams = Streams::start(ctx)?;
    let blocks = ctx.model.config.n_blocks;
    let saved = (0..blocks).take_while(|index| ctx.block_file(*index).exists()).count();
    if saved > 0 {
        let (stage, position) = ("reconstruct".to_owned(), format!("block {saved}/{blocks}"));
        ctx.report.emit(&Event::Resumed { stage, position });
    }
    for index in 0..blocks {
        ctx.stop.check()?;
        let start = Instant::now();
        let target = streams.target(ctx, index, &streams.float)?;
        let path = ctx.block_file(index);
        let mse = if path.exists() {
            let saved = Saved::read(&path)?;
            let mse = saved_mse(&saved);
            ctx.take(saved)?;
            streams.advance(ctx, index, target)?;
            mse
        } else {
            let (mut saved, before) = Fit::new(config, ctx, index, &streams, &target)?.run(ctx)?;
            ctx.take(saved.clone())?;
            streams.advance(ctx, index, target)?;
            let mse = [before, streams.quantized.mse(&streams.float)];
            saved.metadata = with_mse(saved.metadata, mse);
            saved.write(&path)?;
            ctx.report.emit(&Event::Block {
                stage: ctx.stage,
                index,
                of: blocks,
                verb: "reconstruct".to_owned(),
                mse_before: mse[0],
                mse_after: mse[1],
                steps: config.steps,
                seconds: start.elapsed().as_secs_f64(),
                memory_gib: memory::peak_gib(),
            });
            mse
        };
        ctx.note_block(index, mse);
    }
    ctx.report_codes();
    Ok(())
}

/// The training of one block.
struct Fit<'a> {
    config: &'a ReconstructConfig,
    index: usize,
    streams: &'a Streams,
    /// The float block's output on the float stream.
    target: &'a Activations,
    /// The float block's output on the quantized stream, for the augmented loss.
    augmented: Option<Activations>,
    /// What training does to activations.
    quant: ActivationQuant,
    /// Share of the input entries from the quantized stream.
    input_prob: f64,
}

impl<'a> Fit<'a> {
    fn new(
        config: &'a ReconstructConfig,
        ctx: &StageContext<'_>,
        index: usize,
        streams: &'a Streams,
        target: &'a Activations,
    ) -> Result<Self> {
        let augmented = config.augmented().then(|| streams.target(ctx, index, &streams.quantized));
        let quant = config.activations(ctx.model.activations.quant);
        let input_prob = if quant.fixed().is_some() { 0.5 } else { 1.0 };
        let input_prob = config.input_prob.unwrap_or(input_prob);
        let augmented = augmented.transpose()?;
        Ok(Self { config, index, streams, target, augmented, quant, input_prob })
    }

    /// The block's quantized linears with the grids of its inputs, and its error at the start.
    fn run(&self, ctx: &mut StageContext<'_>) -> Result<(Saved, f64)> {
        let config = self.config;
        let prefix = block_prefix(self.index);
        let mut block = loader(ctx, ctx.model).block(self.index)?;
        for (name, linear) in block.linears_mut() {
            let name = format!("{prefix}.{name}");
            if ctx.specs.contains_key(&name) {
                ctx.attach(&name, linear, &config.method, DType::F32)?;
            }
        }
        let start = coarseness(ctx, &prefix, &block)?;
        let grids = inputs::observe(ctx, self.streams, &block)?;
        let quant = ctx.model.activations.quant;
        let tap = |site, x| activations::quantize(&quant, &grids, site, x);
        let before = self.streams.forward(ctx, &block, &self.streams.quantized, &tap)?;
        let before = before.mse(self.target);
        let device = &ctx.device.device;
        let learned = self.quant.fixed();
        let learned = learned.and_then(|bits| StaticInputs::new(&grids, bits, device));
        let student = Student { block, inputs: learned }.train();
        let Student { block, inputs } = self.train(ctx, student, &grids)?;
        report_scales(ctx, self.index, &prefix, &block, &start, config.steps)?;
        let mut saved = Saved::default();
        let grids = match inputs {
            Some(learned) => learned.grids()?,
            None => inputs::observe(ctx, self.streams, &block)?,
        };
        activations::store(self.index, &grids, &mut saved.dense);
        for (name, linear) in block.linears() {
            let name = format!("{prefix}.{name}");
            if ctx.specs.contains_key(&name) {
                let folded = ctx.fold(&name, linear)?;
                saved.linears.push((name, folded, config.method.name().to_owned()));
            }
        }
        Ok((saved, before))
    }

    /// Trains; `grids` are where the learned grids start.
    fn train(
        &self,
        ctx: &mut StageContext<'_>,
        mut student: Student,
        grids: &InputGrids,
    ) -> Result<Student> {
        let config = self.config;
        let mut optimizer = Optimizer::new(&config.optimizer);
        let stream = format!("stage {} block {}", ctx.stage, self.index);
        let order = Order::new(ctx.seed, stream.as_str(), self.target.len(), config.batch)?;
        let rates = config.learning_rate;
        let base = |path: &str| match inputs::highest_rate(path, grids) {
            Some(highest) => rates.of(Role::Activation).min(highest),
            None => method::role_of(path).map_or(0.0, |role| rates.of(role)),
        };
        let mut best: Option<(f64, Student)> = None;
        let shortens_at = ctx.shortens_at(config.steps);
        for step in 0..config.steps {
            ctx.stop.check()?;
            if step == shortens_at {
                method::shorten_all(student.block.linears_mut().map(|(_, l)| l), ctx.scales);
                // A loss with other scales is none of what will be left.
                best = None;
            }
            let factor = config.schedule.factor(step, config.steps);
            let rate_of = |path: &str| base(path) * factor;
            let batch = order.batch(step);
            let start = config.keep_best.then(|| student.clone());
            let (trained, stats) =
                train::step(student, &mut optimizer, 1, &rate_of, |student, _| {
                    Ok(self.loss(ctx, student, &batch, &stream, step))
                })
                .map_err(|e| {
                    e.at(format!("stage {}, block {}, step {step}", ctx.stage, self.index))
                })?;
            student = trained;
            self.between_steps(&mut student.block, Moment::Step(step + 1));
            if let Some(start) = start
                && best.as_ref().is_none_or(|(least, _)| stats.loss < *least)
            {
                best = Some((stats.loss, start));
            }
            let length = self.streams.positions.len();
            report_step(config, ctx, self.index, step, length, stats.loss);
        }
        let mut student = best.map_or(student, |(_, best)| best).valid();
        self.between_steps(&mut student.block, Moment::End);
        Ok(student)
    }

    /// The objective on one batch.
    fn loss(
        &self,
        ctx: &StageContext<'_>,
        student: &Student,
        batch: &[u32],
        stream: &str,
        step: u64,
    ) -> Tensor<1> {
        let device = &ctx.device.device;
        let mut input = self.streams.quantized.batch(batch, device);
        if self.input_prob < 1.0 {
            let float = self.streams.float.batch(batch, device);
            let shape = input.dims();
            let stream = format!("{stream} inputs");
            let count = shape.iter().product();
            let mask = coin_flips(ctx.seed, &stream, step, count, self.input_prob);
            let mask: Tensor<3> = Tensor::from_data(TensorData::new(mask, shape), device);
            input = float.mask_where(mask.equal_elem(1.0), input);
        }
        let output = student.forward(input, &self.streams.positions, self.quant);
        let compare = |goal: &Activations| {
            let goal = goal.batch(batch, device);
            ops::block_mse(output.clone(), goal, self.config.sum_sequence())
        };
        let loss = compare(self.target);
        match &self.augmented {
            Some(augmented) => loss + compare(augmented),
            None => loss,
        }
    }

    fn between_steps(&self, block: &mut Block, moment: Moment) {
        if !self.config.method.has_hook() {
            return;
        }
        for (_, linear) in block.linears_mut() {
            if let Some(weight) = method::between_steps(&linear.weight, moment) {
                linear.weight = weight;
            }
        }
    }
}

fn report_step(
    config: &ReconstructConfig,
    ctx: &mut StageContext<'_>,
    index: usize,
    step: u64,
    length: usize,
    loss: f64,
) {
    // The curve is always the plain mean, whatever the reduction, so that recipes compare.
    let loss = if config.sum_sequence() { loss / length as f64 } else { loss };
    let every = (config.steps / 50).max(1);
    if step.is_multiple_of(every) || step + 1 == config.steps {
        ctx.report.emit(&Event::BlockLoss { block: index, step, loss });
    }
    ctx.report.emit(&Event::Progress {
        verb: format!("block {:>2}/{}", index + 1, ctx.model.config.n_blocks),
        done: step + 1,
        of: config.steps,
        detail: format!("mse {loss:.3e}"),
    });
}

/// How coarse the grid of every group of a block is, in order.
fn coarseness(ctx: &StageContext<'_>, prefix: &str, block: &Block) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (name, linear) in block.linears() {
        if ctx.specs.contains_key(&format!("{prefix}.{name}"))
            && let Some(folded) = method::fold(&linear.weight)
        {
            all.extend(folded?.grid.coarseness());
        }
    }
    Ok(all)
}

fn report_scales(
    ctx: &mut StageContext<'_>,
    index: usize,
    prefix: &str,
    block: &Block,
    start: &[f32],
    steps: u64,
) -> Result<()> {
    let end = coarseness(ctx, prefix, block)?;
    let changes: Vec<f32> = end.iter().zip(start).map(|(end, start)| (end / start).ln()).collect();
    let step = ctx.first_step + steps * (index as u64 + 1);
    ctx.report_scale_change(&changes, step);
    Ok(())
}
