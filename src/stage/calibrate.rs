//! `calibrate`: quantization without learning, block by block.
//!
//! A method that looks at inputs sees what the already quantized blocks give (`inputs =
//! "quantized"`) or what the float model gives (`"float"`); statistics are taken with the block
//! itself still unquantized, and then its linears are solved in order of execution. Fixed grids of
//! activations are taken from each block with its quantized weights. A method that looks at the
//! weight alone needs no text; where the recipe has some, its block errors are reported too.

use std::time::Instant;

use burn::tensor::{Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::activations::Activations;
use super::solve_block::solve_block;
use super::streams::Streams;
use super::{StageContext, inputs, saved_mse, with_mse};
use crate::error::{Error, Result};
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig, Needs};
use crate::model::{WeightSource, weight_name};
use crate::quant::{Bits, GroupSize, ObserverConfig, Symmetry};
use crate::report::{Event, Reporter, memory};

/// Keys of `[stage.calibrate]`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrateConfig {
    /// A method that learns nothing.
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
    /// What enters a block while its inputs are observed: `"quantized"` or `"float"`.
    #[serde(default)]
    pub inputs: InputStream,
}

/// Which stream feeds the block that is being worked on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InputStream {
    /// The output of the quantized blocks before it.
    #[default]
    Quantized,
    /// The output of the float blocks before it: errors of earlier blocks are not seen (AdaDim's).
    Float,
}

impl CalibrateConfig {
    pub(super) fn check(&self) -> Result<()> {
        if self.method.learns() {
            return Err(Error::usage(format!(
                "calibrate learns nothing, and method.{} learns",
                self.method.name()
            ))
            .fix("method.rtn = {} here, or [stage.reconstruct]"));
        }
        Ok(())
    }

    /// Whether the method looks at calibration text.
    pub fn reads_text(&self) -> bool {
        self.method.needs() != Needs::Weight
    }
}

pub(super) fn run(config: &CalibrateConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    if ctx.data.calibration.is_some() || config.reads_text() {
        block_by_block(config, ctx)?;
    } else {
        let mut quantized = Vec::new();
        for index in 0..ctx.model.config.n_blocks {
            quantized.extend(round_block(config, ctx, index)?.linears);
        }
        ctx.save_linears(quantized)?;
    }
    ctx.report_codes();
    Ok(())
}

/// With calibration text: methods that look at inputs see them, static grids of activations are
/// taken, and every method reports its block errors.
fn block_by_block(config: &CalibrateConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let mut streams = Streams::start(ctx)?;
    for index in 0..ctx.model.config.n_blocks {
        ctx.stop.check()?;
        let start = Instant::now();
        let target = streams.target(ctx, index, &streams.float)?;
        let path = ctx.block_file(index);
        if path.exists() {
            let saved = Saved::read(&path)?;
            let mse = saved_mse(&saved);
            ctx.take(saved, &path)?;
            streams.advance(ctx, index, target)?;
            ctx.note_block(index, mse);
            continue;
        }
        let mut saved = if config.method.needs() == Needs::Weight {
            round_block(config, ctx, index)?
        } else {
            let input = match config.inputs {
                InputStream::Quantized => &streams.quantized,
                InputStream::Float => &streams.float,
            };
            progress(ctx, index, config.method.name());
            solve_block(&config.method, ctx, index, input, &streams.positions)?
        };
        ctx.take(saved.clone(), &path)?;
        inputs::calibrate(ctx, &streams, index, &mut saved)?;
        let mse = finish_block(ctx, index, &mut streams, target, start)?;
        saved.metadata = with_mse(saved.metadata, mse);
        saved.write(&path)?;
    }
    Ok(())
}

/// One block's linears by their weights alone.
fn round_block(
    config: &CalibrateConfig,
    ctx: &mut StageContext<'_>,
    index: usize,
) -> Result<Saved> {
    let mut saved = Saved::default();
    for (name, shape) in ctx.model.config.linear_shapes() {
        let of_block = ctx.model.config.block_of(&name) == Some(index);
        let Some(spec) = ctx.specs.get(&name).filter(|_| of_block) else { continue };
        ctx.stop.check()?;
        let values = ctx.model.weight(&weight_name(&name), &shape)?;
        let weight = Tensor::from_data(TensorData::new(values, shape), &ctx.device.device);
        let folded = spec
            .layout(shape)
            .and_then(|layout| {
                method::quantize(&config.method, spec, ctx.observer, layout, &weight)
            })
            .and_then(|weight| weight.with_scales(ctx.scales))
            .map_err(|e| e.at(&name))?;
        progress(ctx, index, &name);
        saved.linears.push((name, folded, config.method.name().to_owned()));
    }
    Ok(saved)
}

/// Moves the streams behind a quantized block, and reports its errors: with its float weights, that
/// is, what the blocks before it leave, and with its quantized ones.
fn finish_block(
    ctx: &mut StageContext<'_>,
    index: usize,
    streams: &mut Streams,
    target: Activations,
    start: Instant,
) -> Result<[f64; 2]> {
    let before = streams.target(ctx, index, &streams.quantized)?.mse(&target);
    streams.advance(ctx, index, target)?;
    let mse = [before, streams.quantized.mse(&streams.float)];
    ctx.report.emit(&Event::Block {
        stage: ctx.stage,
        index,
        of: ctx.model.config.n_blocks,
        verb: "calibrate".to_owned(),
        mse_before: mse[0],
        mse_after: mse[1],
        steps: 0,
        seconds: start.elapsed().as_secs_f64(),
        memory_gib: memory::peak_gib(),
    });
    ctx.note_block(index, mse);
    Ok(mse)
}

fn progress(ctx: &mut StageContext<'_>, block: usize, detail: &str) {
    ctx.report.emit(&Event::Progress {
        verb: "calibrate".to_owned(),
        done: block as u64,
        of: ctx.model.config.n_blocks as u64,
        detail: detail.to_owned(),
    });
}
