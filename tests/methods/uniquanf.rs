//! UniQuanF: the unification theorem, the mapping, and the filter.

use burn::module::Param;
use burn::tensor::{Device, Tensor};
use fewbit::method::{Folded, Method, Moment};
use fewbit::ops;
use fewbit::quant::{Grid, bcq};

use super::{asymmetric, host, matrix, min_max, noise, noisy, rounded, spec, start_from};

fn uniquanf(keys: &str, bits: u8, w: &Tensor<2>) -> fewbit::method::UniQuanF {
    let text = format!("uniquanf = {{ {keys} }}");
    let method = start_from(&text, &asymmetric(bits), w, 0).unwrap();
    let Method::UniQuanF(method) = method else { panic!("another method") };
    method
}

/// With uniform levels, integer zero and no division it is round-to-nearest on the same grid: what
/// lies outside maps to the extreme level, which is what a clamp gives.
#[test]
fn uniform_levels_are_round_to_nearest() {
    let device = Device::flex();
    let w = noisy(60, &device);
    for bits in [2, 3, 4] {
        let rtn = rounded(&asymmetric(bits), &min_max(true), &w);
        let Grid::Uniform { scale, zero_point, .. } = &rtn.grid else { panic!("another grid") };
        let mut method = uniquanf("", bits, &w);
        let planes: Vec<f32> = (0..bits).rev().map(|i| 0.5 * f32::from(1u8 << i)).collect();
        let rows = w.dims()[0];
        method.log_scale = Param::from_tensor(matrix(scale, 1, &device).log());
        method.alpha = Param::from_tensor(matrix(&planes.repeat(rows), planes.len(), &device));
        method.zero_unified = matrix(zero_point, 1, &device);
        let method = Method::UniQuanF(method).between_steps(w.clone(), Moment::End);
        let found = host(method.fake_quant(w.clone()));
        for (found, expected) in found.iter().zip(rtn.dequantize()) {
            // The step goes through exp(ln step).
            assert!(
                (found - expected).abs() <= 2e-6 * expected.abs().max(0.1),
                "{found} {expected}"
            );
        }
    }
}

#[test]
fn folded_is_what_forwards_see_and_has_few_levels() {
    let device = Device::flex();
    let w = noisy(61, &device);
    for (bits, keys) in [(2, ""), (3, "grid_points = 5"), (4, "gradient_filter = false")] {
        let method = Method::UniQuanF(uniquanf(keys, bits, &w));
        let Folded::BinaryCoding { codes, alpha, offset } = method.fold(w.clone()) else {
            panic!("another grid")
        };
        let (codes, alpha, offset) = (host(codes), host(alpha), host(offset));
        let seen = host(method.fake_quant(w.clone()));
        let planes = usize::from(bits);
        for (i, (code, seen)) in codes.iter().zip(&seen).enumerate() {
            let row = i / w.dims()[1];
            let alpha = &alpha[row * planes..][..planes];
            assert_eq!(bcq::level(*code as u8, alpha, offset[row]).to_bits(), seen.to_bits());
        }
    }
}

/// More grid points can only help the error the search is for.
#[test]
fn the_search_of_the_start_never_loses() {
    let device = Device::flex();
    let w = noisy(62, &device);
    let error = |keys: &str| -> f64 {
        let seen = host(Method::UniQuanF(uniquanf(keys, 3, &w)).fake_quant(w.clone()));
        let pairs = seen.iter().zip(host(w.clone()));
        pairs.map(|(a, b)| f64::from((a - b).abs()).powf(2.4)).sum()
    };
    assert!(error("grid_points = 10") <= error("") * (1.0 + 1e-6));
}

#[test]
fn codes_stay_between_periods() {
    let device = Device::flex();
    let w = noisy(63, &device);
    let mut method = uniquanf("period = 3", 3, &w);
    let before = host(method.codes());
    // The transform moves far, the codes only when their period comes.
    method.log_division = Param::from_tensor(matrix(&noise(64, 96, 1.5), 16, &device));
    for step in [1, 2] {
        let Method::UniQuanF(same) =
            Method::UniQuanF(method.clone()).between_steps(w.clone(), Moment::Step(step))
        else {
            panic!("another method")
        };
        assert_eq!(host(same.codes()), before);
    }
    let moved = Method::UniQuanF(method.clone()).between_steps(w.clone(), Moment::Step(3));
    let Method::UniQuanF(moved) = moved else { panic!("another method") };
    let ranks = |method: &fewbit::method::UniQuanF| ranks(method, &host(method.codes()));
    let steps: Vec<usize> =
        ranks(&moved).iter().zip(ranks(&method)).map(|(a, b)| a.abs_diff(b)).collect();
    assert!(steps.contains(&1) && steps.iter().all(|step| *step <= 1));
    let Method::UniQuanF(end) = Method::UniQuanF(method).between_steps(w, Moment::End) else {
        panic!("another method")
    };
    assert_ne!(host(end.codes()), host(moved.codes()));
}

/// Each code's place among the levels of its row.
fn ranks(method: &fewbit::method::UniQuanF, codes: &[f32]) -> Vec<usize> {
    let alpha = host(method.alpha.val());
    let row_of = |i: usize| &alpha[i / 16 * 3..][..3];
    (codes.iter().enumerate())
        .map(|(i, code)| {
            let level = bcq::level(*code as u8, row_of(i), 0.0);
            (0..8u8).filter(|other| bcq::level(*other, row_of(i), 0.0) < level).count()
        })
        .collect()
}

/// Levels out of index order: 2.7, 1.1, 0.9, -0.7, 0.7, -0.9, -1.1, -2.7. Neighbours are neighbours
/// in value.
#[test]
fn the_local_search_knows_levels_by_value() {
    let device = Device::flex();
    let alpha = Tensor::<2>::from_data([[1.0f32, 0.9, 0.8]], &device);
    let code = |level: f32| {
        (0..8u8).find(|c| (bcq::level(*c, &[1.0, 0.9, 0.8], 0.0) - level).abs() < 1e-5).unwrap()
    };
    let at = |x: f32| Tensor::<2>::from_data([[x]], &device);
    let local = |from: f32, x: f32| {
        let codes = at(f32::from(code(from)));
        host(ops::nearest_codes(&at(x), &alpha, Some(&codes)))[0] as u8
    };
    assert_eq!(local(0.9, 0.65), code(0.7));
    assert_eq!(local(0.7, -0.6), code(-0.7));
    assert_eq!(local(-0.7, 0.6), code(0.7));
    assert_eq!(local(2.7, 0.0), code(1.1)); // one level at a time
    assert_eq!(local(-2.7, -9.0), code(-2.7));
    for x in [-3.0f32, -0.8, 0.05, 0.81, 1.3, 2.2] {
        let full = host(ops::nearest_codes(&at(x), &alpha, None))[0] as u8;
        let distance = |c: u8| (bcq::level(c, &[1.0, 0.9, 0.8], 0.0) - x).abs();
        assert!((0..8).all(|c| distance(full) <= distance(c) + 1e-6), "{x}");
    }
}

/// A weight beyond the reach of the smallest plane passes no gradient to its division nor to the
/// levels; without the filter it does.
#[test]
fn the_filter_drops_what_lies_beyond() {
    let device = Device::flex().autodiff();
    let w = matrix(&[-0.9, -0.2, 0.3, 4.0], 4, &device);
    for filter in [true, false] {
        let mut method = uniquanf(&format!("gradient_filter = {filter}"), 2, &w);
        method.alpha = Param::from_tensor(matrix(&[1.0, 0.5], 2, &device).require_grad());
        method.log_scale = Param::from_tensor(matrix(&[0.5], 1, &device).log().require_grad());
        method.zero_unified = matrix(&[2.0], 1, &device);
        let method = Method::UniQuanF(method).between_steps(w.clone(), Moment::End);
        let gradients = method.fake_quant(w.clone()).sum().backward();
        let Method::UniQuanF(method) = method else { panic!("another method") };
        let division = host(method.log_division.val().grad(&gradients).unwrap());
        assert_eq!(division[3] == 0.0, filter, "{division:?}");
        assert!(division[..3].iter().all(|g| *g != 0.0));
    }
}

#[test]
fn it_refuses_symmetric_grids() {
    let spec = spec(3, "channel", fewbit::quant::Symmetry::AbsMax);
    let config = super::recipe("uniquanf = {}");
    assert!(config.accepts(&spec).is_err());
}
