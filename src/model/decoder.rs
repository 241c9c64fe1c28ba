//! The shared decoder block: grouped-query attention, rotate-half RoPE, gated MLP, RMS norms.
//!
//! Field names are the checkpoint's, so a parameter's path in the module is its tensor's name.
//! The model does not know that its linears may be fake-quantized.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use crate::ops::{self, Rotary};
use crate::quant::CodedWeight;

/// Names of a block's linears, in execution order.
pub const LINEARS: [&str; 7] = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
];

/// A place in a block where a caller may look at, or replace, what flows through.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// Input of q, k and v, after the norm.
    Attention,
    /// Output of k, before rotation.
    Keys,
    /// Output of v.
    Values,
    /// Input of o.
    AttentionOutput,
    /// Input of gate and up, after the norm.
    Mlp,
    /// Input of down.
    MlpOutput,
}

impl Site {
    /// Every site, in the order of execution.
    pub const ALL: [Self; 6] = [
        Self::Attention,
        Self::Keys,
        Self::Values,
        Self::AttentionOutput,
        Self::Mlp,
        Self::MlpOutput,
    ];

    /// The sites that feed linears.
    pub const INPUTS: [Self; 4] =
        [Self::Attention, Self::AttentionOutput, Self::Mlp, Self::MlpOutput];

    /// The site that feeds one of [`LINEARS`].
    pub fn feeding(linear: &str) -> Self {
        match linear {
            "self_attn.q_proj" | "self_attn.k_proj" | "self_attn.v_proj" => Self::Attention,
            "self_attn.o_proj" => Self::AttentionOutput,
            "mlp.down_proj" => Self::MlpOutput,
            _ => Self::Mlp,
        }
    }

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Keys => "keys",
            Self::Values => "values",
            Self::AttentionOutput => "attention_output",
            Self::Mlp => "mlp",
            Self::MlpOutput => "mlp_output",
        }
    }
}

/// What a caller does at the sites of a block: `[batch, seq, features]` to the same shape.
pub type Tap<'a> = dyn Fn(Site, Tensor<3>) -> Tensor<3> + 'a;

/// Root-mean-square norm, statistics in f32.
#[derive(Debug, Module)]
pub struct RmsNorm {
    /// Gain, `[d_model]`.
    pub weight: Param<Tensor<1>>,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    /// `x / sqrt(mean(x^2) + eps)`, normalized in f32, times the gain in `x`'s own type.
    ///
    /// # Shapes
    /// - x, result: `[.., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}

/// Rotary tables and the causal mask of one run of positions.
#[derive(Clone, Debug)]
pub struct Positions(Rotary);

impl Positions {
    /// Positions `past..past + seq`, attending to `0..past + seq`.
    pub fn new(
        config: &ModelConfig,
        past: usize,
        seq: usize,
        dtype: DType,
        device: &Device,
    ) -> Self {
        let frequencies = config.rope.inverse_frequencies(config.head_dim);
        let shape = [1, 1, seq, frequencies.len()];
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f32> = (past..past + seq)
                .flat_map(|position| {
                    frequencies.iter().map(move |w| f(f64::from(position as f32 * w)) as f32)
                })
                .collect();
            Tensor::<4>::from_data(TensorData::new(values, shape), device).cast(dtype)
        };
        let copies = config.n_heads / config.n_kv_heads;
        let total = past + seq;
        let mask: Vec<f32> = (0..copies * seq)
            .flat_map(|row| {
                let position = past + row % seq;
                (0..total).map(move |key| if key <= position { 0.0 } else { f32::NEG_INFINITY })
            })
            .collect();
        let mask = TensorData::new(mask, [1, 1, copies * seq, total]);
        Self(Rotary {
            cos: table(f64::cos),
            sin: table(f64::sin),
            mask: Tensor::<4>::from_data(mask, device).cast(dtype),
        })
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.0.cos.dims()[2]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Keys and values of earlier positions of one block, each `[batch, kv_heads, past, head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct KvCache(Option<(Tensor<4>, Tensor<4>)>);

impl KvCache {
    /// All keys and values, with those of new positions at their end.
    fn extended(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let (k, v) = match self.0.take() {
            None => (k, v),
            Some((past_k, past_v)) => {
                (Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2))
            }
        };
        self.0 = Some((k.clone(), v.clone()));
        (k, v)
    }
}

/// Causal self-attention with grouped key and value heads.
#[derive(Debug, Module)]
pub struct Attention {
    /// Queries.
    pub q_proj: Linear,
    /// Keys.
    pub k_proj: Linear,
    /// Values.
    pub v_proj: Linear,
    /// Output.
    pub o_proj: Linear,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Attention {
    /// Attention on the normed residual stream, `[batch, seq, d_model]`.
    pub fn forward(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        let x = tap(Site::Attention, x);
        let q = project(&self.q_proj, x.clone());
        let k = tap(Site::Keys, project(&self.k_proj, x.clone()));
        let v = tap(Site::Values, project(&self.v_proj, x));
        let rotary = &positions.0;
        let mixed = match cache {
            None => ops::causal_attention(q, k, v, rotary, self.head_dim),
            Some(cache) => {
                let [q, k, v] = [q, k, v].map(|x| Rotary::heads(x, self.head_dim));
                let (k, v) = cache.extended(rotary.rotate(k), v);
                rotary.attend(rotary.rotate(q), k, v)
            }
        };
        project(&self.o_proj, tap(Site::AttentionOutput, mixed))
    }
}

/// A linear's output, `[.., out]`.
pub(super) fn project<const D: usize>(linear: &Linear, x: Tensor<D>) -> Tensor<D> {
    let y = match linear.weight.reparameterization::<CodedWeight>() {
        Some(coded) => coded.linear(x),
        None => ops::linear(x, linear.weight.val()),
    };
    match &linear.bias {
        Some(bias) => y + bias.val().unsqueeze(),
        None => y,
    }
}

/// Gated MLP: `down(silu(gate(x)) * up(x))`.
#[derive(Debug, Module)]
pub struct Mlp {
    /// Gate.
    pub gate_proj: Linear,
    /// Up.
    pub up_proj: Linear,
    /// Down.
    pub down_proj: Linear,
}

impl Mlp {
    /// The MLP on the normed residual stream, `[batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let x = tap(Site::Mlp, x);
        let gated = ops::swiglu(project(&self.gate_proj, x.clone()), project(&self.up_proj, x));
        project(&self.down_proj, tap(Site::MlpOutput, gated))
    }
}

/// One decoder layer.
#[derive(Debug, Module)]
pub struct Block {
    /// Norm before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Norm before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// MLP.
    pub mlp: Mlp,
}

impl Block {
    /// The block's output on the residual stream.
    ///
    /// # Shapes
    /// - hidden, result: `[batch, seq, d_model]`
    pub fn forward(&self, hidden: Tensor<3>, positions: &Positions) -> Tensor<3> {
        self.forward_tapped(hidden, positions, None, &|_, x| x)
    }

    /// As [`Block::forward`], reading and extending a cache of earlier positions, with a tap.
    pub fn forward_tapped(
        &self,
        hidden: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        let hidden = self.attend(hidden, positions, cache, tap);
        self.feed_forward(hidden, tap)
    }

    /// The residual stream behind attention.
    ///
    /// # Shapes
    /// - hidden, result: `[batch, seq, d_model]`
    pub fn attend(
        &self,
        hidden: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        let normed = self.input_layernorm.forward(hidden.clone());
        hidden + self.self_attn.forward(normed, positions, cache, tap)
    }

    /// The residual stream behind the MLP, from that behind attention.
    ///
    /// # Shapes
    /// - hidden, result: `[batch, seq, d_model]`
    pub fn feed_forward(&self, hidden: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let normed = self.post_attention_layernorm.forward(hidden.clone());
        hidden + self.mlp.forward(normed, tap)
    }

    /// Queries and keys before rotation, side by side.
    ///
    /// # Shapes
    /// - hidden: `[batch, seq, d_model]`
    /// - result: `[batch, seq, (heads + key heads) * head_dim]`
    pub fn queries_and_keys(&self, hidden: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let x = tap(Site::Attention, self.input_layernorm.forward(hidden));
        let q = project(&self.self_attn.q_proj, x.clone());
        let k = tap(Site::Keys, project(&self.self_attn.k_proj, x));
        Tensor::cat(vec![q, k], 2)
    }

    /// Every linear with its name within the block, in the order of [`LINEARS`].
    pub fn linears(&self) -> [(&'static str, &Linear); 7] {
        let (attention, mlp) = (&self.self_attn, &self.mlp);
        let linears = [
            &attention.q_proj,
            &attention.k_proj,
            &attention.v_proj,
            &attention.o_proj,
            &mlp.gate_proj,
            &mlp.up_proj,
            &mlp.down_proj,
        ];
        std::array::from_fn(|i| (LINEARS[i], linears[i]))
    }

    /// As [`Block::linears`], to change them.
    pub fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let (attention, mlp) = (&mut self.self_attn, &mut self.mlp);
        let [q, k, v, o, gate, up, down] = LINEARS;
        [
            (q, &mut attention.q_proj),
            (k, &mut attention.k_proj),
            (v, &mut attention.v_proj),
            (o, &mut attention.o_proj),
            (gate, &mut mlp.gate_proj),
            (up, &mut mlp.up_proj),
            (down, &mut mlp.down_proj),
        ]
    }
}
