//! Training holds no memory from step to step. Alone in its process, so that nothing else counts.

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use fewbit::method::{FakeQuant, FlexRoundConfig, MethodConfig, Start, attach};
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::report::memory::current_gib;
use fewbit::train::{self, Optimizer, OptimizerConfig};

const STEPS: usize = 300;
/// By then the allocator and the thread pool have what they need.
const WARM: usize = 50;
const ALLOWED_GIB: f64 = 20.0 / 1024.0;

#[test]
fn resident_memory_stays_flat_over_300_steps() {
    let device = Device::flex().autodiff();
    let w = Tensor::<2>::random([256, 256], Distribution::Normal(0.0, 0.1), &device);
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
    let mut linear = Linear { weight: attach(&weight, fake_quant, false), bias: None };
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let mut warm = None;
    for step in 0..STEPS {
        (linear, _) = train::step(linear, &mut optimizer, 1, &|_| 1e-3, |linear, _| {
            Ok(linear.weight.val().sum())
        })
        .unwrap();
        if step == WARM {
            warm = current_gib();
        }
    }
    // Where the system does not tell there is nothing to compare.
    if let (Some(warm), Some(now)) = (warm, current_gib()) {
        assert!(now - warm <= ALLOWED_GIB, "{warm} GiB after {WARM} steps, {now} GiB at the end");
    }
}
