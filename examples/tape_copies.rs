//! How many copies of a weight one fake-quantized linear keeps on the tape.
//!
//! `cargo run --release --example tape_copies`: a chain of 1024 x 1024 linears on a short input, so
//! that weights are all that counts; resident size before and after the forward pass, divided by
//! the weights' bytes.
#![allow(clippy::print_stdout)] // an example prints

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use fewbit::method::{FakeQuant, FlexRoundConfig, MethodConfig, SeqConfig, Start, attach};
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::report::memory::current_gib;

const SIDE: usize = 1024;
const LINEARS: usize = 8;

fn main() -> fewbit::error::Result<()> {
    for (name, bits, method) in [
        ("none", 4, None),
        ("flexround w4", 4, Some(MethodConfig::FlexRound(FlexRoundConfig::default()))),
        ("seq w2", 2, Some(MethodConfig::Seq(SeqConfig::default()))),
    ] {
        let linears = chain(bits, method.as_ref())?;
        let device = Device::flex().autodiff();
        let forward = || {
            let input = Tensor::<2>::random([4, SIDE], Distribution::Default, &device);
            linears.iter().fold(input.require_grad(), |x, linear| linear.forward(x)).sum()
        };
        drop(forward().backward()); // the allocator's first growth is not the tape's
        let before = current_gib().unwrap_or(f64::NAN);
        let loss = forward();
        let after = current_gib().unwrap_or(f64::NAN);
        drop(loss.backward());
        let weights = (LINEARS * SIDE * SIDE * 4) as f64 / f64::from(1 << 30);
        println!("{name:<14} {:.2} weight-sized copies per linear", (after - before) / weights);
    }
    Ok(())
}

fn chain(bits: u8, method: Option<&MethodConfig>) -> fewbit::error::Result<Vec<Linear>> {
    let spec = QuantSpec {
        bits: Bits::new(bits)?,
        group_size: GroupSize::PerChannel,
        symmetry: Symmetry::Asymmetric,
    };
    let layout = spec.layout([SIDE, SIDE])?;
    let device = Device::flex();
    (0..LINEARS)
        .map(|_| {
            let weight = Tensor::<2>::random([SIDE, SIDE], Distribution::Default, &device) * 0.05;
            let mut linear = Linear {
                weight: Param::initialized(ParamId::new(), weight.clone().transpose()),
                bias: None,
            };
            if let Some(method) = method {
                let attached =
                    method.init(&Start::new(&spec, &ObserverConfig::default(), &weight))?;
                let fake_quant = FakeQuant::new(attached, layout, spec.bits, DType::F32);
                linear.weight = attach(&linear.weight, fake_quant, method.trains_base());
            }
            Ok(burn::module::Module::train(linear))
        })
        .collect()
}
