//! Packed codes to weights: a unit for each weight, nothing uploaded.

use burn::tensor::{Int, Tensor};
use burn_cubecl::cubecl;
use cubecl::prelude::*;

use super::{by_element, contiguous, empty, launch};
use crate::ops::bridge::{Plain, tensor};

/// What becomes of a code.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(in crate::ops) enum Decoded {
    /// Itself.
    Codes,
    /// `scale * (code - shift)`.
    Uniform,
    /// `±scale_0 ± scale_1 ... + shift`; bit `i` of a code is the sign of `scale_i`.
    BinaryCoding,
}

const CODES: u32 = 0;
const UNIFORM: u32 = 1;

impl Decoded {
    /// As kernels are compiled for it.
    pub(super) fn kind(self) -> u32 {
        match self {
            Self::Codes => CODES,
            Self::Uniform => UNIFORM,
            Self::BinaryCoding => 2,
        }
    }
}

/// What packed codes stand for, row-major.
///
/// # Shapes
/// - words: `[rows, words per row]`, of 32 bits, codes of `bits` as [`bits`](crate::ops::bits) says
/// - scale: `[groups, 1]` or `[groups, bits]`, shift: `[groups, 1]`
/// - result: `[rows, columns]`
pub(in crate::ops) fn decode(
    words: Tensor<2, Int>,
    [rows, columns]: [usize; 2],
    bits: u8,
    decoded: Decoded,
    [scale, shift]: [Plain; 2],
) -> Plain {
    let [groups, _] = tensor::<2>(shift.clone()).dims();
    let [_, stride] = words.dims();
    let (len, bits) = (rows * columns, u32::from(bits));
    let inputs = [words.into_dispatch(), scale, shift];
    let [out] = launch("fewbit_decode", inputs, [vec![rows, columns]], move |inputs| {
        let [words, scale, shift] = contiguous(inputs);
        let out = empty(&scale, [rows, columns]);
        let (count, dim) = by_element(&out, len);
        decode_kernel::launch(
            &out.client,
            count,
            dim,
            words.into_buffer_arg(),
            scale.into_buffer_arg(),
            shift.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            columns,
            stride,
            len / groups,
            bits,
            decoded.kind(),
        );
        [out]
    });
    out
}

#[cube(launch)]
fn decode_kernel(
    words: &[u32],
    scale: &[f32],
    shift: &[f32],
    out: &mut [f32],
    columns: usize,
    stride: usize,
    group_len: usize,
    #[comptime] bits: u32,
    #[comptime] kind: u32,
) {
    let at = ABSOLUTE_POS as usize;
    if at >= out.len() {
        terminate!();
    }
    let bit = (at % columns) * comptime!(bits as usize);
    let code = code_at(words, (at / columns) * stride, bit, bits);
    let group = at / group_len;
    let scales = scales_of(scale, group, bits, kind);
    out[at] = value(code, &scales, shift[group], bits, kind);
}

/// The code that begins so many bits behind the first of a word.
#[cube]
pub(super) fn code_at(words: &[u32], word: usize, bit: usize, #[comptime] bits: u32) -> u32 {
    let word = word + bit / 32;
    let from = (bit % 32) as u32;
    let mut code = words[word] >> from;
    // A code may straddle two words.
    if from + bits > 32u32 {
        code |= words[word + 1] << (32u32 - from);
    }
    code & comptime!((1u32 << bits) - 1)
}

/// The scales of a group: one, or one for each plane.
#[cube]
pub(super) fn scales_of(
    scale: &[f32],
    group: usize,
    #[comptime] bits: u32,
    #[comptime] kind: u32,
) -> Array<f32> {
    let count = comptime!(if kind == CODES || kind == UNIFORM { 1 } else { bits as usize });
    let mut scales = Array::<f32>::new(count);
    #[unroll]
    for i in 0..count {
        scales[i] = scale[group * count + i];
    }
    scales
}

/// What a code stands for.
#[cube]
pub(super) fn value(
    code: u32,
    scales: &Array<f32>,
    shift: f32,
    #[comptime] bits: u32,
    #[comptime] kind: u32,
) -> f32 {
    if comptime!(kind == CODES) {
        f32::cast_from(code)
    } else if comptime!(kind == UNIFORM) {
        scales[0] * (f32::cast_from(code) - shift)
    } else {
        let mut value = shift;
        #[unroll]
        for plane in 0..comptime!(bits as usize) {
            let set = (code >> (plane as u32)) & 1u32;
            value += select(set == 1u32, scales[plane], -scales[plane]);
        }
        value
    }
}
