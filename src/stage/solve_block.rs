//! One block under a method that looks at inputs: balance, observe, solve linear after linear.

use burn::tensor::{DType, Tensor, TensorData};

use super::activations::Activations;
use super::balance::balance;
use super::context::StageContext;
use super::observed::{Observed, Reference, observe, replace};
use super::places::Places;
use super::streams::loader;
use crate::error::Result;
use crate::export::fewbit::Saved;
use crate::method::{MethodConfig, Needs, Problem, RtnConfig};
use crate::model::{LinearSpec, Site};
use crate::quant::{QuantizedWeight, Repr};

/// The quantized linears of block `index`, and the dense tensors that balancing changed.
pub(super) fn solve_block(
    method: &MethodConfig,
    ctx: &StageContext<'_>,
    index: usize,
    input: &Activations,
    places: &Places,
) -> Result<Saved> {
    let mut block = loader(ctx, ctx.model).block(index)?;
    let config = &ctx.model.config;
    let prefix = config.block_prefix(index);
    let mut saved = Saved::default();
    if !method.balance_exponents().is_empty() {
        saved.dense = balance(method, ctx, &prefix, &mut block, input, places)?;
    }
    let compares = method.needs() == Needs::Outputs;
    let specs = config.specs(index);
    let fed: Vec<Site> = specs.iter().map(LinearSpec::site).collect();
    let sites = observe(ctx, &block, input, places, &fed, compares)?;
    for (position, linear) in specs.iter().enumerate() {
        ctx.stop.check()?;
        let name = format!("{prefix}.{}", linear.name);
        let Some(spec) = ctx.specs.get(&name) else { continue };
        let weight = block.linears[position].weight.val().transpose();
        let [out, inputs] = weight.dims();
        let layout = spec.layout([out, inputs]).map_err(|e| e.at(&name))?;
        // A matrix of second moments is made only where an expert saw nothing.
        let unseen;
        let observed = if let Some(observed) = sites.get(&linear.site()) {
            observed
        } else {
            unseen = Observed::none(inputs, input.keeping());
            &unseen
        };
        let reference = Reference::new(ctx, &block, linear.site(), observed, places)?;
        let error = |replaced: &Tensor<2>| reference.error(ctx, &block, position, replaced);
        let problem = Problem {
            spec,
            layout,
            observer: ctx.observer,
            weight: &weight,
            feeds_scores: linear.role.feeds_scores(),
            inputs: Some(&observed.hessian),
            output_error: if compares { Some(&error) } else { None },
        };
        // What no token entered has nothing but its weights to be judged by.
        let plain = MethodConfig::Rtn(RtnConfig {});
        let blind = observed.hessian.tokens() == 0 && method.leaves() == Repr::Uniform;
        let method = if blind { &plain } else { method };
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

/// The weights that codes stand for, `[out, in]`, on the device.
fn dense(ctx: &StageContext<'_>, weight: &QuantizedWeight) -> Tensor<2> {
    let shape = [weight.layout.out, weight.layout.inputs];
    let data = TensorData::new(weight.dequantize(), shape);
    Tensor::<2>::from_data(data, &ctx.device.device).cast(DType::F32)
}
