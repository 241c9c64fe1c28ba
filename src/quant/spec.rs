//! What a linear is to become: bits, group size, symmetry. Invalid values cannot be built.

use std::fmt;
use std::num::NonZeroUsize;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::error::{Error, Result};
use crate::schema::schema_of;

/// Width of a code, 1 to 8 bits.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct Bits(u8);

impl Bits {
    /// Two.
    pub const TWO: Self = Self(2);

    /// The widest, a byte.
    pub const EIGHT: Self = Self(8);

    /// A width of `bits`.
    ///
    /// # Errors
    /// Outside `1..=8`.
    pub fn new(bits: u8) -> Result<Self> {
        Self::try_from(i64::from(bits)).map_err(Error::usage)
    }

    /// The width as a number.
    pub fn get(self) -> u8 {
        self.0
    }

    /// The highest code, `2^bits - 1` (the papers' `L`).
    pub fn max_code(self) -> u8 {
        u8::MAX >> (8 - self.0)
    }

    /// The number of codes, `2^bits`.
    pub fn levels(self) -> usize {
        1 << self.0
    }
}

impl TryFrom<i64> for Bits {
    type Error = String;

    fn try_from(bits: i64) -> Result<Self, String> {
        match u8::try_from(bits) {
            Ok(bits @ 1..=8) => Ok(Self(bits)),
            _ => Err(format!("bits = {bits} is not in 1..=8")),
        }
    }
}

schema_of!(
    Bits,
    "A number of bits.",
    { "type": "integer", "minimum": 1, "maximum": 8 }
);

impl From<Bits> for i64 {
    fn from(bits: Bits) -> Self {
        Self::from(bits.0)
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many weights share one scale. In a recipe: `"tensor"`, `"channel"` or a number.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GroupSize {
    /// One scale for the whole matrix.
    PerTensor,
    /// One scale for each output row.
    PerChannel,
    /// One scale for each run of this many weights along the input dimension.
    Of(NonZeroUsize),
}

impl fmt::Display for GroupSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerTensor => f.write_str("tensor"),
            Self::PerChannel => f.write_str("channel"),
            Self::Of(size) => size.fmt(f),
        }
    }
}

impl Serialize for GroupSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::PerTensor | Self::PerChannel => serializer.collect_str(self),
            Self::Of(size) => serializer.serialize_u64(size.get() as u64),
        }
    }
}

schema_of!(
    GroupSize,
    "Weights that share a scale.",
    {
        "oneOf": [
            { "const": "tensor", "description": "All of a linear." },
            { "const": "channel", "description": "An output row." },
            { "type": "integer", "minimum": 1 }
        ]
    }
);

impl<'de> Deserialize<'de> for GroupSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = GroupSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"tensor\", \"channel\" or a number of weights")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<GroupSize, E> {
                match text {
                    "tensor" => Ok(GroupSize::PerTensor),
                    "channel" => Ok(GroupSize::PerChannel),
                    _ => Err(E::unknown_variant(text, &["tensor", "channel", "a number"])),
                }
            }

            fn visit_i64<E: de::Error>(self, size: i64) -> Result<GroupSize, E> {
                usize::try_from(size).ok().and_then(NonZeroUsize::new).map(GroupSize::Of).ok_or_else(
                    || E::custom(format!("group_size = {size} must be at least 1; \"channel\" means one scale per output row")),
                )
            }

            fn visit_u64<E: de::Error>(self, size: u64) -> Result<GroupSize, E> {
                self.visit_i64(i64::try_from(size).unwrap_or(i64::MAX))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Where zero lies in the grid.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Symmetry {
    /// Zero point chosen from the data.
    Asymmetric,
    /// Zero point fixed at `2^(bits-1)`, step `max|W| / (2^(bits-1) - 1)`: never clips
    /// (OmniQuant's and ParetoQ's "AbsMax").
    AbsMax,
    /// Zero point fixed at `2^(bits-1)`, step `2 max|W| / (2^bits - 1)`: uses every code and
    /// clips the positive extreme by half a step (the LRQ code's).
    FullRange,
}

impl Symmetry {
    /// Whether the zero point is fixed in the middle.
    pub fn is_symmetric(self) -> bool {
        self != Self::Asymmetric
    }
}

impl Serialize for Symmetry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Asymmetric => serializer.serialize_bool(false),
            Self::AbsMax => serializer.serialize_str("absmax"),
            Self::FullRange => serializer.serialize_str("full_range"),
        }
    }
}

schema_of!(
    Symmetry,
    "Where zero lies.",
    {
        "oneOf": [
            { "const": false, "description": "Zero point chosen from the data." },
            { "const": true, "description": "As \"absmax\"." },
            {
                "const": "absmax",
                "description": "Zero point in the middle, step max|W| / (2^(bits-1) - 1): never clips."
            },
            {
                "const": "full_range",
                "description": "Zero point in the middle, step 2 max|W| / (2^bits - 1): uses every code."
            }
        ]
    }
);

impl<'de> Deserialize<'de> for Symmetry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Symmetry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("true, false, \"absmax\" or \"full_range\"")
            }

            fn visit_bool<E: de::Error>(self, symmetric: bool) -> Result<Symmetry, E> {
                Ok(if symmetric { Symmetry::AbsMax } else { Symmetry::Asymmetric })
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Symmetry, E> {
                match text {
                    "absmax" => Ok(Symmetry::AbsMax),
                    "full_range" => Ok(Symmetry::FullRange),
                    _ => Err(E::unknown_variant(text, &["absmax", "full_range"])),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What one linear is quantized to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct QuantSpec {
    /// Width of a code.
    pub bits: Bits,
    /// Weights that share a scale.
    pub group_size: GroupSize,
    /// Where zero lies.
    pub symmetry: Symmetry,
}

impl QuantSpec {
    /// The grouping of a weight `[out, in]`; never pads, never rounds.
    ///
    /// # Errors
    /// When the group size does not divide `in`; names the nearest divisor.
    pub fn layout(&self, shape: [usize; 2]) -> Result<GroupLayout> {
        self.layout_along(shape, GroupAxis::In)
    }

    /// As [`QuantSpec::layout`], with groups along a chosen dimension. Along the outputs, the group
    /// size must divide `out`, and `"channel"` means one scale per input column.
    ///
    /// # Errors
    /// When the group size does not divide that dimension.
    pub fn layout_along(&self, shape: [usize; 2], axis: GroupAxis) -> Result<GroupLayout> {
        let [out, inputs] = shape;
        let (rows, columns, dimension) = match axis {
            GroupAxis::In => (out, inputs, "in_features"),
            GroupAxis::Out => (inputs, out, "out_features"),
        };
        if self.bits.get() == 1 && self.symmetry == Symmetry::AbsMax {
            return Err(Error::preflight("a symmetric absmax grid needs at least 2 bits")
                .fix("symmetric = false, or symmetric = \"full_range\""));
        }
        let (groups, group_len) = match self.group_size {
            GroupSize::PerTensor => (1, out * inputs),
            GroupSize::PerChannel => (rows, columns),
            GroupSize::Of(size) if columns % size.get() == 0 => {
                (rows * (columns / size.get()), size.get())
            }
            GroupSize::Of(size) => {
                let size = size.get();
                let near = (1..=columns)
                    .filter(|d| columns.is_multiple_of(*d))
                    .min_by_key(|d| d.abs_diff(size))
                    .unwrap_or(1);
                return Err(Error::preflight(format!(
                    "group_size {size} does not divide {dimension} {columns}"
                ))
                .fix(format!("group_size = {near}, or a [[quant.override]] for this linear")));
            }
        };
        Ok(GroupLayout { out, inputs, groups, group_len, axis })
    }
}

impl fmt::Display for QuantSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "w{}", self.bits)?;
        if let GroupSize::Of(size) = self.group_size {
            write!(f, "g{size}")?;
        }
        Ok(())
    }
}

/// The dimension of a weight `[out, in]` along which the members of a group lie.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupAxis {
    /// Runs of inputs within one output row: what every runtime reads.
    #[default]
    In,
    /// Runs of outputs within one input column, which keeps an outlying input channel to itself
    /// (AdaDim, arXiv 2309.15531). The grouped form is that of the transposed weight.
    Out,
}

/// How a weight `[out, in]` falls into groups; `groups * group_len == out * in`.
///
/// Groups run along the input dimension in row-major order, so the grouped form
/// `[groups, group_len]` is a plain reshape of a contiguous weight; along the output dimension, of
/// its transpose.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct GroupLayout {
    /// Output features (rows).
    pub out: usize,
    /// Input features (columns).
    pub inputs: usize,
    /// Number of groups in the whole matrix.
    pub groups: usize,
    /// Weights in a group.
    pub group_len: usize,
    /// Along which dimension.
    pub axis: GroupAxis,
}

impl GroupLayout {
    /// Shape in which codes are kept: `[out, in]`, or `[in, out]` for groups along the outputs.
    pub fn stored(&self) -> [usize; 2] {
        match self.axis {
            GroupAxis::In => [self.out, self.inputs],
            GroupAxis::Out => [self.inputs, self.out],
        }
    }

    /// Shape of the scales in a file: `[stored rows, groups per row]`, or `[1, 1]` per tensor.
    pub fn scale_shape(&self) -> [usize; 2] {
        let [rows, _] = self.stored();
        if self.groups < rows { [1, 1] } else { [rows, self.groups / rows] }
    }

    /// The grouped shape `[groups, group_len]`.
    pub fn grouped(&self) -> [usize; 2] {
        [self.groups, self.group_len]
    }

    /// Whether there is a weight, and groups fill it: what a file says need not be so. The bound is far
    /// beyond any matrix, and no product of its sizes and widths leaves 64 bits.
    pub fn is_sound(&self) -> bool {
        let len = self.out.checked_mul(self.inputs).filter(|len| (1..=1 << 40).contains(len));
        len.is_some() && self.group_len > 0 && self.groups.checked_mul(self.group_len) == len
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.out * self.inputs
    }

    /// Whether there is no weight at all.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(bits: u8, group_size: GroupSize) -> QuantSpec {
        QuantSpec { bits: Bits::new(bits).unwrap(), group_size, symmetry: Symmetry::Asymmetric }
    }

    #[test]
    fn bits_outside_one_to_eight_are_refused() {
        assert!(Bits::new(0).is_err());
        assert!(Bits::new(9).is_err());
        for bits in 1..=8 {
            let bits = Bits::new(bits).unwrap();
            assert_eq!(usize::from(bits.max_code()) + 1, bits.levels());
        }
    }

    #[test]
    fn layouts() {
        let channel = spec(4, GroupSize::PerChannel).layout([6, 8]).unwrap();
        assert_eq!((channel.grouped(), channel.scale_shape()), ([6, 8], [6, 1]));
        let tensor = spec(4, GroupSize::PerTensor).layout([6, 8]).unwrap();
        assert_eq!((tensor.grouped(), tensor.scale_shape()), ([1, 48], [1, 1]));
        let group = spec(4, GroupSize::Of(NonZeroUsize::new(4).unwrap())).layout([6, 8]).unwrap();
        assert_eq!((group.grouped(), group.scale_shape()), ([12, 4], [6, 2]));
    }

    #[test]
    fn a_group_that_does_not_divide_is_refused_with_the_nearest_divisor() {
        let error = spec(4, GroupSize::Of(NonZeroUsize::new(32).unwrap())).layout([64, 172]);
        let text = error.unwrap_err().to_string();
        assert!(text.contains("group_size 32 does not divide in_features 172"), "{text}");
        assert!(text.contains("group_size = 43"), "{text}");
    }

    #[test]
    fn recipe_spellings() {
        #[derive(Debug, Deserialize, PartialEq)]
        struct T {
            group_size: GroupSize,
            symmetric: Symmetry,
        }
        let parse = |text: &str| toml::from_str::<T>(text);
        let t = parse("group_size = \"channel\"\nsymmetric = true").unwrap();
        assert_eq!(t, T { group_size: GroupSize::PerChannel, symmetric: Symmetry::AbsMax });
        let t = parse("group_size = 128\nsymmetric = \"full_range\"").unwrap();
        assert_eq!(t.group_size.to_string(), "128");
        assert!(parse("group_size = 0\nsymmetric = false").is_err());
        assert!(parse("group_size = \"chanel\"\nsymmetric = false").is_err());
    }
}
