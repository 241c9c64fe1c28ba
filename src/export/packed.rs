//! Formats of other runtimes that lie in safetensors: from a quantized weight to their packers, and
//! from their files to weights.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::folder::ModelParts;
use super::gptq::{GptqOptions, Version};
use super::matrix::{Affine, Layer, Planes, Tensors};
use super::mlx::MlxOptions;
use super::{Format, FormatsConfig, awq, bcq, compressed_tensors, gptq, mlx, read};
use crate::error::{Error, Result};
use crate::model::{EMBEDDING, HEAD, ModelConfig, linear_shapes};
use crate::quant::{Grid, GroupAxis, QuantizedWeight, ScaleDType, ZeroKind};
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
}

/// Keys of `format.gptq` and `format.autoround`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct GptqFormatConfig {
    /// 1 or 2; what the grids suit unless said otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<u8>,
}

/// Keys of `format.compressed_tensors`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CompressedTensorsConfig {
    /// Type of scales.
    pub scales: ScaleDType,
}

/// `format.awq`, `format.bcq` and `format.gguf`: no keys.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PlainConfig {}

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

    fn planes(&self, name: &str, weight: &QuantizedWeight) -> Result<Planes<'_>> {
        if !matches!(weight.grid, Grid::BinaryCoding { .. }) {
            return Err(Error::preflight(
                "the weight lies on a uniform grid, and this format holds sign planes",
            )
            .at(name)
            .fix(
                "format.mlx, format.gptq or format.compressed_tensors, or a binary-coding method",
            ));
        }
        Ok(Planes {
            out: weight.layout.out,
            inputs: weight.layout.inputs,
            group_len: self.group_len,
            bits: weight.bits.get(),
            codes: &self.codes,
            alpha: &self.scale,
            offset: &self.shift,
        })
    }
}

/// One export in one of these formats.
pub(super) struct Packer {
    format: Format,
    options: FormatsConfig,
    layers: Vec<Layer>,
    dense: Vec<String>,
    gptq: GptqOptions,
    awq_group: Option<usize>,
}

impl Packer {
    /// Looks at every linear once, before anything is written.
    ///
    /// # Errors
    /// When the format cannot state what they are.
    pub(super) fn new(parts: &ModelParts<'_>, format: Format) -> Result<Self> {
        if parts.activations.is_some() {
            return Err(Error::preflight(format!(
                "format.{} holds weights alone, and this model quantizes activations too",
                format.name()
            ))
            .fix("format.fewbit, which records them"));
        }
        let layers: Vec<Layer> =
            parts.quantized.iter().map(|(name, (weight, _))| layer(name, weight)).collect();
        let mut gptq = GptqOptions::suited(&layers);
        let options = parts.options.clone();
        let asked = match format {
            Format::Autoround => options.autoround.as_ref(),
            _ => options.gptq.as_ref(),
        };
        match asked.and_then(|asked| asked.version) {
            None => {}
            Some(1) => gptq.version = Version::V1,
            Some(2) => gptq.version = Version::V2,
            Some(other) => {
                return Err(Error::usage(format!("version = {other} of GPTQ's layout"))
                    .at(format!("format.{}", format.name()))
                    .fix("1 or 2"));
            }
        }
        gptq.group_index = format == Format::Gptq;
        let awq_group = if format == Format::Awq { awq::group_size(&layers)? } else { None };
        Ok(Self { format, options, dense: unquantized(parts)?, layers, gptq, awq_group })
    }

    /// The tensors of one linear.
    ///
    /// # Errors
    /// When the format cannot hold it exactly; says what would be lost and what to take instead.
    pub(super) fn encode(&self, name: &str, weight: &QuantizedWeight) -> Result<Tensors> {
        let unpacked = Unpacked::new(name, weight)?;
        if self.format == Format::Bcq {
            return bcq::encode(name, &unpacked.planes(name, weight)?);
        }
        let affine = unpacked.affine(name, weight)?;
        match self.format {
            Format::Mlx => {
                let scales = self.options.mlx.as_ref().map_or(ScaleDType::F32, |mlx| mlx.scales);
                let options = MlxOptions { scales: dtype(scales), allow_rounding: false };
                mlx::encode(name, &affine, options).map(|(tensors, _)| tensors)
            }
            Format::Awq => awq::encode(name, &affine, self.awq_group),
            Format::CompressedTensors => {
                let options = self.options.compressed_tensors.as_ref();
                let scales = options.map_or(ScaleDType::F32, |options| options.scales);
                compressed_tensors::encode(name, &affine, dtype(scales))
            }
            _ => gptq::encode(name, &affine, self.gptq),
        }
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
            Format::Bcq => {
                let planes = layers.iter().map(|layer| layer.bits).max();
                bcq::config(layers, &planes.into_iter().collect::<Vec<u8>>())
            }
            _ => gptq::config(layers, dense, self.gptq),
        };
        config["quantization_config"] = section;
        Ok(())
    }
}

fn layer(name: &str, weight: &QuantizedWeight) -> Layer {
    let middle = f32::from(1u8 << (weight.bits.get() - 1));
    let centred = match &weight.grid {
        Grid::Uniform { zero_point, zero_kind, .. } => {
            *zero_kind == ZeroKind::Integer
                && zero_point.iter().all(|zero| zero.to_bits() == middle.to_bits())
        }
        Grid::BinaryCoding { .. } => false,
    };
    let (layout, bits) = (weight.layout, weight.bits.get());
    let group_len = layout.group_len.min(layout.inputs);
    Layer { name: name.to_owned(), shape: [layout.out, layout.inputs], bits, group_len, centred }
}

/// Linears and embeddings that stay as they are.
fn unquantized(parts: &ModelParts<'_>) -> Result<Vec<String>> {
    let config = ModelConfig::read(parts.dir)?;
    let embedding = EMBEDDING.trim_end_matches(".weight").to_owned();
    let linears = linear_shapes(&config).into_iter().map(|(name, _)| name);
    let all = linears.chain([HEAD.to_owned(), embedding]);
    Ok(all.filter(|name| !parts.quantized.contains_key(name)).collect())
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
