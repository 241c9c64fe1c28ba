//! The two streams of block-wise work: what enters the next block in the float model, fine-tuned or
//! as it came, and in the model as quantized so far.

use burn::tensor::{DType, Tensor};

use super::activations::{Activations, Keeping, StreamType};
use super::context::StageContext;
use super::corpus::Data;
use super::memory::Memory;
use super::places::Places;
use super::visits::Visits;
use crate::error::{Error, Result};
use crate::model::{Block, CausalLm, Loader, Tap, WeightSource};

/// Inputs of the next block, and where its positions are.
pub(super) struct Streams {
    /// Of the float model; empty while a block is worked on that does not need it.
    pub float: Activations,
    /// Of the model whose earlier blocks are quantized.
    pub quantized: Activations,
    /// Positions of the calibration windows.
    pub places: Places,
}

impl Streams {
    /// Both streams at the embedding's output, kept in `dtype`, on the disk where `memory` says so.
    pub(super) fn start(
        ctx: &StageContext<'_>,
        memory: Option<Memory>,
        dtype: StreamType,
    ) -> Result<Self> {
        let corpus = Data::need(ctx.data.calibration.as_ref(), "calibration")?;
        let length = corpus.length;
        let windows = match corpus.samples {
            Some(samples) => corpus.stream.spread(samples, length)?,
            None => (0..corpus.stream.windows(length)).collect(),
        };
        let device = &ctx.device.device;
        let places = Places::new(&ctx.model.config, &corpus.stream, &windows, length, device);
        let entrance = loader(ctx, &ctx.model.checkpoint).entrance()?;
        let dir = (memory == Some(Memory::Disk)).then(|| ctx.dir.to_owned());
        let keeping = Keeping { dtype, dir };
        let float = Activations::collect([windows.len(), length], &keeping, |range| {
            let samples: Vec<u32> = range.clone().map(|i| i as u32).collect();
            let rows: Vec<&[u32]> =
                range.map(|i| corpus.stream.window(windows[i], length)).collect();
            let tokens = CausalLm::tokens(&rows, device);
            Ok(entrance.embed(tokens, &places.of(&samples)))
        })?;
        Ok(Self { quantized: float.clone(), float, places })
    }

    /// The float block's output on the float stream; the block is gone when this returns, and so is the
    /// stream unless it is to stay.
    pub(super) fn target(
        &mut self,
        ctx: &StageContext<'_>,
        index: usize,
        float_stays: bool,
    ) -> Result<Activations> {
        let teacher = float_block(ctx, index)?;
        let none = Activations::none(self.float.keeping());
        let float =
            if float_stays { self.float.clone() } else { std::mem::replace(&mut self.float, none) };
        self.replace(ctx, &teacher, float, &|_, x| x)
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
        self.float = target;
        let none = Activations::none(self.float.keeping());
        let quantized = std::mem::replace(&mut self.quantized, none);
        self.quantized = self.replace(ctx, &baked, quantized, &tap)?;
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

    /// As [`Streams::forward`], in the place of what goes in where nothing else needs that.
    fn replace(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        x: Activations,
        tap: &Tap<'_>,
    ) -> Result<Activations> {
        x.replace(&ctx.device.device, |x, samples| {
            ctx.stop.check()?;
            Ok(block.forward_tapped(x, &self.places.of(samples), None, tap))
        })
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

/// Where streams may be kept, the fastest place first.
pub(super) const STREAM_PLACES: [Memory; 2] = [Memory::Host, Memory::Disk];

/// Refuses a place where no streams are kept.
pub(super) fn check_memory(memory: Option<Memory>) -> Result<()> {
    match memory.filter(|memory| !STREAM_PLACES.contains(memory)) {
        None => Ok(()),
        Some(memory) => Err(Error::usage(format!(
            "memory = \"{}\" is for stages that train the whole model; this one keeps the hidden states of its \
             calibration text in main memory or on the disk",
            memory.name()
        ))
        .fix("memory = \"host\" or \"disk\", or no such key")),
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
