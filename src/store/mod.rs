//! Tensors on disk and in host memory, without burn.
//!
//! [`HostTensor`] is a tensor as bytes: a dtype, a shape and little-endian values. A
//! [`TensorSource`] reads such tensors by name, one at a time, so that a model larger than memory
//! can be walked. [`safetensors`] reads and writes checkpoints; [`folder`] makes files and folders
//! appear either whole or not at all.

use std::path::PathBuf;

use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub mod embedded;
pub mod folder;
pub mod hashes;
mod hub;
pub mod locate;
pub mod safetensors;
mod scratch;

pub use scratch::Scratch;

/// What to do about a checkpoint whose bytes are wrong.
pub(crate) const DAMAGED: &str = "the checkpoint is damaged; download it again";

/// Element type of a tensor, under its safetensors name.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "UPPERCASE")]
#[allow(missing_docs)] // the names say it
pub enum DType {
    F64,
    F32,
    F16,
    BF16,
    #[serde(rename = "F8_E4M3")]
    F8E4M3,
    #[serde(rename = "F8_E5M2")]
    F8E5M2,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

impl DType {
    /// Every dtype fewbit can carry; it computes with few of them.
    pub const ALL: [Self; 15] = [
        Self::F64,
        Self::F32,
        Self::F16,
        Self::BF16,
        Self::F8E4M3,
        Self::F8E5M2,
        Self::I64,
        Self::I32,
        Self::I16,
        Self::I8,
        Self::U64,
        Self::U32,
        Self::U16,
        Self::U8,
        Self::Bool,
    ];

    /// The name in a safetensors header.
    pub fn name(self) -> &'static str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::F8E4M3 => "F8_E4M3",
            Self::F8E5M2 => "F8_E5M2",
            Self::I64 => "I64",
            Self::I32 => "I32",
            Self::I16 => "I16",
            Self::I8 => "I8",
            Self::U64 => "U64",
            Self::U32 => "U32",
            Self::U16 => "U16",
            Self::U8 => "U8",
            Self::Bool => "BOOL",
        }
    }

    /// The dtype of a safetensors name; `None` for a name that is not in [`DType::ALL`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|dtype| dtype.name() == name)
    }

    /// Whether it is a float type that weights are read in.
    pub fn is_read(self) -> bool {
        matches!(self, Self::F32 | Self::F16 | Self::BF16)
    }

    /// Bytes per element: 1, 2, 4 or 8.
    pub fn size(self) -> usize {
        match self {
            Self::F64 | Self::I64 | Self::U64 => 8,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F16 | Self::BF16 | Self::I16 | Self::U16 => 2,
            Self::F8E4M3 | Self::F8E5M2 | Self::I8 | Self::U8 | Self::Bool => 1,
        }
    }

    /// Bytes of a tensor of `shape`; `None` when the count overflows, which only a damaged header
    /// can cause.
    pub fn bytes_for(self, shape: &[usize]) -> Option<usize> {
        shape.iter().try_fold(self.size(), |bytes, &size| bytes.checked_mul(size))
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor in host memory.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct HostTensor {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first; empty for a scalar.
    pub shape: Vec<usize>,
    /// Row-major values, little-endian: `shape` product × `dtype.size()` bytes.
    pub bytes: Vec<u8>,
}

impl HostTensor {
    /// An F32 tensor. Like every constructor here it trusts that `values` fills `shape`; the
    /// writers check it ([`HostTensor::check`]).
    pub fn f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        Self::from_values(DType::F32, shape, values, f32::to_le_bytes)
    }

    /// A matrix with rows for columns.
    ///
    /// # Errors
    /// When it is no matrix.
    pub fn transposed(&self) -> Result<Self> {
        let &[rows, columns] = &self.shape[..] else {
            return Err(Error::failed(format!("a tensor of shape {:?} is no matrix", self.shape)));
        };
        let size = self.dtype.size();
        let element = |place: usize| &self.bytes[place * size..][..size];
        let places = (0..columns).flat_map(|c| (0..rows).map(move |r| r * columns + c));
        let mut bytes = Vec::with_capacity(self.bytes.len());
        places.for_each(|place| bytes.extend_from_slice(element(place)));
        Ok(Self { dtype: self.dtype, shape: vec![columns, rows], bytes })
    }

    /// A BF16 tensor; each value is rounded to the nearest, ties to even.
    pub fn bf16_from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        Self::from_values(DType::BF16, shape, values, |value| bf16::from_f32(value).to_le_bytes())
    }

    /// An F16 tensor; each value is rounded to the nearest, ties to even. Magnitudes of 65520 and
    /// more become infinite.
    pub fn f16_from_f32(shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        Self::from_values(DType::F16, shape, values, |value| f16::from_f32(value).to_le_bytes())
    }

    /// An I64 tensor.
    pub fn i64(shape: impl Into<Vec<usize>>, values: &[i64]) -> Self {
        Self::from_values(DType::I64, shape, values, i64::to_le_bytes)
    }

    /// An I32 tensor.
    pub fn i32(shape: impl Into<Vec<usize>>, values: &[i32]) -> Self {
        Self::from_values(DType::I32, shape, values, i32::to_le_bytes)
    }

    /// A U32 tensor, for instance packed words.
    pub fn u32(shape: impl Into<Vec<usize>>, values: &[u32]) -> Self {
        Self::from_values(DType::U32, shape, values, u32::to_le_bytes)
    }

    /// A U8 tensor.
    pub fn u8(shape: impl Into<Vec<usize>>, values: &[u8]) -> Self {
        Self::from_values(DType::U8, shape, values, u8::to_le_bytes)
    }

    fn from_values<T: Copy, const N: usize>(
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        values: &[T],
        encode: impl Fn(T) -> [u8; N],
    ) -> Self {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), values.len(), "values of {shape:?}");
        let mut bytes = vec![0; values.len() * N];
        for (bytes, &value) in bytes.as_chunks_mut::<N>().0.iter_mut().zip(values) {
            *bytes = encode(value);
        }
        Self { dtype, shape, bytes }
    }

    /// Checks the length of `bytes`.
    ///
    /// # Errors
    /// When it is not exactly what `dtype` and `shape` ask for.
    pub fn check(&self) -> Result<()> {
        if self.dtype.bytes_for(&self.shape) == Some(self.bytes.len()) {
            return Ok(());
        }
        let bytes = self.bytes.len();
        let what =
            format!("a {} tensor of shape {:?} cannot have {bytes} bytes", self.dtype, self.shape);
        Err(Error::damaged(what, DAMAGED))
    }

    /// The values as f32, widened exactly from F32, F16 or BF16.
    ///
    /// # Errors
    /// For any other dtype, and when `bytes` does not fit the shape.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match self.dtype {
            DType::F32 => self.decode(f32::from_le_bytes),
            DType::F16 => self.decode(|bytes| f16::from_le_bytes(bytes).to_f32()),
            DType::BF16 => self.decode(|bytes| bf16::from_le_bytes(bytes).to_f32()),
            _ => Err(self.wrong_dtype("F32, F16 or BF16")),
        }
    }

    /// The values as u32 words, from U32 or from the bit patterns of I32 (how some formats label
    /// packed words).
    ///
    /// # Errors
    /// For any other dtype, and when `bytes` does not fit the shape.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        match self.dtype {
            DType::U32 | DType::I32 => self.decode(u32::from_le_bytes),
            _ => Err(self.wrong_dtype("U32 or I32")),
        }
    }

    /// The values of a U8 tensor.
    ///
    /// # Errors
    /// For any other dtype, and when `bytes` does not fit the shape.
    pub fn to_u8(&self) -> Result<Vec<u8>> {
        match self.dtype {
            DType::U8 => self.decode(u8::from_le_bytes),
            _ => Err(self.wrong_dtype("U8")),
        }
    }

    fn decode<T, const N: usize>(&self, decode: impl Fn([u8; N]) -> T) -> Result<Vec<T>> {
        self.check()?;
        Ok(self.bytes.as_chunks::<N>().0.iter().map(|&chunk| decode(chunk)).collect())
    }

    fn wrong_dtype(&self, expected: &str) -> Error {
        let what = format!("the tensor is {}, expected {expected}", self.dtype);
        Error::damaged(what, "a version of the model that holds this tensor so")
    }

    /// SHA-256 of `bytes` alone, in lowercase hex: dtype and shape do not enter.
    pub fn sha256(&self) -> String {
        hex(&Sha256::digest(&self.bytes))
    }
}

/// Where a tensor lies.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TensorInfo {
    /// Element type.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// The file that holds the values.
    pub file: PathBuf,
    /// First byte, counted from the start of `file`.
    pub start: u64,
    /// One past the last byte, counted from the start of `file`.
    pub end: u64,
}

/// Tensors that can be read by name, one at a time.
pub trait TensorSource {
    /// Every name, in ascending order.
    fn names(&self) -> Vec<&str>;

    /// Dtype, shape and place of a tensor, without reading its values.
    fn info(&self, name: &str) -> Option<&TensorInfo>;

    /// Reads one tensor.
    ///
    /// # Errors
    /// When there is none of this name, and when its file cannot be read.
    fn read(&self, name: &str) -> Result<HostTensor>;

    /// Reads one floating-point tensor as f32.
    ///
    /// # Errors
    /// When [`TensorSource::read`] fails, when the shape is not `expected_shape`, when the dtype is
    /// not F32, F16 or BF16, and when a value is NaN or infinite.
    fn read_f32(&self, name: &str, expected_shape: &[usize]) -> Result<Vec<f32>> {
        // The shape is known without the values: refuse before reading gigabytes.
        if let Some(info) = self.info(name)
            && info.shape != expected_shape
        {
            return Err(Error::preflight(format!(
                "the tensor has shape {:?}, expected {expected_shape:?}",
                info.shape
            ))
            .at(name)
            .at(info.file.display())
            .fix("check that config.json belongs to these weights"));
        }
        let values = self.read(name)?.to_f32().map_err(|error| error.at(name))?;
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(flat) => {
                let mut error = Error::preflight(format!(
                    "the tensor holds {} at index {:?}",
                    values[flat],
                    coordinates(flat, expected_shape)
                ))
                .at(name);
                if let Some(info) = self.info(name) {
                    error = error.at(info.file.display());
                }
                Err(error.fix(DAMAGED))
            }
        }
    }
}

/// The index of element `flat` along each axis of a row-major `shape`.
fn coordinates(mut flat: usize, shape: &[usize]) -> Vec<usize> {
    let mut index = vec![0; shape.len()];
    for (axis, &size) in shape.iter().enumerate().rev() {
        let size = size.max(1);
        index[axis] = flat % size;
        flat /= size;
    }
    index
}

/// Lowercase hex digits of `bytes`.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes.iter().flat_map(|&byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
pub(crate) mod sample {
    //! What tests of files look at.

    use std::path::Path;

    /// The names of a folder's entries, sorted.
    pub(crate) fn names(folder: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtype_names_round_trip_and_serde_agrees() {
        for dtype in DType::ALL {
            assert_eq!(DType::from_name(dtype.name()), Some(dtype));
            assert_eq!(serde_json::to_string(&dtype).unwrap(), format!("\"{dtype}\""));
            assert_eq!(serde_json::from_str::<DType>(&format!("\"{dtype}\"")).unwrap(), dtype);
        }
        assert_eq!(DType::from_name("F4"), None);
    }

    #[test]
    fn sizes_do_not_overflow() {
        assert_eq!(DType::BF16.bytes_for(&[3, 5]), Some(30));
        assert_eq!(DType::F32.bytes_for(&[]), Some(4));
        assert_eq!(DType::F32.bytes_for(&[usize::MAX, 2]), None);
    }

    #[test]
    fn values_are_little_endian() {
        assert_eq!(HostTensor::u32([1], &[0x0403_0201]).bytes, [1, 2, 3, 4]);
        assert_eq!(HostTensor::i64([1], &[-2]).bytes, [254, 255, 255, 255, 255, 255, 255, 255]);
        assert_eq!(HostTensor::f32([1], &[1.0]).bytes, [0, 0, 0x80, 0x3f]);
    }

    #[test]
    fn bf16_rounds_half_to_even() {
        // 1 + 2^-8 lies midway between 1 (even) and 1 + 2^-7 (odd); 1 + 3·2^-8 midway between
        // 1 + 2^-7 (odd) and 1 + 2^-6 (even).
        let values = [1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 1.0 + 1.1 / 256.0, -0.0];
        let back = HostTensor::bf16_from_f32([4], &values).to_f32().unwrap();
        assert_eq!(back, [1.0, 1.0 + 1.0 / 64.0, 1.0 + 1.0 / 128.0, 0.0]);
        assert!(back[3].is_sign_negative());
    }

    #[test]
    fn f16_rounds_half_to_even_and_overflows_to_infinity() {
        let values = [2049.0, 2051.0, 65519.0, 65520.0, 2f32.powi(-24), 2f32.powi(-25)];
        let back = HostTensor::f16_from_f32([2, 3], &values).to_f32().unwrap();
        assert_eq!(back, [2048.0, 2052.0, 65504.0, f32::INFINITY, 2f32.powi(-24), 0.0]);
    }

    #[test]
    fn widening_names_the_dtype_it_got() {
        let tensor = HostTensor::i64([2], &[1, 2]);
        assert_eq!(
            tensor.to_f32().unwrap_err().what(),
            "the tensor is I64, expected F32, F16 or BF16"
        );
        assert_eq!(tensor.to_u32().unwrap_err().what(), "the tensor is I64, expected U32 or I32");
        assert_eq!(tensor.to_u8().unwrap_err().what(), "the tensor is I64, expected U8");
        assert_eq!(HostTensor::i32([1], &[-1]).to_u32().unwrap(), [u32::MAX]);
        assert_eq!(HostTensor::u8([2], &[7, 9]).to_u8().unwrap(), [7, 9]);
    }

    #[test]
    fn a_wrong_byte_count_is_an_error() {
        let tensor = HostTensor { dtype: DType::F32, shape: vec![2], bytes: vec![0; 7] };
        assert_eq!(
            tensor.to_f32().unwrap_err().what(),
            "a F32 tensor of shape [2] cannot have 7 bytes"
        );
    }

    #[test]
    fn sha256_depends_on_the_bytes_only() {
        let tensor = HostTensor::u8([3], b"abc");
        assert_eq!(
            tensor.sha256(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let other = HostTensor { dtype: DType::I8, shape: vec![3, 1], bytes: tensor.bytes.clone() };
        assert_eq!(other.sha256(), tensor.sha256());
    }

    #[test]
    fn coordinates_are_row_major() {
        assert_eq!(coordinates(5, &[2, 3]), [1, 2]);
        assert_eq!(coordinates(0, &[]), [0; 0]);
    }
}
