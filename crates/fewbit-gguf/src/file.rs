//! Writing the GGUF container, version 3, little-endian.
//!
//! A file says first what it will hold, so tensors are announced with name, shape and type before
//! any is written; then each is written and forgotten. At most one tensor is in memory.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::types::BlockType;
use crate::value::{Value, push_text};

pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
pub(crate) const VERSION: u32 = 3;
/// Every tensor starts at a multiple of this, counted from the first.
pub(crate) const ALIGNMENT: u64 = 32;
/// ggml's limit, without the zero at the end.
const LONGEST_NAME: usize = 63;
/// ggml's limit.
const MOST_AXES: usize = 4;

/// What a file will hold: metadata and announced tensors.
#[derive(Clone, Debug, Default)]
pub struct Header {
    metadata: Vec<(String, Value)>,
    tensors: Vec<Announced>,
    names: BTreeSet<String>,
}

#[derive(Clone, Debug)]
struct Announced {
    name: String,
    shape: Vec<usize>,
    kind: BlockType,
    bytes: u64,
}

impl Header {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a metadata value; keys keep their order.
    ///
    /// # Errors
    /// When the key is not plain ASCII, is taken, or a list holds values of several kinds.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) -> Result<()> {
        let value = value.into();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if key.is_empty() || key.len() > usize::from(u16::MAX) || !key.bytes().all(plain) {
            return Err(Error::failed(format!("`{key}` is no metadata key for GGUF")));
        }
        if self.metadata.iter().any(|(taken, _)| taken == key) {
            return Err(Error::failed(format!("the metadata key `{key}` is set twice")));
        }
        if !value.is_sound() {
            return Err(Error::failed(format!("`{key}` is a list of several kinds of values")));
        }
        self.metadata.push((key.to_owned(), value));
        Ok(())
    }

    /// Announces a tensor of `shape`, outermost size first. Tensors are written in this order.
    ///
    /// # Errors
    /// When the name is too long or taken, or rows of this width have no whole blocks of `kind`.
    pub fn announce(&mut self, name: &str, shape: &[usize], kind: BlockType) -> Result<()> {
        let refuse = |what: String| Err(Error::failed(what).at(name));
        if name.is_empty() || name.len() > LONGEST_NAME {
            return refuse(format!(
                "a tensor name of {} bytes; GGUF takes 1 to {LONGEST_NAME}",
                name.len()
            ));
        }
        if shape.is_empty() || shape.len() > MOST_AXES || shape.contains(&0) {
            return refuse(format!(
                "shape {shape:?}; GGUF takes 1 to {MOST_AXES} sizes, none of them 0"
            ));
        }
        let Some(bytes) = kind.tensor_bytes(shape) else {
            return refuse(format!(
                "rows of shape {shape:?} are no whole blocks of {} ({kind})",
                kind.block_len()
            ));
        };
        if !self.names.insert(name.to_owned()) {
            return refuse("the tensor is announced twice".to_owned());
        }
        let (name, shape, bytes) = (name.to_owned(), shape.to_vec(), bytes as u64);
        self.tensors.push(Announced { name, shape, kind, bytes });
        Ok(())
    }

    /// Writes the header to `out`. `path` is for errors. What `out` gathers is a file only after
    /// [`Writer::finish`], so let it be one that is renamed when done.
    ///
    /// # Errors
    /// On I/O errors.
    pub fn start<W: Write>(self, mut out: W, path: &Path) -> Result<Writer<W>> {
        out.write_all(&self.to_bytes()).map_err(|source| Error::io_on(path, "write", source))?;
        Ok(Writer { out, path: path.to_owned(), tensors: self.tensors, next: 0 })
    }

    /// Everything before the first tensor, padded.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            push_text(key, &mut out);
            out.extend((value.kind() as u32).to_le_bytes());
            value.push_to(&mut out);
        }
        let mut offset = 0;
        for Announced { name, shape, kind, bytes } in &self.tensors {
            push_text(name, &mut out);
            out.extend((shape.len() as u32).to_le_bytes());
            // GGUF counts the innermost size first.
            out.extend(shape.iter().rev().flat_map(|size| (*size as u64).to_le_bytes()));
            out.extend(kind.id().to_le_bytes());
            out.extend(u64::to_le_bytes(offset));
            offset += padded(*bytes);
        }
        out.resize(padded(out.len() as u64) as usize, 0);
        out
    }
}

/// Takes the announced tensors one by one.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    path: PathBuf,
    tensors: Vec<Announced>,
    next: usize,
}

impl<W: Write> Writer<W> {
    /// Writes the next tensor.
    ///
    /// # Errors
    /// When `name` is not the one that was announced next or `bytes` is not its size, and on I/O
    /// errors.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let failed = |what: String| Err(Error::failed(what).at(self.path.display()).at(name));
        let Some(tensor) = self.tensors.get(self.next) else {
            return failed("a tensor more than was announced".to_owned());
        };
        if tensor.name != name {
            return failed(format!("the next announced tensor is `{}`", tensor.name));
        }
        if tensor.bytes != bytes.len() as u64 {
            return failed(format!(
                "{} bytes for a tensor of shape {:?} in {}, which takes {}",
                bytes.len(),
                tensor.shape,
                tensor.kind,
                tensor.bytes
            ));
        }
        let padding = (padded(tensor.bytes) - tensor.bytes) as usize;
        self.out
            .write_all(bytes)
            .and_then(|()| self.out.write_all(&[0; ALIGNMENT as usize][..padding]))
            .map_err(|source| Error::io_on(&self.path, "write", source))?;
        self.next += 1;
        Ok(())
    }

    /// Ends the file and gives `out` back, flushed.
    ///
    /// # Errors
    /// When announced tensors are missing, and on I/O errors.
    pub fn finish(mut self) -> Result<W> {
        if let Some(missing) = self.tensors.get(self.next) {
            return Err(Error::failed("an announced tensor was not written")
                .at(self.path.display())
                .at(&missing.name));
        }
        self.out.flush().map_err(|source| Error::io_on(&self.path, "write", source))?;
        Ok(self.out)
    }
}

fn padded(bytes: u64) -> u64 {
    bytes.next_multiple_of(ALIGNMENT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        let mut header = Header::new();
        header.set("general.architecture", "llama").unwrap();
        header.announce("a", &[2, 32], BlockType::Q4_0).unwrap();
        header.announce("b", &[3], BlockType::F32).unwrap();
        header
    }

    #[test]
    fn the_bytes_of_a_small_file() {
        let mut writer = header().start(Vec::new(), Path::new("x")).unwrap();
        writer.write("a", &[7; 36]).unwrap();
        writer.write("b", &[9; 12]).unwrap();
        let file = writer.finish().unwrap();
        assert_eq!(
            file[..24],
            [b"GGUF\x03\0\0\0\x02\0\0\0\0\0\0\0\x01".as_slice(), &[0; 7]].concat()
        );
        let data = header().to_bytes().len();
        assert_eq!(file.len(), data + 64 + 32);
        assert!(data.is_multiple_of(32) && file[data - 1] == 0 && file[data] == 7);
        assert_eq!((file[data + 35], file[data + 36], file[data + 64]), (7, 0, 9));
    }

    #[test]
    fn the_order_and_the_sizes_are_kept() {
        let mut writer = header().start(Vec::new(), Path::new("x")).unwrap();
        assert!(writer.write("b", &[0; 12]).unwrap_err().to_string().contains("`a`"));
        assert!(writer.write("a", &[0; 35]).unwrap_err().to_string().contains("takes 36"));
        writer.write("a", &[0; 36]).unwrap();
        assert!(writer.finish().unwrap_err().to_string().contains("x, b"));
    }

    #[test]
    fn what_no_reader_takes_is_refused() {
        let mut header = header();
        assert!(header.set("general.architecture", "x").is_err());
        assert!(header.set("näme", 1_u32).is_err());
        assert!(header.announce("a", &[1], BlockType::F32).is_err());
        assert!(header.announce(&"n".repeat(64), &[1], BlockType::F32).is_err());
        assert!(header.announce("c", &[2, 31], BlockType::Q4_0).is_err());
        assert!(header.announce("d", &[0], BlockType::F32).is_err());
        assert!(header.announce("e", &[1; 5], BlockType::F32).is_err());
    }
}
