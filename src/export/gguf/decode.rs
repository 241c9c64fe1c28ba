//! What a reader makes of a block: the check of [`super::blocks`], which shares nothing with it.
//!
//! Each type is one function from a block and an index to a weight, written down from the layout;
//! slow, and with nothing clever in it that could be wrong in the same way as the encoder.

use half::{bf16, f16};

use super::types::BlockType;
use crate::error::{Error, Result};

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
    };
    let blocks = bytes.chunks_exact(kind.block_bytes());
    Ok(blocks.flat_map(|block| (0..kind.block_len()).map(move |i| weight(block, i))).collect())
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
    let (scales, j) = (&block[96..108], i / 16);
    let low = if j < 8 { scales[j] & 0x0f } else { scales[j - 8] >> 4 };
    let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
    let scale = i16::from(low) + 16 * i16::from(high) - 32;
    half_at(block, 108) * f32::from(scale) * f32::from(code)
}

/// d, dmin, 12 bytes of six-bit scales and minima, 128 of codes.
fn q4_k(block: &[u8], i: usize) -> f32 {
    let (packed, j) = (&block[4..16], i / 32);
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let nibbles = packed[j + 4];
        ((nibbles & 0x0f) + 16 * (packed[j - 4] >> 6), (nibbles >> 4) + 16 * (packed[j] >> 6))
    };
    let code = nibble(&block[16 + 32 * (i / 64)..], i % 64, 64);
    half_at(block, 0) * f32::from(scale) * code - half_at(block, 2) * f32::from(min)
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn half_a_block_is_refused() {
        assert!(decode(BlockType::Q4_0, &[0; 17]).unwrap_err().to_string().contains("18"));
    }
}
