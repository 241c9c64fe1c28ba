//! The laws every method and objective keeps, and the examples that can be followed on paper.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::collections::BTreeSet;

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use fewbit::method::{
    FakeQuant, FlexRound, FlexRoundConfig, Folded, Method, MethodConfig, RtnConfig, SeqConfig,
    SeqStart, Start, attach, attached, fold, materialize,
};
use fewbit::ops::{self, Comparison, Divergence, Rule, Stepped, TieRule};
use fewbit::quant::{
    Bits, Grid, GroupSize, MinMaxConfig, MseConfig, ObserverConfig, QuantSpec, QuantizedWeight,
    Symmetry,
};
use fewbit::train::{self, Optimizer, OptimizerConfig, Still};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const SHAPE: [usize; 2] = [6, 16];
const GROUP_SIZES: [&str; 3] = ["tensor", "channel", "8"];
const SYMMETRIES: [Symmetry; 3] = [Symmetry::Asymmetric, Symmetry::AbsMax, Symmetry::FullRange];

// --- helpers -------------------------------------------------------------------------------------

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn matrix(values: &[f32], columns: usize, device: &Device) -> Tensor<2> {
    let shape = [values.len() / columns, columns];
    Tensor::from_data(TensorData::new(values.to_vec(), shape), device)
}

/// `count` values around zero, roughly normal, with standard deviation `size`.
fn noise(seed: u64, count: usize, size: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut one = || (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0;
    (0..count).map(|_| one() * size).collect()
}

fn spec(bits: u8, group_size: &str, symmetry: Symmetry) -> QuantSpec {
    let group_size = match group_size {
        "tensor" => GroupSize::PerTensor,
        "channel" => GroupSize::PerChannel,
        size => GroupSize::Of(size.parse().unwrap()),
    };
    QuantSpec { bits: Bits::new(bits).unwrap(), group_size, symmetry }
}

/// Every combination of widths, group sizes and symmetries.
fn specs(widths: &[u8]) -> Vec<QuantSpec> {
    let mut all = Vec::new();
    for bits in widths {
        for group_size in GROUP_SIZES {
            all.extend(SYMMETRIES.map(|symmetry| spec(*bits, group_size, symmetry)));
        }
    }
    all
}

fn zero_free() -> ObserverConfig {
    ObserverConfig::MinMax(MinMaxConfig { zero_in_range: false })
}

fn observers() -> [ObserverConfig; 3] {
    [
        ObserverConfig::default(),
        zero_free(),
        ObserverConfig::Mse(MseConfig { grid: 20, ..MseConfig::default() }),
    ]
}

fn rtn() -> MethodConfig {
    MethodConfig::Rtn(RtnConfig {})
}

fn flexround() -> MethodConfig {
    MethodConfig::FlexRound(FlexRoundConfig {})
}

fn seq(start: SeqStart, ties: TieRule) -> MethodConfig {
    MethodConfig::Seq(SeqConfig { start, ties, ..SeqConfig::default() })
}

/// Every method with the specifications it accepts.
fn methods() -> Vec<(MethodConfig, Vec<QuantSpec>)> {
    let mut all = vec![(rtn(), specs(&[2, 3, 4, 8])), (flexround(), specs(&[2, 3, 4, 8]))];
    for start in [SeqStart::Max, SeqStart::Mse] {
        for ties in [TieRule::HalfEven, TieRule::HalfUp] {
            let specs = GROUP_SIZES.map(|size| spec(2, size, Symmetry::Asymmetric));
            all.push((seq(start, ties), specs.to_vec()));
        }
    }
    for (method, specs) in &all {
        assert!(specs.iter().all(|spec| method.accepts(spec).is_ok()));
    }
    all
}

/// `config`'s method on `w`, `[out, in]`, with the weight in grouped form.
fn start(
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    w: &Tensor<2>,
) -> (Method, Tensor<2>) {
    let grouped = ops::reshape_grouped(w.clone(), spec.layout(w.dims()).unwrap().grouped());
    (config.init(&Start::new(spec, observer, &grouped)).unwrap(), grouped)
}

/// A linear whose weight is `w`, `[out, in]`, with `method` attached.
fn linear_with(w: &Tensor<2>, method: Method, spec: &QuantSpec, trains_base: bool) -> Linear {
    let layout = spec.layout(w.dims()).unwrap();
    let fake_quant = FakeQuant::new(method, layout, spec.bits, DType::F32);
    let weight = Param::initialized(ParamId::new(), w.clone().transpose());
    Linear { weight: attach(&weight, fake_quant, trains_base), bias: None }
}

/// The same with the method on its start.
fn started(
    config: &MethodConfig,
    spec: &QuantSpec,
    observer: &ObserverConfig,
    w: &Tensor<2>,
) -> Linear {
    let (method, _) = start(config, spec, observer, w);
    linear_with(w, method, spec, config.trains_base())
}

/// `[out, in]` as the linear multiplies with it.
fn seen(linear: &Linear) -> Vec<f32> {
    host(linear.weight.val().transpose())
}

fn folded(linear: &Linear) -> QuantizedWeight {
    fold(&linear.weight).unwrap().unwrap()
}

fn bits_of(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| (value + 0.0).to_bits()).collect() // -0 is 0
}

fn steps_of(weight: &QuantizedWeight) -> (&[f32], &[f32]) {
    let Grid::Uniform { scale, zero_point, .. } = &weight.grid else { panic!("another grid") };
    (scale, zero_point)
}

fn near(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (a, b) in found.iter().zip(expected) {
        assert!((f64::from(*a) - b).abs() <= tolerance, "{found:?} instead of {expected:?}");
    }
}

/// FlexRound with its three parameters moved by noise, as training would.
fn perturbed(mut method: FlexRound, seed: u64, size: f32) -> FlexRound {
    let moved = |param: &Param<Tensor<2>>, seed| {
        let value = param.val();
        let [rows, columns] = value.dims();
        let noise = matrix(&noise(seed, rows * columns, size), columns, &value.device());
        Param::from_tensor((value + noise).detach())
    };
    method.log_scale = moved(&method.log_scale, seed);
    method.log_division = moved(&method.log_division, seed + 1);
    method.log_row = moved(&method.log_row, seed + 2);
    method
}

fn as_flexround(method: Method) -> FlexRound {
    let Method::FlexRound(method) = method else { panic!("another method") };
    method
}

/// Weights of the shape `SHAPE` that are hard on a grid.
fn awkward_weights() -> Vec<(&'static str, Vec<f32>)> {
    let count = SHAPE[0] * SHAPE[1];
    let mut outlier = noise(1, count, 0.1);
    outlier[20] = 1e20;
    let mut negative_outlier = noise(2, count, 0.1);
    negative_outlier[50] = -1e20;
    let constant: Vec<f32> = (0..count).map(|i| (i / SHAPE[1]) as f32 * 0.3 - 0.7).collect();
    vec![
        ("noise", noise(0, count, 0.3)),
        ("zeros", vec![0.0; count]),
        ("denormals", noise(3, count, 1e-39)),
        ("below the floor of the step", noise(4, count, 1e-10)),
        ("an outlier", outlier),
        ("a negative outlier", negative_outlier),
        ("constant rows", constant),
        ("positive", noise(5, count, 0.3).iter().map(|w| w.abs() + 0.1).collect()),
        ("negative", noise(6, count, 0.3).iter().map(|w| -w.abs() - 0.1).collect()),
    ]
}

// --- the start law -------------------------------------------------------------------------------

#[test]
fn methods_that_start_from_an_observer_start_as_round_to_nearest() {
    let device = Device::flex();
    let w = matrix(&noise(7, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    for observer in observers() {
        for spec in specs(&[2, 3, 4, 8]) {
            let plain = started(&rtn(), &spec, &observer, &w);
            let learned = started(&flexround(), &spec, &observer, &w);
            let what = format!("{observer:?}, {spec:?}");
            let (ours, reference) = (folded(&learned), folded(&plain));
            assert_eq!(steps_of(&ours).1, steps_of(&reference).1, "{what}");
            let len = ours.layout.group_len;
            let (seen, expected, mut ties) = (seen(&learned), seen(&plain), 0);
            for (i, w) in host(w.clone()).iter().enumerate() {
                // The step went through exp(ln(step)): that moves a value by a last bit, and an
                // exact tie to its other side. Full range, or a threshold at a fraction of it,
                // makes such a tie of the largest weight of a group.
                let ratio = w / steps_of(&reference).0[i / len];
                if (ratio - ratio.floor() - 0.5).abs() <= 1e-6 * ratio.abs() {
                    ties += 1;
                    continue;
                }
                assert_eq!(ours.codes.to_vec()[i], reference.codes.to_vec()[i], "{what}: code {i}");
                let (a, b) = (seen[i], expected[i]);
                // 2e-7, and half a last bit of the logarithm, which grows with it.
                let log = steps_of(&reference).0[i / len].ln().abs();
                let allowed = (2e-7 + log * f32::EPSILON / 2.0) * b.abs();
                assert!((a - b).abs() <= allowed, "{what}: {a} instead of {b}");
            }
            assert!(ties <= ours.layout.groups, "{what}: {ties} ties");
        }
    }
}

// --- the fold law --------------------------------------------------------------------------------

fn fold_law_holds(linear: &Linear, what: &str) {
    let weight = folded(linear);
    assert_eq!(bits_of(&weight.dequantize()), bits_of(&seen(linear)), "{what}");
}

#[test]
fn the_folded_weight_is_the_one_the_linear_sees_bit_for_bit() {
    let device = Device::flex();
    for (kind, values) in awkward_weights() {
        let w = matrix(&values, SHAPE[1], &device);
        for (config, specs) in methods() {
            for spec in specs {
                let what = format!("{kind}, {config:?}, {spec:?}");
                fold_law_holds(&started(&config, &spec, &ObserverConfig::default(), &w), &what);
            }
        }
    }
}

#[test]
fn the_fold_law_survives_training() {
    let device = Device::flex();
    let values = noise(8, SHAPE[0] * SHAPE[1], 0.3);
    let w = matrix(&values, SHAPE[1], &device);
    for (i, spec) in specs(&[2, 3, 4, 8]).iter().enumerate() {
        for size in [0.02, 0.3] {
            let (method, _) = start(&flexround(), spec, &ObserverConfig::default(), &w);
            let method = perturbed(as_flexround(method), i as u64, size);
            let linear = linear_with(&w, Method::FlexRound(method), spec, false);
            fold_law_holds(&linear, &format!("{spec:?}"));
        }
    }
    for group_size in GROUP_SIZES {
        for ties in [TieRule::HalfEven, TieRule::HalfUp] {
            let spec = spec(2, group_size, Symmetry::Asymmetric);
            let config = seq(SeqStart::Max, ties);
            let (method, _) = start(&config, &spec, &ObserverConfig::default(), &w);
            let Method::Seq(mut method) = method else { panic!("another method") };
            let step = method.step.val();
            let change = matrix(&noise(9, step.dims()[0], 0.2), 1, &device).exp();
            method.step = Param::from_tensor(step * change);
            // The latent weight moves too.
            let latent = w.clone() + matrix(&noise(10, values.len(), 0.1), SHAPE[1], &device);
            let linear = linear_with(&latent, Method::Seq(method), &spec, true);
            fold_law_holds(&linear, &format!("{spec:?}, {ties:?}"));
        }
    }
}

// --- laws of the grids ---------------------------------------------------------------------------

#[test]
fn codes_stay_in_range_for_awkward_weights() {
    let device = Device::flex();
    for (kind, values) in awkward_weights() {
        let w = matrix(&values, SHAPE[1], &device);
        for (config, specs) in methods() {
            for spec in specs {
                for observer in observers() {
                    if kind == "constant rows" && observer == zero_free() {
                        continue; // a test of its own, below
                    }
                    let case = format!("{kind}, {config:?}, {spec:?}, {observer:?}");
                    // `fold` refuses codes out of range and steps that are not positive numbers.
                    let weight = fold(&started(&config, &spec, &observer, &w).weight).unwrap();
                    let w_hat = weight.unwrap_or_else(|e| panic!("{case}: {e}")).dequantize();
                    assert!(w_hat.iter().all(|w| w.is_finite()), "{case}: {w_hat:?}");
                }
            }
        }
    }
}

#[test]
fn constant_rows_far_from_zero_keep_the_laws_too() {
    // Without zero in range the step of such a row is the floor, and its zero point is larger than
    // any integer that f32 counts one by one.
    let device = Device::flex();
    let rows: Vec<f32> = [-0.7, 0.7, 0.1, -0.3].iter().flat_map(|w| vec![*w; 16]).collect();
    let w = matrix(&rows, 16, &device);
    for config in [rtn(), flexround()] {
        for bits in [2, 3, 4, 8] {
            let spec = spec(bits, "channel", Symmetry::Asymmetric);
            let what = format!("{config:?}, {spec:?}");
            let linear = started(&config, &spec, &zero_free(), &w);
            let weight = fold(&linear.weight).unwrap().unwrap_or_else(|e| panic!("{what}: {e}"));
            assert_eq!(bits_of(&weight.dequantize()), bits_of(&seen(&linear)), "{what}");
        }
    }
}

#[test]
fn a_group_has_no_more_values_than_codes() {
    let device = Device::flex();
    let w = matrix(&noise(11, 4 * 512, 0.3), 512, &device);
    for (config, specs) in methods() {
        for spec in specs {
            let len = spec.layout([4, 512]).unwrap().group_len;
            let linear = started(&config, &spec, &ObserverConfig::default(), &w);
            for group in seen(&linear).chunks_exact(len) {
                let values: BTreeSet<u32> = bits_of(group).into_iter().collect();
                assert!(values.len() <= spec.bits.levels(), "{config:?}, {spec:?}");
            }
        }
    }
}

#[test]
fn round_to_nearest_keeps_its_own_output() {
    let device = Device::flex();
    for (kind, values) in awkward_weights() {
        let w = matrix(&values, SHAPE[1], &device);
        for spec in specs(&[2, 3, 4, 8]) {
            let (method, grouped) = start(&rtn(), &spec, &ObserverConfig::default(), &w);
            let once = method.fake_quant(grouped);
            let twice = method.fake_quant(once.clone());
            assert_eq!(bits_of(&host(once)), bits_of(&host(twice)), "{kind}, {spec:?}");
        }
    }
}

#[test]
fn unclipped_weights_move_by_at_most_half_a_step() {
    let device = Device::flex();
    let w = matrix(&noise(12, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    for spec in specs(&[2, 3, 4, 8]) {
        if spec.symmetry == Symmetry::FullRange {
            continue; // clips its largest weight
        }
        let linear = started(&rtn(), &spec, &ObserverConfig::default(), &w);
        let weight = folded(&linear);
        let len = weight.layout.group_len;
        for (i, (w, w_hat)) in host(w.clone()).iter().zip(weight.dequantize()).enumerate() {
            let step = steps_of(&weight).0[i / len];
            // A rounded zero point may clip an end of the range by up to half a step more.
            let at_end = [0, spec.bits.max_code()].contains(&weight.codes.to_vec()[i]);
            let allowed = if at_end { 1.0 } else { 0.5 } * step * (1.0 + 1e-5);
            assert!((w - w_hat).abs() <= allowed, "{spec:?}: {w} became {w_hat}, step {step}");
        }
    }
}

#[test]
fn powers_of_two_pass_through() {
    let device = Device::flex();
    let w = matrix(&noise(13, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    for (config, specs) in methods() {
        if config == flexround() {
            continue; // ln and exp do not commute with it to the last bit
        }
        for spec in specs {
            for factor in [0.125, 4.0] {
                let plain = started(&config, &spec, &ObserverConfig::default(), &w);
                let scaled =
                    started(&config, &spec, &ObserverConfig::default(), &(w.clone() * factor));
                let expected: Vec<f32> = seen(&plain).iter().map(|w| w * factor).collect();
                assert_eq!(folded(&scaled).codes, folded(&plain).codes, "{config:?}, {spec:?}");
                assert_eq!(bits_of(&seen(&scaled)), bits_of(&expected), "{config:?}, {spec:?}");
            }
        }
    }
}

#[test]
fn permuting_output_channels_commutes_with_quantizing() {
    let device = Device::flex();
    let values = noise(14, SHAPE[0] * SHAPE[1], 0.3);
    let order = [3, 0, 5, 1, 4, 2];
    let permute = |rows: &[f32]| -> Vec<f32> {
        order.iter().flat_map(|row| rows[row * SHAPE[1]..][..SHAPE[1]].to_vec()).collect()
    };
    let w = matrix(&values, SHAPE[1], &device);
    let permuted = matrix(&permute(&values), SHAPE[1], &device);
    for (config, specs) in methods() {
        for spec in specs {
            for observer in observers() {
                let plain = seen(&started(&config, &spec, &observer, &w));
                let other = seen(&started(&config, &spec, &observer, &permuted));
                assert_eq!(bits_of(&other), bits_of(&permute(&plain)), "{config:?}, {spec:?}");
            }
        }
    }
}

#[test]
fn the_clip_search_beats_min_max_in_its_own_norm() {
    let device = Device::flex();
    let w = matrix(&noise(15, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    let clip = ObserverConfig::Mse(MseConfig::default());
    for spec in specs(&[2, 3, 4]) {
        let error = |observer| {
            let (method, grouped) = start(&rtn(), &spec, observer, &w);
            let error = (method.fake_quant(grouped.clone()) - grouped).abs().powf_scalar(2.4);
            host(error.mean_dim(1))
        };
        for (clipped, plain) in error(&clip).iter().zip(error(&ObserverConfig::default())) {
            assert!(*clipped <= plain * (1.0 + 1e-6), "{spec:?}: {clipped}, {plain}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_weight_folds_to_what_the_linear_sees(
        values in prop::collection::vec(-1e30_f32..1e30, 16),
        exponents in prop::collection::vec(-45_i32..=0, 16),
        bits in 2_u8..=8,
        group_size in prop::sample::select(GROUP_SIZES.to_vec()),
        symmetry in prop::sample::select(SYMMETRIES.to_vec()),
        learned in any::<bool>(),
    ) {
        let device = Device::flex();
        let values: Vec<f32> =
            values.iter().zip(&exponents).map(|(value, e)| value * 10_f32.powi(*e)).collect();
        let w = matrix(&values, 8, &device);
        let config = if learned { flexround() } else { rtn() };
        let spec = spec(bits, group_size, symmetry);
        let linear = started(&config, &spec, &ObserverConfig::default(), &w);
        let weight = folded(&linear);
        prop_assert!(weight.codes.to_vec().iter().all(|code| *code <= spec.bits.max_code()));
        prop_assert_eq!(bits_of(&weight.dequantize()), bits_of(&seen(&linear)));
    }
}

// --- hand examples -------------------------------------------------------------------------------

const HAND: [f32; 4] = [-0.9, -0.2, 0.3, 0.6];

#[test]
fn round_to_nearest_by_hand() {
    let device = Device::flex();
    for (symmetry, step, codes, w_hat) in [
        (Symmetry::Asymmetric, 5.0, [0, 2, 3, 3], [-10.0, 0.0, 5.0, 5.0]),
        (Symmetry::FullRange, 6.0, [0, 2, 2, 3], [-12.0, 0.0, 0.0, 6.0]),
        (Symmetry::AbsMax, 9.0, [1, 2, 2, 3], [-9.0, 0.0, 0.0, 9.0]),
    ] {
        // Ten times the example: in f32, 0.3 lies beside the tie of the full-range grid, 3 on it.
        let tens = HAND.map(|w| (w * 10.0).round());
        let spec = spec(2, "channel", symmetry);
        let linear = started(&rtn(), &spec, &ObserverConfig::default(), &matrix(&tens, 4, &device));
        let weight = folded(&linear);
        assert_eq!(weight.codes.to_vec(), codes, "{symmetry:?}");
        near(steps_of(&weight).0, &[step], 0.0);
        near(steps_of(&weight).1, &[2.0], 0.0);
        near(&seen(&linear), &w_hat, 0.0);
    }
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    let w = matrix(&HAND, 4, &device);
    let linear = started(&rtn(), &spec, &ObserverConfig::default(), &w);
    near(&seen(&linear), &[-1.0, 0.0, 0.5, 0.5], 1e-6);
    let error = HAND.iter().zip(seen(&linear)).map(|(w, w_hat)| (w - w_hat).powi(2)).sum::<f32>();
    near(&[error / 4.0], &[0.025], 1e-7);
}

#[test]
fn rounding_ties_go_to_even() {
    let device = Device::flex().autodiff();
    let ties = [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.3, -7.8];
    let x = matrix(&ties, 8, &device).require_grad();
    let rounded = ops::round_ste(x.clone());
    assert_eq!(
        bits_of(&host(rounded.clone())),
        bits_of(&[-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 0.0, -8.0])
    );
    let gradients = rounded.sum().backward();
    assert_eq!(bits_of(&host(x.grad(&gradients).unwrap())), bits_of(&[1.0; 8]));
    // What it is for: the plain rounding has no gradient.
    let gradients = x.clone().round().sum().backward();
    assert_eq!(bits_of(&host(x.grad(&gradients).unwrap())), bits_of(&[0.0; 8]));
}

#[test]
fn straight_through_rounding_is_exact_at_any_size() {
    let device = Device::flex();
    let mut rng = ChaCha8Rng::seed_from_u64(16);
    let values: Vec<f32> =
        (0..10_000).map(|i| (rng.random::<f32>() - 0.5) * 2_f32.powi(i % 40 - 10)).collect();
    let expected: Vec<f32> = values.iter().map(|value| value.round_ties_even()).collect();
    let found = host(ops::round_ste(matrix(&values, 100, &device)));
    assert_eq!(bits_of(&found), bits_of(&expected));
}

#[test]
fn flexround_by_hand() {
    let device = Device::flex().autodiff();
    let w = matrix(&HAND, 4, &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    let (method, grouped) = start(&flexround(), &spec, &ObserverConfig::default(), &w);
    let w_hat = method.fake_quant(grouped.clone());
    near(&host(w_hat.clone()), &[-1.0, 0.0, 0.5, 0.5], 1e-6);
    let gradients = w_hat.sum().backward();
    let mut method = as_flexround(method);
    let gradient = |param: &Param<Tensor<2>>| host(param.val().grad(&gradients).unwrap());
    near(&gradient(&method.log_division), &[0.9, 0.2, -0.3, -0.6], 1e-6);
    near(&gradient(&method.log_row), &[0.2], 1e-6);
    near(&gradient(&method.log_scale), &[0.2], 1e-6);

    // v of the second weight becomes -0.539944: its code falls by one, the others stay.
    method.log_division = Param::from_tensor(matrix(&[0.0, -0.3, 0.0, 0.0], 4, &device));
    let method = Method::FlexRound(method);
    near(&host(method.fake_quant(grouped.clone())), &[-1.0, -0.5, 0.5, 0.5], 1e-6);
    let Folded::Uniform { codes, .. } = method.fold(grouped) else { panic!("another grid") };
    assert_eq!(bits_of(&host(codes)), bits_of(&[0.0, 1.0, 3.0, 3.0]));
}

#[test]
fn a_saturated_weight_teaches_only_the_step() {
    let device = Device::flex().autodiff();
    let w = matrix(&HAND, 4, &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    let (method, grouped) = start(&flexround(), &spec, &ObserverConfig::default(), &w);
    let mut method = as_flexround(method);
    // v of the last weight becomes 1.2 e, beyond the highest integer, 1.
    method.log_division = Param::from_tensor(matrix(&[0.0, 0.0, 0.0, -1.0], 4, &device));
    let method = Method::FlexRound(method);
    let upstream = matrix(&[0.0, 0.0, 0.0, 1.0], 4, &device);
    let gradients = (method.fake_quant(grouped) * upstream).sum().backward();
    let method = as_flexround(method);
    let gradient = |param: &Param<Tensor<2>>| host(param.val().grad(&gradients).unwrap());
    near(&gradient(&method.log_division), &[0.0; 4], 0.0);
    near(&gradient(&method.log_row), &[0.0], 0.0);
    near(&gradient(&method.log_scale), &[0.5], 1e-6);
}

#[test]
fn seq_by_hand() {
    let device = Device::flex().autodiff();
    let w = matrix(&[-1.0, -0.4, -0.1, 0.1, 0.6, 0.8], 6, &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    let config = seq(SeqStart::Max, TieRule::HalfEven);
    let (method, grouped) = start(&config, &spec, &ObserverConfig::default(), &w);
    let latent = grouped.require_grad();
    let w_hat = method.fake_quant(latent.clone());
    near(&host(w_hat.clone()), &[-0.75, -0.25, -0.25, 0.25, 0.75, 0.75], 1e-7);
    let gradients = w_hat.sum().backward();
    // The row's largest weight is clipped at the start and gets no gradient.
    near(&host(latent.grad(&gradients).unwrap()), &[0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 1e-7);
    let Method::Seq(method) = method else { panic!("another method") };
    near(&host(method.step.val().grad(&gradients).unwrap()), &[-0.204_124], 1e-6);
    // Ties of the half-even rule: 0 up, 1/2 down, -1/2 down.
    let step = matrix(&[1.0], 1, &device);
    let rule = Rule::Seq { margin: 0.01, ties: TieRule::HalfEven };
    let weight = matrix(&[0.0, 0.5, -0.5], 3, &device);
    let zero = step.full_like(1.5);
    near(&host(Stepped::new(weight, step, zero, rule).values()), &[0.25, 0.25, -0.75], 0.0);
}

#[test]
fn int4_codes_map_to_int2_by_the_rule() {
    let device = Device::flex();
    // INT4 weights of step 1/4: the codes -8..=7, the largest magnitude is 8 steps.
    let codes: Vec<f32> = (-8_i8..8).map(f32::from).collect();
    let w: Vec<f32> = codes.iter().map(|code| code / 4.0).collect();
    let w = matrix(&w, 16, &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    for (ties, counts) in [(TieRule::HalfEven, [5, 3, 5, 3]), (TieRule::HalfUp, [4, 4, 4, 4])] {
        let config = seq(SeqStart::Max, ties);
        let linear = started(&config, &spec, &ObserverConfig::default(), &w);
        // -6, -2, +2, +6 INT4 steps, in ascending order.
        let expected: Vec<f64> = [-1.5, -0.5, 0.5, 1.5]
            .into_iter()
            .zip(counts)
            .flat_map(|(level, count)| vec![level; count])
            .collect();
        near(&seen(&linear), &expected, 0.0);
        if ties == TieRule::HalfUp {
            // The exact bit nesting of the stored codes.
            let nested: Vec<u8> = (0..16).map(|code| code >> 2).collect();
            assert_eq!(folded(&linear).codes.to_vec(), nested);
        }
    }
}

// --- laws of the methods -------------------------------------------------------------------------

#[test]
fn flexround_keeps_zeros_and_signs_and_a_shift_between_its_divisions() {
    let device = Device::flex();
    let mut values = noise(17, SHAPE[0] * SHAPE[1], 0.3);
    values[5] = 0.0;
    values[40] = 0.0;
    let w = matrix(&values, SHAPE[1], &device);
    for (i, spec) in specs(&[2, 3, 4]).iter().enumerate() {
        let (method, grouped) = start(&flexround(), spec, &ObserverConfig::default(), &w);
        let mut method = perturbed(as_flexround(method), i as u64 + 100, 0.4);
        let w_hat = host(Method::FlexRound(method.clone()).fake_quant(grouped.clone()));
        for (w, w_hat) in values.iter().zip(&w_hat) {
            assert!(w_hat * w >= 0.0 && (*w != 0.0 || *w_hat == 0.0), "{w} became {w_hat}");
        }
        method.log_division = Param::from_tensor(method.log_division.val() + 0.25);
        method.log_row = Param::from_tensor(method.log_row.val() - 0.25);
        let shifted = host(Method::FlexRound(method).fake_quant(grouped));
        assert_eq!(bits_of(&shifted), bits_of(&w_hat), "{spec:?}");
    }
}

#[test]
fn seq_has_four_values_and_none_is_zero() {
    let device = Device::flex();
    for (kind, values) in awkward_weights() {
        let w = matrix(&values, SHAPE[1], &device);
        for start in [SeqStart::Max, SeqStart::Mse] {
            for ties in [TieRule::HalfEven, TieRule::HalfUp] {
                let spec = spec(2, "channel", Symmetry::Asymmetric);
                let linear = started(&seq(start, ties), &spec, &ObserverConfig::default(), &w);
                let weight = folded(&linear);
                for (i, w_hat) in seen(&linear).iter().enumerate() {
                    let step = steps_of(&weight).0[i / SHAPE[1]] * 2.0;
                    let quarters = 4.0 * w_hat / step;
                    let odd = [-3.0, -1.0, 1.0, 3.0].iter().any(|q| (quarters - q).abs() < 1e-5);
                    assert!(odd, "{kind}, {start:?}, {ties:?}: {w_hat} at step {step}");
                }
            }
        }
    }
}

#[test]
fn seq_is_odd_away_from_ties() {
    let device = Device::flex();
    let w = matrix(&noise(18, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    for ties in [TieRule::HalfEven, TieRule::HalfUp] {
        let config = seq(SeqStart::Max, ties);
        let plain = seen(&started(&config, &spec, &ObserverConfig::default(), &w));
        let minus = seen(&started(&config, &spec, &ObserverConfig::default(), &w.clone().neg()));
        let expected: Vec<f32> = plain.iter().map(|w| -w).collect();
        assert_eq!(bits_of(&minus), bits_of(&expected));
    }
}

#[test]
fn the_mse_start_of_seq_is_no_worse_than_the_maximum() {
    let device = Device::flex();
    let w = matrix(&noise(19, 4 * 512, 0.3), 512, &device);
    let spec = spec(2, "channel", Symmetry::Asymmetric);
    let error = |start_at| {
        let config = seq(start_at, TieRule::HalfEven);
        let (method, grouped) = start(&config, &spec, &ObserverConfig::default(), &w);
        host((method.fake_quant(grouped.clone()) - grouped).square().mean_dim(1))
    };
    for (mse, max) in error(SeqStart::Mse).iter().zip(error(SeqStart::Max)) {
        assert!(*mse < max, "{mse}, {max}"); // on rows of 512 the gain is far from nothing
    }
}

// --- gradients against central differences -------------------------------------------------------
//
// A straight-through gradient is the true gradient of a surrogate in which the distance from a
// value to its integer, and the choice between inside and clipped, are constants. The surrogate is
// written out in f64 here.

/// Largest parameter-wise gap between `gradient` and central differences of `f` at `at`.
fn differs_from_central(gradient: &[f32], at: &[f64], f: impl Fn(&[f64]) -> f64) -> f64 {
    const H: f64 = 1e-5;
    let mut worst = 0.0_f64;
    for (i, g) in gradient.iter().enumerate() {
        let moved = |by: f64| {
            let mut x = at.to_vec();
            x[i] += by;
            f(&x)
        };
        worst = worst.max(((moved(H) - moved(-H)) / (2.0 * H) - f64::from(*g)).abs());
    }
    worst
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

#[test]
fn flexround_gradients_are_central_differences_of_the_surrogate() {
    let device = Device::flex().autodiff();
    let values = noise(20, SHAPE[0] * SHAPE[1], 0.3);
    let w = matrix(&values, SHAPE[1], &device);
    let upstream = noise(21, values.len(), 1.0);
    for (i, spec) in specs(&[2, 4]).iter().enumerate() {
        let [groups, len] = spec.layout(SHAPE).unwrap().grouped();
        let (method, grouped) = start(&flexround(), spec, &ObserverConfig::default(), &w);
        let method = perturbed(as_flexround(method), i as u64 + 200, 0.2);
        let folded = Method::FlexRound(method.clone()).fold(grouped.clone());
        let Folded::Uniform { zero_point, .. } = folded else { panic!("another grid") };
        let zero = wide(&host(zero_point));
        let top = f64::from(spec.bits.max_code());
        let at: Vec<f64> = [&method.log_scale, &method.log_row, &method.log_division]
            .into_iter()
            .flat_map(|param| wide(&host(param.val())))
            .collect();
        // The parameters in a row: scales, rows, divisions.
        let value_of = |x: &[f64], k: usize| {
            f64::from(values[k]) / (x[k / len] + x[groups + k / len] + x[2 * groups + k]).exp()
        };
        let fixed: Vec<(f64, Option<f64>)> = (0..groups * len)
            .map(|k| {
                let v = value_of(&at, k);
                let code = v.round_ties_even() + zero[k / len];
                let inside = (0.0..=top).contains(&code);
                let bound = (!inside).then_some(code.clamp(0.0, top) - zero[k / len]);
                (v.round_ties_even() - v, bound)
            })
            .collect();
        let surrogate = |x: &[f64]| -> f64 {
            (0..groups * len)
                .map(|k| {
                    let (rest, bound) = fixed[k];
                    let integer = bound.unwrap_or_else(|| value_of(x, k) + rest);
                    f64::from(upstream[k]) * x[k / len].exp() * integer
                })
                .sum()
        };
        let upstream = matrix(&upstream, len, &device);
        let w_hat = Method::FlexRound(method.clone()).fake_quant(grouped);
        let gradients = (w_hat * upstream).sum().backward();
        let found: Vec<f32> = [&method.log_scale, &method.log_row, &method.log_division]
            .into_iter()
            .flat_map(|param| host(param.val().grad(&gradients).unwrap()))
            .collect();
        let worst = differs_from_central(&found, &at, surrogate);
        assert!(worst < 1e-4, "{spec:?}: {worst}");
    }
}

#[test]
fn seq_gradients_are_central_differences_of_the_surrogate() {
    let device = Device::flex().autodiff();
    let values = noise(22, SHAPE[0] * SHAPE[1], 0.3);
    let upstream = noise(23, values.len(), 1.0);
    for ties in [TieRule::HalfEven, TieRule::HalfUp] {
        let w = matrix(&values, SHAPE[1], &device);
        let config =
            MethodConfig::Seq(SeqConfig { gradient_scale: false, ties, ..SeqConfig::default() });
        let spec = spec(2, "channel", Symmetry::Asymmetric);
        let (method, grouped) = start(&config, &spec, &ObserverConfig::default(), &w);
        let latent = grouped.require_grad();
        let w_hat = method.fake_quant(latent.clone());
        let upstream_on_device = matrix(&upstream, SHAPE[1], &device);
        let gradients = (w_hat * upstream_on_device).sum().backward();
        let Method::Seq(method) = method else { panic!("another method") };
        let mut found = host(method.step.val().grad(&gradients).unwrap());
        found.extend(host(latent.grad(&gradients).unwrap()));

        let mut at = wide(&host(method.step.val()));
        at.extend(wide(&values));
        let rows = SHAPE[0];
        let ratio = |x: &[f64], k: usize| x[rows + k] / x[k / SHAPE[1]];
        let start_at = at.clone();
        let surrogate = |x: &[f64]| -> f64 {
            (0..values.len())
                .map(|k| {
                    let v = ratio(&start_at, k);
                    let level = if v.abs() > 0.99 {
                        0.75 * v.signum()
                    } else {
                        ratio(x, k) + ((2.0 * v - 0.5).round() * 0.5 + 0.25 - v)
                    };
                    f64::from(upstream[k]) * x[k / SHAPE[1]] * level
                })
                .sum()
        };
        let worst = differs_from_central(&found, &at, surrogate);
        assert!(worst < 1e-4, "{ties:?}: {worst}");
    }
}

// --- divergences ---------------------------------------------------------------------------------

fn log_softmax(logits: &[f64]) -> Vec<f64> {
    let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|z| (z - top).exp()).sum();
    logits.iter().map(|z| z - top - total.ln()).collect()
}

/// The mean over rows of `vocab` logits, in f64.
fn divergence_by_definition(
    kind: Divergence,
    student: &[f64],
    teacher: &[f64],
    vocab: usize,
    temperature: f64,
) -> f64 {
    let rows = student.chunks_exact(vocab).zip(teacher.chunks_exact(vocab));
    let warm = |row: &[f64]| -> Vec<f64> { row.iter().map(|z| z / temperature).collect() };
    let kl =
        |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a.exp() * (a - b)).sum() };
    let count = student.len() / vocab;
    let total: f64 = rows
        .map(|(student, teacher)| {
            let (q, p) = (log_softmax(&warm(student)), log_softmax(&warm(teacher)));
            match kind {
                Divergence::KlForward => kl(&p, &q),
                Divergence::KlReverse => kl(&q, &p),
                Divergence::Adaptive { .. } => unreachable!("made of two others"),
                Divergence::Cakld { gamma } => gamma * kl(&q, &p) + (1.0 - gamma) * kl(&p, &q),
                Divergence::Jsd { beta } => {
                    let m: Vec<f64> = p
                        .iter()
                        .zip(&q)
                        .map(|(p, q)| (beta * p.exp() + (1.0 - beta) * q.exp()).ln())
                        .collect();
                    beta * kl(&p, &m) + (1.0 - beta) * kl(&q, &m)
                }
            }
        })
        .sum();
    total / count as f64
}

/// Value and gradient, every token counted.
fn divergence(
    kind: Divergence,
    student: &[f32],
    teacher: &[f32],
    vocab: usize,
    temperature: f64,
) -> (f32, Vec<f32>) {
    let device = Device::flex();
    let tokens = student.len() / vocab;
    let weights = matrix(&vec![1.0 / tokens as f32; tokens], 1, &device);
    let (student, teacher) = (matrix(student, vocab, &device), matrix(teacher, vocab, &device));
    let comparison = Comparison { divergence: kind, temperature, top_k: None, tail: false };
    let loss = ops::divergence(&comparison, student, teacher, weights);
    (host(loss.value)[0], host(loss.gradient))
}

fn jsd(beta: f64, student: &[f32], teacher: &[f32], vocab: usize) -> f32 {
    divergence(Divergence::Jsd { beta }, student, teacher, vocab, 1.0).0
}

#[test]
fn divergences_by_hand() {
    let teacher = [0.5_f32.ln(), 0.5_f32.ln()];
    let student = [0.9_f32.ln(), 0.1_f32.ln()];
    let value = |kind| divergence(kind, &student, &teacher, 2, 1.0).0;
    near(&[value(Divergence::KlForward)], &[0.510_826], 1e-6);
    near(&[value(Divergence::KlReverse)], &[0.368_064], 1e-6);
    near(&[value(Divergence::Jsd { beta: 0.5 })], &[0.101_749], 1e-6);
    near(&[value(Divergence::Jsd { beta: 0.1 })], &[0.043_074], 1e-6);
    near(&[value(Divergence::Jsd { beta: 0.9 })], &[0.033_603], 1e-6);
    near(&[value(Divergence::Cakld { gamma: 0.7 })], &[0.410_893], 1e-6);
    near(&[value(Divergence::Cakld { gamma: 0.0 })], &[0.510_826], 1e-6);
    near(&[value(Divergence::Cakld { gamma: 1.0 })], &[0.368_064], 1e-6);
    let (_, gradient) = divergence(Divergence::Jsd { beta: 0.5 }, &student, &teacher, 2, 1.0);
    near(&gradient, &[0.060_747, -0.060_747], 1e-6);
    // The limits are the two one-sided divergences.
    near(&[jsd(1e-4, &student, &teacher, 2) / 1e-4], &[0.510_737], 1e-3);
    near(&[jsd(1.0 - 1e-4, &student, &teacher, 2) / 1e-4], &[0.368_064], 1e-3);
    // Distributions that share no token.
    let (one, other) = ([0.0, -1e4], [-1e4, 0.0]);
    near(&[jsd(0.5, &one, &other, 2)], &[std::f64::consts::LN_2], 1e-6);
    near(&[jsd(0.1, &one, &other, 2)], &[0.325_083], 1e-6);
}

#[test]
fn divergence_gradients_are_central_differences() {
    let (student, teacher) = (noise(24, 3 * 11, 1.5), noise(25, 3 * 11, 1.5));
    for kind in [
        Divergence::KlForward,
        Divergence::KlReverse,
        Divergence::Jsd { beta: 0.1 },
        Divergence::Jsd { beta: 0.5 },
        Divergence::Jsd { beta: 0.9 },
        Divergence::Cakld { gamma: 0.0 },
        Divergence::Cakld { gamma: 0.7 },
        Divergence::Cakld { gamma: 1.0 },
    ] {
        for temperature in [0.5, 1.0, 2.0] {
            let (value, gradient) = divergence(kind, &student, &teacher, 11, temperature);
            let f = |x: &[f64]| divergence_by_definition(kind, x, &wide(&teacher), 11, temperature);
            let (at, what) = (wide(&student), format!("{kind:?}, temperature {temperature}"));
            assert!((f64::from(value) - f(&at)).abs() < 1e-5, "{what}: {value}, {}", f(&at));
            let worst = differs_from_central(&gradient, &at, f);
            assert!(worst < 1e-5, "{what}: {worst}");
        }
    }
}

#[test]
fn jsd_is_zero_for_equals_only_and_mirrors() {
    let (a, b) = (noise(26, 5 * 17, 2.0), noise(27, 5 * 17, 2.0));
    let same = |kind| divergence(kind, &a, &a, 17, 1.0);
    for kind in [Divergence::KlForward, Divergence::KlReverse, Divergence::Jsd { beta: 0.3 }] {
        let (value, gradient) = same(kind);
        assert!(value.abs() < 1e-6, "{kind:?}: {value}");
        assert!(gradient.iter().all(|g| g.abs() < 1e-7), "{kind:?}");
    }
    assert!(jsd(0.3, &a, &b, 17) > 0.01);
    near(&[jsd(0.5, &a, &b, 17)], &[f64::from(jsd(0.5, &b, &a, 17))], 1e-6);
    near(&[jsd(0.2, &a, &b, 17)], &[f64::from(jsd(0.8, &b, &a, 17))], 1e-6);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn jsd_is_bounded_and_ignores_a_constant(
        student in prop::collection::vec(-60.0_f32..60.0, 12),
        teacher in prop::collection::vec(-60.0_f32..60.0, 12),
        beta in 0.01_f64..0.99,
        shift in -20.0_f32..20.0,
    ) {
        let entropy = -(beta * beta.ln() + (1.0 - beta) * (1.0 - beta).ln());
        let value = jsd(beta, &student, &teacher, 4);
        prop_assert!(value >= -1e-6 && f64::from(value) <= entropy + 1e-5, "{value}, {entropy}");
        let shifted: Vec<f32> = student.iter().map(|z| z + shift).collect();
        let moved = jsd(beta, &shifted, &teacher, 4);
        prop_assert!((moved - value).abs() < 1e-4, "{value} became {moved}");
    }
}

// --- accumulation --------------------------------------------------------------------------------

#[test]
fn four_micro_batches_are_one_batch_of_four() {
    let device = Device::flex().autodiff();
    let w = matrix(&noise(28, SHAPE[0] * SHAPE[1], 0.3), SHAPE[1], &device);
    let x = matrix(&noise(29, 4 * 8 * SHAPE[1], 1.0), SHAPE[1], &device);
    let x: Tensor<3> = x.reshape([4, 8, SHAPE[1]]);
    let target = x.clone().matmul(w.clone().transpose().unsqueeze());
    let spec = spec(3, "channel", Symmetry::Asymmetric);
    // With weights standing still, each is fake-quantized once for all micro-batches.
    let still = |linear: &Linear| {
        let (weight, value) = materialize(&linear.weight).unwrap();
        let weights = vec![(weight.id, value)];
        Still { module: Linear { weight, bias: None }, weights }
    };
    let train = |accumulate: usize| {
        let mut linear = started(&flexround(), &spec, &ObserverConfig::default(), &w);
        let config = OptimizerConfig { clip_norm: Some(1.0), ..OptimizerConfig::default() };
        let mut optimizer = Optimizer::new(&config);
        let (len, mut losses) = (4 / accumulate, Vec::new());
        for _ in 0..10 {
            let loss = |linear: &Linear, micro: usize| {
                let x = x.clone().narrow(0, micro * len, len);
                let target = target.clone().narrow(0, micro * len, len);
                Ok(ops::block_mse(linear.forward(x), target, true))
            };
            let rate = |_: &str| 1e-3;
            let (next, stats) = if accumulate == 2 {
                train::step(linear, &mut optimizer, accumulate, &rate, loss).unwrap()
            } else {
                let optimizer = &mut optimizer;
                let stepped =
                    train::accumulated_step(linear, optimizer, accumulate, &rate, still, loss);
                let (next, stepped) = stepped.unwrap();
                (next, stepped.stats())
            };
            linear = next;
            losses.push(stats.loss as f32);
            losses.push(stats.grad_norm as f32);
        }
        let Method::FlexRound(method) = attached(&linear.weight).unwrap().method() else {
            panic!("another method")
        };
        let learned = [&method.log_scale, &method.log_division, &method.log_row];
        (losses, learned.map(|param| wide(&host(param.val()))).concat())
    };
    let (losses, learned) = train(1);
    for parts in [2, 4] {
        let (part_losses, part_learned) = train(parts);
        for (one, part) in losses.iter().zip(&part_losses) {
            assert!((one - part).abs() <= 1e-5 * one.abs(), "{one}, {part} in {parts} parts");
        }
        for (one, part) in learned.iter().zip(&part_learned) {
            assert!((one - part).abs() <= 1e-5, "{one}, {part} in {parts} parts");
        }
    }
}
