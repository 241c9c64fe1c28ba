//! `distill`: the whole quantized model at once, against a frozen float teacher.
//!
//! UPQ's second half is this stage with `method.seq` at 2 bits and `objective.jsd`: latent weights
//! start at the current (for instance INT4) values, latents and steps learn together. With
//! `objective.cross_entropy` it is plain quantization-aware training.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::keys::{self, check_rate_unit, keys, neutralize};
use super::kind::{Before, Effect, Judged, Stage, codes};
use super::memory::Memory;
use super::on_policy::OnPolicy;
use super::session::Training;
use super::start::{Beginning, StartFrom};
use super::state::{ModelState, Packed};
use super::states::{self, has_states};
use super::student::Student;
use super::teacher_cache::{Kept, TeacherFrom};
use super::validate::ValidateConfig;
use crate::error::{Error, Result};
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig};
use crate::model::{Block, Loader, WeightSource};
use crate::objective::ObjectiveConfig;
use crate::quant::{Bits, GroupSize, ObserverConfig, Symmetry};
use crate::train::{LatentsIn, LearningRate, NormOf, OptimizerConfig, RateUnit, ScheduleConfig};

/// Keys of `[stage.distill]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
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
    /// On another grid than the earlier stage's: what latent weights start from.
    #[serde(default)]
    pub start_from: StartFrom,
    /// How far from the border between two levels latent weights begin at least, in parts of the levels' distance,
    /// below a half; 0, the default: where they are. No code changes by it. Blocks leave many on a border: a margin
    /// helped a model that was near its teacher by then and held up one that was far (docs/two-bits.md).
    #[serde(default, skip_serializing_if = "crate::data::is_default")]
    pub start_margin: f32,
    /// What student and teacher are compared by.
    pub objective: ObjectiveConfig,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences in a micro-batch.
    #[serde(default = "super::keys::eight")]
    pub batch: usize,
    /// Micro-batches in a step.
    #[serde(default = "super::keys::one")]
    pub accumulate: usize,
    /// Base learning rates.
    pub learning_rate: LearningRate,
    /// What the rates of latent weights and steps are measured in: `"absolute"` or `"grid"`.
    #[serde(default)]
    pub rate_unit: RateUnit,
    /// How the rate moves over the steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants and gradient clipping.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Steps between saves of the whole training state.
    #[serde(default = "super::keys::hundred")]
    pub checkpoint_every: u64,
    /// How many of those states are kept; 0: none is saved, and a run that is stopped begins this stage again.
    #[serde(default = "super::keys::two")]
    pub keep: usize,
    /// Steps between log points.
    #[serde(default = "super::keys::ten")]
    pub log_every: u64,
    /// Validation while it trains, the best state, and what is done when the training fails.
    #[serde(default, skip_serializing_if = "ValidateConfig::is_default")]
    pub validate: ValidateConfig,
    /// Where what is trained is kept: `"tape"`, `"device"`, `"host"` or `"disk"`; the same numbers from
    /// each. Absent: the fastest that there is room for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Where the teacher's numbers come from: `"model"`, or `"cached"`: asked once for every window before the
    /// first step, and kept in a file as far as the objective's `top_k` goes.
    #[serde(default, skip_serializing_if = "TeacherFrom::is_model")]
    pub teacher: TeacherFrom,
    /// What the student writes itself, to be compared with its teacher on that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_policy: Option<OnPolicy>,
    /// Go on, with a warning, when the quality gate finds the model worse than at the start of the
    /// stage or than plain rounding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_worse: bool,
}

impl Stage for DistillConfig {
    fn check(&self) -> Result<()> {
        keys!(self).check("distill")?;
        check_rate_unit(self.rate_unit, &self.optimizer)?;
        if let Some(on_policy) = &self.on_policy {
            on_policy.check(self.batch, &self.objective)?;
            if let Some(memory @ (Memory::Host | Memory::Disk)) = self.memory {
                let what = format!(
                    "on_policy needs the student whole, and memory = \"{}\" keeps one block of it on the device",
                    memory.name()
                );
                return Err(Error::usage(what).fix("memory = \"device\", or no on_policy"));
            }
        }
        if self.teacher == TeacherFrom::Cached {
            self.objective.kept_of_teacher().map_err(|e| e.at("teacher = \"cached\""))?;
            if self.on_policy.is_some() {
                let what = "on_policy asks the teacher about texts that nobody knows yet";
                return Err(Error::usage(what)
                    .at("teacher = \"cached\"")
                    .fix("teacher = \"model\", or no on_policy"));
            }
        }
        if !self.method.learns() {
            return Err(Error::usage(format!("method.{} learns nothing", self.method.name()))
                .fix("method.seq = {} here, or [stage.calibrate]"));
        }
        if self.optimizer.latents != LatentsIn::F32 && !self.method.trains_base() {
            let what = format!("method.{} learns no latent weights", self.method.name());
            return Err(Error::usage(what)
                .at("optimizer.latents")
                .fix("method.seq or method.lsq, or no optimizer.latents"));
        }
        if !(0.0..0.5).contains(&self.start_margin) {
            let what = format!("start_margin = {} leaves no level", self.start_margin);
            return Err(
                Error::usage(what).fix("a number from 0, where nothing moves, to below 0.5")
            );
        }
        if self.start_margin > 0.0 && !self.method.trains_base() {
            let what = format!("method.{} learns no latent weights", self.method.name());
            return Err(Error::usage(what)
                .at("start_margin")
                .fix("method.block_ap or method.seq, or no start_margin"));
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

    fn effect(&self) -> Effect<'_> {
        codes!(self)
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        if before.activations.fixed().is_some() && !before.calibrated {
            return Err(Error::usage(
                "distill takes fixed grids of activations from an earlier stage",
            )
            .fix("quant.activations.scheme = \"token\", or a stage.calibrate before it"));
        }
        Ok(())
    }

    fn summary(&self, spec: &str) -> String {
        format!("{}, {spec}, {}", self.method.name(), self.objective.name())
    }

    fn takes_latents(&self) -> bool {
        self.method.tunes().is_none()
    }

    fn needs_float(&self) -> bool {
        self.objective.needs_teacher() || self.on_policy.is_some()
    }

    fn check_data(&self, _model: &ModelState, data: &Data) -> Result<()> {
        data.check_train()
    }

    fn steps(&self, _blocks: usize) -> u64 {
        self.steps
    }

    fn memory(&mut self) -> Option<&mut Option<Memory>> {
        // What a student writes itself needs it whole, which is the recipe's to say.
        if self.on_policy.is_some() { None } else { Some(&mut self.memory) }
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let Scene { linears, block, rest, discrete, .. } = *scene;
        let memory = self.memory.unwrap_or(Memory::Tape);
        let shared = scene.model.has_float_ends();
        let ends = 4 * if shared { rest } else { 2 * rest };
        // Latents, quantized weights, and the gradients of one of them.
        let all = 4 * 3 * linears + self.optimizer.moments.bytes(linears);
        // Weights and moments, and gradients that wait for the norm of all.
        let state = self.optimizer.latents.bytes(linears)
            + self.optimizer.moments.bytes(linears)
            + if self.optimizer.norm == NormOf::Global { 4 * linears } else { 0 };
        // One block at work: latents, quantized weights, gradients; its moments.
        let one = 4 * 3 * block + self.optimizer.moments.bytes(block);
        let kept = self.kept(scene.config().vocab, scene.data);
        let teacher = match (self.needs_float(), kept) {
            (false, _) => 0,
            (true, None) => 4 * linears,
            // One block at a time, before the first step.
            (true, Some(_)) => 4 * block,
        };
        let (weights, host, file) = match memory {
            Memory::Tape => (all + teacher + ends, 0, 0),
            Memory::Device => (state + one + teacher + ends, 0, 0),
            Memory::Host if discrete => (one + ends, state, 0),
            Memory::Host => (state + one + ends, 0, 0),
            Memory::Disk => (one + ends, 0, state),
        };
        // The saved state, the best one, and one of them while it is written.
        // Moments and gradients are let go of before codes are written.
        let codes = linears + if file > 0 { self.optimizer.latents.bytes(linears) } else { 0 };
        let disk = states::bytes(linears, &self.optimizer, keys!(self).states()) + file.max(codes);
        let disk = disk + kept.map_or(0, |kept| self.windows(scene.data) * kept.record() as u64);
        let keys = keys!(self);
        let by_block = memory != Memory::Tape;
        let moved = [0, linears * 4 * 40 + 2 * file];
        let cost = scene.training(&keys, weights, moved, 60, by_block);
        let writing =
            self.on_policy.as_ref().map_or_else(Cost::default, |own| own.cost(scene, &keys));
        cost.map_or_else(Cost::default, |cost| Cost {
            disk,
            host,
            device: cost.device + writing.device,
            seconds: self.seconds(scene).unwrap_or(cost.seconds) + writing.seconds,
            ..cost
        })
    }

    fn judged(&self) -> Option<Judged<'_>> {
        Some(Judged {
            validate: Some(&self.validate),
            allow_worse: self.allow_worse,
            advice: keys::ADVICE,
        })
    }

    fn neutralize(&mut self) {
        neutralize!(self);
        self.memory = None;
    }

    fn has_saved(&self, dir: &Path) -> bool {
        has_states(dir)
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let (student, start) = student(self, ctx)?;
        let base = self.learning_rate;
        let training = Training {
            verb: "distill",
            keys: keys!(self),
            rate: base.weight.max(base.scale),
            rate_of: &|path| method::role_of(path).map_or(0.0, |role| base.of(role)),
            rate_unit: self.rate_unit,
            fake_quant: self.method.tunes().is_none(),
            on_policy: self.on_policy.as_ref(),
            memory: self.memory.unwrap_or(Memory::Tape),
            cached: self.kept(ctx.model.config.vocab, ctx.data),
        };
        let student = training.run(student, ctx)?;
        finish(self, ctx, &student, &start)
    }

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        ctx.restore_linears()
    }
}

impl DistillConfig {
    /// What is kept of a teacher that is asked once.
    fn kept(&self, vocab: usize, data: &Data) -> Option<Kept> {
        if self.teacher != TeacherFrom::Cached {
            return None;
        }
        let (k, temperature) = self.objective.kept_of_teacher().ok()?;
        Some(Kept { k, temperature, vocab, length: data.train.as_ref()?.length })
    }

    /// The most windows that steps may draw.
    fn windows(&self, data: &Data) -> u64 {
        let drawn = self.steps * (self.batch * self.accumulate) as u64;
        let Some(corpus) = &data.train else { return drawn };
        let windows = corpus.stream.windows(corpus.length);
        drawn.min(corpus.samples.map_or(windows, |samples| samples.min(windows)) as u64)
    }

    /// Seconds by what a probe measured.
    fn seconds(&self, scene: &Scene<'_>) -> Option<f64> {
        let length = scene.data.train.as_ref()?.length as u64;
        let (blocks, tokens) = (scene.config().n_blocks as f64, self.batch as u64 * length);
        let step = scene.step(&self.method, &self.optimizer, [length, tokens])?.at(tokens);
        // One that is asked once answers before the first step: a pass over windows, few of them twice.
        let asks = self.needs_float() && self.teacher == TeacherFrom::Model;
        let teacher = if asks { 1.0 } else { 0.0 };
        let again = if self.memory.is_none_or(|memory| memory == Memory::Tape) { 0.0 } else { 1.0 };
        let pass = (teacher + again) * scene.pass(length)? * tokens as f64;
        // Logits of both, and the gradient to the hidden states.
        let head = scene.probe.as_ref()?.head()?.token * tokens as f64 * (2.0 + teacher);
        let micro = blocks * (step + pass) + head;
        let every = self.validate.interval(self.steps);
        let points = self.steps.checked_div(every).map_or(0, |points| points + 1);
        let own = scene.rounding(&self.method)? * blocks + 2.0 * scene.load(scene.linears)?;
        let steps = (self.steps * self.accumulate as u64) as f64;
        Some(steps * micro + own + scene.judging(&self.validate, points)?)
    }
}

/// The current model with the method on every linear of the plan, and how coarse each grid is. Codes
/// are packed where the method leaves them as they are.
fn student(config: &DistillConfig, ctx: &StageContext<'_>) -> Result<(Student, Vec<f32>)> {
    let (model, device) = (&*ctx.model, &ctx.device.device);
    let packed = Packed(model);
    let source: &dyn WeightSource = if config.method.tunes().is_some() { &packed } else { model };
    let loader = Loader { config: &model.config, source, device, dtype: ctx.compute };
    let ends = loader.ends()?.with_tap(model.activations.tap());
    let mut start = Vec::new();
    let block = |index| {
        let mut block = loader.block(index)?;
        attach(&mut block, index, config, ctx)?;
        scales(&block, &mut start)?;
        Ok(block)
    };
    let memory = config.memory.unwrap_or(Memory::Tape);
    let kept = (memory, config.optimizer.latents);
    let student = Student::build(kept, ends, ctx.dir, (device, ctx.device.discrete), block)?;
    Ok((student, start))
}

/// Folds and saves the codes.
fn finish(
    config: &DistillConfig,
    ctx: &mut StageContext<'_>,
    student: &Student,
    start: &[f32],
) -> Result<()> {
    let mut end = Vec::with_capacity(start.len());
    student.visit_blocks(|index, block| {
        scales(block, &mut end)?;
        let mut saved = Saved::default();
        for (name, linear) in block.linears() {
            let name = format!("{}.{name}", ctx.model.config.block_prefix(index));
            if ctx.specs.contains_key(&name) {
                let folded = ctx.fold(&name, linear)?;
                saved.latents.extend(ctx.latents_of(&name, linear, config.optimizer.latents));
                saved.linears.push((name, folded, config.method.name().to_owned()));
            }
        }
        if saved.linears.is_empty() { Ok(()) } else { ctx.save_block(index, saved) }
    })?;
    let changes: Vec<f32> = end.iter().zip(start).map(|(end, start)| (end / start).ln()).collect();
    ctx.report_scale_change(&changes, [config.steps; 2]);
    ctx.report_codes(config.steps);
    Ok(())
}

/// Puts the method on every linear of the plan in a block.
fn attach(
    block: &mut Block,
    index: usize,
    config: &DistillConfig,
    ctx: &StageContext<'_>,
) -> Result<()> {
    for (name, linear) in block.linears_mut() {
        let name = format!("{}.{name}", ctx.model.config.block_prefix(index));
        if !ctx.specs.contains_key(&name) {
            continue;
        }
        let kept = (ctx.compute, config.optimizer.latents);
        let beginning = Beginning { from: config.start_from, margin: config.start_margin };
        ctx.attach(&name, linear, &config.method, beginning, kept)?;
    }
    Ok(())
}

/// Adds how coarse the grid of every group of a block is, in order.
fn scales(block: &Block, all: &mut Vec<f32>) -> Result<()> {
    for (_, linear) in block.linears() {
        if let Some(coarseness) = method::coarseness(&linear.weight) {
            all.extend(coarseness?);
        }
    }
    Ok(())
}
