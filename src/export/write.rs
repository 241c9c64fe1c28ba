//! Writing an export: staged, re-opened, compared, and only then in its place.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::approximate::Loss;
use super::gguf::model as gguf;
use super::manifest::{FORMAT_VERSION, LogitsRecord, Manifest, ParityRecord};
use super::parts::{self, ModelParts, Writing};
use super::{AdapterHead, Format, MANIFEST_FILE, dequantized, fewbit, open_model};
use crate::error::{Error, Result};
use crate::model::{companions, weight_name};
use crate::quant::QuantizedWeight;
use crate::store::folder::{StagedFolder, sha256_file};
use crate::store::safetensors::ShardWriter;
use crate::store::{HostTensor, hex};
use crate::task::{Gauge, Gauged};

/// Largest shard that is written.
const MAX_SHARD_BYTES: u64 = 5 << 30;

/// The half of the gate that runs the model: measured as trained before, and on the re-opened
/// folder.
pub struct Gate<'a> {
    /// Measures a model.
    pub gauge: &'a Gauge<'a>,
    /// What it said of the model as trained.
    pub trained: &'a Gauged,
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

/// SHA-256 of weights as little-endian f32.
pub fn weights_sha256(weights: &[f32]) -> String {
    let mut hash = Sha256::new();
    let mut bytes = [[0; 4]; 4096];
    for chunk in weights.chunks(bytes.len()) {
        let bytes = &mut bytes[..chunk.len()];
        for (bytes, weight) in bytes.iter_mut().zip(chunk) {
            *bytes = weight.to_le_bytes();
        }
        hash.update(bytes.as_flattened());
    }
    hex(&hash.finalize())
}

/// Writes `parts` as `format` to `target`. The folder appears only when the re-opened files hold
/// exactly what was trained, or exactly the change that its options allow; whatever was at `target`
/// stays until then.
///
/// # Errors
/// I/O errors; exit code 3 when the format cannot hold the model, 5 when the gate fails.
pub fn write(
    parts: &ModelParts<'_>,
    format: Format,
    target: &Path,
    gate: &Gate<'_>,
) -> Result<Exported> {
    write_adapted(parts, None, format, target, gate)
}

/// As [`write`]; the manifest names the adapter that the scales are of.
pub(super) fn write_adapted(
    parts: &ModelParts<'_>,
    adapter: Option<&AdapterHead>,
    format: Format,
    target: &Path,
    gate: &Gate<'_>,
) -> Result<Exported> {
    let start = Instant::now();
    let staged = StagedFolder::create(target)?;
    let writing = Writing::new(parts, format, gate.gauge.device)?;
    let mut manifest = match format {
        Format::Gguf => write_gguf(&writing, staged.path())?,
        _ => write_tensors(&writing, staged.path())?,
    };
    manifest.adapter = adapter.cloned();
    let changed = manifest.linears.values().any(|record| record.loss.is_some());
    manifest.lossy = changed || !manifest.rounded.is_empty();
    manifest.files = write_companions(&writing, &manifest, staged.path())?;
    if format == Format::Gguf {
        let sha256 = sha256_file(&staged.path().join(gguf::FILE))?;
        manifest.files.insert(gguf::FILE.to_owned(), sha256);
    }
    manifest.write(staged.path())?;
    let opened = open_model(staged.path())?;
    parts::compare(&writing, &opened)?;
    let gauged = gate.gauge.measure(&opened.config, &opened, opened.tap())?;
    let mut losses = manifest.rounded.clone();
    let changed = manifest.linears.iter();
    losses.extend(changed.filter_map(|(name, record)| Some((name.clone(), record.loss?))));
    if !manifest.lossy {
        check_equal(gate.trained, &gauged).map_err(|e| e.at(target.display()))?;
    }
    record(&mut manifest, gate, &gauged);
    manifest.write(staged.path())?;
    let bytes = folder_bytes(staged.path())?;
    staged.commit()?;
    let Manifest { bits_per_weight, lossy, .. } = manifest;
    let (path, seconds) = (target.to_owned(), start.elapsed().as_secs_f64());
    Ok(Exported { path, bytes, bits_per_weight, lossy, losses, gauged, seconds })
}

/// The same weights compute the same numbers.
fn check_equal(trained: &Gauged, exported: &Gauged) -> Result<()> {
    let failed = |what: String| Err(Error::gate(what).fix("report this: nothing was written"));
    if trained.logits_sha256() != exported.logits_sha256() {
        return failed(format!(
            "the exported model's logits differ from the trained model's by {:e}",
            trained.logits_differ(exported)
        ));
    }
    if trained.prompts_nll.to_bits() != exported.prompts_nll.to_bits() {
        return failed(format!(
            "the exported model's loss on the prompts {} is not the trained model's {}",
            exported.prompts_nll, trained.prompts_nll
        ));
    }
    match (&trained.perplexity, &exported.perplexity) {
        (Some(a), Some(b)) if a.perplexity.to_bits() != b.perplexity.to_bits() => failed(format!(
            "the exported model's perplexity {} is not the trained model's {}",
            b.perplexity, a.perplexity
        )),
        _ => Ok(()),
    }
}

fn record(manifest: &mut Manifest, gate: &Gate<'_>, gauged: &Gauged) {
    manifest.logits = Some(LogitsRecord {
        prompts: gate.gauge.prompts.clone(),
        next: gauged.next_tokens(),
        sha256: gauged.logits_sha256(),
        differ: gate.trained.logits_differ(gauged),
        nll: gauged.prompts_nll,
    });
    let text = gate.gauge.text.as_ref();
    let measured = text.zip(gate.trained.perplexity.as_ref()).zip(gauged.perplexity.as_ref());
    manifest.parity = measured.map(|((text, trained), exported)| ParityRecord {
        trained: trained.perplexity,
        exported: exported.perplexity,
        tokens: exported.tokens,
        context: exported.context,
        stride: (exported.stride != exported.context).then_some(exported.stride),
        windows: Some(exported.windows),
        data_sha256: text.sha256.clone(),
        format: text.format,
    });
}

fn write_tensors(writing: &Writing<'_>, dir: &Path) -> Result<Manifest> {
    let mut writer = ShardWriter::create(dir, MAX_SHARD_BYTES)?;
    let mut stats = WeightStats::default();
    let mut manifest = manifest(writing);
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
        let weight = &stored.weight;
        let tensors: Vec<(String, HostTensor)> = match (&writing.packer, writing.format) {
            (Some(packer), _) => packer.encode(linear, weight)?,
            (None, Format::Dequantized) => {
                let shape = [weight.layout.out, weight.layout.inputs];
                vec![(name.clone(), writing.typed(&name, shape, &stored.decoded)?)]
            }
            (None, _) => fewbit::encode(linear, weight),
        };
        if writing.format == Format::Fewbit {
            stats.add(weight);
        } else {
            let bytes: usize = tensors.iter().map(|(_, tensor)| tensor.bytes.len()).sum();
            stats.weights += weight.layout.len() as u64;
            stats.bits += 8.0 * bytes as f64;
        }
        manifest.linears.insert(linear.to_owned(), stored.record(&tensors));
        for (name, tensor) in tensors {
            writer.add(&name, &writing.laid_out(&name, tensor)?)?;
        }
    }
    writer.finish(&BTreeMap::from([("format".to_owned(), "pt".to_owned())]))?;
    manifest.bits_per_weight = stats.bits_per_weight();
    Ok(manifest)
}

/// One file instead of tensors by name: its hash stands among those of files.
fn write_gguf(writing: &Writing<'_>, dir: &Path) -> Result<Manifest> {
    let mut manifest = manifest(writing);
    let mut stats = WeightStats::default();
    stats.bits = gguf::write(writing, dir, &mut |linear, stored| {
        stats.weights += stored.weight.layout.len() as u64;
        manifest.linears.insert(linear.to_owned(), stored.record(&[]));
    })?;
    manifest.bits_per_weight = stats.bits_per_weight();
    Ok(manifest)
}

fn manifest(writing: &Writing<'_>) -> Manifest {
    Manifest {
        format: writing.format,
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
    let config: Value = serde_json::from_str(&text)
        .map_err(|e| Error::failed(format!("config.json is not valid: {e}")).at(path.display()))?;
    let config = configured(writing, config)?;
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
    let path = dir.join(CARD);
    std::fs::write(&path, card(manifest)).map_err(|e| Error::io("write", &path, &e))?;
    hashes.insert(CARD.to_owned(), sha256_file(&path)?);
    Ok(hashes)
}

/// The source's `config.json` with what the format has to say.
fn configured(writing: &Writing<'_>, mut config: Value) -> Result<Value> {
    match (writing.format, &writing.packer) {
        (Format::Dequantized, _) => {
            let options = writing.parts.options.dequantized.clone().unwrap_or_default();
            config = dequantized::config(config, options.dtype, writing.unties());
        }
        (_, Some(packer)) => {
            if writing.unties() {
                config["tie_word_embeddings"] = json!(false);
            }
            packer.configure(&mut config)?;
        }
        (Format::Gguf, _) => {
            if writing.unties() {
                config["tie_word_embeddings"] = json!(false);
            }
            // The file says it itself; what the source said is not true of it.
            if let Some(map) = config.as_object_mut() {
                map.shift_remove("quantization_config");
            }
        }
        (_, None) => {
            if let Some(map) = config.as_object_mut() {
                let about = json!({
                    "quant_method": "fewbit",
                    "format_version": FORMAT_VERSION,
                    "manifest": MANIFEST_FILE,
                });
                map.insert("quantization_config".to_owned(), about);
            }
        }
    }
    Ok(config)
}

/// The card's name in a folder.
const CARD: &str = "README.md";

/// What the folder is, for who finds it.
fn card(manifest: &Manifest) -> String {
    let mut widths: BTreeMap<u8, usize> = BTreeMap::new();
    for record in manifest.linears.values() {
        *widths.entry(record.bits.get()).or_default() += 1;
    }
    let width = |(bits, count): (&u8, &usize)| {
        let linears = if *count == 1 { "matrix" } else { "matrices" };
        format!("{count} {linears} in {bits} bits")
    };
    let widths: Vec<String> = widths.iter().map(width).collect();
    let methods: BTreeSet<&str> =
        manifest.linears.values().map(|record| record.method.as_str()).collect();
    let methods = methods.into_iter().collect::<Vec<_>>().join(", ");
    let what = if widths.is_empty() {
        "Nothing quantized".to_owned()
    } else {
        format!("{} by {methods}", widths.join(", "))
    };
    let losses = manifest.linears.values().filter_map(|record| record.loss);
    let losses = losses.chain(manifest.rounded.values().copied());
    let worst = losses.map(|loss| loss.relative).fold(0.0, f64::max);
    let kept = if manifest.lossy {
        format!(
            "the format does not hold all of what was trained: weights were changed by up to \
             {:.2} % (relative norm per matrix)",
            100.0 * worst
        )
    } else {
        "the weights decode to what was trained, bit for bit".to_owned()
    };
    format!(
        "# {model}\n\n\
         {what}, written by fewbit {version} as `{name}`: {about}.\n\n\
         Made from {model} (sha256 of its files {sha}). `{MANIFEST_FILE}` has hashes of \
         everything, `fewbit verify` checks them; {kept}.\n",
        model = manifest.provenance.model,
        version = env!("CARGO_PKG_VERSION"),
        name = manifest.format.name(),
        about = manifest.format.about(),
        sha = &manifest.provenance.model_sha256,
    )
}

fn folder_bytes(dir: &Path) -> Result<u64> {
    let mut total = 0;
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io("list", dir, &e))? {
        let entry = entry.map_err(|e| Error::io("list", dir, &e))?;
        total += entry.metadata().map_err(|e| Error::io("read", &entry.path(), &e))?.len();
    }
    Ok(total)
}
