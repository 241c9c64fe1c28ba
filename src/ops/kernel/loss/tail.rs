//! Divergences over a few events and what is left, in f64.

use super::Settings;
use super::softmax::{BLOCK, Scratch, Softmax, Total, ln};
use crate::ops::loss::{Divergence, LEAST_TAIL, NEAR_WEIGHT, far_share};

/// The divergence of a row over the teacher's `k` largest logits and one event for all others. With
/// `KEEP`, the teacher's exponentials become its gradient to the tempered logits.
pub(super) fn with_tail<const KEEP: bool>(
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
    let kept: Vec<usize> = (0..teacher.len()).filter(|i| teacher[*i] >= least).collect();
    let mut events: Vec<[f64; 2]> = Vec::with_capacity(kept.len() + 1);
    for i in &kept {
        let event =
            [log(&scratch.student.total, student[*i]), log(&scratch.teacher.total, teacher[*i])];
        events.push(event);
    }
    scratch.finish(inverse as f32);
    // A sum of its own: one less the kept ones would lose the digits of a small one.
    let rest = [&scratch.student, &scratch.teacher].map(|of| mass_below(of, teacher, least));
    events.push(rest.map(|p| p.max(LEAST_TAIL).ln()));
    let (value, pulls) = over_events(settings.kind, &events);
    if KEEP {
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

/// The probability of all tokens whose logit of the teacher is below `least`, of a finished softmax.
fn mass_below(softmax: &Softmax, teacher: &[f32], least: f32) -> f64 {
    let blocks = softmax.exponentials.chunks(BLOCK).zip(teacher.chunks(BLOCK));
    let of = |((exponentials, teacher), factor): ((&[f32], &[f32]), &f32)| {
        let left = exponentials.iter().zip(teacher).filter(|(_, logit)| **logit < least);
        f64::from(*factor) * left.map(|(e, _)| f64::from(*e)).sum::<f64>()
    };
    blocks.zip(&softmax.total.factors).map(of).sum()
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

/// The `k`-th largest logit; negative infinity if that is all of them.
pub(super) fn kth_largest(logits: &[f32], k: usize) -> f32 {
    if k == 0 || k >= logits.len() {
        return f32::NEG_INFINITY;
    }
    *logits.to_vec().select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}
