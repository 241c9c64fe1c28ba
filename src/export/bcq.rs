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

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::matrix::{Layer, Planes, Tensors};
use super::plan::{self, Target, Traits};
use crate::error::{Error, Result};
use crate::store::HostTensor;

/// Version of this layout, in the config.
pub const FORMAT_VERSION: u32 = 1;

/// Bits in a word.
const WORD: usize = 32;

/// The tensors of linear `name`, with one precision.
///
/// # Errors
/// When the planes do not fit ([`plan::refusal`]).
pub fn encode(name: &str, weight: &Planes<'_>) -> Result<Tensors> {
    weight.check(name)?;
    plan::check(Target::Bcq, &Traits::of_planes(weight), name)?;
    let planes = usize::from(weight.bits);
    let columns = weight.inputs.div_ceil(WORD);
    let mut words = vec![0; columns * planes * weight.out];
    set_bits(weight, &mut words, |column, plane| column * planes + plane);
    let groups = weight.groups();
    Ok(vec![
        (format!("{name}.qweight"), HostTensor::u32([columns, planes, weight.out], &words)),
        (
            format!("{name}.alpha"),
            HostTensor::f32([groups, planes, weight.out], &by_group(weight.alpha, weight, planes)),
        ),
        (
            format!("{name}.offset"),
            HostTensor::f32([groups, weight.out], &by_group(weight.offset, weight, 1)),
        ),
    ])
}

/// The tensors of linear `name`, with two or more precisions in ascending order. The codes of each
/// are the lowest bits of the codes of the last; scales and offsets are its own.
///
/// # Errors
/// When the planes do not fit ([`plan::refusal`]) or are not shared.
pub fn encode_nested(name: &str, precisions: &[Planes<'_>]) -> Result<Tensors> {
    let [_, .., widest] = precisions else {
        let what = format!("{} precisions, nested planes need two", precisions.len());
        return Err(Error::failed(what).at(name));
    };
    for (i, weight) in precisions.iter().enumerate() {
        weight.check(name)?;
        plan::check(Target::Bcq, &Traits::of_planes(weight), name)?;
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
        let alpha = HostTensor::f32([groups, bits, out], &by_group(weight.alpha, weight, bits));
        let offset = HostTensor::f32([groups, out], &by_group(weight.offset, weight, 1));
        tensors.push((format!("{name}.alpha_{bits}"), alpha));
        tensors.push((format!("{name}.offset_{bits}"), offset));
    }
    Ok(tensors)
}

fn check_shared(widest: &Planes<'_>, weight: &Planes<'_>, ascends: bool) -> Result<()> {
    let layout = |w: &Planes<'_>| (w.out, w.inputs, w.group_len);
    let mask = u8::MAX >> (8 - weight.bits);
    let prefix = || weight.codes.iter().zip(widest.codes).all(|(own, all)| *own == all & mask);
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
fn set_bits(weight: &Planes<'_>, words: &mut [u32], row: impl Fn(usize, usize) -> usize) {
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
fn by_group(values: &[f32], weight: &Planes<'_>, each: usize) -> Vec<f32> {
    super::matrix::transposed(values, weight.groups() * each)
}

/// The `quantization_config`. `lower` lists the numbers of planes that can be read besides each
/// linear's own, none for [`encode`]. Each linear is listed with its shape, because padding hides the number of inputs.
pub fn config(linears: &[Layer], lower: &[u8]) -> Value {
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::sample::generator;
    use super::super::read::{self, memory::Memory};
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

        fn planes(&self) -> Vec<Planes<'_>> {
            let planes = |i: usize| Planes {
                out: self.shape[0],
                inputs: self.shape[1],
                group_len: self.group_len,
                bits: self.bits[i],
                codes: &self.codes[i],
                alpha: &self.alpha[i],
                offset: &self.offset[i],
            };
            (0..self.bits.len()).map(planes).collect()
        }
    }

    /// The definition.
    fn weights(planes: &Planes<'_>) -> Vec<u32> {
        let value = |(i, code): (usize, &u8)| {
            let group = i / planes.group_len;
            let bits = usize::from(planes.bits);
            let mut sum = 0.0;
            for plane in 0..bits {
                let alpha = planes.alpha[group * bits + plane];
                let term = if code >> plane & 1 == 1 { alpha } else { -alpha };
                sum = if plane == 0 { term } else { sum + term };
            }
            (sum + planes.offset[group]).to_bits()
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
        let planes = sample.planes()[0];
        let tensors = encode("x", &planes).unwrap();
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
        let error = encode("x", &sample.planes()[0]).unwrap_err().to_string();
        assert!(error.contains("groups of 48"), "{error}");
        let mut sample = Sample::new([2, 64], 32, &[2, 3], 1);
        let descending: Vec<_> = sample.planes().into_iter().rev().collect();
        assert!(encode_nested("x", &descending).is_err());
        assert!(encode_nested("x", &[]).is_err());
        assert!(encode_nested("x", &descending[..1]).is_err());
        sample.codes[0][5] ^= 1;
        let error = encode_nested("x", &sample.planes()).unwrap_err().to_string();
        assert!(error.contains("2 bits are not the first of those of 3 bits"), "{error}");
        sample.alpha[1][0] = f32::NAN;
        assert!(encode("x", &sample.planes()[1]).is_err());
    }

    #[test]
    fn a_config_without_our_version_is_refused() {
        let sample = Sample::new([2, 64], 32, &[2], 1);
        let planes = sample.planes()[0];
        let memory = Memory::new(encode("x", &planes).unwrap());
        let mut config = config(&[planes.layer("x")], &[]);
        assert!(read::bcq::decode(&config, "x", 2, &memory).is_ok());
        assert!(read::bcq::decode(&config, "x", 3, &memory).is_err());
        assert!(read::bcq::decode(&config, "y", 2, &memory).is_err());
        config["format_version"] = json!(2);
        assert!(read::bcq::decode(&config, "x", 2, &memory).is_err());
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
                let memory = Memory::new(encode("x", planes).unwrap());
                let one = read::bcq::decode(&single, "x", planes.bits, &memory).unwrap();
                prop_assert_eq!(&one.codes, planes.codes);
                prop_assert_eq!(bits(&one.alpha), bits(planes.alpha));
                prop_assert_eq!(bits(&one.offset), bits(planes.offset));
                prop_assert_eq!(bits(&one.weights), weights(planes));
                if let Some(nested) = &nested {
                    let config = config(&layers, &precisions[..precisions.len() - 1]);
                    let of_many = read::bcq::decode(&config, "x", planes.bits, nested).unwrap();
                    prop_assert_eq!(of_many, one);
                }
            }
        }
    }
}
