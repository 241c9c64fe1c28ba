//! Questions with given answers as a user measures them: the harness' own answers on the same rows, the forms that rows
//! come in, recipes with several tasks, and refusals.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, datasets, events, few_stories};
use serde_json::{Value, json};

const MODEL: &str = "embedded:tinystories-656k";
/// What lm-evaluation-harness found, by benchmark and row: `tests/oracles/lm_eval_choice.py` wrote it.
const GOLDEN: &str = include_str!("golden/choice.jsonl");

/// What each benchmark is measured on, and with which keys, in the golden file.
fn rows(benchmark: &str) -> (String, Vec<String>) {
    let file = |name: &str| datasets().join("choice").join(name).display().to_string();
    match benchmark {
        "mmlu" => (file("mmlu/val"), vec![format!("examples={}", file("mmlu/dev"))]),
        "piqa" => {
            let examples = format!("examples={}", file("piqa_examples.jsonl"));
            (file("piqa.jsonl"), vec![examples, "shots=2".to_owned()])
        }
        "winogrande" => {
            let examples = format!("examples={}", file("winogrande_examples.jsonl"));
            (file("winogrande.jsonl"), vec![examples, "shots=3".to_owned()])
        }
        "arc_challenge" | "openbookqa" => (file(&format!("{benchmark}.json")), Vec::new()),
        _ => (file(&format!("{benchmark}.jsonl")), Vec::new()),
    }
}

fn golden() -> Vec<Value> {
    GOLDEN.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn eval(place: &Place, model: &str, benchmark: &str) -> (Value, Vec<Value>) {
    let (data, keys) = rows(benchmark);
    let task = format!("{benchmark}={data}");
    let mut args =
        vec!["eval", "--model", model, "--task", &task, "--samples", "samples.jsonl", "--json"];
    for key in &keys {
        args.extend(["--set", key]);
    }
    let found = place.json(&args);
    (found, events(&place.path("samples.jsonl")))
}

#[test]
fn every_row_is_answered_as_the_harness_does() {
    let place = Place::new();
    let golden = golden();
    let mut benchmarks: Vec<&str> =
        golden.iter().map(|row| row["benchmark"].as_str().unwrap()).collect();
    benchmarks.dedup();
    assert_eq!(benchmarks.len(), 8);
    for benchmark in benchmarks {
        let (found, samples) = eval(&place, MODEL, benchmark);
        let expected: Vec<&Value> =
            golden.iter().filter(|row| row["benchmark"] == benchmark).collect();
        assert_eq!(samples.len(), expected.len(), "{benchmark}");
        let (mut right, mut right_by_length) = (0.0, 0.0);
        for (sample, expected) in samples.iter().zip(expected) {
            let sums = |row: &Value| -> Vec<f64> {
                let sums = row["log_likelihoods"].as_array().unwrap();
                sums.iter().map(|sum| sum.as_f64().unwrap()).collect()
            };
            let (ours, theirs) = (sums(sample), sums(expected));
            assert_eq!(ours.len(), theirs.len());
            for (ours, theirs) in ours.iter().zip(theirs) {
                let near = 2e-4 + 1e-5 * theirs.abs();
                assert!((ours - theirs).abs() < near, "{benchmark}: {sample} for {expected}");
            }
            let hit = |key: &str| f64::from(u8::from(sample[key] == sample["right"]));
            assert_eq!(expected["acc"], hit("answer"), "{benchmark}: {sample}");
            right += hit("answer");
            if let Some(norm) = expected["acc_norm"].as_f64() {
                assert!((norm - hit("answer_norm")).abs() < 1e-9, "{benchmark}: {sample}");
                right_by_length += hit("answer_norm");
            }
        }
        let of = samples.len() as f64;
        assert!((found["acc"].as_f64().unwrap() - right / of).abs() < 1e-12);
        if let Some(norm) = found["acc_norm"].as_f64() {
            assert!((norm - right_by_length / of).abs() < 1e-12);
        }
        assert_eq!((&found["task"], &found["benchmark"]), (&"choice".into(), &benchmark.into()));
        assert_eq!(found["rows"], samples.len());
        // Its tokenizer opens texts, and questions behind five examples are longer than its context.
        assert_eq!(found["bos"], true);
        assert_eq!(found["cut"].as_u64().unwrap() > 0, benchmark == "mmlu");
    }
}

#[test]
fn mmlu_is_told_by_groups_and_subjects() {
    let place = Place::new();
    let (found, samples) = eval(&place, MODEL, "mmlu");
    for group in ["humanities", "social_sciences", "stem", "other"] {
        assert!(found[group].is_f64() && found[format!("{group}_stderr")].is_f64(), "{found}");
    }
    assert_eq!(found["subjects"].as_object().unwrap().len(), 4);
    assert_eq!(found["subjects"]["virology"]["rows"], 5);
    assert_eq!(samples[0]["subject"], "anatomy");
    let (data, keys) = rows("mmlu");
    let task = format!("mmlu={data}");
    let text =
        place.ok(&["eval", "--model", MODEL, "--task", &task, "--set", &keys[0], "--limit", "2"]);
    assert!(text.starts_with("mmlu   acc "), "{text}");
    assert!(text.contains(" over 8 rows\n  humanities       acc "), "{text}");
    assert!(
        text.contains("\nprotocol   5-shot, opened by BOS, context 512,\n           "),
        "{text}"
    );
    assert!(text.lines().all(|line| line.chars().count() <= 80 || line.starts_with("data")));
}

#[test]
fn several_tasks_are_measured_at_once_and_beside_a_reference() {
    let place = Place::new();
    place.write("few.json", few_stories(4));
    let boolq = format!("boolq={}", rows("boolq").0);
    let args = ["eval", "--model", MODEL, "--task", "ppl=few.json", "--task", "kl=few.json"];
    let more = ["--task", &boolq, "--reference", MODEL, "--set", "kl.windows=1", "--json"];
    let found = place.json(&[&args[..], &more].concat());
    let [ppl, kl, boolq] = &found["tasks"].as_array().unwrap()[..] else { panic!("{found}") };
    assert_eq!(ppl["perplexity"], ppl["reference"]["perplexity"]);
    assert_eq!((kl["kl"].as_f64(), kl["top1_agreement"].as_f64()), (Some(0.0), Some(1.0)));
    assert_eq!(kl["windows"], 1);
    assert_eq!((boolq["flipped"].as_f64(), boolq["rows"].as_u64()), (Some(0.0), Some(6)));
    assert_eq!(found["model"], MODEL);
    // Another model answers otherwise.
    let (data, _) = rows("openbookqa");
    let other = datasets().join("stories260k").display().to_string();
    let task = format!("openbookqa={data}");
    let args = ["eval", "--model", MODEL, "--task", &task, "--reference", &other, "--json"];
    let refused = place.refused(&args);
    assert!(refused.contains("the reference has 512 tokens, and the model 2048"), "{refused}");
}

const STAGES: &str = r#"
[[stage]]
[stage.calibrate]
method.rtn = {}
bits = 2
[[stage]]
[stage.evaluate]
baselines = ["float", "rtn"]
tasks = [
  { ppl = { context = 64 } },
  { kl = { context = 64 } },
  { choice = { benchmark = "openbookqa", data = "rows.json" } },
]
[[stage]]
[stage.export]
format.fewbit = {}
format.dequantized = {}
"#;

fn small_run() -> Place {
    let place = Place::with_small_run(STAGES);
    std::fs::copy(datasets().join("choice/openbookqa.json"), place.path("rows.json")).unwrap();
    place
}

#[test]
fn a_recipe_measures_several_tasks_and_its_exports_answer_alike() {
    let place = small_run();
    let out = place.ok(&common::TRAIN);
    assert!(out.contains("openbookqa acc    stderr   x float   flipped\n"), "{out}");
    let record: Value = serde_json::from_str(&place.read("run/run.json")).unwrap();
    let measured = record["results"]["measured"].as_array().unwrap();
    let names: Vec<(String, String)> = measured
        .iter()
        .map(|m| {
            let name = |value: &Value| value.as_str().unwrap().to_owned();
            (name(&m["what"]), name(&m["task"]["name"]))
        })
        .collect();
    let name = |what: &str, task: &str| (what.to_owned(), task.to_owned());
    let expected = [
        name("float", "ppl"),
        name("float", "choice"),
        name("rtn w2", "ppl"),
        name("rtn w2", "kl"),
        name("rtn w2", "choice"),
        name("after calibrate", "ppl"),
        name("after calibrate", "kl"),
        name("after calibrate", "choice"),
    ];
    assert_eq!(names, expected);
    let last = &measured[7]["result"];
    assert!(last["flipped"].as_f64().unwrap() > 0.0, "{last}");
    assert!(measured[6]["result"]["kl"].as_f64().unwrap() > 0.1, "{}", measured[6]);
    assert_eq!(record["fingerprint"]["data"].as_object().unwrap().len(), 4);
    let rows = events(&place.path("run/eval/1-openbookqa-after_calibrate.jsonl"));
    assert_eq!(rows.len(), 24);
    // Codes and dense weights, measured by themselves.
    for export in ["run/export/fewbit", "run/export/dequantized"] {
        let args = ["eval", "--model", export, "--task", "openbookqa=rows.json", "--json"];
        let found = place.json(&[&args[..], &["--samples", "again.jsonl"]].concat());
        assert_eq!(found["acc"], last["acc"]);
        for (row, again) in rows.iter().zip(events(&place.path("again.jsonl"))) {
            assert_eq!(row["answer"], again["answer"]);
            assert_eq!(row["answer_norm"], again["answer_norm"]);
        }
    }
    // Measured once: what an attempt has found is there for the next one.
    let lines = place.read("run/metrics.jsonl");
    assert_eq!(lines.matches("\"task\":\"openbookqa\"").count(), 3, "{lines}");
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_runs() {
    let place = small_run();
    let check = ["check", "--recipe", "recipe.toml"];
    let set = |key: &str| {
        [&check[..], &["--set", key]].concat().iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()
    };
    let refused = |key: &str| {
        let args = set(key);
        place.refused(&args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    place.ok(&check);
    let key = |rest: &str| format!("stage.1.evaluate.tasks.2.choice.{rest}");
    let missing = refused(&key("data=\"none.json\""));
    assert!(missing.contains("there is no such data file\n  at   none.json"), "{missing}");
    let columns = refused(&key("benchmark=\"piqa\""));
    assert!(
        columns.contains("does not ask a question with answers behind Solution1:"),
        "{columns}"
    );
    assert!(columns.starts_with("exit 3") && columns.contains("entry 1"), "{columns}");
    let shots = refused(&key("shots=2"));
    assert!(shots.contains("2 examples stand before each question"), "{shots}");
    place.write(
        "rows.json",
        "{\"question_stem\": \"q\", \"choices\": {\"text\": [\"a\"], \"label\": [\"A\"]}}\n",
    );
    let answer = place.refused(&check);
    assert!(answer.contains("the row has no `answerKey` column"), "{answer}");
    assert!(answer.contains("rows.json, line 1"), "{answer}");
    std::fs::remove_file(place.path("model/tokenizer.json")).unwrap();
    let tokenizer = place.refused(&check);
    assert!(tokenizer.contains("no tokenizer.json"), "{tokenizer}");
}

#[test]
fn keys_that_may_be_any_tasks_are_asked_for_by_name() {
    let place = Place::new();
    let boolq = format!("boolq={}", rows("boolq").0);
    let args =
        ["eval", "--model", MODEL, "--task", "ppl=x", "--task", &boolq, "--set", "context=64"];
    let refused = place.refused(&args);
    assert!(refused.contains("--set ppl.context=64"), "{refused}");
    let unnamed = place.refused(&["eval", "--model", MODEL, "--task", "boolq"]);
    assert!(
        unnamed.contains("boolq is measured on rows, and no file of them is named"),
        "{unnamed}"
    );
    let kl = place.refused_briefly(&["eval", "--model", MODEL, "--task", "kl", "--data", "x"]);
    assert!(kl.contains("kl compares with a reference"), "{kl}");
    let glue = place.run(&["eval", "--model", MODEL, "--task", "glue", "--data", "x"]);
    assert!(glue.code == 2 && glue.err.contains("arc_easy"), "{glue:?}");
}

#[test]
fn the_protocol_of_gptq_joins_lines() {
    let place = Place::new();
    let stories: Vec<String> = serde_json::from_str(&few_stories(8)).unwrap();
    place.write("wiki.raw", stories.join("\n"));
    let args = ["eval", "--model", MODEL, "--data", "wiki.raw", "--set", "protocol=wikitext2"];
    let found = place.json(&[&args[..], &["--json"]].concat());
    assert_eq!((&found["protocol"], &found["context"]), (&json!("wikitext2"), &json!(512)));
    let plain = place.json(&["eval", "--model", MODEL, "--data", "wiki.raw", "--json"]);
    assert_ne!(plain["perplexity"], found["perplexity"]);
    let named =
        place.refused(&["eval", "--model", MODEL, "--task", "ppl", "--set", "protocol=wikitext2"]);
    assert!(named.contains("measured on a text of its own"), "{named}");
}
