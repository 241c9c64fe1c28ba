//! Reads bit planes with their scales.

use serde_json::Value;

use super::{damaged, group_len, number};
use crate::error::Result;
use crate::store::TensorSource;

/// A weight in binary coding as a file holds it, at one precision.
#[derive(Clone, Debug, PartialEq)]
pub struct DecodedPlanes {
    /// Output features (rows).
    pub out: usize,
    /// Input features (columns).
    pub inputs: usize,
    /// Weights of a row that share their scales.
    pub group_len: usize,
    /// Number of planes.
    pub bits: u8,
    /// `[out, inputs]`; bit `i` is set where scale `i` is added.
    pub codes: Vec<u8>,
    /// `[out, inputs / group_len, bits]`.
    pub alpha: Vec<f32>,
    /// `[out, inputs / group_len]`.
    pub offset: Vec<f32>,
    /// `[out, inputs]`, summed in f32 in the order of the planes, the offset last.
    pub weights: Vec<f32>,
}

/// Linear `name` at the precision of `bits` planes under `config`, the `quantization_config`.
///
/// # Errors
/// When the config lacks the precision, is of another version, or contradicts the tensors.
pub fn decode(
    config: &Value,
    name: &str,
    bits: u8,
    source: &dyn TensorSource,
) -> Result<DecodedPlanes> {
    let file = File::new(config, name, bits)?;
    let File { out, inputs, stored, .. } = file;
    let planes = usize::from(bits);
    let group_len = group_len(&config["linears"][name], inputs, name)?;
    let groups = inputs / group_len;
    let columns = inputs.div_ceil(32);
    let shape = if file.nested { [stored, columns, out] } else { [columns, stored, out] };
    let words = tensor(source, &format!("{name}.qweight"), &shape)?;
    let words = words.to_u32().map_err(|e| e.at(name))?;
    let bit = |row: usize, input: usize, plane: usize| {
        let (column, lane) = (input / 32, input % 32);
        let first = if file.nested { plane * columns + column } else { column * stored + plane };
        (words[first * out + row] >> lane & 1) as u8
    };
    let suffix = if file.nested { format!("_{bits}") } else { String::new() };
    let alphas = tensor(source, &format!("{name}.alpha{suffix}"), &[groups, planes, out])?;
    let alphas = alphas.to_f32().map_err(|e| e.at(name))?;
    let offsets = tensor(source, &format!("{name}.offset{suffix}"), &[groups, out])?;
    let offsets = offsets.to_f32().map_err(|e| e.at(name))?;
    let mut codes = Vec::with_capacity(out * inputs);
    let mut weights = Vec::with_capacity(out * inputs);
    for row in 0..out {
        for input in 0..inputs {
            let group = input / group_len;
            let mut sum = None;
            let mut code = 0;
            for plane in 0..planes {
                let set = bit(row, input, plane);
                code |= set << plane;
                let alpha = alphas[(group * planes + plane) * out + row];
                let term = if set == 1 { alpha } else { -alpha };
                sum = Some(sum.map_or(term, |sum: f32| sum + term));
            }
            codes.push(code);
            weights.push(sum.unwrap_or_default() + offsets[group * out + row]);
        }
    }
    let each = groups * planes;
    let alpha = (0..out * each).map(|i| alphas[i % each * out + i / each]).collect();
    let offset = (0..out * groups).map(|i| offsets[i % groups * out + i / groups]).collect();
    Ok(DecodedPlanes { out, inputs, group_len, bits, codes, alpha, offset, weights })
}

/// What the config says.
struct File {
    out: usize,
    inputs: usize,
    /// Planes in the file.
    stored: usize,
    /// Whether planes come first.
    nested: bool,
}

impl File {
    fn new(config: &Value, name: &str, bits: u8) -> Result<Self> {
        let version = number(config, "format_version");
        if version != Some(1) || config.get("quant_method").and_then(Value::as_str) != Some("bcq") {
            return Err(damaged("the config is not of version 1 of bcq", name));
        }
        let nested = match config.get("layout").and_then(Value::as_str) {
            Some("lut_gemm") => false,
            Some("plane_major") => true,
            _ => return Err(damaged("the config names no layout of planes", name)),
        };
        let entry = config.get("linears").and_then(|linears| linears.get(name));
        let Some(entry) = entry else {
            return Err(damaged("the config has no entry for this linear", name));
        };
        let shape: Option<Vec<usize>> =
            serde_json::from_value(entry.get("shape").cloned().unwrap_or_default()).ok();
        let stored = number(entry, "bits").unwrap_or(0);
        let offered = if nested {
            let list = config.get("precisions").and_then(Value::as_array);
            list.is_some_and(|list| list.iter().any(|p| p == bits))
        } else {
            stored == usize::from(bits)
        };
        match shape.as_deref() {
            Some([out, inputs])
                if offered && usize::from(bits) <= stored && bits > 0 && *out > 0 =>
            {
                Ok(Self { out: *out, inputs: *inputs, stored, nested })
            }
            _ => Err(damaged(format!("the config does not offer {bits} planes"), name)),
        }
    }
}

fn tensor(
    source: &dyn TensorSource,
    name: &str,
    shape: &[usize],
) -> Result<crate::store::HostTensor> {
    let tensor = source.read(name)?;
    if tensor.shape == shape {
        return Ok(tensor);
    }
    Err(damaged(format!("the tensor has shape {:?}, expected {shape:?}", tensor.shape), name))
}
