//! Loading: tensor names, shapes, and the one place that builds modules from host weights.

use std::path::{Path, PathBuf};

use burn::module::{Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::CausalLm;
use super::config::ModelConfig;
use super::decoder::{Attention, Block, LINEARS, Mlp, RmsNorm};
use super::tap::ModelTap;
use crate::error::{Error, Result};
use crate::quant::{CodedWeight, Learned, QuantizedWeight};
use crate::store::TensorSource;
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

/// The token embedding's name.
pub const EMBEDDING: &str = "model.embed_tokens.weight";

/// The output head's name as a linear.
pub const HEAD: &str = "lm_head";

/// The name under which a source holds the head's weight: its own, or in a tied model the
/// embedding's.
pub fn head_name(source: &dyn WeightSource) -> &'static str {
    if source.contains("lm_head.weight") { "lm_head.weight" } else { EMBEDDING }
}

/// The name of block `index`'s tensors, `model.layers.INDEX`.
pub fn block_prefix(index: usize) -> String {
    format!("model.layers.{index}")
}

/// The checkpoint name of a linear's weight.
pub fn weight_name(linear: &str) -> String {
    format!("{linear}.weight")
}

/// Every linear of the decoder blocks by full name, with its `[out, in]`, in execution order.
pub fn linear_shapes(config: &ModelConfig) -> Vec<(String, [usize; 2])> {
    (0..config.n_blocks)
        .flat_map(|index| {
            LINEARS.map(|name| (format!("{}.{name}", block_prefix(index)), shape_of(config, name)))
        })
        .collect()
}

/// `[out, in]` of one of a block's linears.
fn shape_of(config: &ModelConfig, linear: &str) -> [usize; 2] {
    let (d, ff) = (config.d_model, config.d_ff);
    let q = config.n_heads * config.head_dim;
    let kv = config.n_kv_heads * config.head_dim;
    match linear {
        "self_attn.q_proj" => [q, d],
        "self_attn.k_proj" | "self_attn.v_proj" => [kv, d],
        "self_attn.o_proj" => [d, q],
        "mlp.down_proj" => [d, ff],
        _ => [ff, d],
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

    /// Embedding, final norm and head, without blocks.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn ends(&self) -> Result<CausalLm> {
        Ok(CausalLm {
            embed: self.embed()?,
            blocks: Vec::new(),
            norm: self.norm("model.norm.weight")?,
            head: self.head()?,
            tap: ModelTap::default(),
        })
    }

    /// The token embedding, `[vocab, d_model]`. A tied checkpoint may hold it as `lm_head.weight`.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn embed(&self) -> Result<Param<Tensor<2>>> {
        let under_head = self.config.tied && !self.source.contains(EMBEDDING);
        let name = if under_head { "lm_head.weight" } else { EMBEDDING };
        let shape = [self.config.vocab, self.config.d_model];
        Ok(frozen(self.tensor(name, shape)?))
    }

    /// Decoder block `index`.
    ///
    /// # Errors
    /// As [`WeightSource::weight`].
    pub fn block(&self, index: usize) -> Result<Block> {
        let prefix = block_prefix(index);
        let linear = |name: &str| {
            let bias = if name.starts_with("mlp") {
                self.config.mlp_bias
            } else {
                self.config.attention_bias
            };
            self.linear(&format!("{prefix}.{name}"), shape_of(self.config, name), bias)
        };
        let [q, k, v, o, gate, up, down] = LINEARS;
        Ok(Block {
            input_layernorm: self.norm(&format!("{prefix}.input_layernorm.weight"))?,
            self_attn: Attention {
                q_proj: linear(q)?,
                k_proj: linear(k)?,
                v_proj: linear(v)?,
                o_proj: linear(o)?,
                n_kv_heads: self.config.n_kv_heads,
                head_dim: self.config.head_dim,
            },
            post_attention_layernorm: self
                .norm(&format!("{prefix}.post_attention_layernorm.weight"))?,
            mlp: Mlp { gate_proj: linear(gate)?, up_proj: linear(up)?, down_proj: linear(down)? },
        })
    }

    /// A tied model has a head of its own only when one was quantized apart from the embedding.
    fn head(&self) -> Result<Option<Linear>> {
        if self.config.tied && !self.source.overrides(HEAD) {
            return Ok(None);
        }
        let shape = [self.config.vocab, self.config.d_model];
        self.linear(HEAD, shape, false).map(Some)
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

    fn norm(&self, name: &str) -> Result<RmsNorm> {
        let weight = frozen(self.tensor(name, [self.config.d_model])?);
        Ok(RmsNorm { weight, eps: self.config.norm_eps })
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
