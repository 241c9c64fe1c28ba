//! Loading: tensor names, shapes, and the one place that builds modules from host weights.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::CausalLm;
use super::arch::{ModelConfig, NormKind, Place, Places, weight_name};
use super::block::{Block, Norm, Norms};
use super::random::{self, RandomWeights};
use super::tap::ModelTap;
use crate::error::{Error, Result};
use crate::ops::NarrowCopy;
use crate::quant::{CodedWeight, Learned, QuantizedWeight};
use crate::store::TensorSource;
use crate::store::folder::entries;
use crate::store::safetensors::Checkpoint;

/// Where weights come from: f32 on the host, by checkpoint name.
pub trait WeightSource {
    /// The tensor `name`, row-major, checked to have `shape` and finite values.
    ///
    /// # Errors
    /// When the tensor is missing, has another shape, or holds a NaN or an infinity.
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>>;

    /// Whether there is such a tensor.
    fn contains(&self, name: &str) -> bool;

    /// Linear `name` as codes, to be held in memory as they are; `None` where it is, or is to be
    /// held, dense.
    ///
    /// # Errors
    /// When the codes are damaged.
    fn coded(&self, _name: &str) -> Result<Option<QuantizedWeight>> {
        Ok(None)
    }

    /// Whether this source holds linear `name` in another form than the checkpoint does.
    fn overrides(&self, _name: &str) -> bool {
        false
    }
}

impl WeightSource for Checkpoint {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        if self.info(name).is_none() {
            return Err(Error::preflight(
                "the checkpoint lacks a tensor that config.json asks for",
            )
            .at(name)
            .fix("check that config.json belongs to these weights"));
        }
        self.read_f32(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.info(name).is_some()
    }
}

/// Opens a folder's config and weights, by the names that its checkpoint has; matrices of Conv1D are
/// given as those of linears. A folder that names a seed instead of weights gives
/// [`RandomWeights`].
///
/// # Errors
/// As [`ModelConfig::read`] and [`Checkpoint::open`].
pub fn open_folder(dir: &Path) -> Result<(ModelConfig, Checkpoint)> {
    let config = ModelConfig::read(dir)?;
    if let Some(seed) = random::seed_in(dir)? {
        let checkpoint = RandomWeights::new(&config, seed).into_checkpoint(dir);
        return Ok((config, checkpoint));
    }
    let checkpoint = Checkpoint::open(dir)?;
    let config = config.with_names_of(|name| checkpoint.info(name).is_some());
    let columns: Vec<String> = config.stored_by_columns().collect();
    let checkpoint = checkpoint.with_transposed(columns.into_iter());
    check_tensors(&config, &checkpoint)?;
    check_places(&config, &checkpoint).map_err(|e| e.at(dir.display()))?;
    Ok((config, checkpoint))
}

/// Every tensor of the model is there with the shape that `config.json` gives it, or in a packed form.
fn check_tensors(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<()> {
    let names = checkpoint.names();
    for (name, shape) in config.tensors() {
        let alone = name == config.embedding() && config.tied;
        let held = match checkpoint.info(&name) {
            None if alone => checkpoint.info(&weight_name(config.head())),
            held => held,
        };
        // Names are sorted: a linear's other parts stand beside its own name.
        let start = format!("{}.", name.strip_suffix(".weight").unwrap_or(&name));
        let first = names.partition_point(|other| **other < *start);
        let parts = names[first..].iter().take_while(|other| other.starts_with(&start));
        let bias = format!("{start}bias");
        let packed = parts.filter(|other| **other != name && **other != bias).count() > 0;
        if let Some(info) = held {
            if !packed && !info.dtype.is_read() {
                return Err(Error::preflight(format!("fewbit cannot read dtype {}", info.dtype))
                    .at(format!("{name}, {}", info.file.display()))
                    .fix("use a version of the model in F32, F16 or BF16"));
            }
            // A packed weight has a shape of its own: its reader compares.
            if !packed && info.shape != shape {
                return Err(Error::preflight(format!(
                    "the tensor has shape {:?}, config.json asks for {shape:?}",
                    info.shape
                ))
                .at(name)
                .fix("check that config.json belongs to these weights"));
            }
        } else if !packed {
            let stacked = |at: &&&str| {
                at.contains(".experts.")
                    && checkpoint.info(at).is_some_and(|info| info.shape.len() == 3)
            };
            if name.contains(".experts.")
                && let Some(at) = names.iter().find(stacked)
            {
                return Err(Error::preflight(
                    "the experts of a block are one tensor here, and fewbit reads one for each",
                )
                .at(at)
                .fix("a checkpoint with mlp.experts.0.gate_proj.weight and so on"));
            }
            return Err(Error::preflight(
                "the checkpoint lacks a tensor that config.json asks for",
            )
            .at(name)
            .fix("a Hugging Face model folder, float or packed by fewbit"));
        }
    }
    Ok(())
}

/// Refuses tensors that would change what the model computes, were they used.
fn check_places(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<()> {
    let places = Places::new(config);
    for name in checkpoint.names() {
        if places.of(name) != Place::Unknown || is_zero_bias(checkpoint, name)? {
            continue;
        }
        let (what, fix) = match config.inner(name) {
            Some((block, _)) if block >= config.n_blocks => (
                format!("the file has a block {block}, and config.json says {}", config.n_blocks),
                "a config.json with the file's num_hidden_layers",
            ),
            _ if is_bias(name) => (
                "the file has a bias here, and config.json announces none".to_owned(),
                "the config.json that belongs to these weights; for Llama attention_bias or mlp_bias",
            ),
            _ if name.contains("lora_") => (
                "the file holds factors of an adapter".to_owned(),
                "the base model, or one that the adapter has been merged into",
            ),
            _ => (
                format!("a {} has no such tensor, and it would be left out", config.model_type),
                "the config.json that belongs to these weights",
            ),
        };
        return Err(Error::preflight(what).at(name).fix(fix));
    }
    Ok(())
}

fn is_bias(name: &str) -> bool {
    name.rsplit('.').next() == Some("bias")
}

/// Some packers give every linear a bias of zeros.
fn is_zero_bias(checkpoint: &Checkpoint, name: &str) -> Result<bool> {
    let small = checkpoint.info(name).is_some_and(|info| info.shape.len() == 1);
    if !small || !is_bias(name) {
        return Ok(false);
    }
    let values = checkpoint.read(name)?.to_f32()?;
    Ok(values.iter().all(|value| *value == 0.0))
}

/// The name under which a source holds the head's weight: its own, or in a tied model the
/// embedding's.
pub fn head_name(config: &ModelConfig, source: &dyn WeightSource) -> String {
    let own = weight_name(config.head());
    if !config.tied || !source.contains(&config.embedding()) && source.contains(&own) {
        own
    } else {
        config.embedding()
    }
}

/// Builds modules from a source, on one device, in one type.
pub struct Loader<'a> {
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// Where weights come from.
    pub source: &'a dyn WeightSource,
    /// Where tensors go.
    pub device: &'a Device,
    /// The type tensors are kept in.
    pub dtype: DType,
}

impl Loader<'_> {
    /// The whole model.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn model(&self) -> Result<CausalLm> {
        let blocks = (0..self.config.n_blocks).map(|index| self.block(index));
        Ok(CausalLm { blocks: blocks.collect::<Result<_>>()?, ..self.ends()? })
    }

    /// Embeddings, final norm and head, without blocks.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn ends(&self) -> Result<CausalLm> {
        let d = self.config.d_model;
        let names = &self.config.arch.names;
        let norm = names.norm.map(|norm| self.norm(&format!("{}{norm}", names.root), d));
        let project_out = self.projection(1, [self.config.head_shape()[1], d])?;
        Ok(CausalLm {
            norm: norm.transpose()?,
            project_out,
            head: self.head()?,
            ..self.entrance()?
        })
    }

    /// What embeds tokens, alone.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn entrance(&self) -> Result<CausalLm> {
        let config = self.config;
        let positions = match &config.arch.positions {
            None => None,
            Some(table) => {
                let name = config.outside(table.name, "weight");
                Some(frozen(self.tensor(&name, [table.rows, config.d_model])?))
            }
        };
        Ok(CausalLm {
            embed: self.embed()?,
            positions,
            project_in: self.projection(0, [config.d_model, config.head_shape()[1]])?,
            project_out: None,
            blocks: Vec::new(),
            norm: None,
            head: None,
            config: Arc::new(config.clone()),
            tap: ModelTap::default(),
            kv: None,
            narrow_head: NarrowCopy::default(),
        })
    }

    fn projection(&self, place: usize, shape: [usize; 2]) -> Result<Option<Linear>> {
        let names = &self.config.arch.names;
        let full = names.projections.map(|pair| format!("{}{}", names.root, pair[place]));
        full.map(|name| self.linear(&name, shape, false)).transpose()
    }

    /// The token embedding, `[vocab, width]`. A tied checkpoint may hold it under the head's name.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn embed(&self) -> Result<Param<Tensor<2>>> {
        let embedding = self.config.embedding();
        let under_head = self.config.tied && !self.source.contains(&embedding);
        let name = if under_head { weight_name(self.config.head()) } else { embedding };
        Ok(frozen(self.tensor(&name, self.config.head_shape())?))
    }

    /// Decoder block `index`.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn block(&self, index: usize) -> Result<Block> {
        let (config, arch) = (self.config, &self.config.arch);
        let prefix = config.block_prefix(index);
        let linears = config
            .specs(index)
            .iter()
            .map(|spec| self.linear(&format!("{prefix}.{}", spec.name), spec.shape, spec.bias));
        let widths: BTreeMap<&str, usize> = config.block_norms().collect();
        let norm = |name: Option<&'static str>| {
            name.map(|name| self.norm(&format!("{prefix}.{name}"), widths[name])).transpose()
        };
        let names = arch.norms;
        let router = config.experts(index).map(|experts| {
            let name = weight_name(&format!("{prefix}.{}", experts.router));
            self.tensor(&name, [experts.count, config.d_model]).map(frozen)
        });
        Ok(Block {
            linears: linears.collect::<Result<_>>()?,
            router: router.transpose()?,
            norms: Norms {
                attention_input: norm(names.attention_input)?,
                attention_output: norm(names.attention_output)?,
                mlp_input: norm(names.mlp_input)?,
                mlp_output: norm(names.mlp_output)?,
                query: norm(names.query)?,
                key: norm(names.key)?,
            },
            index,
            config: Arc::new(config.clone()),
        })
    }

    /// A tied model has a head of its own only when one was quantized apart from the embedding.
    fn head(&self) -> Result<Option<Linear>> {
        let name = self.config.head();
        if self.config.tied && !self.source.overrides(name) {
            return Ok(None);
        }
        self.linear(name, self.config.head_shape(), self.config.arch.names.head_bias).map(Some)
    }

    /// The checkpoint holds `[out, in]`; burn's linear wants `[in, out]`. The transposed view
    /// keeps the rows contiguous for the quantizer, and the matmul reads it without a copy.
    fn linear(&self, name: &str, shape: [usize; 2], bias: bool) -> Result<Linear> {
        let weight = match self.source.coded(name)? {
            Some(weight) => self.coded(name, &weight, shape)?,
            None => frozen(self.tensor::<2>(&weight_name(name), shape)?.transpose()),
        };
        let bias = if bias {
            Some(frozen(self.tensor(&format!("{name}.bias"), [shape[0]])?))
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn coded(
        &self,
        name: &str,
        weight: &QuantizedWeight,
        shape: [usize; 2],
    ) -> Result<Param<Tensor<2>>> {
        let found = [weight.layout.out, weight.layout.inputs];
        if found != shape {
            return Err(Error::preflight(format!(
                "the packed weight is {found:?}, config.json asks for {shape:?}"
            ))
            .at(name));
        }
        let coded = CodedWeight::new(weight, Learned::default(), self.dtype, self.device);
        Ok(coded.into_parameter(ParamId::new()))
    }

    fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let kind = self.config.arch.norm;
        let vector = |part: &str| self.tensor::<1>(&format!("{name}.{part}"), [width]).map(frozen);
        Ok(Norm {
            weight: match kind {
                NormKind::LayerPlain => {
                    frozen(Tensor::<1>::ones([width], self.device).cast(self.dtype))
                }
                _ => vector("weight")?,
            },
            bias: (kind == NormKind::Layer).then(|| vector("bias")).transpose()?,
            kind,
            eps: self.config.arch.norm_eps,
        })
    }

    fn tensor<const D: usize>(&self, name: &str, shape: [usize; D]) -> Result<Tensor<D>> {
        let values = self.source.weight(name, &shape)?;
        let tensor = Tensor::from_data(TensorData::new(values, shape), self.device);
        Ok(if self.dtype == DType::F32 { tensor } else { tensor.cast(self.dtype) })
    }
}

/// A parameter that no optimizer touches.
fn frozen<const D: usize>(tensor: Tensor<D>) -> Param<Tensor<D>> {
    Param::initialized(ParamId::new(), tensor).set_require_grad(false)
}

/// A model folder's licence and what belongs to it, in the order of names.
///
/// # Errors
/// When the folder cannot be read.
pub fn licences(dir: &Path) -> Result<Vec<PathBuf>> {
    const STARTS: [&str; 5] = ["license", "licence", "notice", "copying", "use_policy"];
    let is_one = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        path.is_file() && STARTS.iter().any(|start| name.starts_with(start))
    };
    let mut paths = entries(dir)?;
    paths.retain(is_one);
    Ok(paths)
}

/// A model folder's parts that travel with it: tokenizer, chat template, generation settings.
pub fn companions(dir: &Path) -> Vec<PathBuf> {
    const NAMES: [&str; 9] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "generation_config.json",
    ];
    NAMES.iter().map(|name| dir.join(name)).filter(|path| path.is_file()).collect()
}
