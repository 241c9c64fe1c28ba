//! Packed formats: encode, decode, and the folder writer that both share.
//!
//! Every export is written to a staged folder, re-opened, decoded by the reader that `--model`
//! uses, and compared with what was trained; only then does it take its place.

pub mod activations;
mod adapted;
mod adapter;
mod dequantized;
mod difference;
pub mod fewbit;
mod folder;
mod manifest;
mod switch;

use serde::{Deserialize, Serialize};

pub use activations::ActivationRecord;
pub use adapted::write_opened;
pub use adapter::{Adapter, AdapterDType, AdapterHead, AdapterPart, AdapterRecord, Tuned};
pub use difference::{Change, Difference, differences};
pub use folder::{
    Exported, ModelParts, OpenModel, Parity, WeightStats, open_model, weights_sha256, write,
};
pub use manifest::{GridRecord, LinearRecord, MANIFEST_FILE, Manifest, ParityRecord, Provenance};
pub use switch::Adapters;

/// `[stage.export]`'s `format` table: every format named in it is written.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct FormatsConfig {
    /// fewbit's own packed folder: the neutral source of truth.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fewbit: Option<FewbitConfig>,
    /// A dense Hugging Face folder of the quantized weights, which any runtime loads.
    #[serde(skip_serializing_if = "Option::is_none", alias = "dense")]
    pub dequantized: Option<DequantizedConfig>,
}

/// `format.fewbit`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FewbitConfig {}

/// `format.dequantized`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DequantizedConfig {}

/// A format that can be written.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// fewbit's own packed folder.
    Fewbit,
    /// Dense Hugging Face folder.
    Dequantized,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 2] = [Self::Fewbit, Self::Dequantized];

    /// What it is, in a few words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Fewbit => "Packed codes and scales: what every other format is made from",
            Self::Dequantized => "A dense Hugging Face folder of the quantized weights, in f32",
        }
    }

    /// Its name: the folder under `export/`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fewbit => "fewbit",
            Self::Dequantized => "dequantized",
        }
    }
}

impl FormatsConfig {
    /// The formats asked for.
    pub fn formats(&self) -> Vec<Format> {
        let fewbit = self.fewbit.as_ref().map(|_| Format::Fewbit);
        let dequantized = self.dequantized.as_ref().map(|_| Format::Dequantized);
        fewbit.into_iter().chain(dequantized).collect()
    }
}
