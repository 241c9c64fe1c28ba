//! A model that another program packed, or that is not packed, on its way into a format: its codes as they
//! are where they stand for the weights exactly, and else a refusal.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::folder::{OpenModel, open_float};
use super::formats::Format;
use super::parts::Quantized;
use super::record::Provenance;
use crate::error::{Error, Result};
use crate::model::ModelConfig;
use crate::quant::QuantizedWeight;
use crate::store::folder::sha256_file;
use crate::store::hex;
use crate::store::safetensors::Checkpoint;

/// What is said of weights that another program quantized.
const METHOD: &str = "imported";

/// The parts of an opened model that fewbit did not pack.
pub(super) struct Foreign<'a> {
    opened: &'a OpenModel,
    names: Vec<String>,
    /// Its tensors as floats, decoded one at a time.
    pub(super) source: Checkpoint,
    /// The folder of its small files.
    pub(super) dir: PathBuf,
}

impl<'a> Foreign<'a> {
    /// Of a model that goes into `format`; one of floats takes the weights that codes stand for.
    ///
    /// # Errors
    /// As [`open_float`].
    pub(super) fn new(opened: &'a OpenModel, format: Format) -> Result<Self> {
        let (config, source, dir) = open_float(&opened.dir)?;
        let coded = |name: &String| format != Format::Dequantized && opened.is_coded(name);
        let mut names: Vec<String> = linears(&config).filter(coded).collect();
        names.sort();
        Ok(Self { opened, names, source, dir })
    }

    /// Where it came from: its name, and the hash of its files.
    ///
    /// # Errors
    /// I/O errors.
    pub(super) fn provenance(&self, device: &str) -> Result<Provenance> {
        let mut hash = Sha256::new();
        // A GGUF file that stands alone says itself what the model is.
        let config = self.opened.dir.join("config.json");
        if config.is_file() {
            hash.update(sha256_file(&config)?);
        }
        for file in self.source.files() {
            hash.update(sha256_file(file)?);
        }
        Ok(Provenance {
            model: name_of(&self.opened.dir),
            model_sha256: hex(&hash.finalize()),
            data_sha256: BTreeMap::new(),
            recipe: String::new(),
            seed: 0,
            device: device.to_owned(),
        })
    }
}

fn linears(config: &ModelConfig) -> impl Iterator<Item = String> {
    let head = (!config.tied).then(|| config.head().to_owned());
    config.linears().map(|(name, _)| name).chain(head)
}

/// The last part of a path, without the end of a GGUF file.
fn name_of(path: &Path) -> String {
    let name = if path.is_file() { path.file_stem() } else { path.file_name() };
    name.unwrap_or_default().to_string_lossy().into_owned()
}

impl Quantized for Foreign<'_> {
    fn names(&self) -> Vec<&str> {
        self.names.iter().map(String::as_str).collect()
    }

    fn linear(&self, name: &str) -> Result<(QuantizedWeight, String)> {
        match self.opened.codes_of_others(name)? {
            Some(weight) => Ok((weight, METHOD.to_owned())),
            None => Err(Error::preflight(
                "its levels are not `scale * (code - zero)` in 32 bits, so no other format holds \
                 these weights exactly as codes",
            )
            .at(format!("{name}, {}", self.opened.dir.display()))
            .fix("format.dequantized, or a training that starts from this model")),
        }
    }
}
