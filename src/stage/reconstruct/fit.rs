//! One block fitted to the float block's output, at once or piece by piece.

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::Module;
use burn::tensor::DType;

use super::descent::{Descent, Halfway};
use super::keys::ReconstructConfig;
use super::task::Task;
use crate::error::Result;
use crate::export::activations::{self, InputGrids};
use crate::export::fewbit::{Saved, latent_names};
use crate::method;
use crate::model::{Block, LinearSpec};
use crate::quant::ActivationQuant;
use crate::stage::activations::Activations;
use crate::stage::context::StageContext;
use crate::stage::inputs::{self, Piece, StaticInputs, Student};
use crate::stage::start::Beginning;
use crate::stage::states::States;
use crate::stage::streams::{Streams, float_block, loader};
use crate::stage::visits::Visits;
use crate::train::LatentsIn;

/// The steps of a piece, and what they start from.
struct Fitting<'a, 'd> {
    descent: &'a mut Descent<'d>,
    /// Makes the student anew.
    again: &'a dyn Fn(&StageContext<'_>) -> Result<Student>,
    /// Where the learned grids start.
    grids: &'a InputGrids,
}

/// The training of one block.
pub(super) struct Fit<'a> {
    config: &'a ReconstructConfig,
    index: usize,
    streams: &'a Streams,
    /// The float block's output on the float stream.
    target: &'a Activations,
    /// What training does to activations.
    quant: ActivationQuant,
    /// Share of the input entries from the quantized stream.
    input_prob: f64,
}

impl<'a> Fit<'a> {
    pub(super) fn new(
        config: &'a ReconstructConfig,
        ctx: &StageContext<'_>,
        index: usize,
        streams: &'a Streams,
        target: &'a Activations,
    ) -> Self {
        let quant = config.activations(ctx.model.activations.quant);
        let input_prob = config.share_of_quantized(quant);
        Self { config, index, streams, target, quant, input_prob }
    }

    /// The block's quantized linears with the grids of its inputs, and its error at the start. `halfway`
    /// is a state in the middle of it to go on from.
    pub(super) fn run(
        &self,
        ctx: &mut StageContext<'_>,
        states: &mut States,
        halfway: Option<Halfway>,
    ) -> Result<(Saved, f64)> {
        let config = self.config;
        let prefix = ctx.model.config.block_prefix(self.index);
        let block = self.block(ctx, &Saved::default())?;
        let start = coarseness(ctx, &prefix, &block)?;
        let grids = inputs::observe(ctx, self.streams, &block)?;
        let (quant, visits) = (ctx.model.activations.quant, Visits::default());
        let tap = |site, x| {
            visits.count(site, &x);
            activations::quantize(&quant, &grids, site, x)
        };
        let before = self.streams.error(ctx, &block, &tap, self.target)?;
        visits.report(ctx, self.index);
        let device = &ctx.device.device;
        let learned = self.quant.fixed();
        let learned = learned.and_then(|bits| StaticInputs::new(&grids, bits, device));
        let mut saved = Saved::default();
        let mut student = Student { block, inputs: learned };
        // What lies between the pieces, on the float stream.
        let mut attended = Activations::none(self.streams.quantized.keeping());
        let (mut at, mut state) =
            halfway.map(|h| (Some(h.course.piece), Some(h))).unwrap_or_default();
        for (number, piece) in config.within.pieces().iter().enumerate() {
            let quantized =
                |spec: &LinearSpec| ctx.specs.contains_key(&format!("{prefix}.{}", spec.name));
            // Queries and keys of a fused matrix are fitted with the values.
            if !student.block.specs().any(|spec| piece.holds(spec.role) && quantized(spec)) {
                continue;
            }
            if at.is_some_and(|at| number < at) {
                let file = states.pieces_file();
                self.take_piece(ctx, *piece, &file, &mut student.block, &mut saved)?;
                continue;
            }
            let mut descent =
                Descent::new(config, number, states, state.take_if(|_| at == Some(number)));
            // What makes it again; the grids that learn are a few numbers.
            let learned = student.inputs.clone();
            let again = |ctx: &StageContext<'_>| {
                let block = self.block(ctx, &saved)?;
                Ok(Student { block, inputs: learned.clone() }.train())
            };
            let fitting = Fitting { descent: &mut descent, again: &again, grids: &grids };
            student = self.fit(ctx, *piece, student, &mut attended, fitting)?;
            at = None;
            self.keep(ctx, *piece, &mut student.block, &mut saved)?;
            if number + 1 < config.within.pieces().len() {
                // Before any state of the next piece.
                saved.write(&states.pieces_file())?;
            }
        }
        let Student { block, inputs } = student;
        self.report_scales(ctx, &saved, &start);
        let grids = match inputs {
            Some(learned) => learned.grids()?,
            None => inputs::observe(ctx, self.streams, &block)?,
        };
        activations::store(&ctx.model.config, self.index, &grids, &mut saved.dense);
        Ok((saved, before))
    }

    /// The block with the method, or the codes that it tunes, on every linear of the plan but those that are
    /// fitted already.
    fn block(&self, ctx: &StageContext<'_>, fitted: &Saved) -> Result<Block> {
        let prefix = ctx.model.config.block_prefix(self.index);
        let mut block = loader(ctx, ctx.model).block(self.index)?;
        for (name, linear) in block.linears_mut() {
            let name = format!("{prefix}.{name}");
            let done = fitted.linears.iter().find(|(fitted, ..)| *fitted == name);
            if let Some((_, codes, _)) = done {
                ctx.set_weight(linear, codes.dequantize());
            } else if ctx.specs.contains_key(&name) {
                let Self { config, .. } = self;
                let types = (DType::F32, LatentsIn::F32);
                let beginning = Beginning::at(config.start_from);
                ctx.attach(&name, linear, &config.method, beginning, types)?;
            }
        }
        Ok(block)
    }

    /// Fits one piece of the block.
    fn fit(
        &self,
        ctx: &mut StageContext<'_>,
        piece: Piece,
        student: Student,
        attended: &mut Activations,
        fitting: Fitting<'_, '_>,
    ) -> Result<Student> {
        let Fitting { descent, again, grids } = fitting;
        let streams = self.streams;
        if piece == Piece::Whole && !self.config.augmented() {
            let (quantized, float) = (&streams.quantized, &streams.float);
            let target = self.target;
            let task = self.task(piece, quantized, float, target);
            return descent.run(ctx, &task, student.train(), again, grids);
        }
        let float_block = float_block(ctx, self.index)?;
        let through = |x: &Activations, piece: Piece, block: &Block| {
            x.map(&ctx.device.device, |x, samples| {
                ctx.stop.check()?;
                Ok(piece.forward(block, x, &streams.places.of(samples), &|_, x| x))
            })
        };
        let mut quantized = &streams.quantized;
        let (behind, target);
        let (float, target) = match piece {
            Piece::Whole => (&streams.float, self.target),
            Piece::Scores => {
                target = through(&streams.float, piece, &float_block)?;
                (&streams.float, &target)
            }
            Piece::Attention => {
                *attended = through(&streams.float, piece, &float_block)?;
                (&streams.float, &*attended)
            }
            Piece::Mlp => {
                if attended.is_empty() {
                    // Of a block that goes on behind its attention.
                    *attended = through(&streams.float, Piece::Attention, &float_block)?;
                }
                behind = streams.quantized.map(&ctx.device.device, |x, samples| {
                    ctx.stop.check()?;
                    let positions = streams.places.of(samples);
                    Ok(student.forward(Piece::Attention, x, &positions, self.quant))
                })?;
                quantized = &behind;
                (&*attended, self.target)
            }
        };
        let augmented = self.config.augmented();
        let augmented = augmented.then(|| through(quantized, piece, &float_block)).transpose()?;
        drop(float_block);
        let task = Task { augmented, ..self.task(piece, quantized, float, target) };
        descent.run(ctx, &task, student.train(), again, grids)
    }

    fn task<'t>(
        &'t self,
        piece: Piece,
        quantized: &'t Activations,
        float: &'t Activations,
        target: &'t Activations,
    ) -> Task<'t> {
        let Self { config, index, streams, quant, input_prob, .. } = *self;
        let (places, augmented) = (&streams.places, None);
        Task {
            config,
            index,
            piece,
            quantized,
            float,
            target,
            augmented,
            places,
            quant,
            input_prob,
        }
    }

    /// Takes what a piece was fitted to before the block was interrupted.
    fn take_piece(
        &self,
        ctx: &StageContext<'_>,
        piece: Piece,
        file: &Path,
        block: &mut Block,
        saved: &mut Saved,
    ) -> Result<()> {
        let prefix = ctx.model.config.block_prefix(self.index);
        let mut found = Saved::read(file)?;
        let config = block.config.clone();
        for (spec, linear) in config.specs(self.index).iter().zip(&mut block.linears) {
            let full = format!("{prefix}.{}", spec.name);
            let at = found.linears.iter().position(|(name, ..)| *name == full);
            let Some(at) = at.filter(|_| piece.holds(spec.role)) else { continue };
            for name in latent_names(&full) {
                saved.latents.extend(found.latents.remove_entry(&name));
            }
            let linear_of = found.linears.swap_remove(at);
            ctx.set_weight(linear, linear_of.1.dequantize());
            saved.linears.push(linear_of);
        }
        Ok(())
    }

    /// Folds the linears of a piece that has been fitted; the block goes on with what they stand for.
    fn keep(
        &self,
        ctx: &mut StageContext<'_>,
        piece: Piece,
        block: &mut Block,
        saved: &mut Saved,
    ) -> Result<()> {
        let prefix = ctx.model.config.block_prefix(self.index);
        let config = block.config.clone();
        for (spec, linear) in config.specs(self.index).iter().zip(&mut block.linears) {
            let full = format!("{prefix}.{}", spec.name);
            if piece.holds(spec.role) && ctx.specs.contains_key(&full) {
                let folded = ctx.fold(&full, linear)?;
                saved.latents.extend(ctx.latents_of(&full, linear, LatentsIn::F32));
                ctx.set_weight(linear, folded.dequantize());
                saved.linears.push((full, folded, self.config.method.name().to_owned()));
            }
        }
        Ok(())
    }

    /// How far the grids moved from `start`.
    fn report_scales(&self, ctx: &mut StageContext<'_>, saved: &Saved, start: &Coarseness) {
        let changes: Vec<f32> = (saved.linears.iter())
            .flat_map(|(name, end, _)| {
                let start = start.get(name).into_iter().flatten();
                end.grid.coarseness().into_iter().zip(start).map(|(end, start)| (end / start).ln())
            })
            .collect();
        let index = self.index as u64;
        ctx.report_scale_change(&changes, [index, self.config.steps * (index + 1)]);
    }
}

/// How coarse the grid of every group is, by linear.
type Coarseness = BTreeMap<String, Vec<f32>>;

fn coarseness(ctx: &StageContext<'_>, prefix: &str, block: &Block) -> Result<Coarseness> {
    let mut all = Coarseness::new();
    for (name, linear) in block.linears() {
        let name = format!("{prefix}.{name}");
        if ctx.specs.contains_key(&name)
            && let Some(coarseness) = method::coarseness(&linear.weight)
        {
            all.insert(name, coarseness?);
        }
    }
    Ok(all)
}
