//! fewbit's own packed layout: the neutral source of truth that every other format comes from.
//!
//! Per linear `X`: `X.codes`, u32 `[out, words]`, a dense little-endian bit stream per row. On a
//! uniform grid `X.scales`, floats `[out, groups]`, and `X.zero_points`, u8, i32 or floats of the same
//! shape, or `[1, 1]` when they are all equal. In binary coding `X.alphas`, floats
//! `[out, groups, bits]`, and `X.offsets`, floats `[out, groups]` or `[1, 1]`; for each narrower width `N`
//! that the same planes serve, `X.alphas_N` and `X.offsets_N`. Where groups lie along the outputs, all
//! of it is that of the transposed weight. Of codebooks, `X.codes` has the codes of a run of inputs side by
//! side, `in / vector * books` of them in a row, `X.codebooks` is `[books, centroids, vector]` and `X.scales`
//! `[out, groups]`. Floats are f16 where that holds every number of the tensor exactly
//! (`quant.scales = "f16"`), else f32.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::coded::Tensors;
use super::format::{FileFormat, Kind, OwnFormat};
use super::read::DAMAGED;
use super::record::{
    FORMAT_VERSION, GridRecord, LinearRecord, MANIFEST_FILE, nested_names, tensor_names,
    weights_sha256,
};
use crate::error::{Error, Result};
use crate::quant::{
    Additive, Bits, Grid, GroupLayout, PackedCodes, QuantizedWeight, ScaleDType, ZeroKind, bits,
    codebook,
};
use crate::store::{DType, HostTensor, TensorSource};

/// `format.fewbit`: no keys.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FewbitConfig {}

impl FileFormat for FewbitConfig {
    fn about(&self) -> &'static str {
        "Packed codes and scales: what every other format is made from"
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Own(self)
    }
}

impl OwnFormat for FewbitConfig {
    fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        Ok(encode(name, weight))
    }

    fn configure(&self, config: &mut Value, _unties: bool) {
        if let Some(map) = config.as_object_mut() {
            let about = json!({
                "quant_method": "fewbit",
                "format_version": FORMAT_VERSION,
                "manifest": MANIFEST_FILE,
            });
            map.insert("quantization_config".to_owned(), about);
        }
    }
}

/// The tensors of one linear.
pub fn encode(name: &str, weight: &QuantizedWeight) -> Tensors {
    let layout = weight.layout;
    let width = weight.bits.get();
    let [codes_name, scales_name, zeros_name, alphas_name, offsets_name, books_name] =
        tensor_names(name);
    let packed = &weight.codes;
    let words = bits::words_per_row(packed.columns(), packed.bits());
    let codes = HostTensor::u32([packed.rows(), words], packed.words());
    let mut tensors = vec![(codes_name, codes)];
    let scale_shape = layout.scale_shape();
    match &weight.grid {
        Grid::Uniform { scale, zero_point, zero_kind } => {
            tensors.push((scales_name, floats(scale_shape, scale)));
            tensors.push((zeros_name, encode_zeros(zero_point, *zero_kind, scale_shape)));
        }
        Grid::BinaryCoding { alpha, offset } => {
            let [rows, groups] = scale_shape;
            let shape = [rows, groups, usize::from(width)];
            tensors.push((alphas_name, floats(shape, alpha)));
            tensors.push((offsets_name, encode_zeros(offset, ZeroKind::Real, scale_shape)));
        }
        Grid::Codebook { scale, books, additive } => {
            let shape = [additive.books, 1 << packed.bits(), additive.vector];
            tensors.push((books_name, floats(shape, books)));
            tensors.push((scales_name, floats(scale_shape, scale)));
        }
    }
    for (grid, bits) in weight.nested.iter().zip(weight.widths()) {
        let Grid::BinaryCoding { alpha, offset } = grid else { continue };
        let [alphas_name, offsets_name] = nested_names(name, bits);
        let [rows, groups] = scale_shape;
        let shape = [rows, groups, usize::from(bits.get())];
        tensors.push((alphas_name, floats(shape, alpha)));
        tensors.push((offsets_name, encode_zeros(offset, ZeroKind::Real, scale_shape)));
    }
    tensors
}

fn encode_zeros(zeros: &[f32], kind: ZeroKind, shape: [usize; 2]) -> HostTensor {
    let same = zeros.windows(2).all(|pair| pair[0].to_bits() == pair[1].to_bits());
    let (zeros, shape) = if same { (&zeros[..1], [1, 1]) } else { (zeros, shape) };
    let in_range = |low: f32, high: f32| zeros.iter().all(|z| (low..=high).contains(z));
    match kind {
        ZeroKind::Integer if in_range(0.0, 255.0) => {
            HostTensor::u8(shape, &zeros.iter().map(|z| *z as u8).collect::<Vec<u8>>())
        }
        // Integers beyond 2^24 do not occur between neighbours of f32, and i32 holds them exactly.
        ZeroKind::Integer if in_range(-2_147_483_648.0, 2_147_483_520.0) => {
            HostTensor::i32(shape, &zeros.iter().map(|z| *z as i32).collect::<Vec<i32>>())
        }
        _ => floats(shape, zeros),
    }
}

/// In two bytes each where that loses nothing.
fn floats(shape: impl Into<Vec<usize>>, values: &[f32]) -> HostTensor {
    if ScaleDType::of(values) == ScaleDType::F16 {
        HostTensor::f16_from_f32(shape, values)
    } else {
        HostTensor::f32(shape, values)
    }
}

/// Reads one linear back.
///
/// # Errors
/// When a tensor is missing, has another shape or type than the record says, or holds a code,
/// scale or zero point that cannot be.
pub fn decode(
    name: &str,
    record: &LinearRecord,
    source: &dyn TensorSource,
) -> Result<QuantizedWeight> {
    let [out, inputs] = record.shape;
    let group_len = record.group_len;
    let groups = out.saturating_mul(inputs) / group_len.max(1);
    let layout = GroupLayout { out, inputs, groups, group_len, axis: record.axis };
    if !layout.is_sound() {
        let what = format!("group length {group_len} does not divide {out} x {inputs}");
        return Err(Error::damaged(what, DAMAGED).at(name));
    }
    let [rows, columns] = layout.stored();
    let [codes_name, scales_name, zeros_name, alphas_name, offsets_name, books_name] =
        tensor_names(name);
    let (columns, width) = match record.grid {
        GridRecord::Codebook { books, vector, code_bits } => {
            let sound = (1..=codebook::MOST).contains(&books)
                && (1..=codebook::LONGEST).contains(&vector)
                && inputs.is_multiple_of(vector)
                && (1..=8).contains(&code_bits);
            if !sound {
                let what = format!(
                    "{books} codebooks of {code_bits} bits and {vector} inputs in rows of {inputs}"
                );
                return Err(Error::damaged(what, DAMAGED).at(name));
            }
            (Additive { books, vector }.codes(inputs), code_bits)
        }
        GridRecord::Uniform { .. } | GridRecord::BinaryCoding {} => (columns, record.bits.get()),
    };
    let codes_shape = vec![rows, bits::words_per_row(columns, width)];
    let words = read(source, &codes_name, &[codes_shape])?.to_u32();
    let words = words.map_err(|e| e.at(&codes_name))?;
    let scale_shape = layout.scale_shape().to_vec();
    let floats = |name: &str, shape: Vec<usize>| {
        read(source, name, &[shape])?.to_f32().map_err(|e| e.at(name))
    };
    let per_group = |name: &str| -> Result<Vec<f32>> {
        let stored = read(source, name, &[scale_shape.clone(), vec![1, 1]])?;
        let values = decode_zeros(&stored).map_err(|e| e.at(name))?;
        Ok(if values.len() == 1 { vec![values[0]; groups] } else { values })
    };
    let planes = |[alphas, offsets]: [&str; 2], bits: Bits| -> Result<Grid> {
        let shape = [&scale_shape[..], &[usize::from(bits.get())]].concat();
        Ok(Grid::BinaryCoding { alpha: floats(alphas, shape)?, offset: per_group(offsets)? })
    };
    let grid = match record.grid {
        GridRecord::Uniform { zero_kind } => Grid::Uniform {
            scale: floats(&scales_name, scale_shape.clone())?,
            zero_point: per_group(&zeros_name)?,
            zero_kind,
        },
        GridRecord::BinaryCoding {} => planes([&alphas_name, &offsets_name], record.bits)?,
        GridRecord::Codebook { books, vector, .. } => Grid::Codebook {
            scale: floats(&scales_name, scale_shape.clone())?,
            books: floats(&books_name, vec![books, 1 << width, vector])?,
            additive: Additive { books, vector },
        },
    };
    let nested = record.nested.iter().map(|bits| {
        let [alphas, offsets] = nested_names(name, *bits);
        planes([&alphas, &offsets], *bits)
    });
    let nested = nested.collect::<Result<_>>()?;
    let codes = PackedCodes::from_words(words, [rows, columns], width).ok_or_else(|| {
        let what = "bits behind the last code of a row are set";
        Error::damaged(what, DAMAGED).at(&codes_name)
    })?;
    let weight = QuantizedWeight { codes, grid, bits: record.bits, layout, nested };
    weight.checked().map_err(|e| e.at(name).of_input(DAMAGED))
}

fn read(source: &dyn TensorSource, name: &str, shapes: &[Vec<usize>]) -> Result<HostTensor> {
    let tensor = source.read(name)?;
    if shapes.contains(&tensor.shape) {
        return Ok(tensor);
    }
    let what =
        format!("the tensor has shape {:?}, the manifest says {:?}", tensor.shape, shapes[0]);
    Err(Error::damaged(what, DAMAGED).at(name))
}

fn decode_zeros(zeros: &HostTensor) -> Result<Vec<f32>> {
    match zeros.dtype {
        DType::U8 => Ok(zeros.to_u8()?.into_iter().map(f32::from).collect()),
        DType::I32 => {
            Ok(zeros.to_u32()?.into_iter().map(|bits| bits.cast_signed() as f32).collect())
        }
        _ => zeros.to_f32(),
    }
}

/// The names under which the latent weight of linear `name` and its learned step are stored.
pub fn latent_names(name: &str) -> [String; 2] {
    ["latent", "step"].map(|part| format!("{name}.{part}"))
}

/// The name under which the steps of linear `name` are stored, in the order of its groups.
pub fn scales_name(name: &str) -> String {
    let [_, scales, ..] = tensor_names(name);
    scales
}

/// What a stage has made of some linears, and of dense tensors on the way.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Saved {
    /// Quantized linears with the method that made each.
    pub linears: Vec<(String, QuantizedWeight, String)>,
    /// Dense tensors that are no longer the checkpoint's, by name.
    pub dense: BTreeMap<String, HostTensor>,
    /// What a later stage goes on from, by [`latent_names`].
    pub latents: BTreeMap<String, HostTensor>,
    /// Anything else the stage wants back.
    pub metadata: BTreeMap<String, String>,
}

impl Saved {
    /// Writes one crash-safe file, a stage's checkpoint.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, path: &std::path::Path) -> Result<()> {
        let kept = self.dense.iter().chain(&self.latents);
        let mut tensors: Vec<(String, HostTensor)> =
            kept.map(|(name, tensor)| (name.clone(), tensor.clone())).collect();
        let mut records = BTreeMap::new();
        for (name, weight, method) in &self.linears {
            let encoded = encode(name, weight);
            let record = LinearRecord::new(weight, method, &weight.dequantize(), &encoded);
            tensors.extend(encoded);
            records.insert(name.clone(), record);
        }
        let hashes = |tensors: &BTreeMap<String, HostTensor>| -> BTreeMap<String, String> {
            tensors.iter().map(|(name, tensor)| (name.clone(), tensor.sha256())).collect()
        };
        let json = |value: serde_json::Result<String>| {
            value.map_err(|e| Error::failed(format!("cannot encode a checkpoint's records: {e}")))
        };
        let mut metadata = self.metadata.clone();
        metadata.insert("linears".to_owned(), json(serde_json::to_string(&records))?);
        metadata.insert("dense".to_owned(), json(serde_json::to_string(&hashes(&self.dense)))?);
        if !self.latents.is_empty() {
            let latents = json(serde_json::to_string(&hashes(&self.latents)))?;
            metadata.insert("latents".to_owned(), latents);
        }
        crate::store::safetensors::write_file(path, &tensors, &metadata)
    }

    /// Reads what [`Saved::write`] wrote, checking every hash.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn read(path: &std::path::Path) -> Result<Self> {
        let damaged = |what: &str| {
            Error::failed(format!("the checkpoint cannot be used: {what}"))
                .at(path.display())
                .fix("remove that file to repeat its work, or --fresh to start over")
        };
        let unreadable = |e: serde_json::Error| damaged(&format!("its records: {e}"));
        let file = crate::store::safetensors::Checkpoint::open_file(path)
            .map_err(|e| damaged(e.what()))?;
        let mut metadata = file.file_metadata().clone();
        let records = metadata.remove("linears").unwrap_or_default();
        let records: BTreeMap<String, LinearRecord> =
            serde_json::from_str(&records).map_err(unreadable)?;
        let mut hashes = |of: &str| -> Result<BTreeMap<String, String>> {
            let hashes = metadata.remove(of).unwrap_or_else(|| "{}".to_owned());
            serde_json::from_str(&hashes).map_err(unreadable)
        };
        let [dense, latents] = [hashes("dense")?, hashes("latents")?];
        let mut linears = Vec::new();
        for (name, record) in records {
            let weight = decode(&name, &record, &file).map_err(|e| damaged(e.what()))?;
            if weights_sha256(&weight.dequantize()) != record.weights_sha256 {
                return Err(damaged(&format!("{name} does not match its hash")));
            }
            linears.push((name, weight, record.method));
        }
        let read = |hashes: BTreeMap<String, String>| -> Result<BTreeMap<String, HostTensor>> {
            let mut tensors = BTreeMap::new();
            for (name, hash) in hashes {
                let tensor = file.read(&name).map_err(|e| damaged(e.what()))?;
                if tensor.sha256() != hash {
                    return Err(damaged(&format!("{name} does not match its hash")));
                }
                tensors.insert(name, tensor);
            }
            Ok(tensors)
        };
        Ok(Self { linears, dense: read(dense)?, latents: read(latents)?, metadata })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::coded::sample::generator;
    use super::*;
    use crate::quant::{GroupAxis, ScaleDigits};

    /// `kind`: a uniform grid with those zero points, or binary coding.
    fn weight(
        bits: u8,
        [out, groups, group_len]: [usize; 3],
        kind: Option<ZeroKind>,
        seed: u32,
    ) -> QuantizedWeight {
        let mut next = generator(seed);
        let bits = Bits::new(bits).unwrap();
        let n = out * groups;
        let codes: Vec<u8> =
            (0..n * group_len).map(|_| (next() as usize % bits.levels()) as u8).collect();
        let mut positive =
            |n: usize| -> Vec<f32> { (0..n).map(|_| (next() % 1000 + 1) as f32 * 1e-3).collect() };
        let grid = match kind {
            Some(zero_kind) => Grid::Uniform {
                scale: positive(n),
                zero_point: positive(n)
                    .into_iter()
                    .map(|x| match zero_kind {
                        ZeroKind::Integer => (x * 300.0).round() - 20.0,
                        ZeroKind::Half => (x * 4.0).floor() + 0.5,
                        ZeroKind::Real => x - 0.5,
                    })
                    .collect(),
                zero_kind,
            },
            None => Grid::BinaryCoding {
                alpha: positive(n * usize::from(bits.get())),
                offset: positive(n),
            },
        };
        let inputs = groups * group_len;
        let axis = if seed.is_multiple_of(2) { GroupAxis::In } else { GroupAxis::Out };
        let (out, inputs) = if axis == GroupAxis::In { (out, inputs) } else { (inputs, out) };
        let layout = GroupLayout { out, inputs, groups: n, group_len, axis };
        let narrower = if kind.is_none() { 1..bits.get() } else { 0..0 };
        let nested = narrower.map(|planes| Grid::BinaryCoding {
            alpha: positive(n * usize::from(planes)),
            offset: positive(n),
        });
        let nested = nested.collect();
        let weight = QuantizedWeight::new(&codes, grid, bits, layout).unwrap();
        QuantizedWeight { nested, ..weight }.checked().unwrap()
    }

    proptest! {
        #[test]
        fn decode_inverts_encode_for_every_width_and_grid(
            bits in 1u8..=8,
            out in 1usize..5,
            groups in 1usize..4,
            group_len in 1usize..20,
            kind in 0usize..4,
            short: bool,
            seed: u32,
        ) {
            let kinds = [ZeroKind::Integer, ZeroKind::Half, ZeroKind::Real].map(Some);
            let kind = kinds.get(kind).copied().flatten();
            let weight = weight(bits, [out, groups, group_len], kind, seed);
            let digits = if short { ScaleDigits::F16 } else { ScaleDigits::F32 };
            let weight = weight.with_scales(digits).unwrap();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("w.safetensors");
            let tensor = HostTensor::f32([2, 1], &[0.5, -1.0]);
            let saved = Saved {
                linears: vec![("x".to_owned(), weight, "rtn".to_owned())],
                dense: BTreeMap::from([("norm".to_owned(), tensor.clone())]),
                latents: BTreeMap::from([("x.latent".to_owned(), tensor)]),
                metadata: BTreeMap::from([("note".to_owned(), "a".to_owned())]),
            };
            saved.write(&path).unwrap();
            prop_assert_eq!(Saved::read(&path).unwrap(), saved);
        }
    }

    #[test]
    fn floats_are_short_where_that_is_exact_and_counted_as_they_are() {
        for kind in [None, Some(ZeroKind::Integer), Some(ZeroKind::Half), Some(ZeroKind::Real)] {
            for (digits, dtype) in [(ScaleDigits::F32, DType::F32), (ScaleDigits::F16, DType::F16)]
            {
                let weight = weight(3, [4, 3, 8], kind, 2).with_scales(digits).unwrap();
                let tensors = encode("x", &weight);
                let (_, codes) = &tensors[0];
                let (_, scales) = &tensors[1];
                assert_eq!((codes.dtype, scales.dtype), (DType::U32, dtype), "{kind:?}");
                let stored: usize = tensors[1..].iter().map(|(_, tensor)| tensor.bytes.len()).sum();
                let bits = 3.0 + stored as f64 * 8.0 / weight.layout.len() as f64;
                assert!((weight.bits_per_weight() - bits).abs() < 1e-12, "{kind:?} {digits:?}");
            }
        }
    }

    #[test]
    fn one_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let w = weight(4, [4, 1, 8], Some(ZeroKind::Integer), 7);
        let linears = vec![("x".to_owned(), w, "rtn".to_owned())];
        Saved { linears, ..Saved::default() }.write(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(Saved::read(&path).is_err());
    }
}
