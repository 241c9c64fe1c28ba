//! Bit planes with their scales: binary coding as LUT-GEMM style kernels read it.
//!
//! Per linear `X`, with one precision: `X.qweight`, u32 `[inputs / 32, bits, out]`, LUT-GEMM's
//! order; `X.alpha`, f32 `[groups, bits, out]`; `X.offset`, f32 `[groups, out]`. With several
//! precisions on the same planes: `X.qweight`, u32 `[planes, inputs / 32, out]`, so that `p` planes
//! are one contiguous prefix, and for each precision `p` its `X.alpha_p`, f32 `[groups, p, out]`,
//! and `X.offset_p`, f32 `[groups, out]`.
//!
//! Bit `k % 32` of a word, the lowest first, is input `k`, set where the scale is added. Inputs
//! behind the last are zero bits. The value of a weight is `±alpha_0 ± alpha_1 ... + offset`,
//! added in this order in f32.
//!
//! Longer than others, because two layouts are packed and one decoder, which shares no code with them,
//! reads both: a format is one file.

use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::coded::{Coded, Layer, Tensors, transposed};
use super::embeddings::Embeddings;
use super::format::{Dense, PackedFormat, Packer};
use super::plan::{Holds, Reason};
use super::planes;
use super::read::{Reader, section};
use crate::error::{Error, Result};
use crate::store::HostTensor;

/// Keys of `format.bcq`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct BcqFormatConfig {
    /// Numbers of planes, fewer than were trained, that can be read out of the same file too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub precisions: Vec<u8>,
    /// What embedding and head are stored as: `"f16"` or `"bf16"`; as the source has them unless said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

impl PackedFormat for BcqFormatConfig {
    fn about(&self) -> &'static str {
        "Sign planes of binary coding in LUT-GEMM's word order"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn holds(&self) -> &'static Holds {
        &Holds {
            widths: &[1, 2, 3, 4, 5, 6, 7, 8],
            codes_zeros: false,
            planes: true,
            group: 32,
            rank: 5,
            ..Holds::UNLIMITED
        }
    }

    fn wrong_values(&self, weight: &Coded<'_>) -> Option<Reason> {
        weight.zero_kind?;
        let (_, changed) = planes::of_uniform(weight);
        (changed > 0).then(|| {
            Reason::scales(format!(
                "bcq adds scales of planes in f32, with a rounding each, and {changed} of {} groups \
                 have scales of too many digits for that: their weights would differ in the last \
                 digits",
                weight.scale.len()
            ))
        })
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn packer(&self, _linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(self.clone()))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "bcq",
            section: |config| section(config, "bcq"),
            tensor: "qweight",
            weights: |section, name, source| {
                let bits = section["linears"][name]["bits"].as_u64().unwrap_or(0) as u8;
                let found = read::decode(section, name, bits, source)?;
                Ok((found.weights, [found.out, found.inputs]))
            },
            codes: |section, name, source| {
                let bits = section["linears"][name]["bits"].as_u64().unwrap_or(0) as u8;
                read::decode(section, name, bits, source)?.codes()
            },
        }
    }
}

impl Packer for BcqFormatConfig {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        let planes = match weight.zero_kind {
            None => weight.view(),
            Some(_) => planes::of_uniform(weight).0,
        };
        if self.precisions.is_empty() {
            return Ok(encode(name, &planes));
        }
        encode_nested(name, &planes::precisions(name, &planes, &self.precisions)?)
    }

    fn section(&self, linears: &[Layer], _dense: &Dense) -> Result<Value> {
        Ok(config(linears, &self.precisions))
    }
}

/// Version of this layout, in the config.
const FORMAT_VERSION: u32 = 1;

/// Bits in a word.
const WORD: usize = 32;

/// The tensors of linear `name`, in binary coding, with one precision.
fn encode(name: &str, weight: &Coded<'_>) -> Tensors {
    let planes = usize::from(weight.bits);
    let columns = weight.inputs.div_ceil(WORD);
    let mut words = vec![0; columns * planes * weight.out];
    set_bits(weight, &mut words, |column, plane| column * planes + plane);
    let groups = weight.groups();
    vec![
        (format!("{name}.qweight"), HostTensor::u32([columns, planes, weight.out], &words)),
        (
            format!("{name}.alpha"),
            HostTensor::f32([groups, planes, weight.out], &by_group(&weight.scale, weight, planes)),
        ),
        (
            format!("{name}.offset"),
            HostTensor::f32([groups, weight.out], &by_group(&weight.shift, weight, 1)),
        ),
    ]
}

/// The tensors of linear `name`, with two or more precisions in ascending order. The codes of each
/// are the lowest bits of the codes of the last; scales and offsets are its own.
///
/// # Errors
/// When the planes are not shared.
fn encode_nested(name: &str, precisions: &[Coded<'_>]) -> Result<Tensors> {
    let [_, .., widest] = precisions else {
        let what = format!("{} precisions, nested planes need two", precisions.len());
        return Err(Error::failed(what).at(name));
    };
    for (i, weight) in precisions.iter().enumerate() {
        let ascends = i == 0 || precisions[i - 1].bits < weight.bits;
        check_shared(widest, weight, ascends).map_err(|e| e.at(name))?;
    }
    let planes = usize::from(widest.bits);
    let (out, columns, groups) = (widest.out, widest.inputs.div_ceil(WORD), widest.groups());
    let mut words = vec![0; planes * columns * out];
    set_bits(widest, &mut words, |column, plane| plane * columns + column);
    let mut tensors =
        vec![(format!("{name}.qweight"), HostTensor::u32([planes, columns, out], &words))];
    for weight in precisions {
        let bits = usize::from(weight.bits);
        let alpha = HostTensor::f32([groups, bits, out], &by_group(&weight.scale, weight, bits));
        let offset = HostTensor::f32([groups, out], &by_group(&weight.shift, weight, 1));
        tensors.push((format!("{name}.alpha_{bits}"), alpha));
        tensors.push((format!("{name}.offset_{bits}"), offset));
    }
    Ok(tensors)
}

fn check_shared(widest: &Coded<'_>, weight: &Coded<'_>, ascends: bool) -> Result<()> {
    let layout = |w: &Coded<'_>| (w.out, w.inputs, w.group_len);
    let mask = u8::MAX >> (8 - weight.bits);
    let prefix = || weight.codes.iter().zip(&*widest.codes).all(|(own, all)| *own == all & mask);
    if ascends && layout(widest) == layout(weight) && prefix() {
        return Ok(());
    }
    Err(Error::preflight(format!(
        "the planes of {} bits are not the first of those of {} bits",
        weight.bits, widest.bits
    ))
    .fix("export each precision on its own"))
}

/// Sets the bits of all planes; `row` gives the place of a word column of a plane, in rows of
/// `out` words.
fn set_bits(weight: &Coded<'_>, words: &mut [u32], row: impl Fn(usize, usize) -> usize) {
    for (out, codes) in weight.codes.chunks_exact(weight.inputs).enumerate() {
        for (column, codes) in codes.chunks(WORD).enumerate() {
            for plane in 0..usize::from(weight.bits) {
                let bit = |(k, code): (usize, &u8)| u32::from(code >> plane & 1) << k;
                words[row(column, plane) * weight.out + out] =
                    codes.iter().enumerate().map(bit).sum();
            }
        }
    }
}

/// Values `[out, groups, each]` as `[groups, each, out]`.
fn by_group(values: &[f32], weight: &Coded<'_>, each: usize) -> Vec<f32> {
    transposed(values, weight.groups() * each)
}

/// The `quantization_config`. `lower` lists the numbers of planes that can be read besides each
/// linear's own, none for [`encode`]. Each linear is listed with its shape, because padding hides the number of inputs.
fn config(linears: &[Layer], lower: &[u8]) -> Value {
    let own: BTreeSet<u8> = linears.iter().map(|layer| layer.bits).collect();
    let precisions: BTreeSet<u8> = own.iter().chain(lower).copied().collect();
    let entry = |layer: &Layer| {
        let entry = json!({
            "shape": layer.shape,
            "bits": layer.bits,
            "group_size": layer.group_len,
        });
        (layer.name.clone(), entry)
    };
    json!({
        "quant_method": "bcq",
        "format_version": FORMAT_VERSION,
        "layout": if lower.is_empty() { "lut_gemm" } else { "plane_major" },
        "precisions": precisions,
        "linears": linears.iter().map(entry).collect::<Map<_, _>>(),
    })
}

mod read {
    //! Reads bit planes with their scales.

    use serde_json::Value;

    use crate::error::Result;
    use crate::export::read::{damaged, group_len, number};
    use crate::quant::{Bits, Grid, GroupAxis, GroupLayout, QuantizedWeight};
    use crate::store::TensorSource;

    /// A weight in binary coding as a file holds it, at one precision.
    #[derive(Clone, Debug, PartialEq)]
    pub(super) struct DecodedPlanes {
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

    impl DecodedPlanes {
        /// The planes as codes, where these stand for the weights to the bit.
        ///
        /// # Errors
        /// When a value cannot be.
        pub(super) fn codes(self) -> Result<Option<QuantizedWeight>> {
            let Self { out, inputs, group_len, bits, codes, alpha, offset, weights } = self;
            let groups = out * inputs / group_len;
            let layout = GroupLayout { out, inputs, groups, group_len, axis: GroupAxis::In };
            let grid = Grid::BinaryCoding { alpha, offset };
            let weight = QuantizedWeight::new(&codes, grid, Bits::new(bits)?, layout)?;
            let exact =
                weight.dequantize().iter().zip(&weights).all(|(a, b)| a.to_bits() == b.to_bits());
            Ok(exact.then_some(weight))
        }
    }

    /// Linear `name` at the precision of `bits` planes under `config`, the `quantization_config`.
    ///
    /// # Errors
    /// When the config lacks the precision, is of another version, or contradicts the tensors.
    pub(super) fn decode(
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
            let first =
                if file.nested { plane * columns + column } else { column * stored + plane };
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
            if version != Some(1)
                || config.get("quant_method").and_then(Value::as_str) != Some("bcq")
            {
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
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::coded::sample::generator;
    use super::super::format::sample::packed;
    use super::super::read::memory::Memory;
    use super::*;

    struct Sample {
        shape: [usize; 2],
        group_len: usize,
        codes: Vec<Vec<u8>>,
        alpha: Vec<Vec<f32>>,
        offset: Vec<Vec<f32>>,
        bits: Vec<u8>,
    }

    impl Sample {
        fn new(shape: [usize; 2], group_len: usize, bits: &[u8], seed: u32) -> Self {
            let mut next = generator(seed);
            let highest = *bits.last().unwrap();
            let n = shape[0] * shape[1];
            let all: Vec<u8> = (0..n).map(|_| (next() % (1 << highest)) as u8).collect();
            let mut values =
                |n: usize| (0..n).map(|_| next() as f32 * 1.7e-8 - 0.1).collect::<Vec<f32>>();
            let groups = n / group_len;
            Self {
                shape,
                group_len,
                codes: bits
                    .iter()
                    .map(|b| all.iter().map(|code| code & u8::MAX >> (8 - b)).collect())
                    .collect(),
                alpha: bits.iter().map(|b| values(groups * usize::from(*b))).collect(),
                offset: bits.iter().map(|_| values(groups)).collect(),
                bits: bits.to_vec(),
            }
        }

        fn planes(&self) -> Vec<Coded<'_>> {
            let planes = |i: usize| Coded {
                out: self.shape[0],
                inputs: self.shape[1],
                group_len: self.group_len,
                bits: self.bits[i],
                codes: (&self.codes[i]).into(),
                scale: (&self.alpha[i]).into(),
                shift: (&self.offset[i]).into(),
                zero_kind: None,
            };
            (0..self.bits.len()).map(planes).collect()
        }
    }

    /// The definition.
    fn weights(planes: &Coded<'_>) -> Vec<u32> {
        let value = |(i, code): (usize, &u8)| {
            let group = i / planes.group_len;
            let bits = usize::from(planes.bits);
            let mut sum = 0.0;
            for plane in 0..bits {
                let alpha = planes.scale[group * bits + plane];
                let term = if code >> plane & 1 == 1 { alpha } else { -alpha };
                sum = if plane == 0 { term } else { sum + term };
            }
            (sum + planes.shift[group]).to_bits()
        };
        planes.codes.iter().enumerate().map(value).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|value| value.to_bits()).collect()
    }

    #[test]
    fn a_hand_example() {
        let mut sample = Sample::new([2, 34], 34, &[2, 3], 1);
        sample.codes[0].fill(0);
        sample.codes[0][0] = 0b01;
        sample.codes[0][33] = 0b10;
        sample.codes[0][34 + 31] = 0b11;
        let planes = sample.planes().remove(0);
        let tensors = encode("x", &planes);
        assert_eq!(tensors[0].1.shape, [2, 2, 2]);
        let expected = [1, 1 << 31, 0, 1 << 31, 0, 0, 2, 0];
        assert_eq!(tensors[0].1.to_u32().unwrap(), expected);
        let alpha = &sample.alpha[0];
        assert_eq!(
            tensors[1].1,
            HostTensor::f32([1, 2, 2], &[alpha[0], alpha[2], alpha[1], alpha[3]])
        );
        assert_eq!(tensors[2].1, HostTensor::f32([1, 2], &sample.offset[0]));
        sample.codes[1] = sample.codes[0].clone();
        sample.codes[1][32] = 0b100;
        let nested = encode_nested("x", &sample.planes()).unwrap();
        assert_eq!(nested[0].1.shape, [3, 2, 2]);
        let expected = [1, 1 << 31, 0, 0, 0, 1 << 31, 2, 0, 0, 0, 1, 0];
        assert_eq!(nested[0].1.to_u32().unwrap(), expected);
        let names: Vec<&str> = nested[1..].iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["x.alpha_2", "x.offset_2", "x.alpha_3", "x.offset_3"]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let sample = Sample::new([2, 96], 48, &[2], 1);
        let error = packed(&BcqFormatConfig::default(), &sample.planes()[0]).unwrap_err();
        assert!(error.to_string().contains("groups of 48"), "{error}");
        let mut sample = Sample::new([2, 64], 32, &[2, 3], 1);
        let descending: Vec<_> = sample.planes().into_iter().rev().collect();
        assert!(encode_nested("x", &descending).is_err());
        assert!(encode_nested("x", &[]).is_err());
        assert!(encode_nested("x", &descending[..1]).is_err());
        sample.codes[0][5] ^= 1;
        let error = encode_nested("x", &sample.planes()).unwrap_err().to_string();
        assert!(error.contains("2 bits are not the first of those of 3 bits"), "{error}");
    }

    #[test]
    fn a_config_without_our_version_is_refused() {
        let sample = Sample::new([2, 64], 32, &[2], 1);
        let planes = sample.planes().remove(0);
        let memory = Memory::new(encode("x", &planes));
        let mut config = config(&[planes.layer("x")], &[]);
        assert!(read::decode(&config, "x", 2, &memory).is_ok());
        assert!(read::decode(&config, "x", 3, &memory).is_err());
        assert!(read::decode(&config, "y", 2, &memory).is_err());
        config["format_version"] = json!(2);
        assert!(read::decode(&config, "x", 2, &memory).is_err());
    }

    proptest! {
        #[test]
        fn comes_back_bit_for_bit(
            lowest in 1_u8..=3,
            more in 0_u8..=3,
            (group_len, groups) in prop_oneof![
                (1_usize..100, Just(1_usize)),
                (prop::sample::select(&[32_usize, 64, 96][..]), 1_usize..4),
            ],
            out in 1_usize..6,
            seed: u32,
        ) {
            let precisions: Vec<u8> = (lowest..=lowest + more).collect();
            let sample = Sample::new([out, groups * group_len], group_len, &precisions, seed);
            let planes = sample.planes();
            let layers = [planes[planes.len() - 1].layer("x")];
            let nested = (precisions.len() > 1)
                .then(|| Memory::new(encode_nested("x", &planes).unwrap()));
            for planes in &planes {
                let single = config(&[planes.layer("x")], &[]);
                let memory = Memory::new(encode("x", planes));
                let one = read::decode(&single, "x", planes.bits, &memory).unwrap();
                prop_assert_eq!(&one.codes[..], &planes.codes[..]);
                prop_assert_eq!(bits(&one.alpha), bits(&planes.scale));
                prop_assert_eq!(bits(&one.offset), bits(&planes.shift));
                prop_assert_eq!(bits(&one.weights), weights(planes));
                if let Some(nested) = &nested {
                    let config = config(&layers, &precisions[..precisions.len() - 1]);
                    let of_many = read::decode(&config, "x", planes.bits, nested).unwrap();
                    prop_assert_eq!(of_many, one);
                }
            }
        }
    }
}
