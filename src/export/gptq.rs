//! GPTQ's tensors, versions 1 and 2; AutoRound reads them under a config of its own.
//!
//! Per linear `X`, all words i32: `X.qweight` `[inputs * bits / 32, out]`, a dense stream down the
//! inputs of each output; `X.qzeros` `[groups, out * bits / 32]`, a dense stream along the outputs;
//! `X.scales` f16 `[groups, out]`; `X.g_idx` i32 `[inputs]`, the group of each input.
//!
//! Version 1 stores a zero point less one, and its readers add the one back to whole words, so
//! that a zero point of 0 spills into its neighbour. It is written for symmetric grids only, where
//! it has the widest reach; everything else is version 2. `scale * (code - zero)` is exact in f32
//! for an f16 scale; runtimes that compute in f16 round each weight once.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::coded::{
    Coded, Layer, Tensors, floats, most_common, repeated, stated, stored_group, transposed,
    words_as_i32,
};
use super::embeddings::Embeddings;
use super::format::{Dense, PackedFormat, Packer};
use super::plan::{Holds, Reason, beyond_f16};
use super::read::{Reader, section};
use crate::error::{Error, Result};
use crate::quant::bits;
use crate::store::{DType, HostTensor};

/// Keys of `format.gptq`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqFormatConfig {
    /// 1 or 2; what the grids suit unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u8>,
    /// What embedding and head are stored as: `"f16"` or `"bf16"`; as the source has them unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// What the layout holds, AutoRound's too.
pub(super) const HOLDS: Holds =
    Holds { widths: &[2, 3, 4, 8], group: 32, tile: [32, 32], rank: 2, ..Holds::UNLIMITED };

impl PackedFormat for GptqFormatConfig {
    fn about(&self) -> &'static str {
        "GPTQ: transformers, gptqmodel, vLLM; 2, 3, 4 and 8 bits, f16 scales"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn holds(&self) -> &'static Holds {
        &HOLDS
    }

    fn wrong_values(&self, weight: &Coded<'_>) -> Option<Reason> {
        beyond_f16("gptq", weight)
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn packer(&self, linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(GptqOptions::suited(self.version, true, linears)?))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "gptq",
            section: |config| section(config, "gptq"),
            tensor: "qweight",
            weights: |section, name, source| Ok(read::decode(section, name, source)?.values()),
            codes: |section, name, source| read::decode(section, name, source)?.codes(),
        }
    }
}

impl Packer for GptqOptions {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        encode(name, weight, *self)
    }

    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value> {
        Ok(config(linears, &dense.linears, *self))
    }
}

/// Group lengths that readers have kernels for, descending; others are stored as shorter ones.
const GROUPS: [usize; 6] = [1024, 512, 256, 128, 64, 32];

/// How zero points are stored.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Version {
    /// Less one; symmetric grids only.
    V1,
    /// As they are.
    V2,
}

impl Version {
    /// Version 1 where every linear is symmetric, version 2 otherwise: a model has one version.
    pub(super) fn suited(linears: &[Layer]) -> Self {
        if linears.iter().all(|layer| layer.centred) { Self::V1 } else { Self::V2 }
    }
}

/// How to store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct GptqOptions {
    /// How zero points are stored.
    pub version: Version,
    /// Whether the group of each input is stored; AutoRound does without.
    pub index: bool,
    /// Whether rows that are one group are stored as such: so in a model where all of them are.
    pub whole_rows: bool,
}

impl GptqOptions {
    /// What suits a model of these linears: `version` 1 or 2 where it is given, else what the grids
    /// suit.
    ///
    /// # Errors
    /// For another version.
    pub(super) fn suited(version: Option<u8>, index: bool, linears: &[Layer]) -> Result<Self> {
        let version = match version {
            None => Version::suited(linears),
            Some(1) => Version::V1,
            Some(2) => Version::V2,
            Some(other) => {
                let format = if index { "gptq" } else { "autoround" };
                return Err(Error::usage(format!("version = {other} of GPTQ's layout"))
                    .at(format!("format.{format}"))
                    .fix("1 or 2"));
            }
        };
        Ok(Self { version, index, whole_rows: linears.iter().all(Layer::is_whole_row) })
    }

    /// The group length under which a linear is stored.
    fn group(self, group_len: usize, inputs: usize) -> usize {
        match stored_group(group_len, &GROUPS) {
            Some(size) if !(self.whole_rows && group_len == inputs) => size,
            _ => group_len,
        }
    }
}

/// The tensors of linear `name`.
///
/// # Errors
/// In version 1 when the grid is not symmetric.
pub(super) fn encode(name: &str, weight: &Coded<'_>, options: GptqOptions) -> Result<Tensors> {
    let less = match options.version {
        Version::V2 => 0,
        Version::V1 if weight.is_centred() => 1,
        Version::V1 => {
            let what = "version 1 of gptq holds symmetric grids, a zero point of this one is not \
                        in the middle";
            return Err(Error::preflight(what).at(name).fix("format.gptq.version = 2"));
        }
    };
    let (out, inputs, width) = (weight.out, weight.inputs, weight.bits);
    let group = options.group(weight.group_len, inputs);
    let times = weight.group_len / group;
    let groups = inputs / group;
    let words = bits::pack_rows(&weight.codes, inputs, width);
    let rows = bits::words_per_row(inputs, width);
    let zeros: Vec<u8> = weight
        .zero_codes()
        .iter()
        .flat_map(|zero| std::iter::repeat_n(zero - less, times))
        .collect();
    let zeros = bits::pack_rows(&transposed(&zeros, groups), out, width);
    let scales = transposed(&repeated(&weight.scale, times), groups);
    let columns = bits::words_per_row(out, width);
    let mut tensors = vec![
        (format!("{name}.qweight"), words_as_i32([rows, out], &transposed(&words, rows))),
        (format!("{name}.qzeros"), words_as_i32([groups, columns], &zeros)),
        (format!("{name}.scales"), floats(DType::F16, [groups, out], &scales)),
    ];
    if options.index {
        let index: Vec<i32> =
            (0..inputs).map(|input| ((input / group) as u32).cast_signed()).collect();
        tensors.push((format!("{name}.g_idx"), HostTensor::i32([inputs], &index)));
    }
    Ok(tensors)
}

/// Width and group length of a linear as stored, without a length where rows are whole.
type Key = (u8, Option<usize>);

/// Those of all linears, and the most common one.
pub(super) fn keys(linears: &[Layer], options: GptqOptions) -> (Vec<Key>, Key) {
    let key = |layer: &Layer| {
        let whole = options.whole_rows && layer.is_whole_row();
        let group = options.group(layer.group_len, layer.shape[1]);
        (layer.bits, (!whole).then_some(group))
    };
    let keys: Vec<Key> = linears.iter().map(key).collect();
    let common = most_common(&keys).unwrap_or((4, Some(128)));
    (keys, common)
}

/// The `quantization_config` of GPTQ. Linears that differ from the most common width and group
/// are listed under `dynamic`, as are the linears that stay `dense`.
fn config(linears: &[Layer], dense: &[String], options: GptqOptions) -> Value {
    let (keys, common) = keys(linears, options);
    let mut dynamic = Map::new();
    for (layer, key) in linears.iter().zip(&keys) {
        if *key != common {
            let own = json!({ "bits": key.0, "group_size": stated(key.1) });
            dynamic.insert(format!("+:^{}$", escaped(&layer.name)), own);
        }
    }
    // The embedding and the head are dense unless the config says otherwise.
    for name in dense.iter().filter(|name| name.contains(".layers.")) {
        dynamic.insert(format!("-:^{}$", escaped(name)), json!({}));
    }
    let format = match options.version {
        Version::V1 => "gptq",
        Version::V2 => "gptq_v2",
    };
    let mut config = json!({
        "quant_method": "gptq",
        "bits": common.0,
        "group_size": stated(common.1),
        "sym": linears.iter().all(|layer| layer.centred),
        "desc_act": false,
        "checkpoint_format": format,
        "lm_head": linears.iter().any(|layer| layer.name == "lm_head"),
        "meta": { "quantizer": [concat!("fewbit:", env!("CARGO_PKG_VERSION"))] },
    });
    if !dynamic.is_empty() {
        config["dynamic"] = Value::Object(dynamic);
    }
    config
}

/// The name as a regular expression.
fn escaped(name: &str) -> String {
    name.replace('.', "\\.")
}

pub(super) mod read {
    //! Reads GPTQ's tensors, under a config of GPTQ or of AutoRound.

    use serde_json::Value;

    use crate::error::Result;
    use crate::export::read::{
        Decoded, Shift, Stream, damaged, floats_of, group_index, group_len, width, words, words_of,
    };
    use crate::store::TensorSource;

    /// Linear `name` under `config`, the `quantization_config`. Where there is a `g_idx`, it says which
    /// input belongs to which group (act-order).
    ///
    /// # Errors
    /// When config and tensors contradict each other.
    pub(in crate::export) fn decode(
        config: &Value,
        name: &str,
        source: &dyn TensorSource,
    ) -> Result<Decoded> {
        let own = own_entry(config, name);
        let bits =
            own.map_or_else(|| width(config, "bits", name), |own| width(own, "bits", name))?;
        let add = added_to_zeros(config, name)?;
        let (words, [rows, out]) = words(source, &format!("{name}.qweight"))?;
        let inputs = rows * 32 / usize::from(bits);
        if (rows * 32) % usize::from(bits) != 0 {
            return Err(damaged(
                format!("{rows} words are no column of codes of {bits} bits"),
                name,
            ));
        }
        let group_len = group_len(own.unwrap_or(config), inputs, name)?;
        let groups = inputs / group_len;
        let index = group_index(source, &format!("{name}.g_idx"), inputs, groups)?;
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
            (Some("gptq"), Some("gptq_v2"), _) | (Some("auto-round"), _, Some("auto_round")) => {
                Ok(0.0)
            }
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::autoround;
    use super::super::coded::sample::{Grid, grid};
    use super::super::format::sample::packed;
    use super::super::read::{Decoded, Shift, memory::Memory};
    use super::*;
    use crate::quant::ZeroKind;

    const V2: GptqOptions = GptqOptions { version: Version::V2, index: true, whole_rows: false };
    const V1: GptqOptions = GptqOptions { version: Version::V1, ..V2 };

    fn decoded(grid: &Grid, options: GptqOptions) -> Decoded {
        let tensors = encode("x", &grid.coded(), options).unwrap();
        let layers = [grid.coded().layer("x")];
        let gptq = read::decode(&config(&layers, &[], options), "x", &Memory::new(tensors.clone()))
            .unwrap();
        let auto = autoround::config(&layers, &[], options);
        assert_eq!(read::decode(&auto, "x", &Memory::new(tensors)).unwrap(), gptq);
        gptq
    }

    /// Files with `desc_act` scatter the members of a group; we write none, but read them.
    #[test]
    fn scattered_groups_are_read() {
        let grid = grid([32, 96], 32, 4, ZeroKind::Integer, true, 8);
        let mut tensors = encode("x", &grid.coded(), V2).unwrap();
        let config = config(&[grid.coded().layer("x")], &[], V2);
        let index: Vec<i32> = (0..96).map(|input| input * 5 % 3).collect();
        tensors[3].1 = HostTensor::i32([96], &index);
        let found = read::decode(&config, "x", &Memory::new(tensors.clone())).unwrap();
        for (at, weight) in found.weights.iter().enumerate() {
            let group = at / 96 * 3 + index[at % 96] as usize;
            let expected = grid.scale[group] * (f32::from(grid.codes[at]) - grid.zero[group]);
            assert_eq!(weight.to_bits(), expected.to_bits());
        }
        tensors[3].1 = HostTensor::i32([96], &[3; 96]);
        let error = read::decode(&config, "x", &Memory::new(tensors)).unwrap_err();
        assert!(error.to_string().contains("3 groups"), "{error}");
    }

    #[test]
    fn a_hand_example() {
        let mut grid = grid([32, 32], 32, 4, ZeroKind::Integer, true, 1);
        grid.codes.fill(0);
        grid.codes[..9].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8, 9]);
        grid.codes[32] = 15;
        grid.scale[1] = 0.25;
        grid.centre();
        let tensors = encode("x", &grid.coded(), V1).unwrap();
        let words = tensors[0].1.to_u32().unwrap();
        assert_eq!(tensors[0].1.shape, [4, 32]);
        assert_eq!((words[0], words[1], words[32]), (0x8765_4321, 15, 9));
        assert_eq!(tensors[1].1.to_u32().unwrap(), [0x7777_7777; 4]);
        assert_eq!(tensors[1].1.shape, [1, 4]);
        assert_eq!(tensors[2].1.to_f32().unwrap()[1..2], [0.25]);
        assert_eq!(tensors[3].1, HostTensor::i32([32], &[0; 32]));
        grid.zero[2] = 3.0;
        let tensors = encode("x", &grid.coded(), V2).unwrap();
        assert_eq!(tensors[1].1.to_u32().unwrap()[0], 0x8888_8388);
        let error = encode("x", &grid.coded(), V1).unwrap_err().to_string();
        assert!(error.ends_with("format.gptq.version = 2"), "{error}");
    }

    #[test]
    fn three_bit_codes_straddle_words_down_the_inputs() {
        let mut grid = grid([32, 32], 32, 3, ZeroKind::Integer, true, 1);
        grid.codes.fill(0);
        // Input 10 of output 5 takes bits 30..33.
        grid.codes[5 * 32 + 10] = 0b110;
        let words = encode("x", &grid.coded(), V2).unwrap()[0].1.to_u32().unwrap();
        assert_eq!((words[5], words[32 + 5], words.len()), (0b10 << 30, 1, 96));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let v2 = GptqFormatConfig { version: Some(2), ..GptqFormatConfig::default() };
        let cases = [
            grid([32, 32], 32, 8, ZeroKind::Half, true, 1),
            grid([32, 32], 32, 4, ZeroKind::Real, true, 1),
            grid([32, 48], 16, 4, ZeroKind::Integer, true, 1),
            grid([24, 32], 32, 4, ZeroKind::Integer, true, 1),
            grid([32, 32], 32, 4, ZeroKind::Integer, false, 1),
        ];
        for grid in cases {
            assert!(packed(&v2, &grid.coded()).is_err(), "{grid:?}");
        }
        let mut grid = grid([32, 32], 32, 8, ZeroKind::Integer, true, 1);
        grid.zero[0] = 256.0;
        assert!(packed(&v2, &grid.coded()).is_err());
    }

    #[test]
    fn configs_name_what_differs() {
        let layer = |name: &str, bits, group_len| Layer {
            name: format!("model.layers.0.{name}"),
            shape: [32, 256],
            bits,
            group_len,
            centred: true,
        };
        let linears = [layer("a", 2, 64), layer("b", 4, 96), layer("c", 2, 64)];
        let dense = ["lm_head".to_owned(), "model.layers.0.d".to_owned()];
        let options = GptqOptions::suited(None, true, &linears).unwrap();
        let gptq = config(&linears, &dense, options);
        assert_eq!((&gptq["bits"], &gptq["group_size"]), (&json!(2), &json!(64)));
        assert_eq!(gptq["checkpoint_format"], "gptq");
        assert_eq!(
            gptq["dynamic"],
            json!({
                "+:^model\\.layers\\.0\\.b$": {"bits": 4, "group_size": 32},
                "-:^model\\.layers\\.0\\.d$": {},
            })
        );
        let auto =
            autoround::config(&linears, &dense, GptqOptions { version: Version::V2, ..options });
        assert_eq!(auto["packing_format"], "auto_round");
        assert_eq!(auto["extra_config"]["model.layers.0.b"]["group_size"], 32);
        assert_eq!(auto["extra_config"]["model.layers.0.d"]["bits"], 16);
        let rows = [layer("a", 4, 256), layer("b", 4, 256)];
        assert_eq!(
            config(&rows, &[], GptqOptions::suited(None, true, &rows).unwrap())["group_size"],
            -1
        );
        let mixed = [layer("a", 4, 256), layer("b", 4, 128)];
        assert!(!GptqOptions::suited(None, true, &mixed).unwrap().whole_rows);
    }

    proptest! {
        #[test]
        fn comes_back_bit_for_bit(
            bits in prop::sample::select(&[2_u8, 3, 4, 8][..]),
            group_len in prop::sample::select(&[32, 64, 96, 128][..]),
            groups in 1_usize..3,
            out in 1_usize..3,
            whole_rows: bool,
            first: bool,
            autoround: bool,
            seed: u32,
        ) {
            let shape = [out * 32, groups * group_len];
            let mut grid = grid(shape, group_len, bits, ZeroKind::Integer, true, seed);
            if first {
                grid.centre();
            }
            let version = if first { Version::V1 } else { Version::V2 };
            let whole_rows = whole_rows && groups == 1;
            let index = !autoround;
            let decoded = decoded(&grid, GptqOptions { version, index, whole_rows });
            let decoded = decoded.regrouped(group_len).unwrap();
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            prop_assert_eq!(decoded.shift, Shift::Zero(grid.zero.clone()));
            prop_assert_eq!(decoded.weights, grid.coded().dequantize());
        }
    }
}
