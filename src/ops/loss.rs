//! Training losses over logits, in log space, with closed-form gradients.
//!
//! Value and gradient are computed on plain tensors and joined to the tape by [`with_gradient`]:
//! nothing of size `[tokens, vocab]` stays on the tape but the gradient itself. (With m = βp +
//! (1-β)q the terms that flow through `ln m` cancel, because both distributions sum to one;
//! methods-core 6.3.)

use burn::tensor::{DType, Int, Tensor, activation};

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
}

/// Joins a value and a gradient that were computed off the tape to the tracked tensor they belong
/// to: the result has that value, and its gradient with respect to `x` is `gradient`.
pub fn with_gradient<const D: usize>(
    x: Tensor<D>,
    value: Tensor<1>,
    gradient: Tensor<D>,
) -> Tensor<1> {
    let linear = (x * gradient).sum().cast(DType::F32);
    // linear - linear is exactly zero, so the value keeps every bit.
    linear.clone() - linear.detach() + value
}

/// Log-probabilities over the last dimension, `[tokens, vocab]`.
pub fn log_softmax(logits: Tensor<2>) -> Tensor<2> {
    activation::log_softmax(logits, 1)
}

/// Probabilities and log-probabilities of student `q` and teacher `p`, each `[tokens, vocab]`.
#[derive(Clone, Debug)]
pub struct Distributions {
    q: Tensor<2>,
    log_q: Tensor<2>,
    p: Tensor<2>,
    log_p: Tensor<2>,
}

impl Distributions {
    /// From logits, f32, not tracked, at a temperature.
    ///
    /// # Shapes
    /// - student, teacher: `[tokens, vocab]`
    pub fn new(student: Tensor<2>, teacher: Tensor<2>, temperature: f64) -> Self {
        let (q, log_q) = softmax_and_log(student, temperature);
        let (p, log_p) = softmax_and_log(teacher, temperature);
        Self { q, log_q, p, log_p }
    }

    /// A divergence of each token, `[tokens, 1]`.
    pub fn per_token(&self, kind: Divergence) -> Tensor<2> {
        self.evaluate(kind).0
    }

    /// Share of tokens on which both have the same most likely token; `weights` as in
    /// [`divergence`].
    pub fn top1_agreement(&self, weights: Tensor<2>) -> Tensor<1> {
        let same = self.log_q.clone().argmax(1).equal(self.log_p.clone().argmax(1));
        (same.float() * weights).sum()
    }

    /// The divergence per token, `[tokens, 1]`, and what its gradient is made of.
    fn evaluate(&self, kind: Divergence) -> (Tensor<2>, Gradient) {
        let Self { q, log_q, p, log_p } = self;
        let log_ratio = || log_q.clone() - log_p.clone();
        let forward = |ratio: &Tensor<2>| (p.clone() * ratio.clone()).sum_dim(1).neg();
        match kind {
            Divergence::KlForward => {
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

/// Masked mean of a divergence over tokens, and its gradient to the student's logits.
///
/// # Shapes
/// - student, teacher: logits `[tokens, vocab]`, f32, not tracked
/// - weights: `[tokens, 1]`, the mask divided by the number of unmasked tokens
pub fn divergence(
    kind: Divergence,
    student: Tensor<2>,
    teacher: Tensor<2>,
    weights: Tensor<2>,
    temperature: f64,
) -> LossValue {
    let both = Distributions::new(student, teacher, temperature);
    let (per_token, Gradient { mismatch, ratio }) = both.evaluate(kind);
    let value = (per_token * weights.clone()).sum();
    let weights = weights / temperature;
    let Distributions { q, p, .. } = both;
    let gradient = match ratio {
        None => (q - p) * (weights * mismatch),
        Some((ratio, mean, factor)) if mismatch == 0.0 => q * (ratio - mean) * (weights * factor),
        Some((ratio, mean, factor)) => {
            (q.clone() * (ratio - mean) * factor + (q - p) * mismatch) * weights
        }
    };
    LossValue { value, gradient }
}

/// Masked mean over tokens of the largest probability, `[1]`; weights as in [`divergence`].
pub fn confidence(logits: Tensor<2>, weights: Tensor<2>) -> Tensor<1> {
    let (p, _) = softmax_and_log(logits, 1.0);
    (p.max_dim(1) * weights).sum()
}

/// Masked mean of the next-token cross-entropy, and its gradient to the logits.
///
/// # Shapes
/// - logits: `[tokens, vocab]`, f32, not tracked
/// - targets: `[tokens, 1]`
/// - weights: `[tokens, 1]`, the mask divided by the number of unmasked tokens
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<2, Int>, weights: Tensor<2>) -> LossValue {
    let (q, log_q) = softmax_and_log(logits, 1.0);
    let nll = log_q.gather(1, targets.clone()).neg();
    // q - onehot, without a one-hot tensor: take the weight off at the target alone.
    let gradient = (q * weights.clone()).scatter(
        1,
        targets,
        weights.clone().neg(),
        burn::tensor::IndexingUpdateOp::Add,
    );
    LossValue { value: (nll * weights).sum(), gradient }
}

/// Mean over all entries of the squared difference, `[1]`; with `sum_sequence` it is summed over
/// the sequence instead (the FlexRound code's form, `T` times as large).
///
/// # Shapes
/// - output, target: `[batch, seq, d_model]`
pub fn block_mse(output: Tensor<3>, target: Tensor<3>, sum_sequence: bool) -> Tensor<1> {
    let [_, seq, _] = output.dims();
    let mse = (output - target).square().mean();
    if sum_sequence { mse * seq as f64 } else { mse }
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
