//! What embedding and head are stored as, where that is not what the source has.

use burn::tensor::Device;
use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::approximate::round_to_nearest;
use super::coded::floats;
use crate::error::{Error, Result};
use crate::quant::{Bits, Grid, QuantizedWeight, Symmetry};
use crate::store::{DType, HostTensor};

/// `embeddings` of a format: a float type, or a width of codes.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(untagged, expecting = "\"f16\", \"bf16\", \"f32\" or a number of bits")]
pub enum Embeddings {
    /// Floats.
    Floats(Floats),
    /// Codes, rounded to the nearest.
    Codes(Bits),
}

/// A float type.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Floats {
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
    /// Single precision.
    F32,
}

impl Floats {
    fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::F32 => DType::F32,
        }
    }
}

/// How a format rounds an embedding to codes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum EmbeddingGrid {
    /// Groups of one length, scales in half precision.
    Groups(usize, Symmetry),
    /// Groups of 16 whose scales are whole multiples, up to 127, of one number of half precision for 256
    /// weights (ggml's Q6_K).
    Nested,
}

/// A tensor as `floats`, rounded where it has to be.
///
/// # Errors
/// When a value would become infinite.
pub(super) fn as_floats(name: &str, tensor: &HostTensor, kind: Floats) -> Result<HostTensor> {
    let dtype = kind.dtype();
    let values = tensor.to_f32().map_err(|e| e.at(name))?;
    let stored = floats(dtype, tensor.shape.clone(), &values);
    if stored.to_f32()?.iter().all(|value| value.is_finite()) {
        return Ok(stored);
    }
    Err(Error::preflight(format!("a value is beyond the largest {dtype} number"))
        .at(name)
        .fix("embeddings = \"bf16\" there"))
}

/// `values`, `[out, inputs]`, as codes of `bits` bits.
///
/// # Errors
/// When a value is not finite.
pub(super) fn as_codes(
    values: &[f32],
    shape: [usize; 2],
    bits: Bits,
    grid: EmbeddingGrid,
    device: &Device,
) -> Result<QuantizedWeight> {
    match grid {
        EmbeddingGrid::Groups(group, symmetry) => {
            round_to_nearest(values, shape, group, (bits, symmetry), device)
        }
        EmbeddingGrid::Nested => {
            let width = (bits, Symmetry::FullRange);
            let weight = round_to_nearest(values, shape, 16, width, device)?;
            nested(&weight, values)
        }
    }
}

/// The grid of `weight`, in groups of 16, with scales that are multiples of one for every 16 groups; codes
/// are those nearest to `values`.
fn nested(weight: &QuantizedWeight, values: &[f32]) -> Result<QuantizedWeight> {
    const PARTS: usize = 16;
    const MOST: f32 = 127.0;
    let middle = f32::from(1_u8 << (weight.bits.get() - 1));
    let scale: Vec<f32> = weight
        .grid
        .scales()
        .chunks(PARTS)
        .flat_map(|scales| {
            let largest = scales.iter().fold(0.0f32, |most, scale| most.max(scale.abs()));
            // The smallest number of half precision, where all would be lost below it.
            let unit = f16::from_f32(largest / MOST).max(f16::MIN_POSITIVE_SUBNORMAL).to_f32();
            let multiple = move |scale: &f32| (scale.abs() / unit).round().clamp(1.0, MOST) * unit;
            scales.iter().map(multiple).collect::<Vec<_>>()
        })
        .collect();
    let code = |(value, scale): (&f32, &f32)| {
        ((value / scale).round().clamp(-middle, middle - 1.0) + middle) as u8
    };
    let scales = scale.iter().flat_map(|scale| std::iter::repeat_n(scale, weight.layout.group_len));
    let codes: Vec<u8> = values.iter().zip(scales).map(code).collect();
    let Grid::Uniform { zero_point, zero_kind, .. } = &weight.grid else {
        return Err(Error::failed("an embedding is rounded to evenly spaced levels"));
    };
    let grid = Grid::Uniform { scale, zero_point: zero_point.clone(), zero_kind: *zero_kind };
    QuantizedWeight::new(&codes, grid, weight.bits, weight.layout)
}

#[cfg(test)]
mod tests {
    use super::super::approximate::Loss;
    use super::*;

    #[test]
    fn words_and_numbers() {
        let read = |text: &str| serde_json::from_str::<Embeddings>(text);
        assert_eq!(read("\"bf16\"").unwrap(), Embeddings::Floats(Floats::Bf16));
        assert_eq!(read("8").unwrap(), Embeddings::Codes(Bits::EIGHT));
        for wrong in ["\"f64\"", "9", "true"] {
            let told = read(wrong).unwrap_err().to_string();
            assert!(told.contains("\"f16\", \"bf16\", \"f32\" or a number of bits"), "{told}");
        }
    }

    #[test]
    fn six_bits_are_near_and_their_scales_are_multiples() {
        let values: Vec<f32> =
            (0..512_u16).map(|i| (f32::from(i) * 0.7).sin() * (1.0 + f32::from(i / 64))).collect();
        let bits = Bits::new(6).unwrap();
        let six =
            as_codes(&values, [1, 512], bits, EmbeddingGrid::Nested, &Device::flex()).unwrap();
        let loss = Loss::between(&values, &six.dequantize()).unwrap();
        assert!(loss.relative < 0.02, "{loss:?}");
        let Grid::Uniform { scale, zero_point, .. } = &six.grid else { panic!("{six:?}") };
        let stored = fewbit_gguf::choose(&fewbit_gguf::UniformWeight {
            out: 1,
            inputs: 512,
            group_len: 16,
            bits: 6,
            codes: &six.codes.to_vec(),
            scale,
            zero: zero_point,
        });
        assert_eq!(stored.unwrap(), fewbit_gguf::BlockType::Q6K);
        // All zeros have a scale too.
        let zeros = [0.0; 256];
        let six = as_codes(&zeros, [1, 256], bits, EmbeddingGrid::Nested, &Device::flex()).unwrap();
        assert!(six.dequantize().iter().all(|value| *value == 0.0));
    }
}
