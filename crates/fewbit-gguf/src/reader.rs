//! Reading GGUF files, versions 2 and 3, with suspicion: every length is checked against what is
//! left of the file before anything of that length is made.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::decode::decode;
use crate::error::{Error, Result};
use crate::file::{ALIGNMENT, MAGIC, VERSION};
use crate::types::BlockType;
use crate::value::{Value, ValueKind};

const DAMAGED: &str = "the file is damaged or incomplete; copy or export it again";
/// Lists of lists exist, but nobody nests deeper than this.
const MOST_NESTING: u32 = 4;
/// A value of a list takes more memory than file; the longest vocabularies have a tenth of this.
const LONGEST_LIST: u64 = 1 << 22;
const MOST_AXES: u32 = 4;

/// A tensor of a file.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TensorInfo {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// How its rows are stored.
    pub kind: BlockType,
    /// First byte, counted from the start of the file.
    pub start: u64,
    /// Its size in the file.
    pub bytes: u64,
}

/// An open file: its metadata and where its tensors lie.
#[derive(Debug)]
pub struct Reader<R> {
    source: BufReader<R>,
    path: PathBuf,
    metadata: Vec<(String, Value)>,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Reader<File> {
    /// Opens the file at `path` and reads everything but the tensors' values.
    ///
    /// # Errors
    /// When it cannot be read, is no GGUF file or a damaged one, or holds a tensor of a type that
    /// is no [`BlockType`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|source| Error::io_on(path, "read", source))?;
        Self::new(file, path)
    }
}

impl<R: Read + Seek> Reader<R> {
    /// As [`Reader::open`], from anything; `path` is for errors.
    ///
    /// # Errors
    /// As [`Reader::open`].
    pub fn new(mut source: R, path: &Path) -> Result<Self> {
        let length = source
            .seek(SeekFrom::End(0))
            .and_then(|length| source.seek(SeekFrom::Start(0)).map(|_| length))
            .map_err(|error| Error::io_on(path, "read", error))?;
        let mut head = Head { source: BufReader::new(source), path, length, at: 0 };
        let (metadata, tensors) = head.parse().map_err(|error| error.at(path.display()))?;
        Ok(Self { source: head.source, path: path.to_owned(), metadata, tensors })
    }

    /// The file's path, as it was given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Every metadata key with its value, in the file's order.
    pub fn metadata(&self) -> &[(String, Value)] {
        &self.metadata
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Every tensor, by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// A tensor's bytes as stored.
    ///
    /// # Errors
    /// When there is none of this name, and on I/O errors.
    pub fn read(&mut self, name: &str) -> Result<Vec<u8>> {
        self.read_part(name, 0, 1)
    }

    /// The bytes of one of `parts` equal parts along the outermost axis, of a tensor that is a stack of
    /// matrices for instance.
    ///
    /// # Errors
    /// As [`Reader::read`], and where the tensor has no such part.
    pub fn read_part(&mut self, name: &str, part: usize, parts: usize) -> Result<Vec<u8>> {
        let Some(info) = self.tensors.get(name) else {
            return Err(Error::failed("the file has no tensor of this name")
                .at(self.path.display())
                .at(name));
        };
        // Checked against the file's length when it was opened.
        let outermost = info.shape.first().copied().unwrap_or(1);
        if part >= parts || parts > 1 && outermost != parts {
            let what = format!("no part {part} of {parts} in a tensor of shape {:?}", info.shape);
            return Err(Error::failed(what).at(self.path.display()).at(name));
        }
        let bytes = info.bytes / parts as u64;
        let start = info.start + bytes * part as u64;
        let mut bytes = vec![0; bytes as usize];
        self.source
            .seek(SeekFrom::Start(start))
            .and_then(|_| self.source.read_exact(&mut bytes))
            .map_err(|source| Error::io_on(&self.path, "read", source).at(name))?;
        Ok(bytes)
    }

    /// A tensor's values.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_f32(&mut self, name: &str) -> Result<Vec<f32>> {
        let bytes = self.read(name)?;
        match self.tensors.get(name) {
            Some(info) => decode(info.kind, &bytes).map_err(|error| error.at(name)),
            None => Ok(Vec::new()), // `read` has refused it
        }
    }
}

/// The part of the file before the tensors, while it is read.
struct Head<'a, R> {
    source: BufReader<R>,
    path: &'a Path,
    length: u64,
    at: u64,
}

type Contents = (Vec<(String, Value)>, BTreeMap<String, TensorInfo>);

impl<R: Read> Head<'_, R> {
    fn parse(&mut self) -> Result<Contents> {
        if self.length < 4 || self.take::<4>("the magic number")? != MAGIC {
            return Err(Error::failed("the file is no GGUF file: it does not start with `GGUF`")
                .fix("give a file that ends in .gguf"));
        }
        let version = self.u32("the version")?;
        if version.swap_bytes() <= VERSION && version > VERSION {
            return Err(Error::failed("the file is big-endian GGUF, which fewbit does not read"));
        }
        if !(2..=VERSION).contains(&version) {
            return Err(Error::failed(format!(
                "the file is of GGUF version {version}; fewbit reads 2 and {VERSION}"
            )));
        }
        // A tensor takes at least 24 bytes here, a key at least 13.
        let tensors = self.count("number of tensors", 24)?;
        let keys = self.count("number of metadata keys", 13)?;
        let metadata = self.metadata(keys)?;
        let alignment = match metadata.iter().find(|(key, _)| key == "general.alignment") {
            None => ALIGNMENT,
            Some((_, value)) => value
                .as_u64()
                .filter(|size| size.is_power_of_two() && *size <= 1 << 20)
                .ok_or_else(|| damaged(format!("general.alignment is {value:?}")))?,
        };
        let tensors = self.tensors(tensors, alignment)?;
        Ok((metadata, tensors))
    }

    fn metadata(&mut self, keys: u64) -> Result<Vec<(String, Value)>> {
        let (mut metadata, mut taken) = (Vec::new(), BTreeSet::new());
        for _ in 0..keys {
            let key = self.text("a metadata key")?;
            let value = self.kind(&key).and_then(|kind| self.value(kind, &key, 0))?;
            if !taken.insert(key.clone()) {
                return Err(damaged(format!("the metadata key `{key}` occurs twice")));
            }
            metadata.push((key, value));
        }
        Ok(metadata)
    }

    fn tensors(&mut self, count: u64, alignment: u64) -> Result<BTreeMap<String, TensorInfo>> {
        let mut tensors = BTreeMap::new();
        for _ in 0..count {
            let name = self.text("a tensor's name")?;
            let info = self.tensor(alignment).map_err(|error| error.at(&name))?;
            if tensors.insert(name.clone(), info).is_some() {
                return Err(damaged("the tensor occurs twice".to_owned()).at(name));
            }
        }
        // Offsets count from here on; only now is it known where that is.
        let data = self.at.next_multiple_of(alignment);
        for (name, info) in &mut tensors {
            let end = data.checked_add(info.start).and_then(|start| start.checked_add(info.bytes));
            if end.is_none_or(|end| end > self.length) {
                return Err(damaged(format!(
                    "the tensor's {} bytes from {data} + {} end beyond the file's {} bytes",
                    info.bytes, info.start, self.length
                ))
                .at(name));
            }
            info.start += data;
        }
        self.check_places(&tensors, data, alignment)?;
        Ok(tensors)
    }

    /// Tensors follow each other with no more between them than fills up to the alignment, and nothing
    /// stands behind the last: bytes put in or taken out show here.
    fn check_places(
        &self,
        tensors: &BTreeMap<String, TensorInfo>,
        data: u64,
        alignment: u64,
    ) -> Result<()> {
        let mut places: Vec<_> =
            tensors.iter().map(|(name, info)| (info.start, info.bytes, name)).collect();
        places.sort_unstable();
        let mut next = data;
        for (start, bytes, name) in places {
            if start != next {
                let what =
                    format!("the tensor begins at {start}, and the one before ends at {next}");
                return Err(damaged(what).at(name));
            }
            // Both were checked against the file's length.
            next = (start + bytes).next_multiple_of(alignment);
        }
        if self.length > next {
            let rest = self.length - next;
            return Err(damaged(format!("{rest} bytes stand behind the last tensor")));
        }
        Ok(())
    }

    /// One tensor's entry; `start` is still counted from the first tensor.
    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo> {
        let axes = self.u32("a number of sizes")?;
        if axes > MOST_AXES {
            return Err(damaged(format!("a tensor of {axes} sizes; {MOST_AXES} are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..axes {
            let size = self.u64("a tensor's size")?;
            shape.push(usize::try_from(size).map_err(|_| damaged(format!("a size of {size}")))?);
        }
        shape.reverse();
        let id = self.u32("a tensor's type")?;
        let start = self.u64("a tensor's offset")?;
        let Some(kind) = BlockType::from_id(id) else {
            let known = BlockType::ALL.map(BlockType::name).join(", ");
            return Err(Error::failed(format!("the tensor is of type {id}, unknown to fewbit"))
                .fix(format!("a file of the types {known}")));
        };
        let Some(bytes) = kind.tensor_bytes(&shape) else {
            return Err(damaged(format!("shape {shape:?} has no whole blocks of {kind}")));
        };
        if !start.is_multiple_of(alignment) {
            return Err(damaged(format!("offset {start} is no multiple of {alignment}")));
        }
        Ok(TensorInfo { shape, kind, start, bytes: bytes as u64 })
    }

    fn kind(&mut self, key: &str) -> Result<ValueKind> {
        let id = self.u32("a kind of value")?;
        ValueKind::from_id(id)
            .ok_or_else(|| damaged(format!("`{key}` is of kind {id}, which does not exist")))
    }

    fn value(&mut self, kind: ValueKind, key: &str, nesting: u32) -> Result<Value> {
        let what = "a metadata value";
        Ok(match kind {
            ValueKind::U8 => Value::U8(u8::from_le_bytes(self.take(what)?)),
            ValueKind::I8 => Value::I8(i8::from_le_bytes(self.take(what)?)),
            ValueKind::U16 => Value::U16(u16::from_le_bytes(self.take(what)?)),
            ValueKind::I16 => Value::I16(i16::from_le_bytes(self.take(what)?)),
            ValueKind::U32 => Value::U32(self.u32(what)?),
            ValueKind::I32 => Value::I32(i32::from_le_bytes(self.take(what)?)),
            ValueKind::F32 => Value::F32(f32::from_le_bytes(self.take(what)?)),
            ValueKind::Bool => match self.take::<1>(what)? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(damaged(format!("`{key}` is a truth value of {other}"))),
            },
            ValueKind::Text => Value::Text(self.text(key)?),
            ValueKind::List => {
                let kind = self.kind(key)?;
                if nesting == MOST_NESTING {
                    return Err(damaged(format!("`{key}` is a list in a list in a list ...")));
                }
                let count =
                    self.count(&format!("length of the list `{key}`"), kind.least_bytes())?;
                if count > LONGEST_LIST {
                    return Err(damaged(format!("`{key}` is a list of {count} values")));
                }
                let values = (0..count).map(|_| self.value(kind, key, nesting + 1));
                Value::List(kind, values.collect::<Result<_>>()?)
            }
            ValueKind::U64 => Value::U64(self.u64(what)?),
            ValueKind::I64 => Value::I64(i64::from_le_bytes(self.take(what)?)),
            ValueKind::F64 => Value::F64(f64::from_le_bytes(self.take(what)?)),
        })
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(&format!("length of a string ({what})"), 1)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| damaged(format!("a string ({what}) is no UTF-8")))
    }

    /// A count of things of at least `least` bytes each, which the rest of the file must hold.
    fn count(&mut self, what: &str, least: u64) -> Result<u64> {
        let count = self.u64(what)?;
        let left = self.length - self.at;
        if count.checked_mul(least).is_none_or(|bytes| bytes > left) {
            return Err(damaged(format!(
                "the {what} is {count}, but only {left} bytes of the file are left"
            )));
        }
        Ok(count)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.take(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.take(what).map(u64::from_le_bytes)
    }

    fn take<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<()> {
        let count = bytes.len() as u64;
        if count > self.length - self.at {
            return Err(damaged(format!("the file ends inside {what}")));
        }
        self.at += count;
        self.source.read_exact(bytes).map_err(|error| Error::io_on(self.path, "read", error))
    }
}

fn damaged(what: String) -> Error {
    Error::failed(what).fix(DAMAGED)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::file::Header;

    fn file() -> Vec<u8> {
        let mut header = Header::new();
        header.set("general.architecture", "llama").unwrap();
        for (key, value) in [
            ("a", Value::U8(1)),
            ("b", Value::I8(-1)),
            ("c", Value::U16(2)),
            ("d", Value::I16(-2)),
            ("e", Value::I32(-3)),
            ("f", Value::F32(0.5)),
            ("g", Value::Bool(true)),
            ("h", Value::U64(4)),
            ("i", Value::I64(-4)),
            ("j", Value::F64(0.25)),
            ("k", Value::texts(["x".to_owned(), "é".to_owned()])),
            ("l", Value::List(ValueKind::List, vec![Value::integers([1]), Value::floats([])])),
        ] {
            header.set(key, value).unwrap();
        }
        header.announce("w", &[2, 32], BlockType::Q4_0).unwrap();
        header.announce("n", &[3], BlockType::F32).unwrap();
        let mut writer = header.start(Vec::new(), Path::new("x")).unwrap();
        writer.write("w", &[0x3c; 36]).unwrap();
        writer.write("n", &[0, 0, 128, 63, 0, 0, 0, 64, 0, 0, 64, 64]).unwrap();
        writer.finish().unwrap()
    }

    fn read(bytes: Vec<u8>) -> Result<Reader<Cursor<Vec<u8>>>> {
        Reader::new(Cursor::new(bytes), Path::new("m.gguf"))
    }

    #[test]
    fn what_was_written_is_read() {
        let mut reader = read(file()).unwrap();
        assert_eq!(reader.get("general.architecture").unwrap().as_text(), Some("llama"));
        assert_eq!(reader.metadata().len(), 13);
        assert_eq!(reader.get("l").unwrap().as_list().unwrap()[0], Value::integers([1]));
        assert_eq!(reader.tensors()["w"].shape, [2, 32]);
        assert_eq!(reader.read("w").unwrap(), [0x3c; 36]);
        assert_eq!(reader.read_f32("n").unwrap(), [1.0, 2.0, 3.0]);
        assert!(reader.read("x").unwrap_err().to_string().contains("no tensor"));
    }

    #[test]
    fn no_part_of_a_file_is_a_file() {
        let file = file();
        // The last 20 bytes are padding, which readers do not need.
        for length in 0..file.len() - 20 {
            let error = read(file[..length].to_vec()).unwrap_err().to_string();
            assert!(error.contains("m.gguf"), "{error}");
        }
        assert!(read(file[..file.len() - 20].to_vec()).is_ok());
    }

    #[test]
    fn bytes_put_in_taken_out_or_put_behind_are_seen() {
        let whole = file();
        let behind = |bytes: usize| [&whole[..], &vec![0; bytes]].concat();
        assert!(read(behind(0)).is_ok());
        // The last tensor may be filled up to the alignment, and by no more.
        let end = whole.len();
        assert!(read(whole[..end - (ALIGNMENT as usize - 12)].to_vec()).is_ok());
        assert!(read(whole[..end - (ALIGNMENT as usize - 11)].to_vec()).is_err());
        for bytes in [1, 32, 64] {
            let error = read(behind(bytes)).unwrap_err().to_string();
            assert!(error.contains("behind the last tensor"), "{error}");
        }
    }

    /// No byte of the header, whatever it becomes, may panic or ask for absurd memory.
    #[test]
    fn damaged_bytes_are_survived() {
        let file = file();
        for at in 0..file.len() - 96 {
            for byte in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = file.clone();
                damaged[at] = byte;
                if let Ok(mut reader) = read(damaged) {
                    let names: Vec<_> = reader.tensors().keys().cloned().collect();
                    for name in &names {
                        reader.read_f32(name).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn damage_is_named() {
        let damaged = |at: usize, bytes: &[u8]| {
            let mut file = file();
            file[at..at + bytes.len()].copy_from_slice(bytes);
            read(file).unwrap_err().to_string()
        };
        let find = |needle: &[u8]| file().windows(needle.len()).position(|w| w == needle).unwrap();
        assert!(damaged(0, b"GGML").contains("does not start with"));
        assert!(damaged(4, &[1, 0, 0, 0]).contains("version 1"));
        assert!(damaged(4, &[0, 0, 0, 3]).contains("big-endian"));
        assert!(damaged(8, &[0xff; 8]).contains("number of tensors"));
        assert!(damaged(24, &[0xff; 4]).contains("length of a string"));
        let info = find(b"w\x02\0\0\0");
        assert!(damaged(info + 1, &[9]).contains("9 sizes"));
        assert!(damaged(info + 5, &[31]).contains("no whole blocks"));
        assert!(damaged(info + 21, &[99]).contains("type 99"));
        assert!(damaged(info + 25, &[1]).contains("no multiple of 32"));
        assert!(damaged(info + 25 + 6, &[1]).contains("beyond the file"));
    }
}
