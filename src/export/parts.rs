//! What goes into an export: a model's tensors, the quantized ones one at a time, and what a format
//! makes of each.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::approximate::{self, Loss};
use super::packed::Packer;
use super::{ActivationRecord, Format, FormatsConfig, LinearRecord, OpenModel, Provenance, fewbit};
use burn::tensor::Device;

use crate::error::{Error, Result};
use crate::export::gguf::model as gguf;
use crate::model::{ModelConfig, Place, Places, WeightSource, weight_name};
use crate::quant::{QuantizedWeight, Symmetry};
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

/// A packed folder, with its adapter's scales where it has one.
impl Quantized for OpenModel {
    fn names(&self) -> Vec<&str> {
        self.linears().map(|(name, _)| name.as_str()).collect()
    }

    fn linear(&self, name: &str) -> Result<(QuantizedWeight, String)> {
        let record = self.linears().find(|(linear, _)| *linear == name);
        let (Some((_, record)), Some(weight)) = (record, self.quantized(name)?) else {
            return Err(Error::failed("the folder has no codes of this linear").at(name));
        };
        let tuned = self.adapter.as_ref().filter(|adapter| adapter.scales(name).is_some());
        let method = tuned.map_or(&record.method, |adapter| &adapter.head().method);
        Ok((weight, method.clone()))
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
    /// What formats are asked to do.
    pub options: FormatsConfig,
    /// Where all of it came from.
    pub provenance: Provenance,
}

impl ModelParts<'_> {
    /// Every tensor of the export by the name the source has, or would have, for it.
    fn names(&self, config: &ModelConfig) -> BTreeSet<String> {
        let linears = self.quantized.names();
        // A packed source holds the parts of its codes under names of their own.
        let parts: BTreeSet<String> =
            linears.iter().flat_map(|linear| fewbit::tensor_names(linear)).collect();
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
    fn dense(&self, name: &str) -> Result<HostTensor> {
        match self.dense.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => self.source.read(name),
        }
    }
}

/// A linear on its way into a file.
pub(super) struct Stored {
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

/// A model in one format: which tensors, under which names, in which codes.
pub(super) struct Writing<'a> {
    pub parts: &'a ModelParts<'a>,
    pub format: Format,
    /// Where what may change is rounded.
    device: &'a Device,
    pub config: ModelConfig,
    /// The packer of a format in safetensors that is another runtime's.
    pub packer: Option<Packer>,
    names: BTreeSet<String>,
    linears: BTreeSet<String>,
    /// Embedding and head that this format quantizes too, by the name they get.
    embeddings: BTreeMap<String, String>,
}

impl<'a> Writing<'a> {
    /// Looks at every linear once, before anything is written.
    ///
    /// # Errors
    /// When the format cannot hold the model.
    pub(super) fn new(
        parts: &'a ModelParts<'a>,
        format: Format,
        device: &'a Device,
    ) -> Result<Self> {
        let dense = matches!(format, Format::Fewbit | Format::Dequantized);
        if parts.activations.is_some() && !dense {
            return Err(Error::preflight(format!(
                "format.{} holds weights alone, and this model quantizes activations too",
                format.name()
            ))
            .fix("format.fewbit, which records them"));
        }
        let config =
            ModelConfig::read(parts.dir)?.with_names_of(|name| parts.source.info(name).is_some());
        let mut writing = Self {
            parts,
            format,
            device,
            packer: None,
            names: parts.names(&config),
            config,
            linears: parts.quantized.names().into_iter().map(str::to_owned).collect(),
            embeddings: BTreeMap::new(),
        };
        let head = weight_name(writing.config.head());
        let doubled = writing.contains(&writing.config.embedding());
        if !dense && writing.config.tied && !writing.unties() && doubled {
            // Other runtimes take the embedding for the head, and a second copy for a fault.
            writing.names.remove(&head);
        }
        if parts.options.embeddings(format).is_some() {
            writing.embeddings = writing.embedding_names();
        }
        if !dense && format != Format::Gguf && writing.linears().next().is_none() {
            return Err(Error::preflight(format!(
                "nothing of this model is quantized, and format.{} holds quantized weights",
                format.name()
            ))
            .fix("format.dequantized or format.gguf"));
        }
        if !(dense || format == Format::Gguf) {
            writing.packer = Some(Packer::new(&writing)?);
        }
        Ok(writing)
    }

    /// Embedding and head that are not quantized yet: stored name to source's name.
    fn embedding_names(&self) -> BTreeMap<String, String> {
        let names = [self.config.embedding(), weight_name(self.config.head())];
        let dense = names.into_iter().filter(|name| self.names.contains(name));
        dense
            .filter(|name| !self.linears.contains(linear_of(name)))
            .map(|name| (linear_of(&self.stored_as(&name)).to_owned(), name.clone()))
            .collect()
    }

    /// Quantized linears by the name they are stored under, embedding and head included.
    pub(super) fn linears(&self) -> impl Iterator<Item = &str> {
        self.linears.iter().chain(self.embeddings.keys()).map(String::as_str)
    }

    /// Names of the tensors that stay dense, as the source has them.
    pub(super) fn dense_names(&self) -> impl Iterator<Item = &str> {
        let embedded = |name: &String| self.embeddings.values().any(|taken| taken == name);
        let dense = self.names.iter().filter(|name| !self.linears.contains(linear_of(name)));
        dense.filter(move |name| !embedded(name)).map(String::as_str)
    }

    /// Whether the source, or a stage, has a tensor of this name.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// A tensor that is not quantized, as the format stores it.
    ///
    /// # Errors
    /// When it cannot be read, or would be rounded without leave.
    pub(super) fn dense(&self, name: &str) -> Result<HostTensor> {
        let tensor = self.parts.dense(name)?;
        match (&self.parts.options.dequantized, self.format) {
            (Some(options), Format::Dequantized) => options.dense(name, tensor),
            _ => Ok(tensor),
        }
    }

    /// The name under which a tensor that is not quantized is stored: other runtimes look for a
    /// tied model's one matrix under the embedding's name.
    pub(super) fn stored_as(&self, name: &str) -> String {
        let ours = matches!(self.format, Format::Fewbit | Format::Dequantized);
        let head = name == weight_name(self.config.head()) && !self.unties();
        let embedding = self.config.embedding();
        if ours || !head || self.names.contains(&embedding) || !self.config.tied {
            return name.to_owned();
        }
        embedding
    }

    /// A tensor as a folder of the family's stores it: some hold matrices with rows for columns.
    ///
    /// # Errors
    /// When such a tensor is no matrix.
    pub(super) fn laid_out(&self, name: &str, tensor: HostTensor) -> Result<HostTensor> {
        let inner = self.config.inner(linear_of(name)).filter(|_| name.ends_with(".weight"));
        match inner.and_then(|(_, inner)| self.config.linear(inner)) {
            Some(spec) if spec.columns => tensor.transposed(),
            _ => Ok(tensor),
        }
    }

    /// Whether a tied model gets a head of its own.
    pub(super) fn unties(&self) -> bool {
        self.linears.contains(self.config.head())
    }

    /// Linears and embeddings that stay as they are, for a config to list.
    pub(super) fn unquantized(&self) -> Vec<String> {
        let embedding = linear_of(&self.config.embedding()).to_owned();
        let linears = self.config.linears().map(|(name, _)| name);
        let all = linears.chain([self.config.head().to_owned(), embedding]);
        let taken: BTreeSet<&str> = self.linears().collect();
        all.filter(|name| !taken.contains(name.as_str())).collect()
    }

    /// A linear as trained, with the method that did it.
    pub(super) fn trained(&self, linear: &str) -> Result<(QuantizedWeight, String)> {
        self.parts.quantized.linear(linear)
    }

    /// What the file gets for a linear.
    ///
    /// # Errors
    /// When the format cannot hold it, or only with a loss that nobody allowed.
    pub(super) fn stored(&self, linear: &str) -> Result<Stored> {
        match &self.packer {
            Some(packer) => self.stored_by(packer, linear),
            None => self.stored_with(None, linear),
        }
    }

    /// As [`Writing::stored`], by a packer that is not yet this one's.
    ///
    /// # Errors
    /// As [`Writing::stored`].
    pub(super) fn stored_by(&self, packer: &Packer, linear: &str) -> Result<Stored> {
        self.stored_with(Some(packer), linear)
    }

    /// Whether a stored linear is the embedding or the head, which no stage quantized.
    pub(super) fn is_embedding(&self, linear: &str) -> bool {
        self.embeddings.contains_key(linear)
    }

    fn stored_with(&self, packer: Option<&Packer>, linear: &str) -> Result<Stored> {
        if let Some(name) = self.embeddings.get(linear) {
            return self.embedding(packer, linear, name);
        }
        let (trained, method) = self.trained(linear)?;
        let lossy = self.parts.options.lossy(self.format);
        let weight = match (packer, self.format) {
            (Some(packer), _) if lossy => {
                let accepts = |weight: &QuantizedWeight| packer.encode(linear, weight).map(drop);
                approximate::nearest(&trained, self.device, &accepts)?
            }
            (None, Format::Gguf) if lossy => {
                let accepts =
                    |weight: &QuantizedWeight| gguf::choose(linear, weight, &self.config).map(drop);
                approximate::nearest(&trained, self.device, &accepts)?
            }
            _ => trained.clone(),
        };
        let decoded = self.decoded(packer, linear, &weight)?;
        let loss = Loss::between(&trained.dequantize(), &decoded);
        Ok(Stored { weight, method, decoded, loss })
    }

    /// The embedding or the head, rounded to the nearest.
    fn embedding(&self, packer: Option<&Packer>, linear: &str, name: &str) -> Result<Stored> {
        let tensor = self.parts.dense(name)?;
        let values = tensor.to_f32().map_err(|e| e.at(name))?;
        let (Some(bits), &[out, inputs]) =
            (self.parts.options.embeddings(self.format), &tensor.shape[..])
        else {
            return Err(Error::failed("the embedding is no matrix").at(name));
        };
        let common = packer.and_then(Packer::common_group);
        let groups = common.into_iter().chain([64, 32]);
        let Some(group) = groups.into_iter().find(|group| inputs.is_multiple_of(*group)) else {
            return Err(Error::preflight(format!(
                "rows of {inputs} weights are no whole groups of 32"
            ))
            .at(name)
            .fix("leave embeddings out of format.mlx"));
        };
        let shape = [out, inputs];
        let width = (bits, Symmetry::Asymmetric);
        let weight = approximate::round_to_nearest(&values, shape, group, width, self.device)
            .map_err(|e| e.at(name))?;
        let decoded = self.decoded(packer, linear, &weight)?;
        let loss = Loss::between(&values, &decoded);
        Ok(Stored { weight, method: "rtn".to_owned(), decoded, loss })
    }

    /// The weights that a reader computes from what is stored for `weight`.
    fn decoded(
        &self,
        packer: Option<&Packer>,
        linear: &str,
        weight: &QuantizedWeight,
    ) -> Result<Vec<f32>> {
        match (packer, self.format, &self.parts.options.dequantized) {
            (Some(packer), ..) => packer.decoded(linear, weight),
            (None, Format::Dequantized, Some(_)) => {
                let shape = [weight.layout.out, weight.layout.inputs];
                self.typed(&weight_name(linear), shape, &weight.dequantize())?.to_f32()
            }
            _ => Ok(weight.dequantize()),
        }
    }

    /// Weights in the type of the dense format.
    ///
    /// # Errors
    /// When they would be rounded without leave.
    pub(super) fn typed(
        &self,
        name: &str,
        shape: [usize; 2],
        weights: &[f32],
    ) -> Result<HostTensor> {
        let tensor = HostTensor::f32(shape, weights);
        match &self.parts.options.dequantized {
            Some(options) => options.dense(name, tensor),
            None => Ok(tensor),
        }
    }

    /// What of a tensor that is not quantized is rounded.
    ///
    /// # Errors
    /// As [`Writing::dense`].
    pub(super) fn dense_loss(&self, name: &str) -> Result<Option<Loss>> {
        let options = self.parts.options.dequantized.as_ref();
        if self.format != Format::Dequantized || options.is_none_or(|options| !options.lossy) {
            return Ok(None);
        }
        let (source, stored) = (self.parts.dense(name)?, self.dense(name)?);
        Ok(Loss::between(&source.to_f32()?, &stored.to_f32()?))
    }
}

/// The linear that a weight belongs to.
fn linear_of(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

/// The weights of the re-opened folder are those that were meant, and nothing is missing.
///
/// # Errors
/// Exit code 5 where they are not.
pub(super) fn compare(writing: &Writing<'_>, opened: &OpenModel) -> Result<()> {
    let differs = |what: &str, name: &str| {
        Err(Error::gate(format!("the exported {what} is not what was trained"))
            .at(name)
            .fix("report this: nothing was written"))
    };
    for name in writing.linears() {
        let stored = writing.stored(name)?;
        if let Some(packed) = opened.quantized(name)?
            && packed != stored.weight
        {
            return differs("code or grid", name);
        }
        let shape = [stored.weight.layout.out, stored.weight.layout.inputs];
        let exported = opened.weight(&weight_name(name), &shape)?;
        if stored.decoded.iter().zip(&exported).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return differs("weight", name);
        }
    }
    let recorded = opened.manifest.as_ref().and_then(|m| m.activations.as_ref());
    if recorded != writing.parts.activations.as_ref() {
        return differs("grid of the activations", super::MANIFEST_FILE);
    }
    for name in writing.dense_names() {
        let tensor = writing.dense(name)?;
        let same = match opened.gguf_values(name, &tensor.shape) {
            Some(values) => values? == tensor.to_f32()?,
            None => opened.checkpoint.read(&writing.stored_as(name))? == tensor,
        };
        if !same {
            return differs("tensor", name);
        }
    }
    Ok(())
}
