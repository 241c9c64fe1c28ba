//! Which block type a weight is stored in: the smallest that gives every weight back exactly.

use super::blocks::{Refusal, encode_dense, exact_f16, fits};
use super::types::BlockType;
use crate::export::coded::Coded;

const MLX: &str = "export format.mlx, which keeps scales and offsets in f32";

/// The smallest block type that holds `weight` exactly.
///
/// What counts is the codes in use, not those the grid would allow: a 4-bit weight that uses no more
/// than eight neighbouring levels per row may come out as Q3_K.
///
/// Plain floats are not among the answers, though F32 always would be exact: who asks for a packed
/// file should learn that a weight does not pack.
///
/// # Errors
/// When there is none: says which property of the weight stands against it, what rounding it away
/// would cost, and what to do instead.
pub fn choose(weight: &Coded<'_>) -> Result<BlockType, Refusal> {
    let mut packed = BlockType::WRITTEN.into_iter().filter(|kind| kind.block_len() > 1);
    packed.find(|kind| fits(weight, *kind).is_ok()).ok_or_else(|| why_none(weight))
}

/// The smallest of F16, BF16 and F32 that holds `values` exactly.
pub fn choose_dense(values: &[f32]) -> BlockType {
    let narrow = [BlockType::F16, BlockType::Bf16];
    narrow.into_iter().find(|kind| encode_dense(values, *kind).is_ok()).unwrap_or(BlockType::F32)
}

/// The one obstacle that a user can do something about: the width, then scales, then zero points.
fn why_none(weight: &Coded<'_>) -> Refusal {
    let Coded { inputs, group_len, bits, .. } = *weight;
    let (scale, zero) = (&weight.scale[..], &weight.shift[..]);
    if !inputs.is_multiple_of(32) {
        return Refusal::new(
            format!("rows of {inputs} weights are no whole blocks of 32, the smallest in GGUF"),
            "leave this weight dense, store it as F32, or export another format",
        );
    }
    let inexact = scale.iter().filter(|s| exact_f16(**s).is_none()).count();
    if inexact > 0 {
        return Refusal::new(
            format!(
                "{inexact} of {} scales are no f16 values, which is what GGUF stores; rounding \
                 them would change weights by up to {}",
                scale.len(),
                largest_change(scale)
            ),
            format!("quant.scales = \"f16\" in training, or {MLX}"),
        );
    }
    if let Some(z) = zero.iter().find(|z| (**z * 2.0).fract() != 0.0) {
        return Refusal::new(
            format!(
                "zero point {z} is no multiple of a half, and the {bits}-bit grid's offset, scale \
                 times zero point, is no f16 value either; GGUF has no other place for it"
            ),
            format!("train with integer zero points, or {MLX}"),
        );
    }
    if group_len < 32 {
        return Refusal::new(
            format!(
                "groups of {group_len} are smaller than 32, the smallest in GGUF with a scale of \
                 its own"
            ),
            "train with groups of 32 or a multiple of it",
        );
    }
    Refusal::new(
        format!(
            "no block type of GGUF holds a {bits}-bit grid with these zero points (for instance \
             {}) in groups of {group_len}",
            farthest(zero, bits)
        ),
        format!("train with a zero point in the middle of the codes, or {MLX}"),
    )
}

/// The largest relative change of a scale when rounded to f16, in words.
fn largest_change(scales: &[f32]) -> String {
    let change = |s: &f32| {
        let narrow = half::f16::from_f32(*s).to_f64();
        (narrow / f64::from(*s) - 1.0).abs()
    };
    let worst = scales.iter().map(change).fold(0.0, f64::max);
    if worst.is_finite() {
        format!("{:.2} %", 100.0 * worst)
    } else {
        "all there is (a scale is beyond 65504, the largest f16)".to_owned()
    }
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
    use crate::quant::ZeroKind;

    fn weight<'a>(codes: &'a [u8], bits: u8, scale: &'a [f32], zero: &'a [f32]) -> Coded<'a> {
        let inputs = codes.len();
        Coded {
            out: 1,
            inputs,
            group_len: inputs / scale.len(),
            bits,
            codes: codes.into(),
            scale: scale.into(),
            shift: zero.into(),
            zero_kind: Some(ZeroKind::Real),
        }
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
        let cases: [(Coded<'_>, &str, &str); 6] = [
            (weight(&c4[..44], 4, &[0.5], &[8.0]), "rows of 44", "dense"),
            (weight(&c4, 4, &[0.1, 0.5], &[8.0; 2]), "1 of 2 scales", "quant.scales"),
            (weight(&c4, 4, &[1e6], &[8.0]), "65504", "format.mlx"),
            (weight(&c4, 4, &[0.5], &[7.1]), "zero point 7.1", "integer zero"),
            (
                weight(&c4, 4, &[1.000_976_6, 1.0, 3.0, 7.0], &[8.0; 4]),
                "groups of 16",
                "groups of 32",
            ),
            (weight(&c8, 8, &[0.5], &[200.0]), "8-bit grid", "middle"),
        ];
        for (weight, reason, alternative) in cases {
            let refusal = choose(&weight).unwrap_err();
            assert!(refusal.reason.contains(reason), "{refusal}");
            assert!(refusal.alternative.contains(alternative), "{refusal}");
        }
        let rounding = choose(&weight(&c4, 4, &[0.1], &[8.0])).unwrap_err();
        assert!(rounding.reason.contains("up to 0.02 %"), "{rounding}");
    }

    #[test]
    fn dense_values_take_the_narrowest_exact_floats() {
        assert_eq!(choose_dense(&[1.0, 0.5]), BlockType::F16);
        assert_eq!(choose_dense(&[2.0_f32.powi(100)]), BlockType::Bf16);
        assert_eq!(choose_dense(&[0.1]), BlockType::F32);
    }
}
