//! MLX's affine safetensors, which mlx-lm reads, and mistral.rs under the name AFQ.
//!
//! Per linear `X`: `X.weight`, u32 `[out, inputs * bits / 32]`, a dense stream per row;
//! `X.scales` and `X.biases`, `[out, groups]`, f32 or f16; `w = scales * code + biases`.
//!
//! Where fewbit rounds once, in `scale * (code - zero)`, MLX rounds three times: the stored bias
//! `-scale * zero`, the product `scale * code`, and their sum. None of the three rounds when the
//! scale has few enough significant bits: with integer or half zero points, scales that are f16
//! numbers are exact at every width in f32. Scales that use all 24 bits of f32 are not, and f16
//! storage computes in f16, where even f16 scales round. [`rounding`] measures it on the actual
//! codes.

use half::f16;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::coded::{
    Coded, Layer, Tensors, dtype, floats, is_exact, most_common, repeated, stored_group,
};
use super::embeddings::{EmbeddingGrid, Embeddings};
use super::format::{Dense, PackedFormat, Packer};
use super::plan::{Holds, Reason};
use super::read::{Reader, named_method};
use crate::error::{Error, Result};
use crate::quant::{Bits, ScaleDType, Symmetry, bits};
use crate::store::{DType, HostTensor};

/// Keys of `format.mlx`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MlxConfig {
    /// Type of scales and biases.
    pub scales: ScaleDType,
    /// What embedding and head are stored as: codes of so many bits, as mistral.rs wants them, or floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

impl PackedFormat for MlxConfig {
    fn about(&self) -> &'static str {
        "MLX's affine layout: mlx-lm; 2, 3, 4, 5, 6 and 8 bits"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn holds(&self) -> &'static Holds {
        &Holds {
            widths: &[2, 3, 4, 5, 6, 8],
            codes_zeros: false,
            group: 32,
            whole_rows: false,
            rank: 0,
            ..Holds::UNLIMITED
        }
    }

    /// What F16 would round or not hold; and, unless `lossy`, weights that MLX computes differently.
    fn wrong_values(&self, weight: &Coded<'_>) -> Option<Reason> {
        let dtype = dtype(self.scales);
        wrong_storage(weight, dtype, self.lossy)
            .or_else(|| if self.lossy { None } else { wrong_arithmetic(weight, dtype) })
    }

    fn stacks_experts(&self) -> bool {
        true
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn embedding_grid(
        &self,
        bits: Bits,
        inputs: usize,
        common: Option<usize>,
    ) -> Option<EmbeddingGrid> {
        let mut groups = common.into_iter().chain([64, 32]);
        let group = groups.find(|group| inputs.is_multiple_of(*group));
        let held = PackedFormat::holds(self).widths.contains(&bits.get());
        group.filter(|_| held).map(|group| EmbeddingGrid::Groups(group, Symmetry::Asymmetric))
    }

    fn packer(&self, _linears: &[Layer]) -> Result<Box<dyn Packer>> {
        Ok(Box::new(self.clone()))
    }

    fn reader(&self) -> &'static Reader {
        &Reader {
            method: "mlx",
            section: |config| {
                let own = config.get("quantization").filter(|section| section.is_object());
                let section = own.or_else(|| config.get("quantization_config"))?;
                let ours = matches!(named_method(config), None | Some("afq"));
                (ours && section.get("bits").is_some()).then_some(section)
            },
            tensor: "scales",
            weights: |section, name, source| Ok(read::decode(section, name, source)?.values()),
            codes: |section, name, source| read::decode(section, name, source)?.codes(),
        }
    }
}

impl Packer for MlxConfig {
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors> {
        encode(name, weight, dtype(self.scales))
    }

    fn computed(&self, weight: &Coded<'_>) -> Option<Vec<f32>> {
        Some(arithmetic(weight, dtype(self.scales)))
    }

    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value> {
        Ok(config(linears, &dense.linears))
    }

    fn section_name(&self) -> Option<&'static str> {
        Some("quantization")
    }
}

/// Group lengths that MLX has, descending.
const GROUPS: [usize; 3] = [128, 64, 32];

/// What MLX's arithmetic does to a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rounding {
    /// Weights in the matrix.
    pub weights: usize,
    /// Those that come out different, in however small a way.
    pub changed: usize,
    /// The largest difference.
    pub largest: f32,
}

impl Rounding {
    /// The part of the weights that come out different, 0 to 1.
    pub(super) fn fraction(&self) -> f64 {
        self.changed as f64 / self.weights.max(1) as f64
    }
}

/// The tensors of linear `name` (or of an embedding or head that is already quantized), with scales and
/// biases of type `scales`, F32 or F16. What MLX computes from them is [`arithmetic`].
///
/// # Errors
/// When the groups are none of MLX's.
fn encode(name: &str, weight: &Coded<'_>, scales: DType) -> Result<Tensors> {
    let Some(group) = stored_group(weight.group_len, &GROUPS) else {
        return Err(Error::failed("the group length fits no MLX group").at(name));
    };
    let times = weight.group_len / group;
    let shape = [weight.out, weight.inputs / group];
    let words = bits::pack_rows(&weight.codes, weight.inputs, weight.bits);
    let columns = bits::words_per_row(weight.inputs, weight.bits);
    let in_type = |values: &[f32]| floats(scales, shape, &repeated(values, times));
    Ok(vec![
        (format!("{name}.weight"), HostTensor::u32([weight.out, columns], &words)),
        (format!("{name}.scales"), in_type(&weight.scale)),
        (format!("{name}.biases"), in_type(&biases(weight))),
    ])
}

/// One bias per group, `-scale * zero`, the nearest f32.
fn biases(weight: &Coded<'_>) -> Vec<f32> {
    // The addition turns -0 into 0.
    weight.scale.iter().zip(&*weight.shift).map(|(scale, zero)| -(scale * zero) + 0.0).collect()
}

/// Scales and biases that are beyond the type, or would be rounded to it.
fn wrong_storage(weight: &Coded<'_>, dtype: DType, lossy: bool) -> Option<Reason> {
    let fix = "format.mlx.scales = \"f32\"";
    let biases = biases(weight);
    let limit = if dtype == DType::F16 { f32::from(f16::MAX) } else { f32::MAX };
    if let Some(value) = weight.scale.iter().chain(&biases).find(|v| v.abs() > limit) {
        let what = format!("{value:e} is beyond the largest f16 number");
        return Some(Reason::setting(what, fix));
    }
    let inexact = |values: &[f32]| values.iter().filter(|v| !is_exact(dtype, **v)).count();
    match (inexact(&weight.scale), inexact(&biases)) {
        (0, 0) => None,
        _ if lossy => None,
        (scales, biases) => {
            let what = format!(
                "{scales} scales and {biases} biases of {} are no f16 numbers, they would be \
                 rounded",
                weight.scale.len()
            );
            Some(Reason::setting(what, fix))
        }
    }
}

/// Weights that come out different when they are computed in the type.
fn wrong_arithmetic(weight: &Coded<'_>, dtype: DType) -> Option<Reason> {
    let rounding = rounding(weight, dtype);
    if rounding.changed == 0 {
        return None;
    }
    let kind = if dtype == DType::F16 { "f16" } else { "f32" };
    let what = format!(
        "mlx computes scale * code + bias in {kind}, with a rounding at each step: {} of {} weights \
         would come out different ({:.2} %, by at most {:.2e})",
        rounding.changed,
        rounding.weights,
        100.0 * rounding.fraction(),
        rounding.largest
    );
    if dtype == DType::F16 && self::rounding(weight, DType::F32).changed == 0 {
        return Some(Reason::setting(what, "format.mlx.scales = \"f32\", which is exact here"));
    }
    Some(Reason::scales(what))
}

/// The weights that MLX computes from scales and biases of type `dtype`, `[out, inputs]`.
pub(super) fn arithmetic(weight: &Coded<'_>, dtype: DType) -> Vec<f32> {
    let groups = weight.codes.chunks_exact(weight.group_len);
    let values = weight.scale.iter().zip(biases(weight));
    groups
        .zip(values)
        .flat_map(|(codes, (scale, bias))| {
            codes.iter().map(move |code| restored(f32::from(*code), *scale, bias, dtype))
        })
        .collect()
}

/// What MLX computes from scales and biases of type `dtype`, against `scale * (code - zero)`,
/// counted over all weights. MLX multiplies and adds in that type, each with a rounding.
pub(super) fn rounding(weight: &Coded<'_>, dtype: DType) -> Rounding {
    let mut total = Rounding { weights: weight.codes.len(), ..Rounding::default() };
    let groups = weight.codes.chunks_exact(weight.group_len);
    let biases = biases(weight);
    for ((codes, bias), (scale, zero)) in
        groups.zip(&biases).zip(weight.scale.iter().zip(&*weight.shift))
    {
        let mut difference = [0_f32; 256];
        let mut any = false;
        for (code, difference) in (0..1_u16 << weight.bits).zip(&mut difference) {
            let code = f32::from(code);
            *difference = ((scale * (code - zero)) - restored(code, *scale, *bias, dtype)).abs();
            any |= *difference > 0.0;
        }
        if any {
            for code in codes {
                let difference = difference[usize::from(*code)];
                total.changed += usize::from(difference > 0.0);
                total.largest = total.largest.max(difference);
            }
        }
    }
    total
}

fn restored(code: f32, scale: f32, bias: f32, dtype: DType) -> f32 {
    if dtype != DType::F16 {
        return scale * code + bias;
    }
    // An f16 sum rounded through f32 is the f16 sum: f32 has more than twice its digits.
    let half = |value: f32| f16::from_f32(value).to_f32();
    half(half(half(scale) * code) + half(bias))
}

/// The `quantization` section of config.json. mlx-lm wants it under that key and writes it under
/// `quantization_config` as well, where mistral.rs looks for it.
///
/// Linears that differ from the most common width and group get an entry of their own; `dense`
/// names the linears and embeddings that stay as they are.
fn config(linears: &[Layer], dense: &[String]) -> Value {
    let group = |layer: &Layer| stored_group(layer.group_len, &GROUPS).unwrap_or(layer.group_len);
    let keys: Vec<_> = linears.iter().map(|layer| (group(layer), layer.bits)).collect();
    let (group_size, bits) = most_common(&keys).unwrap_or((64, 4));
    let mut section = Map::new();
    section.insert("group_size".to_owned(), json!(group_size));
    section.insert("bits".to_owned(), json!(bits));
    section.insert("mode".to_owned(), json!("affine"));
    for (layer, key) in linears.iter().zip(&keys) {
        if *key != (group_size, bits) {
            let own = json!({ "group_size": key.0, "bits": key.1 });
            section.insert(layer.name.clone(), own);
        }
    }
    for name in dense {
        section.insert(name.clone(), json!(false));
    }
    Value::Object(section)
}

mod read {
    //! Reads MLX's affine tensors.

    use half::{bf16, f16};
    use serde_json::Value;

    use crate::error::Result;
    use crate::export::read::{
        Decoded, Shift, Stream, damaged, floats_of, group_len, matrix, width, words,
    };
    use crate::store::{DType, TensorSource};

    /// Linear `name` under `config`, the `quantization` section. The weights are MLX's: product and
    /// sum each rounded to the type of the scales.
    ///
    /// # Errors
    /// When config and tensors contradict each other.
    pub(super) fn decode(config: &Value, name: &str, source: &dyn TensorSource) -> Result<Decoded> {
        let own = match config.get(name) {
            None => config,
            Some(own) if own.is_object() => own,
            Some(_) => return Err(damaged("the config says that this linear is dense", name)),
        };
        let bits = width(own, "bits", name)?;
        let (words, [out, columns]) = words(source, &format!("{name}.weight"))?;
        let inputs = columns * 32 / usize::from(bits);
        if (columns * 32) % usize::from(bits) != 0 {
            return Err(damaged(
                format!("{columns} words are no row of codes of {bits} bits"),
                name,
            ));
        }
        let group_len = group_len(own, inputs, name)?;
        let shape = [out, inputs / group_len];
        let scales = format!("{name}.scales");
        let (stored, _) = matrix(source, &scales)?;
        let scale = floats_of(source, &scales, shape)?;
        let added = floats_of(source, &format!("{name}.biases"), shape)?;
        let in_type = |value: f32| match stored.dtype {
            DType::F16 => f16::from_f32(value).to_f32(),
            DType::BF16 => bf16::from_f32(value).to_f32(),
            _ => value,
        };
        let mut codes = Vec::with_capacity(out * inputs);
        let mut weights = Vec::with_capacity(out * inputs);
        for row in 0..out {
            let stream = Stream { words: &words, start: row * columns, stride: 1, bits };
            for input in 0..inputs {
                let (code, group) = (stream.code(input), row * shape[1] + input / group_len);
                codes.push(code);
                weights.push(in_type(in_type(scale[group] * f32::from(code)) + added[group]));
            }
        }
        Ok(Decoded {
            out,
            inputs,
            group_len,
            bits,
            codes,
            scale,
            shift: Shift::Bias(added),
            weights,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::coded::sample::{Grid, grid};
    use super::super::format::sample::packed;
    use super::super::read::{Decoded, Shift, memory::Memory};
    use super::*;
    use crate::quant::ZeroKind;

    const PLAIN: MlxConfig = MlxConfig { scales: ScaleDType::F32, embeddings: None, lossy: false };
    const F16: MlxConfig = MlxConfig { scales: ScaleDType::F16, ..PLAIN };
    const ROUND: MlxConfig = MlxConfig { lossy: true, ..PLAIN };

    fn decoded(grid: &Grid, keys: &MlxConfig) -> (Decoded, Rounding) {
        let weight = grid.coded();
        let tensors = packed(keys, &weight).unwrap();
        let config = config(&[weight.layer("x")], &[]);
        let decoded = read::decode(&config, "x", &Memory::new(tensors)).unwrap();
        assert_eq!(decoded.weights, arithmetic(&weight, dtype(keys.scales)));
        (decoded, rounding(&weight, dtype(keys.scales)))
    }

    #[test]
    fn a_hand_example() {
        let mut grid = grid([1, 32], 32, 2, ZeroKind::Half, true, 1);
        grid.codes = [0, 1, 2, 3].repeat(8);
        (grid.scale, grid.zero) = (vec![0.5], vec![1.5]);
        let tensors = packed(&PLAIN, &grid.coded()).unwrap();
        assert_eq!(tensors[0].1, HostTensor::u32([1, 2], &[0xe4e4_e4e4, 0xe4e4_e4e4]));
        assert_eq!(tensors[1], ("x.scales".to_owned(), HostTensor::f32([1, 1], &[0.5])));
        assert_eq!(tensors[2], ("x.biases".to_owned(), HostTensor::f32([1, 1], &[-0.75])));
        let rounding = rounding(&grid.coded(), DType::F32);
        assert_eq!(rounding, Rounding { weights: 32, changed: 0, largest: 0.0 });
        let half = packed(&F16, &grid.coded()).unwrap();
        assert_eq!(half[2].1, HostTensor::f16_from_f32([1, 1], &[-0.75]));
    }

    #[test]
    fn whole_rows_and_long_groups_are_repeated() {
        for (inputs, group_len, stored) in
            [(256, 256, 128), (192, 192, 64), (96, 96, 32), (64, 32, 32)]
        {
            let grid = grid([2, inputs], group_len, 3, ZeroKind::Integer, true, 5);
            let (decoded, _) = decoded(&grid, &PLAIN);
            assert_eq!(decoded.group_len, stored);
            let merged = decoded.regrouped(group_len).unwrap();
            assert_eq!(merged.scale, grid.scale);
            assert_eq!(merged.weights, grid.coded().dequantize());
        }
    }

    #[test]
    fn scales_with_all_bits_round_and_are_refused() {
        let grid = grid([8, 128], 64, 4, ZeroKind::Integer, false, 3);
        let error = packed(&PLAIN, &grid.coded()).unwrap_err().to_string();
        assert!(error.contains("weights would come out different"), "{error}");
        assert!(error.contains("quant.scales"), "{error}");
        let (decoded, rounding) = decoded(&grid, &ROUND);
        let ours = grid.coded().dequantize();
        let differences = || ours.iter().zip(&decoded.weights).map(|(a, b)| (a - b).abs());
        assert!(rounding.changed > 0);
        assert_eq!(rounding.changed, differences().filter(|d| *d > 0.0).count());
        assert_eq!(rounding.largest.to_bits(), differences().fold(0.0, f32::max).to_bits());
        assert!(rounding.largest < 1e-7);
    }

    #[test]
    fn f16_arithmetic_is_counted_too() {
        // 1 + 2^-10 has 11 significant bits: three times that has more than f16 holds.
        let mut grid = grid([1, 32], 32, 2, ZeroKind::Integer, true, 1);
        grid.codes = [0, 1, 2, 3].repeat(8);
        (grid.scale, grid.zero) = (vec![1.0 + 1.0 / 1024.0], vec![1.0]);
        let error = packed(&F16, &grid.coded()).unwrap_err().to_string();
        assert!(error.contains("8 of 32 weights would come out different (25.00 %"), "{error}");
        assert!(error.contains("scales = \"f32\", which is exact here"), "{error}");
        let (decoded, rounding) = decoded(&grid, &MlxConfig { lossy: true, ..F16 });
        // The product and the sum are ties, and both go up.
        assert_eq!((rounding.changed, rounding.largest), (8, 2.0 / 1024.0));
        assert_eq!(decoded.weights[3..4], [2.0 + 4.0 / 1024.0]);
        assert_eq!(decoded.shift, Shift::Bias(vec![-1.0 - 1.0 / 1024.0]));
    }

    #[test]
    fn f16_rounds_what_is_stored_only_where_allowed() {
        let mut grid = grid([1, 32], 32, 4, ZeroKind::Integer, false, 9);
        let lossy = MlxConfig { lossy: true, ..F16 };
        let error = packed(&F16, &grid.coded()).unwrap_err().to_string();
        assert!(error.contains("are no f16 numbers"), "{error}");
        assert!(decoded(&grid, &lossy).1.changed > 0);
        grid.scale.fill(1e5);
        let error = packed(&lossy, &grid.coded()).unwrap_err().to_string();
        assert!(error.contains("largest f16"), "{error}");
    }

    #[test]
    fn groups_that_mlx_lacks_are_refused() {
        for (bits, inputs, group_len) in [(4, 48, 48), (4, 48, 16)] {
            let grid = grid([2, inputs], group_len, bits, ZeroKind::Integer, true, 3);
            assert!(packed(&ROUND, &grid.coded()).is_err(), "{bits} {group_len}");
        }
    }

    #[test]
    fn config_names_what_differs() {
        let layer = |name: &str, bits, group_len| Layer {
            name: name.to_owned(),
            shape: [32, 256],
            bits,
            group_len,
            centred: false,
        };
        let linears = [layer("a", 2, 64), layer("b", 4, 256), layer("c", 2, 64)];
        assert_eq!(
            config(&linears, &["lm_head".to_owned()]),
            json!({
                "group_size": 64, "bits": 2, "mode": "affine",
                "b": {"group_size": 128, "bits": 4}, "lm_head": false
            })
        );
    }

    proptest! {
        #[test]
        fn short_scales_come_back_bit_for_bit(
            bits in prop::sample::select(PLAIN.holds().widths),
            group_len in prop::sample::select(&[32, 64, 96, 128, 256][..]),
            groups in 1_usize..3,
            out in 1_usize..4,
            kind in prop::sample::select(&[ZeroKind::Integer, ZeroKind::Half, ZeroKind::Real][..]),
            seed: u32,
        ) {
            let grid = grid([out, groups * group_len], group_len, bits, kind, true, seed);
            let (decoded, rounding) = decoded(&grid, &PLAIN);
            prop_assert_eq!(rounding.changed, 0);
            let decoded = decoded.regrouped(group_len).unwrap();
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            let ours: Vec<u32> = grid.coded().dequantize().iter().map(|w| w.to_bits()).collect();
            let theirs: Vec<u32> = decoded.weights.iter().map(|w| w.to_bits()).collect();
            prop_assert_eq!(theirs, ours);
        }
    }
}
