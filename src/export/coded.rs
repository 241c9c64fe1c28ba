//! A coded weight as every packer takes it: plain slices, groups along the inputs.

use std::borrow::Cow;

use half::{bf16, f16};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::quant::{Grid, GroupAxis, QuantizedWeight, Repr, ScaleDType, ZeroKind};
use crate::store::{DType, HostTensor};

/// Tensors of one linear under the names of the format.
pub(super) type Tensors = Vec<(String, HostTensor)>;

/// A coded weight: on a uniform grid `w = scale * (code - shift)`; in binary coding `w = ±scale_0 ±
/// scale_1 ... + shift`, added in this order in f32, bit `i` of a code set where `scale_i` is added.
#[derive(Clone, Debug)]
pub struct Coded<'a> {
    /// Output features (rows).
    pub out: usize,
    /// Input features (columns).
    pub inputs: usize,
    /// Weights of a row that share a scale; divides `inputs`.
    pub group_len: usize,
    /// Width of a code, or number of planes, 1 to 8.
    pub bits: u8,
    /// `[out, inputs]`, row-major.
    pub codes: Cow<'a, [u8]>,
    /// `[out, inputs / group_len]`; in binary coding `[out, inputs / group_len, bits]`.
    pub scale: Cow<'a, [f32]>,
    /// `[out, inputs / group_len]`: zero points in code units, or offsets.
    pub shift: Cow<'a, [f32]>,
    /// What the zero points are; `None` in binary coding.
    pub zero_kind: Option<ZeroKind>,
}

/// What a `config.json` has to say about one linear.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Layer {
    /// Its name, without `.weight`.
    pub name: String,
    /// `[out, inputs]`.
    pub shape: [usize; 2],
    /// Width of a code, or number of planes.
    pub bits: u8,
    /// Weights that share a scale.
    pub group_len: usize,
    /// Whether every zero point is `2^(bits-1)`.
    pub centred: bool,
}

impl Layer {
    /// Whether a row is a single group.
    pub fn is_whole_row(&self) -> bool {
        self.group_len == self.shape[1]
    }
}

impl<'a> Coded<'a> {
    /// The view of linear `name`, checked.
    ///
    /// # Errors
    /// When its groups run along the outputs, or lengths or values cannot be.
    pub fn new(name: &str, weight: &'a QuantizedWeight) -> Result<Self> {
        if weight.layout.axis == GroupAxis::Out {
            return Err(Error::preflight(
                "its groups run along the outputs, which no other format holds",
            )
            .at(name)
            .fix("format.fewbit or format.dequantized, or a method that groups along the inputs"));
        }
        let (scale, shift, zero_kind) = match &weight.grid {
            Grid::Uniform { scale, zero_point, zero_kind } => (scale, zero_point, Some(*zero_kind)),
            Grid::BinaryCoding { alpha, offset } => (alpha, offset, None),
            Grid::Codebook { .. } => {
                let what = "the weight is sums of centroids of codebooks, which format.fewbit and format.dequantized alone hold";
                let fix =
                    "format.fewbit, or format.dequantized, which is as large as the float model";
                return Err(Error::preflight(what).at(name).fix(fix));
            }
        };
        weight.check().map_err(|e| e.at(name))?;
        let (inputs, group_len) = (weight.layout.inputs, weight.layout.group_len);
        let divides = inputs.is_multiple_of(group_len) || group_len.is_multiple_of(inputs);
        if inputs == 0 || group_len == 0 || !divides {
            let what = format!("group length {group_len} does not divide {inputs} inputs");
            return Err(Error::failed(what).at(name));
        }
        // A scale for several rows becomes one for each.
        let copies = group_len.div_ceil(inputs);
        let spread = |values: &'a [f32], each: usize| -> Cow<'a, [f32]> {
            if copies == 1 {
                return Cow::Borrowed(values);
            }
            values.chunks(each.max(1)).flat_map(|group| group.repeat(copies)).collect()
        };
        let planes = scale.len() / shift.len().max(1);
        Ok(Self {
            out: weight.layout.out,
            inputs,
            group_len: group_len.min(inputs),
            bits: weight.bits.get(),
            codes: Cow::Owned(weight.codes.to_vec()),
            scale: spread(scale, planes),
            shift: spread(shift, 1),
            zero_kind,
        })
    }

    /// As [`Coded::new`], for formats of evenly spaced levels.
    ///
    /// # Errors
    /// As there, and for binary coding.
    pub fn uniform(name: &str, weight: &'a QuantizedWeight) -> Result<Self> {
        let planes = weight.grid.repr() == Repr::BinaryCoding;
        if !planes || weight.layout.axis == GroupAxis::Out {
            return Self::new(name, weight);
        }
        let what = "the weight is binary-coded, and this format holds evenly spaced levels";
        let fix = "format.bcq, format.fewbit or format.dequantized";
        Err(Error::preflight(what).at(name).fix(fix))
    }

    /// The same view, borrowed.
    pub fn view(&self) -> Coded<'_> {
        Coded {
            codes: Cow::Borrowed(&self.codes),
            scale: Cow::Borrowed(&self.scale),
            shift: Cow::Borrowed(&self.shift),
            ..*self
        }
    }

    /// Groups in a row.
    pub fn groups(&self) -> usize {
        self.inputs / self.group_len
    }

    /// Whether every zero point is `2^(bits-1)`, what formats call symmetric.
    pub fn is_centred(&self) -> bool {
        let middle = f32::from(1_u8 << (self.bits - 1));
        self.shift.iter().all(|zero| zero.to_bits() == middle.to_bits())
    }

    /// Zero points as stored integers; meant for grids whose zero points lie in `0..2^bits`.
    pub(super) fn zero_codes(&self) -> Vec<u8> {
        self.shift.iter().map(|zero| *zero as u8).collect()
    }
}

/// The largest of `sizes` (descending) that divides `group_len`: such groups hold the same grid
/// when each scale is repeated.
pub(super) fn stored_group(group_len: usize, sizes: &[usize]) -> Option<usize> {
    sizes.iter().copied().find(|size| group_len.is_multiple_of(*size))
}

/// Each value `times` over.
pub(super) fn repeated(values: &[f32], times: usize) -> Vec<f32> {
    values.iter().flat_map(|value| std::iter::repeat_n(*value, times)).collect()
}

/// The transpose of row-major `values` with `columns` columns.
pub(super) fn transposed<T: Copy>(values: &[T], columns: usize) -> Vec<T> {
    let rows = values.len() / columns.max(1);
    (0..values.len()).map(|i| values[i % rows * columns + i / rows]).collect()
}

/// Packed words under the signed type that most formats label them with.
pub(super) fn words_as_i32(shape: [usize; 2], words: &[u32]) -> HostTensor {
    let words: Vec<i32> = words.iter().map(|word| word.cast_signed()).collect();
    HostTensor::i32(shape, &words)
}

/// A tensor of `dtype`, which has to be a float type; rounds unless [`is_exact`] holds.
pub(super) fn floats(dtype: DType, shape: impl Into<Vec<usize>>, values: &[f32]) -> HostTensor {
    match dtype {
        DType::F16 => HostTensor::f16_from_f32(shape, values),
        DType::BF16 => HostTensor::bf16_from_f32(shape, values),
        _ => HostTensor::f32(shape, values),
    }
}

/// Whether `dtype` holds `value` exactly.
pub(super) fn is_exact(dtype: DType, value: f32) -> bool {
    let stored = match dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    };
    stored.to_bits() == value.to_bits()
}

/// The most frequent of `keys`, the smallest at a tie: what a config states once, so that only the
/// other linears need an entry of their own.
pub(super) fn most_common<K: Copy + Ord>(keys: &[K]) -> Option<K> {
    let count = |key: &K| keys.iter().filter(|other| *other == key).count();
    keys.iter().copied().max_by_key(|key| (count(key), std::cmp::Reverse(*key)))
}

/// A group length as a config states it.
pub(super) fn stated(group: Option<usize>) -> Value {
    group.map_or(json!(-1), |group| json!(group))
}

/// The type of scales in a file.
pub(super) fn dtype(scales: ScaleDType) -> DType {
    match scales {
        ScaleDType::F32 => DType::F32,
        ScaleDType::F16 => DType::F16,
    }
}

#[cfg(test)]
pub(crate) mod sample {
    //! Weights for the tests of the packers.

    use super::*;

    /// A uniform grid that owns its values.
    #[derive(Clone, Debug)]
    pub(crate) struct Grid {
        pub(crate) shape: [usize; 2],
        pub(crate) group_len: usize,
        pub(crate) bits: u8,
        pub(crate) codes: Vec<u8>,
        pub(crate) scale: Vec<f32>,
        pub(crate) zero: Vec<f32>,
        pub(crate) kind: ZeroKind,
    }

    impl Grid {
        pub(crate) fn coded(&self) -> Coded<'_> {
            Coded {
                out: self.shape[0],
                inputs: self.shape[1],
                group_len: self.group_len,
                bits: self.bits,
                codes: Cow::Borrowed(&self.codes),
                scale: Cow::Borrowed(&self.scale),
                shift: Cow::Borrowed(&self.zero),
                zero_kind: Some(self.kind),
            }
        }

        pub(crate) fn centre(&mut self) {
            self.zero.fill(f32::from(1_u8 << (self.bits - 1)));
            self.kind = ZeroKind::Integer;
        }
    }

    impl Coded<'_> {
        pub(crate) fn into_owned(self) -> Coded<'static> {
            Coded {
                codes: self.codes.into_owned().into(),
                scale: self.scale.into_owned().into(),
                shift: self.shift.into_owned().into(),
                ..self
            }
        }

        /// What a `config.json` has to say about it.
        pub(crate) fn layer(&self, name: &str) -> Layer {
            Layer {
                name: name.to_owned(),
                shape: [self.out, self.inputs],
                bits: self.bits,
                group_len: self.group_len,
                centred: self.is_centred(),
            }
        }

        /// The weights of a uniform grid, `[out, inputs]`.
        pub(crate) fn dequantize(&self) -> Vec<f32> {
            self.codes
                .chunks_exact(self.group_len)
                .zip(self.scale.iter().zip(&*self.shift))
                .flat_map(|(codes, (s, z))| {
                    codes.iter().map(move |code| s * (f32::from(*code) - z))
                })
                .collect()
        }
    }

    /// A small deterministic generator.
    pub(crate) fn generator(seed: u32) -> impl FnMut() -> u32 {
        let mut state = seed.wrapping_mul(2_654_435_769).wrapping_add(12_345);
        move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        }
    }

    /// Random codes; scales are f16 numbers when `short`, and use all bits of f32 otherwise; real
    /// zero points are multiples of 1/16 when `short`.
    pub(crate) fn grid(
        shape: [usize; 2],
        group_len: usize,
        bits: u8,
        kind: ZeroKind,
        short: bool,
        seed: u32,
    ) -> Grid {
        let mut next = generator(seed);
        let groups = shape[0] * shape[1] / group_len;
        let levels = 1_u32 << bits;
        let codes = (0..shape[0] * shape[1]).map(|_| (next() % levels) as u8).collect();
        let mut scale = || {
            let scale = (next() % 4096 + 1024) as f32 / 300_000.0 + (next() % 977) as f32 * 1e-9;
            if short { f16::from_f32(scale).to_f32() } else { scale }
        };
        let scale = (0..groups).map(|_| scale()).collect();
        let mut zero = || {
            let integer = (next() % levels) as f32;
            match kind {
                ZeroKind::Integer => integer,
                ZeroKind::Half => integer + 0.5,
                ZeroKind::Real if short => integer + (next() % 16) as f32 / 16.0,
                ZeroKind::Real => integer + (next() % 1000) as f32 / 1000.0 - 0.3,
            }
        };
        let zero = (0..groups).map(|_| zero()).collect();
        Grid { shape, group_len, bits, codes, scale, zero, kind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Bits, GroupLayout, PackedCodes};

    #[test]
    fn damage_is_refused() {
        let layout = |group_len, axis| {
            let groups = 8 / group_len;
            GroupLayout { out: 2, inputs: 4, groups, group_len, axis }
        };
        let weight = |scale: f32, layout: GroupLayout| {
            let (scale, zero_point) = (vec![scale; layout.groups], vec![1.0; layout.groups]);
            let grid = Grid::Uniform { scale, zero_point, zero_kind: ZeroKind::Integer };
            let columns = layout.stored()[1];
            let codes = PackedCodes::pack(&[1; 8], columns, 2);
            let bits = Bits::new(2).unwrap();
            QuantizedWeight { codes, grid, bits, layout, nested: Vec::new() }
        };
        let fault = |weight: &QuantizedWeight| Coded::new("x", weight).unwrap_err().to_string();
        let good = weight(0.5, layout(2, GroupAxis::In));
        assert_eq!(Coded::uniform("x", &good).unwrap().codes[..], [1; 8]);
        // A scale of the whole matrix is one for each row.
        let whole = weight(0.5, layout(8, GroupAxis::In));
        let view = Coded::new("x", &whole).unwrap();
        assert_eq!((view.group_len, &view.scale[..]), (4, &[0.5; 2][..]));
        assert!(fault(&weight(f32::NAN, layout(2, GroupAxis::In))).contains("scale NaN is not"));
        assert!(fault(&weight(0.5, layout(2, GroupAxis::Out))).contains("along the outputs"));
        let odd = GroupLayout { out: 3, inputs: 4, groups: 4, group_len: 3, axis: GroupAxis::In };
        let codes = PackedCodes::pack(&[1; 12], 4, 2);
        let odd = QuantizedWeight { codes, ..weight(0.5, odd) };
        assert!(fault(&odd).contains("group length 3 does not divide 4 inputs"), "{}", fault(&odd));
    }

    #[test]
    fn helpers_by_hand() {
        assert_eq!(transposed(&[1, 2, 3, 4, 5, 6], 3), [1, 4, 2, 5, 3, 6]);
        assert_eq!(transposed::<u8>(&[], 0), [0; 0]);
        assert_eq!(repeated(&[1.0, 2.0], 2), [1.0, 1.0, 2.0, 2.0]);
        assert_eq!(stored_group(192, &[128, 64, 32]), Some(64));
        assert_eq!(stored_group(48, &[128, 64, 32]), None);
        assert_eq!(most_common(&[3, 1, 2, 1]), Some(1));
        assert_eq!(most_common(&[3, 1]), Some(1));
        assert_eq!(most_common::<u8>(&[]), None);
        assert!(is_exact(DType::F16, 0.125) && !is_exact(DType::F16, 0.1));
        assert!(is_exact(DType::BF16, 2_f32.powi(100)) && !is_exact(DType::F16, 2_f32.powi(100)));
    }
}
