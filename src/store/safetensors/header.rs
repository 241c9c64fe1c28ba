//! The header of a file: eight bytes with its length, then JSON with the dtype, the shape and the
//! byte range of every tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::store::{DAMAGED, DType, HostTensor, TensorInfo};

/// Key of the string table in a header; no tensor can have this name.
pub(super) const METADATA_KEY: &str = "__metadata__";
/// Readers in other languages refuse longer headers too.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The checked header of one file.
pub(super) struct Header {
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    pub(super) metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (u64, u64),
}

impl Header {
    pub(super) fn read(path: &Path) -> Result<Self> {
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

pub(super) fn damaged(what: impl Into<String>, place: impl Display) -> Error {
    Error::preflight(what).at(place).fix(DAMAGED)
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

/// Refuses what no header can hold: a name twice, the reserved name, bytes that do not fit.
pub(super) fn check_new(
    name: &str,
    tensor: &HostTensor,
    names: &mut BTreeSet<String>,
) -> Result<()> {
    tensor.check().map_err(|error| error.at(name))?;
    if name == METADATA_KEY || !names.insert(name.to_owned()) {
        return Err(Error::failed("a tensor of this name cannot be added (again)").at(name));
    }
    Ok(())
}

/// Length and JSON of a header for tensors laid out in this order, padded with spaces so that the
/// values start at a multiple of eight bytes.
pub(super) fn encode_header<'a>(
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

#[cfg(test)]
mod tests {
    use std::fs;

    use tempfile::tempdir;

    use super::super::sample::raw_file;
    use super::super::{Checkpoint, SINGLE_FILE};
    use crate::error::Kind;

    fn open_error(header: &str, values: usize) -> String {
        let (dir, path) = raw_file(header, values);
        let error = Checkpoint::open(dir.path()).unwrap_err();
        assert_eq!(error.kind(), Kind::Preflight);
        let text = error.to_string();
        assert!(text.contains(&path.display().to_string()), "{text}");
        assert!(text.contains("download"), "{text}");
        text
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
}
