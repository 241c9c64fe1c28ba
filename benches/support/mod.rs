//! Running the real binary on a recipe and reading what came out, for the benches that compare
//! methods.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// What a run gave.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    /// Validation perplexity of the last model measured.
    pub(crate) perplexity: f64,
    /// Mean over blocks of the calibration error, of the last stage that reports one.
    pub(crate) block_mse: Option<f64>,
    /// Seconds of the stages that quantize.
    pub(crate) seconds: f64,
}

/// The data section of every recipe here: 128 windows of 128 tokens from the 800 stories.
pub(crate) fn head(model: &str) -> String {
    format!(
        "seed = 0\noutput = \"run\"\ndevice = \"cpu\"\n\
         [model]\npath = \"{}/datasets/{model}\"\n\
         [data.calibration]\n\
         path = [\"embedded:tinystories/calibration.json\", \"embedded:tinystories/train.json\"]\n\
         samples = 128\nlength = 128\n\
         [data.train]\n\
         path = [\"embedded:tinystories/calibration.json\", \"embedded:tinystories/train.json\"]\n\
         length = 128\n\
         [data.validation]\npath = \"embedded:tinystories/validation.json\"\n",
        env!("CARGO_MANIFEST_DIR")
    )
}

/// The stage that measures.
pub(crate) const EVALUATE: &str =
    "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 256 }\nbaselines = []\n";

/// Trains `recipe` in a folder of its own.
///
/// # Errors
/// When the run fails; the message holds what it said.
pub(crate) fn run(recipe: &str) -> Result<Outcome> {
    run_and(recipe, |folder| read(&folder.join("run.json")))
}

/// As [`run`], with another way to look at the run's folder.
///
/// # Errors
/// When the run fails; the message holds what it said.
pub(crate) fn run_and<T>(recipe: &str, look: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let path = folder.path().join("recipe.toml");
    std::fs::write(&path, recipe).context("cannot write the recipe")?;
    let output = Command::new(env!("CARGO_BIN_EXE_fewbit"))
        .args(["train", "--recipe"])
        .arg(&path)
        .current_dir(folder.path())
        .output()
        .context("cannot start fewbit")?;
    ensure!(output.status.success(), "{recipe}\n{}", String::from_utf8_lossy(&output.stderr));
    let path = folder.path().join("run");
    look(&path).with_context(|| format!("cannot use {}", path.display()))
}

fn read(path: &Path) -> Result<Outcome> {
    let record: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    let measured = record["results"]["measured"].as_array().and_then(|all| all.last());
    let perplexity = measured.and_then(|last| last["result"]["perplexity"].as_f64());
    let blocks = record["results"]["block_mse"].as_object().and_then(|stages| {
        let (_, blocks) = stages.iter().next_back()?;
        let after: Vec<f64> =
            blocks.as_array()?.iter().filter_map(|pair| pair[1].as_f64()).collect();
        Some(after.iter().sum::<f64>() / after.len() as f64)
    });
    let stages = record["stages"].as_array().context("it lists no stages")?;
    let quantizing = stages.iter().filter(|stage| stage["name"] != "evaluate");
    Ok(Outcome {
        perplexity: perplexity.context("it holds no perplexity")?,
        block_mse: blocks,
        seconds: quantizing.filter_map(|stage| stage["seconds"].as_f64()).sum(),
    })
}

/// Command-line words that are not options of cargo's own.
pub(crate) fn filters() -> Vec<String> {
    std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).collect()
}
