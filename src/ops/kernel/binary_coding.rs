//! Binary-coding grids: values of codes, gradients of the planes' scales, UniQuanF's mapping, and
//! nearest levels; group by group. A group's `alpha` has `bits` entries, and bit `i` of a code is
//! the sign of `alpha[i]`.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

use super::rows;
use crate::ops::vector::{self, Level, at};

/// The most bits of a code.
const MAX_BITS: usize = 8;

/// `±alpha_0 ± alpha_1 ... + offset`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Levels<'a> {
    /// Integers as floats, `[groups, group_len]`.
    pub codes: &'a [f32],
    /// `[groups, bits]`.
    pub alpha: &'a [f32],
    /// `[groups]`.
    pub offset: &'a [f32],
}

impl Levels<'_> {
    fn bits(&self) -> usize {
        self.alpha.len() / self.offset.len().max(1)
    }

    fn group_len(&self) -> usize {
        self.codes.len() / self.offset.len().max(1)
    }

    /// `[groups, group_len]`.
    pub(crate) fn forward(&self) -> Vec<f32> {
        self.forward_at(Level::best())
    }

    fn forward_at(&self, level: Level) -> Vec<f32> {
        let (len, bits) = (self.group_len(), self.bits());
        let mut out = vec![0.0; self.codes.len()];
        let group = |(index, out): (usize, &mut [f32])| {
            let codes = &self.codes[index * len..][..len];
            let alpha = &self.alpha[index * bits..][..bits];
            at!(level, values_row(out, codes, alpha, self.offset[index]));
        };
        rows(&mut out, len, group);
        out
    }
}

/// UniQuanF's mapping with frozen codes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mapped<'a> {
    /// `[groups, group_len]`.
    pub weight: &'a [f32],
    /// `[groups, group_len]`.
    pub log_division: &'a [f32],
    /// `[groups]`.
    pub log_scale: &'a [f32],
    /// `[groups]`.
    pub log_row: &'a [f32],
    /// In unit steps, `[groups, bits]`.
    pub alpha: &'a [f32],
    /// `z_U - (z_B + c)`, `[groups]`.
    pub shift: &'a [f32],
    /// Integers as floats, `[groups, group_len]`.
    pub codes: &'a [f32],
    /// Drop the gradient of weights beyond their level's reach.
    pub filter: bool,
}

/// Gradients of [`Mapped`].
#[derive(Debug)]
pub(crate) struct MappedGradients {
    /// `[groups, group_len]`.
    pub log_division: Vec<f32>,
    /// `[groups]`.
    pub log_scale: Vec<f32>,
    /// `[groups]`.
    pub log_row: Vec<f32>,
    /// `[groups, bits]`.
    pub alpha: Vec<f32>,
}

impl<'a> Mapped<'a> {
    fn group_len(&self) -> usize {
        self.weight.len() / self.shift.len().max(1)
    }

    fn bits(&self) -> usize {
        self.alpha.len() / self.shift.len().max(1)
    }

    /// The folded grid: scales of the planes, `[groups, bits]`, and offsets, `[groups]`, in weight
    /// units.
    pub(crate) fn folded(&self) -> (Vec<f32>, Vec<f32>) {
        let bits = self.bits();
        let scale: Vec<f32> = self.log_scale.iter().map(|s| vector::exp(*s)).collect();
        let alpha = self.alpha.iter().enumerate().map(|(i, a)| scale[i / bits] * a).collect();
        // Zero minus: the sign of an exact zero as in `scale * (middle - zero)`.
        let offset = scale.iter().zip(self.shift).map(|(s, shift)| s * (0.0 - shift)).collect();
        (alpha, offset)
    }

    /// The weights on their levels: the folded grid's values.
    pub(crate) fn forward(&self) -> Vec<f32> {
        let (alpha, offset) = self.folded();
        Levels { codes: self.codes, alpha: &alpha, offset: &offset }.forward()
    }

    /// Gradients, given that of the values.
    pub(crate) fn backward(&self, gradient: &[f32]) -> MappedGradients {
        self.backward_at(Level::best(), gradient)
    }

    fn backward_at(&self, level: Level, gradient: &[f32]) -> MappedGradients {
        let (len, bits) = (self.group_len(), self.bits());
        let mut log_division = vec![0.0; self.weight.len()];
        let mut alpha = vec![0.0; self.alpha.len()];
        let mut sums = vec![[0.0f64; 2]; self.shift.len()];
        let each = log_division.par_chunks_exact_mut(len).zip(alpha.par_chunks_exact_mut(bits));
        each.zip(&mut sums).enumerate().with_min_len(1 + 4096 / len.max(1)).for_each_init(
            || vec![0.0; len],
            |moved, (index, ((division, alpha), sums))| {
                let gradient = &gradient[index * len..][..len];
                *sums = at!(level, self.group(index, gradient, division, alpha, moved));
            },
        );
        MappedGradients {
            log_division,
            log_scale: sums.iter().map(|[value, division]| (value + division) as f32).collect(),
            log_row: sums.iter().map(|[_, division]| *division as f32).collect(),
            alpha,
        }
    }

    #[inline(always)]
    fn group(
        &self,
        index: usize,
        gradient: &[f32],
        division: &mut [f32],
        alpha_gradient: &mut [f32],
        moved: &mut [f32],
    ) -> [f64; 2] {
        let (len, bits) = (gradient.len(), alpha_gradient.len());
        let at = index * len;
        let part = |values: &'a [f32]| &values[at..][..len];
        let (weight, log_division, codes) =
            (part(self.weight), part(self.log_division), part(self.codes));
        let alpha = &self.alpha[index * bits..][..bits];
        let shift = self.shift[index];
        let log_step = self.log_scale[index] + self.log_row[index];
        let scale = vector::exp(self.log_scale[index]);
        let reach = alpha.iter().fold(f32::INFINITY, |least, a| least.min(a.abs()));
        // The levels in unit steps, from the middle.
        values_row(moved, codes, alpha, 0.0);
        let value = vector::sum_pairs(
            gradient,
            moved,
            #[inline(always)]
            |g, level| g * (level - shift),
        );
        let entries = division.iter_mut().zip(moved.iter_mut()).zip(weight);
        for (((division, moved), w), (d, g)) in entries.zip(log_division.iter().zip(gradient)) {
            let ratio = w / vector::exp(d + log_step);
            let near = !self.filter || ((ratio + shift) - *moved).abs() <= reach;
            *moved = if near { g * scale } else { 0.0 };
            *division = if near { -(g * scale) * ratio } else { 0.0 };
        }
        plane_sums(alpha_gradient, moved, codes);
        [f64::from(scale) * value, vector::sum(division)]
    }
}

/// Whether a bit of a code is set. (A cast to an integer saturates, and is not vectorized.)
#[inline(always)]
fn set(code: f32, bit: usize) -> bool {
    const ONES_LAST: f32 = 8_388_608.0;
    (code + ONES_LAST).to_bits() >> bit & 1 == 1
}

#[inline(always)]
fn values_row(out: &mut [f32], codes: &[f32], alpha: &[f32], offset: f32) {
    // In the order of the stored format: plane by plane, the offset last.
    for (bit, alpha) in alpha.iter().enumerate() {
        for (out, code) in out.iter_mut().zip(codes) {
            let term = if set(*code, bit) { *alpha } else { -*alpha };
            *out = if bit == 0 { term } else { *out + term };
        }
    }
    for value in out {
        *value += offset;
    }
}

/// `Σ gradient · (±1)` for each plane.
#[inline(always)]
fn plane_sums(sums: &mut [f32], gradient: &[f32], codes: &[f32]) {
    for (bit, sum) in sums.iter_mut().enumerate() {
        let signed = vector::sum_pairs(
            gradient,
            codes,
            #[inline(always)]
            |g, code| if set(code, bit) { g } else { -g },
        );
        *sum = signed as f32;
    }
}

/// Codes of the nearest levels; the greater level at a tie. With `around`, only the level of that
/// code and its two neighbours in order of value are candidates.
pub(crate) fn nearest_codes(
    position: &[f32],
    alpha: &[f32],
    bits: usize,
    around: Option<&[f32]>,
) -> Vec<f32> {
    let groups = alpha.len() / bits;
    let len = position.len() / groups.max(1);
    let mut codes = vec![0.0; position.len()];
    let each = codes.par_chunks_exact_mut(len.max(1)).enumerate();
    each.with_min_len(1 + 4096 / len.max(1)).for_each(|(index, codes)| {
        let position = &position[index * len..][..len];
        let around = around.map(|codes| &codes[index * len..][..len]);
        nearest_row(codes, position, &alpha[index * bits..][..bits], around);
    });
    codes
}

fn nearest_row(codes: &mut [f32], position: &[f32], alpha: &[f32], around: Option<&[f32]>) {
    const MOST: usize = 1 << MAX_BITS;
    let count = 1usize << alpha.len();
    let level = |code: usize| -> f32 {
        let signed = |(bit, a): (usize, &f32)| if code >> bit & 1 == 1 { *a } else { -*a };
        alpha.iter().enumerate().map(signed).sum()
    };
    let mut order: Vec<(f32, usize)> = (0..count).map(|code| (level(code), code)).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let middles: Vec<f32> = order.windows(2).map(|pair| (pair[0].0 + pair[1].0) * 0.5).collect();
    match around {
        None => {
            for (code, x) in codes.iter_mut().zip(position) {
                let rank: usize = middles.iter().map(|middle| usize::from(x >= middle)).sum();
                *code = order[rank].1 as f32;
            }
        }
        Some(around) => {
            let mut rank_of = [0usize; MOST];
            for (rank, (_, code)) in order.iter().enumerate() {
                rank_of[*code] = rank;
            }
            for ((code, x), present) in codes.iter_mut().zip(position).zip(around) {
                let rank = rank_of[*present as usize];
                let up = middles.get(rank).is_some_and(|middle| x >= middle);
                let down = rank > 0 && *x < middles[rank - 1];
                *code = order[rank + usize::from(up) - usize::from(down)].1 as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{assert_same, bits as bits_of, noise};
    use super::*;

    /// Groups and their length; the last two are worth a second thread.
    const SHAPES: [[usize; 2]; 10] = [
        [3, 1],
        [2, 7],
        [1, 15],
        [4, 16],
        [5, 17],
        [3, 33],
        [2, 100],
        [8, 128],
        [300, 113],
        [1024, 33],
    ];

    fn codes(len: usize, bits: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + i / 3) % (1 << bits)) as f32).collect()
    }

    #[test]
    fn levels_give_the_same_bits_at_every_level_and_number_of_threads() {
        for ([groups, len], bits) in SHAPES.iter().flat_map(|s| [1, 2, 3, 8].map(|b| (*s, b))) {
            let (alpha, offset) = (noise(groups * bits, 0.2, 1.0), noise(groups, 0.8, 0.3));
            let codes = codes(groups * len, bits);
            let grid = Levels { codes: &codes, alpha: &alpha, offset: &offset };
            assert_same(&format!("{groups} groups of {len}, {bits} bits"), |level| {
                vec![bits_of(&grid.forward_at(level))]
            });
        }
    }

    #[test]
    fn mapped_gives_the_same_bits_at_every_level_and_number_of_threads() {
        for ([groups, len], filter) in SHAPES.iter().flat_map(|s| [false, true].map(|f| (*s, f))) {
            let (bits, count) = (3, groups * len);
            let mapped = Mapped {
                weight: &noise(count, 0.1, 4.0),
                log_division: &noise(count, 0.4, 0.3),
                log_scale: &noise(groups, 0.6, 1.0),
                log_row: &noise(groups, 0.9, 0.3),
                alpha: &noise(groups * bits, 0.2, 2.0),
                shift: &noise(groups, 0.7, 1.0),
                codes: &codes(count, bits),
                filter,
            };
            let gradient = noise(count, 0.5, 1.0);
            assert_same(&format!("{groups} groups of {len}, filter {filter}"), |level| {
                let found = mapped.backward_at(level, &gradient);
                let all = [
                    mapped.forward(),
                    found.log_division,
                    found.log_scale,
                    found.log_row,
                    found.alpha,
                ];
                all.map(|values| bits_of(&values)).to_vec()
            });
        }
    }

    #[test]
    fn nearest_codes_do_not_depend_on_the_number_of_threads() {
        for [groups, len] in SHAPES {
            let (position, alpha) = (noise(groups * len, 0.1, 4.0), noise(groups * 3, 0.2, 2.0));
            let present = codes(groups * len, 3);
            assert_same(&format!("{groups} groups of {len}"), |_| {
                let near = |around| bits_of(&nearest_codes(&position, &alpha, 3, around));
                vec![near(None), near(Some(&present))]
            });
        }
    }
}
