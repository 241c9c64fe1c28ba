//! Safetensors files and Hugging Face folders of them: a reader that loads one tensor at a time,
//! and writers whose memory does not grow with the model.
//!
//! A file is eight bytes with the header's length, the header (JSON: dtype, shape and byte range
//! of every tensor) and the values. [`Checkpoint`] reads headers only and holds them against the
//! files' real lengths, so that a truncated download is refused before any work starts.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::folder::{write_atomic, write_atomic_with};
use super::{DAMAGED, DType, HostTensor, TensorInfo, TensorSource};
use crate::error::{Error, Kind, Result};

/// The file name of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file name of a sharded model's index.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Key of the string table in a header; no tensor can have this name.
const METADATA_KEY: &str = "__metadata__";
/// Readers in other languages refuse longer headers too.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// A checkpoint whose headers have been read and checked. Values are read on demand.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
    /// Matrices that are given with rows for columns.
    transposed: BTreeSet<String>,
    /// Tensors that are computed, not read, and by what.
    decoded: BTreeSet<String>,
    decoder: Option<Arc<dyn Decode>>,
}

/// Computes tensors of a checkpoint that its files hold in another form.
pub trait Decode: std::fmt::Debug + Send + Sync {
    /// The values of a tensor, row-major.
    ///
    /// # Errors
    /// When the files are damaged.
    fn decode(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>>;
}

impl Checkpoint {
    /// Opens a Hugging Face folder: `model.safetensors`, or else the shards that
    /// `model.safetensors.index.json` names. Tensors that the index does not name are left out.
    ///
    /// # Errors
    /// When there is neither, and when a file is missing, truncated or inconsistent.
    pub fn open(dir: &Path) -> Result<Self> {
        let (single, index) = (dir.join(SINGLE_FILE), dir.join(INDEX_FILE));
        // The order of transformers.
        if single.is_file() {
            Self::open_file(&single)
        } else if index.is_file() {
            Self::open_index(dir, &index)
        } else if dir.is_dir() {
            Err(Error::preflight(format!("the folder has neither {SINGLE_FILE} nor {INDEX_FILE}"))
                .at(dir.display())
                .fix("download the safetensors version of the model into this folder"))
        } else {
            Err(Error::preflight("the model folder does not exist")
                .at(dir.display())
                .fix("check the path"))
        }
    }

    /// One without a file or a tensor.
    pub fn empty() -> Self {
        Self {
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: BTreeMap::new(),
            transposed: BTreeSet::new(),
            decoded: BTreeSet::new(),
            decoder: None,
        }
    }

    /// Opens one safetensors file under any name.
    ///
    /// # Errors
    /// When it is missing, truncated or inconsistent.
    pub fn open_file(path: &Path) -> Result<Self> {
        let header = Header::read(path)?;
        Ok(Self {
            files: vec![path.to_owned()],
            tensors: header.tensors,
            metadata: header.metadata,
            transposed: BTreeSet::new(),
            decoded: BTreeSet::new(),
            decoder: None,
        })
    }

    fn open_index(dir: &Path, index_path: &Path) -> Result<Self> {
        let mut weight_map = read_index(index_path)?;
        let shards: BTreeSet<String> = weight_map.values().cloned().collect();
        let (mut files, mut tensors, mut metadata) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
        for shard in shards {
            let path = shard_path(dir, &shard, index_path)?;
            let header = Header::read(&path)?;
            for (name, info) in header.tensors {
                if weight_map.get(&name) == Some(&shard) {
                    weight_map.remove(&name);
                    tensors.insert(name, info);
                }
            }
            for (key, value) in header.metadata {
                metadata.entry(key).or_insert(value);
            }
            files.push(path);
        }
        match weight_map.pop_first() {
            None => Ok(Self { files, tensors, metadata, ..Self::empty() }),
            Some((name, shard)) => {
                Err(damaged("the index names a tensor that its shard does not have", name)
                    .at(dir.join(shard).display()))
            }
        }
    }

    /// Gives these matrices with rows for columns from now on; others of the names are left alone.
    #[must_use]
    pub fn with_transposed(mut self, names: impl Iterator<Item = String>) -> Self {
        for name in names {
            if let Some(info) = self.tensors.get_mut(&name).filter(|info| info.shape.len() == 2) {
                info.shape.reverse();
                self.transposed.insert(name);
            }
        }
        self
    }

    /// With other tensors than its files name: those that `keep` are read as before, and those of
    /// `computed`, by name and shape, are computed in f32 from `file`.
    #[must_use]
    pub fn decoding(
        mut self,
        keep: impl Fn(&str) -> bool,
        computed: impl Iterator<Item = (String, Vec<usize>)>,
        file: &Path,
        decoder: Arc<dyn Decode>,
    ) -> Self {
        self.tensors.retain(|name, _| keep(name));
        for (name, shape) in computed {
            let bytes = DType::F32.bytes_for(&shape).unwrap_or_default() as u64;
            let info = TensorInfo {
                dtype: DType::F32,
                shape,
                file: file.to_owned(),
                start: 0,
                end: bytes,
            };
            self.tensors.insert(name.clone(), info);
            self.decoded.insert(name);
        }
        if self.files.is_empty() {
            self.files.push(file.to_owned());
        }
        self.decoder = Some(decoder);
        self
    }

    /// The string table of the header; of several shards the first to have a key wins.
    pub fn file_metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|info| info.end - info.start).sum()
    }

    /// The safetensors files, in ascending order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }
}

impl TensorSource for Checkpoint {
    fn names(&self) -> Vec<&str> {
        self.tensors.keys().map(String::as_str).collect()
    }

    fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    fn read(&self, name: &str) -> Result<HostTensor> {
        let Some(info) = self.tensors.get(name) else {
            let error =
                Error::preflight("the checkpoint has no tensor of this name").at(name).fix(DAMAGED);
            return Err(match self.files.first().and_then(|file| file.parent()) {
                Some(folder) => error.at(folder.display()),
                None => error,
            });
        };
        if let Some(decoder) = self.decoder.as_ref().filter(|_| self.decoded.contains(name)) {
            let shape = info.shape.clone();
            let values = decoder.decode(name, &shape)?;
            return Ok(HostTensor::f32(shape, &values));
        }
        let bytes = read_range(info).map_err(|error| error.at(name))?;
        let mut tensor = HostTensor { dtype: info.dtype, shape: info.shape.clone(), bytes };
        if self.transposed.contains(name) {
            tensor.shape.reverse();
            tensor = tensor.transposed()?;
        }
        Ok(tensor)
    }
}

fn read_range(info: &TensorInfo) -> Result<Vec<u8>> {
    let failed = |source| Error::io("read", &info.file, &source);
    let expected = info.end - info.start;
    let mut bytes = Vec::new();
    usize::try_from(expected)
        .ok()
        .and_then(|count| bytes.try_reserve_exact(count).ok())
        .ok_or_else(|| {
            Error::new(Kind::Resources, format!("no memory for a tensor of {expected} bytes"))
                .fix("free some memory")
        })?;
    let mut file = File::open(&info.file).map_err(failed)?;
    file.seek(SeekFrom::Start(info.start)).map_err(failed)?;
    let found = file.take(expected).read_to_end(&mut bytes).map_err(failed)?;
    if found as u64 == expected {
        return Ok(bytes);
    }
    // The lengths fitted when the checkpoint was opened.
    Err(Error::failed(format!(
        "the file has changed since it was opened: {expected} bytes expected at offset {}, {found} \
         found",
        info.start
    ))
    .at(info.file.display())
    .fix("leave the checkpoint alone while it is in use; if it is truncated, download it again"))
}

/// The weight map of an index: tensor name to shard name.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read(path).map_err(|source| Error::io("read", path, &source))?;
    let index: Index = serde_json::from_slice(&text).map_err(|error| {
        damaged(format!("the index of the shards is not valid: {error}"), path.display())
    })?;
    Ok(index.weight_map)
}

/// The path of a shard beside its index. Fails when it is missing, and for a name that would lead
/// out of the folder.
fn shard_path(dir: &Path, shard: &str, index: &Path) -> Result<PathBuf> {
    if Path::new(shard).file_name() != Some(shard.as_ref()) {
        return Err(damaged(format!("{shard:?} is not the name of a shard"), index.display()));
    }
    let path = dir.join(shard);
    if path.is_file() {
        return Ok(path);
    }
    Err(Error::preflight(format!("shard {shard}, which the index names, is missing"))
        .at(path.display())
        .fix("download the checkpoint again"))
}

fn damaged(what: impl Into<String>, place: impl Display) -> Error {
    Error::preflight(what).at(place).fix(DAMAGED)
}

/// The checked header of one file.
struct Header {
    tensors: BTreeMap<String, TensorInfo>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Header {
    fn read(path: &Path) -> Result<Self> {
        let failed = |source| Error::io("read", path, &source);
        let mut file = File::open(path).map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        let mut prefix = [0; 8];
        if file_bytes < 8 {
            return Err(truncated(path, "at least 8", file_bytes));
        }
        file.read_exact(&mut prefix).map_err(failed)?;
        if &prefix == b"version " {
            return Err(Error::preflight("the file is a Git LFS pointer, not the weights")
                .at(path.display())
                .fix("run `git lfs pull` in the model's folder, or download the file itself"));
        }
        let header_bytes = u64::from_le_bytes(prefix);
        if header_bytes > MAX_HEADER_BYTES {
            // Text or another format: its first bytes, taken as a length, are beyond any header.
            return Err(Error::preflight("this is not a safetensors file")
                .at(path.display())
                .fix("check the path; if it should be one, download it again"));
        }
        let data_start = 8 + header_bytes;
        if data_start > file_bytes {
            return Err(truncated(path, format!("at least {data_start}"), file_bytes));
        }
        let mut text = vec![0; header_bytes as usize];
        file.read_exact(&mut text).map_err(failed)?;
        Self::parse(&text, path, data_start, file_bytes)
    }

    fn parse(text: &[u8], path: &Path, data_start: u64, file_bytes: u64) -> Result<Self> {
        let invalid = |error: serde_json::Error| {
            damaged(format!("the header is not valid: {error}"), path.display())
        };
        let mut raw: BTreeMap<String, Value> = serde_json::from_slice(text).map_err(invalid)?;
        let metadata = match raw.remove(METADATA_KEY) {
            Some(value) => serde_json::from_value(value).map_err(invalid)?,
            None => BTreeMap::new(),
        };
        let mut tensors = BTreeMap::new();
        for (name, value) in raw {
            let info = serde_json::from_value(value)
                .map_err(invalid)
                .and_then(|raw| tensor_info(raw, path, data_start))
                .map_err(|error| error.at(&name))?;
            tensors.insert(name, info);
        }
        let end = check_ranges(&tensors, path, data_start)?;
        if end > file_bytes {
            return Err(truncated(path, end, file_bytes));
        }
        if end < file_bytes {
            let what = format!("the file should have {end} bytes by its header, has {file_bytes}");
            return Err(damaged(what, path.display()));
        }
        Ok(Self { tensors, metadata })
    }
}

fn truncated(path: &Path, expected: impl Display, found: u64) -> Error {
    let what = format!("the file is truncated: {expected} bytes expected, {found} found");
    Error::preflight(what).at(path.display()).fix("download it again")
}

/// Checks one tensor's range against its dtype and shape.
fn tensor_info(raw: RawTensor, path: &Path, data_start: u64) -> Result<TensorInfo> {
    let RawTensor { dtype, shape, data_offsets: (start, end) } = raw;
    let Some(dtype) = DType::from_name(&dtype) else {
        return Err(Error::preflight(format!("fewbit cannot read dtype {dtype}"))
            .at(path.display())
            .fix("use a version of the model in F32, F16 or BF16"));
    };
    let found = end.checked_sub(start);
    let expected = dtype.bytes_for(&shape).map(|bytes| bytes as u64);
    let place = data_start.checked_add(start).zip(data_start.checked_add(end));
    match (expected, place) {
        (Some(_), Some((start, end))) if expected == found => {
            Ok(TensorInfo { dtype, shape, file: path.to_owned(), start, end })
        }
        _ => {
            let expected = expected.map_or("too many".to_owned(), |bytes| bytes.to_string());
            let what = format!(
                "shape {shape:?} in {dtype} takes {expected} bytes, but the header gives it bytes \
                 {start} to {end}"
            );
            Err(damaged(what, path.display()))
        }
    }
}

/// Checks that the ranges follow each other without gap or overlap, as the format asks; returns
/// where the last one ends.
fn check_ranges(
    tensors: &BTreeMap<String, TensorInfo>,
    path: &Path,
    data_start: u64,
) -> Result<u64> {
    let mut ranges: Vec<_> =
        tensors.iter().map(|(name, info)| (info.start, info.end, name)).collect();
    ranges.sort_unstable();
    let (mut position, mut previous) = (data_start, None);
    for (start, end, name) in ranges {
        if start != position {
            let fault = if start < position { "overlaps" } else { "leaves a gap after" };
            let before = previous.map_or("the header".to_owned(), |name| format!("tensor {name}"));
            return Err(damaged(format!("tensor {name} {fault} {before}"), path.display()));
        }
        (position, previous) = (end, Some(name));
    }
    Ok(position)
}

/// Writes `tensors` to one safetensors file that appears whole or not at all. Readers in Python
/// expect `metadata` to say `format` = `pt`. Values are laid out by falling element size, so that
/// all are aligned, and in the given order within one size.
///
/// # Errors
/// For a repeated name, for bytes that do not fit their shape, and on I/O errors.
pub fn write_file(
    path: &Path,
    tensors: &[(String, HostTensor)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut names = BTreeSet::new();
    for (name, tensor) in tensors {
        check_new(name, tensor, &mut names).map_err(|error| error.at(path.display()))?;
    }
    let mut ordered: Vec<_> = tensors.iter().collect();
    ordered.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype.size()));
    let header = encode_header(
        ordered.iter().map(|(name, tensor)| (name, tensor.dtype, &tensor.shape)),
        metadata,
    );
    write_atomic_with(path, |file| {
        let pieces = ordered.iter().map(|(_, tensor)| &tensor.bytes);
        std::iter::once(&header)
            .chain(pieces)
            .try_for_each(|bytes| file.write_all(bytes))
            .map_err(|source| Error::io("write", path, &source))
    })
}

/// Refuses what no header can hold: a name twice, the reserved name, bytes that do not fit.
fn check_new(name: &str, tensor: &HostTensor, names: &mut BTreeSet<String>) -> Result<()> {
    tensor.check().map_err(|error| error.at(name))?;
    if name == METADATA_KEY || !names.insert(name.to_owned()) {
        return Err(Error::failed("a tensor of this name cannot be added (again)").at(name));
    }
    Ok(())
}

/// Length and JSON of a header for tensors laid out in this order, padded with spaces so that the
/// values start at a multiple of eight bytes.
fn encode_header<'a>(
    tensors: impl Iterator<Item = (&'a String, DType, &'a Vec<usize>)>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut header = Map::new();
    if !metadata.is_empty() {
        header.insert(METADATA_KEY.to_owned(), json!(metadata));
    }
    let mut start = 0;
    for (name, dtype, shape) in tensors {
        // Checked when the tensor was added: its bytes are in memory or on disk.
        let end = start + dtype.bytes_for(shape).unwrap_or_default();
        let entry = json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [start, end] });
        header.insert(name.clone(), entry);
        start = end;
    }
    let mut text = Value::Object(header).to_string().into_bytes();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    bytes
}

/// Writes a model in shards, tensor by tensor; memory holds no values.
///
/// Values go to temporary files at once, one per shard and element size; [`ShardWriter::finish`]
/// joins them behind their headers, so the disk must hold the model plus one shard. Dropped
/// without `finish`, everything written is removed.
#[derive(Debug)]
pub struct ShardWriter {
    dir: PathBuf,
    max_shard_bytes: u64,
    names: BTreeSet<String>,
    shards: Vec<Shard>,
    finished: Vec<PathBuf>,
}

#[derive(Debug, Default)]
struct Shard {
    bytes: u64,
    /// By element size. Joined by falling size, every tensor is aligned without padding, which the
    /// format does not allow between tensors.
    parts: BTreeMap<usize, Part>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    bytes: u64,
    tensors: Vec<(String, DType, Vec<usize>)>,
}

impl ShardWriter {
    /// Starts writing into the existing folder `dir`. A shard holds at most `max_shard_bytes`
    /// bytes of values, except that a larger tensor has a shard of its own.
    ///
    /// # Errors
    /// When the folder cannot be read, and when it already holds a model: its files would mix with
    /// the new ones.
    pub fn create(dir: &Path, max_shard_bytes: u64) -> Result<Self> {
        let failed = |source| Error::io("read", dir, &source);
        for entry in fs::read_dir(dir).map_err(failed)? {
            let name = entry.map_err(failed)?.file_name();
            let name = name.to_string_lossy();
            if name == SINGLE_FILE
                || name == INDEX_FILE
                || name.starts_with("model-") && name.ends_with(".safetensors")
            {
                return Err(Error::failed("the output folder already holds a model")
                    .at(dir.join(&*name).display())
                    .fix("write into an empty folder"));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            max_shard_bytes,
            names: BTreeSet::new(),
            shards: vec![Shard::default()],
            finished: Vec::new(),
        })
    }

    /// Appends one tensor.
    ///
    /// # Errors
    /// For a repeated name, for bytes that do not fit the shape, and on I/O errors; after an I/O
    /// error `finish` fails too.
    pub fn add(&mut self, name: &str, tensor: &HostTensor) -> Result<()> {
        check_new(name, tensor, &mut self.names)?;
        let bytes = tensor.bytes.len() as u64;
        if let Some(shard) = self.shards.last()
            && shard.bytes > 0
            && shard.bytes.saturating_add(bytes) > self.max_shard_bytes
        {
            self.shards.push(Shard::default());
        }
        let (count, size) = (self.shards.len(), tensor.dtype.size());
        let shard = &mut self.shards[count - 1]; // never empty: `create` puts the first one in
        let part = shard.parts.entry(size).or_insert_with(|| {
            let name = format!(".model-{count:05}-{size}.data-{}", std::process::id());
            Part { path: self.dir.join(name), bytes: 0, tensors: Vec::new() }
        });
        part.append(name, tensor).map_err(|source| Error::io("write", &part.path, &source))?;
        shard.bytes += bytes;
        Ok(())
    }

    /// Writes `model.safetensors`, or several shards and their index, and returns these paths, the
    /// index last. Every header carries `metadata`; readers in Python expect `format` = `pt`.
    ///
    /// # Errors
    /// On I/O errors; nothing then stays behind.
    pub fn finish(mut self, metadata: &BTreeMap<String, String>) -> Result<Vec<PathBuf>> {
        let count = self.shards.len();
        let (mut weight_map, mut total_bytes) = (BTreeMap::new(), 0);
        for (number, shard) in (1..).zip(&self.shards) {
            let file_name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{number:05}-of-{count:05}.safetensors"),
            };
            let path = self.dir.join(&file_name);
            shard.join(&path, metadata)?;
            self.finished.push(path);
            total_bytes += shard.bytes;
            for (name, ..) in shard.parts.values().flat_map(|part| &part.tensors) {
                weight_map.insert(name, file_name.clone());
            }
        }
        if count > 1 {
            let index = json!({
                "metadata": { "total_size": total_bytes },
                "weight_map": weight_map,
            });
            let path = self.dir.join(INDEX_FILE);
            write_atomic(&path, format!("{index:#}\n").as_bytes())?;
            self.finished.push(path);
        }
        Ok(std::mem::take(&mut self.finished))
    }
}

impl Drop for ShardWriter {
    fn drop(&mut self) {
        let parts = self.shards.iter().flat_map(|shard| shard.parts.values());
        for path in parts.map(|part| &part.path).chain(&self.finished) {
            // Most parts are gone already; what cannot be removed does no harm.
            let _ = fs::remove_file(path);
        }
    }
}

impl Shard {
    /// Writes header and parts to `path`, then removes the parts.
    fn join(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        let parts = || self.parts.values().rev();
        let header = encode_header(
            parts()
                .flat_map(|part| &part.tensors)
                .map(|(name, dtype, shape)| (name, *dtype, shape)),
            metadata,
        );
        write_atomic_with(path, |file| {
            let failed = |source| Error::io("write", path, &source);
            file.write_all(&header).map_err(failed)?;
            for part in parts() {
                let mut data = File::open(&part.path)
                    .map_err(|source| Error::io("read", &part.path, &source))?;
                let copied = io::copy(&mut data, file).map_err(failed)?;
                // Also catches an `add` that failed half-way.
                if copied != part.bytes {
                    return Err(Error::failed(format!(
                        "the temporary data has {copied} bytes, expected {}",
                        part.bytes
                    ))
                    .at(part.path.display())
                    .fix("run the same command again"));
                }
            }
            Ok(())
        })?;
        for part in parts() {
            let _ = fs::remove_file(&part.path); // tried again on drop
        }
        Ok(())
    }
}

impl Part {
    fn append(&mut self, name: &str, tensor: &HostTensor) -> io::Result<()> {
        // The first tensor starts the file anew, whatever an earlier run may have left.
        let first = self.tensors.is_empty();
        // Booked before it is written, so that `join` misses what a failure here loses.
        self.tensors.push((name.to_owned(), tensor.dtype, tensor.shape.clone()));
        self.bytes += tensor.bytes.len() as u64;
        let mut file = if first {
            File::create(&self.path)?
        } else {
            OpenOptions::new().append(true).open(&self.path)?
        };
        file.write_all(&tensor.bytes)
    }
}

#[cfg(test)]
mod tests {
    use ::safetensors::SafeTensors;
    use tempfile::{TempDir, tempdir};

    use super::*;

    fn pt() -> BTreeMap<String, String> {
        BTreeMap::from([("format".to_owned(), "pt".to_owned())])
    }

    fn sample() -> Vec<(String, HostTensor)> {
        let named = |name: &str, tensor| (name.to_owned(), tensor);
        vec![
            named("z.codes", HostTensor::u8([3], &[1, 2, 3])),
            named("a.weight", HostTensor::f32([2, 2], &[1.0, -2.0, 3.5, 0.0])),
            named("scale", HostTensor::bf16_from_f32([3, 1], &[1.0, 2.0, 3.0])),
            named("words", HostTensor::u32([2], &[7, u32::MAX])),
            named("position", HostTensor::i64([], &[-5])),
            named("empty", HostTensor::f32([0, 4], &[])),
        ]
    }

    fn write_shards(dir: &Path, limit: u64) -> Vec<PathBuf> {
        let mut writer = ShardWriter::create(dir, limit).unwrap();
        for (name, tensor) in sample() {
            writer.add(&name, &tensor).unwrap();
        }
        writer.finish(&pt()).unwrap()
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A file with this header text and this many zero bytes of values.
    fn raw_file(header: &str, values: usize) -> (TempDir, PathBuf) {
        let dir = tempdir().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + values, 0);
        fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    fn open_error(header: &str, values: usize) -> String {
        let (dir, path) = raw_file(header, values);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Preflight);
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(text.contains("download"), "{text}");
        text
    }

    fn cut(path: &Path, bytes: u64) {
        OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
    }

    #[test]
    fn one_file_round_trips_and_the_safetensors_crate_reads_it() {
        let dir = tempdir().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        write_file(&path, &sample(), &pt()).unwrap();
        assert_eq!(names(dir.path()), [SINGLE_FILE]);

        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(
            checkpoint.names(),
            ["a.weight", "empty", "position", "scale", "words", "z.codes"]
        );
        assert_eq!(checkpoint.file_metadata(), &pt());
        assert_eq!(checkpoint.files(), std::slice::from_ref(&path));
        assert_eq!(checkpoint.total_bytes(), 3 + 16 + 6 + 8 + 8);
        for (name, tensor) in sample() {
            assert_eq!(checkpoint.read(&name).unwrap(), tensor);
            let info = checkpoint.info(&name).unwrap();
            assert_eq!(info.start % info.dtype.size() as u64, 0, "{name} is not aligned");
        }

        let bytes = fs::read(&path).unwrap();
        let other = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(other.len(), sample().len());
        for (name, tensor) in sample() {
            let view = other.tensor(&name).unwrap();
            assert_eq!(view.data(), tensor.bytes);
            assert_eq!(view.shape(), tensor.shape);
            assert_eq!(view.dtype().to_string(), tensor.dtype.name());
        }
    }

    #[test]
    fn a_file_of_the_safetensors_crate_is_read() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("other.safetensors");
        let tensors = sample();
        let views = tensors.iter().map(|(name, tensor)| {
            let dtype = serde_json::from_value(json!(tensor.dtype)).unwrap();
            let shape = tensor.shape.clone();
            (name, ::safetensors::tensor::TensorView::new(dtype, shape, &tensor.bytes).unwrap())
        });
        let bytes = ::safetensors::serialize(views, None).unwrap();
        fs::write(&path, bytes).unwrap();
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        for (name, tensor) in &tensors {
            assert_eq!(&checkpoint.read(name).unwrap(), tensor);
        }
        assert!(checkpoint.file_metadata().is_empty());
    }

    #[test]
    fn shards_close_before_the_limit_and_the_index_finds_everything() {
        let dir = tempdir().unwrap();
        // 3 + 16 | 6 + 8 | 8 + 0: the third tensor would bring the first shard to 25 bytes.
        let written = write_shards(dir.path(), 19);
        let expected = [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            INDEX_FILE,
        ];
        assert_eq!(names(dir.path()), expected);
        assert_eq!(written, expected.map(|name| dir.path().join(name)));

        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(checkpoint.files(), &written[..3]);
        assert_eq!(checkpoint.file_metadata(), &pt());
        for (name, tensor) in sample() {
            assert_eq!(checkpoint.read(&name).unwrap(), tensor);
        }
        let index: Value = serde_json::from_slice(&fs::read(&written[3]).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], checkpoint.total_bytes());
        assert_eq!(index["weight_map"]["scale"], expected[1]);
        for (path, count) in written.iter().zip([2, 2, 2]) {
            let bytes = fs::read(path).unwrap();
            assert_eq!(SafeTensors::deserialize(&bytes).unwrap().len(), count);
        }
    }

    #[test]
    fn a_shard_exactly_full_is_one_and_larger_tensors_stand_alone() {
        let dir = tempdir().unwrap();
        assert_eq!(write_shards(dir.path(), 41), [dir.path().join(SINGLE_FILE)]);
        let dir = tempdir().unwrap();
        // No limit is too small: each tensor then has its own shard, the empty one too.
        assert_eq!(write_shards(dir.path(), 0).len(), 6 + 1);
        assert_eq!(Checkpoint::open(dir.path()).unwrap().total_bytes(), 41);
    }

    #[test]
    fn both_writers_are_deterministic_and_agree() {
        let (one, two) = (tempdir().unwrap(), tempdir().unwrap());
        for limit in [19, 1000] {
            let first = write_shards(one.path(), limit);
            let second = write_shards(two.path(), limit);
            for (a, b) in first.iter().zip(&second) {
                assert_eq!(fs::read(a).unwrap(), fs::read(b).unwrap());
            }
            for path in first.iter().chain(&second) {
                if limit == 1000 && path.starts_with(one.path()) {
                    let other = one.path().join("other");
                    write_file(&other, &sample(), &pt()).unwrap();
                    assert_eq!(fs::read(path).unwrap(), fs::read(other).unwrap());
                }
                fs::remove_file(path).unwrap();
            }
        }
    }

    #[test]
    fn an_abandoned_writer_leaves_nothing() {
        let dir = tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), 1).unwrap();
        for (name, tensor) in sample() {
            writer.add(&name, &tensor).unwrap();
        }
        assert_eq!(names(dir.path()).len(), 6);
        drop(writer);
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn writers_refuse_bad_tensors() {
        let dir = tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), 100).unwrap();
        let good = HostTensor::u8([1], &[1]);
        let bad = HostTensor { dtype: DType::F32, shape: vec![2], bytes: vec![0; 4] };
        writer.add("a", &good).unwrap();
        assert!(writer.add("a", &good).unwrap_err().to_string().contains("at   a"));
        writer.add(METADATA_KEY, &good).unwrap_err();
        let error = writer.add("b", &bad).unwrap_err();
        assert_eq!(error.what(), "a F32 tensor of shape [2] cannot have 4 bytes");
        assert_eq!(writer.finish(&pt()).unwrap().len(), 1);

        let path = dir.path().join("file");
        let twice = [("a".to_owned(), good.clone()), ("a".to_owned(), good)];
        write_file(&path, &twice, &pt()).unwrap_err();
        assert_eq!(names(dir.path()), [SINGLE_FILE]);

        let error = ShardWriter::create(dir.path(), 100).unwrap_err();
        assert_eq!(error.what(), "the output folder already holds a model");
        ShardWriter::create(&dir.path().join("none"), 100).unwrap_err();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_fails_the_add_and_the_finish() {
        let dir = tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), 100).unwrap();
        let part = dir.path().join(format!(".model-00001-4.data-{}", std::process::id()));
        std::os::unix::fs::symlink("/dev/full", &part).unwrap();
        let error = writer.add("a", &HostTensor::f32([1], &[1.0])).unwrap_err();
        assert_eq!(error.kind(), Kind::Resources);
        // Space appears again, but the tensor is lost.
        fs::remove_file(&part).unwrap();
        fs::write(&part, "").unwrap();
        writer.add("b", &HostTensor::f32([1], &[2.0])).unwrap();
        let error = writer.finish(&pt()).unwrap_err();
        assert_eq!(error.what(), "the temporary data has 4 bytes, expected 8");
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn a_tensor_that_could_not_be_stored_is_missed_by_finish() {
        let dir = tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), 100).unwrap();
        let part = dir.path().join(format!(".model-00001-4.data-{}", std::process::id()));
        fs::create_dir(&part).unwrap(); // in the way of the data
        writer.add("a", &HostTensor::f32([1], &[1.0])).unwrap_err();
        fs::remove_dir(&part).unwrap();
        writer.finish(&pt()).unwrap_err();
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn a_truncated_shard_is_named_with_both_lengths() {
        let dir = tempdir().unwrap();
        let shard = write_shards(dir.path(), 19).remove(1);
        let bytes = fs::metadata(&shard).unwrap().len();
        cut(&shard, bytes - 1);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "the file is truncated: {bytes} bytes expected, {} found\n  at   {}\n  try  \
                 download it again",
                bytes - 1,
                shard.display()
            )
        );
        cut(&shard, 20);
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("the file is truncated: at least "), "{text}");
        cut(&shard, 7);
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("at least 8 bytes expected, 7 found"), "{text}");
    }

    #[test]
    fn truncation_after_opening_is_an_error_too() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("file");
        write_file(&path, &sample(), &pt()).unwrap();
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        cut(&path, fs::metadata(&path).unwrap().len() - 1);
        let text = checkpoint.read("z.codes").unwrap_err().to_string();
        assert!(text.contains("3 bytes expected") && text.contains("2 found"), "{text}");
        assert!(text.contains("z.codes"), "{text}");
    }

    #[test]
    fn missing_shards_and_tensors_are_named() {
        let dir = tempdir().unwrap();
        let written = write_shards(dir.path(), 19);
        let index = fs::read_to_string(&written[3]).unwrap();

        let wrong = index.replace("\"scale\"", "\"scales\"");
        fs::write(&written[3], wrong).unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(
            text.starts_with("the index names a tensor that its shard does not have"),
            "{text}"
        );
        assert!(text.contains("scales") && text.contains("model-00002-of-00003"), "{text}");

        // Right tensor, wrong shard.
        let wrong = index.replacen("model-00001", "model-00003", 1);
        fs::write(&written[3], wrong).unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("a.weight") && text.contains("model-00003-of-00003"), "{text}");

        fs::write(&written[3], &index).unwrap();
        fs::remove_file(&written[2]).unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("shard model-00003-of-00003.safetensors"), "{text}");
        assert!(text.contains("missing") && text.contains("download"), "{text}");

        for shard in ["../outside.safetensors", "/etc/passwd", "..", ""] {
            let outside = json!({ "weight_map": { "a": shard } });
            fs::write(&written[3], outside.to_string()).unwrap();
            let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(text.contains("is not the name of a shard"), "{text}");
        }

        fs::write(&written[3], &index[..index.len() / 2]).unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.starts_with("the index of the shards is not valid"), "{text}");
    }

    #[test]
    fn a_folder_without_a_model_is_an_error() {
        let dir = tempdir().unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains(SINGLE_FILE) && text.contains(INDEX_FILE), "{text}");
        let error = Checkpoint::open(&dir.path().join("none")).unwrap_err();
        assert_eq!(error.what(), "the model folder does not exist");
        Checkpoint::open_file(&dir.path().join("none")).unwrap_err();
    }

    #[test]
    fn damaged_headers_are_errors() {
        let tensor = |start: usize, end: usize| {
            format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{start},{end}]}}"#)
        };
        let two = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
        let cases = [
            ("{\"a\":".to_owned(), 0, "the header is not valid"),
            ("[]".to_owned(), 0, "the header is not valid"),
            (r#"{"a":{"shape":[2]}}"#.to_owned(), 0, "the header is not valid"),
            (r#"{"__metadata__":{"a":1}}"#.to_owned(), 0, "the header is not valid"),
            (two(tensor(0, 8), tensor(4, 12)), 12, "tensor b overlaps tensor a"),
            (two(tensor(0, 8), tensor(12, 20)), 20, "tensor b leaves a gap after tensor a"),
            (two(tensor(4, 12), tensor(12, 20)), 20, "tensor a leaves a gap after the header"),
            (format!(r#"{{"a":{}}}"#, tensor(0, 7)), 7, "takes 8 bytes, but"),
            (format!(r#"{{"a":{}}}"#, tensor(8, 0)), 8, "takes 8 bytes, but"),
            (format!(r#"{{"a":{}}}"#, tensor(0, 8)), 9, "has 1 more"),
            (
                format!(
                    r#"{{"a":{{"dtype":"F32","shape":[{},3],"data_offsets":[0,8]}}}}"#,
                    usize::MAX
                ),
                8,
                "takes too many bytes",
            ),
        ];
        for (header, values, expected) in cases {
            if expected == "has 1 more" {
                let end = 8 + header.len() + 8;
                let expected = format!("should have {end} bytes by its header, has {}", end + 1);
                assert!(open_error(&header, values).contains(&expected));
            } else {
                let text = open_error(&header, values);
                assert!(text.contains(expected), "{text}");
            }
        }
    }

    #[test]
    fn impossible_header_lengths_are_errors() {
        let dir = tempdir().unwrap();
        let path = dir.path().join(SINGLE_FILE);
        for (length, expected) in
            [(u64::MAX, "this is not a safetensors file"), (9, "at least 17 bytes")]
        {
            let mut bytes = length.to_le_bytes().to_vec();
            bytes.extend(b"{}");
            fs::write(&path, bytes).unwrap();
            let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
        }
        fs::write(&path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
        let text = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(text.contains("Git LFS pointer"), "{text}");
    }

    #[test]
    fn an_unknown_dtype_is_named() {
        let (_dir, path) = raw_file(r#"{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}"#, 1);
        let error = Checkpoint::open_file(&path).unwrap_err();
        assert_eq!(error.what(), "fewbit cannot read dtype F4");
        assert!(error.to_string().contains(", a\n"), "{error}");
    }

    #[test]
    fn read_f32_checks_shape_dtype_and_values() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("file");
        let named = |name: &str, tensor| (name.to_owned(), tensor);
        let tensors = [
            named("good", HostTensor::bf16_from_f32([2], &[1.0, 2.0])),
            named("nan", HostTensor::f32([2, 3], &[0.0, 0.0, 0.0, 0.0, 0.0, f32::NAN])),
            named("inf", HostTensor::f16_from_f32([2], &[0.0, f32::NEG_INFINITY])),
            named("codes", HostTensor::u8([1], &[1])),
        ];
        write_file(&path, &tensors, &pt()).unwrap();
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        assert_eq!(checkpoint.read_f32("good", &[2]).unwrap(), [1.0, 2.0]);
        let message =
            |name, shape: &[usize]| checkpoint.read_f32(name, shape).unwrap_err().to_string();
        let file = path.display();
        assert_eq!(
            message("nan", &[2, 3]),
            format!(
                "the tensor holds NaN at index [1, 2]\n  at   nan, {file}\n  try  the checkpoint \
                 is damaged; download it again"
            )
        );
        assert!(message("inf", &[2]).starts_with("the tensor holds -inf at index [1]\n"));
        assert!(
            message("good", &[2, 1]).starts_with("the tensor has shape [2], expected [2, 1]\n")
        );
        assert!(message("codes", &[1]).contains("the tensor is U8, expected F32, F16 or BF16"));
        assert!(message("none", &[1]).contains("no tensor of this name\n  at   none"));
    }
}
