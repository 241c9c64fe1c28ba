//! Training losses over rows of logits: value and gradient without a tensor between them.
//!
//! A row is read from memory once: block by block its logits become exponentials in a buffer of
//! the thread, relative to the largest logit so far. All the rest happens in the cache.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use crate::ops::loss::{Divergence, LEAST_TAIL, NEAR_WEIGHT, far_share};
use crate::ops::vector::{self, LANES, Level, at};
use rayon::prelude::*;

/// Logits that share a maximum and a partial sum.
const BLOCK: usize = 64 * LANES;
/// Bound of `ln(p/q)`, so that its product with a probability of zero is zero.
const FAR: f32 = 1e30;

/// What is measured between student `q` and teacher `p`.
pub(crate) struct Settings {
    pub kind: Divergence,
    /// Divides the logits of both.
    pub temperature: f64,
    /// Keeps the teacher's largest logits of each row, this many and what ties with the last one;
    /// the others have probability zero. Without a tail only defined for [`Divergence::KlForward`],
    /// [`Divergence::Jsd`] and [`Divergence::Adaptive`]: the reverse KL would be infinite.
    pub top_k: Option<usize>,
    /// Whether the tokens that `top_k` leaves out are one more event.
    pub tail: bool,
}

/// Weighted sum over rows of the divergence; the student's logits `[rows, vocab]` are replaced by
/// the gradient of that sum. Rows of weight zero are not read; NaN in any other makes it NaN.
pub(crate) fn divergence_with_gradient(
    settings: &Settings,
    student: &mut [f32],
    teacher: &[f32],
    weights: &[f32],
) -> f64 {
    let vocab = clear_unused(student, weights);
    let rows = student.chunks_mut(vocab).zip(teacher.chunks(vocab));
    let [sum] = weighted_sum(vocab, rows, weights, |scratch, (student, teacher), weight| {
        let scale = (f64::from(weight) / settings.temperature) as f32;
        [at!(Level::best(), with_gradient(settings, scratch, student, teacher, scale))]
    });
    sum
}

/// The value of [`divergence_with_gradient`], the same bits.
pub(crate) fn divergence(
    settings: &Settings,
    student: &[f32],
    teacher: &[f32],
    weights: &[f32],
) -> f64 {
    let vocab = vocab(student, weights);
    let rows = student.chunks(vocab).zip(teacher.chunks(vocab));
    let [sum] = weighted_sum(vocab, rows, weights, |scratch, (student, teacher), _| {
        [at!(Level::best(), evaluate::<false>(settings, scratch, student, teacher)).0]
    });
    sum
}

/// Weighted sum over rows of `-ln q[target]`; the logits `[rows, vocab]` are replaced by its
/// gradient. NaN for a target outside the vocabulary, unless its weight is zero.
pub(crate) fn cross_entropy_with_gradient(
    logits: &mut [f32],
    targets: &[i32],
    weights: &[f32],
) -> f64 {
    let vocab = clear_unused(logits, weights);
    let rows = logits.chunks_mut(vocab).zip(targets);
    let [sum] = weighted_sum(vocab, rows, weights, |scratch, (logits, target), weight| {
        let logit = logit_of(*target, logits);
        let total = &mut scratch.student.total;
        at!(Level::best(), total.replace(logits, weight));
        if logit.is_some() {
            logits[*target as usize] -= weight;
        }
        [total.surprise(logit)]
    });
    sum
}

/// `-ln q[target]` of every row of logits `[rows, vocab]`; NaN for a target outside the vocabulary.
pub(crate) fn negative_log_likelihood(logits: &[f32], targets: &[i32]) -> Vec<f32> {
    let vocab = vocab(logits, targets);
    each_row(vocab, logits.chunks(vocab).zip(targets).collect(), |scratch, (logits, target)| {
        let total = &mut scratch.student.total;
        at!(Level::best(), total.measure(logits));
        total.surprise(logit_of(*target, logits)) as f32
    })
}

/// Weighted sums over rows of the Jensen–Shannon divergence at β = 0.5, `KL(p‖q)`, `KL(q‖p)`, and
/// 1 where both have the same most likely token (the first one of a tie).
pub(crate) fn compare(student: &[f32], teacher: &[f32], weights: &[f32]) -> [f64; 4] {
    let vocab = vocab(student, weights);
    let rows = student.chunks(vocab).zip(teacher.chunks(vocab));
    weighted_sum(vocab, rows, weights, |scratch, (student, teacher), _| {
        at!(Level::best(), compare_row(scratch, student, teacher))
    })
}

/// Weighted sum over rows of the largest probability.
pub(crate) fn confidence(logits: &[f32], weights: &[f32]) -> f64 {
    let vocab = vocab(logits, weights);
    let [sum] = weighted_sum(vocab, logits.chunks(vocab), weights, |scratch, logits, _| {
        at!(Level::best(), scratch.student.total.measure(logits));
        [1.0 / scratch.student.total.sum] // of exponentials, the largest is one
    });
    sum
}

/// Width of a row; not zero, which no slice can be cut into.
fn vocab<T>(logits: &[f32], rows: &[T]) -> usize {
    (logits.len() / rows.len().max(1)).max(1)
}

/// Zeros the rows of weight zero.
fn clear_unused(logits: &mut [f32], weights: &[f32]) -> usize {
    let vocab = vocab(logits, weights);
    let rows = logits.chunks_mut(vocab).zip(weights);
    rows.filter(|(_, weight)| **weight == 0.0).for_each(|(row, _)| row.fill(0.0));
    vocab
}

fn logit_of(target: i32, logits: &[f32]) -> Option<f32> {
    logits.get(usize::try_from(target).ok()?).copied()
}

/// Weighted sums over rows of what `row` gives; it does not see rows of weight zero.
fn weighted_sum<I: Send, const N: usize>(
    vocab: usize,
    rows: impl Iterator<Item = I>,
    weights: &[f32],
    row: impl Fn(&mut Scratch, I, f32) -> [f64; N] + Sync + Send,
) -> [f64; N] {
    let rows = rows.zip(weights).filter(|(_, weight)| **weight != 0.0).collect();
    let values = each_row(vocab, rows, |scratch, (of, weight)| {
        row(scratch, of, *weight).map(|value| value * f64::from(*weight))
    });
    values.iter().fold([0.0; N], |sums, row| std::array::from_fn(|i| sums[i] + row[i]))
}

/// What `row` gives for each of the rows, in order.
fn each_row<I: Send, R: Send>(
    vocab: usize,
    rows: Vec<I>,
    row: impl Fn(&mut Scratch, I) -> R + Sync + Send,
) -> Vec<R> {
    if super::parallel(rows.len() * vocab) {
        rows.into_par_iter().map_init(Scratch::default, row).collect()
    } else {
        let mut scratch = Scratch::default();
        rows.into_iter().map(|of| row(&mut scratch, of)).collect()
    }
}

/// The buffers of one thread.
#[derive(Default)]
struct Scratch {
    student: Softmax,
    teacher: Softmax,
}

/// A row's softmax: entry `i` is `exponentials[i] * total.factors[i / BLOCK]`.
#[derive(Default)]
struct Softmax {
    exponentials: Vec<f32>,
    total: Total,
}

/// The sum of a row's exponentials, as its blocks come.
#[derive(Default)]
struct Total {
    /// Of each block: what its exponentials are relative to and, once finished, what makes
    /// probabilities of them.
    factors: Vec<f32>,
    /// Largest logit so far.
    max: f32,
    /// Sum of `e^((x - max)/τ)`.
    sum: f64,
}

/// The divergence of a row. With `KEEP`, its gradient to the tempered logits is then
/// `teacher.exponentials + along * q`, where `along` is the second number returned.
#[inline(always)]
fn evaluate<const KEEP: bool>(
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

/// The divergence of a row over the teacher's `k` largest logits and one event for all others. With
/// `KEEP`, the teacher's exponentials become its gradient to the tempered logits.
fn with_tail<const KEEP: bool>(
    settings: &Settings,
    k: usize,
    scratch: &mut Scratch,
    student: &[f32],
    teacher: &[f32],
) -> f64 {
    let inverse = 1.0 / settings.temperature;
    let least = kth_largest(teacher, k);
    scratch.student.load(student, inverse as f32, f32::NEG_INFINITY);
    scratch.teacher.load(teacher, inverse as f32, f32::NEG_INFINITY);
    let log = |total: &Total, logit: f32| {
        (f64::from(logit) - f64::from(total.max)) * inverse - ln(total.sum)
    };
    // Logarithms of the student's and the teacher's probability of each event; the tail is last.
    let mut left = [1.0; 2];
    let kept: Vec<usize> = (0..teacher.len()).filter(|i| teacher[*i] >= least).collect();
    let mut events: Vec<[f64; 2]> = Vec::with_capacity(kept.len() + 1);
    for i in &kept {
        let event =
            [log(&scratch.student.total, student[*i]), log(&scratch.teacher.total, teacher[*i])];
        left = [left[0] - event[0].exp(), left[1] - event[1].exp()];
        events.push(event);
    }
    events.push(left.map(|p| p.max(LEAST_TAIL).ln()));
    let (value, pulls) = over_events(settings.kind, &events);
    if KEEP {
        scratch.finish(inverse as f32);
        let Scratch { student, teacher } = scratch;
        let of_tail = pulls[kept.len()] as f32;
        let blocks = student.exponentials.chunks(BLOCK).zip(&student.total.factors);
        for (out, (e, factor)) in teacher.exponentials.chunks_mut(BLOCK).zip(blocks) {
            for (out, e) in out.iter_mut().zip(e) {
                *out = e * factor * of_tail;
            }
        }
        for ((i, event), pull) in kept.iter().zip(&events).zip(&pulls) {
            teacher.exponentials[*i] = (event[0].exp() * pull) as f32;
        }
    }
    value
}

/// The divergence over events of these log-probabilities, student's and teacher's, and for each what
/// times the student's probability is the gradient to a logit of the event.
fn over_events(kind: Divergence, events: &[[f64; 2]]) -> (f64, Vec<f64>) {
    let sum =
        |term: &dyn Fn(f64, f64) -> f64| -> f64 { events.iter().map(|[q, p]| term(*q, *p)).sum() };
    let each = |pull: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        events.iter().map(|[q, p]| pull(*q, *p)).collect()
    };
    let mixture = |beta: f64, q: f64, p: f64| (beta * p.exp() + (1.0 - beta) * q.exp()).ln();
    match kind {
        Divergence::KlForward => {
            (sum(&|q, p| p.exp() * (p - q)), each(&|q, p| 1.0 - (p - q).exp()))
        }
        Divergence::KlReverse => {
            let value = sum(&|q, p| q.exp() * (q - p));
            (value, each(&|q, p| q - p - value))
        }
        Divergence::Jsd { beta } => {
            let kl_q = sum(&|q, p| q.exp() * (q - mixture(beta, q, p)));
            let kl_p = sum(&|q, p| p.exp() * (p - mixture(beta, q, p)));
            let pulls = each(&|q, p| (1.0 - beta) * (q - mixture(beta, q, p) - kl_q));
            (beta * kl_p + (1.0 - beta) * kl_q, pulls)
        }
        Divergence::Cakld { gamma } => {
            let (forward, to_forward) = over_events(Divergence::KlForward, events);
            let (reverse, to_reverse) = over_events(Divergence::KlReverse, events);
            mixed([1.0 - gamma, gamma], [forward, reverse], [to_forward, to_reverse])
        }
        Divergence::Adaptive { near, far } => {
            let (kl, to_kl) = over_events(Divergence::KlForward, events);
            let (jsd, to_jsd) = over_events(Divergence::Jsd { beta: 0.5 }, events);
            let share = far_share(jsd, near, far);
            mixed([share, NEAR_WEIGHT * (1.0 - share)], [kl, jsd], [to_kl, to_jsd])
        }
    }
}

fn mixed(weights: [f64; 2], values: [f64; 2], pulls: [Vec<f64>; 2]) -> (f64, Vec<f64>) {
    let [first, second] = pulls;
    let pulls = first.into_iter().zip(second);
    (
        weights[0] * values[0] + weights[1] * values[1],
        pulls.map(|(a, b)| weights[0] * a + weights[1] * b).collect(),
    )
}

/// The divergence of a row, whose logits become its gradient times `scale`.
#[inline(always)]
fn with_gradient(
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
fn compare_row(scratch: &mut Scratch, student: &[f32], teacher: &[f32]) -> [f64; 4] {
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

impl Scratch {
    /// Finishes both totals.
    #[inline(always)]
    fn finish(&mut self, inverse: f32) {
        self.student.total.finish(inverse);
        self.teacher.total.finish(inverse);
    }
}

impl Softmax {
    /// Of logits divided by a temperature; what is less than `least` has probability zero.
    #[inline(always)]
    fn load(&mut self, logits: &[f32], inverse: f32, least: f32) {
        self.exponentials.resize(logits.len(), 0.0);
        self.total.clear();
        for (block, logits) in self.exponentials.chunks_mut(BLOCK).zip(logits.chunks(BLOCK)) {
            for (to, from) in block.iter_mut().zip(logits) {
                *to = if *from < least { f32::NEG_INFINITY } else { *from }; // NaN stays
            }
            self.total.add(block, inverse);
        }
    }
}

impl Total {
    fn clear(&mut self) {
        self.factors.clear();
        self.max = f32::MIN; // finite, for logits of negative infinity
        self.sum = 0.0;
    }

    /// Turns a block of logits into exponentials and adds them.
    #[inline(always)]
    fn add(&mut self, block: &mut [f32], inverse: f32) {
        let max = self.max.max(block_max(block));
        let mut lanes = [0.0; LANES];
        let (whole, rest) = block.as_chunks_mut::<LANES>();
        for chunk in whole {
            for (x, lane) in chunk.iter_mut().zip(&mut lanes) {
                *x = vector::exp((*x - max) * inverse);
                *lane += *x;
            }
        }
        for (x, lane) in rest.iter_mut().zip(&mut lanes) {
            *x = vector::exp((*x - max) * inverse);
            *lane += *x;
        }
        let shrink = f64::from(vector::exp((self.max - max) * inverse));
        self.sum = self.sum * shrink + vector::fold_lanes(lanes);
        self.max = max;
        self.factors.push(max);
    }

    /// Takes a whole row without keeping its exponentials, at temperature one.
    #[inline(always)]
    fn measure(&mut self, logits: &[f32]) {
        self.clear();
        let mut buffer = [0.0; BLOCK];
        for logits in logits.chunks(BLOCK) {
            let block = &mut buffer[..logits.len()];
            block.copy_from_slice(logits);
            self.add(block, 1.0);
        }
    }

    /// Turns a whole row into `weight * q`, at temperature one.
    #[inline(always)]
    fn replace(&mut self, logits: &mut [f32], weight: f32) {
        self.clear();
        for block in logits.chunks_mut(BLOCK) {
            self.add(block, 1.0);
        }
        self.finish(1.0);
        for (block, factor) in logits.chunks_mut(BLOCK).zip(&self.factors) {
            for e in block {
                *e = *e * *factor * weight;
            }
        }
    }

    /// Makes the factors that turn exponentials into probabilities.
    #[inline(always)]
    fn finish(&mut self, inverse: f32) {
        let normal = (1.0 / self.sum) as f32;
        for factor in &mut self.factors {
            *factor = vector::exp((*factor - self.max) * inverse) * normal;
        }
    }

    /// Where the largest logit is, before `finish`: in the first block that knew it.
    fn first_max(&self, logits: &[f32]) -> Option<usize> {
        let start = self.factors.iter().position(|max| *max >= self.max)? * BLOCK;
        Some(start + logits[start..].iter().position(|x| *x >= self.max)?)
    }

    /// `-ln` of the probability of a logit of the row, at temperature one.
    fn surprise(&self, logit: Option<f32>) -> f64 {
        ln(self.sum) + (f64::from(self.max) - logit.map_or(f64::NAN, f64::from))
    }
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

/// [`vector::max`] with four times the lanes, which a short slice needs to hide the latency.
#[inline(always)]
fn block_max(values: &[f32]) -> f32 {
    let mut lanes = [[f32::NEG_INFINITY; LANES]; 4];
    let (whole, rest) = values.as_chunks::<{ 4 * LANES }>();
    for chunk in whole {
        for i in 0..LANES {
            lanes[0][i] = lanes[0][i].max(chunk[i]);
            lanes[1][i] = lanes[1][i].max(chunk[i + LANES]);
            lanes[2][i] = lanes[2][i].max(chunk[i + 2 * LANES]);
            lanes[3][i] = lanes[3][i].max(chunk[i + 3 * LANES]);
        }
    }
    vector::max(lanes.as_flattened()).max(vector::max(rest))
}

/// The `k`-th largest logit; negative infinity if that is all of them.
fn kth_largest(logits: &[f32], k: usize) -> f32 {
    if k == 0 || k >= logits.len() {
        return f32::NEG_INFINITY;
    }
    *logits.to_vec().select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}

/// `ln x` in f64 of basic arithmetic only, because the system's differs between machines. NaN
/// unless `x > 0`.
fn ln(x: f64) -> f64 {
    const SQRT_HALF: u64 = 0x3fe6_a09e_667f_3bcd;
    const MANTISSA: u64 = (1 << 52) - 1;
    if x > 0.0 {
        // x = 2^n m with m in sqrt(1/2)..sqrt(2), and ln m = 2 artanh((m - 1)/(m + 1)).
        let bits = x.to_bits().wrapping_sub(SQRT_HALF);
        let n = (bits.cast_signed() >> 52) as f64;
        let m = f64::from_bits((bits & MANTISSA) + SQRT_HALF);
        let z = (m - 1.0) / (m + 1.0);
        let series = (0..9).rev().fold(0.0, |sum, k| sum * z * z + 1.0 / f64::from(2 * k + 1));
        n * std::f64::consts::LN_2 + 2.0 * z * series
    } else {
        f64::NAN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JSD: Divergence = Divergence::Jsd { beta: 0.5 };
    const KINDS: [Divergence; 6] = [
        JSD,
        Divergence::Adaptive { near: 0.1, far: 0.6 },
        Divergence::Jsd { beta: 0.1 },
        Divergence::KlForward,
        Divergence::KlReverse,
        Divergence::Cakld { gamma: 0.7 },
    ];

    fn settings(kind: Divergence, temperature: f64, top_k: Option<usize>) -> Settings {
        Settings { kind, temperature, top_k, tail: false }
    }

    fn logits(len: usize, seed: u32, size: f32) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_654_435_761) | 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / 8_388_608.0 - 1.0) * size
        };
        (0..len).map(|_| next()).collect()
    }

    fn log_softmax(logits: &[f32], temperature: f64) -> Vec<f64> {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let x: Vec<f64> = logits.iter().map(|x| (f64::from(*x) - max) / temperature).collect();
        let total = x.iter().map(|x| x.exp()).sum::<f64>().ln();
        x.iter().map(|x| x - total).collect()
    }

    /// `Σ e^weight value`, nothing where the probability is zero.
    fn mean(weights: &[f64], value: impl Fn(usize) -> f64) -> f64 {
        let terms = weights.iter().enumerate().filter(|(_, w)| w.exp() > 0.0);
        terms.map(|(i, w)| w.exp() * value(i)).sum()
    }

    /// Value and gradient of a row, as the composed form in `ops::loss` has them.
    fn reference(settings: &Settings, student: &[f32], teacher: &[f32]) -> (f64, Vec<f64>) {
        let tau = settings.temperature;
        if let Divergence::Adaptive { near, far } = settings.kind {
            let of = |kind| reference(&Settings { kind, ..*settings }, student, teacher);
            let [(kl, to_kl), (jsd, to_jsd)] = [of(Divergence::KlForward), of(JSD)];
            let share = ((jsd / 2f64.ln() - near) / (far - near)).clamp(0.0, 1.0);
            let mix = |kl: f64, jsd: f64| share * kl + 4.0 * (1.0 - share) * jsd;
            let gradient = to_kl.iter().zip(&to_jsd).map(|(a, b)| mix(*a, *b)).collect();
            return (mix(kl, jsd), gradient);
        }
        let (q, p) = (log_softmax(student, tau), log_softmax(teacher, tau));
        let forward = mean(&p, |i| p[i] - q[i]);
        let reverse = mean(&q, |i| q[i] - p[i]);
        let (value, mismatch, factor, beta) = match settings.kind {
            Divergence::KlForward => (forward, 1.0, 0.0, 1.0),
            Divergence::KlReverse => (reverse, 0.0, 1.0, 1.0),
            Divergence::Cakld { gamma } => {
                (gamma * reverse + (1.0 - gamma) * forward, 1.0 - gamma, gamma, 1.0)
            }
            Divergence::Jsd { beta } => (f64::NAN, 0.0, 1.0 - beta, beta),
            Divergence::Adaptive { .. } => unreachable!(),
        };
        let m = |i: usize| {
            let (a, b) = (p[i] + beta.ln(), q[i] + (1.0 - beta).ln());
            a.max(b) + (-(a - b).abs()).exp().ln_1p()
        };
        let to_m = mean(&q, |i| q[i] - m(i));
        let jsd = beta * mean(&p, |i| p[i] - m(i)) + (1.0 - beta) * to_m;
        let each = |i: usize| {
            let pull = if factor == 0.0 { 0.0 } else { factor * (q[i] - m(i) - to_m) };
            (q[i].exp() * (pull + mismatch) - mismatch * p[i].exp()) / tau
        };
        let value = if value.is_nan() { jsd } else { value };
        (value, (0..q.len()).map(each).collect())
    }

    fn check(settings: &Settings, student: &[f32], teacher: &[f32], cut: &[f32], rows: usize) {
        let vocab = student.len() / rows;
        let mut weights: Vec<f32> = (0..rows).map(|row| (row + 1) as f32 / 16.0).collect();
        weights[0] = 0.0;
        let mut gradient = student.to_vec();
        let value = divergence_with_gradient(settings, &mut gradient, teacher, &weights);
        assert_eq!(value.to_bits(), divergence(settings, student, teacher, &weights).to_bits());
        let mut exact = 0.0;
        let parts = student.chunks(vocab).zip(cut.chunks(vocab)).zip(gradient.chunks(vocab));
        for (((student, cut), gradient), weight) in parts.zip(&weights) {
            let (of_row, row) = reference(settings, student, cut);
            exact += if *weight == 0.0 { 0.0 } else { of_row * f64::from(*weight) };
            for (found, exact) in gradient.iter().zip(&row) {
                let exact = if *weight == 0.0 { 0.0 } else { exact * f64::from(*weight) };
                let error = (f64::from(*found) - exact).abs();
                let bound = 4e-7 * f64::from(*weight) * of_row.max(1.0);
                assert!(error <= bound, "{:?} {vocab}: {found} {exact}", settings.kind);
            }
        }
        let error = (value - exact).abs();
        assert!(error <= 5e-7 * exact.max(1.0), "{:?} {vocab}: {value} {exact}", settings.kind);
    }

    #[test]
    fn divergences_agree_with_f64() {
        for vocab in [1, 2, 7, 16, 17, 33, 1000, 2048] {
            for (size, temperature) in [(4.0, 1.0), (12.0, 2.0), (200.0, 1.0), (200.0, 2.0)] {
                let student = logits(5 * vocab, 1, size);
                let near = student.iter().zip(logits(5 * vocab, 2, 0.5)).map(|(a, b)| a + b);
                for teacher in [logits(5 * vocab, 3, size), near.collect()] {
                    for kind in KINDS {
                        let settings = settings(kind, temperature, None);
                        check(&settings, &student, &teacher, &teacher, 5);
                    }
                }
            }
        }
    }

    #[test]
    fn top_k_is_the_same_as_infinite_logits() {
        for (vocab, k) in [(1, 1), (7, 3), (33, 32), (300, 40), (2048, 5), (2048, 1500)] {
            let student = logits(4 * vocab, 4, 6.0);
            // Steps of 1/8, so that some tie.
            let teacher: Vec<f32> =
                logits(4 * vocab, 5, 6.0).iter().map(|x| (x * 8.0).round() / 8.0).collect();
            let mut cut = teacher.clone();
            for row in cut.chunks_mut(vocab) {
                let mut sorted = row.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                row.iter_mut().filter(|x| **x < sorted[k - 1]).for_each(|x| *x = f32::NEG_INFINITY);
            }
            for kind in &KINDS[..3] {
                check(&settings(*kind, 1.0, Some(k)), &student, &teacher, &cut, 4);
                check(&settings(*kind, 2.0, None), &student, &cut, &cut, 4);
            }
        }
    }

    /// With the tail every divergence is finite, and where nothing is left out it is the whole one.
    #[test]
    fn a_tail_is_one_more_event() {
        let (vocab, rows) = (37, 5);
        let student = logits(vocab * rows, 3, 4.0);
        let teacher = logits(vocab * rows, 8, 4.0);
        let weights = vec![0.2; rows];
        for kind in KINDS {
            let run = |top_k, student: &[f32]| {
                let settings = Settings { kind, temperature: 1.5, top_k, tail: true };
                let mut gradient = student.to_vec();
                let value = divergence_with_gradient(&settings, &mut gradient, &teacher, &weights);
                (value, gradient)
            };
            let (whole, gradient) = run(None, &student);
            let (all, same) = run(Some(vocab), &student);
            assert!((whole - all).abs() < 1e-12 && gradient == same, "{kind:?}");
            let (coarse, gradient) = run(Some(5), &student);
            // Events put together are no easier to tell apart.
            if !matches!(kind, Divergence::Adaptive { .. }) {
                assert!(coarse > 0.0 && coarse <= whole + 1e-9, "{kind:?}: {coarse} of {whole}");
            }
            // Each row's gradient sums to zero, and is that of the value.
            for row in gradient.chunks(vocab) {
                assert!(row.iter().sum::<f32>().abs() < 1e-6, "{kind:?}");
            }
            if matches!(kind, Divergence::Adaptive { .. }) {
                continue; // its share is held fixed in the gradient
            }
            for at in [0, 11, 40, 100, 184] {
                let moved = |by: f32| {
                    let mut student = student.clone();
                    student[at] += by;
                    run(Some(5), &student).0
                };
                let slope = (moved(2e-2) - moved(-2e-2)) / 4e-2;
                assert!((slope - f64::from(gradient[at])).abs() < 2e-4, "{kind:?} {at}: {slope}");
            }
        }
    }

    #[test]
    fn worked_example() {
        let (p, q) = ([0.0, 0.0], [9.0f32.ln(), 0.0]);
        let expected = [0.101_749, 0.043_074, 0.510_826, 0.368_064, 0.410_893];
        let known = KINDS.into_iter().filter(|kind| !matches!(kind, Divergence::Adaptive { .. }));
        for (kind, expected) in known.zip(expected) {
            let value = divergence(&settings(kind, 1.0, None), &q, &p, &[1.0]);
            assert!((value - expected).abs() < 1e-6, "{kind:?}: {value}");
        }
        let mut gradient = q;
        divergence_with_gradient(&settings(JSD, 1.0, None), &mut gradient, &p, &[1.0]);
        assert!((gradient[0] - 0.060_747).abs() < 1e-6 && (gradient[1] + 0.060_747).abs() < 1e-6);
        let found = compare(&[q, q].concat(), &[p, q].concat(), &[1.0, 2.0]);
        for (found, expected) in found.into_iter().zip([expected[0], expected[2], expected[3], 3.0])
        {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
        assert!((confidence(&q, &[2.0]) - 1.8).abs() < 1e-6);
    }

    #[test]
    fn likelihoods_agree_with_f64() {
        for (vocab, size) in [(1, 1.0), (2, 200.0), (17, 5.0), (2048, 20.0), (3000, 200.0)] {
            let x = logits(3 * vocab, 6, size);
            let last = i32::try_from(vocab).unwrap() - 1;
            let targets = [0, last, last / 2];
            let weights = [0.25, 0.0, 0.5];
            let mut gradient = x.clone();
            let mut value = cross_entropy_with_gradient(&mut gradient, &targets, &weights);
            let nll = negative_log_likelihood(&x, &targets);
            for (row, x) in x.chunks(vocab).enumerate() {
                let q = log_softmax(x, 1.0);
                let (at, weight) = (targets[row] as usize, f64::from(weights[row]));
                assert!((f64::from(nll[row]) + q[at]).abs() <= 3e-7 * (-q[at]).max(1.0));
                value += weight * q[at];
                for i in 0..vocab {
                    let exact = weight * (q[i].exp() - f64::from(u8::from(i == at)));
                    assert!((f64::from(gradient[row * vocab + i]) - exact).abs() <= 3e-7 * weight);
                }
            }
            assert!(value.abs() <= 3e-7 * f64::from(size), "{vocab}: {value}");
        }
        assert!(negative_log_likelihood(&[1.0, 2.0], &[-1])[0].is_nan());
    }

    #[test]
    fn same_bits_at_every_level_and_with_any_number_of_threads() {
        let (x, y) = (logits(40 * 3333, 7, 9.0), logits(40 * 3333, 8, 9.0));
        for (kind, top_k) in KINDS.into_iter().map(|kind| (kind, None)).chain([(JSD, Some(50))]) {
            let settings = settings(kind, 2.0, top_k);
            let row = |level: Level| {
                let (mut scratch, mut out) = (Scratch::default(), x[..3333].to_vec());
                let y = &y[..3333];
                let value = at!(level, with_gradient(&settings, &mut scratch, &mut out, y, 0.1));
                let all = at!(level, compare_row(&mut scratch, &x[..3333], y));
                (
                    value.to_bits(),
                    all.map(f64::to_bits),
                    out.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
                )
            };
            for level in Level::available() {
                assert_eq!(row(level), row(Level::Portable), "{level:?}");
            }
            let threads = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let mut out = x.clone();
                let value =
                    pool.install(|| divergence_with_gradient(&settings, &mut out, &y, &[0.3; 40]));
                (value.to_bits(), out.iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            assert_eq!(threads(1), threads(2));
        }
    }

    #[test]
    fn nan_is_not_silent() {
        let good = logits(40, 9, 3.0);
        for (at, bad) in [(3, f32::NAN), (38, -f32::NAN), (0, f32::INFINITY)] {
            let mut x = good.clone();
            x[at] = bad;
            for kind in KINDS {
                for top_k in [None, Some(5)] {
                    let settings = settings(kind, 1.0, top_k);
                    assert!(divergence(&settings, &x, &good, &[1.0]).is_nan());
                    assert!(divergence(&settings, &good, &x, &[1.0]).is_nan());
                    assert_eq!(divergence(&settings, &x, &x, &[0.0]).to_bits(), 0);
                }
            }
            assert!(compare(&x, &good, &[1.0])[..3].iter().all(|x| x.is_nan()));
            assert!(confidence(&x, &[1.0]).is_nan());
            assert!(negative_log_likelihood(&x, &[1])[0].is_nan());
            assert!(cross_entropy_with_gradient(&mut x, &[1], &[1.0]).is_nan());
        }
        assert_eq!(divergence(&settings(JSD, 1.0, None), &[], &[], &[]).to_bits(), 0);
    }
}
