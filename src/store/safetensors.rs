//! Safetensors files and Hugging Face folders of them: a reader that loads one tensor at a time,
//! and writers whose memory does not grow with the model.
//!
//! A file is eight bytes with the header's length, the header (JSON: dtype, shape and byte range
//! of every tensor) and the values. [`Checkpoint`] reads headers only and holds them against the
//! files' real lengths, so that a truncated download is refused before any work starts.

mod checkpoint;
mod header;
#[cfg(test)]
mod sample;
mod shards;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::Path;

pub use self::checkpoint::{Checkpoint, Decode};
use self::header::{check_new, encode_header};
pub use self::shards::ShardWriter;
use super::folder::write_atomic_with;
use super::{DType, HostTensor};
use crate::error::{Error, Result};

/// The file name of an unsharded model.
pub const SINGLE_FILE: &str = "model.safetensors";
/// The file name of a sharded model's index.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

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

/// As [`write_file`], but a tensor is made when its turn comes, and only one is in memory. `layout` has
/// name, type and shape of each in the order in the file, larger elements first; `make` gives the
/// tensor of an index.
///
/// # Errors
/// Those of `make`; for a tensor that is not as the layout says; and on I/O errors.
pub fn write_streamed(
    path: &Path,
    layout: &[(String, DType, Vec<usize>)],
    metadata: &BTreeMap<String, String>,
    mut make: impl FnMut(usize) -> Result<HostTensor>,
) -> Result<()> {
    let header =
        encode_header(layout.iter().map(|(name, dtype, shape)| (name, *dtype, shape)), metadata);
    let failed = |source| Error::io("write", path, &source);
    write_atomic_with(path, |file| {
        file.write_all(&header).map_err(failed)?;
        let mut names = BTreeSet::new();
        for (index, (name, dtype, shape)) in layout.iter().enumerate() {
            let tensor = make(index)?;
            check_new(name, &tensor, &mut names)?;
            if (tensor.dtype, &tensor.shape) != (*dtype, shape) {
                return Err(Error::failed("a tensor is not what was announced").at(name));
            }
            file.write_all(&tensor.bytes).map_err(failed)?;
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use ::safetensors::SafeTensors;
    use serde_json::json;
    use tempfile::tempdir;

    use super::sample::{pt, sample};
    use super::*;
    use crate::store::TensorSource;
    use crate::store::sample::names;

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
}
