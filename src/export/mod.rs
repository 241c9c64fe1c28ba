//! Packed formats: encode, decode, and the folder writer that all share.
//!
//! Every export is written to a staged folder, re-opened, decoded by the reader that `--model`
//! uses, and compared with what was trained; only then does it take its place.

pub mod activations;
mod adapted;
mod adapter;
mod approximate;
mod autoround;
mod awq;
mod bcq;
mod card;
mod coded;
mod compressed_tensors;
mod convert;
mod dequantized;
mod difference;
mod embeddings;
pub mod fewbit;
mod files;
mod folder;
mod foresee;
mod format;
mod formats;
mod gate;
pub mod gguf;
mod gptq;
mod manifest;
mod mlx;
mod parts;
mod plan;
mod planes;
mod read;
mod record;
mod seal;
mod switch;
mod write;

pub use activations::ActivationRecord;
pub use adapted::write_opened;
pub use adapter::{Adapter, AdapterHead, AdapterPart, AdapterRecord, Tuned};
pub use approximate::Loss;
pub use difference::{Change, Difference, differences};
pub use folder::{OpenModel, open_float, open_model};
pub use foresee::holds;
pub use formats::{Format, FormatsConfig};
pub use gate::Gate;
pub use manifest::{LogitsRecord, Manifest, ParityRecord};
pub use parts::{ModelParts, Quantized};
pub use record::{
    GridRecord, LinearRecord, MANIFEST_FILE, Provenance, all_tensor_names, weights_sha256,
};
pub use switch::Adapters;
pub use write::{Exported, WeightStats, write};
