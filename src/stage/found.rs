//! What an evaluation found, in the run's folder `eval/`: the score of each task and model as JSON, and beside it
//! what was found row by row, one object a line. A stage that goes on takes from there what it has measured
//! already.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::results::Measured;
use crate::error::{Error, Result};
use crate::store::folder::write_atomic;

/// The files of one score.
pub(super) struct Files {
    score: PathBuf,
    samples: PathBuf,
}

impl Files {
    /// Those of a task called `label` on the model `what`, in a stage of a run.
    pub(super) fn new(run_dir: &Path, stage: usize, label: &str, what: &str) -> Self {
        let name = format!("{stage}-{label}-{}", what.replace([' ', '/'], "_"));
        let folder = run_dir.join("eval");
        Self {
            score: folder.join(format!("{name}.json")),
            samples: folder.join(format!("{name}.jsonl")),
        }
    }

    /// Writes them.
    ///
    /// # Errors
    /// When the disk is full or the folder cannot be made.
    pub(super) fn write(&self, measured: &Measured) -> Result<()> {
        if let Some(folder) = self.score.parent() {
            std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
        }
        if !measured.result.samples.is_empty() {
            let lines = measured.result.samples.iter().map(|sample| format!("{sample}\n"));
            write_atomic(&self.samples, lines.collect::<String>().as_bytes())?;
        }
        // The score last: with it the pair is whole.
        write_atomic(&self.score, format!("{:#}\n", json!(measured)).as_bytes())
    }

    /// What they hold, if it is of the same task on the same data.
    pub(super) fn read(&self, like: &Measured) -> Option<Measured> {
        let text = std::fs::read_to_string(&self.score).ok()?;
        let mut found: Measured = serde_json::from_str(&text).ok()?;
        found.result.samples = self.samples();
        let same = (&found.what, &found.data_sha256, &found.task)
            == (&like.what, &like.data_sha256, &like.task);
        (same && found.stage == like.stage).then_some(found)
    }

    /// What was found row by row; nothing where there are no rows.
    pub(super) fn samples(&self) -> Vec<Value> {
        let text = std::fs::read_to_string(&self.samples).unwrap_or_default();
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::{Score, TaskConfig};

    #[test]
    fn what_is_written_is_read_for_the_same_task_alone() {
        let dir = tempfile::tempdir().unwrap();
        let result = Score {
            numbers: vec![("perplexity".to_owned(), 2.5), ("nll_per_token".to_owned(), 0.9)],
            tokens: 7,
            samples: vec![json!({"row": 0, "answer": 1})],
            ..Score::default()
        };
        let measured = Measured {
            stage: 2,
            what: "after distill".to_owned(),
            result,
            data_sha256: "s".to_owned(),
            task: TaskConfig::default(),
        };
        let files = Files::new(dir.path(), 2, "ppl", "after distill");
        assert_eq!(files.read(&measured), None);
        files.write(&measured).unwrap();
        assert!(dir.path().join("eval/2-ppl-after_distill.json").exists());
        assert_eq!(files.read(&measured), Some(measured.clone()));
        let other = Measured { data_sha256: "t".to_owned(), ..measured };
        assert_eq!(files.read(&other), None);
    }
}
