//! AWQ's tensors in gemm order: 4 bits, asymmetric, f16 scales.
//!
//! Per linear `X`, all words i32: `X.qweight` `[inputs, out / 8]`, `X.qzeros` `[groups, out / 8]`,
//! `X.scales` f16 `[groups, out]`. A word holds eight neighbouring outputs, in the order of `ORDER`. Zero
//! points are stored as they are. Runtimes compute `scale * (code - zero)` in f16, rounding each
//! weight once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::coded::{
    Coded, Layer, Tensors, floats, repeated, stated, stored_group, transposed, words_as_i32,
};
use super::embeddings::Embeddings;
use super::format::{Dense, PackedFormat, Packer};
use super::plan::{Holds, Reason, beyond_f16};
use super::read::{Reader, section};
use crate::error::{Error, Result};
use crate::store::DType;

/// Keys of `format.awq`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AwqConfig {
    /// What embedding and head are stored as: `"f16"` or `"bf16"`; as the source has them unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

impl PackedFormat for AwqConfig {
    fn about(&self) -> &'static str {
        "AWQ: codes of 4 bits, f16 scales"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn holds(&self) -> &'static Holds {
        &Holds { widths: &[4], group: 32, tile: [8, 1], rank: 4, ..Holds::UNLIMITED }
    }

    fn wrong_values(&self, weight: &Coded<'_>) -> Option<Reason> {
        beyond_f16("awq", weight)
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn packer(&self, linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(Awq(match group_size(linears) {
            // Groups that do not fit will be made to.
            Err(_) if self.lossy => Some(32),
            group => group?,
        })))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "awq",
            section: |config| section(config, "awq"),
            tensor: "qweight",
            weights: |section, name, source| Ok(read::decode(section, name, source)?.values()),
            codes: |section, name, source| read::decode(section, name, source)?.codes(),
        }
    }
}

/// AWQ with the group length of a model.
struct Awq(Option<usize>);

impl Packer for Awq {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        encode(name, weight, self.0)
    }

    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value> {
        config(linears, &[&dense.linears[..], &dense.parts].concat())
    }
}

/// Codes in a word.
const LANES: usize = 8;
/// Nibble `i` of a word, the lowest first, holds this one of its eight outputs.
const ORDER: [usize; LANES] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Group lengths that readers have kernels for, descending; others are stored as shorter ones.
const GROUPS: [usize; 3] = [128, 64, 32];

/// The group length under which the linears of a model are stored, `None` for whole rows: one for
/// all of them, since the config has no other.
///
/// # Errors
/// When no length divides all groups.
fn group_size(linears: &[Layer]) -> Result<Option<usize>> {
    if linears.iter().all(Layer::is_whole_row) {
        return Ok(None);
    }
    let divides = |size: &usize| linears.iter().all(|l| l.group_len.is_multiple_of(*size));
    let group = GROUPS.into_iter().find(divides);
    group.map(Some).ok_or_else(|| {
        let what = "awq has one group length for a whole model, and none of 128, 64 and 32 divides \
                    all groups of this one";
        Error::preflight(what).fix("format.mlx or format.fewbit")
    })
}

/// The tensors of linear `name`, in groups of the model's [`group_size`].
///
/// # Errors
/// When `group_size` does not divide its groups.
fn encode(name: &str, weight: &Coded<'_>, group_size: Option<usize>) -> Result<Tensors> {
    let (out, inputs) = (weight.out, weight.inputs);
    let group = group_size.unwrap_or(inputs);
    if group == 0 || stored_group(weight.group_len, &[group]).is_none() {
        let what = format!("group size {group} does not divide groups of {}", weight.group_len);
        return Err(Error::failed(what).at(name));
    }
    let times = weight.group_len / group;
    let groups = inputs / group;
    let zeros: Vec<u8> =
        weight.zero_codes().iter().flat_map(|zero| std::iter::repeat_n(*zero, times)).collect();
    let scales = transposed(&repeated(&weight.scale, times), groups);
    let words = |codes: &[u8], columns| interleaved(&transposed(codes, columns));
    Ok(vec![
        (
            format!("{name}.qweight"),
            words_as_i32([inputs, out / LANES], &words(&weight.codes, inputs)),
        ),
        (format!("{name}.qzeros"), words_as_i32([groups, out / LANES], &words(&zeros, groups))),
        (format!("{name}.scales"), floats(DType::F16, [groups, out], &scales)),
    ])
}

fn interleaved(codes: &[u8]) -> Vec<u32> {
    let word = |lanes: &[u8; LANES]| {
        let lane = |(place, from): (usize, &usize)| u32::from(lanes[*from]) << (4 * place);
        ORDER.iter().enumerate().map(lane).sum()
    };
    codes.as_chunks::<LANES>().0.iter().map(word).collect()
}

/// The `quantization_config`; `dense` names the linears that stay as they are.
///
/// # Errors
/// As [`group_size`].
fn config(linears: &[Layer], dense: &[String]) -> Result<Value> {
    Ok(json!({
        "quant_method": "awq",
        "bits": 4,
        "group_size": stated(group_size(linears)?),
        "zero_point": true,
        "version": "gemm",
        "modules_to_not_convert": dense,
    }))
}

mod read {
    //! Reads AWQ's tensors in gemm order.

    use serde_json::Value;

    use crate::error::Result;
    use crate::export::read::{Decoded, Shift, damaged, floats_of, group_len, words, words_of};
    use crate::store::TensorSource;

    /// Linear `name` under `config`, the `quantization_config`.
    ///
    /// # Errors
    /// When config and tensors contradict each other.
    pub(super) fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
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
        let zero =
            (0..out * groups).map(by_row).map(|(group, row)| field(&zeros, group, row).into());
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::coded::sample::{Grid, grid};
    use super::super::format::sample::packed;
    use super::super::read::{Shift, memory::Memory};
    use super::*;
    use crate::quant::ZeroKind;

    #[test]
    fn a_hand_example() {
        let mut grid = grid([8, 32], 32, 4, ZeroKind::Integer, true, 1);
        grid.codes.fill(0);
        for out in 0..8 {
            grid.codes[out * 32] = out as u8;
            grid.zero[out] = 15.0 - out as f32;
        }
        grid.codes[32 + 3] = 9;
        let tensors = encode("x", &grid.coded(), None).unwrap();
        let words = tensors[0].1.to_u32().unwrap();
        assert_eq!(tensors[0].1.shape, [32, 1]);
        assert_eq!((words[0], words[3]), (0x7531_6420, 0x0009_0000));
        assert_eq!(tensors[1].1.to_u32().unwrap(), [0x8ace_9bdf]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let plain = AwqConfig::default();
        let refused = |grid: Grid| packed(&plain, &grid.coded()).unwrap_err().to_string();
        assert!(refused(grid([8, 32], 32, 5, ZeroKind::Integer, true, 1)).contains("4 bits"));
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Half, true, 1)).contains("doubled"));
        assert!(refused(grid([4, 32], 32, 4, ZeroKind::Integer, true, 1)).contains("8 outputs"));
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Integer, false, 1)).contains("f16"));
        let good = grid([8, 32], 32, 4, ZeroKind::Integer, true, 1);
        for size in [0, 64] {
            let error = encode("x", &good.coded(), Some(size)).unwrap_err().to_string();
            assert!(error.contains(&format!("size {size}")), "{error}");
        }
        let layer = |group_len| Layer {
            name: String::new(),
            shape: [8, 96],
            bits: 4,
            group_len,
            centred: false,
        };
        assert_eq!(group_size(&[layer(96), layer(96)]).unwrap(), None);
        assert_eq!(group_size(&[layer(96), layer(32)]).unwrap(), Some(32));
        assert!(group_size(&[layer(96), layer(48)]).is_err());
    }

    proptest! {
        #[test]
        fn comes_back_bit_for_bit(
            group_len in prop::sample::select(&[32, 64, 96, 128][..]),
            groups in 1_usize..3,
            out in 1_usize..4,
            seed: u32,
        ) {
            let shape = [out * 8, groups * group_len];
            let grid = grid(shape, group_len, 4, ZeroKind::Integer, true, seed);
            let layers = [grid.coded().layer("x")];
            let size = group_size(&layers).unwrap();
            let tensors = encode("x", &grid.coded(), size).unwrap();
            let config = config(&layers, &[]).unwrap();
            let decoded = read::decode(&config, "x", &Memory::new(tensors)).unwrap();
            let decoded = decoded.regrouped(group_len).unwrap();
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            prop_assert_eq!(decoded.shift, Shift::Zero(grid.zero.clone()));
            prop_assert_eq!(decoded.weights, grid.coded().dequantize());
        }
    }
}
