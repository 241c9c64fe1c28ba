//! What stages find out and outlives them, in `run.json`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use serde_json::{Map, Value};

use crate::task::{Score, TaskConfig, recorded};

/// What a task measured, kept for reports and for the run's last line.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(from = "Recorded")]
pub struct Measured {
    /// Stage index.
    pub stage: usize,
    /// `float`, `rtn w2`, `after distill`, ...
    pub what: String,
    /// The numbers and their protocol.
    pub result: Score,
    /// The data's SHA-256.
    pub data_sha256: String,
    /// The protocol asked for.
    #[serde(with = "recorded")]
    pub task: TaskConfig,
}

/// [`Measured`] as it stands in `run.json`.
#[derive(Deserialize)]
struct Recorded {
    stage: usize,
    what: String,
    result: Map<String, Value>,
    data_sha256: String,
    #[serde(with = "recorded")]
    task: TaskConfig,
}

impl From<Recorded> for Measured {
    fn from(found: Recorded) -> Self {
        let Recorded { stage, what, result, data_sha256, task } = found;
        let result = Score::of_entries(task.task(), result);
        Self { stage, what, result, data_sha256, task }
    }
}

/// What was exported.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct ExportRecord {
    /// The format's name.
    pub format: String,
    /// The folder.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Bits per quantized weight.
    pub bits_per_weight: f64,
    /// Whether it computes something else than what was trained.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lossy: bool,
}

/// Results that outlive a stage; saved in `run.json`.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Results {
    /// Evaluations in order of measurement.
    pub measured: Vec<Measured>,
    /// Exports in order of writing.
    pub exports: Vec<ExportRecord>,
    /// How far the exported weights of each linear are from the float model's: the Euclidean norm of the
    /// difference over that of the weights.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub weight_errors: BTreeMap<String, f64>,
    /// Block errors per stage, `[before, after]` per block.
    pub block_mse: BTreeMap<usize, Vec<[f64; 2]>>,
    /// Numbers that learn, by stage, where it is a few of the model's.
    #[serde(default)]
    pub trainable: BTreeMap<usize, u64>,
    /// Models on a few windows of the validation text: starts, baselines, what stages left.
    #[serde(default)]
    pub quality: Vec<Quality>,
    /// Failures of trainings, and what was done.
    #[serde(default)]
    pub setbacks: Vec<Setback>,
    /// Whether it was said that there is no text for the quality gate.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unguarded: bool,
    /// Largest difference ever found between a folded and a fake-quantized weight: 0.
    pub fold_difference: f32,
}

impl Results {
    /// What the first `stages` stages found out.
    #[must_use]
    pub fn until(self, stages: usize) -> Self {
        let mut left = Self { exports: Vec::new(), weight_errors: BTreeMap::new(), ..self };
        left.measured.retain(|measured| measured.stage < stages);
        left.block_mse.retain(|stage, _| *stage < stages);
        left.trainable.retain(|stage, _| *stage < stages);
        left.quality.retain(|quality| quality.stage < stages);
        left.setbacks.retain(|setback| setback.stage < stages);
        left
    }
}

/// A failure of a training, and what was done about it; kept in `run.json`.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Setback {
    /// Index of the stage.
    pub stage: usize,
    /// Steps that were done.
    pub step: u64,
    /// What failed, a sentence with the numbers.
    pub reason: String,
    /// The step it went on from; absent where the run ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub back_to: Option<u64>,
    /// The factor of the recipe's learning rate from there on.
    pub rate_factor: f64,
}

/// A model measured on a few windows of the validation text; kept in `run.json`, so that nothing is
/// measured twice.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Quality {
    /// Index of the stage.
    pub stage: usize,
    /// `start`, `float`, `rtn w2`, `after distill`.
    pub what: String,
    /// Mean negative log-likelihood of a token, nats; absent where it is no number.
    pub nll_per_token: Option<f64>,
    /// Tokens that counted.
    pub tokens: u64,
    /// Windows.
    pub windows: usize,
    /// Tokens in a window.
    pub length: usize,
    /// SHA-256 of the text.
    pub data_sha256: String,
    /// SHA-256 of what the model was made by, where it may be asked for again.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub made_by: String,
}

impl Quality {
    /// Its perplexity; not a number where the model gave none.
    pub fn perplexity(&self) -> f64 {
        self.nll_per_token.map_or(f64::NAN, f64::exp)
    }

    /// Whether it was measured on the same windows as another.
    pub fn compares_with(&self, other: &Self) -> bool {
        let windows = |q: &Self| (q.length, q.windows, q.tokens);
        windows(self) == windows(other) && self.data_sha256 == other.data_sha256
    }
}
