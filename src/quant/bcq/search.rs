//! The search for one group's scales and signs, in f64.

use std::array;

use super::{BinaryCode, level, signed_sum};
use crate::quant::Bits;

/// Weight of the ridge in the normal equations, per weight of the group. Two planes that are equal
/// up to sign make the equations singular; the ridge then shares the scale between them.
const RIDGE: f64 = 1e-8;

/// Unknowns of the largest least-squares problem: eight scales and the offset.
const UNKNOWNS: usize = 9;

/// One group to be solved, in f64.
pub(super) struct Problem {
    /// The weights, less `centre`: keeps the ridge from pulling at a large common value.
    pub(super) weight: Vec<f64>,
    /// The mean of the weights, or 0 without an offset.
    pub(super) centre: f64,
    pub(super) bits: Bits,
    pub(super) with_offset: bool,
}

/// A candidate solution; `offset` is relative to the problem's centre.
#[derive(Clone, Debug)]
pub(super) struct Fit {
    pub(super) alpha: Vec<f64>,
    pub(super) offset: f64,
    pub(super) codes: Vec<u8>,
}

impl Problem {
    pub(super) fn new(weight: &[f32], bits: Bits, with_offset: bool) -> Self {
        let sum: f64 = weight.iter().map(|w| f64::from(*w)).sum();
        let centre = if with_offset { sum / weight.len().max(1) as f64 } else { 0.0 };
        let weight = weight.iter().map(|w| f64::from(*w) - centre).collect();
        Self { weight, centre, bits, with_offset }
    }

    /// Plane by plane: the signs of the residual and the mean of its magnitude.
    pub(super) fn greedy(&self) -> Fit {
        let mut residual = self.weight.clone();
        let mut fit = Fit { alpha: Vec::new(), offset: 0.0, codes: vec![0; residual.len()] };
        for plane in 0..self.bits.get() {
            let sum: f64 = residual.iter().map(|r| r.abs()).sum();
            let alpha = sum / residual.len().max(1) as f64;
            for (r, code) in residual.iter_mut().zip(&mut fit.codes) {
                // A plane has no zero, so the sign of zero is plus.
                if *r >= 0.0 {
                    *code |= 1 << plane;
                    *r -= alpha;
                } else {
                    *r += alpha;
                }
            }
            fit.alpha.push(alpha);
        }
        fit.normalized()
    }

    /// The levels of a uniform grid, with the weights on the nearest of them.
    pub(super) fn uniform(&self, scale: f32, zero_point: f32) -> Fit {
        let scale = f64::from(scale);
        let alpha = (0..self.bits.get()).rev().map(|plane| scale * 0.5 * f64::from(1 << plane));
        let middle = scale * (f64::from(self.bits.max_code()) * 0.5 - f64::from(zero_point));
        let offset = if self.with_offset { middle - self.centre } else { 0.0 };
        self.assigned(Fit { alpha: alpha.collect(), offset, codes: Vec::new() })
    }

    /// Turns of [`Self::round`] while they help. Codes that did not change give the same fit
    /// again, so an unchanged error is also the sign of a fixed point.
    pub(super) fn alternate(&self, mut fit: Fit, rounds: u32) -> Fit {
        let mut least = self.sse(&fit);
        for _ in 0..rounds {
            let next = self.round(fit.clone());
            let sse = self.sse(&next);
            if sse < least {
                (fit, least) = (next, sse);
            } else {
                break;
            }
        }
        fit
    }

    /// One turn: scales for the signs, then signs for the scales.
    pub(super) fn round(&self, fit: Fit) -> Fit {
        self.assigned(self.refit(fit))
    }

    /// Least squares for the scales, and the offset if there is one, with the signs as they are.
    pub(super) fn refit(&self, mut fit: Fit) -> Fit {
        let (alpha, offset) = self.least_squares(&fit.codes, fit.alpha.len());
        fit.alpha = alpha;
        if self.with_offset {
            fit.offset = offset;
        }
        fit.normalized()
    }

    /// One plane more: the signs of what the planes of `fit` leave, these planes as they are, and all
    /// scales by least squares; in turns while they help.
    pub(super) fn widened(&self, fit: Fit, rounds: u32) -> Fit {
        let plane = fit.alpha.len();
        // A scale of nothing takes whatever sign: the error so far.
        let mut best = Fit { alpha: [&fit.alpha[..], &[0.0]].concat(), ..fit };
        let mut least = self.sse(&best);
        let mut next = best.clone();
        for _ in 0..=rounds {
            let level = |code: u8| signed_sum(code, &next.alpha[..plane], next.offset);
            // Plus where the plane's own scale, of whatever sign, comes nearer by it.
            let positive = next.alpha[plane] >= 0.0;
            let signs = next.codes.iter().zip(&self.weight).map(|(code, w)| {
                let below = code & !(1 << plane);
                below | u8::from((w - level(below) >= 0.0) == positive) << plane
            });
            let codes: Vec<u8> = signs.collect();
            let (alpha, offset) = self.least_squares(&codes, plane + 1);
            next = Fit { alpha, offset, codes };
            let sse = self.sse(&next);
            if sse >= least {
                break;
            }
            (best, least) = (next.clone(), sse);
        }
        best
    }

    /// Scales of these many planes and the offset, 0 without one.
    pub(super) fn least_squares(&self, codes: &[u8], planes: usize) -> (Vec<f64>, f64) {
        let size = planes + usize::from(self.with_offset);
        let (mut count, mut sum) = (vec![0.0; self.bits.levels()], vec![0.0; self.bits.levels()]);
        for (code, w) in codes.iter().zip(&self.weight) {
            count[usize::from(*code)] += 1.0;
            sum[usize::from(*code)] += w;
        }
        let mut gram = [[0.0; UNKNOWNS]; UNKNOWNS];
        let mut moment = [0.0; UNKNOWNS];
        for code in (0..count.len()).filter(|code| count[*code] > 0.0) {
            // Beyond the planes the sign stays plus: the offset's column of ones.
            let sign: [f64; UNKNOWNS] =
                array::from_fn(|i| if i < planes && code >> i & 1 == 0 { -1.0 } else { 1.0 });
            for (i, row) in gram.iter_mut().enumerate().take(size) {
                moment[i] += sign[i] * sum[code];
                for (cell, other) in row.iter_mut().zip(&sign).take(i + 1) {
                    *cell += sign[i] * other * count[code];
                }
            }
        }
        for (i, row) in gram.iter_mut().enumerate() {
            row[i] += RIDGE * self.weight.len() as f64;
        }
        let solution = solve_positive(gram, moment, size);
        let offset = if self.with_offset { solution[planes] } else { 0.0 };
        (solution[..planes].to_vec(), offset)
    }

    /// The same levels with every weight on the nearest.
    pub(super) fn assigned(&self, mut fit: Fit) -> Fit {
        let levels = Levels::new(self.bits, |code| signed_sum(code, &fit.alpha, fit.offset));
        fit.codes = self.weight.iter().map(|w| levels.nearest(*w)).collect();
        fit
    }

    pub(super) fn sse(&self, fit: &Fit) -> f64 {
        let value: Vec<f64> = (0..=self.bits.max_code())
            .map(|code| signed_sum(code, &fit.alpha, fit.offset))
            .collect();
        let errors = fit.codes.iter().zip(&self.weight).map(|(c, w)| w - value[usize::from(*c)]);
        errors.map(|e| e * e).sum()
    }

    /// Rounds to the stored numbers, moves every weight to its nearest stored level, and measures
    /// the squared error of that.
    pub(super) fn finish(&self, weight: &[f32], fit: &Fit) -> (BinaryCode, f64) {
        let alpha: Vec<f32> = fit.alpha.iter().map(|a| *a as f32).collect();
        let offset = (fit.offset + self.centre) as f32;
        let value = |code| f64::from(level(code, &alpha, offset));
        let levels = Levels::new(self.bits, value);
        let codes: Vec<u8> = weight.iter().map(|w| levels.nearest(f64::from(*w))).collect();
        let errors = codes.iter().zip(weight).map(|(code, w)| f64::from(*w) - value(*code));
        let sse = errors.map(|e| e * e).sum();
        (BinaryCode { codes, alpha, offset }, sse)
    }
}

impl Fit {
    /// The same reconstruction with positive scales in descending order.
    fn normalized(mut self) -> Self {
        let mut order: Vec<usize> = (0..self.alpha.len()).collect();
        order.sort_by(|a, b| self.alpha[*b].abs().total_cmp(&self.alpha[*a].abs()));
        let flipped = |plane: usize| u8::from(self.alpha[plane] < 0.0);
        for code in &mut self.codes {
            let moved = order.iter().enumerate();
            *code =
                moved.fold(0, |new, (to, from)| new | ((*code >> from & 1) ^ flipped(*from)) << to);
        }
        self.alpha = order.iter().map(|plane| self.alpha[*plane].abs()).collect();
        self
    }
}

/// All levels of a code, sorted for search.
struct Levels {
    /// Codes by ascending level.
    code: Vec<u8>,
    /// The middle between each two neighbours.
    middle: Vec<f64>,
}

impl Levels {
    fn new(bits: Bits, value: impl Fn(u8) -> f64) -> Self {
        let mut level: Vec<(f64, u8)> =
            (0..=bits.max_code()).map(|code| (value(code), code)).collect();
        level.sort_by(|a, b| a.0.total_cmp(&b.0));
        let middle = level.windows(2).map(|pair| f64::midpoint(pair[0].0, pair[1].0)).collect();
        Self { code: level.into_iter().map(|(_, code)| code).collect(), middle }
    }

    /// The code of the nearest level; at a tie the greater one.
    fn nearest(&self, weight: f64) -> u8 {
        self.code[self.middle.partition_point(|middle| *middle <= weight)]
    }
}

/// Solves `gram * x = moment` for the leading `size` unknowns by Cholesky's method; only the lower
/// triangle is read, and the matrix must be positive definite (the ridge sees to that).
fn solve_positive(
    mut gram: [[f64; UNKNOWNS]; UNKNOWNS],
    mut moment: [f64; UNKNOWNS],
    size: usize,
) -> [f64; UNKNOWNS] {
    for i in 0..size {
        for j in 0..=i {
            let dot: f64 = (0..j).map(|k| gram[i][k] * gram[j][k]).sum();
            let rest = gram[i][j] - dot;
            // The root is of a positive number up to rounding, which must not make it NaN.
            gram[i][j] =
                if i == j { rest.max(f64::MIN_POSITIVE).sqrt() } else { rest / gram[j][j] };
        }
        let dot: f64 = (0..i).map(|k| gram[i][k] * moment[k]).sum();
        moment[i] = (moment[i] - dot) / gram[i][i];
    }
    for i in (0..size).rev() {
        let dot: f64 = (i + 1..size).map(|k| gram[k][i] * moment[k]).sum();
        moment[i] = (moment[i] - dot) / gram[i][i];
    }
    moment
}
