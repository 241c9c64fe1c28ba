//! Formats of other runtimes that lie in safetensors: from a quantized weight to their packers, and
//! from their files to weights.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::container::{self, UniformPlanes};
use super::gptq::{GptqOptions, Version};
use super::matrix::{Affine, Layer, Planes, Tensors, most_common, stored_group};
use super::mlx::MlxOptions;
use super::parts::Writing;
use super::plan::{self, Target, Traits};
use super::{Format, FormatsConfig, awq, bcq, compressed_tensors, gptq, mlx, nested, read};
use crate::error::{Error, Result};
use crate::quant::{Bits, Grid, GroupAxis, QuantizedWeight, Repr, ScaleDType};
use crate::store::safetensors::Checkpoint;
use crate::store::{DType, TensorSource};

fn dtype(scales: ScaleDType) -> DType {
    match scales {
        ScaleDType::F32 => DType::F32,
        ScaleDType::F16 => DType::F16,
    }
}

/// Keys of `format.mlx`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MlxConfig {
    /// Type of scales and biases.
    pub scales: ScaleDType,
    /// Rounds embedding and head to this many bits too, as mistral.rs wants them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<Bits>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Keys of `format.gptq` and `format.autoround`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqFormatConfig {
    /// 1 or 2; what the grids suit unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u8>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Keys of `format.compressed_tensors`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressedTensorsConfig {
    /// Type of scales.
    pub scales: ScaleDType,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Keys of `format.bcq`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct BcqFormatConfig {
    /// Numbers of planes, fewer than were trained, that can be read out of the same file too.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub precisions: Vec<u8>,
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Keys of `format.awq` and `format.gguf`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct PlainConfig {
    /// Whether weights may change; by how much is reported.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// A quantized weight as slices, groups within rows.
pub(super) struct Unpacked {
    codes: Vec<u8>,
    group_len: usize,
    scale: Vec<f32>,
    shift: Vec<f32>,
}

impl Unpacked {
    pub(super) fn new(name: &str, weight: &QuantizedWeight) -> Result<Self> {
        if weight.layout.axis == GroupAxis::Out {
            return Err(Error::preflight(
                "its groups run along the outputs, which no other format holds",
            )
            .at(name)
            .fix("format.fewbit or format.dequantized, or a method that groups along the inputs"));
        }
        let (scale, shift) = match &weight.grid {
            Grid::Uniform { scale, zero_point, .. } => (scale, zero_point),
            Grid::BinaryCoding { alpha, offset } => (alpha, offset),
        };
        let (inputs, group_len) = (weight.layout.inputs, weight.layout.group_len);
        // A scale for several rows becomes one for each.
        let copies = group_len.div_ceil(inputs);
        let spread = |values: &[f32], each: usize| -> Vec<f32> {
            values.chunks(each.max(1)).flat_map(|group| group.repeat(copies)).collect()
        };
        let planes = scale.len() / shift.len().max(1);
        Ok(Self {
            codes: weight.codes.to_vec(),
            group_len: group_len.min(inputs),
            scale: spread(scale, planes),
            shift: spread(shift, 1),
        })
    }

    pub(super) fn affine(&self, name: &str, weight: &QuantizedWeight) -> Result<Affine<'_>> {
        let Grid::Uniform { zero_kind, .. } = weight.grid else {
            return Err(Error::preflight(
                "the weight is binary-coded, and this format holds evenly spaced levels",
            )
            .at(name)
            .fix("format.bcq, format.fewbit or format.dequantized"));
        };
        Ok(Affine {
            out: weight.layout.out,
            inputs: weight.layout.inputs,
            group_len: self.group_len,
            bits: weight.bits.get(),
            codes: &self.codes,
            scale: &self.scale,
            zero: &self.shift,
            zero_kind,
        })
    }

    fn planes(&self, weight: &QuantizedWeight) -> Planes<'_> {
        Planes {
            out: weight.layout.out,
            inputs: weight.layout.inputs,
            group_len: self.group_len,
            bits: weight.bits.get(),
            codes: &self.codes,
            alpha: &self.scale,
            offset: &self.shift,
        }
    }
}

/// One export in one of these formats.
pub(super) struct Packer {
    format: Format,
    options: FormatsConfig,
    layers: Vec<Layer>,
    group: Option<usize>,
    dense: Vec<String>,
    gptq: GptqOptions,
    awq_group: Option<usize>,
}

impl Packer {
    /// Looks at every linear once, before anything is written.
    ///
    /// # Errors
    /// When the format cannot state what they are.
    pub(super) fn new(writing: &Writing<'_>) -> Result<Self> {
        let format = writing.format;
        let target = match format {
            Format::Mlx => Target::Mlx,
            Format::Awq => Target::Awq,
            Format::CompressedTensors => Target::CompressedTensors,
            Format::Bcq => Target::Bcq,
            Format::Autoround => Target::AutoRound,
            _ => Target::Gptq,
        };
        let mut packer = Self {
            format,
            options: writing.parts.options.clone(),
            layers: Vec::new(),
            group: None,
            dense: writing.unquantized(),
            gptq: GptqOptions::suited(target, &[]),
            awq_group: None,
        };
        // What is stored of a linear that may change, or of an embedding, depends on what suits
        // all, and that on what is stored: the linears as trained decide first.
        let trained = writing.linears().filter(|name| !writing.is_embedding(name));
        let layers = trained.map(|name| Ok(layer(target, name, &writing.trained(name)?.0)));
        packer.suit(layers.collect::<Result<_>>()?)?;
        let groups = packer.layers.iter().map(|l| stored_group(l.group_len, &mlx::GROUPS));
        packer.group = most_common(&groups.flatten().collect::<Vec<_>>());
        if packer.options.lossy(format) || packer.options.embeddings(format).is_some() {
            let stored = |name| Ok(layer(target, name, &writing.stored_by(&packer, name)?.weight));
            let layers = writing.linears().map(stored).collect::<Result<_>>()?;
            packer.suit(layers)?;
        }
        Ok(packer)
    }

    /// Settings for a whole model of these linears.
    fn suit(&mut self, layers: Vec<Layer>) -> Result<()> {
        self.gptq = GptqOptions::suited(self.gptq.target, &layers);
        let asked = match self.format {
            Format::Autoround => self.options.autoround.as_ref(),
            _ => self.options.gptq.as_ref(),
        };
        match asked.and_then(|asked| asked.version) {
            None => {}
            Some(1) => self.gptq.version = Version::V1,
            Some(2) => self.gptq.version = Version::V2,
            Some(other) => {
                return Err(Error::usage(format!("version = {other} of GPTQ's layout"))
                    .at(format!("format.{}", self.format.name()))
                    .fix("1 or 2"));
            }
        }
        self.awq_group = match self.format {
            // Groups that do not fit will be made to.
            Format::Awq if self.options.lossy(Format::Awq) => {
                awq::group_size(&layers).unwrap_or(Some(32))
            }
            Format::Awq => awq::group_size(&layers)?,
            _ => None,
        };
        self.layers = layers;
        Ok(())
    }

    /// The tensors of one linear.
    ///
    /// # Errors
    /// When the format cannot hold it exactly; says what would be lost and what to take instead.
    pub(super) fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        let unpacked = Unpacked::new(name, weight)?;
        if self.format == Format::Bcq {
            if weight.grid.repr() == Repr::BinaryCoding {
                return self.encode_planes(name, &unpacked.planes(weight));
            }
            let affine = unpacked.affine(name, weight)?;
            plan::check(Target::Bcq, &Traits::of(&affine), name)?;
            return self.encode_planes(name, &UniformPlanes::new(&affine).0.planes(&affine));
        }
        let affine = unpacked.affine(name, weight)?;
        match self.format {
            Format::Mlx => mlx::encode(name, &affine, self.mlx()),
            Format::Awq => awq::encode(name, &affine, self.awq_group),
            Format::CompressedTensors => {
                let options = self.options.compressed_tensors.as_ref();
                let scales = options.map_or(ScaleDType::F32, |options| options.scales);
                compressed_tensors::encode(name, &affine, dtype(scales))
            }
            _ => gptq::encode(name, &affine, self.gptq),
        }
    }

    fn encode_planes(&self, name: &str, planes: &Planes<'_>) -> Result<Tensors> {
        let lower = self.lower_precisions();
        if lower.is_empty() {
            return bcq::encode(name, planes);
        }
        let all = nested::precisions(name, planes, lower)?;
        let all: Vec<Planes<'_>> = all.iter().map(|precision| precision.planes(planes)).collect();
        bcq::encode_nested(name, &all)
    }

    fn lower_precisions(&self) -> &[u8] {
        self.options.bcq.as_ref().map_or(&[], |bcq| &bcq.precisions)
    }

    fn mlx(&self) -> MlxOptions {
        let MlxConfig { scales, lossy, .. } = self.options.mlx.clone().unwrap_or_default();
        MlxOptions { scales: dtype(scales), lossy }
    }

    /// The weights that a reader computes from the tensors of [`Packer::encode`].
    ///
    /// # Errors
    /// When the weight is none that the format can hold.
    pub(super) fn decoded(&self, name: &str, weight: &QuantizedWeight) -> Result<Vec<f32>> {
        if self.format != Format::Mlx || !self.options.lossy(Format::Mlx) {
            return Ok(weight.dequantize());
        }
        let unpacked = Unpacked::new(name, weight)?;
        Ok(mlx::arithmetic(&unpacked.affine(name, weight)?, self.mlx().scales))
    }

    /// The group length of most linears as trained, among those that MLX has.
    pub(super) fn common_group(&self) -> Option<usize> {
        self.group
    }

    /// Puts the format's section into `config.json`.
    ///
    /// # Errors
    /// When the format cannot state what the linears are.
    pub(super) fn configure(&self, config: &mut Value) -> Result<()> {
        let (layers, dense) = (&self.layers, &self.dense);
        let section = match self.format {
            Format::Mlx => {
                let section = mlx::config(layers, dense);
                config["quantization"] = section.clone();
                section
            }
            Format::Autoround => gptq::autoround_config(layers, dense, self.gptq),
            Format::Awq => awq::config(layers, dense)?,
            Format::CompressedTensors => compressed_tensors::config(layers, dense),
            Format::Bcq => bcq::config(layers, self.lower_precisions()),
            _ => gptq::config(layers, dense, self.gptq),
        };
        config["quantization_config"] = section;
        Ok(())
    }
}

/// What a config has to say about a linear as `target` stores it.
fn layer(target: Target, name: &str, weight: &QuantizedWeight) -> Layer {
    let (layout, bits) = (weight.layout, weight.bits.get());
    let (stored, centred) = match &weight.grid {
        Grid::Uniform { zero_point, zero_kind, .. } => {
            let zeros = container::bounds(zero_point);
            let stored = plan::stored_bits(target, *zero_kind, bits, zeros).unwrap_or(bits);
            (stored, container::is_centred(target, *zero_kind, bits, zeros))
        }
        Grid::BinaryCoding { .. } => (bits, false),
    };
    let group_len = layout.group_len.min(layout.inputs);
    let shape = [layout.out, layout.inputs];
    Layer { name: name.to_owned(), shape, bits: stored, group_len, centred }
}

/// A folder in one of these formats, whoever wrote it.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    kind: Kind,
    section: Value,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    Mlx,
    Gptq,
    Awq,
    CompressedTensors,
    Bcq,
}

impl Packed {
    /// What the `config.json` says; `None` for a dense folder, or one of fewbit's own.
    ///
    /// # Errors
    /// For a quantization that is not read.
    pub(super) fn of(config: &Value) -> Result<Option<Self>> {
        let section = |key: &str| config.get(key).filter(|section| section.is_object());
        let named = section("quantization_config");
        let method = named.and_then(|s| s.get("quant_method")).and_then(Value::as_str);
        let kind = match (method, section("quantization").or(named)) {
            (Some("fewbit"), _) | (None, None) => return Ok(None),
            (Some("gptq" | "auto-round"), _) => Kind::Gptq,
            (Some("awq"), _) => Kind::Awq,
            (Some("compressed-tensors"), _) => Kind::CompressedTensors,
            (Some("bcq"), _) => Kind::Bcq,
            (None | Some("afq"), Some(section)) if section.get("bits").is_some() => Kind::Mlx,
            (method, _) => {
                let method = method.unwrap_or("without a name");
                return Err(Error::preflight(format!("quantization `{method}` is not read"))
                    .at("config.json")
                    .fix("gptq, awq, auto-round, compressed-tensors, mlx, bcq or fewbit"));
            }
        };
        let section = match kind {
            Kind::Mlx => section("quantization").or(named),
            _ => named,
        };
        Ok(Some(Self { kind, section: section.cloned().unwrap_or_else(|| json!({})) }))
    }

    /// Whether a linear is stored packed.
    pub(super) fn holds(&self, linear: &str, checkpoint: &Checkpoint) -> bool {
        let part = match self.kind {
            Kind::Mlx => "scales",
            Kind::CompressedTensors => "weight_packed",
            Kind::Gptq | Kind::Awq | Kind::Bcq => "qweight",
        };
        checkpoint.info(&format!("{linear}.{part}")).is_some()
    }

    /// A linear's weights as the runtime computes them, with their shape, `[out, in]`.
    ///
    /// # Errors
    /// When the files are damaged.
    pub(super) fn weights(
        &self,
        linear: &str,
        checkpoint: &Checkpoint,
    ) -> Result<(Vec<f32>, [usize; 2])> {
        let section = &self.section;
        let decoded = match self.kind {
            Kind::Bcq => {
                let bits = section["linears"][linear]["bits"].as_u64().unwrap_or(0) as u8;
                let found = read::bcq::decode(section, linear, bits, checkpoint)?;
                return Ok((found.weights, [found.out, found.inputs]));
            }
            Kind::Mlx => read::mlx::decode(section, linear, checkpoint)?,
            Kind::Gptq => read::gptq::decode(section, linear, checkpoint)?,
            Kind::Awq => read::awq::decode(section, linear, checkpoint)?,
            Kind::CompressedTensors => {
                read::compressed_tensors::decode(section, linear, checkpoint)?
            }
        };
        Ok((decoded.weights, [decoded.out, decoded.inputs]))
    }
}
