//! The numbers that scales are, in training and in files.

use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How scales are stored in a file.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDType {
    /// 32-bit floats.
    #[default]
    F32,
    /// Half precision.
    F16,
}

impl ScaleDType {
    /// The name in recipes and files.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
        }
    }

    /// The shortest type that holds all of them exactly.
    pub fn of(values: &[f32]) -> Self {
        let is_half = |value: &f32| f16::from_f32(*value).to_f32().to_bits() == value.to_bits();
        if values.iter().all(is_half) { Self::F16 } else { Self::F32 }
    }

    /// Bits of a number.
    pub fn bits(self) -> u32 {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
        }
    }

    /// The nearest values of this type.
    ///
    /// # Errors
    /// As [`ScaleDigits::rounded`].
    pub fn rounded(self, values: Vec<f32>) -> Result<Vec<f32>> {
        match self {
            Self::F32 => Ok(values),
            Self::F16 => ScaleDigits::F16.rounded(values),
        }
    }
}

/// The numbers that trained scales are, so that formats hold them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDigits {
    /// Any 32-bit floats.
    #[default]
    F32,
    /// Half precision, which most runtimes store.
    F16,
    /// Half precision with seven significant bits: such a scale times any 4-bit zero point is a
    /// half precision number too, as GGUF's Q4_1 stores it.
    Bits7,
}

impl ScaleDigits {
    /// The name in recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bits7 => "bits7",
        }
    }

    /// What the planes' scales of binary coding get: nothing is multiplied with them.
    #[must_use]
    pub fn of_planes(self) -> Self {
        if self == Self::Bits7 { Self::F16 } else { self }
    }

    /// Significant bits that are kept.
    pub fn significant(self) -> u32 {
        match self {
            Self::F32 => f32::MANTISSA_DIGITS,
            Self::F16 => f16::MANTISSA_DIGITS,
            Self::Bits7 => 7,
        }
    }

    /// The nearest such numbers, of which none but zero becomes zero.
    ///
    /// # Errors
    /// When one lies beyond the largest number of half precision.
    pub fn rounded(self, values: Vec<f32>) -> Result<Vec<f32>> {
        if self == Self::F32 {
            return Ok(values);
        }
        let half = |value: f32| {
            let rounded = f16::from_f32(shortened(value, self.significant())).to_f32();
            if rounded == 0.0 && value != 0.0 {
                // A scale is not zero: what training drove to its floor stays as good as nothing.
                Ok(f16::from_bits(1).to_f32().copysign(value))
            } else if rounded.is_finite() {
                Ok(rounded)
            } else {
                Err(Error::failed(format!("scale {value:e} does not fit in half precision"))
                    .fix("scales of \"f32\""))
            }
        };
        values.into_iter().map(half).collect()
    }
}

/// The nearest number of this many significant bits, fewer than f32's 24; ties to even.
fn shortened(value: f32, significant: u32) -> f32 {
    let dropped = f32::MANTISSA_DIGITS - significant;
    let bits = value.to_bits();
    let half = (1 << (dropped - 1)) - 1 + (bits >> dropped & 1);
    f32::from_bits((bits + half) & !((1 << dropped) - 1))
}
