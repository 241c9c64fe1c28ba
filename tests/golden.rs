//! Our arithmetic against PyTorch's, on the cases of `tests/golden` (its README says how each was
//! made).
//!
//! Values agree within 1e-5 of the tensor's largest magnitude, integers exactly. Round-to-nearest
//! is compared bit for bit: both sides do the same few operations in the same order.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "common/golden.rs"]
mod golden;

use burn::module::{Module, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use fewbit::method::{
    FakeQuant, FlexRound, FlexRoundConfig, Folded, Method, MethodConfig, RtnConfig, Seq, SeqConfig,
    Start, attach, attached, fold,
};
use fewbit::objective::{
    CakldObjective, CrossEntropyObjective, JsdObjective, KlObjective, ObjectiveConfig, Targets,
    Term,
};
use fewbit::ops::{self, Comparison, Divergence, LossValue, TieRule};
use fewbit::quant::{
    Bits, GroupSize, MinMaxConfig, MseConfig, ObserverConfig, QuantSpec, Symmetry,
};
use fewbit::train::{self, Optimizer, OptimizerConfig, ScheduleConfig};
use golden::Golden;

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn spec(bits: u8, group_size: GroupSize, symmetry: Symmetry) -> QuantSpec {
    QuantSpec { bits: Bits::new(bits).unwrap(), group_size, symmetry }
}

fn group_of(len: usize) -> GroupSize {
    GroupSize::Of(len.try_into().unwrap())
}

fn min_max(zero_in_range: bool) -> ObserverConfig {
    ObserverConfig::MinMax(MinMaxConfig { zero_in_range })
}

/// A linear without bias whose weight is `w`, `[out, in]`, with a method attached to it.
fn linear_with(w: &Tensor<2>, method: Method, spec: &QuantSpec, trains_base: bool) -> Linear {
    let layout = spec.layout(w.dims()).unwrap();
    let weight = Param::initialized(ParamId::new(), w.clone().transpose());
    let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
    Linear { weight: attach(&weight, fake_quant, trains_base), bias: None }
}

/// `trained.steps` on `mean((linear(x) - target)^2)`; the loss before each step.
fn train_on_outputs(
    mut linear: Linear,
    x: &Tensor<2>,
    target: &Tensor<2>,
    steps: usize,
    rate: f64,
) -> (Linear, Vec<f32>) {
    let mut optimizer = Optimizer::new(&OptimizerConfig::default());
    let mut losses = Vec::new();
    for _ in 0..steps {
        let (next, stats) = train::step(linear, &mut optimizer, 1, &|_| rate, |linear, _| {
            Ok((linear.forward(x.clone()) - target.clone()).square().mean())
        })
        .unwrap();
        linear = next;
        losses.push(stats.loss as f32);
    }
    (linear, losses)
}

// --- round-to-nearest ----------------------------------------------------------------------------

#[test]
fn rtn_in_every_spelling_bit_for_bit() {
    let device = Device::flex();
    let schemes = [
        ("asym", Symmetry::Asymmetric, min_max(true)),
        ("asym_free", Symmetry::Asymmetric, min_max(false)),
        ("full_range", Symmetry::FullRange, min_max(true)),
        ("absmax", Symmetry::AbsMax, min_max(true)),
    ];
    for bits in [2, 3, 4, 8] {
        for (group, len) in [("row", 32), ("g8", 8)] {
            for (scheme, symmetry, observer) in &schemes {
                let golden = Golden::open("rtn", &format!("b{bits}_{group}_{scheme}"));
                let w = Golden::open("rtn", "").matrix("w", len, &device);
                rtn_case(&golden, &w, bits, *symmetry, observer);
            }
        }
    }
}

fn rtn_case(
    golden: &Golden,
    w: &Tensor<2>,
    bits: u8,
    symmetry: Symmetry,
    observer: &ObserverConfig,
) {
    // `w` comes grouped, so one scale per row is one scale per group.
    let spec = spec(bits, GroupSize::PerChannel, symmetry);
    let params = observer.observe(w, spec.bits, symmetry).unwrap();
    let codes = params.codes(w.clone(), spec.bits.max_code());
    golden.bit_equal("scale", &host(params.scale.clone()));
    golden.bit_equal("dequantized", &host(params.dequantize(codes.clone())));
    // PyTorch's symmetric codes are signed; ours start at 0, with the zero point in the middle.
    let middle =
        if symmetry == Symmetry::Asymmetric { 0.0 } else { (spec.bits.levels() / 2) as f32 };
    golden.bit_equal("codes", &host(codes - middle));
    if symmetry == Symmetry::Asymmetric {
        golden.bit_equal("zero_point", &host(params.zero_point));
    } else {
        assert!(host(params.zero_point).iter().all(|z| z.to_bits() == middle.to_bits()));
    }
    let rtn = MethodConfig::Rtn(RtnConfig {}).init(&Start::new(&spec, observer, w)).unwrap();
    golden.bit_equal("dequantized", &host(rtn.fake_quant(w.clone())));
    let linear = linear_with(w, rtn, &spec, false);
    golden.bit_equal("dequantized", &fold(&linear.weight).unwrap().unwrap().dequantize());
}

#[test]
fn mse_clip_finds_the_same_interval() {
    let device = Device::flex();
    let w = Golden::open("mse_clip", "").matrix("w", 32, &device);
    let observer = ObserverConfig::Mse(MseConfig::default());
    for bits in [2, 3, 4] {
        let golden = Golden::open("mse_clip", &format!("b{bits}"));
        let bits = Bits::new(bits).unwrap();
        let params = observer.observe(&w, bits, Symmetry::Asymmetric).unwrap();
        let codes = params.codes(w.clone(), bits.max_code());
        let w_hat = params.dequantize(codes.clone());
        golden.agrees("scale", &host(params.scale));
        golden.bit_equal("zero_point", &host(params.zero_point));
        golden.bit_equal("codes", &host(codes));
        golden.agrees("dequantized", &host(w_hat.clone()));
        golden.agrees("error", &host((w.clone() - w_hat).abs().powf_scalar(2.4).mean_dim(1)));
    }
}

// --- FlexRound -----------------------------------------------------------------------------------

struct FlexCase {
    golden: Golden,
    spec: QuantSpec,
    /// `[5, 16]`.
    w: Tensor<2>,
    method: FlexRound,
}

impl FlexCase {
    fn open(name: &str, device: &Device) -> Self {
        let golden = Golden::open("flexround", name);
        let len = if name.starts_with("channel") { 16 } else { 8 };
        let symmetry = if name.ends_with("_sym") { Symmetry::AbsMax } else { Symmetry::Asymmetric };
        let spec = spec(3, group_of(len), symmetry);
        let grouped = golden.matrix("w", len, device);
        let start = MethodConfig::FlexRound(FlexRoundConfig {})
            .init(&Start::new(&spec, &ObserverConfig::default(), &grouped))
            .unwrap();
        let Method::FlexRound(mut method) = start else { panic!("another method") };
        golden.agrees("log_scale", &host(method.log_scale.val()));
        method.log_scale = Param::from_tensor(golden.matrix("log_scale", 1, device));
        method.log_division = Param::from_tensor(golden.matrix("log_division", len, device));
        method.log_row = Param::from_tensor(golden.matrix("log_row", 1, device));
        let w = golden.matrix("w", 16, device);
        Self { golden, spec, w, method }
    }
}

const FLEX_CASES: [&str; 4] = ["channel_asym", "channel_sym", "group_asym", "group_sym"];

#[test]
fn flexround_values_and_gradients() {
    let device = Device::flex().autodiff();
    for name in FLEX_CASES {
        let FlexCase { golden, spec, w, method } = FlexCase::open(name, &device);
        let grouped = spec.layout(w.dims()).unwrap().grouped();
        let method = Method::FlexRound(method);
        let w_hat = method.fake_quant(w.clone().reshape(grouped));
        golden.agrees("w_hat", &host(w_hat.clone()));
        let folded = method.fold(w.clone().reshape(grouped));
        let Folded::Uniform { codes, zero_point, .. } = folded else { panic!("another grid") };
        let middle = if name.ends_with("_sym") { 4.0 } else { 0.0 };
        golden.bit_equal("codes", &host(codes - middle));
        golden.bit_equal("zero_point", &host(zero_point - middle));

        let upstream = golden.matrix("upstream", grouped[1], &device);
        let gradients = (w_hat * upstream).sum().backward();
        let Method::FlexRound(method) = method else { panic!("another method") };
        for (name, param) in [
            ("grad_log_scale", &method.log_scale),
            ("grad_log_division", &method.log_division),
            ("grad_log_row", &method.log_row),
        ] {
            golden.agrees(name, &host(param.val().grad(&gradients).unwrap()));
        }
    }
}

#[test]
fn flexround_trains_as_adam_does() {
    let device = Device::flex().autodiff();
    for name in FLEX_CASES {
        let FlexCase { golden, spec, w, method } = FlexCase::open(name, &device);
        let x = golden.matrix("x", 16, &device);
        let target = x.clone().matmul(w.clone().transpose());
        let linear = linear_with(&w, Method::FlexRound(method), &spec, false);
        let (linear, losses) = train_on_outputs(linear, &x, &target, 20, 1e-2);
        golden.agrees("trained_losses", &losses);
        golden.agrees("trained_w_hat", &host(linear.weight.val().transpose()));
        let Method::FlexRound(method) = attached(&linear.weight).unwrap().method() else {
            panic!("another method")
        };
        golden.agrees_after_training("trained_log_scale", &host(method.log_scale.val()));
        golden.agrees_after_training("trained_log_division", &host(method.log_division.val()));
        golden.agrees_after_training("trained_log_row", &host(method.log_row.val()));
        golden.bit_equal("w", &host(linear.weight.base().transpose()));
    }
}

// --- SEQ -----------------------------------------------------------------------------------------

fn seq_on(w: &Tensor<2>, step: Tensor<2>, gradient_scale: bool) -> Seq {
    let config = SeqConfig { ties: TieRule::HalfEven, gradient_scale, ..SeqConfig::default() };
    let spec = spec(2, GroupSize::PerChannel, Symmetry::Asymmetric);
    let start =
        MethodConfig::Seq(config).init(&Start::new(&spec, &ObserverConfig::default(), w)).unwrap();
    let Method::Seq(mut seq) = start else { panic!("another method") };
    seq.step = Param::from_tensor(step);
    seq
}

#[test]
fn seq_values_and_gradients() {
    let device = Device::flex().autodiff();
    for (case, columns) in [("hand", 6), ("rows", 16)] {
        let golden = Golden::open("seq", case);
        for (scaled, name) in [(false, "grad_step_plain"), (true, "grad_step_scaled")] {
            let w = golden.matrix("w", columns, &device);
            let seq = Method::Seq(seq_on(&w, golden.matrix("step", 1, &device), scaled));
            let w = w.require_grad();
            let w_hat = seq.fake_quant(w.clone());
            golden.agrees("w_hat", &host(w_hat.clone()));
            let upstream = golden.matrix("upstream", columns, &device);
            let gradients = (w_hat * upstream).sum().backward();
            golden.agrees("grad_w", &host(w.grad(&gradients).unwrap()));
            let Method::Seq(seq) = seq else { panic!("another method") };
            golden.agrees(name, &host(seq.step.val().grad(&gradients).unwrap()));
        }
    }
}

#[test]
fn seq_trains_latent_and_step_as_adamw_does() {
    let device = Device::flex().autodiff();
    let start = Golden::open("seq", "train");
    for (scaled, name) in [(false, "trained_plain"), (true, "trained_scaled")] {
        let golden = Golden::open("seq", name);
        let w = start.matrix("w", 16, &device);
        let x = start.matrix("x", 16, &device);
        let target = x.clone().matmul(w.clone().transpose());
        let spec = spec(2, GroupSize::PerChannel, Symmetry::Asymmetric);
        let config = SeqConfig { gradient_scale: scaled, ..SeqConfig::default() };
        let config = MethodConfig::Seq(config);
        let seq = config.init(&Start::new(&spec, &ObserverConfig::default(), &w)).unwrap();
        if let Method::Seq(seq) = &seq {
            start.bit_equal("step", &host(seq.step.val()));
        }
        let linear = linear_with(&w, seq, &spec, config.trains_base());
        let (linear, losses) = train_on_outputs(linear, &x, &target, 20, 1e-3);
        golden.agrees("losses", &losses);
        golden.agrees("w", &host(linear.weight.base().transpose()));
        golden.agrees("w_hat", &host(linear.weight.val().transpose()));
        let Method::Seq(seq) = attached(&linear.weight).unwrap().method() else {
            panic!("another method")
        };
        golden.agrees("step", &host(seq.step.val()));
    }
}

// --- losses over logits --------------------------------------------------------------------------

const VOCAB: usize = 33;

/// The mask over the 14 positions, divided by its sum, `[14, 1]`.
fn masked(mask: &[f32], device: &Device) -> Tensor<2> {
    let count: f32 = mask.iter().sum();
    let weights: Vec<f32> = mask.iter().map(|m| m / count).collect();
    Tensor::from_data(TensorData::new(weights, [mask.len(), 1]), device)
}

fn labels(values: &[f32], device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = values.iter().map(|v| *v as i32).collect();
    let shape = [values.len(), 1];
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn loss_agrees(case: &str, loss: &LossValue) {
    let golden = Golden::open("jsd", case);
    golden.agrees("loss", &host(loss.value.clone()));
    golden.agrees("grad", &host(loss.gradient.clone()));
}

/// Names as in the file, operations, and the objectives that recipes name.
fn divergences(temperature: f64) -> Vec<(&'static str, Divergence, ObjectiveConfig)> {
    let jsd =
        |beta| ObjectiveConfig::Jsd(JsdObjective { beta, temperature, top_k: None, tail: false });
    let kl = || KlObjective { temperature, top_k: None, tail: false };
    vec![
        ("jsd_b10", Divergence::Jsd { beta: 0.1 }, jsd(0.1)),
        ("jsd_b50", Divergence::Jsd { beta: 0.5 }, jsd(0.5)),
        ("jsd_b90", Divergence::Jsd { beta: 0.9 }, jsd(0.9)),
        ("forward_kl", Divergence::KlForward, ObjectiveConfig::KlForward(kl())),
        ("reverse_kl", Divergence::KlReverse, ObjectiveConfig::KlReverse(kl())),
    ]
}

#[test]
fn divergences_at_every_beta_and_temperature() {
    let device = Device::flex();
    let golden = Golden::open("jsd", "");
    let weights = masked(&golden.values("mask"), &device);
    let next = labels(&golden.values("labels"), &device);
    for (prefix, temperature) in [("", 1.0), ("", 2.0), ("large_", 1.0)] {
        let student = golden.matrix(&format!("{prefix}student"), VOCAB, &device);
        let targets = Targets {
            teacher: Some(golden.matrix(&format!("{prefix}teacher"), VOCAB, &device)),
            next: next.clone(),
            next_weights: weights.clone(),
            weights: weights.clone(),
        };
        for (name, kind, objective) in divergences(temperature) {
            let case = match prefix {
                "" => format!("{name}_t{temperature}"),
                _ => format!("{prefix}{name}"),
            };
            let (teacher, weights) = (targets.teacher.clone().unwrap(), targets.weights.clone());
            let comparison = Comparison { divergence: kind, temperature, top_k: None, tail: false };
            let loss = ops::divergence(&comparison, student.clone(), teacher, weights);
            loss_agrees(&case, &loss);
            let same = objective.on_logits(student.clone(), &targets).unwrap();
            assert_eq!(host(same.value), host(loss.value), "{case}");
            assert_eq!(host(same.gradient), host(loss.gradient), "{case}");
        }
    }
}

#[test]
fn cakld_at_every_gamma_and_temperature() {
    let device = Device::flex();
    let golden = Golden::open("cakld", "");
    let [student, teacher] = ["student", "teacher"].map(|name| golden.matrix(name, 11, &device));
    let weights = masked(&golden.values("mask"), &device);
    let confidence = ops::confidence(teacher.clone(), weights.clone());
    golden.agrees("confidence", &[confidence as f32]);
    let targets = Targets {
        teacher: Some(teacher),
        next: labels(&[0.0; 7], &device),
        next_weights: weights.clone(),
        weights,
    };
    for (percent, gamma) in [("00", 0.0), ("30", 0.3), ("70", 0.7), ("100", 1.0)] {
        for temperature in [1.0, 2.0] {
            // A gamma left open becomes the confidence; one that is given stays.
            let open = CakldObjective { temperature, ..CakldObjective::default() };
            let open = ObjectiveConfig::Cakld(open);
            assert_eq!((open.confidence_batches(), open.needs_teacher()), (10, true));
            let given = CakldObjective {
                gamma: Some(gamma),
                temperature,
                estimate_batches: 10,
                top_k: None,
            };
            assert_eq!(open.with_confidence(gamma), ObjectiveConfig::Cakld(given.clone()));
            let objective = ObjectiveConfig::Cakld(given).with_confidence(0.9);
            let loss = objective.on_logits(student.clone(), &targets).unwrap();
            let case = Golden::open("cakld", &format!("g{percent}_t{temperature}"));
            case.agrees("loss", &host(loss.value.clone()));
            case.agrees("grad", &host(loss.gradient.clone()));
            // A weighted sum is what it says.
            let term = |weight| Term { weight, objective: objective.clone() };
            let sum = ObjectiveConfig::Sum(vec![term(0.25), term(0.75)]);
            let summed = sum.on_logits(student.clone(), &targets).unwrap();
            case.agrees("loss", &host(summed.value));
            case.agrees("grad", &host(summed.gradient));
        }
    }
}

#[test]
fn cross_entropy_masked_shifted_and_at_large_logits() {
    let device = Device::flex();
    let golden = Golden::open("jsd", "");
    let (mask, label) = (golden.values("mask"), golden.values("labels"));
    let weights = masked(&mask, &device);
    for (case, student) in [("cross_entropy", "student"), ("large_cross_entropy", "large_student")]
    {
        let student = golden.matrix(student, VOCAB, &device);
        let loss = ops::cross_entropy(student, labels(&label, &device), weights.clone());
        loss_agrees(case, &loss);
    }
    // Position t predicts label t + 1; the last of the seven predicts nothing.
    let shifted: Vec<f32> = (0..14).map(|i| if i % 7 == 6 { 0.0 } else { label[i + 1] }).collect();
    let has_next: Vec<f32> = (0..14).map(|i| if i % 7 == 6 { 0.0 } else { 1.0 }).collect();
    let targets = Targets {
        teacher: None,
        next: labels(&shifted, &device),
        next_weights: masked(&has_next, &device),
        weights,
    };
    let objective = ObjectiveConfig::CrossEntropy(CrossEntropyObjective {});
    let student = golden.matrix("student", VOCAB, &device);
    let loss = objective.on_logits(student, &targets).unwrap();
    let golden = Golden::open("jsd", "next_token");
    golden.agrees("loss", &host(loss.value));
    golden.agrees("grad", &host(loss.gradient));
}

#[test]
fn a_loss_joined_to_the_tape_keeps_value_and_gradient() {
    let device = Device::flex().autodiff();
    let golden = Golden::open("jsd", "");
    let student = golden.matrix("student", VOCAB, &device).require_grad();
    let teacher = golden.matrix("teacher", VOCAB, &device).inner();
    let weights = masked(&golden.values("mask"), &device).inner();
    let divergence = Divergence::Jsd { beta: 0.5 };
    let comparison = Comparison { divergence, temperature: 1.0, top_k: None, tail: false };
    let loss = ops::divergence(&comparison, student.clone().inner(), teacher, weights);
    let (value, gradient) =
        (Tensor::from_inner(loss.value.clone()), Tensor::from_inner(loss.gradient));
    let joined = ops::with_gradient(student.clone(), value, gradient);
    assert_eq!(host(joined.clone()), host(loss.value));
    let gradients = joined.backward();
    Golden::open("jsd", "jsd_b50_t1").agrees("grad", &host(student.grad(&gradients).unwrap()));
}

// --- AdamW ---------------------------------------------------------------------------------------

#[derive(Debug, Module)]
struct Pair {
    a: Param<Tensor<2>>,
    b: Param<Tensor<2>>,
}

#[test]
fn adamw_with_cosine_decay_and_global_clipping() {
    let device = Device::flex().autodiff();
    let golden = Golden::open("adamw_cosine", "");
    let mut pair = Pair {
        a: Param::from_tensor(golden.matrix("start/a", 8, &device)),
        b: Param::from_tensor(golden.matrix("start/b", 1, &device)),
    };
    let config =
        OptimizerConfig { weight_decay: 0.01, clip_norm: Some(1.0), ..OptimizerConfig::default() };
    let mut optimizer = Optimizer::new(&config);
    let (grads_a, grads_b) =
        (golden.matrix("grads/a", 8, &device), golden.matrix("grads/b", 1, &device));
    let (mut rates, mut norms, mut after_a, mut after_b) = (vec![], vec![], vec![], vec![]);
    for i in 0..20 {
        let rate = 1e-2 * ScheduleConfig::default().factor(i as u64, 20);
        // The gradient of sum(p g) is g.
        let (next, stats) = train::step(pair, &mut optimizer, 1, &|_| rate, |pair, _| {
            let a = pair.a.val() * grads_a.clone().narrow(0, i * 4, 4);
            let b = pair.b.val() * grads_b.clone().narrow(0, i * 4, 4);
            Ok(a.sum() + b.sum())
        })
        .unwrap();
        pair = next;
        rates.push(rate as f32);
        norms.push(stats.grad_norm as f32);
        after_a.extend(host(pair.a.val()));
        after_b.extend(host(pair.b.val()));
    }
    golden.agrees("lr", &rates);
    golden.agrees("norm", &norms);
    golden.agrees("after/a", &after_a);
    golden.agrees("after/b", &after_b);
}
