//! What happens in a run, as stages tell it.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::error::Told;

/// Something that happened in a run.
///
/// Stages, blocks and their like count from zero here, as in tensor names and recipe paths; the
/// screen counts them from one. A number that is not finite becomes `null` in JSON.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The stages to come, in one line of text.
    Plan {
        /// `dense → reconstruct(flexround, w4) → …`
        text: String,
    },
    /// The model that is being worked on.
    Model {
        /// Name of the folder or hub id.
        name: String,
        /// Decoder blocks.
        blocks: usize,
        /// Linear layers that get quantized.
        quantized: usize,
        /// Layers that stay as they are, by short name.
        kept: Vec<String>,
    },
    /// What the preflight expects the run to need.
    Needs {
        /// The device, e.g. `cuda:0`.
        device: String,
        /// Memory on the device in bytes, if it has its own.
        device_bytes: Option<u64>,
        /// Main memory in bytes.
        host_bytes: u64,
        /// Disk space in bytes.
        disk_bytes: u64,
        /// Estimated time in seconds.
        seconds: f64,
    },
    /// A state is about to be written from which a run may go on. What is reported behind this line is
    /// not part of that state.
    Saved {
        /// The state's name, e.g. `01-distill/state-000004`.
        mark: String,
    },
    /// An unfinished run goes on. What an attempt that was cut off reported behind the mark is dropped,
    /// for it comes again.
    Resumed {
        /// The stage's name.
        stage: String,
        /// Where in the stage, e.g. `step 1200/2000`.
        position: String,
        /// The state that it goes on from; empty where nothing is dropped.
        mark: String,
    },
    /// A stage begins.
    StageStart {
        /// Index of the stage, from zero.
        stage: usize,
        /// Number of stages.
        of: usize,
        /// The stage's name, e.g. `distill`.
        name: String,
    },
    /// A stage is complete.
    StageEnd {
        /// Index of the stage, from zero.
        stage: usize,
        /// Number of stages.
        of: usize,
        /// The stage's name.
        name: String,
        /// Wall-clock time in seconds.
        seconds: f64,
    },
    /// A decoder block is finished: tags `block/mse_before`, `block/mse_after`, by block.
    Block {
        /// Index of the stage, from zero.
        stage: usize,
        /// Index of the block, from zero.
        index: usize,
        /// Number of blocks.
        of: usize,
        /// What was done to it, e.g. `reconstruct`.
        verb: String,
        /// Output error before the work.
        mse_before: f64,
        /// Output error after the work.
        mse_after: f64,
        /// Optimizer steps spent.
        steps: u64,
        /// Wall-clock time in seconds.
        seconds: f64,
        /// Peak memory in GiB, where the system tells.
        memory_gib: Option<f64>,
    },
    /// A log point of training.
    Step {
        /// Index of the stage, from zero.
        stage: usize,
        /// What is being done, e.g. `distill`.
        verb: String,
        /// Steps done in this stage.
        step: u64,
        /// Steps of this stage.
        of: u64,
        /// Steps done in the whole run.
        global_step: u64,
        /// TensorBoard tag and value, e.g. `train/loss`; on the screen in this order.
        #[serde(serialize_with = "as_map")]
        values: Vec<(String, f64)>,
    },
    /// What a log point says beside its [`Event::Step`], not on the screen: how far the step moved what
    /// learns.
    Details {
        /// Index of the stage, from zero.
        stage: usize,
        /// Steps done in this stage.
        step: u64,
        /// Steps done in the whole run.
        global_step: u64,
        /// TensorBoard tag and value: `codes/flipped`, `codes/changed`, `scales/changed`,
        /// `perf/seconds_left`.
        #[serde(serialize_with = "as_map")]
        values: Vec<(&'static str, f64)>,
        /// A number of each block: `grad_norm` and `update_norm`, tags `grad_norm/block_BB`.
        #[serde(serialize_with = "as_map")]
        blocks: Vec<(&'static str, Vec<f64>)>,
    },
    /// The model in training, measured on a few windows of the validation text: tags `eval/loss`,
    /// `eval/perplexity`, `eval/kl_forward`, `eval/top1_agreement`.
    Validation {
        /// Index of the stage, from zero.
        stage: usize,
        /// What is being done, e.g. `distill`.
        verb: String,
        /// Steps done in this stage.
        step: u64,
        /// Steps of this stage.
        of: u64,
        /// Steps done in the whole run.
        global_step: u64,
        /// Perplexity per token.
        perplexity: f64,
        /// Mean negative log likelihood per token, in nats.
        nll_per_token: f64,
        /// `KL(teacher‖student)` per token in nats, where there is a teacher.
        #[serde(skip_serializing_if = "Option::is_none")]
        kl_forward: Option<f64>,
        /// Share of tokens on which both find the same token likeliest.
        #[serde(skip_serializing_if = "Option::is_none")]
        top1_agreement: Option<f64>,
        /// Tokens predicted.
        tokens: u64,
        /// Whether no state so far was better.
        best: bool,
    },
    /// A training failed and goes on from an earlier state at a smaller rate.
    Retry {
        /// Index of the stage, from zero.
        stage: usize,
        /// What is being done, e.g. `distill`.
        verb: String,
        /// Steps that were done in this stage.
        step: u64,
        /// The step it goes on from.
        back_to: u64,
        /// That step of the whole run.
        global_step: u64,
        /// What failed: one sentence without a full stop.
        reason: String,
        /// The factor of the recipe's learning rate from there on.
        rate_factor: f64,
        /// How many times this stage has gone back, this time included.
        attempt: u64,
        /// How many times it may.
        of: u64,
    },
    /// The quality gate's measurement behind a training stage or before an export.
    Gate {
        /// Index of the stage, from zero.
        stage: usize,
        /// Which model: `after distill`.
        what: String,
        /// Its perplexity on a few windows of the validation text.
        perplexity: f64,
        /// The perplexity at the stage's start, if measured.
        start: Option<f64>,
        /// The perplexity of plain rounding at the same bits, if measured.
        rtn: Option<f64>,
        /// Tokens predicted.
        tokens: u64,
        /// Whether it is not worse than those.
        passed: bool,
    },
    /// One point of the loss curve inside a block: tag `block/BB/loss`.
    BlockLoss {
        /// Index of the stage, from zero.
        stage: usize,
        /// Index of the block, from zero.
        block: usize,
        /// Optimizer step inside the block.
        step: u64,
        /// The loss.
        loss: f64,
    },
    /// Moves the bar; written nowhere.
    Progress {
        /// What is being done.
        verb: String,
        /// Units done.
        done: u64,
        /// Units in all.
        of: u64,
        /// A few words beside the bar.
        detail: String,
    },
    /// A model was evaluated.
    Evaluation {
        /// Index of the stage, from zero.
        stage: usize,
        /// Which model: `float`, `rtn w2`, `after reconstruct`.
        what: String,
        /// The task's name, e.g. `ppl`.
        task: String,
        /// What it found, the number that models are compared by first.
        #[serde(flatten, serialize_with = "by_name")]
        numbers: Vec<Number>,
        /// Tokens that counted.
        tokens: u64,
        /// The task's protocol.
        #[serde(flatten)]
        protocol: Map<String, Value>,
        /// What of it has to stand beside the number, in words and in fewer.
        #[serde(skip)]
        marks: Vec<[String; 2]>,
        /// Whether a BOS token opens each document.
        bos: bool,
        /// The text it was measured on.
        data: String,
        /// The first number divided by the float model's.
        ratio_to_float: Option<f64>,
        /// Steps done in the whole run.
        global_step: u64,
        /// Whether this is the model in training: only then `eval/*` gets a point.
        track: bool,
    },
    /// A histogram, for TensorBoard and JSON. Tags: `codes/…`, `scale_change/…`.
    Histogram {
        /// Index of the stage, from zero.
        stage: usize,
        /// TensorBoard tag.
        tag: String,
        /// Steps done in this stage.
        step: u64,
        /// Steps done in the whole run.
        global_step: u64,
        /// Bucket edges, ascending: one more than `counts`.
        edges: Vec<f64>,
        /// Entries in each bucket.
        counts: Vec<u64>,
    },
    /// A text for TensorBoard, shown as it is (not as Markdown). Tag of the recipe: `recipe`.
    Text {
        /// TensorBoard tag.
        tag: String,
        /// The text.
        text: String,
    },
    /// What a run is compared with others by, for TensorBoard's HParams.
    Settings {
        /// Names, the same ones in every run, and values.
        settings: Vec<(String, Setting)>,
    },
    /// A packed model was written.
    Exported {
        /// Name of the format, e.g. `gguf`.
        format: String,
        /// Folder or file.
        path: String,
        /// Size in bytes.
        bytes: u64,
        /// Mean over the quantized weights, scales included.
        bits_per_weight: f64,
        /// Of the files of weights, per parameter of the whole model.
        bits_per_parameter: f64,
        /// Result of the parity check, e.g. `codes exact`.
        parity: String,
        /// Wall-clock time in seconds.
        seconds: f64,
    },
    /// Something worth knowing.
    Note {
        /// One sentence without a full stop.
        text: String,
    },
    /// Something the user may want to act on.
    Warning {
        /// One sentence without a full stop.
        text: String,
    },
    /// The run ended by an error.
    Failed {
        /// The error.
        #[serde(flatten)]
        told: Told,
        /// Wall-clock time in seconds, over all attempts.
        seconds: f64,
    },
    /// The run is complete.
    Done {
        /// The run's folder.
        run: String,
        /// Perplexity of the float model, if measured.
        perplexity_float: Option<f64>,
        /// Perplexity of the result, if measured.
        perplexity_final: Option<f64>,
        /// Tokens of the validation text that both were measured on, where no evaluation measured the
        /// result.
        #[serde(skip_serializing_if = "Option::is_none")]
        slice_tokens: Option<u64>,
        /// Size of the export in bytes, if there is one.
        bytes: Option<u64>,
        /// Bits per quantized weight of the export, if there is one.
        bits_per_weight: Option<f64>,
        /// Whether every export holds exactly what was trained; shown only with `bytes`.
        codes_exact: bool,
        /// Wall-clock time in seconds.
        seconds: f64,
    },
}

/// The value of a setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Setting {
    /// A number; none where a run does not have it.
    Number(Option<f64>),
    /// A word or two; empty where a run does not have it.
    Text(String),
}

/// A number that an evaluation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Number {
    /// Its name.
    pub name: String,
    /// TensorBoard tag.
    pub tag: String,
    /// Its value.
    pub value: f64,
}

/// Pairs as one JSON object, so that a script can ask for `values["train/loss"]`.
fn as_map<S: Serializer, K: Serialize, V: Serialize>(
    pairs: &[(K, V)],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(pairs.len()))?;
    for (tag, value) in pairs {
        map.serialize_entry(tag, value)?;
    }
    map.end()
}

/// Numbers as fields, and the tags that they go under.
fn by_name<S: Serializer>(numbers: &[Number], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(numbers.len() + 1))?;
    for number in numbers {
        map.serialize_entry(&number.name, &number.value)?;
    }
    let tags: BTreeMap<&str, &str> =
        numbers.iter().map(|number| (number.name.as_str(), number.tag.as_str())).collect();
    map.serialize_entry("tags", &tags)?;
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_tagged_and_values_are_an_object() {
        let event = Event::Step {
            stage: 1,
            verb: "distill".into(),
            step: 10,
            of: 20,
            global_step: 110,
            values: vec![("train/loss".into(), 2.5), ("train/grad_norm".into(), f64::NAN)],
        };
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"event":"step","stage":1,"verb":"distill","step":10,"of":20,"global_step":110,"#
                .to_owned()
                + r#""values":{"train/loss":2.5,"train/grad_norm":null}}"#
        );
    }
}
