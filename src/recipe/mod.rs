//! Recipes: the whole TOML surface, composed from the configurations of the layers below, and its
//! resolution into a plan.

mod builtin;
mod parse;
mod plan;
mod reference;
mod tailor;

use std::path::PathBuf;

use burn::tensor::DType;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use builtin::{Builtin, builtins, find};
pub use parse::{parse, to_toml};
pub use plan::{Base, Plan, PlannedStage};
pub use reference::{Key, explain, inside, keys, schema};
pub use tailor::{real_model_settings, with_settings};

pub use crate::data::{DataFormat, Paths};
use crate::data::{Reading, TemplateChoice, TrainOn};
use crate::export::Format;
use crate::quant::{
    ActivationConfig, ActivationQuant, Bits, GroupSize, KvCacheConfig, ObserverConfig, ScaleDigits,
    Symmetry,
};
use crate::stage::StageConfig;

/// A recipe as written.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    /// Seed of everything random.
    #[serde(default)]
    pub seed: u64,
    /// The run's folder.
    pub output: PathBuf,
    /// `auto`, `cpu`, `cuda[:i]`, ...
    #[serde(default = "auto")]
    pub device: String,
    /// The model.
    pub model: ModelSection,
    /// The data sets.
    #[serde(default)]
    pub data: DataSection,
    /// Default quantization of every linear of the decoder blocks.
    pub quant: QuantSection,
    /// What is done, in order.
    pub stage: Vec<StageConfig>,
}

impl Recipe {
    /// The recipe without what changes no result: where it is written and run, and keys of stages that
    /// only say how closely a run is watched. Runs of equal ones go on from each other.
    #[must_use]
    pub fn neutral(mut self) -> Self {
        self.output = PathBuf::new();
        self.device = String::new();
        self.stage = self.stage.into_iter().map(StageConfig::neutral).collect();
        self
    }
}

fn auto() -> String {
    "auto".to_owned()
}

/// `[model]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSection {
    /// A folder, `embedded:NAME` or a hub id.
    pub path: String,
    /// The float model behind a packed one, for objectives and baselines that need it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
    /// The type activations are computed in; learned parameters stay f32.
    #[serde(default)]
    pub compute: Compute,
}

/// A compute type.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// 32-bit floats.
    #[default]
    F32,
    /// bfloat16.
    Bf16,
}

impl Compute {
    /// burn's name of it.
    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// `[data]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DataSection {
    /// Put the model's BOS token before each document, where it has one.
    pub bos: bool,
    /// For reconstruct.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<DataConfig>,
    /// For distill.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub train: Option<DataConfig>,
    /// For evaluate, and for the export's gate.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub validation: Option<DataConfig>,
}

impl Default for DataSection {
    fn default() -> Self {
        Self { bos: true, calibration: None, train: None, validation: None }
    }
}

/// One data set.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// A file or a list of files, joined in order; `format` says what is in them. Absent in
    /// `[data.calibration]`: what `[data.train]` reads, in its way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<Paths>,
    /// Several sources in place of `path`, with their weights; not in `[data.validation]`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mix: Vec<MixSource>,
    /// Windows drawn, evenly spread; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub samples: Option<usize>,
    /// Tokens in a window, which examples are packed into whole; default the model's context, at
    /// most 2048.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<usize>,
    /// What a document is: plain text (JSONL with `text`, a JSON list of strings, or a text file),
    /// or an example of which only the answers are learned (JSONL or a JSON list of objects).
    #[serde(default)]
    pub format: DataFormat,
    /// What of a conversation is learned: `assistant`, `last`, `each` or `all`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub train_on: TrainOn,
    /// `true`: instructions and completions go through the model's chat template too; a path: through this
    /// one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<TemplateChoice>,
    /// Values for further names in the chat template, such as `enable_thinking`.
    #[serde(default, skip_serializing_if = "serde_json::Map::is_empty")]
    pub chat_template_kwargs: serde_json::Map<String, serde_json::Value>,
    /// What a chat template that asks is told of today's date.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub date: Option<String>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl DataConfig {
    /// How documents become tokens.
    pub fn reading(&self) -> Reading {
        Reading {
            format: self.format,
            train_on: self.train_on,
            chat_template: self.chat_template.clone(),
            chat_template_kwargs: self.chat_template_kwargs.clone(),
            date: self.date.clone(),
        }
    }

    /// The same windows of what another one reads.
    #[must_use]
    pub fn reading_as(&self, other: &Self) -> Self {
        Self { samples: self.samples, length: self.length, ..other.clone() }
    }
}

/// A source of a mix.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MixSource {
    /// A file or a list of files.
    pub path: Paths,
    /// Its share of the windows, beside the others' weights; 1.
    #[serde(default = "one")]
    pub weight: f64,
    /// What its documents are; default: what the data set says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<DataFormat>,
}

fn one() -> f64 {
    1.0
}

/// `[quant]`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct QuantSection {
    /// Width of a code.
    pub bits: Bits,
    /// Weights that share a scale.
    #[serde(default = "channel")]
    pub group_size: GroupSize,
    /// Where zero lies.
    #[serde(default = "asymmetric")]
    pub symmetric: Symmetry,
    /// How grids start.
    #[serde(default)]
    pub observer: ObserverConfig,
    /// `"f16"`: what a stage leaves has scales that half precision holds, so that formats which
    /// store such scales hold the model exactly; `"bits7"`: and no more digits than GGUF's Q4_1
    /// takes. The last tenth of a training computes with them.
    #[serde(default)]
    pub scales: ScaleDigits,
    /// The format that the model is for: the scales of training get as few digits as make its weights
    /// smallest there, unless `scales` says how many, and what it cannot hold is refused at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Format>,
    /// Activations too, from the first stage that quantizes on; absent: they stay float.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationConfig>,
    /// Keys and values too; absent: they stay float.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCacheConfig>,
    /// Exceptions; later ones win.
    #[serde(default, rename = "override", skip_serializing_if = "Vec::is_empty")]
    pub overrides: Vec<Override>,
}

impl QuantSection {
    /// What is done to activations.
    pub fn of_activations(&self) -> ActivationQuant {
        ActivationQuant { activations: self.activations, kv_cache: self.kv_cache }
    }
}

fn channel() -> GroupSize {
    GroupSize::PerChannel
}

fn asymmetric() -> Symmetry {
    Symmetry::Asymmetric
}

/// `[[quant.override]]`: an exception for some linears, in every stage.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// `attention` or `mlp`, or a shell-style pattern on full names such as
    /// `model.layers.0.mlp.down_proj`.
    #[serde(rename = "match")]
    pub pattern: String,
    /// Bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<Bits>,
    /// Group size.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<GroupSize>,
    /// Symmetry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub symmetric: Option<Symmetry>,
    /// Leave these linears float.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep: bool,
}
