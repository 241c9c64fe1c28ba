//! While scales are tuned, weights are held as packed codes and in no other form. Alone in its
//! process, so that nothing else counts.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too
#![cfg(target_os = "linux")] // where the system tells the peak

use burn::module::{Module, ParamId};
use burn::tensor::{DType, Device, Distribution, Tensor};
use fewbit::error::Result;
use fewbit::model::{Block, Loader, ModelConfig, Positions, WeightSource};
use fewbit::ops;
use fewbit::quant::{
    Bits, CodedWeight, Grid, GroupAxis, GroupLayout, Learned, LearnedScales, PackedCodes,
    QuantizedWeight, ZeroKind,
};
use fewbit::report::memory::{current_gib, peak_gib};
use fewbit::train::{self, Optimizer, OptimizerConfig};

const SEQ: usize = 16;
const BITS: u8 = 4;
const GROUP: usize = 128;
/// What a weight may take besides its code.
const ALLOWED: f64 = 0.25;
/// Activations of the block, the tiles that exist as floats, and what the allocator and the threads
/// keep: less than a third of what the weights would take as floats.
const WORKING_BYTES: f64 = 40e6;

/// Codes without a float weight behind them; norms of ones.
struct Codes;

impl WeightSource for Codes {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        assert!(name.ends_with("norm.weight"), "{name} was read as floats");
        Ok(vec![1.0; shape.iter().product()])
    }

    fn contains(&self, _: &str) -> bool {
        true
    }

    fn coded(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let shape = match name.rsplit('.').next().unwrap() {
            "gate_proj" | "up_proj" => [4096, 1536],
            "down_proj" => [1536, 4096],
            _ => [1536, 1536],
        };
        Ok(Some(quantized(shape)))
    }
}

fn quantized([out, inputs]: [usize; 2]) -> QuantizedWeight {
    let words = (0..out * inputs / 8).map(|i| (i as u32).wrapping_mul(2_654_435_761)).collect();
    let groups = out * inputs / GROUP;
    QuantizedWeight {
        codes: PackedCodes::from_words(words, [out, inputs], BITS).unwrap(),
        grid: Grid::Uniform {
            scale: vec![1e-3; groups],
            zero_point: vec![8.0; groups],
            zero_kind: ZeroKind::Integer,
        },
        bits: Bits::new(BITS).unwrap(),
        layout: GroupLayout { out, inputs, groups, group_len: GROUP, axis: GroupAxis::In },
        nested: Vec::new(),
    }
}

#[test]
fn tuning_scales_holds_packed_codes_alone() {
    let device = Device::flex();
    let config = config();
    let before = current_gib().unwrap();
    let loader = Loader { config: &config, source: &Codes, device: &device, dtype: DType::F32 };
    let mut block = loader.block(0).unwrap();
    let learned = Learned { scales: LearnedScales::All, ..Learned::default() };
    let (mut weights, mut bytes, mut numbers) = (0, 0, 0);
    for (_, linear) in block.linears_mut() {
        let frozen = linear.weight.reparameterization::<CodedWeight>().unwrap();
        let coded = CodedWeight::new(&frozen.fold().unwrap(), learned, DType::F32, &device);
        weights += coded.layout().len();
        bytes += coded.bytes();
        numbers += coded.learned_numbers();
        linear.weight = coded.into_parameter(ParamId::new());
    }
    // Codes and grid: 4 bits, and a scale and a zero point of 4 bytes for 128 weights.
    let each = bytes as f64 / weights as f64;
    assert!(each <= f64::from(BITS) / 8.0 + ALLOWED, "{each} bytes a weight");
    assert_eq!((bytes, numbers), (weights / 2 + weights / GROUP * 8, weights / GROUP));

    let positions = Positions::new(&config, 0, SEQ, DType::F32, &device);
    let x = Tensor::<3>::random([1, SEQ, config.d_model], Distribution::Normal(0.0, 1.0), &device);
    let target = x.clone();
    let mut block: Block = block.train();
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    for _ in 0..3 {
        (block, _) = train::step(block, &mut optimizer, 1, &|_| 1e-5, |block, _| {
            let x = Tensor::from_inner(x.clone());
            let target = Tensor::from_inner(target.clone());
            Ok(ops::block_mse(block.forward(x, &positions), target, false))
        })
        .unwrap();
    }
    assert!(block.valid().linears().len() == 7);
    let grown = (peak_gib().unwrap() - before) * f64::from(1 << 30);
    // Scales, their gradients and two moments are 16 bytes for each group.
    let state = (16 * numbers) as f64;
    let weights = weights as f64;
    let budget = weights * (f64::from(BITS) / 8.0 + ALLOWED) + state + WORKING_BYTES;
    assert!(budget < 0.7 * weights * 4.0, "the bound would pass a float copy");
    assert!(grown <= budget, "{grown} bytes for {weights} weights, at most {budget}");
}

fn config() -> ModelConfig {
    ModelConfig::parse(
        r#"{"model_type": "llama", "hidden_size": 1536, "intermediate_size": 4096,
        "num_hidden_layers": 1, "num_attention_heads": 12, "vocab_size": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true}"#,
    )
    .unwrap()
}
