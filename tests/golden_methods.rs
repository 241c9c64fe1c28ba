//! The learned methods against PyTorch, on the cases of `tests/golden` (its README says how each
//! was made): values, codes and gradients at one point, and 20 steps of training.
//!
//! A method's parameters have the names that the cases give them, so one test serves all.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "common/golden.rs"]
mod golden;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use fewbit::method::{
    FakeQuant, Folded, Method, MethodConfig, Moment, Start, attach, attached, between_steps,
    is_carried, role_of,
};
use fewbit::quant::{Bits, GroupSize, ObserverConfig, QuantSpec, Symmetry};
use fewbit::train::{self, Optimizer, OptimizerConfig, Role, Rule};
use golden::Golden;

const INPUTS: usize = 16;

// --- one method on one case ----------------------------------------------------------------------

struct Case {
    golden: Golden,
    config: MethodConfig,
    spec: QuantSpec,
    /// `[5, 16]`.
    w: Tensor<2>,
    method: Method,
}

impl Case {
    /// `recipe` as in a recipe; the case's parameters replace those of the method's own start.
    fn open(file: &str, folder: &str, recipe: &str, bits: u8, device: &Device) -> Self {
        let golden = Golden::open(file, folder);
        let len = if folder.contains("group") { 8 } else { INPUTS };
        let symmetric = folder.ends_with("_sym");
        let symmetry = if symmetric { Symmetry::AbsMax } else { Symmetry::Asymmetric };
        let w = golden.matrix("w", INPUTS, device);
        Self::new(golden, recipe, w, (bits, len, symmetry)).with_parameters()
    }

    fn new(golden: Golden, recipe: &str, w: Tensor<2>, spec: (u8, usize, Symmetry)) -> Self {
        let (bits, len, symmetry) = spec;
        let group_size = GroupSize::Of(len.try_into().unwrap());
        let spec = QuantSpec { bits: Bits::new(bits).unwrap(), group_size, symmetry };
        let config: MethodConfig = toml::from_str(recipe).unwrap();
        config.accepts(&spec).unwrap();
        let layout = spec.layout(w.dims()).unwrap();
        let start = Start {
            spec: &spec,
            layout,
            observer: &ObserverConfig::default(),
            weight: &w.clone().reshape(layout.grouped()),
            seed: 0,
        };
        let method = config.init(&start).unwrap();
        Self { golden, config, spec, w, method }
    }

    fn with_parameters(self) -> Self {
        let Self { golden, method, .. } = self;
        let method = method.map(&mut Assign { golden: &golden, path: Vec::new() });
        Self { golden, method, ..self }
    }

    fn grouped(&self) -> [usize; 2] {
        self.spec.layout(self.w.dims()).unwrap().grouped()
    }

    /// `w_hat`, and the gradients of `sum(upstream * w_hat)` for every parameter. `step` is what the
    /// case calls the gradient of a parameter of that name.
    fn values_and_gradients(&self, step: &str) {
        let w = self.w.clone().reshape(self.grouped());
        let w = if self.config.trains_base() { w.require_grad() } else { w };
        let w_hat = self.method.fake_quant(w.clone());
        self.golden.agrees("w_hat", &host(w_hat.clone()));
        let upstream = self.golden.matrix("upstream", w.dims()[1], &w.device());
        let gradients = (w_hat * upstream).sum().backward();
        if self.config.trains_base() {
            self.golden.agrees("grad_w", &host(w.grad(&gradients).unwrap()));
        }
        let mut compare = Compare::new(|name, values| {
            let name = if name == "step" { step.to_owned() } else { format!("grad_{name}") };
            self.golden.agrees(&name, values);
        });
        compare.gradients = Some(&gradients);
        self.method.visit(&mut compare);
    }

    /// Codes, and those of scale and zero point that the case has, by its own names.
    fn grid(&self, scale: Option<&str>, zero_point: Option<&str>) {
        let grouped = self.w.clone().reshape(self.grouped());
        let Folded::Uniform { codes, scale: scales, zero_point: zeros, .. } =
            self.method.fold(grouped)
        else {
            panic!("another grid")
        };
        // PyTorch's symmetric codes are signed; ours start at 0, with the zero point in the middle.
        let symmetric = self.spec.symmetry.is_symmetric();
        let middle = if symmetric { (self.spec.bits.levels() / 2) as f32 } else { 0.0 };
        self.golden.bit_equal("codes", &host(codes - middle));
        if let Some(name) = scale {
            self.golden.agrees(name, &host(scales));
        }
        if let Some(name) = zero_point {
            self.golden.bit_equal(name, &host(zeros - middle));
        }
    }

    /// 20 steps on `mean((x w_hat^T - x w^T)^2)`; tensors are named `trained_...`.
    fn training(self, rule: Rule, rate: impl Fn(Role, usize) -> f64) {
        let Self { golden, config, spec, w, method } = self;
        let x = golden.matrix("x", INPUTS, &w.device());
        let found = train(&config, method, &spec, (&w, &x), rule, rate);
        golden.agrees("trained_losses", &found.losses);
        golden.agrees("trained_w_hat", &host(found.linear.weight.val().transpose()));
        let base = host(found.linear.weight.base().transpose());
        if config.trains_base() {
            golden.agrees_after_training("trained_w", &base);
        } else {
            golden.bit_equal("w", &base);
        }
        let mut compare = Compare::new(|name, values| {
            golden.agrees_after_training(&format!("trained_{name}"), values);
        });
        attached(&found.linear.weight).unwrap().method().visit(&mut compare);
    }
}

struct Trained {
    linear: Linear,
    losses: Vec<f32>,
}

fn train(
    config: &MethodConfig,
    method: Method,
    spec: &QuantSpec,
    (w, x): (&Tensor<2>, &Tensor<2>),
    rule: Rule,
    rate: impl Fn(Role, usize) -> f64,
) -> Trained {
    let target = x.clone().matmul(w.clone().transpose());
    let layout = spec.layout(w.dims()).unwrap();
    let weight = Param::initialized(ParamId::new(), w.clone().transpose());
    let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
    let weight = attach(&weight, fake_quant, config.trains_base());
    let mut linear = Linear { weight, bias: None };
    let mut optimizer = Optimizer::new(&OptimizerConfig { rule, ..OptimizerConfig::default() });
    let mut losses = Vec::new();
    for i in 0..20 {
        let rate_of = |path: &str| role_of(path).map_or(0.0, |role| rate(role, i));
        let (next, stats) = train::step(linear, &mut optimizer, 1, &rate_of, |linear, _| {
            Ok((linear.forward(x.clone()) - target.clone()).square().mean())
        })
        .unwrap();
        linear = next;
        if config.has_hook() {
            let moment = Moment::Step(i as u64 + 1);
            linear.weight = between_steps(&linear.weight, moment).unwrap();
        }
        losses.push(stats.loss as f32);
    }
    Trained { linear, losses }
}

fn adam_rates(role: Role, _: usize) -> f64 {
    if role == Role::Weight { 1e-3 } else { 1e-2 }
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

/// Replaces every parameter by the golden tensor of its name.
struct Assign<'a> {
    golden: &'a Golden,
    path: Vec<String>,
}

impl ModuleMapper for Assign<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if is_carried(self.path.last().unwrap()) {
            return param;
        }
        let values = self.golden.values(self.path.last().unwrap());
        param.map(|tensor| {
            let data = TensorData::new(values, tensor.shape());
            Tensor::from_data(data, &tensor.device()).require_grad()
        })
    }
}

/// Shows every parameter, or its gradient, with its name.
struct Compare<'a, F> {
    check: F,
    gradients: Option<&'a Gradients>,
    path: Vec<String>,
}

impl<F: Fn(&str, &[f32])> Compare<'_, F> {
    fn new(check: F) -> Self {
        Self { check, gradients: None, path: Vec::new() }
    }
}

impl<F: Fn(&str, &[f32])> ModuleVisitor for Compare<'_, F> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if is_carried(self.path.last().unwrap()) {
            return;
        }
        let values = match self.gradients {
            Some(gradients) => param.val().grad(gradients).unwrap(),
            None => param.val(),
        };
        (self.check)(self.path.last().unwrap(), &host(values));
    }
}

// --- the cases -----------------------------------------------------------------------------------

#[test]
fn lrq_agrees() {
    let device = Device::flex().autodiff();
    for folder in ["channel_asym", "channel_sym", "group_asym", "start"] {
        let case = Case::open("lrq", folder, "lrq = { rank = 3 }", 3, &device);
        case.values_and_gradients("");
        case.grid(None, Some("zero_point"));
        case.training(Rule::Adamw, adam_rates);
    }
}

#[test]
fn block_ap_agrees() {
    let device = Device::flex().autodiff();
    for (bits, folder) in [(2, "b2_channel"), (2, "b2_group"), (3, "b3_channel"), (3, "b3_group")] {
        let case = Case::open("block_ap", folder, "block_ap = {}", bits, &device);
        case.values_and_gradients("grad_step");
        case.grid(None, Some("zero_point"));
        case.training(Rule::Adamw, adam_rates);
    }
}

#[test]
fn lwc_agrees() {
    let device = Device::flex().autodiff();
    for folder in ["channel", "group"] {
        let case = Case::open("lwc", folder, "lwc = {}", 3, &device);
        case.values_and_gradients("");
        case.grid(Some("step"), Some("zero_point"));
        case.training(Rule::Adamw, adam_rates);
    }
}

#[test]
fn signround_agrees() {
    let device = Device::flex().autodiff();
    for folder in ["channel", "group"] {
        let case = Case::open("signround", folder, "signround = {}", 4, &device);
        case.values_and_gradients("");
        case.grid(Some("scale"), Some("zero_point"));
        case.training(Rule::Sign, |_, i| 5e-3 * (1.0 - i as f64 / 20.0));
    }
}

#[test]
fn lsq_agrees() {
    let device = Device::flex().autodiff();
    for folder in ["channel", "group", "channel_plus", "group_plus"] {
        let offset = folder.ends_with("_plus");
        let recipe = |scale| format!("lsq = {{ offset = {offset}, gradient_scale = \"{scale}\" }}");
        let case = Case::open("lsq", folder, &recipe("tensor"), 3, &device);
        case.values_and_gradients("grad_step_scaled");
        let case = Case::open("lsq", folder, &recipe("none"), 3, &device);
        case.values_and_gradients("grad_step_plain");
        case.grid(None, None);
        case.training(Rule::Adamw, adam_rates);
    }
}

#[test]
fn uniquanf_agrees() {
    let device = Device::flex().autodiff();
    for (bits, folder) in [(2, "k2_channel"), (2, "k2_group"), (3, "k3_channel"), (3, "k3_group")] {
        let mut case = Case::open("uniquanf", folder, "uniquanf = { period = 1 }", bits, &device);
        let Method::UniQuanF(mut method) = case.method else { panic!("another method") };
        method.zero_unified = case.golden.matrix("zero_unified", 1, &device);
        method.zero_binary = case.golden.matrix("zero_binary", 1, &device);
        let layout = case.spec.layout(case.w.dims()).unwrap();
        let grouped = case.w.clone().reshape(layout.grouped());
        case.method = Method::UniQuanF(method).between_steps(grouped.clone(), Moment::End);
        case.values_and_gradients("");
        let Folded::BinaryCoding { codes, alpha, offset } = case.method.fold(grouped) else {
            panic!("another grid")
        };
        case.golden.bit_equal("codes", &host(codes));
        case.golden.agrees("folded_alpha", &host(alpha));
        case.golden.agrees("folded_offset", &host(offset));
        // Each step moves a code by a level at most, so the local search is the full one here.
        case.training(Rule::Adamw, |role, _| if role == Role::Levels { 1e-3 } else { 1e-2 });
    }
}

#[test]
fn ternary_agrees() {
    few_levels("ternary", 2);
}

#[test]
fn sign_agrees() {
    few_levels("sign", 1);
}

fn few_levels(name: &str, bits: u8) {
    let device = Device::flex().autodiff();
    let case = |folder: &str, scaled: bool, columns: usize| {
        let golden = Golden::open(name, folder);
        let w = golden.matrix("w", columns, &device);
        let recipe = format!("{name} = {{ gradient_scale = {scaled} }}");
        Case::new(golden, &recipe, w, (bits, columns, Symmetry::Asymmetric))
    };
    for (folder, columns) in [("hand", 6), ("rows", INPUTS)] {
        let plain = case(folder, false, columns).with_parameters();
        plain.values_and_gradients("grad_step_plain");
        let scaled = case(folder, true, columns).with_parameters();
        scaled.values_and_gradients("grad_step_scaled");
    }
    // The method's own start is the case's.
    let Case { golden, config, spec, w, method } = case("train", false, INPUTS);
    method.visit(&mut Compare::new(|name, values| golden.agrees(name, values)));
    let x = golden.matrix("x", INPUTS, &device);
    let Trained { linear, losses } =
        train(&config, method, &spec, (&w, &x), Rule::Adamw, adam_rates);
    let golden = Golden::open(name, "trained_plain");
    golden.agrees("losses", &losses);
    golden.agrees("w", &host(linear.weight.base().transpose()));
    golden.agrees("w_hat", &host(linear.weight.val().transpose()));
    let mut compare = Compare::new(|name, values| golden.agrees_after_training(name, values));
    attached(&linear.weight).unwrap().method().visit(&mut compare);
}
