//! The two streams of block-wise work: what enters the next block in the float model, fine-tuned or
//! as it came, and in the model as quantized so far.

use burn::tensor::{DType, Tensor};

use super::activations::Activations;
use super::context::StageContext;
use super::corpus::Data;
use super::places::Places;
use super::visits::Visits;
use crate::error::Result;
use crate::model::{Block, CausalLm, Loader, Tap, WeightSource};

/// Inputs of the next block, and where its positions are.
pub(super) struct Streams {
    /// Of the float model.
    pub float: Activations,
    /// Of the model whose earlier blocks are quantized.
    pub quantized: Activations,
    /// Positions of the calibration windows.
    pub places: Places,
}

impl Streams {
    /// Both streams at the embedding's output.
    pub(super) fn start(ctx: &StageContext<'_>) -> Result<Self> {
        let corpus = Data::need(ctx.data.calibration.as_ref(), "calibration")?;
        let length = corpus.length;
        let windows = match corpus.samples {
            Some(samples) => corpus.stream.spread(samples, length)?,
            None => (0..corpus.stream.windows(length)).collect(),
        };
        let device = &ctx.device.device;
        let places = Places::new(&ctx.model.config, &corpus.stream, &windows, length, device);
        let entrance = loader(ctx, &ctx.model.checkpoint).entrance()?;
        let float = Activations::collect(windows.len(), |range| {
            let samples: Vec<u32> = range.clone().map(|i| i as u32).collect();
            let rows: Vec<&[u32]> =
                range.map(|i| corpus.stream.window(windows[i], length)).collect();
            let tokens = CausalLm::tokens(&rows, device);
            Ok(entrance.embed(tokens, &places.of(&samples)))
        })?;
        Ok(Self { quantized: float.clone(), float, places })
    }

    /// The float block's output on the float stream; the block is gone when this returns.
    pub(super) fn target(&self, ctx: &StageContext<'_>, index: usize) -> Result<Activations> {
        let teacher = float_block(ctx, index)?;
        self.forward(ctx, &teacher, &self.float, &|_, x| x)
    }

    /// Moves both streams behind block `index`: the float one is `target`, the quantized one goes
    /// through the block with its folded weights.
    pub(super) fn advance(
        &mut self,
        ctx: &StageContext<'_>,
        index: usize,
        target: Activations,
    ) -> Result<()> {
        let baked = loader(ctx, ctx.model).block(index)?;
        let tap = ctx.model.tap();
        let tap = |site, x: Tensor<3>| tap.apply(index, site, x);
        // Before a third stream is made, the one that nothing reads any more is gone.
        self.float = target;
        self.quantized = self.forward(ctx, &baked, &self.quantized, &tap)?;
        Ok(())
    }

    /// Mean squared difference between `block`'s output on the quantized stream and `target`.
    pub(super) fn error(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        tap: &Tap<'_>,
        target: &Activations,
    ) -> Result<f64> {
        self.quantized.mse_through(&ctx.device.device, target, |x, samples| {
            ctx.stop.check()?;
            Ok(block.forward_tapped(x, &self.places.of(samples), None, tap))
        })
    }

    /// As [`Streams::error`], of float block `index`: what the blocks before it leave. Counts the tokens
    /// of its experts.
    pub(super) fn float_error(
        &self,
        ctx: &StageContext<'_>,
        index: usize,
        target: &Activations,
        visits: &Visits,
    ) -> Result<f64> {
        let tap = |site, x| {
            visits.count(site, &x);
            x
        };
        self.error(ctx, &float_block(ctx, index)?, &tap, target)
    }

    /// `block` on every sample.
    pub(super) fn forward(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        x: &Activations,
        tap: &Tap<'_>,
    ) -> Result<Activations> {
        x.map(&ctx.device.device, |x, samples| {
            ctx.stop.check()?;
            Ok(block.forward_tapped(x, &self.places.of(samples), None, tap))
        })
    }
}

/// The float block.
pub(super) fn float_block(ctx: &StageContext<'_>, index: usize) -> Result<Block> {
    let float = ctx.model.tuned_on(ctx.model.float()?);
    loader(ctx, &float).block(index)
}

/// A loader of f32 pieces.
pub(super) fn loader<'a>(ctx: &'a StageContext<'_>, source: &'a dyn WeightSource) -> Loader<'a> {
    Loader { config: &ctx.model.config, source, device: &ctx.device.device, dtype: DType::F32 }
}
