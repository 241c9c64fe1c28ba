//! Which format can hold a weight without changing it, and in words why another cannot.

use std::fmt;

use super::container::{self, UniformPlanes};
use super::matrix::{Affine, Planes, is_exact, stored_group};
use super::mlx::{self, Rounding};
use crate::error::{Error, Result};
use crate::quant::{GroupAxis, GroupLayout, Repr, ZeroKind};
use crate::store::DType;

/// A packed format of another runtime.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Target {
    /// MLX affine, as mlx-lm and mistral.rs read it.
    Mlx,
    /// compressed-tensors `pack-quantized`.
    CompressedTensors,
    /// GPTQ, version 2 zero points unless symmetric.
    Gptq,
    /// AutoRound: the tensors of GPTQ under another config.
    AutoRound,
    /// AWQ, gemm order.
    Awq,
    /// Bit planes with their scales.
    Bcq,
}

impl Target {
    /// All of them, in the order in which they are recommended.
    pub const ALL: [Self; 6] =
        [Self::Mlx, Self::CompressedTensors, Self::Gptq, Self::AutoRound, Self::Awq, Self::Bcq];

    /// Its name in a recipe's `format` table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mlx => "mlx",
            Self::CompressedTensors => "compressed_tensors",
            Self::Gptq => "gptq",
            Self::AutoRound => "autoround",
            Self::Awq => "awq",
            Self::Bcq => "bcq",
        }
    }

    /// Widths of codes that it has, ascending, and in words.
    fn widths(self) -> (&'static [u8], &'static str) {
        match self {
            Self::Mlx => (&mlx::BITS, "2, 3, 4, 5, 6 or 8"),
            Self::Gptq | Self::AutoRound => (&[2, 3, 4, 8], "2, 3, 4 or 8"),
            Self::Awq => (&[4], "4"),
            // Its other widths changed their layout, and no release loads all of them.
            Self::CompressedTensors => (&[1, 2, 4, 8], "1, 2, 4 or 8"),
            Self::Bcq => (&[1, 2, 3, 4, 5, 6, 7, 8], "1 to 8"),
        }
    }

    /// Whether a zero point is stored as a code.
    fn codes_zeros(self) -> bool {
        !matches!(self, Self::Mlx | Self::Bcq)
    }
}

/// Whether `target` holds zero points between two codes by doubling the codes.
pub fn doubles(target: Target, kind: ZeroKind) -> bool {
    target.codes_zeros() && kind == ZeroKind::Half
}

/// The width of code under which `target` stores a uniform grid with zero points between `low` and
/// `high`: the grid's own, or a wider one. `None` where it has none that is wide enough.
pub fn stored_bits(
    target: Target,
    kind: ZeroKind,
    bits: u8,
    (low, high): (f32, f32),
) -> Option<u8> {
    let (widths, _) = target.widths();
    let top = f32::from(u8::MAX >> (8 - bits));
    if !target.codes_zeros() {
        return widths.iter().copied().find(|width| *width >= bits);
    }
    if kind == ZeroKind::Real {
        return None;
    }
    let doubled = doubles(target, kind);
    // A zero point below the codes lifts them all.
    let span = top.max(high) + (-low).max(0.0);
    let needed = if doubled { 2.0 * span } else { span };
    // Runtimes have kernels for doubled codes in these widths.
    let has = |width: u8| !doubled || width == 4 || width == 8;
    let holds = |width: &u8| has(*width) && f32::from(u8::MAX >> (8 - width)) >= needed;
    widths.iter().copied().find(holds)
}

/// What decides whether a format can hold a weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Traits {
    /// Kind of grid.
    pub repr: Repr,
    /// What the zero points of a uniform grid are.
    pub zero_kind: ZeroKind,
    /// Width of a code.
    pub bits: u8,
    /// How weights fall into groups.
    pub layout: GroupLayout,
    /// What only the trained values tell; `None` before the training, when nothing is refused for
    /// them.
    pub values: Option<Values>,
}

/// What the values of a uniform grid are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Values {
    /// The least and the greatest zero point.
    pub zeros: (f32, f32),
    /// Number of scales.
    pub scales: usize,
    /// Scales that are no f16 numbers.
    pub beyond_f16: usize,
    /// What MLX's arithmetic does with f32 scales.
    pub mlx: Rounding,
    /// Groups of which sums of sign planes are not the levels.
    pub beyond_planes: usize,
}

impl Traits {
    /// Of a weight on a uniform grid that passed [`Affine::check`], values included.
    pub fn of(weight: &Affine<'_>) -> Self {
        let values = Values {
            zeros: container::bounds(weight.zero),
            scales: weight.scale.len(),
            beyond_f16: weight.scale.iter().filter(|s| !is_exact(DType::F16, **s)).count(),
            mlx: mlx::rounding(weight, DType::F32),
            beyond_planes: UniformPlanes::new(weight).1,
        };
        Self { values: Some(values), ..Self::untrained(weight) }
    }

    /// As [`Traits::of`], as far as it is known before the training.
    pub fn untrained(weight: &Affine<'_>) -> Self {
        let shape = [weight.out, weight.inputs];
        Self::new(Repr::Uniform, weight.zero_kind, weight.bits, shape, weight.group_len)
    }

    /// Of a weight in binary coding.
    pub fn of_planes(weight: &Planes<'_>) -> Self {
        let shape = [weight.out, weight.inputs];
        Self::new(Repr::BinaryCoding, ZeroKind::Real, weight.bits, shape, weight.group_len)
    }

    fn new(repr: Repr, zero_kind: ZeroKind, bits: u8, shape: [usize; 2], group: usize) -> Self {
        let [out, inputs] = shape;
        let groups = out * inputs / group.max(1);
        let layout = GroupLayout { out, inputs, groups, group_len: group, axis: GroupAxis::In };
        Self { repr, zero_kind, bits, layout, values: None }
    }

    /// Weights of a row that share a scale; of a matrix with a single scale, the row.
    fn group_len(&self) -> usize {
        self.layout.group_len.min(self.layout.inputs)
    }
}

/// Why a format cannot hold a weight.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Reason {
    /// What does not fit.
    pub what: String,
    /// What would be lost if it were written all the same.
    pub lost: String,
}

/// A [`Reason`] with what to take instead.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Refusal {
    /// Why not.
    pub reason: Reason,
    /// Formats that hold the weight exactly, as keys of a recipe.
    pub instead: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.what, self.reason.lost)
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        Self::preflight(refusal.to_string()).fix(refusal.instead)
    }
}

/// The key of a recipe that makes scales numbers which every format holds.
pub(super) const SHORT_SCALES: &str = "quant.scales = \"f16\"";

/// Why `target` cannot hold a weight exactly; `None` when it can.
pub fn refusal(target: Target, traits: &Traits) -> Option<Refusal> {
    let reason = reason(target, traits)?;
    let holds = |other: &Target| *other != target && self::reason(*other, traits).is_none();
    let mut names: Vec<String> = Target::ALL
        .into_iter()
        .filter(holds)
        .take(2)
        .map(|other| format!("format.{}", other.name()))
        .collect();
    names.push("format.fewbit".to_owned());
    let mut instead = names.join(" or ");
    if wrong_values(target, traits).as_ref() == Some(&reason) {
        instead = format!("{SHORT_SCALES} in training, or {instead}");
    }
    Some(Refusal { reason, instead })
}

/// The refusal of linear `name` as an error.
///
/// # Errors
/// When there is one.
pub(super) fn check(target: Target, traits: &Traits, name: &str) -> Result<()> {
    match refusal(target, traits) {
        None => Ok(()),
        Some(refusal) => Err(Error::from(refusal).at(name)),
    }
}

fn reason(target: Target, traits: &Traits) -> Option<Reason> {
    wrong_grid(target, traits)
        .or_else(|| wrong_zeros(target, traits))
        .or_else(|| wrong_bits(target, traits))
        .or_else(|| wrong_groups(target, traits))
        .or_else(|| wrong_values(target, traits))
}

fn say(what: impl Into<String>, lost: impl Into<String>) -> Reason {
    Reason { what: what.into(), lost: lost.into() }
}

fn wrong_grid(target: Target, traits: &Traits) -> Option<Reason> {
    let name = target.name();
    match (target, traits.repr) {
        (_, Repr::Dense) => Some(say(
            format!("{name} holds codes, this weight is dense"),
            "it would be rounded to codes",
        )),
        (Target::Bcq, Repr::BinaryCoding) | (_, Repr::Uniform) => {
            (traits.layout.axis == GroupAxis::Out).then(|| Reason {
                what: format!("{name} groups inputs, this weight has groups along the outputs"),
                lost: "weights would share scales they were not trained with".to_owned(),
            })
        }
        (_, Repr::BinaryCoding) => Some(say(
            format!("{name} has evenly spaced levels, this weight is in binary coding"),
            "levels that are not evenly spaced would be moved",
        )),
    }
}

fn wrong_zeros(target: Target, traits: &Traits) -> Option<Reason> {
    if !target.codes_zeros() || traits.zero_kind != ZeroKind::Real {
        return None;
    }
    Some(say(
        format!(
            "{} has integer zero points, those of this grid are any real numbers",
            target.name()
        ),
        "every weight would move by up to half a step",
    ))
}

fn wrong_bits(target: Target, traits: &Traits) -> Option<Reason> {
    let Traits { repr, zero_kind, bits, .. } = *traits;
    let zeros = traits.values.map_or((0.0, 0.0), |values| values.zeros);
    if repr == Repr::BinaryCoding || stored_bits(target, zero_kind, bits, zeros).is_some() {
        return None;
    }
    let ((_, widths), name) = (target.widths(), target.name());
    let doubled =
        if doubles(target, zero_kind) { ", doubled for zero points between two codes" } else { "" };
    let (low, high) = zeros;
    Some(say(
        format!(
            "{name} has codes of {widths} bits, which do not hold those of this weight ({bits} \
             bits, zero points {low} to {high}{doubled})"
        ),
        "it would be quantized again",
    ))
}

fn wrong_groups(target: Target, traits: &Traits) -> Option<Reason> {
    let GroupLayout { out, inputs, .. } = traits.layout;
    let (group, name) = (traits.group_len(), target.name());
    let grouped = |sizes: &[usize]| group == inputs || stored_group(group, sizes).is_some();
    let fits = match target {
        Target::Mlx => stored_group(group, &mlx::GROUPS).is_some(),
        Target::Gptq | Target::AutoRound | Target::Awq | Target::Bcq => grouped(&[32]),
        Target::CompressedTensors => true,
    };
    if !fits {
        return Some(say(
            format!("{name} has groups of whole 32 inputs, this weight has groups of {group}"),
            "weights of different groups would share a scale",
        ));
    }
    let [by_out, by_inputs] = match target {
        Target::Gptq | Target::AutoRound => [32, 32],
        Target::Awq => [8, 1],
        _ => [1, 1],
    };
    if out.is_multiple_of(by_out) && inputs.is_multiple_of(by_inputs) {
        return None;
    }
    Some(say(
        format!(
            "{name} packs {by_out} outputs by {by_inputs} inputs, this weight is {out} x {inputs}"
        ),
        "it would have to be padded, which loaders do not expect",
    ))
}

fn wrong_values(target: Target, traits: &Traits) -> Option<Reason> {
    let values = traits.values?;
    match target {
        Target::Mlx if values.mlx.changed > 0 => Some(rounding_reason(&values.mlx, DType::F32)),
        Target::Gptq | Target::AutoRound | Target::Awq if values.beyond_f16 > 0 => Some(say(
            format!(
                "{} has f16 scales, {} of {} scales are no f16 numbers",
                target.name(),
                values.beyond_f16,
                values.scales
            ),
            "their groups would be scaled by up to 0.05 % more or less",
        )),
        Target::Bcq if values.beyond_planes > 0 => Some(say(
            format!(
                "bcq adds scales of planes in f32, with a rounding each, and {} of {} groups have \
                 scales of too many digits for that",
                values.beyond_planes, values.scales
            ),
            "their weights would differ in the last digits",
        )),
        _ => None,
    }
}

fn rounding_reason(rounding: &Rounding, dtype: DType) -> Reason {
    let kind = if dtype == DType::F16 { "f16" } else { "f32" };
    Reason {
        what: format!("mlx computes scale * code + bias in {kind}, with a rounding at each step"),
        lost: format!(
            "{} of {} weights would come out different ({:.2} %, by at most {:.2e})",
            rounding.changed,
            rounding.weights,
            100.0 * rounding.fraction(),
            rounding.largest
        ),
    }
}

/// What MLX would change, in words.
pub(super) fn rounding_sentence(rounding: &Rounding, dtype: DType) -> String {
    let Reason { what, lost } = rounding_reason(rounding, dtype);
    format!("{what}: {lost}")
}

#[cfg(test)]
mod tests {
    use super::super::matrix::sample::grid;
    use super::*;

    fn traits(kind: ZeroKind, bits: u8, group: usize) -> Traits {
        Traits::new(Repr::Uniform, kind, bits, [64, 256], group)
    }

    fn instead(target: Target, traits: &Traits) -> String {
        refusal(target, traits).unwrap().instead
    }

    #[test]
    fn integer_and_half_zero_points_go_everywhere() {
        for traits in [
            traits(ZeroKind::Integer, 4, 128),
            traits(ZeroKind::Integer, 2, 64),
            traits(ZeroKind::Half, 2, 64),
            traits(ZeroKind::Half, 3, 256),
        ] {
            for target in Target::ALL {
                assert_eq!(refusal(target, &traits), None, "{target:?}, {traits:?}");
            }
        }
    }

    #[test]
    fn widths() {
        use Target::{Awq, Bcq, CompressedTensors, Gptq, Mlx};
        use ZeroKind::{Half, Integer, Real};
        for (target, kind, bits, zeros, stored) in [
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
            let found = stored_bits(target, kind, bits, zeros);
            assert_eq!(found, stored, "{target:?} {kind:?} {bits} {zeros:?}");
        }
    }

    #[test]
    fn what_does_not_hold_says_why_and_what_does() {
        let real = traits(ZeroKind::Real, 4, 64);
        let error = Error::from(refusal(Target::Gptq, &real).unwrap());
        assert_eq!(
            error.to_string(),
            "gptq has integer zero points, those of this grid are any real numbers: every weight \
             would move by up to half a step\n  try  format.mlx or format.bcq or format.fewbit"
        );
        assert_eq!(refusal(Target::Mlx, &real), None);
        let five = traits(ZeroKind::Integer, 5, 32);
        assert_eq!(
            instead(Target::Awq, &five),
            "format.mlx or format.compressed_tensors or format.fewbit"
        );
        let out = GroupLayout { axis: GroupAxis::Out, ..five.layout };
        let out = Traits { layout: out, ..five };
        assert_eq!(instead(Target::Mlx, &out), "format.fewbit");
        let planes = Traits { repr: Repr::BinaryCoding, ..five };
        assert_eq!(instead(Target::Mlx, &planes), "format.bcq or format.fewbit");
        assert_eq!(instead(Target::Mlx, &Traits { repr: Repr::Dense, ..five }), "format.fewbit");
    }

    #[test]
    fn groups_and_shapes() {
        let narrow = Traits::new(Repr::Uniform, ZeroKind::Integer, 4, [60, 48], 48);
        for (target, word) in [
            (Target::Mlx, "groups of 48"),
            (Target::Gptq, "32 outputs by 32 inputs, this weight is 60 x 48"),
            (Target::Awq, "8 outputs by 1 inputs"),
        ] {
            let refusal = refusal(target, &narrow).unwrap().to_string();
            assert!(refusal.contains(word), "{refusal}");
        }
        assert_eq!(refusal(Target::CompressedTensors, &narrow), None);
        // One scale for the whole matrix is one scale per row, repeated.
        let tensor = GroupLayout {
            groups: 1,
            group_len: 64 * 256,
            ..traits(ZeroKind::Integer, 4, 256).layout
        };
        let tensor = Traits { layout: tensor, ..traits(ZeroKind::Integer, 4, 256) };
        assert_eq!(refusal(Target::Mlx, &tensor), None);
    }

    #[test]
    fn values_decide_after_the_training() {
        let mut grid = grid([32, 64], 32, 4, ZeroKind::Integer, false, 4);
        let traits = Traits::of(&grid.affine());
        let gptq = refusal(Target::Gptq, &traits).unwrap();
        assert!(gptq.reason.what.contains("scales are no f16 numbers"), "{gptq}");
        let short = format!("{SHORT_SCALES} in training, or ");
        assert_eq!(gptq.instead, short + "format.compressed_tensors or format.fewbit");
        for (target, word) in [(Target::Mlx, "rounding at each step"), (Target::Bcq, "groups")] {
            let refusal = refusal(target, &traits).unwrap().to_string();
            assert!(refusal.contains(word), "{refusal}");
        }
        grid.scale.fill(0.5);
        for target in Target::ALL {
            assert_eq!(refusal(target, &Traits::of(&grid.affine())), None, "{target:?}");
        }
        grid.zero[3] = -1.0;
        let traits = Traits::of(&grid.affine());
        let awq = refusal(Target::Awq, &traits).unwrap().to_string();
        assert!(awq.contains("4 bits, zero points -1 to 15"), "{awq}");
        assert_eq!(refusal(Target::Gptq, &traits), None, "8 bits hold it");
    }
}
