//! `evaluate`: the current model under one protocol, beside its baselines.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::kind::Stage;
use super::results::Measured;
use super::state::{BASE, ModelState, Packed};
use crate::error::{Error, Result};
use crate::method::{self, MethodConfig, RtnConfig};
use crate::model::{Loader, ModelTap, WeightSource, weight_name};
use crate::quant::{GroupAxis, GroupLayout, QuantSpec, QuantizedWeight, Symmetry};
use crate::report::{Event, Number, Reporter};
use crate::task::{Bench, Score, TaskConfig};

/// Keys of `[stage.evaluate]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluateConfig {
    /// What is measured.
    pub task: TaskConfig,
    /// What is measured beside it, so that a number never stands alone; the float model unless
    /// said otherwise, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baselines: Option<Vec<Baseline>>,
}

/// Something to compare with.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The float model.
    Float,
    /// Round-to-nearest from the float weights, at the current bits and grouping.
    Rtn,
}

impl Stage for EvaluateConfig {
    fn check(&self) -> Result<()> {
        Ok(())
    }

    fn needs_float(&self) -> bool {
        self.baselines.as_ref().is_some_and(|all| !all.is_empty())
    }

    fn check_data(&self, model: &ModelState, data: &Data) -> Result<()> {
        let corpus = Data::need(data.validation.as_ref(), "validation")?;
        let at = |e: Error| e.at(format!("task.{}", self.task.name()));
        let task = self.task.task();
        task.window(&model.config, corpus.stream.packed).map_err(|refused| at(refused.error))?;
        task.check_text(&model.config, &corpus.stream).map_err(|e| e.at("data.validation"))
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let Some(corpus) = &scene.data.validation else { return Cost::default() };
        let models = 1 + self.baselines.as_ref().map_or(1, Vec::len) as u64;
        let weights = scene.linears + scene.rest;
        let tokens = corpus.stream.tokens.len() as u64 * models;
        Cost {
            device: 4 * weights + scene.tape(2048, 2048),
            seconds: scene.speed.seconds(2.0 * (weights * tokens) as f64, 0.0, 0.0),
            ..Cost::default()
        }
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let mut task = self.task.clone();
        // `samples` of the data is what a task measures that says nothing else.
        if let Some(samples) = ctx.data.validation.as_ref().and_then(|corpus| corpus.samples) {
            task.task_mut().limit(samples);
        }
        let task = &task;
        let baselines = match &self.baselines {
            Some(baselines) => baselines.clone(),
            None => ctx.model.float().map_or_else(|_| Vec::new(), |_| vec![Baseline::Float]),
        };
        for baseline in &baselines {
            match baseline {
                Baseline::Float => float(task, ctx).map(drop)?,
                Baseline::Rtn => rtn(task, ctx)?,
            }
        }
        let what = if ctx.model.quantized.is_empty() && ctx.model.tuned.is_empty() {
            "float".to_owned()
        } else if ctx.latest == BASE {
            BASE.to_owned()
        } else {
            format!("after {}", ctx.latest)
        };
        if what != "float" || baselines.is_empty() {
            let result = measure(ctx, &Packed(ctx.model), ctx.model.tap(), task)?;
            record(ctx, what, result, task);
        }
        Ok(())
    }
}

/// The float model's numbers, measured once per protocol and run.
fn float(task: &TaskConfig, ctx: &mut StageContext<'_>) -> Result<Score> {
    if let Some(known) = known_float(ctx, task) {
        return Ok(known);
    }
    let result = measure(ctx, ctx.model.float()?, ModelTap::default(), task)?;
    record(ctx, "float".to_owned(), result.clone(), task);
    Ok(result)
}

fn known_float(ctx: &StageContext<'_>, task: &TaskConfig) -> Option<Score> {
    let measured = ctx.results.measured.iter();
    measured.filter(|m| m.what == "float" && m.task == *task).map(|m| m.result.clone()).next()
}

/// What rounding alone would give at these bits, activations treated alike: the price that learning
/// has to beat.
fn rtn(task: &TaskConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let Some((baseline, what)) = rounded(ctx)? else { return Ok(()) };
    let result = measure(ctx, &baseline, ctx.model.tap(), task)?;
    record(ctx, what, result, task);
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
    for (name, (current, _)) in &ctx.model.quantized {
        baseline.weights.insert(name.clone(), round(ctx, name, current)?);
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

/// The task on the model that `source` holds and the validation data; `tap` acts on activations.
fn measure(
    ctx: &StageContext<'_>,
    source: &dyn WeightSource,
    tap: ModelTap,
    task: &TaskConfig,
) -> Result<Score> {
    let corpus = Data::need(ctx.data.validation.as_ref(), "validation")?;
    let config = &ctx.model.config;
    let device = &ctx.device.device;
    let model = Loader { config, source, device, dtype: ctx.compute }.model()?.with_tap(tap);
    let bench = Bench { config, text: &corpus.stream, device, stop: ctx.stop };
    task.task().measure(&bench, &model, &mut |_, _| ())
}

fn record(ctx: &mut StageContext<'_>, what: String, result: Score, task: &TaskConfig) {
    let corpus = ctx.data.validation.as_ref();
    let ratio = known_float(ctx, task).filter(|_| what != "float");
    let tags = task.task().numbers().iter().map(|number| number.tag);
    let numbers = tags
        .zip(&result.numbers)
        .map(|(tag, (name, value))| Number {
            name: name.clone(),
            tag: tag.to_owned(),
            value: *value,
        })
        .collect();
    ctx.report.emit(&Event::Evaluation {
        stage: ctx.stage,
        what: what.clone(),
        task: task.name().to_owned(),
        numbers,
        tokens: result.tokens,
        protocol: result.protocol.clone(),
        marks: task.task().marks(&result),
        bos: ctx.data.bos.is_some(),
        data: corpus.map(|corpus| corpus.name.clone()).unwrap_or_default(),
        ratio_to_float: ratio.map(|float| result.first() / float.first()),
        global_step: ctx.first_step,
        track: what.starts_with("after"),
    });
    ctx.results.measured.push(Measured {
        stage: ctx.stage,
        what,
        result,
        data_sha256: corpus.map(|corpus| corpus.sha256.clone()).unwrap_or_default(),
        task: task.clone(),
    });
}
