//! `reconstruct`: block by block, each quantized block is fitted to the float block's output.
//!
//! For each block in order: the float block on the float stream gives the target; the quantized
//! block is trained on the quantized stream (the output of the already quantized blocks), or on a
//! random mixture of both streams; its codes are folded and saved; both streams move on. One block
//! is resident at a time, and the teacher block is released before the next one is read. Parameters
//! and losses are f32 whatever the model's type.
//!
//! With `within = "staged"` a block is fitted in three pieces, one after the other and each with all
//! the steps: queries and keys by themselves, values and output by the residual stream behind
//! attention, the MLP by the block's output. A piece computes no more than it needs: three of them
//! cost less than three passes over the block. What it is worth: docs/two-bits.md.
//!
//! Activations on fixed grids are quantized in training, and the grids learn together with the
//! weights; grids that are chosen for each token are left out of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::activations::Activations;
use super::context::{StageContext, block_file, saved_mse, with_mse};
use super::corpus::Data;
use super::cost::{Cost, Lever, Scene, TRAINED_WEIGHT_BYTES};
use super::inputs::{self, Piece, StaticInputs, Student};
use super::keys::check_rate_unit;
use super::kind::{Before, Effect, Judged, Stage, codes};
use super::start::StartFrom;
use super::state::ModelState;
use super::streams::{Streams, float_block, loader};
use super::visits::Visits;
use crate::data::{Order, coin_flips};
use crate::error::{Error, Result};
use crate::export::activations::{self, InputGrids};
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig, Moment};
use crate::model::{Block, LinearSpec, Residual};
use crate::objective::{ObjectiveConfig, Reduction, TokenWeight};
use crate::ops;
use crate::quant::{ActivationQuant, Bits, GroupSize, ObserverConfig, Symmetry};
use crate::report::{At, Event, Reporter, memory};
use crate::train::{
    self, LearningRate, Optimizer, OptimizerConfig, RateUnit, Role, ScheduleConfig,
};

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
    /// On another grid than the earlier stage's: what the weights start from.
    #[serde(default)]
    pub start_from: StartFrom,
    /// Whether the linears of a block learn together or piece by piece: `"block"` or `"staged"`.
    #[serde(default)]
    pub within: Within,
    /// `objective.mse`.
    #[serde(default = "mse")]
    pub objective: ObjectiveConfig,
    /// Optimizer steps for each block, or for each piece of a block.
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
    /// What the rates of latent weights and steps are measured in: `"absolute"` or `"grid"`.
    #[serde(default)]
    pub rate_unit: RateUnit,
    /// How the rate moves over a block's steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
}

/// What of a block learns at a time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Within {
    /// All of it.
    #[default]
    Block,
    /// Queries and keys, then values and output, then the MLP.
    Staged,
}

impl Within {
    fn pieces(self) -> &'static [Piece] {
        match self {
            Self::Block => &[Piece::Whole],
            Self::Staged => &[Piece::Scores, Piece::Attention, Piece::Mlp],
        }
    }
}

fn mse() -> ObjectiveConfig {
    ObjectiveConfig::Mse(crate::objective::MseObjective::default())
}

fn two() -> usize {
    2
}

impl ReconstructConfig {
    /// What training does to activations when the model does `quant`.
    fn activations(&self, quant: ActivationQuant) -> ActivationQuant {
        let quantizes = self.quantize_activations.unwrap_or(quant.fixed().is_some());
        if quantizes { quant } else { ActivationQuant::default() }
    }

    fn sum_sequence(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.reduction == Reduction::SequenceSum)
    }

    fn relative_tokens(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.tokens == TokenWeight::Relative)
    }

    fn augmented(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.augmented)
    }
}

impl Stage for ReconstructConfig {
    fn check(&self) -> Result<()> {
        if !matches!(self.objective, ObjectiveConfig::Mse(_)) {
            return Err(Error::usage(format!(
                "reconstruct compares block outputs, and its objective, {}, compares logits",
                self.objective.name()
            ))
            .fix("objective.mse = {}, or [stage.distill]"));
        }
        check_rate_unit(self.rate_unit, &self.optimizer)?;
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

    fn effect(&self) -> Effect<'_> {
        codes!(self)
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        if self.quantize_activations == Some(true) && !before.activations.is_on() {
            return Err(Error::usage(
                "quantize_activations = true, and the recipe leaves them float",
            )
            .fix("quant.activations.scheme = \"tensor\" or \"token\""));
        }
        let beside = before.model.arch.residual == Residual::Parallel;
        if self.within == Within::Staged && beside {
            return Err(Error::usage(format!(
                "within = \"staged\" fits attention before the MLP, and in a {} they stand side by side",
                before.model.model_type
            ))
            .fix("within = \"block\""));
        }
        Ok(())
    }

    fn summary(&self, spec: &str) -> String {
        format!("{}, {spec}", self.method.name())
    }

    fn calibrates(&self) -> bool {
        true
    }

    fn takes_latents(&self) -> bool {
        true
    }

    fn needs_float(&self) -> bool {
        true
    }

    fn check_data(&self, _model: &ModelState, data: &Data) -> Result<()> {
        data.check_calibration()
    }

    fn steps(&self, blocks: usize) -> u64 {
        self.steps * blocks as u64
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let Some((samples, length)) = scene.calibration() else { return Cost::default() };
        let config = scene.config();
        let tokens = self.batch as u64 * length;
        let steps = self.steps(config.n_blocks) as f64;
        let flops = 6.0 * (scene.block * tokens) as f64 * steps
            + 6.0 * (scene.linears * samples * length) as f64;
        let moved = steps * (scene.block * 4 * 40 + scene.tape(tokens, length) * 3) as f64;
        // Both streams and the target; what lies between pieces; the float block's output on the
        // quantized stream.
        let pieces = if self.within == Within::Staged { 2 } else { 0 };
        let streams = 3 + pieces + u64::from(self.augmented());
        let sample = 4 * streams * length * config.d_model as u64;
        Cost {
            device: TRAINED_WEIGHT_BYTES * scene.block + scene.tape(tokens, length),
            host: samples * sample,
            disk: scene.linears,
            seconds: scene.speed.seconds(flops, moved, steps),
            lever: Some(Lever { key: "data.calibration.samples", value: samples, bytes: sample }),
        }
    }

    fn judged(&self) -> Option<Judged<'_>> {
        Some(Judged {
            validate: None,
            allow_worse: self.allow_worse,
            advice: "a smaller learning_rate, more steps; or ",
        })
    }

    fn neutralize(&mut self) {
        self.allow_worse = false;
    }

    fn saved(&self, dir: &Path) -> At {
        At::Block((0..usize::MAX).take_while(|index| block_file(dir, *index).exists()).count())
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
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
            let target = streams.target(ctx, index)?;
            let path = ctx.block_file(index);
            let mse = if path.exists() {
                let saved = Saved::read(&path)?;
                let mse = saved_mse(&saved);
                ctx.take(saved, &path)?;
                streams.advance(ctx, index, target)?;
                mse
            } else {
                let (mut saved, before) = Fit::new(self, ctx, index, &streams, &target).run(ctx)?;
                ctx.take(saved.clone(), &path)?;
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
                    steps: self.steps * self.within.pieces().len() as u64,
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

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        ctx.restore_linears()
    }
}

/// The training of one block.
struct Fit<'a> {
    config: &'a ReconstructConfig,
    index: usize,
    streams: &'a Streams,
    /// The float block's output on the float stream.
    target: &'a Activations,
    /// What training does to activations.
    quant: ActivationQuant,
    /// Share of the input entries from the quantized stream.
    input_prob: f64,
}

/// What one piece of a block is fitted on.
struct Task<'a> {
    piece: Piece,
    /// Input on the quantized stream.
    quantized: &'a Activations,
    /// Input on the float stream.
    float: &'a Activations,
    /// The float piece's output on the float stream.
    target: &'a Activations,
    /// The float piece's output on the quantized stream, for the augmented loss.
    augmented: Option<Activations>,
}

impl<'a> Fit<'a> {
    fn new(
        config: &'a ReconstructConfig,
        ctx: &StageContext<'_>,
        index: usize,
        streams: &'a Streams,
        target: &'a Activations,
    ) -> Self {
        let quant = config.activations(ctx.model.activations.quant);
        let input_prob = if quant.fixed().is_some() { 0.5 } else { 1.0 };
        let input_prob = config.input_prob.unwrap_or(input_prob);
        Self { config, index, streams, target, quant, input_prob }
    }

    /// The block's quantized linears with the grids of its inputs, and its error at the start.
    fn run(&self, ctx: &mut StageContext<'_>) -> Result<(Saved, f64)> {
        let config = self.config;
        let prefix = ctx.model.config.block_prefix(self.index);
        let mut block = loader(ctx, ctx.model).block(self.index)?;
        for (name, linear) in block.linears_mut() {
            let name = format!("{prefix}.{name}");
            if ctx.specs.contains_key(&name) {
                ctx.attach(&name, linear, &config.method, config.start_from, DType::F32)?;
            }
        }
        let start = coarseness(ctx, &prefix, &block)?;
        let grids = inputs::observe(ctx, self.streams, &block)?;
        let (quant, visits) = (ctx.model.activations.quant, Visits::default());
        let tap = |site, x| {
            visits.count(site, &x);
            activations::quantize(&quant, &grids, site, x)
        };
        let before = self.streams.error(ctx, &block, &tap, self.target)?;
        visits.report(ctx, self.index);
        let device = &ctx.device.device;
        let learned = self.quant.fixed();
        let learned = learned.and_then(|bits| StaticInputs::new(&grids, bits, device));
        let mut saved = Saved::default();
        let mut student = Student { block, inputs: learned };
        // What lies between the pieces, on the float stream.
        let mut attended = Activations::default();
        for piece in config.within.pieces() {
            let quantized =
                |spec: &LinearSpec| ctx.specs.contains_key(&format!("{prefix}.{}", spec.name));
            // Queries and keys of a fused matrix are fitted with the values.
            if !student.block.specs().any(|spec| piece.holds(spec.role) && quantized(spec)) {
                continue;
            }
            student = self.fit(ctx, *piece, student, &grids, &mut attended)?;
            self.keep(ctx, *piece, &mut student.block, &mut saved)?;
        }
        let Student { block, inputs } = student;
        self.report_scales(ctx, &saved, &start);
        let grids = match inputs {
            Some(learned) => learned.grids()?,
            None => inputs::observe(ctx, self.streams, &block)?,
        };
        activations::store(&ctx.model.config, self.index, &grids, &mut saved.dense);
        Ok((saved, before))
    }

    /// Fits one piece of the block.
    fn fit(
        &self,
        ctx: &mut StageContext<'_>,
        piece: Piece,
        student: Student,
        grids: &InputGrids,
        attended: &mut Activations,
    ) -> Result<Student> {
        let streams = self.streams;
        if piece == Piece::Whole && !self.config.augmented() {
            let (quantized, float) = (&streams.quantized, &streams.float);
            let target = self.target;
            let task = Task { piece, quantized, float, target, augmented: None };
            return self.train(ctx, &task, student.train(), grids);
        }
        let float_block = float_block(ctx, self.index)?;
        let through = |x: &Activations, piece: Piece, block: &Block| {
            x.map(&ctx.device.device, |x| {
                ctx.stop.check()?;
                Ok(piece.forward(block, x, &streams.positions, &|_, x| x))
            })
        };
        let mut quantized = &streams.quantized;
        let (behind, target);
        let (float, target) = match piece {
            Piece::Whole => (&streams.float, self.target),
            Piece::Scores => {
                target = through(&streams.float, piece, &float_block)?;
                (&streams.float, &target)
            }
            Piece::Attention => {
                *attended = through(&streams.float, piece, &float_block)?;
                (&streams.float, &*attended)
            }
            Piece::Mlp => {
                behind = streams.quantized.map(&ctx.device.device, |x| {
                    ctx.stop.check()?;
                    Ok(student.forward(Piece::Attention, x, &streams.positions, self.quant))
                })?;
                quantized = &behind;
                (&*attended, self.target)
            }
        };
        let augmented = self.config.augmented();
        let augmented = augmented.then(|| through(quantized, piece, &float_block)).transpose()?;
        drop(float_block);
        let task = Task { piece, quantized, float, target, augmented };
        self.train(ctx, &task, student.train(), grids)
    }

    /// Folds the linears of a piece that has been fitted; the block goes on with what they stand for.
    fn keep(
        &self,
        ctx: &mut StageContext<'_>,
        piece: Piece,
        block: &mut Block,
        saved: &mut Saved,
    ) -> Result<()> {
        let prefix = ctx.model.config.block_prefix(self.index);
        let config = block.config.clone();
        for (spec, linear) in config.specs(self.index).iter().zip(&mut block.linears) {
            let full = format!("{prefix}.{}", spec.name);
            if piece.holds(spec.role) && ctx.specs.contains_key(&full) {
                let folded = ctx.fold(&full, linear)?;
                saved.latents.extend(ctx.latents_of(&full, linear));
                ctx.set_weight(linear, folded.dequantize());
                saved.linears.push((full, folded, self.config.method.name().to_owned()));
            }
        }
        Ok(())
    }

    /// Trains; `grids` are where the learned grids start.
    fn train(
        &self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        mut student: Student,
        grids: &InputGrids,
    ) -> Result<Student> {
        let config = self.config;
        let piece = task.piece;
        let mut optimizer = Optimizer::new(&config.optimizer);
        let mut stream = format!("stage {} block {}", ctx.stage, self.index);
        if piece != Piece::Whole {
            stream = format!("{stream} {piece:?}");
        }
        let order = Order::new(ctx.seed, stream.as_str(), self.target.len(), config.batch)?;
        let rates = config.learning_rate;
        let base = |path: &str| match inputs::highest_rate(path, grids) {
            Some(highest) => rates.of(Role::Activation).min(highest),
            None => method::role_of(path).map_or(0.0, |role| rates.of(role)),
        };
        let schedule = config.schedule.resolved(config.rate_unit, config.steps);
        let mut best: Option<(f64, Student)> = None;
        let shortens_at = ctx.shortens_at(config.steps);
        for step in 0..config.steps {
            ctx.stop.check()?;
            if step == shortens_at {
                method::shorten_all(piece_mut(piece, &mut student.block), ctx.scales);
                // A loss with other scales is none of what will be left.
                best = None;
            }
            let factor = schedule.factor(step, config.steps);
            let rate_of = |path: &str| base(path) * factor;
            let batch = order.batch(step);
            let start = config.keep_best.then(|| student.clone());
            if config.rate_unit == RateUnit::Grid {
                let linears = student.block.linears();
                let measures = linears.flat_map(|(_, linear)| method::measures(&linear.weight));
                optimizer.measure_by(measures.collect());
            }
            let (trained, stats) =
                train::step(student, &mut optimizer, 1, &rate_of, |student, _| {
                    Ok(self.loss(ctx, task, student, &batch, &stream, step))
                })
                .map_err(|e| {
                    e.at(format!("stage {}, block {}, step {step}", ctx.stage, self.index))
                })?;
            student = trained;
            self.between_steps(piece, &mut student.block, Moment::Step(step + 1));
            if let Some(start) = start
                && best.as_ref().is_none_or(|(least, _)| stats.loss < *least)
            {
                best = Some((stats.loss, start));
            }
            let length = self.streams.positions.len();
            report_step(config, ctx, (self.index, piece), step, length, stats.loss);
        }
        let mut student = best.map_or(student, |(_, best)| best).valid();
        self.between_steps(piece, &mut student.block, Moment::End);
        Ok(student)
    }

    /// The objective on one batch.
    fn loss(
        &self,
        ctx: &StageContext<'_>,
        task: &Task<'_>,
        student: &Student,
        batch: &[u32],
        stream: &str,
        step: u64,
    ) -> Tensor<1> {
        let device = &ctx.device.device;
        let mut input = task.quantized.batch(batch, device);
        if self.input_prob < 1.0 {
            let float = task.float.batch(batch, device);
            let shape = input.dims();
            let stream = format!("{stream} inputs");
            let count = shape.iter().product();
            let mask = coin_flips(ctx.seed, &stream, step, count, self.input_prob);
            let mask: Tensor<3> = Tensor::from_data(TensorData::new(mask, shape), device);
            input = float.mask_where(mask.equal_elem(1.0), input);
        }
        let output = student.forward(task.piece, input, &self.streams.positions, self.quant);
        let compare = |goal: &Activations| {
            let goal = goal.batch(batch, device);
            let (output, goal) = if self.config.relative_tokens() {
                // A token whose output is zero counts as one of a tiny output, not infinitely.
                let size = (goal.clone().square().mean_dim(2) + f32::MIN_POSITIVE).sqrt();
                (output.clone() / size.clone(), goal / size)
            } else {
                (output.clone(), goal)
            };
            ops::block_mse(output, goal, self.config.sum_sequence())
        };
        let loss = compare(task.target);
        match &task.augmented {
            Some(augmented) => loss + compare(augmented),
            None => loss,
        }
    }

    fn between_steps(&self, piece: Piece, block: &mut Block, moment: Moment) {
        if !self.config.method.has_hook() {
            return;
        }
        for linear in piece_mut(piece, block) {
            if let Some(weight) = method::between_steps(&linear.weight, moment) {
                linear.weight = weight;
            }
        }
    }

    /// How far the grids moved from `start`.
    fn report_scales(&self, ctx: &mut StageContext<'_>, saved: &Saved, start: &Coarseness) {
        let changes: Vec<f32> = (saved.linears.iter())
            .flat_map(|(name, end, _)| {
                let start = start.get(name).into_iter().flatten();
                end.grid.coarseness().into_iter().zip(start).map(|(end, start)| (end / start).ln())
            })
            .collect();
        let step = ctx.first_step + self.config.steps * (self.index as u64 + 1);
        ctx.report_scale_change(&changes, step);
    }
}

/// The linears of a piece of a block.
fn piece_mut(piece: Piece, block: &mut Block) -> impl Iterator<Item = &mut Linear> {
    let specs = block.config.specs(block.index).iter();
    let linears = specs.zip(&mut block.linears);
    linears.filter(move |(spec, _)| piece.holds(spec.role)).map(|(_, linear)| linear)
}

fn report_step(
    config: &ReconstructConfig,
    ctx: &mut StageContext<'_>,
    (index, piece): (usize, Piece),
    step: u64,
    length: usize,
    loss: f64,
) {
    let of_piece = config.within.pieces().iter().position(|p| *p == piece).unwrap_or(0) as u64;
    let (step, steps) =
        (of_piece * config.steps + step, config.steps * config.within.pieces().len() as u64);
    // The curve is always the plain mean, whatever the reduction, so that recipes compare.
    let loss = if config.sum_sequence() { loss / length as f64 } else { loss };
    let every = (steps / 50).max(1);
    if step.is_multiple_of(every) || step + 1 == steps {
        ctx.report.emit(&Event::BlockLoss { block: index, step, loss });
    }
    ctx.report.emit(&Event::Progress {
        verb: format!("block {:>2}/{}", index + 1, ctx.model.config.n_blocks),
        done: step + 1,
        of: steps,
        detail: format!("mse {loss:.3e}"),
    });
}

/// How coarse the grid of every group is, by linear.
type Coarseness = BTreeMap<String, Vec<f32>>;

fn coarseness(ctx: &StageContext<'_>, prefix: &str, block: &Block) -> Result<Coarseness> {
    let mut all = Coarseness::new();
    for (name, linear) in block.linears() {
        let name = format!("{prefix}.{name}");
        if ctx.specs.contains_key(&name)
            && let Some(coarseness) = method::coarseness(&linear.weight)
        {
            all.insert(name, coarseness?);
        }
    }
    Ok(all)
}
