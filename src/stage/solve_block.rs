//! One block under a method that looks at inputs: balance, observe, solve linear after linear.

use std::cell::RefCell;
use std::collections::BTreeMap;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{DType, Tensor, TensorData};

use super::StageContext;
use super::activations::Activations;
use super::balance::balance;
use super::streams::loader;
use crate::error::{Error, Result};
use crate::export::fewbit::Saved;
use crate::method::{MethodConfig, Needs, Problem};
use crate::model::{Block, Positions, Site};
use crate::quant::{Hessian, QuantizedWeight};

/// The quantized linears of block `index`, and the dense tensors that balancing changed.
pub(super) fn solve_block(
    method: &MethodConfig,
    ctx: &StageContext<'_>,
    index: usize,
    input: &Activations,
    positions: &Positions,
) -> Result<Saved> {
    let mut block = loader(ctx, ctx.model).block(index)?;
    let config = &ctx.model.config;
    let prefix = config.block_prefix(index);
    let mut saved = Saved::default();
    if !method.balance_exponents().is_empty() {
        saved.dense = balance(method, ctx, &prefix, &mut block, input, positions)?;
    }
    let compares = method.needs() == Needs::Outputs;
    let sites = observe(ctx, &block, input, positions, &Site::INPUTS, compares)?;
    for position in 0..block.linears.len() {
        ctx.stop.check()?;
        let (short, role) =
            (config.arch.linears[position].name, config.arch.linears[position].role);
        let name = format!("{prefix}.{short}");
        let Some(spec) = ctx.specs.get(&name) else { continue };
        let weight = block.linears[position].weight.val().transpose();
        let [out, inputs] = weight.dims();
        let layout = spec.layout([out, inputs]).map_err(|e| e.at(&name))?;
        let observed = &sites[&role.site()];
        let reference = Reference::new(ctx, &block, role.site(), observed, positions)?;
        let error = |replaced: &Tensor<2>| reference.error(ctx, &block, position, replaced);
        let problem = Problem {
            spec,
            layout,
            observer: ctx.observer,
            weight: &weight,
            feeds_scores: role.feeds_scores(),
            inputs: Some(&observed.hessian),
            output_error: if compares { Some(&error) } else { None },
        };
        let solved = method
            .solve(&problem)
            .and_then(|weight| weight.with_scales(ctx.scales))
            .map_err(|e| e.at(&name))?;
        replace(&mut block.linears[position], dense(ctx, &solved));
        saved.linears.push((name, solved, method.name().to_owned()));
    }
    saved.dense.retain(|name, _| {
        !name.strip_suffix(".weight").is_some_and(|linear| ctx.specs.contains_key(linear))
    });
    Ok(saved)
}

/// What enters one site of a block.
pub(super) struct Observed {
    /// Second moments over all tokens.
    pub hessian: Hessian,
    /// The inputs themselves, for methods that compare module outputs; else empty.
    pub inputs: Activations,
}

/// Inputs at some `sites`, over the whole stream; `keep` keeps them besides their moments.
pub(super) fn observe(
    ctx: &StageContext<'_>,
    block: &Block,
    input: &Activations,
    positions: &Positions,
    sites: &[Site],
    keep: bool,
) -> Result<BTreeMap<Site, Observed>> {
    let all: RefCell<BTreeMap<Site, Observed>> = RefCell::default();
    let tap = |site, x: Tensor<3>| {
        if sites.contains(&site) {
            let mut part = Activations::default();
            let rows = part.push(x.clone());
            let [_, _, width] = x.dims();
            let mut all = all.borrow_mut();
            let observed = all.entry(site).or_insert_with(|| Observed {
                hessian: Hessian::new(width),
                inputs: Activations::default(),
            });
            observed.hessian.add(&rows);
            if keep {
                observed.inputs.append(part);
            }
        }
        x
    };
    input.map(&ctx.device.device, |x| {
        ctx.stop.check()?;
        Ok(block.forward_tapped(x, positions, None, &tap))
    })?;
    Ok(all.into_inner())
}

/// The output that a linear's replacement is judged by: that of the attention for q, k and v, of
/// the MLP for gate and up, and the linear's own for o and down (AdaDim's and AWQ's choice).
pub(super) struct Reference<'a> {
    site: Site,
    observed: &'a Observed,
    positions: &'a Positions,
    output: Option<Activations>,
}

impl<'a> Reference<'a> {
    /// With `block` as it is now.
    pub(super) fn new(
        ctx: &StageContext<'_>,
        block: &Block,
        site: Site,
        observed: &'a Observed,
        positions: &'a Positions,
    ) -> Result<Self> {
        let mut reference = Self { site, observed, positions, output: None };
        if !observed.inputs.is_empty() && matches!(site, Site::Attention | Site::Mlp) {
            reference.output = Some(reference.module_output(ctx, block)?);
        }
        Ok(reference)
    }

    fn module_output(&self, ctx: &StageContext<'_>, block: &Block) -> Result<Activations> {
        self.observed.inputs.map(&ctx.device.device, |x| {
            ctx.stop.check()?;
            Ok(match self.site {
                Site::Attention => block.attention(x, self.positions, None, &|_, x| x),
                _ => block.mlp(x, &|_, x| x),
            })
        })
    }

    /// Mean squared change of the module's output between then and `block` as it is now.
    pub(super) fn block_error(&self, ctx: &StageContext<'_>, block: &Block) -> Result<f64> {
        match &self.output {
            Some(output) => Ok(self.module_output(ctx, block)?.mse(output)),
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

/// Puts a weight, `[out, in]`, into a linear.
pub(super) fn replace(linear: &mut Linear, weight: Tensor<2>) {
    linear.weight =
        Param::initialized(linear.weight.id, weight.transpose()).set_require_grad(false);
}

/// The weights that codes stand for, `[out, in]`, on the device.
fn dense(ctx: &StageContext<'_>, weight: &QuantizedWeight) -> Tensor<2> {
    let shape = [weight.layout.out, weight.layout.inputs];
    let data = TensorData::new(weight.dequantize(), shape);
    Tensor::<2>::from_data(data, &ctx.device.device).cast(DType::F32)
}
