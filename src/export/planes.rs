//! Sign planes: a uniform grid as planes whose scales double from one to the next, exact in f32 as long
//! as scales have few digits; and one set of planes for several precisions, of which the first planes of
//! each group are its greatest, and every precision below the full one has scales of its own, of least
//! squared error.

use std::borrow::Cow;

use super::coded::Coded;
use crate::error::{Error, Result};
use crate::quant::{Bits, bcq};

/// Whether two weights are the same number; formats do not tell the two zeros apart.
fn same(a: f32, b: f32) -> bool {
    (a + 0.0).to_bits() == (b + 0.0).to_bits()
}

/// A weight on a uniform grid as sign planes, and the number of groups in which a sum of f32 numbers
/// is not the grid's level. Plane `i` of a group has the scale `scale * 2^(i-1)`, and the offset is
/// `scale * ((2^bits - 1) / 2 - zero)`.
pub(super) fn of_uniform<'w>(weight: &'w Coded<'_>) -> (Coded<'w>, usize) {
    let bits = Bits::new(weight.bits).unwrap_or(Bits::EIGHT);
    let (mut alpha, mut offset, mut changed) = (Vec::new(), Vec::new(), 0);
    for (scale, zero) in weight.scale.iter().zip(&*weight.shift) {
        let planes = bcq::from_uniform(&[], *scale, *zero, bits);
        let exact = |code: u8| {
            let level = scale * (f32::from(code) - zero);
            same(bcq::level(code, &planes.alpha, planes.offset), level)
        };
        changed += usize::from(!(0..=bits.max_code()).all(exact));
        alpha.extend(planes.alpha);
        offset.push(planes.offset);
    }
    let (scale, shift) = (Cow::Owned(alpha), Cow::Owned(offset));
    (Coded { scale, shift, zero_kind: None, ..weight.view() }, changed)
}

/// `full` with its planes in descending order, behind what its first planes are at each of
/// `precisions`, ascending widths below its own.
///
/// # Errors
/// When a width is none of them, or the order of the planes changes a weight: scales are added in
/// f32, one after the other.
pub(super) fn precisions<'w>(
    name: &str,
    full: &Coded<'w>,
    precisions: &[u8],
) -> Result<Vec<Coded<'w>>> {
    let ascend = precisions.windows(2).all(|pair| pair[0] < pair[1]);
    if !ascend || precisions.iter().any(|bits| *bits == 0 || *bits >= full.bits) {
        return Err(Error::usage(format!(
            "precisions = {precisions:?} are no ascending widths below the {} planes of this weight",
            full.bits
        ))
        .at(name)
        .fix("widths from 1 to one less than the planes"));
    }
    let full_sorted = sorted(full);
    let exact = |(group, codes): (usize, &[u8])| {
        let old = |code| level(full, group, code);
        let new = |code| level(&full_sorted, group, code);
        let moved = &full_sorted.codes[group * full.group_len..];
        codes.iter().zip(moved).all(|(from, to)| same(old(*from), new(*to)))
    };
    let groups = full.codes.chunks_exact(full.group_len).enumerate();
    let changed = groups.filter(|group| !exact(*group)).count();
    if changed > 0 {
        return Err(Error::preflight(format!(
            "planes in descending order add up to other weights in {changed} groups, by a rounding"
        ))
        .at(name)
        .fix("quant.scales = \"f16\" in training, or format.bcq without precisions"));
    }
    let mut all = Vec::new();
    for bits in precisions {
        all.push(lower(&full_sorted, *bits)?);
    }
    all.push(full_sorted);
    Ok(all)
}

/// What `code` of a group stands for.
fn level(weight: &Coded<'_>, group: usize, code: u8) -> f32 {
    let planes = usize::from(weight.bits);
    bcq::level(code, &weight.scale[group * planes..][..planes], weight.shift[group])
}

/// Each group's planes by descending magnitude.
fn sorted<'w>(full: &Coded<'w>) -> Coded<'w> {
    let planes = usize::from(full.bits);
    let (mut codes, mut alpha) = (Vec::new(), Vec::new());
    let groups = full.codes.chunks_exact(full.group_len);
    for (group, scales) in groups.zip(full.scale.chunks_exact(planes)) {
        let mut order: Vec<usize> = (0..planes).collect();
        order.sort_by(|a, b| scales[*b].abs().total_cmp(&scales[*a].abs()));
        alpha.extend(order.iter().map(|plane| scales[*plane]));
        let bit = |code: u8, (to, from): (usize, &usize)| (code >> from & 1) << to;
        codes.extend(group.iter().map(|code| {
            order.iter().enumerate().fold(0, |moved, place| moved | bit(*code, place))
        }));
    }
    Coded { codes: Cow::Owned(codes), scale: Cow::Owned(alpha), ..full.clone() }
}

/// The first `bits` planes of a `sorted` weight, with scales for them alone.
fn lower<'w>(sorted: &Coded<'w>, bits: u8) -> Result<Coded<'w>> {
    let width = Bits::new(bits)?;
    let (mut all, mut alpha, mut offset) = (Vec::new(), Vec::new(), Vec::new());
    for (group, codes) in sorted.codes.chunks_exact(sorted.group_len).enumerate() {
        let weight: Vec<f32> = codes.iter().map(|code| level(sorted, group, *code)).collect();
        let codes: Vec<u8> = codes.iter().map(|code| code & width.max_code()).collect();
        let (alphas, offsets) = bcq::fit_scales(&weight, &codes, width);
        all.extend(codes);
        alpha.extend(alphas);
        offset.push(offsets);
    }
    let (codes, scale, shift) = (Cow::Owned(all), Cow::Owned(alpha), Cow::Owned(offset));
    Ok(Coded { bits, codes, scale, shift, ..*sorted })
}

#[cfg(test)]
mod tests {
    use super::super::coded::sample::{generator, grid};
    use super::*;
    use crate::quant::ZeroKind;

    fn weights(planes: &Coded<'_>) -> Vec<f32> {
        let group = |at: usize| at / planes.group_len;
        let each = planes.codes.iter().enumerate();
        each.map(|(at, code)| level(planes, group(at), *code)).collect()
    }

    #[test]
    fn fewer_planes_are_the_first_of_more() {
        let mut next = generator(5);
        let codes: Vec<u8> = (0..256).map(|_| (next() % 8) as u8).collect();
        // Ascending, and short.
        let alpha: Vec<f32> = (0..8).flat_map(|_| [0.125, 0.25, 0.75]).collect();
        let full = Coded {
            out: 4,
            inputs: 64,
            group_len: 32,
            bits: 3,
            codes: codes.into(),
            scale: alpha.into(),
            shift: vec![0.5; 8].into(),
            zero_kind: None,
        };
        let all = precisions("x", &full, &[1, 2]).unwrap();
        assert_eq!(all[2].scale[..3], [0.75, 0.25, 0.125]);
        assert_eq!(weights(&all[2]), weights(&full));
        let trained = weights(&full);
        let error = |planes: &Coded<'_>| -> f32 {
            weights(planes).iter().zip(&trained).map(|(a, b)| (a - b).powi(2)).sum()
        };
        assert!(error(&all[0]) > error(&all[1]) && error(&all[1]) > 0.0);
        // Scales of their own are better than the full weight's.
        let plain: Vec<f32> = (0..8).flat_map(|_| [0.75, 0.25]).collect();
        assert!(error(&all[1]) <= error(&Coded { scale: plain.into(), ..all[1].clone() }));
        for wrong in [&[3][..], &[0], &[2, 1], &[2, 2]] {
            assert!(precisions("x", &full, wrong).is_err(), "{wrong:?}");
        }
        // Many digits: the order of a sum shows.
        let alpha: Vec<f32> = (0..8).flat_map(|_| [0.1, 0.3, 0.700_001]).collect();
        let long = Coded { scale: alpha.into(), ..full };
        let error = precisions("x", &long, &[1]).err().unwrap().to_string();
        assert!(error.contains("quant.scales"), "{error}");
    }

    fn bits_of(weights: &[f32]) -> Vec<u32> {
        weights.iter().map(|weight| (weight + 0.0).to_bits()).collect()
    }

    #[test]
    fn a_uniform_grid_is_binary_coding() {
        for kind in [ZeroKind::Integer, ZeroKind::Half] {
            for bits in 1..=8 {
                let grid = grid([4, 64], 32, bits, kind, true, u32::from(bits));
                let coded = grid.coded();
                let (planes, changed) = of_uniform(&coded);
                assert_eq!(changed, 0, "{bits} bits");
                let weights = weights(&planes);
                assert_eq!(bits_of(&weights), bits_of(&coded.dequantize()));
            }
        }
        // All digits of f32: sums round.
        let long = grid([8, 64], 32, 4, ZeroKind::Real, false, 1);
        assert!(of_uniform(&long.coded()).1 > 0);
    }
}
