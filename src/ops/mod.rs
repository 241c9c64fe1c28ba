//! Tensor operations of our own, behind front functions on `Tensor`.
//!
//! Methods and objectives call only these functions. Their bodies compose burn operations, so
//! they run on every backend; a fused kernel for a backend goes behind the same front function,
//! with the composed body as its oracle.

mod fake_quant;
mod loss;

pub use fake_quant::{TieRule, flexround, reshape_grouped, round_ste, scale_gradient, seq_levels};
pub use loss::{
    Distributions, Divergence, LossValue, block_mse, cross_entropy, divergence, log_softmax,
    with_gradient,
};
