//! The shared decoder block: grouped-query attention, rotate-half RoPE, gated MLP, RMS norms.
//!
//! Field names are the checkpoint's, so a parameter's path in the module is its tensor's name.
//! The model does not know that its linears may be fake-quantized.

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData, activation};
use serde::{Deserialize, Serialize};

use super::config::ModelConfig;

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
        let dtype = x.dtype();
        let wide = if dtype == DType::F32 { x } else { x.cast(DType::F32) };
        let rms = (wide.clone().square().mean_dim(D - 1) + self.eps).sqrt();
        let normalized = wide / rms;
        let normalized = if dtype == DType::F32 { normalized } else { normalized.cast(dtype) };
        normalized * self.weight.val().unsqueeze()
    }
}

/// Rotary tables and the causal mask of one run of positions.
#[derive(Clone, Debug)]
pub struct Positions {
    /// `[1, 1, seq, head_dim / 2]`.
    cos: Tensor<4>,
    /// `[1, 1, seq, head_dim / 2]`.
    sin: Tensor<4>,
    /// 0 or -inf, `[1, 1, heads per kv head * seq, past + seq]`.
    mask: Tensor<4>,
}

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
        Self {
            cos: table(f64::cos),
            sin: table(f64::sin),
            mask: Tensor::<4>::from_data(mask, device).cast(dtype),
        }
    }

    /// Number of positions.
    pub fn len(&self) -> usize {
        self.cos.dims()[2]
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Rotates `[batch, heads, seq, head_dim]`: half of the features against the other half.
    fn rotate(&self, x: Tensor<4>) -> Tensor<4> {
        let half = x.dims()[3] / 2;
        let first = x.clone().narrow(3, 0, half);
        let second = x.narrow(3, half, half);
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let rotated_first = first.clone() * cos.clone() - second.clone() * sin.clone();
        let rotated_second = second * cos + first * sin;
        Tensor::cat(vec![rotated_first, rotated_second], 3)
    }
}

/// Keys and values of earlier positions of one block, each `[batch, kv_heads, past, head_dim]`.
#[derive(Clone, Debug, Default)]
pub struct KvCache(Option<(Tensor<4>, Tensor<4>)>);

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
        let [batch, seq, _] = x.dims();
        let x = tap(Site::Attention, x);
        let heads = |x: Tensor<3>| -> Tensor<4> {
            let [batch, seq, width] = x.dims();
            x.reshape([batch, seq, width / self.head_dim, self.head_dim]).swap_dims(1, 2)
        };
        let q = positions.rotate(heads(self.q_proj.forward(x.clone())));
        let k = positions.rotate(heads(tap(Site::Keys, self.k_proj.forward(x.clone()))));
        let v = heads(tap(Site::Values, self.v_proj.forward(x)));
        let (k, v) = match cache {
            None => (k, v),
            Some(cache) => {
                let (k, v) = match cache.0.take() {
                    None => (k, v),
                    Some((past_k, past_v)) => {
                        (Tensor::cat(vec![past_k, k], 2), Tensor::cat(vec![past_v, v], 2))
                    }
                };
                cache.0 = Some((k.clone(), v.clone()));
                (k, v)
            }
        };
        // The query heads that share a key head are stacked along the sequence, so that keys and
        // values are used as they are, never repeated.
        let stacked = [batch, self.n_kv_heads, q.dims()[1] / self.n_kv_heads * seq, self.head_dim];
        let scale = (self.head_dim as f64).powf(-0.5);
        let scores = (q * scale).reshape(stacked).matmul(k.swap_dims(2, 3));
        let weights = activation::softmax(scores + positions.mask.clone(), 3);
        let mixed = weights.matmul(v);
        let n_heads = stacked[1] * stacked[2] / seq;
        let mixed = mixed.reshape([batch, n_heads, seq, self.head_dim]).swap_dims(1, 2);
        let mixed = mixed.reshape([batch, seq, n_heads * self.head_dim]);
        self.o_proj.forward(tap(Site::AttentionOutput, mixed))
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
        let gate = activation::silu(self.gate_proj.forward(x.clone()));
        let gated = gate * self.up_proj.forward(x);
        self.down_proj.forward(tap(Site::MlpOutput, gated))
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
        let normed = self.input_layernorm.forward(hidden.clone());
        let hidden = hidden + self.self_attn.forward(normed, positions, cache, tap);
        let normed = self.post_attention_layernorm.forward(hidden.clone());
        hidden + self.mlp.forward(normed, tap)
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
