//! A run as one HTML page that needs nothing else: no network, no script, no other file. Made from
//! what lies in the run's folder, whatever state the run is in: `run.json`, `metrics.jsonl`,
//! `recipe.toml` and the manifests of exports.

mod chart;
mod figures;
mod run;
mod tables;

use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment};
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
pub use run::Run;

/// The page's name in a run's folder.
pub const PAGE_FILE: &str = "report.html";

const TEMPLATE: &str = include_str!("page.html");

/// A prompt, and what models wrote behind it.
#[derive(Clone, Debug, Serialize)]
pub struct Sample {
    /// The prompt.
    pub prompt: String,
    /// A model's name and its text, in the order of the page.
    pub texts: Vec<[String; 2]>,
}

impl Sample {
    /// A prompt behind which nothing was written yet.
    pub fn new(prompt: &str) -> Self {
        Self { prompt: prompt.to_owned(), texts: Vec::new() }
    }
}

/// The page of a run, or of several side by side.
///
/// # Errors
/// If there is no run.
pub fn of(runs: &[Run], samples: &[Sample]) -> Result<String> {
    match runs {
        [] => Err(Error::usage("a page of no run").fix("the folder of a run")),
        [run] => render(&json!({
            "title": run.name,
            "sentence": tables::sentence(run),
            "headline": tables::headline(run),
            "figures": figures::of_run(run),
            "tables": tables::of_run(run),
            "samples": samples,
            "remarks": run.remarks(),
            "recipe": run.recipe,
            "provenance": tables::provenance(run),
        })),
        runs => {
            let names: Vec<&str> = runs.iter().map(Run::name).collect();
            render(&json!({
                "title": names.join(" · "),
                "sentence": format!("{} runs side by side", runs.len()),
                "figures": figures::of_runs(runs),
                "tables": tables::of_runs(runs),
                "samples": samples,
            }))
        }
    }
}

fn render(page: &Value) -> Result<String> {
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment
        .template_from_str(TEMPLATE)
        .and_then(|template| template.render(Serde(page)))
        .map_err(|e| Error::failed(format!("the page cannot be made: {e}")))
}
