//! One set of sign planes that serves several widths (AnyBCQ, arXiv 2510.10467): a narrower model takes
//! the first planes of the same codes, with scales and offsets of its own.

use super::{Bits, Grid, QuantizedWeight};
use crate::error::{Error, Result};

/// Refuses a width that planes do not serve.
pub fn no_width(bits: Bits, widths: impl IntoIterator<Item = Bits>) -> Error {
    let known: Vec<String> = widths.into_iter().map(|bits| bits.to_string()).collect();
    match &known[..] {
        [] | [_] => {
            Error::usage(format!("bits = {bits} reads one of several widths, and there is one"))
                .fix("no bits, or codes made by method.anybcq")
        }
        known => {
            let known = known.join(", ");
            Error::usage(format!("there are no {bits} bits: the planes serve {known}"))
                .fix(format!("one of {known}"))
        }
    }
}

impl QuantizedWeight {
    /// The widths it can be read at, ascending; its own is the last.
    pub fn widths(&self) -> Vec<Bits> {
        let nested = self.nested.iter().filter_map(|grid| self.width_of(grid));
        nested.chain([self.bits]).collect()
    }

    /// The width of a grid of its groups, where it is one of planes.
    fn width_of(&self, grid: &Grid) -> Option<Bits> {
        let Grid::BinaryCoding { alpha, offset } = grid else { return None };
        let groups = self.layout.groups.max(1);
        let planes = u8::try_from(alpha.len() / groups).ok()?;
        let whole = alpha.len() == usize::from(planes) * groups && offset.len() == groups;
        Bits::new(planes).ok().filter(|_| whole)
    }

    /// As it is read at `bits`: the first planes of the codes, on the grid of that width. A weight whose
    /// widths all end below is read at its widest.
    ///
    /// # Errors
    /// A usage error when its widths begin above.
    pub fn at(&self, bits: Bits) -> Result<Self> {
        if bits >= self.bits {
            return Ok(Self { nested: Vec::new(), ..self.clone() });
        }
        let grid = self.nested.iter().find(|grid| self.width_of(grid) == Some(bits));
        let grid = grid.ok_or_else(|| no_width(bits, self.widths()))?.clone();
        let codes = self.codes.first_bits(bits.get());
        Self { codes, grid, bits, layout: self.layout, nested: Vec::new() }.checked()
    }

    /// Puts another grid in the place of that of width `bits`.
    ///
    /// # Errors
    /// As [`QuantizedWeight::at`], and when the grid does not fit.
    pub fn set_grid(&mut self, bits: Bits, grid: Grid) -> Result<()> {
        if bits == self.bits {
            self.grid = grid;
            return self.check();
        }
        let place = self.nested.iter().position(|old| self.width_of(old) == Some(bits));
        let place = place.filter(|_| self.width_of(&grid) == Some(bits));
        let place = place.ok_or_else(|| no_width(bits, self.widths()))?;
        self.nested[place] = grid;
        self.check()
    }

    /// Checks the grids of narrower widths.
    pub(super) fn check_nested(&self) -> Result<()> {
        if self.nested.is_empty() {
            return Ok(());
        }
        let widths: Option<Vec<Bits>> =
            self.nested.iter().map(|grid| self.width_of(grid)).collect();
        let ascending = |widths: &Vec<Bits>| {
            let all: Vec<u8> = widths.iter().chain([&self.bits]).map(|bits| bits.get()).collect();
            all.windows(2).all(|pair| pair[0] < pair[1])
        };
        let planes = matches!(self.grid, Grid::BinaryCoding { .. });
        if !planes || !widths.as_ref().is_some_and(ascending) {
            return Err(Error::failed("the scales of narrower widths do not fit the codes"));
        }
        let finite = |grid: &Grid| match grid {
            Grid::BinaryCoding { alpha, offset } => {
                alpha.iter().chain(offset).all(|value| value.is_finite())
            }
            Grid::Uniform { .. } | Grid::Codebook { .. } => false,
        };
        if self.nested.iter().all(finite) {
            return Ok(());
        }
        Err(Error::failed("a scale or offset of a narrower width is not a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{GroupAxis, GroupLayout};

    fn weight() -> QuantizedWeight {
        let layout =
            GroupLayout { out: 1, inputs: 4, groups: 1, group_len: 4, axis: GroupAxis::In };
        let grid = |alpha: &[f32], offset| Grid::BinaryCoding {
            alpha: alpha.to_vec(),
            offset: vec![offset],
        };
        // The worked example of w = [-3, -1, 1, 7]: two planes, then a third from what they leave.
        let codes = [0b010, 0b110, 0b001, 0b111];
        let bits = Bits::new(3).unwrap();
        let weight = QuantizedWeight::new(&codes, grid(&[4.0, 2.0, 1.0], 0.0), bits, layout);
        let narrow = grid(&[13.0 / 3.0, 8.0 / 3.0], 0.0);
        QuantizedWeight { nested: vec![narrow], ..weight.unwrap() }.checked().unwrap()
    }

    #[test]
    fn a_narrower_width_has_the_first_planes_and_scales_of_its_own() {
        let weight = weight();
        let two = Bits::new(2).unwrap();
        assert_eq!(weight.widths(), [two, Bits::new(3).unwrap()]);
        let narrow = weight.at(two).unwrap();
        assert_eq!(narrow.codes.to_vec(), [0b10, 0b10, 0b01, 0b11]);
        assert_eq!(weight.dequantize(), [-3.0, -1.0, 1.0, 7.0]);
        let (a, b) = (13.0f32 / 3.0, 8.0f32 / 3.0);
        assert_eq!(narrow.dequantize(), [-a + b, -a + b, a - b, a + b]);
        assert_eq!(weight.at(weight.bits).unwrap().dequantize(), weight.dequantize());
        assert!(narrow.nested.is_empty());
        // Beside wider linears it stays as it is.
        assert_eq!(weight.at(Bits::new(4).unwrap()).unwrap().bits, weight.bits);
    }

    #[test]
    fn other_widths_and_grids_are_refused() {
        let mut weight = weight();
        let error = weight.at(Bits::new(1).unwrap()).unwrap_err().to_string();
        assert!(error.contains("the planes serve 2, 3"), "{error}");
        let two = Bits::new(2).unwrap();
        let of_one = Grid::BinaryCoding { alpha: vec![1.0], offset: vec![0.0] };
        assert!(weight.set_grid(two, of_one).is_err());
        let broken = Grid::BinaryCoding { alpha: vec![1.0, f32::NAN], offset: vec![0.0] };
        assert!(weight.clone().set_grid(two, broken).is_err());
        let grid = Grid::BinaryCoding { alpha: vec![1.0, 0.5], offset: vec![0.25] };
        weight.set_grid(two, grid.clone()).unwrap();
        assert_eq!(weight.at(two).unwrap().grid, grid);
    }
}
