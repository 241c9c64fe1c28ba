//! Writing an export: staged, re-opened, compared, and only then in its place.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::Value;

use super::adapter::AdapterHead;
use super::approximate::Loss;
use super::card::{CARD, card};
use super::files::weight_files;
use super::folder::open_model;
use super::format::{Kind, SingleFile, Writing};
use super::formats::{Format, FormatsConfig};
use super::gate::{Gate, check_equal, compare, record};
use super::manifest::Manifest;
use super::parts::ModelParts;
use super::record::FORMAT_VERSION;
use crate::error::{Error, Result};
use crate::model::{companions, licences, weight_name};
use crate::quant::QuantizedWeight;
use crate::store::folder::{StagedFolder, entries, sha256_file};
use crate::store::safetensors::ShardWriter;
use crate::task::Gauged;

/// Largest shard that is written.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// A finished export.
#[derive(Clone, Debug)]
pub struct Exported {
    /// The folder.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Bits per quantized weight as stored in this format.
    pub bits_per_weight: f64,
    /// Bits of the files of weights per parameter of the model: embedding, head and norms included.
    pub bits_per_parameter: f64,
    /// Whether the folder computes something else than what was trained.
    pub lossy: bool,
    /// What was changed of linears and other tensors, where a loss was allowed, by name.
    pub losses: BTreeMap<String, Loss>,
    /// What the re-opened folder measured.
    pub gauged: Gauged,
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

/// Writes `parts` as `format`, with its keys of `options`, to `target`. The folder appears only when
/// the re-opened files hold exactly what was trained, or exactly the change that its options allow;
/// whatever was at `target` stays until then.
///
/// # Errors
/// I/O errors; exit code 3 when the format cannot hold the model, 5 when the gate fails.
pub fn write(
    parts: &ModelParts<'_>,
    format: Format,
    options: &FormatsConfig,
    target: &Path,
    gate: &Gate<'_>,
) -> Result<Exported> {
    write_adapted(parts, None, (format, options), target, gate)
}

/// As [`write`]; the manifest names the adapter that the scales are of.
pub(super) fn write_adapted(
    parts: &ModelParts<'_>,
    adapter: Option<&AdapterHead>,
    (format, options): (Format, &FormatsConfig),
    target: &Path,
    gate: &Gate<'_>,
) -> Result<Exported> {
    let start = Instant::now();
    let staged = StagedFolder::create(target)?;
    let (plain, all) = (format.plain(), Format::ALL.map(Format::plain));
    let keys = options.keys(format).unwrap_or(&*plain);
    let writing = Writing::new(parts, keys, &all, gate.gauge.device)?;
    let mut manifest = Manifest { adapter: adapter.cloned(), ..manifest(format, &writing) };
    match keys.kind() {
        Kind::File(file) => write_file(file, &writing, staged.path(), &mut manifest)?,
        _ => write_tensors(&writing, staged.path(), &mut manifest)?,
    }
    let changed = manifest.linears.values().any(|record| record.loss.is_some());
    manifest.lossy = changed || !manifest.rounded.is_empty();
    manifest.files.extend(write_companions(&writing, &manifest, staged.path())?);
    manifest.write(staged.path())?;
    let opened = open_model(staged.path())?;
    compare(&writing, &opened)?;
    let gauged = gate.gauge.measure(&opened.config, &opened, opened.tap())?;
    let mut losses = manifest.rounded.clone();
    let changed = manifest.linears.iter();
    losses.extend(changed.filter_map(|(name, record)| Some((name.clone(), record.loss?))));
    if !manifest.lossy {
        check_equal(gate.trained, &gauged).map_err(|e| e.at(target.display()))?;
    }
    record(&mut manifest, gate, &gauged);
    manifest.write(staged.path())?;
    let bytes = folder_bytes(staged.path(), |_| true)?;
    let weights = folder_bytes(staged.path(), |name| {
        [".safetensors", ".gguf"].iter().any(|end| name.ends_with(end))
    })?;
    let parameters: usize =
        opened.config.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum();
    let bits_per_parameter = 8.0 * weights as f64 / parameters.max(1) as f64;
    staged.commit()?;
    let Manifest { bits_per_weight, lossy, .. } = manifest;
    let (path, seconds) = (target.to_owned(), start.elapsed().as_secs_f64());
    Ok(Exported {
        path,
        bytes,
        bits_per_weight,
        bits_per_parameter,
        lossy,
        losses,
        gauged,
        seconds,
    })
}

fn write_tensors(writing: &Writing<'_>, dir: &Path, manifest: &mut Manifest) -> Result<()> {
    let mut writer = ShardWriter::create(dir, MAX_SHARD_BYTES)?;
    let mut stats = WeightStats::default();
    let names = writing.linears().map(|name| (weight_name(name), Some(name)));
    let dense = writing.dense_names().map(|name| (name.to_owned(), None));
    // In the order of names, as the source has them.
    let all: BTreeMap<String, Option<&str>> = names.chain(dense).collect();
    for (name, linear) in all {
        let Some(linear) = linear else {
            if let Some(loss) = writing.dense_loss(&name)? {
                manifest.rounded.insert(name.clone(), loss);
            }
            let (tensor, name) = (writing.dense(&name)?, writing.stored_as(&name));
            manifest.dense.insert(name.clone(), tensor.sha256());
            writer.add(&name, &writing.laid_out(&name, tensor)?)?;
            continue;
        };
        let stored = writing.stored(linear)?;
        let tensors = writing.encode(linear, &stored.weight)?;
        if manifest.format == Format::Fewbit {
            stats.add(&stored.weight);
        } else {
            let bytes: usize = tensors.iter().map(|(_, tensor)| tensor.bytes.len()).sum();
            stats.weights += stored.weight.layout.len() as u64;
            stats.bits += 8.0 * bytes as f64;
        }
        manifest.linears.insert(linear.to_owned(), stored.record(&tensors));
        for (name, tensor) in tensors {
            writer.add(&name, &writing.laid_out(&name, tensor)?)?;
        }
    }
    writer.finish(&BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    manifest.files.extend(weight_files(dir)?);
    manifest.bits_per_weight = stats.bits_per_weight();
    Ok(())
}

/// One file instead of tensors by name: its hash stands among those of files.
fn write_file(
    format: &dyn SingleFile,
    writing: &Writing<'_>,
    dir: &Path,
    manifest: &mut Manifest,
) -> Result<()> {
    let mut stats = WeightStats::default();
    stats.bits = format.write(writing, dir, &mut |linear, stored| {
        stats.weights += stored.weight.layout.len() as u64;
        manifest.linears.insert(linear.to_owned(), stored.record(&[]));
    })?;
    for name in writing.dense_names() {
        if let Some(loss) = writing.dense_loss(name)? {
            manifest.rounded.insert(name.to_owned(), loss);
        }
    }
    manifest.bits_per_weight = stats.bits_per_weight();
    let file = format.file();
    manifest.files.insert(file.to_owned(), sha256_file(&dir.join(file))?);
    Ok(())
}

/// What is known before anything is written.
fn manifest(format: Format, writing: &Writing<'_>) -> Manifest {
    Manifest {
        format,
        format_version: FORMAT_VERSION,
        fewbit: env!("CARGO_PKG_VERSION").to_owned(),
        bit_order: "lsb_stream".to_owned(),
        axis: "in".to_owned(),
        provenance: writing.parts.provenance.clone(),
        adapter: None,
        linears: BTreeMap::new(),
        activations: writing.parts.activations.clone(),
        dense: BTreeMap::new(),
        files: BTreeMap::new(),
        bits_per_weight: 0.0,
        rounded: BTreeMap::new(),
        lossy: false,
        logits: None,
        parity: None,
        sha256: None,
    }
}

/// config.json, tokenizer files, chat template, generation settings; gives the hash of each.
fn write_companions(
    writing: &Writing<'_>,
    manifest: &Manifest,
    dir: &Path,
) -> Result<BTreeMap<String, String>> {
    let source = writing.parts.dir;
    let path = source.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    let mut config: Value = serde_json::from_str(text.strip_prefix('\u{feff}').unwrap_or(&text))
        .map_err(|e| Error::failed(format!("config.json is not valid: {e}")).at(path.display()))?;
    // How the source was packed is no longer true of what is written.
    let elsewhere = |section: &Value| section["quant_method"] != "fewbit";
    if let Some(map) = config.as_object_mut() {
        for key in ["quantization", "quantization_config"] {
            if map.get(key).is_some_and(elsewhere) {
                map.shift_remove(key);
            }
        }
    }
    let config = writing.configured(config)?;
    let path = dir.join("config.json");
    std::fs::write(&path, format!("{config:#}\n")).map_err(|e| Error::io("write", &path, &e))?;
    let mut hashes = BTreeMap::from([("config.json".to_owned(), sha256_file(&path)?)]);
    for source in companions(source) {
        if let Some(name) = source.file_name() {
            let to = dir.join(name);
            std::fs::copy(&source, &to).map_err(|e| Error::io("copy", &source, &e))?;
            hashes.insert(name.to_string_lossy().into_owned(), sha256_file(&to)?);
        }
    }
    for source in licences(source)? {
        let Some(name) = source.file_name() else { continue };
        let to = dir.join(name);
        std::fs::copy(&source, &to).map_err(|e| Error::io("copy", &source, &e))?;
        hashes.insert(name.to_string_lossy().into_owned(), sha256_file(&to)?);
    }
    let path = dir.join(CARD);
    // A card that cannot be read is none.
    let head = std::fs::read_to_string(source.join(CARD)).unwrap_or_default();
    std::fs::write(&path, card(manifest, &head)).map_err(|e| Error::io("write", &path, &e))?;
    hashes.insert(CARD.to_owned(), sha256_file(&path)?);
    Ok(hashes)
}

/// Bytes of the files in a folder whose names are `counted`.
fn folder_bytes(dir: &Path, counted: impl Fn(&str) -> bool) -> Result<u64> {
    let mut total = 0;
    let counted = |path: &PathBuf| counted(&path.file_name().unwrap_or_default().to_string_lossy());
    for path in entries(dir)?.into_iter().filter(counted) {
        total += path.symlink_metadata().map_err(|e| Error::io("read", &path, &e))?.len();
    }
    Ok(total)
}
