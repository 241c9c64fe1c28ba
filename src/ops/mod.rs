//! Tensor operations of our own, behind front functions on `Tensor`.
//!
//! Methods and objectives call only these functions. Their bodies compose burn operations, so
//! they run on every backend; a fused kernel for a backend goes behind the same front function,
//! with the composed body as its oracle.

mod binary_coding;
mod fake_quant;
mod loss;

pub use binary_coding::{Unified, binary_coding, nearest_codes, sign_planes};
pub use fake_quant::{
    TieRule, affine_codes, clamp_ste, flexround, low_rank_division, lsq_codes, reshape_grouped,
    round_ste, scale_gradient, seq_levels, sign_codes, ternary_codes,
};
pub use loss::{
    Distributions, Divergence, LossValue, block_mse, confidence, cross_entropy, divergence,
    log_softmax, with_gradient,
};
