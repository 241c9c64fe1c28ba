//! LRQ, low-rank quantization (Lee et al., NAACL 2025, arXiv 2407.11534): FlexRound with far fewer
//! division factors.
//!
//! *What it learns:* the step `exp(log_scale)` of each group; for the matrix two thin factors
//! (`log_left`, `log_right`), a division factor for every output row (`log_row`) and every input
//! column (`log_column`); the weight and the zero point stay frozen. *Formula:*
//! `W_hat = exp(δ) · clamp(round(W / exp(δ + P·U + r + c)), -z, L - z)` with δ = `log_scale`,
//! P = `log_left`, U = `log_right`, r = `log_row`, c = `log_column`: for a weight
//! `[out, in]` that is `rank · (out + in) + out + in` division factors instead of `out · in`. Over
//! Llama-2-7B's linears, rank 1024 everywhere learns 39.5 % as many numbers as there are weights;
//! the released code's rule 83.5 %, for it keeps the whole matrix in the MLP. *Start:* `P = r = c =
//! 0`, so the codes are round-to-nearest's; U is uniform within `1/sqrt(in)`, or P would get no
//! gradient. *Recipe keys:* `rank`. *Export:* uniform grid, integer zero; the division factors only
//! chose the integers.

use std::num::NonZeroUsize;

use burn::module::{Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng as _, SeedableRng as _};
use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{GridKind, LeftGrid, Quantizer, Start, WeightMethod};
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::{QuantParams, QuantSpec, Repr, ZeroKind};
use crate::schema::schema_of;
use crate::train::Role;

/// The paper's rank for models of ordinary size, and for large ones.
const RANKS: [usize; 2] = [1024, 2048];
/// Where a matrix is large, on its smaller side.
const LARGE: usize = 8192;
/// The side that decides, in the released code, whether a matrix is factored at all.
const WIDE: usize = 4096;

/// How many columns `log_left` has. In a recipe: `"quarter"`, `"paper"`, `"code"` or a number.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Rank {
    /// A quarter of the smaller side, 1 at least and 1024 at most.
    #[default]
    Quarter,
    /// 1024, and 2048 where both sides have 8192 features or more; capped at the smaller side.
    Paper,
    /// The released code's rule: as [`Rank::Paper`], but a matrix with exactly one side above 4096,
    /// or one of 8192 x 8192, keeps FlexRound's full matrix.
    Code,
    /// This one.
    Of(NonZeroUsize),
}

impl Rank {
    /// The rank for a weight `[out, in]`; `None` is a full matrix.
    ///
    /// # Errors
    /// When a rank given as a number exceeds the smaller side.
    pub fn of_shape(self, shape: [usize; 2]) -> Result<Option<usize>> {
        let [out, inputs] = shape;
        let smaller = out.min(inputs);
        let paper = RANKS[usize::from(smaller >= LARGE)].min(smaller);
        match self {
            Self::Quarter => Ok(Some((smaller / 4).clamp(1, RANKS[0]))),
            Self::Paper => Ok(Some(paper)),
            Self::Code => {
                let full = (out > WIDE) != (inputs > WIDE) || shape == [LARGE; 2];
                Ok(if full { None } else { Some(paper) })
            }
            Self::Of(rank) if rank.get() <= smaller => Ok(Some(rank.get())),
            Self::Of(rank) => Err(Error::preflight(format!(
                "rank {rank} exceeds the smaller side of a weight of {out} x {inputs}"
            ))
            .fix(format!("rank = {smaller} at most, or rank = \"quarter\""))),
        }
    }
}

impl Serialize for Rank {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Quarter => serializer.serialize_str("quarter"),
            Self::Paper => serializer.serialize_str("paper"),
            Self::Code => serializer.serialize_str("code"),
            Self::Of(rank) => serializer.serialize_u64(rank.get() as u64),
        }
    }
}

schema_of!(
    Rank,
    "Columns of the learned factors.",
    {
        "oneOf": [
            { "const": "quarter", "description": "A quarter of the smaller side, 1 at least and 1024 at most." },
            { "const": "paper", "description": "1024, and 2048 where both sides have 8192 features or more." },
            {
                "const": "code",
                "description": "As \"paper\", but some of the largest matrices keep FlexRound's full matrix."
            },
            { "type": "integer", "minimum": 1 }
        ]
    }
);

impl<'de> Deserialize<'de> for Rank {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Rank;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("\"quarter\", \"paper\", \"code\" or a number")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Rank, E> {
                match text {
                    "quarter" => Ok(Rank::Quarter),
                    "paper" => Ok(Rank::Paper),
                    "code" => Ok(Rank::Code),
                    _ => Err(E::unknown_variant(text, &["quarter", "paper", "code", "a number"])),
                }
            }

            fn visit_i64<E: de::Error>(self, rank: i64) -> Result<Rank, E> {
                let rank =
                    usize::try_from(rank).ok().and_then(NonZeroUsize::new).ok_or_else(|| {
                        E::custom(format!("rank = {rank} must be at least 1, or \"quarter\""))
                    })?;
                Ok(Rank::Of(rank))
            }

            fn visit_u64<E: de::Error>(self, rank: u64) -> Result<Rank, E> {
                self.visit_i64(i64::try_from(rank).unwrap_or(i64::MAX))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// `method.lrq`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct LrqConfig {
    /// Columns of the left factor: `"quarter"`, `"paper"`, `"code"` or a number.
    pub rank: Rank,
}

/// The division factors of a whole matrix, but for those of its rows.
#[derive(Debug, Module)]
#[allow(clippy::large_enum_variant)] // a few tensor handles either way
pub enum Division {
    /// One for every weight, as in FlexRound.
    Full(FullDivision),
    /// A product of two thin matrices.
    LowRank(LowRankDivision),
}

/// FlexRound's division factors.
#[derive(Debug, Module)]
pub struct FullDivision {
    /// Element-wise log division, `[out, in]`.
    pub log_division: Param<Tensor<2>>,
}

/// LRQ's division factors.
#[derive(Debug, Module)]
pub struct LowRankDivision {
    /// Left factor of the log division, `[out, rank]`.
    pub log_left: Param<Tensor<2>>,
    /// Right factor of the log division, `[rank, in]`.
    pub log_right: Param<Tensor<2>>,
    /// Column-wise log division, `[1, in]`.
    pub log_column: Param<Tensor<2>>,
}

/// LRQ's learned state for one weight.
#[derive(Debug, Module)]
pub struct Lrq {
    /// `ln Δ`, `[groups, 1]`.
    pub log_scale: Param<Tensor<2>>,
    /// Row-wise log division, `[out, 1]`, with groups too.
    pub log_row: Param<Tensor<2>>,
    /// The rest of the log division.
    pub division: Division,
    /// What `log_scale` is relative to; 1 where absent.
    base: Option<Tensor<2>>,
    zero_point: Tensor<2>,
    max_code: u8,
}

impl WeightMethod for Lrq {
    type Config = LrqConfig;

    const LEAVES: Repr = Repr::Uniform;
    const GRID: GridKind = GridKind::Affine;
    const RESUMES: bool = true;
    const TRAINS_BASE: bool = false;
    const ROLES: &'static [(&'static str, Role)] = &[
        ("log_scale", Role::Scale),
        ("log_left", Role::Rounding),
        ("log_right", Role::Rounding),
        ("log_row", Role::Rounding),
        ("log_column", Role::Rounding),
        ("log_division", Role::Rounding),
    ];

    fn accepts(_: &LrqConfig, _: &QuantSpec) -> Result<()> {
        Ok(())
    }

    fn accepts_shape(config: &LrqConfig, shape: [usize; 2]) -> Result<()> {
        config.rank.of_shape(shape).map(drop)
    }

    fn init(config: &LrqConfig, start: &Start<'_>) -> Result<Self> {
        let Start { spec, observer, weight, .. } = *start;
        let QuantParams { scale, zero_point } =
            observer.observe(weight, spec.bits, spec.symmetry)?;
        Self::on(config, start, None, scale.log(), zero_point)
    }

    fn resume(config: &LrqConfig, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Self>> {
        if grid.zero_kind != ZeroKind::Integer {
            return Ok(None);
        }
        let log_scale = grid.scale.zeros_like();
        let base = Some(grid.scale.clone());
        Self::on(config, start, base, log_scale, grid.zero_point.clone()).map(Some)
    }

    fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
        let (mut log_division, mut log_column) = match &self.division {
            Division::Full(full) => (full.log_division.val(), None),
            Division::LowRank(factors) => {
                let product = ops::matmul(factors.log_left.val(), factors.log_right.val());
                (product, Some(factors.log_column.val()))
            }
        };
        let (mut log_row, [groups, _]) = (self.log_row.val(), weight.dims());
        if groups < log_row.dims()[0] {
            // A group of several rows: their factors vary within it.
            log_division = log_division + log_row;
            if let Some(column) = log_column.take() {
                log_division = log_division + column;
            }
            log_row = self.zero_point.zeros_like();
        }
        Quantizer::Divided(ops::Divided {
            base: self.base.clone(),
            log_scale: self.log_scale.val(),
            log_division: ops::reshape_grouped(log_division, weight.dims()),
            log_row,
            log_column,
            zero_point: self.zero_point.clone(),
            max_code: self.max_code,
            weight,
        })
    }
}

impl Lrq {
    /// Without division factors yet.
    fn on(
        config: &LrqConfig,
        start: &Start<'_>,
        base: Option<Tensor<2>>,
        log_scale: Tensor<2>,
        zero_point: Tensor<2>,
    ) -> Result<Self> {
        let Start { spec, layout, weight, seed, .. } = *start;
        let [out, inputs] = [layout.out, layout.inputs];
        let device = weight.device();
        let zeros = |shape: [usize; 2]| Param::from_tensor(Tensor::zeros(shape, &device));
        let division = match config.rank.of_shape([out, inputs])? {
            None => Division::Full(FullDivision { log_division: zeros([out, inputs]) }),
            Some(rank) => Division::LowRank(LowRankDivision {
                log_left: zeros([out, rank]),
                log_right: Param::from_tensor(uniform([rank, inputs], seed, &device)),
                log_column: zeros([1, inputs]),
            }),
        };
        Ok(Self {
            log_scale: Param::from_tensor(log_scale),
            log_row: zeros([out, 1]),
            division,
            base,
            zero_point,
            max_code: spec.bits.max_code(),
        })
    }
}

/// Uniform within `1/sqrt(columns)`, drawn on the host: the same on every device.
fn uniform(shape: [usize; 2], seed: u64, device: &Device) -> Tensor<2> {
    let [rows, columns] = shape;
    let bound = (columns as f32).sqrt().recip();
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..rows * columns)
        .map(|_| {
            let unit = (random.next_u32() >> 8) as f32 / (1 << 24) as f32;
            (2.0 * unit - 1.0) * bound
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
