//! Which format can hold a weight without changing it, and in words why another cannot; and the codes
//! under which a format stores what it holds.
//!
//! Two rewritings keep every value. Codes may be wider than the grid needs, shifted together with
//! their zero points; a zero point between two codes becomes a code when both are doubled and the
//! scale halved.

use std::borrow::Cow;

use super::coded::{Coded, Layer, is_exact};
use crate::error::Error;
use crate::quant::{Grid, QuantizedWeight, ZeroKind};
use crate::store::DType;

/// What a format that packs codes can hold.
#[derive(Clone, Copy, Debug)]
pub struct Holds {
    /// Widths of codes, ascending.
    pub widths: &'static [u8],
    /// Whether a zero point is stored as a code.
    pub codes_zeros: bool,
    /// Whether weights may be in binary coding.
    pub planes: bool,
    /// Inputs of which a group is a multiple.
    pub group: usize,
    /// Whether a row may be one group whatever its length.
    pub whole_rows: bool,
    /// Outputs and inputs that are packed together.
    pub tile: [usize; 2],
    /// Its place among formats that are recommended where another does not fit, from 0.
    pub rank: u8,
}

impl Holds {
    /// No width yet, and no other limit.
    pub(super) const UNLIMITED: Self = Self {
        widths: &[],
        codes_zeros: true,
        planes: false,
        group: 1,
        whole_rows: true,
        tile: [1, 1],
        rank: u8::MAX,
    };

    /// Whether zero points between two codes are held by doubling the codes.
    fn doubles(&self, kind: ZeroKind) -> bool {
        self.codes_zeros && kind == ZeroKind::Half
    }

    /// The width of code under which a uniform grid with zero points between `low` and `high` is
    /// stored: the grid's own, or a wider one. `None` where there is none that is wide enough.
    fn stored_bits(&self, kind: ZeroKind, bits: u8, (low, high): (f32, f32)) -> Option<u8> {
        if !self.codes_zeros {
            return self.widths.iter().copied().find(|width| *width >= bits);
        }
        if kind == ZeroKind::Real {
            return None;
        }
        let doubled = self.doubles(kind);
        // A zero point below the codes lifts them all.
        let span = top(bits).max(high) + (-low).max(0.0);
        let needed = if doubled { 2.0 * span } else { span };
        // Runtimes have kernels for doubled codes in these widths.
        let has = |width: u8| !doubled || width == 4 || width == 8;
        self.widths.iter().copied().find(|width| has(*width) && top(*width) >= needed)
    }

    /// Whether a grid of `bits` with zero points between `low` and `high` is stored as a symmetric
    /// one: its zero points are all in the middle, or its codes can be shifted until they are, which
    /// wider codes leave room for. Runtimes are at their best with symmetric grids.
    fn is_centred(&self, kind: ZeroKind, bits: u8, (low, high): (f32, f32)) -> bool {
        let Some(stored) = self.stored_bits(kind, bits, (low, high)) else { return false };
        let middle = middle(stored);
        if stored == bits && !self.doubles(kind) {
            return low.to_bits() == middle.to_bits() && high.to_bits() == middle.to_bits();
        }
        let factor = if self.doubles(kind) { 2.0 } else { 1.0 };
        factor * high <= middle && factor * (top(bits) - low) + middle <= top(stored)
    }

    /// `weight` in the codes that it is stored in: its own, or others that stand for the same values.
    pub(super) fn stored<'w>(&self, weight: &'w Coded<'_>) -> Coded<'w> {
        let Some(kind) = weight.zero_kind else { return weight.view() };
        let range = bounds(&weight.shift);
        let doubled = self.doubles(kind);
        let bits = match self.stored_bits(kind, weight.bits, range) {
            Some(bits) if bits != weight.bits || doubled => bits,
            _ => return weight.view(),
        };
        let factor: u8 = if doubled { 2 } else { 1 };
        let centred = self.is_centred(kind, weight.bits, range);
        let lift = |zero: f32| match self.codes_zeros {
            false => 0.0,
            true if centred => middle(bits) - zero,
            true => (-zero).max(0.0),
        };
        let scale = weight.scale.iter().map(|scale| scale / f32::from(factor)).collect();
        let (mut codes, mut zeros) = (Vec::with_capacity(weight.codes.len()), Vec::new());
        for (group, zero) in weight.codes.chunks_exact(weight.group_len).zip(&*weight.shift) {
            let zero = zero * f32::from(factor);
            let lift = lift(zero);
            zeros.push(zero + lift);
            codes.extend(group.iter().map(|code| code * factor + lift as u8));
        }
        let half = zeros.iter().any(|zero| zero.fract() != 0.0);
        Coded {
            bits,
            codes: Cow::Owned(codes),
            scale,
            shift: Cow::Owned(zeros),
            zero_kind: Some(if half { kind } else { ZeroKind::Integer }),
            ..*weight
        }
    }

    /// What a config has to say about linear `name` as it is stored.
    pub(super) fn layer(&self, name: &str, weight: &QuantizedWeight) -> Layer {
        let (layout, bits) = (weight.layout, weight.bits.get());
        let (stored, centred) = match &weight.grid {
            Grid::Uniform { zero_point, zero_kind, .. } => {
                let zeros = bounds(zero_point);
                let stored = self.stored_bits(*zero_kind, bits, zeros).unwrap_or(bits);
                (stored, self.is_centred(*zero_kind, bits, zeros))
            }
            Grid::BinaryCoding { .. } | Grid::Codebook { .. } => (bits, false),
        };
        let group_len = layout.group_len.min(layout.inputs);
        let shape = [layout.out, layout.inputs];
        Layer { name: name.to_owned(), shape, bits: stored, group_len, centred }
    }

    /// Why format `name` cannot hold a weight, whatever its scales are; `None` when it can.
    pub(super) fn refuses(&self, name: &str, weight: &Coded<'_>) -> Option<Reason> {
        self.wrong_zeros(name, weight)
            .or_else(|| self.wrong_bits(name, weight))
            .or_else(|| self.wrong_groups(name, weight))
    }

    fn wrong_zeros(&self, name: &str, weight: &Coded<'_>) -> Option<Reason> {
        let Some(kind) = weight.zero_kind else {
            let what = format!("{name} has evenly spaced levels, this weight is in binary coding");
            return (!self.planes).then(|| Reason::new(what));
        };
        (self.codes_zeros && kind == ZeroKind::Real).then(|| {
            Reason::new(format!(
                "{name} has integer zero points, those of this grid are any real numbers: every \
                 weight would move by up to half a step"
            ))
        })
    }

    fn wrong_bits(&self, name: &str, weight: &Coded<'_>) -> Option<Reason> {
        let (kind, bits) = (weight.zero_kind?, weight.bits);
        let (low, high) = bounds(&weight.shift);
        if self.stored_bits(kind, bits, (low, high)).is_some() {
            return None;
        }
        let doubled =
            if self.doubles(kind) { ", doubled for zero points between two codes" } else { "" };
        let widths: Vec<String> = self.widths.iter().map(u8::to_string).collect();
        let widths = match widths.split_last() {
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{} or {last}", others.join(", ")),
            None => "no".to_owned(),
        };
        Some(Reason::new(format!(
            "{name} has codes of {widths} bits, which do not hold those of this weight ({bits} bits, zero \
             points {low} to {high}{doubled}): it would be quantized again"
        )))
    }

    fn wrong_groups(&self, name: &str, weight: &Coded<'_>) -> Option<Reason> {
        let Coded { out, inputs, group_len, .. } = *weight;
        let whole = self.whole_rows && group_len == inputs;
        if !whole && !group_len.is_multiple_of(self.group) {
            return Some(Reason::new(format!(
                "{name} has groups of whole {} inputs, this weight has groups of {group_len}: \
                 weights of different groups would share a scale",
                self.group
            )));
        }
        let [by_out, by_inputs] = self.tile;
        if out.is_multiple_of(by_out) && inputs.is_multiple_of(by_inputs) {
            return None;
        }
        Some(Reason::new(format!(
            "{name} packs {by_out} outputs by {by_inputs} inputs, this weight is {out} x {inputs}: \
             it would have to be padded, which loaders do not expect"
        )))
    }
}

/// The greatest code of a width.
fn top(bits: u8) -> f32 {
    f32::from(u8::MAX >> (8 - bits))
}

/// The zero point of a symmetric grid as formats mean it.
fn middle(bits: u8) -> f32 {
    f32::from(1_u8 << (bits - 1))
}

/// The least and the greatest of zero points.
fn bounds(zeros: &[f32]) -> (f32, f32) {
    let start = (f32::INFINITY, f32::NEG_INFINITY);
    zeros.iter().fold(start, |(low, high), zero| (low.min(*zero), high.max(*zero)))
}

/// What makes trained scales so short that formats hold them.
const SHORT_SCALES: &str = "quant.scales = \"f16\"";

/// Why a format cannot hold a weight exactly.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reason {
    /// What does not fit, and what would be lost if it were written all the same.
    pub what: String,
    /// What to do.
    instead: Instead,
}

#[derive(Clone, Debug, Eq, PartialEq)]
enum Instead {
    /// Take a format that holds it.
    Format,
    /// Train with shorter scales, or take a format that holds it.
    Scales,
    /// This.
    Setting(&'static str),
}

impl Reason {
    fn new(what: String) -> Self {
        Self { what, instead: Instead::Format }
    }

    /// Scales that are too long.
    pub(super) fn scales(what: String) -> Self {
        Self { what, instead: Instead::Scales }
    }

    /// What another `setting` of the format helps with.
    pub(super) fn setting(what: String, setting: &'static str) -> Self {
        Self { what, instead: Instead::Setting(setting) }
    }

    /// The error about linear `name`; `others` are formats that hold it exactly, the most recommended
    /// first.
    pub(super) fn error<'n>(self, name: &str, others: impl Iterator<Item = &'n str>) -> Error {
        let formats = || {
            let names = others.take(2).chain(["fewbit"]).map(|name| format!("format.{name}"));
            names.collect::<Vec<_>>().join(" or ")
        };
        let fix = match self.instead {
            Instead::Format => formats(),
            Instead::Scales => format!("{SHORT_SCALES} in training, or {}", formats()),
            Instead::Setting(setting) => setting.to_owned(),
        };
        Error::preflight(self.what).at(name).fix(fix)
    }
}

/// What stands against f16 scales, which format `name` has.
pub(super) fn beyond_f16(name: &str, weight: &Coded<'_>) -> Option<Reason> {
    let beyond = weight.scale.iter().filter(|s| !is_exact(DType::F16, **s)).count();
    (beyond > 0).then(|| {
        Reason::scales(format!(
            "{name} has f16 scales, {beyond} of {} scales are no f16 numbers: their groups would be \
             scaled by up to 0.05 % more or less",
            weight.scale.len()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::super::coded::sample::{Grid, grid};
    use super::super::format::{Kind, refuses};
    use super::super::formats::Format;
    use super::*;
    use crate::quant::ZeroKind::{Half, Integer, Real};

    const PACKED: [Format; 6] = [
        Format::Mlx,
        Format::Gptq,
        Format::Autoround,
        Format::Awq,
        Format::CompressedTensors,
        Format::Bcq,
    ];

    fn holds(format: Format) -> Holds {
        let plain = format.plain();
        let Kind::Packed(packed) = plain.kind() else { panic!("{format:?} packs no codes") };
        *packed.holds()
    }

    fn reason(format: Format, weight: &Coded<'_>) -> Option<String> {
        let plain = format.plain();
        let Kind::Packed(packed) = plain.kind() else { panic!("{format:?} packs no codes") };
        refuses(packed, format.name(), weight).map(|reason| reason.what)
    }

    #[test]
    fn integer_and_half_zero_points_go_everywhere() {
        for (kind, bits, group) in
            [(Integer, 4, 128), (Integer, 2, 64), (Half, 2, 64), (Half, 3, 256)]
        {
            let mut grid = grid([64, 256], group, bits, kind, true, 1);
            let zero = f32::from(1_u8 << (bits - 1)) - if kind == Half { 0.5 } else { 0.0 };
            grid.zero.fill(zero);
            for format in PACKED {
                assert_eq!(reason(format, &grid.coded()), None, "{format:?}, {kind:?}");
            }
        }
    }

    #[test]
    fn widths() {
        use Format::{Awq, Bcq, CompressedTensors, Gptq, Mlx};
        for (format, kind, bits, zeros, stored) in [
            (Gptq, Integer, 4, (0.0, 15.0), Some(4)),
            (Gptq, Integer, 4, (0.0, 16.0), Some(8)),
            (Gptq, Integer, 4, (-1.0, 3.0), Some(8)),
            (Gptq, Integer, 5, (0.0, 0.0), Some(8)),
            (Gptq, Half, 1, (0.5, 0.5), Some(4)),
            (Gptq, Half, 2, (1.5, 1.5), Some(4)),
            (Gptq, Half, 3, (3.5, 3.5), Some(4)),
            (Gptq, Half, 4, (7.5, 7.5), Some(8)),
            (Gptq, Half, 8, (7.5, 7.5), None),
            (Gptq, Real, 4, (0.0, 0.0), None),
            (Awq, Integer, 2, (0.0, 3.0), Some(4)),
            (Awq, Integer, 5, (0.0, 3.0), None),
            (Awq, Half, 3, (-1.5, 3.5), None),
            (CompressedTensors, Integer, 3, (0.0, 7.0), Some(4)),
            (CompressedTensors, Half, 2, (1.5, 1.5), Some(4)),
            (Mlx, Real, 1, (-9.0, 0.0), Some(2)),
            (Mlx, Half, 7, (63.5, 63.5), Some(8)),
            (Bcq, Real, 7, (63.5, 63.5), Some(7)),
        ] {
            let found = holds(format).stored_bits(kind, bits, zeros);
            assert_eq!(found, stored, "{format:?} {kind:?} {bits} {zeros:?}");
        }
    }

    #[test]
    fn groups_and_shapes() {
        let narrow = grid([60, 48], 48, 4, Integer, true, 1);
        for (format, word) in [
            (Format::Mlx, "groups of 48"),
            (Format::Gptq, "32 outputs by 32 inputs, this weight is 60 x 48"),
            (Format::Awq, "8 outputs by 1 inputs"),
        ] {
            let what = reason(format, &narrow.coded()).unwrap();
            assert!(what.contains(word), "{what}");
        }
        assert_eq!(reason(Format::CompressedTensors, &narrow.coded()), None);
    }

    #[test]
    fn values_decide_after_the_training() {
        let mut grid = grid([32, 64], 32, 4, Integer, false, 4);
        for (format, word) in [
            (Format::Gptq, "scales are no f16 numbers"),
            (Format::Mlx, "rounding at each step"),
            (Format::Bcq, "groups"),
        ] {
            let what = reason(format, &grid.coded()).unwrap();
            assert!(what.contains(word), "{what}");
        }
        grid.scale.fill(0.5);
        for format in PACKED {
            assert_eq!(reason(format, &grid.coded()), None, "{format:?}");
        }
        grid.zero[3] = -1.0;
        let awq = reason(Format::Awq, &grid.coded()).unwrap();
        assert!(awq.contains("4 bits, zero points -1 to 15"), "{awq}");
        assert_eq!(reason(Format::Gptq, &grid.coded()), None, "8 bits hold it");
    }

    fn stored(format: Format, grid: &Grid, width: u8) -> Coded<'static> {
        let (holds, weight) = (holds(format), grid.coded());
        let stored = holds.stored(&weight).into_owned();
        assert_eq!(stored.bits, width);
        let bits = |weight: &Coded<'_>| -> Vec<u32> {
            weight.dequantize().iter().map(|weight| (weight + 0.0).to_bits()).collect()
        };
        assert_eq!(bits(&stored), bits(&grid.coded()));
        stored
    }

    #[test]
    fn half_steps_become_codes() {
        // SEQ's 2 bits, -1.5 to 1.5 steps: odd multiples of half a step around 8.
        let mut seq = grid([2, 32], 32, 2, Half, false, 3);
        seq.zero.fill(1.5);
        seq.codes = [0, 1, 2, 3].repeat(16);
        for format in [Format::Gptq, Format::Autoround, Format::Awq, Format::CompressedTensors] {
            let stored = stored(format, &seq, 4);
            assert_eq!((&stored.codes[..4], stored.shift[0]), (&[5, 7, 9, 11][..], 8.0));
            assert!(stored.is_centred());
        }
        assert_eq!(stored(Format::Mlx, &seq, 2).codes[..], seq.codes);
        let off = Grid { zero: vec![0.5, -0.5], ..seq.clone() };
        let moved = stored(Format::Gptq, &off, 4);
        assert_eq!((moved.codes[0], &moved.shift[..]), (7, &[8.0, 8.0][..]));
        let far = Grid { zero: vec![1.5, -3.5], ..seq.clone() };
        let moved = stored(Format::Gptq, &far, 4);
        assert_eq!(moved.shift[..], [3.0, 0.0], "no room for a middle");
        let three = grid([2, 32], 32, 3, Half, false, 5);
        stored(Format::Gptq, &three, 4);
        let four = grid([2, 32], 32, 4, Half, false, 6);
        stored(Format::CompressedTensors, &four, 8);
    }

    #[test]
    fn wider_codes_keep_the_weights() {
        for (bits, format, width) in
            [(2, Format::Awq, 4), (5, Format::Gptq, 8), (7, Format::Mlx, 8), (1, Format::Mlx, 2)]
        {
            let mut grid = grid([4, 32], 32, bits, Integer, false, 9);
            // Three codes on either side of eight, for instance.
            let moved = format != Format::Mlx;
            assert_eq!(stored(format, &grid, width).is_centred(), moved, "{bits} bits");
            grid.centre();
            assert_eq!(stored(format, &grid, width).is_centred(), moved);
        }
        let mut beyond = grid([2, 32], 32, 4, Integer, false, 9);
        beyond.zero = vec![-3.0, 20.0];
        assert_eq!(stored(Format::Gptq, &beyond, 8).shift[..], [128.0, 128.0]);
    }
}
