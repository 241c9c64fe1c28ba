//! A dense Hugging Face folder of the quantized weights.
//!
//! Weights are f32 unless asked otherwise, the only type that keeps every trained value bit for
//! bit; the `config.json` says so, or a loader would round them to the source model's type.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::matrix::{floats, is_exact};
use crate::error::{Error, Result};
use crate::store::{DType, HostTensor};

/// Keys of `format.dequantized`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
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
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
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

impl DequantizedConfig {
    /// A float tensor in the type asked for.
    ///
    /// # Errors
    /// When a value would be rounded, or become infinite, without `lossy`.
    pub(super) fn dense(&self, name: &str, tensor: HostTensor) -> Result<HostTensor> {
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
}

/// The source's `config.json` with the type set under whichever key it uses, and no word of the
/// source's own quantization; `unties` when the head has weights of its own now.
pub(super) fn config(mut config: Value, dtype: DenseDType, unties: bool) -> Value {
    if let Some(map) = config.as_object_mut() {
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.to_owned(), json!(dtype.name()));
        map.shift_remove("quantization_config");
        if unties {
            map.insert("tie_word_embeddings".to_owned(), json!(false));
        }
    }
    config
}
