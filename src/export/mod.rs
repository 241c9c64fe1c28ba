//! Packed formats: encode, decode, and the folder writer that both share.
//!
//! Every export is written to a staged folder, re-opened, decoded by the reader that `--model`
//! uses, and compared with what was trained; only then does it take its place.

pub mod activations;
mod adapted;
mod adapter;
mod approximate;
pub mod awq;
pub mod bcq;
pub mod compressed_tensors;
pub mod container;
mod dequantized;
mod difference;
pub mod fewbit;
mod folder;
pub mod gguf;
pub mod gptq;
mod manifest;
pub mod matrix;
pub mod mlx;
mod nested;
mod packed;
mod parts;
pub mod plan;
pub mod read;
mod switch;
mod write;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use activations::ActivationRecord;
pub use adapted::write_opened;
pub use adapter::{Adapter, AdapterHead, AdapterPart, AdapterRecord, Tuned};
pub use approximate::Loss;
pub use dequantized::{DenseDType, DequantizedConfig};
pub use difference::{Change, Difference, differences};
pub use folder::{OpenModel, open_model};
pub use manifest::{
    GridRecord, LinearRecord, LogitsRecord, MANIFEST_FILE, Manifest, ParityRecord, Provenance,
};
pub use packed::{
    BcqFormatConfig, CompressedTensorsConfig, GptqFormatConfig, MlxConfig, PlainConfig,
};
pub use parts::{ModelParts, Quantized};
pub use switch::Adapters;
pub use write::{Exported, Gate, WeightStats, weights_sha256, write};

use crate::error::{Error, Result};
use crate::quant::Bits;

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
    /// MLX's affine layout, as mlx-lm reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mlx: Option<MlxConfig>,
    /// GPTQ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gptq: Option<GptqFormatConfig>,
    /// AutoRound: GPTQ's tensors under another config.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub autoround: Option<GptqFormatConfig>,
    /// AWQ, 4 bits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub awq: Option<PlainConfig>,
    /// compressed-tensors, packed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compressed_tensors: Option<CompressedTensorsConfig>,
    /// Bit planes in LUT-GEMM's word order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bcq: Option<BcqFormatConfig>,
    /// One GGUF file, as llama.cpp reads it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gguf: Option<PlainConfig>,
}

/// `format.fewbit`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FewbitConfig {}

/// A format that can be written.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// fewbit's own packed folder.
    Fewbit,
    /// Dense Hugging Face folder.
    Dequantized,
    /// MLX.
    Mlx,
    /// GPTQ.
    Gptq,
    /// AutoRound.
    Autoround,
    /// AWQ.
    Awq,
    /// compressed-tensors.
    CompressedTensors,
    /// Bit planes.
    Bcq,
    /// GGUF.
    Gguf,
}

impl Format {
    /// Every format.
    pub const ALL: [Self; 9] = [
        Self::Fewbit,
        Self::Dequantized,
        Self::Mlx,
        Self::Gptq,
        Self::Autoround,
        Self::Awq,
        Self::CompressedTensors,
        Self::Bcq,
        Self::Gguf,
    ];

    /// What it is, in a few words.
    pub fn about(self) -> &'static str {
        match self {
            Self::Fewbit => "Packed codes and scales: what every other format is made from",
            Self::Dequantized => {
                "A dense Hugging Face folder of the quantized weights: f32, or dtype = bf16, f16"
            }
            Self::Mlx => "MLX's affine layout: mlx-lm; 2, 3, 4, 5, 6 and 8 bits",
            Self::Gptq => "GPTQ: transformers, gptqmodel, vLLM; 2, 3, 4 and 8 bits, f16 scales",
            Self::Autoround => "AutoRound: GPTQ's tensors under its own config",
            Self::Awq => "AWQ: codes of 4 bits, f16 scales",
            Self::CompressedTensors => {
                "compressed-tensors: vLLM, transformers; codes of 1, 2, 4 or 8 bits"
            }
            Self::Gguf => "One GGUF file: llama.cpp; the block type that holds each weight exactly",
            Self::Bcq => "Sign planes of binary coding in LUT-GEMM's word order",
        }
    }

    /// Its name: the folder under `export/`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fewbit => "fewbit",
            Self::Dequantized => "dequantized",
            Self::Mlx => "mlx",
            Self::Gptq => "gptq",
            Self::Autoround => "autoround",
            Self::Awq => "awq",
            Self::CompressedTensors => "compressed_tensors",
            Self::Bcq => "bcq",
            Self::Gguf => "gguf",
        }
    }
}

impl FormatsConfig {
    /// One format with the keys of `settings`, each `KEY=VALUE` as in a recipe.
    ///
    /// # Errors
    /// A usage error that names a key or value which the format does not have.
    pub fn of(format: Format, settings: &[String]) -> Result<Self> {
        let mut lines = BTreeMap::new();
        for setting in settings {
            let Some((key, value)) = setting.split_once('=') else {
                return Err(Error::usage(format!("`{setting}` is not KEY=VALUE")).at("--set"));
            };
            let (key, value) = (key.trim(), value.trim());
            // A bare word is a text.
            let line = format!("{key} = {value}\n");
            let plain = toml::from_str::<toml::Table>(&line).is_ok();
            let quoted = format!("{key} = {value:?}\n");
            // The last one of a key wins.
            lines.insert(key, if plain { line } else { quoted });
        }
        let lines: String = lines.into_values().collect();
        let text = format!("[{}]\n{lines}", format.name());
        toml::from_str(&text).map_err(|error| {
            Error::usage(format!("the settings of {}: {}", format.name(), error.message()))
                .at("--set")
                .fix("fewbit export --help lists what each format takes")
        })
    }

    /// Whether a format may change weights.
    pub fn lossy(&self, format: Format) -> bool {
        let plain = |config: &Option<PlainConfig>| config.as_ref().is_some_and(|c| c.lossy);
        let gptq = |config: &Option<GptqFormatConfig>| config.as_ref().is_some_and(|c| c.lossy);
        match format {
            Format::Fewbit => false,
            Format::Dequantized => self.dequantized.as_ref().is_some_and(|c| c.lossy),
            Format::Mlx => self.mlx.as_ref().is_some_and(|c| c.lossy),
            Format::Gptq => gptq(&self.gptq),
            Format::Autoround => gptq(&self.autoround),
            Format::Awq => plain(&self.awq),
            Format::CompressedTensors => self.compressed_tensors.as_ref().is_some_and(|c| c.lossy),
            Format::Bcq => self.bcq.as_ref().is_some_and(|c| c.lossy),
            Format::Gguf => plain(&self.gguf),
        }
    }

    /// The width that a format rounds embedding and head to, if asked to.
    pub fn embeddings(&self, format: Format) -> Option<Bits> {
        self.mlx.as_ref().filter(|_| format == Format::Mlx)?.embeddings
    }

    /// The formats asked for.
    pub fn formats(&self) -> Vec<Format> {
        let asked = |format: &Format| match format {
            Format::Fewbit => self.fewbit.is_some(),
            Format::Dequantized => self.dequantized.is_some(),
            Format::Mlx => self.mlx.is_some(),
            Format::Gptq => self.gptq.is_some(),
            Format::Autoround => self.autoround.is_some(),
            Format::Awq => self.awq.is_some(),
            Format::CompressedTensors => self.compressed_tensors.is_some(),
            Format::Bcq => self.bcq.is_some(),
            Format::Gguf => self.gguf.is_some(),
        };
        Format::ALL.into_iter().filter(asked).collect()
    }
}
