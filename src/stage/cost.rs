//! What a stage will need, before a weight is read.

use std::time::Instant;

use burn::tensor::{Device, Distribution, Tensor};

use super::corpus::Data;
use super::keys::Keys;
use super::probe::{Line, Probe};
use super::state::ModelState;
use super::validate::ValidateConfig;
use crate::method::MethodConfig;
use crate::model::ModelConfig;
use crate::ops;
use crate::quant::{ObserverConfig, QuantSpec};
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
    /// Weights of the largest linear.
    pub widest: u64,
    /// Bytes of a weight in the model's files.
    pub stored: u64,
    /// Bytes of the codes that are in main memory behind this stage.
    pub codes: u64,
    /// How this stage quantizes linears without an override.
    pub spec: QuantSpec,
    /// How this stage's grids start.
    pub observer: ObserverConfig,
    /// What one block took, where that is measured.
    pub probe: Option<Probe<'a>>,
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

/// Bytes of so many weights that learn by `method`, with the moments that `optimizer` holds: weight, latent, and
/// what the forward sees, in whose place a gradient comes linear by linear. On a device without kernels of ours as [`TRAINED_WEIGHT_BYTES`].
pub(super) fn trained(
    weights: u64,
    method: &MethodConfig,
    optimizer: &OptimizerConfig,
    discrete: bool,
) -> u64 {
    // Methods that learn little beside a frozen weight: factors, or a few numbers for each row. So do those that
    // tune grids, beside codes.
    const FEW: [&str; 2] = ["lrq", "lwc"];
    let moments = optimizer.moments.bytes(weights);
    if discrete {
        return TRAINED_WEIGHT_BYTES * weights - MomentsIn::F32.bytes(weights) + moments;
    }
    let few = FEW.contains(&method.name()) || method.tunes().is_some();
    match (method.trains_base(), few) {
        (true, _) => 8 * weights + moments,
        (false, false) => 12 * weights + moments,
        (false, true) => 9 * weights,
    }
}

/// Bytes that one block keeps for its backward pass on `tokens` in windows of `length`: hidden-sized
/// tensors, and where there are no kernels of ours attention's scores.
pub fn tape_bytes(config: &ModelConfig, tokens: u64, length: u64, discrete: bool) -> u64 {
    let scores = if discrete { 12 * tokens * length * config.n_heads as u64 } else { 0 };
    4 * tokens * (10 * config.d_model as u64 + 5 * config.inner_width() as u64) + scores
}

/// Bytes that a forward pass of `tokens` has at once inside a block: two hidden states, and what stands
/// between the linears of the MLP.
pub(super) fn pass_bytes(config: &ModelConfig, tokens: u64) -> u64 {
    4 * tokens * (3 * config.d_model as u64 + 3 * config.inner_width() as u64)
}

/// Logits that are computed at once when a perplexity is measured.
const LOGITS_MEASURED: u64 = 1 << 24;
/// Logits that are computed at once in a step of training.
const LOGITS_TRAINED: u64 = 1 << 23;

impl Speed {
    /// What a device reaches in about a tenth of a second of the operations that training consists of.
    pub fn measure(device: &Device) -> Self {
        const SIDE: usize = 384;
        /// Too large for the caches, as activations are.
        const WIDE: usize = 1536;
        let random = |side| Tensor::<2>::random([side, side], Distribution::Default, device);
        let time = |work: &dyn Fn() -> Tensor<2>, times: u32| {
            let finish = |tensor: Tensor<2>| tensor.sum().into_scalar::<f32>();
            finish(work());
            let start = Instant::now();
            for _ in 1..times {
                drop(work());
            }
            finish(work());
            start.elapsed().as_secs_f64() / f64::from(times)
        };
        let (a, b) = (random(SIDE), random(SIDE));
        let product = time(&|| ops::linear(a.clone(), b.clone()), 8);
        let (a, b) = (random(WIDE), random(WIDE));
        let gated = time(&|| ops::swiglu(a.clone(), b.clone()), 6);
        let tiny = random(8);
        let launch = time(&|| tiny.clone() + 1.0, 64);
        Self {
            flops: 2.0 * (SIDE as f64).powi(3) / product,
            bytes: 12.0 * (WIDE as f64).powi(2) / gated,
            launch,
        }
    }

    /// Time for `flops` operations, `bytes` moved and `steps` steps.
    pub(super) fn seconds(&self, flops: f64, bytes: f64, steps: f64) -> f64 {
        /// Operations in one step, forward and backward, of a block.
        const OPERATIONS: f64 = 400.0;
        flops / self.flops + bytes / self.bytes + steps * OPERATIONS * self.launch
    }
}

impl Scene<'_> {
    /// Bytes of main memory while a stage of this cost runs: the codes so far, and on a device without memory of
    /// its own what would be there.
    pub fn in_memory(&self, cost: &Cost) -> u64 {
        self.codes + cost.host + if self.discrete { 0 } else { cost.device }
    }

    /// The model's shape.
    pub(super) fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Bytes that one block keeps for its backward pass.
    pub(super) fn tape(&self, tokens: u64, length: u64) -> u64 {
        tape_bytes(self.config(), tokens, length, self.discrete)
    }

    /// Bytes of the embedding in f32, and in its file's type while it is read.
    pub(super) fn entrance(&self) -> u64 {
        (4 + self.stored) * self.config().head_shape().iter().product::<usize>() as u64
    }

    /// Bytes of embedding and head in f32, and of the larger one in its file's type while it is read.
    pub(super) fn ends(&self) -> u64 {
        let head = self.config().head_shape().iter().product::<usize>() as u64;
        4 * self.rest + self.stored * head
    }

    /// Bytes of hidden states of the calibration text in one stream.
    pub(super) fn stream(&self, bytes: u64) -> u64 {
        let (samples, length) = self.calibration().unwrap_or_default();
        samples * length * self.config().d_model as u64 * bytes
    }

    /// Bytes of measuring the model block by block on so many tokens at once, and of what plain rounding is
    /// compared by where `rounds` says so.
    pub(super) fn measuring(&self, tokens: u64, rounds: bool) -> u64 {
        let codes = if rounds { self.codes + 28 * self.widest } else { 0 };
        let work = codes.max(4 * self.block) + self.passing(tokens);
        // Nothing else is there while the ends are read.
        self.ends().max(4 * self.rest + work)
    }

    /// Bytes of a pass of so many tokens through a block, or of their logits.
    pub(super) fn passing(&self, tokens: u64) -> u64 {
        let logits = 4 * LOGITS_MEASURED.min(tokens * self.config().vocab as u64);
        logits.max(pass_bytes(self.config(), tokens))
    }

    /// Seconds of measuring perplexities on `tokens`, and of reading the model for it; `None` without a probe.
    pub(super) fn measured(&self, tokens: u64, length: u64) -> Option<f64> {
        let probe = self.probe.as_ref()?;
        let (pass, load) = (probe.forward(length as usize)?, probe.load()?);
        let blocks = self.config().n_blocks as f64;
        let reading = load.token * (self.linears + self.rest) as f64;
        Some(tokens as f64 * (blocks * pass.token + probe.head()?.token) + reading)
    }

    /// Seconds of what the quality gate measures behind a stage: what it left, plain rounding, and where the
    /// stage validates `points` times more.
    pub(super) fn judging(&self, validate: &ValidateConfig, points: u64) -> Option<f64> {
        let length = validate.length as u64;
        self.data.validation.as_ref().map_or(Some(0.0), |_| {
            self.measured(validate.windows as u64 * length, length)
                .map(|one| one * (points + 2) as f64)
        })
    }

    /// Seconds for each token of a forward pass of one block, of windows of `length`.
    pub(super) fn pass(&self, length: u64) -> Option<f64> {
        Some(self.probe.as_ref()?.forward(length as usize)?.token)
    }

    /// A step of training one block by `method`, at most so many tokens of it at once.
    pub(super) fn step(
        &self,
        method: &MethodConfig,
        optimizer: &OptimizerConfig,
        [length, most]: [u64; 2],
    ) -> Option<Line> {
        let grid = (&self.spec, &self.observer);
        self.probe.as_ref()?.step(method, grid, optimizer, [length as usize, most as usize])
    }

    /// Seconds of reading so many weights.
    pub(super) fn load(&self, weights: u64) -> Option<f64> {
        Some(self.probe.as_ref()?.load()?.token * weights as f64)
    }

    /// Seconds of putting `method` on a block's linears, or of having it solve them.
    pub(super) fn rounding(&self, method: &MethodConfig) -> Option<f64> {
        let Line { fixed: probed, token } =
            self.probe.as_ref()?.round(method, &self.spec, &self.observer)?;
        let inputs = method.needs() == crate::method::Needs::Moments;
        let seconds = self.config().specs(0).iter().map(|spec| {
            let [out, own] = spec.shape.map(|size| size as f64);
            // The factor of the moments, by the cube of the inputs; then every row with each of its columns.
            let work = |inputs: f64, out: f64| inputs * inputs / out + 2.0 * inputs;
            let more = if inputs { work(own, out) / work(probed, probed) } else { 1.0 };
            token * own * out * more
        });
        Some(seconds.sum())
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
        // What a block keeps, and what is there of one while its gradients are computed.
        let (d, inner) = (self.config().d_model as u64, self.config().inner_width() as u64);
        let kept = self.tape(micro, length) - 4 * micro * (2 * d + 2 * inner);
        let tapes = if by_block {
            self.tape(micro, length) + inputs
        } else {
            kept * blocks + 8 * micro * (d + inner)
        };
        let seen = 3 * 4 * (micro * vocab).min(LOGITS_TRAINED);
        let validating = self.passing(micro.min(2048));
        Some(Cost {
            device: weights + (tapes + seen).max(validating),
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
        let method = MethodConfig::FlexRound(crate::method::FlexRoundConfig {});
        let of = |moments| trained(3200, &method, &config(moments), false);
        assert_eq!(of(MomentsIn::F32), 20 * 3200);
        assert_eq!(of(MomentsIn::F32) - of(MomentsIn::Int8), 8 * 3200 - (2 * 3200 + 100));
    }
}
