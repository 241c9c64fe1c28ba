//! A run: one execution of a plan, in one folder, that can be stopped and resumed at any time.
//!
//! Nothing is kept but files: what is done stands in `run.json`, what was learned under
//! `checkpoints/`. Data order is a function of seed, stage and step. A run whose recipe, model or
//! data changed is refused (exit 6), never silently mixed.

mod folder;
mod preflight;
mod record;
mod reuse;
mod settings;
mod standing;

use std::path::{Path, PathBuf};
use std::time::Instant;

pub use folder::RunFolder;
use folder::stage_folder;
pub use preflight::{
    Needs, Prepared, Price, StageNeeds, Target, data_of, memory_available, memory_total,
    model_sha256, prepare,
};
pub use record::{Fingerprint, RunRecord, StageRecord, Status};
pub use reuse::Reused;
pub use standing::{Standing, State};

use crate::data::{SourceShare, TokenStream};
use crate::error::{Error, Kind, Result};
use crate::exhausted;
use crate::export::Provenance;
use crate::page;
use crate::recipe::{Plan, Recipe, to_toml};
use crate::report::jsonl::JsonLines;
use crate::report::log::LogFile;
use crate::report::tensorboard::TensorBoard;
use crate::report::{Event, Reporter, Reporters, memory};
use crate::stage::{Measured, Quality, Results, StageContext, is_state, mark, remove_states};
use crate::stop::StopFlag;
use crate::store::folder::{bytes_below, entries, write_atomic};

/// How a recipe is to be run.
#[derive(Clone, Debug)]
pub struct Options {
    /// A recipe's path or name.
    pub recipe: String,
    /// `--set` overrides.
    pub set: Vec<String>,
    /// `--output`.
    pub output: Option<PathBuf>,
    /// `--device`.
    pub device: Option<String>,
    /// Start over, whatever the folder holds.
    pub fresh: bool,
    /// The run whose first stages are taken over, where the recipe begins as its does.
    pub reuse: Option<PathBuf>,
    /// Time one block before anything begins, and estimate by that.
    pub probe: bool,
    /// What an hour of this machine costs.
    pub price_per_hour: Option<f64>,
}

/// Runs a recipe to its end, or to a signal; resumes by itself.
///
/// # Errors
/// Everything that can go wrong; what was saved stays, and the same command goes on from it.
pub fn train(options: &Options, mut report: Reporters, stop: &StopFlag) -> Result<RunRecord> {
    let prepared = prepare(options, stop)?;
    announce(&prepared, &mut report);
    let (folder, mut record) = RunFolder::open(&prepared, options.fresh)?;
    if record.status == Status::Done {
        report.emit(&Event::Note {
            text: "this run is already complete; --fresh starts it over".to_owned(),
        });
        report.emit(&done(
            &record,
            last_change(&prepared.plan, prepared.plan.stages.len()),
            folder.path(),
        ));
        return Ok(record);
    }
    attach_files(&folder, &mut report)?;
    announce_to_files(&prepared, &mut report);
    say_where_it_goes_on(&prepared, &record, &folder, &mut report);
    let start = Instant::now();
    let before = record.seconds;
    let last_change = last_change(&prepared.plan, prepared.plan.stages.len());
    let outcome = execute(prepared, &folder, &mut record, &mut report, stop).map_err(|error| {
        match error.kind() {
            Kind::Stopped(_) => error.fix("the same command to go on from the last checkpoint"),
            _ => error,
        }
    });
    record.seconds = before + start.elapsed().as_secs_f64();
    let peak = memory::peak_gib();
    record.peak_gib = record.peak_gib.zip(peak).map(|(a, b)| a.max(b)).or(peak);
    record.disk_bytes = Some(bytes_below(folder.path()));
    let per_hour = options.price_per_hour.or(record.price.map(|price| price.per_hour));
    record.price = per_hour.map(|per_hour| Price::of(per_hour, record.seconds));
    record.status = match &outcome {
        Ok(()) => Status::Done,
        Err(error) if matches!(error.kind(), Kind::Stopped(_)) => Status::Stopped,
        Err(_) => Status::Failed,
    };
    let failure = outcome.as_ref().err().filter(|_| record.status == Status::Failed);
    record.failure = failure.map(Error::told);
    if let Some(told) = record.failure.clone() {
        report.emit(&Event::Failed { told, seconds: record.seconds });
    }
    let saved = record.save(folder.path());
    // Once a run has begun, whatever a weight turns out to be is a failure, not a refusal.
    let outcome = outcome.map_err(|error| match error.kind() {
        Kind::Preflight => error.with_kind(Kind::Failed),
        _ => error,
    });
    outcome.and(saved)?;
    report.emit(&done(&record, last_change, folder.path()));
    report.flush();
    write_page(&folder, &mut report);
    Ok(record)
}

/// The run as a page. What can be made again from the run is no reason to fail.
fn write_page(folder: &RunFolder, report: &mut Reporters) {
    let path = folder.path().join(page::PAGE_FILE);
    let text = page::Run::read(folder.path()).and_then(|run| page::of(&[run], &[]));
    let written = text.and_then(|text| write_atomic(&path, text.as_bytes()));
    if let Err(error) = written {
        let text = format!("{} was not written: {}", path.display(), error.what());
        report.emit(&Event::Warning { text });
    }
}

fn execute(
    prepared: Prepared,
    folder: &RunFolder,
    record: &mut RunRecord,
    report: &mut Reporters,
    stop: &StopFlag,
) -> Result<()> {
    let Prepared { plan, device, mut model, data, fingerprint, smaller, .. } = prepared;
    let provenance = Provenance {
        model: model.name.clone(),
        model_sha256: fingerprint.model,
        data_sha256: fingerprint.data,
        // Without output folder and device: equal runs give equal manifests.
        recipe: recipe_of(&plan.recipe)?,
        seed: plan.recipe.seed,
        device: device.name.clone(),
    };
    model.take_packed()?;
    let model_blocks = model.config.n_blocks;
    record.status = Status::Running;
    record.device.clone_from(&device.name);
    record.save(folder.path())?;
    for (index, stage) in plan.stages.iter().enumerate() {
        let name = stage.config.name();
        let dir = folder.stage_dir(index, name);
        let was = record.stages[index].status;
        let mut results = std::mem::take(&mut record.results);
        if !matches!(was, Status::Done | Status::Trained) {
            discard_of(&mut results, index);
        }
        model.width = stage.config.stage().width();
        let mut ctx = StageContext {
            model: &mut model,
            data: &data,
            device: &device,
            compute: plan.recipe.model.compute.dtype(),
            seed: plan.recipe.seed,
            stage: index,
            latest: stage.latest,
            first_step: stage.first_step,
            is_last: record.stages[index + 1..].iter().all(|stage| stage.status == Status::Pending),
            steps: stage.config.stage().steps(model_blocks),
            left_by: last_change(&plan, index),
            specs: &stage.specs,
            keeps_latents: stage.keeps_latents,
            head: stage.head,
            observer: &stage.observer,
            default_spec: stage.default_spec,
            scales: plan.recipe.quant.scales,
            dir: &dir,
            run_dir: folder.path(),
            report,
            stop,
            results: &mut results,
            provenance: &provenance,
        };
        exhausted::working_on(format!("stage {index} ({name})"), smaller[index].as_str());
        let start = Instant::now();
        let mut outcome = match was {
            Status::Done | Status::Trained => {
                remove_states(&dir).and_then(|()| stage.config.restore(&mut ctx))
            }
            _ => begin(&mut ctx, name, plan.stages.len(), &dir)
                .and_then(|()| stage.config.run(&mut ctx)),
        };
        let mut trained = was == Status::Trained;
        if was != Status::Done && outcome.is_ok() && stage.config.is_judged() {
            // The work is done and saved, whatever the gate says of it.
            trained = true;
            record.stages[index].status = Status::Trained;
            record.stages[index].files = left_in(&dir);
            record.results = ctx.results.clone();
            ctx.report.emit(&Event::Saved { mark: mark_of(&dir, Status::Trained) });
            record.save(folder.path())?;
            // What the stage left is enough from here on.
            remove_states(&dir)?;
            outcome = stage.config.judge(&mut ctx);
        }
        record.results = results;
        if was == Status::Done {
            outcome?;
            continue;
        }
        record.stages[index].seconds += start.elapsed().as_secs_f64();
        record.stages[index].peak_gib = memory::peak_gib();
        record.stages[index].status = match &outcome {
            Ok(()) => Status::Done,
            Err(_) if trained => Status::Trained,
            Err(error) if matches!(error.kind(), Kind::Stopped(_)) => Status::Stopped,
            Err(_) => Status::Failed,
        };
        if outcome.is_ok() {
            record.stages[index].files = left_in(&dir);
            let (stage, of, name) = (index, plan.stages.len(), name.to_owned());
            report.emit(&Event::StageEnd {
                stage,
                of,
                name,
                seconds: record.stages[index].seconds,
            });
            report.emit(&Event::Saved { mark: mark_of(&dir, Status::Done) });
        }
        let saved = record.save(folder.path());
        // What ended the stage comes first: a full disk is often why the record cannot be saved.
        outcome.and(saved)?;
        report.flush();
    }
    Ok(())
}

/// An unfinished stage measures again: what an interrupted attempt noted is dropped.
fn discard_of(results: &mut Results, stage: usize) {
    results.measured.retain(|measured| measured.stage != stage);
    results.setbacks.retain(|setback| setback.stage != stage);
    // Baselines are the same whenever they are measured.
    let baseline = |what: &str| what == "float" || what.starts_with("rtn ");
    results.quality.retain(|quality| quality.stage != stage || baseline(&quality.what));
}

/// The checkpoints in a stage's folder, without states of its training.
fn left_in(dir: &Path) -> Vec<String> {
    let paths = entries(dir).unwrap_or_default().into_iter();
    let names = paths.filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    names.filter(|name| !name.starts_with('.') && !is_state(name)).collect()
}

fn begin(ctx: &mut StageContext<'_>, name: &str, of: usize, dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io("create", dir, &e))?;
    let stage = ctx.stage;
    ctx.report.emit(&Event::StageStart { stage, of, name: name.to_owned() });
    Ok(())
}

/// Plan, model and needs on the screen, before anything is touched.
pub fn announce(prepared: &Prepared, report: &mut dyn Reporter) {
    let plan = &prepared.plan;
    report.emit(&Event::Plan { text: plan.summary() });
    report.emit(&Event::Model {
        name: prepared.model.name.clone(),
        blocks: prepared.model.config.n_blocks,
        quantized: plan.quantized().len(),
        kept: prepared.kept(),
    });
    report.emit(&prepared.needs.event(&prepared.device));
    if let Some(Price { per_hour, run }) = prepared.needs.price {
        let text = format!("at {per_hour:.2} an hour the run costs about {run:.2}");
        report.emit(&Event::Note { text });
    }
    if let Some(Target { format, scales, bits_per_weight }) = prepared.target {
        let text = format!(
            "for {}: {bits_per_weight:.2} bits a quantized weight, with quant.scales = \"{}\"",
            format.name(),
            scales.name()
        );
        report.emit(&Event::Note { text });
    }
    if let Some(reused) = &prepared.reused {
        report.emit(&Event::Note { text: reused.summary() });
    }
    for text in &prepared.chosen {
        report.emit(&Event::Note { text: text.clone() });
    }
    if let Some(text) = prepared.scarce.clone() {
        report.emit(&Event::Warning { text });
    }
    let data = &prepared.data;
    let corpora = [
        ("calibration", &data.calibration),
        ("train", &data.train),
        ("validation", &data.validation),
    ];
    for (role, corpus) in corpora {
        if let Some(text) = corpus.as_ref().and_then(|corpus| packing(role, &corpus.stream)) {
            report.emit(&Event::Note { text });
        }
    }
}

/// What became of a data set of examples.
fn packing(role: &str, stream: &TokenStream) -> Option<String> {
    let length = stream.packed?;
    let cut = match stream.cut {
        0 => String::new(),
        cut => format!("; {cut} of them cut to a window"),
    };
    let (windows, counted, tokens) =
        (stream.windows(length), stream.counted(), stream.tokens.len());
    let empty = match stream.empty {
        0 => String::new(),
        empty => format!("; {empty} teach nothing"),
    };
    let share = |source: &SourceShare| {
        format!("{:.1} % {}", 100.0 * source.visits as f64 / windows.max(1) as f64, source.name)
    };
    let shares: Vec<String> = stream.sources.iter().map(share).collect();
    let mix = if shares.is_empty() { String::new() } else { format!("; {}", shares.join(", ")) };
    Some(format!(
        "data.{role} packs {} examples into {windows} windows of {length} tokens{cut}{empty}; {counted} of \
         {tokens} tokens are supervised{mix}",
        stream.documents
    ))
}

/// The recipe for TensorBoard, and what it compares runs by.
fn announce_to_files(prepared: &Prepared, report: &mut Reporters) {
    let text = to_toml(&prepared.plan.recipe).unwrap_or_default();
    report.emit(&Event::Text { tag: "recipe".to_owned(), text });
    let settings = settings::settings(&prepared.plan, &prepared.model.name);
    report.emit(&Event::Settings { settings });
}

fn attach_files(folder: &RunFolder, report: &mut Reporters) -> Result<()> {
    let dir = folder.path();
    let metrics = dir.join("metrics.jsonl");
    report.push(JsonLines::open(&metrics)?);
    report.push(LogFile::open(&dir.join("run.log"))?);
    // Behind the metrics, whose lines it shows.
    report.push(TensorBoard::open(&dir.join("tensorboard"), &metrics));
    Ok(())
}

/// The mark of a run's beginning.
const START: &str = "start";

/// Says from which state a run that has begun goes on, unless its unfinished stage will: from one of
/// its own.
fn say_where_it_goes_on(
    prepared: &Prepared,
    record: &RunRecord,
    folder: &RunFolder,
    report: &mut Reporters,
) {
    if record.status == Status::Pending {
        report.emit(&Event::Saved { mark: START.to_owned() });
        return;
    }
    let is_left = |stage: &StageRecord| matches!(stage.status, Status::Done | Status::Trained);
    if record.status == Status::Running {
        let text = "the attempt before this one ended without a word: killed, or out of memory";
        report.emit(&Event::Note { text: text.to_owned() });
    }
    let open = record.stages.iter().position(|stage| stage.status != Status::Done);
    let Some(stage) = open else { return };
    let later = record.stages.iter().skip(stage + 1);
    if later.clone().any(is_left) {
        // Something that was lost is made again; what came behind it stays.
        return;
    }
    let planned = &prepared.plan.stages[stage];
    let name = planned.config.name();
    let dir = |stage: usize| {
        let name = prepared.plan.stages[stage].config.name();
        folder.stage_dir(stage, name)
    };
    let (mark, position) = match (record.stages[stage].status, stage) {
        (Status::Trained, _) => (mark_of(&dir(stage), Status::Trained), "its quality gate"),
        _ if planned.config.stage().has_saved(&dir(stage)) => return,
        (_, 0) => (START.to_owned(), "its start"),
        _ => (mark_of(&dir(stage - 1), Status::Done), "its start"),
    };
    let (stage, position) = (name.to_owned(), position.to_owned());
    report.emit(&Event::Resumed { stage, position, mark });
}

/// What the record's note that a stage has got so far is called.
fn mark_of(dir: &Path, status: Status) -> String {
    let status = if status == Status::Done { "done" } else { "trained" };
    mark(dir, status)
}

/// The last stage before `stage` that changes the model.
fn last_change(plan: &Plan, stage: usize) -> Option<usize> {
    plan.stages[..stage].iter().rposition(|stage| stage.config.changes_model())
}

/// The recipe without output folder and device.
fn recipe_of(recipe: &Recipe) -> Result<String> {
    let mut recipe = recipe.clone();
    recipe.output = PathBuf::new();
    recipe.device = String::new();
    to_toml(&recipe)
}

/// The last line. A perplexity that a stage has changed since is none of the result; without a later
/// one the few windows of the quality gate say what they can.
fn done(record: &RunRecord, last_change: Option<usize>, dir: &Path) -> Event {
    let results = &record.results;
    let current = |stage: usize| last_change.is_none_or(|change| stage > change);
    let last = results.measured.iter().rev();
    let last = last.filter(|measured| current(measured.stage));
    let perplexity = |measured: &Measured| measured.result.number("perplexity");
    let last = last
        .filter(|measured| measured.what.starts_with("after"))
        .find(|measured| perplexity(measured).is_some());
    let task = last.map(|measured| &measured.task);
    let float = results.measured.iter().find(|m| m.what == "float" && Some(&m.task) == task);
    let judged =
        results.quality.iter().rev().find(|quality| {
            quality.what.starts_with("after ") && Some(quality.stage) == last_change
        });
    let judged = judged.filter(|_| last.is_none());
    let teacher = judged.and_then(|judged| {
        let float = |q: &&Quality| q.what == "float" && q.compares_with(judged);
        results.quality.iter().find(float)
    });
    let export = results.exports.first();
    Event::Done {
        run: dir.display().to_string(),
        perplexity_float: float.and_then(perplexity).or(teacher.map(Quality::perplexity)),
        perplexity_final: last.and_then(perplexity).or(judged.map(Quality::perplexity)),
        slice_tokens: judged.map(|judged| judged.tokens),
        bytes: export.map(|export| export.bytes),
        bits_per_weight: export.map(|export| export.bits_per_weight),
        codes_exact: !results.exports.iter().any(|export| export.lossy),
        seconds: record.seconds,
    }
}
