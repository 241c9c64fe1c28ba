//! What one piece of a block is fitted on, and how far it is from it.

use burn::nn::Linear;
use burn::tensor::{Tensor, TensorData};

use super::keys::ReconstructConfig;
use crate::data::coin_flips;
use crate::error::Result;
use crate::method::{self, Moment};
use crate::model::Block;
use crate::ops;
use crate::quant::ActivationQuant;
use crate::stage::activations::Activations;
use crate::stage::context::StageContext;
use crate::stage::inputs::{Piece, Student};
use crate::stage::places::Places;

/// What one piece of a block is fitted on.
pub(super) struct Task<'a> {
    pub config: &'a ReconstructConfig,
    /// The block.
    pub index: usize,
    pub piece: Piece,
    /// Input on the quantized stream.
    pub quantized: &'a Activations,
    /// Input on the float stream.
    pub float: &'a Activations,
    /// The float piece's output on the float stream.
    pub target: &'a Activations,
    /// The float piece's output on the quantized stream, for the augmented loss.
    pub augmented: Option<Activations>,
    pub places: &'a Places,
    /// What training does to activations.
    pub quant: ActivationQuant,
    /// Share of the input entries from the quantized stream.
    pub input_prob: f64,
}

impl Task<'_> {
    /// The objective on one batch.
    pub(super) fn loss(
        &self,
        ctx: &StageContext<'_>,
        student: &Student,
        batch: &[u32],
        stream: &str,
        step: u64,
    ) -> Result<Tensor<1>> {
        let device = &ctx.device.device;
        let mut input = self.quantized.batch(batch, device)?;
        if self.input_prob < 1.0 {
            let float = self.float.batch(batch, device)?;
            let shape = input.dims();
            let stream = format!("{stream} inputs");
            let count = shape.iter().product();
            let mask = coin_flips(ctx.seed, &stream, step, count, self.input_prob);
            let mask: Tensor<3> = Tensor::from_data(TensorData::new(mask, shape), device);
            input = float.mask_where(mask.equal_elem(1.0), input);
        }
        let output = student.forward(self.piece, input, &self.places.of(batch), self.quant);
        let compare = |goal: &Activations| -> Result<Tensor<1>> {
            let goal = goal.batch(batch, device)?;
            let (output, goal) = if self.config.relative_tokens() {
                // A token whose output is zero counts as one of a tiny output, not infinitely.
                let size = (goal.clone().square().mean_dim(2) + f32::MIN_POSITIVE).sqrt();
                (output.clone() / size.clone(), goal / size)
            } else {
                (output.clone(), goal)
            };
            Ok(ops::block_mse(output, goal, self.config.sum_sequence()))
        };
        let loss = compare(self.target)?;
        Ok(match &self.augmented {
            Some(augmented) => loss + compare(augmented)?,
            None => loss,
        })
    }

    /// Begins to read what the next step will ask for, where it is in files.
    pub(super) fn ahead(&self, batch: &[u32]) -> Result<()> {
        let float = (self.input_prob < 1.0).then_some(self.float);
        let streams = [Some(self.quantized), float, Some(self.target), self.augmented.as_ref()];
        streams.into_iter().flatten().try_for_each(|stream| stream.ahead(batch))
    }

    pub(super) fn between_steps(&self, block: &mut Block, moment: Moment) {
        if !self.config.method.has_hook() {
            return;
        }
        for linear in self.linears_mut(block) {
            if let Some(weight) = method::between_steps(&linear.weight, moment) {
                linear.weight = weight;
            }
        }
    }

    /// The linears of the piece.
    pub(super) fn linears_mut<'b>(
        &self,
        block: &'b mut Block,
    ) -> impl Iterator<Item = &'b mut Linear> {
        let specs = block.config.specs(block.index).iter();
        let linears = specs.zip(&mut block.linears);
        let piece = self.piece;
        linears.filter(move |(spec, _)| piece.holds(spec.role)).map(|(_, linear)| linear)
    }
}
