//! A packed folder in a module of one's own: `cargo run --release --example read_packed -- FOLDER`.
//!
//! Reads the first block's MLP of any folder that fewbit opens (dense or packed; by default the built-in model) into
//! plain `burn::nn::Linear`s, and runs it. A packed linear is decoded on the way; `quantized` gives its codes and
//! grid to whoever computes with those.
#![allow(clippy::print_stdout)] // an example prints

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::activation::silu;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use fewbit::error::{Error, Result};
use fewbit::export::{OpenModel, open_model};
use fewbit::model::{WeightSource, weight_name};
use fewbit::store::locate;

/// A gated MLP as anyone would write it.
#[derive(Debug, Module)]
struct Mlp {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    /// The MLP of a block, by the names that the folder's linears have.
    fn read(model: &OpenModel, block: usize, device: &Device) -> Result<Self> {
        let linear = |end: &str| -> Result<Linear> {
            let of_block =
                |name: &str| model.config.inner(name).is_some_and(|(index, _)| index == block);
            let mut linears = model.config.linears();
            let found = linears.find(|(name, _)| of_block(name) && name.ends_with(end));
            let (name, spec) =
                found.ok_or_else(|| Error::usage(format!("the model has no {end}")))?;
            if let Some(weight) = model.quantized(&name)? {
                println!("{name}: {} bits, {} groups", weight.bits, weight.grid.scales().len());
            }
            let [out, inputs] = spec.shape;
            let values = model.weight(&weight_name(&name), &[out, inputs])?;
            // burn keeps `[in, out]`, checkpoints `[out, in]`.
            let weight = Tensor::<2>::from_data(TensorData::new(values, [out, inputs]), device);
            Ok(Linear { weight: Param::from_tensor(weight.transpose()), bias: None })
        };
        Ok(Self { gate: linear("gate_proj")?, up: linear("up_proj")?, down: linear("down_proj")? })
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(silu(self.gate.forward(x.clone())) * self.up.forward(x))
    }
}

fn main() -> Result<()> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| "embedded:tinystories-656k".to_owned());
    let model = open_model(&locate::model(&folder)?)?;
    let device = Device::flex();
    let mlp = Mlp::read(&model, 0, &device)?;
    let input = Tensor::random([2, model.config.d_model], Distribution::Default, &device);
    let output = mlp.forward(input);
    println!("{:?}, mean {:.5}", output.dims(), output.mean().into_scalar::<f32>());
    Ok(())
}
