//! Stages: the only place where model, method, data, objective and export meet.
//!
//! A stage states what it takes and what it leaves ([`StageConfig::leaves`]), so that a plan
//! type-checks before a weight is read, and it saves what it has done as it goes, so that a run
//! that was stopped goes on from there.

mod activations;
mod balance;
mod calibrate;
mod distill;
mod evaluate;
mod export;
mod finetune;
mod gate;
mod head;
mod inputs;
mod lora;
mod monitor;
mod reconstruct;
mod session;
mod solve_block;
mod start;
mod streams;
mod training_state;
mod tune_scales;
mod validate;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::nn::Linear;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

pub use calibrate::{CalibrateConfig, InputStream};
pub use distill::DistillConfig;
pub use evaluate::{Baseline, EvaluateConfig, TaskConfig};
pub use export::{ExportConfig, PARITY_WINDOWS};
pub use finetune::{FinetuneConfig, FinetuneMethod, FullConfig, LoraConfig, QloraConfig};
pub use lora::{Target, Targets};
pub use monitor::{Quality, Setback};
pub use reconstruct::{ReconstructConfig, Within};
pub use start::{LatentFile, StartFrom};
pub use tune_scales::{AdapterConfig, TuneScalesConfig};
pub use validate::{Point, ValidateConfig};

use crate::data::{DataFormat, TokenStream};
use crate::device::NamedDevice;
use crate::error::{Error, Result};
use crate::export::fewbit::Saved;
use crate::export::{ActivationRecord, OpenModel, Provenance};
use crate::method::{self, MethodConfig};
use crate::model::{ModelConfig, ModelTap, WeightSource};
use crate::objective::ObjectiveConfig;
use crate::quant::{
    Bits, CodedWeight, GroupSize, Learned, ObserverConfig, QuantSpec, QuantizedWeight, Repr,
    ScaleDigits, Symmetry,
};
use crate::report::{At, Event, Reporter, Reporters};
use crate::stop::StopFlag;
use crate::store::HostTensor;
use crate::store::safetensors::Checkpoint;
use crate::task::{Perplexity, PplConfig};
use crate::train::{OptimizerConfig, RateUnit, Rule};

/// What a packed model is called before any stage has changed it.
pub const BASE: &str = "base";

/// One entry of a recipe's stage list.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StageConfig {
    /// Observers only: grids without learning.
    Calibrate(CalibrateConfig),
    /// Block by block, each fitted to the float block's output.
    Reconstruct(ReconstructConfig),
    /// The whole model at once, against a frozen teacher.
    Distill(DistillConfig),
    /// The scales of codes that an earlier stage left.
    TuneScales(TuneScalesConfig),
    /// Float weights, by low-rank factors beside them or as they are.
    Finetune(FinetuneConfig),
    /// Perplexity.
    Evaluate(EvaluateConfig),
    /// Packed files.
    Export(ExportConfig),
}

/// What a stage changes in the quantization of `[quant]`, for the stages that quantize.
#[derive(Clone, Copy, Debug, Default)]
pub struct SpecChange {
    /// Bits.
    pub bits: Option<Bits>,
    /// Group size.
    pub group_size: Option<GroupSize>,
    /// Symmetry.
    pub symmetric: Option<Symmetry>,
}

impl StageConfig {
    /// Name in recipes and folders.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Calibrate(_) => "calibrate",
            Self::Reconstruct(_) => "reconstruct",
            Self::Distill(_) => "distill",
            Self::TuneScales(_) => "tune_scales",
            Self::Finetune(_) => "finetune",
            Self::Evaluate(_) => "evaluate",
            Self::Export(_) => "export",
        }
    }

    /// What the model is after this stage, given what it is before: the typing rule.
    ///
    /// # Errors
    /// A usage error when this stage cannot follow.
    pub fn leaves(&self, input: Repr) -> Result<Repr> {
        if let Some(method) = self.method() {
            let (takes, name) = (method.takes(), method.name());
            if takes != Repr::Dense && takes != input {
                return Err(Error::usage(format!(
                    "method.{name} goes on from {takes} codes, and the weights are {input} here"
                ))
                .fix("a stage before it that leaves such codes, for instance stage.calibrate"));
            }
        }
        let needs_dense = |leaves| match input {
            Repr::Dense => Ok(leaves),
            Repr::Uniform | Repr::BinaryCoding => Err(Error::usage(format!(
                "{} needs float weights, and they are quantized already",
                self.name()
            ))
            .fix("stage.reconstruct or stage.distill here, or a float model and this stage first")),
        };
        match self {
            Self::Calibrate(config) => needs_dense(config.method.leaves()),
            Self::Reconstruct(config) => Ok(config.method.leaves()),
            Self::Distill(config) => Ok(config.method.leaves()),
            Self::TuneScales(config) => Ok(config.method.leaves()),
            Self::Finetune(_) => Ok(Repr::Dense),
            Self::Export(config) if input == Repr::Dense && config.format.fewbit.is_some() => {
                Err(Self::nothing_quantized())
            }
            Self::Evaluate(_) | Self::Export(_) => Ok(input),
        }
    }

    /// What an export of weights that are all dense is refused with.
    pub(crate) fn nothing_quantized() -> Error {
        Error::usage("export needs quantized weights, and no earlier stage makes any")
            .fix("a stage.calibrate, stage.reconstruct or stage.distill before it")
    }

    /// What this stage does to weights, where it does anything.
    pub fn method(&self) -> Option<&MethodConfig> {
        match self {
            Self::TuneScales(config) => Some(&config.method),
            _ => self.quantizes().map(|(method, _)| method),
        }
    }

    /// Method and specification change, for the stages that quantize.
    pub fn quantizes(&self) -> Option<(&MethodConfig, SpecChange)> {
        macro_rules! of {
            ($config:expr) => {
                Some((
                    &$config.method,
                    SpecChange {
                        bits: $config.bits,
                        group_size: $config.group_size,
                        symmetric: $config.symmetric,
                    },
                ))
            };
        }
        match self {
            Self::Calibrate(config) => of!(config),
            Self::Reconstruct(config) => of!(config),
            Self::Distill(config) => of!(config),
            Self::TuneScales(_) | Self::Finetune(_) | Self::Evaluate(_) | Self::Export(_) => None,
        }
    }

    /// Optimizer steps in all, for estimates and TensorBoard's axis.
    pub fn steps(&self, blocks: usize) -> u64 {
        match self {
            Self::Reconstruct(config) => config.steps * blocks as u64,
            Self::Distill(config) => config.steps,
            Self::TuneScales(config) => config.steps,
            Self::Finetune(config) => config.steps,
            Self::Calibrate(_) | Self::Evaluate(_) | Self::Export(_) => 0,
        }
    }

    /// Whether it cannot do without the float model.
    pub fn needs_float(&self) -> bool {
        match self {
            Self::Distill(config) => config.objective.needs_teacher(),
            Self::TuneScales(config) => config.objective.needs_teacher(),
            Self::Finetune(config) => config.objective.needs_teacher(),
            Self::Evaluate(config) => config.baselines.as_ref().is_some_and(|all| !all.is_empty()),
            Self::Reconstruct(_) => true,
            Self::Calibrate(_) | Self::Export(_) => false,
        }
    }

    /// Refuses values that no type can refuse.
    ///
    /// # Errors
    /// Usage errors that name the key.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Calibrate(config) => config.check(),
            Self::Reconstruct(config) => config.check(),
            Self::Distill(config) => config.check(),
            Self::TuneScales(config) => config.check(),
            Self::Finetune(config) => config.check(),
            Self::Evaluate(_) => Ok(()),
            Self::Export(config) => config.check(),
        }
    }

    /// Runs the stage.
    ///
    /// # Errors
    /// Whatever goes wrong; what was saved before stays.
    pub fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        head::round(ctx)?;
        match self {
            Self::Calibrate(config) => calibrate::run(config, ctx),
            Self::Reconstruct(config) => reconstruct::run(config, ctx),
            Self::Distill(config) => distill::run(config, ctx),
            Self::TuneScales(config) => tune_scales::run(config, ctx),
            Self::Finetune(config) => finetune::run(config, ctx),
            Self::Evaluate(config) => evaluate::run(config, ctx),
            Self::Export(config) => export::run(config, ctx),
        }
    }

    /// Whether what it leaves is judged by [`StageConfig::judge`].
    pub fn is_judged(&self) -> bool {
        gate::guards(self)
    }

    /// The quality gate behind a training stage, once what it leaves is saved.
    ///
    /// # Errors
    /// A gate error when the model is worse than at the stage's start or than plain rounding, and the
    /// recipe does not allow that.
    pub fn judge(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        gate::after(self, ctx)
    }

    /// Whether it changes the model.
    pub fn changes_model(&self) -> bool {
        !matches!(self, Self::Evaluate(_) | Self::Export(_))
    }

    /// The configuration without what changes no result, so that changing it goes on with a run.
    #[must_use]
    pub fn without_permissions(mut self) -> Self {
        match &mut self {
            Self::Reconstruct(config) => config.allow_worse = false,
            Self::Distill(config) => config.allow_worse = false,
            Self::TuneScales(config) => config.allow_worse = false,
            Self::Finetune(config) => config.allow_worse = false,
            Self::Export(config) => config.allow_worse = false,
            Self::Calibrate(_) | Self::Evaluate(_) => {}
        }
        self
    }

    /// How far an unfinished stage is saved in its folder `dir`.
    pub fn saved(&self, dir: &Path) -> At {
        match self {
            Self::Reconstruct(_) => {
                let file = |index: usize| dir.join(format!("block-{index:04}.safetensors"));
                At::Block((0..usize::MAX).take_while(|index| file(*index).exists()).count())
            }
            _ => At::Step(session::saved_step(dir).unwrap_or(0)),
        }
    }

    /// Brings back the model a finished stage left.
    ///
    /// # Errors
    /// When its checkpoints are missing or damaged.
    pub fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        match self {
            Self::Calibrate(_) | Self::Reconstruct(_) | Self::Distill(_) => {
                head::round(ctx)?;
                ctx.restore_linears()
            }
            Self::TuneScales(_) => tune_scales::restore(ctx),
            Self::Finetune(config) => finetune::restore(config, ctx),
            Self::Evaluate(_) | Self::Export(_) => Ok(()),
        }
    }
}

/// Refuses an objective that does not compare logits.
fn check_objective(objective: &ObjectiveConfig, stage: &str) -> Result<()> {
    objective.check()?;
    if matches!(objective, ObjectiveConfig::Mse(_)) {
        return Err(Error::usage(format!(
            "objective.mse compares block outputs, and {stage} logits"
        ))
        .fix("objective.jsd = {} or objective.cross_entropy = {}"));
    }
    Ok(())
}

/// Refuses a unit that the optimizer's rule does not have.
fn check_rate_unit(unit: RateUnit, optimizer: &OptimizerConfig) -> Result<()> {
    if unit == RateUnit::Grid && optimizer.rule == Rule::Sign {
        return Err(Error::usage("rate_unit = \"grid\" is for optimizer.rule = \"adamw\"")
            .fix("rate_unit = \"absolute\", or optimizer.rule = \"adamw\""));
    }
    Ok(())
}

/// Refuses counts of zero.
fn check_counts(counts: &[(&str, u64)]) -> Result<()> {
    match counts.iter().find(|(_, count)| *count == 0) {
        Some((key, _)) => Err(Error::usage(format!("{key} = 0")).fix(format!("{key} = 1"))),
        None => Ok(()),
    }
}

/// The model between stages.
pub struct ModelState {
    /// The source folder.
    pub dir: PathBuf,
    /// The name it goes by.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tensors: float, or where `packed` says so the codes of a folder of ours.
    pub checkpoint: Checkpoint,
    /// The packed folder that the run starts from, when it does.
    pub packed: Option<OpenModel>,
    /// The float model behind a packed one, for teachers and baselines.
    pub teacher: Option<Checkpoint>,
    /// Quantized linears by full name, with the method that made each.
    pub quantized: BTreeMap<String, (QuantizedWeight, String)>,
    /// Where the latent weights of quantized linears lie, by full name, for stages that go on.
    pub latents: BTreeMap<String, LatentFile>,
    /// Dense tensors that a stage changed on the way to quantized ones, by name.
    pub dense: BTreeMap<String, HostTensor>,
    /// Float tensors that fine-tuning left, by name: with them the checkpoint is the float model that
    /// later stages quantize and compare with.
    pub tuned: BTreeMap<String, HostTensor>,
    /// What is done to activations once something is quantized, and the grids calibrated so far.
    pub activations: ActivationRecord,
}

impl ModelState {
    /// The float model.
    ///
    /// # Errors
    /// When the run starts from packed codes and names none.
    pub fn float(&self) -> Result<&Checkpoint> {
        match (&self.teacher, &self.packed) {
            (Some(teacher), _) => Ok(teacher),
            (None, None) => Ok(&self.checkpoint),
            (None, Some(packed)) => {
                // The plan has refused what needs it.
                Err(Error::failed("there is no float model beside the packed one")
                    .at(packed.dir.display()))
            }
        }
    }

    /// A float checkpoint with what fine-tuning made of it.
    pub(crate) fn tuned_on<'a>(&'a self, checkpoint: &'a Checkpoint) -> Tuned<'a> {
        Tuned { checkpoint, tuned: &self.tuned }
    }

    /// A tensor that a stage has left dense.
    fn left(&self, name: &str) -> Option<&HostTensor> {
        self.dense.get(name).or_else(|| self.tuned.get(name))
    }

    /// Takes the codes of the packed folder that the run starts from, if it does.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn take_packed(&mut self) -> Result<()> {
        let Some(packed) = &self.packed else { return Ok(()) };
        for (name, record) in packed.linears() {
            if let Some(weight) = packed.quantized(name)? {
                self.quantized.insert(name.clone(), (weight, record.method.clone()));
            }
        }
        Ok(())
    }

    /// What the current model does to activations: nothing while every linear is float.
    pub fn tap(&self) -> ModelTap {
        if self.quantized.is_empty() { ModelTap::default() } else { self.activations.tap() }
    }
}

/// The current weights: the checkpoint with the quantized linears in place.
impl WeightSource for ModelState {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        match (self.quantized.get(linear), self.left(name)) {
            (Some((weight, _)), _) => Ok(weight.dequantize()),
            (None, Some(tensor)) => tensor.to_f32().map_err(|e| e.at(name)),
            (None, None) => self.checkpoint.weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name) || self.left(name).is_some()
    }

    fn overrides(&self, name: &str) -> bool {
        self.quantized.contains_key(name)
    }
}

/// See [`ModelState::tuned_on`].
pub(crate) struct Tuned<'a> {
    checkpoint: &'a Checkpoint,
    tuned: &'a BTreeMap<String, HostTensor>,
}

impl WeightSource for Tuned<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.tuned.get(name) {
            Some(tensor) => tensor.to_f32().map_err(|e| e.at(name)),
            None => self.checkpoint.weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name) || self.tuned.contains_key(name)
    }
}

/// The current weights, quantized linears as their codes.
pub(crate) struct Packed<'a>(pub(crate) &'a ModelState);

impl WeightSource for Packed<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.weight(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn coded(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        Ok(self.0.quantized.get(name).map(|(weight, _)| weight.clone()))
    }

    fn overrides(&self, name: &str) -> bool {
        self.0.overrides(name)
    }
}

/// One data set, tokenized.
pub struct Corpus {
    /// The stream.
    pub stream: TokenStream,
    /// What its documents are.
    pub format: DataFormat,
    /// SHA-256 of its files.
    pub sha256: String,
    /// How it goes by in reports.
    pub name: String,
    /// Windows to draw; all of them when absent.
    pub samples: Option<usize>,
    /// Window length; examples are packed for it.
    pub length: usize,
}

/// The data sets of a recipe.
#[derive(Default)]
pub struct Data {
    /// For reconstruct.
    pub calibration: Option<Corpus>,
    /// For distill.
    pub train: Option<Corpus>,
    /// For validation while training, evaluate and the gates.
    pub validation: Option<Corpus>,
    /// Token put before documents.
    pub bos: Option<u32>,
}

impl Data {
    /// A data set that a stage cannot do without.
    ///
    /// # Errors
    /// A usage error that names the table to add.
    pub fn need<'a>(corpus: Option<&'a Corpus>, role: &str) -> Result<&'a Corpus> {
        corpus.ok_or_else(|| {
            Error::usage(format!("the recipe has no [data.{role}]"))
                .fix(format!("[data.{role}] with a path"))
        })
    }
}

/// A measured perplexity, kept for reports and for the run's last line.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Measured {
    /// Stage index.
    pub stage: usize,
    /// `float`, `rtn w2`, `after distill`, ...
    pub what: String,
    /// The number and its protocol.
    pub result: Perplexity,
    /// The data's SHA-256.
    pub data_sha256: String,
    /// The protocol asked for.
    pub task: PplConfig,
}

/// What was exported.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ExportRecord {
    /// The format's name.
    pub format: String,
    /// The folder.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Bits per quantized weight.
    pub bits_per_weight: f64,
    /// Whether it computes something else than what was trained.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Results that outlive a stage; saved in `run.json`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Results {
    /// Perplexities in order of measurement.
    pub measured: Vec<Measured>,
    /// Exports in order of writing.
    pub exports: Vec<ExportRecord>,
    /// Block errors per stage, `[before, after]` per block.
    pub block_mse: BTreeMap<usize, Vec<[f64; 2]>>,
    /// Numbers that learn, by stage, where it is a few of the model's.
    #[serde(default)]
    pub trainable: BTreeMap<usize, u64>,
    /// Models on a few windows of the validation text: starts, baselines, what stages left.
    #[serde(default)]
    pub quality: Vec<Quality>,
    /// Failures of trainings, and what was done.
    #[serde(default)]
    pub setbacks: Vec<Setback>,
    /// Whether it was said that there is no text for the quality gate.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unguarded: bool,
    /// Largest difference ever found between a folded and a fake-quantized weight: 0.
    pub fold_difference: f32,
}

/// Everything a stage may touch, nothing else.
pub struct StageContext<'a> {
    /// The model.
    pub model: &'a mut ModelState,
    /// The data.
    pub data: &'a Data,
    /// Where tensors live.
    pub device: &'a NamedDevice,
    /// The type activations are computed in (latent weights and scales are always f32).
    pub compute: DType,
    /// Seed of the run.
    pub seed: u64,
    /// Index of this stage.
    pub stage: usize,
    /// Index of the last stage that quantized, this one included: names the current model.
    pub latest: &'static str,
    /// Steps of all earlier stages, TensorBoard's axis.
    pub first_step: u64,
    /// Steps of this stage.
    pub steps: u64,
    /// Index of the last earlier stage that changed the model.
    pub left_by: Option<usize>,
    /// What this stage quantizes, by linear.
    pub specs: &'a BTreeMap<String, QuantSpec>,
    /// Whether a later stage may go on from this one's latent weights.
    pub keeps_latents: bool,
    /// What this stage rounds the output head to.
    pub head: Option<QuantSpec>,
    /// The observer of this stage's grids.
    pub observer: &'a ObserverConfig,
    /// `[quant]`, the stage's overrides aside: baselines use its grouping.
    pub default_spec: QuantSpec,
    /// The numbers that scales are, of what this stage leaves.
    pub scales: ScaleDigits,
    /// This stage's folder under `checkpoints/`.
    pub dir: &'a Path,
    /// The run's folder.
    pub run_dir: &'a Path,
    /// Where reports go.
    pub report: &'a mut Reporters,
    /// Set by signals.
    pub stop: &'a StopFlag,
    /// Results so far.
    pub results: &'a mut Results,
    /// Provenance of exports.
    pub provenance: &'a Provenance,
}

impl StageContext<'_> {
    /// The step of a training of `steps` from which scales have as few digits as what the stage
    /// leaves: its last tenth, so that everything else settles on them.
    fn shortens_at(&self, steps: u64) -> u64 {
        match self.scales {
            ScaleDigits::F32 => u64::MAX,
            ScaleDigits::F16 | ScaleDigits::Bits7 => steps - steps / 10,
        }
    }

    /// The codes that an earlier stage left of a linear, with what learns of their grid.
    fn coded(&self, name: &str, learned: Learned) -> Result<CodedWeight> {
        let Some((weight, _)) = self.model.quantized.get(name) else {
            return Err(Error::failed("no stage has left codes of this linear").at(name));
        };
        Ok(CodedWeight::new(weight, learned, self.compute, &self.device.device))
    }

    /// Folds one linear and checks the law on the real tensor: the folded weight is the
    /// fake-quantized one, bit for bit on a CPU (a GPU may differ in the last bit; recorded).
    fn fold(&mut self, name: &str, linear: &Linear) -> Result<QuantizedWeight> {
        let folded = method::fold(&linear.weight)
            .ok_or_else(|| Error::failed("nothing to fold").at(name))?
            .map_err(|e| e.at(name))?;
        let trained = linear.weight.val().transpose();
        // In bf16 the forward sees the same weights rounded; there is nothing to compare.
        let widest = if trained.dtype() == DType::F32 {
            let trained = trained.into_data();
            let pairs = trained.iter::<f32>().zip(folded.dequantize());
            pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        } else {
            0.0
        };
        self.results.fold_difference = self.results.fold_difference.max(widest);
        if widest > 0.0 && self.device.name == "cpu" {
            return Err(Error::gate(format!("the folded weight differs by {widest:e}")).at(name));
        }
        folded.with_scales(self.scales).map_err(|e| e.at(name))
    }

    /// Emits the code histogram of everything quantized so far, one per width.
    fn report_codes(&mut self) {
        let mut widths: BTreeMap<u8, crate::quant::CodeHistogram> = BTreeMap::new();
        for (weight, _) in self.model.quantized.values() {
            let histogram = weight.histogram();
            widths
                .entry(weight.bits.get())
                .and_modify(|sum| sum.merge(&histogram))
                .or_insert(histogram);
        }
        for (bits, histogram) in widths {
            let edges = (0..=histogram.0.len()).map(|code| code as f64 - 0.5).collect();
            self.report.emit(&Event::Histogram {
                tag: format!("codes/{}_w{bits}", self.latest),
                global_step: self.first_step + self.steps,
                edges,
                counts: histogram.0,
            });
        }
    }

    /// Emits how far learned steps moved from where they started: `ln(scale / start)`.
    fn report_scale_change(&mut self, changes: &[f32], step: u64) {
        const BUCKETS: usize = 40;
        let (low, high) =
            changes.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), c| {
                (low.min(f64::from(*c)), high.max(f64::from(*c)))
            });
        if changes.is_empty() || !(high - low).is_finite() {
            return;
        }
        let width = ((high - low) / BUCKETS as f64).max(1e-12);
        let mut counts = vec![0; BUCKETS];
        for change in changes {
            let bucket = ((f64::from(*change) - low) / width) as usize;
            counts[bucket.min(BUCKETS - 1)] += 1;
        }
        self.report.emit(&Event::Histogram {
            tag: format!("scale_change/{}", self.latest),
            global_step: step,
            edges: (0..=BUCKETS).map(|i| low + width * i as f64).collect(),
            counts,
        });
    }

    /// The file of block `index`'s linears in this stage.
    fn block_file(&self, index: usize) -> PathBuf {
        self.dir.join(format!("block-{index:04}.safetensors"))
    }

    /// Loads every linear this stage saved.
    fn restore_linears(&mut self) -> Result<()> {
        for index in 0..self.model.config.n_blocks {
            let path = self.block_file(index);
            if path.exists() {
                self.take(Saved::read(&path)?, &path)?;
            }
        }
        let grids = self.model.activations.check(&self.model.config);
        grids.map_err(|e| e.at(self.dir.display()).fix("--fresh to start over"))?;
        for name in self.specs.keys() {
            if !self.model.quantized.contains_key(name) {
                return Err(Error::failed("a finished stage lacks a linear")
                    .at(self.dir.display())
                    .at(name)
                    .fix("--fresh to start over"));
            }
        }
        Ok(())
    }

    /// Puts what a stage made into the model.
    fn take(&mut self, mut saved: Saved, file: &Path) -> Result<()> {
        self.note_latents(&saved, file);
        self.model.activations.take(&self.model.config, &mut saved.dense)?;
        for (name, weight, method) in saved.linears {
            self.model.quantized.insert(name, (weight, method));
        }
        self.model.dense.extend(saved.dense);
        Ok(())
    }

    /// Saves what a stage made of a block, then takes it.
    fn save_block(&mut self, index: usize, saved: Saved) -> Result<()> {
        let path = self.block_file(index);
        saved.write(&path)?;
        self.take(saved, &path)
    }

    /// Saves quantized linears block by block, then takes them.
    fn save_linears(&mut self, linears: Vec<(String, QuantizedWeight, String)>) -> Result<()> {
        let mut blocks: BTreeMap<usize, Saved> = BTreeMap::new();
        for linear in linears {
            let block = self.model.config.block_of(&linear.0).ok_or_else(|| {
                Error::failed("a quantized linear is in no block of the model").at(&linear.0)
            })?;
            blocks.entry(block).or_default().linears.push(linear);
        }
        blocks.into_iter().try_for_each(|(index, saved)| self.save_block(index, saved))
    }

    /// Notes a block's errors, `[before, after]`, in the results.
    fn note_block(&mut self, index: usize, mse: [f64; 2]) {
        let list = self.results.block_mse.entry(self.stage).or_default();
        list.truncate(index);
        list.push(mse);
    }
}

/// A block's errors as its checkpoint carries them.
fn with_mse(mut metadata: BTreeMap<String, String>, mse: [f64; 2]) -> BTreeMap<String, String> {
    for (key, mse) in MSE_KEYS.into_iter().zip(mse) {
        metadata.insert(key.to_owned(), format!("{mse:e}"));
    }
    metadata
}

/// What [`with_mse`] put there, `[before, after]`.
fn saved_mse(saved: &Saved) -> [f64; 2] {
    MSE_KEYS
        .map(|key| saved.metadata.get(key).and_then(|text| text.parse().ok()).unwrap_or(f64::NAN))
}

const MSE_KEYS: [&str; 2] = ["mse_before", "mse_after"];
