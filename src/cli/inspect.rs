//! `fewbit inspect PATH`: what is in a model folder, an export, a run, an adapter or a safetensors
//! file.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::{adapter, output};
use crate::error::Result;
use crate::export::{Adapter, Format, Manifest, all_tensor_names, fewbit, gguf};
use crate::quant::{Additive, CodeHistogram, Grid, GroupAxis, QuantizedWeight, Repr};
use crate::report::size;
use crate::store::safetensors::Checkpoint;
use crate::store::{TensorInfo, TensorSource, locate};

/// Shares of codes on one line.
const BINS: usize = 16;

/// Arguments of `inspect`.
#[derive(Args, Debug)]
pub(super) struct InspectArgs {
    /// A model folder, an export, a run, an adapter, or one safetensors or GGUF file
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
    if let Some(file) = gguf_file(&path)? {
        return inspect_gguf(&file, args.json);
    }
    if path.is_file() && Adapter::is_described_by(Checkpoint::open_file(&path)?.file_metadata()) {
        return adapter::inspect(&path, args.json);
    }
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

/// The GGUF file that stands for a model.
fn gguf_file(path: &Path) -> Result<Option<PathBuf>> {
    let exported = path.join("model.gguf");
    match path {
        _ if exported.is_file() => Ok(Some(exported)),
        path if path.is_dir() => gguf::alone(path),
        path => Ok(gguf::is_gguf(path).then(|| path.to_owned())),
    }
}

fn inspect_gguf(path: &Path, json: bool) -> Result<()> {
    let file = gguf::Reader::open(path)?;
    let text = |key: &str| file.get(key).and_then(gguf::Value::as_text).unwrap_or("unknown");
    let (architecture, name) = (text("general.architecture"), text("general.name"));
    let tensors = file.tensors();
    let total: u64 = tensors.values().map(|info| info.bytes).sum();
    let weights: usize = tensors.values().map(|info| info.shape.iter().product::<usize>()).sum();
    let mean = 8.0 * total as f64 / weights.max(1) as f64;
    if json {
        let each: Vec<Value> = tensors
            .iter()
            .map(|(name, info)| {
                json!({
                    "name": name,
                    "dtype": info.kind.name(),
                    "shape": info.shape,
                    "bytes": info.bytes,
                })
            })
            .collect();
        return output::json(&json!({
            "path": path,
            "architecture": architecture,
            "name": name,
            "metadata_keys": file.metadata().len(),
            "bytes": total,
            "tensors": each,
            "bits_per_weight": mean,
        }));
    }
    let rows: Vec<Vec<String>> = tensors
        .iter()
        .map(|(name, info)| {
            let shape: Vec<String> = info.shape.iter().map(ToString::to_string).collect();
            vec![name.clone(), info.kind.name().into(), shape.join(" x "), size(info.bytes)]
        })
        .collect();
    let table = table(&["tensor", "type", "shape", "size"], &rows);
    let (keys, count) = (file.metadata().len(), tensors.len());
    output::print(&format!(
        "{}\nGGUF, architecture {architecture}, {name}, {keys} metadata keys\n{table}\n\
         {} in {count} tensors, {mean:.4} bits a weight over all of them\n",
        path.display(),
        size(total),
    ))
}

/// The tensors at `path`, and the quantized linears among them: by the manifest of an export, or
/// by the records of a stage's checkpoint file.
fn open(path: &Path) -> Result<(Checkpoint, Vec<Linear>)> {
    if path.is_file() {
        let file = Checkpoint::open_file(path)?;
        let linears = if file.file_metadata().contains_key("linears") {
            let saved = fewbit::Saved::read(path)?;
            (saved.linears.into_iter())
                .map(|(name, weight, method)| Linear { name, method, weight })
                .collect()
        } else {
            Vec::new()
        };
        return Ok((file, linears));
    }
    let checkpoint = Checkpoint::open(path)?;
    let mut linears = Vec::new();
    // A dequantized export has records, but no codes.
    if let Some(manifest) = Manifest::read(path)?.filter(|m| m.format == Format::Fewbit) {
        for (name, record) in manifest.linears {
            let weight = fewbit::decode(&name, &record, &checkpoint)
                .map_err(|error| error.fix("export the run again"))?;
            linears.push(Linear { name, method: record.method, weight });
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
                "widths": weight.widths(),
                "shape": [weight.layout.out, weight.layout.inputs],
                "group_len": weight.layout.group_len,
                "axis": weight.layout.axis,
                "grid": weight.grid.repr(),
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
    let mut widths: BTreeMap<u8, CodeHistogram> = BTreeMap::new();
    let mut rows = Vec::new();
    for Linear { name, weight, .. } in linears {
        let histogram = weight.histogram();
        let layout = weight.layout;
        // More codes than four are in the summary only: the line would not fit a screen.
        let few = weight.codes.bits() <= 2;
        rows.push(vec![
            name.clone(),
            format!("{} x {}", layout.out, layout.inputs),
            match weight.grid.repr() {
                Repr::BinaryCoding => {
                    let widths: Vec<String> =
                        weight.widths().iter().map(ToString::to_string).collect();
                    format!("{} planes", widths.join(","))
                }
                Repr::Codebook => match &weight.grid {
                    Grid::Codebook { additive, .. } => {
                        let Additive { books, vector } = additive;
                        format!("{books} x {} for {vector}", weight.codes.bits())
                    }
                    _ => weight.bits.to_string(),
                },
                _ => weight.bits.to_string(),
            },
            match layout.axis {
                GroupAxis::In => layout.group_len.to_string(),
                GroupAxis::Out => format!("{} outputs", layout.group_len),
            },
            format!("{:.4}", weight.bits_per_weight()),
            if few { shares(&histogram) } else { String::new() },
        ]);
        widths.entry(weight.codes.bits()).and_modify(|h| h.merge(&histogram)).or_insert(histogram);
    }
    let codes = if rows.iter().any(|row| !row[5].is_empty()) { "codes, share in %" } else { "" };
    text += &table(&["linear", "out x in", "bits", "group", "bits/weight", codes], &rows);
    let quantized: BTreeSet<String> =
        linears.iter().flat_map(|linear| all_tensor_names(&linear.name)).collect();
    let others = stored.iter().filter(|(name, _)| !quantized.contains(*name));
    let rows: Vec<Vec<String>> = others
        .map(|(name, info)| {
            let shape: Vec<String> = info.shape.iter().map(ToString::to_string).collect();
            vec![name.clone(), info.dtype.name().into(), shape.join(" x "), size(bytes(info))]
        })
        .collect();
    let heading = if linears.is_empty() { "tensor" } else { "other tensor" };
    text += &table(&[heading, "dtype", "shape", "size"], &rows);
    text.push('\n');
    for (bits, histogram) in &widths {
        let bins =
            if histogram.0.len() > BINS { format!(" in {BINS} bins") } else { String::new() };
        let _ = writeln!(text, "all {bits}-bit codes{bins}, share in %\n {}", shares(histogram));
    }
    if let Some((bits, weights)) = stats(linears) {
        let _ = writeln!(text, "{weights} quantized weights, {bits:.4} bits each with scales");
    }
    let (total, count) = (stored.values().map(bytes).sum(), stored.len());
    let tensors = if count == 1 { "tensor" } else { "tensors" };
    let _ = writeln!(text, "{} in {count} {tensors}", size(total));
    text
}

/// An empty line, the heading and the rows, each column as wide as its longest entry and all but
/// the first aligned right. Nothing where there are no rows.
pub(super) fn table(heading: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let width = |column: usize| {
        let entries = rows.iter().map(|row| row[column].chars().count());
        entries.max().unwrap_or(0).max(heading[column].chars().count())
    };
    let widths: Vec<usize> = (0..heading.len()).map(width).collect();
    let mut text = String::from("\n");
    let heading = heading.iter().map(ToString::to_string).collect();
    for row in std::iter::once(&heading).chain(rows) {
        let mut line = format!("{:<1$}", row[0], widths[0]);
        for (entry, width) in row.iter().zip(&widths).skip(1) {
            let _ = write!(line, "  {entry:>width$}");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// `3.1 20.4 ...`: at most [`BINS`] codes, more summed in as many bins.
fn shares(histogram: &CodeHistogram) -> String {
    let counts = &histogram.0;
    let total = counts.iter().sum::<u64>().max(1) as f64;
    let bin = counts.len().div_ceil(BINS);
    let shares = counts.chunks(bin).map(|c| 100.0 * c.iter().sum::<u64>() as f64 / total);
    shares.map(|share| format!("{share:>4.1}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_as_wide_as_their_names() {
        let row = |name: &str, number: &str| vec![name.to_owned(), number.to_owned()];
        assert_eq!(
            table(&["name", "n"], &[row("a.long.name", "1"), row("b", "100")]),
            "\nname           n\na.long.name    1\nb            100\n"
        );
        assert_eq!(table(&["name", "n"], &[]), "");
        assert_eq!(table(&["name", ""], &[row("b", "")]), "\nname\nb\n");
    }
}
