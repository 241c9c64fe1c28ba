//! Reads AWQ's tensors in gemm order.

use serde_json::Value;

use super::{Decoded, Shift, damaged, floats_of, group_len, words, words_of};
use crate::error::Result;
use crate::store::TensorSource;

/// Linear `name` under `config`, the `quantization_config`.
///
/// # Errors
/// When config and tensors contradict each other.
pub fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
    let text = |key: &str| config.get(key).and_then(Value::as_str).unwrap_or_default();
    let gemm = text("quant_method") == "awq" && text("version").eq_ignore_ascii_case("gemm");
    if !gemm || config.get("bits").and_then(Value::as_u64) != Some(4) {
        return Err(damaged("the config is not of awq's 4-bit gemm layout", name));
    }
    let (words, [inputs, columns]) = words(source, &format!("{name}.qweight"))?;
    let out = columns * 8;
    let group_len = group_len(config, inputs, name)?;
    let groups = inputs / group_len;
    let zeros = words_of(source, &format!("{name}.qzeros"), [groups, columns])?;
    let scales = floats_of(source, &format!("{name}.scales"), [groups, out])?;
    let field = |words: &[u32], row: usize, out: usize| {
        let word = words[row * columns + out / 8];
        // Even outputs in the lower half of the word, odd ones in the upper.
        let nibble = if out.is_multiple_of(2) { out % 8 / 2 } else { 4 + out % 8 / 2 };
        (word >> (4 * nibble) & 15) as u8
    };
    let codes = (0..out * inputs).map(|i| field(&words, i % inputs, i / inputs)).collect();
    let by_row = |i: usize| (i % groups, i / groups);
    let scale = (0..out * groups).map(by_row).map(|(group, row)| scales[group * out + row]);
    let zero = (0..out * groups).map(by_row).map(|(group, row)| field(&zeros, group, row).into());
    Ok(Decoded {
        out,
        inputs,
        group_len,
        bits: 4,
        codes,
        scale: scale.collect(),
        shift: Shift::Zero(zero.collect()),
        weights: Vec::new(),
    }
    .with_weights())
}
