//! The decoder block: one interpreter of every family's description.
//!
//! The model does not know that its linears may be fake-quantized.

use std::sync::Arc;

use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Tensor, activation};

use super::KvCache;
use super::arch::{Activation, LinearSpec, ModelConfig, NormKind, QueryNorm, Residual, Role, Site};
use super::positions::Positions;
use crate::ops;
use crate::quant::CodedWeight;

/// What a caller does at the sites of a block: `[batch, seq, features]` to the same shape.
pub type Tap<'a> = dyn Fn(Site, Tensor<3>) -> Tensor<3> + 'a;

/// A norm over the last axis, statistics in f32.
#[derive(Debug, Module)]
pub struct Norm {
    /// Gain as stored, `[width]`.
    pub weight: Param<Tensor<1>>,
    /// Bias of a layer norm, `[width]`.
    pub bias: Option<Param<Tensor<1>>>,
    /// What it computes.
    #[module(skip)]
    pub kind: NormKind,
    /// Added to the mean square.
    pub eps: f64,
}

impl Norm {
    /// The normed features.
    ///
    /// # Shapes
    /// - x, result: `[.., width]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let gain = self.gain();
        match self.kind {
            NormKind::Rms | NormKind::RmsPlusOne => ops::rms_norm(x, gain, self.eps),
            NormKind::Layer | NormKind::LayerPlain => {
                ops::layer_norm(x, gain, self.bias.as_ref().map(Param::val), self.eps)
            }
        }
    }

    /// What normed features are multiplied by, `[width]`.
    pub fn gain(&self) -> Tensor<1> {
        match self.kind {
            NormKind::RmsPlusOne => self.weight.val() + 1.0,
            _ => self.weight.val(),
        }
    }

    /// Divides what it gives, channel by channel.
    pub fn divide(&mut self, factors: &Tensor<1>) {
        let gain = self.gain() / factors.clone();
        let weight = if self.kind == NormKind::RmsPlusOne { gain - 1.0 } else { gain };
        self.weight = Param::initialized(self.weight.id, weight).set_require_grad(false);
        if let Some(bias) = &mut self.bias {
            let value = bias.val() / factors.clone();
            *bias = Param::initialized(bias.id, value).set_require_grad(false);
        }
    }
}

/// A linear's output, `[.., out]`.
pub(super) fn project<const D: usize>(linear: &Linear, x: Tensor<D>) -> Tensor<D> {
    project_by(linear, x, ops::linear)
}

/// As [`project`]; `dense` multiplies with a weight that is no codes.
pub(super) fn project_by<const D: usize>(
    linear: &Linear,
    x: Tensor<D>,
    dense: impl FnOnce(Tensor<D>, Tensor<2>) -> Tensor<D>,
) -> Tensor<D> {
    let y = match linear.weight.reparameterization::<CodedWeight>() {
        Some(coded) => coded.linear(x),
        None => dense(x, linear.weight.val()),
    };
    match &linear.bias {
        Some(bias) => y + bias.val().unsqueeze(),
        None => y,
    }
}

/// The norms of a block; absent where the family has none there.
#[derive(Debug, Module)]
pub struct Norms {
    /// Before attention.
    pub attention_input: Option<Norm>,
    /// Behind attention.
    pub attention_output: Option<Norm>,
    /// Before the MLP.
    pub mlp_input: Option<Norm>,
    /// Behind the MLP.
    pub mlp_output: Option<Norm>,
    /// Of queries.
    pub query: Option<Norm>,
    /// Of keys.
    pub key: Option<Norm>,
}

/// What a linear computes, and of which expert.
pub(super) struct Part(pub(super) Role, pub(super) Option<usize>);

impl From<Role> for Part {
    fn from(role: Role) -> Self {
        Self(role, None)
    }
}

/// One decoder layer.
#[derive(Debug, Module)]
pub struct Block {
    /// The linears, in the order of the description's.
    pub linears: Vec<Linear>,
    /// The router to its experts, `[experts, d_model]`; absent where it has an MLP.
    pub router: Option<Param<Tensor<2>>>,
    /// The norms.
    pub norms: Norms,
    /// Its place in the model.
    pub index: usize,
    /// The model's description.
    #[module(skip)]
    pub config: Arc<ModelConfig>,
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
        if self.config.arch.residual == Residual::Parallel {
            let normed = normed(self.norms.attention_input.as_ref(), hidden.clone());
            let mlp_input = match &self.norms.mlp_input {
                Some(norm) => norm.forward(hidden.clone()),
                None => normed.clone(),
            };
            let attention = self.attention(normed, positions, cache, tap);
            return hidden + self.scaled(attention) + self.scaled(self.mlp(mlp_input, tap));
        }
        let hidden = self.attend(hidden, positions, cache, tap);
        self.feed_forward(hidden, tap)
    }

    /// The residual stream behind attention, of a block with one after the other.
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
        let normed = normed(self.norms.attention_input.as_ref(), hidden.clone());
        let added = self.attention(normed, positions, cache, tap);
        self.join(hidden, added, self.norms.attention_output.as_ref())
    }

    /// The residual stream behind the MLP, from that behind attention.
    ///
    /// # Shapes
    /// - hidden, result: `[batch, seq, d_model]`
    pub fn feed_forward(&self, hidden: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let normed = normed(self.norms.mlp_input.as_ref(), hidden.clone());
        let added = self.mlp(normed, tap);
        self.join(hidden, added, self.norms.mlp_output.as_ref())
    }

    fn join(&self, hidden: Tensor<3>, added: Tensor<3>, norm: Option<&Norm>) -> Tensor<3> {
        match self.config.arch.residual {
            Residual::NormedSum => normed(norm, hidden + self.scaled(added)),
            _ => hidden + self.scaled(normed(norm, added)),
        }
    }

    fn scaled(&self, added: Tensor<3>) -> Tensor<3> {
        times(added, self.config.arch.multipliers.residual)
    }

    /// Attention on the normed residual stream.
    ///
    /// # Shapes
    /// - x, result: `[batch, seq, d_model]`
    pub fn attention(
        &self,
        x: Tensor<3>,
        positions: &Positions,
        cache: Option<&mut KvCache>,
        tap: &Tap<'_>,
    ) -> Tensor<3> {
        let attending = positions.of_block(&self.config, self.index);
        let [q, k, v] = self.queries_keys_values(x, tap);
        let mixed = match cache {
            None => ops::causal_attention(q, k, v, attending),
            Some(cache) => cache.attend(attending, [q, k, v]),
        };
        self.project(Role::Output, tap(Site::AttentionOutput, mixed))
    }

    /// Queries, keys and values before rotation, normed where the family norms them.
    fn queries_keys_values(&self, x: Tensor<3>, tap: &Tap<'_>) -> [Tensor<3>; 3] {
        let x = tap(Site::Attention, x);
        let config = &self.config;
        let [q, kv] = [config.n_heads, config.n_kv_heads].map(|heads| heads * config.head_dim);
        let [q, k, v] = if self.find(Role::Query).is_some() {
            [Role::Query, Role::Key, Role::Value].map(|role| self.project(role, x.clone()))
        } else if self.find(Role::QueryKeyValue).is_some() {
            let all = self.project(Role::QueryKeyValue, x);
            [(0, q), (q, kv), (q + kv, kv)].map(|(start, len)| all.clone().narrow(2, start, len))
        } else {
            let all = self.project(Role::QueryKeyValueByHead, x);
            let [batch, seq, _] = all.dims();
            let all = all.reshape([batch, seq, config.n_heads, 3, config.head_dim]);
            [0, 1, 2].map(|part| all.clone().narrow(3, part, 1).reshape([batch, seq, q]))
        };
        let over_heads = |norm: Option<&Norm>, x: Tensor<3>| match norm {
            None => x,
            Some(norm) if config.arch.query_norm == Some(QueryNorm::Width) => norm.forward(x),
            Some(norm) => {
                let [batch, seq, width] = x.dims();
                let heads = [batch, seq, width / config.head_dim, config.head_dim];
                norm.forward(x.reshape(heads)).reshape([batch, seq, width])
            }
        };
        let q = over_heads(self.norms.query.as_ref(), q);
        let k = tap(Site::Keys, over_heads(self.norms.key.as_ref(), k));
        [q, k, tap(Site::Values, v)]
    }

    /// The MLP on the normed residual stream.
    ///
    /// # Shapes
    /// - x, result: `[batch, seq, d_model]`
    pub fn mlp(&self, x: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        if let (Some(experts), Some(router)) = (self.config.experts(self.index), &self.router) {
            return self.mix_experts(experts, router.val(), x, tap);
        }
        let x = tap(Site::Mlp, x);
        let kind = self.config.arch.activation;
        let inner = if self.find(Role::GateUp).is_some() {
            let both = self.project(Role::GateUp, x);
            let ff = self.config.d_ff;
            gated(kind, both.clone().narrow(2, 0, ff), both.narrow(2, ff, ff))
        } else if self.find(Role::Gate).is_some() {
            gated(kind, self.project(Role::Gate, x.clone()), self.project(Role::Up, x))
        } else {
            activate(kind, self.project(Role::Up, x))
        };
        self.project(Role::Down, tap(Site::MlpOutput, inner))
    }

    /// Queries and keys before rotation, side by side.
    ///
    /// # Shapes
    /// - hidden: `[batch, seq, d_model]`
    /// - result: `[batch, seq, (heads + key heads) * head_dim]`
    pub fn queries_and_keys(&self, hidden: Tensor<3>, tap: &Tap<'_>) -> Tensor<3> {
        let normed = normed(self.norms.attention_input.as_ref(), hidden);
        let [q, k, _] = self.queries_keys_values(normed, tap);
        Tensor::cat(vec![q, k], 2)
    }

    fn find(&self, part: impl Into<Part>) -> Option<&Linear> {
        let Part(role, expert) = part.into();
        let place = self.specs().position(|spec| spec.role == role && spec.expert == expert)?;
        self.linears.get(place)
    }

    /// The output of a linear that the family has; nothing happens for one that it has not.
    pub(super) fn project(&self, part: impl Into<Part>, x: Tensor<3>) -> Tensor<3> {
        match self.find(part) {
            Some(linear) => project(linear, x),
            None => x,
        }
    }

    /// Every linear with its name within the block, in the order of the description's.
    pub fn linears(&self) -> impl ExactSizeIterator<Item = (&'static str, &Linear)> {
        self.specs().zip(&self.linears).map(|(spec, linear)| (spec.name, linear))
    }

    /// As [`Block::linears`], to change them.
    pub fn linears_mut(&mut self) -> impl ExactSizeIterator<Item = (&'static str, &mut Linear)> {
        let specs = self.config.specs(self.index).iter();
        specs.zip(&mut self.linears).map(|(spec, linear)| (spec.name, linear))
    }

    /// The description of its linears.
    pub fn specs(&self) -> std::slice::Iter<'_, LinearSpec> {
        self.config.specs(self.index).iter()
    }
}

fn normed(norm: Option<&Norm>, x: Tensor<3>) -> Tensor<3> {
    match norm {
        Some(norm) => norm.forward(x),
        None => x,
    }
}

/// A stream times a factor; nothing is computed for 1.
pub(super) fn times<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    if (factor - 1.0).abs() > 0.0 { x * factor } else { x }
}

/// `f(gate) * up`.
pub(super) fn gated(kind: Activation, gate: Tensor<3>, up: Tensor<3>) -> Tensor<3> {
    match kind {
        Activation::Silu => ops::swiglu(gate, up),
        kind => activate(kind, gate) * up,
    }
}

fn activate(kind: Activation, x: Tensor<3>) -> Tensor<3> {
    match kind {
        Activation::Silu => activation::silu(x),
        Activation::Gelu => activation::gelu(x),
        Activation::GeluTanh => activation::gelu_approximate(x),
        Activation::Relu => activation::relu(x),
    }
}
