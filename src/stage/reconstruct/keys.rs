//! What `[stage.reconstruct]` says.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::method::MethodConfig;
use crate::objective::{MseObjective, ObjectiveConfig, Reduction, TokenWeight};
use crate::quant::{ActivationQuant, Bits, GroupSize, ObserverConfig, Symmetry};
use crate::stage::activations::StreamType;
use crate::stage::inputs::Piece;
use crate::stage::memory::Memory;
use crate::stage::start::StartFrom;
use crate::train::{LearningRate, OptimizerConfig, RateUnit, ScheduleConfig};

/// Keys of `[stage.reconstruct]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ReconstructConfig {
    /// How weights are quantized and what is learned; or what learns of the grids of codes that an earlier
    /// stage left.
    pub method: MethodConfig,
    /// Instead of `quant.bits`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Instead of `quant.group_size`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Instead of `quant.symmetric`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<Symmetry>,
    /// Instead of `quant.observer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observer: Option<ObserverConfig>,
    /// On another grid than the earlier stage's: what the weights start from.
    #[serde(default)]
    pub start_from: StartFrom,
    /// Whether the linears of a block learn together or piece by piece: `"block"` or `"staged"`.
    #[serde(default)]
    pub within: Within,
    /// `objective.mse`.
    #[serde(default = "mse")]
    pub objective: ObjectiveConfig,
    /// Optimizer steps for each block, or for each piece of a block.
    pub steps: u64,
    /// Sequences in a step.
    #[serde(default = "two")]
    pub batch: usize,
    /// Share of the block's input entries that come from the quantized stream, the others from the
    /// float stream, drawn anew for every step (QDrop, UniQuanF). 1: the quantized stream alone.
    /// Default: 1, or 0.5 when training quantizes activations on fixed grids.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub input_prob: Option<f64>,
    /// Whether training quantizes activations, keys and values as `[quant.activations]` and
    /// `[quant.kv_cache]` say. Default: `true` on fixed grids (`scheme = "tensor"`), else `false`.
    /// Grids that do not learn here are calibrated on the finished block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantize_activations: Option<bool>,
    /// Go on, with a warning, when the quality gate finds the model worse than plain rounding.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_worse: bool,
    /// Steps between saves of the state in the middle of a block.
    #[serde(default = "five_hundred")]
    pub checkpoint_every: u64,
    /// How many of those states are kept.
    #[serde(default = "two")]
    pub keep: usize,
    /// Keep the parameters of the step with the lowest loss instead of the last (SignRound's).
    #[serde(default)]
    pub keep_best: bool,
    /// Base learning rates.
    pub learning_rate: LearningRate,
    /// What the rates of latent weights and steps are measured in: `"absolute"` or `"grid"`.
    #[serde(default)]
    pub rate_unit: RateUnit,
    /// How the rate moves over a block's steps.
    #[serde(default)]
    pub schedule: ScheduleConfig,
    /// AdamW's constants.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Where the hidden states of the calibration set are kept: `"host"`, main memory, or `"disk"`, a file in
    /// the run's folder; the same numbers from each. Absent: main memory where there is room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// The type they are kept in: `"f32"` or `"bf16"`, half the room and other numbers.
    #[serde(default, skip_serializing_if = "StreamType::is_default")]
    pub streams: StreamType,
}

/// What of a block learns at a time.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Within {
    /// All of it.
    #[default]
    Block,
    /// Queries and keys, then values and output, then the MLP.
    Staged,
}

impl Within {
    pub(super) fn pieces(self) -> &'static [Piece] {
        match self {
            Self::Block => &[Piece::Whole],
            Self::Staged => &[Piece::Scores, Piece::Attention, Piece::Mlp],
        }
    }
}

fn mse() -> ObjectiveConfig {
    ObjectiveConfig::Mse(MseObjective::default())
}

pub(super) fn five_hundred() -> u64 {
    500
}

fn two() -> usize {
    2
}

impl ReconstructConfig {
    /// What training does to activations when the model does `quant`.
    pub(super) fn activations(&self, quant: ActivationQuant) -> ActivationQuant {
        let quantizes = self.quantize_activations.unwrap_or(quant.fixed().is_some());
        if quantizes { quant } else { ActivationQuant::default() }
    }

    /// Share of the block's input entries that come from the quantized stream.
    pub(super) fn share_of_quantized(&self, quant: ActivationQuant) -> f64 {
        self.input_prob.unwrap_or(if quant.fixed().is_some() { 0.5 } else { 1.0 })
    }

    /// Whether steps look at what enters the block in the float model.
    pub(super) fn reads_float(&self, quant: ActivationQuant) -> bool {
        self.within == Within::Staged || self.share_of_quantized(self.activations(quant)) < 1.0
    }

    pub(super) fn sum_sequence(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.reduction == Reduction::SequenceSum)
    }

    pub(super) fn relative_tokens(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.tokens == TokenWeight::Relative)
    }

    pub(super) fn augmented(&self) -> bool {
        matches!(&self.objective, ObjectiveConfig::Mse(o) if o.augmented)
    }
}
