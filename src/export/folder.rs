//! Writing an export folder, opening any model folder, and the parity gate between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::gguf::model as gguf;
use super::manifest::{FORMAT_VERSION, LinearRecord, Manifest, ParityRecord, Provenance};
use super::packed::{Packed, Packer};
use super::{ActivationRecord, Adapter, AdapterHead, Format, FormatsConfig, dequantized, fewbit};
use crate::data::DataFormat;
use crate::error::{Error, Result};
use crate::model::{EMBEDDING, HEAD, ModelConfig, ModelTap, WeightSource, companions, weight_name};
use crate::quant::QuantizedWeight;
use crate::store::folder::{StagedFolder, sha256_file};
use crate::store::safetensors::{Checkpoint, ShardWriter};
use crate::store::{HostTensor, TensorSource, hex};

/// Largest shard that is written.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// What goes into an export.
pub struct ModelParts<'a> {
    /// The source model's folder.
    pub dir: &'a Path,
    /// Its tensors.
    pub source: &'a Checkpoint,
    /// Quantized linears by name, with the method that trained each.
    pub quantized: &'a BTreeMap<String, (QuantizedWeight, String)>,
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
    pub(super) fn names(&self) -> BTreeSet<String> {
        // A packed source holds the parts of its codes under names of their own.
        let parts: BTreeSet<String> =
            self.quantized.keys().flat_map(|linear| fewbit::tensor_names(linear)).collect();
        let source = self.source.names().into_iter().map(str::to_owned);
        source
            .filter(|name| !parts.contains(name))
            .chain(self.dense.keys().cloned())
            .chain(self.quantized.keys().map(|linear| weight_name(linear)))
            .collect()
    }

    /// A tensor that is not quantized.
    pub(super) fn dense(&self, name: &str) -> Result<HostTensor> {
        match self.dense.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => self.source.read(name),
        }
    }

    /// The name under which `format` stores a tensor that is not quantized: other runtimes look for
    /// a tied model's one matrix under the embedding's name.
    fn stored_as<'n>(&self, name: &'n str, format: Format) -> Result<&'n str> {
        let ours = matches!(format, Format::Fewbit | Format::Dequantized);
        let head = name == weight_name(HEAD) && !self.unties();
        if ours || !head || self.source.info(EMBEDDING).is_some() {
            return Ok(name);
        }
        Ok(if ModelConfig::read(self.dir)?.tied { EMBEDDING } else { name })
    }

    /// Whether a tied model gets a head of its own.
    fn unties(&self) -> bool {
        self.quantized.contains_key(HEAD)
    }
}

/// The perplexity half of the gate: measured on the trained model before, and by the callback on
/// the re-opened folder.
pub struct Parity<'a> {
    /// Of the model as trained.
    pub trained: f64,
    /// Predicted tokens.
    pub tokens: u64,
    /// Window length.
    pub context: usize,
    /// SHA-256 of the text.
    pub data_sha256: String,
    /// What its documents are.
    pub format: DataFormat,
    /// Measures a folder the way `fewbit eval` does.
    pub measure: &'a mut dyn FnMut(&OpenModel) -> Result<f64>,
}

/// A finished export.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The folder.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Bits per quantized weight as stored in this format.
    pub bits_per_weight: f64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Size of the quantized weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct WeightStats {
    /// Number of quantized weights.
    pub weights: u64,
    /// Stored bits, scales and zero points included.
    pub bits: f64,
}

impl WeightStats {
    /// Adds one linear.
    pub fn add(&mut self, weight: &QuantizedWeight) {
        self.weights += weight.layout.len() as u64;
        self.bits += weight.bits_per_weight() * weight.layout.len() as f64;
    }

    /// Mean bits per weight.
    pub fn bits_per_weight(&self) -> f64 {
        self.bits / (self.weights.max(1) as f64)
    }
}

/// SHA-256 of weights as little-endian f32.
pub fn weights_sha256(weights: &[f32]) -> String {
    let mut hash = Sha256::new();
    for chunk in weights.chunks(4096) {
        let bytes: Vec<u8> = chunk.iter().flat_map(|w| w.to_le_bytes()).collect();
        hash.update(&bytes);
    }
    hex(&hash.finalize())
}

/// Writes `parts` as `format` to `target`. The folder appears only when the re-opened files hold
/// exactly what was trained; whatever was at `target` stays until then.
///
/// # Errors
/// I/O errors; exit code 5 when the gate fails.
pub fn write(
    parts: &ModelParts<'_>,
    format: Format,
    target: &Path,
    parity: Option<Parity<'_>>,
) -> Result<Exported> {
    write_adapted(parts, None, format, target, parity)
}

/// As [`write`]; the manifest names the adapter that the scales are of.
pub(super) fn write_adapted(
    parts: &ModelParts<'_>,
    adapter: Option<&AdapterHead>,
    format: Format,
    target: &Path,
    parity: Option<Parity<'_>>,
) -> Result<Exported> {
    let start = Instant::now();
    let staged = StagedFolder::create(target)?;
    let packer = match format {
        Format::Fewbit | Format::Dequantized | Format::Gguf => None,
        _ => Some(Packer::new(parts, format)?),
    };
    let mut manifest = if format == Format::Gguf {
        write_gguf(parts, staged.path())?
    } else {
        write_tensors(parts, format, packer.as_ref(), staged.path())?
    };
    manifest.adapter = adapter.cloned();
    manifest.files = write_companions(parts, format, packer.as_ref(), staged.path())?;
    if format == Format::Gguf {
        let sha256 = sha256_file(&staged.path().join(gguf::FILE))?;
        manifest.files.insert(gguf::FILE.to_owned(), sha256);
    }
    manifest.write(staged.path())?;
    let opened = open_model(staged.path())?;
    compare_weights(parts, format, &opened)?;
    if let Some(parity) = parity {
        let exported = (parity.measure)(&opened)?;
        if exported.to_bits() != parity.trained.to_bits() {
            return Err(Error::gate(format!(
                "the exported model's perplexity {exported} is not the trained model's {}",
                parity.trained
            ))
            .at(target.display())
            .fix("report this: nothing was written"));
        }
        manifest.parity = Some(ParityRecord {
            trained: parity.trained,
            exported,
            tokens: parity.tokens,
            context: parity.context,
            data_sha256: parity.data_sha256,
            format: parity.format,
        });
        manifest.write(staged.path())?;
    }
    let bytes = folder_bytes(staged.path())?;
    let bits_per_weight = match format {
        Format::Dequantized => 32.0,
        _ => manifest.bits_per_weight,
    };
    staged.commit()?;
    Ok(Exported {
        path: target.to_owned(),
        bytes,
        bits_per_weight,
        seconds: start.elapsed().as_secs_f64(),
    })
}

fn write_tensors(
    parts: &ModelParts<'_>,
    format: Format,
    packer: Option<&Packer>,
    dir: &Path,
) -> Result<Manifest> {
    let mut writer = ShardWriter::create(dir, MAX_SHARD_BYTES)?;
    let mut stats = WeightStats::default();
    let mut linears = BTreeMap::new();
    let mut dense = BTreeMap::new();
    for name in &parts.names() {
        let linear = name.strip_suffix(".weight").and_then(|linear| {
            parts.quantized.get(linear).map(|(weight, method)| (linear, weight, method))
        });
        let Some((linear, weight, method)) = linear else {
            let (tensor, name) = (parts.dense(name)?, parts.stored_as(name, format)?);
            dense.insert(name.to_owned(), tensor.sha256());
            writer.add(name, &tensor)?;
            continue;
        };
        let (mut tensors, mut record) = fewbit::encode(linear, weight, method);
        match packer {
            Some(packer) => {
                tensors = packer.encode(linear, weight)?;
                let bytes: usize = tensors.iter().map(|(_, tensor)| tensor.bytes.len()).sum();
                stats.weights += weight.layout.len() as u64;
                stats.bits += 8.0 * bytes as f64;
            }
            None => stats.add(weight),
        }
        if format == Format::Dequantized {
            tensors = vec![(name.to_owned(), dequantized::encode(weight))];
        }
        record.sha256 = tensors.iter().map(|(name, t)| (name.clone(), t.sha256())).collect();
        write_all(&mut writer, &tensors)?;
        linears.insert(linear.to_owned(), record);
    }
    writer.finish(&BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    Ok(manifest(parts, format, linears, dense, stats))
}

/// One file instead of tensors by name: its hash stands among those of files.
fn write_gguf(parts: &ModelParts<'_>, dir: &Path) -> Result<Manifest> {
    let mut stats = WeightStats::default();
    let mut linears = BTreeMap::new();
    for (name, (weight, method)) in parts.quantized {
        let (_, record) = fewbit::encode(name, weight, method);
        linears.insert(name.clone(), LinearRecord { sha256: BTreeMap::new(), ..record });
        stats.weights += weight.layout.len() as u64;
    }
    stats.bits = gguf::write(parts, &parts.provenance.model, dir)?;
    Ok(manifest(parts, Format::Gguf, linears, BTreeMap::new(), stats))
}

fn manifest(
    parts: &ModelParts<'_>,
    format: Format,
    linears: BTreeMap<String, LinearRecord>,
    dense: BTreeMap<String, String>,
    stats: WeightStats,
) -> Manifest {
    Manifest {
        format,
        format_version: FORMAT_VERSION,
        fewbit: env!("CARGO_PKG_VERSION").to_owned(),
        bit_order: "lsb_stream".to_owned(),
        axis: "in".to_owned(),
        provenance: parts.provenance.clone(),
        adapter: None,
        linears,
        activations: parts.activations.clone(),
        dense,
        files: BTreeMap::new(),
        bits_per_weight: stats.bits_per_weight(),
        parity: None,
    }
}

fn write_all(writer: &mut ShardWriter, tensors: &[(String, HostTensor)]) -> Result<()> {
    tensors.iter().try_for_each(|(name, tensor)| writer.add(name, tensor))
}

/// config.json, tokenizer files, chat template, generation settings; gives the hash of each.
fn write_companions(
    parts: &ModelParts<'_>,
    format: Format,
    packer: Option<&Packer>,
    dir: &Path,
) -> Result<BTreeMap<String, String>> {
    let path = parts.dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let mut config: Value = serde_json::from_str(&text)
        .map_err(|e| Error::failed(format!("config.json is not valid: {e}")).at(path.display()))?;
    match (format, packer) {
        (Format::Dequantized, _) => config = dequantized::config(config, parts.unties()),
        (_, Some(packer)) => {
            if parts.unties() {
                config["tie_word_embeddings"] = json!(false);
            }
            packer.configure(&mut config)?;
        }
        (Format::Gguf, _) => {}
        (_, None) => {
            if let Some(map) = config.as_object_mut() {
                let about = json!({
                    "quant_method": "fewbit",
                    "format_version": FORMAT_VERSION,
                    "manifest": super::MANIFEST_FILE,
                });
                map.insert("quantization_config".to_owned(), about);
            }
        }
    }
    let path = dir.join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(|e| Error::io("write", &path, &e))?;
    let mut hashes = BTreeMap::from([("config.json".to_owned(), sha256_file(&path)?)]);
    for source in companions(parts.dir) {
        if let Some(name) = source.file_name() {
            let to = dir.join(name);
            std::fs::copy(&source, &to).map_err(|e| Error::io("copy", &source, &e))?;
            hashes.insert(name.to_string_lossy().into_owned(), sha256_file(&to)?);
        }
    }
    let path = dir.join(CARD);
    std::fs::write(&path, card(parts, format)).map_err(|e| Error::io("write", &path, &e))?;
    hashes.insert(CARD.to_owned(), sha256_file(&path)?);
    Ok(hashes)
}

/// The card's name in a folder.
const CARD: &str = "README.md";

/// What the folder is, for who finds it.
fn card(parts: &ModelParts<'_>, format: Format) -> String {
    let mut widths: BTreeMap<u8, usize> = BTreeMap::new();
    for (weight, _) in parts.quantized.values() {
        *widths.entry(weight.bits.get()).or_default() += 1;
    }
    let widths: Vec<String> =
        widths.iter().map(|(bits, count)| format!("{count} linears in {bits} bits")).collect();
    let methods: BTreeSet<&str> =
        parts.quantized.values().map(|(_, method)| method.as_str()).collect();
    let methods = methods.into_iter().collect::<Vec<_>>().join(", ");
    format!(
        "# {model}, quantized\n\n\
         {widths} by {methods}, written by fewbit {version} as `{name}`: {about}.\n\n\
         Made from {model} (sha256 of its files {sha}). `manifest.json` has hashes of everything, \
         `fewbit verify` checks them; the weights decode to what was trained, bit for bit.\n",
        model = parts.provenance.model,
        widths = widths.join(", "),
        version = env!("CARGO_PKG_VERSION"),
        name = format.name(),
        about = format.about(),
        sha = &parts.provenance.model_sha256,
    )
}

/// Codes equal, weights bit-equal, activations on the same grids, nothing missing.
fn compare_weights(parts: &ModelParts<'_>, format: Format, opened: &OpenModel) -> Result<()> {
    let differs = |what: &str, name: &str| {
        Err(Error::gate(format!("the exported {what} is not what was trained"))
            .at(name)
            .fix("report this: nothing was written"))
    };
    for (name, (weight, _)) in parts.quantized {
        if let Some(packed) = opened.quantized(name)?
            && packed != *weight
        {
            return differs("code or grid", name);
        }
        let shape = [weight.layout.out, weight.layout.inputs];
        let trained = weight.dequantize();
        let exported = opened.weight(&weight_name(name), &shape)?;
        if trained.iter().zip(&exported).any(|(a, b)| a.to_bits() != b.to_bits()) {
            return differs("weight", name);
        }
    }
    if opened.manifest.as_ref().and_then(|m| m.activations.as_ref()) != parts.activations.as_ref() {
        return differs("grid of the activations", super::MANIFEST_FILE);
    }
    for name in &parts.names() {
        let quantized =
            name.strip_suffix(".weight").is_some_and(|l| parts.quantized.contains_key(l));
        if quantized {
            continue;
        }
        let tensor = parts.dense(name)?;
        let same = match &opened.gguf {
            Some(file) => file.values(name, &tensor.shape)? == tensor.to_f32()?,
            None => opened.checkpoint.read(parts.stored_as(name, format)?)? == tensor,
        };
        if !same {
            return differs("tensor", name);
        }
    }
    Ok(())
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, &e))? {
        let entry = entry.map_err(|e| Error::io("list", dir, &e))?;
        total += entry.metadata().map_err(|e| Error::io("read", &entry.path(), &e))?.len();
    }
    Ok(total)
}

/// A model folder opened for reading: dense, or packed by fewbit.
pub struct OpenModel {
    /// The folder.
    pub dir: PathBuf,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tensors as stored.
    pub checkpoint: Checkpoint,
    /// The manifest, when fewbit wrote the folder.
    pub manifest: Option<Manifest>,
    /// An adapter whose scales stand in for the stored ones.
    pub adapter: Option<Adapter>,
    /// How linears are stored in another runtime's format.
    packed_as: Option<Packed>,
    /// The file that holds the weights instead of safetensors.
    gguf: Option<gguf::Weights>,
}

/// Opens a model folder; only headers are read.
///
/// # Errors
/// When the folder is not a model that can be read, or a file is damaged.
pub fn open_model(dir: &Path) -> Result<OpenModel> {
    if !dir.is_dir() {
        return Err(Error::usage("there is no such model folder")
            .at(dir.display())
            .fix("a Hugging Face folder, a fewbit run or export, or a hub id owner/name"));
    }
    let config = ModelConfig::read(dir)?;
    let gguf = gguf::Weights::open(dir, &config)?;
    let opened = OpenModel {
        dir: dir.to_owned(),
        config,
        checkpoint: if gguf.is_some() { Checkpoint::empty() } else { Checkpoint::open(dir)? },
        gguf,
        manifest: Manifest::read(dir)?,
        adapter: None,
        packed_as: Packed::of(&config_json(dir)?).map_err(|e| e.at(dir.display()))?,
    };
    if let Some(record) = opened.activations() {
        record.check(opened.config.n_blocks).map_err(|e| {
            e.at(dir.join(super::MANIFEST_FILE).display()).fix("export the run again")
        })?;
    }
    Ok(opened)
}

/// A folder's `config.json` as it stands.
fn config_json(dir: &Path) -> Result<Value> {
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    serde_json::from_str(&text)
        .map_err(|e| Error::failed(format!("config.json is not valid: {e}")).at(path.display()))
}

impl OpenModel {
    /// How a linear is stored in another runtime's format, if it is.
    fn packed_elsewhere(&self, linear: &str) -> Option<&Packed> {
        self.packed_as.as_ref().filter(|packed| packed.holds(linear, &self.checkpoint))
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
            .map_err(|e| e.at(self.dir.display()))?;
        match &self.adapter {
            None => Ok(Some(weight)),
            Some(adapter) => {
                let grid = adapter.grid(linear, &weight)?;
                Ok(Some(QuantizedWeight { grid: grid.unwrap_or(weight.grid.clone()), ..weight }))
            }
        }
    }
}

impl WeightSource for OpenModel {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
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
            return Err(Error::preflight(what).at(name));
        }
        match self.quantized(linear)? {
            None => self.checkpoint.weight(name, shape),
            Some(weight) if shape == [weight.layout.out, weight.layout.inputs] => {
                Ok(weight.dequantize())
            }
            Some(weight) => Err(Error::preflight(format!(
                "the packed weight is {} x {}, config.json asks for {shape:?}",
                weight.layout.out, weight.layout.inputs
            ))
            .at(name)),
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
