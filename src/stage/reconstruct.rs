//! `reconstruct`: block by block, each quantized block is fitted to the float block's output.
//!
//! For each block in order: the float block on the float stream gives the target; the quantized
//! block is trained on the quantized stream (the output of the already quantized blocks); its
//! codes are folded and saved; both streams move on. One block is resident at a time, and the
//! teacher block is released before the next one is read. Parameters and losses are f32 whatever
//! the model's type (methods-core 3.3 and 12).

use std::collections::BTreeMap;
use std::time::Instant;

use burn::module::Module;
use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::activations::Activations;
use super::{Data, ModelState, StageContext};
use crate::data::Order;
use crate::error::{Error, Result};
use crate::export::fewbit;
use crate::method::{self, MethodConfig};
use crate::model::{Block, CausalLm, Loader, Positions, WeightSource, block_prefix};
use crate::objective::{ObjectiveConfig, Reduction};
use crate::ops;
use crate::quant::{Bits, Grid, GroupSize, ObserverConfig, QuantizedWeight, Symmetry};
use crate::report::{Event, Reporter, memory};
use crate::train::{self, AdamWConfig, LearningRate, Optimizer, ScheduleConfig};

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
    /// Base learning rates.
    pub learning_rate: LearningRate,
    /// How the rate moves over a block's steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: AdamWConfig,
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
                "reconstruct compares block outputs, and objective.{} compares logits",
                self.objective.name()
            ))
            .fix("objective.mse = {}, or [stage.distill]"));
        }
        if self.batch == 0 {
            return Err(Error::usage("batch = 0").fix("batch = 2"));
        }
        if !self.method.learns() {
            return Err(Error::usage(format!("method.{} learns nothing", self.method.name()))
                .fix("method.flexround = {} here, or [stage.calibrate]"));
        }
        Ok(())
    }

    fn sum_sequence(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.reduction == Reduction::SequenceSum)
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
        let target = streams.target(ctx, index)?;
        let saved = ctx.block_file(index);
        let [before, after] = if saved.exists() {
            let (linears, metadata) = fewbit::read_linears(&saved)?;

            ctx.take(linears);
            streams.advance(ctx, index, target)?;
            metadata_mse(&metadata)
        } else {
            let (linears, before) = fit(config, ctx, index, &streams.quantized, &target)?;
            ctx.take(linears.clone());
            streams.advance(ctx, index, target)?;
            let mse = [before, streams.quantized.mse(&streams.float)];
            let extra = ["mse_before", "mse_after"].map(str::to_owned).into_iter();
            let extra = extra.zip(mse.map(|mse| format!("{mse:e}"))).collect();
            fewbit::write_linears(&saved, &linears, extra)?;
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
        let list = ctx.results.block_mse.entry(ctx.stage).or_default();
        list.truncate(index);
        list.push([before, after]);
    }
    ctx.report_codes();
    Ok(())
}

/// The errors that a block's checkpoint carries.
fn metadata_mse(metadata: &BTreeMap<String, String>) -> [f64; 2] {
    ["mse_before", "mse_after"]
        .map(|key| metadata.get(key).and_then(|text| text.parse().ok()).unwrap_or(f64::NAN))
}

/// Inputs of the next block, and where its positions are.
struct Streams {
    float: Activations,
    quantized: Activations,
    positions: Positions,
}

impl Streams {
    /// Both streams at the embedding's output.
    fn start(ctx: &StageContext<'_>) -> Result<Self> {
        let corpus = Data::need(ctx.data.calibration.as_ref(), "calibration")?;
        let length = corpus.length;
        let windows = match corpus.samples {
            Some(samples) => corpus.stream.spread(samples, length)?,
            None => (0..corpus.stream.windows(length)).collect(),
        };
        let device = &ctx.device.device;
        let embed = loader(ctx, &ctx.model.checkpoint).embed()?.val();
        let float = Activations::collect(windows.len(), |range| {
            let rows: Vec<&[u32]> =
                range.map(|i| corpus.stream.window(windows[i], length)).collect();
            let tokens = CausalLm::tokens(&rows, device);
            Ok(burn::tensor::module::embedding(embed.clone(), tokens))
        })?;
        Ok(Self {
            quantized: float.clone(),
            float,
            positions: Positions::new(&ctx.model.config, 0, length, DType::F32, device),
        })
    }

    /// The float block's output on the float stream; the block is gone when this returns.
    fn target(&self, ctx: &StageContext<'_>, index: usize) -> Result<Activations> {
        let teacher = loader(ctx, &ctx.model.checkpoint).block(index)?;
        self.forward(ctx, &teacher, &self.float)
    }

    /// Moves both streams behind block `index`: the float one is `target`, the quantized one goes
    /// through the block with its folded weights.
    fn advance(&mut self, ctx: &StageContext<'_>, index: usize, target: Activations) -> Result<()> {
        let baked = loader(ctx, ctx.model).block(index)?;
        self.quantized = self.forward(ctx, &baked, &self.quantized)?;
        self.float = target;
        Ok(())
    }

    fn forward(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        x: &Activations,
    ) -> Result<Activations> {
        x.map(&ctx.device.device, |x| {
            ctx.stop.check()?;
            Ok(block.forward(x, &self.positions))
        })
    }
}

fn loader<'a>(ctx: &'a StageContext<'_>, source: &'a dyn WeightSource) -> Loader<'a> {
    Loader { config: &ctx.model.config, source, device: &ctx.device.device, dtype: DType::F32 }
}

/// A block's quantized linears, with the method that made each, and its error at the start.
type Fitted = (Vec<(String, QuantizedWeight, String)>, f64);

/// Trains block `index` and folds it.
fn fit(
    config: &ReconstructConfig,
    ctx: &mut StageContext<'_>,
    index: usize,
    input: &Activations,
    target: &Activations,
) -> Result<Fitted> {
    let device = ctx.device.device.clone();
    let model: &ModelState = ctx.model;
    let length = Data::need(ctx.data.calibration.as_ref(), "calibration")?.length;
    let positions = Positions::new(&model.config, 0, length, DType::F32, &device);
    let mut student = loader(ctx, ctx.model).block(index)?;
    let prefix = block_prefix(index);
    for (name, linear) in student.linears_mut() {
        let name = format!("{prefix}.{name}");
        if ctx.specs.contains_key(&name) {
            ctx.attach(&name, linear, &config.method, DType::F32)?;
        }
    }
    let start_scales = scales(ctx, &prefix, &student)?;
    let before = input.map(&device, |x| Ok(student.forward(x, &positions)))?.mse(target);
    let mut student = student.train();
    let mut optimizer = Optimizer::new(&config.optimizer);
    let order = Order::new(
        ctx.seed,
        format!("stage {} block {index}", ctx.stage),
        input.len(),
        config.batch,
    )?;
    let rates = config.learning_rate;
    for step in 0..config.steps {
        ctx.stop.check()?;
        let batch = order.batch(step);
        let factor = config.schedule.factor(step, config.steps);
        let rate_of =
            |path: &str| method::role_of(path).map_or(0.0, |role| rates.of(role) * factor);
        let (trained, stats) = train::step(student, &mut optimizer, 1, &rate_of, |student, _| {
            let output = student.forward(input.batch(&batch, &device), &positions);
            let target = target.batch(&batch, &device);
            Ok(ops::block_mse(output, target, config.sum_sequence()))
        })
        .map_err(|e| e.at(format!("stage {}, block {index}, step {step}", ctx.stage)))?;
        student = trained;
        report_step(config, ctx, index, step, length, stats.loss);
    }
    let student = student.valid();
    report_scales(ctx, index, &prefix, &student, &start_scales, config.steps)?;
    let mut linears = Vec::new();
    for (name, linear) in student.linears() {
        let name = format!("{prefix}.{name}");
        if ctx.specs.contains_key(&name) {
            let folded = ctx.fold(&name, linear)?;
            linears.push((name, folded, config.method.name().to_owned()));
        }
    }
    Ok((linears, before))
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
        verb: format!("block {}/{}", index + 1, ctx.model.config.n_blocks),
        done: step + 1,
        of: config.steps,
        detail: format!("mse {loss:.3e}"),
    });
}

/// The steps of every quantized linear of a block, in order.
fn scales(ctx: &StageContext<'_>, prefix: &str, block: &Block) -> Result<Vec<f32>> {
    let mut all = Vec::new();
    for (name, linear) in block.linears() {
        if ctx.specs.contains_key(&format!("{prefix}.{name}"))
            && let Some(folded) = method::fold(&linear.weight)
        {
            let Grid::Uniform { scale, .. } = folded?.grid;
            all.extend(scale);
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
    let end = scales(ctx, prefix, block)?;
    let changes: Vec<f32> = end.iter().zip(start).map(|(end, start)| (end / start).ln()).collect();
    let step = ctx.first_step + steps * (index as u64 + 1);
    ctx.report_scale_change(&changes, step);
    Ok(())
}
