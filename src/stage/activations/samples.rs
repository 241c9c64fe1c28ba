//! Where the samples of a stream lie.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::store::Scratch;

/// The type that hidden states of the calibration set are kept in.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamType {
    /// As they were computed.
    #[default]
    F32,
    /// Rounded to bfloat16: half the room.
    Bf16,
}

impl StreamType {
    /// Bytes of a value.
    pub fn size(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// Whether it is the one that recipes get which say nothing.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How streams are kept.
#[derive(Clone, Debug, Default)]
pub(in crate::stage) struct Keeping {
    /// In this type.
    pub dtype: StreamType,
    /// In files without a name in this folder; `None`: in main memory.
    pub dir: Option<PathBuf>,
}

/// A thread that reads.
type Reading = JoinHandle<Result<Vec<f32>>>;

/// Samples of a stream.
#[derive(Debug)]
pub(super) struct Samples {
    keeping: Keeping,
    /// Values of each sample.
    lengths: Vec<usize>,
    /// First value of each sample, in the file.
    starts: Vec<u64>,
    /// Values in all.
    values: u64,
    memory: Vec<Sample>,
    file: Option<Arc<Scratch>>,
    /// What is being read ahead of need.
    ahead: RefCell<Option<(Vec<u32>, Reading)>>,
}

#[derive(Debug)]
enum Sample {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// Only what nobody else has is ever changed ([`std::rc::Rc::make_mut`]), and so no copy is ever made.
impl Clone for Samples {
    fn clone(&self) -> Self {
        Self::none(&self.keeping)
    }
}

impl Samples {
    pub(super) fn none(keeping: &Keeping) -> Self {
        Self {
            keeping: keeping.clone(),
            lengths: Vec::new(),
            starts: Vec::new(),
            values: 0,
            memory: Vec::new(),
            file: None,
            ahead: RefCell::new(None),
        }
    }

    pub(super) fn keeping(&self) -> &Keeping {
        &self.keeping
    }

    pub(super) fn len(&self) -> usize {
        self.lengths.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lengths.is_empty()
    }

    /// Values in all.
    pub(super) fn values(&self) -> usize {
        self.values as usize
    }

    /// Values of a sample.
    pub(super) fn length(&self, index: u32) -> usize {
        self.lengths[index as usize]
    }

    /// Adds a sample.
    pub(super) fn push(&mut self, values: &[f32]) -> Result<()> {
        let index = self.lengths.len() as u32;
        self.lengths.push(values.len());
        self.starts.push(self.values);
        self.values += values.len() as u64;
        if self.keeping.dir.is_none() {
            self.memory.push(Sample::F32(Vec::new()));
        }
        self.set(index, values)
    }

    /// Puts values in the place of a sample's, of the same length.
    pub(super) fn set(&mut self, index: u32, values: &[f32]) -> Result<()> {
        let at = index as usize;
        debug_assert_eq!(self.lengths[at], values.len());
        let Some(dir) = &self.keeping.dir else {
            self.memory[at] = match self.keeping.dtype {
                StreamType::F32 => Sample::F32(values.to_vec()),
                StreamType::Bf16 => {
                    let mut rounded = vec![bf16::ZERO; values.len()];
                    rounded.convert_from_f32_slice(values);
                    Sample::Bf16(rounded)
                }
            };
            return Ok(());
        };
        let file = match &self.file {
            Some(file) => file,
            None => self.file.insert(Arc::new(Scratch::new(dir)?)),
        };
        let place = self.starts[at] * self.keeping.dtype.size();
        file.write(place, &encode(values, self.keeping.dtype))
    }

    /// The values of some samples, one after the other.
    pub(super) fn read(&self, indices: &[u32]) -> Result<Vec<f32>> {
        let Some(file) = &self.file else {
            let mut values = Vec::with_capacity(self.count(indices));
            for index in indices {
                match &self.memory[*index as usize] {
                    Sample::F32(sample) => values.extend_from_slice(sample),
                    Sample::Bf16(sample) => {
                        let from = values.len();
                        values.resize(from + sample.len(), 0.0);
                        sample.convert_to_f32_slice(&mut values[from..]);
                    }
                }
            }
            return Ok(values);
        };
        let found = self.ahead.borrow_mut().take_if(|(reading, _)| reading == indices);
        match found {
            Some((_, thread)) => joined(thread),
            None => from_file(file, &self.places(indices), self.keeping.dtype),
        }
    }

    /// Begins to read what will be asked for next; nothing to do in main memory.
    pub(super) fn ahead(&self, indices: &[u32]) -> Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut ahead = self.ahead.borrow_mut();
        if ahead.as_ref().is_some_and(|(reading, _)| reading == indices) {
            return Ok(());
        }
        if let Some((_, thread)) = ahead.take() {
            joined(thread)?;
        }
        let (file, places, dtype) = (Arc::clone(file), self.places(indices), self.keeping.dtype);
        let read = move || from_file(&file, &places, dtype);
        let thread = std::thread::Builder::new().name("ahead".to_owned()).spawn(read);
        let thread = thread.map_err(|e| Error::of_io(format!("cannot start a thread: {e}"), &e))?;
        *ahead = Some((indices.to_vec(), thread));
        Ok(())
    }

    fn count(&self, indices: &[u32]) -> usize {
        indices.iter().map(|index| self.length(*index)).sum()
    }

    /// First value and number of values of samples in the file; neighbours are one place.
    fn places(&self, indices: &[u32]) -> Vec<(u64, usize)> {
        let mut places: Vec<(u64, usize)> = Vec::new();
        for index in indices {
            let (start, length) = (self.starts[*index as usize], self.length(*index));
            match places.last_mut() {
                Some((first, count)) if *first + *count as u64 == start => *count += length,
                _ => places.push((start, length)),
            }
        }
        places
    }
}

fn from_file(file: &Scratch, places: &[(u64, usize)], dtype: StreamType) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(places.iter().map(|(_, count)| count).sum());
    for (start, count) in places {
        let bytes = file.read(start * dtype.size(), count * dtype.size() as usize)?;
        match dtype {
            StreamType::F32 => {
                let read = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
                values.extend(read);
            }
            StreamType::Bf16 => {
                let read = bytes.as_chunks::<2>().0.iter();
                values.extend(read.map(|bytes| bf16::from_le_bytes(*bytes).to_f32()));
            }
        }
    }
    Ok(values)
}

fn encode(values: &[f32], dtype: StreamType) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size() as usize];
    match dtype {
        StreamType::F32 => {
            for (bytes, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *bytes = value.to_le_bytes();
            }
        }
        StreamType::Bf16 => {
            for (bytes, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *bytes = bf16::from_f32(*value).to_le_bytes();
            }
        }
    }
    bytes
}

fn joined<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}
