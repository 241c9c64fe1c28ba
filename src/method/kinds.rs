//! The three kinds of methods: what each is given, and what it has to do.

use burn::module::{Module, Param};
use burn::tensor::Tensor;

use super::Quantizer;
use crate::error::{Error, Result};
use crate::ops;
use crate::quant::{
    GroupAxis, GroupLayout, Hessian, Learned, ObserverConfig, QuantSpec, QuantizedWeight, Repr,
    ZeroKind,
};
use crate::train::Role;

/// What a [`WeightMethod`] starts from.
pub struct Start<'a> {
    /// What the linear is to become.
    pub spec: &'a QuantSpec,
    /// How its weight falls into groups.
    pub layout: GroupLayout,
    /// How uniform grids start.
    pub observer: &'a ObserverConfig,
    /// The weight, `[groups, group_len]`, f32.
    pub weight: &'a Tensor<2>,
    /// For random starts: a function of the run's seed and the linear's name.
    pub seed: u64,
}

impl<'a> Start<'a> {
    /// From a weight of one group per row, `[groups, group_len]`, with nothing else known.
    pub fn new(spec: &'a QuantSpec, observer: &'a ObserverConfig, weight: &'a Tensor<2>) -> Self {
        let [groups, group_len] = weight.dims();
        let axis = GroupAxis::In;
        let layout = GroupLayout { out: groups, inputs: group_len, groups, group_len, axis };
        Self { spec, layout, observer, weight, seed: 0 }
    }
}

/// A uniform grid that an earlier stage left, for a method that goes on from it.
#[derive(Clone, Debug)]
pub struct LeftGrid {
    /// Distances of neighbouring levels, `[groups, 1]`.
    pub scale: Tensor<2>,
    /// Zero points in code units, `[groups, 1]`.
    pub zero_point: Tensor<2>,
    /// What the zero points are.
    pub zero_kind: ZeroKind,
    /// The learned step that the scales follow from, where it is known and is not them, `[groups, 1]`.
    pub step: Option<Tensor<2>>,
    /// The method that left it.
    pub method: String,
}

impl LeftGrid {
    /// Learned steps that give `scale` through `rule`.
    pub(super) fn steps(&self, rule: ops::Rule) -> Tensor<2> {
        // The rules multiply by powers of two, but for Ternary's, whose step is known unless its scale
        // was rounded to few digits, and then the division is exact too.
        let divided = self.scale.clone() / rule.scale(1.0);
        match &self.step {
            Some(step) => {
                let gives = rule.scales(step.clone()).equal(self.scale.clone());
                divided.mask_where(gives, step.clone())
            }
            None => divided,
        }
    }

    /// Whether every zero point is this number.
    pub(super) fn all_zeros_at(&self, zero: f32) -> bool {
        self.zero_point.clone().equal_scalar(zero).all().into_scalar::<bool>()
    }
}

/// What learning rates of latent weights, steps and shifts are measured in; see
/// [`RateUnit::Grid`](crate::train::RateUnit::Grid).
pub struct Units<'a> {
    /// The learned step.
    pub step: &'a Param<Tensor<2>>,
    /// The learned shift of the grid, if any.
    pub shift: Option<&'a Param<Tensor<2>>>,
    /// Distances of neighbouring levels, `[groups, 1]`.
    pub spacing: Tensor<2>,
}

/// The kind of grid that a method makes: stages of one kind, of the same bits and groups, chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum GridKind {
    /// Evenly spaced levels, zero at any integer.
    Affine,
    /// Evenly spaced levels, zero in the middle, or shifted from it.
    Centred,
    /// Evenly spaced levels, zero between the two in the middle.
    Stretched,
    /// Three levels.
    Ternary,
    /// Two levels.
    Signs,
    /// Sums of signed scales.
    Planes,
    /// Sums of centroids.
    Codebook,
}

/// When [`WeightMethod::between_steps`] is called.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Moment {
    /// After this many optimizer steps.
    Step(u64),
    /// Training is over; the weight is about to be folded.
    End,
}

/// One way to turn a weight into codes and a grid that can learn.
pub trait WeightMethod: Module + Sized {
    /// The method's keys in a recipe.
    type Config;

    /// What the linear becomes.
    const LEAVES: Repr;
    /// The kind of its grid.
    const GRID: GridKind;
    /// Whether [`WeightMethod::resume`] does anything.
    const RESUMES: bool = false;
    /// Whether the stored weight itself learns (as a latent) or stays frozen.
    const TRAINS_BASE: bool;
    /// Learned parameters by name, with the learning rate that drives each.
    const ROLES: &'static [(&'static str, Role)];
    /// Whether [`WeightMethod::between_steps`] does anything.
    const HAS_HOOK: bool = false;
    /// Parameters by name that do not learn, but that [`WeightMethod::between_steps`] goes on from.
    const CARRIED: &'static [&'static str] = &[];

    /// Refuses a specification that this method cannot serve, before any weight is read.
    ///
    /// # Errors
    /// Preflight errors that name the key to change.
    fn accepts(config: &Self::Config, spec: &QuantSpec) -> Result<()>;

    /// Refuses a weight of `shape`, `[out, in]`, before it is read.
    ///
    /// # Errors
    /// Preflight errors that name the key to change.
    fn accepts_shape(_config: &Self::Config, _shape: [usize; 2]) -> Result<()> {
        Ok(())
    }

    /// The method on its start. For methods that start from an observer the codes are
    /// round-to-nearest's on the observed grid, but for exact ties, and the weights equal to within
    /// the rounding of `exp(ln Δ)` (about `2e-7 + |ln Δ| 2^-24`, relative).
    ///
    /// # Errors
    /// When the observer refuses the weight.
    fn init(config: &Self::Config, start: &Start<'_>) -> Result<Self>;

    /// The method on a grid that is there already, so that `start.weight`, the latent that the earlier
    /// stage left, has exactly the codes and values it had; `None` where it cannot hold the grid.
    ///
    /// # Errors
    /// When `start` does not suffice.
    fn resume(
        _config: &Self::Config,
        _start: &Start<'_>,
        _grid: &LeftGrid,
    ) -> Result<Option<Self>> {
        Ok(None)
    }

    /// What rates of latents, steps and shifts are measured in; `None` where there are none of them.
    fn units(&self) -> Option<Units<'_>> {
        None
    }

    /// The method on a weight, `[groups, group_len]`.
    fn quantizer(&self, weight: Tensor<2>) -> Quantizer;

    /// Work between optimizer steps that no gradient does: remapping codes, projecting into bounds.
    /// `weight` (`[groups, group_len]`) is not tracked.
    #[must_use]
    fn between_steps(self, _weight: Tensor<2>, _moment: Moment) -> Self {
        self
    }
}

/// The task of a [`Solver`]: one linear.
pub struct Problem<'a> {
    /// What the linear is to become.
    pub spec: &'a QuantSpec,
    /// How its weight falls into groups, unless the solver chooses that itself.
    pub layout: GroupLayout,
    /// How uniform grids start.
    pub observer: &'a ObserverConfig,
    /// The weight, `[out, in]`, f32.
    pub weight: &'a Tensor<2>,
    /// Whether its outputs are queries or keys, whose errors the softmax amplifies.
    pub feeds_scores: bool,
    /// Second moments of the linear's inputs, when asked for by [`Solver::NEEDS`].
    pub inputs: Option<&'a Hessian>,
    /// The mean squared change of the enclosing module's output when this linear's weight is
    /// replaced by another, `[out, in]`; when asked for by [`Solver::NEEDS`].
    pub output_error: Option<&'a OutputError<'a>>,
}

/// See [`Problem::output_error`].
pub type OutputError<'a> = dyn Fn(&Tensor<2>) -> Result<f64> + 'a;

impl<'a> Problem<'a> {
    /// The inputs' second moments.
    ///
    /// # Errors
    /// When the stage gave none.
    pub fn need_inputs(&self) -> Result<&'a Hessian> {
        self.inputs.ok_or_else(|| Error::failed("this method needs calibration data"))
    }
}

/// What a method looks at besides the weight.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Needs {
    /// Nothing.
    Weight,
    /// Second moments of the linear's inputs.
    Moments,
    /// Those, and the outputs of the module around the linear.
    Outputs,
}

/// A method that learns nothing.
pub trait Solver {
    /// The method's keys in a recipe.
    type Config;

    /// What the linear becomes.
    const LEAVES: Repr;
    /// The kind of its grid.
    const GRID: GridKind = GridKind::Affine;
    /// What it looks at; anything but the weight takes `[data.calibration]`.
    const NEEDS: Needs;

    /// As [`WeightMethod::accepts`].
    ///
    /// # Errors
    /// Errors that name the key to change.
    fn accepts(config: &Self::Config, spec: &QuantSpec) -> Result<()>;

    /// As [`WeightMethod::accepts_shape`].
    ///
    /// # Errors
    /// Errors that name the key to change.
    fn accepts_shape(_config: &Self::Config, _shape: [usize; 2]) -> Result<()> {
        Ok(())
    }

    /// Exponents to try when input channels are balanced before quantization (AWQ): channel `c` of
    /// the weight is multiplied by `(mean |x_c|)^exponent`, and what feeds it divided; the stage
    /// keeps the exponent with the smallest output error. None: no balancing.
    fn balance_exponents(_config: &Self::Config) -> Vec<f64> {
        Vec::new()
    }

    /// Codes and grid of one linear.
    ///
    /// # Errors
    /// When the observer refuses the weight, or the inputs do not suffice.
    fn solve(config: &Self::Config, problem: &Problem<'_>) -> Result<QuantizedWeight>;
}

/// A method that learns the grid of codes which an earlier stage left, and nothing else.
pub trait Tuner {
    /// The method's keys in a recipe.
    type Config;

    /// What the linear has to be, and stays.
    const TAKES: Repr;

    /// What of the grid learns.
    fn learned(config: &Self::Config) -> Learned;
}
