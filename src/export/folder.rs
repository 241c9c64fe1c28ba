//! Opening any model folder: dense, packed by fewbit, or in another runtime's format.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::activations::ActivationRecord;
use super::adapter::Adapter;
use super::fewbit;
use super::formats::{Format, packed_as};
use super::gguf::model as gguf;
use super::manifest::Manifest;
use super::read::{DAMAGED, Packed};
use super::record::{LinearRecord, MANIFEST_FILE};
use crate::data::{ChatTemplate, Tokenizer};
use crate::error::{Error, Result};
use crate::model::{
    GenerationConfig, ModelConfig, ModelTap, Place, Places, WeightSource, open_folder, weight_name,
};
use crate::quant::{Bits, GroupLayout, QuantizedWeight, no_width};
use crate::store::safetensors::{Checkpoint, Decode};
use crate::store::{TensorSource, embedded, hex};

/// A model folder opened for reading: dense, or packed by fewbit.
pub struct OpenModel {
    /// The folder, or the GGUF file.
    pub dir: PathBuf,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tensors as stored.
    pub checkpoint: Checkpoint,
    /// The manifest, when fewbit wrote the folder.
    pub manifest: Option<Manifest>,
    /// An adapter whose scales stand in for the stored ones.
    pub adapter: Option<Adapter>,
    /// The width at which linears are read whose planes serve several; absent: the widest.
    width: Option<Bits>,
    /// How linears are stored in another runtime's format.
    packed_as: Option<Packed>,
    /// The file that holds the weights instead of safetensors.
    gguf: Option<gguf::Weights>,
    /// The small files of a folder, by name, of a GGUF file that stands alone.
    files: BTreeMap<String, String>,
}

/// Opens a model folder; only headers are read.
///
/// # Errors
/// When the folder is not a model that can be read, or a file is damaged.
pub fn open_model(dir: &Path) -> Result<OpenModel> {
    open(dir).map_err(|error| error.or_at(dir))
}

fn open(dir: &Path) -> Result<OpenModel> {
    if let Some(file) = gguf::alone(dir)? {
        let (weights, files) = gguf::Weights::open_alone(&file)?;
        return Ok(OpenModel {
            dir: file,
            config: weights.config().clone(),
            checkpoint: Checkpoint::empty(),
            manifest: None,
            adapter: None,
            width: None,
            packed_as: None,
            gguf: Some(weights),
            files,
        });
    }
    if !dir.is_dir() {
        return Err(Error::usage("there is no such model folder").at(dir.display()).fix(
            "a Hugging Face folder, a GGUF file, a fewbit run or export, or a hub id owner/name",
        ));
    }
    let file = dir.join(gguf::FILE);
    let (config, checkpoint) = if file.is_file() {
        (ModelConfig::read(dir)?, Checkpoint::empty())
    } else {
        open_folder(dir)?
    };
    let gguf = file.is_file().then(|| gguf::Weights::open(&file, &config)).transpose()?;
    let opened = OpenModel {
        dir: dir.to_owned(),
        config,
        checkpoint,
        gguf,
        manifest: Manifest::read(dir)?,
        adapter: None,
        width: None,
        files: BTreeMap::new(),
        packed_as: packed_as(&config_json(dir)?).map_err(|e| e.at(dir.display()))?,
    };
    check_packed(&opened)?;
    if let Some(record) = opened.activations() {
        record
            .check(&opened.config)
            .map_err(|e| e.at(dir.join(MANIFEST_FILE).display()).fix("export the run again"))?;
    }
    Ok(opened)
}

/// The float model that a folder or file stands for, whichever way its weights are packed: they are
/// decoded one at a time. Gives the folder of its small files too, which for a GGUF file that stands
/// alone is one of the cache.
///
/// # Errors
/// As [`open_model`], and when the small files cannot be written.
pub fn open_float(path: &Path) -> Result<(ModelConfig, Checkpoint, PathBuf)> {
    let opened = open_model(path)?;
    if opened.gguf.is_none() && opened.packed_as.is_none() {
        return Ok((opened.config, opened.checkpoint, opened.dir));
    }
    let config = opened.config.clone();
    let dir = if opened.files.is_empty() { opened.dir.clone() } else { unpacked(&opened)? };
    let file = match (&opened.gguf, opened.files.is_empty()) {
        (Some(_), true) => opened.dir.join(gguf::FILE),
        _ => opened.dir.clone(),
    };
    let tensors = config.tensors();
    let packed = |name: &str| {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        opened.gguf.is_some() || opened.packed_elsewhere(linear).is_some()
    };
    let decoded: Vec<(String, Vec<usize>)> =
        tensors.iter().filter(|(name, _)| packed(name)).cloned().collect();
    let used: BTreeSet<String> = tensors.into_iter().map(|(name, _)| name).collect();
    let places = Places::new(&config);
    let keep = |name: &str| used.contains(name) || places.of(name) == Place::Beside;
    let checkpoint = opened.checkpoint.clone();
    let source = Arc::new(Decoder(opened));
    let checkpoint = checkpoint.decoding(keep, decoded.into_iter(), &file, source);
    Ok((config, checkpoint, dir))
}

/// Decodes what is packed in a folder or file.
struct Decoder(OpenModel);

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Decoder({})", self.0.dir.display())
    }
}

impl Decode for Decoder {
    fn decode(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.weight(name, shape)
    }
}

/// A folder of the cache with the small files of a GGUF file that stands alone; the same for the same.
fn unpacked(opened: &OpenModel) -> Result<PathBuf> {
    let files = || opened.files.iter().map(|(name, text)| (name.as_str(), text.as_bytes()));
    let mut hash = Sha256::new();
    for (name, text) in files() {
        hash.update(name.as_bytes());
        hash.update(text);
    }
    let name = hex(&hash.finalize());
    embedded::cached(&format!("gguf/{}", &name[..16]), files())
}

/// A folder's `config.json` as it stands; the settings of GPTQ may lie beside it.
fn config_json(dir: &Path) -> Result<Value> {
    let read = |path: &Path| -> Result<Value> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))?;
        serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text)).map_err(|e| {
            let what = format!("{} is not valid: {e}", path.display());
            Error::preflight(what).fix("the model's own file")
        })
    };
    let mut config = read(&dir.join("config.json"))?;
    let beside = dir.join("quantize_config.json");
    if config.get("quantization_config").is_none() && beside.is_file() {
        let mut settings = read(&beside)?;
        if settings.is_object() && settings.get("quant_method").is_none() {
            settings["quant_method"] = Value::from("gptq");
        }
        config["quantization_config"] = settings;
    }
    Ok(config)
}

/// Refuses a folder of packed tensors that says nothing of how they are packed.
fn check_packed(opened: &OpenModel) -> Result<()> {
    let silent = opened.packed_as.is_none() && opened.manifest.is_none();
    let names = opened.checkpoint.names();
    let packed = names.iter().find(|name| {
        [".qweight", ".weight_packed"].iter().any(|part| name.ends_with(part)) && silent
    });
    match packed {
        None => Ok(()),
        Some(name) => Err(Error::preflight(
            "the weights are packed (GPTQ, AWQ or compressed-tensors), and config.json has no \
             quantization_config",
        )
        .at(format!("{}, {name}", opened.dir.display()))
        .fix("the config.json, or quantize_config.json, that belongs to these weights")),
    }
}

impl OpenModel {
    /// Whether the model comes with a tokenizer.
    pub fn has_tokenizer(&self) -> bool {
        self.files.contains_key("tokenizer.json") || self.dir.join("tokenizer.json").is_file()
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When there is none, or it does not load.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        let tokenizer = match (self.files.get("tokenizer.json"), self.files.is_empty()) {
            (Some(json), _) => {
                let config = self.files.get("tokenizer_config.json").map(String::as_str);
                Tokenizer::from_texts(json, config, &self.dir)?
            }
            (None, true) => Tokenizer::load(&self.dir)?,
            (None, false) => {
                return Err(Error::preflight("the GGUF file holds no tokenizer")
                    .at(self.dir.display())
                    .fix("a file with tokenizer.ggml.* keys, or the model's Hugging Face folder"));
            }
        };
        tokenizer.fitting(self.config.vocab).map_err(|e| e.at(self.dir.display()))
    }

    /// How its makers generate.
    ///
    /// # Errors
    /// When `generation_config.json` cannot be read.
    pub fn generation(&self) -> Result<GenerationConfig> {
        let ends = self.config.eos.iter().copied();
        if self.files.is_empty() {
            return GenerationConfig::of_folder(&self.dir, ends);
        }
        let text = self.files.get("generation_config.json").map(String::as_str);
        GenerationConfig::parse(text, ends).map_err(|e| e.at(self.dir.display()))
    }

    /// The model's chat template; `None` where it has none.
    ///
    /// # Errors
    /// When a file of it cannot be read, or it is no Jinja.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>> {
        if self.files.is_empty() {
            return ChatTemplate::of_folder(&self.dir);
        }
        let config = self.files.get("tokenizer_config.json");
        let template = config.map(|config| ChatTemplate::of_config(config, &self.dir));
        Ok(template.transpose()?.flatten())
    }

    /// A tensor of the GGUF file; `None` where the model is no such file.
    pub(super) fn gguf_values(&self, name: &str, shape: &[usize]) -> Option<Result<Vec<f32>>> {
        self.gguf.as_ref().map(|file| file.values(name, shape))
    }

    /// How a linear is stored in another runtime's format, if it is.
    fn packed_elsewhere(&self, linear: &str) -> Option<&Packed> {
        self.packed_as.as_ref().filter(|packed| packed.holds(linear, &self.checkpoint))
    }

    /// Whether another program stored a linear as codes.
    pub(super) fn is_coded(&self, linear: &str) -> bool {
        let in_file = self.gguf.as_ref().is_some_and(|file| file.is_packed(&weight_name(linear)));
        in_file || self.packed_elsewhere(linear).is_some()
    }

    /// The codes that another program stored for a linear, where they stand for its weights exactly, in
    /// the longest groups that share a grid.
    ///
    /// # Errors
    /// When the files are damaged.
    pub(super) fn codes_of_others(&self, linear: &str) -> Result<Option<QuantizedWeight>> {
        let weight = match (&self.gguf, self.packed_elsewhere(linear)) {
            (Some(file), _) => file.codes(&weight_name(linear))?,
            (None, Some(packed)) => packed.codes(linear, &self.checkpoint)?,
            (None, None) => None,
        };
        Ok(weight.map(QuantizedWeight::in_longest_groups))
    }

    fn activations(&self) -> Option<&ActivationRecord> {
        self.manifest.as_ref()?.activations.as_ref()
    }

    /// What the model does to activations, as it was trained to.
    pub fn tap(&self) -> ModelTap {
        self.activations().map(ActivationRecord::tap).unwrap_or_default()
    }

    /// The linears that are stored as codes, with their records.
    pub fn linears(&self) -> impl Iterator<Item = (&String, &LinearRecord)> {
        let manifest = self.manifest.as_ref().filter(|m| m.format == Format::Fewbit);
        manifest.into_iter().flat_map(|manifest| &manifest.linears)
    }

    /// The widths at which linears can be read whose planes serve several; none where there are no such.
    pub fn widths(&self) -> BTreeSet<Bits> {
        let nested = self.linears().filter(|(_, record)| !record.nested.is_empty());
        nested.flat_map(|(_, record)| record.nested.iter().copied().chain([record.bits])).collect()
    }

    /// The model read at `bits`: its linears by their first planes, with the scales of that width.
    ///
    /// # Errors
    /// A usage error when it was not made to be read so.
    pub fn at_width(self, bits: Bits) -> Result<Self> {
        let widths = self.widths();
        if widths.contains(&bits) {
            return Ok(Self { width: Some(bits), ..self });
        }
        Err(no_width(bits, widths).at(self.dir.display()))
    }

    /// The record of a linear that is stored as codes.
    fn packed(&self, linear: &str) -> Option<&LinearRecord> {
        let manifest = self.manifest.as_ref().filter(|m| m.format == Format::Fewbit)?;
        manifest.linears.get(linear)
    }

    /// A linear's codes and grid; `None` when it is stored dense.
    ///
    /// # Errors
    /// When the stored tensors are damaged.
    pub fn quantized(&self, linear: &str) -> Result<Option<QuantizedWeight>> {
        let Some(record) = self.packed(linear) else { return Ok(None) };
        let weight = fewbit::decode(linear, record, &self.checkpoint)
            .map_err(|e| e.at(self.dir.display()).of_input(DAMAGED))?;
        let weight = match self.width.filter(|_| !weight.nested.is_empty()) {
            Some(bits) => weight.at(bits).map_err(|e| e.at(linear))?,
            None => weight,
        };
        match &self.adapter {
            None => Ok(Some(weight)),
            Some(adapter) => {
                let grid = adapter.grid(linear, &weight)?;
                Ok(Some(QuantizedWeight { grid: grid.unwrap_or(weight.grid.clone()), ..weight }))
            }
        }
    }
}

impl OpenModel {
    fn stored_weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        if let Some(file) = &self.gguf {
            return file.values(name, shape);
        }
        if let Some(packed) = self.packed_elsewhere(linear) {
            let (weights, found) = packed.weights(linear, &self.checkpoint)?;
            if shape == found {
                return Ok(weights);
            }
            let what = format!("the packed weight is {found:?}, config.json asks for {shape:?}");
            return Err(Error::damaged(what, "the config.json of these weights").at(name));
        }
        match self.quantized(linear)? {
            None => self.checkpoint.weight(name, shape),
            Some(weight) if shape == [weight.layout.out, weight.layout.inputs] => {
                Ok(weight.dequantize())
            }
            Some(weight) => {
                let GroupLayout { out, inputs, .. } = weight.layout;
                let what = format!(
                    "the packed weight is {out} x {inputs}, config.json asks for {shape:?}"
                );
                Err(Error::damaged(what, "the config.json of these weights").at(name))
            }
        }
    }
}

impl WeightSource for OpenModel {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let values = self.stored_weight(name, shape).map_err(|e| e.of_input(DAMAGED))?;
        match values.iter().find(|value| !value.is_finite()) {
            None => Ok(values),
            // A scale of another program that is no number, or too large with its code.
            Some(value) => {
                let what = format!("the weight holds {value}");
                Err(Error::damaged(what, DAMAGED).at(name).at(self.dir.display()))
            }
        }
    }

    fn contains(&self, name: &str) -> bool {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        self.checkpoint.contains(name)
            || self.gguf.as_ref().is_some_and(|file| file.contains(name))
            || self.packed(linear).is_some()
            || self.packed_elsewhere(linear).is_some()
    }

    fn coded(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        self.quantized(name)
    }

    fn overrides(&self, name: &str) -> bool {
        self.packed(name).is_some() || self.packed_elsewhere(name).is_some()
    }
}
