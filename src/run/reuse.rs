//! Finished stages of another run, taken over by one whose recipe begins alike.
//!
//! A block stage of an hour is then fitted once, however many rates are tried behind it. What is taken
//! over is what the run would have made itself, bit for bit: seed, model, data and quantization are the
//! same, and so is every stage up to there.

use std::fs;
use std::path::{Path, PathBuf};

use super::folder::RunFolder;
use super::record::{Fingerprint, RunRecord, Status};
use super::{Prepared, stage_folder};
use crate::error::{Error, Result};
use crate::recipe::{self, Base, Plan, PlannedStage, Recipe, to_toml};
use crate::stage::{StageConfig, TuneScalesConfig};
use crate::store::folder::entries;

/// The first stages of another run.
#[derive(Debug)]
pub struct Reused {
    /// The other run's folder.
    from: PathBuf,
    /// Its record, of those stages alone.
    record: RunRecord,
    /// Those of them that leave an adapter, which has a copy outside of the stage's folder.
    tuned: Vec<Option<TuneScalesConfig>>,
}

impl Reused {
    /// The stages of the run in `from` that `prepared` need not do again. `base` says what the linears of a
    /// packed model are.
    ///
    /// # Errors
    /// A usage error where there is no run, or it is the same one; exit 6 where it has no finished stage that
    /// is one of this run's, with the difference.
    pub(super) fn find(from: &Path, prepared: &Prepared, base: &Base) -> Result<Self> {
        let at = |error: Error| error.at(format!("--reuse {}", from.display()));
        let Some(mut record) = RunRecord::read(from)? else {
            return Err(at(Error::usage("there is no run to reuse"))
                .fix("the folder of a run, the one that run.json is in"));
        };
        let output = &prepared.plan.recipe.output;
        if fs::canonicalize(from).ok() == fs::canonicalize(output).ok() {
            return Err(at(Error::usage("a run cannot reuse itself"))
                .fix("another --output; without --reuse the same command goes on"));
        }
        record.reopen_lost(from, |index, name| stage_folder(from, index, name));
        let (theirs, _): (Recipe, _) =
            recipe::parse(&record.fingerprint.recipe, "run.json", &[]).map_err(at)?;
        // A recipe that no longer makes sense has no stage in common.
        let plan = Plan::new(theirs.clone(), &prepared.model.config, base, "", &[]);
        let stages = plan.map(|plan| plan.stages).unwrap_or_default();
        let pairs = stages.iter().zip(&prepared.plan.stages).zip(&record.stages);
        let alike = pairs.take_while(|((their, our), stage)| {
            stage.status == Status::Done && is_kept_in_checkpoints(&our.config) && same(their, our)
        });
        let mut count = alike.count();
        let first = |recipe: &Recipe, fingerprint: &Fingerprint, count: usize| {
            let mut recipe = recipe.clone().neutral();
            recipe.stage.truncate(count);
            let mut cut = Fingerprint { recipe: to_toml(&recipe)?, ..fingerprint.clone() };
            let is_later = |role: &str| later(role).is_some_and(|stage| stage >= count);
            cut.data.retain(|role, _| !is_later(role));
            Ok::<_, Error>(cut)
        };
        let difference = |count: usize| {
            let was = first(&theirs, &record.fingerprint, count)?;
            Ok::<_, Error>(was.difference(&first(
                &prepared.plan.recipe,
                &prepared.fingerprint,
                count,
            )?))
        };
        // What a stage reads by itself may differ, too.
        while count > 0 && difference(count)?.is_some() {
            count -= 1;
        }
        if count == 0 {
            let latents = stages.first().is_some_and(|their| !their.keeps_latents)
                && prepared.plan.stages[0].keeps_latents;
            let why = if latents {
                "a later stage goes on from latent weights, which its first stage did not leave"
            } else {
                "its first stage is not complete, or leaves more than checkpoints"
            };
            let why = difference(1)?.unwrap_or_else(|| why.to_owned());
            return Err(at(Error::mismatch(format!("nothing of that run can be reused: {why}")))
                .fix("a recipe that differs in later stages alone, or no --reuse"));
        }
        record.stages.truncate(count);
        let tuned = prepared.plan.stages[..count].iter().map(|stage| match &stage.config {
            StageConfig::TuneScales(config) => Some(config.clone()),
            _ => None,
        });
        Ok(Self { from: from.to_owned(), record, tuned: tuned.collect() })
    }

    /// In words.
    pub(super) fn summary(&self) -> String {
        let names = self.record.stages.iter().enumerate();
        let names: Vec<_> =
            names.map(|(index, stage)| format!("{index} ({})", stage.name)).collect();
        format!("stages {} are those of {}", names.join(", "), self.from.display())
    }

    /// Puts the stages into `folder`, whose `record` has not begun. May be repeated.
    ///
    /// # Errors
    /// I/O errors.
    pub(super) fn take_over(&self, folder: &RunFolder, record: &mut RunRecord) -> Result<()> {
        let theirs = &self.record;
        for (index, stage) in theirs.stages.iter().enumerate() {
            let (from, to) = (
                stage_folder(&self.from, index, &stage.name),
                folder.stage_dir(index, &stage.name),
            );
            fs::create_dir_all(&to).map_err(|e| Error::io("create", &to, &e))?;
            for name in &stage.files {
                share(&from.join(name), &to.join(name))?;
            }
            if let Some(config) = &self.tuned[index] {
                let public = config.adapter_file(folder.path())?;
                share(&to.join(TuneScalesConfig::CHECKPOINT), &public)?;
            }
            let mut own = stage.clone();
            own.needs.clone_from(&record.stages[index].needs);
            record.stages[index] = own;
        }
        let count = theirs.stages.len();
        let eval = folder.path().join("eval");
        for path in entries(&self.from.join("eval")).unwrap_or_default() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let stage = name.split_once('-').and_then(|(stage, _)| stage.parse::<usize>().ok());
            if stage.is_some_and(|stage| stage < count) {
                fs::create_dir_all(&eval).map_err(|e| Error::io("create", &eval, &e))?;
                share(&path, &eval.join(name))?;
            }
        }
        // The run cuts it to the end of those stages as it goes on.
        let (from, to) = (self.from.join(METRICS), folder.path().join(METRICS));
        let _ = fs::remove_file(&to);
        fs::copy(&from, &to).map_err(|e| Error::io("copy", &from, &e))?;
        record.results = theirs.results.clone().until(count);
        record.seconds = theirs.stages.iter().map(|stage| stage.seconds).sum();
        record.reused_from = Some(self.from.clone());
        record.status = Status::Stopped;
        record.save(folder.path())
    }
}

/// The run's events.
const METRICS: &str = "metrics.jsonl";

/// Whether all that a stage leaves is in its folder under `checkpoints/`, but for what it measured and the copy
/// of an adapter.
fn is_kept_in_checkpoints(stage: &StageConfig) -> bool {
    matches!(
        stage,
        StageConfig::Calibrate(_)
            | StageConfig::Reconstruct(_)
            | StageConfig::Distill(_)
            | StageConfig::TuneScales(_)
            | StageConfig::Evaluate(_)
    )
}

/// Whether two stages do the same, and the other run's leaves all that this one's would: latent weights that
/// nobody asks for are in nobody's way.
fn same(their: &PlannedStage, our: &PlannedStage) -> bool {
    let bare = |stage: &PlannedStage| PlannedStage {
        config: stage.config.clone().neutral(),
        keeps_latents: false,
        ..stage.clone()
    };
    (their.keeps_latents || !our.keeps_latents) && bare(their) == bare(our)
}

/// The stage that a data set is read by, where one stage reads it by itself.
fn later(role: &str) -> Option<usize> {
    role.strip_prefix("stage.")?.split('.').next()?.parse().ok()
}

/// The same file in another place; nothing that a finished stage left is written to again.
fn share(from: &Path, to: &Path) -> Result<()> {
    if to.exists() || fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    // Another file system, or one without links. Whole or not at all: it may be long.
    let beside = to.with_file_name(format!(
        ".{}.tmp-{}",
        to.file_name().unwrap_or_default().to_string_lossy(),
        std::process::id()
    ));
    fs::copy(from, &beside)
        .and_then(|_| fs::rename(&beside, to))
        .map_err(|e| Error::io("copy", from, &e))
}
