//! Which block type a weight is stored in: the smallest that gives every weight back exactly.

use crate::blocks::{encode_dense, exact_f16, fits};
use crate::refusal::Refusal;
use crate::types::BlockType;
use crate::weight::UniformWeight;

/// The smallest block type that holds `weight` exactly.
///
/// What counts is the codes in use, not those the grid would allow: a 4-bit weight that uses no more
/// than eight neighbouring levels per row may come out as Q3_K.
///
/// Plain floats are not among the answers, though F32 always would be exact: who asks for a packed
/// file should learn that a weight does not pack.
///
/// # Errors
/// When there is none: says which property of the weight stands against it, and what rounding it away
/// would cost.
pub fn choose(weight: &UniformWeight<'_>) -> Result<BlockType, Refusal> {
    weight.check()?;
    let mut packed = BlockType::WRITTEN.into_iter().filter(|kind| kind.block_len() > 1);
    packed.find(|kind| fits(weight, *kind).is_ok()).ok_or_else(|| why_none(weight))
}

/// The smallest of F16, BF16 and F32 that holds `values` exactly.
pub fn choose_dense(values: &[f32]) -> BlockType {
    let narrow = [BlockType::F16, BlockType::Bf16];
    narrow.into_iter().find(|kind| encode_dense(values, *kind).is_ok()).unwrap_or(BlockType::F32)
}

/// The one obstacle that a user can do something about: the width, then scales, then zero points.
fn why_none(weight: &UniformWeight<'_>) -> Refusal {
    let UniformWeight { inputs, group_len, bits, scale, zero, .. } = *weight;
    if !inputs.is_multiple_of(32) {
        return Refusal::Rows { inputs };
    }
    let inexact = scale.iter().filter(|s| exact_f16(**s).is_none()).count();
    if inexact > 0 {
        return Refusal::Scales { inexact, of: scale.len(), change: largest_change(scale) };
    }
    if let Some(zero) = zero.iter().copied().find(|z| (z * 2.0).fract() != 0.0) {
        return Refusal::ZeroPoint { zero, bits };
    }
    if group_len < 32 {
        return Refusal::Groups { group_len };
    }
    Refusal::Grid { bits, zero: farthest(zero, bits), group_len }
}

/// The largest relative change of a scale when rounded to f16.
fn largest_change(scales: &[f32]) -> f64 {
    let change = |s: &f32| {
        let narrow = half::f16::from_f32(*s).to_f64();
        (narrow / f64::from(*s) - 1.0).abs()
    };
    scales.iter().map(change).fold(0.0, f64::max)
}

/// The zero point farthest from the middle of the codes.
fn farthest(zeros: &[f32], bits: u8) -> f32 {
    let middle = f32::from(1_u16 << (bits - 1));
    let distance = |z: &f32| (z - middle).abs();
    zeros.iter().copied().max_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(middle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight<'a>(
        codes: &'a [u8],
        bits: u8,
        scale: &'a [f32],
        zero: &'a [f32],
    ) -> UniformWeight<'a> {
        let inputs = codes.len();
        UniformWeight { out: 1, inputs, group_len: inputs / scale.len(), bits, codes, scale, zero }
    }

    fn codes(columns: usize, bits: u8) -> Vec<u8> {
        (0..columns).map(|i| (i % (1 << bits)) as u8).collect()
    }

    #[test]
    fn the_smallest_exact_type() {
        use BlockType::{Q2_0, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q8_0};
        // columns, bits, scales, zero points
        type Case = (usize, u8, &'static [f32], &'static [f32], BlockType);
        let cases: [Case; 13] = [
            (64, 4, &[0.5; 2], &[8.0; 2], Q4_0),
            (64, 8, &[0.5; 2], &[128.0; 2], Q8_0),
            (64, 4, &[1.000_976_6], &[4.0], Q4_1),
            (64, 4, &[1.000_976_6], &[11.0], Q8_0),
            (256, 4, &[1.000_976_6], &[11.0], Q4K),
            (64, 2, &[0.5], &[2.0], Q2_0),
            (64, 2, &[0.5; 2], &[2.0; 2], Q2_0),
            (64, 2, &[0.5, 0.75], &[2.0; 2], Q4_0),
            (32, 2, &[0.5], &[3.0], Q4_0),
            (256, 2, &[0.5], &[3.0], Q2K),
            (256, 2, &[0.5], &[1.5], Q2K),
            (128, 2, &[0.5], &[1.5], Q4_0),
            (256, 3, &[0.5], &[4.0], Q3K),
        ];
        for (columns, bits, scale, zero, kind) in cases {
            let codes = codes(columns, bits);
            let chosen = choose(&weight(&codes, bits, scale, zero));
            assert_eq!(chosen, Ok(kind), "{columns} columns, {bits} bits, {scale:?} {zero:?}");
        }
    }

    #[test]
    fn refusals_name_the_obstacle() {
        let (c4, c8) = (codes(64, 4), codes(64, 8));
        let cases: [(UniformWeight<'_>, &str); 6] = [
            (weight(&c4[..44], 4, &[0.5], &[8.0]), "rows of 44"),
            (weight(&c4, 4, &[0.1, 0.5], &[8.0; 2]), "1 of 2 scales"),
            (weight(&c4, 4, &[1e6], &[8.0]), "65504"),
            (weight(&c4, 4, &[0.5], &[7.1]), "zero point 7.1"),
            (weight(&c4, 4, &[1.000_976_6, 1.0, 3.0, 7.0], &[8.0; 4]), "groups of 16"),
            (weight(&c8, 8, &[0.5], &[200.0]), "8-bit grid"),
        ];
        for (weight, reason) in cases {
            let refusal = choose(&weight).unwrap_err();
            assert!(refusal.to_string().contains(reason), "{refusal}");
        }
        let rounding = choose(&weight(&c4, 4, &[0.1], &[8.0])).unwrap_err();
        assert!(rounding.to_string().contains("up to 0.02 %"), "{rounding}");
    }

    #[test]
    fn dense_values_take_the_narrowest_exact_floats() {
        assert_eq!(choose_dense(&[1.0, 0.5]), BlockType::F16);
        assert_eq!(choose_dense(&[2.0_f32.powi(100)]), BlockType::Bf16);
        assert_eq!(choose_dense(&[0.1]), BlockType::F32);
    }
}
