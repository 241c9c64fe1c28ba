//! Reads GPTQ's tensors, under a config of GPTQ or of AutoRound.

use serde_json::Value;

use super::{Decoded, Shift, Stream, damaged, floats_of, group_len, width, words, words_of};
use crate::error::Result;
use crate::store::TensorSource;

/// Linear `name` under `config`, the `quantization_config`. Where there is a `g_idx`, it says which
/// input belongs to which group (act-order).
///
/// # Errors
/// When config and tensors contradict each other.
pub fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
    let own = own_entry(config, name);
    let bits = own.map_or_else(|| width(config, "bits", name), |own| width(own, "bits", name))?;
    let add = added_to_zeros(config, name)?;
    let (words, [rows, out]) = words(source, &format!("{name}.qweight"))?;
    let inputs = rows * 32 / usize::from(bits);
    if (rows * 32) % usize::from(bits) != 0 {
        return Err(damaged(format!("{rows} words are no column of codes of {bits} bits"), name));
    }
    let group_len = group_len(own.unwrap_or(config), inputs, name)?;
    let groups = inputs / group_len;
    let index = index(source, name, inputs, groups)?;
    let zero_words = (out * usize::from(bits)).div_ceil(32);
    let zeros = words_of(source, &format!("{name}.qzeros"), [groups, zero_words])?;
    let scales = floats_of(source, &format!("{name}.scales"), [groups, out])?;
    let mut decoded = Decoded {
        out,
        inputs,
        group_len,
        bits,
        codes: Vec::with_capacity(out * inputs),
        scale: Vec::with_capacity(out * groups),
        shift: Shift::Zero(Vec::new()),
        weights: Vec::new(),
    };
    let mut zero = Vec::with_capacity(out * groups);
    for row in 0..out {
        let column = Stream { words: &words, start: row, stride: out, bits };
        decoded.codes.extend((0..inputs).map(|input| column.code(input)));
        for group in 0..groups {
            let stream = Stream { words: &zeros, start: group * zero_words, stride: 1, bits };
            zero.push(f32::from(stream.code(row)) + add);
            decoded.scale.push(scales[group * out + row]);
        }
    }
    decoded.shift = Shift::Zero(zero);
    Ok(match index {
        Some(index) => decoded.with_scattered(&|input| index[input]),
        None => decoded.with_weights(),
    })
}

/// What a reader adds to a stored zero point.
fn added_to_zeros(config: &Value, name: &str) -> Result<f32> {
    let text = |key: &str| config.get(key).and_then(Value::as_str);
    match (text("quant_method"), text("checkpoint_format"), text("packing_format")) {
        // Files from before the key had a second value do without it.
        (Some("gptq"), Some("gptq") | None, _)
        | (Some("auto-round"), _, Some("auto_round:auto_gptq")) => Ok(1.0),
        (Some("gptq"), Some("gptq_v2"), _) | (Some("auto-round"), _, Some("auto_round")) => Ok(0.0),
        _ => Err(damaged("the config names no version of gptq", name)),
    }
}

/// The entry that a linear has to itself.
fn own_entry<'a>(config: &'a Value, name: &str) -> Option<&'a Value> {
    let extra = config.get("extra_config").and_then(|extra| extra.get(name));
    let plain = |pattern: &str| pattern.replace('\\', "") == format!("+:^{name}$");
    let dynamic = config.get("dynamic").and_then(Value::as_object);
    extra.or_else(|| {
        dynamic.and_then(|map| map.iter().find(|(key, _)| plain(key)).map(|(_, own)| own))
    })
}

/// The group of each input, where the file says so.
fn index(
    source: &dyn TensorSource,
    name: &str,
    inputs: usize,
    groups: usize,
) -> Result<Option<Vec<usize>>> {
    let name = format!("{name}.g_idx");
    if source.info(&name).is_none() {
        return Ok(None);
    }
    let index = source.read(&name)?.to_u32().map_err(|e| e.at(&name))?;
    let index: Vec<usize> = index.iter().filter_map(|own| usize::try_from(*own).ok()).collect();
    if index.len() == inputs && index.iter().all(|group| *group < groups) {
        return Ok(Some(index));
    }
    Err(damaged(format!("it does not name one of {groups} groups for {inputs} inputs"), &name))
}
