//! Training losses over rows of logits: value and gradient without a tensor between them.
//!
//! A row is read from memory once: block by block its logits become exponentials in a buffer of
//! the thread, relative to the largest logit so far. All the rest happens in the cache.

mod row;
mod softmax;
mod tail;

use rayon::prelude::*;

use self::row::{compare_row, evaluate, with_gradient};
use self::softmax::Scratch;
use crate::ops::loss::Divergence;
use crate::ops::vector::{Level, at};

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

/// As [`negative_log_likelihood`], of several targets of each row.
pub(crate) fn negative_log_likelihoods(logits: &[f32], targets: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let vocab = vocab(logits, targets);
    each_row(vocab, logits.chunks(vocab).zip(targets).collect(), |scratch, (logits, targets)| {
        let total = &mut scratch.student.total;
        at!(Level::best(), total.measure(logits));
        let of = |target: &u32| total.surprise(logit_of(target.cast_signed(), logits)) as f32;
        targets.iter().map(of).collect()
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
