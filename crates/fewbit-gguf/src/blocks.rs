//! Codes on a uniform grid, written into ggml's blocks: exactly, or not at all.
//!
//! Every encoder asks for the very f32 that the weight is, `scale * (code - zero)`, and compares what
//! a reader of the block will compute with it. Equal means equal as numbers: where a block's
//! scale is negative a zero weight may come back as minus zero.
//!
//! A long file: an encoder for each type, and every one of them tried on grids that others hold too.

// Equality to the bit is what this file is about.
#![allow(clippy::float_cmp)]

use half::{bf16, f16};

use crate::refusal::Refusal;
use crate::types::BlockType;
use crate::weight::UniformWeight;

/// The bytes of `weight` as `kind`, row after row.
///
/// # Errors
/// When one weight would not come back as it is, and for a type that is only read.
pub fn encode(weight: &UniformWeight<'_>, kind: BlockType) -> Result<Vec<u8>, Refusal> {
    let mut bytes =
        Vec::with_capacity(kind.tensor_bytes(&[weight.out, weight.inputs]).unwrap_or(0));
    each_row(weight, kind, |row| bytes.extend_from_slice(row))?;
    Ok(bytes)
}

/// Whether [`encode`] would work, without keeping its bytes.
///
/// # Errors
/// As [`encode`].
pub fn fits(weight: &UniformWeight<'_>, kind: BlockType) -> Result<(), Refusal> {
    each_row(weight, kind, |_| ())
}

/// The bytes of plain numbers as F32, F16 or BF16.
///
/// # Errors
/// When a value is not exactly one of the type's, and for a block type that takes codes.
pub fn encode_dense(values: &[f32], kind: BlockType) -> Result<Vec<u8>, Refusal> {
    refuse_unwritten(kind)?;
    let mut bytes = Vec::with_capacity(values.len() * kind.block_bytes());
    for value in values {
        if !push_float(*value, kind, &mut bytes) {
            return Err(Refusal::InexactValue { kind, value: *value });
        }
    }
    Ok(bytes)
}

/// Types of other programs are read only.
fn refuse_unwritten(kind: BlockType) -> Result<(), Refusal> {
    if kind.is_written() { Ok(()) } else { Err(Refusal::ReadOnly(kind)) }
}

fn each_row(
    weight: &UniformWeight<'_>,
    kind: BlockType,
    mut each: impl FnMut(&[u8]),
) -> Result<(), Refusal> {
    refuse_unwritten(kind)?;
    weight.check()?;
    let Some(row_bytes) = kind.row_bytes(weight.inputs) else {
        return Err(Refusal::PartialBlocks { kind, inputs: weight.inputs });
    };
    let (mut values, mut bytes) = (vec![0.0; weight.inputs], Vec::with_capacity(row_bytes));
    for row in 0..weight.out {
        weight.row_values(row, &mut values);
        bytes.clear();
        for (index, values) in values.chunks_exact(kind.block_len()).enumerate() {
            let start = index * kind.block_len();
            let block = Block { weight, row, start, values };
            if !block.encode(kind, &mut bytes) {
                return Err(block.refusal(kind));
            }
        }
        each(&bytes);
    }
    Ok(())
}

/// One block's worth of a row.
struct Block<'a> {
    weight: &'a UniformWeight<'a>,
    row: usize,
    start: usize,
    values: &'a [f32],
}

impl Block<'_> {
    /// Appends the block; `false`, with rubbish appended, when it cannot be exact.
    fn encode(&self, kind: BlockType, out: &mut Vec<u8>) -> bool {
        match kind {
            BlockType::F32 | BlockType::F16 | BlockType::Bf16 => {
                push_float(self.values[0], kind, out)
            }
            BlockType::Q4_0 => self.one_scale(-8..=7, true, out, |steps, out| {
                let (low, high) = steps.split_at(16);
                out.extend(low.iter().zip(high).map(|(l, h)| (l + 8) as u8 | ((h + 8) as u8) << 4));
            }),
            BlockType::Q8_0 => self.one_scale(-128..=127, true, out, |steps, out| {
                out.extend(steps.iter().map(|step| *step as u8));
            }),
            BlockType::Q2_0 => {
                self.one_scale(-1..=2, true, out, |steps, out| {
                    let code = |step: &i32| (step + 1) as u8;
                    out.extend(steps.chunks_exact(4).map(|four| {
                        four.iter().rev().fold(0, |byte, step| byte << 2 | code(step))
                    }));
                })
            }
            // The fourth code exists, but the type is documented as ternary.
            BlockType::Tq2_0 => self.one_scale(-1..=1, false, out, |steps, out| {
                push_two_bits(steps.iter().map(|step| (step + 1) as u8), out);
            }),
            BlockType::Q4_1 => self.q4_1(out),
            BlockType::Q2K => self.q2_k(out),
            BlockType::Q3K => self.q3_k(out),
            BlockType::Q4K => self.q4_k(out),
            BlockType::Q6K => self.q6_k(out),
            // Read only: refused before any block is made.
            BlockType::Q1_0
            | BlockType::Tq1_0
            | BlockType::Mxfp4
            | BlockType::Iq4Xs
            | BlockType::Iq4Nl
            | BlockType::Q5_0
            | BlockType::Q5K
            | BlockType::Q5_1 => false,
        }
    }

    /// Blocks of one f16 scale and integer steps in `range`.
    fn one_scale(
        &self,
        range: std::ops::RangeInclusive<i32>,
        scale_first: bool,
        out: &mut Vec<u8>,
        pack: impl Fn(&[i32], &mut Vec<u8>),
    ) -> bool {
        let (scales, _) = self.weight.grids(self.row, self.start, self.values.len());
        let mut steps = [0; 256];
        let steps = &mut steps[..self.values.len()];
        let fitting = candidates(scales).find_map(|step| {
            let d = exact_f16(step)?;
            in_steps(self.values, step, &range, steps).then_some(d)
        });
        let Some(d) = fitting else { return false };
        if scale_first {
            out.extend(d.to_le_bytes());
        }
        pack(steps, out);
        if !scale_first {
            out.extend(d.to_le_bytes());
        }
        true
    }

    fn q4_1(&self, out: &mut Vec<u8>) -> bool {
        let Some((scale, zero)) = self.grid(self.start, 32) else { return false };
        let (Some(d), Some(m)) = (exact_f16(scale), exact_f16(-(scale * zero))) else {
            return false;
        };
        let codes = self.codes(0, 32);
        let exact = codes
            .iter()
            .zip(self.values)
            .all(|(code, value)| d.to_f32() * f32::from(*code) + m.to_f32() == *value);
        if !exact || codes.iter().any(|code| *code > 15) {
            return false;
        }
        out.extend(d.to_le_bytes());
        out.extend(m.to_le_bytes());
        let (low, high) = codes.split_at(16);
        out.extend(low.iter().zip(high).map(|(l, h)| l | h << 4));
        true
    }

    fn q2_k(&self, out: &mut Vec<u8>) -> bool {
        let Some(Levels { d, scales, minimum, mins }) = self.two_levels::<16>(3, 15) else {
            return false;
        };
        out.extend(scales.iter().zip(mins).map(|(scale, min)| scale | min << 4));
        push_two_bits(self.codes(0, 256).iter().copied(), out);
        out.extend(d.to_le_bytes());
        out.extend(minimum.to_le_bytes());
        true
    }

    fn q4_k(&self, out: &mut Vec<u8>) -> bool {
        let Some(Levels { d, scales, minimum, mins }) = self.two_levels::<8>(15, 63) else {
            return false;
        };
        out.extend(d.to_le_bytes());
        out.extend(minimum.to_le_bytes());
        // The first four scales and minima take the low six bits of a byte each; the upper two
        // bits of those bytes, and four more bytes of nibbles, hold the last four.
        for six_bits in [&scales, &mins] {
            out.extend((0..4).map(|j| six_bits[j] | six_bits[j + 4] >> 4 << 6));
        }
        out.extend((4..8).map(|j| scales[j] & 15 | (mins[j] & 15) << 4));
        for pair in self.codes(0, 256).chunks_exact(64) {
            let (low, high) = pair.split_at(32);
            out.extend(low.iter().zip(high).map(|(l, h)| l | h << 4));
        }
        true
    }

    /// Steps in `range` of 16 parts of a block, and the parts' signed scales in `scales` as multiples of
    /// one f16.
    fn parts(
        &self,
        range: std::ops::RangeInclusive<i32>,
        scales: std::ops::RangeInclusive<i32>,
    ) -> Option<([i32; 256], f16, [i32; 16])> {
        let (mut steps, mut sizes) = ([0; 256], [0.0; 16]);
        for (j, size) in sizes.iter_mut().enumerate() {
            let values = &self.values[16 * j..][..16];
            let steps = &mut steps[16 * j..][..16];
            let (scales, _) = self.weight.grids(self.row, self.start + 16 * j, 16);
            *size = candidates(scales).find(|step| in_steps(values, *step, &range, steps))?;
        }
        let (d, scales) = common_unit(&sizes, scales)?;
        Some((steps, d, scales))
    }

    fn q6_k(&self, out: &mut Vec<u8>) -> bool {
        let Some((steps, d, scales)) = self.parts(-32..=31, -128..=127) else { return false };
        let codes = steps.map(|step| (step + 32) as u8);
        for half in codes.chunks_exact(128) {
            let (low, high) = half.split_at(64);
            out.extend(low.iter().zip(high).map(|(l, h)| l & 15 | h << 4));
        }
        push_two_bits(codes.iter().map(|code| code >> 4), out);
        out.extend(scales.iter().map(|scale| *scale as u8));
        out.extend(d.to_le_bytes());
        true
    }

    fn q3_k(&self, out: &mut Vec<u8>) -> bool {
        let Some((steps, d, scales)) = self.parts(-4..=3, -32..=31) else { return false };
        let scales = scales.map(|scale| (scale + 32) as u8);
        let codes = steps.map(|step| (step + 4) as u8);
        // Bit b of byte i is the third bit of weight 32 b + i.
        out.extend((0..32).map(|i| (0..8).fold(0, |byte, b| byte | codes[32 * b + i] >> 2 << b)));
        push_two_bits(codes.iter().map(|code| code & 3), out);
        out.extend((0..8).map(|j| scales[j] & 15 | (scales[j + 8] & 15) << 4));
        out.extend((0..4).map(|j| {
            (0..4).fold(0, |byte, quarter| byte | scales[4 * quarter + j] >> 4 << (2 * quarter))
        }));
        out.extend(d.to_le_bytes());
        true
    }

    /// Scales and minima of the `N` parts of a block as multiples up to `most` of one f16 each,
    /// with codes up to `top`.
    fn two_levels<const N: usize>(&self, top: u8, most: i32) -> Option<Levels<N>> {
        let len = 256 / N;
        let (mut sizes, mut offsets) = ([0.0; N], [0.0; N]);
        for j in 0..N {
            let (scale, zero) = self.grid(self.start + j * len, len)?;
            (sizes[j], offsets[j]) = (scale, scale * zero);
        }
        let (d, scales) = common_unit(&sizes, 0..=most)?;
        let (minimum, mins) = common_unit(&offsets, 0..=most)?;
        for j in 0..N {
            let step = d.to_f32() * scales[j] as f32;
            let offset = minimum.to_f32() * mins[j] as f32;
            let pairs = self.codes(j * len, len).iter().zip(&self.values[j * len..]);
            for (code, value) in pairs {
                if *code > top || step * f32::from(*code) - offset != *value {
                    return None;
                }
            }
        }
        let bytes = |multiples: [i32; N]| multiples.map(|multiple| multiple as u8);
        Some(Levels { d, scales: bytes(scales), minimum, mins: bytes(mins) })
    }

    /// The scale and zero point that all of `len` weights from column `start` share.
    fn grid(&self, start: usize, len: usize) -> Option<(f32, f32)> {
        let (scales, zeros) = self.weight.grids(self.row, start, len);
        let same = |values: &[f32]| values.iter().all(|value| *value == values[0]);
        (same(scales) && same(zeros)).then(|| (scales[0], zeros[0]))
    }

    /// Codes of the block's weights `from..from + len`.
    fn codes(&self, from: usize, len: usize) -> &[u8] {
        &self.weight.codes[self.row * self.weight.inputs + self.start + from..][..len]
    }

    fn refusal(&self, kind: BlockType) -> Refusal {
        let (row, column) = (self.row, self.start);
        let (scales, zeros) = self.weight.grids(row, column, self.values.len());
        Refusal::Inexact { kind, row, column, scale: scales[0], zero: zeros[0] }
    }
}

/// A K-type block's scales and minima.
struct Levels<const N: usize> {
    d: f16,
    scales: [u8; N],
    minimum: f16,
    mins: [u8; N],
}

/// Step sizes to try: zero, for blocks of nothing but zeros, whatever their scale; then each scale of
/// the block, its negative (levels -1..=2 against -2..=1), and their halves (a zero point between two
/// codes makes odd multiples of half the scale).
fn candidates(scales: &[f32]) -> impl Iterator<Item = f32> {
    let different = scales.iter().enumerate().filter(|(i, s)| *i == 0 || **s != scales[i - 1]);
    [0.0].into_iter().chain(different.flat_map(|(_, s)| [*s, -s, s / 2.0, -s / 2.0]))
}

/// Writes every value as a whole number of `step`s; `false` when one is not exactly that or its
/// number is out of `range`.
fn in_steps(
    values: &[f32],
    step: f32,
    range: &std::ops::RangeInclusive<i32>,
    steps: &mut [i32],
) -> bool {
    values.iter().zip(steps).all(|(value, count)| {
        // A division by zero gives no number or an infinite one, which casts to 0 or out of range.
        *count = (value / step).round() as i32;
        range.contains(count) && step * *count as f32 == *value
    })
}

/// An f16 of which every size is a whole multiple in `range`, and the multiples.
fn common_unit<const N: usize>(
    sizes: &[f32; N],
    range: std::ops::RangeInclusive<i32>,
) -> Option<(f16, [i32; N])> {
    let nonzero = sizes.iter().copied().filter(|size| *size != 0.0);
    let Some(least) = nonzero.min_by(|a, b| a.abs().total_cmp(&b.abs())) else {
        return Some((f16::ZERO, [0; N]));
    };
    let mut multiples = [0; N];
    (1..=*range.end()).find_map(|parts| {
        // When the division rounds, the products below are not the sizes.
        let unit = exact_f16(least / parts as f32)?;
        in_steps(sizes, unit.to_f32(), &range, &mut multiples).then_some((unit, multiples))
    })
}

/// The f16 that is exactly `value`.
pub(crate) fn exact_f16(value: f32) -> Option<f16> {
    let narrow = f16::from_f32(value);
    (narrow.is_finite() && narrow.to_f32() == value).then_some(narrow)
}

fn push_float(value: f32, kind: BlockType, out: &mut Vec<u8>) -> bool {
    match kind {
        BlockType::F32 => out.extend(value.to_le_bytes()),
        BlockType::F16 => match exact_f16(value) {
            Some(narrow) => out.extend(narrow.to_le_bytes()),
            None => return false,
        },
        BlockType::Bf16 => {
            let narrow = bf16::from_f32(value);
            out.extend(narrow.to_le_bytes());
            return narrow.to_f32() == value;
        }
        _ => return false,
    }
    true
}

/// 256 two-bit codes: byte i of each half holds weights i, i + 32, i + 64 and i + 96 of it.
fn push_two_bits(codes: impl Iterator<Item = u8>, out: &mut Vec<u8>) {
    let mut bytes = [0; 64];
    for (i, code) in codes.enumerate() {
        bytes[i / 128 * 32 + i % 32] |= code << (i % 128 / 32 * 2);
    }
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decode::decode;

    /// A small deterministic generator.
    struct Dice(u64);

    impl Dice {
        fn below(&mut self, n: u64) -> u64 {
            self.0 = self
                .0
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (self.0 >> 33) % n
        }

        fn f16(&mut self) -> f32 {
            f16::from_f32((1 + self.below(4000)) as f32 / 30_000.0).to_f32()
        }
    }

    struct Owned {
        shape: [usize; 3],
        bits: u8,
        codes: Vec<u8>,
        scale: Vec<f32>,
        zero: Vec<f32>,
    }

    impl Owned {
        /// Four rows; codes up to `top`.
        fn new(shape: [usize; 2], bits: u8, top: u64, zero: impl Fn(&mut Dice) -> f32) -> Self {
            let (mut dice, [columns, group_len]) = (Dice(7 + u64::from(bits)), shape);
            let groups = 4 * columns / group_len;
            Self {
                shape: [4, columns, group_len],
                bits,
                codes: (0..4 * columns).map(|_| dice.below(top + 1) as u8).collect(),
                scale: (0..groups).map(|_| dice.f16()).collect(),
                zero: (0..groups).map(|_| zero(&mut dice)).collect(),
            }
        }

        fn view(&self) -> UniformWeight<'_> {
            let [out, inputs, group_len] = self.shape;
            let (codes, scale, zero) = (&self.codes, &self.scale, &self.zero);
            UniformWeight { out, inputs, group_len, bits: self.bits, codes, scale, zero }
        }

        /// Encoded and decoded is what it was.
        fn is_exact(&self, kind: BlockType) -> bool {
            let weight = self.view();
            let Ok(bytes) = encode(&weight, kind) else { return false };
            assert_eq!(Some(bytes.len()), kind.tensor_bytes(&[weight.out, weight.inputs]));
            let mut wanted = vec![0.0; weight.inputs];
            for (row, got) in decode(kind, &bytes).unwrap().chunks(weight.inputs).enumerate() {
                weight.row_values(row, &mut wanted);
                assert_eq!(got, wanted, "{kind}, row {row}");
            }
            fits(&weight, kind).is_ok()
        }

        fn exact(&self) -> Vec<BlockType> {
            BlockType::ALL.into_iter().filter(|kind| self.is_exact(*kind)).collect()
        }
    }

    use BlockType::{Bf16, F16, F32, Q2_0, Q2K, Q3K, Q4_0, Q4_1, Q4K, Q6K, Q8_0, Tq2_0};

    #[test]
    fn int4() {
        let symmetric = Owned::new([96, 32], 4, 15, |_| 8.0);
        let kinds = symmetric.exact();
        assert!(kinds.starts_with(&[Q4_0, Q4_1, Q8_0]) && kinds.ends_with(&[F32]), "{kinds:?}");
        // Levels -7..=8 need a negative scale.
        assert_eq!(Owned::new([96, 96], 4, 15, |_| 7.0).exact()[0], Q4_0);
        let asymmetric = Owned::new([512, 128], 4, 15, |dice| dice.below(16) as f32);
        assert_eq!(asymmetric.exact()[0], Q8_0);
        let channel = Owned::new([512, 512], 4, 15, |dice| dice.below(16) as f32);
        assert_eq!(channel.exact()[..2], [Q4K, Q6K]);
        let half = Owned::new([64, 32], 4, 15, |_| 7.5);
        assert_eq!(half.exact()[0], Q8_0);
    }

    #[test]
    fn minima_that_are_f16() {
        let mut weight = Owned::new([64, 32], 4, 15, |dice| dice.below(16) as f32);
        for scale in &mut weight.scale {
            *scale = (*scale * 4096.0).round().clamp(1.0, 127.0) / 4096.0; // seven bits
        }
        assert_eq!(weight.exact()[..2], [Q4_1, Q8_0]);
    }

    #[test]
    fn int3_and_int2() {
        let zeros = |dice: &mut Dice| dice.below(8) as f32;
        assert_eq!(Owned::new([96, 32], 3, 7, zeros).exact()[0], Q4_0);
        assert_eq!(Owned::new([256, 256], 3, 7, |_| 4.0).exact()[0], Q3K);
        assert_eq!(Owned::new([256, 256], 3, 7, |_| 3.0).exact()[0], Q3K);
        assert_eq!(Owned::new([256, 32], 3, 7, |_| 3.5).exact()[0], Q4_0);
        let either = |dice: &mut Dice| 1.0 + dice.below(2) as f32;
        assert_eq!(Owned::new([128, 64], 2, 3, either).exact()[..2], [Q2_0, Q4_0]);
        let any = |dice: &mut Dice| 3.0 * dice.below(2) as f32;
        assert_eq!(Owned::new([128, 64], 2, 3, any).exact()[0], Q4_0);
        assert_eq!(Owned::new([512, 512], 2, 3, any).exact()[0], Q2K);
        // Groups of 128 share a block of 256, and 32 share one of 64.
        assert!(!Owned::new([256, 128], 2, 3, |_| 2.0).is_exact(Q2K));
        assert!(!Owned::new([64, 32], 2, 3, |_| 2.0).is_exact(Q2_0));
    }

    #[test]
    fn int6_and_int5() {
        let six = Owned::new([512, 512], 6, 63, |_| 32.0);
        assert_eq!(six.exact()[..2], [Q6K, Q8_0]);
        assert_eq!(Owned::new([256, 256], 5, 31, |_| 16.0).exact()[0], Q6K);
        // A scale for every 16 weights.
        let mut weight = Owned::new([512, 16], 6, 63, |_| 32.0);
        let (mut dice, unit) = (Dice(5), f16::from_f32(0.003).to_f32());
        weight.scale.fill_with(|| unit * (1 + dice.below(127)) as f32);
        assert_eq!(weight.exact()[0], Q6K);
        assert!(!Owned::new([256, 256], 7, 127, |_| 64.0).is_exact(Q6K));
    }

    #[test]
    fn half_integer_zeros_are_odd_multiples() {
        let seq = |shape| Owned::new(shape, 2, 3, |_| 1.5);
        assert_eq!(seq([128, 32]).exact()[..2], [Q4_0, Q8_0]);
        assert_eq!(seq([512, 512]).exact()[0], Q2K);
        assert_eq!(seq([512, 256]).exact()[0], Q2K);
    }

    #[test]
    fn ternary() {
        assert_eq!(Owned::new([256, 256], 2, 2, |_| 1.0).exact()[..2], [Tq2_0, Q2_0]);
        assert_eq!(Owned::new([64, 64], 2, 2, |_| 1.0).exact()[0], Q2_0);
        assert!(!Owned::new([256, 256], 2, 3, |_| 1.0).is_exact(Tq2_0), "a fourth level");
    }

    #[test]
    fn scales_trained_on_two_levels() {
        let mut weight = Owned::new([512, 32], 2, 3, |_| 2.0);
        let (mut dice, unit) = (Dice(3), 0.01_f32);
        let unit = f16::from_f32(unit).to_f32();
        weight.scale.fill_with(|| unit * (1 + dice.below(7)) as f32);
        assert_eq!(weight.exact()[0], Q2K);
        weight.codes.iter_mut().for_each(|code| *code = 3 - *code);
        weight.zero.fill(1.0);
        assert!(weight.is_exact(Q2K) && weight.is_exact(Q3K));
    }

    #[test]
    fn zeros_need_no_scale() {
        let mut weight = Owned::new([256, 256], 2, 0, |_| 0.0);
        weight.scale.fill(0.1); // no f16
        let kinds = weight.exact();
        assert!([Tq2_0, Q2_0, Q3K, Q4_0, Q8_0, F16, Bf16].iter().all(|kind| kinds.contains(kind)));
    }

    #[test]
    fn what_is_not_exact_is_refused_in_words() {
        let mut weight = Owned::new([96, 32], 4, 15, |_| 8.0);
        weight.scale[3] = 0.1;
        for kind in BlockType::ALL {
            assert_eq!(weight.is_exact(kind), kind == F32, "{kind}");
        }
        let refusal = encode(&weight.view(), Q4_0).unwrap_err();
        assert!(refusal.to_string().contains("row 1, columns from 0: scale 1e-1"), "{refusal}");
        let refusal = encode(&weight.view(), Q2_0).unwrap_err();
        assert!(refusal.to_string().contains("rows of 96"), "{refusal}");
        // A scale whose half is no f16: the smallest subnormal one.
        let mut weight = Owned::new([32, 32], 2, 3, |_| 1.5);
        weight.scale.fill(5.960_464_5e-8);
        assert!(!weight.is_exact(Q4_0));
        weight.scale.fill(2.0 * 5.960_464_5e-8);
        assert!(weight.is_exact(Q4_0));
    }

    #[test]
    fn dense_values() {
        let values = [1.0, -0.5, 65504.0];
        for kind in [F32, F16] {
            assert_eq!(decode(kind, &encode_dense(&values, kind).unwrap()).unwrap(), values);
        }
        assert!(encode_dense(&values, Bf16).is_err());
        assert!(encode_dense(&[1e5], F16).is_err());
        assert!(encode_dense(&[1e38, 3.0], Bf16).is_err());
        assert_eq!(decode(Bf16, &encode_dense(&[3.0], Bf16).unwrap()).unwrap(), [3.0]);
        assert!(encode_dense(&values, Q4_0).is_err());
    }
}
