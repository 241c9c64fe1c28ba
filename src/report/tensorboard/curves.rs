//! What TensorBoard shows of an event: from a line of `metrics.jsonl` to records.

use std::collections::BTreeMap;

use serde_json::Value as Json;

use super::events::{Dim, Histogram, Record, Value};
use super::hparams::{self, Ending, RESULTS};
use super::layout::layout;

/// A record, and the folder below `tensorboard/` whose axis it is on: empty for the run as a whole.
pub(super) type Point = (String, Record);

/// What TensorBoard shows of events in their JSON form.
///
/// A stage has a folder of its own, because a folder is what TensorBoard has axes for: its steps begin
/// at 0. In it, `blocks` is what is told block by block, which a filter of runs hides. What the stages'
/// folders have is in the run's own file, too, on one axis, but for validations and single blocks: a
/// program that reads a run need not know its stages.
pub(super) struct Curves {
    /// What every first file of the run as a whole begins with, and `metrics.jsonl` does not have.
    pub front: Vec<Record>,
    /// Names of the stages so far.
    names: BTreeMap<u64, String>,
    /// The stage that was last heard of.
    stage: u64,
    /// The last step of the last training so far.
    trained: u64,
    /// How many blocks each stage that goes block by block has.
    blocks: BTreeMap<u64, u64>,
    /// What the run as a whole was told of them: steps of another kind, which no training takes back.
    of_blocks: Vec<Record>,
    /// Stage, KL and agreement of the validation that stands for the result.
    closeness: Option<(u64, [Json; 2])>,
}

impl Default for Curves {
    fn default() -> Self {
        Self::new(vec![Record::of(0, [layout()])])
    }
}

impl Curves {
    fn new(front: Vec<Record>) -> Self {
        let (names, blocks) = (BTreeMap::new(), BTreeMap::new());
        let of_blocks = Vec::new();
        Self { front, names, stage: 0, trained: 0, blocks, of_blocks, closeness: None }
    }

    /// For a story that is told from its start.
    pub(super) fn again(&mut self) {
        *self = Self::new(std::mem::take(&mut self.front));
    }

    /// What TensorBoard shows of an event, which may be nothing.
    pub(super) fn records(&mut self, event: &Json) -> Vec<Point> {
        let stage = event["stage"].as_u64().unwrap_or(self.stage);
        self.stage = stage;
        let number = |key: &str| event[key].as_u64().unwrap_or_default();
        let pairs = |pairs: &[(&str, &str)]| -> Vec<Value> {
            let of = |(tag, key): &(&str, &str)| Some(Value::scalar(tag, event[*key].as_f64()?));
            pairs.iter().filter_map(of).collect()
        };
        let mut run_step = event["global_step"].as_u64();
        let (step, values) = match event["event"].as_str().unwrap_or_default() {
            "stage_start" => {
                self.names.insert(stage, event["name"].as_str().unwrap_or_default().to_owned());
                return Vec::new();
            }
            "block" => {
                self.blocks.insert(stage, number("of"));
                let before: u64 = self.blocks.range(..stage).map(|(_, blocks)| blocks).sum();
                run_step = Some(before + number("index"));
                (
                    number("index"),
                    pairs(&[
                        ("block/mse_before", "mse_before"),
                        ("block/mse_after", "mse_after"),
                        ("perf/block_seconds", "seconds"),
                        ("memory/block_peak_gib", "memory_gib"),
                    ]),
                )
            }
            "block_loss" => {
                let tag = format!("block/{:02}/loss", number("block"));
                let values = pairs(&[(&tag, "loss")]);
                return told(&format!("{}/{BLOCKS}", self.folder()), number("step"), values);
            }
            "step" => {
                self.trained = number("step");
                (number("step"), scalars(&event["values"]).collect())
            }
            "details" => return self.details(event),
            "evaluation" if event["track"] == true => {
                let tags = event["tags"].as_object().into_iter().flatten();
                let tags = tags.filter_map(|(name, tag)| Some((tag.as_str()?, name.as_str())));
                // Where the training before it ended.
                (self.trained, pairs(&tags.collect::<Vec<_>>()))
            }
            "validation" => {
                self.note_closeness(event);
                // Of another text than the evaluations', whose tags they share.
                run_step = None;
                (
                    number("step"),
                    pairs(&[
                        ("eval/perplexity", "perplexity"),
                        ("eval/loss", "nll_per_token"),
                        ("eval/kl_forward", "kl_forward"),
                        ("eval/top1_agreement", "top1_agreement"),
                    ]),
                )
            }
            "retry" => {
                let (folder, step) = (self.folder(), number("back_to") + 1);
                let blocks = format!("{folder}/{BLOCKS}");
                let restarts =
                    [(folder, step), (blocks, step), (String::new(), number("global_step") + 1)];
                let restarts = restarts.map(|(folder, step)| (folder, Record::restart(step)));
                let of_blocks = self.of_blocks.iter().cloned();
                let again =
                    of_blocks.filter(|record| record.step > number("global_step").cast_signed());
                return restarts
                    .into_iter()
                    .chain(again.map(|record| (String::new(), record)))
                    .collect();
            }
            "histogram" => {
                let step = event["step"].as_u64().unwrap_or(self.trained);
                (step, histogram(event).into_iter().collect())
            }
            "done" => return told("", 0, self.results(event)),
            "failed" => return told("", 0, vec![hparams::end(Ending::Failed)]),
            _ => return Vec::new(),
        };
        let mut points = run_step.map_or_else(Vec::new, |step| told("", step, values.clone()));
        if event["event"] == "block" {
            self.of_blocks.extend(points.iter().map(|(_, record)| record.clone()));
        }
        points.extend(told(&self.folder(), step, values));
        points
    }

    /// The present stage's folder, named as that of its checkpoints.
    fn folder(&self) -> String {
        let name = self.names.get(&self.stage).map_or("stage", String::as_str);
        format!("{:02}-{name}", self.stage)
    }

    /// Numbers of a log point beside those of its step: of the model, and of each block.
    fn details(&self, event: &Json) -> Vec<Point> {
        let (folder, step) = (self.folder(), event["step"].as_u64().unwrap_or_default());
        let mut points = told(&folder, step, scalars(&event["values"]).collect());
        let lists = event["blocks"].as_object().into_iter().flatten();
        let blocks = lists.flat_map(|(group, list)| {
            let list = list.as_array().into_iter().flatten().enumerate();
            list.map(move |(block, value)| {
                let value = value.as_f64().unwrap_or(f64::NAN);
                Value::scalar(&format!("{group}/block_{block:02}"), value)
            })
        });
        points.extend(told(&format!("{folder}/{BLOCKS}"), step, blocks.collect()));
        points
    }

    /// Of a stage's validations the last one that was its best counts.
    fn note_closeness(&mut self, event: &Json) {
        let known = self.closeness.as_ref().is_some_and(|(stage, _)| *stage == self.stage);
        if event["best"] == true || !known {
            let numbers = ["kl_forward", "top1_agreement"].map(|key| event[key].clone());
            self.closeness = Some((self.stage, numbers));
        }
    }

    /// The numbers that a run is judged by, and that it is complete.
    fn results(&self, event: &Json) -> Vec<Value> {
        let number = |key: &str| event[key].as_f64();
        let perplexity = number("perplexity_final");
        let [kl, top1] = self
            .closeness
            .as_ref()
            .map_or([None; 2], |(_, numbers)| numbers.each_ref().map(Json::as_f64));
        let numbers = [
            perplexity,
            perplexity.zip(number("perplexity_float")).map(|(after, float)| after / float),
            kl,
            top1,
            number("bits_per_weight"),
            number("bytes").map(|bytes| bytes / 1e9),
            number("seconds"),
        ];
        let known = RESULTS.iter().zip(numbers);
        let known = known.filter_map(|((tag, ..), value)| Some(Value::scalar(tag, value?)));
        known.chain([hparams::end(Ending::Complete)]).collect()
    }
}

/// Values at a step on the axis of a folder, if there are any.
fn told(folder: &str, step: u64, values: Vec<Value>) -> Vec<Point> {
    if values.is_empty() {
        return Vec::new();
    }
    vec![(folder.to_owned(), Record::of(step, values))]
}

/// The folder in a stage's of what is told block by block.
const BLOCKS: &str = "blocks";

/// Tags with their values.
fn scalars(values: &Json) -> impl Iterator<Item = Value> {
    let values = values.as_object().into_iter().flatten();
    values.map(|(tag, value)| Value::scalar(tag, value.as_f64().unwrap_or(f64::NAN)))
}

/// Sums are taken at the middle of each bucket. Nothing for edges and counts that do not match.
fn histogram(event: &Json) -> Option<Value> {
    let tag = event["tag"].as_str().unwrap_or_default();
    let numbers = |key: &str| -> Vec<f64> {
        event[key].as_array().into_iter().flatten().filter_map(Json::as_f64).collect()
    };
    let (edges, buckets) = (numbers("edges"), numbers("counts"));
    let (&first, &last) = (edges.first()?, edges.last()?);
    if buckets.is_empty() || edges.len() != buckets.len() + 1 {
        let (edges, counts) = (edges.len(), buckets.len());
        tracing::warn!("histogram {tag} has {edges} edges for {counts} counts; it is left out");
        return None;
    }
    let middles = edges.windows(2).map(|pair| f64::midpoint(pair[0], pair[1]));
    let (sum, squares) = middles
        .zip(&buckets)
        .fold((0.0, 0.0), |(sum, squares), (x, count)| (sum + x * count, squares + x * x * count));
    let histogram = Histogram {
        min: first,
        max: last,
        num: buckets.iter().sum(),
        sum,
        sum_squares: squares,
        bucket_limit: edges[1..].to_vec(),
        bucket: buckets,
    };
    Some(Value::histogram(tag, histogram))
}

/// A text. TensorBoard reads it as Markdown; four spaces make each line a line of code.
pub(super) fn text(tag: &str, text: &str) -> Value {
    let mut code = String::new();
    for line in text.lines() {
        code.push_str("    ");
        code.push_str(line);
        code.push('\n');
    }
    Value::strings(tag, "text", vec![Dim { size: 1 }], vec![code.into_bytes()])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::tensorboard::events::{Shown, What};
    use crate::report::{Event, Number};

    /// Folder, step and tags of each record.
    fn shown(points: Vec<Point>) -> Vec<(String, i64, Vec<String>)> {
        let tags = |what: Option<What>| match what {
            Some(What::Summary(summary)) => summary.value.into_iter().map(|v| v.tag).collect(),
            _ => vec!["restart".to_owned()],
        };
        let of = |(folder, record): Point| (folder, record.step, tags(record.what));
        points.into_iter().map(of).collect()
    }

    fn at(folder: &str, step: i64, tags: &[&str]) -> (String, i64, Vec<String>) {
        (folder.to_owned(), step, tags.iter().map(|&tag| tag.to_owned()).collect())
    }

    /// What is shown of the last of these events.
    fn last(events: &[Json]) -> Vec<(String, i64, Vec<String>)> {
        let mut curves = Curves::default();
        let mut points = Vec::new();
        for event in events {
            points = curves.records(event);
        }
        shown(points)
    }

    fn start(stage: u64, name: &str) -> Json {
        json!({ "event": "stage_start", "stage": stage, "of": 9, "name": name })
    }

    #[test]
    fn a_stage_has_an_axis_of_its_own() {
        let step = json!({ "event": "step", "stage": 3, "step": 10, "global_step": 510,
                           "values": { "train/loss": 1.0 } });
        let events = [start(3, "distill"), step];
        let expected = [("", 510), ("03-distill", 10)];
        assert_eq!(last(&events), expected.map(|(folder, step)| at(folder, step, &["train/loss"])));
        let loss = json!({ "event": "block_loss", "stage": 1, "block": 3, "step": 7, "loss": 0.5 });
        let events = [start(1, "reconstruct"), loss];
        assert_eq!(last(&events), [at("01-reconstruct/blocks", 7, &["block/03/loss"])]);
        // Of a file without stages.
        let loss = json!({ "event": "block_loss", "stage": 2, "block": 103, "step": 7, "loss": 1 });
        assert_eq!(last(&[loss]), [at("02-stage/blocks", 7, &["block/103/loss"])]);
    }

    #[test]
    fn details_are_of_the_model_and_of_its_blocks() {
        let details = json!({ "event": "details", "stage": 0, "step": 4, "global_step": 4,
                              "values": { "codes/flipped": 0.1 },
                              "blocks": { "grad_norm": [1.0, 2.0] } });
        let blocks = at("00-distill/blocks", 4, &["grad_norm/block_00", "grad_norm/block_01"]);
        let expected = [at("00-distill", 4, &["codes/flipped"]), blocks];
        assert_eq!(last(&[start(0, "distill"), details]), expected);
    }

    #[test]
    fn only_the_trained_model_is_tracked_and_where_its_training_ended() {
        let evaluation = |track| Event::Evaluation {
            stage: 1,
            what: "float".into(),
            task: "ppl".into(),
            numbers: ["eval/perplexity", "eval/loss"]
                .map(|tag| Number { name: tag.into(), tag: tag.into(), value: 2.0 })
                .into(),
            tokens: 1,
            protocol: serde_json::Map::new(),
            marks: Vec::new(),
            bos: true,
            data: String::new(),
            ratio_to_float: None,
            global_step: 0,
            track,
        };
        let step = json!({ "event": "step", "stage": 0, "step": 60, "values": {} });
        let told = |track| {
            let mut evaluation = serde_json::to_value(evaluation(track)).unwrap();
            evaluation["global_step"] = json!(560);
            last(&[start(0, "distill"), step.clone(), start(1, "evaluate"), evaluation])
        };
        assert!(told(false).is_empty());
        let expected = [("", 560), ("01-evaluate", 60)];
        let tags = ["eval/loss", "eval/perplexity"];
        assert_eq!(told(true), expected.map(|(folder, step)| at(folder, step, &tags)));
    }

    #[test]
    fn a_run_ends_with_the_numbers_it_is_judged_by() {
        let validation = |best, kl| {
            json!({ "event": "validation", "stage": 0, "step": 1, "perplexity": 3.0,
                    "nll_per_token": 1.0, "kl_forward": kl, "best": best })
        };
        let done = json!({ "event": "done", "perplexity_float": 2.0, "perplexity_final": 3.0,
                           "bytes": null, "bits_per_weight": null, "seconds": 4.0 });
        let mut curves = Curves::default();
        for event in [validation(true, 0.25), validation(false, 0.5)] {
            curves.records(&event);
        }
        let points = curves.records(&done);
        let Some(What::Summary(summary)) = &points[0].1.what else { panic!() };
        let told = summary.value.iter().map(|value| match value.shown {
            Some(Shown::Scalar(number)) => (value.tag.as_str(), number),
            _ => (value.tag.as_str(), f32::NAN),
        });
        let told: Vec<_> = told.collect();
        let expected = [
            ("result/perplexity", 3.0),
            ("result/times_float", 1.5),
            ("result/kl_forward", 0.25),
            ("result/seconds", 4.0),
        ];
        assert_eq!(told[..4], expected);
        assert_eq!((told[4].0, told.len()), ("_hparams_/session_end_info", 5));
        assert_eq!(points[0].0, "");
    }

    #[test]
    fn a_training_that_goes_back_drops_what_comes_again() {
        let retry = json!({ "event": "retry", "stage": 0, "step": 9, "back_to": 4,
                            "global_step": 104 });
        let folders = [("00-finetune", 5), ("00-finetune/blocks", 5), ("", 105)];
        let expected = folders.map(|(folder, step)| at(folder, step, &["restart"]));
        assert_eq!(last(&[start(0, "finetune"), retry]), expected);
        // Blocks of a stage without steps stay in the file of the whole run.
        let block = |index| json!({ "event": "block", "stage": 0, "index": index, "of": 3, "mse_before": 2 });
        let retry = json!({ "event": "retry", "stage": 1, "step": 9, "back_to": 0,
                            "global_step": 0 });
        let events = [start(0, "calibrate"), block(0), block(1), start(1, "distill"), retry];
        let told = last(&events);
        assert_eq!(told[2..], [at("", 1, &["restart"]), at("", 1, &["block/mse_before"])]);
    }

    #[test]
    fn the_run_as_a_whole_has_one_axis_without_validations_and_single_blocks() {
        let block = |stage| {
            json!({ "event": "block", "stage": stage, "index": 1, "of": 3, "mse_before": 2,
                    "mse_after": 1 })
        };
        let tags = ["block/mse_before", "block/mse_after"];
        let blocks = [start(1, "reconstruct"), block(1), start(2, "reconstruct"), block(2)];
        assert_eq!(last(&blocks[..2]), ["", "01-reconstruct"].map(|folder| at(folder, 1, &tags)));
        let expected = [("", 4), ("02-reconstruct", 1)];
        assert_eq!(last(&blocks), expected.map(|(folder, step)| at(folder, step, &tags)));
        let validation = json!({ "event": "validation", "stage": 3, "step": 5, "global_step": 105,
                                 "perplexity": 3.0 });
        let expected = [at("03-distill", 5, &["eval/perplexity"])];
        assert_eq!(last(&[start(3, "distill"), validation]), expected);
    }

    #[test]
    fn histogram_sums_and_mismatch() {
        let told = |edges: &[f64], counts: &[u64]| {
            histogram(&json!({ "tag": "codes/a", "edges": edges, "counts": counts }))
        };
        let value = told(&[-0.5, 0.5, 1.5], &[3, 5]).unwrap();
        let Some(Shown::Histogram(found)) = value.shown else { panic!() };
        assert_eq!((found.num, found.sum), (8.0, 5.0));
        assert_eq!((found.min, found.max), (-0.5, 1.5));
        assert_eq!(found.bucket_limit, [0.5, 1.5]);
        assert!(told(&[0.0, 1.0], &[3, 5]).is_none());
        assert!(told(&[], &[]).is_none());
    }
}
