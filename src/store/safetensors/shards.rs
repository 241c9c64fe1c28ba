//! Writes a model in shards whose memory does not grow with the model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use super::header::{check_new, encode_header};
use super::{INDEX_FILE, SINGLE_FILE};
use crate::error::{Error, Result};
use crate::store::folder::{write_atomic, write_atomic_with};
use crate::store::{DType, HostTensor};

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
    use serde_json::Value;
    use tempfile::tempdir;

    use super::super::header::METADATA_KEY;
    use super::super::sample::{pt, sample, write_shards};
    use super::super::{Checkpoint, write_file};
    use super::*;
    use crate::error::Kind;
    use crate::store::TensorSource;
    use crate::store::sample::names;

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
}
