//! AWQ's tensors in gemm order: 4 bits, asymmetric, f16 scales.
//!
//! Per linear `X`, all words i32: `X.qweight` `[inputs, out / 8]`, `X.qzeros` `[groups, out / 8]`,
//! `X.scales` f16 `[groups, out]`. A word holds eight neighbouring outputs, in the order of `ORDER`. Zero
//! points are stored as they are. Runtimes compute `scale * (code - zero)` in f16, rounding each
//! weight once.

use serde_json::{Value, json};

use super::container::Container;
use super::gptq::stated;
use super::matrix::{
    Affine, Layer, Tensors, floats, repeated, stored_group, transposed, words_as_i32,
};
use super::plan::{self, Target, Traits};
use crate::error::{Error, Result};
use crate::store::DType;

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
pub fn group_size(linears: &[Layer]) -> Result<Option<usize>> {
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
/// When the grid does not fit ([`plan::refusal`]) or `group_size` does not divide its groups.
pub fn encode(name: &str, weight: &Affine<'_>, group_size: Option<usize>) -> Result<Tensors> {
    weight.check(name)?;
    plan::check(Target::Awq, &Traits::of(weight), name)?;
    let container = Container::new(Target::Awq, weight);
    let weight = &container.as_ref().map_or(*weight, |container| container.affine(weight));
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
    let scales = transposed(&repeated(weight.scale, times), groups);
    let words = |codes: &[u8], columns| interleaved(&transposed(codes, columns));
    Ok(vec![
        (
            format!("{name}.qweight"),
            words_as_i32([inputs, out / LANES], &words(weight.codes, inputs)),
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
pub fn config(linears: &[Layer], dense: &[String]) -> Result<Value> {
    Ok(json!({
        "quant_method": "awq",
        "bits": 4,
        "group_size": stated(group_size(linears)?),
        "zero_point": true,
        "version": "gemm",
        "modules_to_not_convert": dense,
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::matrix::sample::grid;
    use super::super::read::{self, Shift, memory::Memory};
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
        let tensors = encode("x", &grid.affine(), None).unwrap();
        let words = tensors[0].1.to_u32().unwrap();
        assert_eq!(tensors[0].1.shape, [32, 1]);
        assert_eq!((words[0], words[3]), (0x7531_6420, 0x0009_0000));
        assert_eq!(tensors[1].1.to_u32().unwrap(), [0x8ace_9bdf]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let refused = |grid: super::super::matrix::sample::Grid, group| {
            encode("x", &grid.affine(), Some(group)).unwrap_err().to_string()
        };
        assert!(refused(grid([8, 32], 32, 5, ZeroKind::Integer, true, 1), 32).contains("4 bits"));
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Half, true, 1), 32).contains("doubled"));
        assert!(
            refused(grid([4, 32], 32, 4, ZeroKind::Integer, true, 1), 32).contains("8 outputs")
        );
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Integer, true, 1), 64).contains("size 64"));
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Integer, true, 1), 0).contains("size 0"));
        assert!(refused(grid([8, 32], 32, 4, ZeroKind::Integer, false, 1), 32).contains("f16"));
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
            let layers = [grid.affine().layer("x")];
            let size = group_size(&layers).unwrap();
            let tensors = encode("x", &grid.affine(), size).unwrap();
            let config = config(&layers, &[]).unwrap();
            let decoded = read::awq::decode(&config, "x", &Memory::new(tensors)).unwrap();
            let decoded = decoded.regrouped(group_len).unwrap();
            prop_assert_eq!(&decoded.codes, &grid.codes);
            prop_assert_eq!(&decoded.scale, &grid.scale);
            prop_assert_eq!(decoded.shift, Shift::Zero(grid.zero.clone()));
            prop_assert_eq!(decoded.weights, grid.affine().dequantize());
        }
    }
}
