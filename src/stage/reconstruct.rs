//! `reconstruct`: block by block, each quantized block is fitted to the float block's output.
//!
//! For each block in order: the float block on the float stream gives the target; the quantized
//! block is trained on the quantized stream (the output of the already quantized blocks), or on a
//! random mixture of both streams; its codes are folded and saved; both streams move on. One block
//! is resident at a time, and the teacher block is released before the next one is read. Parameters
//! and losses are f32 whatever the model's type.
//!
//! A method that learns the grids of codes (`method.aqlm_ft`, `e2e_qp`, `peqa`, `alphatuning`) leaves the
//! codes of an earlier stage as they are, packed, and fits scales and codebooks alone: AQLM's block
//! fine-tuning (arXiv 2401.06118, 3.3).
//!
//! With `within = "staged"` a block is fitted in three pieces, one after the other and each with all
//! the steps: queries and keys by themselves, values and output by the residual stream behind
//! attention, the MLP by the block's output. A piece computes no more than it needs: three of them
//! cost less than three passes over the block. What it is worth: docs/two-bits.md.
//!
//! Activations on fixed grids are quantized in training, and the grids learn together with the
//! weights; grids that are chosen for each token are left out of it.

mod descent;
mod fit;
mod keys;
mod task;

use std::path::Path;
use std::time::Instant;

use self::descent::Halfway;
use self::fit::Fit;
pub use self::keys::{ReconstructConfig, Within};
use super::activations::samples_per_pass;
use super::context::{StageContext, block_file, saved_mse, with_mse};
use super::corpus::Data;
use super::cost::{Cost, Lever, Scene, pass_bytes, trained};
use super::keys::{check_latents, check_rate_unit};
use super::kind::{Before, Effect, Judged, Stage, codes};
use super::memory::Memory;
use super::state::ModelState;
use super::states::{self, States, has_states, remove_states};
use super::streams::{STREAM_PLACES, Streams, check_memory};
use super::validate::ValidateConfig;
use crate::error::{Error, Result};
use crate::exhausted;
use crate::export::fewbit::Saved;
use crate::model::Residual;
use crate::objective::ObjectiveConfig;
use crate::report::{Event, Reporter, memory};

impl Stage for ReconstructConfig {
    fn check(&self) -> Result<()> {
        if !matches!(self.objective, ObjectiveConfig::Mse(_)) {
            return Err(Error::usage(format!(
                "reconstruct compares block outputs, and its objective, {}, compares logits",
                self.objective.name()
            ))
            .fix("objective.mse = {}, or [stage.distill]"));
        }
        check_rate_unit(self.rate_unit, &self.optimizer)?;
        check_latents(&self.optimizer, "reconstruct")?;
        check_memory(self.memory)?;
        if self.batch == 0 {
            return Err(Error::usage("batch = 0").fix("batch = 2"));
        }
        if let Some(prob) = self.input_prob
            && !(0.0..=1.0).contains(&prob)
        {
            return Err(Error::usage(format!("input_prob = {prob} is not in 0..=1"))
                .fix("input_prob = 1.0: the quantized stream alone"));
        }
        if !self.method.learns() {
            return Err(Error::usage(format!("method.{} learns nothing", self.method.name()))
                .fix("method.flexround = {} here, or [stage.calibrate]"));
        }
        Ok(())
    }

    fn effect(&self) -> Effect<'_> {
        codes!(self)
    }

    fn follows(&self, before: &Before<'_>) -> Result<()> {
        if self.quantize_activations == Some(true) && !before.activations.is_on() {
            return Err(Error::usage(
                "quantize_activations = true, and the recipe leaves them float",
            )
            .fix("quant.activations.scheme = \"tensor\" or \"token\""));
        }
        let beside = before.model.arch.residual == Residual::Parallel;
        if self.within == Within::Staged && beside {
            return Err(Error::usage(format!(
                "within = \"staged\" fits attention before the MLP, and in a {} they stand side by side",
                before.model.model_type
            ))
            .fix("within = \"block\""));
        }
        Ok(())
    }

    fn summary(&self, spec: &str) -> String {
        format!("{}, {spec}", self.method.name())
    }

    fn calibrates(&self) -> bool {
        true
    }

    fn takes_latents(&self) -> bool {
        self.method.tunes().is_none()
    }

    fn needs_float(&self) -> bool {
        true
    }

    fn check_data(&self, _model: &ModelState, data: &Data) -> Result<()> {
        data.check_calibration()
    }

    fn steps(&self, blocks: usize) -> u64 {
        self.steps * blocks as u64
    }

    fn cost(&self, scene: &Scene<'_>) -> Cost {
        let Some((samples, length)) = scene.calibration() else { return Cost::default() };
        let config = scene.config();
        let tokens = self.batch as u64 * length;
        let pieces = self.within.pieces().len() as u64;
        let steps = (self.steps(config.n_blocks) * pieces) as f64;
        let flops = 6.0 * (scene.block * tokens) as f64 * steps
            + 6.0 * (scene.linears * samples * length) as f64;
        let moved = steps * (scene.block * 4 * 40 + scene.tape(tokens, length) * 3) as f64;
        // The quantized stream and the target; the float stream where it is looked at; what lies between
        // pieces; the float block's output on the quantized stream.
        let float = u64::from(self.reads_float(scene.model.activations.quant));
        let between = if self.within == Within::Staged { 2 } else { 0 };
        let streams = 2 + float + between + u64::from(self.augmented());
        let all = streams * scene.stream(self.streams.size());
        let on_disk = self.memory == Some(Memory::Disk);
        // A batch of each, the next ones, and the bytes of one.
        let batches = (8 * streams + 4) * tokens * config.d_model as u64;
        let each = if on_disk { 0 } else { all / samples.max(1) };
        let pass = (samples_per_pass(length as usize) as u64).min(samples) * length;
        let best = if self.keep_best { 4 * scene.block } else { 0 };
        let fitted = trained(scene.block, &self.method, &self.optimizer, scene.discrete) + best;
        let work = (fitted + scene.tape(tokens, length))
            .max(8 * scene.block + pass_bytes(config, pass))
            .max(scene.entrance());
        let judged = scene.data.validation.is_some();
        let judged = if judged { scene.measuring(1024, true) } else { 0 };
        Cost {
            device: work.max(judged.saturating_sub(if on_disk { 0 } else { all })),
            host: if on_disk { batches } else { all },
            disk: scene.codes
                + states::bytes(scene.block, &self.optimizer, self.states(pieces))
                + if on_disk { all } else { 0 },
            seconds: (self.seconds(scene, [samples, length], steps))
                .unwrap_or_else(|| scene.speed.seconds(flops, moved, steps)),
            lever: Some(Lever { key: "data.calibration.samples", value: samples, bytes: each }),
        }
    }

    fn judged(&self) -> Option<Judged<'_>> {
        Some(Judged {
            validate: None,
            allow_worse: self.allow_worse,
            advice: "a smaller learning_rate, more steps; or ",
        })
    }

    fn neutralize(&mut self) {
        self.allow_worse = false;
        self.checkpoint_every = keys::five_hundred();
        self.keep = super::keys::two();
        self.memory = None;
    }

    fn memory(&mut self) -> Option<&mut Option<Memory>> {
        Some(&mut self.memory)
    }

    fn places(&self) -> &'static [Memory] {
        &STREAM_PLACES
    }

    fn has_saved(&self, dir: &Path) -> bool {
        block_file(dir, 0).exists() || has_states(dir)
    }

    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        let mut streams = Streams::start(ctx, self.memory, self.streams)?;
        let float_stays = self.reads_float(ctx.model.activations.quant);
        let blocks = ctx.model.config.n_blocks;
        let mut states = States::of(ctx.dir, self.keep)?;
        let mut halfway = self.go_on(ctx, &states)?;
        for index in 0..blocks {
            ctx.stop.check()?;
            exhausted::part(&format!("block {index}"));
            let start = Instant::now();
            let target = streams.target(ctx, index, float_stays)?;
            let path = ctx.block_file(index);
            let mse = if path.exists() {
                let saved = Saved::read(&path)?;
                let mse = saved_mse(&saved);
                ctx.take(saved, &path)?;
                streams.advance(ctx, index, target)?;
                mse
            } else {
                let fit = Fit::new(self, ctx, index, &streams, &target);
                let (mut saved, before) = fit.run(ctx, &mut states, halfway.take())?;
                ctx.take(saved.clone(), &path)?;
                streams.advance(ctx, index, target)?;
                let mse = [before, streams.quantized.mse(&streams.float)?];
                saved.metadata = with_mse(saved.metadata, mse);
                ctx.report.emit(&Event::Block {
                    stage: ctx.stage,
                    index,
                    of: blocks,
                    verb: "reconstruct".to_owned(),
                    mse_before: mse[0],
                    mse_after: mse[1],
                    steps: self.steps * self.within.pieces().len() as u64,
                    seconds: start.elapsed().as_secs_f64(),
                    memory_gib: memory::peak_gib(),
                });
                ctx.report.emit(&Event::Saved { mark: ctx.block_mark(index) });
                saved.write(&path)?;
                states.finish()?;
                remove_states(ctx.dir)?;
                mse
            };
            ctx.note_block(index, mse);
        }
        ctx.report_codes(blocks.saturating_sub(1) as u64);
        Ok(())
    }

    fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        ctx.restore_linears()
    }
}

impl ReconstructConfig {
    /// Seconds by what a probe measured.
    fn seconds(&self, scene: &Scene<'_>, [samples, length]: [u64; 2], steps: f64) -> Option<f64> {
        let blocks = scene.config().n_blocks as f64;
        let tokens = self.batch as u64 * length;
        let step = scene.step(&self.method, &self.optimizer, [length, tokens])?.at(tokens);
        // Target, error, and behind the block.
        let passes = 3.0 + if self.within == Within::Staged { 3.0 } else { 0.0 };
        let passes = passes + u64::from(self.augmented()) as f64;
        let passes = passes * scene.pass(length)? * (samples * length) as f64 * blocks;
        let own = scene.rounding(&self.method)? * blocks + 3.0 * scene.load(scene.linears)?;
        // A piece computes about half of what the block does.
        let piece = if self.within == Within::Staged { 0.6 } else { 1.0 };
        Some(steps * step * piece + passes + own + scene.judging(&ValidateConfig::default(), 0)?)
    }

    /// States on the disk at once, of a block in so many pieces.
    fn states(&self, pieces: u64) -> u64 {
        let saved = self.steps.saturating_sub(1) / self.checkpoint_every.max(1);
        if saved == 0 && pieces == 1 { 0 } else { saved.min(self.keep as u64) + 1 }
    }

    /// Says from where an interrupted stage goes on; gives the state in the middle of a block, if that
    /// is where.
    fn go_on(&self, ctx: &mut StageContext<'_>, states: &States) -> Result<Option<Halfway>> {
        let blocks = ctx.model.config.n_blocks;
        let saved = (0..blocks).take_while(|index| ctx.block_file(*index).exists()).count();
        let (mut mark, mut position) = (String::new(), format!("block {saved}/{blocks}"));
        if let Some(last) = saved.checked_sub(1) {
            mark = ctx.block_mark(last);
        }
        let found = if saved < blocks { states.newest()? } else { None };
        let mut halfway = None;
        if let Some(found) = &found {
            halfway = Halfway::of(&found.state, saved)?;
            if let Some(Halfway { course, .. }) = &halfway {
                mark.clone_from(&found.mark);
                let step = course.step + course.piece as u64 * self.steps;
                let steps = self.steps * self.within.pieces().len() as u64;
                position = format!("{position}, step {step}/{steps}");
            }
        }
        if !mark.is_empty() {
            ctx.say_resumed("reconstruct", position, &mark);
        }
        if let Some(found) = found {
            found.warn(ctx.report);
        }
        Ok(halfway)
    }
}
