//! What a run's folder tells, as the page needs it.

use std::path::Path;

use serde_json::Value;

use crate::error::{Error, Result};

/// A run as its files tell it.
#[derive(Debug)]
pub struct Run {
    /// The folder's name.
    pub(super) name: String,
    /// `run.json`.
    pub(super) record: Value,
    /// The events of `metrics.jsonl`, in their order.
    events: Vec<Value>,
    /// `recipe.toml`.
    pub(super) recipe: String,
    /// The manifests of the exports, with the format's name.
    pub(super) manifests: Vec<(String, Value)>,
}

impl Run {
    /// Reads a run's folder.
    ///
    /// # Errors
    /// If it is none, or what lies there is damaged.
    pub fn read(run: &Path) -> Result<Self> {
        let file = run.join("run.json");
        if !file.is_file() {
            return Err(Error::usage("this is no run's folder: there is no run.json")
                .at(run.display())
                .fix("a folder that `fewbit train` wrote, runs/NAME for instance"));
        }
        let record = parsed(&file, &text(&file)?)?;
        let metrics = run.join("metrics.jsonl");
        let lines = if metrics.is_file() { text(&metrics)? } else { String::new() };
        // A line that was cut off, or is being written, is not there yet.
        let events = lines.lines().filter_map(|line| serde_json::from_str(line).ok());
        let events = placed(events.collect());
        let recipe = text(&run.join("recipe.toml")).unwrap_or_default();
        let full = run.canonicalize().unwrap_or_else(|_| run.to_owned());
        let name = full.file_name().map(|name| name.to_string_lossy().into_owned());
        let mut manifests = Vec::new();
        let exports = run.join("export");
        if exports.is_dir() {
            for folder in crate::store::folder::entries(&exports)? {
                let file = folder.join("manifest.json");
                let format = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if !format.starts_with('.') && file.is_file() {
                    manifests.push((format, parsed(&file, &text(&file)?)?));
                }
            }
        }
        Ok(Self { name: name.unwrap_or_default(), record, events, recipe, manifests })
    }

    /// The folder's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The model that was trained, as the recipe names it.
    pub fn model(&self) -> Option<String> {
        let recipe: toml::Table = self.recipe.parse().ok()?;
        Some(recipe.get("model")?.get("path")?.as_str()?.to_owned())
    }

    /// Every event of a kind, in order.
    pub(super) fn events<'a>(&'a self, kind: &str) -> impl Iterator<Item = &'a Value> {
        self.events.iter().filter(move |event| event["event"] == kind)
    }

    /// The stages' names, in order.
    pub(super) fn stages(&self) -> Vec<&str> {
        let stages = self.record["stages"].as_array().map_or(&[][..], Vec::as_slice);
        stages.iter().map(|stage| stage["name"].as_str().unwrap_or_default()).collect()
    }

    /// `stage 3, distill`.
    pub(super) fn stage(&self, event: &Value) -> String {
        let index = event["stage"].as_u64().unwrap_or(0);
        let stages = self.stages();
        let name = stages.get(usize::try_from(index).unwrap_or(usize::MAX));
        format!("stage {}, {}", index + 1, name.copied().unwrap_or("?"))
    }

    /// `done`, `running`, `stopped`, `failed`, `pending`.
    pub(super) fn state(&self) -> &str {
        self.record["status"].as_str().unwrap_or("unknown")
    }

    /// What the run had to say, the gravest first: kind and text, each text once.
    pub(super) fn remarks(&self) -> Vec<[String; 2]> {
        let mut remarks: Vec<[String; 2]> = Vec::new();
        let mut add = |kind: &str, text: String| {
            if !remarks.iter().any(|[_, other]| *other == text) {
                remarks.push([kind.to_owned(), text]);
            }
        };
        for event in self.events("failed") {
            add("error", event["what"].as_str().unwrap_or_default().to_owned());
        }
        for event in self.events("retry") {
            let reason = event["reason"].as_str().unwrap_or_default();
            let [step, back] = ["step", "back_to"].map(|key| event[key].as_u64().unwrap_or(0));
            let place = self.stage(event);
            add("setback", format!("{place}: {reason} at step {step}; went back to step {back}"));
        }
        for kind in ["warning", "note"] {
            for event in self.events(kind) {
                add(kind, event["text"].as_str().unwrap_or_default().to_owned());
            }
        }
        remarks
    }
}

/// With the stage in which histograms were made, which do not say it themselves.
fn placed(mut events: Vec<Value>) -> Vec<Value> {
    let mut stage = Value::Null;
    for event in &mut events {
        if event["event"] == "stage_start" {
            stage = event["stage"].clone();
        } else if event["event"] == "histogram" {
            event["stage"] = stage.clone();
        }
    }
    events
}

fn text(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).map_err(|e| Error::io("read", path, &e))
}

fn parsed(path: &Path, text: &str) -> Result<Value> {
    serde_json::from_str(text).map_err(|e| {
        Error::damaged(format!("the file is no JSON: {e}"), "another copy of the run")
            .at(path.display())
    })
}
