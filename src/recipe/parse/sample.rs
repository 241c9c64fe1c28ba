//! A small recipe, and its errors as a user sees them.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::parse;
use crate::error::Result;

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Recipe {
    pub(super) seed: u64,
    pub(super) output: PathBuf,
    pub(super) model: Model,
    #[serde(default)]
    pub(super) quant: Option<Quant>,
    #[serde(default)]
    pub(super) stage: Vec<Stage>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Model {
    pub(super) path: String,
    #[serde(default)]
    pub(super) compute: Compute,
    #[serde(default)]
    pub(super) packed: bool,
}

#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Compute {
    F32,
    #[default]
    Bf16,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Quant {
    pub(super) bits: u8,
    #[serde(default, rename = "override")]
    pub(super) overrides: Vec<QuantOverride>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct QuantOverride {
    pub(super) r#match: String,
    pub(super) group_size: Option<NonZeroUsize>,
    pub(super) width: Option<Width>,
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Stage {
    Reconstruct(Training),
    Distill(Training),
    TuneScales { steps: usize },
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Training {
    pub(super) method: Method,
    pub(super) steps: usize,
    #[serde(default)]
    pub(super) learning_rate: f64,
    #[serde(default)]
    pub(super) betas: Vec<f64>,
}

/// A width with a sentence of its own.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
#[serde(try_from = "i64", into = "i64")]
pub(super) struct Width(i64);

impl TryFrom<i64> for Width {
    type Error = String;

    fn try_from(width: i64) -> std::result::Result<Self, String> {
        match width {
            1..=8 => Ok(Self(width)),
            0 => Err("width = 0 holds nothing".to_owned()),
            ..0 => Err("a width below 0".to_owned()),
            _ => Err(format!("width = {width} is not in 1..=8")),
        }
    }
}

impl From<Width> for i64 {
    fn from(width: Width) -> Self {
        width.0
    }
}

#[derive(Debug, Deserialize, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Method {
    Flexround(Flexround),
    Lrq { rank: usize },
    Seq,
}

#[derive(Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Flexround {
    #[serde(default)]
    pub(super) clip: bool,
}

pub(super) const RECIPE: &str = r#"seed = 0
output = "runs/x"

[model]
path = "toy"

[quant]
bits = 4
[[quant.override]]
match = "*.down_proj"
group_size = 32

[[stage]]
[stage.reconstruct]
method.flexround = {}
steps = 100

[[stage]]
[stage.distill]
method.seq = {}
steps = 7
learning_rate = 1
"#;

pub(super) fn read(text: &str, sets: &[&str]) -> Result<(Recipe, toml::Table)> {
    let sets: Vec<_> = sets.iter().map(ToString::to_string).collect();
    parse(text, "r.toml", &sets)
}

/// The whole error for the recipe with `from` replaced by `to`.
#[track_caller]
pub(super) fn assert_error(from: &str, to: &str, expected: &[&str]) {
    assert!(RECIPE.contains(from), "the recipe has no {from:?}");
    let error = read(&RECIPE.replacen(from, to, 1), &[]).unwrap_err();
    assert_eq!(error.to_string(), expected.join("\n"));
    assert_eq!(error.kind().exit_code(), 2);
}

/// The whole error for the recipe with one override; the `at` line is always the override.
#[track_caller]
pub(super) fn assert_set_error(set: &str, what: &str, fix: &str) {
    let error = read(RECIPE, &["seed=1", set, "model.packed=true"]).unwrap_err();
    assert_eq!(error.to_string(), format!("{what}\n  at   --set {set}\n  try  {fix}"));
    assert_eq!(error.kind().exit_code(), 2);
}
