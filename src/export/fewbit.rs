//! fewbit's own packed layout: the neutral source of truth that every other format comes from.
//!
//! Per linear `X`: `X.codes`, u32 `[out, words]`, a dense little-endian bit stream per row;
//! `X.scales`, f32 `[out, groups]`; `X.zero_points`, u8, i32 or f32 of the same shape, or `[1, 1]`
//! when they are all equal.

use std::collections::BTreeMap;

use super::manifest::LinearRecord;
use super::weights_sha256;
use crate::error::{Error, Result};
use crate::quant::{Grid, GroupLayout, QuantizedWeight, ZeroKind, bits};
use crate::store::{DType, HostTensor, TensorSource};

/// The names under which linear `name` is stored.
pub fn tensor_names(name: &str) -> [String; 3] {
    [format!("{name}.codes"), format!("{name}.scales"), format!("{name}.zero_points")]
}

/// The tensors of one linear, and its record for the manifest.
pub fn encode(
    name: &str,
    weight: &QuantizedWeight,
    method: &str,
) -> (Vec<(String, HostTensor)>, LinearRecord) {
    let GroupLayout { out, inputs, group_len, .. } = weight.layout;
    let Grid::Uniform { scale, zero_point, zero_kind } = &weight.grid;
    let width = weight.bits.get();
    let words = bits::pack_rows(&weight.codes, inputs, width);
    let [codes_name, scales_name, zeros_name] = tensor_names(name);
    let tensors = vec![
        (codes_name, HostTensor::u32([out, bits::words_per_row(inputs, width)], &words)),
        (scales_name, HostTensor::f32(weight.layout.scale_shape(), scale)),
        (zeros_name, encode_zeros(zero_point, *zero_kind, weight.layout.scale_shape())),
    ];
    let record = LinearRecord {
        method: method.to_owned(),
        bits: weight.bits,
        shape: [out, inputs],
        group_len,
        zero_kind: *zero_kind,
        histogram: weight.histogram(),
        sha256: tensors.iter().map(|(name, tensor)| (name.clone(), tensor.sha256())).collect(),
        weights_sha256: weights_sha256(&weight.dequantize()),
    };
    (tensors, record)
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
        _ => HostTensor::f32(shape, zeros),
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
    let len = out * inputs;
    let group_len = record.group_len;
    if group_len == 0 || !len.is_multiple_of(group_len) {
        return Err(Error::failed(format!(
            "group length {group_len} does not divide {out} x {inputs}"
        ))
        .at(name));
    }
    let layout = GroupLayout { out, inputs, groups: len / group_len, group_len };
    let [codes_name, scales_name, zeros_name] = tensor_names(name);
    let width = record.bits.get();
    let words = read(source, &codes_name, &[[out, bits::words_per_row(inputs, width)]])?.to_u32();
    let words = words.map_err(|e| e.at(&codes_name))?;
    let scale = read(source, &scales_name, &[layout.scale_shape()])?;
    let zeros = read(source, &zeros_name, &[layout.scale_shape(), [1, 1]])?;
    let mut zero_point = decode_zeros(&zeros).map_err(|e| e.at(&zeros_name))?;
    if zero_point.len() == 1 {
        zero_point = vec![zero_point[0]; layout.groups];
    }
    QuantizedWeight {
        codes: bits::unpack_rows(&words, inputs, width),
        grid: Grid::Uniform {
            scale: scale.to_f32().map_err(|e| e.at(&scales_name))?,
            zero_point,
            zero_kind: record.zero_kind,
        },
        bits: record.bits,
        layout,
    }
    .checked()
    .map_err(|e| e.at(name))
}

fn read(source: &dyn TensorSource, name: &str, shapes: &[[usize; 2]]) -> Result<HostTensor> {
    let tensor = source.read(name)?;
    if shapes.iter().any(|shape| tensor.shape == shape) {
        return Ok(tensor);
    }
    Err(Error::failed(format!(
        "the tensor has shape {:?}, the manifest says {:?}",
        tensor.shape, shapes[0]
    ))
    .at(name)
    .fix("export the run again"))
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

/// Writes quantized linears as one crash-safe file, a stage's checkpoint.
///
/// # Errors
/// I/O errors.
pub fn write_linears(
    path: &std::path::Path,
    linears: &[(String, QuantizedWeight, String)],
    extra: BTreeMap<String, String>,
) -> Result<()> {
    let mut tensors = Vec::new();
    let mut records = BTreeMap::new();
    for (name, weight, method) in linears {
        let (encoded, record) = encode(name, weight, method);
        tensors.extend(encoded);
        records.insert(name.clone(), record);
    }
    let mut metadata = extra;
    let records = serde_json::to_string(&records)
        .map_err(|e| Error::failed(format!("cannot encode a checkpoint's records: {e}")))?;
    metadata.insert("linears".to_owned(), records);
    crate::store::safetensors::write_file(path, &tensors, &metadata)
}

/// A checkpoint's linears with the method of each, and its other metadata.
pub type Linears = (Vec<(String, QuantizedWeight, String)>, BTreeMap<String, String>);

/// Reads what [`write_linears`] wrote, checking every hash.
///
/// # Errors
/// When the file is damaged.
pub fn read_linears(path: &std::path::Path) -> Result<Linears> {
    let damaged = |what: &str| {
        Error::failed(format!("the checkpoint cannot be used: {what}"))
            .at(path.display())
            .fix("remove that file to repeat its work, or --fresh to start over")
    };
    let file =
        crate::store::safetensors::Checkpoint::open_file(path).map_err(|e| damaged(e.what()))?;
    let mut metadata = file.file_metadata().clone();
    let records = metadata.remove("linears").unwrap_or_default();
    let records: BTreeMap<String, LinearRecord> =
        serde_json::from_str(&records).map_err(|e| damaged(&format!("its records: {e}")))?;
    let mut linears = Vec::new();
    for (name, record) in records {
        let weight = decode(&name, &record, &file).map_err(|e| damaged(e.what()))?;
        if weights_sha256(&weight.dequantize()) != record.weights_sha256 {
            return Err(damaged(&format!("{name} does not match its hash")));
        }
        linears.push((name, weight, record.method));
    }
    Ok((linears, metadata))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::quant::Bits;

    fn weight(
        bits: u8,
        [out, groups, group_len]: [usize; 3],
        zero_kind: ZeroKind,
        seed: u32,
    ) -> QuantizedWeight {
        let mut state = seed | 1;
        let mut next = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 8
        };
        let bits = Bits::new(bits).unwrap();
        let n = out * groups;
        QuantizedWeight {
            codes: (0..n * group_len).map(|_| (next() as usize % bits.levels()) as u8).collect(),
            grid: Grid::Uniform {
                scale: (0..n).map(|_| (next() % 1000 + 1) as f32 * 1e-3).collect(),
                zero_point: (0..n)
                    .map(|_| match zero_kind {
                        ZeroKind::Integer => (next() % 300) as f32 - 20.0,
                        ZeroKind::Half => (next() % 4) as f32 + 0.5,
                        ZeroKind::Real => next() as f32 * 1e-4,
                    })
                    .collect(),
                zero_kind,
            },
            bits,
            layout: GroupLayout { out, inputs: groups * group_len, groups: n, group_len },
        }
    }

    proptest! {
        #[test]
        fn decode_inverts_encode_for_every_width_and_grid(
            bits in 1u8..=8,
            out in 1usize..5,
            groups in 1usize..4,
            group_len in 1usize..20,
            kind in 0usize..3,
            seed: u32,
        ) {
            let kind = [ZeroKind::Integer, ZeroKind::Half, ZeroKind::Real][kind];
            let weight = weight(bits, [out, groups, group_len], kind, seed);
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("w.safetensors");
            let linears = vec![("x".to_owned(), weight, "rtn".to_owned())];
            write_linears(&path, &linears, BTreeMap::new()).unwrap();
            prop_assert_eq!(read_linears(&path).unwrap().0, linears);
        }
    }

    #[test]
    fn one_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("w.safetensors");
        let w = weight(4, [4, 1, 8], ZeroKind::Integer, 7);
        write_linears(&path, &[("x".to_owned(), w, "rtn".to_owned())], BTreeMap::new()).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[8 + header] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        assert!(read_linears(&path).is_err());
    }
}
