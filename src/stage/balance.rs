//! Balancing input channels before quantization (AWQ, arXiv 2306.00978): where activations are
//! large, weights are scaled up and what feeds them is scaled down, so that the float model stays
//! what it is while the important channels get finer grids.

use std::collections::BTreeMap;

use burn::module::Param;
use burn::tensor::{Tensor, TensorData};

use super::activations::Activations;
use super::context::StageContext;
use super::observed::{Observed, Reference, judged_alone, observe, replace};
use super::places::Places;
use crate::error::Result;
use crate::method::{MethodConfig, Problem};
use crate::model::{Activation, Block, ModelConfig, Norm, Residual, Role, Site, weight_name};
use crate::store::HostTensor;

/// No channel is scaled by less than this before the factors are centred (the AWQ code's).
const SCALE_FLOOR: f32 = 1e-4;

/// Linears that share an input, and what produces it.
struct Group {
    site: Site,
    /// Positions in the description's list of linears.
    members: Vec<usize>,
    feeder: Feeder,
}

#[derive(Clone, Copy)]
enum Feeder {
    /// The norm before attention or the MLP.
    Norm(&'static str),
    /// Rows of a linear, from one on: its output channels are the group's input channels.
    Rows(usize, usize),
}

/// What of a block can be balanced: where nothing but one norm, or rows of one linear, produces
/// an input, and factors pass through what stands between.
fn groups(config: &ModelConfig, index: usize) -> Vec<Group> {
    let (arch, specs) = (&config.arch, config.specs(index));
    let part = |role: Role, expert: Option<usize>| {
        specs.iter().position(|spec| spec.role == role && spec.expert == expert)
    };
    let place = |role: Role| part(role, None);
    let norm = |norm: Option<&'static str>| norm.map(Feeder::Norm);
    let [q, kv] = [config.n_heads, config.n_kv_heads].map(|heads| heads * config.head_dim);
    // With grouped heads a value feeds several inputs of the output.
    let values = place(Role::Value).map(|place| Feeder::Rows(place, 0));
    let values = values.or(place(Role::QueryKeyValue).map(|place| Feeder::Rows(place, q + kv)));
    let passes = place(Role::Gate).is_some() || arch.activation == Activation::Relu;
    let up = place(Role::Up).filter(|_| passes).map(|place| Feeder::Rows(place, 0));
    let up = up.or(place(Role::GateUp).map(|place| Feeder::Rows(place, config.d_ff)));
    // A norm that attention and MLP share has two readers.
    let shared = arch.residual == Residual::Parallel && arch.norms.mlp_input.is_none();
    // The norm before experts has the router as a reader, too.
    let experts = config.experts(index).map_or(0, |experts| experts.count);
    let feeders = [
        (Site::Attention, norm(arch.norms.attention_input).filter(|_| !shared)),
        (Site::AttentionOutput, values.filter(|_| q == kv)),
        (Site::Mlp, norm(arch.norms.mlp_input).filter(|_| experts == 0)),
        (Site::MlpOutput, up),
    ];
    let of_experts = (0..experts).map(|expert| {
        let up = part(Role::Up, Some(expert)).map(|place| Feeder::Rows(place, 0));
        (Site::ExpertOutput(expert), up)
    });
    let group = |(site, feeder): (Site, Option<Feeder>)| {
        let members = specs.iter().enumerate().filter(|(_, spec)| spec.site() == site);
        Some(Group { site, members: members.map(|(place, _)| place).collect(), feeder: feeder? })
    };
    feeders.into_iter().chain(of_experts).filter_map(group).collect()
}

/// Balances `block` in place; gives every dense tensor that changed, by full name.
pub(super) fn balance(
    method: &MethodConfig,
    ctx: &StageContext<'_>,
    prefix: &str,
    block: &mut Block,
    input: &Activations,
    places: &Places,
) -> Result<BTreeMap<String, HostTensor>> {
    let mut changed = BTreeMap::new();
    let groups = groups(&ctx.model.config, block.index);
    let of_experts: Vec<Site> =
        groups.iter().map(|group| group.site).filter(|site| site.expert().is_some()).collect();
    let mut seen_by_experts = None;
    for group in groups {
        ctx.stop.check()?;
        let quantized: Vec<usize> = (group.members.iter().copied())
            .filter(|place| ctx.specs.contains_key(&full_name(prefix, block, *place)))
            .collect();
        if quantized.is_empty() {
            continue;
        }
        let look = |sites: &[Site]| observe(ctx, block, input, places, sites, true);
        let alone;
        let seen = if group.site.expert().is_some() {
            // Balancing an expert leaves what the others read as it is: one pass serves them all.
            if seen_by_experts.is_none() {
                seen_by_experts = Some(look(&of_experts)?);
            }
            seen_by_experts.as_ref()
        } else {
            alone = look(&[group.site])?;
            Some(&alone)
        };
        // An expert that no token went to stays as it is.
        let Some(observed) = seen.and_then(|seen| seen.get(&group.site)) else { continue };
        let search = Search { method, ctx, prefix, places, observed, group: &group, quantized };
        if let Some(factors) = search.best(block)? {
            apply(block, &group, &factors);
            note(&mut changed, prefix, block, &group);
        }
    }
    Ok(changed)
}

fn full_name(prefix: &str, block: &Block, place: usize) -> String {
    format!("{prefix}.{}", block.config.specs(block.index)[place].name)
}

struct Search<'a> {
    method: &'a MethodConfig,
    ctx: &'a StageContext<'a>,
    prefix: &'a str,
    places: &'a Places,
    observed: &'a Observed,
    group: &'a Group,
    quantized: Vec<usize>,
}

impl Search<'_> {
    /// The factors, `[in]`, of the exponent with the smallest output error; none when that is no
    /// balancing at all. The first of equals wins.
    fn best(&self, block: &Block) -> Result<Option<Tensor<1>>> {
        let magnitude = self.observed.inputs.mean_magnitude()?;
        let site = self.group.site;
        let reference = Reference::new(self.ctx, block, site, self.observed, self.places)?;
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
            let name = full_name(self.prefix, block, *position);
            let spec = &self.ctx.specs[&name];
            let weight = block.linears[*position].weight.val().transpose();
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
            if judged_alone(self.group.site) {
                own += reference.error(self.ctx, block, *position, &replaced)?;
            } else {
                replace(&mut rounded.linears[*position], replaced);
            }
        }
        if judged_alone(self.group.site) {
            return Ok(own);
        }
        reference.block_error(self.ctx, &rounded)
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
    for member in &group.members {
        let linear = &mut block.linears[*member];
        let weight = linear.weight.val().transpose() * factors.clone().reshape([1, channels]);
        replace(linear, weight);
    }
    match group.feeder {
        Feeder::Norm(_) => {
            if let Some(norm) = input_norm(block, group.site) {
                norm.divide(factors);
            }
        }
        Feeder::Rows(place, first) => {
            let linear = &mut block.linears[place];
            let [_, out] = linear.weight.dims();
            // The other rows are divided by one.
            let ones = |rows: usize| Tensor::<1>::ones([rows], &factors.device());
            let parts = vec![ones(first), factors.clone(), ones(out - first - channels)];
            let parts = parts.into_iter().filter(|part| part.dims()[0] > 0).collect();
            let divisors = Tensor::cat(parts, 0);
            let weight = linear.weight.val().transpose() / divisors.clone().reshape([out, 1]);
            replace(linear, weight);
            if let Some(bias) = &mut linear.bias {
                let value = bias.val() / divisors;
                *bias = Param::initialized(bias.id, value).set_require_grad(false);
            }
        }
    }
}

fn input_norm(block: &mut Block, site: Site) -> Option<&mut Norm> {
    match site {
        Site::Attention => block.norms.attention_input.as_mut(),
        _ => block.norms.mlp_input.as_mut(),
    }
}

/// The changed tensors as they are now.
fn note(
    changed: &mut BTreeMap<String, HostTensor>,
    prefix: &str,
    block: &mut Block,
    group: &Group,
) {
    let mut vector = |name: &str, value: Tensor<1>| {
        let values: Vec<f32> = value.into_data().iter::<f32>().collect();
        changed.insert(format!("{prefix}.{name}"), HostTensor::f32([values.len()], &values));
    };
    let mut linears: Vec<usize> = group.members.clone();
    match group.feeder {
        Feeder::Norm(name) => {
            if let Some(norm) = input_norm(block, group.site) {
                vector(&format!("{name}.weight"), norm.weight.val());
                if let Some(bias) = &norm.bias {
                    vector(&format!("{name}.bias"), bias.val());
                }
            }
        }
        Feeder::Rows(place, _) => {
            let name = block.config.specs(block.index)[place].name;
            if let Some(bias) = &block.linears[place].bias {
                vector(&format!("{name}.bias"), bias.val());
            }
            linears.push(place);
        }
    }
    for place in linears {
        let weight = block.linears[place].weight.val().transpose();
        let shape = weight.dims();
        let values: Vec<f32> = weight.into_data().iter::<f32>().collect();
        let name = weight_name(&full_name(prefix, block, place));
        changed.insert(name, HostTensor::f32(shape, &values));
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{DType, Device, Distribution};

    use super::*;
    use crate::model::{Loader, Positions, open_folder};

    /// Of every family that `tests/parity` has a model of.
    #[test]
    fn the_float_block_stays_what_it_is() {
        let device = Device::flex();
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tiny = std::fs::read_dir(root.join("tests/parity")).unwrap();
        let tiny = tiny.map(|entry| entry.unwrap().path()).filter(|dir| dir.is_dir());
        let stories =
            ["stories260k", "tinystories-656k"].map(|name| root.join("datasets").join(name));
        for folder in tiny.chain(stories) {
            let (config, source) = open_folder(&folder).unwrap();
            let loader =
                Loader { config: &config, source: &source, device: &device, dtype: DType::F32 };
            let mut block = loader.block(0).unwrap();
            let positions = Positions::new(&config, 0, 16, DType::F32, &device);
            let x = [2, 16, config.d_model];
            let x = Tensor::<3>::random(x, Distribution::Normal(0.0, 1.0), &device);
            let before = block.forward(x.clone(), &positions);
            let groups = groups(&config, 0);
            for group in &groups {
                let [inputs, _] = block.linears[group.members[0]].weight.dims();
                let magnitude: Vec<f32> = (0..inputs).map(|c| 0.05 + (c * c % 97) as f32).collect();
                let values = factors(&magnitude, 0.5);
                let (low, high) = (values.iter().copied())
                    .fold((f32::INFINITY, 0.0f32), |(low, high), s| (low.min(s), high.max(s)));
                assert!((low * high - 1.0).abs() < 1e-5);
                apply(&mut block, group, &Tensor::from_data(values.as_slice(), &device));
            }
            if config.model_type == "llama" {
                // Grouped heads: v's channels are not o's.
                let expected = if config.n_kv_heads == config.n_heads { 4 } else { 3 };
                assert_eq!(groups.len(), expected);
            }
            let after = block.forward(x, &positions);
            let largest = before.clone().abs().max().into_scalar::<f32>();
            let change = (after - before).abs().max().into_scalar::<f32>();
            assert!(change < 2e-5 * largest, "{}: {change} of {largest}", folder.display());
        }
    }

    #[test]
    fn exponent_zero_is_no_balance() {
        assert!(factors(&[0.1, 3.0, 0.0], 0.0).iter().all(|s| s.to_bits() == 1.0f32.to_bits()));
    }
}
