//! What a stage will need, before a weight is read.

use super::corpus::Data;
use super::keys::Keys;
use super::state::ModelState;
use crate::model::ModelConfig;
use crate::train::{MomentsIn, OptimizerConfig};

/// What a stage will need.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cost {
    /// Bytes on the device.
    pub device: u64,
    /// Bytes of main memory besides.
    pub host: u64,
    /// Bytes on the disk.
    pub disk: u64,
    /// Seconds.
    pub seconds: f64,
    /// The setting that decides how much memory it is.
    pub lever: Option<Lever>,
}

/// A setting that a need of memory grows with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lever {
    /// Its key: in the recipe where it has dots, else in the stage.
    pub key: &'static str,
    /// Its value now.
    pub value: u64,
    /// Bytes for each unit of it.
    pub bytes: u64,
}

/// What costs depend on.
pub struct Scene<'a> {
    /// The model; no weight read yet.
    pub model: &'a ModelState,
    /// The texts.
    pub data: &'a Data,
    /// Weights of all linears.
    pub linears: u64,
    /// Weights of one block's linears.
    pub block: u64,
    /// Weights of embedding and head.
    pub rest: u64,
    /// What the device reaches.
    pub speed: Speed,
    /// Whether the device has memory of its own.
    pub discrete: bool,
}

/// What a device reaches in a quick measurement.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// Matrix multiplication, floating-point operations per second.
    pub flops: f64,
    /// Element-wise work, bytes per second.
    pub bytes: f64,
    /// One operation, seconds.
    pub launch: f64,
}

/// Bytes per learned weight: weight, fake-quantized copies on the tape, gradient, two moments,
/// and the update's transients.
pub const TRAINED_WEIGHT_BYTES: u64 = 4 * 14;

/// Bytes of so many learned weights, as [`TRAINED_WEIGHT_BYTES`], with the moments that `optimizer` holds.
pub(super) fn trained(weights: u64, optimizer: &OptimizerConfig) -> u64 {
    TRAINED_WEIGHT_BYTES * weights - MomentsIn::F32.bytes(weights)
        + optimizer.moments.bytes(weights)
}

/// Bytes that one block keeps for its backward pass on `tokens` in windows of `length`: hidden-sized
/// tensors, and attention.
pub fn tape_bytes(config: &ModelConfig, tokens: u64, length: u64) -> u64 {
    4 * tokens * (14 * config.d_model as u64 + 5 * config.inner_width() as u64)
        + 12 * tokens * length * config.n_heads as u64
}

impl Speed {
    /// Time for `flops` operations, `bytes` moved and `steps` steps.
    pub(super) fn seconds(&self, flops: f64, bytes: f64, steps: f64) -> f64 {
        /// Operations in one step, forward and backward, of a block.
        const OPERATIONS: f64 = 400.0;
        flops / self.flops + bytes / self.bytes + steps * OPERATIONS * self.launch
    }
}

impl Scene<'_> {
    /// The model's shape.
    pub(super) fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Bytes that one block keeps for its backward pass.
    pub(super) fn tape(&self, tokens: u64, length: u64) -> u64 {
        tape_bytes(self.config(), tokens, length)
    }

    /// Tokens and window length of the calibration text; `None` without it.
    pub(super) fn calibration(&self) -> Option<(u64, u64)> {
        let corpus = self.data.calibration.as_ref()?;
        let length = corpus.length as u64;
        let samples = corpus.samples.unwrap_or_else(|| corpus.stream.windows(corpus.length));
        Some((samples as u64, length))
    }

    /// Having the whole model write texts, `together` of them at once: for each token of those every
    /// weight is read once.
    pub(super) fn writing(&self, texts: u64, together: u64, tokens: u64) -> Cost {
        let together = together.clamp(1, texts.max(1));
        let passes = (texts.div_ceil(together) * tokens) as f64;
        let config = self.config();
        let weights = (self.linears + self.rest) as f64;
        let cached = 2 * (config.n_kv_heads * config.head_dim * config.n_blocks) as u64;
        // A block forward is about a third of the operations of one forward and backward.
        let steps = passes * config.n_blocks as f64 / 3.0;
        Cost {
            device: 4 * together * cached * tokens,
            seconds: self.speed.seconds(
                2.0 * weights * passes * together as f64,
                4.0 * weights * passes,
                steps,
            ),
            ..Cost::default()
        }
    }

    /// A training of the whole model on the training text; `None` without it. `weights` are bytes on the
    /// device whatever the batch, `moved` the bytes of weights that a micro-batch moves, and `once` a
    /// step; `logits` is how often it passes over the logits. With `by_block` the tape is that of one block
    /// at a time, beside the inputs of all.
    pub(super) fn training(
        &self,
        keys: &Keys<'_>,
        weights: u64,
        [moved, once]: [u64; 2],
        logits: u64,
        by_block: bool,
    ) -> Option<Cost> {
        let length = self.data.train.as_ref()?.length as u64;
        let (vocab, blocks) = (self.config().vocab as u64, self.config().n_blocks as u64);
        let [batch, accumulate] = [keys.batch as u64, keys.accumulate as u64];
        let micro = batch * length;
        let all = self.linears + self.rest;
        // Forward, backward and the teacher; by block also once more forward.
        let each = if by_block { 10.0 } else { 8.0 };
        let flops = each * (all * micro * accumulate * keys.steps) as f64;
        let per_step = (moved + self.tape(micro, length) * 3 * blocks + 4 * logits * micro * vocab)
            * accumulate
            + once;
        let inputs = 4 * micro * accumulate * self.config().d_model as u64 * blocks;
        let tapes = self.tape(micro, length) * if by_block { 1 } else { blocks }
            + if by_block { inputs } else { 0 };
        Some(Cost {
            device: weights + tapes + 12 * 4 * (micro * vocab).min(1 << 23),
            seconds: self.speed.seconds(flops, (per_step * keys.steps) as f64, keys.steps as f64),
            lever: Some(Lever { key: "batch", value: batch, bytes: tapes / batch.max(1) }),
            ..Cost::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_in_8_bits_take_a_quarter_of_f32() {
        let config = |moments| OptimizerConfig { moments, ..OptimizerConfig::default() };
        let of = |moments| trained(3200, &config(moments));
        assert_eq!(of(MomentsIn::F32), TRAINED_WEIGHT_BYTES * 3200);
        assert_eq!(of(MomentsIn::F32) - of(MomentsIn::Int8), 8 * 3200 - (2 * 3200 + 100));
    }
}
