//! Binary-coding quantization (BCQ) of one group of weights at a time.
//!
//! A group is stored as `k` planes of signs, `k` scales and an offset,
//! `w ~ alpha_0 b_0 + .. + alpha_{k-1} b_{k-1} + offset` with every `b` plus or minus one. Finding
//! them is hard jointly and easy by halves: the scales are a least-squares problem when the signs
//! are fixed, and the signs are a search for the nearest level when the scales are fixed. The
//! solvers follow the greedy, refined and alternating schemes of Xu et al. (arXiv 1802.00150) as
//! AlphaTuning, LUT-GEMM and UniQuanF use them; the second start, from a uniform grid, makes the
//! result never worse than that grid when there is an offset.

mod search;

use std::ops::{Add, Neg};

use rayon::prelude::*;

use self::search::{Fit, Problem};
use super::{Bits, GroupLayout};

/// One group in binary coding.
#[derive(Clone, Debug, PartialEq)]
pub struct BinaryCode {
    /// One code per weight; bit `i` set means that plane `i` is `+1`, else `-1`.
    pub codes: Vec<u8>,
    /// One scale per plane; `alpha[i]` belongs to bit `i`.
    pub alpha: Vec<f32>,
    /// Added to every level, in weight units.
    pub offset: f32,
}

/// The value of a code.
///
/// The order of the additions is part of the format: `+-alpha[0]`, then `+-alpha[1]` and so on,
/// then the offset, each in f32. Every reader must use it to be bit-equal.
pub fn level(code: u8, alpha: &[f32], offset: f32) -> f32 {
    signed_sum(code, alpha, offset)
}

/// How scales and signs are searched for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum BcqSolver {
    /// One plane after the other: the signs of what is left and the mean of its magnitude.
    Greedy,
    /// Greedy, then all scales together by least squares.
    Refined,
    /// Greedy, then least squares and nearest levels in turns.
    Alternating {
        /// Most turns; fewer when the error stops shrinking.
        rounds: u32,
    },
}

/// What [`solve`] is to find.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BcqOptions {
    /// Number of planes.
    pub bits: Bits,
    /// The search.
    pub solver: BcqSolver,
    /// Whether the levels may lie around another value than zero.
    pub offset: bool,
}

/// Finds the binary code of one group.
///
/// The scales come out positive and in descending order, and the codes are the nearest levels of
/// the stored f32 numbers (the greater level at a tie), whichever the solver.
///
/// `uniform` is the scale and the zero point of a uniform grid for the same group. With
/// [`BcqSolver::Alternating`] the search then starts from that grid too, and the best of both ends
/// and of the grid itself is kept. Without an offset only the grid's scales are used.
pub fn solve(weight: &[f32], options: &BcqOptions, uniform: Option<(f32, f32)>) -> BinaryCode {
    let problem = Problem::new(weight, options.bits, options.offset);
    let greedy = problem.greedy();
    let rounds = match options.solver {
        BcqSolver::Greedy => return problem.finish(weight, &greedy).0,
        BcqSolver::Refined => return problem.finish(weight, &problem.refit(greedy)).0,
        BcqSolver::Alternating { rounds } => rounds,
    };
    let (mut best, mut least) = problem.finish(weight, &problem.alternate(greedy, rounds));
    if let Some((scale, zero_point)) = uniform {
        let image = problem.uniform(scale, zero_point);
        // The image itself too: rounding to f32 could lose the little that alternation gained.
        for fit in [problem.alternate(image.clone(), rounds), image] {
            let (code, sse) = problem.finish(weight, &fit);
            if sse < least {
                (best, least) = (code, sse);
            }
        }
    }
    best
}

/// [`solve`] for every group of a weight, in the order of the groups. `weight` is in the layout's
/// stored form, row-major: `[out, in]`, or its transpose for groups along the outputs.
///
/// `uniform` holds one scale and zero point for each group.
///
/// # Panics
/// When `weight` or `uniform` does not have the length that `layout` says.
pub fn solve_all(
    weight: &[f32],
    layout: &GroupLayout,
    options: &BcqOptions,
    uniform: Option<&[(f32, f32)]>,
) -> Vec<BinaryCode> {
    assert_eq!(weight.len(), layout.len(), "one number for each weight of the layout");
    assert!(uniform.is_none_or(|grid| grid.len() == layout.groups), "one grid for each group");
    weight
        .par_chunks(layout.group_len.max(1))
        .enumerate()
        .map(|(group, weight)| solve(weight, options, uniform.map(|grid| grid[group])))
        .collect()
}

/// One group in binary coding at several widths.
#[derive(Clone, Debug, PartialEq)]
pub struct NestedCode {
    /// One code per weight, of the greatest width; its lowest bits are the code of a narrower one.
    pub codes: Vec<u8>,
    /// Scales and offset of each width, the narrowest first.
    pub grids: Vec<(Vec<f32>, f32)>,
}

/// Finds the binary code of one group that can be read at every width from `lowest` to `highest`
/// (AnyBCQ, arXiv 2510.10467): [`solve`] at the lowest; then plane by plane the signs of what the planes
/// before leave, which stay, with all scales and the offset of that width by least squares, in turns.
/// So the squared error never grows with the width. Only the scales of the lowest are sure to be positive
/// and in order: planes are shared and cannot be moved.
///
/// `uniform` as for [`solve`], at the lowest width.
pub fn solve_nested(
    weight: &[f32],
    [lowest, highest]: [Bits; 2],
    rounds: u32,
    uniform: Option<(f32, f32)>,
) -> NestedCode {
    let solver = BcqSolver::Alternating { rounds };
    let base = solve(weight, &BcqOptions { bits: lowest, solver, offset: true }, uniform);
    let problem = Problem::new(weight, highest, true);
    let mut fit = Fit {
        alpha: base.alpha.iter().map(|alpha| f64::from(*alpha)).collect(),
        offset: f64::from(base.offset) - problem.centre,
        codes: base.codes,
    };
    let mut grids = vec![(base.alpha, base.offset)];
    for _ in lowest.get()..highest.get() {
        fit = problem.widened(fit, rounds);
        let alpha = fit.alpha.iter().map(|alpha| *alpha as f32).collect();
        grids.push((alpha, (fit.offset + problem.centre) as f32));
    }
    NestedCode { codes: fit.codes, grids }
}

/// [`solve_nested`] for every group of a weight, as [`solve_all`].
///
/// # Panics
/// When `weight` or `uniform` does not have the length that `layout` says.
pub fn solve_all_nested(
    weight: &[f32],
    layout: &GroupLayout,
    widths: [Bits; 2],
    rounds: u32,
    uniform: &[(f32, f32)],
) -> Vec<NestedCode> {
    assert_eq!(weight.len(), layout.len(), "one number for each weight of the layout");
    assert_eq!(uniform.len(), layout.groups, "one grid for each group");
    let groups = weight.par_chunks(layout.group_len.max(1)).zip(uniform);
    groups.map(|(weight, uniform)| solve_nested(weight, widths, rounds, Some(*uniform))).collect()
}

/// The binary code of a group on a uniform grid `scale * (code - zero_point)`: the same codes, with
/// bit `i` as plane `i`.
///
/// The levels are bit-equal to the grid's when `scale` has at most 11 significant bits (an f16
/// value) and `zero_point` is an integer of the code range; otherwise they are within a few f32
/// roundings. Here the scales are in ascending order, because the planes are the code's own bits.
pub fn from_uniform(codes: &[u8], scale: f32, zero_point: f32, bits: Bits) -> BinaryCode {
    let alpha = (0..bits.get()).map(|plane| scale * 0.5 * f32::from(1u16 << plane)).collect();
    let offset = scale * (f32::from(bits.max_code()) * 0.5 - zero_point);
    BinaryCode { codes: codes.to_vec(), alpha, offset }
}

/// Scales and offset of least squared error for a group whose codes stay as they are; scales may
/// come out negative. Below the width that codes were made for, they are its first planes.
pub fn fit_scales(weight: &[f32], codes: &[u8], bits: Bits) -> (Vec<f32>, f32) {
    let problem = Problem::new(weight, bits, true);
    let (alpha, offset) = problem.least_squares(codes, usize::from(bits.get()));
    (alpha.iter().map(|a| *a as f32).collect(), (offset + problem.centre) as f32)
}

fn signed_sum<T: Copy + Add<Output = T> + Neg<Output = T>>(code: u8, alpha: &[T], offset: T) -> T {
    let signed =
        |(plane, alpha): (usize, &T)| if code >> plane & 1 == 1 { *alpha } else { -*alpha };
    match alpha.iter().enumerate().map(signed).reduce(|sum, term| sum + term) {
        Some(sum) => sum + offset,
        None => offset,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::GroupAxis;

    const TURNS: BcqSolver = BcqSolver::Alternating { rounds: 15 };

    fn options(bits: u8, solver: BcqSolver, offset: bool) -> BcqOptions {
        BcqOptions { bits: Bits::new(bits).unwrap(), solver, offset }
    }

    fn problem(weight: &[f32], bits: u8, offset: bool) -> Problem {
        Problem::new(weight, Bits::new(bits).unwrap(), offset)
    }

    fn values(code: &BinaryCode) -> Vec<f32> {
        code.codes.iter().map(|c| level(*c, &code.alpha, code.offset)).collect()
    }

    fn sse(weight: &[f32], code: &BinaryCode) -> f64 {
        weight.iter().zip(values(code)).map(|(w, v)| (f64::from(*w) - f64::from(v)).powi(2)).sum()
    }

    fn close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (f, e) in found.iter().zip(expected) {
            assert!((f64::from(*f) - e).abs() < 1e-6, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn greedy_is_exact_on_a_centred_uniform_grid() {
        let code = solve(&[-3.0, -1.0, 1.0, 3.0], &options(2, BcqSolver::Greedy, false), None);
        assert_eq!((code.alpha.as_slice(), code.offset), ([2.0, 1.0].as_slice(), 0.0));
        assert_eq!(values(&code), [-3.0, -1.0, 1.0, 3.0]);
        assert_eq!(code.codes, [0b00, 0b10, 0b01, 0b11]);
    }

    #[test]
    fn greedy_by_hand() {
        let w = [-3.0, -1.0, 1.0, 7.0];
        let greedy = |bits| solve(&w, &options(bits, BcqSolver::Greedy, false), None);
        assert_eq!((greedy(1).alpha, sse(&w, &greedy(1))), (vec![3.0], 24.0));
        assert_eq!((greedy(2).alpha, sse(&w, &greedy(2))), (vec![3.0, 2.0], 8.0));
        assert_eq!(values(&greedy(2)), [-1.0, -1.0, 1.0, 5.0]);
        assert_eq!((greedy(3).alpha, sse(&w, &greedy(3))), (vec![3.0, 2.0, 1.0], 4.0));
        assert_eq!(values(&greedy(3)), [-2.0, 0.0, 2.0, 6.0]);
    }

    #[test]
    fn least_squares_by_hand_is_a_fixed_point() {
        let w = [-3.0, -1.0, 1.0, 7.0];
        for solver in [BcqSolver::Refined, TURNS] {
            let code = solve(&w, &options(2, solver, false), None);
            close(&code.alpha, &[13.0 / 3.0, 8.0 / 3.0]);
            close(&values(&code), &[-5.0 / 3.0, -5.0 / 3.0, 5.0 / 3.0, 7.0]);
            assert!((sse(&w, &code) - 8.0 / 3.0).abs() < 1e-5);
        }
    }

    fn nested_sse(weight: &[f32], code: &NestedCode, lowest: usize) -> Vec<f64> {
        let of = |(index, (alpha, offset)): (usize, &(Vec<f32>, f32))| {
            let mask = u8::MAX >> (8 - lowest - index);
            let codes = code.codes.iter().map(|code| code & mask).collect();
            sse(weight, &BinaryCode { codes, alpha: alpha.clone(), offset: *offset })
        };
        code.grids.iter().enumerate().map(of).collect()
    }

    #[test]
    fn a_third_plane_by_hand() {
        let w = [-3.0, -1.0, 1.0, 7.0];
        let problem = problem(&w, 3, false);
        let two = Fit {
            alpha: vec![13.0 / 3.0, 8.0 / 3.0],
            offset: 0.0,
            codes: vec![0b10, 0b10, 0b01, 0b11],
        };
        let three = problem.widened(two, 20);
        assert_eq!(three.codes, [0b010, 0b110, 0b001, 0b111]);
        assert!(problem.sse(&three) < 1e-12);
        let alpha: Vec<f32> = three.alpha.iter().map(|alpha| *alpha as f32).collect();
        close(&alpha, &[4.0, 2.0, 1.0]);
    }

    #[test]
    fn alternation_by_hand() {
        let w = [-2.0, -1.0, 0.2, 0.4, 1.0, 3.0];
        let greedy = problem(&w, 2, false).greedy();
        assert!((problem(&w, 2, false).sse(&greedy) - 1.517_037).abs() < 1e-6);
        let code = solve(&w, &options(2, TURNS, false), None);
        close(&code.alpha, &[1.575, 0.925]);
        assert!((sse(&w, &code) - 1.01).abs() < 1e-6);
    }

    #[test]
    fn the_offset_is_found_exactly() {
        let w = [0.1, 0.2, 0.9, -0.6];
        let without = solve(&w, &options(2, TURNS, false), None);
        close(&without.alpha, &[0.45, 0.30]);
        assert!((sse(&w, &without) - 0.05).abs() < 1e-6);

        // Joint least squares from the codes found without an offset.
        let joint = problem(&w, 2, true);
        let fit = Fit { codes: problem(&w, 2, false).greedy().codes, ..joint.greedy() };
        let refit = joint.refit(fit.clone());
        assert!((refit.alpha[0] - 0.375).abs() < 1e-6 && (refit.alpha[1] - 0.375).abs() < 1e-6);
        assert!((refit.offset + joint.centre - 0.15).abs() < 1e-6);
        assert!((joint.sse(&refit) - 0.005).abs() < 1e-6);
        let end = joint.alternate(fit, 15);
        assert!((end.alpha[0] - 0.40).abs() < 1e-6 && (end.alpha[1] - 0.35).abs() < 1e-6);

        let with = solve(&w, &options(2, TURNS, true), None);
        close(&with.alpha, &[0.40, 0.35]);
        close(&[with.offset], &[0.15]);
        assert!(sse(&w, &with) < 1e-13);
    }

    #[test]
    fn scales_are_sorted_even_where_greedy_ends_with_a_greater_one() {
        let w = [0.0, 0.0, 0.0, 8.0];
        let code = solve(&w, &options(2, BcqSolver::Greedy, false), None);
        assert_eq!((code.alpha.as_slice(), sse(&w, &code)), ([3.0, 2.0].as_slice(), 12.0));
        assert!(sse(&w, &solve(&w, &options(2, TURNS, true), None)) < 1e-12);
    }

    #[test]
    fn constant_groups_are_exact() {
        for (value, offset) in [(0.0, false), (0.0, true), (0.3, false), (-0.7, false), (1e3, true)]
        {
            for bits in 1..=8 {
                for solver in [BcqSolver::Greedy, TURNS] {
                    let code = solve(&[value; 5], &options(bits, solver, offset), Some((1.0, 0.0)));
                    assert_eq!(values(&code), [value; 5], "{bits} bits, {solver:?}");
                }
            }
        }
        assert!(solve(&[], &options(2, TURNS, true), None).codes.is_empty());
    }

    #[test]
    fn equal_planes_share_the_scale() {
        // Both planes equal: singular without the ridge.
        let joint = problem(&[1.0, -1.0], 2, false);
        let fit = joint.refit(Fit { alpha: vec![0.0; 2], offset: 0.0, codes: vec![0b11, 0b00] });
        assert!((fit.alpha[0] - 0.5).abs() < 1e-6 && (fit.alpha[1] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn a_uniform_grid_is_reproduced_bit_for_bit() {
        // Powers of two scale exactly, so the mantissas of f16 stand for all its values.
        for bits in (1..=8).map(|b| Bits::new(b).unwrap()) {
            let codes: Vec<u8> = (0..=bits.max_code()).collect();
            for mantissa in (1024u16..2048).step_by(31).chain([1, 3, 1023, 2047]) {
                let scale = f32::from(mantissa) / 65536.0;
                for zero in &codes {
                    let zero = f32::from(*zero);
                    let code = from_uniform(&codes, scale, zero, bits);
                    for (q, value) in codes.iter().zip(values(&code)) {
                        assert_eq!(value.to_bits(), (scale * (f32::from(*q) - zero)).to_bits());
                    }
                }
            }
        }
        let code = from_uniform(&[0, 7], 0.5, 3.0, Bits::new(3).unwrap());
        assert_eq!((code.alpha, code.offset), (vec![0.25, 0.5, 1.0], 0.25));
    }

    #[test]
    fn groups_keep_their_order() {
        let layout =
            GroupLayout { out: 2, inputs: 4, groups: 4, group_len: 2, axis: GroupAxis::In };
        let weight = [1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0];
        let all = solve_all(&weight, &layout, &options(1, TURNS, false), None);
        let scales: Vec<f32> = all.iter().map(|code| code.alpha[0]).collect();
        assert_eq!(scales, [1.0, 2.0, 3.0, 4.0]);
    }

    fn group() -> impl Strategy<Value = Vec<f32>> {
        prop::collection::vec(-1.0f32..1.0, 1..65)
    }

    fn norm(weight: &[f32]) -> f64 {
        weight.iter().map(|w| f64::from(*w).powi(2)).sum()
    }

    proptest! {
        #[test]
        fn a_wider_nested_code_is_never_worse(
            weight in proptest::collection::vec(-2.0f32..2.0, 1..40),
            lowest in 1u8..=3,
            more in 0u8..=3,
            shift in -3.0f32..3.0,
        ) {
            let weight: Vec<f32> = weight.iter().map(|w| w + shift).collect();
            let widths = [lowest, lowest + more].map(|bits| Bits::new(bits).unwrap());
            let code = solve_nested(&weight, widths, 20, None);
            prop_assert_eq!(code.grids.len(), usize::from(more) + 1);
            let alone = solve(&weight, &options(lowest, BcqSolver::Alternating { rounds: 20 }, true), None);
            let mask = u8::MAX >> (8 - lowest);
            let first: Vec<u8> = code.codes.iter().map(|code| code & mask).collect();
            prop_assert_eq!(first, alone.codes);
            let errors = nested_sse(&weight, &code, usize::from(lowest));
            let size: f64 = weight.iter().map(|w| f64::from(*w).powi(2)).sum();
            for pair in errors.windows(2) {
                prop_assert!(pair[1] <= pair[0] + 1e-6 * size, "{:?}", errors);
            }
        }

        #[test]
        fn greedy_error_is_what_the_scales_leave(w in group(), bits in 1u8..=8) {
            let problem = problem(&w, bits, false);
            let fit = problem.greedy();
            let left = norm(&w) - w.len() as f64 * fit.alpha.iter().map(|a| a * a).sum::<f64>();
            prop_assert!((problem.sse(&fit) - left).abs() < 1e-9 * (1.0 + norm(&w)));
        }

        #[test]
        fn two_planes_have_a_closed_form(w in group()) {
            let problem = problem(&w, 2, false);
            let fit = problem.greedy();
            let sign = |i: usize, code: u8| if code >> i & 1 == 1 { 1.0 } else { -1.0 };
            let mean = |f: &dyn Fn(u8, f64) -> f64| {
                let terms = fit.codes.iter().zip(&problem.weight).map(|(c, w)| f(*c, *w));
                terms.sum::<f64>() / w.len() as f64
            };
            let rho = mean(&|c, _| sign(0, c) * sign(1, c));
            prop_assume!(rho.abs() < 0.99);
            let (m0, m1) = (mean(&|c, w| sign(0, c) * w), mean(&|c, w| sign(1, c) * w));
            let mut expected = [m0 - rho * m1, m1 - rho * m0].map(|a| (a / (1.0 - rho * rho)).abs());
            expected.sort_by(|a, b| b.total_cmp(a));
            let found = problem.refit(fit.clone()).alpha;
            prop_assert!((found[0] - expected[0]).abs() < 1e-5, "{found:?} {expected:?}");
            prop_assert!((found[1] - expected[1]).abs() < 1e-5, "{found:?} {expected:?}");
        }

        #[test]
        fn no_turn_raises_the_error(w in group(), bits in 1u8..=8, offset: bool) {
            let problem = problem(&w, bits, offset);
            let mut fit = problem.greedy();
            for _ in 0..10 {
                let next = problem.round(fit.clone());
                prop_assert!(problem.sse(&next) <= problem.sse(&fit) + 1e-9 * norm(&w));
                fit = next;
            }
        }

        #[test]
        fn codes_are_the_nearest_levels(
            w in group(), bits in 1u8..=8, offset: bool, solver in 0..3usize,
        ) {
            let solver = [BcqSolver::Greedy, BcqSolver::Refined, TURNS][solver];
            let code = solve(&w, &options(bits, solver, offset), None);
            prop_assert!(code.alpha.windows(2).all(|a| a[0] >= a[1]) && code.alpha[bits as usize - 1] >= 0.0);
            prop_assert!(offset || code.offset == 0.0);
            for (w, value) in w.iter().zip(values(&code)) {
                let distance = |v: f32| (f64::from(*w) - f64::from(v)).abs();
                let least = (0..=Bits::new(bits).unwrap().max_code())
                    .map(|c| distance(level(c, &code.alpha, code.offset)))
                    .fold(f64::INFINITY, f64::min);
                prop_assert!(distance(value) <= least);
            }
        }

        #[test]
        fn never_worse_than_the_uniform_grid(w in group(), bits in 1u8..=8, mantissa in 1024u16..2048) {
            // Any grid will do, good or bad; an f16 step makes its image exact.
            let (scale, zero) = (f32::from(mantissa) / 65536.0, f32::from(1u8 << (bits - 1)));
            let top = f32::from(Bits::new(bits).unwrap().max_code());
            let grid = |w: f32| scale * (((w / scale).round_ties_even() + zero).clamp(0.0, top) - zero);
            let expected: f64 = w.iter().map(|w| (f64::from(*w) - f64::from(grid(*w))).powi(2)).sum();
            let code = solve(&w, &options(bits, TURNS, true), Some((scale, zero)));
            prop_assert!(sse(&w, &code) <= expected * (1.0 + 1e-12));
        }
    }
}
