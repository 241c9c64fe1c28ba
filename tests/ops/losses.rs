//! Losses over logits: values, gradients, and what is measured without one.

use burn::tensor::{Int, Tensor, TensorData};
use fewbit::ops::{self, Closeness, Comparison, Divergence, LossValue};
use proptest::prelude::*;

use crate::{Dice, Matrix, Sum, bits, both, cases, close, host, same};

/// Differences of logits up to 60 are rounded before their exponential.
const TOLERANCE: f64 = 2e-5;

#[derive(Debug)]
pub(crate) struct Case {
    pub(crate) student: Matrix,
    pub(crate) teacher: Matrix,
    /// Of the tokens; some are zero.
    pub(crate) weights: Matrix,
    pub(crate) targets: Vec<i32>,
}

/// Rows of a few logits up to some more than a kernel takes at a time, and enough for two threads.
fn shape() -> impl Strategy<Value = [usize; 2]> {
    let vocab = vec![1, 2, 7, 15, 16, 17, 33, 100, 1023, 1025, 2100];
    let large = Just([20, 2100]);
    let any = (1usize..6, prop::sample::select(vocab)).prop_map(|(tokens, vocab)| [tokens, vocab]);
    prop_oneof![1 => large, 20 => any]
}

impl Case {
    fn new(shape: [usize; 2], seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let [tokens, vocab] = shape;
        let size = dice.one_of(&[0.1, 2.0, 8.0]);
        let teacher = dice.matrix(shape, size);
        let student = match dice.below(4) {
            // Near the teacher, where differences are small.
            0 => Matrix::new(
                shape,
                teacher.values.iter().map(|x| x + 0.01 * dice.normal()).collect(),
            ),
            _ => dice.matrix(shape, size),
        };
        let even = 1.0 / tokens as f32;
        let mut weights: Vec<f32> = (0..tokens).map(|_| dice.one_of(&[even, 0.0])).collect();
        weights[0] = even;
        let targets = (0..tokens).map(|_| i32::try_from(dice.below(vocab)).unwrap()).collect();
        Self { student, teacher, weights: Matrix::column(weights), targets }
    }

    fn targets(&self) -> Tensor<2, Int> {
        let device = self.student.plain().device();
        let data = TensorData::new(self.targets.clone(), [self.targets.len(), 1]);
        Tensor::from_data(data, &device)
    }

    /// Each token's weight, and the logarithms of both distributions, `top_k` of the teacher's.
    fn tokens(&self, temperature: f64, top_k: Option<usize>) -> Vec<(f64, Vec<f64>, Vec<f64>)> {
        let of_row = |row: usize| {
            let wide = |x: &Matrix| x.row(row).iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            let mut teacher = wide(&self.teacher);
            if let Some(k) = top_k.filter(|k| *k < teacher.len()) {
                let mut sorted = teacher.clone();
                sorted.sort_by(|a, b| b.total_cmp(a));
                let least = sorted[k - 1];
                teacher.iter_mut().filter(|x| **x < least).for_each(|x| *x = f64::NEG_INFINITY);
            }
            let student = log_softmax(&wide(&self.student), temperature);
            (self.weights.at(row, 0), student, log_softmax(&teacher, temperature))
        };
        (0..self.weights.shape[0]).map(of_row).collect()
    }

    /// Value and gradient to the student's logits.
    fn divergence(&self, comparison: &Comparison) -> (Sum, Vec<Sum>) {
        let Comparison { divergence, temperature, top_k, .. } = *comparison;
        let (mut value, mut gradient) = (Sum::default(), Vec::new());
        for (weight, log_q, log_p) in self.tokens(temperature, top_k) {
            let (of_token, slopes) = slopes(divergence, &log_q, &log_p);
            value.value += weight * of_token.value;
            value.size += weight * of_token.size;
            gradient.extend(slopes.iter().map(|slope| slope.times(weight / temperature)));
        }
        (value, gradient)
    }

    /// That what was found is [`Case::divergence`].
    pub(crate) fn check(
        &self,
        what: &str,
        comparison: &Comparison,
        [value, gradient]: [&[f32]; 2],
    ) {
        let (sum, slopes) = self.divergence(comparison);
        let slopes: Vec<Sum> = slopes.into_iter().map(|g| at_least(g, 1e-4)).collect();
        close(&format!("value, {what}"), value, &[at_least(sum, 1.0)], TOLERANCE);
        close(&format!("gradient, {what}"), gradient, &slopes, TOLERANCE);
    }
}

fn log_softmax(logits: &[f64], temperature: f64) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = logits.iter().map(|x| ((x - max) / temperature).exp()).sum();
    logits.iter().map(|x| (x - max) / temperature - total.ln()).collect()
}

/// `Σ a (ln a - ln b)`, zero where `a` is.
fn kl(log_a: &[f64], log_b: &[f64]) -> Sum {
    let both = log_a.iter().zip(log_b);
    both.filter(|(a, _)| **a > f64::NEG_INFINITY).map(|(a, b)| a.exp() * (a - b)).collect()
}

/// A divergence of one token and its derivatives to the student's logits: through the derivative
/// `d` to each probability q, `q (d - Σ q d)`.
fn slopes(kind: Divergence, log_q: &[f64], log_p: &[f64]) -> (Sum, Vec<Sum>) {
    let plus = |a: Sum, b: Sum| Sum { value: a.value + b.value, size: a.size + b.size };
    let (forward, reverse) = (|| kl(log_p, log_q), || kl(log_q, log_p));
    let through = |d: &dyn Fn(usize) -> f64| -> Vec<Sum> {
        let mean: Sum = (0..log_q.len()).map(|i| log_q[i].exp() * d(i)).collect();
        let one = |i: usize| {
            let q = log_q[i].exp();
            Sum { value: q * (d(i) - mean.value), size: q * (d(i).abs() + mean.size + 1.0) }
        };
        (0..log_q.len()).map(one).collect()
    };
    let to_forward = || -> Vec<Sum> {
        let both = log_q.iter().zip(log_p);
        both.map(|(q, p)| [q.exp(), -p.exp()].into_iter().collect()).collect()
    };
    match kind {
        Divergence::KlForward => (forward(), to_forward()),
        Divergence::KlReverse => (reverse(), through(&|i| log_q[i] - log_p[i])),
        Divergence::Jsd { beta } => {
            let mixture = |(q, p): (&f64, &f64)| (beta * p.exp() + (1.0 - beta) * q.exp()).ln();
            let log_m: Vec<f64> = log_q.iter().zip(log_p).map(mixture).collect();
            let value = plus(kl(log_p, &log_m).times(beta), kl(log_q, &log_m).times(1.0 - beta));
            (value, through(&|i| (1.0 - beta) * (log_q[i] - log_m[i])))
        }
        Divergence::Adaptive { .. } => unreachable!("made of two others"),
        Divergence::Cakld { gamma } => {
            let value = plus(reverse().times(gamma), forward().times(1.0 - gamma));
            let backward = through(&|i| log_q[i] - log_p[i]);
            let both = backward.into_iter().zip(to_forward());
            (value, both.map(|(b, f)| plus(b.times(gamma), f.times(1.0 - gamma))).collect())
        }
    }
}

/// Sizes of at least a token's probabilities, whose rounding shows where the logarithms cancel.
fn at_least(mut sum: Sum, size: f64) -> Sum {
    sum.size = sum.size.max(size);
    sum
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn divergences(
        shape in shape(),
        kind in prop::sample::select(vec![
            Divergence::KlForward,
            Divergence::KlReverse,
            Divergence::Jsd { beta: 0.5 },
            Divergence::Jsd { beta: 0.1 },
            Divergence::Cakld { gamma: 0.7 },
        ]),
        temperature in prop::sample::select(vec![1.0, 0.5, 4.0]),
        top_k in prop::option::of(1usize..40),
        seed in any::<u64>(),
    ) {
        let infinite = matches!(kind, Divergence::KlReverse | Divergence::Cakld { .. });
        let top_k = top_k.filter(|_| !infinite);
        let comparison = Comparison { divergence: kind, temperature, top_k, tail: false };
        let case = Case::new(shape, seed);
        let [student, teacher] = [case.student.plain(), case.teacher.plain()];
        let weights = || case.weights.plain();
        for (loss, alone) in both(|| {
            let pair = || (student.clone(), teacher.clone());
            let (s, t) = pair();
            let LossValue { value, gradient } = ops::divergence(&comparison, s, t, weights());
            let (s, t) = pair();
            let alone = ops::divergence_value(&comparison, s, t, weights());
            ((host(value), host(gradient)), alone)
        }) {
            case.check("here", &comparison, [&loss.0, &loss.1]);
            same("the value alone", &[alone as f32], &loss.0);
        }
        // The gradient takes the place of the logits, but not of those that another holds.
        prop_assert_eq!(bits(&host(student)), bits(&case.student.values));
    }

    #[test]
    fn closeness(shape in shape(), seed in any::<u64>()) {
        let case = Case::new(shape, seed);
        let of = |divergence| {
            let comparison = Comparison { divergence, temperature: 1.0, top_k: None, tail: false };
            at_least(case.divergence(&comparison).0, 1.0)
        };
        let exact = [Divergence::Jsd { beta: 0.5 }, Divergence::KlForward, Divergence::KlReverse];
        let exact = exact.map(of);
        let first = |x: &[f32]| {
            (0..x.len()).rev().max_by(|a, b| x[*a].total_cmp(&x[*b])).unwrap()
        };
        let agree = |row: &usize| first(case.student.row(*row)) == first(case.teacher.row(*row));
        let agreeing: f64 =
            (0..shape[0]).filter(agree).map(|row| f64::from(case.weights.values[row])).sum();
        for found in both(|| {
            ops::compare(case.student.plain(), case.teacher.plain(), case.weights.plain())
        }) {
            let Closeness { jsd, kl_forward, kl_reverse, top1 } = found;
            let found = [jsd, kl_forward, kl_reverse].map(|x| x as f32);
            close("jsd, kl_forward, kl_reverse", &found, &exact, TOLERANCE);
            prop_assert!((top1 - agreeing).abs() < 1e-6, "{top1} for {agreeing}");
        }
    }

    #[test]
    fn likelihoods(shape in shape(), seed in any::<u64>()) {
        let case = Case::new(shape, seed);
        let (mut value, mut sure) = (Sum::default(), Sum::default());
        let (mut each, mut gradient) = (Vec::new(), Vec::new());
        for ((weight, log_q, _), target) in case.tokens(1.0, None).iter().zip(&case.targets) {
            let target = *target as usize;
            each.push(at_least(Sum::from(-log_q[target]), 1.0));
            value.add(-weight * log_q[target]);
            sure.add(weight * log_q.iter().copied().fold(f64::NEG_INFINITY, f64::max).exp());
            gradient.extend(log_q.iter().enumerate().map(|(i, q)| {
                let hit = if i == target { *weight } else { 0.0 };
                at_least([weight * q.exp(), -hit].into_iter().collect(), 1e-4)
            }));
        }
        let (logits, weights) = (case.student.plain(), || case.weights.plain());
        for (loss, likelihoods, confidence) in both(|| {
            let loss = ops::cross_entropy(logits.clone(), case.targets(), weights());
            (
                (host(loss.value), host(loss.gradient)),
                ops::negative_log_likelihood(logits.clone(), case.targets()),
                ops::confidence(logits.clone(), weights()),
            )
        }) {
            close("cross-entropy", &loss.0, &[at_least(value, 1.0)], TOLERANCE);
            close("gradient", &loss.1, &gradient, TOLERANCE);
            close("likelihoods", &likelihoods, &each, TOLERANCE);
            close("confidence", &[confidence as f32], &[sure], TOLERANCE);
        }
        prop_assert_eq!(bits(&host(logits)), bits(&case.student.values));
    }
}

#[test]
fn the_first_of_equal_logits_is_the_most_likely() {
    let student = Matrix::new([2, 20], vec![0.5; 40]);
    let mut teacher = student.clone();
    teacher.values[0] = 0.6; // of the first token
    teacher.values[21] = 0.6; // of the second, beside its first
    let weights = Matrix::column(vec![0.75, 0.25]);
    let [fused, composed] =
        both(|| ops::compare(student.plain(), teacher.plain(), weights.plain()).top1);
    assert!((fused - 0.75).abs() < 1e-6 && (composed - 0.75).abs() < 1e-6, "{fused}, {composed}");
}

#[test]
fn logits_that_tie_with_the_last_kept_one_are_kept() {
    let teacher = Matrix::new([1, 6], vec![1.0, 3.0, 2.0, 2.0, 2.0, -1.0]);
    let student = Matrix::new([1, 6], vec![0.3, -0.2, 0.8, 0.1, 0.0, 0.5]);
    let weights = Matrix::column(vec![1.0]);
    let of = |top_k| {
        let divergence = Divergence::KlForward;
        let comparison = Comparison { divergence, temperature: 1.0, top_k, tail: false };
        both(|| {
            let loss =
                ops::divergence(&comparison, student.plain(), teacher.plain(), weights.plain());
            bits(&host(loss.gradient))
        })
    };
    // Two, and the two that tie with the second.
    assert_eq!(of(Some(2)), of(Some(4)));
    assert_ne!(of(Some(2)), of(Some(5)));
}

/// The adaptive mixture, and every divergence with a tail, are the same by kernels and composed.
#[test]
fn mixtures_and_tails_agree_with_the_composed_form() {
    let near_and_far = Divergence::Adaptive { near: 0.05, far: 0.5 };
    let kinds = [
        Divergence::KlForward,
        Divergence::KlReverse,
        Divergence::Jsd { beta: 0.3 },
        Divergence::Cakld { gamma: 0.4 },
        near_and_far,
    ];
    for seed in 0..4 {
        let case = Case::new([6, 40], seed);
        for divergence in kinds {
            for (top_k, tail) in [(None, false), (Some(7), true), (Some(40), true)] {
                if top_k.is_none() && divergence != near_and_far {
                    continue; // of the properties above
                }
                let comparison = Comparison { divergence, temperature: 1.3, top_k, tail };
                let [fused, composed] = both(|| {
                    let (s, t) = (case.student.plain(), case.teacher.plain());
                    let loss = ops::divergence(&comparison, s, t, case.weights.plain());
                    [host(loss.value), host(loss.gradient)].concat()
                });
                for (a, b) in fused.iter().zip(&composed) {
                    let size = a.abs().max(b.abs()).max(1e-2);
                    assert!((a - b).abs() < 2e-5 * size.max(1.0), "{comparison:?}: {a} {b}");
                }
            }
        }
    }
}
