//! The model between stages: what it was read from, what stages have made of it, and the weights that
//! both give.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::export::{ActivationRecord, OpenModel};
use crate::model::{ModelConfig, ModelTap, WeightSource};
use crate::quant::{Bits, QuantizedWeight};
use crate::store::HostTensor;
use crate::store::safetensors::Checkpoint;

/// What a packed model is called before any stage has changed it.
pub const BASE: &str = "base";

/// Where the latent of a linear lies.
#[derive(Clone, Debug)]
pub struct LatentFile(pub(super) PathBuf);

/// The model between stages.
pub struct ModelState {
    /// The source folder.
    pub dir: PathBuf,
    /// The name it goes by.
    pub name: String,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tensors: float, or where `packed` says so the codes of a folder of ours.
    pub checkpoint: Checkpoint,
    /// The packed folder that the run starts from, when it does.
    pub packed: Option<OpenModel>,
    /// The float model behind a packed one, for teachers and baselines.
    pub teacher: Option<Checkpoint>,
    /// Quantized linears by full name, with the method that made each.
    pub quantized: BTreeMap<String, (QuantizedWeight, String)>,
    /// Where the latent weights of quantized linears lie, by full name, for stages that go on.
    pub latents: BTreeMap<String, LatentFile>,
    /// Dense tensors that a stage changed on the way to quantized ones, by name.
    pub dense: BTreeMap<String, HostTensor>,
    /// Float tensors that fine-tuning left, by name: with them the checkpoint is the float model that
    /// later stages quantize and compare with.
    pub tuned: BTreeMap<String, HostTensor>,
    /// What is done to activations once something is quantized, and the grids calibrated so far.
    pub activations: ActivationRecord,
    /// The width at which the current stage reads linears whose planes serve several; absent: the widest.
    pub width: Option<Bits>,
}

impl ModelState {
    /// The float model.
    ///
    /// # Errors
    /// When the run starts from packed codes and names none.
    pub fn float(&self) -> Result<&Checkpoint> {
        match (&self.teacher, &self.packed) {
            (Some(teacher), _) => Ok(teacher),
            (None, None) => Ok(&self.checkpoint),
            (None, Some(packed)) => {
                // The plan has refused what needs it.
                Err(Error::failed("there is no float model beside the packed one")
                    .at(packed.dir.display()))
            }
        }
    }

    /// A float checkpoint with what fine-tuning made of it.
    pub(crate) fn tuned_on<'a>(&'a self, checkpoint: &'a Checkpoint) -> Tuned<'a> {
        Tuned { checkpoint, tuned: &self.tuned }
    }

    /// Whether embedding, final norm and head are those of the float model.
    pub(super) fn has_float_ends(&self) -> bool {
        let outside = |name: &String| self.config.inner(name).is_none();
        self.packed.is_none()
            && self.teacher.is_none()
            && !self.quantized.contains_key(self.config.head())
            && !self.dense.keys().any(outside)
    }

    /// A tensor that a stage has left dense.
    fn left(&self, name: &str) -> Option<&HostTensor> {
        self.dense.get(name).or_else(|| self.tuned.get(name))
    }

    /// A quantized linear as the current stage reads it.
    ///
    /// # Errors
    /// When its planes serve several widths, and not that of the stage.
    pub fn now(&self, linear: &str) -> Result<Option<Cow<'_, QuantizedWeight>>> {
        let Some((weight, _)) = self.quantized.get(linear) else { return Ok(None) };
        match self.width.filter(|_| !weight.nested.is_empty()) {
            None => Ok(Some(Cow::Borrowed(weight))),
            Some(width) => Ok(Some(Cow::Owned(weight.at(width).map_err(|e| e.at(linear))?))),
        }
    }

    /// Takes the codes of the packed folder that the run starts from, if it does.
    ///
    /// # Errors
    /// When they are damaged.
    pub fn take_packed(&mut self) -> Result<()> {
        let Some(packed) = &self.packed else { return Ok(()) };
        for (name, record) in packed.linears() {
            if let Some(weight) = packed.quantized(name)? {
                self.quantized.insert(name.clone(), (weight, record.method.clone()));
            }
        }
        Ok(())
    }

    /// What the current model does to activations: nothing while every linear is float.
    pub fn tap(&self) -> ModelTap {
        if self.quantized.is_empty() { ModelTap::default() } else { self.activations.tap() }
    }
}

/// The current weights: the checkpoint with the quantized linears in place.
impl WeightSource for ModelState {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        match (self.now(linear)?, self.left(name)) {
            (Some(weight), _) => Ok(weight.dequantize()),
            (None, Some(tensor)) => tensor.to_f32().map_err(|e| e.at(name)),
            (None, None) => self.checkpoint.weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name) || self.left(name).is_some()
    }

    fn overrides(&self, name: &str) -> bool {
        self.quantized.contains_key(name)
    }
}

/// See [`ModelState::tuned_on`].
pub(crate) struct Tuned<'a> {
    checkpoint: &'a Checkpoint,
    tuned: &'a BTreeMap<String, HostTensor>,
}

impl WeightSource for Tuned<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        match self.tuned.get(name) {
            Some(tensor) => tensor.to_f32().map_err(|e| e.at(name)),
            None => self.checkpoint.weight(name, shape),
        }
    }

    fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name) || self.tuned.contains_key(name)
    }
}

/// The current weights, quantized linears as their codes.
pub(crate) struct Packed<'a>(pub(crate) &'a ModelState);

impl WeightSource for Packed<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.weight(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn coded(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        Ok(self.0.now(name)?.map(Cow::into_owned))
    }

    fn overrides(&self, name: &str) -> bool {
        self.0.overrides(name)
    }
}
