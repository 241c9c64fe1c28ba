//! Rows of one head's keys or values: at high precision, or as codes of a few bits.

use half::f16;

use crate::ops::bits::{pack, unpack, words_per_row};

/// Rows as they are, in 32 or 16 bits a number.
#[derive(Clone, Debug)]
pub(super) enum Exact {
    /// The numbers themselves.
    F32(Vec<f32>),
    /// Rounded to the nearest.
    F16(Vec<f16>),
}

impl Exact {
    pub(super) fn new(bits: u8) -> Self {
        if bits == 32 { Self::F32(Vec::new()) } else { Self::F16(Vec::new()) }
    }

    pub(super) fn push(&mut self, row: &[f32]) {
        match self {
            Self::F32(all) => all.extend_from_slice(row),
            Self::F16(all) => all.extend(row.iter().map(|x| rounded(*x))),
        }
    }

    /// Fills `row` with row `index`.
    pub(super) fn read(&self, index: usize, row: &mut [f32]) {
        let (start, width) = (index * row.len(), row.len());
        match self {
            Self::F32(all) => row.copy_from_slice(&all[start..start + width]),
            Self::F16(all) => {
                for (out, x) in row.iter_mut().zip(&all[start..start + width]) {
                    *out = x.to_f32();
                }
            }
        }
    }

    /// Keeps the rows of `width` numbers for which `keep` holds.
    pub(super) fn retain(&mut self, width: usize, keep: &[bool]) {
        match self {
            Self::F32(all) => retain(all, width, keep),
            Self::F16(all) => retain(all, width, keep),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::F32(all) => size_of_val(&all[..]),
            Self::F16(all) => size_of_val(&all[..]),
        }
    }
}

/// Rows of codes, each group of a row with a step and a minimum of its own: `x = step code + minimum`.
#[derive(Clone, Debug)]
pub(super) struct Coded {
    bits: u8,
    /// Numbers of a row.
    width: usize,
    /// Numbers that share a grid.
    group: usize,
    /// Each row in whole words.
    codes: Vec<u32>,
    /// Step and minimum of each group.
    grids: Vec<[f16; 2]>,
}

impl Coded {
    pub(super) fn new(bits: u8, width: usize, group: usize) -> Self {
        Self { bits, width, group, codes: Vec::new(), grids: Vec::new() }
    }

    /// Numbers of a row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Rounds a row: `a = (max - min) / (2^b - 1)`, `code = round((x - min) / a)`, both numbers of the grid
    /// in f16 before the codes are chosen.
    pub(super) fn push(&mut self, row: &[f32]) {
        let top = f32::from((1u16 << self.bits) - 1);
        let mut codes = Vec::with_capacity(self.width);
        for group in row.chunks_exact(self.group) {
            let low = group.iter().copied().fold(f32::INFINITY, f32::min);
            let high = group.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let grid = [(high - low) / top, low].map(rounded);
            let [step, minimum] = grid.map(f16::to_f32);
            self.grids.push(grid);
            let code = |x: &f32| {
                let code = if step > 0.0 { (x - minimum) / step } else { 0.0 };
                code.round_ties_even().clamp(0.0, top) as u8
            };
            codes.extend(group.iter().map(code));
        }
        self.codes.extend(pack(&codes, self.bits));
    }

    /// Fills `row` with row `index`.
    pub(super) fn read(&self, index: usize, row: &mut [f32]) {
        let words = words_per_row(self.width, self.bits);
        let codes = unpack(&self.codes[index * words..][..words], self.bits, self.width);
        let grids = &self.grids[index * (self.width / self.group)..];
        let groups = row.chunks_exact_mut(self.group).zip(codes.chunks_exact(self.group));
        for ((row, codes), grid) in groups.zip(grids) {
            let [step, minimum] = grid.map(f16::to_f32);
            for (x, code) in row.iter_mut().zip(codes) {
                *x = step * f32::from(*code) + minimum;
            }
        }
    }

    /// Keeps the rows for which `keep` holds.
    pub(super) fn retain(&mut self, keep: &[bool]) {
        retain(&mut self.codes, words_per_row(self.width, self.bits), keep);
        retain(&mut self.grids, self.width / self.group, keep);
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&self.codes[..]) + size_of_val(&self.grids[..])
    }
}

/// The nearest f16, the largest one for what is larger.
fn rounded(x: f32) -> f16 {
    f16::from_f32(x.clamp(f16::MIN.to_f32(), f16::MAX.to_f32()))
}

/// Keeps of rows of `width` items those for which `keep` holds.
fn retain<T: Copy>(all: &mut Vec<T>, width: usize, keep: &[bool]) {
    let mut end = 0;
    for (row, _) in keep.iter().enumerate().filter(|(_, keep)| **keep) {
        all.copy_within(row * width..(row + 1) * width, end);
        end += width;
    }
    all.truncate(end);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_number_moves_by_half_a_step_and_rows_are_their_own(
            numbers in proptest::collection::vec(-20.0f32..20.0, 48),
            bits in 2u8..=8,
            group in prop_oneof![Just(4usize), Just(8), Just(24)],
        ) {
            let (mut rows, width) = (Coded::new(bits, 24, group), 24);
            for row in numbers.chunks_exact(width) {
                rows.push(row);
            }
            let mut found = [0.0; 48];
            for (index, row) in found.chunks_exact_mut(width).enumerate() {
                rows.read(index, row);
            }
            for (found, exact) in found.chunks(group).zip(numbers.chunks(group)) {
                let low = exact.iter().copied().fold(f32::INFINITY, f32::min);
                let high = exact.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let step = (high - low) / f32::from((1u16 << bits) - 1);
                for (a, b) in found.iter().zip(exact) {
                    // Step and minimum are f16.
                    prop_assert!((a - b).abs() <= 0.5 * step + 0.03, "{b} became {a}, step {step}");
                }
            }
            let mut second = rows.clone();
            second.retain(&[false, true]);
            let mut row = vec![0.0; width];
            second.read(0, &mut row);
            prop_assert_eq!(&row[..], &found[width..]);
            prop_assert_eq!(second.bytes() * 2, rows.bytes());
        }
    }

    #[test]
    fn a_row_of_one_value_and_of_huge_ones_stays_finite() {
        for value in [0.0, -3.5, 1e30] {
            let mut rows = Coded::new(2, 4, 4);
            rows.push(&[value; 4]);
            let mut row = [1.0; 4];
            rows.read(0, &mut row);
            assert!(row.iter().all(|x| (x - value.min(65504.0)).abs() < 1e-6), "{row:?}");
        }
    }
}
