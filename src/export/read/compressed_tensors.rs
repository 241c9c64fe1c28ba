//! Reads compressed-tensors' `pack-quantized` tensors.

use serde_json::Value;

use super::{Decoded, Shift, Stream, damaged, floats_of, group_len, width, words_of};
use crate::error::Result;
use crate::store::{DType, TensorSource};

/// Linear `name` under `config`, the `quantization_config`.
///
/// # Errors
/// When config and tensors contradict each other.
pub fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
    let scheme = scheme(config, name)?;
    let bits = width(scheme, "num_bits", name)?;
    let [out, inputs] = shape(source, name)?;
    let group_len = group_len(scheme, inputs, name)?;
    let groups = inputs / group_len;
    let columns = (inputs * usize::from(bits)).div_ceil(32);
    let words = words_of(source, &format!("{name}.weight_packed"), [out, columns])?;
    let scale = floats_of(source, &format!("{name}.weight_scale"), [out, groups])?;
    let mut codes = Vec::with_capacity(out * inputs);
    for row in 0..out {
        let stream = Stream { words: &words, start: row * columns, stride: 1, bits };
        codes.extend((0..inputs).map(|input| stream.code(input)));
    }
    let symmetric = scheme.get("symmetric").and_then(Value::as_bool);
    let zero = match symmetric {
        Some(true) => vec![f32::from(1_u8 << (bits - 1)); out * groups],
        Some(false) => {
            let rows = (out * usize::from(bits)).div_ceil(32);
            let words = words_of(source, &format!("{name}.weight_zero_point"), [rows, groups])?;
            let zero = |i: usize| {
                let stream = Stream { words: &words, start: i % groups, stride: groups, bits };
                f32::from(stream.code(i / groups))
            };
            (0..out * groups).map(zero).collect()
        }
        None => return Err(damaged("the config does not say whether it is symmetric", name)),
    };
    Ok(Decoded {
        out,
        inputs,
        group_len,
        bits,
        codes,
        scale,
        shift: Shift::Zero(zero),
        weights: Vec::new(),
    }
    .with_weights())
}

/// The weight scheme of the entry that lists the linear, or every linear.
fn scheme<'a>(config: &'a Value, name: &str) -> Result<&'a Value> {
    let lists = |group: &&Value| {
        let targets = group.get("targets").and_then(Value::as_array);
        targets.is_some_and(|t| t.iter().any(|target| target == name || target == "Linear"))
    };
    let ignored = config
        .get("ignore")
        .and_then(Value::as_array)
        .is_some_and(|ignore| ignore.iter().any(|other| other == name));
    let groups = config.get("config_groups").and_then(Value::as_object);
    groups
        .filter(|_| !ignored)
        .and_then(|groups| groups.values().find(lists))
        .and_then(|group| group.get("weights"))
        .ok_or_else(|| damaged("the config has no entry for this linear", name))
}

fn shape(source: &dyn TensorSource, name: &str) -> Result<[usize; 2]> {
    let name = format!("{name}.weight_shape");
    let tensor = source.read(&name)?;
    let sizes: Vec<usize> = tensor
        .bytes
        .as_chunks()
        .0
        .iter()
        .filter_map(|bytes| u32::try_from(i64::from_le_bytes(*bytes)).ok())
        .filter_map(|size| usize::try_from(size).ok())
        .collect();
    match sizes[..] {
        [out, inputs] if tensor.dtype == DType::I64 && tensor.shape == [2] => Ok([out, inputs]),
        _ => Err(damaged("the tensor is no pair of sizes", &name)),
    }
}
