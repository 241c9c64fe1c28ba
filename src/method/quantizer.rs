//! From a weight to its codes and to their values.

use burn::tensor::Tensor;

use crate::ops;
use crate::quant::{QuantParams, ScaleDigits, ZeroKind};

/// A folded weight still on the device: integer codes and their grid.
#[derive(Clone, Debug)]
pub enum Folded {
    /// `w = scale * (code - zero_point)`.
    Uniform {
        /// Codes as floats, `[groups, group_len]`, each an integer in `0..2^bits`.
        codes: Tensor<2>,
        /// Steps, `[groups, 1]`.
        scale: Tensor<2>,
        /// Zero points in code units, `[groups, 1]`.
        zero_point: Tensor<2>,
        /// What the zero points are.
        zero_kind: ZeroKind,
    },
    /// `w = ±alpha_0 ± alpha_1 ... + offset`.
    BinaryCoding {
        /// Codes as floats, `[groups, group_len]`; bit `i` is the sign of `alpha_i`.
        codes: Tensor<2>,
        /// Scales of the planes, `[groups, bits]`.
        alpha: Tensor<2>,
        /// Offsets, `[groups, 1]`.
        offset: Tensor<2>,
    },
}

impl Folded {
    /// Codes on a uniform grid.
    pub fn uniform(codes: Tensor<2>, grid: QuantParams, zero_kind: ZeroKind) -> Self {
        let QuantParams { scale, zero_point } = grid;
        Self::Uniform { codes, scale, zero_point, zero_kind }
    }
}

/// The one function from a weight to its codes and to their values: training, evaluation and export
/// all read it.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // a handful of tensor handles either way
pub enum Quantizer {
    /// Codes of the weight divided by learned factors.
    Divided(ops::Divided),
    /// Codes of the weight in units of a learned step; what its zero points are.
    Stepped(ops::Stepped, ZeroKind),
    /// UniQuanF's mapping to binary coding.
    Unified {
        /// The learned mapping.
        unified: ops::Unified,
        /// The weight, `[groups, group_len]`.
        weight: Tensor<2>,
        /// Present codes as floats, `[groups, group_len]`.
        codes: Tensor<2>,
        /// Whether weights beyond their level's reach get no gradient.
        filter: bool,
    },
}

impl Quantizer {
    /// With scales of few digits, so that training sees what will be stored; their gradient is
    /// that of the scales as they are. Scales that are products or exponentials come out short to
    /// within their last bit.
    #[must_use]
    pub fn shortened(mut self, digits: ScaleDigits) -> Self {
        if digits == ScaleDigits::F32 {
            return self;
        }
        let digits = match self {
            Self::Unified { .. } => digits.of_planes(),
            Self::Divided(_) | Self::Stepped(..) => digits,
        };
        let short = |scale: Tensor<2>| ops::shorten_ste(scale, digits.significant());
        match &mut self {
            Self::Divided(divided) => {
                divided.log_scale = short(divided.scales()).log();
                divided.base = None;
            }
            Self::Stepped(stepped, _) => {
                let step = stepped.step.clone();
                let scale = stepped.rule.scales(step.clone());
                // Scales are steps times a constant.
                stepped.step = step * (short(scale.clone()) / scale);
            }
            Self::Unified { unified, .. } => {
                let scale = ops::exp(unified.log_scale.clone());
                unified.alpha = short(scale.clone() * unified.alpha.clone()) / scale;
            }
        }
        self
    }

    /// Of every so many groups the first, where that is simple; how many groups are to be passed over still.
    #[must_use]
    pub(super) fn some_groups(self, every: usize) -> (Self, usize) {
        match self {
            Self::Stepped(stepped, zero_kind) => {
                (Self::Stepped(stepped.some_groups(every), zero_kind), 1)
            }
            // Their factors are shared among groups.
            Self::Divided(_) | Self::Unified { .. } => (self, every),
        }
    }

    /// Differentiable stand-in for the weight, `[groups, group_len]`.
    pub fn values(self) -> Tensor<2> {
        match self {
            Self::Divided(divided) => divided.values(),
            Self::Stepped(stepped, _) => stepped.values(),
            Self::Unified { unified, weight, codes, filter } => unified.map(weight, &codes, filter),
        }
    }

    /// The weight where it stands between the levels before it is rounded, `[groups, group_len]`, off
    /// the tape, in units of weights: what a later stage goes on from.
    pub fn latent(self) -> Tensor<2> {
        use ops::off_tape;
        match self {
            Self::Divided(divided) => divided.latent(),
            Self::Stepped(stepped, _) => match stepped.rounding {
                None => off_tape(stepped.weight),
                Some(offset) => {
                    off_tape(stepped.weight) + off_tape(offset) * off_tape(stepped.step)
                }
            },
            Self::Unified { unified, weight, .. } => {
                let division = unified.log_division + unified.log_row;
                off_tape(weight) / off_tape(division).exp()
            }
        }
    }

    /// Distances of levels, `[groups, 1]`, or scales of planes, `[groups, bits]`.
    pub fn scales(&self) -> Tensor<2> {
        match self {
            Self::Divided(divided) => divided.scales(),
            Self::Stepped(stepped, _) => stepped.rule.scales(stepped.step.clone()),
            Self::Unified { unified, .. } => unified.folded().0,
        }
    }

    /// Codes and grid. Law: they stand for [`Quantizer::values`], bit for bit.
    pub fn fold(self) -> Folded {
        match self {
            Self::Divided(divided) => {
                let scale = divided.scales();
                let grid = QuantParams { scale, zero_point: divided.zero_point.clone() };
                Folded::uniform(divided.codes(), grid, ZeroKind::Integer)
            }
            Self::Stepped(stepped, zero_kind) => {
                let scale = stepped.rule.scales(stepped.step.clone());
                let grid = QuantParams { scale, zero_point: stepped.zero_point.clone() };
                Folded::uniform(stepped.codes(), grid, zero_kind)
            }
            Self::Unified { unified, codes, .. } => {
                let (alpha, offset) = unified.folded();
                Folded::BinaryCoding { codes, alpha, offset }
            }
        }
    }
}
