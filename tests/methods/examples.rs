//! Each method by itself: the examples of the design notes, starts, limits and refusals.

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor};
use fewbit::method::{Division, Method, Rank};
use fewbit::quant::{Symmetry, ZeroKind};
use fewbit::train::Rule;

use super::{
    GROUP_SIZES, SHAPE, SYMMETRIES, asymmetric, bits_of, folded, grid_of, host, linear, matrix,
    min_max, near, noisy, recipe, rounded, spec, start, start_from, started, trained,
    values_per_group,
};

/// A learned parameter with given values.
fn param(values: &[f32], columns: usize, device: &Device) -> Param<Tensor<2>> {
    Param::from_tensor(matrix(values, columns, device))
}

// --- LRQ -----------------------------------------------------------------------------------------

#[test]
fn lrq_by_hand() {
    let device = Device::flex();
    let w = matrix(&[0.6, -0.9, 0.2, 0.4], 2, &device);
    let spec = spec(4, "channel", Symmetry::AbsMax);
    let Method::Lrq(mut lrq) = start("lrq = { rank = 1 }", &spec, &w) else { panic!("another") };
    lrq.log_scale = param(&[0.5_f32.ln(); 2], 1, &device);
    near(&host(Method::Lrq(lrq.clone()).fake_quant(w.clone())), &[0.5, -1.0, 0.0, 0.5]);
    lrq.log_row = param(&[0.0, 0.1], 1, &device);
    let Division::LowRank(factors) = &mut lrq.division else { panic!("a full matrix") };
    factors.log_left = param(&[-0.3, 0.2], 1, &device);
    factors.log_right = param(&[1.0, -1.0], 2, &device);
    near(&host(Method::Lrq(lrq).fake_quant(w)), &[1.0, -0.5, 0.0, 0.5]);
}

#[test]
fn lrq_moves_its_left_factor_first() {
    let device = Device::flex().autodiff();
    let w = noisy(11, &device);
    let Method::Lrq(lrq) = start("lrq = {}", &asymmetric(3), &w) else { panic!("another") };
    let gradients = Method::Lrq(lrq.clone()).fake_quant(w).sum().backward();
    let Division::LowRank(factors) = &lrq.division else { panic!("a full matrix") };
    let gradient = |param: &Param<Tensor<2>>| host(param.val().grad(&gradients).unwrap());
    assert!(gradient(&factors.log_right).iter().all(|g| *g == 0.0));
    assert!(gradient(&factors.log_left).iter().any(|g| g.abs() > 1e-3));
    let bound = (SHAPE[1] as f32).sqrt().recip();
    let right = host(factors.log_right.val());
    assert!(right.iter().all(|u| u.abs() <= bound) && right.iter().any(|u| u.abs() > bound / 2.0));
}

#[test]
fn lrq_draws_by_seed() {
    let device = Device::flex();
    let right = |seed| {
        let method = start_from("lrq = {}", &asymmetric(3), &noisy(0, &device), seed);
        let Method::Lrq(lrq) = method.unwrap() else { panic!("another") };
        let Division::LowRank(factors) = lrq.division else { panic!("a full matrix") };
        host(factors.log_right.val())
    };
    assert_eq!(right(1), right(1));
    assert_ne!(right(1), right(2));
}

#[test]
fn lrq_ranks() {
    let of = |rank: Rank, shape| rank.of_shape(shape).unwrap();
    let quarter = [[64, 172], [3, 100], [4096, 11008], [28672, 8192]];
    assert_eq!(quarter.map(|s| of(Rank::Quarter, s)), [Some(16), Some(1), Some(1024), Some(1024)]);
    let paper = [[64, 172], [4096, 11008], [8192, 28672]];
    assert_eq!(paper.map(|s| of(Rank::Paper, s)), [Some(64), Some(1024), Some(2048)]);
    let factored = [[64, 172], [4096, 4096], [5120, 13824], [28672, 8192]];
    let ranks = [Some(64), Some(1024), Some(1024), Some(2048)];
    assert_eq!(factored.map(|s| of(Rank::Code, s)), ranks);
    let full = [[11008, 4096], [4096, 11008], [1024, 8192], [8192, 8192]];
    assert_eq!(full.map(|s| of(Rank::Code, s)), [None; 4]);
    for text in ["lrq = { rank = 0 }", "lrq = { rank = -1 }", "lrq = { rank = \"half\" }"] {
        assert!(toml::from_str::<fewbit::method::MethodConfig>(text).is_err(), "{text}");
    }
    for text in ["lrq = {}", "lrq = { rank = \"code\" }", "lrq = { rank = 3 }"] {
        let config = recipe(text);
        assert_eq!(recipe(&toml::to_string(&config).unwrap()), config);
    }
}

/// Numbers that `rank` learns for a weight, steps of the rows included.
fn learned(rank: Rank, [out, inputs]: [usize; 2]) -> usize {
    let division = match rank.of_shape([out, inputs]).unwrap() {
        Some(rank) => rank * (out + inputs) + inputs,
        None => out * inputs,
    };
    division + 2 * out
}

#[test]
fn lrq_learns_as_many_numbers_as_documented() {
    let device = Device::flex();
    for (text, rank) in
        [("\"quarter\"", Rank::Quarter), ("\"code\"", Rank::Code), ("\"paper\"", Rank::Paper)]
    {
        for shape in [SHAPE, [2, 4100]] {
            let method = format!("lrq = {{ rank = {text} }}");
            let method = start(&method, &asymmetric(4), &Tensor::ones(shape, &device));
            assert_eq!(method.num_params(), learned(rank, shape), "{text}, {shape:?}");
        }
    }
    // Llama-2-7B: four attention projections and three of the MLP in each layer.
    let linears =
        [[4096, 4096]; 4].into_iter().chain([[11008, 4096], [11008, 4096], [4096, 11008]]);
    let share = |rank| {
        let (learned, weights) = linears.clone().fold((0, 0), |(sum, weights), shape| {
            (sum + learned(rank, shape), weights + shape[0] * shape[1])
        });
        f64::from(learned as u32) / f64::from(weights as u32)
    };
    for (rank, expected) in [(Rank::Paper, 0.395), (Rank::Quarter, 0.395), (Rank::Code, 0.835)] {
        assert!((share(rank) - expected).abs() < 1e-3, "{rank:?}: {}", share(rank));
    }
}

#[test]
fn lrq_with_a_full_matrix_is_flexround() {
    let device = Device::flex();
    let values: Vec<f32> = (0..8200_u16).map(|i| (f32::from(i) * 0.37).sin()).collect();
    let w = matrix(&values, 4100, &device);
    let full = started("lrq = { rank = \"code\" }", &asymmetric(4), &w);
    let flexround = started("flexround = {}", &asymmetric(4), &w);
    assert_eq!(folded(&full), folded(&flexround));
}

// --- LWC, Block-AP -------------------------------------------------------------------------------

#[test]
fn lwc_by_hand_and_without_clipping() {
    let device = Device::flex();
    let w = matrix(&[-0.9, -0.2, 0.3, 0.6], 4, &device);
    let found = start("lwc = {}", &asymmetric(2), &w).fake_quant(w);
    near(&host(found), &[-0.982_014, 0.0, 0.491_007, 0.491_007]);
    for seed in 0..10 {
        let w = noisy(seed, &device);
        for group_size in GROUP_SIZES {
            for symmetry in SYMMETRIES {
                let spec = spec(3, group_size, symmetry);
                let open = folded(&started("lwc = { start = 20.0 }", &spec, &w));
                let expected = rounded(&spec, &min_max(false), &w);
                assert_eq!(open.codes, expected.codes);
                assert_eq!(bits_of(&open.dequantize()), bits_of(&expected.dequantize()));
                let clipped = folded(&started("lwc = {}", &spec, &w));
                let kept: Vec<f32> = grid_of(&open).0.iter().map(|s| s * 0.982_013_8).collect();
                near(grid_of(&clipped).0, &kept);
            }
        }
    }
}

#[test]
fn block_ap_derivatives_by_hand() {
    let device = Device::flex().autodiff();
    let w = matrix(&[-1.4, -0.2, 0.3, 0.9], 4, &device);
    // Four groups of one weight: the gradients of each by itself.
    let spec = spec(2, "1", Symmetry::Asymmetric);
    let Method::BlockAp(mut method) = start("block_ap = {}", &spec, &w) else { panic!("another") };
    method.step = param(&[0.5; 4], 1, &device);
    method.zero = param(&[2.0; 4], 1, &device);
    let w = w.reshape([4, 1]).require_grad();
    let w_hat = Method::BlockAp(method.clone()).fake_quant(w.clone());
    near(&host(w_hat.clone()), &[-1.0, 0.0, 0.5, 0.5]);
    let gradients = w_hat.sum().backward();
    near(&host(w.grad(&gradients).unwrap()), &[0.0, 1.0, 1.0, 0.0]);
    near(&host(method.step.val().grad(&gradients).unwrap()), &[-2.0, 0.4, 0.4, 1.0]);
    near(&host(method.zero.val().grad(&gradients).unwrap()), &[-0.5, 0.0, 0.0, -0.5]);
}

#[test]
fn block_ap_starts() {
    let device = Device::flex();
    // All above zero: without zero in range the zero point starts below the codes.
    let w = matrix(&[0.5, 0.6, 0.7, 0.8], 4, &device);
    let zero_of = |text: &str| {
        let Method::BlockAp(method) = start(text, &asymmetric(2), &w) else { panic!("another") };
        (host(method.step.val())[0], host(method.zero.val())[0])
    };
    let (step, zero) = zero_of("block_ap = {}");
    near(&[step, zero], &[0.1, -5.0]);
    let (step, zero) = zero_of("block_ap = { start = \"observer\" }");
    near(&[step, zero], &[0.8 / 3.0, 0.0]);
    // A step below the floor is used at the floor.
    let tiny = matrix(&[1e-6, -1e-6, 2e-6, 0.0], 4, &device);
    let weight = folded(&started("block_ap = {}", &asymmetric(4), &tiny));
    assert_eq!(bits_of(grid_of(&weight).0), bits_of(&[1e-4]));
}

// --- LSQ, ternary, sign --------------------------------------------------------------------------

#[test]
fn lsq_by_hand() {
    let device = Device::flex().autodiff();
    let w = matrix(&[-1.3, -0.4, 0.2, 0.9], 4, &device);
    let Method::Lsq(mut lsq) = start("lsq = {}", &asymmetric(2), &w) else { panic!("another") };
    lsq.step = param(&[0.5], 1, &device);
    let w_hat = Method::Lsq(lsq.clone()).fake_quant(w.clone());
    near(&host(w_hat.clone()), &[-1.0, -0.5, 0.0, 0.5]);
    near(&host(lsq.step.val().grad(&w_hat.sum().backward()).unwrap()), &[-0.8]);
    for (text, bits, step) in [
        ("lsq = { start = \"mean\" }", 2, 1.4),
        ("lsq = { start = \"mean\" }", 4, 0.529_150),
        ("lsq = {}", 3, 1.3 / 3.0),
        // mean -0.15, standard deviation sqrt(2.7 / 4 - 0.15²)
        ("lsq = { start = \"sigma\" }", 3, (0.15 + 3.0 * 0.6525_f32.sqrt()) / 4.0),
    ] {
        let Method::Lsq(lsq) = start(text, &asymmetric(bits), &w) else { panic!("another") };
        near(&host(lsq.step.val()), &[step]);
    }
    // On the points of the grid the step has no gradient.
    let on_grid = matrix(&[-1.0, -0.5, 0.25, 0.75], 4, &device);
    let Method::Lsq(mut lsq) = start("lsq = {}", &asymmetric(3), &on_grid) else {
        panic!("another")
    };
    lsq.step = param(&[0.25], 1, &device);
    let w_hat = Method::Lsq(lsq.clone()).fake_quant(on_grid);
    assert_eq!(host(lsq.step.val().grad(&w_hat.sum().backward()).unwrap()), [0.0]);
}

#[test]
fn lsq_with_a_shift() {
    let device = Device::flex();
    let w = noisy(12, &device);
    let plain = folded(&started("lsq = {}", &asymmetric(3), &w));
    let shifted = start("lsq = { offset = true }", &asymmetric(3), &w);
    let unmoved = folded(&linear(&w, shifted.clone(), &asymmetric(3), true));
    assert_eq!((&plain.codes, grid_of(&plain).0), (&unmoved.codes, grid_of(&unmoved).0));
    assert_eq!(grid_of(&plain).2, ZeroKind::Integer);
    assert_eq!(grid_of(&unmoved).2, ZeroKind::Real);
    // Moving weights and grid alike moves what they stand for, and no code.
    let Method::Lsq(mut lsq) = shifted else { panic!("another") };
    lsq.shift = Some(param(&[0.25; 6], 1, &device));
    let moved = folded(&linear(&(w + 0.25), Method::Lsq(lsq), &asymmetric(3), true));
    assert_eq!(moved.codes, plain.codes);
    near(&moved.dequantize(), &plain.dequantize().iter().map(|w| w + 0.25).collect::<Vec<_>>());
}

#[test]
fn ternary_and_sign_have_few_levels() {
    let device = Device::flex();
    let w = noisy(13, &device);
    for group_size in GROUP_SIZES {
        let ternary = folded(&started("ternary = {}", &spec(2, group_size, SYMMETRIES[0]), &w));
        assert!(values_per_group(&ternary).into_iter().all(|count| count <= 3));
        assert!(ternary.codes.to_vec().iter().all(|code| *code <= 2));
        let sign = folded(&started("sign = {}", &spec(1, group_size, SYMMETRIES[0]), &w));
        assert!(values_per_group(&sign).into_iter().all(|count| count == 2));
        let signs: Vec<u8> = host(w.clone()).iter().map(|w| u8::from(*w >= 0.0)).collect();
        assert_eq!(sign.codes.to_vec(), signs);
    }
    // A zero is positive; its negative too.
    let zeros = matrix(&[0.0, -0.0, 1.0, -1.0], 4, &device);
    let sign = folded(&started("sign = {}", &asymmetric(1), &zeros));
    assert_eq!(sign.dequantize(), [0.5, 0.5, 0.5, -0.5]);
    // Searching for the step cannot be worse than the largest weight.
    let error = |text: &str| -> f32 {
        let weight = folded(&started(text, &asymmetric(2), &w)).dequantize();
        weight.iter().zip(host(w.clone())).map(|(a, b)| (a - b).powi(2)).sum()
    };
    assert!(error("ternary = { start = \"mse\" }") < error("ternary = {}"));
}

// --- SignRound, E2E-QP ---------------------------------------------------------------------------

#[test]
fn signround_starts_as_round_to_nearest_and_stays_within_its_bounds() {
    let device = Device::flex().autodiff();
    let w = noisy(14, &device);
    for group_size in GROUP_SIZES {
        for symmetry in SYMMETRIES {
            let spec = spec(4, group_size, symmetry);
            let linear = started("signround = { bound = 0.3 }", &spec, &w);
            assert_eq!(folded(&linear), rounded(&spec, &min_max(true), &w));
            let linear = trained(linear, 4, Rule::Sign, 0.2, 15);
            let method = fewbit::method::attached(&linear.weight).unwrap().method();
            let Method::SignRound(method) = method else { panic!("another") };
            let rounding = host(method.rounding.val());
            assert!(rounding.iter().all(|v| v.abs() <= 0.3));
            assert!(rounding.iter().any(|v| v.abs() >= 0.3), "no bound was reached");
            for factor in [&method.max_factor, &method.min_factor] {
                assert!(host(factor.val()).iter().all(|f| (0.0..=1.0).contains(f)));
                assert!(factor.val().is_require_grad());
            }
        }
    }
}

// --- refusals ------------------------------------------------------------------------------------

#[test]
fn specifications_that_a_method_cannot_serve_are_refused() {
    let absmax = |bits| spec(bits, "channel", Symmetry::AbsMax);
    for (text, spec, part) in [
        ("block_ap = {}", absmax(4), "symmetric = false"),
        ("lsq = {}", asymmetric(1), "bits = 2 or more"),
        ("lsq = { offset = true }", absmax(4), "offset = false"),
        ("ternary = {}", asymmetric(3), "bits = 2"),
        ("sign = {}", asymmetric(2), "bits = 1"),
        ("signround = { bound = 0.0 }", asymmetric(4), "bound = 0.5"),
        ("signround = { bound = nan }", asymmetric(4), "bound = 0.5"),
        ("lwc = { start = inf }", asymmetric(4), "start = 4.0"),
    ] {
        let error = recipe(text).accepts(&spec).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
    }
    let error = start_from("lrq = { rank = 7 }", &asymmetric(4), &noisy(0, &Device::flex()), 0);
    let error = error.unwrap_err().to_string();
    assert!(error.contains("rank 7 exceeds the smaller side of a weight of 6 x 16"), "{error}");
}
