//! Balancing input channels before quantization (AWQ, arXiv 2306.00978): where activations are
//! large, weights are scaled up and what feeds them is scaled down, so that the float model stays
//! what it is while the important channels get finer grids.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Tensor, TensorData};

use super::StageContext;
use super::activations::Activations;
use super::solve_block::{Observed, Reference, observe, replace};
use crate::error::Result;
use crate::method::{MethodConfig, Problem};
use crate::model::{Block, LINEARS, Positions, RmsNorm, Site, weight_name};
use crate::store::HostTensor;

/// No channel is scaled by less than this before the factors are centred (the AWQ code's).
const SCALE_FLOOR: f32 = 1e-4;

/// Linears that share an input, and what produces it.
struct Group {
    site: Site,
    /// Positions in [`LINEARS`].
    members: &'static [usize],
    feeder: Feeder,
}

#[derive(Clone, Copy)]
enum Feeder {
    InputNorm,
    MlpNorm,
    /// Position in [`LINEARS`]: its output channels are the group's input channels.
    Linear(usize),
}

const GROUPS: [Group; 4] = [
    Group { site: Site::Attention, members: &[0, 1, 2], feeder: Feeder::InputNorm },
    Group { site: Site::AttentionOutput, members: &[3], feeder: Feeder::Linear(2) },
    Group { site: Site::Mlp, members: &[4, 5], feeder: Feeder::MlpNorm },
    Group { site: Site::MlpOutput, members: &[6], feeder: Feeder::Linear(5) },
];

/// Balances `block` in place; gives every dense tensor that changed, by full name.
pub(super) fn balance(
    method: &MethodConfig,
    ctx: &StageContext<'_>,
    prefix: &str,
    block: &mut Block,
    input: &Activations,
    positions: &Positions,
) -> Result<BTreeMap<String, HostTensor>> {
    let mut changed = BTreeMap::new();
    for group in GROUPS {
        ctx.stop.check()?;
        let quantized: Vec<usize> = (group.members.iter().copied())
            .filter(|i| ctx.specs.contains_key(&format!("{prefix}.{}", LINEARS[*i])))
            .collect();
        if quantized.is_empty() || !feeds(block, &group) {
            continue;
        }
        let sites = [group.site];
        let observed = &observe(ctx, block, input, positions, &sites, true)?[&group.site];
        let search = Search { method, ctx, prefix, positions, observed, group: &group, quantized };
        if let Some(factors) = search.best(block)? {
            apply(block, &group, &factors);
            note(&mut changed, prefix, block, &group);
        }
    }
    Ok(changed)
}

/// Whether the feeder's channels are the group's channels: with grouped heads v's are not o's.
fn feeds(block: &Block, group: &Group) -> bool {
    let Feeder::Linear(feeder) = group.feeder else { return true };
    let linears = block.linears();
    let [_, made] = linears[feeder].1.weight.dims();
    let [read, _] = linears[group.members[0]].1.weight.dims();
    made == read
}

struct Search<'a> {
    method: &'a MethodConfig,
    ctx: &'a StageContext<'a>,
    prefix: &'a str,
    positions: &'a Positions,
    observed: &'a Observed,
    group: &'a Group,
    quantized: Vec<usize>,
}

impl Search<'_> {
    /// The factors, `[in]`, of the exponent with the smallest output error; none when that is no
    /// balancing at all. The first of equals wins.
    fn best(&self, block: &Block) -> Result<Option<Tensor<1>>> {
        let magnitude = self.observed.inputs.mean_magnitude();
        let short = LINEARS[self.group.members[0]];
        let reference = Reference::new(self.ctx, block, short, self.observed, self.positions)?;
        let mut best: Option<(f64, Option<Tensor<1>>)> = None;
        for exponent in self.method.balance_exponents() {
            self.ctx.stop.check()?;
            let factors = factors(&magnitude, exponent);
            let factors = Tensor::<1>::from_data(factors.as_slice(), &self.ctx.device.device);
            let error = self.error(block, &reference, &factors)?;
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, (exponent != 0.0).then_some(factors)));
            }
        }
        Ok(best.and_then(|(_, factors)| factors))
    }

    /// The output error with every quantized member rounded after scaling and scaled back.
    fn error(&self, block: &Block, reference: &Reference<'_>, factors: &Tensor<1>) -> Result<f64> {
        let mut rounded = block.clone();
        let mut own = 0.0;
        for position in &self.quantized {
            let name = format!("{}.{}", self.prefix, LINEARS[*position]);
            let spec = &self.ctx.specs[&name];
            let weight = block.linears()[*position].1.weight.val().transpose();
            let [out, inputs] = weight.dims();
            let row = factors.clone().reshape([1, inputs]);
            let scaled = weight * row.clone();
            let problem = Problem {
                spec,
                layout: spec.layout([out, inputs]).map_err(|e| e.at(&name))?,
                observer: self.ctx.observer,
                weight: &scaled,
                feeds_scores: false,
                inputs: None,
                output_error: None,
            };
            let solved = self.method.solve(&problem).map_err(|e| e.at(&name))?;
            let values = TensorData::new(solved.dequantize(), [out, inputs]);
            let replaced = Tensor::<2>::from_data(values, &self.ctx.device.device) / row;
            if matches!(self.group.site, Site::AttentionOutput | Site::MlpOutput) {
                own += reference.error(self.ctx, block, *position, &replaced)?;
            } else {
                replace(rounded.linears_mut()[*position].1, replaced);
            }
        }
        match self.group.site {
            Site::AttentionOutput | Site::MlpOutput => Ok(own),
            _ => reference.block_error(self.ctx, &rounded),
        }
    }
}

/// `magnitude^exponent`, centred so that the geometric mean of the extremes is 1.
fn factors(magnitude: &[f32], exponent: f64) -> Vec<f32> {
    let raised: Vec<f32> =
        magnitude.iter().map(|m| m.powf(exponent as f32).max(SCALE_FLOOR)).collect();
    let (low, high) =
        raised.iter().fold((f32::INFINITY, 0.0f32), |(low, high), s| (low.min(*s), high.max(*s)));
    let centre = (low * high).sqrt();
    raised.iter().map(|s| s / centre).collect()
}

/// Multiplies the members' input channels and divides what feeds them.
fn apply(block: &mut Block, group: &Group, factors: &Tensor<1>) {
    let channels = factors.dims()[0];
    for member in group.members {
        let linear = &mut block.linears_mut()[*member];
        let weight = linear.1.weight.val().transpose() * factors.clone().reshape([1, channels]);
        replace(linear.1, weight);
    }
    let divide = |norm: &mut RmsNorm| {
        let weight = norm.weight.val() / factors.clone();
        norm.weight = Param::initialized(norm.weight.id, weight).set_require_grad(false);
    };
    match group.feeder {
        Feeder::InputNorm => divide(&mut block.input_layernorm),
        Feeder::MlpNorm => divide(&mut block.post_attention_layernorm),
        Feeder::Linear(position) => {
            let linear: &mut Linear = block.linears_mut()[position].1;
            let weight = linear.weight.val().transpose() / factors.clone().reshape([channels, 1]);
            replace(linear, weight);
            if let Some(bias) = &mut linear.bias {
                let value = bias.val() / factors.clone();
                *bias = Param::initialized(bias.id, value).set_require_grad(false);
            }
        }
    }
}

/// The changed tensors as they are now.
fn note(changed: &mut BTreeMap<String, HostTensor>, prefix: &str, block: &Block, group: &Group) {
    let mut vector = |name: &str, value: Tensor<1>| {
        let values: Vec<f32> = value.into_data().iter::<f32>().collect();
        changed.insert(format!("{prefix}.{name}"), HostTensor::f32([values.len()], &values));
    };
    let mut linears: Vec<usize> = group.members.to_vec();
    match group.feeder {
        Feeder::InputNorm => {
            vector("input_layernorm.weight", block.input_layernorm.weight.val());
        }
        Feeder::MlpNorm => {
            vector("post_attention_layernorm.weight", block.post_attention_layernorm.weight.val());
        }
        Feeder::Linear(position) => {
            let (name, linear) = block.linears()[position];
            if let Some(bias) = &linear.bias {
                vector(&format!("{name}.bias"), bias.val());
            }
            linears.push(position);
        }
    }
    for position in linears {
        let (name, linear) = block.linears()[position];
        let weight = linear.weight.val().transpose();
        let shape = weight.dims();
        let values: Vec<f32> = weight.into_data().iter::<f32>().collect();
        changed.insert(weight_name(&format!("{prefix}.{name}")), HostTensor::f32(shape, &values));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{DType, Device, Distribution};

    use super::*;
    use crate::model::{Loader, ModelConfig};
    use crate::store::safetensors::Checkpoint;

    #[test]
    fn the_float_block_stays_what_it_is() {
        let device = Device::flex();
        for model in ["stories260k", "tinystories-656k"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("datasets").join(model);
            let config = ModelConfig::read(&folder).unwrap();
            let source = Checkpoint::open(&folder).unwrap();
            let loader =
                Loader { config: &config, source: &source, device: &device, dtype: DType::F32 };
            let mut block = loader.block(0).unwrap();
            let positions = Positions::new(&config, 0, 16, DType::F32, &device);
            let x = [2, 16, config.d_model];
            let x = Tensor::<3>::random(x, Distribution::Normal(0.0, 1.0), &device);
            let before = block.forward(x.clone(), &positions);
            let mut balanced = 0;
            for group in &GROUPS {
                if !feeds(&block, group) {
                    continue;
                }
                let [inputs, _] = block.linears()[group.members[0]].1.weight.dims();
                let magnitude: Vec<f32> = (0..inputs).map(|c| 0.05 + (c * c % 97) as f32).collect();
                let values = factors(&magnitude, 0.5);
                let (low, high) = (values.iter().copied())
                    .fold((f32::INFINITY, 0.0f32), |(low, high), s| (low.min(s), high.max(s)));
                assert!((low * high - 1.0).abs() < 1e-5);
                apply(&mut block, group, &Tensor::from_data(values.as_slice(), &device));
                balanced += 1;
            }
            // Grouped heads: v's channels are not o's.
            assert_eq!(balanced, if config.n_kv_heads == config.n_heads { 4 } else { 3 });
            let after = block.forward(x, &positions);
            let largest = before.clone().abs().max().into_scalar::<f32>();
            let change = (after - before).abs().max().into_scalar::<f32>();
            assert!(change < 1e-5 * largest, "{model}: {change} of {largest}");
        }
    }

    #[test]
    fn exponent_zero_is_no_balance() {
        assert!(factors(&[0.1, 3.0, 0.0], 0.0).iter().all(|s| s.to_bits() == 1.0f32.to_bits()));
    }
}
