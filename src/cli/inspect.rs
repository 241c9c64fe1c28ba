//! `fewbit inspect PATH`: what is in a model folder, an export, a run or a safetensors file.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::output;
use crate::error::Result;
use crate::export::{Manifest, fewbit};
use crate::quant::{CodeHistogram, QuantizedWeight};
use crate::report::size;
use crate::store::safetensors::Checkpoint;
use crate::store::{TensorInfo, TensorSource, locate};

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub(super) struct InspectArgs {
    /// A model folder, an export, a run, or one safetensors file
    path: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One quantized linear.
struct Linear {
    name: String,
    method: String,
    weight: QuantizedWeight,
}

pub(super) fn run(args: &InspectArgs) -> Result<()> {
    let path = if Path::new(&args.path).is_file() {
        PathBuf::from(&args.path)
    } else {
        locate::model(&args.path)?
    };
    let (checkpoint, linears) = open(&path)?;
    let stored: BTreeMap<String, TensorInfo> = checkpoint
        .names()
        .into_iter()
        .filter_map(|name| Some((name.to_owned(), checkpoint.info(name)?.clone())))
        .collect();
    if args.json {
        return output::json(&as_json(&path, &stored, &linears));
    }
    output::print(&as_text(&path, &stored, &linears))
}

/// The tensors at `path`, and the quantized linears among them: by the manifest of an export, or
/// by the records of a stage's checkpoint file.
fn open(path: &Path) -> Result<(Checkpoint, Vec<Linear>)> {
    if path.is_file() {
        let file = Checkpoint::open_file(path)?;
        let linears = if file.file_metadata().contains_key("linears") {
            let (linears, _) = fewbit::read_linears(path)?;
            linears
                .into_iter()
                .map(|(name, weight, method)| Linear { name, method, weight })
                .collect()
        } else {
            Vec::new()
        };
        return Ok((file, linears));
    }
    let checkpoint = Checkpoint::open(path)?;
    let mut linears = Vec::new();
    if let Some(manifest) = Manifest::read(path)? {
        for (name, record) in manifest.linears {
            // A dequantized export has records, but no codes.
            if checkpoint.info(&fewbit::tensor_names(&name)[0]).is_some() {
                let weight = fewbit::decode(&name, &record, &checkpoint)?;
                linears.push(Linear { name, method: record.method, weight });
            }
        }
    }
    Ok((checkpoint, linears))
}

fn bytes(info: &TensorInfo) -> u64 {
    info.end - info.start
}

fn as_json(path: &Path, stored: &BTreeMap<String, TensorInfo>, linears: &[Linear]) -> Value {
    let tensors: Vec<Value> = stored
        .iter()
        .map(|(name, info)| {
            json!({
                "name": name,
                "dtype": info.dtype.name(),
                "shape": info.shape,
                "bytes": bytes(info),
            })
        })
        .collect();
    let quantized: Vec<Value> = linears
        .iter()
        .map(|Linear { name, method, weight }| {
            json!({
                "name": name,
                "method": method,
                "bits": weight.bits,
                "shape": [weight.layout.out, weight.layout.inputs],
                "group_len": weight.layout.group_len,
                "bits_per_weight": weight.bits_per_weight(),
                "histogram": weight.histogram(),
            })
        })
        .collect();
    json!({
        "path": path,
        "bytes": stored.values().map(bytes).sum::<u64>(),
        "tensors": tensors,
        "linears": quantized,
        "bits_per_weight": stats(linears).map(|stats| stats.0),
    })
}

/// Bits per weight and number of weights of all quantized linears.
fn stats(linears: &[Linear]) -> Option<(f64, u64)> {
    let mut stats = crate::export::WeightStats::default();
    for linear in linears {
        stats.add(&linear.weight);
    }
    (stats.weights > 0).then(|| (stats.bits_per_weight(), stats.weights))
}

fn as_text(path: &Path, stored: &BTreeMap<String, TensorInfo>, linears: &[Linear]) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "{}", path.display());
    if !linears.is_empty() {
        let _ = writeln!(
            text,
            "\n{:<42}{:>11}{:>6}{:>7}{:>11}  codes, share in %",
            "linear", "out x in", "bits", "group", "bits/weight"
        );
    }
    let mut widths: BTreeMap<u8, CodeHistogram> = BTreeMap::new();
    for Linear { name, weight, .. } in linears {
        let histogram = weight.histogram();
        let layout = weight.layout;
        let _ = writeln!(
            text,
            "{name:<42}{:>11}{:>6}{:>7}{:>11.4}  {}",
            format!("{} x {}", layout.out, layout.inputs),
            weight.bits,
            layout.group_len,
            weight.bits_per_weight(),
            shares(&histogram),
        );
        widths.entry(weight.bits.get()).and_modify(|h| h.merge(&histogram)).or_insert(histogram);
    }
    let quantized: std::collections::BTreeSet<String> =
        linears.iter().flat_map(|linear| fewbit::tensor_names(&linear.name)).collect();
    let _ = writeln!(text, "\n{:<42}{:>11}{:>20}{:>11}", "other tensor", "dtype", "shape", "size");
    for (name, info) in stored.iter().filter(|(name, _)| !quantized.contains(*name)) {
        let shape: Vec<String> = info.shape.iter().map(ToString::to_string).collect();
        let (dtype, shape) = (info.dtype.name(), shape.join(" x "));
        let _ = writeln!(text, "{name:<42}{dtype:>11}{shape:>20}{:>11}", size(bytes(info)));
    }
    text.push('\n');
    for (bits, histogram) in &widths {
        let _ = writeln!(text, "all {bits}-bit codes, share in %: {}", shares(histogram));
    }
    if let Some((bits, weights)) = stats(linears) {
        let _ = writeln!(text, "{weights} quantized weights, {bits:.4} bits each with scales");
    }
    let total = stored.values().map(bytes).sum();
    let _ = writeln!(text, "{} in {} tensors", size(total), stored.len());
    text
}

/// `3.1 20.4 ...`: at most 16 codes, the rest summed in bins.
fn shares(histogram: &CodeHistogram) -> String {
    let counts = &histogram.0;
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let bin = counts.len().div_ceil(16);
    let shares = counts.chunks(bin).map(|c| 100.0 * c.iter().sum::<u64>() as f64 / total);
    shares.map(|share| format!("{share:.1}")).collect::<Vec<_>>().join(" ")
}
