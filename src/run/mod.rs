//! A run: one execution of a plan, in one folder, that can be stopped and resumed at any time.
//!
//! Nothing is kept but files: what is done stands in `run.json`, what was learned under
//! `checkpoints/`. Data order is a function of seed, stage and step. A run whose recipe, model or
//! data changed is refused (exit 6), never silently mixed.

mod folder;
mod preflight;
mod record;

use std::path::{Path, PathBuf};
use std::time::Instant;

pub use folder::RunFolder;
pub use preflight::{Needs, Prepared, Target, prepare};
pub use record::{Fingerprint, RunRecord, StageRecord, Status};

use crate::data::TokenStream;
use crate::error::{Error, Kind, Result};
use crate::export::Provenance;
use crate::recipe::{Plan, Recipe, to_toml};
use crate::report::jsonl::{JsonLines, cut_back};
use crate::report::log::LogFile;
use crate::report::tensorboard::TensorBoard;
use crate::report::{At, Event, Position, Reporter, Reporters, memory};
use crate::stage::{Measured, Quality, Results, StageContext};
use crate::stop::StopFlag;

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
    attach_files(&prepared, &record, &folder, &mut report)?;
    announce_to_files(&prepared, &mut report);
    let start = Instant::now();
    let before = record.seconds;
    let last_change = last_change(&prepared.plan, prepared.plan.stages.len());
    let outcome = execute(prepared, &folder, &mut record, &mut report, stop);
    record.seconds = before + start.elapsed().as_secs_f64();
    let peak = memory::peak_gib();
    record.peak_gib = record.peak_gib.zip(peak).map(|(a, b)| a.max(b)).or(peak);
    record.status = match &outcome {
        Ok(()) => Status::Done,
        Err(error) if matches!(error.kind(), Kind::Stopped(_)) => Status::Stopped,
        Err(_) => Status::Failed,
    };
    let saved = record.save(folder.path());
    // Once a run has begun, whatever a weight turns out to be is a failure, not a refusal.
    let outcome = outcome.map_err(|error| match error.kind() {
        Kind::Preflight => error.with_kind(Kind::Failed),
        _ => error,
    });
    outcome.and(saved)?;
    report.emit(&done(&record, last_change, folder.path()));
    report.flush();
    Ok(record)
}

fn execute(
    prepared: Prepared,
    folder: &RunFolder,
    record: &mut RunRecord,
    report: &mut Reporters,
    stop: &StopFlag,
) -> Result<()> {
    let Prepared { plan, device, mut model, data, fingerprint, .. } = prepared;
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
        let mut ctx = StageContext {
            model: &mut model,
            data: &data,
            device: &device,
            compute: plan.recipe.model.compute.dtype(),
            seed: plan.recipe.seed,
            stage: index,
            latest: stage.latest,
            first_step: stage.first_step,
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
        let start = Instant::now();
        let mut outcome = match was {
            Status::Done | Status::Trained => stage.config.restore(&mut ctx),
            _ => begin(&mut ctx, name, plan.stages.len(), &dir)
                .and_then(|()| stage.config.run(&mut ctx)),
        };
        let mut trained = was == Status::Trained;
        if was != Status::Done && outcome.is_ok() && stage.config.is_judged() {
            // The work is done and saved, whatever the gate says of it.
            trained = true;
            record.stages[index].status = Status::Trained;
            record.results = ctx.results.clone();
            record.save(folder.path())?;
            outcome = stage.config.judge(&mut ctx);
        }
        record.results = results;
        if was == Status::Done {
            outcome?;
            continue;
        }
        record.stages[index].seconds += start.elapsed().as_secs_f64();
        record.stages[index].status = match &outcome {
            Ok(()) => Status::Done,
            Err(_) if trained => Status::Trained,
            Err(error) if matches!(error.kind(), Kind::Stopped(_)) => Status::Stopped,
            Err(_) => Status::Failed,
        };
        let saved = record.save(folder.path());
        // What ended the stage comes first: a full disk is often why the record cannot be saved.
        outcome.and(saved)?;
        let (stage, of, name) = (index, plan.stages.len(), name.to_owned());
        report.emit(&Event::StageEnd { stage, of, name, seconds: record.stages[index].seconds });
        report.flush();
    }
    Ok(())
}

/// An unfinished stage measures again: what an interrupted attempt noted is dropped.
fn discard_of(results: &mut Results, stage: usize) {
    results.measured.retain(|measured| measured.stage < stage);
    results.setbacks.retain(|setback| setback.stage < stage);
    // Baselines are the same whenever they are measured.
    let baseline = |what: &str| what == "float" || what.starts_with("rtn ");
    results.quality.retain(|quality| quality.stage < stage || baseline(&quality.what));
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
    if let Some(Target { format, scales, bits_per_weight }) = prepared.target {
        let text = format!(
            "for {}: {bits_per_weight:.2} bits a quantized weight, with quant.scales = \"{}\"",
            format.name(),
            scales.name()
        );
        report.emit(&Event::Note { text });
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
    Some(format!(
        "data.{role} packs {} examples into {windows} windows of {length} tokens{cut}; {counted} of \
         {tokens} tokens are supervised",
        stream.documents
    ))
}

/// The recipe for TensorBoard; the opening lines for the log.
fn announce_to_files(prepared: &Prepared, report: &mut Reporters) {
    let text = to_toml(&prepared.plan.recipe).unwrap_or_default();
    report.emit(&Event::Text { tag: "recipe".to_owned(), text });
}

fn attach_files(
    prepared: &Prepared,
    record: &RunRecord,
    folder: &RunFolder,
    report: &mut Reporters,
) -> Result<()> {
    let dir = folder.path();
    let metrics = dir.join("metrics.jsonl");
    let mut board = TensorBoard::open(&dir.join("tensorboard"));
    if let Some(position) = position(prepared, record, folder) {
        cut_back(&metrics, &position)?;
        // Curves inside blocks have an axis of their own, which must not be cut.
        if matches!(position.at, At::Step(_)) && position.global_step > 0 {
            board.resume(position.global_step);
        }
    }
    report.push(JsonLines::open(&metrics)?);
    report.push(LogFile::open(&dir.join("run.log"))?);
    report.push(board);
    Ok(())
}

/// Where a run that has begun goes on.
fn position(prepared: &Prepared, record: &RunRecord, folder: &RunFolder) -> Option<Position> {
    let open = |stage: &StageRecord| !matches!(stage.status, Status::Done | Status::Trained);
    let stage = record.stages.iter().position(open)?;
    let begun = record.stages[stage].status != Status::Pending || stage > 0;
    let planned = prepared.plan.stages.get(stage).filter(|_| begun)?;
    let at = planned.config.stage().saved(&folder.stage_dir(stage, planned.config.name()));
    let steps = match at {
        At::Step(step) => step,
        At::Block(_) => 0,
    };
    Some(Position { stage, at, global_step: planned.first_step + steps })
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
