//! `run.json`: what a run is made of, how far it got, and what came out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Needs, Price, StageNeeds};
use crate::error::{Error, Result, Told};
use crate::recipe::{self, Recipe, to_toml};
use crate::stage::Results;
use crate::store::folder::write_atomic;

/// The record's name in a run's folder.
pub(super) const RECORD_FILE: &str = "run.json";
/// Version of the record and of the checkpoints.
const RECORD_VERSION: u32 = 1;

/// How far something got.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Not begun.
    Pending,
    /// Begun; if no process runs it, it was killed.
    Running,
    /// Stopped by a signal after a clean save.
    Stopped,
    /// Ended by an error.
    Failed,
    /// A stage that has left its model, which the quality gate has not passed.
    Trained,
    /// Complete.
    Done,
}

/// One stage's progress.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct StageRecord {
    /// The stage's name.
    pub name: String,
    /// How far it got.
    pub status: Status,
    /// Wall-clock seconds spent in it, over all attempts.
    pub seconds: f64,
    /// What the preflight expected of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needs: Option<StageNeeds>,
    /// Peak memory of the process at its end, over all stages so far, where the system tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peak_gib: Option<f64>,
    /// The checkpoints that it left, once it has left its model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// What a checkpoint depends on. Output folder and device are not part of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Fingerprint {
    /// The resolved recipe as TOML, without output and device.
    pub recipe: String,
    /// SHA-256 over the model's config, weight and tokenizer files.
    pub model: String,
    /// SHA-256 of each data set, by role.
    pub data: BTreeMap<String, String>,
}

impl Fingerprint {
    /// What differs from another one, in words.
    pub fn difference(&self, other: &Self) -> Option<String> {
        let (was, is) = (neutral(&self.recipe), neutral(&other.recipe));
        if was != is {
            let mut lines = was.lines().zip(is.lines());
            return Some(match lines.find(|(a, b)| a != b) {
                Some((was, is)) => format!("the recipe changed: `{was}` became `{is}`"),
                None => "the recipe changed: its list of stages or keys is another".to_owned(),
            });
        }
        if self.model != other.model {
            return Some("the model's files changed".to_owned());
        }
        let roles = self.data.keys().chain(other.data.keys());
        let mut changed = roles.filter(|role| self.data.get(*role) != other.data.get(*role));
        changed.next().map(|role| format!("the {role} data changed"))
    }
}

/// A recorded recipe without what changes no result, whichever fewbit wrote it.
fn neutral(recipe: &str) -> String {
    let parsed = recipe::parse::<Recipe>(recipe, RECORD_FILE, &[]);
    let written = parsed.and_then(|(parsed, _)| to_toml(&parsed.neutral()));
    written.unwrap_or_else(|_| recipe.to_owned())
}

/// The record.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct RunRecord {
    /// Version of this layout.
    pub version: u32,
    /// The fewbit that wrote it last.
    pub fewbit: String,
    /// How far the run got.
    pub status: Status,
    /// What it was run on last.
    pub device: String,
    /// Every stage in order.
    pub stages: Vec<StageRecord>,
    /// What the preflight expected.
    pub needs: Needs,
    /// Wall-clock seconds, over all attempts.
    pub seconds: f64,
    /// Peak memory of the process, where the system tells.
    pub peak_gib: Option<f64>,
    /// Bytes of the run's folder at the end of the last attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
    /// What the run cost, where it was said what an hour costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price: Option<Price>,
    /// What ended the last attempt, where it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Told>,
    /// The run whose first stages it took over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reused_from: Option<PathBuf>,
    /// Perplexities, errors and exports.
    pub results: Results,
    /// What the checkpoints depend on.
    pub fingerprint: Fingerprint,
}

impl RunRecord {
    /// The record of a run that has not begun.
    pub fn new(stages: &[&str], mut needs: Needs, fingerprint: Fingerprint) -> Self {
        let mut of_stages = std::mem::take(&mut needs.stages).into_iter();
        let pending = |name: &&str| StageRecord {
            name: (*name).to_owned(),
            status: Status::Pending,
            seconds: 0.0,
            needs: of_stages.next(),
            peak_gib: None,
            files: Vec::new(),
        };
        Self {
            version: RECORD_VERSION,
            fewbit: env!("CARGO_PKG_VERSION").to_owned(),
            status: Status::Pending,
            device: String::new(),
            stages: stages.iter().map(pending).collect(),
            needs,
            seconds: 0.0,
            peak_gib: None,
            disk_bytes: None,
            price: None,
            failure: None,
            reused_from: None,
            results: Results::default(),
            fingerprint,
        }
    }

    /// Reads `dir/run.json`; `None` when there is none.
    ///
    /// # Errors
    /// When it cannot be read or is damaged.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(RECORD_FILE);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &path, &e)),
        };
        let damaged = |why: String| {
            Err(Error::failed(format!("run.json cannot be used: {why}"))
                .at(path.display())
                .fix("--fresh to start over, or another --output"))
        };
        match serde_json::from_str::<Self>(&text) {
            Ok(record) if record.version == RECORD_VERSION => Ok(Some(record)),
            Ok(record) => {
                damaged(format!("it has version {}, not {RECORD_VERSION}", record.version))
            }
            Err(error) => damaged(error.to_string()),
        }
    }

    /// What is gone is made again: stages whose checkpoints are not all there count as not complete, and
    /// those of exports as not begun. `stage_dir` gives a stage's folder.
    pub(super) fn reopen_lost(&mut self, dir: &Path, stage_dir: impl Fn(usize, &str) -> PathBuf) {
        let folder = |format: &str| dir.join("export").join(format);
        let exported = self.results.exports.iter().all(|export| folder(&export.format).is_dir());
        for (index, stage) in self.stages.iter_mut().enumerate() {
            let checkpoints = stage_dir(index, &stage.name);
            let whole = stage.files.iter().all(|file| checkpoints.join(file).is_file());
            stage.status = match stage.status {
                Status::Done | Status::Trained if !whole => Status::Stopped,
                _ if stage.name == "export" && !exported => Status::Pending,
                _ => continue,
            };
            self.status = Status::Stopped;
        }
    }

    /// Writes `dir/run.json`, whole or not at all.
    ///
    /// # Errors
    /// I/O errors.
    pub fn save(&self, dir: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)
            .map_err(|e| Error::failed(format!("cannot encode run.json: {e}")))?;
        write_atomic(&dir.join(RECORD_FILE), text.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fingerprint() -> Fingerprint {
        Fingerprint {
            recipe: "seed = 0\nsteps = 100\n".to_owned(),
            model: "m".to_owned(),
            data: BTreeMap::from([("train".to_owned(), "t".to_owned())]),
        }
    }

    #[test]
    fn differences_are_named() {
        assert_eq!(fingerprint().difference(&fingerprint()), None);
        let mut other = fingerprint();
        other.recipe = "seed = 0\nsteps = 200\n".to_owned();
        let text = fingerprint().difference(&other).unwrap();
        assert!(text.contains("`steps = 100` became `steps = 200`"), "{text}");
        let mut other = fingerprint();
        other.model = "n".to_owned();
        assert!(fingerprint().difference(&other).unwrap().contains("model"));
        let mut other = fingerprint();
        other.data.insert("validation".to_owned(), "v".to_owned());
        assert!(fingerprint().difference(&other).unwrap().contains("validation"));
    }
}
