//! What readers of packed formats share. They are written after the formats' specifications and apart
//! from the writers, and every export is read back through them before it counts.

use serde_json::Value;

use crate::error::{Error, Result};
use crate::quant::{Bits, Grid, GroupAxis, GroupLayout, QuantizedWeight};
use crate::store::{HostTensor, TensorSource};

/// What to do about packed weights that are not what their config or manifest says.
pub(super) const DAMAGED: &str =
    "export the run again, or get the model again: these files are damaged";

/// How folders of a packed format are read.
#[derive(Debug)]
pub struct Reader {
    /// The format's name in a `config.json`.
    pub method: &'static str,
    /// The format's section of a `config.json`, where it has one.
    pub section: fn(&Value) -> Option<&Value>,
    /// The tensor of a linear by which one can tell that it is packed.
    pub tensor: &'static str,
    /// The weights of a linear under the section.
    pub weights: fn(&Value, &str, &dyn TensorSource) -> Result<Weights>,
    /// Its codes, where they stand for these weights exactly.
    pub codes: fn(&Value, &str, &dyn TensorSource) -> Result<Option<QuantizedWeight>>,
}

/// Weights as the runtime computes them, row-major, and their shape, `[out, in]`.
pub(super) type Weights = (Vec<f32>, [usize; 2]);

/// The method that a `config.json` names.
pub(super) fn named_method(config: &Value) -> Option<&str> {
    config.get("quantization_config")?.get("quant_method")?.as_str()
}

/// The `quantization_config`, where it is of `method`.
pub(super) fn section<'a>(config: &'a Value, method: &str) -> Option<&'a Value> {
    (named_method(config)? == method).then(|| &config["quantization_config"])
}

/// A folder in a packed format, whoever wrote it.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    /// How it is read.
    pub reader: &'static Reader,
    /// What its `config.json` says.
    pub section: Value,
}

impl Packed {
    /// Whether a linear is stored packed.
    pub(super) fn holds(&self, linear: &str, source: &dyn TensorSource) -> bool {
        source.info(&format!("{linear}.{}", self.reader.tensor)).is_some()
    }

    /// A linear's weights.
    ///
    /// # Errors
    /// When the files are damaged.
    pub(super) fn weights(&self, linear: &str, source: &dyn TensorSource) -> Result<Weights> {
        (self.reader.weights)(&self.section, linear, source)
    }

    /// A linear's codes, where they stand for its weights exactly.
    ///
    /// # Errors
    /// When the files are damaged.
    pub(super) fn codes(
        &self,
        linear: &str,
        source: &dyn TensorSource,
    ) -> Result<Option<QuantizedWeight>> {
        (self.reader.codes)(&self.section, linear, source)
    }
}

/// A weight on a uniform grid as a file holds it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Decoded {
    /// Output features (rows).
    pub out: usize,
    /// Input features (columns).
    pub inputs: usize,
    /// Weights of a row that share a scale, as stored; neighbours, unless the file says which input
    /// belongs to which group.
    pub group_len: usize,
    /// Width of a code.
    pub bits: u8,
    /// `[out, inputs]`.
    pub codes: Vec<u8>,
    /// `[out, inputs / group_len]`.
    pub scale: Vec<f32>,
    /// What is added or subtracted.
    pub shift: Shift,
    /// `[out, inputs]`, as the runtime computes them: MLX in the type of its scales, all others
    /// in f32 (those that compute in f16 round each of these once).
    pub weights: Vec<f32>,
}

/// Where a group's grid lies, `[out, inputs / group_len]`.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Shift {
    /// `scale * (code - zero)`.
    Zero(Vec<f32>),
    /// `scale * code + bias`.
    Bias(Vec<f32>),
}

impl Decoded {
    /// The same weight in groups of `group_len`, a multiple of the stored length; `None` when
    /// stored groups within one of these differ.
    #[cfg(test)]
    pub(super) fn regrouped(self, group_len: usize) -> Option<Self> {
        let fits = group_len > 0
            && group_len.is_multiple_of(self.group_len)
            && self.inputs.is_multiple_of(group_len);
        if !fits {
            return None;
        }
        let times = group_len / self.group_len;
        let merged = |values: &[f32]| -> Option<Vec<f32>> {
            let runs = values.chunks_exact(times);
            runs.map(|run| run.iter().all(|v| v.to_bits() == run[0].to_bits()).then(|| run[0]))
                .collect()
        };
        let scale = merged(&self.scale)?;
        let shift = match &self.shift {
            Shift::Zero(zero) => Shift::Zero(merged(zero)?),
            Shift::Bias(bias) => Shift::Bias(merged(bias)?),
        };
        Some(Self { group_len, scale, shift, ..self })
    }

    /// The codes and their grid, where these stand for the weights to the bit.
    ///
    /// # Errors
    /// When a scale or a code cannot be.
    pub(super) fn codes(self) -> Result<Option<QuantizedWeight>> {
        let Self { out, inputs, group_len, codes, scale, shift, weights, bits } = self;
        let zero = match shift {
            Shift::Zero(zero) => zero,
            Shift::Bias(bias) => {
                bias.iter().zip(&scale).map(|(bias, scale)| -bias / scale).collect()
            }
        };
        // A grid that fewbit counts from below.
        if scale.iter().any(|scale| *scale <= 0.0) || zero.iter().any(|zero| !zero.is_finite()) {
            return Ok(None);
        }
        let groups = out * inputs / group_len;
        let layout = GroupLayout { out, inputs, groups, group_len, axis: GroupAxis::In };
        let grid = Grid::uniform(scale, zero);
        let weight = QuantizedWeight::new(&codes, grid, Bits::new(bits)?, layout)?;
        let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || *a == 0.0 && *b == 0.0;
        let exact = weight.dequantize().iter().zip(&weights).all(same);
        Ok(exact.then_some(weight))
    }

    /// The weights with their shape, `[out, in]`.
    pub(super) fn values(self) -> Weights {
        (self.weights, [self.out, self.inputs])
    }

    /// Fills in `weights` by `scale * (code - zero)` in f32.
    pub(super) fn with_weights(self) -> Self {
        let group_len = self.group_len;
        self.with_scattered(&|input| input / group_len)
    }

    /// As [`Decoded::with_weights`], each input in the group that `group_of` says.
    pub(super) fn with_scattered(mut self, group_of: &dyn Fn(usize) -> usize) -> Self {
        let Shift::Zero(zero) = &self.shift else { return self };
        let groups = self.inputs / self.group_len;
        let weight = |(i, code): (usize, &u8)| {
            let group = i / self.inputs * groups + group_of(i % self.inputs);
            self.scale[group] * (f32::from(*code) - zero[group])
        };
        self.weights = self.codes.iter().enumerate().map(weight).collect();
        self
    }
}

/// The group of each input, where the file has such a tensor.
///
/// # Errors
/// When it does not name one of `groups` for each of `inputs`.
pub(super) fn group_index(
    source: &dyn TensorSource,
    name: &str,
    inputs: usize,
    groups: usize,
) -> Result<Option<Vec<usize>>> {
    if source.info(name).is_none() {
        return Ok(None);
    }
    let index = source.read(name)?.to_u32().map_err(|e| e.at(name))?;
    let index: Vec<usize> = index.iter().filter_map(|own| usize::try_from(*own).ok()).collect();
    if index.len() == inputs && index.iter().all(|group| *group < groups) {
        return Ok(Some(index));
    }
    Err(damaged(format!("it does not name one of {groups} groups for {inputs} inputs"), name))
}

/// A stream of codes in 32-bit words that lie `stride` apart: code `i` occupies bits
/// `i * bits ..`, the lowest bit of a word first.
pub(super) struct Stream<'a> {
    /// The words.
    pub words: &'a [u32],
    /// The first one's place.
    pub start: usize,
    /// Words from one to the next.
    pub stride: usize,
    /// Width of a code.
    pub bits: u8,
}

impl Stream<'_> {
    /// Code `index`; bits behind the last word are zero.
    pub(super) fn code(&self, index: usize) -> u8 {
        let place = index * usize::from(self.bits);
        let word = |number: usize| {
            let word = self.words.get(self.start + number * self.stride);
            u64::from(word.copied().unwrap_or(0))
        };
        let both = word(place / 32) | word(place / 32 + 1) << 32;
        (both >> (place % 32)) as u8 & (u8::MAX >> (8 - self.bits))
    }
}

/// A tensor of two dimensions.
pub(super) fn matrix(source: &dyn TensorSource, name: &str) -> Result<(HostTensor, [usize; 2])> {
    let tensor = source.read(name)?;
    match tensor.shape[..] {
        [rows, columns] if rows > 0 && columns > 0 => Ok((tensor, [rows, columns])),
        _ => Err(damaged(
            format!("the tensor has shape {:?}, not two sizes above 0", tensor.shape),
            name,
        )),
    }
}

/// The words of a matrix.
pub(super) fn words(source: &dyn TensorSource, name: &str) -> Result<(Vec<u32>, [usize; 2])> {
    let (tensor, shape) = matrix(source, name)?;
    Ok((tensor.to_u32().map_err(|e| e.at(name))?, shape))
}

/// The words of a matrix of a known shape.
pub(super) fn words_of(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
) -> Result<Vec<u32>> {
    let (words, found) = words(source, name)?;
    expect(name, found, shape).map(|()| words)
}

/// The values of a float matrix of a known shape.
pub(super) fn floats_of(
    source: &dyn TensorSource,
    name: &str,
    shape: [usize; 2],
) -> Result<Vec<f32>> {
    let (tensor, found) = matrix(source, name)?;
    expect(name, found, shape)?;
    tensor.to_f32().map_err(|e| e.at(name))
}

fn expect(name: &str, found: [usize; 2], shape: [usize; 2]) -> Result<()> {
    if found == shape {
        return Ok(());
    }
    Err(damaged(format!("the tensor has shape {found:?}, expected {shape:?}"), name))
}

/// An error about a file that is not what its config says.
pub(super) fn damaged(what: impl Into<String>, at: &str) -> Error {
    Error::damaged(what, DAMAGED).at(at)
}

/// An unsigned number of a config.
pub(super) fn number(config: &Value, key: &str) -> Option<usize> {
    config.get(key)?.as_u64().and_then(|number| usize::try_from(number).ok())
}

/// A code width of a config.
pub(super) fn width(config: &Value, key: &str, at: &str) -> Result<u8> {
    match number(config, key).map(u8::try_from) {
        Some(Ok(bits @ 1..=8)) => Ok(bits),
        _ => Err(damaged(format!("the config has no usable {key}"), at)),
    }
}

/// The length of a group, which has to divide the inputs; -1 or nothing in a config means a row.
pub(super) fn group_len(config: &Value, inputs: usize, at: &str) -> Result<usize> {
    let stated = config.get("group_size").and_then(Value::as_i64).unwrap_or(-1);
    let group = if stated == -1 { inputs } else { usize::try_from(stated).unwrap_or(0) };
    if group > 0 && inputs.is_multiple_of(group) {
        return Ok(group);
    }
    Err(damaged(format!("group size {stated} does not divide {inputs} inputs"), at))
}

#[cfg(test)]
pub(crate) mod memory {
    //! Tensors in memory, for tests.

    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;
    use crate::store::TensorInfo;

    pub(crate) struct Memory(BTreeMap<String, (TensorInfo, HostTensor)>);

    impl Memory {
        pub(crate) fn new(tensors: Vec<(String, HostTensor)>) -> Self {
            let entry = |(name, tensor): (String, HostTensor)| {
                tensor.check().unwrap();
                let info = TensorInfo {
                    dtype: tensor.dtype,
                    shape: tensor.shape.clone(),
                    file: PathBuf::new(),
                    start: 0,
                    end: tensor.bytes.len() as u64,
                };
                (name, (info, tensor))
            };
            Self(tensors.into_iter().map(entry).collect())
        }
    }

    impl TensorSource for Memory {
        fn names(&self) -> Vec<&str> {
            self.0.keys().map(String::as_str).collect()
        }

        fn info(&self, name: &str) -> Option<&TensorInfo> {
            self.0.get(name).map(|(info, _)| info)
        }

        fn read(&self, name: &str) -> Result<HostTensor> {
            let tensor = self.0.get(name).map(|(_, tensor)| tensor.clone());
            tensor.ok_or_else(|| Error::failed("there is no such tensor").at(name))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_by_hand() {
        // Codes 5 at 0, 6 at 10 of three bits; the latter straddles into the next word.
        let words = [0b101 | 0b10 << 30, 77, 1, 77];
        let stream = Stream { words: &words, start: 0, stride: 2, bits: 3 };
        assert_eq!((stream.code(0), stream.code(1), stream.code(10)), (5, 0, 6));
        assert_eq!(Stream { words: &[u32::MAX], start: 0, stride: 1, bits: 8 }.code(3), 255);
    }
}
