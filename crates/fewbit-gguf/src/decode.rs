//! What a reader makes of a block: the check of [`crate::blocks`], which shares nothing with it.
//!
//! Each type is one function from a block and an index to a weight, written down from the layout;
//! slow, and with nothing clever in it that could be wrong in the same way as the encoder.

// Levels either are the weights or are not.
#![allow(clippy::float_cmp)]

use half::{bf16, f16};

use crate::error::{Error, Result};
use crate::types::BlockType;

/// The weights of whole blocks of `kind`, in order.
///
/// # Errors
/// When `bytes` are no whole number of blocks.
pub fn decode(kind: BlockType, bytes: &[u8]) -> Result<Vec<f32>> {
    if !bytes.len().is_multiple_of(kind.block_bytes()) {
        return Err(Error::failed(format!(
            "{} bytes are no whole blocks of {} ({kind})",
            bytes.len(),
            kind.block_bytes()
        )));
    }
    let weight = match kind {
        BlockType::F32 => |b: &[u8], _| f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        BlockType::F16 => |b: &[u8], _| half_at(b, 0),
        BlockType::Bf16 => |b: &[u8], _| bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        BlockType::Q4_0 => |b: &[u8], i| half_at(b, 0) * (nibble(&b[2..], i, 32) - 8.0),
        BlockType::Q4_1 => |b: &[u8], i| half_at(b, 0) * nibble(&b[4..], i, 32) + half_at(b, 2),
        BlockType::Q8_0 => |b: &[u8], i: usize| half_at(b, 0) * f32::from(b[2 + i].cast_signed()),
        BlockType::Q2_0 => {
            |b: &[u8], i| half_at(b, 0) * (f32::from(b[2 + i / 4] >> (2 * (i % 4)) & 3) - 1.0)
        }
        BlockType::Tq2_0 => |b: &[u8], i| half_at(b, 64) * (f32::from(quarter(b, i)) - 1.0),
        BlockType::Q2K => q2_k,
        BlockType::Q3K => q3_k,
        BlockType::Q4K => q4_k,
        BlockType::Q1_0 => {
            |b: &[u8], i| if bit(&b[2..], i) == 1 { half_at(b, 0) } else { -half_at(b, 0) }
        }
        BlockType::Tq1_0 => |b: &[u8], i| half_at(b, 52) * (f32::from(third(b, i)) - 1.0),
        BlockType::Mxfp4 => {
            |b: &[u8], i| half_power(b[0]) * FOUR_BIT_FLOATS[nibble(&b[1..], i, 32) as usize]
        }
        BlockType::Iq4Nl => {
            |b: &[u8], i| half_at(b, 0) * UNEVEN_LEVELS[nibble(&b[2..], i, 32) as usize]
        }
        BlockType::Iq4Xs => iq4_xs,
        BlockType::Q5_0 => |b: &[u8], i| half_at(b, 0) * (five_bits(&b[2..], i) - 16.0),
        BlockType::Q5_1 => |b: &[u8], i| half_at(b, 0) * five_bits(&b[4..], i) + half_at(b, 2),
        BlockType::Q5K => q5_k,
        BlockType::Q6K => q6_k,
    };
    let blocks = bytes.chunks_exact(kind.block_bytes());
    Ok(blocks.flat_map(|block| (0..kind.block_len()).map(move |i| weight(block, i))).collect())
}

/// Codes and grid of a tensor, `scale * (code - zero)` in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Levels {
    /// Width of a code.
    pub bits: u8,
    /// Weights that share a scale and a zero point, neighbours in a row.
    pub group_len: usize,
    /// One for each weight.
    pub codes: Vec<u8>,
    /// One for each group, above 0.
    pub scale: Vec<f32>,
    /// One for each group, in units of a code; not whole where the file says an offset.
    pub zero: Vec<f32>,
}

/// The codes of blocks of `kind` whose levels are evenly spaced: the same weights as [`decode`]'s, or
/// `None` where the levels are not, or an offset is no exact multiple of its scale.
///
/// # Errors
/// As [`decode`].
pub fn decode_levels(kind: BlockType, bytes: &[u8]) -> Result<Option<Levels>> {
    let values = decode(kind, bytes)?;
    let Some((bits, group_len, grid)) = grid_of(kind) else { return Ok(None) };
    let top = f32::from((1_u16 << bits) - 1);
    let parts = kind.block_len() / group_len;
    let blocks = bytes.chunks_exact(kind.block_bytes());
    let grids = blocks.flat_map(|block| (0..parts).map(move |part| grid(block, part)));
    let mut levels = Levels {
        bits,
        group_len,
        codes: Vec::with_capacity(values.len()),
        scale: Vec::with_capacity(values.len() / group_len),
        zero: Vec::with_capacity(values.len() / group_len),
    };
    for ((scale, zero), values) in grids.zip(values.chunks_exact(group_len)) {
        // A group of nothing but zeros may have any scale; levels may be counted from the other end.
        let (scale, zero) = match scale {
            0.0 => (1.0, (top / 2.0).floor()),
            scale if scale < 0.0 => (-scale, top - zero),
            scale => (scale, zero),
        };
        for value in values {
            let code = (value / scale + zero).round();
            if !(0.0..=top).contains(&code) || scale * (code - zero) != *value {
                return Ok(None);
            }
            levels.codes.push(code as u8);
        }
        levels.scale.push(scale);
        levels.zero.push(zero);
    }
    Ok(Some(levels))
}

/// Scale and zero point of a part of a block.
type Grid = fn(&[u8], usize) -> (f32, f32);

/// Width of a code, weights of a group, and their grid.
fn grid_of(kind: BlockType) -> Option<(u8, usize, Grid)> {
    /// From a scale and what is subtracted.
    fn shifted(scale: f32, offset: f32) -> (f32, f32) {
        (scale, offset / scale)
    }
    Some(match kind {
        BlockType::Q4_0 => (4, 32, |b, _| (half_at(b, 0), 8.0)),
        BlockType::Q5_0 => (5, 32, |b, _| (half_at(b, 0), 16.0)),
        BlockType::Q8_0 => (8, 32, |b, _| (half_at(b, 0), 128.0)),
        BlockType::Q2_0 => (2, 64, |b, _| (half_at(b, 0), 1.0)),
        BlockType::Tq2_0 => (2, 256, |b, _| (half_at(b, 64), 1.0)),
        BlockType::Tq1_0 => (2, 256, |b, _| (half_at(b, 52), 1.0)),
        BlockType::Q1_0 => (1, 128, |b, _| (2.0 * half_at(b, 0), 0.5)),
        BlockType::Q4_1 => (4, 32, |b, _| shifted(half_at(b, 0), -half_at(b, 2))),
        BlockType::Q5_1 => (5, 32, |b, _| shifted(half_at(b, 0), -half_at(b, 2))),
        BlockType::Q2K => (2, 16, |b, part| {
            let (scale, min) = (f32::from(b[part] & 0x0f), f32::from(b[part] >> 4));
            shifted(half_at(b, 80) * scale, half_at(b, 82) * min)
        }),
        BlockType::Q3K => (3, 16, |b, part| (half_at(b, 108) * q3_scale(b, part), 4.0)),
        BlockType::Q4K | BlockType::Q5K => {
            let bits = if kind == BlockType::Q4K { 4 } else { 5 };
            (bits, 32, |b, part| {
                let (scale, min) = scale_and_min(&b[4..16], part);
                shifted(half_at(b, 0) * scale, half_at(b, 2) * min)
            })
        }
        BlockType::Q6K => {
            (6, 16, |b, part| (half_at(b, 208) * f32::from(b[192 + part].cast_signed()), 32.0))
        }
        BlockType::F32
        | BlockType::F16
        | BlockType::Bf16
        | BlockType::Mxfp4
        | BlockType::Iq4Nl
        | BlockType::Iq4Xs => return None,
    })
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Of `len` weights the first half lies in the low nibbles, the second in the high ones.
fn nibble(codes: &[u8], i: usize, len: usize) -> f32 {
    let half = len / 2;
    f32::from(if i < half { codes[i] & 0x0f } else { codes[i - half] >> 4 })
}

/// Two bits of weight `i`: each 32 bytes carry 128 weights, 32 at a time from the low bits up.
fn quarter(codes: &[u8], i: usize) -> u8 {
    let (half, within) = (i / 128, i % 128);
    codes[32 * half + within % 32] >> (2 * (within / 32)) & 3
}

/// 16 bytes of scale and minimum nibbles, 64 of codes, d, dmin.
fn q2_k(block: &[u8], i: usize) -> f32 {
    let part = block[i / 16];
    let (scale, min) = (f32::from(part & 0x0f), f32::from(part >> 4));
    let code = f32::from(quarter(&block[16..80], i));
    half_at(block, 80) * scale * code - half_at(block, 82) * min
}

/// 32 bytes of third bits, 64 of low bits, 12 of scales, d.
fn q3_k(block: &[u8], i: usize) -> f32 {
    let third = block[i % 32] >> (i / 32) & 1;
    let code = i16::from(quarter(&block[32..96], i)) + 4 * i16::from(third) - 4;
    half_at(block, 108) * q3_scale(block, i / 16) * f32::from(code)
}

/// Six-bit signed scale of part `j` of a Q3_K block.
fn q3_scale(block: &[u8], j: usize) -> f32 {
    let scales = &block[96..108];
    let low = if j < 8 { scales[j] & 0x0f } else { scales[j - 8] >> 4 };
    let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    f32::from(i16::from(low) + 16 * i16::from(high) - 32)
}

/// d, dmin, 12 bytes of six-bit scales and minima, 128 of codes.
fn q4_k(block: &[u8], i: usize) -> f32 {
    let (scale, min) = scale_and_min(&block[4..16], i / 32);
    let code = nibble(&block[16 + 32 * (i / 64)..], i % 64, 64);
    half_at(block, 0) * scale * code - half_at(block, 2) * min
}

/// As [`q4_k`], with 32 bytes of fifth bits in front of the codes.
fn q5_k(block: &[u8], i: usize) -> f32 {
    let (scale, min) = scale_and_min(&block[4..16], i / 32);
    let fifth = f32::from(block[16 + i % 32] >> (i / 32) & 1);
    let code = nibble(&block[48 + 32 * (i / 64)..], i % 64, 64) + 16.0 * fifth;
    half_at(block, 0) * scale * code - half_at(block, 2) * min
}

/// Six-bit scale and minimum of part `j`.
fn scale_and_min(packed: &[u8], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let nibbles = packed[j + 4];
        ((nibbles & 0x0f) + 16 * (packed[j - 4] >> 6), (nibbles >> 4) + 16 * (packed[j] >> 6))
    };
    (f32::from(scale), f32::from(min))
}

/// 128 bytes of low bits, 64 of upper ones, 16 of signed scales, d.
fn q6_k(block: &[u8], i: usize) -> f32 {
    let low = nibble(&block[64 * (i / 128)..], i % 128, 128);
    let code = low + 16.0 * f32::from(quarter(&block[128..192], i)) - 32.0;
    half_at(block, 208) * f32::from(block[192 + i / 16].cast_signed()) * code
}

/// d, two bytes of upper and four of lower scale bits, 128 of codes.
fn iq4_xs(block: &[u8], i: usize) -> f32 {
    let j = i / 32;
    let low = block[4 + j / 2] >> (4 * (j % 2)) & 0x0f;
    let high = block[2 + j / 4] >> (2 * (j % 4)) & 3;
    let scale = f32::from(low + 16 * high) - 32.0;
    half_at(block, 0) * scale * UNEVEN_LEVELS[nibble(&block[8 + 16 * j..], i % 32, 32) as usize]
}

/// Bit `i`, from the low end of the first byte.
fn bit(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 8] >> (i % 8) & 1
}

/// Four bytes of fifth bits, 16 of nibbles.
fn five_bits(codes: &[u8], i: usize) -> f32 {
    nibble(&codes[4..], i, 32) + 16.0 * f32::from(bit(codes, i))
}

/// A ternary digit of weight `i`. A byte is a fraction of 256 with five digits behind the point, and
/// weights a fixed distance apart share it: 32, then 16, then (four digits only) 4 bytes.
fn third(bytes: &[u8], i: usize) -> u8 {
    let (byte, place) = match i {
        0..160 => (bytes[i % 32], i / 32),
        160..240 => (bytes[32 + i % 16], (i - 160) / 16),
        _ => (bytes[48 + i % 4], (i - 240) / 4),
    };
    let fraction = (0..place).fold(byte, |fraction, _| fraction.wrapping_mul(3));
    (u16::from(fraction) * 3).to_le_bytes()[1]
}

/// Half of two to the power of `exponent - 127`, as [`FOUR_BIT_FLOATS`] are doubled.
fn half_power(exponent: u8) -> f32 {
    (f64::from(exponent) - 128.0).exp2() as f32
}

/// Twice the values of a float of one sign, two exponent and one mantissa bits.
const FOUR_BIT_FLOATS: [f32; 16] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];

/// ggml's levels for codes that lie closer together around zero.
const UNEVEN_LEVELS: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// Codes and grid of every type of even levels stand for the weights, whatever the block's bytes.
    #[test]
    fn levels_stand_for_the_weights() {
        let mut state = 1_u64;
        let mut dice = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            (state >> 33) as u8
        };
        for kind in BlockType::ALL {
            let mut bytes: Vec<u8> = (0..3 * kind.block_bytes()).map(|_| dice()).collect();
            // A scale that is a number, of either sign, and minima that are multiples of it.
            for (index, block) in bytes.chunks_exact_mut(kind.block_bytes()).enumerate() {
                let scale = if index == 1 { 0xb4_u8 } else { 0x34 };
                let (at, offset) = match kind {
                    BlockType::Q2K => (80, Some(82)),
                    BlockType::Q3K => (108, None),
                    BlockType::Q6K => (208, None),
                    BlockType::Tq2_0 => (64, None),
                    BlockType::Tq1_0 => (52, None),
                    BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => {
                        (0, Some(2))
                    }
                    _ => (0, None),
                };
                for at in std::iter::once(at).chain(offset) {
                    (block[at], block[at + 1]) = (0, scale);
                }
                // Multiples of a part's scale: every scale is 1.
                match kind {
                    BlockType::Q2K => {
                        block[..16].iter_mut().for_each(|part| *part = *part & 0xf0 | 1);
                    }
                    BlockType::Q4K | BlockType::Q5K => {
                        block[4..8].fill(1);
                        block[12..16].iter_mut().for_each(|part| *part = *part & 0xf0 | 1);
                    }
                    _ => {}
                }
            }
            let Some(levels) = decode_levels(kind, &bytes).unwrap() else {
                let uneven = [BlockType::Mxfp4, BlockType::Iq4Nl, BlockType::Iq4Xs];
                assert!(kind.block_len() == 1 || uneven.contains(&kind), "{kind}");
                continue;
            };
            let values = decode(kind, &bytes).unwrap();
            assert_eq!(levels.codes.len(), values.len());
            for (at, value) in values.iter().enumerate() {
                let group = at / levels.group_len;
                let weight =
                    levels.scale[group] * (f32::from(levels.codes[at]) - levels.zero[group]);
                assert!(weight == *value && levels.scale[group] > 0.0, "{kind}, {at}");
                assert!(u16::from(levels.codes[at]) < 1 << levels.bits);
            }
        }
        // Offsets that are no exact multiples of their scales, of which rounding hides some.
        let inexact = (0..=255).filter(|low| {
            let mut block: Vec<u8> = (0..20).map(|i| i * 13).collect();
            (block[0], block[1], block[2], block[3]) = (*low, 0x35, 0x33, 0x33);
            decode_levels(BlockType::Q4_1, &block).unwrap().is_none()
        });
        assert!(inexact.count() > 100);
    }

    /// Bytes worked out by hand from the published layouts.
    #[test]
    fn hand_made_blocks() {
        let one = [0x00, 0x3c];
        let mut q4 = [one.as_slice(), &[0x88; 16]].concat();
        q4[2] = 0xf0; // weight 0: code 0, weight 16: code 15
        let q4 = decode(BlockType::Q4_0, &q4).unwrap();
        assert_eq!((q4[0], q4[1], q4[16], q4[31]), (-8.0, 0.0, 7.0, 0.0));
        let q2 = decode(BlockType::Q2_0, &[one.as_slice(), &[0b1110_0100; 16]].concat()).unwrap();
        assert_eq!(q2[..5], [-1.0, 0.0, 1.0, 2.0, -1.0]);
        let mut tq2 = vec![0b0101_0101; 64];
        tq2.extend(one);
        tq2[32] = 0b1001_0101; // weight 128 + 96: code 2
        let tq2 = decode(BlockType::Tq2_0, &tq2).unwrap();
        assert_eq!(tq2.iter().position(|w| *w > 0.0), Some(224));
        assert_eq!(tq2.iter().filter(|w| **w == 0.0).count(), 255);
        let mut q3 = vec![0; 110];
        (q3[108], q3[109]) = (0x00, 0x3c);
        q3[96 + 4] = 0x30; // part 12: low bits 3
        q3[96 + 8] = 0b1100_0000; // part 12: high bits 3, so 51 - 32 = 19
        q3[3] = 0b0100_0000; // weight 195: third bit
        q3[32 + 32 + 3] = 0b0011_0000; // weight 128 + 64 + 3: low bits 3
        let q3 = decode(BlockType::Q3K, &q3).unwrap();
        assert_eq!((q3[0], q3[194], q3[195]), (128.0, -76.0, 57.0));
        let mut q4k = vec![0; 144];
        (q4k[1], q4k[3]) = (0x3c, 0x3c);
        q4k[4 + 9] = 0x21; // part 5: low nibbles of scale 1, minimum 2
        q4k[4 + 1] = 0x40; // part 5: scale + 16
        q4k[4 + 5] = 0x80; // part 5: minimum + 32
        q4k[16 + 64] = 0x70; // weight 128 + 32: code 7
        let q4k = decode(BlockType::Q4K, &q4k).unwrap();
        assert_eq!((q4k[128], q4k[160], q4k[161]), (0.0, 85.0, -34.0));
    }

    /// As above, for the types that are only read.
    #[test]
    fn hand_made_blocks_of_others() {
        let one = [0x00, 0x3c];
        let block = |kind: BlockType, parts: &[&[u8]]| decode(kind, &parts.concat()).unwrap();
        let q1 = block(BlockType::Q1_0, &[&one, &[0b0000_0101; 16]]);
        assert_eq!((q1[..4].to_vec(), q1[122]), (vec![1.0, -1.0, 1.0, -1.0], 1.0));
        let mut q5 = [[0_u8; 4].as_slice(), &[0; 16]].concat();
        q5[2] = 0b0000_0010; // weight 17: fifth bit
        q5[4 + 1] = 0x3f; // weight 1: 15, weight 17: 3
        let q5_0 = block(BlockType::Q5_0, &[&one, &q5]);
        assert_eq!((q5_0[0], q5_0[1], q5_0[17]), (-16.0, -1.0, 3.0));
        let q5_1 = block(BlockType::Q5_1, &[&one, &[0x00, 0xc0], &q5]);
        assert_eq!((q5_1[0], q5_1[1], q5_1[17]), (-2.0, 13.0, 17.0));
        // 3^-1 + 3^-5 is 82/243: digits 1 0 0 0 1, and 256 times it, rounded up, is 87.
        let mut tq1 = [0_u8; 54];
        (tq1[3], tq1[32 + 3], tq1[48 + 3]) = (87, 87, 87);
        (tq1[52], tq1[53]) = (0x00, 0x3c);
        let tq1 = block(BlockType::Tq1_0, &[&tq1]);
        let ones: Vec<usize> = (0..256).filter(|i| tq1[*i] == 0.0).collect();
        assert_eq!(ones, [3, 128 + 3, 160 + 3, 224 + 3, 240 + 3]);
        assert!(tq1.iter().all(|w| *w <= 0.0));
        let four = block(BlockType::Mxfp4, &[&[129], &[0xf3; 16]]);
        assert_eq!((four[0], four[16]), (6.0, -24.0));
        assert_eq!(block(BlockType::Mxfp4, &[&[0], &[0x02; 16]])[..1], [2.0_f32.powi(-127)]);
        let uneven = block(BlockType::Iq4Nl, &[&one, &[0x08; 16]]);
        assert_eq!((uneven[0], uneven[16]), (1.0, -127.0));
    }

    #[test]
    fn hand_made_long_blocks_of_others() {
        let mut q5 = vec![0; 176];
        (q5[1], q5[3]) = (0x3c, 0x3c);
        q5[4 + 9] = 0x21; // part 5: low nibbles of scale 1, minimum 2
        q5[16] = 0b0010_0000; // weight 160: fifth bit
        q5[48 + 64] = 0x70; // weight 160: low bits 7
        let q5 = decode(BlockType::Q5K, &q5).unwrap();
        assert_eq!((q5[128], q5[160], q5[161]), (0.0, 21.0, -2.0));
        let mut q6 = vec![0; 210];
        (q6[208], q6[209]) = (0x00, 0x3c);
        q6[192 + 12] = 0xfe; // part 12: scale -2
        q6[64 + 3] = 0x50; // weight 128 + 64 + 3: low bits 5
        q6[128 + 32 + 3] = 0b0011_0000; // the same: upper bits 3
        let q6 = decode(BlockType::Q6K, &q6).unwrap();
        assert_eq!((q6[0], q6[194], q6[195]), (-0.0, 64.0, -42.0));
        let mut uneven = vec![0; 136];
        uneven[1] = 0x3c;
        uneven[2 + 1] = 0b0000_1000; // part 5: upper bits 2
        uneven[4 + 2] = 0x30; // part 5: low bits 3, so 35 - 32 = 3
        uneven[8 + 80] = 0x9f; // weights 160 and 176: levels 15 and 9
        let uneven = decode(BlockType::Iq4Xs, &uneven).unwrap();
        assert_eq!((uneven[0], uneven[160], uneven[176]), (4064.0, 339.0, 39.0));
    }

    #[test]
    fn half_a_block_is_refused() {
        assert!(decode(BlockType::Q4_0, &[0; 17]).unwrap_err().to_string().contains("18"));
    }
}
