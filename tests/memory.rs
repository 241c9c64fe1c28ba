//! Training holds no memory from step to step. Alone in its process, so that nothing else counts.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use burn::tensor::{DType, Device, Distribution, Tensor};
use fewbit::error::Result;
use fewbit::method::{FakeQuant, FlexRoundConfig, MethodConfig, Start, attach};
use fewbit::model::{Block, Loader, ModelConfig, Positions, WeightSource};
use fewbit::ops;
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::report::memory::current_gib;
use fewbit::train::{self, Optimizer, OptimizerConfig};

const STEPS: usize = 500;
/// By then the allocator and the thread pool have what they need.
const WARM: usize = 50;
/// Much less than one activation of every step since.
const ALLOWED_GIB: f64 = 20.0 / 1024.0;

const BATCH: usize = 2;
const SEQ: usize = 64;

/// Weights that only have to be some.
struct Waves;

impl WeightSource for Waves {
    fn weight(&self, _: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let count = shape.iter().product();
        Ok((0..count).map(|i: usize| (i as f32 * 12.9898).sin() * 0.1).collect())
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}

fn config() -> ModelConfig {
    ModelConfig::parse(
        r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 16,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": true}"#,
    )
    .unwrap()
}

/// A decoder block, `FlexRound` on each of its linears.
fn block(config: &ModelConfig, device: &Device) -> Block {
    let loader = Loader { config, source: &Waves, device, dtype: DType::F32 };
    let spec = QuantSpec {
        bits: Bits::new(4).unwrap(),
        group_size: GroupSize::PerChannel,
        symmetry: Symmetry::Asymmetric,
    };
    let mut block = loader.block(0).unwrap();
    for (_, linear) in block.linears_mut() {
        let weight = linear.weight.base().transpose();
        let method = MethodConfig::FlexRound(FlexRoundConfig {})
            .init(&Start::new(&spec, &ObserverConfig::default(), &weight))
            .unwrap();
        let layout = spec.layout(weight.dims()).unwrap();
        let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
        linear.weight = attach(&linear.weight, fake_quant, false);
    }
    block
}

#[test]
fn resident_memory_stays_flat_over_500_steps_of_a_block() {
    let device = Device::flex().autodiff();
    let config = config();
    let mut block = block(&config, &device);
    let positions = Positions::new(&config, 0, SEQ, DType::F32, &device);
    let [x, target] = [(); 2].map(|()| {
        let shape = [BATCH, SEQ, config.d_model];
        Tensor::<3>::random(shape, Distribution::Normal(0.0, 1.0), &device)
    });
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let mut warm = None;
    for step in 0..STEPS {
        (block, _) = train::step(block, &mut optimizer, 1, &|_| 1e-3, |block, _| {
            Ok(ops::block_mse(block.forward(x.clone(), &positions), target.clone(), false))
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
