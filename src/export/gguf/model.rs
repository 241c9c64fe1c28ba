//! A whole model as one GGUF file, and its weights back.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use super::llama::{self, Interleaved};
use super::{Affine, BlockType, Header, Reader, blocks, choose, tokenizer};
use crate::error::{Error, Result};
use crate::export::folder::ModelParts;
use crate::export::packed::Unpacked;
use crate::model::{EMBEDDING, HEAD, ModelConfig, weight_name};
use crate::quant::QuantizedWeight;
use crate::store::folder::write_atomic_with;

/// The file's name in an exported folder.
pub(in crate::export) const FILE: &str = "model.gguf";

/// How one tensor is stored.
struct Planned {
    /// The source's name.
    name: String,
    /// The file's.
    stored: String,
    shape: Vec<usize>,
    kind: BlockType,
}

/// Writes `dir/model.gguf`: every tensor chosen first, then written one by one. Gives the bits that
/// the quantized weights take.
///
/// # Errors
/// When a weight does not fit any block type exactly, with the reason; I/O errors.
pub(in crate::export) fn write(parts: &ModelParts<'_>, name: &str, dir: &Path) -> Result<f64> {
    if parts.activations.is_some() {
        return Err(Error::preflight(
            "format.gguf holds weights alone, and this model quantizes activations too",
        )
        .fix("format.fewbit, which records them"));
    }
    let config = ModelConfig::read(parts.dir)?;
    let tensors = plan(parts, &config)?;
    let mut header = Header::new();
    let mostly = mostly(&tensors, parts);
    for (key, value) in llama::metadata(&config, name, mostly)? {
        header.set(&key, value)?;
    }
    let tokenizer = tokenizer::read(parts.dir, &config)?;
    for (key, value) in tokenizer.entries {
        header.set(&key, value)?;
    }
    for note in tokenizer.notes {
        tracing::warn!("{note}");
    }
    let factors = llama::rope_factors(&config);
    if let Some(factors) = &factors {
        header.announce(llama::ROPE_FACTORS, &[factors.len()], BlockType::F32)?;
    }
    for tensor in &tensors {
        header.announce(&tensor.stored, &tensor.shape, tensor.kind)?;
    }
    let path = dir.join(FILE);
    let mut bits = 0.0;
    write_atomic_with(&path, |file: &mut File| {
        let mut writer = header.start(std::io::BufWriter::new(file), &path)?;
        if let Some(factors) = &factors {
            let bytes = blocks::encode_dense(factors, BlockType::F32).map_err(Error::from)?;
            writer.write(llama::ROPE_FACTORS, &bytes)?;
        }
        for tensor in &tensors {
            let bytes = encode(parts, &config, tensor)?;
            if quantized(parts, &tensor.name).is_some() {
                bits += 8.0 * bytes.len() as f64;
            }
            writer.write(&tensor.stored, &bytes)?;
        }
        writer.finish().map(drop)
    })?;
    Ok(bits)
}

fn quantized<'a>(parts: &ModelParts<'a>, name: &str) -> Option<&'a QuantizedWeight> {
    parts.quantized.get(name.strip_suffix(".weight")?).map(|(weight, _)| weight)
}

fn plan(parts: &ModelParts<'_>, config: &ModelConfig) -> Result<Vec<Planned>> {
    let names = parts.names();
    let mut tensors = Vec::new();
    for name in &names {
        let stored = stored_name(name, config, &|other| names.contains(other));
        let Some(stored) = stored else {
            return Err(Error::preflight("format.gguf has no name for this tensor").at(name));
        };
        if stored.is_empty() {
            continue;
        }
        let (shape, kind) = if let Some(weight) = quantized(parts, name) {
            let linear = name.trim_end_matches(".weight");
            let kind = with_affine(weight, linear, config, |affine| {
                choose::choose(affine).map_err(|refusal| Error::from(refusal).at(linear))
            })?;
            (vec![weight.layout.out, weight.layout.inputs], kind)
        } else {
            let tensor = parts.dense(name)?;
            let values = tensor.to_f32().map_err(|e| e.at(name))?;
            // Readers want vectors in 32 bits.
            let kind = match tensor.shape.len() {
                1 => BlockType::F32,
                _ => choose::choose_dense(&values),
            };
            (tensor.shape, kind)
        };
        tensors.push(Planned { name: name.clone(), stored, shape, kind });
    }
    Ok(tensors)
}

/// The name in the file; empty for a tensor that the file does not repeat.
fn stored_name(
    name: &str,
    config: &ModelConfig,
    contains: &dyn Fn(&str) -> bool,
) -> Option<String> {
    let head = weight_name(HEAD);
    if name == head && config.tied {
        // A tied checkpoint may hold its one matrix under the head's name.
        return if contains(EMBEDDING) {
            Some(String::new())
        } else {
            llama::tensor_name(EMBEDDING)
        };
    }
    llama::tensor_name(name)
}

/// The type that most quantized weights are stored in.
fn mostly(tensors: &[Planned], parts: &ModelParts<'_>) -> BlockType {
    let mut counts: BTreeMap<u32, (usize, BlockType)> = BTreeMap::new();
    for tensor in tensors.iter().filter(|tensor| quantized(parts, &tensor.name).is_some()) {
        let entry = counts.entry(tensor.kind.id()).or_insert((0, tensor.kind));
        entry.0 += tensor.shape.iter().product::<usize>();
    }
    counts.into_values().max_by_key(|(count, _)| *count).map_or(BlockType::F32, |(_, kind)| kind)
}

/// Calls `f` with the weight as the file holds it.
fn with_affine<R>(
    weight: &QuantizedWeight,
    linear: &str,
    config: &ModelConfig,
    f: impl FnOnce(&Affine<'_>) -> Result<R>,
) -> Result<R> {
    let unpacked = Unpacked::new(linear, weight)?;
    let plain = unpacked.affine(linear, weight)?;
    let affine = Affine {
        rows: plain.out,
        columns: plain.inputs,
        group_len: plain.group_len,
        bits: plain.bits,
        codes: plain.codes,
        scale: plain.scale,
        zero: plain.zero,
    };
    match llama::rotated_heads(&weight_name(linear), config) {
        Some(heads) => f(&Interleaved::new(&affine, heads)?.affine()),
        None => f(&affine),
    }
}

fn encode(parts: &ModelParts<'_>, config: &ModelConfig, tensor: &Planned) -> Result<Vec<u8>> {
    let Planned { name, kind, .. } = tensor;
    if let Some(weight) = quantized(parts, name) {
        let linear = name.trim_end_matches(".weight");
        return with_affine(weight, linear, config, |affine| {
            blocks::encode(affine, *kind).map_err(|refusal| Error::from(refusal).at(linear))
        });
    }
    let mut values = parts.dense(name)?.to_f32().map_err(|e| e.at(name))?;
    if let Some(heads) = llama::rotated_heads(name, config) {
        values = llama::interleave(&values, tensor.shape[0], heads)?;
    }
    blocks::encode_dense(&values, *kind).map_err(|refusal| Error::from(refusal).at(name))
}

/// The weights of a file, under the names of a Hugging Face folder.
#[derive(Debug)]
pub(in crate::export) struct Weights {
    reader: Mutex<Reader<File>>,
    config: ModelConfig,
}

impl Weights {
    /// Opens `dir/model.gguf`; `None` where there is none.
    pub(in crate::export) fn open(dir: &Path, config: &ModelConfig) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let reader = Mutex::new(Reader::open(&path)?);
        Ok(Some(Self { reader, config: config.clone() }))
    }

    fn stored(&self, name: &str) -> Option<String> {
        let name = if self.config.tied && name == weight_name(HEAD) { EMBEDDING } else { name };
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let holds = |stored: &String| reader.tensors().contains_key(stored);
        llama::tensor_name(name).filter(holds)
    }

    /// Whether the file holds a tensor.
    pub(in crate::export) fn contains(&self, name: &str) -> bool {
        self.stored(name).is_some()
    }

    /// A tensor's values, row-major, in the order of rows that the model has.
    pub(in crate::export) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let stored = self.stored(name).ok_or_else(|| {
            Error::preflight("the GGUF file lacks a tensor that config.json asks for").at(name)
        })?;
        let values = {
            let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
            let found = reader.tensors()[&stored].shape.clone();
            if found != shape {
                return Err(Error::preflight(format!(
                    "the tensor has shape {found:?}, config.json asks for {shape:?}"
                ))
                .at(name));
            }
            reader.read_f32(&stored)?
        };
        let values = match llama::rotated_heads(name, &self.config) {
            Some(heads) => llama::split_halves(&values, shape[0], heads)?,
            None => values,
        };
        // A block with a negative step gives its zero a sign.
        Ok(values.into_iter().map(|value| value + 0.0).collect())
    }
}
