//! A dense Hugging Face folder of the quantized weights.
//!
//! Weights are f32 unless asked otherwise, the only type that keeps every trained value bit for
//! bit; the `config.json` says so, or a loader would round them to the source model's type.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::coded::{Tensors, floats, is_exact};
use super::format::{FileFormat, Kind, OwnFormat};
use crate::error::{Error, Result};
use crate::model::weight_name;
use crate::quant::QuantizedWeight;
use crate::store::{DType, HostTensor};

/// Keys of `format.dequantized`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DequantizedConfig {
    /// The type of every tensor: `f32`, or narrower where all values are numbers of that type, or
    /// `lossy` lets them be rounded.
    pub dtype: DenseDType,
    /// Whether values may be rounded.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// The type of dense tensors.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DenseDType {
    /// 32-bit floats for weights; other tensors as the source has them.
    #[default]
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl DenseDType {
    /// Its name in `config.json`.
    fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
        }
    }
}

impl FileFormat for DequantizedConfig {
    fn about(&self) -> &'static str {
        "A dense Hugging Face folder of the quantized weights: f32, or dtype = bf16, f16"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Own(self)
    }
}

impl OwnFormat for DequantizedConfig {
    fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        let (name, shape) = (weight_name(name), [weight.layout.out, weight.layout.inputs]);
        let tensor = self.dense(&name, HostTensor::f32(shape, &weight.dequantize()))?;
        Ok(vec![(name, tensor)])
    }

    fn decoded(&self, name: &str, weight: &QuantizedWeight) -> Result<Vec<f32>> {
        self.encode(name, weight)?.remove(0).1.to_f32()
    }

    /// A float tensor in the type asked for.
    ///
    /// # Errors
    /// When a value would be rounded, or become infinite, without `lossy`.
    fn dense(&self, name: &str, tensor: HostTensor) -> Result<HostTensor> {
        let dtype = match self.dtype {
            DenseDType::F32 => return Ok(tensor),
            DenseDType::F16 => DType::F16,
            DenseDType::Bf16 => DType::BF16,
        };
        if tensor.dtype == dtype {
            return Ok(tensor);
        }
        let values = tensor.to_f32().map_err(|e| e.at(name))?;
        let inexact = values.iter().filter(|value| !is_exact(dtype, **value)).count();
        if inexact > 0 && !self.lossy {
            return Err(Error::preflight(format!(
                "{inexact} of {} values are no {dtype} numbers, they would be rounded",
                values.len()
            ))
            .at(name)
            .fix("format.dequantized.dtype = \"f32\", or lossy = true beside it"));
        }
        let stored = floats(dtype, tensor.shape, &values);
        if stored.to_f32()?.iter().any(|value| !value.is_finite()) {
            return Err(Error::preflight(format!("a value is beyond the largest {dtype} number"))
                .at(name)
                .fix("format.dequantized.dtype = \"bf16\" or \"f32\""));
        }
        Ok(stored)
    }

    /// Sets the type under whichever key the source uses, and takes out what the source says of its own
    /// quantization.
    fn configure(&self, config: &mut Value, unties: bool) {
        if let Some(map) = config.as_object_mut() {
            let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            map.insert(key.to_owned(), json!(self.dtype.name()));
            map.shift_remove("quantization_config");
            if unties {
                map.insert("tie_word_embeddings".to_owned(), json!(false));
            }
        }
    }
}
