//! AdamW (or signed descent) over a module, with state by parameter path and global-norm clipping.
//!
//! burn's module optimizer keys its state by random parameter ids (a resumed run has others), clips
//! each parameter by itself, and allocates three parameter-sized tensors for each.

use std::collections::{BTreeMap, HashMap};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::{self, AdamWStep, Moments};
pub use crate::ops::{Later, Values, later};

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

/// How AdamW's two moments are held between steps.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MomentsIn {
    /// As f32: 8 bytes for each learned number.
    #[default]
    F32,
    /// As 8-bit codes of the dynamic map in blocks of 256 (Dettmers et al. 2022): 2.03 bytes; parameters of
    /// fewer than 4096 numbers stay f32.
    Int8,
}

impl MomentsIn {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes of both moments of so many numbers that learn, in large parameters.
    pub fn bytes(self, learned: u64) -> u64 {
        match self {
            Self::F32 => 8 * learned,
            Self::Int8 => 2 * learned + learned / 32,
        }
    }
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
    /// AdamW's moments between steps: `"f32"` or `"int8"`.
    #[serde(skip_serializing_if = "MomentsIn::is_default")]
    pub moments: MomentsIn,
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
            moments: MomentsIn::F32,
        }
    }
}

/// What a parameter's learning rate is measured in, where not in the parameter's own units.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // a tensor handle or nothing, a few for each linear
pub enum Measure {
    /// A linear's weight `[in, out]`: the distance between two levels of each of its groups,
    /// `[groups, 1]`, off the tape.
    Units(Tensor<2>),
    /// A parameter that stays positive: itself. Its logarithm takes the step.
    Itself,
}

/// Below this part of the largest gradient norm that a training has seen, a gradient is what rounding
/// left of one. The trainings of docs/two-bits.md stay above a twentieth.
const COLLAPSED: f64 = 1e-4;

/// The optimizer with its state.
pub struct Optimizer {
    config: OptimizerConfig,
    moments: BTreeMap<String, (Moments, usize)>,
    steps: u64,
    /// The largest gradient norm so far.
    largest_norm: f64,
    measures: HashMap<ParamId, Measure>,
}

impl Optimizer {
    /// An optimizer without state.
    pub fn new(config: &OptimizerConfig) -> Self {
        Self {
            config: config.clone(),
            moments: BTreeMap::new(),
            steps: 0,
            largest_norm: 0.0,
            measures: HashMap::new(),
        }
    }

    /// What learning rates are measured in from the next step on, by parameter; others in their own
    /// units. A function of the module's state: nothing of it is saved.
    pub fn measure_by(&mut self, measures: HashMap<ParamId, Measure>) {
        self.measures = measures;
    }

    /// By what rates shrink at a step whose gradients have this norm: 1, unless the gradient has
    /// collapsed. AdamW divides by the gradient's own size and would make steps of full length
    /// from noise.
    fn damping(&mut self, norm: f64) -> f64 {
        self.largest_norm = self.largest_norm.max(norm);
        let least = COLLAPSED * self.largest_norm;
        if norm < least { norm / least } else { 1.0 }
    }

    /// Euclidean norm of all gradients together.
    pub fn global_norm<M: Module>(&self, module: &M, gradients: &GradientsParams) -> f64 {
        let mut visitor = SquaredNorm { gradients, sum: 0.0 };
        module.visit(&mut visitor);
        visitor.sum.sqrt()
    }

    /// One step. `norm` is the gradients' global norm, `rate_of` the learning rate by path; rates
    /// shrink with a gradient that falls below a ten thousandth of the largest one so far.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        gradients: GradientsParams,
        norm: f64,
        rate_of: &dyn Fn(&str) -> f64,
    ) -> M {
        self.steps += 1;
        // PyTorch's clip_grad_norm_: the small constant keeps a zero norm from dividing.
        let shrink = self.config.clip_norm.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
        let damping = self.damping(norm);
        let rate_of = |path: &str| rate_of(path) * damping;
        let rate_of = &rate_of;
        let mut mapper = Update { optimizer: self, gradients, shrink, rate_of, path: Vec::new() };
        module.map(&mut mapper)
    }

    /// The state as named tensors, `path.leaf`, the number of steps taken, and the largest gradient
    /// norm so far. Nothing is copied before a tensor is asked for its values.
    pub fn save(&self) -> (Vec<Later>, u64, f64) {
        let mut tensors = Vec::new();
        for (path, (moments, rank)) in &self.moments {
            for part in moments.parts(*rank) {
                tensors.push(Later { name: format!("{path}{}", part.name), ..part });
            }
        }
        (tensors, self.steps, self.largest_norm)
    }

    /// Restores what [`Optimizer::save`] gave.
    ///
    /// # Errors
    /// When a parameter's state is incomplete.
    pub fn load(
        &mut self,
        tensors: Vec<(String, TensorData)>,
        steps: u64,
        largest_norm: f64,
        device: &Device,
    ) -> Result<()> {
        self.steps = steps;
        self.largest_norm = largest_norm;
        let mut parts: BTreeMap<String, BTreeMap<&str, TensorData>> = BTreeMap::new();
        for (name, data) in tensors {
            let leaf = ops::LEAVES.into_iter().flatten().find(|leaf| name.ends_with(leaf));
            if let Some((path, leaf)) = leaf.and_then(|l| Some((name.strip_suffix(l)?, l))) {
                parts.entry(path.to_owned()).or_default().insert(leaf, data);
            }
        }
        for (path, mut parts) in parts {
            let moments = Moments::from_parts(|leaf| parts.remove(leaf), device);
            let (moments, rank) = moments.ok_or_else(|| {
                Error::failed("the optimizer state is incomplete").at(&path).fix("--fresh")
            })?;
            self.moments.insert(path, (moments, rank));
        }
        Ok(())
    }
}

struct SquaredNorm<'a> {
    gradients: &'a GradientsParams,
    sum: f64,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.sum += ops::squared_norm(gradient);
        }
    }
}

/// Where the first number of the gradients stands that is not finite: parameter and row.
pub(super) fn culprit<M: Module>(module: &M, gradients: &GradientsParams) -> Option<String> {
    let mut visitor = Culprit { gradients, path: Vec::new(), found: None };
    module.visit(&mut visitor);
    visitor.found
}

struct Culprit<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    found: Option<String>,
}

impl ModuleVisitor for Culprit<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradient = self.gradients.get::<D>(param.id).filter(|_| self.found.is_none());
        let Some(gradient) = gradient else { return };
        let columns = gradient.dims().last().map_or(1, |columns| (*columns).max(1));
        let values = gradient.into_data();
        let at = values.iter::<f32>().position(|value| !value.is_finite());
        let path = self.path.join(".");
        // A linear's weight is [in, out] here, and its rows are the outputs everywhere else.
        let of_linear = D == 2 && path.ends_with("weight");
        let row = |at: usize| if of_linear { at % columns } else { at / columns };
        self.found = at.map(|at| format!("{path}, row {}", row(at)));
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
        let path = self.path.join(".");
        let rate = (self.rate_of)(&path);
        let config = &self.optimizer.config;
        if config.rule == Rule::Sign {
            let tensor = tensor.inner() - gradient.sign() * rate;
            return Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper);
        }
        let step = AdamWStep {
            shrink: self.shrink,
            beta1: config.beta1.into(),
            beta2: config.beta2.into(),
            epsilon: config.epsilon.into(),
            rate,
            weight_decay: config.weight_decay.into(),
            step: self.optimizer.steps,
        };
        let moments = self.optimizer.moments.remove(&path).map(|(moments, _)| moments);
        let tensor = tensor.inner();
        let moments = moments.or_else(|| match config.moments {
            MomentsIn::F32 => None,
            MomentsIn::Int8 => {
                let measure = self.optimizer.measures.get(&id);
                Moments::int8(&tensor, matches!(measure, Some(Measure::Units(_))))
            }
        });
        let (tensor, moments) = match self.optimizer.measures.get(&id) {
            None => ops::adamw_step(&step, tensor, gradient, moments),
            Some(Measure::Units(units)) => {
                // Casts of a rank that is 2 already: weights of linears alone have units.
                let [tensor, gradient] =
                    [tensor, gradient].map(|t| Tensor::<2>::from_dispatch(t.into_dispatch()));
                let (tensor, moments) =
                    ops::adamw_step_in_units(&step, units.clone(), tensor, gradient, moments);
                (Tensor::from_dispatch(tensor.into_dispatch()), moments)
            }
            Some(Measure::Itself) => {
                // d/d ln x = x d/dx; where nothing moves the factor is exactly 1.
                let gradient = gradient * tensor.clone();
                let start = tensor.zeros_like();
                let (change, moments) = ops::adamw_step(&step, start, gradient, moments);
                (tensor * change.exp(), moments)
            }
        };
        self.optimizer.moments.insert(path, (moments, D));
        Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_shrink_with_a_gradient_that_has_collapsed() {
        let mut optimizer = Optimizer::new(&OptimizerConfig::default());
        let damping: Vec<f64> =
            [1.0, 2.0, 0.01, 2e-6, 0.0, 2.0].map(|norm| optimizer.damping(norm)).into();
        assert_eq!(damping[..3], [1.0; 3]);
        assert!((damping[3] - 0.01).abs() < 1e-12, "{damping:?}");
        // Nothing is no noise, and a gradient that comes back has its full rate.
        assert_eq!(damping[4..], [0.0, 1.0]);
        assert_eq!(
            Optimizer::new(&OptimizerConfig::default()).damping(0.0).to_bits(),
            1f64.to_bits()
        );
    }
}
