//! A whole model as one GGUF file, and its weights back.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use fewbit_gguf::{BlockType, Header, Reader, UniformWeight};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::folder::folder_files;
use super::llama::Rows;
use super::names::{part_of, tensor_name};
use super::{llama, tokenizer};
use crate::error::{Error, Result};
use crate::export::coded::Coded;
use crate::export::embeddings::{EmbeddingGrid, Embeddings};
use crate::export::format::{FileFormat, Kind, SingleFile, Writing};
use crate::export::parts::Stored;
use crate::model::{ModelConfig, weight_name};
use crate::quant::{Bits, Grid, GroupAxis, GroupLayout, QuantizedWeight, Symmetry};
use crate::store::folder::{entries, write_atomic_with};

/// The file's name in an exported folder.
pub(in crate::export) const FILE: &str = "model.gguf";

/// Keys of `format.gguf`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GgufConfig {
    /// What embedding and head are stored as: codes of 8, 6 or 4 bits (Q8_0, Q6_K, Q4_0), or floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Embeddings>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

impl FileFormat for GgufConfig {
    fn about(&self) -> &'static str {
        "One GGUF file: llama.cpp; the block type that holds each weight exactly"
    }

    fn lossy(&self) -> bool {
        self.lossy
    }

    fn kind(&self) -> Kind<'_> {
        Kind::File(self)
    }
}

impl SingleFile for GgufConfig {
    fn file(&self) -> &'static str {
        FILE
    }

    fn accepts(&self, name: &str, weight: &QuantizedWeight, model: &ModelConfig) -> Result<f64> {
        let kind = choose(name, weight, model)?;
        Ok(8.0 * kind.block_bytes() as f64 / kind.block_len() as f64)
    }

    fn embeddings(&self) -> Option<Embeddings> {
        self.embeddings
    }

    fn embedding_grid(&self, bits: Bits, inputs: usize) -> Option<EmbeddingGrid> {
        let (block, grid) = match bits.get() {
            4 | 8 => (32, EmbeddingGrid::Groups(32, Symmetry::FullRange)),
            6 => (256, EmbeddingGrid::Nested),
            _ => return None,
        };
        inputs.is_multiple_of(block).then_some(grid)
    }

    fn fits(&self, writing: &Writing<'_>) -> Result<()> {
        llama::family(&meant(writing))?;
        for name in writing.dense_names() {
            stored_name(name, writing).ok_or_else(|| nameless(name))?;
        }
        let dir = writing.parts.dir;
        if !dir.join("tokenizer.json").is_file() {
            return Err(Error::preflight(
                "format.gguf holds the tokenizer too, and the model's folder has no tokenizer.json",
            )
            .at(dir.display())
            .fix("the model's tokenizer.json in its folder, or another format"));
        }
        tokenizer::read(dir, &writing.config).map(drop)
    }

    /// Every tensor is chosen first, then written one by one.
    fn write(
        &self,
        writing: &Writing<'_>,
        dir: &Path,
        done: &mut dyn FnMut(&str, &Stored),
    ) -> Result<f64> {
        let config = &meant(writing);
        llama::family(config)?;
        let tensors = plan(writing)?;
        let mut header = Header::new();
        let name = &writing.parts.provenance.model;
        for (key, value) in llama::metadata(config, name, mostly(&tensors))? {
            header.set(&key, value)?;
        }
        let tokenizer = tokenizer::read(writing.parts.dir, config)?;
        for (key, value) in tokenizer.entries {
            header.set(&key, value)?;
        }
        for note in tokenizer.notes {
            tracing::warn!("{note}");
        }
        let factors = llama::rope_factors(config);
        for (name, divisors) in &factors {
            header.announce(name, &[divisors.len()], BlockType::F32)?;
        }
        for tensor in &tensors {
            header.announce(&tensor.stored, &tensor.shape, tensor.kind)?;
        }
        let path = dir.join(FILE);
        let mut bits = 0.0;
        write_atomic_with(&path, |file: &mut File| {
            let mut writer = header.start(std::io::BufWriter::new(file), &path)?;
            for (name, divisors) in &factors {
                writer.write(name, &fewbit_gguf::encode_dense(divisors, BlockType::F32)?)?;
            }
            for tensor in &tensors {
                let bytes = encode(writing, tensor, done)?;
                if tensor.coded {
                    bits += 8.0 * bytes.len() as f64;
                }
                writer.write(&tensor.stored, &bytes)?;
            }
            writer.finish()?;
            Ok(())
        })?;
        Ok(bits)
    }
}

/// How one tensor is stored.
struct Planned {
    /// The source's names: one, or one for each expert.
    names: Vec<String>,
    /// Whether they are weights of quantized linears.
    coded: bool,
    /// The file's.
    stored: String,
    shape: Vec<usize>,
    kind: BlockType,
}

fn plan(writing: &Writing<'_>) -> Result<Vec<Planned>> {
    let linears = writing.linears().map(|name| (weight_name(name), Some(name.to_owned())));
    let dense = writing.dense_names().map(|name| (name.to_owned(), None));
    let all: BTreeMap<String, Option<String>> = linears.chain(dense).collect();
    let mut tensors: Vec<Planned> = Vec::new();
    // Where the tensor of a stack is, by its name.
    let mut stacks: BTreeMap<String, usize> = BTreeMap::new();
    for (name, linear) in all {
        let Some(stored) = stored_name(&name, writing) else {
            return Err(nameless(&name));
        };
        if stored.is_empty() {
            continue;
        }
        let (shape, kind) = if let Some(linear) = &linear {
            let weight = writing.stored(linear)?.weight;
            let shape = vec![weight.layout.out, weight.layout.inputs];
            (shape, choose(linear, &weight, &writing.config)?)
        } else {
            let tensor = writing.dense(&name)?;
            let values = tensor.to_f32().map_err(|e| e.at(&name))?;
            // Readers want vectors in 32 bits, and routers.
            let kind = match tensor.shape.len() {
                1 => BlockType::F32,
                _ if is_router(&name, &writing.config) => BlockType::F32,
                _ => fewbit_gguf::choose_dense(&values),
            };
            (tensor.shape, kind)
        };
        let coded = linear.is_some();
        let Some((expert, count)) = part_of(&name, &writing.config) else {
            tensors.push(Planned { names: vec![name], coded, stored, shape, kind });
            continue;
        };
        let place = *stacks.entry(stored.clone()).or_insert_with(|| {
            let (names, shape) = (vec![String::new(); count], [vec![count], shape].concat());
            tensors.push(Planned { names, coded, stored, shape, kind });
            tensors.len() - 1
        });
        let stack = &mut tensors[place];
        if stack.coded != coded {
            let what = "some experts of a block are quantized and others are not, and a GGUF file \
                        holds them as one tensor";
            return Err(Error::preflight(what).at(name).fix("one quant.override for all of them"));
        }
        // The larger type holds what the smaller one does, or the encoder says that it does not.
        let bits = |kind: BlockType| kind.block_bytes() * 256 / kind.block_len();
        if bits(kind) > bits(stack.kind) {
            stack.kind = kind;
        }
        stack.names[expert] = name;
    }
    Ok(tensors)
}

/// Whether a tensor sends tokens to experts.
fn is_router(name: &str, config: &ModelConfig) -> bool {
    let base = name.strip_suffix(".weight").unwrap_or(name);
    let inner = config.inner(base).map(|(_, inner)| inner);
    config.arch.experts.as_ref().is_some_and(|experts| Some(experts.router) == inner)
}

/// The block type that holds a linear's weight exactly.
///
/// # Errors
/// When there is none, with the reason.
fn choose(linear: &str, weight: &QuantizedWeight, config: &ModelConfig) -> Result<BlockType> {
    let weight = coded(linear, weight, config)?;
    fewbit_gguf::choose(&view(&weight)).map_err(|refusal| Error::from(refusal).at(linear))
}

/// The model that is written: a head of its own makes it an untied one.
fn meant(writing: &Writing<'_>) -> ModelConfig {
    let mut config = writing.config.clone();
    config.tied &= !writing.unties();
    config
}

fn nameless(name: &str) -> Error {
    Error::preflight("format.gguf has no name for this tensor")
        .at(name)
        .fix("another format, or a model without this tensor")
}

/// The name in the file; empty for a tensor that the file does not repeat.
fn stored_name(name: &str, writing: &Writing<'_>) -> Option<String> {
    let config = &writing.config;
    if name == weight_name(config.head()) && config.tied && !writing.unties() {
        // A tied checkpoint may hold its one matrix under the head's name.
        let embedding = config.embedding();
        return if writing.contains(&embedding) {
            Some(String::new())
        } else {
            tensor_name(&embedding, config)
        };
    }
    tensor_name(name, config)
}

/// The type that most quantized weights are stored in.
fn mostly(tensors: &[Planned]) -> BlockType {
    let mut counts: BTreeMap<u32, (usize, BlockType)> = BTreeMap::new();
    for tensor in tensors.iter().filter(|tensor| tensor.coded) {
        let entry = counts.entry(tensor.kind.id()).or_insert((0, tensor.kind));
        entry.0 += tensor.shape.iter().product::<usize>();
    }
    counts.into_values().max_by_key(|(count, _)| *count).map_or(BlockType::F32, |(_, kind)| kind)
}

/// A linear's weight with its rows as the file holds them.
fn coded<'w>(name: &str, weight: &'w QuantizedWeight, model: &ModelConfig) -> Result<Coded<'w>> {
    let coded = Coded::uniform(name, weight)?;
    match Rows::of(&weight_name(name), model) {
        Some(rows) => reordered(&coded, rows),
        None => Ok(coded),
    }
}

/// What the container's crate takes of a coded weight, which has to be on a uniform grid.
fn view<'a>(weight: &'a Coded<'_>) -> UniformWeight<'a> {
    UniformWeight {
        out: weight.out,
        inputs: weight.inputs,
        group_len: weight.group_len,
        bits: weight.bits,
        codes: &weight.codes,
        scale: &weight.scale,
        zero: &weight.shift,
    }
}

/// [`Rows::stored`] on codes, scales and zero points.
fn reordered<'w>(coded: &Coded<'_>, rows: Rows) -> Result<Coded<'w>> {
    Ok(Coded {
        codes: rows.stored(&coded.codes, coded.out)?.into(),
        scale: rows.stored(&coded.scale, coded.out)?.into(),
        shift: rows.stored(&coded.shift, coded.out)?.into(),
        ..*coded
    })
}

fn encode(
    writing: &Writing<'_>,
    tensor: &Planned,
    done: &mut dyn FnMut(&str, &Stored),
) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    for name in &tensor.names {
        bytes.extend(encode_one(writing, name, tensor, done)?);
    }
    Ok(bytes)
}

fn encode_one(
    writing: &Writing<'_>,
    name: &str,
    tensor: &Planned,
    done: &mut dyn FnMut(&str, &Stored),
) -> Result<Vec<u8>> {
    let kind = tensor.kind;
    if tensor.coded {
        let linear = name.strip_suffix(".weight").unwrap_or(name);
        let stored = writing.stored(linear)?;
        done(linear, &stored);
        let weight = coded(linear, &stored.weight, &writing.config)?;
        return fewbit_gguf::encode(&view(&weight), kind).map_err(|e| Error::from(e).at(linear));
    }
    let mut values = writing.dense(name)?.to_f32().map_err(|e| e.at(name))?;
    if let Some(rows) = Rows::of(name, &writing.config) {
        values = rows.stored(&values, tensor.shape[0])?;
    }
    let offset = writing.config.gain_offset(name);
    for value in &mut values {
        *value += offset;
    }
    fewbit_gguf::encode_dense(&values, kind).map_err(|refusal| Error::from(refusal).at(name))
}

/// The weights of a file, under the names of a Hugging Face folder.
#[derive(Debug)]
pub(in crate::export) struct Weights {
    reader: Mutex<Reader<File>>,
    config: ModelConfig,
}

impl Weights {
    /// Opens a file for a model that a `config.json` beside it describes.
    pub(in crate::export) fn open(path: &Path, config: &ModelConfig) -> Result<Self> {
        Ok(Self { reader: Mutex::new(Reader::open(path)?), config: config.clone() })
    }

    /// Opens a file that stands alone: gives the small files of a model folder too, by name.
    pub(in crate::export) fn open_alone(path: &Path) -> Result<(Self, BTreeMap<String, String>)> {
        let mut reader = Reader::open(path)?;
        let files = folder_files(&mut reader)?;
        let config = files.get("config.json").map_or("", String::as_str);
        let config = ModelConfig::parse(config).map_err(|e| e.at(path.display()))?;
        Ok((Self { reader: Mutex::new(reader), config }, files))
    }

    /// What the model is.
    pub(in crate::export) fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn stored(&self, name: &str) -> Option<String> {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        self.name_in(&reader, name)
    }

    fn name_in(&self, reader: &Reader<File>, name: &str) -> Option<String> {
        let embedding = self.config.embedding();
        let head = self.config.tied && name == weight_name(self.config.head());
        let name = if head { &embedding } else { name };
        let holds = |stored: &String| reader.tensors().contains_key(stored);
        tensor_name(name, &self.config).filter(holds)
    }

    /// Whether the file holds a tensor.
    pub(in crate::export) fn contains(&self, name: &str) -> bool {
        self.stored(name).is_some()
    }

    /// Whether a tensor is stored as codes.
    pub(in crate::export) fn is_packed(&self, name: &str) -> bool {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let info = self.name_in(&reader, name).and_then(|stored| reader.tensors().get(&stored));
        info.is_some_and(|info| info.kind.block_len() > 1)
    }

    /// A tensor's codes, in the order of rows that the model has; `None` where they stand for no exact
    /// grid.
    pub(in crate::export) fn codes(&self, name: &str) -> Result<Option<QuantizedWeight>> {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(stored) = self.name_in(&reader, name) else { return Ok(None) };
        let info = reader.tensors()[&stored].clone();
        let (part, parts) = part_of(name, &self.config).unwrap_or((0, 1));
        let &[.., out, inputs] = &info.shape[..] else { return Ok(None) };
        let bytes = reader.read_part(&stored, part, parts)?;
        let Some(levels) = fewbit_gguf::decode_levels(info.kind, &bytes)? else { return Ok(None) };
        let fewbit_gguf::Levels { bits, group_len, mut codes, mut scale, mut zero } = levels;
        if let Some(rows) = Rows::of(name, &self.config) {
            codes = rows.ours(&codes, out)?;
            scale = rows.ours(&scale, out)?;
            zero = rows.ours(&zero, out)?;
        }
        let grid = Grid::uniform(scale, zero);
        let groups = out * inputs / group_len;
        let layout = GroupLayout { out, inputs, groups, group_len, axis: GroupAxis::In };
        QuantizedWeight::new(&codes, grid, Bits::new(bits)?, layout).map(Some)
    }

    /// A tensor's values, row-major, in the order of rows that the model has.
    pub(in crate::export) fn values(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let stored = self.stored(name).ok_or_else(|| {
            Error::preflight("the GGUF file lacks a tensor that config.json asks for").at(name)
        })?;
        let values = {
            let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
            let info = reader.tensors()[&stored].clone();
            let (part, parts) = part_of(name, &self.config).unwrap_or((0, 1));
            let wanted = if parts > 1 { [&[parts], shape].concat() } else { shape.to_vec() };
            if info.shape != wanted {
                return Err(Error::preflight(format!(
                    "the tensor has shape {:?}, config.json asks for {wanted:?}",
                    info.shape
                ))
                .at(name));
            }
            let bytes = reader.read_part(&stored, part, parts)?;
            fewbit_gguf::decode(info.kind, &bytes).map_err(|e| Error::from(e).at(name))?
        };
        let values = match Rows::of(name, &self.config) {
            Some(rows) => rows.ours(&values, shape[0])?,
            None => values,
        };
        let offset = self.config.gain_offset(name);
        // A block with a negative step gives its zero a sign.
        Ok(values.into_iter().map(|value| value - offset + 0.0).collect())
    }
}

/// Whether a path is a file of this kind by its name.
pub fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

/// The GGUF file that a path stands for, where no `config.json` says more: the file itself, or the
/// only one of a folder.
///
/// # Errors
/// When a file is no GGUF file, or a folder holds several.
pub fn alone(path: &Path) -> Result<Option<PathBuf>> {
    if path.is_file() {
        if is_gguf(path) {
            return Ok(Some(path.to_owned()));
        }
        return Err(Error::usage("this file is no model")
            .at(path.display())
            .fix("a folder, or a file whose name ends in .gguf"));
    }
    if !path.is_dir() || path.join("config.json").exists() {
        return Ok(None);
    }
    let mut files = entries(path)?;
    files.retain(|file| is_gguf(file));
    match &files[..] {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [first, ..] => {
            let count = files.len();
            Err(Error::usage(format!("the folder holds {count} GGUF files"))
                .at(path.display())
                .fix(format!("one of them: {}", first.display())))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_take_their_scales_along() {
        let weight = Coded {
            out: 4,
            inputs: 2,
            group_len: 2,
            bits: 3,
            codes: vec![0, 1, 2, 3, 4, 5, 6, 7].into(),
            scale: vec![1.0, 2.0, 3.0, 4.0].into(),
            shift: vec![5.0, 6.0, 7.0, 8.0].into(),
            zero_kind: Some(crate::quant::ZeroKind::Integer),
        };
        let turned = reordered(&weight, Rows::Neighbours(1)).unwrap();
        assert_eq!(turned.codes[..], [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(
            (&turned.scale[..], &turned.shift[..]),
            (&[1.0, 3.0, 2.0, 4.0][..], &[5.0, 7.0, 6.0, 8.0][..])
        );
        assert!(reordered(&weight, Rows::Neighbours(4)).is_err());
    }
}
