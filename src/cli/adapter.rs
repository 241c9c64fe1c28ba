//! `fewbit adapter inspect | diff | apply`: scale adapters as files.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::export::{self, TargetArgs};
use super::inspect::table;
use super::{output, read_adapter};
use crate::error::{Error, Result};
use crate::export::{Adapter, AdapterPart, Change, Difference, Format, differences};
use crate::quant::GroupAxis;
use crate::report::size;
use crate::stop::StopFlag;
use crate::store::DType;
use crate::store::folder::sha256_file;

/// Arguments of `adapter`.
#[derive(Args, Debug)]
pub(super) struct AdapterArgs {
    #[command(subcommand)]
    command: AdapterCommand,
}

#[derive(Debug, Subcommand)]
enum AdapterCommand {
    /// Show where an adapter came from and what it holds
    Inspect {
        /// An adapter's file, or a run that left one
        file: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Show where two adapters differ, and by how much
    Diff {
        /// An adapter's file, or a run that left one
        a: PathBuf,
        /// Another
        b: PathBuf,
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Write a base with an adapter's scales as a model of its own
    Apply(ApplyArgs),
}

/// Arguments of `adapter apply`.
#[derive(Args, Debug)]
struct ApplyArgs {
    /// The packed base: a folder that fewbit packed, a run, or a hub id of such a folder
    #[arg(long, value_name = "DIR")]
    model: String,
    /// The adapter's file, or a run that left one
    #[arg(long, value_name = "FILE")]
    adapter: PathBuf,
    /// The format to write
    #[arg(long, default_value = "fewbit", value_parser = export::formats())]
    format: Format,
    #[command(flatten)]
    target: TargetArgs,
}

pub(super) fn run(args: &AdapterArgs, stop: &StopFlag) -> Result<()> {
    match &args.command {
        AdapterCommand::Inspect { file, json } => inspect(file, *json),
        AdapterCommand::Diff { a, b, json } => diff(a, b, *json),
        AdapterCommand::Apply(ApplyArgs { model, adapter, format, target }) => {
            export::write(model, Some(adapter), *format, target, stop)
        }
    }
}

/// Prints what the adapter at `path` is.
pub(super) fn inspect(path: &Path, json: bool) -> Result<()> {
    let (path, adapter) = read_adapter(path)?;
    if json {
        return output::json(&as_json(&path, &adapter)?);
    }
    output::print(&as_text(&path, &adapter)?)
}

fn as_json(path: &Path, adapter: &Adapter) -> Result<Value> {
    let linears = adapter.records().map(|(name, record)| {
        let [smallest, largest] = range(adapter, name);
        json!({
            "name": name,
            "bits": record.bits,
            "shape": record.shape,
            "group_len": record.group_len,
            "axis": record.axis,
            "groups": record.layout().groups,
            "part": record.part,
            "smallest": smallest,
            "largest": largest,
            "base_sha256": record.base_sha256,
        })
    });
    let linears: Vec<Value> = linears.collect();
    Ok(json!({
        "path": path,
        "adapter": adapter.head(),
        "dtype": adapter.dtype(),
        "numbers": adapter.numbers(),
        "bytes": file_bytes(path)?,
        "sha256": sha256_file(path)?,
        "linears": linears,
    }))
}

fn as_text(path: &Path, adapter: &Adapter) -> Result<String> {
    let head = adapter.head();
    let mut text = format!("{}\n\n", path.display());
    // Writing to a String cannot fail.
    let _ = writeln!(text, "adapter    {}", title(adapter));
    let _ = writeln!(text, "base       {}{}", head.base, short(&head.base_model_sha256));
    let _ = writeln!(text, "trained    seed {}, data{}", head.seed, short(&head.data_sha256));
    let parts: Vec<AdapterPart> = adapter.records().map(|(_, record)| record.part).collect();
    let alike = parts.windows(2).all(|pair| pair[0] == pair[1]);
    if let Some(part) = parts.first().filter(|_| alike) {
        let _ = writeln!(text, "holds      {} of {} linears", part.name(), parts.len());
    }
    let rows: Vec<Vec<String>> = adapter
        .records()
        .map(|(name, record)| {
            let [smallest, largest] = range(adapter, name);
            vec![
                name.to_owned(),
                record.bits.to_string(),
                match record.axis {
                    GroupAxis::In => record.group_len.to_string(),
                    GroupAxis::Out => format!("{} out", record.group_len),
                },
                record.layout().groups.to_string(),
                number(smallest),
                number(largest),
                if alike { String::new() } else { record.part.name().to_owned() },
            ]
        })
        .collect();
    let part = if alike { "" } else { "holds" };
    text += &table(&["linear", "bits", "group", "groups", "smallest", "largest", part], &rows);
    let numbers = adapter.numbers();
    let each = DType::from_name(&adapter.dtype().name().to_uppercase()).map_or(4, DType::size);
    let _ = writeln!(
        text,
        "\n{numbers} numbers of {each} bytes: {}; the file {}",
        size((numbers * each) as u64),
        size(file_bytes(path)?),
    );
    Ok(text)
}

/// The smallest and the largest scale of a linear.
fn range(adapter: &Adapter, linear: &str) -> [f32; 2] {
    let scales = adapter.scales(linear).unwrap_or_default();
    let mut range = scales.first().map_or([0.0; 2], |first| [*first; 2]);
    for scale in scales {
        range = [range[0].min(*scale), range[1].max(*scale)];
    }
    range
}

/// Name, method and type.
fn title(adapter: &Adapter) -> String {
    let (head, dtype) = (adapter.head(), adapter.dtype().name());
    format!("{}, by {}, in {dtype}", head.name, head.method)
}

/// A scale in at most nine characters.
fn number(value: f32) -> String {
    let plain = value == 0.0 || (1e-3..1e4).contains(&value.abs());
    if plain { format!("{value:.4}") } else { format!("{value:.2e}") }
}

/// ` sha256 0123456789ab`, where there is one.
fn short(sha256: &str) -> String {
    sha256.get(..12).map_or_else(String::new, |sha256| format!(" sha256 {sha256}"))
}

fn file_bytes(path: &Path) -> Result<u64> {
    Ok(std::fs::metadata(path).map_err(|e| Error::io("read", path, &e))?.len())
}

/// An adapter and where it lies.
type Placed = (PathBuf, Adapter);

/// Two adapters compared.
struct Comparison<'a> {
    rows: Vec<(&'a str, Difference)>,
    /// Of all scales that can be compared.
    scales: Change,
    /// Unknown where no linear is in both and the models they were made from differ.
    same_base: Option<bool>,
    equal: bool,
}

impl<'a> Comparison<'a> {
    fn new(a: &'a Adapter, b: &'a Adapter) -> Self {
        let rows = differences(a, b);
        let comparable = rows.iter().filter_map(|(_, difference)| match difference {
            Difference::Comparable { scales, .. } => Some(*scales),
            _ => None,
        });
        let scales = comparable.fold(Change::default(), Change::and);
        let other = rows.iter().any(|(_, difference)| {
            matches!(difference, Difference::OtherBase | Difference::OtherShape)
        });
        let same_model = a.head().base_model_sha256 == b.head().base_model_sha256;
        let same = scales.numbers > 0 || same_model;
        let same_base = if other { Some(false) } else { same.then_some(true) };
        let equal = rows.iter().all(|(_, difference)| difference.is_none());
        Self { rows, scales, same_base, equal }
    }

    fn as_json(&self, a: &Placed, b: &Placed) -> Value {
        let rows = self.rows.iter();
        let linears: Vec<Value> =
            rows.map(|(name, found)| json!({ "name": name, "difference": found })).collect();
        json!({
            "a": { "path": a.0, "adapter": a.1.head() },
            "b": { "path": b.0, "adapter": b.1.head() },
            "same_base": self.same_base,
            "equal": self.equal,
            "scales": self.scales,
            "linears": linears,
        })
    }

    fn as_text(&self, a: &Placed, b: &Placed) -> String {
        let title = |label: &str, (path, adapter): &Placed| {
            format!("{label}          {}\n           {}\n", path.display(), title(adapter))
        };
        let (first, second) = (title("a", a), title("b", b));
        let base = base_line(&a.1, &b.1, self.same_base);
        let Change { mean, largest, numbers } = self.scales;
        let summary = match numbers {
            _ if self.equal => "equal in every number".to_owned(),
            0 => "nothing to compare".to_owned(),
            _ => format!(
                "{numbers} scales: a mean change of {}, at most {};\n\
                 a change is |a - b| over the larger of |a| and |b|",
                percent(mean),
                percent(largest),
            ),
        };
        format!("{first}{second}base       {base}\n{}\n{summary}\n", diff_table(&self.rows))
    }
}

fn diff(a: &Path, b: &Path, json: bool) -> Result<()> {
    let (a, b) = (read_adapter(a)?, read_adapter(b)?);
    let comparison = Comparison::new(&a.1, &b.1);
    if json {
        return output::json(&comparison.as_json(&a, &b));
    }
    output::print(&comparison.as_text(&a, &b))
}

fn base_line(a: &Adapter, b: &Adapter, same: Option<bool>) -> String {
    let (a, b) = (&a.head().base, &b.head().base);
    let from = if a == b { format!("both from {a}") } else { format!("a from {a}, b from {b}") };
    match same {
        Some(true) => format!("the same, made from {a}"),
        Some(false) => format!("not the same: {from}, packed differently"),
        None => format!("unknown, since no linear is in both; {from}"),
    }
}

fn diff_table(rows: &[(&str, Difference)]) -> String {
    let rows: Vec<Vec<String>> = rows
        .iter()
        .map(|(name, difference)| {
            let words = |text: &str| [String::new(), String::new(), text.to_owned()];
            let [mean, largest, note] = match difference {
                Difference::OnlyA => words("only in a"),
                Difference::OnlyB => words("only in b"),
                Difference::OtherShape => words("other bits or groups"),
                Difference::OtherPart => words("holds another part"),
                Difference::OtherBase => words("other codes"),
                Difference::Comparable { scales, offsets } => {
                    let offsets = offsets.filter(|offsets| offsets.largest > 0.0);
                    let note = match offsets {
                        Some(offsets) => format!("offsets {}", percent(offsets.mean)),
                        None if difference.is_none() => "equal".to_owned(),
                        None => String::new(),
                    };
                    [percent(scales.mean), percent(scales.largest), note]
                }
            };
            vec![(*name).to_owned(), mean, largest, note]
        })
        .collect();
    table(&["linear", "mean change", "largest", ""], &rows)
}

fn percent(share: f64) -> String {
    format!("{:.3} %", 100.0 * share)
}
