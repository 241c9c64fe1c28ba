//! The tape holds about one copy of a fake-quantized weight, that which the linear multiplies with.
//! Alone in its process, so that nothing else counts.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use fewbit::method::{FakeQuant, FlexRoundConfig, Method, MethodConfig, Start, attach, attached};
use fewbit::ops;
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::report::memory::current_gib;

const LINEARS: usize = 6;
const WIDTH: usize = 1024;
/// One copy of every weight.
const COPY_GIB: f64 = (LINEARS * WIDTH * WIDTH * 4) as f64 / (1u64 << 30) as f64;
/// Copies that the operations of ours (one) and of burn (more than four) are told apart by.
const BETWEEN: f64 = 2.0;

fn linear(device: &Device) -> Linear {
    let w = Tensor::<2>::random([WIDTH, WIDTH], Distribution::Normal(0.0, 0.02), device);
    let spec = QuantSpec {
        bits: Bits::new(4).unwrap(),
        group_size: GroupSize::PerChannel,
        symmetry: Symmetry::Asymmetric,
    };
    let method = MethodConfig::FlexRound(FlexRoundConfig {})
        .init(&Start::new(&spec, &ObserverConfig::default(), &w))
        .unwrap();
    let layout = spec.layout(w.dims()).unwrap();
    let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
    let weight = Param::initialized(ParamId::new(), w.transpose());
    Linear { weight: attach(&weight, fake_quant, false), bias: None }
}

/// What resident memory grew by while `weight_of` of every linear was multiplied with, in copies of
/// the weights; and the end of the tape, which holds them.
fn held(
    linears: &[Linear],
    x: &Tensor<2>,
    weight_of: impl Fn(&Linear) -> Tensor<2>,
) -> (Option<f64>, Tensor<2>) {
    let before = current_gib();
    let y = linears.iter().fold(x.clone(), |x, linear| ops::linear(x, weight_of(linear)));
    let growth = before.zip(current_gib()).map(|(before, now)| (now - before) / COPY_GIB);
    (growth, y)
}

/// `FlexRound`'s formula on the tape, operation by operation (with the zero point at 8).
fn by_burn(linear: &Linear) -> Tensor<2> {
    let Method::FlexRound(method) = attached(&linear.weight).unwrap().method() else {
        panic!("another method")
    };
    let (log_scale, log_row) = (method.log_scale.val(), method.log_row.val());
    let theta = method.log_division.val() + (log_scale.clone() + log_row);
    let ratio = linear.weight.base().transpose() / theta.exp();
    let code = (ops::round_ste(ratio) + 8.0).clamp(0.0, 15.0);
    ((code - 8.0) * log_scale.exp()).transpose()
}

#[test]
fn the_tape_holds_one_copy_of_a_weight() {
    let device = Device::flex().autodiff();
    let linears: Vec<Linear> = (0..LINEARS).map(|_| linear(&device)).collect();
    let x = Tensor::<2>::random([1, WIDTH], Distribution::Normal(0.0, 1.0), &device);
    // The first tape is kept, so that the second one finds no memory that is free already.
    let (copies, y) = held(&linears, &x, |linear| linear.weight.val());
    let (of_burn, y_of_burn) = held(&linears, &x, by_burn);
    // Where the system does not tell there is nothing to compare.
    if let (Some(copies), Some(of_burn)) = (copies, of_burn) {
        assert!(copies < BETWEEN, "{copies} copies of every weight");
        assert!(of_burn > BETWEEN, "{of_burn} copies: this measure does not see what it is for");
    }
    // Both are tapes, with all that a backward needs.
    for y in [y, y_of_burn] {
        let gradients = y.sum().backward();
        for linear in &linears {
            let Method::FlexRound(method) = attached(&linear.weight).unwrap().method() else {
                panic!("another method")
            };
            assert!(method.log_division.val().grad(&gradients).is_some());
        }
    }
}
