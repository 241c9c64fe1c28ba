//! `finetune`: float weights adapt to a text, by low-rank factors beside them or as they are.
//!
//! The usual ways, in the same recipe as fewbit's own: LoRA, QLoRA, and full fine-tuning of the
//! decoder blocks' linears. Embedding, norms and head stay frozen. Parameters, losses and weights are
//! f32 whatever the model's type. Weights that an earlier stage quantized are taken by their values.
//! What is left is dense: factors merged into their weights, for a later stage to quantize; activations
//! are float again.

use std::path::Path;

use burn::module::Param;
use burn::tensor::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::keys::{check_counts, keys, neutralize};
use super::kind::{Before, Effect, Judged, Stage};
use super::lora::{self, Adapters, Targets};
use super::memory::Memory;
use super::session::Training;
use super::state::ModelState;
use super::states::{self, has_states};
use super::student::Student;
use super::validate::ValidateConfig;
use crate::data;
use crate::error::{Error, Result};
use crate::export::fewbit::Saved;
use crate::model::{CausalLm, LinearSpec, Loader, ModelConfig, weight_name};
use crate::objective::{CrossEntropyObjective, ObjectiveConfig};
use crate::quant::Repr;
use crate::report::{Event, Reporter, size};
use crate::store::HostTensor;
use crate::train::{OptimizerConfig, RateUnit, ScheduleConfig};

/// Keys of `[stage.finetune]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FinetuneConfig {
    /// What learns: `lora`, `qlora` or `full`.
    pub method: FinetuneMethod,
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
    /// Base learning rate.
    pub learning_rate: f64,
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
}

/// What learns in a `finetune` stage.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinetuneMethod {
    /// Low-rank factors beside frozen float weights (arXiv 2106.09685).
    Lora(LoraConfig),
    /// Low-rank factors beside frozen quantized weights (arXiv 2305.14314, but on even steps in
    /// blocks instead of its NF4 levels, and without its paged optimizer).
    Qlora(QloraConfig),
    /// Every linear of the decoder blocks.
    Full(FullConfig),
}

/// `method.lora`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoraConfig {
    /// Columns of the factors; 4.
    pub rank: usize,
    /// The product of the factors is scaled by `alpha / rank`; 8.
    pub alpha: f64,
    /// Linears that get factors; `["q_proj", "v_proj"]`.
    pub targets: Targets,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self { rank: 4, alpha: 8.0, targets: Targets::queries_and_values() }
    }
}

/// `method.qlora`. Every linear of the blocks is quantized; targets are held that way (on a CPU in a
/// byte for each weight, whatever the width), others by their values. The factors belong to that base:
/// on the float weights they are only near what was trained.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct QloraConfig {
    /// Columns of the factors; 4.
    pub rank: usize,
    /// The product of the factors is scaled by `alpha / rank`; 8.
    pub alpha: f64,
    /// Linears that get factors; `"all"`.
    pub targets: Targets,
    /// Width of the frozen weights, 4 or 8; 4.
    pub bits: u8,
    /// Weights along the inputs that share a symmetric f32 step; 32.
    pub block: u8,
}

impl Default for QloraConfig {
    fn default() -> Self {
        let LoraConfig { rank, alpha, .. } = LoraConfig::default();
        Self { rank, alpha, targets: Targets::all(), bits: 4, block: 32 }
    }
}

/// `method.full`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FullConfig {}

fn cross_entropy() -> ObjectiveConfig {
    ObjectiveConfig::CrossEntropy(CrossEntropyObjective {})
}

fn linear() -> ScheduleConfig {
    ScheduleConfig::Linear { final_ratio: 0.0, warmup: None }
}

impl FinetuneMethod {
    /// Its name in recipes.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Lora(_) => "lora",
            Self::Qlora(_) => "qlora",
            Self::Full(_) => "full",
        }
    }

    /// Its name with what it is measured by, for plans: `lora r4`, `qlora w4 r4`, `full`.
    pub fn summary(&self) -> String {
        match self {
            Self::Lora(config) => format!("lora r{}", config.rank),
            Self::Qlora(config) => format!("qlora w{} r{}", config.bits, config.rank),
            Self::Full(_) => "full".to_owned(),
        }
    }

    /// The factors it learns; `None` where weights learn as they are.
    fn adapters(&self) -> Option<Adapters<'_>> {
        match self {
            Self::Lora(LoraConfig { rank, alpha, targets }) => {
                Some(Adapters { rank: *rank, alpha: *alpha, targets, base: None })
            }
            Self::Qlora(QloraConfig { rank, alpha, targets, bits, block }) => {
                let base = Some((*bits, *block));
                Some(Adapters { rank: *rank, alpha: *alpha, targets, base })
            }
            Self::Full(_) => None,
        }
    }

    /// How many numbers learn.
    pub fn trainable(&self, model: &ModelConfig) -> u64 {
        let adapters = self.adapters();
        let numbers = model.linears().map(|(_, spec)| {
            let [out, inputs] = spec.shape;
            match adapters {
                Some(adapters) if adapters.targets.contains(spec.role) => {
                    adapters.rank * (out + inputs)
                }
                Some(_) => 0,
                None => out * inputs,
            }
        });
        numbers.sum::<usize>() as u64
    }

    /// Whether it changes a linear's weight.
    fn changes(&self, linear: &LinearSpec) -> bool {
        match self {
            Self::Lora(config) => config.targets.contains(linear.role),
            Self::Qlora(_) | Self::Full(_) => true,
        }
    }
}

impl FinetuneConfig {
    /// Refuses factors and blocks that the model's linears have no room for.
    ///
    /// # Errors
    /// A preflight error that names the linear.
    fn fits(&self, model: &ModelConfig) -> Result<()> {
        let Some(adapters) = self.method.adapters() else { return Ok(()) };
        for (name, spec) in model.linears() {
            let [out, inputs] = spec.shape;
            let smaller = out.min(inputs);
            if adapters.targets.contains(spec.role) && adapters.rank > smaller {
                return Err(Error::preflight(format!(
                    "rank {} is above {smaller}, the smaller side of a {out} x {inputs} linear",
                    adapters.rank
                ))
                .at(weight_name(&name))
                .fix(format!("rank = {smaller} or less, or method.full = {{}}")));
            }
            if let Some((_, block)) = adapters.base
                && !inputs.is_multiple_of(usize::from(block))
            {
                return Err(Error::preflight(format!(
                    "method.qlora.block {block} does not divide in_features {inputs}"
                ))
                .at(weight_name(&name))
                .fix("block = 32 or 16"));
            }
        }
        Ok(())
    }
}

impl Stage for FinetuneConfig {
    fn check(&self) -> Result<()> {
        keys!(self).check("finetune")?;
        if !self.learning_rate.is_finite() || self.learning_rate < 0.0 {
            let what = format!("learning_rate = {} is not a rate", self.learning_rate);
            return Err(Error::usage(what).fix("learning_rate = 1e-3"));
        }
        let Some(adapters) = self.method.adapters() else { return Ok(()) };
        let name = self.method.name();
        check_counts(&[("rank", adapters.rank as u64)])
            .map_err(|e| e.at(format!("method.{name}")))?;
        if !adapters.alpha.is_finite() || adapters.alpha <= 0.0 {
            let what = format!("method.{name}.alpha = {} scales by nothing", adapters.alpha);
            return Err(Error::usage(what).fix("alpha = 8"));
        }
        match adapters.base {
            Some((bits, _)) if bits != 4 && bits != 8 => Err(Error::usage(format!(
                "method.qlora.bits = {bits}, and it holds weights of 4 or 8"
            ))
            .fix("bits = 4; other widths: a stage.calibrate before this one, and method.lora")),
            Some((_, 0)) => Err(Error::usage("method.qlora.block = 0").fix("block = 32")),
            _ => Ok(()),
        }
    }

    fn effect(&self) -> Effect<'_> {
        Effect::Floats
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        if before.repr != Repr::Dense && before.activations.is_on() {
            return Err(Error::preflight(
                "finetune leaves float weights, and an earlier stage has quantized activations",
            )
            .at("quant.activations")
            .fix("stage.finetune before the stage that quantizes, or stage.tune_scales"));
        }
        self.fits(before.model)
    }

    fn summary(&self, _spec: &str) -> String {
        format!("{}, {}", self.method.summary(), self.objective.name())
    }

    fn needs_float(&self) -> bool {
        self.objective.needs_teacher()
    }

    fn check_data(&self, _model: &ModelState, data: &Data) -> Result<()> {
        data.check_train()
    }

    fn steps(&self, _blocks: usize) -> u64 {
        self.steps
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let learned = self.method.trainable(scene.config());
        let all = scene.linears + scene.rest;
        let teacher = if self.objective.needs_teacher() { 4 * all } else { 0 };
        let moments = self.optimizer.moments.bytes(learned);
        // Weights, merged ones and their gradients; of what learns also two moments.
        let weights = 4 * (3 * scene.linears + scene.rest) + teacher + 8 * learned + moments;
        // Weights with their factors merged are made anew, with their gradients.
        let cost = scene.training(&keys!(self), weights, [scene.linears * 4 * 8, 0], 20, false);
        cost.map_or_else(Cost::default, |cost| Cost {
            host: 4 * scene.linears,
            disk: 4 * scene.linears + states::bytes(learned, &self.optimizer, keys!(self).states()),
            ..cost
        })
    }

    fn judged(&self) -> Option<Judged<'_>> {
        Some(Judged {
            validate: Some(&self.validate),
            allow_worse: self.allow_worse,
            advice: "a smaller learning_rate or fewer steps; or ",
        })
    }

    fn neutralize(&mut self) {
        neutralize!(self);
    }

    fn has_saved(&self, dir: &Path) -> bool {
        has_states(dir)
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        // A factor's step is far below what bf16 resolves of it.
        ctx.compute = DType::F32;
        note_size(self, ctx);
        let student = student(self, ctx)?;
        let training = Training {
            verb: "finetune",
            keys: keys!(self),
            rate: self.learning_rate,
            rate_of: &|_| self.learning_rate,
            rate_unit: RateUnit::Absolute,
            fake_quant: false,
            on_policy: None,
            memory: Memory::Tape,
            cached: None,
        };
        let student = training.run(Student::Whole(student), ctx)?;
        // The public copy first: the stage is done once its own is there.
        write_adapter(self, ctx, &student)?;
        let all = holds_codes(ctx);
        student.visit_blocks(|index, block| {
            let mut saved = Saved::default();
            let prefix = block.config.block_prefix(index);
            for (spec, linear) in block.specs().zip(&block.linears) {
                let name = format!("{prefix}.{}", spec.name);
                if all || self.method.changes(spec) {
                    saved.dense.insert(weight_name(&name), merged(&name, &linear.weight)?);
                }
            }
            saved.write(&ctx.block_file(index))?;
            take(ctx, saved);
            Ok(())
        })?;
        finish(ctx);
        Ok(())
    }

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let all = holds_codes(ctx);
        for index in 0..ctx.model.config.n_blocks {
            let saved = Saved::read(&ctx.block_file(index))?;
            take(ctx, saved);
        }
        finish(ctx);
        for (name, spec) in ctx.model.config.linears() {
            let left = ctx.model.tuned.contains_key(&weight_name(&name));
            if (all || self.method.changes(spec)) && !left {
                return Err(Error::failed("a finished stage lacks a linear")
                    .at(ctx.dir.display())
                    .at(name)
                    .fix("--fresh to start over"));
            }
        }
        Ok(())
    }
}

/// Whether some linear of the blocks is quantized: all of them turn dense then.
fn holds_codes(ctx: &StageContext<'_>) -> bool {
    ctx.model.quantized.keys().any(|name| name != ctx.model.config.head())
}

fn take(ctx: &mut StageContext<'_>, saved: Saved) {
    for (name, tensor) in saved.dense {
        ctx.model.quantized.remove(name.strip_suffix(".weight").unwrap_or(&name));
        ctx.model.dense.remove(&name);
        ctx.model.tuned.insert(name, tensor);
    }
}

/// What earlier stages made of norms belongs to the float model from here on.
fn finish(ctx: &mut StageContext<'_>) {
    ctx.model.latents.clear();
    let norms = std::mem::take(&mut ctx.model.dense);
    ctx.model.tuned.extend(norms);
}

/// The current model by its values, with what learns of it.
fn student(config: &FinetuneConfig, ctx: &StageContext<'_>) -> Result<CausalLm> {
    let (model, device) = (&*ctx.model, &ctx.device.device);
    let loader = Loader { config: &model.config, source: model, device, dtype: ctx.compute };
    let mut student = loader.model()?;
    let adapters = config.method.adapters();
    for (index, block) in student.blocks.iter_mut().enumerate() {
        let prefix = model.config.block_prefix(index);
        for (spec, linear) in model.config.specs(index).iter().zip(&mut block.linears) {
            let name = format!("{prefix}.{}", spec.name);
            let weight = linear.weight.clone();
            let seed = data::seed_of(ctx.seed, &format!("stage {} {name}", ctx.stage));
            linear.weight = match adapters {
                Some(adapters) => adapters.attach(spec.role, weight, seed, device),
                None => weight.set_require_grad(true),
            };
        }
    }
    Ok(student)
}

/// A weight with its factors merged into it, `[out, in]`.
fn merged(name: &str, weight: &Param<Tensor<2>>) -> Result<HostTensor> {
    let tensor = lora::host(weight.val().transpose());
    if tensor.to_f32()?.iter().all(|w| w.is_finite()) {
        return Ok(tensor);
    }
    Err(Error::failed("a weight is no longer a number").at(name).fix("a smaller learning_rate"))
}

/// How much learns.
fn note_size(config: &FinetuneConfig, ctx: &mut StageContext<'_>) {
    let model = &ctx.model.config;
    let weights: usize =
        model.linears().map(|(_, spec)| spec.shape.iter().product::<usize>()).sum();
    let learned = config.method.trainable(model);
    ctx.results.trainable.insert(ctx.stage, learned);
    let share = 100.0 * learned as f64 / weights.max(1) as f64;
    let text = format!("{learned} numbers learn, {share:.2} % of the linears' {weights} weights");
    ctx.report.emit(&Event::Note { text });
}

/// The factors in a folder that peft reads, where there are any.
fn write_adapter(
    config: &FinetuneConfig,
    ctx: &mut StageContext<'_>,
    student: &Student,
) -> Result<()> {
    let Some(adapters) = config.method.adapters() else { return Ok(()) };
    let mut factors = Vec::new();
    student.visit_blocks(|index, block| {
        let prefix = block.config.block_prefix(index);
        for (name, linear) in block.linears() {
            let name = format!("{prefix}.{name}");
            factors.extend(lora::factors(&name, &linear.weight));
        }
        Ok(())
    })?;
    let dir = ctx.run_dir.join("adapters").join(config.method.name());
    let path = lora::write_folder(&dir, &adapters, ctx.model, &factors)?;
    let bytes = std::fs::metadata(&path).map_or(0, |data| data.len());
    let text = format!("adapter {} for peft, {}", dir.display(), size(bytes));
    ctx.report.emit(&Event::Note { text });
    Ok(())
}
