//! What enters the linears of a block, and the outputs that their replacements are judged by.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::Tensor;

use super::activations::{Activations, Keeping, values_of};
use super::context::StageContext;
use super::places::Places;
use crate::error::{Error, Result};
use crate::model::{Block, Site};
use crate::quant::Hessian;

/// What enters one site of a block.
pub(super) struct Observed {
    /// Second moments over all tokens.
    pub hessian: Hessian,
    /// The inputs themselves, for methods that compare module outputs; else empty.
    pub inputs: Activations,
}

impl Observed {
    /// Nothing yet, at a site of this width.
    pub(super) fn none(width: usize, keeping: &Keeping) -> Self {
        Self { hessian: Hessian::new(width), inputs: Activations::none(keeping) }
    }
}

/// Inputs at some `sites`, over the whole stream; `keep` keeps them besides their moments.
pub(super) fn observe(
    ctx: &StageContext<'_>,
    block: &Block,
    input: &Activations,
    places: &Places,
    sites: &[Site],
    keep: bool,
) -> Result<BTreeMap<Site, Observed>> {
    let all: RefCell<BTreeMap<Site, Observed>> = RefCell::default();
    let failed: RefCell<Option<Error>> = RefCell::default();
    let tap = |site, x: Tensor<3>| {
        if sites.contains(&site) {
            let (shape, rows) = (x.dims(), values_of(x.clone()));
            let mut all = all.borrow_mut();
            let none = || Observed::none(shape[2], input.keeping());
            let observed = all.entry(site).or_insert_with(none);
            observed.hessian.add(&rows);
            if keep && let Err(error) = observed.inputs.add(&rows, shape) {
                *failed.borrow_mut() = Some(error);
            }
        }
        x
    };
    input.each(&ctx.device.device, |x, samples| {
        ctx.stop.check()?;
        block.forward_tapped(x, &places.of(samples), None, &tap);
        failed.borrow_mut().take().map_or(Ok(()), Err)
    })?;
    Ok(all.into_inner())
}

/// The output that a linear's replacement is judged by: that of the attention for q, k and v, of
/// the MLP for gate and up, and the linear's own for o and down (AdaDim's and AWQ's choice).
pub(super) struct Reference<'a> {
    site: Site,
    observed: &'a Observed,
    places: &'a Places,
    output: Option<Activations>,
}

impl<'a> Reference<'a> {
    /// With `block` as it is now.
    pub(super) fn new(
        ctx: &StageContext<'_>,
        block: &Block,
        site: Site,
        observed: &'a Observed,
        places: &'a Places,
    ) -> Result<Self> {
        let mut reference = Self { site, observed, places, output: None };
        if !observed.inputs.is_empty() && !judged_alone(site) {
            let forward = |x: Tensor<3>, samples: &[u32]| reference.forward(ctx, block, x, samples);
            reference.output = Some(observed.inputs.map(&ctx.device.device, forward)?);
        }
        Ok(reference)
    }

    /// Of the inputs with these numbers, which are those of windows where the module is attention.
    fn forward(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        x: Tensor<3>,
        samples: &[u32],
    ) -> Result<Tensor<3>> {
        ctx.stop.check()?;
        Ok(match self.site {
            Site::Attention => block.attention(x, &self.places.of(samples), None, &|_, x| x),
            Site::Expert(expert) => block.expert(expert, x, &|_, x| x),
            _ => block.mlp(x, &|_, x| x),
        })
    }

    /// Mean squared change of the module's output between then and `block` as it is now.
    pub(super) fn block_error(&self, ctx: &StageContext<'_>, block: &Block) -> Result<f64> {
        let inputs = &self.observed.inputs;
        match &self.output {
            Some(output) => inputs.mse_through(&ctx.device.device, output, |x, samples| {
                self.forward(ctx, block, x, samples)
            }),
            None => Err(Error::failed("a linear's own output is judged by its weight")),
        }
    }

    /// Mean squared change of the output when linear number `position` has weight `replaced`.
    pub(super) fn error(
        &self,
        ctx: &StageContext<'_>,
        block: &Block,
        position: usize,
        replaced: &Tensor<2>,
    ) -> Result<f64> {
        if self.output.is_some() {
            let mut block = block.clone();
            replace(&mut block.linears[position], replaced.clone());
            return self.block_error(ctx, &block);
        }
        let weight = block.linears[position].weight.val().transpose();
        let change: Vec<f32> = (replaced.clone() - weight).into_data().iter::<f32>().collect();
        let [out, _] = replaced.dims();
        // The Hessian is twice the mean outer product.
        Ok(self.observed.hessian.weighted_error(&change, out) / (2.0 * out as f64))
    }
}

/// Whether the linear that reads a site is judged by its own output.
pub(super) fn judged_alone(site: Site) -> bool {
    matches!(site, Site::AttentionOutput | Site::MlpOutput | Site::ExpertOutput(_))
}

/// Puts a weight, `[out, in]`, into a linear.
pub(super) fn replace(linear: &mut Linear, weight: Tensor<2>) {
    linear.weight =
        Param::initialized(linear.weight.id, weight.transpose()).set_require_grad(false);
}
