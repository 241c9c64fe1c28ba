//! Scale adapters: what a task learned of a quantized model, in a file of its own.
//!
//! A safetensors file. Per linear `X` on a uniform grid `X.scales`, `[rows, groups]`; in binary
//! coding `X.alphas`, `[rows, groups, bits]`, or `X.alpha_1`, `[rows, groups]`, where the largest
//! scale of each group alone learned (with `X.planes`, u8, where that is not the first plane
//! everywhere); and `X.offsets`, `[rows, groups]`, where they learned. Values
//! are absolute, so that applying an adapter is a copy without a rounding history. The metadata say
//! which base it belongs to: every record carries the hash of what the adapter leaves as it is,
//! codes first of all.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::quant::{
    Bits, Grid, GroupAxis, GroupLayout, Learned, LearnedScales, QuantizedWeight, Repr, ScaleDType,
};
use crate::store::safetensors::{Checkpoint, write_file};
use crate::store::{HostTensor, TensorSource, hex};

/// What the metadata's `format` says.
const FORMAT: &str = "fewbit-adapter";
/// Version of this layout.
const VERSION: u32 = 1;

/// Where an adapter came from.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct AdapterHead {
    /// Its name.
    pub name: String,
    /// The method that trained it.
    pub method: String,
    /// The base model's name.
    pub base: String,
    /// SHA-256 over the files of the model the run started from.
    pub base_model_sha256: String,
    /// SHA-256 of the text it was trained on.
    pub data_sha256: String,
    /// Seed of the run.
    pub seed: u64,
}

/// What an adapter holds of a linear.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterPart {
    /// The steps of a uniform grid.
    Scales,
    /// Every plane's scale.
    Alphas,
    /// Every plane's scale, and the offsets.
    AlphasAndOffsets,
    /// The largest scale of each group.
    #[serde(rename = "alpha_1")]
    Alpha1,
    /// The scales of codebooks.
    CodebookScales,
    /// The codebooks, and their scales.
    Codebooks,
}

/// One linear of an adapter.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct AdapterRecord {
    /// Width of a code.
    pub bits: Bits,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Weights that share a scale.
    pub group_len: usize,
    /// Along which dimension they lie.
    pub axis: GroupAxis,
    /// What of the grid the adapter holds.
    pub part: AdapterPart,
    /// SHA-256 of the base's packed codes, and of what else of its grid the adapter leaves.
    pub base_sha256: String,
}

/// Learned scales of some linears.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    head: AdapterHead,
    dtype: ScaleDType,
    linears: BTreeMap<String, (AdapterRecord, Values)>,
}

/// A linear's values, in the order of its groups.
#[derive(Clone, Debug, PartialEq)]
struct Values {
    /// `[groups, planes]`, or `[groups]` of [`AdapterPart::Alpha1`].
    scales: Vec<f32>,
    /// `[groups]`.
    offsets: Option<Vec<f32>>,
    /// The plane of each group's scale, where it is not the first everywhere, `[groups]`.
    planes: Option<Vec<u8>>,
}

/// A linear before and after training.
#[derive(Clone, Copy, Debug)]
pub struct Tuned<'a> {
    /// Its full name.
    pub name: &'a str,
    /// As the stage found it.
    pub base: &'a QuantizedWeight,
    /// As the stage left it.
    pub weight: &'a QuantizedWeight,
}

impl Adapter {
    /// What `learned` says has been learned.
    ///
    /// # Errors
    /// When a value does not fit in half precision.
    pub fn new(
        head: AdapterHead,
        learned: Learned,
        dtype: ScaleDType,
        tuned: &[Tuned<'_>],
    ) -> Result<Self> {
        let linears = tuned.iter().map(|linear| {
            let entry = entry(linear, learned, dtype).map_err(|e| e.at(linear.name))?;
            Ok((linear.name.to_owned(), entry))
        });
        Ok(Self { head, dtype, linears: linears.collect::<Result<_>>()? })
    }

    /// Where it came from.
    pub fn head(&self) -> &AdapterHead {
        &self.head
    }

    /// How its values are stored.
    pub fn dtype(&self) -> ScaleDType {
        self.dtype
    }

    /// Its linears, by name.
    pub fn records(&self) -> impl Iterator<Item = (&str, &AdapterRecord)> {
        self.linears.iter().map(|(name, (record, _))| (name.as_str(), record))
    }

    /// A linear's offsets, `[groups]`, where they learned.
    pub fn offsets(&self, linear: &str) -> Option<&[f32]> {
        self.linears.get(linear).and_then(|(_, values)| values.offsets.as_deref())
    }

    /// A linear's scales as stored, `[groups, planes]` or `[groups]`.
    pub fn scales(&self, linear: &str) -> Option<&[f32]> {
        self.linears.get(linear).map(|(_, values)| values.scales.as_slice())
    }

    /// Numbers that it holds.
    pub fn numbers(&self) -> usize {
        let of =
            |values: &Values| values.scales.len() + values.offsets.as_ref().map_or(0, Vec::len);
        self.linears.values().map(|(_, values)| of(values)).sum()
    }

    /// Refuses a base that this adapter was not trained on. `find` gives the base's linears.
    ///
    /// # Errors
    /// Exit code 6, with the linear that differs.
    pub fn check(
        &self,
        mut find: impl FnMut(&str) -> Result<Option<QuantizedWeight>>,
    ) -> Result<()> {
        for (name, (record, _)) in &self.linears {
            let wrong = |what: &str| {
                Error::mismatch(format!("the adapter belongs to another base: {what}"))
                    .at(format!("adapter {}", self.head.name))
                    .at(name)
                    .fix(format!("the base it was trained on, made from {}", self.head.base))
            };
            let Some(base) = find(name)? else {
                return Err(wrong("this linear is not quantized here"));
            };
            if !record.fits(&base) {
                let (found, layout) = (base.bits, base.layout);
                let wanted = (record.bits, record.group_len);
                return Err(wrong(&format!(
                    "{} x {} in {found} bits and groups of {}, not {} x {} in {} bits and groups of {}",
                    layout.out,
                    layout.inputs,
                    layout.group_len,
                    record.shape[0],
                    record.shape[1],
                    wanted.0,
                    wanted.1,
                )));
            }
            let (_, values) = &self.linears[name];
            if frozen_sha256(&base, record.part, values.planes.as_deref()) != record.base_sha256 {
                return Err(wrong("the codes do not match their hash"));
            }
        }
        Ok(())
    }

    /// The grid of a linear with the adapter's values in it; `None` for a linear it does not hold.
    /// Nothing but shapes is compared with the base: see [`Adapter::check`].
    ///
    /// # Errors
    /// When the base has another shape or kind of grid.
    pub fn grid(&self, linear: &str, base: &QuantizedWeight) -> Result<Option<Grid>> {
        let Some((record, values)) = self.linears.get(linear) else { return Ok(None) };
        if !record.fits(base) {
            return Err(Error::mismatch("the adapter belongs to another base").at(linear));
        }
        let scales = values.scales.clone();
        Ok(Some(match &base.grid {
            Grid::Uniform { zero_point, zero_kind, .. } => Grid::Uniform {
                scale: scales,
                zero_point: zero_point.clone(),
                zero_kind: *zero_kind,
            },
            Grid::BinaryCoding { alpha, offset } => {
                let alpha = if record.part == AdapterPart::Alpha1 {
                    let mut alpha = alpha.clone();
                    let bits = usize::from(base.bits.get());
                    for (group, (alpha, scale)) in
                        alpha.chunks_exact_mut(bits).zip(&scales).enumerate()
                    {
                        let plane = values.planes.as_ref().map_or(0, |planes| planes[group]);
                        alpha[usize::from(plane)] = *scale;
                    }
                    alpha
                } else {
                    scales
                };
                let offset = values.offsets.clone().unwrap_or_else(|| offset.clone());
                Grid::BinaryCoding { alpha, offset }
            }
            Grid::Codebook { books, additive, .. } => {
                let own = values.offsets.as_ref().unwrap_or(books);
                if own.len() != books.len() {
                    let what = "the adapter has codebooks of another size";
                    return Err(Error::mismatch(what).at(linear));
                }
                Grid::Codebook { scale: scales, books: own.clone(), additive: *additive }
            }
        }))
    }

    /// Writes one crash-safe file.
    ///
    /// # Errors
    /// I/O errors.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for (name, (record, values)) in &self.linears {
            let [rows, groups] = record.scale_shape();
            let floats = |values: &[f32]| {
                let shape = if values.len() == rows * groups {
                    vec![rows, groups]
                } else {
                    vec![rows, groups, values.len() / (rows * groups)]
                };
                match self.dtype {
                    ScaleDType::F32 => HostTensor::f32(shape, values),
                    ScaleDType::F16 => HostTensor::f16_from_f32(shape, values),
                }
            };
            tensors.push((format!("{name}.{}", record.part.tensor()), floats(&values.scales)));
            let offsets = values.offsets.iter();
            let offsets_name = format!("{name}.{}", record.part.offsets());
            tensors.extend(offsets.map(|values| match record.part {
                AdapterPart::Codebooks => {
                    (offsets_name.clone(), HostTensor::f16_from_f32([values.len()], values))
                }
                _ => (offsets_name.clone(), floats(values)),
            }));
            tensors.extend(
                values.planes.iter().map(|planes| {
                    (format!("{name}.planes"), HostTensor::u8([rows, groups], planes))
                }),
            );
        }
        let json = |value: serde_json::Result<String>| {
            value.map_err(|e| Error::failed(format!("cannot encode the adapter's records: {e}")))
        };
        let records: BTreeMap<&str, &AdapterRecord> = self.records().collect();
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("version".to_owned(), VERSION.to_string()),
            ("fewbit".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
            ("head".to_owned(), json(serde_json::to_string(&self.head))?),
            ("dtype".to_owned(), self.dtype.name().to_owned()),
            ("linears".to_owned(), json(serde_json::to_string(&records))?),
            ("sha256".to_owned(), contents_sha256(&tensors)),
        ]);
        write_file(path, &tensors, &metadata)
    }

    /// Whether the safetensors file with these metadata is an adapter.
    pub fn is_described_by(metadata: &BTreeMap<String, String>) -> bool {
        metadata.get("format").is_some_and(|format| format == FORMAT)
    }

    /// Reads what [`Adapter::write`] wrote.
    ///
    /// # Errors
    /// When the file is no adapter, is damaged, or is of a newer version.
    pub fn read(path: &Path) -> Result<Self> {
        let no_adapter = |what: &str| {
            let what = format!("the file is no adapter of fewbit's: {what}");
            Error::damaged(what, "a file under a run's adapters/").at(path.display())
        };
        if !path.is_file() {
            return Err(Error::usage("there is no such adapter")
                .at(path.display())
                .fix("a file under a run's adapters/"));
        }
        let file = Checkpoint::open_file(path).map_err(|e| no_adapter(e.what()))?;
        let metadata = file.file_metadata();
        let text = |key: &str| metadata.get(key).map_or("", String::as_str);
        if !Self::is_described_by(metadata) {
            return Err(no_adapter("its metadata do not say so"));
        }
        match text("version").parse::<u32>() {
            Ok(version) if version <= VERSION => {}
            _ => return Err(no_adapter("it is of a newer version").fix("a newer fewbit")),
        }
        let damaged = |what: &str| {
            Error::damaged(format!("the adapter is damaged: {what}"), "another copy of it")
                .at(path.display())
        };
        let unreadable = |e: serde_json::Error| damaged(&e.to_string());
        let head: AdapterHead = serde_json::from_str(text("head")).map_err(unreadable)?;
        let records: BTreeMap<String, AdapterRecord> =
            serde_json::from_str(text("linears")).map_err(unreadable)?;
        let dtype = match text("dtype") {
            "f16" => ScaleDType::F16,
            _ => ScaleDType::F32,
        };
        let tensors: Vec<(String, HostTensor)> = (file.names().into_iter())
            .map(|name| Ok((name.to_owned(), file.read(name)?)))
            .collect::<Result<_>>()
            .map_err(|e| damaged(e.what()))?;
        if contents_sha256(&tensors) != text("sha256") {
            return Err(damaged("its values do not match their hash"));
        }
        let mut tensors: BTreeMap<String, HostTensor> = tensors.into_iter().collect();
        let mut linears = BTreeMap::new();
        for (name, record) in records {
            let values = record.values(&name, &mut tensors).map_err(|e| damaged(e.what()))?;
            linears.insert(name, (record, values));
        }
        match tensors.keys().next() {
            Some(name) => Err(damaged(&format!("it has no record of {name}"))),
            None => Ok(Self { head, dtype, linears }),
        }
    }
}

fn entry(
    Tuned { base, weight, .. }: &Tuned<'_>,
    learned: Learned,
    dtype: ScaleDType,
) -> Result<(AdapterRecord, Values)> {
    let (part, scales, offsets) = match &weight.grid {
        Grid::Uniform { scale, .. } => (AdapterPart::Scales, scale, None),
        Grid::BinaryCoding { alpha, .. } if learned.scales == LearnedScales::Largest => {
            (AdapterPart::Alpha1, alpha, None)
        }
        Grid::BinaryCoding { alpha, offset } if learned.offsets => {
            (AdapterPart::AlphasAndOffsets, alpha, Some(offset))
        }
        Grid::BinaryCoding { alpha, .. } => (AdapterPart::Alphas, alpha, None),
        Grid::Codebook { scale, books, .. } if learned.offsets => {
            (AdapterPart::Codebooks, scale, Some(books))
        }
        Grid::Codebook { scale, .. } => (AdapterPart::CodebookScales, scale, None),
    };
    let mut planes = None;
    let mut scales = scales.clone();
    if part == AdapterPart::Alpha1 {
        let bits = usize::from(base.bits.get());
        let largest = base.grid.largest_planes(bits);
        scales = scales.chunks_exact(bits).zip(&largest).map(|(a, p)| a[usize::from(*p)]).collect();
        planes = largest.iter().any(|plane| *plane != 0).then_some(largest);
    }
    let layout = weight.layout;
    let record = AdapterRecord {
        bits: weight.bits,
        shape: [layout.out, layout.inputs],
        group_len: layout.group_len,
        axis: layout.axis,
        part,
        base_sha256: frozen_sha256(base, part, planes.as_deref()),
    };
    let offsets = offsets.cloned().map(|offsets| dtype.rounded(offsets)).transpose()?;
    Ok((record, Values { scales: dtype.rounded(scales)?, offsets, planes }))
}

impl AdapterPart {
    fn tensor(self) -> &'static str {
        match self {
            Self::Scales | Self::CodebookScales | Self::Codebooks => "scales",
            Self::Alphas | Self::AlphasAndOffsets => "alphas",
            Self::Alpha1 => "alpha_1",
        }
    }

    /// The tensor of what learns beside scales.
    fn offsets(self) -> &'static str {
        if self == Self::Codebooks { "codebooks" } else { "offsets" }
    }

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scales => "scales",
            Self::Alphas => "alphas",
            Self::AlphasAndOffsets => "alphas and offsets",
            Self::Alpha1 => "alpha_1",
            Self::CodebookScales => "scales of codebooks",
            Self::Codebooks => "codebooks and scales",
        }
    }
}

impl AdapterRecord {
    /// `[rows, groups of a row]` of the stored scales.
    fn scale_shape(&self) -> [usize; 2] {
        self.layout().scale_shape()
    }

    /// How the linear's weights fall into groups.
    pub fn layout(&self) -> GroupLayout {
        let [out, inputs] = self.shape;
        let (group_len, axis) = (self.group_len, self.axis);
        GroupLayout {
            out,
            inputs,
            groups: out.saturating_mul(inputs) / group_len.max(1),
            group_len,
            axis,
        }
    }

    fn fits(&self, base: &QuantizedWeight) -> bool {
        let repr = match self.part {
            AdapterPart::Scales => Repr::Uniform,
            AdapterPart::CodebookScales | AdapterPart::Codebooks => Repr::Codebook,
            AdapterPart::Alphas | AdapterPart::AlphasAndOffsets | AdapterPart::Alpha1 => {
                Repr::BinaryCoding
            }
        };
        self.bits == base.bits && self.layout() == base.layout && base.grid.repr() == repr
    }

    /// This record's values, taken out of `tensors`.
    fn values(&self, name: &str, tensors: &mut BTreeMap<String, HostTensor>) -> Result<Values> {
        let mut take = |part: &str, len: usize, needed: bool| -> Result<Option<HostTensor>> {
            let name = format!("{name}.{part}");
            match tensors.remove(&name) {
                Some(tensor) if tensor.shape.iter().product::<usize>() == len => Ok(Some(tensor)),
                Some(tensor) => {
                    Err(Error::failed(format!("{name} has the shape {:?}", tensor.shape)))
                }
                None if needed => Err(Error::failed(format!("{name} is missing"))),
                None => Ok(None),
            }
        };
        if !self.layout().is_sound() {
            let [out, inputs] = self.shape;
            let what = format!("{name} has groups of {} in {out} x {inputs}", self.group_len);
            return Err(Error::failed(what));
        }
        let groups = self.layout().groups;
        let per_group = match self.part {
            AdapterPart::Scales
            | AdapterPart::Alpha1
            | AdapterPart::CodebookScales
            | AdapterPart::Codebooks => 1,
            AdapterPart::Alphas | AdapterPart::AlphasAndOffsets => usize::from(self.bits.get()),
        };
        let scales = take(self.part.tensor(), groups * per_group, true)?;
        let with_offsets = self.part == AdapterPart::AlphasAndOffsets;
        let offsets = take("offsets", groups, with_offsets)?;
        let planes = take("planes", groups, false)?.map(|t| t.to_u8()).transpose()?;
        let offsets = if self.part == AdapterPart::Codebooks {
            // The number of centroids is the base's, and compared when they are put there.
            let books = format!("{name}.codebooks");
            let missing = || Error::failed(format!("{books} is missing"));
            Some(tensors.remove(&books).ok_or_else(missing)?)
        } else {
            offsets
        };
        if planes.iter().flatten().any(|plane| *plane >= self.bits.get()) {
            return Err(Error::failed(format!("{name}.planes names a plane that is not there")));
        }
        let floats = |tensor: HostTensor| -> Result<Vec<f32>> {
            let values = tensor.to_f32()?;
            match values.iter().find(|value| !value.is_finite()) {
                Some(value) => Err(Error::failed(format!("{name} holds {value}"))),
                None => Ok(values),
            }
        };
        Ok(Values {
            scales: scales.map(floats).transpose()?.unwrap_or_default(),
            offsets: offsets.map(floats).transpose()?,
            planes,
        })
    }
}

/// SHA-256 of what an adapter leaves of its base: packed codes, and zero points, offsets and scales
/// that it does not hold.
fn frozen_sha256(base: &QuantizedWeight, part: AdapterPart, planes: Option<&[u8]>) -> String {
    let mut hash = Sha256::new();
    for words in base.codes.words().chunks(4096) {
        hash.update(words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>());
    }
    let mut floats = |values: &mut dyn Iterator<Item = f32>| {
        hash.update(values.flat_map(f32::to_le_bytes).collect::<Vec<u8>>());
    };
    match &base.grid {
        Grid::Uniform { zero_point, .. } => floats(&mut zero_point.iter().copied()),
        Grid::BinaryCoding { alpha, offset } => {
            if part == AdapterPart::Alpha1 {
                let bits = usize::from(base.bits.get());
                let plane = |group: usize| planes.map_or(0, |planes| usize::from(planes[group]));
                let mut rest = alpha.iter().enumerate();
                let mut rest = rest.by_ref().filter(|(i, _)| i % bits != plane(i / bits));
                floats(&mut rest.by_ref().map(|(_, alpha)| *alpha));
            }
            if part != AdapterPart::AlphasAndOffsets {
                floats(&mut offset.iter().copied());
            }
        }
        Grid::Codebook { books, .. } => {
            if part != AdapterPart::Codebooks {
                floats(&mut books.iter().copied());
            }
        }
    }
    hex(&hash.finalize())
}

/// SHA-256 over names and contents.
fn contents_sha256(tensors: &[(String, HostTensor)]) -> String {
    let sorted: BTreeMap<&str, &HostTensor> =
        tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut hash = Sha256::new();
    for (name, tensor) in sorted {
        hash.update(name.as_bytes());
        hash.update(&tensor.bytes);
    }
    hex(&hash.finalize())
}
