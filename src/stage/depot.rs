//! Tensors that wait away from the device, in main memory or in a file, until their block's turn comes.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::ops;
use crate::store::Scratch;
use crate::train::{Later, Values};

/// What of a block waits.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub(super) enum Kind {
    /// The tensors of its parameters.
    Parameters,
    /// The optimizer's state.
    Moments,
    /// Gradients, until the norm of all of them is known.
    Gradients,
}

/// A block's index, and what of it.
type Key = (usize, Kind);

/// A tensor off the device.
#[derive(Clone, Debug)]
pub(super) struct Parked {
    /// What it is called in its block.
    pub name: String,
    /// Whether it is the transposed view of what `data` holds.
    turned: bool,
    data: TensorData,
}

impl Parked {
    /// A tensor off the tape; its memory becomes the parked one where nobody else holds it.
    pub(super) fn of<const D: usize>(name: String, tensor: Tensor<D>) -> Self {
        let turned = ops::lies_transposed(&tensor);
        let tensor = if turned { tensor.transpose() } else { tensor };
        Self { name, turned, data: tensor.into_data() }
    }

    /// As [`Parked::of`], in two bytes each where bf16 holds every value.
    pub(super) fn of_bf16<const D: usize>(name: String, tensor: Tensor<D>) -> Self {
        let Self { name, turned, data } = Self::of(name, tensor);
        let is_held = data
            .as_bytes()
            .as_chunks::<4>()
            .0
            .iter()
            .all(|value| u32::from_ne_bytes(*value).trailing_zeros() >= 16);
        Self { name, turned, data: if is_held { narrowed(&data) } else { data } }
    }

    /// What is about to be saved, as it lies there.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn read(name: String, later: Later) -> Result<Self> {
        let data = match later.values {
            Values::F32(read) | Values::Bf16(read) => TensorData::new(read()?, later.shape),
            Values::U8(read) => TensorData::new(read()?, later.shape),
        };
        Ok(Self { name, turned: false, data })
    }

    /// Its values as they lie.
    pub(super) fn into_data(self) -> TensorData {
        self.data
    }

    /// The tensor, on a device without a tape; of bf16 in f32.
    pub(super) fn tensor<const D: usize>(self, device: &Device) -> Tensor<D> {
        let data = if self.data.dtype() == DType::BF16 { widened(&self.data) } else { self.data };
        let options = (device, data.dtype());
        let tensor = Tensor::<D>::from_data(data, options);
        if self.turned { tensor.transpose() } else { tensor }
    }

    /// Dimensions of the tensor.
    pub(super) fn rank(&self) -> usize {
        self.data.rank()
    }
}

/// Where one tensor lies.
#[derive(Clone, Debug)]
struct Slot {
    name: String,
    turned: bool,
    shape: Vec<usize>,
    dtype: DType,
    bytes: usize,
    at: At,
}

#[derive(Clone, Debug)]
enum At {
    Memory(Arc<TensorData>),
    File(u64),
}

/// A thread that reads.
type Reading = JoinHandle<Result<Vec<Parked>>>;

/// The tensors of all blocks.
pub(super) struct Depot {
    /// The file, where it is not main memory.
    file: Option<Arc<Scratch>>,
    /// The file's length.
    end: u64,
    slots: HashMap<Key, Vec<Slot>>,
    /// What is being read ahead of need.
    ahead: RefCell<Option<(Key, Reading)>>,
}

impl Depot {
    /// In main memory.
    pub(super) fn in_memory() -> Self {
        Self { file: None, end: 0, slots: HashMap::new(), ahead: RefCell::new(None) }
    }

    /// In a file without a name on the disk of `dir`.
    ///
    /// # Errors
    /// When none can be made there.
    pub(super) fn on_disk(dir: &Path) -> Result<Self> {
        Ok(Self { file: Some(Arc::new(Scratch::new(dir)?)), ..Self::in_memory() })
    }

    /// Keeps tensors in the place of those of the same key.
    ///
    /// # Errors
    /// When they cannot be written.
    pub(super) fn put(&mut self, key: Key, tensors: Vec<Parked>) -> Result<()> {
        // What is being read may be what is about to change.
        let stale = self.ahead.borrow_mut().take_if(|(reading, _)| *reading == key);
        if let Some((_, thread)) = stale {
            joined(thread)?;
        }
        let old = self.slots.remove(&key).unwrap_or_default();
        let mut slots = Vec::with_capacity(tensors.len());
        for (index, Parked { name, turned, data }) in tensors.into_iter().enumerate() {
            let (shape, dtype) = (data.shape().to_vec(), data.dtype());
            let bytes = data.as_bytes().len();
            let at = match &self.file {
                None => At::Memory(Arc::new(data)),
                Some(file) => {
                    let place = match old.get(index) {
                        Some(Slot { at: At::File(place), bytes: room, .. }) if *room >= bytes => {
                            *place
                        }
                        _ => {
                            let place = self.end;
                            self.end += bytes as u64;
                            place
                        }
                    };
                    file.write(place, data.as_bytes())?;
                    At::File(place)
                }
            };
            slots.push(Slot { name, turned, shape, dtype, bytes, at });
        }
        self.slots.insert(key, slots);
        Ok(())
    }

    /// A copy of what was kept; nothing where nothing was.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn get(&self, key: Key) -> Result<Vec<Parked>> {
        let found = self.ahead.borrow_mut().take_if(|(reading, _)| *reading == key);
        if let Some((_, thread)) = found {
            return joined(thread);
        }
        let slots = self.slots.get(&key).map_or(&[][..], Vec::as_slice);
        slots.iter().map(|slot| read(slot, self.file.as_deref())).collect()
    }

    /// Lets go of what was kept of a kind, on the disk too where it lies behind everything else.
    ///
    /// # Errors
    /// When the file cannot be made shorter.
    pub(super) fn drop_all(&mut self, kind: Kind) -> Result<()> {
        if let Some((_, thread)) = self.ahead.borrow_mut().take() {
            joined(thread)?;
        }
        self.slots.retain(|(_, of), _| *of != kind);
        let Some(file) = &self.file else { return Ok(()) };
        let ends = self.slots.values().flatten().map(|slot| match slot.at {
            At::File(place) => place + slot.bytes as u64,
            At::Memory(_) => 0,
        });
        self.end = ends.max().unwrap_or(0);
        file.cut(self.end)
    }

    /// Begins to read what will be asked for next; nothing to do in main memory.
    ///
    /// # Errors
    /// When there can be no thread.
    pub(super) fn ahead(&self, key: Key) -> Result<()> {
        let (Some(file), Some(slots)) = (&self.file, self.slots.get(&key)) else { return Ok(()) };
        let mut ahead = self.ahead.borrow_mut();
        if let Some((_, thread)) = ahead.take() {
            joined(thread)?;
        }
        let (file, slots) = (Arc::clone(file), slots.clone());
        let read = move || slots.iter().map(|slot| read(slot, Some(&file))).collect();
        let thread = std::thread::Builder::new().name("ahead".to_owned()).spawn(read);
        let thread = thread.map_err(|e| Error::of_io(format!("cannot start a thread: {e}"), &e))?;
        *ahead = Some((key, thread));
        Ok(())
    }

    /// What was kept, to be written into a saved state before anything else is put here: name, shape and
    /// values of each tensor.
    pub(super) fn later(&self, key: Key) -> impl Iterator<Item = Later> {
        let slots = self.slots.get(&key).cloned().unwrap_or_default();
        let file = self.file.clone();
        slots.into_iter().map(move |slot| {
            let mut shape = slot.shape.clone();
            if slot.turned {
                shape.reverse();
            }
            let (name, file) = (slot.name.clone(), file.clone());
            let values = if slot.dtype == DType::U8 {
                let read = move || Ok(read(&slot, file.as_deref())?.data.iter::<u8>().collect());
                Values::U8(Box::new(read))
            } else {
                let bf16 = slot.dtype == DType::BF16;
                let read = Box::new(move || {
                    let data = read(&slot, file.as_deref())?.data;
                    let data = if bf16 { widened(&data) } else { data };
                    let values: Vec<f32> = data.iter::<f32>().collect();
                    Ok(if slot.turned { turned(&values, slot.shape[1]) } else { values })
                });
                if bf16 { Values::Bf16(read) } else { Values::F32(read) }
            };
            Later { name, shape, values }
        })
    }
}

fn read(slot: &Slot, file: Option<&Scratch>) -> Result<Parked> {
    let data = match (&slot.at, file) {
        (At::Memory(data), _) => TensorData::clone(data),
        (At::File(place), Some(file)) => {
            let bytes = file.read(*place, slot.bytes)?;
            TensorData::from_bytes_vec(bytes, slot.shape.clone(), slot.dtype)
        }
        (At::File(_), None) => return Err(Error::failed("a scratch file is gone")),
    };
    Ok(Parked { name: slot.name.clone(), turned: slot.turned, data })
}

/// f32 values that bf16 holds as that: the upper half of their bits.
fn narrowed(data: &TensorData) -> TensorData {
    let values = data.as_bytes().as_chunks::<4>().0;
    let mut bytes = vec![0; 2 * values.len()];
    for (place, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *place = ((u32::from_ne_bytes(*value) >> 16) as u16).to_ne_bytes();
    }
    TensorData::from_bytes_vec(bytes, data.shape().to_vec(), DType::BF16)
}

/// bf16 values in f32.
fn widened(data: &TensorData) -> TensorData {
    let values = data.as_bytes().as_chunks::<2>().0.iter();
    let widen = |value: &[u8; 2]| f32::from_bits(u32::from(u16::from_ne_bytes(*value)) << 16);
    TensorData::new::<f32, _>(values.map(widen).collect(), data.shape().to_vec())
}

fn joined<T>(thread: JoinHandle<T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A row-major matrix of so many columns with rows for columns, a tile at a time.
fn turned(values: &[f32], columns: usize) -> Vec<f32> {
    const TILE: usize = 32;
    let rows = values.len() / columns.max(1);
    let mut turned = vec![0.0; values.len()];
    for row in (0..rows).step_by(TILE) {
        for column in (0..columns).step_by(TILE) {
            for r in row..(row + TILE).min(rows) {
                for c in column..(column + TILE).min(columns) {
                    turned[c * rows + r] = values[r * columns + c];
                }
            }
        }
    }
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A block lies where it will before anything of it learns: its place in the file never changes.
    #[test]
    fn what_bf16_holds_takes_two_bytes_and_keeps_its_value() {
        let device = Device::flex();
        let bytes = |values: [f32; 3]| {
            let parked = Parked::of_bf16("x".to_owned(), Tensor::<1>::from_data(values, &device));
            let len = parked.data.as_bytes().len();
            let back: Vec<f32> = parked.tensor::<1>(&device).into_data().iter::<f32>().collect();
            assert!(back.iter().zip(values).all(|(a, b)| a.to_bits() == b.to_bits()));
            len
        };
        assert_eq!(bytes([1.0, -0.375, 0.0]), 6);
        assert_eq!(bytes([1.0, 0.1, 0.0]), 12);
    }
}
