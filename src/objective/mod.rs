//! Training objectives: what a recipe may name under `objective`.

use burn::tensor::{Int, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::ops::{self, Comparison, Divergence, LossValue};

/// `objective.NAME = { ... }`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
    /// Confidence-aware KL (BitDistiller): forward and reverse KL mixed by how sure the teacher is.
    Cakld(CakldObjective),
    /// Next-token cross-entropy; no teacher.
    CrossEntropy(CrossEntropyObjective),
    /// A weighted sum of objectives on logits.
    Sum(Vec<Term>),
}

/// One term of `objective.sum`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Term {
    /// Its factor, positive.
    pub weight: f64,
    /// What is weighted.
    pub objective: ObjectiveConfig,
}

/// How the squared error is reduced.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduction {
    /// Summed over the sequence, mean over batch and features (the FlexRound code's).
    #[default]
    SequenceSum,
    /// Mean over everything.
    Mean,
}

/// Keys of `objective.mse`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MseObjective {
    /// `"sequence_sum"` or `"mean"`. Adam hardly sees the difference; reports are always means.
    pub reduction: Reduction,
    /// Add the error to the float block's output on the *quantized* stream (OmniQuant's
    /// augmented loss).
    pub augmented: bool,
}

/// Keys of `objective.jsd`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct JsdObjective {
    /// Weight of the teacher in the mixture, strictly between 0 and 1; UPQ's 0.5.
    pub beta: f64,
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position. Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
}

impl Default for JsdObjective {
    fn default() -> Self {
        Self { beta: 0.5, temperature: 1.0, top_k: None }
    }
}

/// Keys of `objective.kl_forward` and `objective.kl_reverse`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlObjective {
    /// Temperature of both distributions.
    pub temperature: f64,
    /// Keep only the teacher's so many most likely tokens, at each position; `kl_forward` alone.
    /// Absent: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_k: Option<usize>,
}

impl Default for KlObjective {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: None }
    }
}

/// Keys of `objective.cakld`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
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
}

impl Default for CakldObjective {
    fn default() -> Self {
        Self { gamma: None, estimate_batches: 10, temperature: 1.0 }
    }
}

/// Keys of `objective.cross_entropy`: none.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
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
            Self::Jsd(_) | Self::KlForward(_) | Self::KlReverse(_) | Self::Cakld(_) => true,
            Self::Sum(terms) => terms.iter().any(|term| term.objective.needs_teacher()),
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
            Self::KlReverse(KlObjective { top_k: Some(_), .. }) => {
                return Err(Error::usage(
                    "objective.kl_reverse is infinite where top_k drops tokens",
                )
                .fix("objective.kl_forward or objective.jsd, or no top_k"));
            }
            Self::Jsd(JsdObjective { top_k: Some(0), .. })
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
        let (divergence, temperature, top_k) = match self {
            Self::Jsd(jsd) => (Divergence::Jsd { beta: jsd.beta }, jsd.temperature, jsd.top_k),
            Self::KlForward(kl) => (Divergence::KlForward, kl.temperature, kl.top_k),
            Self::KlReverse(kl) => (Divergence::KlReverse, kl.temperature, None),
            Self::Cakld(cakld) => {
                let gamma = cakld
                    .gamma
                    .ok_or_else(|| Error::failed("the teacher's confidence was not measured"))?;
                (Divergence::Cakld { gamma }, cakld.temperature, None)
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
        let comparison = Comparison { divergence, temperature, top_k };
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
