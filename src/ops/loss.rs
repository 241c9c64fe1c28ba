//! Training losses over logits, in log space, with closed-form gradients.
//!
//! Value and gradient are computed on plain tensors and joined to the tape by [`with_gradient`]:
//! nothing of size `[tokens, vocab]` stays on the tape but the gradient itself. (With m = βp +
//! (1-β)q the terms that flow through `ln m` cancel, because both distributions sum to one.) On
//! this machine's processor a loss reads each row of logits once and writes the gradient over the
//! student's.

#[cfg(feature = "gpu")]
use burn::tensor::DType;
use burn::tensor::{Int, Tensor, TensorData, activation};

use super::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "gpu")]
use super::cube;
use super::numbers::{Numbers, read};
#[cfg(feature = "flex")]
use {
    super::bridge::{Rows, reads},
    super::kernel::loss as kernel,
};

/// A scalar loss and its gradient with respect to the logits.
#[derive(Clone, Debug)]
pub struct LossValue {
    /// Masked mean over tokens, `[1]`.
    pub value: Tensor<1>,
    /// Gradient of that mean, `[tokens, vocab]`.
    pub gradient: Tensor<2>,
}

/// A divergence between teacher `p` and student `q`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divergence {
    /// `KL(p‖q)`: mass-covering.
    KlForward,
    /// `KL(q‖p)`: mode-seeking.
    KlReverse,
    /// Generalized Jensen–Shannon, `β KL(p‖m) + (1-β) KL(q‖m)`, `m = βp + (1-β)q`, β strictly
    /// between 0 and 1.
    Jsd {
        /// Weight of the teacher.
        beta: f64,
    },
    /// `γ KL(q‖p) + (1-γ) KL(p‖q)` (BitDistiller's CAKLD).
    Cakld {
        /// Weight of the reverse, mode-seeking term.
        gamma: f64,
    },
    /// `λ KL(p‖q) + (1-λ) 4 JSD`, both distributions weighted equally in the latter, where λ goes from
    /// 0 to 1 as the token's JSD goes from `near` to `far`, parts of its bound ln 2; λ gets no
    /// gradient. The JSD is flat at its bound, where a student starts that is far from its teacher;
    /// close to it four times the JSD is the KL to second order.
    Adaptive {
        /// Below it, the JSD alone.
        near: f64,
        /// Above it, the KL alone.
        far: f64,
    },
}

/// The share of `KL(p‖q)` in [`Divergence::Adaptive`] at a Jensen–Shannon divergence of `jsd` nats.
pub(super) fn far_share(jsd: f64, near: f64, far: f64) -> f64 {
    ((jsd / std::f64::consts::LN_2 - near) / (far - near)).clamp(0.0, 1.0)
}

/// What the JSD weighs in [`Divergence::Adaptive`].
pub(super) const NEAR_WEIGHT: f64 = 4.0;

/// Joins a value and a gradient that were computed off the tape to the tracked tensor they belong
/// to: the result has that value, and its gradient with respect to `x` is `gradient`.
pub fn with_gradient<const D: usize>(
    x: Tensor<D>,
    value: Tensor<1>,
    gradient: Tensor<D>,
) -> Tensor<1> {
    let operation = Known { value: bridge::frozen(value), gradient: bridge::frozen(gradient) };
    tensor(bridge::apply(operation, [x.into_dispatch()]))
}

#[derive(Clone, Debug)]
struct Known {
    value: Plain,
    gradient: Plain,
}

impl Operation<1> for Known {
    type Saved = ();
    const CHEAP: bool = false;

    fn forward(&self, _: [Plain; 1]) -> (Plain, ()) {
        (self.value.clone(), ())
    }

    fn backward(&self, _: [Plain; 1], (): (), upstream: Plain, _: [bool; 1]) -> [Option<Plain>; 1] {
        let upstream = tensor::<1>(upstream);
        if !bridge::at_hand(&upstream) {
            return [Some(self.scaled_there(upstream))];
        }
        // The scalar is read, which costs nothing here, and most often it is 1.
        let upstream = upstream.into_scalar::<f32>();
        #[allow(clippy::float_cmp)] // exactly 1, or multiplied
        let unchanged = upstream == 1.0;
        let gradient = self.gradient.clone();
        [Some(if unchanged { gradient } else { scaled(gradient, upstream) })]
    }
}

impl Known {
    /// The gradient times a number `[1]` that stays on its device.
    fn scaled_there(&self, upstream: Tensor<1>) -> Plain {
        use burn::backend::TensorMetadata as _;
        let gradient = self.gradient.clone();
        match gradient.rank() {
            1 => (tensor::<1>(gradient) * upstream).into_dispatch(),
            2 => (tensor::<2>(gradient) * upstream.reshape([1; 2])).into_dispatch(),
            3 => (tensor::<3>(gradient) * upstream.reshape([1; 3])).into_dispatch(),
            _ => (tensor::<4>(gradient) * upstream.reshape([1; 4])).into_dispatch(),
        }
    }
}

/// A plain tensor of any rank times a number.
fn scaled(x: Plain, factor: f32) -> Plain {
    Tensor::<2>::from_dispatch(x).mul_scalar(factor).into_dispatch()
}

/// Joins a value and a gradient, summed in f64, to the device they came from.
#[cfg(feature = "flex")]
fn loss_value(value: f64, gradient: Rows) -> LossValue {
    let value = tensor(Rows::new(vec![value as f32], [1]).plain());
    LossValue { value, gradient: tensor(gradient.plain()) }
}

/// How logits are compared with a teacher's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Comparison {
    /// What is measured.
    pub divergence: Divergence,
    /// Divides the logits of both.
    pub temperature: f64,
    /// Keep the teacher's so many largest logits of each token (and what ties with the last of
    /// them), and none of its others.
    pub top_k: Option<usize>,
    /// With `top_k`: all other tokens are one more event, of what is left of both distributions.
    /// Without it [`Divergence::KlReverse`] and [`Divergence::Cakld`] would be infinite.
    pub tail: bool,
}

/// Masked mean of a divergence over tokens, and its gradient to the student's logits, which takes
/// their place in memory.
///
/// # Shapes
/// - student, teacher: logits `[tokens, vocab]`, f32, not tracked
/// - weights: `[tokens, 1]`, the mask divided by the number of unmasked tokens
pub fn divergence(
    comparison: &Comparison,
    student: Tensor<2>,
    teacher: Tensor<2>,
    weights: Tensor<2>,
) -> LossValue {
    let Comparison { divergence, temperature, top_k, tail } = *comparison;
    #[cfg(feature = "flex")]
    if reads(&student) {
        let [mut student, teacher, weights] =
            [student, teacher, weights].map(|t| Rows::of(bridge::frozen(t)));
        let settings = kernel::Settings { kind: divergence, temperature, top_k, tail };
        let (logits, teacher) = (student.values_mut(), teacher.values());
        let value = kernel::divergence_with_gradient(&settings, logits, teacher, weights.values());
        return loss_value(value, student);
    }
    let vocab = teacher.dims()[1];
    #[cfg(feature = "gpu")]
    if top_k.is_none_or(|k| k >= vocab) && on_device(&[&student, &teacher, &weights]) {
        return summed(cube::divergence(divergence, temperature, [student, teacher, weights]));
    }
    if let Some(k) = top_k.filter(|k| tail && *k < vocab) {
        return with_tail(divergence, temperature, k, [student, teacher], weights);
    }
    let teacher = match top_k {
        Some(k) if k < vocab => {
            let least = teacher.clone().topk(k, 1).min_dim(1);
            // Far below any logit, but finite: its product with a probability of zero is zero.
            teacher.clone().mask_fill(teacher.lower(least), -1e30)
        }
        _ => teacher,
    };
    let both = Distributions::new(student, teacher, temperature);
    let (per_token, gradient) = both.with_gradient(divergence);
    let value = (per_token * weights.clone()).sum();
    LossValue { value, gradient: gradient * (weights / temperature) }
}

/// As [`divergence`] over the teacher's `k` largest logits and one event for all others.
fn with_tail(
    divergence: Divergence,
    temperature: f64,
    k: usize,
    [student, teacher]: [Tensor<2>; 2],
    weights: Tensor<2>,
) -> LossValue {
    let all = Distributions::new(student, teacher.clone(), temperature);
    let least = teacher.clone().topk(k, 1).min_dim(1);
    let rest = teacher.lower(least);
    // The events: every kept token, and in a last column the rest.
    let events = |p: &Tensor<2>, log_p: &Tensor<2>| {
        let kept = p.clone().mask_fill(rest.clone(), 0.0);
        // Not one less the kept ones, which would lose the digits of a small one.
        let tail = p.clone().mask_fill(rest.clone().bool_not(), 0.0).sum_dim(1);
        let tail = tail.clamp_min(LEAST_TAIL);
        let log =
            Tensor::cat(vec![log_p.clone().mask_fill(rest.clone(), -1e30), tail.clone().log()], 1);
        (Tensor::cat(vec![kept, tail], 1), log)
    };
    let (q, log_q) = events(&all.q, &all.log_q);
    let (p, log_p) = events(&all.p, &all.log_p);
    let vocab = all.q.dims()[1];
    let tail_of_q = q.clone().narrow(1, vocab, 1);
    let (per_token, gradient) = Distributions { q, log_q, p, log_p }.with_gradient(divergence);
    // What pulls at the tail pulls at each of its tokens by its share.
    let pull = gradient.clone().narrow(1, vocab, 1) / tail_of_q;
    let kept = gradient.narrow(1, 0, vocab).mask_fill(rest.clone(), 0.0);
    let shared = (all.q * pull).mask_fill(rest.bool_not(), 0.0);
    let value = (per_token * weights.clone()).sum();
    LossValue { value, gradient: (kept + shared) * (weights / temperature) }
}

/// The least probability of all tokens but the kept ones: no logarithm of zero.
pub(super) const LEAST_TAIL: f64 = 1e-12;

/// The value of [`divergence`] without its gradient: nothing of the logits' size is allocated where
/// there are kernels.
pub fn divergence_value(
    comparison: &Comparison,
    student: Tensor<2>,
    teacher: Tensor<2>,
    weights: Tensor<2>,
) -> f64 {
    #[cfg(feature = "flex")]
    if reads(&student) {
        let Comparison { divergence, temperature, top_k, tail } = *comparison;
        let [student, teacher, weights] =
            [student, teacher, weights].map(|t| Rows::of(bridge::frozen(t)));
        let settings = kernel::Settings { kind: divergence, temperature, top_k, tail };
        let (student, teacher) = (student.values(), teacher.values());
        return kernel::divergence(&settings, student, teacher, weights.values());
    }
    sum(divergence(comparison, student, teacher, weights).value)
}

/// Whether a kernel on a device can read them all.
#[cfg(feature = "gpu")]
fn on_device(tensors: &[&Tensor<2>]) -> bool {
    tensors.iter().all(|&tensor| {
        assert!(!tensor.is_tracked(), "a tracked tensor where an operation gives no gradient");
        cube::reads_rows(&tensor.clone().into_dispatch())
    })
}

/// The loss of which a kernel gave each token's value and the gradient.
#[cfg(feature = "gpu")]
fn summed(found: [Plain; 2]) -> LossValue {
    let [values, gradient] = found.map(tensor::<2>);
    LossValue { value: values.sum(), gradient }
}

/// One number, waited for.
fn sum(value: Tensor<1>) -> f64 {
    Numbers::of(value).values().into_iter().sum()
}

/// How close a student is to its teacher, masked means over tokens, at temperature 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Closeness {
    /// Jensen–Shannon divergence with both weighted equally.
    pub jsd: f64,
    /// `KL(teacher‖student)`.
    pub kl_forward: f64,
    /// `KL(student‖teacher)`.
    pub kl_reverse: f64,
    /// Share of tokens on which both have the same most likely token.
    pub top1: f64,
}

impl Closeness {
    /// From what [`compare_later`] gave; 0 for what is missing.
    pub fn of(numbers: &[f64]) -> Self {
        let at = |index| numbers.get(index).copied().unwrap_or_default();
        Self { jsd: at(0), kl_forward: at(1), kl_reverse: at(2), top1: at(3) }
    }
}

/// Compares student and teacher; shapes and weights as in [`divergence`]. Nothing is kept.
pub fn compare(student: Tensor<2>, teacher: Tensor<2>, weights: Tensor<2>) -> Closeness {
    Closeness::of(&compare_later(student, teacher, weights).values())
}

/// As [`compare`], without waiting for the device: the four numbers of [`Closeness`] in their order.
pub fn compare_later(student: Tensor<2>, teacher: Tensor<2>, weights: Tensor<2>) -> Numbers {
    #[cfg(feature = "flex")]
    if reads(&student) {
        let [student, teacher, weights] =
            [student, teacher, weights].map(|t| Rows::of(bridge::frozen(t)));
        let found = kernel::compare(student.values(), teacher.values(), weights.values());
        return Numbers::Known(found.into());
    }
    let both = Distributions::new(student, teacher, 1.0);
    let mean = |kind| (both.evaluate(kind).0 * weights.clone()).sum();
    let same = both.log_q.clone().argmax(1).equal(both.log_p.clone().argmax(1));
    let all = vec![
        mean(Divergence::Jsd { beta: 0.5 }),
        mean(Divergence::KlForward),
        mean(Divergence::KlReverse),
        (same.float() * weights).sum(),
    ];
    Numbers::of(Tensor::cat(all, 0))
}

/// Probabilities and log-probabilities of student `q` and teacher `p`, each `[tokens, vocab]`.
struct Distributions {
    q: Tensor<2>,
    log_q: Tensor<2>,
    p: Tensor<2>,
    log_p: Tensor<2>,
}

impl Distributions {
    fn new(student: Tensor<2>, teacher: Tensor<2>, temperature: f64) -> Self {
        let (q, log_q) = softmax_and_log(student, temperature);
        let (p, log_p) = softmax_and_log(teacher, temperature);
        Self { q, log_q, p, log_p }
    }

    /// The divergence per token, `[tokens, 1]`, and its gradient to the tempered student logits.
    fn with_gradient(&self, kind: Divergence) -> (Tensor<2>, Tensor<2>) {
        if let Divergence::Adaptive { near, far } = kind {
            let (kl, of_kl) = self.with_gradient(Divergence::KlForward);
            let (jsd, of_jsd) = self.with_gradient(Divergence::Jsd { beta: 0.5 });
            let share = (jsd.clone() / std::f64::consts::LN_2 - near) / (far - near);
            let share = share.clamp(0.0, 1.0);
            let close = (share.clone().neg() + 1.0) * NEAR_WEIGHT;
            return (kl * share.clone() + jsd * close.clone(), of_kl * share + of_jsd * close);
        }
        let (per_token, Gradient { mismatch, ratio }) = self.evaluate(kind);
        let difference = || self.q.clone() - self.p.clone();
        let gradient = match ratio {
            None => difference() * mismatch,
            Some((ratio, mean, factor)) if mismatch == 0.0 => {
                self.q.clone() * (ratio - mean) * factor
            }
            Some((ratio, mean, factor)) => {
                self.q.clone() * (ratio - mean) * factor + difference() * mismatch
            }
        };
        (per_token, gradient)
    }

    /// The divergence per token, `[tokens, 1]`, and what its gradient is made of; not of
    /// [`Divergence::Adaptive`], which is made of two others.
    fn evaluate(&self, kind: Divergence) -> (Tensor<2>, Gradient) {
        let Self { q, log_q, p, log_p } = self;
        let log_ratio = || log_q.clone() - log_p.clone();
        let forward = |ratio: &Tensor<2>| (p.clone() * ratio.clone()).sum_dim(1).neg();
        match kind {
            Divergence::KlForward | Divergence::Adaptive { .. } => {
                (forward(&log_ratio()), Gradient { mismatch: 1.0, ratio: None })
            }
            Divergence::KlReverse => {
                let ratio = log_ratio();
                let kl = (q.clone() * ratio.clone()).sum_dim(1);
                (kl.clone(), Gradient { mismatch: 0.0, ratio: Some((ratio, kl, 1.0)) })
            }
            Divergence::Jsd { beta } => {
                let teacher_part = log_p.clone() + beta.ln();
                let log_m = log_add_exp(teacher_part, log_q.clone() + (1.0 - beta).ln());
                let ratio = log_q.clone() - log_m.clone();
                let kl_q = (q.clone() * ratio.clone()).sum_dim(1);
                let kl_p = (p.clone() * (log_p.clone() - log_m)).sum_dim(1);
                let jsd = kl_p * beta + kl_q.clone() * (1.0 - beta);
                (jsd, Gradient { mismatch: 0.0, ratio: Some((ratio, kl_q, 1.0 - beta)) })
            }
            Divergence::Cakld { gamma } => {
                let ratio = log_ratio();
                let reverse = (q.clone() * ratio.clone()).sum_dim(1);
                let value = reverse.clone() * gamma + forward(&ratio) * (1.0 - gamma);
                (value, Gradient { mismatch: 1.0 - gamma, ratio: Some((ratio, reverse, gamma)) })
            }
        }
    }
}

/// The gradient of a divergence to the tempered student logits:
/// `mismatch * (q - p) + factor * q * (ratio - mean)`.
struct Gradient {
    mismatch: f64,
    /// Ratio, mean, factor.
    ratio: Option<(Tensor<2>, Tensor<2>, f64)>,
}

/// Masked mean over tokens of the largest probability; weights as in [`divergence`].
pub fn confidence(logits: Tensor<2>, weights: Tensor<2>) -> f64 {
    #[cfg(feature = "flex")]
    if reads(&logits) {
        let [logits, weights] = [logits, weights].map(|t| Rows::of(bridge::frozen(t)));
        return kernel::confidence(logits.values(), weights.values());
    }
    let (p, _) = softmax_and_log(logits, 1.0);
    sum((p.max_dim(1) * weights).sum())
}

/// Masked mean of the next-token cross-entropy, and its gradient to the logits, which takes their
/// place in memory.
///
/// # Shapes
/// - logits: `[tokens, vocab]`, f32, not tracked
/// - targets: `[tokens, 1]`
/// - weights: `[tokens, 1]`, the mask divided by the number of unmasked tokens
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<2, Int>, weights: Tensor<2>) -> LossValue {
    #[cfg(feature = "flex")]
    if reads(&logits) {
        let [mut logits, weights] = [logits, weights].map(|t| Rows::of(bridge::frozen(t)));
        let targets = host(targets);
        let value =
            kernel::cross_entropy_with_gradient(logits.values_mut(), &targets, weights.values());
        return loss_value(value, logits);
    }
    #[cfg(feature = "gpu")]
    if targets.dtype() == DType::I32 && on_device(&[&logits, &weights]) {
        return summed(cube::cross_entropy(logits, targets, weights));
    }
    let (q, log_q) = softmax_and_log(logits, 1.0);
    // Summed before the gradient is begun: fused with an operation of more elements, burn's gather of one of each row
    // gives wrong numbers on a device (burn-cubecl-fusion 0.22.1).
    let value = (log_q.gather(1, targets.clone()).neg() * weights.clone()).sum();
    // q - onehot, without a one-hot tensor: take the weight off at the target alone.
    let gradient = (q * weights.clone()).scatter(
        1,
        targets,
        weights.neg(),
        burn::tensor::IndexingUpdateOp::Add,
    );
    LossValue { value, gradient }
}

/// `-ln q` of each token's target, on the host.
///
/// # Shapes
/// - logits: `[tokens, vocab]`, f32, not tracked
/// - targets: `[tokens, 1]`
/// - result: `[tokens]`
pub fn negative_log_likelihood(logits: Tensor<2>, targets: Tensor<2, Int>) -> Vec<f32> {
    #[cfg(feature = "flex")]
    if reads(&logits) {
        let logits = Rows::of(bridge::frozen(logits));
        return kernel::negative_log_likelihood(logits.values(), &host(targets));
    }
    let nll = activation::log_softmax(logits, 1).gather(1, targets).neg();
    read(nll)
}

/// As [`negative_log_likelihood`], of several targets of each token.
///
/// # Shapes
/// - logits: `[tokens, vocab]`, f32, not tracked
/// - targets, result: `[tokens]`, each as many as there are
pub fn negative_log_likelihoods(logits: Tensor<2>, targets: &[Vec<u32>]) -> Vec<Vec<f32>> {
    #[cfg(feature = "flex")]
    if reads(&logits) {
        let logits = Rows::of(bridge::frozen(logits));
        return kernel::negative_log_likelihoods(logits.values(), targets);
    }
    let most = targets.iter().map(Vec::len).max().unwrap_or(0);
    let filled = targets.iter().flat_map(|row| {
        row.iter().map(|id| id.cast_signed()).chain(std::iter::repeat(0)).take(most)
    });
    let ids = TensorData::new(filled.collect::<Vec<i32>>(), [targets.len(), most]);
    let ids = Tensor::<2, Int>::from_data(ids, &logits.device());
    let nll = activation::log_softmax(logits, 1).gather(1, ids).neg();
    let nll = read(nll);
    let rows = nll.chunks(most.max(1)).zip(targets);
    rows.map(|(losses, row)| losses[..row.len()].to_vec()).collect()
}

#[cfg(feature = "flex")]
fn host(targets: Tensor<2, Int>) -> Vec<i32> {
    targets.into_data().iter::<i32>().collect()
}

/// Softmax and its logarithm over the last dimension at a temperature, with one exponential.
fn softmax_and_log(logits: Tensor<2>, temperature: f64) -> (Tensor<2>, Tensor<2>) {
    let logits = tempered(logits, temperature);
    let shifted = logits.clone() - logits.max_dim(1);
    let e = shifted.clone().exp();
    let sum = e.clone().sum_dim(1);
    (e / sum.clone(), shifted - sum.log())
}

fn tempered(logits: Tensor<2>, temperature: f64) -> Tensor<2> {
    if temperature.to_bits() == 1.0f64.to_bits() { logits } else { logits / temperature }
}

/// `ln(e^a + e^b)` without overflow.
fn log_add_exp(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let gap = (a.clone() - b.clone()).abs().neg();
    a.max_pair(b) + gap.exp().log1p()
}
