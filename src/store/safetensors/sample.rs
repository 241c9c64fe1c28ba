//! Small files, whole and damaged.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use tempfile::{TempDir, tempdir};

use super::{SINGLE_FILE, ShardWriter};
use crate::store::HostTensor;

pub(super) fn pt() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_owned(), "pt".to_owned())])
}

pub(super) fn sample() -> Vec<(String, HostTensor)> {
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

pub(super) fn write_shards(dir: &Path, limit: u64) -> Vec<PathBuf> {
    let mut writer = ShardWriter::create(dir, limit).unwrap();
    for (name, tensor) in sample() {
        writer.add(&name, &tensor).unwrap();
    }
    writer.finish(&pt()).unwrap()
}

/// A file with this header text and this many zero bytes of values.
pub(super) fn raw_file(header: &str, values: usize) -> (TempDir, PathBuf) {
    let dir = tempdir().unwrap();
    let path = dir.path().join(SINGLE_FILE);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + values, 0);
    fs::write(&path, bytes).unwrap();
    (dir, path)
}

pub(super) fn cut(path: &Path, bytes: u64) {
    OpenOptions::new().write(true).open(path).unwrap().set_len(bytes).unwrap();
}
