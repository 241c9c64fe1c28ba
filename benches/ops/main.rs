//! Operations in their two forms, as kernels ("fused") and composed from burn's ("composed"), and the
//! block step that they make up, with its memory.
//!
//! `cargo bench --bench ops` runs everything in about ten minutes; words after `--` filter, as in every
//! Criterion bench. `benches/peers/plain.py kernels` puts PyTorch beside it. `docs/performance.md` has
//! the figures and how to read them.

mod block;

use std::num::NonZeroUsize;
use std::time::Duration;

use anyhow::{Context as _, Result};
use burn::module::Module as _;
use burn::tensor::{DType, Device, Distribution, Int, Tensor};
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput};
use fewbit::method::{FlexRoundConfig, MethodConfig, RtnConfig, SeqConfig, Start, quantize};
use fewbit::ops::{self, Comparison, Divergence};
use fewbit::quant::{
    Bits, CodedWeight, GroupSize, Learned, LearnedScales, ObserverConfig, QuantSpec, Symmetry,
};
use rayon::iter::{IndexedParallelIterator as _, ParallelIterator as _};
use rayon::slice::{ParallelSlice as _, ParallelSliceMut as _};

/// The program's own allocator.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> Result<()> {
    if block::measured_one()? {
        return Ok(());
    }
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(3))
        .configure_from_args();
    ceilings(&mut criterion);
    fake_quantizers(&mut criterion)?;
    losses(&mut criterion);
    packed_linear(&mut criterion)?;
    block::bench(&mut criterion)?;
    criterion.final_summary();
    block::memory()
}

/// The two forms under the names that the reports carry.
const FORMS: [(&str, bool); 2] = [("fused", true), ("composed", false)];

/// Runs `f` in one of the forms.
fn in_form<R>(fused: bool, f: impl FnOnce() -> R) -> R {
    if fused { f() } else { ops::composed(f) }
}

fn spec(bits: u8) -> Result<QuantSpec> {
    Ok(QuantSpec {
        bits: Bits::new(bits)?,
        group_size: GroupSize::PerChannel,
        symmetry: Symmetry::Asymmetric,
    })
}

/// What this machine can do at most: bytes moved by a plain copy on all threads, and multiplications by
/// a square product.
fn ceilings(criterion: &mut Criterion) {
    const PART: usize = 1 << 20;
    let mut group = criterion.benchmark_group("ceiling");
    let (from, mut to) = (vec![1.0f32; 1 << 25], vec![0.0f32; 1 << 25]);
    group.throughput(Throughput::Bytes((2 * 4) << 25));
    group.bench_function(BenchmarkId::new("copy", "128 MiB to 128 MiB"), |bencher| {
        bencher.iter(|| {
            let parts = to.par_chunks_mut(PART).zip(from.par_chunks(PART));
            parts.for_each(|(to, from)| to.copy_from_slice(from));
        });
    });
    let device = Device::flex();
    let square = || Tensor::<2>::random([2048, 2048], Distribution::Normal(0.0, 1.0), &device);
    let (left, right) = (square(), square());
    group.throughput(Throughput::Elements(2 * 2048 * 2048 * 2048));
    for (form, fused) in FORMS {
        group.bench_function(BenchmarkId::new(format!("product {form}"), "2048"), |bencher| {
            bencher.iter(|| in_form(fused, || ops::matmul(left.clone(), right.clone())));
        });
    }
    group.finish();
}

/// Forward and backward of one fake-quantizer, one scale per output row, from a given gradient of its
/// values.
fn fake_quantizers(criterion: &mut Criterion) -> Result<()> {
    let device = Device::flex().autodiff();
    let methods = [
        (
            "flexround",
            MethodConfig::FlexRound(FlexRoundConfig {}),
            4,
            vec![[2048, 8192], [128, 384]],
        ),
        ("seq", MethodConfig::Seq(SeqConfig::default()), 2, vec![[2048, 8192]]),
    ];
    for (name, config, bits, shapes) in methods {
        let mut group = criterion.benchmark_group(name);
        for shape in shapes {
            let random = || Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.02), &device);
            let (weight, upstream) = (random(), random().inner());
            let (spec, observer) = (spec(bits)?, ObserverConfig::default());
            let start = weight.clone().inner();
            let method = config.init(&Start::new(&spec, &observer, &start))?.train();
            let weight = if config.trains_base() { weight.require_grad() } else { weight };
            for (form, fused) in FORMS {
                let id = BenchmarkId::new(form, format!("{}x{}", shape[0], shape[1]));
                group.bench_function(id, |bencher| {
                    bencher.iter(|| {
                        in_form(fused, || {
                            let value = method.fake_quant(weight.clone());
                            let zero = Tensor::zeros([1], &device.clone().inner());
                            ops::with_gradient(value, zero, upstream.clone()).backward()
                        })
                    });
                });
            }
        }
        group.finish();
    }
    Ok(())
}

/// Forward and backward of a linear, given the gradient of its output: dense with a weight that
/// learns, dense and frozen, and with packed codes whose scales learn.
fn packed_linear(criterion: &mut Criterion) -> Result<()> {
    const SHAPE: [usize; 2] = [8192, 2048];
    const TOKENS: usize = 512;
    let device = Device::flex().autodiff();
    let mut group = criterion.benchmark_group("packed linear");
    let random = |shape| Tensor::<2>::random(shape, Distribution::Normal(0.0, 0.02), &device);
    let (x, upstream) = (random([TOKENS, SHAPE[1]]).require_grad(), random([TOKENS, SHAPE[0]]));
    let backward = |y: Tensor<2>| {
        let zero = Tensor::zeros([1], &device.clone().inner());
        ops::with_gradient(y, zero, upstream.clone().inner()).backward()
    };
    for (name, learns) in [("dense, weight learns", true), ("dense, frozen", false)] {
        let weight = random(SHAPE).set_require_grad(learns);
        group.bench_function(BenchmarkId::new(name, "512x2048x8192"), |bencher| {
            bencher.iter(|| backward(ops::linear(x.clone(), weight.clone().transpose())));
        });
    }
    let learned = Learned { scales: LearnedScales::All, ..Learned::default() };
    for (name, bits, group_size) in [
        ("4 bits, per row", 4, GroupSize::PerChannel),
        ("4 bits, groups of 128", 4, GroupSize::Of(NonZeroUsize::new(128).context("128")?)),
        ("3 bits, per row", 3, GroupSize::PerChannel),
        ("2 bits, per row", 2, GroupSize::PerChannel),
    ] {
        let spec = QuantSpec { group_size, ..spec(bits)? };
        let layout = spec.layout(SHAPE)?;
        let rtn = MethodConfig::Rtn(RtnConfig {});
        let weight = random(SHAPE).inner();
        let weight = quantize(&rtn, &spec, &ObserverConfig::default(), layout, &weight)?;
        let coded = CodedWeight::new(&weight, learned, DType::F32, &device);
        group.bench_function(BenchmarkId::new(name, "512x2048x8192"), |bencher| {
            bencher.iter(|| backward(coded.linear(x.clone())));
        });
    }
    group.finish();
    Ok(())
}

/// Value and gradient of one loss to the student's logits.
fn losses(criterion: &mut Criterion) {
    let device = Device::flex();
    let kinds = [
        ("jsd", Some(Divergence::Jsd { beta: 0.5 })),
        ("kl_forward", Some(Divergence::KlForward)),
        ("cross_entropy", None),
    ];
    for [tokens, vocab] in [[512, 32_000], [128, 128_256]] {
        let random =
            || Tensor::<2>::random([tokens, vocab], Distribution::Normal(0.0, 3.0), &device);
        let (student, teacher) = (random(), random());
        let weights = Tensor::<2>::full([tokens, 1], 1.0 / tokens as f32, &device);
        let targets = Tensor::<2, Int>::zeros([tokens, 1], &device);
        for (name, kind) in kinds {
            let mut group = criterion.benchmark_group(name);
            for (form, fused) in FORMS {
                let id = BenchmarkId::new(form, format!("{tokens}x{vocab}"));
                group.bench_function(id, |bencher| {
                    // Its gradient takes the place of the student's logits: each run has its own.
                    let fresh = || student.clone().mul_scalar(1.0);
                    let loss = |student: Tensor<2>| {
                        in_form(fused, || match kind {
                            None => ops::cross_entropy(student, targets.clone(), weights.clone()),
                            Some(divergence) => {
                                let how = Comparison {
                                    divergence,
                                    temperature: 1.0,
                                    top_k: None,
                                    tail: false,
                                };
                                ops::divergence(&how, student, teacher.clone(), weights.clone())
                            }
                        })
                    };
                    bencher.iter_batched(fresh, loss, BatchSize::PerIteration);
                });
            }
            group.finish();
        }
    }
}
