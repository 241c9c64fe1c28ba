//! AdamW (or signed descent) over a module, with state by parameter path and global-norm clipping.
//!
//! burn's module optimizer keys its state by random parameter ids (a resumed run has others), clips
//! each parameter by itself, and allocates three parameter-sized tensors for each.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::{self, AdamWStep, Moments, Numbers, Restraint};
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

/// What latent weights are between steps.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LatentsIn {
    /// f32: 4 bytes.
    #[default]
    F32,
    /// bf16: 2 bytes. A step is computed in f32 and rounded up or down by chance, so that steps that are
    /// smaller than the distance of two such numbers count on average.
    Bf16,
}

impl LatentsIn {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Bytes of so many weights.
    pub fn bytes(self, weights: u64) -> u64 {
        match self {
            Self::F32 => 4 * weights,
            Self::Bf16 => 2 * weights,
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
    /// Scale gradients down to this norm when they exceed it; absent: no clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip_norm: Option<f64>,
    /// What the gradients' norm is taken over: `"global"`, or `"block"`, which needs no gradient of another
    /// block and so lets a training that goes block by block update each at once.
    #[serde(skip_serializing_if = "NormOf::is_global")]
    pub norm: NormOf,
    /// AdamW's moments between steps: `"f32"` or `"int8"`.
    #[serde(skip_serializing_if = "MomentsIn::is_default")]
    pub moments: MomentsIn,
    /// Latent weights between steps: `"f32"` or `"bf16"`, rounded by chance; of `distill`.
    #[serde(skip_serializing_if = "LatentsIn::is_default")]
    pub latents: LatentsIn,
}

/// What a gradient norm is taken over, for clipping and for the watch on gradients that collapse.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormOf {
    /// Everything that learns.
    #[default]
    Global,
    /// Each decoder block by itself; the clipping norm is shared out evenly (by squares), so that all
    /// blocks together never exceed it.
    Block,
}

impl NormOf {
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
    fn is_global(&self) -> bool {
        *self == Self::Global
    }
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
            norm: NormOf::Global,
            moments: MomentsIn::F32,
            latents: LatentsIn::F32,
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
    /// The largest gradient norms so far, of each part that has one of its own, one number each.
    largest_norms: BTreeMap<usize, Numbers>,
    /// Decoder blocks that learn.
    blocks: usize,
    measures: HashMap<ParamId, Measure>,
    /// Where weights are bf16 between steps.
    seeds: Option<Seeds>,
    /// What is noted of a step, where somebody asked.
    noted: Option<Noted>,
}

/// Squares of what a step is made of, parameter by parameter.
#[derive(Clone, Debug, Default)]
pub struct Noted {
    /// The gradients, before clipping.
    pub gradients: Squares,
    /// What was added to the parameters.
    pub updates: Squares,
}

/// The seed of a step's rounding by the step and a parameter's path; `None` for one that stays f32.
type Seeds = Box<dyn Fn(u64, &str) -> Option<u64>>;

/// The number of what is outside of blocks, where norms are taken over blocks, and of everything where
/// they are not.
const WHOLE: usize = usize::MAX;

impl Optimizer {
    /// An optimizer without state.
    pub fn new(config: &OptimizerConfig) -> Self {
        Self {
            config: config.clone(),
            moments: BTreeMap::new(),
            steps: 0,
            largest_norms: BTreeMap::new(),
            blocks: 1,
            measures: HashMap::new(),
            seeds: None,
            noted: None,
        }
    }

    /// With the seeds that the rounding of bf16 weights follows from, by the number of the step and a
    /// parameter's path: `None` for a parameter that stays f32. Nothing where the configuration has no bf16.
    #[must_use]
    pub fn rounding(self, seeds: impl Fn(u64, &str) -> Option<u64> + 'static) -> Self {
        let wanted = self.config.latents == LatentsIn::Bf16;
        Self { seeds: wanted.then(|| Box::new(seeds) as Seeds), ..self }
    }

    /// Whether a parameter is bf16 between steps, by its path.
    pub fn is_bf16(&self, path: &str) -> bool {
        self.seeds.as_ref().is_some_and(|seeds| seeds(0, path).is_some())
    }

    /// A parameter after a step, as it is kept.
    fn kept<const D: usize>(&self, path: &str, tensor: Tensor<D>) -> Tensor<D> {
        match self.seeds.as_ref().and_then(|seeds| seeds(self.steps, path)) {
            Some(seed) => ops::round_to_bf16(tensor, seed),
            None => tensor,
        }
    }

    /// Has the next step note what it is made of. A parameter is then held twice while it is updated, one
    /// at a time; the numbers are the same.
    pub fn note(&mut self) {
        self.noted = Some(Noted::default());
    }

    /// What was noted since [`Optimizer::note`].
    pub fn take_noted(&mut self) -> Option<Noted> {
        self.noted.take()
    }

    /// For a model of so many decoder blocks, which share a clipping norm where norms are those of
    /// blocks.
    #[must_use]
    pub fn of_blocks(self, blocks: usize) -> Self {
        Self { blocks: blocks.max(1), ..self }
    }

    /// Whether a block's update waits for the gradients of all others.
    pub fn needs_global_norm(&self) -> bool {
        self.config.norm.is_global()
    }

    /// What learning rates are measured in from the next step on, by parameter; others in their own
    /// units. A function of the module's state: nothing of it is saved.
    pub fn measure_by(&mut self, measures: HashMap<ParamId, Measure>) {
        self.measures = measures;
    }

    /// By what rates shrink at a step where the gradients of `part` have this norm: 1, unless the
    /// gradient has collapsed. AdamW divides by the gradient's own size and would make steps of full
    /// length from noise.
    fn damping(&mut self, part: usize, norm: f64) -> f64 {
        let before = self.largest_norms.get(&part).map_or(0.0, |largest| first(&largest.values()));
        let largest = before.max(norm);
        self.largest_norms.insert(part, Numbers::one(largest));
        let least = COLLAPSED * largest;
        if norm < least { norm / least } else { 1.0 }
    }

    /// Squares of the gradients' norms, parameter by parameter, in the module's order. `path` is where
    /// the module stands in the model, as [`Optimizer::step_part`]'s.
    pub fn squares<M: Module>(
        &self,
        path: &[&str],
        module: &M,
        gradients: &GradientsParams,
    ) -> Squares {
        let path = path.iter().map(|&name| name.to_owned()).collect();
        let mut visitor = SquaredNorm { gradients, path, squares: Squares::default() };
        module.visit(&mut visitor);
        visitor.squares
    }

    /// One step. `squares` are those of the gradients, `rate_of` the learning rate by path; rates
    /// shrink with a gradient that falls below a ten thousandth of the largest one so far.
    pub fn step<M: Module>(
        &mut self,
        module: M,
        gradients: GradientsParams,
        squares: &Squares,
        rate_of: &dyn Fn(&str) -> f64,
    ) -> M {
        self.begin_step();
        let scales = self.scales(squares);
        self.step_part(&scales, &[], module, gradients, rate_of)
    }

    /// A step begins: its parts follow by [`Optimizer::step_part`].
    pub fn begin_step(&mut self) {
        self.steps += 1;
    }

    /// What gradients and rates are multiplied by at a step with gradients of these norms: of the whole
    /// model, or of a part that has a norm of its own.
    pub fn scales(&mut self, squares: &Squares) -> Scales {
        if let Some(noted) = &mut self.noted {
            noted.gradients.0.extend(squares.0.iter().cloned());
        }
        let of = |optimizer: &mut Self, part: usize, norm: Numbers, share: f64| {
            (part, optimizer.scale(part, &norm, share))
        };
        if self.config.norm.is_global() {
            return Scales([of(self, WHOLE, squares.norm(), 1.0)].into());
        }
        let share = 1.0 / (self.blocks as f64).sqrt();
        let parts: BTreeSet<usize> = squares.0.iter().map(|(part, _)| *part).collect();
        Scales(parts.into_iter().map(|part| of(self, part, squares.norm_of(part), share)).collect())
    }

    fn scale(&mut self, part: usize, norm: &Numbers, share: f64) -> Scale {
        let clip = self.config.clip_norm.map(|max| max * share);
        match norm {
            Numbers::Known(norm) => {
                let norm = first(norm);
                // PyTorch's clip_grad_norm_: the small constant keeps a zero norm from dividing.
                let shrink = clip.map_or(1.0, |max| (max / (norm + 1e-6)).min(1.0));
                Scale::Known([shrink, self.damping(part, norm)])
            }
            Numbers::There(norm) => {
                let before = self.largest_norms.remove(&part).unwrap_or_else(|| Numbers::one(0.0));
                let before = before.on_device_of(norm);
                let (restraint, largest) = Restraint::new(norm, before, clip, COLLAPSED);
                self.largest_norms.insert(part, Numbers::There(largest));
                Scale::There(restraint)
            }
        }
    }

    /// The step of a part of the model: of `module`, which stands at `path` in it.
    pub fn step_part<M: Module>(
        &mut self,
        scales: &Scales,
        path: &[&str],
        module: M,
        gradients: GradientsParams,
        rate_of: &dyn Fn(&str) -> f64,
    ) -> M {
        let path = path.iter().map(|&name| name.to_owned()).collect();
        let mut mapper = Update { optimizer: self, gradients, scales, rate_of, path };
        module.map(&mut mapper)
    }

    /// Takes the state of the parameters whose path begins with `prefix` out of it.
    pub fn take_part(&mut self, prefix: &str) -> Vec<(String, Moments, usize)> {
        let of_part = |path: &String, _: &mut (Moments, usize)| path.starts_with(prefix);
        let taken = self.moments.extract_if(.., of_part);
        taken.map(|(path, (moments, rank))| (path, moments, rank)).collect()
    }

    /// Puts back one of those that [`Optimizer::take_part`] took.
    pub fn put_part(&mut self, path: String, moments: Moments, rank: usize) {
        self.moments.insert(path, (moments, rank));
    }

    /// The state as named tensors, `path.leaf`, the number of steps taken, and the largest gradient
    /// norm so far. Nothing is copied before a tensor is asked for its values.
    pub fn save(&self) -> (Vec<Later>, u64, String) {
        let mut tensors = Vec::new();
        for (path, (moments, rank)) in &self.moments {
            for part in moments.parts(*rank) {
                tensors.push(Later { name: format!("{path}{}", part.name), ..part });
            }
        }
        let mut largest = self.largest_norms.clone();
        Numbers::read_all(largest.values_mut());
        let norms = largest.iter().map(|(part, norm)| match (*part, first(&norm.values())) {
            // Shortest text that reads back as the same number.
            (WHOLE, norm) => norm.to_string(),
            (part, norm) => format!("{part}:{norm}"),
        });
        (tensors, self.steps, norms.collect::<Vec<_>>().join(" "))
    }

    /// Restores what [`Optimizer::save`] gave.
    ///
    /// # Errors
    /// When a parameter's state is incomplete.
    pub fn load(
        &mut self,
        tensors: Vec<(String, TensorData)>,
        steps: u64,
        largest_norms: &str,
        device: &Device,
    ) -> Result<()> {
        self.steps = steps;
        let norm = |text: &str| {
            let (part, norm) = text
                .split_once(':')
                .map_or((Some(WHOLE), text), |(part, norm)| (part.parse().ok(), norm));
            Some((part?, Numbers::one(norm.parse().ok()?)))
        };
        let norms: Option<_> = largest_norms.split_whitespace().map(norm).collect();
        self.largest_norms =
            norms.ok_or_else(|| Error::failed("the optimizer state is damaged").fix("--fresh"))?;
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

/// Squares of gradient norms, parameter by parameter in the model's order, each with the block that it
/// belongs to (a number of its own outside of blocks).
#[derive(Clone, Debug, Default)]
pub struct Squares(Vec<(usize, Numbers)>);

impl Squares {
    /// The Euclidean norm of all gradients together, one number.
    pub fn norm(&self) -> Numbers {
        Numbers::sum(self.0.iter().map(|(_, square)| square.clone())).root()
    }

    fn norm_of(&self, part: usize) -> Numbers {
        let own = self.0.iter().filter(|(of, _)| *of == part);
        Numbers::sum(own.map(|(_, square)| square.clone())).root()
    }

    /// The Euclidean norm of each of the first `blocks` blocks, one number each; 0 of one without any.
    pub fn norms_of_blocks(&self, blocks: usize) -> Vec<Numbers> {
        (0..blocks).map(|block| self.norm_of(block)).collect()
    }

    /// Those of several parts, in their order.
    pub fn of_parts(parts: impl IntoIterator<Item = Self>) -> Self {
        Self(parts.into_iter().flat_map(|part| part.0).collect())
    }
}

/// What gradients and rates are multiplied by, by part of the model.
#[derive(Debug)]
pub struct Scales(BTreeMap<usize, Scale>);

/// What gradients and rates of a part are multiplied by.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // handles, one or one for each block
enum Scale {
    /// Both.
    Known([f64; 2]),
    /// On a device.
    There(Restraint),
}

fn first(numbers: &[f64]) -> f64 {
    numbers.first().copied().unwrap_or_default()
}

/// The block that a parameter belongs to, by its path.
fn part_of(path: &[String]) -> usize {
    match path {
        [blocks, index, ..] if blocks == "blocks" => index.parse().unwrap_or(WHOLE),
        _ => WHOLE,
    }
}

struct SquaredNorm<'a> {
    gradients: &'a GradientsParams,
    path: Vec<String>,
    squares: Squares,
}

impl ModuleVisitor for SquaredNorm<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.squares.0.push((part_of(&self.path), ops::squared_norm(gradient)));
        }
    }
}

/// Where the first number of the gradients stands that is not finite: parameter and row.
pub fn culprit<M: Module>(
    path: &[&str],
    module: &M,
    gradients: &GradientsParams,
) -> Option<String> {
    let path = path.iter().map(|&name| name.to_owned()).collect();
    let mut visitor = Culprit { gradients, path, found: None };
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
    scales: &'a Scales,
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
        let tensor = tensor.inner();
        // Held twice it is not updated in place.
        let before = self.optimizer.noted.is_some().then(|| tensor.clone());
        let tensor = self.stepped(&path, id, tensor, gradient);
        let tensor = self.optimizer.kept(&path, tensor);
        if let (Some(noted), Some(before)) = (&mut self.optimizer.noted, before) {
            let change = ops::squared_distance(tensor.clone(), before);
            noted.updates.0.push((part_of(&self.path), change));
        }
        Param::from_mapped_value(id, Tensor::from_inner(tensor).require_grad(), mapper)
    }
}

impl Update<'_> {
    /// A parameter after its step, off the tape.
    fn stepped<const D: usize>(
        &mut self,
        path: &str,
        id: ParamId,
        tensor: Tensor<D>,
        gradient: Tensor<D>,
    ) -> Tensor<D> {
        let Scales(scales) = self.scales;
        let found = scales.get(&WHOLE).or_else(|| scales.get(&part_of(&self.path)));
        let ([shrink, damping], restraint) = match found {
            Some(Scale::Known(both)) => (*both, None),
            Some(Scale::There(restraint)) => ([1.0; 2], Some(restraint.clone())),
            None => ([1.0; 2], None),
        };
        let rate = (self.rate_of)(path) * damping;
        let config = &self.optimizer.config;
        if config.rule == Rule::Sign {
            let change = gradient.sign() * rate;
            let change = match &restraint {
                Some(restraint) => restraint.damp(change),
                None => change,
            };
            return tensor - change;
        }
        let step = AdamWStep {
            shrink,
            beta1: config.beta1.into(),
            beta2: config.beta2.into(),
            epsilon: config.epsilon.into(),
            rate,
            weight_decay: config.weight_decay.into(),
            step: self.optimizer.steps,
            restraint,
        };
        let moments = self.optimizer.moments.remove(path).map(|(moments, _)| moments);
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
        self.optimizer.moments.insert(path.to_owned(), (moments, D));
        tensor
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_shrink_with_a_gradient_that_has_collapsed() {
        let mut optimizer = Optimizer::new(&OptimizerConfig::default());
        let damping: Vec<f64> =
            [1.0, 2.0, 0.01, 2e-6, 0.0, 2.0].map(|norm| optimizer.damping(WHOLE, norm)).into();
        assert_eq!(damping[..3], [1.0; 3]);
        assert!((damping[3] - 0.01).abs() < 1e-12, "{damping:?}");
        // Nothing is no noise, and a gradient that comes back has its full rate.
        assert_eq!(damping[4..], [0.0, 1.0]);
        assert_eq!(
            Optimizer::new(&OptimizerConfig::default()).damping(WHOLE, 0.0).to_bits(),
            1f64.to_bits()
        );
    }
}
