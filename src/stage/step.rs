//! One optimizer step, block by block: the tape reaches through one block at a time.
//!
//! The way forward is off the tape and keeps the input of every block. On the way back a block is computed
//! again, on a tape of its own, from its input; the gradient of its output, which the block above (or the
//! loss) has left, goes through it, and leaves that of its input. Sums are those of one tape through all
//! blocks, in the same order, so on a CPU the result is the same to the last bit.

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::Tensor;

use super::batch::Batch;
use super::motion::{self, Motion};
use super::student::{Rack, quantized};
use crate::error::{Error, Result};
use crate::method;
use crate::model::{Block, CausalLm, Forward, Positions};
use crate::objective::ObjectiveConfig;
use crate::ops::{self, Numbers};
use crate::train::{self, Optimizer, Scales, Squares, Stepped, Still, culprit};

/// A batch, and what its loss counts for in its micro-batch.
pub(super) struct Part<'a> {
    /// The tokens.
    pub batch: Batch,
    /// What is minimized on them.
    pub objective: &'a ObjectiveConfig,
    /// The share of the micro-batch's sequences.
    pub share: f64,
}

/// The sum of a micro-batch's losses, each by its share.
///
/// # Errors
/// Those of `loss`; when there is no part.
pub(super) fn total(
    parts: &[Part<'_>],
    mut loss: impl FnMut(usize, &Part<'_>) -> Result<Tensor<1>>,
) -> Result<Tensor<1>> {
    let mut sum: Option<Tensor<1>> = None;
    for (index, part) in parts.iter().enumerate() {
        let loss = loss(index, part)?;
        let loss = if part.share < 1.0 { loss * part.share } else { loss };
        sum = Some(match sum {
            None => loss,
            Some(sum) => sum + loss,
        });
    }
    sum.ok_or_else(|| Error::failed("an empty batch"))
}

/// How a step goes with one tape through all blocks.
pub(super) struct OnTape<'a> {
    /// The whole teacher.
    pub teacher: Option<&'a CausalLm>,
    /// Whether rates are relative to the grid.
    pub in_units: bool,
    /// Whether weights are fake-quantized, once for all micro-batches.
    pub fake_quant: bool,
}

impl OnTape<'_> {
    /// As [`ByBlockStep::step`], of the whole model.
    ///
    /// # Errors
    /// For an empty batch.
    pub(super) fn step(
        &self,
        student: CausalLm,
        optimizer: &mut Optimizer,
        micros: &[Vec<Part<'_>>],
        rate_of: &dyn Fn(&str) -> f64,
        compare: bool,
    ) -> Result<(CausalLm, Stepped, Option<Numbers>)> {
        let mut closeness = None;
        let loss = |student: &CausalLm, micro: usize| {
            total(&micros[micro], |_, part| {
                let Part { batch, objective, .. } = part;
                let compare = compare && micro == 0;
                let (loss, measured) = batch.loss(student, self.teacher, objective, compare)?;
                closeness = closeness.take().or(measured);
                Ok(loss)
            })
        };
        if self.in_units {
            let linears = student.blocks.iter().flat_map(Block::linears);
            optimizer.measure_by(linears.flat_map(|(_, l)| method::measures(&l.weight)).collect());
        }
        let (student, stats) = if self.fake_quant {
            train::accumulated_step(student, optimizer, micros.len(), rate_of, still_model, loss)?
        } else {
            train::checked_step(student, optimizer, micros.len(), rate_of, loss)?
        };
        Ok((student, stats, closeness))
    }
}

/// How a step goes block by block.
pub(super) struct ByBlockStep<'a> {
    /// The student.
    pub rack: &'a mut Rack,
    /// Its optimizer.
    pub optimizer: &'a mut Optimizer,
    /// Learning rates by path.
    pub rate_of: &'a dyn Fn(&str) -> f64,
    /// Whether rates are relative to the grid.
    pub in_units: bool,
    /// Whether weights are fake-quantized, once for all micro-batches.
    pub fake_quant: bool,
    /// Where it is noted what the step moves, if it is.
    pub motion: Option<&'a mut Motion>,
}

/// Hidden states of each part of each micro-batch.
type Streams = Vec<Vec<Tensor<3>>>;

impl ByBlockStep<'_> {
    /// One step on micro-batches of parts. The teacher comes with its final hidden states, and with
    /// `compare` the closeness of the first part is measured.
    ///
    /// # Errors
    /// When a block cannot be read or written.
    pub(super) fn step(
        &mut self,
        micros: &[Vec<Part<'_>>],
        teacher: Option<(&dyn Forward, &CausalLm)>,
        compare: bool,
    ) -> Result<(Stepped, Option<Numbers>)> {
        let goals = teacher.map(|(model, _)| goals(model, micros)).transpose()?;
        let (inputs, outputs) = self.forward(micros)?;
        let teacher = teacher.map(|(_, ends)| ends).zip(goals.as_ref());
        let (loss, gradients, closeness) = self.losses(micros, outputs, teacher, compare)?;
        if loss.is_bad() {
            let stats = Stepped { loss, grad_norm: Numbers::one(f64::NAN), culprit: None };
            return Ok((stats, closeness));
        }
        let stats = self.backward(micros, inputs, gradients, loss)?;
        Ok((stats, closeness))
    }

    /// The inputs of every block, and the outputs of the last one.
    fn forward(&self, micros: &[Vec<Part<'_>>]) -> Result<(Vec<Streams>, Streams)> {
        let ends = self.rack.ends.valid();
        let embed = |part: &Part<'_>| ends.embed(part.batch.tokens(), part.batch.positions());
        let embedded = micros.iter().map(|parts| parts.iter().map(embed).collect());
        let mut streams: Streams = embedded.collect();
        let mut inputs = Vec::new();
        for index in 0..self.rack.len() {
            let block = quantized(&self.rack.block(index)?);
            self.rack.ahead(Some(index + 1))?;
            inputs.push(streams.clone());
            let through = |(x, part): (Tensor<3>, &Part<'_>)| {
                through(&block, x, part.batch.positions(), &self.rack.ends)
            };
            let micro = |(streams, parts): (Vec<Tensor<3>>, &Vec<Part<'_>>)| {
                streams.into_iter().zip(parts).map(through).collect()
            };
            streams = streams.into_iter().zip(micros).map(micro).collect();
        }
        Ok((inputs, streams))
    }

    /// The mean loss, its gradients with respect to the last block's outputs, and the closeness to the
    /// teacher.
    fn losses(
        &self,
        micros: &[Vec<Part<'_>>],
        outputs: Streams,
        teacher: Option<(&CausalLm, &Streams)>,
        compare: bool,
    ) -> Result<(Numbers, Streams, Option<Numbers>)> {
        let ends = &self.rack.ends;
        let (mut sum, mut gradients, mut closeness) = (Numbers::one(0.0), Vec::new(), None);
        for (micro, (parts, outputs)) in micros.iter().zip(outputs).enumerate() {
            let leaves: Vec<_> = outputs.into_iter().map(leaf).collect();
            let loss = total(parts, |index, part| {
                let hidden = ends.finish(leaves[index].clone());
                let goal = teacher.map(|(ends, goals)| (ends, goals[micro][index].clone()));
                let compare = compare && micro == 0;
                let (loss, measured) =
                    part.batch.loss_at(ends, hidden, goal, part.objective, compare)?;
                closeness = closeness.take().or(measured);
                Ok(loss)
            })?;
            let back = (loss.clone() / micros.len() as f64).backward();
            let of_leaf = |leaf: &Tensor<3>| {
                leaf.grad(&back).unwrap_or_else(|| leaf.clone().inner().zeros_like())
            };
            gradients.push(leaves.iter().map(of_leaf).collect());
            sum = Numbers::sum([sum, Numbers::of(loss.inner())]);
        }
        Ok((sum.divided_by(micros.len() as f64), gradients, closeness))
    }

    /// Gradients from the last block to the first, and the update.
    fn backward(
        &mut self,
        micros: &[Vec<Part<'_>>],
        mut inputs: Vec<Streams>,
        mut gradients: Streams,
        loss: Numbers,
    ) -> Result<Stepped> {
        let waits = self.optimizer.needs_global_norm();
        let mut squares: Vec<Squares> = Vec::new();
        let mut found = None;
        if !waits {
            self.optimizer.begin_step();
        }
        while let Some(own) = inputs.pop() {
            let index = inputs.len();
            let block = self.rack.block(index)?;
            self.rack.ahead(index.checked_sub(1))?;
            let of_block;
            (of_block, gradients) = self.through_block(&block, micros, own, gradients);
            let name = index.to_string();
            let path = ["blocks", name.as_str()];
            let own = self.optimizer.squares(&path, &block, &of_block);
            let bad = own.norm().is_bad();
            if bad {
                found = found.or_else(|| culprit(&path, &block, &of_block));
            }
            if waits {
                self.rack.keep_gradients(index, &block, of_block)?;
            } else if !bad {
                let scales = self.optimizer.scales(&own);
                self.update(index, block, of_block, &scales)?;
            }
            squares.push(own);
        }
        squares.reverse();
        let squares = Squares::of_parts(squares);
        let grad_norm = squares.norm();
        if waits && !grad_norm.is_bad() {
            self.optimizer.begin_step();
            let scales = self.optimizer.scales(&squares);
            for index in 0..self.rack.len() {
                let block = self.rack.block(index)?;
                let of_block = self.rack.gradients(index, &block)?;
                self.update(index, block, of_block, &scales)?;
            }
        }
        Ok(Stepped { loss, grad_norm, culprit: found })
    }

    /// The gradients of a block's parameters, and those of its inputs.
    fn through_block(
        &self,
        block: &Block,
        micros: &[Vec<Part<'_>>],
        inputs: Streams,
        gradients: Streams,
    ) -> (GradientsParams, Streams) {
        let still = (self.fake_quant && micros.len() > 1).then(|| still(block));
        let on = still.as_ref().map_or(block, |still| &still.module);
        let mut sum = GradientsAccumulator::new();
        let mut below = Vec::new();
        for ((parts, inputs), gradients) in micros.iter().zip(inputs).zip(gradients) {
            // Nothing learns below the first block.
            let tracked = |x| if block.index == 0 { Tensor::from_inner(x) } else { leaf(x) };
            let leaves: Vec<Tensor<3>> = inputs.into_iter().map(tracked).collect();
            let losses = leaves.iter().zip(parts).zip(gradients).map(|((x, part), gradient)| {
                let y = through(on, x.clone(), part.batch.positions(), &self.rack.ends);
                let nothing = Tensor::zeros([1], &gradient.device());
                ops::with_gradient(y, nothing, gradient)
            });
            let Some(loss) = losses.reduce(|sum, loss| sum + loss) else { continue };
            let back = loss.backward();
            below.push(leaves.iter().filter_map(|leaf| leaf.grad(&back)).collect());
            sum.accumulate(on, GradientsParams::from_grads(back, on));
        }
        let gradients = sum.grads();
        let gradients = match still {
            Some(still) => train::through_methods(block, still.weights, gradients),
            None => gradients,
        };
        (gradients, below)
    }

    /// The optimizer's step of one block.
    fn update(
        &mut self,
        index: usize,
        block: Block,
        gradients: GradientsParams,
        scales: &Scales,
    ) -> Result<()> {
        if self.in_units {
            let measures = block.linears().flat_map(|(_, linear)| method::measures(&linear.weight));
            self.optimizer.measure_by(measures.collect());
        }
        self.rack.let_go(index);
        self.rack.moments_to(index, self.optimizer)?;
        let path = ["blocks", &index.to_string()];
        let before = self.motion.is_some().then(|| motion::codes(&block));
        let block = self.optimizer.step_part(scales, &path, block, gradients, self.rate_of);
        if let (Some(motion), Some(before)) = (&mut self.motion, before) {
            motion.note(index, &before, &block);
        }
        self.rack.moments_from(index, self.optimizer)?;
        self.rack.put(index, block)
    }
}

/// The teacher's final hidden states.
fn goals(teacher: &dyn Forward, micros: &[Vec<Part<'_>>]) -> Result<Streams> {
    let batches = micros.iter().flatten();
    let batches = batches.map(|part| (part.batch.tokens(), part.batch.positions())).collect();
    let mut hidden = teacher.streams(batches)?.into_iter();
    Ok(micros.iter().map(|parts| hidden.by_ref().take(parts.len()).collect()).collect())
}

/// A value as the start of a tape.
fn leaf(x: Tensor<3>) -> Tensor<3> {
    Tensor::from_inner(x).require_grad()
}

/// A block's output.
fn through(block: &Block, x: Tensor<3>, positions: &Positions, ends: &CausalLm) -> Tensor<3> {
    let tap = |site, x| ends.tap.apply(block.index, site, x);
    block.forward_tapped(x, positions, None, &tap)
}

/// A model with its weights as they are quantized now.
fn still_model(model: &CausalLm) -> Still<CausalLm> {
    let stills: Vec<Still<Block>> = model.blocks.iter().map(still).collect();
    let (mut blocks, mut weights) = (Vec::new(), Vec::new());
    for Still { module, weights: own } in stills {
        blocks.push(module);
        weights.extend(own);
    }
    Still { module: CausalLm { blocks, ..model.clone() }, weights }
}

/// A block with its weights as they are quantized now.
fn still(block: &Block) -> Still<Block> {
    let mut module = block.clone();
    let mut weights = Vec::new();
    for (_, linear) in module.linears_mut() {
        if let Some((leaf, value)) = method::materialize(&linear.weight) {
            weights.push((leaf.id, value));
            linear.weight = leaf;
        }
    }
    Still { module, weights }
}
