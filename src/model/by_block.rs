//! Forward passes: of a model in memory, or of one that is read block by block.

use burn::tensor::{DType, Device, Int, Tensor};

use super::{CausalLm, Loader, ModelConfig, ModelTap, Positions, WeightSource};
use crate::error::Result;

/// Bytes of hidden states that wait for the next block at once.
const WAITING_BYTES: usize = 256 << 20;

/// What turns tokens into hidden states, and those into logits.
pub trait Forward {
    /// The model's embedding, final norm and head.
    fn ends(&self) -> &CausalLm;

    /// The residual streams after the final norm, `[batch, seq, d_model]` for each batch of tokens,
    /// `[batch, seq]`.
    ///
    /// # Errors
    /// When weights cannot be read.
    fn hidden(&self, batches: Vec<Tensor<2, Int>>, positions: &Positions)
    -> Result<Vec<Tensor<3>>>;

    /// How many batches of this many tokens to give [`Forward::hidden`] at once.
    fn batches_at_once(&self, _tokens: usize) -> usize {
        1
    }
}

impl Forward for CausalLm {
    fn ends(&self) -> &CausalLm {
        self
    }

    fn hidden(
        &self,
        batches: Vec<Tensor<2, Int>>,
        positions: &Positions,
    ) -> Result<Vec<Tensor<3>>> {
        Ok(batches.into_iter().map(|tokens| self.hidden(tokens, positions)).collect())
    }
}

/// A model of which embedding, head and one block at a time are in memory. The operations are those
/// of the whole model, in the same order: results are the same bits.
pub struct ByBlock<'a> {
    loader: Loader<'a>,
    ends: CausalLm,
}

impl<'a> ByBlock<'a> {
    /// The model that `source` holds; `tap` acts on its activations.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn open(
        config: &'a ModelConfig,
        source: &'a dyn WeightSource,
        tap: ModelTap,
        device: &'a Device,
        dtype: DType,
    ) -> Result<Self> {
        let loader = Loader { config, source, device, dtype };
        let ends = loader.ends()?.with_tap(tap);
        Ok(Self { loader, ends })
    }
}

impl Forward for ByBlock<'_> {
    fn ends(&self) -> &CausalLm {
        &self.ends
    }

    fn hidden(
        &self,
        batches: Vec<Tensor<2, Int>>,
        positions: &Positions,
    ) -> Result<Vec<Tensor<3>>> {
        let mut streams: Vec<Tensor<3>> =
            batches.into_iter().map(|tokens| self.ends.embed(tokens, positions)).collect();
        for index in 0..self.loader.config.n_blocks {
            let block = self.loader.block(index)?;
            let tap = |site, x| self.ends.tap.apply(index, site, x);
            let forward = |hidden| block.forward_tapped(hidden, positions, None, &tap);
            streams = streams.into_iter().map(forward).collect();
        }
        Ok(streams.into_iter().map(|hidden| self.ends.finish(hidden)).collect())
    }

    fn batches_at_once(&self, tokens: usize) -> usize {
        let bytes = tokens * self.loader.config.d_model * self.ends.dtype().size();
        (WAITING_BYTES / bytes.max(1)).max(1)
    }
}
