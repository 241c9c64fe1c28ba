//! A dense Hugging Face folder of the quantized weights.
//!
//! Weights are stored as f32, the only type that keeps every trained value bit for bit; the
//! `config.json` says so, or a loader would round them to the source model's type.

use serde_json::{Value, json};

use crate::quant::QuantizedWeight;
use crate::store::HostTensor;

/// One linear's weight as it is stored.
pub(super) fn encode(weight: &QuantizedWeight) -> HostTensor {
    HostTensor::f32([weight.layout.out, weight.layout.inputs], &weight.dequantize())
}

/// The source's `config.json` with the type set to f32 under whichever key it uses, and no word of
/// the source's own quantization; `unties` when the head has weights of its own now.
pub(super) fn config(mut config: Value, unties: bool) -> Value {
    if let Some(map) = config.as_object_mut() {
        let key = if map.contains_key("dtype") { "dtype" } else { "torch_dtype" };
        map.insert(key.to_owned(), json!("float32"));
        map.shift_remove("quantization_config");
        if unties {
            map.insert("tie_word_embeddings".to_owned(), json!(false));
        }
    }
    config
}
