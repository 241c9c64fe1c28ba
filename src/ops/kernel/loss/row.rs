//! Divergences of one row.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use super::Settings;
use super::softmax::{BLOCK, Scratch, Softmax, ln};
use super::tail::{kth_largest, with_tail};
use crate::ops::loss::{Divergence, NEAR_WEIGHT, far_share};
use crate::ops::vector::{self, LANES};

/// Bound of `ln(p/q)`, so that its product with a probability of zero is zero.
const FAR: f32 = 1e30;

/// The divergence of a row. With `KEEP`, its gradient to the tempered logits is then
/// `teacher.exponentials + along * q`, where `along` is the second number returned.
#[inline(always)]
pub(super) fn evaluate<const KEEP: bool>(
    settings: &Settings,
    scratch: &mut Scratch,
    student: &[f32],
    teacher: &[f32],
) -> (f64, f32) {
    if let Some(k) = settings.top_k.filter(|k| settings.tail && *k < teacher.len()) {
        return (with_tail::<KEEP>(settings, k, scratch, student, teacher), 0.0);
    }
    let inverse = (1.0 / settings.temperature) as f32;
    let least = settings.top_k.map_or(f32::NEG_INFINITY, |k| kth_largest(teacher, k));
    scratch.student.load(student, inverse, f32::NEG_INFINITY);
    scratch.teacher.load(teacher, inverse, least);
    scratch.finish(inverse);
    let gamma = match settings.kind {
        Divergence::Adaptive { near, far } => {
            return adaptive::<KEEP>([near, far], scratch, [student, teacher], inverse);
        }
        Divergence::Jsd { beta } => {
            let share = [(1.0 - beta) as f32, beta as f32];
            let [kl_q, kl_p] = sums::<2, KEEP>(
                scratch,
                [student, teacher],
                inverse,
                #[inline(always)]
                |q, p, d| {
                    let terms = to_mixture(share, q, p, d);
                    (terms, share[0] * terms[0])
                },
            );
            return (beta * kl_p + (1.0 - beta) * kl_q, ((beta - 1.0) * kl_q) as f32);
        }
        Divergence::KlForward => 0.0,
        Divergence::KlReverse => 1.0,
        Divergence::Cakld { gamma } => gamma,
    };
    let share = [gamma as f32, (1.0 - gamma) as f32];
    let [reverse, forward] = sums::<2, KEEP>(
        scratch,
        [student, teacher],
        inverse,
        #[inline(always)]
        |q, p, d| ([-q * d, p * d], -share[0] * (q * d) - share[1] * p),
    );
    (gamma * reverse + (1.0 - gamma) * forward, (1.0 - gamma - gamma * reverse) as f32)
}

/// [`evaluate`] of [`Divergence::Adaptive`]: its share of the KL is known once the row has been read.
#[inline(always)]
fn adaptive<const KEEP: bool>(
    [near, far]: [f64; 2],
    scratch: &mut Scratch,
    logits: [&[f32]; 2],
    inverse: f32,
) -> (f64, f32) {
    let [kl_q, kl_p, forward] = sums::<3, false>(
        scratch,
        logits,
        inverse,
        #[inline(always)]
        |q, p, d| {
            let [to_q, to_p] = to_mixture([0.5; 2], q, p, d);
            ([to_q, to_p, p * d], 0.0)
        },
    );
    let jsd = 0.5 * (kl_q + kl_p);
    let share = far_share(jsd, near, far);
    // NaN in a row is no share.
    let close = NEAR_WEIGHT * (1.0 - share);
    let value = share * forward + close * jsd;
    if !KEEP {
        return (value, 0.0);
    }
    let (pull, mismatch) = ((0.5 * close) as f32, share as f32);
    let [_] = sums::<1, KEEP>(
        scratch,
        logits,
        inverse,
        #[inline(always)]
        |q, p, d| ([0.0], pull * to_mixture([0.5; 2], q, p, d)[0] - mismatch * p),
    );
    (value, (share - 0.5 * close * kl_q) as f32)
}

/// The divergence of a row, whose logits become its gradient times `scale`.
#[inline(always)]
pub(super) fn with_gradient(
    settings: &Settings,
    scratch: &mut Scratch,
    student: &mut [f32],
    teacher: &[f32],
    scale: f32,
) -> f64 {
    let (value, along) = evaluate::<true>(settings, scratch, student, teacher);
    let Softmax { exponentials, total } = &scratch.student;
    let blocks = exponentials.chunks(BLOCK).zip(scratch.teacher.exponentials.chunks(BLOCK));
    for ((out, (e, kept)), factor) in student.chunks_mut(BLOCK).zip(blocks).zip(&total.factors) {
        let along = along * factor;
        for ((out, e), kept) in out.iter_mut().zip(e).zip(kept) {
            *out = (kept + e * along) * scale;
        }
    }
    value
}

#[inline(always)]
pub(super) fn compare_row(scratch: &mut Scratch, student: &[f32], teacher: &[f32]) -> [f64; 4] {
    scratch.student.load(student, 1.0, f32::NEG_INFINITY);
    scratch.teacher.load(teacher, 1.0, f32::NEG_INFINITY);
    let first =
        [scratch.student.total.first_max(student), scratch.teacher.total.first_max(teacher)];
    scratch.finish(1.0);
    let [jsd, kl_p, kl_q] = sums::<3, false>(
        scratch,
        [student, teacher],
        1.0,
        #[inline(always)]
        |q, p, d| {
            let [to_q, to_p] = to_mixture([0.5; 2], q, p, d);
            ([to_q + to_p, p * d, -q * d], 0.0)
        },
    );
    [0.5 * jsd, kl_p, kl_q, f64::from(u8::from(first[0] == first[1]))]
}

/// Sums, once both totals are finished, in the order of [`vector::sum`], what `terms` makes of `q`,
/// `p` and `ln(p/q)`; its other result replaces the teacher's exponentials if `KEEP`.
#[inline(always)]
fn sums<const N: usize, const KEEP: bool>(
    scratch: &mut Scratch,
    logits: [&[f32]; 2],
    inverse: f32,
    terms: impl Fn(f32, f32, f32) -> ([f32; N], f32),
) -> [f64; N] {
    let Scratch { student, teacher } = scratch;
    let mut scale = Scale {
        max: [student.total.max, teacher.total.max],
        inverse,
        offset: ln(teacher.total.sum / student.total.sum) as f32,
        factors: [0.0; 2],
    };
    let mut sums = [0.0; N];
    let factors = student.total.factors.iter().zip(&teacher.total.factors);
    let logits = logits[0].chunks(BLOCK).zip(logits[1].chunks(BLOCK));
    let blocks = student.exponentials.chunks(BLOCK).zip(teacher.exponentials.chunks_mut(BLOCK));
    for (((s, t), (e, kept)), factors) in logits.zip(blocks).zip(factors) {
        scale.factors = [*factors.0, *factors.1];
        let mut lanes = [[0.0; LANES]; N];
        let ((s, s_rest), (t, t_rest)) = (s.as_chunks(), t.as_chunks());
        let ((e, e_rest), (kept, kept_rest)) = (e.as_chunks(), kept.as_chunks_mut());
        for (((s, t), e), kept) in s.iter().zip(t).zip(e).zip(kept) {
            let keep = scale.step(&mut lanes, [*s, *t, *e, *kept], &terms);
            if KEEP {
                *kept = keep;
            }
        }
        // Padded with probabilities of zero.
        let mut last = [[0.0; LANES]; 4];
        for (to, from) in last.iter_mut().zip([s_rest, t_rest, e_rest, &*kept_rest]) {
            to[..from.len()].copy_from_slice(from);
        }
        let keep = scale.step(&mut lanes, last, &terms);
        if KEEP {
            kept_rest.copy_from_slice(&keep[..kept_rest.len()]);
        }
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum += vector::fold_lanes(lanes);
        }
    }
    sums
}

/// What makes probabilities and log-ratios of the student's and the teacher's logits.
struct Scale {
    max: [f32; 2],
    inverse: f32,
    /// Difference of the logarithms of the totals.
    offset: f32,
    factors: [f32; 2],
}

impl Scale {
    #[inline(always)]
    #[allow(clippy::manual_clamp)] // which would keep NaN
    fn step<const N: usize>(
        &self,
        lanes: &mut [[f32; LANES]; N],
        [student, teacher, exponentials, mut keep]: [[f32; LANES]; 4],
        terms: &impl Fn(f32, f32, f32) -> ([f32; N], f32),
    ) -> [f32; LANES] {
        for i in 0..LANES {
            // Relative to the largest logits: near them, where the mass is, it is exact. If both
            // are infinite it is any number; the offset is NaN if a logit was.
            let d = ((teacher[i] - self.max[1]) - (student[i] - self.max[0])) * self.inverse;
            let d = d.max(-FAR).min(FAR) - self.offset;
            let (q, p) = (exponentials[i] * self.factors[0], keep[i] * self.factors[1]);
            let (terms, new) = terms(q, p, d);
            for (lanes, term) in lanes.iter_mut().zip(terms) {
                lanes[i] += term;
            }
            keep[i] = new;
        }
        keep
    }
}

/// `q ln(q/m)` and `p ln(p/m)`, where `m` is made of these shares of `q` and `p`, and `d` is
/// `ln(p/q)`: the larger one over `m` from their ratio, the other one then by `d`, which is still
/// accurate when the ratio underflows.
#[inline(always)]
fn to_mixture(share: [f32; 2], q: f32, p: f32, d: f32) -> [f32; 2] {
    let d = if p > 0.0 { d } else { -FAR }; // also if it was cut off
    // m / larger = 1 - share of the smaller one * (1 - smaller / larger): one if they are equal.
    let gap = 1.0 - q.min(p) / q.max(p).max(f32::MIN_POSITIVE);
    let share = if p > q { share[0] } else { share[1] };
    let base = -vector::ln(1.0 - share * gap);
    [q * (base - d.max(0.0)), p * (base + d.min(0.0))]
}
