//! One step of block reconstruction, FlexRound at 4 bits with one scale per output row: fake-quantize
//! seven linears, run the block, compare with a target, go back, AdamW.

use std::time::Duration;

use burn::module::{Module as _, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion};
use fewbit::method::{FakeQuant, FlexRoundConfig, MethodConfig, Start, attach};
use fewbit::model::{Attention, Block, Mlp, ModelConfig, Positions, RmsNorm};
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
    block: Option<Block>,
    optimizer: Optimizer,
    positions: Positions,
    input: Tensor<3>,
    target: Tensor<3>,
}

impl Session {
    fn new(shape: &Shape) -> Self {
        let device = Device::flex();
        let config = format!(
            r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": {},
                "intermediate_size": {}, "num_hidden_layers": 1, "num_attention_heads": {},
                "num_key_value_heads": {}, "vocab_size": 256, "rms_norm_eps": 1e-5,
                "max_position_embeddings": 2048, "rope_theta": 10000.0}}"#,
            shape.width, shape.mlp, shape.heads, shape.kv_heads
        );
        let folder = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(folder.path().join("config.json"), config).expect("it can be written");
        let config = ModelConfig::read(folder.path()).expect("a Llama configuration");
        let dims = [shape.batch, shape.seq, shape.width];
        let stream = || Tensor::<3>::random(dims, Distribution::Normal(0.0, 1.0), &device);
        Self {
            block: Some(block(shape, &device).train()),
            optimizer: Optimizer::new(&OptimizerConfig::default()),
            positions: Positions::new(&config, 0, shape.seq, DType::F32, &device),
            input: stream(),
            target: stream(),
        }
    }

    fn step(&mut self) {
        let block = self.block.take().expect("put back after every step");
        let (block, stats) = train::step(block, &mut self.optimizer, 1, &|_| 1e-3, |block, _| {
            let output = block.forward(self.input.clone(), &self.positions);
            Ok(ops::block_mse(output, self.target.clone(), true))
        })
        .expect("finite losses");
        assert!(stats.loss.is_finite());
        self.block = Some(block);
    }
}

fn block(shape: &Shape, device: &Device) -> Block {
    let norm = || RmsNorm { weight: frozen(Tensor::<1>::ones([shape.width], device)), eps: 1e-5 };
    let linear = |inputs: usize, out: usize| {
        let random = Distribution::Normal(0.0, 0.02);
        let rows = Tensor::<2>::random([out, inputs], random, device);
        let (spec, observer) = (spec(4), ObserverConfig::default());
        let layout = spec.layout([out, inputs]).expect("one group in a row");
        let method = MethodConfig::FlexRound(FlexRoundConfig {})
            .init(&Start::new(&spec, &observer, &rows))
            .expect("a random weight has a grid");
        let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
        Linear { weight: attach(&frozen(rows.transpose()), fake_quant, false), bias: None }
    };
    let head_dim = shape.width / shape.heads;
    let keys = shape.kv_heads * head_dim;
    Block {
        input_layernorm: norm(),
        self_attn: Attention {
            q_proj: linear(shape.width, shape.width),
            k_proj: linear(shape.width, keys),
            v_proj: linear(shape.width, keys),
            o_proj: linear(shape.width, shape.width),
            n_kv_heads: shape.kv_heads,
            head_dim,
        },
        post_attention_layernorm: norm(),
        mlp: Mlp {
            gate_proj: linear(shape.width, shape.mlp),
            up_proj: linear(shape.width, shape.mlp),
            down_proj: linear(shape.mlp, shape.width),
        },
    }
}

fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor).set_require_grad(false)
}

pub(super) fn bench(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("block_step");
    // The first two steps of a large block touch memory that the system has yet to give.
    group.warm_up_time(Duration::from_secs(6));
    for shape in &SHAPES {
        for (form, fused) in FORMS {
            // Criterion calls the closure for every sample: what lasts is made before.
            let mut session = Session::new(shape);
            group.bench_function(BenchmarkId::new(form, shape.name), |bencher| {
                bencher.iter(|| in_form(fused, || session.step()));
            });
        }
    }
    group.finish();
}

/// Names the one measurement that a process of ours is started for.
const ONE: &str = "FEWBIT_BENCH_MEMORY";

/// Prints by how much three steps raise a process's resident memory above what it held before the
/// first; a process for each, so that none inherits another's free memory. Linux counts it;
/// elsewhere nothing is printed.
pub(super) fn memory() {
    let Ok(program) = std::env::current_exe() else { return };
    for shape in &SHAPES {
        for (form, _) in FORMS {
            let mut child = std::process::Command::new(&program);
            // A child that cannot start leaves a gap in the report, nothing else.
            let _ = child.env(ONE, format!("{form}/{}", shape.name)).status();
        }
    }
}

/// Whether this process was started for one measurement, which is then done.
pub(super) fn measured_one() -> bool {
    let Ok(one) = std::env::var(ONE) else { return false };
    for shape in &SHAPES {
        for (form, fused) in FORMS {
            if one == format!("{form}/{}", shape.name) {
                measure(shape, form, fused);
            }
        }
    }
    true
}

#[allow(clippy::print_stdout)] // a report
fn measure(shape: &Shape, form: &str, fused: bool) {
    let mut session = Session::new(shape);
    // Resets the peak to what is resident now.
    if std::fs::write("/proc/self/clear_refs", "5").is_err() {
        return;
    }
    let Some(before) = current_gib() else { return };
    for _ in 0..3 {
        in_form(fused, || session.step());
    }
    if let Some(peak) = peak_gib() {
        let mib = (peak - before) * 1024.0;
        println!("block_step/{form}/{}: {mib:.0} MiB above the start", shape.name);
    }
}
