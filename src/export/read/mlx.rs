//! Reads MLX's affine tensors.

use half::{bf16, f16};
use serde_json::Value;

use super::{Decoded, Shift, Stream, damaged, floats_of, group_len, matrix, width, words};
use crate::error::Result;
use crate::store::{DType, TensorSource};

/// Linear `name` under `config`, the `quantization` section. The weights are MLX's: product and
/// sum each rounded to the type of the scales.
///
/// # Errors
/// When config and tensors contradict each other.
pub fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
    let own = match config.get(name) {
        None => config,
        Some(own) if own.is_object() => own,
        Some(_) => return Err(damaged("the config says that this linear is dense", name)),
    };
    let bits = width(own, "bits", name)?;
    let (words, [out, columns]) = words(source, &format!("{name}.weight"))?;
    let inputs = columns * 32 / usize::from(bits);
    if (columns * 32) % usize::from(bits) != 0 {
        return Err(damaged(format!("{columns} words are no row of codes of {bits} bits"), name));
    }
    let group_len = group_len(own, inputs, name)?;
    let shape = [out, inputs / group_len];
    let scales = format!("{name}.scales");
    let (stored, _) = matrix(source, &scales)?;
    let scale = floats_of(source, &scales, shape)?;
    let added = floats_of(source, &format!("{name}.biases"), shape)?;
    let in_type = |value: f32| match stored.dtype {
        DType::F16 => f16::from_f32(value).to_f32(),
        DType::BF16 => bf16::from_f32(value).to_f32(),
        _ => value,
    };
    let mut codes = Vec::with_capacity(out * inputs);
    let mut weights = Vec::with_capacity(out * inputs);
    for row in 0..out {
        let stream = Stream { words: &words, start: row * columns, stride: 1, bits };
        for input in 0..inputs {
            let (code, group) = (stream.code(input), row * shape[1] + input / group_len);
            codes.push(code);
            weights.push(in_type(in_type(scale[group] * f32::from(code)) + added[group]));
        }
    }
    Ok(Decoded { out, inputs, group_len, bits, codes, scale, shift: Shift::Bias(added), weights })
}
