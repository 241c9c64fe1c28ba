//! Straight-through rounding and the fake-quant families; everything in grouped form
//! `[groups, group_len]` with per-group parameters `[groups, 1]`.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

/// `round(x)`, ties to even, with gradient 1 (straight-through estimator).
///
/// The forward value is exactly the integer: `x + (round(x) - x)` cancels without a rounding
/// error (Sterbenz).
pub fn round_ste<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let rounding = (x.clone().round() - x.clone()).detach();
    x + rounding
}

/// `x` unchanged, with its gradient multiplied by `factor` (LSQ's step-size gradient scale).
///
/// Adds an exact zero, so the forward value keeps every bit.
pub fn scale_gradient<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    let scaled = x.clone() * factor;
    x.detach() + (scaled.clone() - scaled.detach())
}

/// `clamp(x, low, high)` with gradient 1 everywhere: what lies outside can come back.
///
/// The forward value is exactly the clamp's.
pub fn clamp_ste<const D: usize>(x: Tensor<D>, low: f32, high: f32) -> Tensor<D> {
    x.clone().clamp(low, high).detach() + (x.clone() - x.detach())
}

/// A weight in any float rank-2 layout as `[groups, group_len]`; free when it is contiguous.
pub fn reshape_grouped(weight: Tensor<2>, grouped: [usize; 2]) -> Tensor<2> {
    if weight.dims() == grouped { weight } else { weight.reshape(grouped) }
}

/// FlexRound's codes (Lee et al. 2023, eq. 2, in the log form of the released code):
/// `clamp(round(W / exp(θ)) + z, 0, L)` with `θ = log_scale + log_division + log_row`.
///
/// Gradients: true clamp (1 inside and on the bounds, 0 outside), straight-through round. The
/// paper's bounds `[-z, L - z]` on the integer differ by row; with `z` added they do not.
///
/// # Shapes
/// - weight, log_division: `[groups, group_len]`
/// - log_scale, log_row, zero_point: `[groups, 1]`
/// - result: `[groups, group_len]`, integers in `0..=max_code`
pub fn flexround(
    weight: Tensor<2>,
    log_scale: Tensor<2>,
    log_division: Tensor<2>,
    log_row: Tensor<2>,
    zero_point: Tensor<2>,
    max_code: u8,
) -> Tensor<2> {
    let divisor = (log_division + (log_scale + log_row)).exp();
    affine_codes(weight / divisor, zero_point, max_code)
}

/// Codes of a weight that has been divided by its step: `clamp(round(v) + z, 0, L)`.
///
/// Gradients: straight-through round, true clamp (1 inside and on the bounds, 0 outside).
///
/// # Shapes
/// - ratio: `[groups, group_len]`, `v`
/// - zero_point: `[groups, 1]`, integers
/// - result: `[groups, group_len]`, integers in `0..=max_code`
pub fn affine_codes(ratio: Tensor<2>, zero_point: Tensor<2>, max_code: u8) -> Tensor<2> {
    (round_ste(ratio) + zero_point).clamp(0.0, f32::from(max_code))
}

/// LRQ's log division factors (Lee et al. 2024): `left · right + row + column`, the low-rank
/// stand-in for FlexRound's full matrix.
///
/// # Shapes
/// - left: `[out, rank]`, right: `[rank, in]`
/// - row: `[out, 1]`, column: `[1, in]`
/// - result: `[out, in]`
pub fn low_rank_division(
    left: Tensor<2>,
    right: Tensor<2>,
    row: Tensor<2>,
    column: Tensor<2>,
) -> Tensor<2> {
    left.matmul(right) + row + column
}

/// Which way the stretched elastic grid sends an exact tie. A zero weight is such a tie, and
/// INT4 weights are full of zeros, so the rule moves a sixth of them (methods-core 6.2).
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TieRule {
    /// Ties to even, as PyTorch and burn round: a zero goes to `+1/4`.
    #[default]
    HalfEven,
    /// `floor(x + 1/2)`: the exact bit nesting `code >> 2` of INT4 codes.
    HalfUp,
}

/// Stretched elastic quantization's 2-bit levels (ParetoQ; methods-core 6.2 and 7.1), in units of
/// half a step: `round(2 clamp(W/Δ, ±(1 - ε)) - 1/2) + 1/2`, one of ±1/2, ±3/2, so that
/// `W_hat = (Δ/2) · level`. No level is zero.
///
/// # Shapes
/// - weight: `[groups, group_len]`
/// - step: `[groups, 1]`, `Δ`
/// - result: `[groups, group_len]`
pub fn seq_levels(weight: Tensor<2>, step: Tensor<2>, epsilon: f32, ties: TieRule) -> Tensor<2> {
    let x = (weight / step).clamp(epsilon - 1.0, 1.0 - epsilon) * 2.0 - 0.5;
    let rounded = match ties {
        TieRule::HalfEven => round_ste(x),
        TieRule::HalfUp => {
            let rounding = ((x.clone() + 0.5).floor() - x.clone()).detach();
            x + rounding
        }
    };
    rounded + 0.5
}

/// ParetoQ's ternary codes (methods-core 7.1): `round(3/2 clamp(W/Δ, ±(1 - ε))) + 1`, so that
/// `W_hat = (2Δ/3) · (code - 1)`. Gradients as [`seq_levels`]'s.
///
/// # Shapes
/// - weight: `[groups, group_len]`
/// - step: `[groups, 1]`, `Δ`
/// - result: `[groups, group_len]`, 0, 1 or 2
pub fn ternary_codes(weight: Tensor<2>, step: Tensor<2>, epsilon: f32) -> Tensor<2> {
    round_ste((weight / step).clamp(epsilon - 1.0, 1.0 - epsilon) * 1.5) + 1.0
}

/// LSQ's codes (Esser et al. 2020, eq. 1) of a weight that has been divided by its step, counted
/// from the lowest: `round(clamp(v, -2^(bits-1), 2^(bits-1) - 1)) + 2^(bits-1)`.
///
/// Gradients: straight-through round of a true clamp (1 inside and on the bounds, 0 outside).
///
/// # Shapes
/// - ratio and result: `[groups, group_len]`
pub fn lsq_codes(ratio: Tensor<2>, bits: u8) -> Tensor<2> {
    let middle = f32::from(1u8 << (bits - 1));
    round_ste(ratio.clamp(-middle, middle - 1.0)) + middle
}

/// One-bit codes (methods-core 7.1): 1 where the weight is not negative, else 0, so that
/// `W_hat = 2Δ · (code - 1/2)`.
///
/// Gradients: to the weight `1/(2Δ)` where `|W| <= Δ`, else 0; none to the step.
///
/// # Shapes
/// - weight: `[groups, group_len]`
/// - step: `[groups, 1]`, `Δ`
/// - result: `[groups, group_len]`
pub fn sign_codes(weight: Tensor<2>, step: Tensor<2>) -> Tensor<2> {
    let code = weight.clone().greater_equal_scalar(0.0).float();
    let slope = (weight / step.detach()).clamp(-1.0, 1.0) * 0.5;
    code + (slope.clone() - slope.detach())
}
