//! One block fitted to the float block's output, at once or piece by piece.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};

use super::keys::ReconstructConfig;
use crate::data::{Order, coin_flips};
use crate::error::Result;
use crate::export::activations::{self, InputGrids};
use crate::export::fewbit::Saved;
use crate::method::{self, Moment};
use crate::model::{Block, LinearSpec};
use crate::ops;
use crate::quant::ActivationQuant;
use crate::report::{Event, Reporter};
use crate::stage::activations::Activations;
use crate::stage::context::StageContext;
use crate::stage::inputs::{self, Piece, StaticInputs, Student};
use crate::stage::streams::{Streams, float_block, loader};
use crate::stage::visits::Visits;
use crate::train::{self, Optimizer, RateUnit, Role};

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

/// What one piece of a block is fitted on.
struct Task<'a> {
    piece: Piece,
    /// Input on the quantized stream.
    quantized: &'a Activations,
    /// Input on the float stream.
    float: &'a Activations,
    /// The float piece's output on the float stream.
    target: &'a Activations,
    /// The float piece's output on the quantized stream, for the augmented loss.
    augmented: Option<Activations>,
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
        let input_prob = if quant.fixed().is_some() { 0.5 } else { 1.0 };
        let input_prob = config.input_prob.unwrap_or(input_prob);
        Self { config, index, streams, target, quant, input_prob }
    }

    /// The block's quantized linears with the grids of its inputs, and its error at the start.
    pub(super) fn run(&self, ctx: &mut StageContext<'_>) -> Result<(Saved, f64)> {
        let config = self.config;
        let prefix = ctx.model.config.block_prefix(self.index);
        let mut block = loader(ctx, ctx.model).block(self.index)?;
        for (name, linear) in block.linears_mut() {
            let name = format!("{prefix}.{name}");
            if ctx.specs.contains_key(&name) {
                ctx.attach(&name, linear, &config.method, config.start_from, DType::F32)?;
            }
        }
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
        let mut attended = Activations::default();
        for piece in config.within.pieces() {
            let quantized =
                |spec: &LinearSpec| ctx.specs.contains_key(&format!("{prefix}.{}", spec.name));
            // Queries and keys of a fused matrix are fitted with the values.
            if !student.block.specs().any(|spec| piece.holds(spec.role) && quantized(spec)) {
                continue;
            }
            student = self.fit(ctx, *piece, student, &grids, &mut attended)?;
            self.keep(ctx, *piece, &mut student.block, &mut saved)?;
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

    /// Fits one piece of the block.
    fn fit(
        &self,
        ctx: &mut StageContext<'_>,
        piece: Piece,
        student: Student,
        grids: &InputGrids,
        attended: &mut Activations,
    ) -> Result<Student> {
        let streams = self.streams;
        if piece == Piece::Whole && !self.config.augmented() {
            let (quantized, float) = (&streams.quantized, &streams.float);
            let target = self.target;
            let task = Task { piece, quantized, float, target, augmented: None };
            return self.train(ctx, &task, student.train(), grids);
        }
        let float_block = float_block(ctx, self.index)?;
        let through = |x: &Activations, piece: Piece, block: &Block| {
            x.map(&ctx.device.device, |x| {
                ctx.stop.check()?;
                Ok(piece.forward(block, x, &streams.positions, &|_, x| x))
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
                behind = streams.quantized.map(&ctx.device.device, |x| {
                    ctx.stop.check()?;
                    Ok(student.forward(Piece::Attention, x, &streams.positions, self.quant))
                })?;
                quantized = &behind;
                (&*attended, self.target)
            }
        };
        let augmented = self.config.augmented();
        let augmented = augmented.then(|| through(quantized, piece, &float_block)).transpose()?;
        drop(float_block);
        let task = Task { piece, quantized, float, target, augmented };
        self.train(ctx, &task, student.train(), grids)
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
                saved.latents.extend(ctx.latents_of(&full, linear));
                ctx.set_weight(linear, folded.dequantize());
                saved.linears.push((full, folded, self.config.method.name().to_owned()));
            }
        }
        Ok(())
    }

    /// Trains; `grids` are where the learned grids start.
    fn train(
        &self,
        ctx: &mut StageContext<'_>,
        task: &Task<'_>,
        mut student: Student,
        grids: &InputGrids,
    ) -> Result<Student> {
        let config = self.config;
        let piece = task.piece;
        let mut optimizer = Optimizer::new(&config.optimizer);
        let mut stream = format!("stage {} block {}", ctx.stage, self.index);
        if piece != Piece::Whole {
            stream = format!("{stream} {piece:?}");
        }
        let order = Order::new(ctx.seed, stream.as_str(), self.target.len(), config.batch)?;
        let rates = config.learning_rate;
        let base = |path: &str| match inputs::highest_rate(path, grids) {
            Some(highest) => rates.of(Role::Activation).min(highest),
            None => method::role_of(path).map_or(0.0, |role| rates.of(role)),
        };
        let schedule = config.schedule.resolved(config.rate_unit, config.steps);
        let mut best: Option<(f64, Student)> = None;
        let shortens_at = ctx.shortens_at(config.steps);
        for step in 0..config.steps {
            ctx.stop.check()?;
            if step == shortens_at {
                method::shorten_all(piece_mut(piece, &mut student.block), ctx.scales);
                // A loss with other scales is none of what will be left.
                best = None;
            }
            let factor = schedule.factor(step, config.steps);
            let rate_of = |path: &str| base(path) * factor;
            let batch = order.batch(step);
            let start = config.keep_best.then(|| student.clone());
            if config.rate_unit == RateUnit::Grid {
                let linears = student.block.linears();
                let measures = linears.flat_map(|(_, linear)| method::measures(&linear.weight));
                optimizer.measure_by(measures.collect());
            }
            let (trained, stats) =
                train::step(student, &mut optimizer, 1, &rate_of, |student, _| {
                    Ok(self.loss(ctx, task, student, &batch, &stream, step))
                })
                .map_err(|e| {
                    e.at(format!("stage {}, block {}, step {step}", ctx.stage, self.index))
                })?;
            student = trained;
            self.between_steps(piece, &mut student.block, Moment::Step(step + 1));
            if let Some(start) = start
                && best.as_ref().is_none_or(|(least, _)| stats.loss < *least)
            {
                best = Some((stats.loss, start));
            }
            let length = self.streams.positions.len();
            report_step(config, ctx, (self.index, piece), step, length, stats.loss);
        }
        let mut student = best.map_or(student, |(_, best)| best).valid();
        self.between_steps(piece, &mut student.block, Moment::End);
        Ok(student)
    }

    /// The objective on one batch.
    fn loss(
        &self,
        ctx: &StageContext<'_>,
        task: &Task<'_>,
        student: &Student,
        batch: &[u32],
        stream: &str,
        step: u64,
    ) -> Tensor<1> {
        let device = &ctx.device.device;
        let mut input = task.quantized.batch(batch, device);
        if self.input_prob < 1.0 {
            let float = task.float.batch(batch, device);
            let shape = input.dims();
            let stream = format!("{stream} inputs");
            let count = shape.iter().product();
            let mask = coin_flips(ctx.seed, &stream, step, count, self.input_prob);
            let mask: Tensor<3> = Tensor::from_data(TensorData::new(mask, shape), device);
            input = float.mask_where(mask.equal_elem(1.0), input);
        }
        let output = student.forward(task.piece, input, &self.streams.positions, self.quant);
        let compare = |goal: &Activations| {
            let goal = goal.batch(batch, device);
            let (output, goal) = if self.config.relative_tokens() {
                // A token whose output is zero counts as one of a tiny output, not infinitely.
                let size = (goal.clone().square().mean_dim(2) + f32::MIN_POSITIVE).sqrt();
                (output.clone() / size.clone(), goal / size)
            } else {
                (output.clone(), goal)
            };
            ops::block_mse(output, goal, self.config.sum_sequence())
        };
        let loss = compare(task.target);
        match &task.augmented {
            Some(augmented) => loss + compare(augmented),
            None => loss,
        }
    }

    fn between_steps(&self, piece: Piece, block: &mut Block, moment: Moment) {
        if !self.config.method.has_hook() {
            return;
        }
        for linear in piece_mut(piece, block) {
            if let Some(weight) = method::between_steps(&linear.weight, moment) {
                linear.weight = weight;
            }
        }
    }

    /// How far the grids moved from `start`.
    fn report_scales(&self, ctx: &mut StageContext<'_>, saved: &Saved, start: &Coarseness) {
        let changes: Vec<f32> = (saved.linears.iter())
            .flat_map(|(name, end, _)| {
                let start = start.get(name).into_iter().flatten();
                end.grid.coarseness().into_iter().zip(start).map(|(end, start)| (end / start).ln())
            })
            .collect();
        let step = ctx.first_step + self.config.steps * (self.index as u64 + 1);
        ctx.report_scale_change(&changes, step);
    }
}

/// The linears of a piece of a block.
fn piece_mut(piece: Piece, block: &mut Block) -> impl Iterator<Item = &mut Linear> {
    let specs = block.config.specs(block.index).iter();
    let linears = specs.zip(&mut block.linears);
    linears.filter(move |(spec, _)| piece.holds(spec.role)).map(|(_, linear)| linear)
}

fn report_step(
    config: &ReconstructConfig,
    ctx: &mut StageContext<'_>,
    (index, piece): (usize, Piece),
    step: u64,
    length: usize,
    loss: f64,
) {
    let of_piece = config.within.pieces().iter().position(|p| *p == piece).unwrap_or(0) as u64;
    let (step, steps) =
        (of_piece * config.steps + step, config.steps * config.within.pieces().len() as u64);
    // The curve is always the plain mean, whatever the reduction, so that recipes compare.
    let loss = if config.sum_sequence() { loss / length as f64 } else { loss };
    let every = (steps / 50).max(1);
    if step.is_multiple_of(every) || step + 1 == steps {
        ctx.report.emit(&Event::BlockLoss { block: index, step, loss });
    }
    ctx.report.emit(&Event::Progress {
        verb: format!("block {:>2}/{}", index + 1, ctx.model.config.n_blocks),
        done: step + 1,
        of: steps,
        detail: format!("mse {loss:.3e}"),
    });
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
