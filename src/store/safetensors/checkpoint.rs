//! Reads one tensor at a time, of a file or of a folder of shards.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use super::header::{Header, damaged};
use super::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Kind, Result};
use crate::store::{DAMAGED, DType, HostTensor, TensorInfo, TensorSource};

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

    /// What it makes them in.
    fn dtype(&self) -> DType {
        DType::F32
    }

    /// The tensor in that type.
    ///
    /// # Errors
    /// As [`Decode::decode`].
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        Ok(HostTensor::f32(shape, &self.decode(name, shape)?))
    }
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
                .fix("download the safetensors version of the model into this folder; for an export, write it again"))
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
            ..Self::empty()
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
    /// `computed`, by name and shape, are computed from `file`.
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
            let dtype = decoder.dtype();
            let bytes = dtype.bytes_for(&shape).unwrap_or_default() as u64;
            let info = TensorInfo { dtype, shape, file: file.to_owned(), start: 0, end: bytes };
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
            return decoder.tensor(name, &info.shape);
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

/// Whether a file lies in the folder, or where the hub's cache puts what its folders link to.
fn stays_in(dir: &Path, path: &Path) -> bool {
    let (Ok(dir), Ok(path)) = (dir.canonicalize(), path.canonicalize()) else { return false };
    // `models--owner--name/snapshots/REVISION/FILE` is a link to `models--owner--name/blobs/HASH`.
    let snapshots = dir.parent().filter(|parent| parent.ends_with("snapshots"));
    let blobs = snapshots.and_then(Path::parent).map(|model| model.join("blobs"));
    path.starts_with(&dir) || blobs.is_some_and(|blobs| path.starts_with(blobs))
}

/// The path of a shard beside its index. Fails when it is missing, and for a name that would lead
/// out of the folder.
fn shard_path(dir: &Path, shard: &str, index: &Path) -> Result<PathBuf> {
    if Path::new(shard).file_name() != Some(shard.as_ref()) {
        return Err(damaged(format!("{shard:?} is not the name of a shard"), index.display()));
    }
    let path = dir.join(shard);
    if path.is_file() {
        return if stays_in(dir, &path) {
            Ok(path)
        } else {
            let what = format!("shard {shard}, which the index names, is a link out of the folder");
            Err(Error::damaged(what, "the file itself in its place").at(path.display()))
        };
    }
    Err(Error::preflight(format!("shard {shard}, which the index names, is missing"))
        .at(path.display())
        .fix("download the checkpoint again"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use tempfile::tempdir;

    use super::super::sample::{cut, pt, sample, write_shards};
    use super::super::write_file;
    use super::*;

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

    #[cfg(unix)]
    #[test]
    fn a_link_out_of_the_folder_is_refused_but_for_the_hubs() {
        use std::os::unix::fs::symlink;
        let root = tempdir().unwrap();
        let out = root.path().join("out");
        fs::create_dir(&out).unwrap();
        let shards = write_shards(&out, 19);
        let blobs = root.path().join("models--a--b/blobs");
        let snapshot = root.path().join("models--a--b/snapshots/1f");
        let plain = root.path().join("plain");
        for dir in [&blobs, &snapshot, &plain] {
            fs::create_dir_all(dir).unwrap();
        }
        for (number, shard) in shards.iter().enumerate() {
            let blob = blobs.join(number.to_string());
            fs::rename(shard, &blob).unwrap();
            symlink(&blob, snapshot.join(shard.file_name().unwrap())).unwrap();
            symlink(&blob, plain.join(shard.file_name().unwrap())).unwrap();
        }
        Checkpoint::open(&snapshot).unwrap();
        let error = Checkpoint::open(&plain).unwrap_err();
        assert!(error.what().ends_with("is a link out of the folder"), "{error}");
        // A folder that is itself reached by a link is no such thing.
        let index = plain.join(INDEX_FILE);
        fs::remove_file(&index).unwrap();
        fs::copy(snapshot.join(INDEX_FILE), &index).unwrap();
        for (number, shard) in shards[..shards.len() - 1].iter().enumerate() {
            let shard = plain.join(shard.file_name().unwrap());
            fs::remove_file(&shard).unwrap();
            fs::copy(blobs.join(number.to_string()), shard).unwrap();
        }
        symlink(&plain, root.path().join("linked")).unwrap();
        Checkpoint::open(&root.path().join("linked")).unwrap();
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
