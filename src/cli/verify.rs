//! `fewbit verify DIR`: an export against its own manifest.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::{ModelArgs, output};
use crate::data::{TokenStream, sha256_of};
use crate::error::{Error, Kind, Result};
use crate::export::{self, Manifest, OpenModel, open_model};
use crate::model::{WeightSource, weight_name};
use crate::stage::PARITY_WINDOWS;
use crate::stop::StopFlag;
use crate::store::folder::sha256_file;
use crate::store::{TensorSource, locate};
use crate::task::{self, PplConfig};

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
    for (name, sha256) in &manifest.files {
        let path = dir.join(name);
        if sha256_file(&path).map_err(failed)? != *sha256 {
            return Err(damaged("a file does not match its hash", &dir, name));
        }
    }
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
    check_record(&opened, manifest)?;
    let perplexity = match &args.data {
        Some(data) => Some(check_perplexity(args, &opened, manifest, data, stop)?),
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
            "parity": manifest.parity,
            "perplexity": perplexity,
        }));
    }
    let parity = match (&manifest.parity, perplexity) {
        (Some(p), Some(perplexity)) => {
            format!("perplexity {perplexity:.4} (context {}) measured again and equal", p.context)
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
         ok  {parity}",
        manifest.format.name(),
        manifest.files.len(),
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
        Some(parity) if parity.trained.to_bits() != parity.exported.to_bits() => {
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

fn check_perplexity(
    args: &VerifyArgs,
    opened: &OpenModel,
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
    let dir = args.dir.clone();
    let compute = crate::recipe::Compute::F32;
    let session = ModelArgs { model: dir, device: args.device.clone(), compute }.open()?;
    let tokenizer = session.tokenizer()?;
    let marks = session.marks(&tokenizer)?;
    let (format, length) = (recorded.format, recorded.context);
    let stream = TokenStream::load(&[&path], format, &tokenizer, marks, length)?;
    let task = PplConfig {
        context: Some(recorded.context),
        windows: Some(PARITY_WINDOWS),
        ..PplConfig::default()
    };
    let (config, device) = (&opened.config, &session.device.device);
    let model = session.load()?;
    let result = task::measure(&model, config, &stream, &task, device, stop, &mut |_, _| ())?;
    // Another device may round differently; the same one does not.
    let same_device = session.device.name == manifest.provenance.device;
    let tolerance = if same_device { 0.0 } else { 1e-2 * recorded.exported };
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
