//! `evaluate`: the current model under one protocol, beside its baselines.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::{Corpus, Data};
use super::cost::{Cost, Scene};
use super::kind::Stage;
use super::results::Measured;
use super::state::{BASE, ModelState, Packed};
use crate::error::Result;
use crate::method::{self, MethodConfig, RtnConfig};
use crate::model::{Loader, ModelTap, WeightSource, weight_name};
use crate::quant::{GroupAxis, GroupLayout, QuantSpec, QuantizedWeight, Symmetry};
use crate::report::{Event, Reporter};
use crate::task::{self, Perplexity, PplConfig};

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

/// `task.NAME = { ... }`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskConfig {
    /// Perplexity on `[data.validation]`.
    Ppl(PplConfig),
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
        let TaskConfig::Ppl(task) = &self.task;
        let packed = corpus.stream.packed;
        let (context, stride) =
            task.protocol(&model.config, packed).map_err(|e| e.at("task.ppl"))?;
        corpus.stream.strided(context, stride).map_err(|e| e.at("data.validation"))?;
        Ok(())
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
        let TaskConfig::Ppl(task) = &self.task;
        // `samples` of the data is what a task measures that says nothing else.
        let samples = ctx.data.validation.as_ref().and_then(|corpus| corpus.samples);
        let task = &PplConfig { windows: task.windows.or(samples), ..task.clone() };
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
            let result = perplexity(ctx, &Packed(ctx.model), ctx.model.tap(), task)?;
            record(ctx, what, result, task);
        }
        Ok(())
    }
}

/// The float model's perplexity, measured once per protocol and run.
fn float(task: &PplConfig, ctx: &mut StageContext<'_>) -> Result<Perplexity> {
    if let Some(known) = known_float(ctx, task) {
        return Ok(known);
    }
    let result = perplexity(ctx, ctx.model.float()?, ModelTap::default(), task)?;
    record(ctx, "float".to_owned(), result.clone(), task);
    Ok(result)
}

fn known_float(ctx: &StageContext<'_>, task: &PplConfig) -> Option<Perplexity> {
    let measured = ctx.results.measured.iter();
    measured.filter(|m| m.what == "float" && m.task == *task).map(|m| m.result.clone()).next()
}

/// What rounding alone would give at these bits, activations treated alike: the price that learning
/// has to beat.
fn rtn(task: &PplConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let Some((baseline, what)) = rounded(ctx)? else { return Ok(()) };
    let result = perplexity(ctx, &baseline, ctx.model.tap(), task)?;
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

/// Perplexity of the model that `source` holds, on the validation data; `tap` acts on activations.
pub(super) fn perplexity(
    ctx: &StageContext<'_>,
    source: &dyn WeightSource,
    tap: ModelTap,
    task: &PplConfig,
) -> Result<Perplexity> {
    let corpus = validation(ctx)?;
    let config = &ctx.model.config;
    let device = &ctx.device.device;
    let model = Loader { config, source, device, dtype: ctx.compute }.model()?.with_tap(tap);
    task::measure(&model, config, &corpus.stream, task, device, ctx.stop, &mut |_, _| ())
}

pub(super) fn validation<'a>(ctx: &'a StageContext<'_>) -> Result<&'a Corpus> {
    Data::need(ctx.data.validation.as_ref(), "validation")
}

fn record(ctx: &mut StageContext<'_>, what: String, result: Perplexity, task: &PplConfig) {
    let corpus = ctx.data.validation.as_ref();
    let ratio = known_float(ctx, task).filter(|_| what != "float");
    ctx.report.emit(&Event::Evaluation {
        stage: ctx.stage,
        what: what.clone(),
        perplexity: result.perplexity,
        nll_per_token: result.nll_per_token,
        tokens: result.tokens,
        context: result.context,
        stride: result.stride,
        bos: ctx.data.bos.is_some(),
        completions_only: result.completions_only,
        data: corpus.map(|corpus| corpus.name.clone()).unwrap_or_default(),
        ratio_to_float: ratio.map(|float| result.perplexity / float.perplexity),
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
