//! Activations and the KV cache on integer grids, simulated in float arithmetic.
//!
//! Two schemes (LRQ's settings, arXiv 2407.11534): a grid for each token, chosen
//! on the spot from that token's extremes, and one fixed grid for a whole site, calibrated on text
//! and possibly learned like LSQ's steps. Arithmetic is f32 whatever the type of the activations.

use std::fmt;

use burn::tensor::{DType, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Bits, SCALE_FLOOR};
use crate::ops::round_ste;

/// Who shares a grid.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActivationScheme {
    /// Each token has its own, from its smallest and largest feature, at run time.
    Token,
    /// One for all tokens at a site, calibrated beforehand.
    Tensor,
}

/// `[quant.activations]`: the inputs of every linear of the decoder blocks.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ActivationConfig {
    /// Width of a code.
    #[serde(default = "eight")]
    pub bits: Bits,
    /// `"token"` or `"tensor"`.
    pub scheme: ActivationScheme,
}

/// `[quant.kv_cache]`: keys before rotation and values, a grid for each token over all its heads.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct KvCacheConfig {
    /// Width of a code.
    #[serde(default = "eight")]
    pub bits: Bits,
}

fn eight() -> Bits {
    Bits::EIGHT
}

/// What is done to activations once weights are quantized; nothing by default.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
pub struct ActivationQuant {
    /// To the inputs of linears.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationConfig>,
    /// To keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCacheConfig>,
}

impl ActivationQuant {
    /// Whether anything is done at all.
    pub fn is_on(&self) -> bool {
        self.activations.is_some() || self.kv_cache.is_some()
    }

    /// The width of fixed grids, when the scheme has them.
    pub fn fixed(&self) -> Option<Bits> {
        let fixed = self.activations.filter(|config| config.scheme == ActivationScheme::Tensor);
        fixed.map(|config| config.bits)
    }
}

/// What follows a weight's `w4`: `a8`, `kv8`, both or nothing.
impl fmt::Display for ActivationQuant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(config) = self.activations {
            write!(f, "a{}", config.bits)?;
        }
        if let Some(config) = self.kv_cache {
            write!(f, "kv{}", config.bits)?;
        }
        Ok(())
    }
}

/// The fixed grid of one site.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct InputGrid {
    /// Step.
    pub scale: f32,
    /// Zero point in code units before it is rounded and clamped.
    pub zero: f32,
}

impl InputGrid {
    /// The grid over `low..=high`, widened until it holds zero.
    pub fn from_range(low: f32, high: f32, bits: Bits) -> Self {
        let top = f32::from(bits.max_code());
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = ((high - low) / top).max(SCALE_FLOOR);
        Self { scale, zero: (-low / scale).round_ties_even().clamp(0.0, top) }
    }

    /// Whether it can be used: the step a positive number, the zero point a number.
    pub fn is_sound(&self) -> bool {
        self.scale.is_finite() && self.scale > 0.0 && self.zero.is_finite()
    }

    /// [`per_tensor`] with this grid as a constant.
    pub fn apply<const D: usize>(&self, x: Tensor<D>, bits: Bits) -> Tensor<D> {
        let top = f32::from(bits.max_code());
        let zero = self.zero.round_ties_even().clamp(0.0, top);
        in_f32(x, |x| ((round_ste(x / self.scale) + zero).clamp(0.0, top) - zero) * self.scale)
    }
}

/// Fake-quantizes along the last axis with a grid for each row, chosen from its extremes:
/// `s = max((max - min) / L, 1e-8)`, `z = clamp(round(-min / s), 0, L)`,
/// `x_hat = s (clamp(round(x / s) + z, 0, L) - z)`. The range is not widened to hold zero, so a row
/// with all its values on one side of it loses those that do not fit (the LRQ code's rule).
///
/// The gradient to `x` is 1 everywhere (straight-through).
///
/// # Shapes
/// - x, result: `[.., features]`
pub fn per_token<const D: usize>(x: Tensor<D>, bits: Bits) -> Tensor<D> {
    let top = f32::from(bits.max_code());
    in_f32(x, |x| {
        let plain = if x.is_autodiff() { x.clone().inner() } else { x.clone() };
        let (low, high) = (plain.clone().min_dim(D - 1), plain.clone().max_dim(D - 1));
        let scale = ((high - low.clone()) / top).clamp_min(SCALE_FLOOR);
        let zero = (low / scale.clone()).neg().round().clamp(0.0, top);
        let codes = ((plain / scale.clone()).round() + zero.clone()).clamp(0.0, top);
        let x_hat = scale * (codes - zero);
        if x.is_autodiff() {
            // x - x is exactly zero, so the value keeps every bit.
            Tensor::from_inner(x_hat) + (x.clone() - x.detach())
        } else {
            x_hat
        }
    })
}

/// Fake-quantizes with one grid for the whole tensor: `x_hat = s (clamp(round(x / s) + z, 0, L) - z)`
/// with `z = clamp(round(zero), 0, L)`.
///
/// Gradients to `x`, `scale` and `zero` as LSQ's: 1 through every rounding and through the clamp of
/// `z`, the clamp of codes a true one.
///
/// # Shapes
/// - x, result: any
/// - scale, zero: `[1]`, f32
pub fn per_tensor<const D: usize>(
    x: Tensor<D>,
    scale: Tensor<1>,
    zero: Tensor<1>,
    bits: Bits,
) -> Tensor<D> {
    let top = f32::from(bits.max_code());
    let zero = round_ste(zero);
    let clamping = (zero.clone().clamp(0.0, top) - zero.clone()).detach();
    let zero = (zero + clamping).reshape([1; D]);
    let scale = scale.reshape([1; D]);
    in_f32(x, |x| {
        let codes = (round_ste(x / scale.clone()) + zero.clone()).clamp(0.0, top);
        (codes - zero) * scale
    })
}

/// `f` on `x` in f32, its result in `x`'s own type.
fn in_f32<const D: usize>(x: Tensor<D>, f: impl FnOnce(Tensor<D>) -> Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F32 => f(x),
        dtype => f(x.cast(DType::F32)).cast(dtype),
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};
    use proptest::prelude::*;

    use super::*;

    fn row(values: &[f32]) -> Tensor<2> {
        let data = TensorData::new(values.to_vec(), [1, values.len()]);
        Tensor::from_data(data, &Device::flex())
    }

    fn values(tensor: Tensor<2>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    proptest! {
        #[test]
        fn a_row_around_zero_moves_by_half_a_step_at_most(
            mut x in proptest::collection::vec(-40.0f32..40.0, 2..40),
            bits in 2u8..=8,
        ) {
            x[0] = -x[0].abs();
            x[1] = x[1].abs();
            let bits = Bits::new(bits).unwrap();
            let (low, high) = x.iter().fold((0.0f32, 0.0f32), |(l, h), x| (l.min(*x), h.max(*x)));
            let step = ((high - low) / f32::from(bits.max_code())).max(SCALE_FLOOR);
            for (a, b) in x.iter().zip(values(per_token(row(&x), bits))) {
                prop_assert!((a - b).abs() <= step * 0.5001 + 1e-7, "{a} became {b}, step {step}");
            }
        }

        #[test]
        fn a_constant_grid_and_a_learned_one_agree_in_every_bit(
            x in proptest::collection::vec(-4.0f32..4.0, 1..40),
            scale in 1e-3f32..0.2,
            zero in -5.0f32..300.0,
        ) {
            let grid = InputGrid { scale, zero };
            let parameter = |value: f32| Tensor::<1>::from_data([value], &Device::flex());
            let learned = per_tensor(row(&x), parameter(scale), parameter(zero), Bits::EIGHT);
            let bits = |x: Vec<f32>| -> Vec<u32> { x.into_iter().map(f32::to_bits).collect() };
            prop_assert_eq!(bits(values(grid.apply(row(&x), Bits::EIGHT))), bits(values(learned)));
        }
    }

    #[test]
    fn a_constant_row_stays_finite_and_zero_stays_zero() {
        assert_eq!(values(per_token(row(&[0.0; 4]), Bits::EIGHT)), [0.0; 4]);
        for constant in [3.0, -3.0] {
            let x_hat = values(per_token(row(&[constant; 4]), Bits::EIGHT));
            assert!(x_hat.iter().all(|x| x.abs() <= 256.0 * SCALE_FLOOR), "{x_hat:?}");
        }
        // A fixed grid of such a site holds the constant.
        let grid = InputGrid::from_range(3.0, 3.0, Bits::EIGHT);
        let x_hat = values(grid.apply(row(&[3.0; 2]), Bits::EIGHT));
        assert!(x_hat.iter().all(|x| (x - 3.0).abs() < 1e-5), "{x_hat:?}");
    }

    #[test]
    fn names_and_widths() {
        let quant: ActivationQuant =
            toml::from_str("activations.scheme = \"tensor\"\nkv_cache = { bits = 4 }").unwrap();
        assert_eq!(quant.to_string(), "a8kv4");
        assert_eq!(quant.fixed(), Some(Bits::EIGHT));
        assert_eq!(ActivationQuant::default().to_string(), "");
        assert!(toml::from_str::<ActivationConfig>("scheme = \"tokn\"").is_err());
        assert!(toml::from_str::<ActivationConfig>("scheme = \"token\"\nbits = 9").is_err());
    }
}
