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
    /// `[batch, seq]`, at its own positions.
    ///
    /// # Errors
    /// When weights cannot be read.
    fn streams(&self, batches: Vec<(Tensor<2, Int>, &Positions)>) -> Result<Vec<Tensor<3>>>;

    /// As [`Forward::streams`], every batch at the same positions.
    ///
    /// # Errors
    /// When weights cannot be read.
    fn hidden(
        &self,
        batches: Vec<Tensor<2, Int>>,
        positions: &Positions,
    ) -> Result<Vec<Tensor<3>>> {
        self.streams(batches.into_iter().map(|tokens| (tokens, positions)).collect())
    }

    /// The model, where it is in memory whole: what generates needs it.
    fn whole(&self) -> Option<&CausalLm> {
        None
    }

    /// How many batches of this many tokens to give [`Forward::hidden`] at once.
    fn batches_at_once(&self, _tokens: usize) -> usize {
        1
    }
}

impl Forward for CausalLm {
    fn ends(&self) -> &CausalLm {
        self
    }

    fn streams(&self, batches: Vec<(Tensor<2, Int>, &Positions)>) -> Result<Vec<Tensor<3>>> {
        Ok(batches.into_iter().map(|(tokens, at)| Self::hidden(self, tokens, at)).collect())
    }

    fn whole(&self) -> Option<&CausalLm> {
        Some(self)
    }
}

/// A model of which embedding, head and one block at a time are in memory. The operations are those
/// of the whole model, in the same order: results are the same bits.
pub struct ByBlock<'a> {
    loader: Loader<'a>,
    ends: CausalLm,
    /// Told how many blocks are behind, and how many there are.
    tell: &'a dyn Fn(u64, u64),
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
        Ok(Self::between(loader, ends))
    }

    /// The blocks that `loader` reads between ends that are there already.
    pub fn between(loader: Loader<'a>, ends: CausalLm) -> Self {
        Self { loader, ends, tell: &|_, _| () }
    }

    /// The same model, that tells `tell` how many blocks of a pass are behind, and how many there are.
    #[must_use]
    pub fn telling(self, tell: &'a dyn Fn(u64, u64)) -> Self {
        Self { tell, ..self }
    }
}

impl Forward for ByBlock<'_> {
    fn ends(&self) -> &CausalLm {
        &self.ends
    }

    fn streams(&self, batches: Vec<(Tensor<2, Int>, &Positions)>) -> Result<Vec<Tensor<3>>> {
        let embedded = batches.into_iter().map(|(tokens, at)| (self.ends.embed(tokens, at), at));
        let mut streams: Vec<_> = embedded.collect();
        let of = self.loader.config.n_blocks;
        for index in 0..of {
            (self.tell)(index as u64, of as u64);
            let block = self.loader.block(index)?;
            let tap = |site, x| self.ends.tap.apply(index, site, x);
            let forward = |(hidden, at)| (block.forward_tapped(hidden, at, None, &tap), at);
            streams = streams.into_iter().map(forward).collect();
        }
        Ok(streams.into_iter().map(|(hidden, _)| self.ends.finish(hidden)).collect())
    }

    fn batches_at_once(&self, tokens: usize) -> usize {
        batches_that_wait(self.loader.config, self.ends.dtype(), tokens)
    }
}

/// How many batches of so many tokens go through a model that is read block by block at once.
pub fn batches_that_wait(config: &ModelConfig, dtype: DType, tokens: usize) -> usize {
    let bytes = tokens * config.d_model * dtype.size();
    (WAITING_BYTES / bytes.max(1)).max(1)
}
