//! `evaluate`: the current model under one protocol, beside its baselines.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::found;
use super::kind::Stage;
use super::results::Measured;
use super::state::{BASE, ModelState, Packed};
use crate::error::{Error, Result};
use crate::method::{self, MethodConfig, RtnConfig};
use crate::model::{CausalLm, Forward, Loader, ModelConfig, ModelTap, WeightSource, weight_name};
use crate::quant::{Bits, GroupAxis, GroupLayout, QuantSpec, QuantizedWeight, Symmetry};
use crate::report::terminal::Terminal;
use crate::report::{Event, Number, Reporter};
use crate::task::{Bench, Files, Material, Prepared, Score, Source, TaskConfig, Writes};

/// Keys of `[stage.evaluate]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    /// What is measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskConfig>,
    /// What is measured besides, or in its place.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tasks: Vec<TaskConfig>,
    /// What is measured beside the current model, so that a number never stands alone; the float model
    /// unless said otherwise, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Vec<Baseline>>,
    /// The width at which a model of several (`method.anybcq`) is read; the widest unless said otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
}

/// Something to compare with.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The float model.
    Float,
    /// Round-to-nearest from the float weights, at the current bits and grouping.
    Rtn,
}

impl Stage for EvaluateConfig {
    fn check(&self) -> Result<()> {
        if self.all().next().is_none() {
            return Err(Error::usage("evaluate has no task")
                .fix("task.ppl = {}, or tasks = [...] with several"));
        }
        self.all().try_for_each(|task| task.task().check().map_err(|r| r.error.at(r.key)))
    }

    fn needs_float(&self) -> bool {
        self.baselines.as_ref().is_some_and(|all| !all.is_empty())
            || self.all().any(|task| task.task().needs_reference())
    }

    fn needs_tokenizer(&self) -> bool {
        self.all().any(|task| matches!(task.task().source(), Source::Rows(_)))
    }

    fn own_data(&self) -> Result<Vec<(String, String)>> {
        let found = self.all().map(|task| {
            let files = Files::find(&task.task().source()).map_err(|e| e.at(place(task)))?;
            Ok((task.label(), files.sha256))
        });
        let found: Result<Vec<_>> = found.collect();
        Ok(found?.into_iter().filter(|(_, sha256)| !sha256.is_empty()).collect())
    }

    fn check_data(&self, model: &ModelState, data: &Data) -> Result<()> {
        for task in self.all() {
            let files = Files::find(&task.task().source()).map_err(|e| e.at(place(task)))?;
            Measuring { task, files: &files, label: "" }.prepare(&model.config, data).map(drop)?;
        }
        Ok(())
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let models = 1 + self.baselines.as_ref().map_or(1, Vec::len) as u64;
        let weights = scene.linears + scene.rest;
        let tokens = self.all().map(|task| match (task.task().source(), &scene.data.validation) {
            (Source::Text, Some(corpus)) => corpus.stream.tokens.len() as u64,
            _ => 0,
        });
        let tokens = tokens.sum::<u64>() * models;
        let reading = scene.speed.seconds(2.0 * (weights * tokens) as f64, 0.0, 0.0);
        // `check_data` says what is wrong with files.
        let writing = self.all().filter_map(|task| {
            let files = Files::find(&task.task().source()).ok()?;
            let Writes { texts, together, tokens } = task.task().writes(&files).ok()??;
            Some(scene.writing(texts as u64, together as u64, tokens as u64))
        });
        let writing: Vec<Cost> = writing.collect();
        let cached = writing.iter().map(|cost| cost.device).max().unwrap_or(0);
        let seconds: f64 = writing.iter().map(|cost| cost.seconds).sum();
        // A dense model, or rounded codes beside it, is the largest.
        let of = |baseline| self.baselines.as_ref().is_some_and(|all| all.contains(&baseline));
        let float = self.baselines.is_none() && scene.model.float().is_ok() || of(Baseline::Float);
        let whole = if of(Baseline::Rtn) {
            4 * scene.linears + scene.codes
        } else if float || scene.codes == 0 {
            4 * scene.linears
        } else {
            scene.codes
        };
        let context = 2048.min(scene.config().max_positions as u64);
        let pass = 4096.min(tokens / models.max(1)).max(64);
        let passing = scene.ends() + scene.passing(pass);
        let reading = scene
            .measured(tokens, context)
            .map_or(reading, |seconds| seconds + scene.load((models - 1) * weights).unwrap_or(0.0));
        Cost {
            device: whole + passing + cached,
            seconds: reading + seconds * models as f64,
            ..Cost::default()
        }
    }

    fn width(&self) -> Option<Bits> {
        self.bits
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        // `samples` of the data is what a task on it measures that says nothing else.
        let samples = ctx.data.validation.as_ref().and_then(|corpus| corpus.samples);
        let mut tasks: Vec<TaskConfig> = self.all().cloned().collect();
        for task in &mut tasks {
            if let (Source::Text, Some(samples)) = (task.task().source(), samples) {
                task.task_mut().limit(samples);
            }
        }
        let files = tasks.iter().map(|task| Files::find(&task.task().source()));
        let files: Vec<Files> = files.collect::<Result<_>>()?;
        let labels: Vec<String> = (0..tasks.len()).map(|index| label_of(&tasks, index)).collect();
        let all = tasks.iter().zip(&files).zip(&labels);
        let all: Vec<Measuring<'_>> =
            all.map(|((task, files), label)| Measuring { task, files, label }).collect();
        let all = &all[..];
        let baselines = match &self.baselines {
            Some(baselines) => baselines.clone(),
            None => ctx.model.float().map_or_else(|_| Vec::new(), |_| vec![Baseline::Float]),
        };
        for baseline in &baselines {
            match baseline {
                Baseline::Float => float(all, ctx)?,
                Baseline::Rtn => rtn(all, ctx)?,
            }
        }
        let what = if ctx.model.quantized.is_empty() && ctx.model.tuned.is_empty() {
            FLOAT.to_owned()
        } else if ctx.latest == BASE {
            BASE.to_owned()
        } else {
            // The run's own result is that of its widest.
            let read = self.bits.map(|bits| format!("w{bits} ")).unwrap_or_default();
            format!("{read}after {}", ctx.latest)
        };
        if what != FLOAT || baselines.is_empty() {
            let found = measure(ctx, &Packed(ctx.model), &ctx.model.tap(), all, &what)?;
            record(ctx, found, all);
        }
        Ok(())
    }
}

impl EvaluateConfig {
    /// Every task.
    fn all(&self) -> impl Iterator<Item = &TaskConfig> {
        self.task.iter().chain(&self.tasks)
    }
}

/// A task, the files of its rows, and what it goes by in this stage.
#[derive(Clone, Copy)]
struct Measuring<'a> {
    task: &'a TaskConfig,
    files: &'a Files,
    label: &'a str,
}

impl<'a> Measuring<'a> {
    fn is_on_text(&self) -> bool {
        matches!(self.task.task().source(), Source::Text)
    }

    /// What is recorded of a model called `what`; no numbers yet.
    fn measured(&self, ctx: &StageContext<'_>, what: &str) -> Measured {
        let corpus = ctx.data.validation.as_ref().filter(|_| self.is_on_text());
        let data_sha256 = corpus.map_or(&self.files.sha256, |corpus| &corpus.sha256);
        Measured {
            stage: ctx.stage,
            what: what.to_owned(),
            result: Score::default(),
            data_sha256: data_sha256.clone(),
            task: self.task.clone(),
        }
    }

    /// Refuses what it cannot be measured on.
    fn prepare(&self, config: &'a ModelConfig, data: &'a Data) -> Result<Box<dyn Prepared + 'a>> {
        let task = self.task.task();
        let at = |error: Error| error.at(place(self.task));
        let tokenizer = data.tokenizer.as_ref();
        let (template, ends) = (data.template.as_ref(), &data.ends[..]);
        let material =
            Material { config, text: None, files: self.files, tokenizer, template, ends };
        if !self.is_on_text() {
            return task.prepare(&material).map_err(at);
        }
        let corpus = Data::need(data.validation.as_ref(), "validation")?;
        task.window(config, corpus.stream.packed).map_err(|refused| at(refused.error))?;
        let material = Material { text: Some(&corpus.stream), ..material };
        task.prepare(&material).map_err(|e| e.at("data.validation"))
    }
}

/// What the float model is called.
const FLOAT: &str = "float";

/// Where a task stands in recipes.
fn place(task: &TaskConfig) -> String {
    format!("task.{}", task.name())
}

/// The float model's numbers, measured once per protocol and run. What is told by comparing with it has none.
fn float(all: &[Measuring<'_>], ctx: &mut StageContext<'_>) -> Result<()> {
    let unknown = all.iter().filter(|measuring| {
        !measuring.task.task().needs_reference() && known_float(ctx, measuring.task).is_none()
    });
    let unknown: Vec<Measuring<'_>> = unknown.copied().collect();
    if unknown.is_empty() {
        return Ok(());
    }
    let found = measure(ctx, ctx.model.float()?, &ModelTap::default(), &unknown, FLOAT)?;
    record(ctx, found, &unknown);
    Ok(())
}

fn known_float<'a>(ctx: &'a StageContext<'_>, task: &TaskConfig) -> Option<&'a Measured> {
    ctx.results.measured.iter().find(|m| m.what == FLOAT && m.task == *task)
}

/// What rounding alone would give at these bits, activations treated alike: the price that learning
/// has to beat.
fn rtn(all: &[Measuring<'_>], ctx: &mut StageContext<'_>) -> Result<()> {
    let Some((baseline, what)) = rounded(ctx)? else { return Ok(()) };
    let found = measure(ctx, &baseline, &ctx.model.tap(), all, &what)?;
    record(ctx, found, all);
    Ok(())
}

/// The float model rounded at the current bits and groups, and what that is called: `rtn w2`; `None`
/// where nothing but the head is quantized.
///
/// # Errors
/// When there is no float model, or its weights cannot be read.
pub(super) fn rounded<'a>(ctx: &'a StageContext<'_>) -> Result<Option<(Rounded<'a>, String)>> {
    let mut baseline = Rounded { model: ctx.model, weights: BTreeMap::new() };
    let mut widths = Vec::new();
    for name in ctx.model.quantized.keys() {
        let Some(current) = ctx.model.now(name)? else { continue };
        baseline.weights.insert(name.clone(), round(ctx, name, &current)?);
        // The head's width is named by its override, not by the baseline.
        widths.extend((name != ctx.model.config.head()).then_some(current.bits));
    }
    widths.sort_unstable();
    widths.dedup();
    let widths: Vec<String> = widths.iter().map(|bits| format!("w{bits}")).collect();
    let what = format!("rtn {}{}", widths.join("+"), ctx.model.activations.quant);
    Ok((!widths.is_empty()).then_some((baseline, what)))
}

fn round(ctx: &StageContext<'_>, name: &str, current: &QuantizedWeight) -> Result<QuantizedWeight> {
    let layout = GroupLayout { axis: GroupAxis::In, ..current.layout };
    let shape = [layout.out, layout.inputs];
    if name == ctx.model.config.head() {
        return Ok(current.clone());
    }
    let float = ctx.model.tuned_on(ctx.model.float()?);
    let values = float.weight(&weight_name(name), &shape)?;
    let weight = Tensor::from_data(TensorData::new(values, shape), &ctx.device.device);
    let symmetry =
        if current.bits.get() == 1 { Symmetry::Asymmetric } else { ctx.default_spec.symmetry };
    let spec = QuantSpec { bits: current.bits, symmetry, ..ctx.default_spec };
    let rtn = MethodConfig::Rtn(RtnConfig {});
    method::quantize(&rtn, &spec, ctx.observer, layout, &weight).map_err(|e| e.at(name))
}

/// The float model with every quantized linear rounded instead.
pub(super) struct Rounded<'a> {
    model: &'a ModelState,
    weights: BTreeMap<String, QuantizedWeight>,
}

impl WeightSource for Rounded<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.weights.get(name.strip_suffix(".weight").unwrap_or(name)) {
            Some(weight) => Ok(weight.dequantize()),
            // Norms as the checkpoint has them: balancing is part of another method.
            None if name == self.model.config.embedding() => self.model.weight(name, shape),
            None => self.model.tuned_on(self.model.float()?).weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.model.contains(name)
    }

    fn overrides(&self, name: &str) -> bool {
        self.weights.contains_key(name)
    }
}

/// The tasks on the model that `source` holds, called `what`; `tap` acts on activations. What an interrupted
/// attempt has measured is not measured again.
fn measure(
    ctx: &StageContext<'_>,
    source: &dyn WeightSource,
    tap: &ModelTap,
    all: &[Measuring<'_>],
    what: &str,
) -> Result<Vec<Measured>> {
    let config = &ctx.model.config;
    let device = &ctx.device.device;
    let load = |source, tap| -> Result<CausalLm> {
        Ok(Loader { config, source, device, dtype: ctx.compute }.model()?.with_tap(tap))
    };
    // Loaded for the first task that is not measured yet.
    let (mut model, mut reference) = (None, None);
    let mut found = Vec::new();
    let mut screen = Terminal::new();
    for measuring in all {
        let (task, label) = (measuring.task.task(), measuring.label);
        let files = found::Files::new(ctx.run_dir, ctx.stage, label, what);
        let mut measured = measuring.measured(ctx, what);
        if let Some(known) = files.read(&measured) {
            found.push(known);
            continue;
        }
        if model.is_none() {
            model = Some(load(source, tap.clone())?);
        }
        if task.needs_reference() && reference.is_none() {
            reference = Some(load(ctx.model.float()?, ModelTap::default())?);
        }
        let Some(model) = &model else { continue };
        let beside = reference.as_ref().map(|model| -> &dyn Forward { model });
        let bench = Bench { device, stop: ctx.stop, reference: beside };
        let mut progress = |done, of| {
            let (verb, detail) = (format!("eval {label}"), what.to_owned());
            screen.emit(&Event::Progress { verb, done, of, detail });
        };
        let score = measuring.prepare(config, ctx.data)?.measure(&bench, model, &mut progress);
        measured.result = score.map_err(|error| error.at(place(measuring.task)))?;
        if what != FLOAT
            && let Some(float) = known_float(ctx, measuring.task)
        {
            let float = found::Files::new(ctx.run_dir, float.stage, label, FLOAT);
            task.compare(&mut measured.result, &float.samples());
        }
        files.write(&measured)?;
        found.push(measured);
    }
    screen.flush();
    Ok(found)
}

/// What a task goes by among all: with its number where another one goes by the same name.
fn label_of(all: &[TaskConfig], index: usize) -> String {
    let label = all[index].label();
    let before = all[..index].iter().filter(|other| other.label() == label).count();
    if before == 0 { label } else { format!("{label}-{}", before + 1) }
}

fn record(ctx: &mut StageContext<'_>, found: Vec<Measured>, all: &[Measuring<'_>]) {
    for (measured, measuring) in found.into_iter().zip(all) {
        record_one(ctx, measured, *measuring);
    }
}

fn record_one(ctx: &mut StageContext<'_>, mut measured: Measured, measuring: Measuring<'_>) {
    let task = measuring.task;
    let (what, result) = (&measured.what, &measured.result);
    let data = match ctx.data.validation.as_ref().filter(|_| measuring.is_on_text()) {
        Some(corpus) => corpus.name.clone(),
        None => measuring.files.name.clone(),
    };
    let ratio = known_float(ctx, task).filter(|_| what != FLOAT);
    let tag = |name: &str| {
        let known = task.task().numbers().iter().find(|number| number.name == name);
        known.map_or_else(String::new, |number| number.tag.to_owned())
    };
    let number = |(name, value): &(String, f64)| Number {
        name: name.clone(),
        tag: tag(name),
        value: *value,
    };
    let mut protocol = result.protocol.clone();
    let bos = protocol.remove("bos").and_then(|bos| bos.as_bool());
    ctx.report.emit(&Event::Evaluation {
        stage: ctx.stage,
        what: what.clone(),
        task: measuring.label.to_owned(),
        numbers: result.numbers.iter().map(number).collect(),
        tokens: result.tokens,
        protocol,
        marks: task.task().marks(result),
        bos: bos.unwrap_or(ctx.data.bos.is_some()),
        data,
        ratio_to_float: ratio
            .filter(|float| float.result.first() != 0.0) // of nothing right
            .map(|float| result.first() / float.result.first()),
        global_step: ctx.first_step,
        track: what.starts_with("after"),
    });
    measured.result.samples.clear();
    ctx.results.measured.push(measured);
}
