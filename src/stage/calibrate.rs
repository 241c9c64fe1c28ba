//! `calibrate`: quantization without learning, block by block.
//!
//! A method that looks at inputs sees what the already quantized blocks give (`inputs =
//! "quantized"`) or what the float model gives (`"float"`); statistics are taken with the block
//! itself still unquantized, and then its linears are solved in order of execution. Fixed grids of
//! activations are taken from each block with its quantized weights. A method that looks at the
//! weight alone needs no text; where the recipe has some, its block errors are reported too.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::activations::{Activations, StreamType, samples_per_pass};
use super::context::{StageContext, block_file, saved_mse, with_mse};
use super::corpus::Data;
use super::cost::{Cost, Lever, Scene, pass_bytes};
use super::inputs;
use super::kind::{Before, Effect, Stage, codes};
use super::memory::Memory;
use super::solve_block::solve_block;
use super::state::ModelState;
use super::streams::{STREAM_PLACES, Streams, check_memory};
use super::visits::Visits;
use crate::error::{Error, Result};
use crate::exhausted;
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig, Needs};
use crate::model::{WeightSource, weight_name};
use crate::quant::{Bits, GroupSize, ObserverConfig, Repr, Symmetry};
use crate::report::{Event, Reporter, memory};

/// Keys of `[stage.calibrate]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
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
    /// Where the hidden states of the calibration set are kept: `"host"`, main memory, or `"disk"`, a file in
    /// the run's folder; the same numbers from each. Absent: main memory where there is room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// The type they are kept in: `"f32"` or `"bf16"`, half the room and other numbers.
    #[serde(default, skip_serializing_if = "StreamType::is_default")]
    pub streams: StreamType,
}

/// Which stream feeds the block that is being worked on.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InputStream {
    /// The output of the quantized blocks before it.
    #[default]
    Quantized,
    /// The output of the float blocks before it: errors of earlier blocks are not seen (AdaDim's).
    Float,
}

impl CalibrateConfig {
    /// Seconds by what a probe measured, with so many tokens of calibration.
    fn seconds(&self, scene: &Scene<'_>, tokens: u64) -> Option<f64> {
        let blocks = scene.config().n_blocks as f64;
        let rounded = scene.rounding(&self.method)? * blocks;
        if tokens == 0 {
            return Some(rounded + scene.load(scene.linears)?);
        }
        let length = scene.calibration()?.1;
        // Target, error, and behind the block; what is observed; then one for each way to balance.
        let looks = u64::from(self.reads_text()) as f64;
        let tried = self.method.balance_exponents().len() as f64;
        let passes = 3.0 + looks + tried;
        let pass = scene.pass(length)? * tokens as f64 * blocks;
        Some(passes * pass + rounded * tried.max(1.0) + 4.0 * scene.load(scene.linears)?)
    }

    /// Whether the method looks at calibration text.
    fn reads_text(&self) -> bool {
        self.method.needs() != Needs::Weight
    }
}

impl Stage for CalibrateConfig {
    fn check(&self) -> Result<()> {
        check_memory(self.memory)?;
        if self.method.learns() {
            return Err(Error::usage(format!(
                "calibrate learns nothing, and method.{} learns",
                self.method.name()
            ))
            .fix("method.rtn = {} here, or [stage.reconstruct]"));
        }
        Ok(())
    }

    fn effect(&self) -> Effect<'_> {
        codes!(self)
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        match before.repr {
            Repr::Dense => Ok(()),
            Repr::Uniform | Repr::BinaryCoding | Repr::Codebook => Err(Error::usage(
                "calibrate needs float weights, and they are quantized already",
            )
            .fix("stage.reconstruct or stage.distill here, or a float model and this stage first")),
        }
    }

    fn summary(&self, spec: &str) -> String {
        format!("{}, {spec}", self.method.name())
    }

    fn calibrates(&self) -> bool {
        true
    }

    fn check_data(&self, model: &ModelState, data: &Data) -> Result<()> {
        if model.activations.quant.fixed().is_none() && !self.reads_text() {
            return Ok(());
        }
        data.check_calibration()
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let config = scene.config();
        let d_model = config.d_model as u64;
        // Those of the block with the most, each site once.
        let sites = |index| {
            let specs = config.specs(index).iter();
            specs.map(|spec| (spec.site(), spec.shape[1] as u64)).collect::<BTreeMap<_, _>>()
        };
        let all = (0..config.n_blocks).map(sites).max_by_key(BTreeMap::len).unwrap_or_default();
        let widest = all.values().copied().max().unwrap_or(0);
        // A token goes to some of the experts only.
        let read = config.arch.experts.as_ref().map_or(usize::MAX, |experts| experts.active);
        let seen = all.iter().filter(|(site, _)| site.expert().is_none_or(|at| at < read));
        let inputs: u64 = seen.map(|(_, width)| *width).sum();
        let stream = scene.stream(self.streams.size());
        let on_disk = self.memory == Some(Memory::Disk);
        let streams = 2 + u64::from(self.inputs == InputStream::Float);
        // The moments at every site of a block in f64, and what a solver makes of one of them.
        let moments = 8 * all.values().map(|width| width * width).sum::<u64>();
        // The inputs of every site, and a module's output.
        let per_token = self.streams.size() * (inputs + d_model);
        let kept = scene.calibration().map_or(0, |(samples, length)| samples * length * per_token);
        // Of the linear that is worked on; f64 where its errors are made good.
        let (solved, kept) = match self.method.needs() {
            Needs::Weight => (28 * scene.widest, 0),
            // What is left, its gradient, and what both are made of.
            Needs::Moments if self.method.leaves() == Repr::Codebook => {
                (moments + 20 * widest * widest + 36 * scene.widest, 0)
            }
            Needs::Moments => (moments + 16 * (widest * widest + scene.widest), 0),
            Needs::Outputs => (moments + 28 * scene.widest, kept),
        };
        let (samples, length) = scene.calibration().unwrap_or_default();
        let pass = (samples_per_pass(length as usize) as u64).min(samples) * length;
        let waits = streams * stream + kept;
        let moments = if self.method.needs() == Needs::Weight { 0 } else { moments };
        let work = if samples == 0 {
            solved
        } else {
            let passing = 8 * scene.block + moments + pass_bytes(config, pass);
            let solving = solved + if self.reads_text() { 4 * scene.block } else { 0 };
            passing.max(solving).max(scene.entrance())
        };
        Cost {
            device: work,
            host: if on_disk { 12 * pass * d_model } else { waits },
            disk: scene.codes + if on_disk { waits } else { 0 },
            seconds: self.seconds(scene, samples * length).unwrap_or_else(|| {
                let flops = 8.0 * (scene.linears * samples * length) as f64;
                scene.speed.seconds(flops, scene.linears as f64 * 40.0, 0.0)
            }),
            lever: (samples > 0).then(|| Lever {
                key: "data.calibration.samples",
                value: samples,
                bytes: if on_disk { 0 } else { waits / samples },
            }),
        }
    }

    fn memory(&mut self) -> Option<&mut Option<Memory>> {
        Some(&mut self.memory)
    }

    fn places(&self) -> &'static [Memory] {
        &STREAM_PLACES
    }

    fn neutralize(&mut self) {
        self.memory = None;
    }

    fn has_saved(&self, dir: &Path) -> bool {
        block_file(dir, 0).exists()
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        if ctx.data.calibration.is_some() || self.reads_text() {
            block_by_block(self, ctx)?;
        } else {
            let blocks = 0..ctx.model.config.n_blocks;
            let rounded: Vec<Saved> =
                blocks.map(|index| round_block(self, ctx, index)).collect::<Result<_>>()?;
            for (index, saved) in rounded.into_iter().enumerate() {
                if !saved.linears.is_empty() {
                    ctx.save_block(index, saved)?;
                }
            }
        }
        ctx.report_codes(ctx.model.config.n_blocks.saturating_sub(1) as u64);
        Ok(())
    }

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        ctx.restore_linears()
    }
}

/// With calibration text: methods that look at inputs see them, static grids of activations are
/// taken, and every method reports its block errors.
fn block_by_block(config: &CalibrateConfig, ctx: &mut StageContext<'_>) -> Result<()> {
    let mut streams = Streams::start(ctx, config.memory, config.streams)?;
    let float_stays = config.inputs == InputStream::Float;
    let blocks = ctx.model.config.n_blocks;
    let saved = (0..blocks).take_while(|index| ctx.block_file(*index).exists()).count();
    if let Some(last) = saved.checked_sub(1) {
        let mark = ctx.block_mark(last);
        ctx.say_resumed("calibrate", format!("block {saved}/{blocks}"), &mark);
    }
    for index in 0..blocks {
        ctx.stop.check()?;
        exhausted::part(&format!("block {index}"));
        let start = Instant::now();
        let target = streams.target(ctx, index, float_stays)?;
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
            solve_block(&config.method, ctx, index, input, &streams.places)?
        };
        ctx.take(saved.clone(), &path)?;
        inputs::calibrate(ctx, &streams, index, &mut saved)?;
        let mse = finish_block(ctx, index, &mut streams, target, start)?;
        saved.metadata = with_mse(saved.metadata, mse);
        ctx.report.emit(&Event::Saved { mark: ctx.block_mark(index) });
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
    let visits = Visits::default();
    let before = streams.float_error(ctx, index, &target, &visits)?;
    visits.report(ctx, index);
    streams.advance(ctx, index, target)?;
    let mse = [before, streams.quantized.mse(&streams.float)?];
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
