//! AdamW in place with moments of 8 bits: a block is decoded, updated and encoded at a time.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::adamw::{AdamW, step_chunk};
use super::parallel;
use crate::ops::dynamic::{Map, SIGNED, UNSIGNED, ZERO};
use crate::ops::moments::BLOCK;
use crate::ops::vector::{Level, at};

/// Entries that one thread takes at a time; whole blocks.
const CHUNK: usize = 64 * BLOCK;

/// One step, the rate multiplied by the entry of `units` that belongs to a parameter's group; groups are
/// equal runs of parameters. Codes and scales are those of the gradient's mean and of its square's.
pub(crate) fn step(
    adamw: AdamW,
    units: &[f32],
    parameter: &mut [f32],
    gradient: &[f32],
    codes: [&mut [u8]; 2],
    scales: [&mut [f32]; 2],
) {
    step_at(Level::best(), adamw, units, parameter, gradient, (codes, scales));
}

fn step_at(
    level: Level,
    adamw: AdamW,
    units: &[f32],
    parameter: &mut [f32],
    gradient: &[f32],
    ([m, v], [m_scale, v_scale]): ([&mut [u8]; 2], [&mut [f32]; 2]),
) {
    let group = (parameter.len() / units.len().max(1)).max(1);
    let units = Units { adamw, of_groups: units, group };
    let maps = [&*SIGNED, &*UNSIGNED];
    let blocks = CHUNK / BLOCK;
    if !parallel(parameter.len()) {
        let codes = m.chunks_mut(CHUNK).zip(v.chunks_mut(CHUNK));
        let scales = m_scale.chunks_mut(blocks).zip(v_scale.chunks_mut(blocks));
        let both = parameter.chunks_mut(CHUNK).zip(gradient.chunks(CHUNK));
        for (i, ((codes, scales), both)) in codes.zip(scales).zip(both).enumerate() {
            at!(level, step_chunk_of(&units, i * CHUNK, both, codes, scales, maps));
        }
        return;
    }
    let codes = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    let scales = m_scale.par_chunks_mut(blocks).zip(v_scale.par_chunks_mut(blocks));
    let both = parameter.par_chunks_mut(CHUNK).zip(gradient.par_chunks(CHUNK));
    codes.zip(scales).zip(both).enumerate().for_each(|(i, ((codes, scales), both))| {
        at!(level, step_chunk_of(&units, i * CHUNK, both, codes, scales, maps));
    });
}

/// A step whose rate is in units of each group.
struct Units<'a> {
    adamw: AdamW,
    of_groups: &'a [f32],
    /// Parameters in a group.
    group: usize,
}

/// Whole blocks, of which the first begins at entry `start` of the parameter.
#[inline(always)]
fn step_chunk_of(
    units: &Units<'_>,
    start: usize,
    (parameter, gradient): (&mut [f32], &[f32]),
    (m_codes, v_codes): (&mut [u8], &mut [u8]),
    (m_scales, v_scales): (&mut [f32], &mut [f32]),
    [signed, unsigned]: [&Map; 2],
) {
    let codes = m_codes.chunks_mut(BLOCK).zip(v_codes.chunks_mut(BLOCK));
    let scales = m_scales.iter_mut().zip(v_scales);
    let both = parameter.chunks_mut(BLOCK).zip(gradient.chunks(BLOCK));
    for (i, ((codes, scales), (p, g))) in codes.zip(scales).zip(both).enumerate() {
        let (mut m, mut v) = ([0.0f32; BLOCK], [0.0f32; BLOCK]);
        let (m, v) = (&mut m[..p.len()], &mut v[..p.len()]);
        decode(m, codes.0, *scales.0, signed);
        decode(v, codes.1, *scales.1, unsigned);
        let (start, mut done) = (start + i * BLOCK, 0);
        while done < p.len() {
            let group = (start + done) / units.group;
            let end = ((group + 1) * units.group - start).min(p.len());
            let part = done..end;
            let adamw = AdamW { rate: units.adamw.rate * units.of_groups[group], ..units.adamw };
            let means = (&mut m[part.clone()], &mut v[part.clone()]);
            step_chunk(adamw, &mut p[part.clone()], &g[part], means.0, means.1);
            done = end;
        }
        *scales.0 = scale(m);
        *scales.1 = scale(v);
        encode_signed(codes.0, m, *scales.0, signed);
        encode_unsigned(codes.1, v, *scales.1, unsigned);
    }
}

#[inline(always)]
fn decode(values: &mut [f32], codes: &[u8], scale: f32, map: &Map) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = map.values[usize::from(*code)] * scale;
    }
}

/// The largest magnitude, finite.
#[inline(always)]
fn scale(values: &[f32]) -> f32 {
    let mut lanes = [0.0f32; crate::ops::vector::LANES];
    for chunk in values.chunks(lanes.len()) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if value.abs() > *lane { value.abs() } else { *lane };
        }
    }
    lanes.iter().fold(0.0f32, |a, b| a.max(*b)).min(f32::MAX)
}

/// What values are divided by; nothing changes in a block of zeros.
#[inline(always)]
fn divisor(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { scale }
}

#[inline(always)]
fn encode_signed(codes: &mut [u8], values: &[f32], scale: f32, map: &Map) {
    let divisor = divisor(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        let k = map.magnitude((value.abs() / divisor).min(1.0));
        *code = if *value < 0.0 { ZERO - k.min(ZERO) } else { ZERO + k };
    }
}

/// A mean of squares that is not 0 does not become 0: the first moment would be divided by nothing.
#[inline(always)]
fn encode_unsigned(codes: &mut [u8], values: &[f32], scale: f32, map: &Map) {
    let divisor = divisor(scale);
    for (code, value) in codes.iter_mut().zip(values) {
        let k = map.magnitude((*value / divisor).min(1.0));
        *code = k.max(u8::from(*value > 0.0));
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits, noise};
    use super::*;

    /// Parameter, codes and scales after three steps.
    fn trained(level: Level, len: usize, groups: usize) -> (Vec<u32>, [Vec<u8>; 2], Vec<u32>) {
        let mut parameter = noise(len, 0.2, 0.5);
        let mut codes = [vec![ZERO; len], vec![0; len]];
        let mut scales = [(); 2].map(|()| vec![0.0; len.div_ceil(BLOCK)]);
        let units: Vec<f32> = (0..groups).map(|g| [0.5, 2.0, 0.3][g % 3]).collect();
        for i in 1..=3u8 {
            let size = [0.1, 1e-25, 50.0][usize::from(i) - 1];
            let mut gradient = noise(len, f32::from(i), size);
            gradient.iter_mut().step_by(5).for_each(|g| *g = 0.0);
            let adamw = AdamW {
                shrink: 0.7,
                beta1: 0.9,
                beta2: 0.95,
                new: [0.1, 0.05],
                epsilon: 1e-8,
                rate: 0.01 / (1.0 - 0.9f32.powi(i.into())),
                correction2: 1.0 / (1.0 - 0.95f32.powi(i.into())),
                keep: 0.999,
            };
            let (codes, scales) = (codes.each_mut(), scales.each_mut());
            let state = (codes.map(Vec::as_mut_slice), scales.map(Vec::as_mut_slice));
            step_at(level, adamw, &units, &mut parameter, &gradient, state);
        }
        (bits(&parameter), codes, bits(&scales.concat()))
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for (len, groups) in [(1, 1), (255, 1), (257, 1), (4_096, 64), (33_001, 1), (98_304, 1_024)]
        {
            assert_same(&format!("{len} entries"), |level| trained(level, len, groups));
        }
    }
}
