//! What a format is, and a model on its way into one: which tensors, under which names, in which codes.
//!
//! Both stand in one file, longer than others, because each asks the other: the model being written asks
//! its format for what it stores, and a format that is one file asks the model for its tensors.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use burn::tensor::Device;
use serde_json::Value;

use super::approximate::{self, Loss};
use super::coded::{Coded, Layer, Tensors, most_common, stored_group};
use super::embeddings::{self, EmbeddingGrid, Embeddings};
use super::parts::{ModelParts, Stored};
use super::plan::{Holds, Reason};
use super::read::Reader;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, weight_name};
use crate::quant::{Bits, QuantizedWeight, Repr};
use crate::store::{HostTensor, TensorSource};

/// A format: the keys of `format.NAME` in a recipe.
pub trait FileFormat: Named {
    /// What it is, in a few words.
    fn about(&self) -> &'static str;

    /// Whether weights may change; by how much is reported.
    fn lossy(&self) -> bool {
        false
    }

    /// How it is written.
    fn kind(&self) -> Kind<'_>;
}

/// The name in recipes, which is the folder under `export/` too; `formats!` gives it.
pub trait Named {
    /// The name.
    fn name(&self) -> &'static str;
}

/// How a format is written.
#[derive(Clone, Copy)]
pub enum Kind<'a> {
    /// In safetensors, whatever fewbit trains, under the names that the source has.
    Own(&'a dyn OwnFormat),
    /// In safetensors, the codes of each linear as another runtime reads them.
    Packed(&'a dyn PackedFormat),
    /// As one file.
    File(&'a dyn SingleFile),
}

/// A format that holds whatever fewbit trains.
pub trait OwnFormat {
    /// The tensors of linear `name`.
    ///
    /// # Errors
    /// When they would be rounded without leave.
    fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors>;

    /// A tensor that is not quantized, as the format stores it.
    ///
    /// # Errors
    /// As [`OwnFormat::encode`].
    fn dense(&self, _name: &str, tensor: HostTensor) -> Result<HostTensor> {
        Ok(tensor)
    }

    /// The weights that a reader computes.
    ///
    /// # Errors
    /// As [`OwnFormat::encode`].
    fn decoded(&self, _name: &str, weight: &QuantizedWeight) -> Result<Vec<f32>> {
        Ok(weight.dequantize())
    }

    /// Puts what the format has to say into `config.json`; `unties` when a tied model gets a head of
    /// its own.
    fn configure(&self, config: &mut Value, unties: bool);
}

/// A format of another runtime that packs codes: the planner asks it what it holds.
pub trait PackedFormat: Named {
    /// What it is, in a few words.
    fn about(&self) -> &'static str;

    /// Whether weights may change; by how much is reported.
    fn lossy(&self) -> bool;

    /// What it holds.
    fn holds(&self) -> &'static Holds;

    /// Whether its readers want the experts of a block as one tensor, which fewbit does not write.
    fn stacks_experts(&self) -> bool {
        false
    }

    /// Why it cannot hold the values of a weight that [`Holds`] has nothing against.
    fn wrong_values(&self, _weight: &Coded<'_>) -> Option<Reason> {
        None
    }

    /// What it is asked to store embedding and head as.
    fn embeddings(&self) -> Option<Embeddings> {
        None
    }

    /// How it rounds embedding and head, in rows of so many inputs, to so many bits; `None` where it
    /// cannot. `common` is the group of most linears.
    fn embedding_grid(
        &self,
        _bits: Bits,
        _inputs: usize,
        _common: Option<usize>,
    ) -> Option<EmbeddingGrid> {
        None
    }

    /// What packs a model of these linears.
    ///
    /// # Errors
    /// When the format cannot state what they are.
    fn packer(&self, linears: &[Layer]) -> Result<Box<dyn Packer>>;

    /// How its folders are read.
    fn reader(&self) -> &'static Reader;
}

/// What of a model stays as it is, for a config to list.
#[derive(Debug, Default)]
pub struct Dense {
    /// Linears of the blocks, embedding and head by their names.
    pub linears: Vec<String>,
    /// Parts of other models in the same file, an image encoder for instance: loaders would take their
    /// linears for packed ones.
    pub parts: Vec<String>,
}

/// What the head is called in a model that transformers has loaded.
const LOADED_HEAD: &str = "lm_head";

/// A packed format with the settings that suit a model.
pub trait Packer {
    /// The tensors of linear `name`, which the planner has put into codes of the format.
    ///
    /// # Errors
    /// When the settings do not hold it exactly.
    fn pack(&self, name: &str, weight: &Coded<'_>) -> Result<Tensors>;

    /// The weights that a reader computes, where they are not those that the codes stand for.
    fn computed(&self, _weight: &Coded<'_>) -> Option<Vec<f32>> {
        None
    }

    /// The `quantization_config` of a model of these linears; `dense` names what stays as it is, the
    /// embedding among it.
    ///
    /// # Errors
    /// When the format cannot state what the linears are.
    fn section(&self, linears: &[Layer], dense: &Dense) -> Result<Value>;

    /// Where else in `config.json` the section stands.
    fn section_name(&self) -> Option<&'static str> {
        None
    }
}

impl<T: PackedFormat> FileFormat for T {
    fn about(&self) -> &'static str {
        PackedFormat::about(self)
    }

    fn lossy(&self) -> bool {
        PackedFormat::lossy(self)
    }

    fn kind(&self) -> Kind<'_> {
        Kind::Packed(self)
    }
}

/// A format that is one file for a whole model.
pub trait SingleFile {
    /// The file's name.
    fn file(&self) -> &'static str;

    /// The bits that a weight of linear `name` of a model takes.
    ///
    /// # Errors
    /// Why it does not hold the linear.
    fn accepts(&self, name: &str, weight: &QuantizedWeight, model: &ModelConfig) -> Result<f64>;

    /// What it is asked to store embedding and head as.
    fn embeddings(&self) -> Option<Embeddings>;

    /// As [`PackedFormat::embedding_grid`].
    fn embedding_grid(&self, bits: Bits, inputs: usize) -> Option<EmbeddingGrid>;

    /// Whether it has a name for every tensor of a model, and all else that it needs of its folder.
    ///
    /// # Errors
    /// What is missing.
    fn fits(&self, writing: &Writing<'_>) -> Result<()>;

    /// Writes the file into `dir`; `done` hears of each linear. Gives the bits that the quantized
    /// weights take.
    ///
    /// # Errors
    /// As [`SingleFile::accepts`]; I/O errors.
    fn write(
        &self,
        writing: &Writing<'_>,
        dir: &Path,
        done: &mut dyn FnMut(&str, &Stored),
    ) -> Result<f64>;
}

/// A packed format with its packer, behind the planner.
struct Planned<'a> {
    name: &'static str,
    format: &'a dyn PackedFormat,
    packer: Box<dyn Packer>,
    /// The linears as they are stored.
    linears: Vec<Layer>,
    /// The group length of most linears as trained, among those that every format has.
    group: Option<usize>,
    others: &'a [Box<dyn FileFormat>],
}

impl Planned<'_> {
    /// The tensors of a linear.
    ///
    /// # Errors
    /// When the format cannot hold it exactly; says what would be lost and what to take instead.
    fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        let coded = self.coded(name, weight)?;
        if let Some(reason) = refuses(self.format, self.name, &coded) {
            let packed = self.others.iter().filter_map(|other| match other.kind() {
                Kind::Packed(format) if other.name() != self.name => Some((other.name(), format)),
                _ => None,
            });
            let mut packed: Vec<(&str, &dyn PackedFormat)> = packed.collect();
            packed.sort_by_key(|(_, format)| format.holds().rank);
            let holds = |(name, format): (&'static str, &dyn PackedFormat)| {
                refuses(format, name, &coded).is_none().then_some(name)
            };
            return Err(reason.error(name, packed.into_iter().filter_map(holds)));
        }
        self.packer.pack(name, &self.format.holds().stored(&coded))
    }

    fn coded<'w>(&self, name: &str, weight: &'w QuantizedWeight) -> Result<Coded<'w>> {
        let view = if self.format.holds().planes { Coded::new } else { Coded::uniform };
        view(name, weight)
    }
}

/// Why a format cannot hold a weight exactly; `None` when it can.
pub(super) fn refuses(format: &dyn PackedFormat, name: &str, weight: &Coded<'_>) -> Option<Reason> {
    format.holds().refuses(name, weight).or_else(|| format.wrong_values(weight))
}

/// A model in one format.
pub struct Writing<'a> {
    /// What goes into it.
    pub parts: &'a ModelParts<'a>,
    /// The format.
    pub format: &'a dyn FileFormat,
    /// What the model is.
    pub config: ModelConfig,
    /// Where what may change is rounded.
    device: &'a Device,
    /// What packs codes, in a packed format.
    planned: Option<Planned<'a>>,
    names: BTreeSet<String>,
    linears: BTreeSet<String>,
    /// Embedding and head that this format quantizes too, by the name they get.
    embeddings: BTreeMap<String, String>,
}

impl Kind<'_> {
    /// What embedding and head are asked to be stored as.
    fn embeddings(&self) -> Option<Embeddings> {
        match self {
            Self::Own(_) => None,
            Self::Packed(format) => format.embeddings(),
            Self::File(format) => format.embeddings(),
        }
    }
}

impl<'a> Writing<'a> {
    /// Looks at every linear once, before anything is written. Of `all` formats, a refusal recommends
    /// those that hold the weight.
    ///
    /// # Errors
    /// When the format cannot hold the model.
    pub(super) fn new(
        parts: &'a ModelParts<'a>,
        format: &'a dyn FileFormat,
        all: &'a [Box<dyn FileFormat>],
        device: &'a Device,
    ) -> Result<Self> {
        let (own, name) = (matches!(format.kind(), Kind::Own(_)), format.name());
        if parts.activations.is_some() && !own {
            return Err(Error::preflight(format!(
                "format.{name} holds weights alone, and this model quantizes activations too"
            ))
            .fix("format.fewbit, which records them"));
        }
        let config =
            ModelConfig::read(parts.dir)?.with_names_of(|name| parts.source.info(name).is_some());
        let mut writing = Self {
            parts,
            format,
            device,
            planned: None,
            names: parts.names(&config),
            config,
            linears: parts.quantized.names().into_iter().map(str::to_owned).collect(),
            embeddings: BTreeMap::new(),
        };
        let head = weight_name(writing.config.head());
        let doubled = writing.contains(&writing.config.embedding());
        if !own && writing.config.tied && !writing.unties() && doubled {
            // Other runtimes take the embedding for the head, and a second copy for a fault.
            writing.names.remove(&head);
        }
        if let Some(Embeddings::Codes(_)) = format.kind().embeddings() {
            writing.embeddings = writing.embedding_names();
        }
        if let Kind::Packed(packed) = format.kind() {
            writing.plan(packed, all)?;
        }
        Ok(writing)
    }

    /// Finds the settings of a packed format that suit the model.
    fn plan(
        &mut self,
        format: &'a dyn PackedFormat,
        others: &'a [Box<dyn FileFormat>],
    ) -> Result<()> {
        let name = self.format.name();
        if format.stacks_experts() && self.config.arch.experts.is_some() {
            let what = format!(
                "format.{name} holds the experts of a block as one tensor, and fewbit does not write that yet"
            );
            return Err(Error::preflight(what).fix(
                "format.fewbit, format.dequantized, or a format with a tensor for each expert",
            ));
        }
        if self.linears().next().is_none() {
            return Err(Error::preflight(format!(
                "nothing of this model is quantized, and format.{name} holds quantized weights"
            ))
            .fix("format.dequantized or format.gguf"));
        }
        let holds = format.holds();
        // What is stored of a linear that may change, or of an embedding, depends on what suits
        // all, and that on what is stored: the linears as trained decide first.
        let trained = self.linears.iter().map(|name| {
            let (weight, _) = self.trained(name)?;
            if weight.grid.repr() == Repr::Codebook && !format.lossy() {
                Coded::new(name, &weight)?;
            }
            Ok(holds.layer(name, &weight))
        });
        let trained: Vec<Layer> = trained.collect::<Result<_>>()?;
        let groups = trained.iter().map(|l| stored_group(l.group_len, &approximate::GROUPS));
        let group = most_common(&groups.flatten().collect::<Vec<_>>());
        let packer = format.packer(&trained)?;
        self.planned = Some(Planned { name, format, packer, linears: trained, group, others });
        if self.format.lossy() || !self.embeddings.is_empty() {
            let stored =
                self.linears().map(|name| Ok(holds.layer(name, &self.stored(name)?.weight)));
            let linears: Vec<Layer> = stored.collect::<Result<_>>()?;
            let packer = format.packer(&linears)?;
            self.planned = Some(Planned { name, format, packer, linears, group, others });
        }
        Ok(())
    }

    /// Embedding and head that are not quantized yet: stored name to source's name.
    fn embedding_names(&self) -> BTreeMap<String, String> {
        let names = [self.config.embedding(), weight_name(self.config.head())];
        let dense = names.into_iter().filter(|name| self.is_embedding(name));
        dense.map(|name| (linear_of(&self.stored_as(&name)).to_owned(), name.clone())).collect()
    }

    /// Whether a tensor is the embedding or the head, and not quantized.
    fn is_embedding(&self, name: &str) -> bool {
        (name == self.config.embedding() || name == weight_name(self.config.head()))
            && self.names.contains(name)
            && !self.linears.contains(linear_of(name))
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
        match (self.format.kind(), self.format.kind().embeddings()) {
            (Kind::Own(format), _) => format.dense(name, tensor),
            (_, Some(Embeddings::Floats(kind))) if self.is_embedding(name) => {
                embeddings::as_floats(name, &tensor, kind)
            }
            _ => Ok(tensor),
        }
    }

    /// The name under which a tensor that is not quantized is stored: other runtimes look for a
    /// tied model's one matrix under the embedding's name.
    pub(super) fn stored_as(&self, name: &str) -> String {
        let own = matches!(self.format.kind(), Kind::Own(_));
        let head = name == weight_name(self.config.head()) && !self.unties();
        let embedding = self.config.embedding();
        if own || !head || self.names.contains(&embedding) || !self.config.tied {
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

    /// What stays as it is, for a config to list.
    fn unquantized(&self) -> Dense {
        let (config, taken) = (&self.config, self.linears().collect::<BTreeSet<&str>>());
        let embedding = linear_of(&config.embedding()).to_owned();
        let linears = config.linears().map(|(name, _)| name);
        let all = linears.chain([config.head().to_owned(), embedding]);
        let mut linears: Vec<String> = all.filter(|name| !taken.contains(name.as_str())).collect();
        let names = &config.arch.names;
        let between = names.projections.into_iter().flatten();
        linears.extend(between.map(|name| format!("{}{name}", names.root)));
        // transformers calls every head so, whatever its checkpoints do.
        if linears.iter().any(|name| name == config.head()) && config.head() != LOADED_HEAD {
            linears.push(LOADED_HEAD.to_owned());
        }
        let held = |start: &&&str| self.names.iter().any(|name| name.starts_with(**start));
        let beside = names.beside.iter().filter(held);
        let part = |start: &&str| {
            let name = start.trim_end_matches('.');
            name.rsplit('.').next().unwrap_or(name).to_owned()
        };
        Dense { linears, parts: beside.map(part).collect() }
    }

    /// A linear as trained, with the method that did it.
    fn trained(&self, linear: &str) -> Result<(QuantizedWeight, String)> {
        self.parts.quantized.linear(linear)
    }

    /// What the file gets for a linear.
    ///
    /// # Errors
    /// When the format cannot hold it, or only with a loss that nobody allowed.
    pub(super) fn stored(&self, linear: &str) -> Result<Stored> {
        if let Some(name) = self.embeddings.get(linear) {
            return self.embedding(linear, name);
        }
        let (trained, method) = self.trained(linear)?;
        let accepts = |weight: &QuantizedWeight| match (self.format.kind(), &self.planned) {
            (Kind::File(format), _) => format.accepts(linear, weight, &self.config).map(drop),
            (_, Some(planned)) => planned.encode(linear, weight).map(drop),
            (_, None) => Ok(()),
        };
        let weight = if self.format.lossy() {
            approximate::nearest(&trained, self.device, &accepts)?
        } else {
            trained.clone()
        };
        let decoded = self.decoded(linear, &weight)?;
        let loss = Loss::between(&trained.dequantize(), &decoded);
        Ok(Stored { weight, method, decoded, loss })
    }

    /// The embedding or the head, rounded to the nearest.
    fn embedding(&self, linear: &str, name: &str) -> Result<Stored> {
        let tensor = self.parts.dense(name)?;
        let values = tensor.to_f32().map_err(|e| e.at(name))?;
        let kind = self.format.kind();
        let (Some(Embeddings::Codes(bits)), &[out, inputs]) =
            (kind.embeddings(), &tensor.shape[..])
        else {
            return Err(Error::failed("the embedding is no matrix").at(name));
        };
        let common = self.planned.as_ref().and_then(|planned| planned.group);
        let grid_of = |bits: Bits| match kind {
            Kind::Own(_) => None,
            Kind::Packed(format) => format.embedding_grid(bits, inputs, common),
            Kind::File(format) => format.embedding_grid(bits, inputs),
        };
        let Some(grid) = grid_of(bits) else {
            let fitting = (1..=8)
                .filter_map(|bits| Bits::new(bits).ok())
                .filter(|bits| grid_of(*bits).is_some());
            let fitting: Vec<String> = fitting.map(|bits| bits.to_string()).collect();
            let format = self.format.name();
            let what = format!(
                "format.{format} has no {bits}-bit embedding with rows of {inputs} weights"
            );
            let floats = "\"f16\" or \"bf16\"";
            return Err(Error::preflight(what).at(name).fix(if fitting.is_empty() {
                format!("format.{format}.embeddings = {floats}")
            } else {
                format!("format.{format}.embeddings = {}, {floats}", fitting.join(", "))
            }));
        };
        let weight = embeddings::as_codes(&values, [out, inputs], bits, grid, self.device)
            .map_err(|e| e.at(name))?;
        let decoded = self.decoded(linear, &weight)?;
        let loss = Loss::between(&values, &decoded);
        Ok(Stored { weight, method: "rtn".to_owned(), decoded, loss })
    }

    /// The weights that a reader computes from what is stored for `weight`.
    fn decoded(&self, linear: &str, weight: &QuantizedWeight) -> Result<Vec<f32>> {
        let computed = match (self.format.kind(), &self.planned) {
            (Kind::Own(format), _) => return format.decoded(linear, weight),
            (_, Some(planned)) if self.format.lossy() => {
                planned.packer.computed(&planned.coded(linear, weight)?)
            }
            _ => None,
        };
        Ok(computed.unwrap_or_else(|| weight.dequantize()))
    }

    /// The tensors of a linear; none in a format that is one file.
    ///
    /// # Errors
    /// When the format cannot hold it exactly; says what would be lost and what to take instead.
    pub(super) fn encode(&self, linear: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        match (self.format.kind(), &self.planned) {
            (Kind::Own(format), _) => format.encode(linear, weight),
            (_, Some(planned)) => planned.encode(linear, weight),
            (_, None) => Ok(Tensors::new()),
        }
    }

    /// The source's `config.json` with what the format has to say.
    ///
    /// # Errors
    /// When the format cannot state what the linears are.
    pub(super) fn configured(&self, mut config: Value) -> Result<Value> {
        if let Kind::Own(format) = self.format.kind() {
            format.configure(&mut config, self.unties());
            return Ok(config);
        }
        if self.unties() {
            config["tie_word_embeddings"] = Value::Bool(false);
        }
        if let Some(Planned { packer, linears, .. }) = &self.planned {
            let section = packer.section(linears, &self.unquantized())?;
            if let Some(name) = packer.section_name() {
                config[name] = section.clone();
            }
            config["quantization_config"] = section;
        } else if let Some(map) = config.as_object_mut() {
            // The file says it itself; what the source said is not true of it.
            map.shift_remove("quantization_config");
        }
        Ok(config)
    }

    /// What of a tensor that is not quantized is rounded.
    ///
    /// # Errors
    /// As [`Writing::dense`].
    pub(super) fn dense_loss(&self, name: &str) -> Result<Option<Loss>> {
        let rounds = match (self.format.kind(), self.format.kind().embeddings()) {
            (Kind::Own(_), _) => self.format.lossy(),
            (_, Some(Embeddings::Floats(_))) => self.is_embedding(name),
            _ => false,
        };
        if !rounds {
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

#[cfg(test)]
pub(super) mod sample {
    //! A packer behind its planner, for tests of formats.

    use super::*;

    /// The tensors of linear `x`, in a model of nothing else.
    pub(in crate::export) fn packed(
        keys: &impl PackedFormat,
        weight: &Coded<'_>,
    ) -> Result<Tensors> {
        if let Some(reason) = refuses(keys, keys.name(), weight) {
            return Err(reason.error("x", std::iter::empty()));
        }
        let stored = keys.holds().stored(weight);
        keys.packer(&[stored.layer("x")])?.pack("x", &stored)
    }
}

#[cfg(test)]
mod tests {
    use super::super::formats::Format;
    use super::*;
    use crate::quant::{Grid, GroupAxis, GroupLayout, ZeroKind};

    /// The error of a format about a weight.
    fn error(
        format: Format,
        bits: u8,
        group_len: usize,
        zero_kind: ZeroKind,
        scale: f32,
    ) -> String {
        let layout = GroupLayout {
            out: 64,
            inputs: 256,
            groups: 64 * 256 / group_len,
            group_len,
            axis: GroupAxis::In,
        };
        let (scale, zero_point) = (vec![scale; layout.groups], vec![1.5; layout.groups]);
        let zero_point =
            if zero_kind == ZeroKind::Integer { vec![1.0; layout.groups] } else { zero_point };
        let grid = Grid::Uniform { scale, zero_point, zero_kind };
        let bits = Bits::new(bits).unwrap();
        let weight = QuantizedWeight::new(&vec![1; 64 * 256], grid, bits, layout).unwrap();
        let (plain, others) = (format.plain(), Format::ALL.map(Format::plain));
        let Kind::Packed(keys) = plain.kind() else { panic!("{format:?} packs no codes") };
        let packer = keys.packer(&[]).unwrap();
        let (name, linears) = (format.name(), Vec::new());
        let planned = Planned { name, format: keys, packer, linears, group: None, others: &others };
        planned.encode("x", &weight).unwrap_err().to_string()
    }

    #[test]
    fn what_does_not_hold_says_why_and_what_does() {
        assert_eq!(
            error(Format::Gptq, 4, 64, ZeroKind::Real, 0.5),
            "gptq has integer zero points, those of this grid are any real numbers: every weight \
             would move by up to half a step\n  at   x\n  try  format.mlx or format.bcq or \
             format.fewbit"
        );
        let five = error(Format::Awq, 5, 32, ZeroKind::Integer, 0.5);
        assert!(
            five.ends_with("format.mlx or format.compressed_tensors or format.fewbit"),
            "{five}"
        );
        let long = error(Format::Gptq, 4, 32, ZeroKind::Integer, 0.1);
        let formats = "or format.mlx or format.compressed_tensors or format.fewbit";
        let fix = format!("quant.scales = \"f16\" in training, {formats}");
        assert!(long.ends_with(&fix), "{long}");
    }
}
