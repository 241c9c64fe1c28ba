//! `tune_scales`: a quantized model adapts to a text by the scales of its grids alone.
//!
//! The codes stay as they are, packed and shared; what learns, and what is left, is a few numbers
//! per output channel or group. They are saved as an adapter, which is this stage's checkpoint too.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::keys::{self, check_rate_unit, keys, neutralize};
use super::kind::{Effect, Judged, Stage};
use super::memory::Memory;
use super::session::Training;
use super::state::{ModelState, Packed};
use super::states::{self, has_states};
use super::student::Student;
use super::validate::ValidateConfig;
use crate::error::{Error, Result};
use crate::export::{Adapter, AdapterHead, Tuned};
use crate::method::{self, MethodConfig};
use crate::model::{Block, CausalLm, Loader};
use crate::objective::{CrossEntropyObjective, ObjectiveConfig};
use crate::quant::{Bits, CodedWeight, Grid, Learned, QuantizedWeight, SCALE_FLOOR, ScaleDType};
use crate::report::{Event, Reporter, size};
use crate::train::{LearningRate, OptimizerConfig, RateUnit, ScheduleConfig};

/// Keys of `[stage.tune_scales]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TuneScalesConfig {
    /// What of the grids learns: `peqa`, `alphatuning`, `e2e_qp` or `aqlm_ft`.
    pub method: MethodConfig,
    /// The width whose scales learn, of a model of several (`method.anybcq`); the widest unless said
    /// otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// What is minimized; next-token cross-entropy unless said otherwise.
    #[serde(default = "cross_entropy")]
    pub objective: ObjectiveConfig,
    /// Optimizer steps.
    pub steps: u64,
    /// Sequences in a micro-batch.
    #[serde(default = "super::keys::eight")]
    pub batch: usize,
    /// Micro-batches in a step.
    #[serde(default = "super::keys::one")]
    pub accumulate: usize,
    /// Base learning rate, in the units of the scales; relative where the method says so.
    pub learning_rate: LearningRate,
    /// What the rate of scales is measured in: `"absolute"`, or `"grid"`: in themselves.
    #[serde(default)]
    pub rate_unit: RateUnit,
    /// How the rate moves over the steps; a straight line to 0 unless said otherwise.
    #[serde(default = "linear")]
    pub schedule: ScheduleConfig,
    /// AdamW's constants and gradient clipping.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Steps between saves of the whole training state.
    #[serde(default = "super::keys::hundred")]
    pub checkpoint_every: u64,
    /// How many of those states are kept.
    #[serde(default = "super::keys::two")]
    pub keep: usize,
    /// Steps between log points.
    #[serde(default = "super::keys::ten")]
    pub log_every: u64,
    /// Validation while it trains, the best state, and what is done when the training fails.
    #[serde(default, skip_serializing_if = "ValidateConfig::is_default")]
    pub validate: ValidateConfig,
    /// Go on, with a warning, when the quality gate finds the model worse than at the start of the
    /// stage or than plain rounding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_worse: bool,
    /// The adapter that is written.
    #[serde(default)]
    pub adapter: AdapterConfig,
}

/// Keys of `adapter`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterConfig {
    /// Its name, and its file's; the method's (and width's) unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `"f32"`, or `"f16"`: half the size; the trained scales are rounded to it, so the model that
    /// goes on is the one that the adapter gives.
    pub dtype: ScaleDType,
}

fn cross_entropy() -> ObjectiveConfig {
    ObjectiveConfig::CrossEntropy(CrossEntropyObjective {})
}

fn linear() -> ScheduleConfig {
    ScheduleConfig::Linear { final_ratio: 0.0, warmup: None }
}

impl TuneScalesConfig {
    /// The adapter in the stage's own folder: its checkpoint.
    pub(crate) const CHECKPOINT: &str = "adapter.safetensors";

    /// The copy of the adapter for whoever uses the run in this folder, where there is a folder for it now.
    ///
    /// # Errors
    /// I/O errors.
    pub(crate) fn adapter_file(&self, run: &Path) -> Result<PathBuf> {
        let dir = run.join("adapters");
        std::fs::create_dir_all(&dir).map_err(|e| Error::io("create", &dir, &e))?;
        Ok(dir.join(format!("{}.safetensors", self.adapter_name())))
    }

    /// The adapter's name.
    pub fn adapter_name(&self) -> Cow<'_, str> {
        match (&self.adapter.name, self.bits) {
            (Some(name), _) => name.into(),
            (None, None) => self.method.name().into(),
            // Of several widths each has its own.
            (None, Some(bits)) => format!("{}_w{bits}", self.method.name()).into(),
        }
    }

    fn learned(&self) -> Learned {
        self.method.tunes().unwrap_or_default()
    }
}

impl Stage for TuneScalesConfig {
    fn check(&self) -> Result<()> {
        keys!(self).check("tune_scales")?;
        check_rate_unit(self.rate_unit, &self.optimizer)?;
        if self.method.tunes().is_none() {
            return Err(Error::usage(format!(
                "tune_scales learns the grids of codes, and method.{} makes codes",
                self.method.name()
            ))
            .fix("method.peqa = {}, method.alphatuning = {} or method.e2e_qp = {}"));
        }
        let name = self.adapter_name();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.starts_with('.') || !name.chars().all(plain) {
            return Err(Error::usage(format!("adapter.name = {name:?} is no name of a file"))
                .fix("letters, digits, - and _"));
        }
        Ok(())
    }

    fn effect(&self) -> Effect<'_> {
        Effect::Grids { method: &self.method, dtype: self.adapter.dtype }
    }

    fn summary(&self, spec: &str) -> String {
        format!("{}, {spec}, {}", self.method.name(), self.objective.name())
    }

    fn needs_float(&self) -> bool {
        self.objective.needs_teacher()
    }

    fn width(&self) -> Option<Bits> {
        self.bits
    }

    fn check_data(&self, _model: &ModelState, data: &Data) -> Result<()> {
        data.check_train()
    }

    fn steps(&self, _blocks: usize) -> u64 {
        self.steps
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let all = scene.linears + scene.rest;
        let teacher = if self.objective.needs_teacher() { 4 * all } else { 0 };
        // Codes of at most a byte, their scales, and the tiles that exist as floats.
        let weights = scene.linears + 4 * scene.rest + teacher + (16 << 20);
        let cost = scene.training(&keys!(self), weights, [0; 2], 20, false);
        // A scale for 32 weights, at most.
        let disk = scene.linears / 8
            + states::bytes(scene.linears / 32, &self.optimizer, keys!(self).states());
        cost.map_or_else(Cost::default, |cost| Cost { disk, ..cost })
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
    }

    fn has_saved(&self, dir: &Path) -> bool {
        has_states(dir)
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let student = student(self, ctx)?;
        note_size(ctx, &student);
        let base = self.learning_rate;
        let training = Training {
            verb: "tune_scales",
            keys: keys!(self),
            rate: base.scale,
            rate_of: &|path| method::role_of(path).map_or(0.0, |role| base.of(role)),
            rate_unit: self.rate_unit,
            fake_quant: false,
            on_policy: None,
            memory: Memory::Tape,
            cached: None,
        };
        let student = training.run(Student::Whole(student), ctx)?;
        let mut tuned = Vec::new();
        student.visit_blocks(|index, block| {
            for (name, linear) in block.linears() {
                let name = format!("{}.{name}", ctx.model.config.block_prefix(index));
                if ctx.specs.contains_key(&name) {
                    tuned.push((name.clone(), ctx.fold(&name, linear)?));
                }
            }
            Ok(())
        })?;
        report_changes(ctx, &tuned, self.steps);
        let mut bases = Vec::new();
        for (name, _) in &tuned {
            bases.extend(ctx.model.now(name)?);
        }
        let linears = tuned.iter().zip(&bases);
        let linears: Vec<Tuned<'_>> =
            linears.map(|((name, weight), base)| Tuned { name, base, weight }).collect();
        let (head, dtype) = (head(self, ctx), self.adapter.dtype);
        let adapter = Adapter::new(head, self.learned(), dtype, &linears)?;
        // The public copy first: the stage is done once its own is there.
        let public = self.adapter_file(ctx.run_dir)?;
        adapter.write(&public)?;
        adapter.write(&checkpoint(ctx))?;
        take(ctx, &adapter)?;
        let bytes = std::fs::metadata(&public).map_or(0, |data| data.len());
        let text = format!("adapter {}, {}", public.display(), size(bytes));
        ctx.report.emit(&Event::Note { text });
        Ok(())
    }

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let again = |e: Error| e.fix("--fresh to start over");
        let adapter = Adapter::read(&checkpoint(ctx)).map_err(again)?;
        adapter.check(|name| Ok(ctx.model.now(name)?.map(Cow::into_owned))).map_err(again)?;
        take(ctx, &adapter)
    }
}

fn checkpoint(ctx: &StageContext<'_>) -> PathBuf {
    ctx.dir.join(TuneScalesConfig::CHECKPOINT)
}

/// The model goes on with the adapter's scales.
fn take(ctx: &mut StageContext<'_>, adapter: &Adapter) -> Result<()> {
    let names: Vec<String> = ctx.model.quantized.keys().cloned().collect();
    for name in &names {
        let Some(now) = ctx.model.now(name)? else { continue };
        let (bits, grid) = (now.bits, adapter.grid(name, &now)?);
        let Some((weight, method)) = ctx.model.quantized.get_mut(name) else { continue };
        if let Some(grid) = grid {
            weight.set_grid(bits, grid).map_err(|e| e.at(name))?;
            if !matches!(weight.grid, Grid::Uniform { .. }) {
                // The levels are no longer those that the latent was learned with.
                ctx.model.latents.remove(name);
            }
            method.clone_from(&adapter.head().method);
        }
    }
    Ok(())
}

/// The model with its codes packed and its grids ready to learn.
fn student(config: &TuneScalesConfig, ctx: &StageContext<'_>) -> Result<CausalLm> {
    let (model, device) = (&*ctx.model, &ctx.device.device);
    let source = Packed(model);
    let loader = Loader { config: &model.config, source: &source, device, dtype: ctx.compute };
    let mut student = loader.model()?.with_tap(model.activations.tap());
    for (index, block) in student.blocks.iter_mut().enumerate() {
        for (name, linear) in block.linears_mut() {
            let name = format!("{}.{name}", ctx.model.config.block_prefix(index));
            if ctx.specs.contains_key(&name) {
                let coded = ctx.coded(&name, config.learned(), ctx.compute)?;
                linear.weight = coded.into_parameter(linear.weight.id);
            }
        }
    }
    Ok(student)
}

/// How much learns, and how much memory the weights take while it does.
fn note_size(ctx: &mut StageContext<'_>, student: &CausalLm) {
    let (mut weights, mut bytes, mut learned) = (0, 0, 0);
    for (_, linear) in student.blocks.iter().flat_map(Block::linears) {
        let Some(coded) = linear.weight.reparameterization::<CodedWeight>() else {
            continue;
        };
        weights += coded.layout().len();
        bytes += coded.bytes();
        learned += coded.learned_numbers();
    }
    ctx.results.trainable.insert(ctx.stage, learned as u64);
    // Value, gradient and two moments; the value is counted with the weights.
    let training = 12 * learned;
    let each = bytes as f64 / (weights.max(1)) as f64;
    let all = (bytes + training) as f64 / (weights.max(1)) as f64;
    ctx.report.emit(&Event::Note {
        text: format!(
            "{learned} scales learn; packed weights take {each:.3} bytes each, {all:.3} with \
             gradients and optimizer state"
        ),
    });
}

/// How far scales moved, and whether some left the side of zero they were on.
fn report_changes(ctx: &mut StageContext<'_>, tuned: &[(String, QuantizedWeight)], step: u64) {
    let mut changes = Vec::new();
    let (mut widest, mut crossed, mut floored) = (0.0f32, 0usize, 0usize);
    for (name, after) in tuned {
        let Ok(Some(before)) = ctx.model.now(name) else { continue };
        for (before, after) in before.grid.scales().iter().zip(after.grid.scales()) {
            widest = widest.max((after / before - 1.0).abs());
            floored += usize::from(after.abs() <= SCALE_FLOOR);
            if after * before > 0.0 {
                changes.push((after / before).ln());
            } else {
                crossed += usize::from(after * before < 0.0);
            }
        }
    }
    ctx.report_scale_change(&changes, [step; 2]);
    ctx.report.emit(&Event::Note {
        text: format!(
            "scales moved by at most {widest:.2} of themselves, {crossed} crossed zero, {floored} \
             fell to zero"
        ),
    });
}

fn head(config: &TuneScalesConfig, ctx: &StageContext<'_>) -> AdapterHead {
    AdapterHead {
        name: config.adapter_name().into_owned(),
        method: config.method.name().to_owned(),
        base: ctx.model.name.clone(),
        base_model_sha256: ctx.provenance.model_sha256.clone(),
        data_sha256: ctx.data.train.as_ref().map(|c| c.sha256.clone()).unwrap_or_default(),
        seed: ctx.seed,
    }
}
