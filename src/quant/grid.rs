//! What every method must end in: integer codes on a grid, on the host, ready to be packed.

use serde::{Deserialize, Serialize};

use super::{Bits, GroupLayout};
use crate::error::{Error, Result};

/// What a linear currently is; the alphabet in which a plan type-checks.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Repr {
    /// Float weights.
    Dense,
    /// Codes on a uniform grid.
    Uniform,
}

impl std::fmt::Display for Repr {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Dense => "dense",
            Self::Uniform => "uniform",
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
}

impl Grid {
    /// The representation this grid stands for.
    pub fn repr(&self) -> Repr {
        match self {
            Self::Uniform { .. } => Repr::Uniform,
        }
    }
}

/// A quantized linear: codes and grid. What was trained, and what is exported, bit for bit.
#[derive(Clone, Debug, PartialEq)]
pub struct QuantizedWeight {
    /// The stored integers, `[out, in]` row-major, each in `0..2^bits`.
    pub codes: Vec<u8>,
    /// The values they stand for.
    pub grid: Grid,
    /// Width of a code.
    pub bits: Bits,
    /// How weights fall into groups.
    pub layout: GroupLayout,
}

impl QuantizedWeight {
    /// Checks what a reader or a fold cannot guarantee by type: lengths, code range, finite steps.
    ///
    /// # Errors
    /// Says which value is wrong; the caller adds the tensor's name.
    pub fn checked(self) -> Result<Self> {
        let Self { codes, grid, bits, layout } = &self;
        let Grid::Uniform { scale, zero_point, zero_kind } = grid;
        if codes.len() != layout.len() {
            return Err(Error::failed(format!(
                "{} codes for a weight of {} x {}",
                codes.len(),
                layout.out,
                layout.inputs
            )));
        }
        if scale.len() != layout.groups || zero_point.len() != layout.groups {
            return Err(Error::failed(format!(
                "{} scales and {} zero points for {} groups",
                scale.len(),
                zero_point.len(),
                layout.groups
            )));
        }
        if let Some(code) = codes.iter().find(|c| **c > bits.max_code()) {
            return Err(Error::failed(format!("code {code} does not fit in {bits} bits")));
        }
        if let Some(s) = scale.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
            return Err(Error::failed(format!("scale {s} is not a positive number")));
        }
        let fits = |z: f32| match zero_kind {
            ZeroKind::Integer => z.fract() == 0.0,
            ZeroKind::Half => (z - 0.5).fract() == 0.0,
            ZeroKind::Real => z.is_finite(),
        };
        if let Some(z) = zero_point.iter().find(|z| !fits(**z)) {
            return Err(Error::failed(format!("zero point {z} is not of kind {zero_kind:?}")));
        }
        Ok(self)
    }

    /// The weights the codes stand for, `[out, in]` row-major.
    ///
    /// One subtraction (exact) and one multiplication per weight, the same two operations that
    /// every method's `fake_quant` ends in; so the result is bit-equal to what was trained.
    pub fn dequantize(&self) -> Vec<f32> {
        let Grid::Uniform { scale, zero_point, .. } = &self.grid;
        self.codes
            .chunks_exact(self.layout.group_len)
            .zip(scale.iter().zip(zero_point))
            .flat_map(|(group, (scale, zero))| {
                group.iter().map(move |c| scale * (f32::from(*c) - zero))
            })
            .collect()
    }

    /// Stored bits per weight in fewbit's own format: codes, a 32-bit scale per group, and zero
    /// points (8 bits each when small integers, 32 otherwise, none when they are all the same).
    pub fn bits_per_weight(&self) -> f64 {
        let Grid::Uniform { zero_point, zero_kind, .. } = &self.grid;
        let zero_bits = match zero_kind {
            _ if zero_point.windows(2).all(|w| w[0].to_bits() == w[1].to_bits()) => 0.0,
            ZeroKind::Integer if zero_point.iter().all(|z| (0.0..=255.0).contains(z)) => 8.0,
            _ => 32.0,
        };
        let group_bits = 32.0 + zero_bits;
        f64::from(self.bits.get()) + group_bits / self.layout.group_len as f64
    }

    /// How often each code occurs.
    pub fn histogram(&self) -> CodeHistogram {
        let mut counts = vec![0; self.bits.levels()];
        for code in &self.codes {
            counts[usize::from(*code)] += 1;
        }
        CodeHistogram(counts)
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
    use super::*;

    fn weight() -> QuantizedWeight {
        QuantizedWeight {
            codes: vec![0, 2, 3, 3],
            grid: Grid::Uniform {
                scale: vec![0.5],
                zero_point: vec![2.0],
                zero_kind: ZeroKind::Integer,
            },
            bits: Bits::new(2).unwrap(),
            layout: GroupLayout { out: 1, inputs: 4, groups: 1, group_len: 4 },
        }
    }

    #[test]
    fn the_hand_example_dequantizes() {
        assert_eq!(weight().dequantize(), [-1.0, 0.0, 0.5, 0.5]);
        assert_eq!(weight().histogram().0, [1, 0, 1, 2]);
    }

    #[test]
    fn damage_is_refused() {
        assert!(weight().checked().is_ok());
        let mut w = weight();
        w.codes[1] = 4;
        assert!(w.checked().unwrap_err().to_string().contains("code 4"));
        let mut w = weight();
        w.codes.pop();
        assert!(w.checked().is_err());
        let mut w = weight();
        w.grid = Grid::Uniform {
            scale: vec![f32::NAN],
            zero_point: vec![2.0],
            zero_kind: ZeroKind::Integer,
        };
        assert!(w.checked().is_err());
        let mut w = weight();
        w.grid =
            Grid::Uniform { scale: vec![0.5], zero_point: vec![1.5], zero_kind: ZeroKind::Integer };
        assert!(w.checked().is_err());
    }
}
