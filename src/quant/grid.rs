//! What every method must end in: integer codes on a grid, on the host, ready to be packed.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{Bits, GroupAxis, GroupLayout, ScaleDType, ScaleDigits, bcq, codebook};
use crate::error::{Error, Result};
use crate::ops::{Additive, PackedCodes};

/// Weights that a task decodes.
const DECODED_AT_ONCE: usize = 1 << 15;

/// What a linear currently is; the alphabet in which a plan type-checks.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Repr {
    /// Float weights.
    Dense,
    /// Codes on a uniform grid.
    Uniform,
    /// Sign planes with a scale each.
    BinaryCoding,
    /// Sums of centroids.
    Codebook,
}

impl std::fmt::Display for Repr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Uniform => "uniform",
            Self::BinaryCoding => "binary_coding",
            Self::Codebook => "codebook",
        })
    }
}

/// What the zero points of a uniform grid may be.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ZeroKind {
    /// Integers: zero is a level of the grid (or would be, outside it).
    Integer,
    /// Integers plus a half: no level is zero (SEQ).
    Half,
    /// Any real number.
    Real,
}

/// The representable values of each group.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Grid {
    /// `w = scale * (code - zero_point)`.
    Uniform {
        /// One step per group, `[groups]`.
        scale: Vec<f32>,
        /// One zero point per group, `[groups]`, in code units.
        zero_point: Vec<f32>,
        /// What the zero points are.
        zero_kind: ZeroKind,
    },
    /// `w = ±alpha_0 ± alpha_1 ... + offset`, summed in this order; bit `i` of the code is set
    /// where `alpha_i` is added. Levels need not be evenly spaced.
    BinaryCoding {
        /// One scale per plane of each group, `[groups, bits]`.
        alpha: Vec<f32>,
        /// One offset per group, `[groups]`.
        offset: Vec<f32>,
    },
    /// `w = scale * (C_0[code_0] + C_1[code_1] ...)` of each run of inputs, summed in this order; the codes of
    /// a run lie side by side, in a width of their own. See [`codebook`].
    Codebook {
        /// One scale per group, `[groups]`.
        scale: Vec<f32>,
        /// `[books, centroids, vector]`.
        books: Vec<f32>,
        /// How many codebooks, and inputs in a run.
        additive: Additive,
    },
}

impl Grid {
    /// Evenly spaced levels, of the kind that all zero points are of.
    pub fn uniform(scale: Vec<f32>, zero_point: Vec<f32>) -> Self {
        let all = |fract: f32| zero_point.iter().all(|zero| (zero - fract).fract() == 0.0);
        let zero_kind = match (all(0.0), all(0.5)) {
            (true, _) => ZeroKind::Integer,
            (_, true) => ZeroKind::Half,
            _ => ZeroKind::Real,
        };
        Self::Uniform { scale, zero_point, zero_kind }
    }

    /// The representation this grid stands for.
    pub fn repr(&self) -> Repr {
        match self {
            Self::Uniform { .. } => Repr::Uniform,
            Self::BinaryCoding { .. } => Repr::BinaryCoding,
            Self::Codebook { .. } => Repr::Codebook,
        }
    }

    /// Steps, or scales of the planes, `[groups, planes]`.
    pub fn scales(&self) -> &[f32] {
        match self {
            Self::Uniform { scale, .. } | Self::Codebook { scale, .. } => scale,
            Self::BinaryCoding { alpha, .. } => alpha,
        }
    }

    /// The plane of the scale of greatest magnitude of each group, the first at a tie, `[groups]`;
    /// `planes` scales to a group.
    pub fn largest_planes(&self, planes: usize) -> Vec<u8> {
        let magnitude = |group: &[f32], i: usize| group[i].abs();
        let largest = |group: &[f32]| {
            let by_magnitude =
                |a: &usize, b: &usize| magnitude(group, *a).total_cmp(&magnitude(group, *b));
            // The last of equal maxima is taken: from the back, that is the first.
            (0..group.len()).rev().max_by(by_magnitude).unwrap_or(0) as u8
        };
        self.scales().chunks(planes.max(1)).map(largest).collect()
    }

    /// One positive number per group that says how coarse its levels are: the step of a uniform
    /// grid, the sum of the magnitudes of a binary-coding group's scales, that of a codebook's. For reports.
    pub fn coarseness(&self) -> Vec<f32> {
        match self {
            Self::Uniform { scale, .. } => scale.clone(),
            Self::Codebook { scale, .. } => scale.iter().map(|a| a.abs()).collect(),
            Self::BinaryCoding { alpha, offset } => {
                let bits = alpha.len() / offset.len().max(1);
                alpha.chunks(bits.max(1)).map(|a| a.iter().map(|a| a.abs()).sum()).collect()
            }
        }
    }
}

/// A quantized linear: codes and grid. What was trained, and what is exported, bit for bit.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    /// The stored integers, packed, in the layout's stored shape.
    pub codes: PackedCodes,
    /// The values they stand for.
    pub grid: Grid,
    /// Width of a code; of codebooks the bits of codes that a weight takes.
    pub bits: Bits,
    /// How weights fall into groups.
    pub layout: GroupLayout,
    /// Grids of the first planes of the codes alone, the fewest first, where the weight serves several
    /// widths (AnyBCQ); see [`QuantizedWeight::at`].
    pub nested: Vec<Grid>,
}

impl QuantizedWeight {
    /// Packs `codes`, row-major in the layout's stored shape, each in `0..2^bits`.
    ///
    /// # Errors
    /// As [`QuantizedWeight::checked`].
    pub fn new(codes: &[u8], grid: Grid, bits: Bits, layout: GroupLayout) -> Result<Self> {
        let [rows, columns] = layout.stored();
        if codes.len() != rows * columns {
            return Err(Error::failed(format!(
                "{} codes for a weight of {} x {}",
                codes.len(),
                layout.out,
                layout.inputs
            )));
        }
        if let Some(code) = codes.iter().find(|code| **code > bits.max_code()) {
            return Err(Error::failed(format!("code {code} does not fit in {bits} bits")));
        }
        let codes = PackedCodes::pack(codes, columns, bits.get());
        Self { codes, grid, bits, layout, nested: Vec::new() }.checked()
    }

    /// Packs the `codes` of codebooks, `[out, in / vector, books]`, each in `0..2^width`.
    ///
    /// # Errors
    /// As [`QuantizedWeight::checked`].
    pub fn of_codebooks(
        codes: &[u8],
        grid: Grid,
        width: Bits,
        bits: Bits,
        layout: GroupLayout,
    ) -> Result<Self> {
        if let Some(code) = codes.iter().find(|code| **code > width.max_code()) {
            return Err(Error::failed(format!("code {code} does not fit in {width} bits")));
        }
        if layout.out == 0 || !codes.len().is_multiple_of(layout.out) {
            let what = format!("{} codes for {} rows", codes.len(), layout.out);
            return Err(Error::failed(what));
        }
        let codes = PackedCodes::pack(codes, codes.len() / layout.out, width.get());
        Self { codes, grid, bits, layout, nested: Vec::new() }.checked()
    }

    /// Checks what a reader or a fold cannot guarantee by type: lengths, finite steps.
    ///
    /// # Errors
    /// Says which value is wrong; the caller adds the tensor's name.
    pub fn checked(self) -> Result<Self> {
        self.check().map(|()| self)
    }

    /// As [`QuantizedWeight::checked`], of a borrowed weight.
    ///
    /// # Errors
    /// As there.
    pub fn check(&self) -> Result<()> {
        let Self { codes, grid, bits, layout, .. } = self;
        if let Grid::Codebook { scale, books, additive } = grid {
            self.check_codebook(scale, books, *additive)?;
            return self.check_nested();
        }
        if [codes.rows(), codes.columns()] != layout.stored() || codes.bits() != bits.get() {
            return Err(Error::failed(format!(
                "{} codes of {} bits for a weight of {} x {} in {bits} bits",
                codes.len(),
                codes.bits(),
                layout.out,
                layout.inputs
            )));
        }
        match grid {
            Grid::Uniform { scale, zero_point, zero_kind } => {
                check_uniform(scale, zero_point, *zero_kind, layout.groups)?;
            }
            Grid::BinaryCoding { alpha, offset } => {
                let planes = layout.groups * usize::from(bits.get());
                if alpha.len() != planes || offset.len() != layout.groups {
                    return Err(Error::failed(format!(
                        "{} plane scales and {} offsets for {} groups of {bits} bits",
                        alpha.len(),
                        offset.len(),
                        layout.groups
                    )));
                }
                if let Some(value) = alpha.iter().chain(offset).find(|value| !value.is_finite()) {
                    return Err(Error::failed(format!("plane scale or offset {value}")));
                }
            }
            Grid::Codebook { .. } => {}
        }
        self.check_nested()
    }

    /// As [`QuantizedWeight::check`], of codebooks.
    fn check_codebook(&self, scale: &[f32], books: &[f32], additive: Additive) -> Result<()> {
        let Self { codes, bits, layout, .. } = self;
        let Additive { books: count, vector } = additive;
        let (width, inputs) = (usize::from(codes.bits()), layout.inputs);
        let fits = (1..=codebook::MOST).contains(&count)
            && (1..=codebook::LONGEST).contains(&vector)
            && layout.axis == GroupAxis::In
            && layout.group_len <= inputs
            && layout.group_len.is_multiple_of(vector)
            && [codes.rows(), codes.columns()] == [layout.out, additive.codes(inputs)]
            && count * width == usize::from(bits.get()) * vector
            && books.len() == (count * vector) << width
            && scale.len() == layout.groups;
        if !fits {
            return Err(Error::failed(format!(
                "{} codes of {width} bits, {} numbers of centroids and {} scales for a weight of {} x {inputs} \
                 in {bits} bits, {count} codebooks of {vector} inputs and {} groups",
                codes.len(),
                books.len(),
                scale.len(),
                layout.out,
                layout.groups
            )));
        }
        match scale.iter().chain(books).find(|value| !value.is_finite()) {
            Some(value) => Err(Error::failed(format!("scale or centroid {value}"))),
            None => Ok(()),
        }
    }

    /// The same weights in the longest groups along the inputs whose parts share a grid.
    #[must_use]
    pub fn in_longest_groups(self) -> Self {
        let GroupLayout { out, inputs, group_len, axis, .. } = self.layout;
        if axis == GroupAxis::Out || group_len >= inputs || !self.nested.is_empty() {
            return self;
        }
        let stored = inputs / group_len;
        // Parts of a row that become one group, more of them first.
        let counts = (2..=stored).rev().filter(|times| stored.is_multiple_of(*times));
        let same = |values: &[f32], times: usize, each: usize| {
            let runs = values.chunks_exact(times * each);
            runs.into_iter().all(|run| {
                run.chunks_exact(each)
                    .all(|part| part.iter().zip(run).all(|(a, b)| a.to_bits() == b.to_bits()))
            })
        };
        let (first, second, each) = match &self.grid {
            Grid::Uniform { scale, zero_point, .. } => (scale, zero_point, 1),
            Grid::BinaryCoding { alpha, offset } => (alpha, offset, usize::from(self.bits.get())),
            // Their groups are what they were solved for, and no other format holds them.
            Grid::Codebook { .. } => return self,
        };
        let mut counts = counts;
        let fits = |times: &usize| same(first, *times, each) && same(second, *times, 1);
        let Some(times) = counts.find(fits) else { return self };
        let kept = |values: &[f32], each: usize| -> Vec<f32> {
            values.chunks_exact(times * each).flat_map(|run| run[..each].to_vec()).collect()
        };
        let grid = match &self.grid {
            Grid::Uniform { scale, zero_point, zero_kind } => Grid::Uniform {
                scale: kept(scale, 1),
                zero_point: kept(zero_point, 1),
                zero_kind: *zero_kind,
            },
            Grid::BinaryCoding { alpha, offset } => {
                Grid::BinaryCoding { alpha: kept(alpha, each), offset: kept(offset, 1) }
            }
            codebook @ Grid::Codebook { .. } => codebook.clone(),
        };
        let group_len = group_len * times;
        let layout = GroupLayout { groups: out * inputs / group_len, group_len, ..self.layout };
        Self { grid, layout, ..self }
    }

    /// The same codes, with scales (and the offsets of binary coding) of this type. Beside short
    /// scales, real zero points lose digits behind the point that formats could not add exactly:
    /// they become multiples of `2^(bits-12)`.
    ///
    /// # Errors
    /// As [`ScaleDigits::rounded`].
    pub fn with_scales(mut self, digits: ScaleDigits) -> Result<Self> {
        for grid in self.nested.iter_mut().chain([&mut self.grid]) {
            match grid {
                Grid::Uniform { scale, zero_point, zero_kind } => {
                    *scale = digits.rounded(std::mem::take(scale))?;
                    if digits != ScaleDigits::F32 && *zero_kind == ZeroKind::Real {
                        let unit = f32::from(1_u16 << (12 - self.bits.get()));
                        for zero in zero_point {
                            *zero = (*zero * unit).round_ties_even() / unit;
                        }
                    }
                }
                Grid::BinaryCoding { alpha, offset } => {
                    let digits = digits.of_planes();
                    *alpha = digits.rounded(std::mem::take(alpha))?;
                    *offset = digits.rounded(std::mem::take(offset))?;
                }
                Grid::Codebook { scale, .. } => {
                    *scale = digits.of_planes().rounded(std::mem::take(scale))?;
                }
            }
        }
        Ok(self)
    }

    /// The weights the codes stand for, `[out, in]` row-major.
    ///
    /// The same operations in the same order as every method's `fake_quant` ends in (one
    /// subtraction, exact, and one multiplication on a uniform grid; one addition per plane and one
    /// for the offset in binary coding); so the result is bit-equal to what was trained.
    pub fn dequantize(&self) -> Vec<f32> {
        let codes = self.codes.to_vec();
        if let Grid::Codebook { scale, books, additive } = &self.grid {
            return self.sums_of_centroids(&codes, (scale, books, *additive));
        }
        let len = self.layout.group_len;
        let mut stored = vec![0.0; codes.len()];
        // Whole groups, so many that a task is worth it.
        let groups = (DECODED_AT_ONCE / len).max(1);
        let parts = stored.par_chunks_mut(groups * len).zip(codes.par_chunks(groups * len));
        parts.enumerate().for_each(|(part, (stored, codes))| {
            let each = stored.chunks_exact_mut(len).zip(codes.chunks_exact(len));
            for (group, (stored, codes)) in (part * groups..).zip(each) {
                match &self.grid {
                    Grid::Uniform { scale, zero_point, .. } => {
                        let (scale, zero) = (scale[group], zero_point[group]);
                        for (value, code) in stored.iter_mut().zip(codes) {
                            *value = scale * (f32::from(*code) - zero);
                        }
                    }
                    Grid::BinaryCoding { alpha, offset } => {
                        let planes = usize::from(self.bits.get());
                        let alpha = &alpha[group * planes..][..planes];
                        for (value, code) in stored.iter_mut().zip(codes) {
                            *value = bcq::level(*code, alpha, offset[group]);
                        }
                    }
                    Grid::Codebook { .. } => {}
                }
            }
        });
        match self.layout.axis {
            GroupAxis::In => stored,
            GroupAxis::Out => {
                let (out, inputs) = (self.layout.out, self.layout.inputs);
                (0..out * inputs).map(|i| stored[i % inputs * out + i / inputs]).collect()
            }
        }
    }

    /// The weights of codebooks.
    fn sums_of_centroids(
        &self,
        codes: &[u8],
        (scale, books, additive): (&[f32], &[f32], Additive),
    ) -> Vec<f32> {
        let GroupLayout { out, inputs, group_len, .. } = self.layout;
        let mut values = vec![0.0; out * inputs];
        let rows = values.par_chunks_mut(inputs).zip(codes.par_chunks(additive.codes(inputs)));
        let rows = rows.zip(scale.par_chunks(inputs / group_len));
        rows.with_min_len((DECODED_AT_ONCE / inputs).max(1)).for_each(
            |((values, codes), scale)| {
                additive.sums(codes, books, values);
                for (values, scale) in values.chunks_exact_mut(group_len).zip(scale) {
                    for value in values {
                        *value *= scale;
                    }
                }
            },
        );
        values
    }

    /// Stored bits per weight in fewbit's own format: codes, and per group a scale, or one for each plane,
    /// with its zero point or offset (8 bits when a small integer, none when all are the same); those of
    /// narrower widths too. Floats have 16 bits where that is exact for all of a kind, else 32.
    pub fn bits_per_weight(&self) -> f64 {
        let floats = |values: &[f32]| values.len() * ScaleDType::of(values).bits() as usize;
        let shifts = |zeros: &[f32], kind: ZeroKind| match kind {
            _ if zeros.windows(2).all(|pair| pair[0].to_bits() == pair[1].to_bits()) => 0,
            ZeroKind::Integer if zeros.iter().all(|zero| (0.0..=255.0).contains(zero)) => {
                8 * zeros.len()
            }
            ZeroKind::Integer => 32 * zeros.len(),
            _ => floats(zeros),
        };
        let of = |grid: &Grid| match grid {
            Grid::Uniform { scale, zero_point, zero_kind } => {
                floats(scale) + shifts(zero_point, *zero_kind)
            }
            Grid::BinaryCoding { alpha, offset } => floats(alpha) + shifts(offset, ZeroKind::Real),
            Grid::Codebook { scale, books, .. } => floats(scale) + floats(books),
        };
        let stored: usize = std::iter::once(&self.grid).chain(&self.nested).map(of).sum();
        let weights = (self.layout.groups * self.layout.group_len).max(1);
        f64::from(self.bits.get()) + stored as f64 / weights as f64
    }

    /// How often each code occurs.
    pub fn histogram(&self) -> CodeHistogram {
        let mut counts = vec![0; 1 << self.codes.bits()];
        let mut row = vec![0; self.codes.columns()];
        for index in 0..self.codes.rows() {
            self.codes.unpack_row(index, &mut row);
            for code in &row {
                counts[usize::from(*code)] += 1;
            }
        }
        CodeHistogram(counts)
    }
}

fn check_uniform(scale: &[f32], zeros: &[f32], kind: ZeroKind, groups: usize) -> Result<()> {
    if scale.len() != groups || zeros.len() != groups {
        return Err(Error::failed(format!(
            "{} scales and {} zero points for {groups} groups",
            scale.len(),
            zeros.len()
        )));
    }
    if let Some(s) = scale.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
        return Err(Error::failed(format!("scale {s} is not a positive number")));
    }
    let fits = |z: f32| match kind {
        ZeroKind::Integer => z.fract() == 0.0,
        ZeroKind::Half => (z - 0.5).fract() == 0.0,
        ZeroKind::Real => z.is_finite(),
    };
    match zeros.iter().find(|z| !fits(**z)) {
        Some(z) => Err(Error::failed(format!("zero point {z} is not of kind {kind:?}"))),
        None => Ok(()),
    }
}

/// Number of occurrences of each code, `[2^bits]`.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct CodeHistogram(pub Vec<u64>);

impl CodeHistogram {
    /// Adds another histogram; widths may differ.
    pub fn merge(&mut self, other: &Self) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (sum, n) in self.0.iter_mut().zip(&other.0) {
            *sum += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    fn weight() -> QuantizedWeight {
        let layout =
            GroupLayout { out: 1, inputs: 4, groups: 1, group_len: 4, axis: GroupAxis::In };
        QuantizedWeight::new(&[0, 2, 3, 3], grid(0.5, 2.0), Bits::new(2).unwrap(), layout).unwrap()
    }

    fn grid(scale: f32, zero: f32) -> Grid {
        let (scale, zero_point) = (vec![scale], vec![zero]);
        Grid::Uniform { scale, zero_point, zero_kind: ZeroKind::Integer }
    }

    #[test]
    fn the_hand_example_dequantizes() {
        assert_eq!(weight().dequantize(), [-1.0, 0.0, 0.5, 0.5]);
        assert_eq!(weight().histogram().0, [1, 0, 1, 2]);
    }

    #[test]
    fn damage_is_refused() {
        let QuantizedWeight { bits, layout, .. } = weight();
        let packed = |codes: &[u8]| QuantizedWeight::new(codes, grid(0.5, 2.0), bits, layout);
        assert!(packed(&[0, 4, 3, 3]).unwrap_err().to_string().contains("code 4"));
        assert!(packed(&[0, 2, 3]).is_err());
        for grid in [grid(f32::NAN, 2.0), grid(0.5, 1.5)] {
            assert!(QuantizedWeight { grid, ..weight() }.checked().is_err());
        }
        let wider = Bits::new(3).unwrap();
        assert!(QuantizedWeight { bits: wider, ..weight() }.checked().is_err());
    }

    #[test]
    fn scales_of_few_digits() {
        let digits = |digits: ScaleDigits, value| digits.rounded(vec![value]).unwrap();
        assert_eq!(digits(ScaleDigits::F32, 0.1), [0.1]);
        assert_eq!(digits(ScaleDigits::F16, 0.1), [1638.0 / 16384.0]);
        assert_eq!(digits(ScaleDigits::Bits7, 0.1), [102.0 / 1024.0]);
        assert_eq!(digits(ScaleDigits::Bits7, 127.5), [128.0], "a tie, to even");
        assert!(ScaleDigits::F16.rounded(vec![7e4]).is_err());
        assert_eq!(digits(ScaleDigits::Bits7, -1e-9), [-(2.0_f32.powi(-24))]);
        // Every 4-bit zero point times such a scale is a half precision number.
        for i in 1..2000_u16 {
            let scale = digits(ScaleDigits::Bits7, f32::from(i) * 1.37e-3)[0];
            for zero in 0..16_u8 {
                let offset = scale * f32::from(zero);
                assert_eq!(f16::from_f32(offset).to_f32().to_bits(), offset.to_bits());
            }
        }
        let real = Grid::Uniform {
            scale: vec![0.1],
            zero_point: vec![1.234_567],
            zero_kind: ZeroKind::Real,
        };
        let short = QuantizedWeight { grid: real, ..weight() }.with_scales(ScaleDigits::F16);
        let Grid::Uniform { zero_point, .. } = short.unwrap().grid else { unreachable!() };
        assert_eq!(zero_point, [1264.0 / 1024.0]);
    }
}
