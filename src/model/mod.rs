//! The language model: from a Hugging Face folder to logits.
//!
//! A model is loaded whole for evaluation and distillation, or piece by piece (embedding, one
//! block at a time, head) for block reconstruction. Weights come from a [`WeightSource`], so a
//! dense checkpoint, a packed one, and "this checkpoint with those linears replaced" all load
//! through the same code.

mod by_block;
mod config;
mod decoder;
mod families;
mod generate;
mod load;
mod sizes;
mod tap;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use by_block::{ByBlock, Forward};
pub use config::{ModelConfig, Rope, RopeScaling};
pub use decoder::{Attention, Block, KvCache, LINEARS, Mlp, Positions, RmsNorm, Site, Tap};
pub use families::{LinearShape, ModelShape};
pub use generate::{Sampler, generate};
pub use load::{
    EMBEDDING, HEAD, Loader, WeightSource, block_prefix, companions, head_name, linear_shapes,
    weight_name,
};
pub use sizes::{TRAINING_BYTES, Trainable};
pub use tap::ModelTap;

use crate::ops;

/// A decoder-only causal language model.
#[derive(Debug, Module)]
pub struct CausalLm {
    /// Token embedding, `[vocab, d_model]`.
    pub embed: Param<Tensor<2>>,
    /// Decoder blocks.
    pub blocks: Vec<Block>,
    /// Final norm.
    pub norm: RmsNorm,
    /// Output head; `None` when it is the embedding.
    pub head: Option<Linear>,
    /// What is done to activations on the way; nothing by default.
    #[module(skip)]
    pub tap: ModelTap,
}

impl CausalLm {
    /// The model with a tap.
    #[must_use]
    pub fn with_tap(mut self, tap: ModelTap) -> Self {
        self.tap = tap;
        self
    }

    /// Token ids of a batch as a tensor, `[batch, seq]`.
    pub fn tokens(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
        let seq = rows.first().map_or(0, |row| row.len());
        let ids: Vec<i32> =
            rows.iter().flat_map(|row| row.iter().map(|id| id.cast_signed())).collect();
        Tensor::from_data(TensorData::new(ids, [rows.len(), seq]), device)
    }

    /// Embedded tokens.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - result: `[batch, seq, d_model]`
    pub fn embed(&self, tokens: Tensor<2, Int>) -> Tensor<3> {
        burn::tensor::module::embedding(self.embed.val(), tokens)
    }

    /// The residual stream after the final norm, `[batch, seq, d_model]`.
    pub fn hidden(&self, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
        let mut hidden = self.embed(tokens);
        for (index, block) in self.blocks.iter().enumerate() {
            let tap = |site, x| self.tap.apply(index, site, x);
            hidden = block.forward_tapped(hidden, positions, None, &tap);
        }
        self.norm.forward(hidden)
    }

    /// Logits in f32.
    ///
    /// # Shapes
    /// - hidden: `[tokens, d_model]`, after the final norm
    /// - result: `[tokens, vocab]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let logits = match &self.head {
            Some(head) => decoder::project(head, hidden),
            None => ops::linear(hidden, self.embed.val().transpose()),
        };
        if logits.dtype() == DType::F32 { logits } else { logits.cast(DType::F32) }
    }

    /// Rows of the embedding.
    pub fn vocab(&self) -> usize {
        self.embed.val().dims()[0]
    }

    /// The gradient of a loss with respect to the hidden state, from its gradient with respect to
    /// the logits; the head is frozen.
    ///
    /// # Shapes
    /// - gradient: `[tokens, vocab]`
    /// - result: `[tokens, d_model]`
    pub fn head_gradient(&self, gradient: Tensor<2>) -> Tensor<2> {
        let gradient = gradient.cast(self.dtype());
        match &self.head {
            Some(head) => ops::matmul(gradient, head.weight.val().transpose()),
            None => ops::matmul(gradient, self.embed.val()),
        }
    }

    /// The type activations are computed in.
    pub fn dtype(&self) -> DType {
        self.norm.weight.val().dtype()
    }
}
