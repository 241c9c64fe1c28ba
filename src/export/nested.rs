//! One set of sign planes for several precisions: the first planes of each group are its greatest, and
//! every precision below the full one has scales of its own, of least squared error.

use super::container::same;
use super::matrix::Planes;
use crate::error::{Error, Result};
use crate::quant::{Bits, bcq};

/// A weight at one precision.
pub(super) struct Precision {
    bits: u8,
    codes: Vec<u8>,
    alpha: Vec<f32>,
    offset: Vec<f32>,
}

impl Precision {
    /// As packers take it, with the layout of `full`.
    pub(super) fn planes<'a>(&'a self, full: &Planes<'a>) -> Planes<'a> {
        let Self { bits, codes, alpha, offset } = self;
        Planes { bits: *bits, codes, alpha, offset, ..*full }
    }
}

/// `full` with its planes in descending order, behind what its first planes are at each of
/// `precisions`, ascending widths below its own.
///
/// # Errors
/// When a width is none of them, or the order of the planes changes a weight: scales are added in
/// f32, one after the other.
pub(super) fn precisions(
    name: &str,
    full: &Planes<'_>,
    precisions: &[u8],
) -> Result<Vec<Precision>> {
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
    let widest = usize::from(full.bits);
    let exact = |(group, codes): (usize, &[u8])| {
        let old = |code| level(full.alpha, full.offset, group, widest, code);
        let new = |code| level(&full_sorted.alpha, &full_sorted.offset, group, widest, code);
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
    let mut all: Vec<Precision> = Vec::new();
    for bits in precisions {
        all.push(lower(full, &full_sorted, *bits)?);
    }
    all.push(full_sorted);
    Ok(all)
}

fn level(alpha: &[f32], offset: &[f32], group: usize, planes: usize, code: u8) -> f32 {
    bcq::level(code, &alpha[group * planes..][..planes], offset[group])
}

/// Each group's planes by descending magnitude.
fn sorted(full: &Planes<'_>) -> Precision {
    let planes = usize::from(full.bits);
    let (mut codes, mut alpha) = (Vec::new(), Vec::new());
    let groups = full.codes.chunks_exact(full.group_len);
    for (group, scales) in groups.zip(full.alpha.chunks_exact(planes)) {
        let mut order: Vec<usize> = (0..planes).collect();
        order.sort_by(|a, b| scales[*b].abs().total_cmp(&scales[*a].abs()));
        alpha.extend(order.iter().map(|plane| scales[*plane]));
        let bit = |code: u8, (to, from): (usize, &usize)| (code >> from & 1) << to;
        codes.extend(group.iter().map(|code| {
            order.iter().enumerate().fold(0, |moved, place| moved | bit(*code, place))
        }));
    }
    Precision { bits: full.bits, codes, alpha, offset: full.offset.to_vec() }
}

/// The first `bits` planes, with scales for them alone.
fn lower(full: &Planes<'_>, sorted: &Precision, bits: u8) -> Result<Precision> {
    let planes = usize::from(full.bits);
    let width = Bits::new(bits)?;
    let mut made = Precision { bits, codes: Vec::new(), alpha: Vec::new(), offset: Vec::new() };
    for (group, codes) in sorted.codes.chunks_exact(full.group_len).enumerate() {
        let weight: Vec<f32> = codes
            .iter()
            .map(|code| level(&sorted.alpha, &sorted.offset, group, planes, *code))
            .collect();
        let codes: Vec<u8> = codes.iter().map(|code| code & width.max_code()).collect();
        let (alpha, offset) = bcq::fit_scales(&weight, &codes, width);
        made.codes.extend(codes);
        made.alpha.extend(alpha);
        made.offset.push(offset);
    }
    Ok(made)
}

#[cfg(test)]
mod tests {
    use super::super::matrix::sample::generator;
    use super::*;

    fn weights(planes: &Planes<'_>) -> Vec<f32> {
        let bits = usize::from(planes.bits);
        let group = |at: usize| at / planes.group_len;
        let each = planes.codes.iter().enumerate();
        each.map(|(at, code)| level(planes.alpha, planes.offset, group(at), bits, *code)).collect()
    }

    #[test]
    fn fewer_planes_are_the_first_of_more() {
        let mut next = generator(5);
        let codes: Vec<u8> = (0..256).map(|_| (next() % 8) as u8).collect();
        // Ascending, and short.
        let alpha: Vec<f32> = (0..8).flat_map(|_| [0.125, 0.25, 0.75]).collect();
        let offset = vec![0.5; 8];
        let full = Planes {
            out: 4,
            inputs: 64,
            group_len: 32,
            bits: 3,
            codes: &codes,
            alpha: &alpha,
            offset: &offset,
        };
        let all = precisions("x", &full, &[1, 2]).unwrap();
        let all: Vec<Planes<'_>> = all.iter().map(|precision| precision.planes(&full)).collect();
        assert_eq!(all[2].alpha[..3], [0.75, 0.25, 0.125]);
        assert_eq!(weights(&all[2]), weights(&full));
        let trained = weights(&full);
        let error = |planes: &Planes<'_>| -> f32 {
            weights(planes).iter().zip(&trained).map(|(a, b)| (a - b).powi(2)).sum()
        };
        assert!(error(&all[0]) > error(&all[1]) && error(&all[1]) > 0.0);
        // Scales of their own are better than the full weight's.
        let plain: Vec<f32> = (0..8).flat_map(|_| [0.75, 0.25]).collect();
        assert!(error(&all[1]) <= error(&Planes { alpha: &plain, ..all[1] }));
        super::super::bcq::encode_nested("x", &all).unwrap();
        for wrong in [&[3][..], &[0], &[2, 1], &[2, 2]] {
            assert!(precisions("x", &full, wrong).is_err(), "{wrong:?}");
        }
        // Many digits: the order of a sum shows.
        let alpha: Vec<f32> = (0..8).flat_map(|_| [0.1, 0.3, 0.700_001]).collect();
        let long = Planes { alpha: &alpha, ..full };
        let error = precisions("x", &long, &[1]).err().unwrap().to_string();
        assert!(error.contains("quant.scales"), "{error}");
    }
}
