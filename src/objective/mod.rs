//! Training objectives: what a recipe may name under `objective`.

use burn::tensor::{Int, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::{self, Comparison, Divergence, LossValue};

/// `objective.NAME = { ... }`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectiveConfig {
    /// Squared error of a block's output.
    Mse(MseObjective),
    /// Generalized Jensen–Shannon divergence to the teacher.
    Jsd(JsdObjective),
    /// `KL(teacher‖student)`.
    KlForward(KlObjective),
    /// `KL(student‖teacher)`.
    KlReverse(KlObjective),
    /// Forward KL where the student is far from its teacher, JSD where it is near.
    Adaptive(AdaptiveObjective),
    /// Confidence-aware KL (BitDistiller): forward and reverse KL mixed by how sure the teacher is.
    Cakld(CakldObjective),
    /// Next-token cross-entropy; no teacher.
    CrossEntropy(CrossEntropyObjective),
    /// A weighted sum of objectives on logits.
    Sum(Vec<Term>),
}

/// One term of `objective.sum`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// Its factor, positive.
    pub weight: f64,
    /// What is weighted.
    pub objective: ObjectiveConfig,
}

/// How the squared error is reduced.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Summed over the sequence, mean over batch and features (the FlexRound code's).
    #[default]
    SequenceSum,
    /// Mean over everything.
    Mean,
}

/// What the tokens of a squared error weigh.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TokenWeight {
    /// The same.
    #[default]
    Equal,
    /// The inverse mean square of the target.
    Relative,
}

/// Keys of `objective.mse`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MseObjective {
    /// `"sequence_sum"` or `"mean"`. Adam hardly sees the difference; reports are always means.
    pub reduction: Reduction,
    /// `"equal"`, or `"relative"`: each token's error counts relative to the mean square of the float
    /// block's output there. The next block's norm divides by just that; without it a few tokens
    /// with massive activations are all that counts.
    pub tokens: TokenWeight,
    /// Add the error to the float block's output on the *quantized* stream (OmniQuant's
    /// augmented loss).
    pub augmented: bool,
}

/// Keys of `objective.jsd`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct JsdObjective {
    /// Weight of the teacher in the mixture, strictly between 0 and 1; UPQ's 0.5.
    pub beta: f64,
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position. Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// With `top_k`: the other tokens count together as one more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tail: bool,
}

impl Default for JsdObjective {
    fn default() -> Self {
        Self { beta: 0.5, temperature: 1.0, top_k: None, tail: false }
    }
}

/// Keys of `objective.adaptive`: at each token `λ KL(teacher‖student) + (1-λ) 4 JSD`, with λ going from
/// 0 to 1 as the token's Jensen–Shannon divergence goes from `near` to `far`. The JSD is bounded by
/// ln 2 and flat there: where the student starts far away it gives no direction. Nearby both are the
/// same to second order.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdaptiveObjective {
    /// Below this part of ln 2 a token's objective is the JSD.
    pub near: f64,
    /// Above this part of ln 2 it is the forward KL.
    pub far: f64,
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position. Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// With `top_k`: the other tokens count together as one more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tail: bool,
}

impl Default for AdaptiveObjective {
    fn default() -> Self {
        Self { near: 0.1, far: 0.5, temperature: 1.0, top_k: None, tail: false }
    }
}

/// Keys of `objective.kl_forward` and `objective.kl_reverse`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlObjective {
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position; for `kl_reverse` with a
    /// tail alone. Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
    /// With `top_k`: the other tokens count together as one more.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub tail: bool,
}

impl Default for KlObjective {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None, tail: false }
    }
}

/// Keys of `objective.cakld`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct CakldObjective {
    /// Weight of the reverse, mode-seeking term, in 0..=1. Absent: the teacher's mean largest
    /// probability on the first batches, measured before training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gamma: Option<f64>,
    /// Batches that an absent `gamma` is measured on.
    pub estimate_batches: u64,
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position, and all others together
    /// as one more. Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
}

impl Default for CakldObjective {
    fn default() -> Self {
        Self { gamma: None, estimate_batches: 10, temperature: 1.0, top_k: None }
    }
}

/// Keys of `objective.cross_entropy`: none.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CrossEntropyObjective {}

/// What the student is compared with, one row per token.
pub struct Targets {
    /// The teacher's logits, `[tokens, vocab]`; absent for objectives without a teacher.
    pub teacher: Option<Tensor<2>>,
    /// The next token of each position, `[tokens, 1]`.
    pub next: Tensor<2, Int>,
    /// 1 where a next token exists and counts, else 0, `[tokens, 1]`, divided by their number.
    pub next_weights: Tensor<2>,
    /// 1 for every position that is distilled, else 0, `[tokens, 1]`, divided by their number.
    pub weights: Tensor<2>,
}

impl ObjectiveConfig {
    /// The name in recipes and reports.
    pub fn name(&self) -> String {
        match self {
            Self::Mse(_) => "mse".to_owned(),
            Self::Jsd(jsd) => format!("jsd {}", jsd.beta),
            Self::KlForward(_) => "kl_forward".to_owned(),
            Self::KlReverse(_) => "kl_reverse".to_owned(),
            Self::Adaptive(_) => "adaptive".to_owned(),
            Self::Cakld(_) => "cakld".to_owned(),
            Self::CrossEntropy(_) => "cross_entropy".to_owned(),
            Self::Sum(terms) => {
                let terms: Vec<String> = (terms.iter())
                    .map(|term| format!("{} {}", term.weight, term.objective.name()))
                    .collect();
                terms.join(" + ")
            }
        }
    }

    /// Whether a teacher's logits are needed.
    pub fn needs_teacher(&self) -> bool {
        match self {
            Self::Mse(_) | Self::CrossEntropy(_) => false,
            Self::Jsd(_)
            | Self::KlForward(_)
            | Self::KlReverse(_)
            | Self::Adaptive(_)
            | Self::Cakld(_) => true,
            Self::Sum(terms) => terms.iter().any(|term| term.objective.needs_teacher()),
        }
    }

    /// How many of a teacher's likeliest tokens, at which temperature, are all that this objective asks of it.
    ///
    /// # Errors
    /// A usage error where it asks for more.
    pub fn kept_of_teacher(&self) -> Result<(usize, f64)> {
        let whole = |name: &str, fix: &str| {
            let what = format!("objective.{name} compares with all that the teacher knows");
            Err(Error::usage(what).fix(fix))
        };
        let (name, top_k, temperature) = match self {
            Self::Jsd(jsd) => ("jsd", jsd.top_k, jsd.temperature),
            Self::KlForward(kl) => ("kl_forward", kl.top_k, kl.temperature),
            Self::KlReverse(kl) => ("kl_reverse", kl.top_k, kl.temperature),
            Self::Adaptive(adaptive) => ("adaptive", adaptive.top_k, adaptive.temperature),
            Self::Cakld(CakldObjective { gamma: None, .. }) => {
                return whole("cakld without gamma", "gamma = 0.7 and top_k = 64");
            }
            Self::Cakld(cakld) => ("cakld", cakld.top_k, cakld.temperature),
            Self::Sum(terms) => return kept_of_terms(terms),
            Self::Mse(_) | Self::CrossEntropy(_) => {
                let what = format!("objective.{} has no teacher to keep", self.name());
                return Err(Error::usage(what).fix("no teacher key, or objective.jsd = {}"));
            }
        };
        match top_k {
            Some(k) => Ok((k, temperature)),
            None => whole(name, "top_k = 64 and tail = true in the objective"),
        }
    }

    /// The most batches that a confidence has to be measured on before training; 0: none.
    pub fn confidence_batches(&self) -> u64 {
        match self {
            Self::Cakld(CakldObjective { gamma: None, estimate_batches, .. }) => *estimate_batches,
            Self::Sum(terms) => {
                terms.iter().map(|term| term.objective.confidence_batches()).max().unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// The objective with the teacher's confidence where it was left open.
    #[must_use]
    pub fn with_confidence(mut self, confidence: f64) -> Self {
        match &mut self {
            Self::Cakld(cakld) => cakld.gamma = Some(cakld.gamma.unwrap_or(confidence)),
            Self::Sum(terms) => {
                for term in terms {
                    term.objective = term.objective.clone().with_confidence(confidence);
                }
            }
            _ => {}
        }
        self
    }

    /// Refuses values outside their range.
    ///
    /// # Errors
    /// A usage error that names the key.
    pub fn check(&self) -> Result<()> {
        let temperature = match self {
            Self::Jsd(jsd) if !(jsd.beta > 0.0 && jsd.beta < 1.0) => {
                return Err(Error::usage(format!(
                    "objective.jsd.beta = {} is not strictly between 0 and 1",
                    jsd.beta
                ))
                .fix("beta = 0.5, or objective.kl_forward / objective.kl_reverse for the limits"));
            }
            Self::Cakld(cakld) if !(0.0..=1.0).contains(&cakld.gamma.unwrap_or(0.5)) => {
                let gamma = cakld.gamma.unwrap_or_default();
                return Err(Error::usage(format!(
                    "objective.cakld.gamma = {gamma} is not in 0..=1"
                ))
                .fix("gamma = 0.7, or no gamma: it is measured then"));
            }
            Self::Cakld(cakld) if cakld.estimate_batches == 0 => {
                return Err(Error::usage("estimate_batches = 0").fix("estimate_batches = 10"));
            }
            Self::KlReverse(KlObjective { top_k: Some(_), tail: false, .. }) => {
                return Err(Error::usage(
                    "objective.kl_reverse is infinite where top_k drops tokens",
                )
                .fix("tail = true beside it, or objective.kl_forward, or no top_k"));
            }
            Self::Adaptive(AdaptiveObjective { near, far, .. })
                if !(*near >= 0.0 && near < far && *far <= 1.0) =>
            {
                return Err(Error::usage(format!(
                    "objective.adaptive goes from near = {near} to far = {far}, which are no parts of \
                     ln 2 in that order"
                ))
                .fix("near = 0.1 and far = 0.5"));
            }
            Self::Jsd(JsdObjective { top_k: None, tail: true, .. })
            | Self::KlForward(KlObjective { top_k: None, tail: true, .. })
            | Self::KlReverse(KlObjective { top_k: None, tail: true, .. })
            | Self::Adaptive(AdaptiveObjective { top_k: None, tail: true, .. }) => {
                return Err(Error::usage("tail = true is about what top_k leaves out")
                    .fix("top_k = 64 beside it, or no tail"));
            }
            Self::Jsd(JsdObjective { top_k: Some(0), .. })
            | Self::Cakld(CakldObjective { top_k: Some(0), .. })
            | Self::Adaptive(AdaptiveObjective { top_k: Some(0), .. })
            | Self::KlReverse(KlObjective { top_k: Some(0), .. })
            | Self::KlForward(KlObjective { top_k: Some(0), .. }) => {
                return Err(
                    Error::usage("top_k = 0 leaves nothing to learn from").fix("top_k = 64")
                );
            }
            Self::Sum(terms) if terms.is_empty() => {
                return Err(Error::usage("objective.sum has no terms")
                    .fix("objective.sum = [{ weight = 1.0, objective.jsd = {} }]"));
            }
            Self::Sum(terms) => {
                for term in terms {
                    term.check()?;
                }
                1.0
            }
            Self::Jsd(jsd) => jsd.temperature,
            Self::KlForward(kl) | Self::KlReverse(kl) => kl.temperature,
            Self::Cakld(cakld) => cakld.temperature,
            Self::Adaptive(adaptive) => adaptive.temperature,
            Self::Mse(_) | Self::CrossEntropy(_) => 1.0,
        };
        if temperature > 0.0 && temperature.is_finite() {
            return Ok(());
        }
        Err(Error::usage(format!("temperature = {temperature} is not positive"))
            .fix("temperature = 1.0"))
    }

    /// Value and gradient of this objective on student logits.
    ///
    /// # Shapes
    /// - student: `[tokens, vocab]`, f32, not tracked
    ///
    /// # Errors
    /// A usage error when this is an objective for block outputs, or the teacher is missing.
    pub fn on_logits(&self, student: Tensor<2>, targets: &Targets) -> Result<LossValue> {
        let (divergence, temperature, top_k, tail) = match self {
            Self::Jsd(jsd) => {
                (Divergence::Jsd { beta: jsd.beta }, jsd.temperature, jsd.top_k, jsd.tail)
            }
            Self::KlForward(kl) => (Divergence::KlForward, kl.temperature, kl.top_k, kl.tail),
            Self::KlReverse(kl) => (Divergence::KlReverse, kl.temperature, kl.top_k, kl.tail),
            Self::Adaptive(AdaptiveObjective { near, far, temperature, top_k, tail }) => {
                let kind = Divergence::Adaptive { near: *near, far: *far };
                (kind, *temperature, *top_k, *tail)
            }
            Self::Cakld(cakld) => {
                let gamma = cakld
                    .gamma
                    .ok_or_else(|| Error::failed("the teacher's confidence was not measured"))?;
                (Divergence::Cakld { gamma }, cakld.temperature, cakld.top_k, true)
            }
            Self::Sum(terms) => return weighted_sum(terms, &student, targets),
            Self::CrossEntropy(_) => {
                let (next, weights) = (targets.next.clone(), targets.next_weights.clone());
                return Ok(ops::cross_entropy(student, next, weights));
            }
            Self::Mse(_) => {
                return Err(Error::usage("objective.mse compares block outputs, not logits")
                    .fix("objective.jsd = {}"));
            }
        };
        let teacher = targets
            .teacher
            .clone()
            .ok_or_else(|| Error::failed(format!("objective {} needs a teacher", self.name())))?;
        let comparison = Comparison { divergence, temperature, top_k, tail };
        Ok(ops::divergence(&comparison, student, teacher, targets.weights.clone()))
    }
}

impl Term {
    fn check(&self) -> Result<()> {
        if matches!(self.objective, ObjectiveConfig::Mse(_)) {
            return Err(Error::usage("objective.mse compares block outputs, not logits")
                .fix("objective.sum of jsd, kl_forward, kl_reverse, cakld, cross_entropy"));
        }
        if !(self.weight.is_finite() && self.weight > 0.0) {
            return Err(Error::usage(format!("weight = {} is not positive", self.weight))
                .fix("weight = 1.0"));
        }
        self.objective.check()
    }
}

/// As [`ObjectiveConfig::kept_of_teacher`], of a sum: the most that any of its terms asks for.
fn kept_of_terms(terms: &[Term]) -> Result<(usize, f64)> {
    let asking = terms.iter().filter(|term| term.objective.needs_teacher());
    let mut all: Option<(usize, f64)> = None;
    for term in asking {
        let (k, temperature) = term.objective.kept_of_teacher()?;
        all = match all {
            None => Some((k, temperature)),
            Some((most, same)) if same.to_bits() == temperature.to_bits() => {
                Some((most.max(k), same))
            }
            Some((_, other)) => {
                let what =
                    format!("objective.sum compares at temperatures {other} and {temperature}");
                return Err(Error::usage(what).fix("one temperature in all of its terms"));
            }
        };
    }
    all.ok_or_else(|| Error::usage("objective.sum has no teacher to keep").fix("no teacher key"))
}

fn weighted_sum(terms: &[Term], student: &Tensor<2>, targets: &Targets) -> Result<LossValue> {
    let mut sum: Option<LossValue> = None;
    for term in terms {
        let LossValue { value, gradient } = term.objective.on_logits(student.clone(), targets)?;
        let (value, gradient) = (value * term.weight, gradient * term.weight);
        sum = Some(match sum {
            None => LossValue { value, gradient },
            Some(sum) => LossValue { value: sum.value + value, gradient: sum.gradient + gradient },
        });
    }
    sum.ok_or_else(|| Error::usage("objective.sum has no terms"))
}
