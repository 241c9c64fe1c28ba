//! compressed-tensors, format `pack-quantized`.
//!
//! Per linear `X`: `X.weight_packed`, i32 `[out, ceil(inputs * bits / 32)]`, a dense stream per
//! row; `X.weight_scale`, `[out, groups]`, f32, f16 or bf16; `X.weight_shape`, i64 `[2]`; and
//! unless symmetric `X.weight_zero_point`, i32 `[ceil(out * bits / 32), groups]`, a dense stream
//! down the outputs. The library thinks in signed values, of which these are the unsigned codes:
//! each has `2^(bits-1)` added.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::coded::{
    Coded, Layer, Tensors, dtype, floats, is_exact, most_common, transposed, words_as_i32,
};
use super::embeddings::Embeddings;
use super::format::{Dense, PackedFormat, Packer};
use super::plan::Holds;
use super::read::{Reader, section};
use crate::error::{Error, Result};
use crate::quant::{ScaleDType, bits};
use crate::store::{DType, HostTensor};

/// Keys of `format.compressed_tensors`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressedTensorsConfig {
    /// Type of scales.
    pub scales: ScaleDType,
    /// What embedding and head are stored as: `"f16"` or `"bf16"`; as the source has them unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

impl PackedFormat for CompressedTensorsConfig {
    fn about(&self) -> &'static str {
        "compressed-tensors: vLLM, transformers; codes of 1, 2, 4 or 8 bits"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn holds(&self) -> &'static Holds {
        // Its other widths changed their layout, and no release loads all of them.
        &Holds { widths: &[1, 2, 4, 8], rank: 1, ..Holds::UNLIMITED }
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn packer(&self, _linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(self.clone()))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "compressed-tensors",
            section: |config| section(config, "compressed-tensors"),
            tensor: "weight_packed",
            weights: |section, name, source| Ok(read::decode(section, name, source)?.values()),
            codes: |section, name, source| read::decode(section, name, source)?.codes(),
        }
    }
}

impl Packer for CompressedTensorsConfig {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        encode(name, weight, dtype(self.scales))
    }

    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value> {
        // Names are whole ones but for expressions.
        let parts = dense.parts.iter().map(|part| format!("re:.*{part}.*"));
        let ignored: Vec<String> = dense.linears.iter().cloned().chain(parts).collect();
        Ok(config(linears, &ignored))
    }
}

/// The tensors of linear `name` with scales of type `scales`. A symmetric grid (zero points of
/// `2^(bits-1)`) is stored without zero points.
///
/// # Errors
/// When `scales` would round a scale.
fn encode(name: &str, weight: &Coded<'_>, scales: DType) -> Result<Tensors> {
    check_scales(name, weight, scales)?;
    let (out, inputs, groups, width) = (weight.out, weight.inputs, weight.groups(), weight.bits);
    let packed = bits::pack_rows(&weight.codes, inputs, width);
    let columns = bits::words_per_row(inputs, width);
    let mut tensors = vec![
        (format!("{name}.weight_packed"), words_as_i32([out, columns], &packed)),
        (format!("{name}.weight_scale"), floats(scales, [out, groups], &weight.scale)),
        (
            format!("{name}.weight_shape"),
            HostTensor::i64([2], &[out.cast_signed() as i64, inputs.cast_signed() as i64]),
        ),
    ];
    if !weight.is_centred() {
        let zeros = bits::pack_rows(&transposed(&weight.zero_codes(), groups), out, width);
        let rows = bits::words_per_row(out, width);
        let zeros = words_as_i32([rows, groups], &transposed(&zeros, rows));
        tensors.push((format!("{name}.weight_zero_point"), zeros));
    }
    Ok(tensors)
}

fn check_scales(name: &str, weight: &Coded<'_>, dtype: DType) -> Result<()> {
    let inexact = weight.scale.iter().filter(|scale| !is_exact(dtype, **scale)).count();
    if inexact == 0 {
        return Ok(());
    }
    let what = format!(
        "{inexact} of {} scales are no {dtype} numbers, they would be rounded",
        weight.scale.len()
    );
    Err(Error::preflight(what).at(name).fix("format.compressed_tensors.scales = \"f32\""))
}

/// The `quantization_config`; `dense` names the linears that stay as they are.
///
/// Linears of one width, grouping and symmetry share an entry. Where there is one entry, it holds
/// every linear that is not `dense`; where there are more, each names its linears.
fn config(linears: &[Layer], dense: &[String]) -> Value {
    let rows = linears.iter().all(Layer::is_whole_row);
    let key = |layer: &Layer| (layer.bits, layer.group_len * usize::from(!rows), layer.centred);
    let keys: Vec<_> = linears.iter().map(key).collect();
    let mut distinct = keys.clone();
    distinct.sort_unstable();
    distinct.dedup();
    // The most common first: readers show it as the model's scheme.
    let common = most_common(&keys);
    distinct.sort_by_key(|key| Some(*key) != common);
    let mut groups = Map::new();
    for (i, key) in distinct.iter().enumerate() {
        let members = linears.iter().zip(&keys).filter(|(_, other)| *other == key);
        let targets: Vec<&str> = match distinct.len() {
            1 => vec!["Linear"],
            _ => members.map(|(layer, _)| layer.name.as_str()).collect(),
        };
        groups.insert(format!("group_{i}"), scheme(*key, &targets));
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": VERSION,
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": dense,
        "config_groups": groups,
    })
}

fn scheme((bits, group, symmetric): (u8, usize, bool), targets: &[&str]) -> Value {
    let mut weights = json!({
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": if group == 0 { "channel" } else { "group" },
        "dynamic": false,
        "actorder": null,
    });
    if group > 0 {
        weights["group_size"] = json!(group);
    }
    json!({
        "targets": targets,
        "weights": weights,
        "input_activations": null,
        "output_activations": null,
    })
}

/// The release of the library whose layout this is. (Widths that do not divide a word became dense
/// in 0.18; none is written.)
const VERSION: &str = "0.17.1";

mod read {
    //! Reads compressed-tensors' `pack-quantized` tensors.

    use serde_json::Value;

    use crate::error::Result;
    use crate::export::read::{
        Decoded, Shift, Stream, damaged, floats_of, group_index, group_len, width, words_of,
    };
    use crate::store::{DType, TensorSource};

    /// Linear `name` under `config`, the `quantization_config`.
    ///
    /// # Errors
    /// When config and tensors contradict each other.
    pub(super) fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
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
        let decoded = Decoded {
            out,
            inputs,
            group_len,
            bits,
            codes,
            scale,
            shift: Shift::Zero(zero),
            weights: Vec::new(),
        };
        // With act-order each input says which group it is in.
        let index = group_index(source, &format!("{name}.weight_g_idx"), inputs, groups)?;
        Ok(match index {
            Some(index) => decoded.with_scattered(&|input| index[input]),
            None => decoded.with_weights(),
        })
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
}

#[cfg(test)]
mod tests {
    use half::bf16;
    use proptest::prelude::*;

    use super::super::coded::sample::grid;
    use super::super::format::sample::packed;
    use super::super::read::{Shift, memory::Memory};
    use super::*;
    use crate::quant::ZeroKind;

    #[test]
    fn a_hand_example() {
        let mut grid = grid([2, 4], 2, 4, ZeroKind::Integer, true, 1);
        grid.codes = vec![1, 2, 3, 4, 5, 6, 7, 8];
        grid.zero = vec![1.0, 2.0, 3.0, 4.0];
        grid.scale = vec![0.5, 0.25, 2.0, 1.0];
        let tensors = encode("x", &grid.coded(), DType::F16).unwrap();
        assert_eq!(tensors[0].1, HostTensor::i32([2, 1], &[0x4321, 0x8765]));
        assert_eq!(tensors[1].1, HostTensor::f16_from_f32([2, 2], &grid.scale));
        assert_eq!(tensors[2].1, HostTensor::i64([2], &[2, 4]));
        // One word per group, down the outputs.
        assert_eq!(tensors[3].1, HostTensor::i32([1, 2], &[0x31, 0x42]));
        grid.centre();
        assert_eq!(encode("x", &grid.coded(), DType::F16).unwrap().len(), 3);
    }

    #[test]
    fn scales_are_never_rounded() {
        let mut grid = grid([2, 4], 2, 4, ZeroKind::Integer, false, 1);
        for dtype in [DType::F16, DType::BF16] {
            let error = encode("x", &grid.coded(), dtype).unwrap_err().to_string();
            assert!(error.contains("scales = \"f32\""), "{error}");
        }
        assert!(encode("x", &grid.coded(), DType::F32).is_ok());
        grid.scale.fill(bf16::from_f32(1e-20).to_f32());
        assert!(encode("x", &grid.coded(), DType::BF16).is_ok());
        assert!(encode("x", &grid.coded(), DType::F16).is_err());
        grid.kind = ZeroKind::Real;
        assert!(packed(&CompressedTensorsConfig::default(), &grid.coded()).is_err());
    }

    #[test]
    fn one_entry_per_scheme() {
        let layer = |name: &str, bits, group_len, centred| Layer {
            name: name.to_owned(),
            shape: [8, 64],
            bits,
            group_len,
            centred,
        };
        let same = [layer("a", 4, 64, true), layer("b", 4, 64, true)];
        let one = config(&same, &["lm_head".to_owned()]);
        let scheme = &one["config_groups"]["group_0"];
        assert_eq!(scheme["targets"], json!(["Linear"]));
        assert_eq!(scheme["weights"]["strategy"], "channel");
        assert_eq!((&one["ignore"], &one["version"]), (&json!(["lm_head"]), &json!("0.17.1")));
        let mixed = [layer("a", 2, 32, false), layer("b", 8, 64, true), layer("c", 8, 64, true)];
        let two = config(&mixed, &[]);
        let groups = &two["config_groups"];
        assert_eq!(groups["group_0"]["targets"], json!(["b", "c"]));
        assert_eq!(groups["group_0"]["weights"]["group_size"], 64);
        assert_eq!(groups["group_1"]["targets"], json!(["a"]));
        assert_eq!(groups["group_1"]["weights"]["symmetric"], false);
    }

    proptest! {
        #[test]
        fn comes_back_bit_for_bit(
            bits in prop::sample::select(&[1_u8, 2, 4, 8][..]),
            group_len in 1_usize..70,
            groups in 1_usize..4,
            out in 1_usize..20,
            centred: bool,
            short: bool,
            seed: u32,
        ) {
            let shape = [out, groups * group_len];
            let mut grid = grid(shape, group_len, bits, ZeroKind::Integer, short, seed);
            if centred {
                grid.centre();
            }
            let dtype = if short { DType::F16 } else { DType::F32 };
            let tensors = encode("x", &grid.coded(), dtype).unwrap();
            let config = config(&[grid.coded().layer("x")], &[]);
            let decoded =
                read::decode(&config, "x", &Memory::new(tensors)).unwrap();
            prop_assert_eq!(decoded.group_len, group_len);
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            prop_assert_eq!(decoded.shift, Shift::Zero(grid.zero.clone()));
            prop_assert_eq!(decoded.weights, grid.coded().dequantize());
        }
    }
}
