//! The output head: rounded to nearest by the first stage that quantizes, when an override names it.
//!
//! No method learns it: it is no part of a block, and distillation brings its gradient through a
//! frozen head. A tied model gets a head of its own; the embedding stays as it is.

use burn::tensor::{Tensor, TensorData};

use super::context::StageContext;
use crate::error::Result;
use crate::export::fewbit::Saved;
use crate::method::{self, MethodConfig, RtnConfig};
use crate::model::{WeightSource, head_name};
use crate::quant::{QuantSpec, QuantizedWeight};
use crate::store::TensorSource;

/// Rounds the head and saves it, or takes what was saved; nothing when this stage has no such task.
pub(super) fn round(ctx: &mut StageContext<'_>) -> Result<()> {
    let Some(spec) = ctx.head else { return Ok(()) };
    let path = ctx.dir.join("head.safetensors");
    let saved = if path.exists() {
        Saved::read(&path)?
    } else {
        let weight = rounded(ctx, &spec)?;
        let linears = vec![(ctx.model.config.head().to_owned(), weight, "rtn".to_owned())];
        let mut saved = Saved { linears, ..Saved::default() };
        // A tied checkpoint may hold the embedding under the head's name, which is taken now.
        let (config, source) = (&ctx.model.config, &ctx.model.checkpoint);
        let embedding = config.embedding();
        if !source.contains(&embedding) {
            saved.dense.insert(embedding, source.read(&head_name(config, source))?);
        }
        saved.write(&path)?;
        saved
    };
    ctx.take(saved, &path)
}

/// The float head on its grid.
pub(super) fn rounded(ctx: &StageContext<'_>, spec: &QuantSpec) -> Result<QuantizedWeight> {
    let (config, source) = (&ctx.model.config, &ctx.model.checkpoint);
    let shape = config.head_shape();
    let values = source.read_f32(&head_name(config, source), &shape)?;
    let weight = Tensor::from_data(TensorData::new(values, shape), &ctx.device.device);
    let rtn = MethodConfig::Rtn(RtnConfig {});
    let layout = spec.layout(shape)?;
    method::quantize(&rtn, spec, ctx.observer, layout, &weight)
        .and_then(|weight| weight.with_scales(ctx.scales))
        .map_err(|e| e.at(config.head()))
}
