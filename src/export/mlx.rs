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
use serde_json::{Map, Value, json};

use super::container::Container;
use super::matrix::{
    Affine, Layer, Tensors, floats, is_exact, most_common, repeated, stored_group,
};
use super::plan::{self, Target, Traits};
use crate::error::{Error, Result};
use crate::quant::bits;
use crate::store::{DType, HostTensor};

/// Code widths that MLX has.
pub const BITS: [u8; 6] = [2, 3, 4, 5, 6, 8];
/// Group lengths that MLX has, descending.
pub const GROUPS: [usize; 3] = [128, 64, 32];

/// How to store.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct MlxOptions {
    /// Type of scales and biases, F32 or F16.
    pub scales: DType,
    /// Whether stored numbers and MLX's arithmetic may round.
    pub lossy: bool,
}

impl Default for MlxOptions {
    fn default() -> Self {
        Self { scales: DType::F32, lossy: false }
    }
}

/// What MLX's arithmetic does to a weight.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Rounding {
    /// Weights in the matrix.
    pub weights: usize,
    /// Those that come out different, in however small a way.
    pub changed: usize,
    /// The largest difference.
    pub largest: f32,
}

impl Rounding {
    /// The part of the weights that come out different, 0 to 1.
    pub fn fraction(&self) -> f64 {
        self.changed as f64 / self.weights.max(1) as f64
    }
}

/// The tensors of linear `name` (or of an embedding or head that is already quantized). Unless
/// `lossy`, MLX computes the very weights from them; see [`arithmetic`].
///
/// # Errors
/// When the grid does not fit ([`plan::refusal`]), and unless `lossy` when F16 would round a scale or
/// bias and when weights would come out different.
pub fn encode(name: &str, weight: &Affine<'_>, options: MlxOptions) -> Result<Tensors> {
    weight.check(name)?;
    plan::check(Target::Mlx, &Traits::untrained(weight), name)?;
    let container = Container::new(Target::Mlx, weight);
    let weight = &container.as_ref().map_or(*weight, |container| container.affine(weight));
    let Some(group) = stored_group(weight.group_len, &GROUPS) else {
        return Err(Error::failed("the group length fits no MLX group").at(name));
    };
    let biases = biases(weight);
    check_storage(name, weight, &biases, options)?;
    if !options.lossy {
        let rounding = rounding(weight, options.scales);
        if rounding.changed > 0 {
            return Err(refuse_rounding(name, weight, options.scales, rounding));
        }
    }
    let times = weight.group_len / group;
    let shape = [weight.out, weight.inputs / group];
    let words = bits::pack_rows(weight.codes, weight.inputs, weight.bits);
    let columns = bits::words_per_row(weight.inputs, weight.bits);
    let scales = floats(options.scales, shape, &repeated(weight.scale, times));
    let biases = floats(options.scales, shape, &repeated(&biases, times));
    Ok(vec![
        (format!("{name}.weight"), HostTensor::u32([weight.out, columns], &words)),
        (format!("{name}.scales"), scales),
        (format!("{name}.biases"), biases),
    ])
}

/// One bias per group, `-scale * zero`, the nearest f32.
fn biases(weight: &Affine<'_>) -> Vec<f32> {
    // The addition turns -0 into 0.
    weight.scale.iter().zip(weight.zero).map(|(scale, zero)| -(scale * zero) + 0.0).collect()
}

fn check_storage(
    name: &str,
    weight: &Affine<'_>,
    biases: &[f32],
    MlxOptions { scales: dtype, lossy }: MlxOptions,
) -> Result<()> {
    if !matches!(dtype, DType::F32 | DType::F16) {
        let what = format!("mlx scales are stored as F32 or F16, not {dtype}");
        return Err(Error::usage(what).at(name).fix("format.mlx.scales = \"f32\""));
    }
    let limit = if dtype == DType::F16 { f32::from(f16::MAX) } else { f32::MAX };
    if let Some(value) = weight.scale.iter().chain(biases).find(|v| v.abs() > limit) {
        let what = format!("{value:e} is beyond the largest f16 number");
        return Err(Error::preflight(what).at(name).fix("format.mlx.scales = \"f32\""));
    }
    let inexact = |values: &[f32]| values.iter().filter(|v| !is_exact(dtype, **v)).count();
    match (inexact(weight.scale), inexact(biases)) {
        (0, 0) => Ok(()),
        _ if lossy => Ok(()),
        (scales, biases) => Err(Error::preflight(format!(
            "{scales} scales and {biases} biases of {} are no f16 numbers, they would be rounded",
            weight.scale.len()
        ))
        .at(name)
        .fix("format.mlx.scales = \"f32\"")),
    }
}

fn refuse_rounding(name: &str, weight: &Affine<'_>, dtype: DType, rounding: Rounding) -> Error {
    let error = Error::preflight(plan::rounding_sentence(&rounding, dtype)).at(name);
    if dtype == DType::F16 && self::rounding(weight, DType::F32).changed == 0 {
        return error.fix("format.mlx.scales = \"f32\", which is exact here");
    }
    let instead = plan::refusal(Target::Mlx, &Traits::of(weight));
    let instead = instead.map_or_else(|| "format.fewbit".to_owned(), |refusal| refusal.instead);
    error.fix(instead)
}

/// The weights that MLX computes from scales and biases of type `dtype`, `[out, inputs]`.
pub fn arithmetic(weight: &Affine<'_>, dtype: DType) -> Vec<f32> {
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
pub fn rounding(weight: &Affine<'_>, dtype: DType) -> Rounding {
    let mut total = Rounding { weights: weight.codes.len(), ..Rounding::default() };
    let groups = weight.codes.chunks_exact(weight.group_len);
    let biases = biases(weight);
    for ((codes, bias), (scale, zero)) in
        groups.zip(&biases).zip(weight.scale.iter().zip(weight.zero))
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
pub fn config(linears: &[Layer], dense: &[String]) -> Value {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::sample::{Grid, grid};
    use super::super::read::{self, Shift, memory::Memory};
    use super::*;
    use crate::quant::ZeroKind;

    const F16: MlxOptions = MlxOptions { scales: DType::F16, lossy: false };
    const ROUND: MlxOptions = MlxOptions { scales: DType::F32, lossy: true };

    fn decoded(grid: &Grid, options: MlxOptions) -> (read::Decoded, Rounding) {
        let affine = grid.affine();
        let tensors = encode("x", &affine, options).unwrap();
        let config = config(&[affine.layer("x")], &[]);
        let decoded = read::mlx::decode(&config, "x", &Memory::new(tensors)).unwrap();
        assert_eq!(decoded.weights, arithmetic(&affine, options.scales));
        (decoded, rounding(&affine, options.scales))
    }

    #[test]
    fn a_hand_example() {
        let mut grid = grid([1, 32], 32, 2, ZeroKind::Half, true, 1);
        grid.codes = [0, 1, 2, 3].repeat(8);
        (grid.scale, grid.zero) = (vec![0.5], vec![1.5]);
        let tensors = encode("x", &grid.affine(), MlxOptions::default()).unwrap();
        assert_eq!(tensors[0].1, HostTensor::u32([1, 2], &[0xe4e4_e4e4, 0xe4e4_e4e4]));
        assert_eq!(tensors[1], ("x.scales".to_owned(), HostTensor::f32([1, 1], &[0.5])));
        assert_eq!(tensors[2], ("x.biases".to_owned(), HostTensor::f32([1, 1], &[-0.75])));
        let rounding = rounding(&grid.affine(), DType::F32);
        assert_eq!(rounding, Rounding { weights: 32, changed: 0, largest: 0.0 });
        let half = encode("x", &grid.affine(), F16).unwrap();
        assert_eq!(half[2].1, HostTensor::f16_from_f32([1, 1], &[-0.75]));
    }

    #[test]
    fn whole_rows_and_long_groups_are_repeated() {
        for (inputs, group_len, stored) in
            [(256, 256, 128), (192, 192, 64), (96, 96, 32), (64, 32, 32)]
        {
            let grid = grid([2, inputs], group_len, 3, ZeroKind::Integer, true, 5);
            let (decoded, _) = decoded(&grid, MlxOptions::default());
            assert_eq!(decoded.group_len, stored);
            let merged = decoded.regrouped(group_len).unwrap();
            assert_eq!(merged.scale, grid.scale);
            assert_eq!(merged.weights, grid.affine().dequantize());
        }
    }

    #[test]
    fn scales_with_all_bits_round_and_are_refused() {
        let grid = grid([8, 128], 64, 4, ZeroKind::Integer, false, 3);
        let error = encode("x", &grid.affine(), MlxOptions::default()).unwrap_err().to_string();
        assert!(error.contains("weights would come out different"), "{error}");
        assert!(error.contains("quant.scales"), "{error}");
        let (decoded, rounding) = decoded(&grid, ROUND);
        let ours = grid.affine().dequantize();
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
        let error = encode("x", &grid.affine(), F16).unwrap_err().to_string();
        assert!(error.contains("8 of 32 weights would come out different (25.00 %"), "{error}");
        assert!(error.contains("scales = \"f32\", which is exact here"), "{error}");
        let (decoded, rounding) = decoded(&grid, MlxOptions { lossy: true, ..F16 });
        // The product and the sum are ties, and both go up.
        assert_eq!((rounding.changed, rounding.largest), (8, 2.0 / 1024.0));
        assert_eq!(decoded.weights[3..4], [2.0 + 4.0 / 1024.0]);
        assert_eq!(decoded.shift, Shift::Bias(vec![-1.0 - 1.0 / 1024.0]));
    }

    #[test]
    fn f16_rounds_what_is_stored_only_where_allowed() {
        let mut grid = grid([1, 32], 32, 4, ZeroKind::Integer, false, 9);
        let lossy = MlxOptions { lossy: true, ..F16 };
        let error = encode("x", &grid.affine(), F16).unwrap_err().to_string();
        assert!(error.contains("are no f16 numbers"), "{error}");
        assert!(decoded(&grid, lossy).1.changed > 0);
        let bf16 = MlxOptions { scales: DType::BF16, ..F16 };
        assert!(encode("x", &grid.affine(), bf16).is_err());
        grid.scale.fill(1e5);
        let error = encode("x", &grid.affine(), lossy).unwrap_err().to_string();
        assert!(error.contains("largest f16"), "{error}");
    }

    #[test]
    fn groups_that_mlx_lacks_are_refused() {
        for (bits, inputs, group_len) in [(4, 48, 48), (4, 48, 16)] {
            let grid = grid([2, inputs], group_len, bits, ZeroKind::Integer, true, 3);
            assert!(encode("x", &grid.affine(), ROUND).is_err(), "{bits} {group_len}");
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
            bits in prop::sample::select(&BITS[..]),
            group_len in prop::sample::select(&[32, 64, 96, 128, 256][..]),
            groups in 1_usize..3,
            out in 1_usize..4,
            kind in prop::sample::select(&[ZeroKind::Integer, ZeroKind::Half, ZeroKind::Real][..]),
            seed: u32,
        ) {
            let grid = grid([out, groups * group_len], group_len, bits, kind, true, seed);
            let (decoded, rounding) = decoded(&grid, MlxOptions::default());
            prop_assert_eq!(rounding.changed, 0);
            let decoded = decoded.regrouped(group_len).unwrap();
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            let ours: Vec<u32> = grid.affine().dequantize().iter().map(|w| w.to_bits()).collect();
            let theirs: Vec<u32> = decoded.weights.iter().map(|w| w.to_bits()).collect();
            prop_assert_eq!(theirs, ours);
        }
    }
}
