//! Learning rates as pure functions of the step.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Deserializer, Serialize, de};

use crate::schema::schema_of;

/// Which learning rate drives a learned parameter.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Role {
    /// What the grid's steps follow from, on a scale of its own: logarithms, clipping, zero points.
    Scale,
    /// Steps of the grid themselves: positive numbers in the units of the weights.
    Step,
    /// Shifts of the grid, in the units of the weights.
    Shift,
    /// What chooses the integers: division factors.
    Rounding,
    /// The latent weight itself.
    Weight,
    /// Levels of a binary-coding grid.
    Levels,
    /// Steps and zero points of activation quantizers.
    Activation,
}

/// Rate of activation quantizers unless a recipe says otherwise (the FlexRound command lines').
pub const ACTIVATION_RATE: f64 = 4e-5;

/// Base learning rates, one per role. In a recipe a single number, or
/// `{ scale = ..., rounding = ..., weight = ..., levels = ..., activation = ... }`; a role that the
/// table leaves out does not learn. A single number drives all of them, but activations at no more
/// than [`ACTIVATION_RATE`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LearningRate {
    /// Of the steps of the grid.
    pub scale: f64,
    /// Of what chooses the integers.
    pub rounding: f64,
    /// Of latent weights.
    pub weight: f64,
    /// Of the levels of binary-coding grids.
    pub levels: f64,
    /// Of activation quantizers.
    pub activation: f64,
}

impl LearningRate {
    /// The same rate for every role, but at most [`ACTIVATION_RATE`] for activations.
    pub fn uniform(rate: f64) -> Self {
        let activation = rate.min(ACTIVATION_RATE);
        Self { scale: rate, rounding: rate, weight: rate, levels: rate, activation }
    }

    /// The rate of a role.
    pub fn of(&self, role: Role) -> f64 {
        match role {
            Role::Scale | Role::Step | Role::Shift => self.scale,
            Role::Rounding => self.rounding,
            Role::Weight => self.weight,
            Role::Levels => self.levels,
            Role::Activation => self.activation,
        }
    }
}

schema_of!(
    LearningRate,
    "A number for everything that learns (activations at no more than 4e-5), or a table with a rate for each role; \
     a role that the table leaves out does not learn.",
    {
        "oneOf": [
            { "type": "number", "minimum": 0 },
            {
                "type": "object",
                "additionalProperties": false,
                "properties": {
                    "scale": { "type": "number", "minimum": 0, "description": "Of the steps of the grid." },
                    "rounding": {
                        "type": "number", "minimum": 0, "description": "Of what chooses the integers."
                    },
                    "weight": { "type": "number", "minimum": 0, "description": "Of latent weights." },
                    "levels": {
                        "type": "number", "minimum": 0, "description": "Of the levels of binary-coding grids."
                    },
                    "activation": {
                        "type": "number", "minimum": 0, "description": "Of activation quantizers."
                    }
                }
            }
        ]
    }
);

impl<'de> Deserialize<'de> for LearningRate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct PerRole {
            scale: Option<f64>,
            rounding: Option<f64>,
            weight: Option<f64>,
            levels: Option<f64>,
            activation: Option<f64>,
        }
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = LearningRate;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or a table with scale, rounding, weight, levels, activation")
            }

            fn visit_f64<E: de::Error>(self, rate: f64) -> Result<LearningRate, E> {
                if rate.is_finite() && rate >= 0.0 {
                    Ok(LearningRate::uniform(rate))
                } else {
                    Err(E::custom(format!("learning_rate = {rate} is not a rate")))
                }
            }

            fn visit_i64<E: de::Error>(self, rate: i64) -> Result<LearningRate, E> {
                self.visit_f64(rate as f64)
            }

            fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<LearningRate, A::Error> {
                let rates = PerRole::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let check = |rate: Option<f64>| match rate.unwrap_or(0.0) {
                    rate if rate.is_finite() && rate >= 0.0 => Ok(rate),
                    rate => Err(de::Error::custom(format!("learning_rate {rate} is not a rate"))),
                };
                Ok(LearningRate {
                    scale: check(rates.scale)?,
                    rounding: check(rates.rounding)?,
                    weight: check(rates.weight)?,
                    levels: check(rates.levels)?,
                    activation: check(rates.activation)?,
                })
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What a learning rate is measured in, for latent weights, steps and shifts of a grid. Everything
/// else that methods learn has a scale of its own, whatever the size of the weights.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RateUnit {
    /// The units of the weights: what papers state. Weights of a small model are ten to a hundred
    /// times those of a large one, and a rate fits one of them.
    #[default]
    Absolute,
    /// The grid: a latent weight moves by parts of the distance between two levels of its group, a
    /// step by parts of itself. One rate then means the same on every model.
    Grid,
}

/// How the rate moves over the steps.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ScheduleConfig {
    /// No change.
    Constant {},
    /// Half a cosine from 1 down to `final_ratio` over all steps.
    Cosine {
        /// What is left of the rate at the end.
        #[serde(default)]
        final_ratio: f64,
        /// Steps of linear warm-up before it. Absent: none, or with rates relative to the grid a
        /// twentieth of the steps, at least 50 but no more than a fifth.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        warmup: Option<u64>,
    },
    /// A straight line from 1 down to `final_ratio` over all steps.
    Linear {
        /// What is left of the rate at the end.
        #[serde(default)]
        final_ratio: f64,
        /// Steps of linear warm-up before it. Absent: none, or with rates relative to the grid a
        /// twentieth of the steps.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        warmup: Option<u64>,
    },
}

impl Default for ScheduleConfig {
    fn default() -> Self {
        Self::Cosine { final_ratio: 0.0, warmup: None }
    }
}

/// The least warm-up where rates are relative to the grid. AdamW's first steps have full length in
/// every weight, whatever the noise in the gradient: on a model of 30 blocks ten of them undo what a
/// stage before has fitted.
const WARM_UP: u64 = 50;

impl ScheduleConfig {
    /// With its warm-up decided, for a training of `steps` with rates in `unit`.
    #[must_use]
    pub fn resolved(&self, unit: RateUnit, steps: u64) -> Self {
        let mut schedule = self.clone();
        if let Self::Cosine { warmup, .. } | Self::Linear { warmup, .. } = &mut schedule {
            let default = match unit {
                RateUnit::Grid => (steps / 20).max(WARM_UP).min(steps / 5),
                RateUnit::Absolute => 0,
            };
            *warmup = Some(warmup.unwrap_or(default));
        }
        schedule
    }

    /// The factor on the base rate at `step` of `steps` (the first step is 0). The cosine is
    /// PyTorch's `CosineAnnealingLR` with `T_max = steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        let (final_ratio, warmup, cosine) = match *self {
            Self::Constant {} => return 1.0,
            Self::Cosine { final_ratio, warmup } => (final_ratio, warmup.unwrap_or(0), true),
            Self::Linear { final_ratio, warmup } => (final_ratio, warmup.unwrap_or(0), false),
        };
        if step < warmup {
            return (step + 1) as f64 / (warmup + 1) as f64;
        }
        let done = (step - warmup) as f64 / (steps.saturating_sub(warmup).max(1)) as f64;
        let left = if cosine {
            f64::midpoint(1.0, (std::f64::consts::PI * done).cos())
        } else {
            1.0 - done
        };
        final_ratio + (1.0 - final_ratio) * left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_runs_from_one_to_the_final_ratio() {
        let cosine = ScheduleConfig::Cosine { final_ratio: 0.05, warmup: None };
        assert!((cosine.factor(0, 100) - 1.0).abs() < 1e-12);
        assert!((cosine.factor(50, 100) - 0.525).abs() < 1e-12);
        assert!((cosine.factor(100, 100) - 0.05).abs() < 1e-12);
    }

    #[test]
    fn warm_up_is_linear_and_joins_the_curve() {
        let linear = ScheduleConfig::Linear { final_ratio: 0.0, warmup: Some(3) };
        let rates: Vec<f64> = (0..7).map(|step| linear.factor(step, 7)).collect();
        assert_eq!(rates, [0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]);
    }

    #[test]
    fn rates_relative_to_the_grid_warm_up() {
        let cosine = ScheduleConfig::default();
        for (steps, warm_up) in [(4, 0), (100, 20), (600, 50), (20_000, 1000)] {
            let relative = cosine.resolved(RateUnit::Grid, steps);
            let expected = ScheduleConfig::Cosine { final_ratio: 0.0, warmup: Some(warm_up) };
            assert_eq!(relative, expected);
        }
        assert!(cosine.resolved(RateUnit::Absolute, 100).factor(0, 100) > 0.999);
        let none = ScheduleConfig::Cosine { final_ratio: 0.0, warmup: Some(0) };
        assert_eq!(none.resolved(RateUnit::Grid, 100), none);
    }

    #[test]
    fn rates_are_a_number_or_a_table() {
        #[derive(Deserialize)]
        struct T {
            learning_rate: LearningRate,
        }
        let rate = |text: &str| toml::from_str::<T>(text).map(|t| t.learning_rate);
        assert_eq!(rate("learning_rate = 1").unwrap(), LearningRate::uniform(1.0));
        let table = rate("learning_rate = { scale = 1e-4, rounding = 3e-3 }").unwrap();
        assert_eq!((table.scale, table.rounding, table.weight), (1e-4, 3e-3, 0.0));
        assert!(rate("learning_rate = -1.0").is_err());
        assert!(rate("learning_rate = { scala = 1.0 }").is_err());
    }
}
