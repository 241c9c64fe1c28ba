//! Logits in parts: nothing of size `[tokens, vocab]` is held whole.

use burn::tensor::Tensor;

/// Logits held at once, student's and teacher's each.
const LOGITS_PER_CHUNK: usize = 1 << 23;

/// `[batch, seq, d_model]` as `[tokens, d_model]`.
pub(super) fn flat(hidden: Tensor<3>) -> Tensor<2> {
    let [batch, seq, d_model] = hidden.dims();
    hidden.reshape([batch * seq, d_model])
}

/// Runs of tokens whose logits are held together.
pub(super) fn chunks(tokens: usize, vocab: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let chunk = (LOGITS_PER_CHUNK / vocab).clamp(1, tokens.max(1));
    (0..tokens).step_by(chunk).map(move |start| start..(start + chunk).min(tokens))
}
