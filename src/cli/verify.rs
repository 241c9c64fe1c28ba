//! `fewbit verify DIR`: an export against its own manifest.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::{Arithmetic, ModelArgs, Session, output};
use crate::data::sha256_of;
use crate::error::{Error, Kind, Result};
use crate::export::{self, Manifest, OpenModel, open_model};
use crate::model::{ByBlock, WeightSource, weight_name};
use crate::report::terminal::Bar;
use crate::stage::PARITY_WINDOWS;
use crate::stop::StopFlag;
use crate::store::{TensorSource, locate};
use crate::task::{self, Gauge, PplConfig};

/// By what part of itself a loss may change with the order of sums.
const CLOSE: f64 = 1e-4;

/// Arguments of `verify`.
#[derive(Args, Debug)]
pub(super) struct VerifyArgs {
    /// The exported folder, or a run: then its packed export
    dir: String,
    /// Also measure the perplexity the manifest recorded, on this text
    #[arg(long, value_name = "FILE")]
    data: Option<String>,
    /// Where to measure it
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &VerifyArgs, stop: &StopFlag) -> Result<()> {
    let failed = |error: Error| match error.kind() {
        Kind::Failed | Kind::Preflight => error.with_kind(Kind::Gate),
        _ => error,
    };
    let dir = locate::model(&args.dir)?;
    let manifest = Manifest::read(&dir).map_err(failed)?.ok_or_else(|| {
        Error::usage("the folder has no manifest.json of fewbit's")
            .at(dir.display())
            .fix("a folder under a run's export/")
    })?;
    manifest.check_small_files(&dir).map_err(failed)?;
    let opened = open_model(&dir).map_err(failed)?;
    let manifest = &manifest;
    check_names(&opened, manifest).map_err(failed)?;
    for (name, sha256) in &manifest.dense {
        stop.check()?;
        check_tensor(&opened, name, sha256).map_err(failed)?;
    }
    for name in manifest.linears.keys() {
        stop.check()?;
        check_linear(&opened, manifest, name).map_err(failed)?;
    }
    manifest.check_weight_files(&dir).map_err(failed)?;
    check_record(&opened, manifest).map_err(failed)?;
    let session = session(args)?;
    let prompts = check_logits(&session, manifest, stop).map_err(failed)?;
    let perplexity = match &args.data {
        Some(data) => Some(check_perplexity(args, &session, manifest, data, stop)?),
        None => None,
    };
    let (linears, dense) = (manifest.linears.len(), manifest.dense.len());
    if args.json {
        return output::json(&json!({
            "ok": true,
            "format": manifest.format,
            "linears": linears,
            "dense_tensors": dense,
            "bits_per_weight": manifest.bits_per_weight,
            "lossy": manifest.lossy,
            "sealed": manifest.sha256.is_some(),
            "prompts": prompts,
            "parity": manifest.parity,
            "perplexity": perplexity,
        }));
    }
    let parity = match (&manifest.parity, perplexity) {
        (Some(p), Some(perplexity)) => {
            format!("perplexity {perplexity:.4} (context {}) measured again and equal", p.context)
        }
        (Some(p), None) if manifest.lossy => {
            let (trained, exported, context) = (p.trained, p.exported, p.context);
            format!("perplexity {trained:.4} became {exported:.4} (context {context}), recorded")
        }
        (Some(p), None) => {
            let (perplexity, context) = (p.exported, p.context);
            format!(
                "perplexity {perplexity:.4} (context {context}) recorded, trained and exported equal"
            )
        }
        (None, _) => "no perplexity recorded".to_owned(),
    };
    output::line(&format!(
        "ok  {}  {linears} linears: hashes, shapes, codes, scales, weights\n\
         ok  {dense} other tensors and {} files: hashes\n\
         {}\n\
         ok  {}\n\
         ok  {parity}",
        manifest.format.name(),
        manifest.files.len(),
        if manifest.sha256.is_some() {
            "ok  manifest: its own hash"
        } else {
            "old manifest without a hash of its own: what it says of the run was not checked"
        },
        match prompts {
            0 => "no prompts recorded".to_owned(),
            prompts => format!("{prompts} prompts: logits and loss"),
        },
    ))
}

/// What the manifest says of itself agrees with the files.
fn check_record(opened: &OpenModel, manifest: &Manifest) -> Result<()> {
    let mut stats = export::WeightStats::default();
    for name in manifest.linears.keys() {
        if let Some(weight) = opened.quantized(name)? {
            stats.add(&weight);
        }
    }
    let stored = stats.bits_per_weight();
    if stats.weights > 0 && stored.to_bits() != manifest.bits_per_weight.to_bits() {
        let says = manifest.bits_per_weight;
        let what = format!("the weights take {stored} bits each, the manifest says {says}");
        return Err(damaged(&what, &opened.dir, "bits_per_weight"));
    }
    match &manifest.parity {
        Some(p) if !manifest.lossy && p.trained.to_bits() != p.exported.to_bits() => {
            let what = "the recorded perplexities of trained and exported model differ";
            Err(damaged(what, &opened.dir, "parity"))
        }
        _ => Ok(()),
    }
}

/// Nothing missing, nothing the manifest does not know.
fn check_names(opened: &OpenModel, manifest: &Manifest) -> Result<()> {
    let stored: Vec<&str> = opened.checkpoint.names();
    let recorded = manifest.linears.values().flat_map(|record| record.sha256.keys());
    let mut recorded: Vec<&str> =
        recorded.chain(manifest.dense.keys()).map(String::as_str).collect();
    recorded.sort_unstable();
    if stored == recorded {
        return Ok(());
    }
    let missing = recorded.iter().find(|name| !stored.contains(name));
    let extra = stored.iter().find(|name| !recorded.contains(name));
    let (what, name) = match (missing, extra) {
        (Some(name), _) => ("a tensor is missing", *name),
        (None, Some(name)) => ("a tensor is not in the manifest", *name),
        (None, None) => ("the manifest names a tensor twice", ""),
    };
    Err(damaged(what, &opened.dir, name))
}

fn check_tensor(opened: &OpenModel, name: &str, sha256: &str) -> Result<()> {
    if opened.checkpoint.read(name)?.sha256() == sha256 {
        return Ok(());
    }
    Err(damaged("a tensor does not match its hash", &opened.dir, name))
}

fn check_linear(opened: &OpenModel, manifest: &Manifest, name: &str) -> Result<()> {
    let record = &manifest.linears[name];
    for (tensor, sha256) in &record.sha256 {
        check_tensor(opened, tensor, sha256)?;
    }
    let weights = opened.weight(&weight_name(name), &record.shape)?;
    if export::weights_sha256(&weights) != record.weights_sha256 {
        return Err(damaged("decoded weights do not match their hash", &opened.dir, name));
    }
    match opened.quantized(name)? {
        Some(weight) if weight.histogram() != record.histogram => {
            Err(damaged("codes do not match the recorded histogram", &opened.dir, name))
        }
        _ => Ok(()),
    }
}

fn session(args: &VerifyArgs) -> Result<Session> {
    let (model, device) = (args.dir.clone(), args.device.clone());
    ModelArgs { model, device, compute: Arithmetic::F32, bits: None }.open()
}

/// The folder says to the recorded prompts what it said when it was written. Gives their number.
fn check_logits(session: &Session, manifest: &Manifest, stop: &StopFlag) -> Result<usize> {
    let Some(recorded) = &manifest.logits else { return Ok(0) };
    let opened = &session.opened;
    let vocab = opened.config.vocab;
    let fits = |id: &u32| (*id as usize) < vocab;
    let prompts = &recorded.prompts;
    if !prompts.iter().all(|prompt| !prompt.is_empty() && prompt.iter().all(fits)) {
        return Err(damaged("a recorded prompt is none of this model", &opened.dir, "logits"));
    }
    let bar = Bar::new("verify", "logits");
    let progress = |done, of| bar.at(done, of);
    let gauge = Gauge { prompts: prompts.clone(), ..session.gauge(None, stop, &progress)? };
    let found = gauge.measure(&opened.config, opened, opened.tap())?;
    let equal = found.logits_sha256() == recorded.sha256
        && found.prompts_nll.to_bits() == recorded.nll.to_bits();
    // Another device, or another processor, sums in another order.
    let close = found.next_tokens() == recorded.next
        && (found.prompts_nll - recorded.nll).abs() <= CLOSE * recorded.nll.abs();
    if equal || close {
        return Ok(prompts.len());
    }
    Err(Error::gate("the logits of the recorded prompts are not those of the manifest")
        .at(opened.dir.display())
        .fix("the same device as the run's, or export the run again"))
}

fn check_perplexity(
    args: &VerifyArgs,
    session: &Session,
    manifest: &Manifest,
    data: &str,
    stop: &StopFlag,
) -> Result<f64> {
    let recorded = manifest.parity.as_ref().ok_or_else(|| {
        Error::usage("the manifest records no perplexity").at(&args.dir).fix("no --data")
    })?;
    let path = locate::data(data)?;
    if sha256_of(&[&path])? != recorded.data_sha256 {
        return Err(Error::usage("the perplexity was recorded on another text")
            .at(data)
            .fix(format!("the text with sha256 {}", recorded.data_sha256)));
    }
    let tokenizer = session.tokenizer()?;
    let marks = session.marks(&tokenizer)?;
    let stream = session.read(&[path], &recorded.reading, &tokenizer, marks, recorded.context)?;
    let task = PplConfig {
        context: Some(recorded.context),
        stride: recorded.stride,
        windows: recorded.windows.or(Some(PARITY_WINDOWS)),
        ..PplConfig::default()
    };
    let Session { opened, device, compute, .. } = session;
    let (config, device) = (&opened.config, &device.device);
    let model = ByBlock::open(config, opened, opened.tap(), device, compute.dtype())?;
    let result = task::measure(&model, config, &stream, &task, device, stop, &mut |_, _| ())?;
    // Another device may round differently; the same one does not.
    let same_device = session.device.name == manifest.provenance.device;
    // (Processors of one name may, in the last digits.)
    let tolerance = if same_device { CLOSE } else { 1e-2 } * recorded.exported;
    if (result.perplexity - recorded.exported).abs() <= tolerance {
        return Ok(result.perplexity);
    }
    Err(Error::gate(format!(
        "the perplexity is {}, the manifest says {}",
        result.perplexity, recorded.exported
    ))
    .at(&args.dir)
    .fix("the same device as the run's, or export the run again"))
}

fn damaged(what: &str, dir: &Path, name: &str) -> Error {
    Error::gate(what).at(dir.display()).at(name).fix("export the run again")
}
