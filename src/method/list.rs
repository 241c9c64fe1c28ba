//! What a line of the `methods!` list makes: the enum of methods, their configurations and the dispatch.

use crate::train::Role;

/// What the parameters of a [`CodedWeight`](crate::quant::CodedWeight) are to the optimizer.
pub(super) const TUNED: &[(&str, Role)] = &[("scale", Role::Scale), ("offset", Role::Scale)];

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
        #[derive(Clone, Debug, Deserialize, schemars::JsonSchema, PartialEq, Serialize)]
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
                    $(Self::$solver(config) => {
                        <$solver as Solver>::accepts_shape(config, shape)
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
                            .fix("[stage.tune_scales] or [stage.reconstruct], after a stage that leaves some"));
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

        /// See [`WeightMethod::CARRIED`], of every method.
        const CARRIED: &[&[&str]] = &[$(<$name as WeightMethod>::CARRIED,)*];
        /// The learned parameters of every method, `(name, role)`.
        const ROLES: &[&[(&str, Role)]] = &[$(<$name as WeightMethod>::ROLES,)* TUNED];
    };
}

pub(super) use methods;
