//! Quantization methods: one file, one line in the `methods!` list each.
//!
//! A method sees one weight in grouped form `[groups, group_len]` and knows neither models nor
//! files. There are three kinds:
//!
//! * a [`WeightMethod`] sits on a stock `nn::Linear`'s weight as a burn `Reparameterization`: what it
//!   learns are ordinary parameters, the optimizer and the records see them, and every forward reads
//!   the fake-quantized weight. There is no second kind of linear;
//! * a [`Solver`] learns nothing: it turns a weight, and if it asks for them statistics of the
//!   linear's inputs, into codes and a grid at once;
//! * a [`Tuner`] goes on from codes that an earlier stage left: they stay packed
//!   ([`CodedWeight`](crate::quant::CodedWeight)), and only their grid learns.

mod adadim;
mod alphatuning;
mod attach;
mod awq;
mod bcq;
mod block_ap;
mod e2e_qp;
mod flexround;
mod gptq;
mod lrq;
mod lsq;
mod lwc;
mod peqa;
mod rtn;
mod seq;
mod sign;
mod signround;
mod ternary;
mod uniquanf;

use burn::module::{Module, Param};
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use adadim::{AdaDim, AdaDimConfig};
pub use alphatuning::{AlphaTuning, AlphaTuningConfig, LearnedAlphas};
pub use attach::{
    FakeQuant, Latent, attach, attached, between_steps, coarseness, fold, latent, materialize,
    measures, quantize, role_of, shorten_all,
};
pub use awq::{Awq, AwqConfig};
pub use bcq::{Bcq, BcqConfig, BcqSolve};
pub use block_ap::{BlockAp, BlockApConfig, BlockApStart};
pub use e2e_qp::{E2eQp, E2eQpConfig};
pub use flexround::{FlexRound, FlexRoundConfig};
pub use gptq::{Gptq, GptqConfig};
pub use lrq::{Division, FullDivision, LowRankDivision, Lrq, LrqConfig, Rank};
pub use lsq::{Lsq, LsqConfig, LsqGradientScale, LsqStart};
pub use lwc::{Lwc, LwcConfig};
pub use peqa::{Peqa, PeqaConfig};
pub use rtn::{Rtn, RtnConfig};
pub use seq::{Seq, SeqConfig, SeqStart};
pub use sign::{Sign, SignConfig};
pub use signround::{SignRound, SignRoundConfig};
pub use ternary::{Ternary, TernaryConfig};
pub use uniquanf::{UniQuanF, UniQuanFConfig};

use crate::error::{Error, Result};
use crate::ops;
use crate::quant::{
    GroupAxis, GroupLayout, Hessian, Learned, ObserverConfig, QuantParams, QuantSpec,
    QuantizedWeight, Repr, ScaleDigits, ZeroKind,
};
use crate::train::Role;

/// A folded weight still on the device: integer codes and their grid.
#[derive(Clone, Debug)]
pub enum Folded {
    /// `w = scale * (code - zero_point)`.
    Uniform {
        /// Codes as floats, `[groups, group_len]`, each an integer in `0..2^bits`.
        codes: Tensor<2>,
        /// Steps, `[groups, 1]`.
        scale: Tensor<2>,
        /// Zero points in code units, `[groups, 1]`.
        zero_point: Tensor<2>,
        /// What the zero points are.
        zero_kind: ZeroKind,
    },
    /// `w = ±alpha_0 ± alpha_1 ... + offset`.
    BinaryCoding {
        /// Codes as floats, `[groups, group_len]`; bit `i` is the sign of `alpha_i`.
        codes: Tensor<2>,
        /// Scales of the planes, `[groups, bits]`.
        alpha: Tensor<2>,
        /// Offsets, `[groups, 1]`.
        offset: Tensor<2>,
    },
}

impl Folded {
    /// Codes on a uniform grid.
    pub fn uniform(codes: Tensor<2>, grid: QuantParams, zero_kind: ZeroKind) -> Self {
        let QuantParams { scale, zero_point } = grid;
        Self::Uniform { codes, scale, zero_point, zero_kind }
    }
}

/// The one function from a weight to its codes and to their values: training, evaluation and export
/// all read it.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant)] // a handful of tensor handles either way
pub enum Quantizer {
    /// Codes of the weight divided by learned factors.
    Divided(ops::Divided),
    /// Codes of the weight in units of a learned step; what its zero points are.
    Stepped(ops::Stepped, ZeroKind),
    /// UniQuanF's mapping to binary coding.
    Unified {
        /// The learned mapping.
        unified: ops::Unified,
        /// The weight, `[groups, group_len]`.
        weight: Tensor<2>,
        /// Present codes as floats, `[groups, group_len]`.
        codes: Tensor<2>,
        /// Whether weights beyond their level's reach get no gradient.
        filter: bool,
    },
}

impl Quantizer {
    /// With scales of few digits, so that training sees what will be stored; their gradient is
    /// that of the scales as they are. Scales that are products or exponentials come out short to
    /// within their last bit.
    #[must_use]
    pub fn shortened(mut self, digits: ScaleDigits) -> Self {
        if digits == ScaleDigits::F32 {
            return self;
        }
        let digits = match self {
            Self::Unified { .. } => digits.of_planes(),
            Self::Divided(_) | Self::Stepped(..) => digits,
        };
        let short = |scale: Tensor<2>| ops::shorten_ste(scale, digits.significant());
        match &mut self {
            Self::Divided(divided) => {
                divided.log_scale = short(divided.scales()).log();
                divided.base = None;
            }
            Self::Stepped(stepped, _) => {
                let step = stepped.step.clone();
                let scale = stepped.rule.scales(step.clone());
                // Scales are steps times a constant.
                stepped.step = step * (short(scale.clone()) / scale);
            }
            Self::Unified { unified, .. } => {
                let scale = ops::exp(unified.log_scale.clone());
                unified.alpha = short(scale.clone() * unified.alpha.clone()) / scale;
            }
        }
        self
    }

    /// Differentiable stand-in for the weight, `[groups, group_len]`.
    pub fn values(self) -> Tensor<2> {
        match self {
            Self::Divided(divided) => divided.values(),
            Self::Stepped(stepped, _) => stepped.values(),
            Self::Unified { unified, weight, codes, filter } => unified.map(weight, &codes, filter),
        }
    }

    /// The weight where it stands between the levels before it is rounded, `[groups, group_len]`, off
    /// the tape, in units of weights: what a later stage goes on from.
    pub fn latent(self) -> Tensor<2> {
        use ops::off_tape;
        match self {
            Self::Divided(divided) => divided.latent(),
            Self::Stepped(stepped, _) => match stepped.rounding {
                None => off_tape(stepped.weight),
                Some(offset) => {
                    off_tape(stepped.weight) + off_tape(offset) * off_tape(stepped.step)
                }
            },
            Self::Unified { unified, weight, .. } => {
                let division = unified.log_division + unified.log_row;
                off_tape(weight) / off_tape(division).exp()
            }
        }
    }

    /// Distances of levels, `[groups, 1]`, or scales of planes, `[groups, bits]`.
    pub fn scales(&self) -> Tensor<2> {
        match self {
            Self::Divided(divided) => divided.scales(),
            Self::Stepped(stepped, _) => stepped.rule.scales(stepped.step.clone()),
            Self::Unified { unified, .. } => unified.folded().0,
        }
    }

    /// Codes and grid. Law: they stand for [`Quantizer::values`], bit for bit.
    pub fn fold(self) -> Folded {
        match self {
            Self::Divided(divided) => {
                let scale = divided.scales();
                let grid = QuantParams { scale, zero_point: divided.zero_point.clone() };
                Folded::uniform(divided.codes(), grid, ZeroKind::Integer)
            }
            Self::Stepped(stepped, zero_kind) => {
                let scale = stepped.rule.scales(stepped.step.clone());
                let grid = QuantParams { scale, zero_point: stepped.zero_point.clone() };
                Folded::uniform(stepped.codes(), grid, zero_kind)
            }
            Self::Unified { unified, codes, .. } => {
                let (alpha, offset) = unified.folded();
                Folded::BinaryCoding { codes, alpha, offset }
            }
        }
    }
}

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
    fn steps(&self, rule: ops::Rule) -> Tensor<2> {
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
    fn all_zeros_at(&self, zero: f32) -> bool {
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

/// What the parameters of a [`CodedWeight`](crate::quant::CodedWeight) are to the optimizer.
const TUNED: &[(&str, Role)] = &[("scale", Role::Scale), ("offset", Role::Scale)];

/// Makes the enum of methods, their configurations and the dispatch; a new method is one line.
macro_rules! methods {
    (
        learned { $($(#[$doc:meta])* $name:ident { $key:literal, $config:ty },)* }
        solvers { $($(#[$sdoc:meta])* $solver:ident { $skey:literal, $sconfig:ty },)* }
        tuners { $($(#[$tdoc:meta])* $tuner:ident { $tkey:literal, $tconfig:ty },)* }
    ) => {
        /// A method attached to a weight.
        #[derive(Debug, Module)]
        #[allow(clippy::large_enum_variant)] // a handful of tensor handles either way
        pub enum Method {
            $($(#[$doc])* $name($name),)*
        }

        /// `method.NAME = { ... }` in a recipe.
        #[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
        pub enum MethodConfig {
            $($(#[$doc])* #[serde(rename = $key)] $name($config),)*
            $($(#[$sdoc])* #[serde(rename = $skey)] $solver($sconfig),)*
            $($(#[$tdoc])* #[serde(rename = $tkey)] $tuner($tconfig),)*
        }

        /// The name of every method in recipes.
        pub const NAMES: &[&str] = &[$($key,)* $($skey,)* $($tkey,)*];

        impl MethodConfig {
            /// The name in recipes and reports.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $key,)*
                    $(Self::$solver(_) => $skey,)*
                    $(Self::$tuner(_) => $tkey,)*
                }
            }

            /// What linears have to be.
            pub fn takes(&self) -> Repr {
                match self {
                    $(Self::$tuner(_) => <$tuner as Tuner>::TAKES,)*
                    _ => Repr::Dense,
                }
            }

            /// What linears become.
            pub fn leaves(&self) -> Repr {
                match self {
                    $(Self::$name(_) => <$name as WeightMethod>::LEAVES,)*
                    $(Self::$solver(_) => <$solver as Solver>::LEAVES,)*
                    $(Self::$tuner(_) => <$tuner as Tuner>::TAKES,)*
                }
            }

            /// The kind of its grid; `None` for a method that keeps what is there.
            pub fn grid(&self) -> Option<GridKind> {
                match self {
                    $(Self::$name(_) => Some(<$name as WeightMethod>::GRID),)*
                    $(Self::$solver(_) => Some(<$solver as Solver>::GRID),)*
                    $(Self::$tuner(_) => None,)*
                }
            }

            /// Whether it can go on from codes on its own kind of grid.
            pub fn resumes(&self) -> bool {
                match self {
                    $(Self::$name(_) => <$name as WeightMethod>::RESUMES,)*
                    $(Self::$solver(_) => false,)*
                    $(Self::$tuner(_) => true,)*
                }
            }

            /// See [`WeightMethod::resume`].
            ///
            /// # Errors
            /// As there.
            pub fn resume(&self, start: &Start<'_>, grid: &LeftGrid) -> Result<Option<Method>> {
                Ok(match self {
                    $(Self::$name(config) => {
                        $name::resume(config, start, grid)?.map(Method::$name)
                    })*
                    _ => None,
                })
            }

            /// What of a grid it learns; `None` for a method that makes codes.
            pub fn tunes(&self) -> Option<Learned> {
                match self {
                    $(Self::$tuner(config) => Some(<$tuner as Tuner>::learned(config)),)*
                    _ => None,
                }
            }

            /// Whether the stored weight itself learns.
            pub fn trains_base(&self) -> bool {
                match self {
                    $(Self::$name(_) => <$name as WeightMethod>::TRAINS_BASE,)*
                    _ => false,
                }
            }

            /// Whether anything learns at all.
            pub fn learns(&self) -> bool {
                match self {
                    $(Self::$name(_) => {
                        <$name as WeightMethod>::TRAINS_BASE
                            || !<$name as WeightMethod>::ROLES.is_empty()
                    })*
                    $(Self::$solver(_) => false,)*
                    $(Self::$tuner(_) => true,)*
                }
            }

            /// Whether the method works between optimizer steps.
            pub fn has_hook(&self) -> bool {
                match self {
                    $(Self::$name(_) => <$name as WeightMethod>::HAS_HOOK,)*
                    _ => false,
                }
            }

            /// What the method looks at besides the weight.
            pub fn needs(&self) -> Needs {
                match self {
                    $(Self::$solver(_) => <$solver as Solver>::NEEDS,)*
                    _ => Needs::Weight,
                }
            }

            /// See [`Solver::balance_exponents`].
            pub fn balance_exponents(&self) -> Vec<f64> {
                match self {
                    $(Self::$solver(config) => $solver::balance_exponents(config),)*
                    _ => Vec::new(),
                }
            }

            /// See [`WeightMethod::accepts`].
            ///
            /// # Errors
            /// Preflight errors that name the key to change.
            pub fn accepts(&self, spec: &QuantSpec) -> Result<()> {
                match self {
                    $(Self::$name(config) => <$name as WeightMethod>::accepts(config, spec),)*
                    $(Self::$solver(config) => <$solver as Solver>::accepts(config, spec),)*
                    $(Self::$tuner(_) => Ok(()),)*
                }
            }

            /// See [`WeightMethod::accepts_shape`].
            ///
            /// # Errors
            /// Preflight errors that name the key to change.
            pub fn accepts_shape(&self, shape: [usize; 2]) -> Result<()> {
                match self {
                    $(Self::$name(config) => {
                        <$name as WeightMethod>::accepts_shape(config, shape)
                    })*
                    _ => Ok(()),
                }
            }

            /// See [`WeightMethod::init`].
            ///
            /// # Errors
            /// When the observer refuses the weight, or this is another kind of method.
            pub fn init(&self, start: &Start<'_>) -> Result<Method> {
                Ok(match self {
                    $(Self::$name(config) => Method::$name($name::init(config, start)?),)*
                    $(Self::$solver(_) => {
                        return Err(Error::usage(concat!("method.", $skey, " learns nothing"))
                            .fix("[stage.calibrate]"));
                    })*
                    $(Self::$tuner(_) => {
                        return Err(Error::usage(concat!("method.", $tkey, " makes no codes"))
                            .fix("[stage.tune_scales], after a stage that leaves some"));
                    })*
                })
            }

            /// Codes and grid without learning: a solver's solution, or a method as it starts.
            ///
            /// # Errors
            /// When the observer refuses the weight, or the grid is damaged.
            pub fn solve(&self, problem: &Problem<'_>) -> Result<QuantizedWeight> {
                match self {
                    $(Self::$solver(config) => $solver::solve(config, problem),)*
                    _ => attach::start_only(self, problem),
                }
            }
        }

        impl Method {
            /// Differentiable stand-in for the weight, both `[groups, group_len]`.
            pub fn fake_quant(&self, weight: Tensor<2>) -> Tensor<2> {
                self.quantizer(weight).values()
            }

            /// Codes and grid of the weight. Law: they stand for `fake_quant(weight)`, bit for bit.
            pub fn fold(&self, weight: Tensor<2>) -> Folded {
                self.quantizer(weight).fold()
            }

            /// See [`WeightMethod::quantizer`].
            pub fn quantizer(&self, weight: Tensor<2>) -> Quantizer {
                match self { $(Self::$name(method) => method.quantizer(weight),)* }
            }

            /// See [`WeightMethod::units`].
            pub fn units(&self) -> Option<Units<'_>> {
                match self { $(Self::$name(method) => method.units(),)* }
            }

            /// See [`WeightMethod::between_steps`].
            #[must_use]
            pub fn between_steps(self, weight: Tensor<2>, moment: Moment) -> Self {
                match self {
                    $(Self::$name(method) => Self::$name(method.between_steps(weight, moment)),)*
                }
            }
        }

        /// The learned parameters of every method, `(name, role)`.
        const ROLES: &[&[(&str, Role)]] = &[$(<$name as WeightMethod>::ROLES,)* TUNED];
    };
}

methods! {
    learned {
        /// Round-to-nearest: nothing learned, the baseline.
        Rtn { "rtn", RtnConfig },
        /// FlexRound: element-wise division factors.
        FlexRound { "flexround", FlexRoundConfig },
        /// UniQuanF: FlexRound's transform and learned binary-coding levels.
        UniQuanF { "uniquanf", UniQuanFConfig },
        /// LRQ: FlexRound's division factors as a low-rank product.
        Lrq { "lrq", LrqConfig },
        /// LWC: learned clipping of each group's range.
        Lwc { "lwc", LwcConfig },
        /// Block-AP: latent weights, steps and zero points learned.
        BlockAp { "block_ap", BlockApConfig },
        /// Stretched elastic quantization, 2 bits, latent weights and steps learned.
        Seq { "seq", SeqConfig },
        /// SignRound: bounded rounding offsets and range factors, by signed descent.
        SignRound { "signround", SignRoundConfig },
        /// LSQ and LSQ+: latent weights and steps learned, zero in the middle or shifted.
        Lsq { "lsq", LsqConfig },
        /// Three levels, latent weights and steps learned.
        Ternary { "ternary", TernaryConfig },
        /// Signs, 1 bit, latent weights and steps learned.
        Sign { "sign", SignConfig },
    }
    solvers {
        /// Binary coding: sign planes with a scale each, fitted to the weight.
        Bcq { "bcq", BcqConfig },
        /// GPTQ: each column's rounding error is made up for by the columns after it.
        Gptq { "gptq", GptqConfig },
        /// AWQ: input channels balanced by activation, and clipping searched.
        Awq { "awq", AwqConfig },
        /// AdaDim: groups along the inputs or the outputs, chosen for each linear.
        AdaDim { "adadim", AdaDimConfig },
    }
    tuners {
        /// PEQA: the scales of codes that an earlier stage left.
        Peqa { "peqa", PeqaConfig },
        /// AlphaTuning: the scales of sign planes that an earlier stage left.
        AlphaTuning { "alphatuning", AlphaTuningConfig },
        /// E2E-QP: the steps of codes that an earlier stage left.
        E2eQp { "e2e_qp", E2eQpConfig },
    }
}
