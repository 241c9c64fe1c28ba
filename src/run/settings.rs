//! What runs are compared by: one list of names, whatever the recipe.

use serde_json::{Value, json};

use crate::recipe::{Plan, PlannedStage};
use crate::report::Setting;

/// The settings of a run, of its last training and of the codes that it leaves; `model` is the model's
/// name.
pub(super) fn settings(plan: &Plan, model: &str) -> Vec<(String, Setting)> {
    let recipe = json!(plan.recipe);
    let codes = last(plan, |stage| stage.config.stage().effect().codes().is_some());
    let grid = codes.map(|stage| stage.default_spec);
    let training = last(plan, |stage| keys(stage)["steps"].is_number());
    let training = training.or(codes).map_or(Value::Null, keys);
    let batch = product(&[&training["batch"], &training["accumulate"]]);
    let rates =
        ["weight", "rounding", "scale"].map(|role| training["learning_rate"][role].as_f64());
    let length = &recipe["data"][if training["objective"].is_null() || is_blockwise(&training) {
        "calibration"
    } else {
        "train"
    }]["length"];
    let optimizer = &training["optimizer"];
    let text = |value: &Value| Setting::Text(word(value));
    let number = |value: &Value| Setting::Number(value.as_f64());
    let settings = [
        ("model", Setting::Text(model.to_owned())),
        ("plan", Setting::Text(plan.summary())),
        ("bits", Setting::Number(grid.map(|spec| f64::from(spec.bits.get())))),
        ("group_size", Setting::Text(grid.map_or(String::new(), |s| s.group_size.to_string()))),
        ("symmetric", text(&json!(grid.map(|spec| spec.symmetry)))),
        ("scales", text(&recipe["quant"]["scales"])),
        ("method", text(&training["method"])),
        ("objective", text(&training["objective"])),
        ("steps", number(&training["steps"])),
        ("batch", Setting::Number(batch)),
        ("length", number(length)),
        ("learning_rate", Setting::Number(rates.into_iter().flatten().reduce(f64::max))),
        ("rate_unit", text(&training["rate_unit"])),
        ("schedule", text(&training["schedule"])),
        ("clip_norm", number(&optimizer["clip_norm"])),
        ("weight_decay", number(&optimizer["weight_decay"])),
        ("seed", number(&recipe["seed"])),
        ("compute", text(&recipe["model"]["compute"])),
    ];
    settings.into_iter().map(|(name, setting)| (name.to_owned(), setting)).collect()
}

/// The last stage that is of a kind.
fn last(plan: &Plan, is_of: impl Fn(&PlannedStage) -> bool) -> Option<&PlannedStage> {
    plan.stages.iter().rev().find(|stage| is_of(stage))
}

/// What a stage's keys are, with what a recipe leaves out.
fn keys(stage: &PlannedStage) -> Value {
    json!(stage.config)[stage.config.name()].take()
}

/// Whether the calibration text is what these keys train on.
fn is_blockwise(keys: &Value) -> bool {
    !keys["objective"]["mse"].is_null()
}

/// The product of those that are numbers; none where none is.
fn product(numbers: &[&Value]) -> Option<f64> {
    numbers.iter().filter_map(|number| number.as_f64()).reduce(|a, b| a * b)
}

/// A value in a word: of a table the name of its entry.
fn word(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        Value::Object(map) => map.keys().next().cloned().unwrap_or_default(),
        other => other.to_string(),
    }
}
