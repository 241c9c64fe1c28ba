//! Laws of all methods: a name in a recipe is enough to be held to them.

use std::collections::BTreeSet;

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Tensor};
use fewbit::method::{NAMES, fold, is_carried, role_of, shorten_all};
use fewbit::quant::{GroupSize, QuantSpec, QuantizedWeight, ScaleDigits, Symmetry};
use fewbit::train::Rule;
use proptest::prelude::*;

use super::{
    GROUP_SIZES, SHAPE, SYMMETRIES, bits_of, folded, grid_of, host, linear, matrix, min_max, noise,
    noisy, recipe, rounded, spec, start, start_from, started, trained,
};

/// Every method that learns, in its variants, with every specification it accepts.
fn learners() -> Vec<(String, QuantSpec)> {
    let mut recipes: Vec<String> = NAMES.iter().map(|name| format!("{name} = {{}}")).collect();
    // What goes on from codes has laws of its own (tuning.rs).
    recipes.retain(|text| recipe(text).learns() && recipe(text).tunes().is_none());
    for variant in [
        "lrq = { rank = 1 }",
        "lsq = { offset = true, start = \"sigma\", gradient_scale = \"group\" }",
        "lsq = { start = \"mean\" }",
        "block_ap = { start = \"observer\" }",
        "ternary = { start = \"mse\", gradient_scale = false }",
    ] {
        recipes.push(variant.to_owned());
    }
    let mut all = Vec::new();
    for text in recipes {
        for bits in [1, 2, 3, 4, 8] {
            for group_size in GROUP_SIZES {
                let specs = SYMMETRIES.map(|symmetry| spec(bits, group_size, symmetry));
                let fits = |spec: &QuantSpec| {
                    recipe(&text).accepts(spec).is_ok() && spec.layout(SHAPE).is_ok()
                };
                all.extend(specs.into_iter().filter(fits).map(|spec| (text.clone(), spec)));
            }
        }
    }
    all
}

/// `fold` refuses codes out of range and steps that are not positive numbers.
fn fold_law_holds(linear: &Linear, what: &str) {
    let weight = fold(&linear.weight).unwrap().unwrap_or_else(|e| panic!("{what}: {e}"));
    let seen = host(linear.weight.val().transpose());
    assert_eq!(bits_of(&weight.dequantize()), bits_of(&seen), "{what}");
    assert!(seen.iter().all(|w| w.is_finite()), "{what}: {seen:?}");
}

#[test]
fn the_fold_law_holds_on_weights_that_are_hard_on_a_grid() {
    let device = Device::flex();
    let count = SHAPE[0] * SHAPE[1];
    let mut outlier = noise(1, count, 0.1);
    (outlier[20], outlier[50]) = (1e10, -1e10);
    let constant: Vec<f32> = (0..count).map(|i| (i / SHAPE[1]) as f32 * 0.3 - 0.7).collect();
    for (kind, values) in [
        ("zeros", vec![0.0; count]),
        ("denormals", noise(3, count, 1e-39)),
        ("below the floor of the step", noise(4, count, 1e-10)),
        ("outliers", outlier),
        ("constant rows", constant),
        ("positive", noise(5, count, 0.3).iter().map(|w| w.abs() + 0.1).collect()),
        ("negative", noise(6, count, 0.3).iter().map(|w| -w.abs() - 0.1).collect()),
    ] {
        let w = matrix(&values, SHAPE[1], &device);
        for (method, spec) in learners() {
            fold_law_holds(&started(&method, &spec, &w), &format!("{kind}, {method}, {spec:?}"));
        }
    }
}

struct Names(Vec<String>, BTreeSet<String>);

impl ModuleVisitor for Names {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.0.pop();
    }

    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        self.1.insert(self.0.join("."));
    }
}

#[test]
fn every_parameter_has_a_role_or_is_carried() {
    let device = Device::flex();
    for (method, spec) in learners() {
        let mut names = Names(Vec::new(), BTreeSet::new());
        start(&method, &spec, &noisy(7, &device)).visit(&mut names);
        assert!(
            !names.1.is_empty()
                && names.1.iter().all(|path| role_of(path).is_some() || is_carried(path)),
            "{method}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4))]

    #[test]
    fn the_fold_law_survives_training(seed in 0_u64..1000) {
        let device = Device::flex().autodiff();
        let w = noisy(seed, &device);
        for (i, (method, spec)) in learners().into_iter().enumerate() {
            let rule = if i % 2 == 0 { Rule::Adamw } else { Rule::Sign };
            let linear = trained(started(&method, &spec, &w), 3, rule, 0.02, seed + i as u64);
            fold_law_holds(&linear, &format!("{method}, {spec:?}"));
        }
    }
}

/// Largest relative distance of a weight's scales from numbers of few digits; half precision has
/// fewer below 1e-4.
pub(super) fn beyond(weight: &QuantizedWeight, digits: ScaleDigits) -> f32 {
    let short = weight.clone().with_scales(digits).unwrap();
    let pairs = weight.grid.scales().iter().zip(short.grid.scales());
    let pairs = pairs.filter(|(scale, _)| scale.abs() > 1e-4);
    pairs.map(|(a, b)| (a / b - 1.0).abs()).fold(0.0, f32::max)
}

#[test]
fn training_goes_on_with_scales_of_few_digits() {
    let device = Device::flex().autodiff();
    let w = noisy(11, &device);
    for digits in [ScaleDigits::F16, ScaleDigits::Bits7] {
        for (method, spec) in learners() {
            let what = format!("{method}, {spec:?}, {digits:?}");
            let mut linear = trained(started(&method, &spec, &w), 2, Rule::Adamw, 0.002, 5);
            let before = beyond(&folded(&linear), digits);
            shorten_all([&mut linear], digits);
            fold_law_holds(&linear, &what);
            let start = folded(&linear);
            assert!(beyond(&start, digits) < 4e-7, "{what}");
            let linear = trained(linear, 30, Rule::Adamw, 0.002, 5);
            fold_law_holds(&linear, &what);
            let end = folded(&linear);
            assert!(beyond(&end, digits) < 4e-7, "{what}");
            // They had to be rounded, and went on learning.
            let learns = recipe(&method).trains_base();
            let rounds = before > 1e-5 || spec.group_size == GroupSize::PerTensor;
            assert!(rounds && (end != start || !learns), "{what}: {before}");
        }
    }
}

#[test]
fn lrq_starts_as_round_to_nearest_for_any_right_factor() {
    let device = Device::flex();
    for seed in 0..20 {
        let w = noisy(seed, &device);
        for group_size in GROUP_SIZES {
            let spec = spec(3, group_size, Symmetry::Asymmetric);
            let lrq = format!("lrq = {{ rank = {} }}", 1 + seed % 6);
            let method = start_from(&lrq, &spec, &w, seed).unwrap();
            let found = folded(&linear(&w, method, &spec, false));
            let expected = rounded(&spec, &min_max(true), &w);
            assert_eq!(found.codes, expected.codes);
            assert_eq!(grid_of(&found).1, grid_of(&expected).1);
            for (a, b) in found.dequantize().iter().zip(expected.dequantize()) {
                assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} instead of {b}");
            }
        }
    }
}
