//! The quality gate: no training leaves a model, and no export writes one, that is worse than what it
//! began with or than plain rounding, unless the recipe says so.
//!
//! Everything is measured on a few windows of the validation text ([`Slice`]) and compared in pairs
//! there. A number that cannot change is measured once and kept in the run's results.

use std::fmt::Write;

use super::context::StageContext;
use super::evaluate::rounded;
use super::kind::Judged;
use super::results::Quality;
use super::state::Packed;
use super::validate::{NOISE_NLL, Slice, ValidateConfig};
use crate::error::{Error, Result};
use crate::model::{ByBlock, ModelTap, WeightSource, weight_name};
use crate::report::terminal::Bar;
use crate::report::{Event, Reporter};
use crate::store::HostTensor;

/// Judges what a training stage has left.
///
/// # Errors
/// A gate error (exit 5) when it is worse than its start or plain rounding and the recipe does not
/// allow that; whatever measuring gives.
pub(super) fn after(stage: &str, judged: &Judged<'_>, ctx: &mut StageContext<'_>) -> Result<()> {
    let default = ValidateConfig::default();
    let validate = judged.validate.unwrap_or(&default);
    let Some(slice) = slice(validate, ctx) else { return Ok(()) };
    let left = current(&slice, ctx)?;
    let of_start = |q: &&Quality| q.stage == ctx.stage && q.what == "start";
    let start = ctx.results.quality.iter().rev().find(of_start);
    let start = start.filter(|start| start.compares_with(&left)).cloned();
    let rtn = plain_rounding(&slice, ctx)?;
    judge(&left, start.as_ref(), rtn.as_ref(), judged, stage, ctx)
}

/// Judges the model that is about to be exported.
///
/// # Errors
/// As [`after`].
pub(super) fn before_export(allow_worse: bool, ctx: &mut StageContext<'_>) -> Result<()> {
    // A folder that nothing has changed since, and plain rounding itself, have nothing to prove.
    let head = ctx.model.config.head();
    let rtn = |(name, (_, method)): (&String, &(_, String))| name == head || method == "rtn";
    if ctx.left_by.is_none() || ctx.model.quantized.iter().all(rtn) {
        return Ok(());
    }
    let Some(slice) = slice(&ValidateConfig::default(), ctx) else { return Ok(()) };
    let left = ctx.left_by.and_then(|stage| {
        let after = |q: &&Quality| q.stage == stage && q.what.starts_with("after ");
        ctx.results.quality.iter().rev().find(after).cloned()
    });
    // What the last stage was measured on may be other windows than the default ones.
    let rtn = left.as_ref().and_then(|left| {
        let same = |q: &&Quality| {
            q.what.starts_with("rtn ") && q.compares_with(left) && q.stage == left.stage
        };
        ctx.results.quality.iter().rev().find(same).cloned()
    });
    let (left, rtn) = match (left, rtn) {
        (Some(left), Some(rtn)) => (left, Some(rtn)),
        _ => (current(&slice, ctx)?, plain_rounding(&slice, ctx)?),
    };
    let judged = Judged { validate: None, allow_worse, advice: "" };
    judge(&left, None, rtn.as_ref(), &judged, "export", ctx)
}

/// The windows to measure on; without any, that is said once in a run.
fn slice(config: &ValidateConfig, ctx: &mut StageContext<'_>) -> Option<Slice> {
    let corpus = ctx.data.validation.as_ref();
    let slice = corpus.and_then(|corpus| Slice::new(corpus, config, &ctx.model.config));
    if slice.is_none() && !ctx.results.unguarded {
        ctx.results.unguarded = true;
        let text = "without [data.validation] nothing tells whether a stage makes the model worse \
                    than plain rounding";
        ctx.report.emit(&Event::Note { text: text.to_owned() });
    }
    slice
}

/// The current model on the slice.
fn current(slice: &Slice, ctx: &mut StageContext<'_>) -> Result<Quality> {
    let what = format!("after {}", ctx.latest);
    let new = |nll| slice.quality(ctx, &what, nll);
    let wanted = new(0.0);
    let known = |q: &&Quality| q.stage == ctx.stage && q.what == what && q.compares_with(&wanted);
    if let Some(known) = ctx.results.quality.iter().find(known) {
        return Ok(known.clone());
    }
    let left = new(measure(slice, &Packed(ctx.model), ctx.model.tap(), ctx)?);
    ctx.results.quality.push(left.clone());
    Ok(left)
}

/// The float model rounded at the current bits and groups, where there is a float model and something
/// is quantized.
fn plain_rounding(slice: &Slice, ctx: &mut StageContext<'_>) -> Result<Option<Quality>> {
    if ctx.model.float().is_err() {
        return Ok(None);
    }
    let made_by = fingerprint(ctx);
    let wanted = Quality { made_by: made_by.clone(), ..slice.quality(ctx, "", 0.0) };
    let known = |q: &&Quality| q.made_by == made_by && q.compares_with(&wanted);
    let known = ctx.results.quality.iter().find(known).cloned();
    let rtn = match known {
        // Again under this stage's number, for the export that asks for what the stage compared with.
        Some(known) if known.stage == ctx.stage => return Ok(Some(known)),
        Some(known) => Quality { stage: ctx.stage, ..known },
        None => {
            let Some((baseline, what)) = rounded(ctx)? else { return Ok(None) };
            let nll = measure(slice, &baseline, ctx.model.tap(), ctx)?;
            Quality { made_by, ..slice.quality(ctx, &what, nll) }
        }
    };
    ctx.results.quality.push(rtn.clone());
    Ok(Some(rtn))
}

fn measure(
    slice: &Slice,
    source: &dyn WeightSource,
    tap: ModelTap,
    ctx: &StageContext<'_>,
) -> Result<f64> {
    let (config, device) = (&ctx.model.config, &ctx.device.device);
    let model = ByBlock::open(config, source, tap, device, ctx.compute)?;
    let bar = Bar::new("gate", "comparing on a slice of the validation text");
    Ok(slice.measure(&model, None, config, device, (ctx.stop, &|done, of| bar.at(done, of)))?.nll)
}

/// SHA-256 of what plain rounding at the current bits and groups depends on.
fn fingerprint(ctx: &StageContext<'_>) -> String {
    let mut text =
        format!("{:?} {:?} {}\n", ctx.default_spec, ctx.observer, ctx.model.activations.quant);
    if let Some(width) = ctx.model.width {
        let _ = writeln!(text, "read at {width}");
    }
    for (name, (weight, _)) in &ctx.model.quantized {
        // Nothing fails to be written to a string.
        let _ = writeln!(text, "{name} {} {:?}", weight.bits, weight.layout);
    }
    // Fine-tuning makes another float model.
    for name in ctx.model.quantized.keys().map(|linear| weight_name(linear)) {
        if let Some(tensor) = ctx.model.tuned.get(&name) {
            let _ = writeln!(text, "{name} {}", tensor.sha256());
        }
    }
    HostTensor::u8([text.len()], text.as_bytes()).sha256()
}

/// Says how the model compares; refuses it, or warns, when it is worse.
fn judge(
    left: &Quality,
    start: Option<&Quality>,
    rtn: Option<&Quality>,
    judged: &Judged<'_>,
    stage: &str,
    ctx: &mut StageContext<'_>,
) -> Result<()> {
    let worse = |other: &Quality| match (left.nll_per_token, other.nll_per_token) {
        (Some(left), Some(other)) => left > other + NOISE_NLL,
        // Beside a number, none is worse; beside none, anything is as good.
        (None, other) => other.is_some(),
        (Some(_), None) => false,
    };
    let than_rtn = rtn.filter(|rtn| worse(rtn)).map(|rtn| (rtn, "plain rounding"));
    let than_start = start.filter(|start| worse(start)).map(|start| (start, "before the stage"));
    let verdict = than_rtn.or(than_start);
    let passed = verdict.is_none() && left.nll_per_token.is_some();
    ctx.report.emit(&Event::Gate {
        stage: ctx.stage,
        what: left.what.clone(),
        perplexity: left.perplexity(),
        start: start.map(Quality::perplexity),
        rtn: rtn.map(Quality::perplexity),
        tokens: left.tokens,
        passed,
    });
    if passed {
        return Ok(());
    }
    let number = |quality: &Quality| crate::report::perplexity(quality.perplexity());
    let what = match verdict {
        Some((other, than)) => format!(
            "{} the model is worse than {than}: perplexity {}, {} {}, on {} tokens of validation",
            left.what,
            number(left),
            if other.what == "start" { "before" } else { other.what.as_str() },
            number(other),
            left.tokens
        ),
        None => format!("{} the model's loss is not a number", left.what),
    };
    if judged.allow_worse {
        ctx.report.emit(&Event::Warning { text: what });
        return Ok(());
    }
    let key = format!("stage.{}.{stage}.allow_worse=true", ctx.stage);
    Err(Error::gate(what)
        .at(format!("stage {}, {stage}", ctx.stage))
        .fix(format!("{}--set {key} to go on from what is saved", judged.advice)))
}
