//! A method from outside: `cargo run --release --example own_method`.
//!
//! Half-quadratic quantization (HQQ; Badri and Shaji, 2023) is no method of fewbit's. Here it is a [`Solver`]: a weight
//! in, codes and a grid out. Steps are those of the weights' range; zero points are real numbers, moved so that a
//! few large errors count for less than many small ones (a quasi-norm below 1). The linears of the built-in model
//! become 3-bit codes in groups of 64, are compared with plain rounding, and are packed into `own_method/` behind the
//! gate that every export passes.
#![allow(clippy::print_stdout)] // an example prints

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::{DType, Device, Tensor, TensorData};
use fewbit::error::Result;
use fewbit::export::{self, Format, FormatsConfig, Gate, Loss, ModelParts, Provenance};
use fewbit::method::{MethodConfig, Needs, Problem, RtnConfig, Solver, quantize};
use fewbit::model::{ModelTap, WeightSource, open_folder, weight_name};
use fewbit::quant::{
    Bits, Grid, GroupSize, ObserverConfig, QuantSpec, QuantizedWeight, Repr, Symmetry,
};
use fewbit::stop::StopFlag;
use fewbit::store::locate;
use fewbit::store::safetensors::Checkpoint;
use fewbit::task::Gauge;

/// Half-quadratic quantization.
struct Hqq;

/// Its keys.
struct HqqConfig {
    /// Passes over the zero points.
    rounds: usize,
    /// The quasi-norm of the errors, below 1.
    norm: f32,
}

impl Solver for Hqq {
    type Config = HqqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const NEEDS: Needs = Needs::Weight;

    fn accepts(_: &HqqConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn solve(config: &HqqConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let Problem { spec, layout, .. } = *problem;
        let weight = problem.weight.clone().reshape(layout.grouped());
        let levels = f32::from(spec.bits.max_code());
        let (low, high) = (weight.clone().min_dim(1), weight.clone().max_dim(1));
        let step = ((high - low.clone()) / levels).clamp_min(1e-8);
        let mut zero = low.neg() / step.clone();
        let codes = |zero: &Tensor<2>| {
            (weight.clone() / step.clone() + zero.clone()).round().clamp(0.0, levels)
        };
        // How firmly an error has to be an error to be taken for one; grows.
        let mut beta = step.clone().recip();
        for _ in 0..config.rounds {
            let codes = codes(&zero);
            let error = weight.clone() - (codes.clone() - zero) * step.clone();
            let size = error.clone().abs().clamp_min(1e-8);
            let shrunk =
                (size.clone() - size.powf_scalar(config.norm - 1.0) / beta.clone()).clamp_min(0.0);
            let outlier = error.sign() * shrunk;
            zero = (codes - (weight.clone() - outlier) / step.clone()).mean_dim(1);
            beta = beta * 1.01;
        }
        let host = |tensor: Tensor<2>| tensor.into_data().iter::<f32>().collect::<Vec<f32>>();
        let codes: Vec<u8> = host(codes(&zero)).into_iter().map(|code| code as u8).collect();
        QuantizedWeight::new(&codes, Grid::uniform(host(step), host(zero)), spec.bits, layout)
    }
}

/// The model with its linears as codes.
struct Coded<'a> {
    float: &'a Checkpoint,
    linears: &'a BTreeMap<String, (QuantizedWeight, String)>,
}

impl WeightSource for Coded<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.linears.get(name.trim_end_matches(".weight")) {
            Some((weight, _)) => Ok(weight.dequantize()),
            None => self.float.weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.float.contains(name)
    }

    fn coded(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        Ok(self.linears.get(name).map(|(weight, _)| weight.clone()))
    }
}

fn main() -> Result<()> {
    let device = Device::flex();
    let dir = locate::model("embedded:tinystories-656k")?;
    let (config, float) = open_folder(&dir)?;
    let group_size = GroupSize::Of(64.try_into().unwrap_or(std::num::NonZeroUsize::MIN));
    let spec = QuantSpec { bits: Bits::new(3)?, group_size, symmetry: Symmetry::Asymmetric };
    let observer = ObserverConfig::default();
    let mut linears = BTreeMap::new();
    let mut errors = [0.0, 0.0];
    for (name, linear) in config.linears() {
        let values = float.weight(&weight_name(&name), &linear.shape)?;
        let weight = Tensor::<2>::from_data(TensorData::new(values.clone(), linear.shape), &device);
        let layout = spec.layout(linear.shape)?;
        let problem = Problem {
            spec: &spec,
            layout,
            observer: &observer,
            weight: &weight,
            feeds_scores: false,
            inputs: None,
            output_error: None,
        };
        let solved = Hqq::solve(&HqqConfig { rounds: 20, norm: 0.7 }, &problem)?;
        let rounded =
            quantize(&MethodConfig::Rtn(RtnConfig::default()), &spec, &observer, layout, &weight)?;
        for (error, weight) in errors.iter_mut().zip([&solved, &rounded]) {
            *error +=
                Loss::between(&values, &weight.dequantize()).map_or(0.0, |loss| loss.relative);
        }
        linears.insert(name, (solved, "hqq".to_owned()));
    }
    let [hqq, rtn] = errors.map(|error| 100.0 * error / linears.len() as f64);
    println!("off the float weights: hqq {hqq:.2} %, plain rounding {rtn:.2} %");
    let coded = Coded { float: &float, linears: &linears };
    let stop = StopFlag::default();
    let prompts = Gauge::prompts(None, &config);
    let gauge = Gauge {
        device: &device,
        dtype: DType::F32,
        prompts,
        text: None,
        stop: &stop,
        progress: &|_, _| (),
    };
    let before = gauge.measure(&config, &float, ModelTap::default())?;
    let after = gauge.measure(&config, &coded, ModelTap::default())?;
    println!("loss on prompts: float {:.3}, hqq {:.3}", before.prompts_nll, after.prompts_nll);
    let parts = ModelParts {
        dir: &dir,
        source: &float,
        quantized: &linears,
        dense: &BTreeMap::new(),
        activations: None,
        provenance: Provenance::default(),
    };
    let gate = Gate { gauge: &gauge, trained: &after };
    let format = Format::Fewbit;
    let options = FormatsConfig::of(format, &[])?;
    let written = export::write(&parts, format, &options, Path::new("own_method"), &gate)?;
    println!("{}: {:.2} bits a weight", written.path.display(), written.bits_per_weight);
    Ok(())
}
