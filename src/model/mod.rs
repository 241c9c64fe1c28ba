//! The language model: from a Hugging Face folder to logits.
//!
//! A model is loaded whole for evaluation and distillation, or piece by piece (embedding, one
//! block at a time, head) for block reconstruction. Weights come from a [`WeightSource`], so a
//! dense checkpoint, a packed one, and "this checkpoint with those linears replaced" all load
//! through the same code.

mod arch;
mod batch;
mod block;
mod by_block;
mod cache;
mod experts;
mod generate;
mod generation_config;
mod load;
mod positions;
mod random;
mod sampler;
mod shapes;
mod sizes;
mod tap;

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

pub use arch::{
    Activation, Arch, BlockNorms, Experts, Gguf, GgufKeys, GgufValue, LONG_FACTORS,
    LearnedPositions, LinearSpec, ModelConfig, Multipliers, Names, NormKind, PartNames, Place,
    Places, QueryNorm, QueryScaling, ROPE_FACTORS, Residual, Role, Rope, RopeScaling, Site, Span,
    model_types, weight_name,
};
pub use batch::{Batch, Beginning, Prompt, finite};
pub use block::{Block, Norm, Norms, Tap};
pub use by_block::{ByBlock, Forward, batches_that_wait};
pub use cache::{KvCache, KvHeld, KvMode, KvSetting};
pub use generate::{Ended, Generation, Memory};
pub use generation_config::{GenerationConfig, end_tokens};
pub use load::{Loader, WeightSource, companions, head_name, licences, open_folder};
pub use positions::Positions;
pub use random::{RandomWeights, write_random, write_random_seed};
pub use sampler::{Logprobs, Sampler};
pub use shapes::{known_config, known_shapes};
pub use sizes::{ModelShape, TRAINING_BYTES, Trainable};
pub use tap::ModelTap;

use crate::ops::{self, NarrowCopy};
use crate::quant::CodedWeight;

/// A decoder-only causal language model.
#[derive(Debug, Module)]
pub struct CausalLm {
    /// Token embedding, `[vocab, width]`.
    pub embed: Param<Tensor<2>>,
    /// Learned embedding of positions, `[rows, d_model]`.
    pub positions: Option<Param<Tensor<2>>>,
    /// From the embedding's width to the model's.
    pub project_in: Option<Linear>,
    /// Back.
    pub project_out: Option<Linear>,
    /// Decoder blocks.
    pub blocks: Vec<Block>,
    /// Final norm.
    pub norm: Option<Norm>,
    /// Output head; `None` when it is the embedding.
    pub head: Option<Linear>,
    /// What it is made of.
    #[module(skip)]
    pub config: Arc<ModelConfig>,
    /// What is done to activations on the way; nothing by default.
    #[module(skip)]
    pub tap: ModelTap,
    /// How it holds keys and values where it goes on; as computed by default.
    #[module(skip)]
    pub kv: Option<KvSetting>,
    /// The frozen head in 16 bits, for texts that are continued.
    #[module(skip)]
    pub narrow_head: NarrowCopy,
}

impl CausalLm {
    /// The model with a tap.
    #[must_use]
    pub fn with_tap(mut self, tap: ModelTap) -> Self {
        self.tap = tap;
        self
    }

    /// The model that holds keys and values by a setting.
    #[must_use]
    pub fn with_kv(self, kv: Option<KvSetting>) -> Self {
        Self { kv, ..self }
    }

    /// Every linear with its full name: those of the blocks in order, then the head.
    pub fn linears_mut(&mut self) -> impl Iterator<Item = (String, &mut Linear)> {
        let config = self.config.clone();
        let head = self.head.iter_mut().map(|head| (self.config.head().to_owned(), head));
        let blocks = self.blocks.iter_mut().enumerate().flat_map(move |(index, block)| {
            let prefix = config.block_prefix(index);
            block.linears_mut().map(move |(name, linear)| (format!("{prefix}.{name}"), linear))
        });
        blocks.chain(head)
    }

    /// Rounds activations to 8 bits before products with packed codes of uniform grids, which are then computed
    /// in integers ([`CodedWeight::in_integers`]); the number of linears that do.
    pub fn multiply_in_integers(&mut self) -> usize {
        let changed = self.linears_mut().filter_map(|(_, linear)| {
            let coded = linear.weight.reparameterization::<CodedWeight>()?.in_integers()?;
            linear.weight = coded.into_parameter(linear.weight.id);
            Some(())
        });
        changed.count()
    }

    /// The residual stream behind the last block of a run of positions that goes on from `caches`, which are
    /// made where there are none; they are then extended.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - result: `[batch, seq, d_model]`
    pub fn go_on(
        &self,
        tokens: Tensor<2, Int>,
        positions: &Positions,
        caches: &mut Vec<KvCache>,
    ) -> Tensor<3> {
        caches.resize(self.blocks.len(), KvCache::by(self.kv));
        let mut hidden = self.embed(tokens, positions);
        for (index, (block, cache)) in self.blocks.iter().zip(caches).enumerate() {
            let tap = |site, x| self.tap.apply(index, site, x);
            hidden = block.forward_tapped(hidden, positions, Some(cache), &tap);
        }
        hidden
    }

    /// Token ids of a batch as a tensor, `[batch, seq]`.
    pub fn tokens(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
        let seq = rows.first().map_or(0, |row| row.len());
        let ids: Vec<i32> =
            rows.iter().flat_map(|row| row.iter().map(|id| id.cast_signed())).collect();
        Tensor::from_data(TensorData::new(ids, [rows.len(), seq]), device)
    }

    /// Embedded tokens, their positions with them where those are learned.
    ///
    /// # Shapes
    /// - tokens: `[batch, seq]`
    /// - result: `[batch, seq, d_model]`
    pub fn embed(&self, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
        let embedded = burn::tensor::module::embedding(self.embed.val(), tokens);
        let mut hidden = block::times(embedded, self.config.arch.multipliers.embedding);
        if let Some(project) = &self.project_in {
            hidden = block::project(project, hidden);
        }
        match (&self.positions, positions.rows()) {
            (Some(table), Some(rows)) => {
                hidden + burn::tensor::module::embedding(table.val(), rows)
            }
            _ => hidden,
        }
    }

    /// What the head reads: the residual stream behind the last block, normed.
    ///
    /// # Shapes
    /// - hidden: `[.., d_model]`
    /// - result: `[.., width of the head]`
    pub fn finish<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        let hidden = match &self.norm {
            Some(norm) => norm.forward(hidden),
            None => hidden,
        };
        match &self.project_out {
            Some(project) => block::project(project, hidden),
            None => hidden,
        }
    }

    /// What the head reads of every position, `[batch, seq, width of the head]`.
    pub fn hidden(&self, tokens: Tensor<2, Int>, positions: &Positions) -> Tensor<3> {
        let mut hidden = self.embed(tokens, positions);
        for (index, block) in self.blocks.iter().enumerate() {
            let tap = |site, x| self.tap.apply(index, site, x);
            hidden = block.forward_tapped(hidden, positions, None, &tap);
        }
        self.finish(hidden)
    }

    /// Logits in f32.
    ///
    /// # Shapes
    /// - hidden: `[tokens, width]`, as [`CausalLm::finish`] gives it
    /// - result: `[tokens, vocab]`
    pub fn logits(&self, hidden: Tensor<2>) -> Tensor<2> {
        let dense = |x, weight| ops::linear_narrow(x, weight, &self.narrow_head);
        let logits = match &self.head {
            Some(head) => block::project_by(head, hidden, dense),
            None => dense(hidden, self.embed.val().transpose()),
        };
        let logits = if logits.dtype() == DType::F32 { logits } else { logits.cast(DType::F32) };
        let arch = &self.config.arch;
        let logits = block::times(logits, arch.multipliers.logits);
        match arch.logit_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// Rows of the embedding.
    pub fn vocab(&self) -> usize {
        self.embed.val().dims()[0]
    }

    /// The gradient of a loss with respect to the hidden state, from its gradient with respect to
    /// the `logits`; the head is frozen.
    ///
    /// # Shapes
    /// - gradient, logits: `[tokens, vocab]`
    /// - result: `[tokens, width]`
    pub fn head_gradient(&self, gradient: Tensor<2>, logits: &Tensor<2>) -> Tensor<2> {
        let arch = &self.config.arch;
        let gradient = match arch.logit_cap {
            // The slope of the cap.
            Some(cap) => gradient * ((logits.clone() / cap).square() * -1.0 + 1.0),
            None => gradient,
        };
        let gradient = block::times(gradient, arch.multipliers.logits).cast(self.dtype());
        match &self.head {
            Some(head) => ops::matmul(gradient, head.weight.val().transpose()),
            None => ops::matmul(gradient, self.embed.val()),
        }
    }

    /// The type activations are computed in.
    pub fn dtype(&self) -> DType {
        self.embed.val().dtype()
    }
}
