//! Laws that every learned method keeps, and the examples of each that can be followed on paper.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod examples;
mod laws;
mod toy;
mod tuning;
mod uniquanf;

use std::collections::BTreeSet;

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use fewbit::error::Result;
use fewbit::method::{
    FakeQuant, Method, MethodConfig, Moment, Start, attach, between_steps, fold, quantize,
};
use fewbit::quant::{
    Bits, Grid, GroupSize, MinMaxConfig, ObserverConfig, QuantSpec, QuantizedWeight, Symmetry,
    ZeroKind,
};
use fewbit::train::{self, Optimizer, OptimizerConfig, Rule};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SHAPE: [usize; 2] = [6, 16];
const GROUP_SIZES: [&str; 3] = ["tensor", "channel", "8"];
const SYMMETRIES: [Symmetry; 3] = [Symmetry::Asymmetric, Symmetry::AbsMax, Symmetry::FullRange];

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn matrix(values: &[f32], columns: usize, device: &Device) -> Tensor<2> {
    let shape = [values.len() / columns, columns];
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// `count` values around zero, roughly normal, with standard deviation `size`.
fn noise(seed: u64, count: usize, size: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..count).map(|_| one() * size).collect()
}

fn noisy(seed: u64, device: &Device) -> Tensor<2> {
    matrix(&noise(seed, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], device)
}

fn spec(bits: u8, group_size: &str, symmetry: Symmetry) -> QuantSpec {
    let group_size = match group_size {
        "tensor" => GroupSize::PerTensor,
        "channel" => GroupSize::PerChannel,
        size => GroupSize::Of(size.parse().unwrap()),
    };
    QuantSpec { bits: Bits::new(bits).unwrap(), group_size, symmetry }
}

fn asymmetric(bits: u8) -> QuantSpec {
    spec(bits, "channel", Symmetry::Asymmetric)
}

fn recipe(text: &str) -> MethodConfig {
    toml::from_str(text).unwrap()
}

fn min_max(zero_in_range: bool) -> ObserverConfig {
    ObserverConfig::MinMax(MinMaxConfig { zero_in_range })
}

fn rounded(spec: &QuantSpec, observer: &ObserverConfig, w: &Tensor<2>) -> QuantizedWeight {
    let layout = spec.layout(w.dims()).unwrap();
    quantize(&recipe("rtn = {}"), spec, observer, layout, w).unwrap()
}

/// A method on `w`, `[out, in]`.
fn start_from(method: &str, spec: &QuantSpec, w: &Tensor<2>, seed: u64) -> Result<Method> {
    let config = recipe(method);
    config.accepts(spec)?;
    let layout = spec.layout(w.dims())?;
    let weight = w.clone().reshape(layout.grouped());
    let observer = &ObserverConfig::default();
    config.init(&Start { spec, layout, observer, weight: &weight, seed })
}

fn start(method: &str, spec: &QuantSpec, w: &Tensor<2>) -> Method {
    start_from(method, spec, w, 0).unwrap()
}

/// A linear whose weight is `w`, with `method` attached.
fn linear(w: &Tensor<2>, method: Method, spec: &QuantSpec, trains_base: bool) -> Linear {
    let layout = spec.layout(w.dims()).unwrap();
    let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
    let weight = Param::initialized(ParamId::new(), w.clone().transpose());
    Linear { weight: attach(&weight, fake_quant, trains_base), bias: None }
}

fn started(method: &str, spec: &QuantSpec, w: &Tensor<2>) -> Linear {
    linear(w, start(method, spec, w), spec, recipe(method).trains_base())
}

fn folded(linear: &Linear) -> QuantizedWeight {
    fold(&linear.weight).unwrap().unwrap()
}

/// Steps of an optimizer towards the outputs of another weight.
fn trained(mut linear: Linear, steps: u64, rule: Rule, rate: f64, seed: u64) -> Linear {
    let [inputs, outputs] = linear.weight.dims();
    let device = linear.weight.base().device();
    let x = matrix(&noise(seed, 12 * inputs, 1.0), inputs, &device);
    let target = matrix(&noise(seed + 1, 12 * outputs, 1.0), outputs, &device);
    let mut optimizer = Optimizer::new(&OptimizerConfig { rule, ..OptimizerConfig::default() });
    for step in 1..=steps {
        let (next, _) = train::step(linear, &mut optimizer, 1, &|_| rate, |linear, _| {
            Ok((linear.forward(x.clone()) - target.clone()).square().mean())
        })
        .unwrap();
        linear = next;
        linear.weight = between_steps(&linear.weight, Moment::Step(step)).unwrap();
    }
    linear
}

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| (value + 0.0).to_bits()).collect() // -0 is 0
}

fn near(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let close = found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 2e-6);
    assert!(close, "{found:?} instead of {expected:?}");
}

fn grid_of(weight: &QuantizedWeight) -> (&[f32], &[f32], ZeroKind) {
    let Grid::Uniform { scale, zero_point, zero_kind } = &weight.grid else {
        panic!("another grid")
    };
    (scale, zero_point, *zero_kind)
}

/// How many values each group of a folded weight has.
fn values_per_group(weight: &QuantizedWeight) -> Vec<usize> {
    let codes = weight.codes.to_vec();
    let groups = codes.chunks(weight.layout.group_len);
    groups.map(|group| group.iter().collect::<BTreeSet<_>>().len()).collect()
}
