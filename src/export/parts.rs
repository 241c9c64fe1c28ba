//! What goes into an export: a model's tensors, the quantized ones one at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::activations::ActivationRecord;
use super::approximate::Loss;
use super::record::{LinearRecord, Provenance, all_tensor_names};
use crate::error::{Error, Result};
use crate::model::{ModelConfig, Place, Places, WeightSource, weight_name};
use crate::quant::QuantizedWeight;
use crate::store::safetensors::Checkpoint;
use crate::store::{HostTensor, TensorSource};

/// The quantized linears of a model, read one at a time.
pub trait Quantized {
    /// Their names, in ascending order.
    fn names(&self) -> Vec<&str>;

    /// One of them, with the method that trained it.
    ///
    /// # Errors
    /// When it cannot be read.
    fn linear(&self, name: &str) -> Result<(QuantizedWeight, String)>;
}

impl Quantized for BTreeMap<String, (QuantizedWeight, String)> {
    fn names(&self) -> Vec<&str> {
        self.keys().map(String::as_str).collect()
    }

    fn linear(&self, name: &str) -> Result<(QuantizedWeight, String)> {
        self.get(name).cloned().ok_or_else(|| Error::failed("the linear is not quantized").at(name))
    }
}

/// What goes into an export.
pub struct ModelParts<'a> {
    /// The source model's folder.
    pub dir: &'a Path,
    /// Its tensors.
    pub source: &'a Checkpoint,
    /// Its quantized linears.
    pub quantized: &'a dyn Quantized,
    /// Dense tensors that are no longer the source's, by name.
    pub dense: &'a BTreeMap<String, HostTensor>,
    /// What happens to activations, where anything does.
    pub activations: Option<ActivationRecord>,
    /// Where all of it came from.
    pub provenance: Provenance,
}

impl ModelParts<'_> {
    /// Every tensor of the export by the name the source has, or would have, for it.
    pub(super) fn names(&self, config: &ModelConfig) -> BTreeSet<String> {
        let linears = self.quantized.names();
        // A packed source holds the parts of its codes under names of their own.
        let parts: BTreeSet<String> =
            linears.iter().flat_map(|linear| all_tensor_names(linear)).collect();
        // What the model does not use, an export does not hold.
        let places = Places::new(config);
        let kept = |name: &&str| matches!(places.of(name), Place::Used | Place::Beside);
        let head = weight_name(config.head());
        let alone = |name: &&str| **name == head && !self.source.contains(&config.embedding());
        let source = self.source.names().into_iter().filter(|name| kept(name) || alone(name));
        source
            .map(str::to_owned)
            .filter(|name| !parts.contains(name))
            .chain(self.dense.keys().cloned())
            .chain(linears.into_iter().map(weight_name))
            .collect()
    }

    /// A tensor that is not quantized.
    pub(super) fn dense(&self, name: &str) -> Result<HostTensor> {
        match self.dense.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => self.source.read(name),
        }
    }
}

/// A linear on its way into a file.
pub struct Stored {
    /// The codes and the grid that are stored.
    pub weight: QuantizedWeight,
    /// The method that trained it.
    pub method: String,
    /// The weights that a reader computes from the file.
    pub decoded: Vec<f32>,
    /// What differs from the trained weights; only where a loss is allowed.
    pub loss: Option<Loss>,
}

impl Stored {
    /// Its record; `tensors` are what the file gets.
    pub(super) fn record(&self, tensors: &[(String, HostTensor)]) -> LinearRecord {
        let record = LinearRecord::new(&self.weight, &self.method, &self.decoded, tensors);
        LinearRecord { loss: self.loss, ..record }
    }
}
