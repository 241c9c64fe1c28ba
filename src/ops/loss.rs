//! Training losses over logits, in log space, with closed-form gradients.
//!
//! Value and gradient are computed on plain tensors and joined to the tape by [`with_gradient`]:
//! nothing of size `[tokens, vocab]` stays on the tape but the gradient itself. (With m = βp +
//! (1-β)q the terms that flow through `ln m` cancel, because both distributions sum to one;
//! methods-core 6.3.)

use burn::tensor::{Int, Tensor, activation};

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
}

/// Joins a value and a gradient that were computed off the tape to the tracked tensor they belong
/// to: the result has that value, and its gradient with respect to `x` is `gradient`.
pub fn with_gradient<const D: usize>(
    x: Tensor<D>,
    value: Tensor<1>,
    gradient: Tensor<D>,
) -> Tensor<1> {
    let linear = (x * gradient).sum();
    // linear - linear is exactly zero, so the value keeps every bit.
    linear.clone() - linear.detach() + value
}

/// Log-probabilities over the last dimension at a temperature, `[tokens, vocab]`.
pub fn log_softmax(logits: Tensor<2>, temperature: f64) -> Tensor<2> {
    let logits =
        if temperature.to_bits() == 1.0f64.to_bits() { logits } else { logits / temperature };
    activation::log_softmax(logits, 1)
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
    let log_q = log_softmax(student, temperature);
    let log_p = log_softmax(teacher, temperature);
    let q = log_q.clone().exp();
    let (per_token, gradient) = match kind {
        Divergence::KlForward => {
            let p = log_p.clone().exp();
            let kl = (p.clone() * (log_p - log_q)).sum_dim(1);
            (kl, q - p)
        }
        Divergence::KlReverse => {
            let ratio = log_q - log_p;
            let kl = (q.clone() * ratio.clone()).sum_dim(1);
            (kl.clone(), q * (ratio - kl))
        }
        Divergence::Jsd { beta } => {
            let p = log_p.clone().exp();
            let log_m = log_add_exp(log_p.clone() + beta.ln(), log_q.clone() + (1.0 - beta).ln());
            let ratio = log_q - log_m.clone();
            let kl_q = (q.clone() * ratio.clone()).sum_dim(1);
            let kl_p = (p * (log_p - log_m)).sum_dim(1);
            let jsd = kl_p * beta + kl_q.clone() * (1.0 - beta);
            (jsd, q * (ratio - kl_q) * (1.0 - beta))
        }
    };
    LossValue {
        value: (per_token * weights.clone()).sum(),
        gradient: gradient * (weights / temperature),
    }
}

/// Masked mean of the next-token cross-entropy, and its gradient to the logits.
///
/// # Shapes
/// - logits: `[tokens, vocab]`, f32, not tracked
/// - targets: `[tokens, 1]`
/// - weights: `[tokens, 1]`, the mask divided by the number of unmasked tokens
pub fn cross_entropy(logits: Tensor<2>, targets: Tensor<2, Int>, weights: Tensor<2>) -> LossValue {
    let log_q = log_softmax(logits, 1.0);
    let nll = log_q.clone().gather(1, targets.clone()).neg();
    // q - onehot, without a one-hot tensor: take the weight off at the target alone.
    let gradient = (log_q.exp() * weights.clone()).scatter(
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

/// `ln(e^a + e^b)` without overflow.
fn log_add_exp(a: Tensor<2>, b: Tensor<2>) -> Tensor<2> {
    let gap = (a.clone() - b.clone()).abs().neg();
    a.max_pair(b) + gap.exp().log1p()
}
