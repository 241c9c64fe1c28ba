//! Tensor operations of our own, behind front functions on `Tensor`.
//!
//! Methods, objectives and the model call only these functions. Behind each is an operation with a
//! derivative written by hand (`bridge`), so the tape holds little more than its inputs. On this
//! machine's processor (burn's Flex backend, f32) it runs as a kernel over rows (`kernel`), in
//! vector code that is chosen at run time (`vector`); on burn's CubeCL backend those that matter most
//! are kernels too (`cube`), and all others are composed from burn's operations. [`composed`] forces
//! the latter.

mod adamw;
mod additive;
mod attention;
#[cfg(feature = "flex")]
mod awake;
mod binary_coding;
pub mod bits;
mod block;
mod bridge;
mod coded;
mod continuing;
#[cfg(feature = "gpu")]
mod cube;
mod device_kernels;
mod dynamic;
mod fake_quant;
mod forest;
#[cfg(feature = "flex")]
mod kernel;
mod likely;
mod linear;
mod loss;
mod moments;
mod narrow;
mod numbers;
mod search;
mod stochastic;
#[cfg(feature = "flex")]
mod vector;

pub use adamw::{
    AdamWStep, adamw_step, adamw_step_in_units, laid_out_like, lies_transposed, squared_distance,
    squared_norm,
};
pub use additive::Additive;
pub use attention::{Attending, Scores, Sight, causal_attention, has_kernel};
pub use binary_coding::{Unified, nearest_codes};
pub use block::{block_mse, layer_norm, rms_norm, swiglu};
pub use bridge::composed;
pub use coded::{CodedKind, CodedMatrix, FrozenGrid, PackedCodes};
pub use continuing::continuing;
pub use device_kernels::{DeviceKernels, device_kernels};
pub use fake_quant::{
    Divided, Rule, Stepped, TieRule, clamp_ste, every_row, exp, off_tape, reshape_grouped,
    round_ste, scale_gradient, shorten_ste,
};
pub use forest::{Branch, Forest};
pub use likely::{Likely, likeliest};
pub use linear::{linear, matmul};
pub use loss::{
    Closeness, Comparison, Divergence, LossValue, compare, compare_later, confidence,
    cross_entropy, divergence, divergence_value, negative_log_likelihood, negative_log_likelihoods,
    with_gradient,
};
pub use moments::{Int8Moments, LEAVES, Later, Moments, Values, later};
pub use narrow::{NarrowCopy, linear_narrow};
pub use numbers::{Numbers, Restraint, device_reads};
pub use search::{Candidate, Extent, nearest_grids};
pub use stochastic::round_to_bf16;

/// Runs `body` compiled for the widest registers of this machine's processor. What it calls, and `body` itself,
/// has to be `#[inline(always)]`; see `vector`.
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    #[cfg(feature = "flex")]
    return vector::Level::best().run(body);
    #[cfg(not(feature = "flex"))]
    body()
}

/// The instruction set that kernels run in on this machine's processor, for reports.
pub fn vector_level() -> &'static str {
    #[cfg(feature = "flex")]
    return vector::Level::best().name();
    #[cfg(not(feature = "flex"))]
    "none"
}
