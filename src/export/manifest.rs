//! `manifest.json`: what an exported folder holds, where it came from, and hashes of all of it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::activations::ActivationRecord;
use super::adapter::AdapterHead;
use super::approximate::Loss;
use super::formats::Format;
use super::record::{FORMAT_VERSION, LinearRecord, MANIFEST_FILE, Provenance};
use super::seal::{BLANK, is_whole, sealed};
use crate::data::Reading;
use crate::error::{Error, Result};

/// Everything that `verify` checks and a reader needs.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Manifest {
    /// Which format the folder is in.
    pub format: Format,
    /// Version of this layout.
    pub format_version: u32,
    /// The fewbit that wrote it.
    pub fewbit: String,
    /// Order of codes in a word: code `i` of a row occupies bits `[i*b, i*b+b)`, least
    /// significant first, rows starting at a fresh 32-bit word.
    pub bit_order: String,
    /// The axis along which codes are packed and groups run.
    pub axis: String,
    /// Model, data and recipe.
    pub provenance: Provenance,
    /// The adapter whose scales were put in place of the base's, where that is how the folder was
    /// made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adapter: Option<AdapterHead>,
    /// Quantized linears by name.
    pub linears: BTreeMap<String, LinearRecord>,
    /// What happens to activations, where anything does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<ActivationRecord>,
    /// SHA-256 of every other tensor's bytes, by name.
    pub dense: BTreeMap<String, String>,
    /// SHA-256 of config.json, tokenizer and the other files of the folder, by name.
    pub files: BTreeMap<String, String>,
    /// Mean stored bits of a quantized weight, scales and zero points included.
    pub bits_per_weight: f64,
    /// What was changed of tensors that are not quantized, where that was allowed.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rounded: BTreeMap<String, Loss>,
    /// Whether the folder computes something else than what was trained, where that was allowed.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
    /// What the re-opened model says to fixed prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits: Option<LogitsRecord>,
    /// Perplexity of the trained and the re-opened model.
    pub parity: Option<ParityRecord>,
    /// SHA-256 of this file with zeros in place of these digits; manifests of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

/// What a model says to fixed prompts, so that `verify` can ask again.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LogitsRecord {
    /// Token ids of each prompt.
    pub prompts: Vec<Vec<u32>>,
    /// The likeliest token behind each.
    pub next: Vec<u32>,
    /// SHA-256 of the logits behind each, as little-endian f32, on the device of the provenance.
    pub sha256: String,
    /// The largest difference from the trained model's logits.
    pub differ: f32,
    /// Mean negative log-likelihood of the prompts' tokens, nats.
    pub nll: f64,
}

/// Two perplexities that must be equal, and what they were measured on.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ParityRecord {
    /// Of the model as trained.
    pub trained: f64,
    /// Of the re-opened folder.
    pub exported: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Window length.
    pub context: usize,
    /// Tokens between window starts; the window length where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Windows, evenly spread; at most 64 where it is not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub windows: Option<usize>,
    /// SHA-256 of the text.
    pub data_sha256: String,
    /// What its documents are, and how they became tokens; packed examples have windows of `context` tokens.
    #[serde(flatten)]
    pub reading: Reading,
}

impl Manifest {
    /// Whether a file of this name belongs to the folder.
    pub fn covers(&self, name: &str) -> bool {
        // Earlier versions have no hashes of these.
        let unnamed = self.sha256.is_none() && is_weights(name);
        name == MANIFEST_FILE || unnamed || self.files.contains_key(name)
    }

    /// Reads `dir/manifest.json`; `None` when there is none, or it is another tool's.
    ///
    /// # Errors
    /// When it is damaged, not as it was written, or of a newer version.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MANIFEST_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            // A file, for instance a GGUF file, has nothing beside it in this sense.
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
                return Ok(None);
            }
            Err(e) => return Err(Error::io("read", &path, &e)),
        };
        let value: Value = serde_json::from_str(&text).map_err(|e| damaged(&path, &e))?;
        match value.get("format_version").and_then(Value::as_u64) {
            None => return Ok(None),
            Some(version) if !(1..=u64::from(FORMAT_VERSION)).contains(&version) => {
                let what = format!(
                    "the manifest has version {version}, this fewbit reads {FORMAT_VERSION}"
                );
                return Err(Error::damaged(what, "a newer fewbit").at(path.display()));
            }
            Some(_) => {}
        }
        let keys: BTreeSet<String> =
            value.as_object().into_iter().flat_map(|map| map.keys().cloned()).collect();
        let manifest: Self = serde_json::from_value(value).map_err(|e| damaged(&path, &e))?;
        match &manifest.sha256 {
            Some(hash) if !is_whole(&text, hash) => {
                let what = "the manifest is not as it was written: it does not match its own hash";
                return Err(Error::damaged(what, "export the run again").at(path.display()));
            }
            Some(_) => {}
            // A manifest without the key is an earlier version's, and not one whose key is misspelt.
            None => {
                let known = serde_json::to_value(&manifest).map_err(|e| damaged(&path, &e))?;
                let stranger = keys.iter().find(|key| known.get(key).is_none() && *key != "parity");
                if let Some(key) = stranger {
                    let error = serde::de::Error::custom(format!("it has a key `{key}`"));
                    return Err(damaged(&path, &error));
                }
            }
        }
        Ok(Some(manifest))
    }

    /// Writes `dir/manifest.json`.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(MANIFEST_FILE);
        let blank = Self { sha256: Some(BLANK.to_owned()), ..self.clone() };
        let text = serde_json::to_string_pretty(&blank)
            .map_err(|e| Error::failed(format!("cannot encode the manifest: {e}")))?;
        let text = text + "\n";
        let text = sealed(&text).unwrap_or(text);
        std::fs::write(&path, text).map_err(|e| Error::io("write", &path, &e))
    }
}

/// Whether a file holds tensors under their names, or says which file does.
pub(super) fn is_weights(name: &str) -> bool {
    name.starts_with("model") && name.contains(".safetensors")
}

fn damaged(path: &Path, error: &serde_json::Error) -> Error {
    Error::damaged(format!("the manifest is damaged: {error}"), "export the run again")
        .at(path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_without_a_format_is_of_text() {
        let text = r#"{"trained": 2.0, "exported": 2.0, "tokens": 3, "context": 4,
            "data_sha256": "ab"}"#;
        let record: ParityRecord = serde_json::from_str(text).unwrap();
        assert_eq!(record.reading, Reading::default());
    }
}
