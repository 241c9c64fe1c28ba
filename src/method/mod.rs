//! Quantization methods: one file, one line in the `methods!` list each.
//!
//! A method sees one weight in grouped form `[groups, group_len]` and knows neither models nor
//! files. It sits on a stock `nn::Linear`'s weight as a burn `Reparameterization`: the learned
//! scales are ordinary parameters, the optimizer and the records see them, and every forward reads
//! the fake-quantized weight. There is no second kind of linear.

mod attach;
mod flexround;
mod rtn;
mod seq;

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use attach::{FakeQuant, attach, attached, fold, quantize, role_of};
pub use flexround::{FlexRound, FlexRoundConfig};
pub use rtn::{Rtn, RtnConfig};
pub use seq::{Seq, SeqConfig, SeqStart};

use crate::error::Result;
use crate::quant::{ObserverConfig, QuantSpec, Repr, ZeroKind};
use crate::train::Role;

/// A folded weight still on the device: integer codes and their grid.
#[derive(Clone, Debug)]
pub struct Folded {
    /// Codes as floats, `[groups, group_len]`, each an integer in `0..2^bits`.
    pub codes: Tensor<2>,
    /// Steps, `[groups, 1]`.
    pub scale: Tensor<2>,
    /// Zero points in code units, `[groups, 1]`.
    pub zero_point: Tensor<2>,
    /// What the zero points are.
    pub zero_kind: ZeroKind,
}

/// One way to turn a weight into codes and a grid.
pub trait WeightMethod: Module + Sized {
    /// The method's keys in a recipe.
    type Config;

    /// What the linear becomes.
    const LEAVES: Repr;
    /// Whether the stored weight itself learns (as a latent) or stays frozen.
    const TRAINS_BASE: bool;
    /// Learned parameters by name, with the learning rate that drives each.
    const ROLES: &'static [(&'static str, Role)];

    /// Refuses a specification that this method cannot serve, before any weight is read.
    ///
    /// # Errors
    /// Preflight errors that name the key to change.
    fn accepts(config: &Self::Config, spec: &QuantSpec) -> Result<()>;

    /// The method on its start. For methods that start from an observer the codes are
    /// round-to-nearest's on the observed grid, but for exact ties, and the weights equal to within
    /// the rounding of `exp(ln Δ)` (about `2e-7 + |ln Δ| 2^-24`, relative).
    ///
    /// # Shapes
    /// - weight: `[groups, group_len]`
    ///
    /// # Errors
    /// When the observer refuses the weight.
    fn init(
        config: &Self::Config,
        spec: &QuantSpec,
        observer: &ObserverConfig,
        weight: &Tensor<2>,
    ) -> Result<Self>;

    /// Differentiable stand-in for the weight, `[groups, group_len]`.
    fn fake_quant(&self, weight: Tensor<2>) -> Tensor<2>;

    /// Codes and grid. Law: `scale * (codes - zero_point) == fake_quant(weight)`, bit for bit.
    fn fold(&self, weight: Tensor<2>) -> Folded;
}

/// Makes the enum of methods, their configurations and the dispatch; a new method is one line.
macro_rules! methods {
    ($($(#[$doc:meta])* $name:ident { $key:ident, $config:ty },)*) => {
        /// A method attached to a weight.
        #[derive(Debug, Module)]
        #[allow(clippy::large_enum_variant)] // a handful of tensor handles either way
        pub enum Method {
            $($(#[$doc])* $name($name),)*
        }

        /// `method.NAME = { ... }` in a recipe.
        #[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
        #[serde(rename_all = "lowercase")]
        pub enum MethodConfig {
            $($(#[$doc])* $name($config),)*
        }

        impl MethodConfig {
            /// The name in recipes and reports.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$name(_) => stringify!($key),)* }
            }

            /// What linears become.
            pub fn leaves(&self) -> Repr {
                match self { $(Self::$name(_) => <$name as WeightMethod>::LEAVES,)* }
            }

            /// Whether the stored weight itself learns.
            pub fn trains_base(&self) -> bool {
                match self { $(Self::$name(_) => <$name as WeightMethod>::TRAINS_BASE,)* }
            }

            /// Whether anything learns at all.
            pub fn learns(&self) -> bool {
                match self {
                    $(Self::$name(_) => {
                        <$name as WeightMethod>::TRAINS_BASE
                            || !<$name as WeightMethod>::ROLES.is_empty()
                    })*
                }
            }

            /// See [`WeightMethod::accepts`].
            ///
            /// # Errors
            /// Preflight errors that name the key to change.
            pub fn accepts(&self, spec: &QuantSpec) -> Result<()> {
                match self { $(Self::$name(config) => $name::accepts(config, spec),)* }
            }

            /// See [`WeightMethod::init`].
            ///
            /// # Errors
            /// When the observer refuses the weight.
            pub fn init(
                &self,
                spec: &QuantSpec,
                observer: &ObserverConfig,
                weight: &Tensor<2>,
            ) -> Result<Method> {
                Ok(match self {
                    $(Self::$name(config) => {
                        Method::$name($name::init(config, spec, observer, weight)?)
                    })*
                })
            }
        }

        impl Method {
            /// See [`WeightMethod::fake_quant`].
            pub fn fake_quant(&self, weight: Tensor<2>) -> Tensor<2> {
                match self { $(Self::$name(method) => method.fake_quant(weight),)* }
            }

            /// See [`WeightMethod::fold`].
            pub fn fold(&self, weight: Tensor<2>) -> Folded {
                match self { $(Self::$name(method) => method.fold(weight),)* }
            }
        }

        /// The learned parameters of every method, `(name, role)`.
        const ROLES: &[&[(&str, Role)]] = &[$(<$name as WeightMethod>::ROLES,)*];
    };
}

methods! {
    /// Round-to-nearest: nothing learned, the baseline.
    Rtn { rtn, RtnConfig },
    /// FlexRound: element-wise division factors.
    FlexRound { flexround, FlexRoundConfig },
    /// Stretched elastic quantization, 2 bits, latent weights and steps learned.
    Seq { seq, SeqConfig },
}
