//! One step of block reconstruction, FlexRound at 4 bits with one scale per output row: fake-quantize
//! seven linears, run the block, compare with a target, go back, AdamW.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use burn::module::Module as _;
use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion};
use fewbit::method::{FakeQuant, FlexRoundConfig, MethodConfig, Start, attach};
use fewbit::model::{Block, Loader, ModelConfig, Positions, WeightSource};
use fewbit::ops;
use fewbit::quant::ObserverConfig;
use fewbit::report::memory::{current_gib, peak_gib};
use fewbit::train::{self, Optimizer, OptimizerConfig};

use super::{FORMS, in_form, spec};

/// A decoder block and how much it is given to read.
struct Shape {
    name: &'static str,
    width: usize,
    mlp: usize,
    heads: usize,
    kv_heads: usize,
    batch: usize,
    seq: usize,
}

/// The embedded model's blocks, and those of Llama-3.2-1B.
const SHAPES: [Shape; 2] = [
    Shape { name: "embedded", width: 128, mlp: 384, heads: 8, kv_heads: 4, batch: 8, seq: 128 },
    Shape { name: "llama-1b", width: 2048, mlp: 8192, heads: 32, kv_heads: 8, batch: 4, seq: 128 },
];

/// Everything that a step reads and changes.
struct Session {
    block: Block,
    optimizer: Optimizer,
    positions: Positions,
    input: Tensor<3>,
    target: Tensor<3>,
}

impl Session {
    fn new(shape: &Shape) -> Result<Self> {
        let device = Device::flex();
        let config = config(shape)?;
        let dims = [shape.batch, shape.seq, shape.width];
        let stream = || Tensor::<3>::random(dims, Distribution::Normal(0.0, 1.0), &device);
        Ok(Self {
            block: block(shape, &device)?.train(),
            optimizer: Optimizer::new(&OptimizerConfig::default()),
            positions: Positions::new(&config, 0, shape.seq, DType::F32, &device),
            input: stream(),
            target: stream(),
        })
    }

    fn step(self) -> Result<Self> {
        let Self { block, mut optimizer, positions, input, target } = self;
        let (block, _) = train::step(block, &mut optimizer, 1, &|_| 1e-3, |block, _| {
            let output = block.forward(input.clone(), &positions);
            Ok(ops::block_mse(output, target.clone(), true))
        })?;
        Ok(Self { block, optimizer, positions, input, target })
    }
}

/// A Llama of one such block.
fn config(shape: &Shape) -> Result<ModelConfig> {
    let Shape { width, mlp, heads, kv_heads, .. } = shape;
    Ok(ModelConfig::parse(&format!(
        r#"{{"model_type": "llama", "hidden_size": {width}, "intermediate_size": {mlp},
        "num_hidden_layers": 1, "num_attention_heads": {heads}, "num_key_value_heads": {kv_heads},
        "vocab_size": 16, "rms_norm_eps": 1e-5}}"#
    ))?)
}

/// Random weights and gains of one.
struct Random;

impl WeightSource for Random {
    fn weight(&self, _: &str, shape: &[usize]) -> fewbit::error::Result<Vec<f32>> {
        let count = shape.iter().product();
        if shape.len() == 1 {
            return Ok(vec![1.0; count]);
        }
        let normal = Distribution::Normal(0.0, 0.02);
        let values = Tensor::<1>::random([count], normal, &Device::flex());
        Ok(values.into_data().iter::<f32>().collect())
    }

    fn contains(&self, _: &str) -> bool {
        true
    }
}

fn block(shape: &Shape, device: &Device) -> Result<Block> {
    let config = config(shape)?;
    let loader = Loader { config: &config, source: &Random, device, dtype: DType::F32 };
    let mut block = loader.block(0)?;
    for linear in &mut block.linears {
        let rows = linear.weight.val().transpose();
        let (spec, observer) = (spec(4)?, ObserverConfig::default());
        let layout = spec.layout(rows.dims())?;
        let method = MethodConfig::FlexRound(FlexRoundConfig {})
            .init(&Start::new(&spec, &observer, &rows))?;
        let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
        linear.weight = attach(&linear.weight, fake_quant, false);
    }
    Ok(block)
}

pub(super) fn bench(criterion: &mut Criterion) -> Result<()> {
    let mut group = criterion.benchmark_group("block_step");
    // The first two steps of a large block touch memory that the system has yet to give.
    group.warm_up_time(Duration::from_secs(6));
    for shape in &SHAPES {
        for (form, fused) in FORMS {
            // Criterion calls the closure for every sample: what lasts is made before.
            let mut session = Some(Session::new(shape)?);
            let mut outcome = Ok(());
            group.bench_function(BenchmarkId::new(form, shape.name), |bencher| {
                bencher.iter(|| {
                    let Some(before) = session.take() else { return };
                    match in_form(fused, || before.step()) {
                        Ok(after) => session = Some(after),
                        Err(e) => outcome = Err(e),
                    }
                });
            });
            outcome?;
        }
    }
    group.finish();
    Ok(())
}

/// Names the one measurement that a process of ours is started for.
const ONE: &str = "FEWBIT_BENCH_MEMORY";

/// Prints by how much three steps raise a process's resident memory above what it held before the
/// first; a process for each, so that none inherits another's free memory. Linux counts it;
/// elsewhere nothing is printed.
pub(super) fn memory() -> Result<()> {
    let program = std::env::current_exe()?;
    for shape in &SHAPES {
        for (form, _) in FORMS {
            let mut child = Command::new(&program);
            let status = child.env(ONE, format!("{form}/{}", shape.name)).status()?;
            ensure!(status.success(), "the memory of {form}/{} was not measured", shape.name);
        }
    }
    Ok(())
}

/// Whether this process was started for one measurement, which is then done.
pub(super) fn measured_one() -> Result<bool> {
    let Ok(one) = std::env::var(ONE) else { return Ok(false) };
    for shape in &SHAPES {
        for (form, fused) in FORMS {
            if one == format!("{form}/{}", shape.name) {
                measure(shape, form, fused)?;
            }
        }
    }
    Ok(true)
}

#[allow(clippy::print_stdout)] // a report
fn measure(shape: &Shape, form: &str, fused: bool) -> Result<()> {
    let mut session = Session::new(shape)?;
    // Resets the peak to what is resident now.
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        return Ok(());
    }
    let Some(before) = current_gib() else { return Ok(()) };
    for _ in 0..3 {
        session = in_form(fused, || session.step())?;
    }
    if let Some(peak) = peak_gib() {
        let mib = (peak - before) * 1024.0;
        println!("block_step/{form}/{}: {mib:.0} MiB above the start", shape.name);
    }
    Ok(())
}
