//! A run that knows how it is doing: what it says of itself, and what it refuses to leave.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod common;

use common::{Place, events, few_stories};
use serde_json::Value;

/// Two blocks to 4 bits, then a distillation to 2.
const RECIPE: &str = r#"output = "run"
device = "cpu"
model.path = "embedded:tinystories-656k"
quant.bits = 4

[data]
validation.path = "few.json"
[data.calibration]
path = "embedded:tinystories/calibration.json"
samples = 8
length = 64
[data.train]
path = "embedded:tinystories/calibration.json"
length = 64

[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 4
learning_rate = 1e-2
[[stage]]
[stage.distill]
bits = 2
method.seq = { start = "mse" }
objective.jsd = {}
steps = 40
batch = 4
learning_rate = 1e-3
[[stage]]
[stage.export]
format.fewbit = {}
"#;

fn prepared() -> Place {
    let place = Place::new();
    place.write("recipe.toml", RECIPE);
    place.write("few.json", few_stories(12));
    place
}

fn train<'a>(set: &[&'a str]) -> Vec<&'a str> {
    let set = set.iter().flat_map(|set| ["--set", set]);
    ["train", "--recipe", "recipe.toml"].into_iter().chain(set).collect()
}

fn results(place: &Place) -> Value {
    serde_json::from_str::<Value>(&place.read("run/run.json")).unwrap()["results"].take()
}

fn of_kind(place: &Place, kind: &str) -> Vec<Value> {
    let events = events(&place.path("run/metrics.jsonl"));
    events.into_iter().filter(|event| event["event"] == kind).collect()
}

#[test]
fn a_training_is_validated_and_the_last_line_says_what_became_of_it() {
    let place = prepared();
    let ended = place.run(&train(&[]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    let validations = of_kind(&place, "validation");
    let steps: Vec<u64> = validations.iter().filter_map(|v| v["step"].as_u64()).collect();
    assert_eq!(steps, (0..=40).step_by(4).collect::<Vec<_>>());
    for validation in &validations {
        assert_eq!(validation["tokens"], 4 * 255);
        let [loss, kl] = ["nll_per_token", "kl_forward"].map(|key| validation[key].as_f64());
        assert!(loss.unwrap() > 1.0 && kl.unwrap() > 0.0, "{validation}");
    }
    let gates = of_kind(&place, "gate");
    assert_eq!(gates.len(), 3);
    assert!(gates.iter().all(|gate| gate["passed"] == true), "{gates:?}");
    // The model that the gate read from its codes is the one that was validated.
    let last = validations.last().unwrap()["perplexity"].as_f64().unwrap();
    assert!((gates[1]["perplexity"].as_f64().unwrap() / last - 1.0).abs() < 1e-4, "{gates:?}");
    let start = validations[0]["perplexity"].as_f64().unwrap();
    assert!((gates[1]["start"].as_f64().unwrap() / start - 1.0).abs() < 1e-9);
    // What was measured for the stage is not measured again for the export.
    assert_eq!(gates[2]["perplexity"], gates[1]["perplexity"]);
    assert_eq!(gates[2]["rtn"], gates[1]["rtn"]);
    let done = ended.err.lines().last().unwrap();
    // No evaluation, so the few windows say what they can.
    assert!(done.contains(" × float on 1020 tokens"), "{done}");
    assert!(!place.path("run/checkpoints/01-distill/best.safetensors").exists());
    assert_eq!(results(&place)["setbacks"].as_array().unwrap().len(), 0);
}

#[test]
fn an_absurd_rate_never_ends_in_silence() {
    let place = prepared();
    let ended =
        place.run(&train(&["stage.1.distill.learning_rate=30", "stage.1.distill.steps=60"]));
    let setbacks = results(&place)["setbacks"].take();
    let setbacks = setbacks.as_array().unwrap();
    match ended.code {
        // Recovered at a smaller rate, or went back to where it began: said either way.
        0 => assert!(ended.err.contains("warning "), "{}", ended.err),
        1 => assert!(
            ended.err.contains(", after 3 retries\n  at   stage 1, distill"),
            "{}",
            ended.err
        ),
        5 => assert!(ended.err.contains("allow_worse=true"), "{}", ended.err),
        code => panic!("exit {code}: {}", ended.err),
    }
    let retries = of_kind(&place, "retry");
    assert!(!retries.is_empty() && setbacks.len() >= retries.len(), "{}", ended.err);
    assert_eq!(retries[0]["rate_factor"], 0.5);
    assert_eq!(retries[0]["reason"], setbacks[0]["reason"]);
}

#[test]
fn without_retries_the_first_failure_ends_the_run() {
    let place = prepared();
    let set = ["stage.1.distill.learning_rate=1e30", "stage.1.distill.validate.retries=0"];
    let refused = place.failed(&train(&set));
    assert!(refused.starts_with("exit 1\n") && refused.contains("at   stage 1, distill, step "));
    assert!(refused.contains("\n  try  a smaller learning_rate"), "{refused}");
    assert!(of_kind(&place, "retry").is_empty());
}

#[test]
fn the_gate_refuses_what_is_worse_than_plain_rounding_and_goes_on_where_it_may() {
    let place = prepared();
    let text = RECIPE.replacen("learning_rate = 1e-2", "learning_rate = 0.3", 1);
    let (start, end) = (text.find("[[stage]]\n[stage.distill]"), text.rfind("[[stage]]"));
    let text = format!("{}{}", &text[..start.unwrap()], &text[end.unwrap()..]);
    place.write("recipe.toml", text.replacen("steps = 4", "steps = 40", 1));

    let refused = place.failed(&train(&[]));
    assert!(refused.starts_with("exit 5\nerror: after reconstruct the model is worse than plain "));
    assert!(refused.contains("\n  at   stage 0, reconstruct\n  try  "), "{refused}");
    assert!(refused.contains("--set stage.0.reconstruct.allow_worse=true"), "{refused}");
    let block = "run/checkpoints/00-reconstruct/block-0001.safetensors";
    let made = std::fs::metadata(place.path(block)).unwrap().modified().unwrap();
    // The same command is refused again, and nothing is done twice.
    assert_eq!(place.failed(&train(&[])), refused);
    assert!(!place.path("run/export").exists());

    let allowed = "stage.0.reconstruct.allow_worse=true";
    let export = place.failed(&train(&[allowed]));
    assert!(export.starts_with("exit 5\n") && export.contains("at   stage 1, export"), "{export}");
    assert!(export.contains("stage.1.export.allow_worse=true"), "{export}");
    let ended = place.run(&train(&[allowed, "stage.1.export.allow_worse=true"]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(ended.err.contains("warning   after reconstruct the model is worse"), "{}", ended.err);
    assert_eq!(std::fs::metadata(place.path(block)).unwrap().modified().unwrap(), made);
    assert_eq!(of_kind(&place, "block").len(), 2, "no block was fitted twice");
    // Another rate is still another run.
    let other = place.failed(&train(&["stage.0.reconstruct.learning_rate=1e-2"]));
    assert!(other.starts_with("exit 6\n"), "{other}");
}

#[test]
fn validation_can_be_turned_off() {
    let place = prepared();
    let ended = place.run(&train(&["stage.1.distill.validate.every=0"]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert!(of_kind(&place, "validation").is_empty());
    let gates = of_kind(&place, "gate");
    assert!(gates[1]["start"].is_null() && gates[1]["rtn"].is_number(), "{gates:?}");
    let place = prepared();
    let text = RECIPE.replacen("validation.path = \"few.json\"\n", "", 1);
    place.write("recipe.toml", text.replacen("[data]\n", "", 1));
    let ended = place.run(&train(&[]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    assert_eq!(ended.err.matches("without [data.validation] nothing tells").count(), 1);
    assert!(of_kind(&place, "gate").is_empty());
}

#[test]
fn a_training_without_a_better_state_ends_early() {
    let place = prepared();
    let ended = place.run(&train(&[
        "stage.1.distill.learning_rate=1e-12",
        "stage.1.distill.validate.patience=2",
    ]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    let validations = of_kind(&place, "validation");
    let steps: Vec<u64> = validations.iter().filter_map(|v| v["step"].as_u64()).collect();
    assert_eq!(steps, [0, 4, 8]);
    assert!(ended.err.contains("ended at step 8 of 40: no better state"), "{}", ended.err);
    let refused = place.run(&train(&["stage.1.distill.validate={patience=2, keep_best=false}"]));
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("none is looked for"), "{}", refused.err);
}

#[test]
fn the_student_is_compared_on_what_it_wrote() {
    let place = prepared();
    let own = "stage.1.distill.on_policy={share=0.5, every=15, max_new_tokens=12, prompt_tokens=9}";
    let ended = place.run(&train(&[own]));
    assert_eq!(ended.code, 0, "{}", ended.err);
    let folder = place.path("run/checkpoints/01-distill");
    let samples = |step: u64| -> Vec<Value> {
        let text = std::fs::read_to_string(folder.join(format!("samples-{step:06}.json"))).unwrap();
        let mut file: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(file["step"], step);
        serde_json::from_value(file["samples"].take()).unwrap()
    };
    let tokens = |sample: &Value, key: &str| sample[key].as_array().unwrap().len();
    // Half of 4 rows in each of 15 steps; of 40 steps the last 10.
    for (step, count) in [(0, 30), (15, 30), (30, 20)] {
        let samples = samples(step);
        assert_eq!(samples.len(), count);
        for sample in &samples {
            assert_eq!(tokens(sample, "prompt"), 9);
            assert!((1..=12).contains(&tokens(sample, "answer")), "{sample}");
        }
        assert!(samples.iter().any(|sample| sample["answer"] != samples[0]["answer"]));
    }
    assert_ne!(samples(0), samples(15));
    // What it wrote is the run's own, which may start over.
    let again = place.run(&[&train(&[own])[..], &["--fresh"]].concat());
    assert_eq!(again.code, 0, "{}", again.err);
    // Comparing needs a teacher, whatever the stage's own objective.
    let refused =
        place.run(&train(&[own, "stage.1.distill.objective={cross_entropy={}}", "output=other"]));
    assert_eq!(refused.code, 2);
    assert!(refused.err.contains("compares with no teacher"), "{}", refused.err);
    let both = "stage.1.distill.on_policy={share=1.0, every=20, max_new_tokens=8, \
                objective={kl_reverse={}}}";
    let other = ["stage.1.distill.objective={cross_entropy={}}", "output=other", both];
    let ended = place.run(&train(&other));
    assert_eq!(ended.code, 0, "{}", ended.err);
}
