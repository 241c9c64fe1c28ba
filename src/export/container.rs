//! Grids in the place of others: the same weights, bit for bit, under codes that a format has.
//!
//! Two rewritings keep every value. Codes may be wider than the grid needs, shifted together with
//! their zero points; a zero point between two codes becomes a code when both are doubled and the
//! scale halved. And a uniform grid is binary coding with scales that double from plane to plane,
//! exact in f32 as long as scales have few digits.

use super::matrix::{Affine, Planes};
use super::plan::{self, Target};
use crate::quant::{Bits, ZeroKind, bcq};

/// A weight on a uniform grid under other codes.
#[derive(Clone, Debug)]
pub struct Container {
    bits: u8,
    codes: Vec<u8>,
    scale: Vec<f32>,
    zero: Vec<f32>,
}

impl Container {
    /// `weight` in the codes that `target` stores it in; `None` where those are its own, or where
    /// the format does not hold it ([`plan::refusal`] says why).
    pub fn new(target: Target, weight: &Affine<'_>) -> Option<Self> {
        let zeros = bounds(weight.zero);
        let bits = plan::stored_bits(target, weight.zero_kind, weight.bits, zeros)?;
        let doubled = plan::doubles(target, weight.zero_kind);
        if bits == weight.bits && !doubled {
            return None;
        }
        let factor: u8 = if doubled { 2 } else { 1 };
        let centred = is_centred(target, weight.zero_kind, weight.bits, zeros);
        let shift = |zero: f32| match target {
            Target::Mlx => 0.0,
            _ if centred => middle(bits) - zero,
            _ => (-zero).max(0.0),
        };
        let scale = weight.scale.iter().map(|scale| scale / f32::from(factor)).collect();
        let (mut codes, mut zeros) = (Vec::with_capacity(weight.codes.len()), Vec::new());
        for (group, zero) in weight.codes.chunks_exact(weight.group_len).zip(weight.zero) {
            let zero = zero * f32::from(factor);
            let shift = shift(zero);
            zeros.push(zero + shift);
            codes.extend(group.iter().map(|code| code * factor + shift as u8));
        }
        Some(Self { bits, codes, scale, zero: zeros })
    }

    /// The weight that it stands for.
    pub fn affine<'a>(&'a self, weight: &Affine<'a>) -> Affine<'a> {
        let Self { bits, codes, scale, zero } = self;
        let half = zero.iter().any(|zero| zero.fract() != 0.0);
        let zero_kind = if half { weight.zero_kind } else { ZeroKind::Integer };
        Affine { bits: *bits, codes, scale, zero, zero_kind, ..*weight }
    }
}

/// The least and the greatest of zero points.
pub(super) fn bounds(zeros: &[f32]) -> (f32, f32) {
    let start = (f32::INFINITY, f32::NEG_INFINITY);
    zeros.iter().fold(start, |(low, high), zero| (low.min(*zero), high.max(*zero)))
}

/// The zero point of a symmetric grid as formats mean it.
pub(super) fn middle(bits: u8) -> f32 {
    f32::from(1_u8 << (bits - 1))
}

/// Whether `target` stores a grid of `bits` with zero points between `low` and `high` as a symmetric
/// one: its zero points are all in the middle, or its codes can be shifted until they are, which
/// wider codes leave room for. Runtimes are at their best with symmetric grids.
pub(super) fn is_centred(
    target: Target,
    kind: ZeroKind,
    bits: u8,
    (low, high): (f32, f32),
) -> bool {
    let Some(stored) = plan::stored_bits(target, kind, bits, (low, high)) else { return false };
    let doubled = plan::doubles(target, kind);
    let middle = middle(stored);
    if stored == bits && !doubled {
        return low.to_bits() == middle.to_bits() && high.to_bits() == middle.to_bits();
    }
    let factor = if doubled { 2.0 } else { 1.0 };
    let [top, end] = [bits, stored].map(|bits| f32::from(u8::MAX >> (8 - bits)));
    factor * high <= middle && factor * (top - low) + middle <= end
}

/// Whether two weights are the same number; formats do not tell the two zeros apart.
pub(super) fn same(a: f32, b: f32) -> bool {
    (a + 0.0).to_bits() == (b + 0.0).to_bits()
}

/// A uniform grid as sign planes: plane `i` of a group has the scale `scale * 2^(i-1)`, and the
/// offset is `scale * ((2^bits - 1) / 2 - zero)`.
#[derive(Clone, Debug)]
pub struct UniformPlanes {
    alpha: Vec<f32>,
    offset: Vec<f32>,
}

impl UniformPlanes {
    /// The planes of `weight`, with the number of groups in which a sum of f32 numbers is not the
    /// grid's level.
    pub fn new(weight: &Affine<'_>) -> (Self, usize) {
        let bits = Bits::new(weight.bits).unwrap_or(Bits::EIGHT);
        let (mut alpha, mut offset, mut changed) = (Vec::new(), Vec::new(), 0);
        for (scale, zero) in weight.scale.iter().zip(weight.zero) {
            let planes = bcq::from_uniform(&[], *scale, *zero, bits);
            let exact = |code: u8| {
                let level = scale * (f32::from(code) - zero);
                same(bcq::level(code, &planes.alpha, planes.offset), level)
            };
            changed += usize::from(!(0..=bits.max_code()).all(exact));
            alpha.extend(planes.alpha);
            offset.push(planes.offset);
        }
        (Self { alpha, offset }, changed)
    }

    /// The weight that they stand for.
    pub fn planes<'a>(&'a self, weight: &Affine<'a>) -> Planes<'a> {
        let Affine { out, inputs, group_len, bits, codes, .. } = *weight;
        Planes { out, inputs, group_len, bits, codes, alpha: &self.alpha, offset: &self.offset }
    }
}

#[cfg(test)]
mod tests {
    use super::super::matrix::sample::{Grid, grid};
    use super::*;

    fn bits_of(weights: &[f32]) -> Vec<u32> {
        weights.iter().map(|weight| (weight + 0.0).to_bits()).collect()
    }

    fn check(target: Target, grid: &Grid, width: u8) -> Container {
        let affine = grid.affine();
        let container = Container::new(target, &affine).unwrap();
        let stored = container.affine(&affine);
        stored.check("x").unwrap();
        assert_eq!(stored.bits, width);
        assert_eq!(bits_of(&stored.dequantize()), bits_of(&affine.dequantize()));
        container
    }

    #[test]
    fn half_steps_become_codes() {
        // SEQ's 2 bits, -1.5 to 1.5 steps: odd multiples of half a step around 8.
        let mut seq = grid([2, 32], 32, 2, ZeroKind::Half, false, 3);
        seq.zero.fill(1.5);
        seq.codes = [0, 1, 2, 3].repeat(16);
        for target in [Target::Gptq, Target::AutoRound, Target::Awq, Target::CompressedTensors] {
            let stored = check(target, &seq, 4);
            assert_eq!((&stored.codes[..4], stored.zero[0]), (&[5, 7, 9, 11][..], 8.0));
            assert!(stored.affine(&seq.affine()).is_centred());
        }
        assert!(Container::new(Target::Mlx, &seq.affine()).is_none());
        let off = Grid { zero: vec![0.5, -0.5], ..seq.clone() };
        let stored = check(Target::Gptq, &off, 4);
        assert_eq!((stored.codes[0], &stored.zero[..]), (7, &[8.0, 8.0][..]));
        let far = Grid { zero: vec![1.5, -3.5], ..seq.clone() };
        let stored = check(Target::Gptq, &far, 4);
        assert_eq!(stored.zero, [3.0, 0.0], "no room for a middle");
        let three = grid([2, 32], 32, 3, ZeroKind::Half, false, 5);
        check(Target::Gptq, &three, 4);
        let four = grid([2, 32], 32, 4, ZeroKind::Half, false, 6);
        check(Target::CompressedTensors, &four, 8);
        assert!(Container::new(Target::Awq, &four.affine()).is_none(), "needs 5 bits");
    }

    #[test]
    fn wider_codes_keep_the_weights() {
        for (bits, target, width) in
            [(2, Target::Awq, 4), (5, Target::Gptq, 8), (7, Target::Mlx, 8), (1, Target::Mlx, 2)]
        {
            let mut grid = grid([4, 32], 32, bits, ZeroKind::Integer, false, 9);
            let stored = check(target, &grid, width);
            // Three codes on either side of eight, for instance.
            let moved = target != Target::Mlx;
            assert_eq!(stored.affine(&grid.affine()).is_centred(), moved, "{bits} bits");
            grid.centre();
            let stored = check(target, &grid, width);
            assert_eq!(stored.affine(&grid.affine()).is_centred(), moved);
        }
        let mut beyond = grid([2, 32], 32, 4, ZeroKind::Integer, false, 9);
        beyond.zero = vec![-3.0, 20.0];
        let stored = check(Target::Gptq, &beyond, 8);
        assert_eq!(stored.zero, [128.0, 128.0]);
        assert!(Container::new(Target::Awq, &beyond.affine()).is_none());
        let plain = grid([2, 32], 32, 4, ZeroKind::Integer, false, 9);
        assert!(Container::new(Target::Awq, &plain.affine()).is_none(), "as it is");
    }

    #[test]
    fn a_uniform_grid_is_binary_coding() {
        for kind in [ZeroKind::Integer, ZeroKind::Half] {
            for bits in 1..=8 {
                let grid = grid([4, 64], 32, bits, kind, true, u32::from(bits));
                let affine = grid.affine();
                let (planes, changed) = UniformPlanes::new(&affine);
                assert_eq!(changed, 0, "{bits} bits");
                let planes = planes.planes(&affine);
                planes.check("x").unwrap();
                let groups = planes.codes.chunks(planes.group_len).enumerate();
                let weights: Vec<f32> = groups
                    .flat_map(|(group, codes)| {
                        let b = usize::from(bits);
                        let alpha = &planes.alpha[group * b..][..b];
                        codes.iter().map(move |code| bcq::level(*code, alpha, planes.offset[group]))
                    })
                    .collect();
                assert_eq!(bits_of(&weights), bits_of(&affine.dequantize()));
            }
        }
        // All digits of f32: sums round.
        let long = grid([8, 64], 32, 4, ZeroKind::Real, false, 1);
        assert!(UniformPlanes::new(&long.affine()).1 > 0);
    }
}
