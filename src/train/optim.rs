//! AdamW (or signed descent) over a module, with state by parameter path and global-norm clipping.
//!
//! The arithmetic of one tensor is burn's `AdamW`. What is ours is what surrounds it: burn's module
//! optimizer keys its state by random parameter ids (a resumed run has others) and clips each
//! parameter by itself.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{
    AdamW, AdamWState, DynOptimizer, DynState, GradientsParams, Optimizer as _, StateSink,
    StateSource,
};
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a gradient becomes a step.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Rule {
    /// AdamW.
    #[default]
    Adamw,
    /// One learning rate against the gradient's sign, without state (SignRound's).
    Sign,
}

/// Keys of `optimizer` in a training stage. PyTorch's defaults, but no weight decay.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// `"adamw"` or `"sign"`; the constants below are AdamW's.
    pub rule: Rule,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// Scale gradients down to this global norm when they exceed it; absent: no clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            rule: Rule::Adamw,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.0,
            clip_norm: None,
        }
    }
}

/// The optimizer with its state.
pub struct Optimizer {
    rule: Rule,
    adamw: AdamW,
    clip_norm: Option<f64>,
    states: BTreeMap<String, DynState>,
}

impl Optimizer {
    /// An optimizer without state.
    pub fn new(config: &OptimizerConfig) -> Self {
        let adamw = burn::optim::AdamWConfig::new()
            .with_beta_1(config.beta1)
            .with_beta_2(config.beta2)
            .with_epsilon(config.epsilon)
            .with_weight_decay(config.weight_decay)
            .build();
        Self { rule: config.rule, adamw, clip_norm: config.clip_norm, states: BTreeMap::new() }
    }

    /// Euclidean norm of all gradients together.
    pub fn global_norm<M: Module>(&self, module: &M, gradients: &GradientsParams) -> f64 {
        let mut visitor = SquaredNorm { gradients, sum: None };
        module.visit(&mut visitor);
        visitor.sum.map_or(0.0, |sum| f64::from(sum.into_scalar::<f32>()).sqrt())
    }

    /// One step. `norm` is the gradients' global norm, `rate_of` the learning rate by path.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        gradients: GradientsParams,
        norm: f64,
        rate_of: &dyn Fn(&str) -> f64,
    ) -> M {
        // PyTorch's clip_grad_norm_: the small constant keeps a zero norm from dividing.
        let shrink = self.clip_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let mut mapper = Update { optimizer: self, gradients, shrink, rate_of, path: Vec::new() };
        module.map(&mut mapper)
    }

    /// The state as named tensors, `(path.leaf, data)`, and the number of steps taken.
    pub fn save(&self) -> (Vec<(String, TensorData)>, u64) {
        let mut sink = StateSink::default();
        for (path, state) in &self.states {
            self.adamw.state_flatten(path, state, &mut sink);
        }
        let steps = sink.scalars.iter().filter_map(|(_, time)| u64::try_from(*time).ok()).max();
        (sink.tensors, steps.unwrap_or(0))
    }

    /// Restores what [`Optimizer::save`] gave.
    ///
    /// # Errors
    /// When a parameter's state is incomplete.
    pub fn load(
        &mut self,
        tensors: Vec<(String, TensorData)>,
        steps: u64,
        device: &Device,
    ) -> Result<()> {
        const FIRST: &str = ".momentum.moment_1";
        let paths: Vec<(String, usize)> = tensors
            .iter()
            .filter_map(|(name, data)| Some((name.strip_suffix(FIRST)?.to_owned(), data.rank())))
            .collect();
        let scalars =
            paths.iter().map(|(path, _)| (format!("{path}.momentum.time"), steps.into())).collect();
        let mut source = StateSource::new(scalars);
        for (name, data) in tensors {
            source.insert_tensor(name, data);
        }
        for (path, rank) in paths {
            let state = self.adamw.state_unflatten(rank, &path, &mut source, device);
            let state = state.ok_or_else(|| {
                Error::failed("the optimizer state is incomplete").at(&path).fix("--fresh")
            })?;
            self.states.insert(path, state);
        }
        Ok(())
    }
}

struct SquaredNorm<'a> {
    gradients: &'a GradientsParams,
    sum: Option<Tensor<1>>,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            let square = gradient.square().sum();
            self.sum = Some(match self.sum.take() {
                Some(sum) => sum + square,
                None => square,
            });
        }
    }
}

struct Update<'a> {
    optimizer: &'a mut Optimizer,
    gradients: GradientsParams,
    shrink: f64,
    rate_of: &'a dyn Fn(&str) -> f64,
    path: Vec<String>,
}

impl ModuleMapper for Update<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (id, tensor, mapper) = param.consume();
        let Some(gradient) = self.gradients.remove::<D>(id) else {
            return Param::from_mapped_value(id, tensor, mapper);
        };
        let gradient = if self.shrink < 1.0 { gradient * self.shrink } else { gradient };
        let path = self.path.join(".");
        let rate = (self.rate_of)(&path);
        if self.optimizer.rule == Rule::Sign {
            let tensor = tensor.inner() - gradient.sign() * rate;
            return Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper);
        }
        let state = self.optimizer.states.remove(&path);
        let state = state.map(DynState::downcast::<AdamWState<D>>);
        let (tensor, state) = self.optimizer.adamw.step(rate, tensor.inner(), gradient, state);
        if let Some(state) = state {
            self.optimizer.states.insert(path, DynState::create(state, D));
        }
        Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper)
    }
}
