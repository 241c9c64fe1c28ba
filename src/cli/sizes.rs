//! `fewbit check --config`: sizes and counts of trainable parameters from a config.json alone.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use clap::builder::RangedU64ValueParser;
use serde_json::{Value, json};

use super::output;
use crate::error::{Error, Result};
use crate::model::{ModelShape, TRAINING_BYTES, Trainable};

/// Widths the size is told for.
const BITS: [u64; 5] = [16, 8, 4, 3, 2];

/// Widths of binary coding that all alphas are counted for.
const ALPHA_BITS: [u64; 3] = [4, 3, 2];

/// Bits of the weights that PEQA is trained on.
const PEQA_BITS: u64 = 4;

/// Summary from a config.json alone.
#[derive(Args, Debug)]
pub(super) struct SizesArgs {
    /// A config.json, or a folder with one: sizes and trainable parameters, without any weight
    #[arg(long, value_name = "PATH", conflicts_with_all = ["set", "output", "device"])]
    pub(super) config: Option<PathBuf>,
    /// With --config: also for groups of so many weights along a row
    #[arg(long, value_name = "G", conflicts_with = "recipe", value_parser = positive())]
    group_size: Option<u64>,
    /// With --config: rank of LoRA's factors
    #[arg(long, value_name = "RANK", conflicts_with = "recipe", default_value_t = 4)]
    #[arg(value_parser = positive())]
    lora_rank: u64,
}

fn positive() -> RangedU64ValueParser {
    clap::value_parser!(u64).range(1..)
}

pub(super) fn run(config: &Path, args: &SizesArgs, json: bool) -> Result<()> {
    let summary = Summary::of(ModelShape::read(config)?, args)?;
    if json { output::json(&summary.as_json(config)) } else { output::print(&summary.as_text()) }
}

/// Everything that is told about one model.
struct Summary {
    shape: ModelShape,
    group_size: Option<u64>,
    lora_rank: u64,
    sizes: Vec<Size>,
    trainable: Vec<Tuning>,
    training: Vec<Training>,
}

/// Bytes of the model at one width.
struct Size {
    bits: u64,
    per_channel: u64,
    per_group: Option<u64>,
}

/// Parameters that one method trains.
struct Tuning {
    method: String,
    label: String,
    group_size: Option<u64>,
    parameters: u64,
}

/// Bytes while one method trains.
struct Training {
    method: &'static str,
    label: String,
    bits: u64,
    group_size: Option<u64>,
    bytes: u64,
}

impl Summary {
    fn of(shape: ModelShape, args: &SizesArgs) -> Result<Self> {
        let SizesArgs { group_size, lora_rank, .. } = *args;
        let sizes = BITS.iter().map(|&bits| {
            let per_group = group_size.map(|size| shape.bytes(bits, Some(size))).transpose()?;
            Ok(Size { bits, per_channel: shape.bytes(bits, None)?, per_group })
        });
        Ok(Self {
            sizes: sizes.collect::<Result<_>>()?,
            trainable: trainable(&shape, group_size, lora_rank)?,
            training: training(&shape, group_size, lora_rank)?,
            shape,
            group_size,
            lora_rank,
        })
    }

    fn as_json(&self, config: &Path) -> Value {
        let shape = &self.shape;
        let linears: Vec<Value> = (shape.linears().iter())
            .map(|linear| json!({ "name": linear.name, "shape": linear.shape }))
            .collect();
        let gigabytes = |bytes: u64| json!({ "bytes": bytes, "gb": bytes as f64 / 1e9 });
        let sizes = self.sizes.iter().map(|size| {
            json!({
                "bits": size.bits,
                "per_channel": gigabytes(size.per_channel),
                "per_group": size.per_group.map(gigabytes),
            })
        });
        let trainable = self.trainable.iter().map(|tuning| {
            json!({
                "method": tuning.method,
                "group_size": tuning.group_size,
                "parameters": tuning.parameters,
                "share": share(tuning.parameters, shape),
                "f16_bytes": 2 * tuning.parameters,
                "f32_bytes": 4 * tuning.parameters,
            })
        });
        let training = self.training.iter().map(|training| {
            json!({
                "method": training.method,
                "bits": training.bits,
                "group_size": training.group_size,
                "bytes": training.bytes,
                "gb": training.bytes as f64 / 1e9,
            })
        });
        json!({
            "ok": true,
            "config": config,
            "model_type": shape.config().model_type,
            "blocks": shape.blocks(),
            "tied": shape.config().tied,
            "parameters": {
                "all": shape.parameters(),
                "block_linears": shape.linear_weights(),
                "block_biases": shape.biases(),
                "embeddings": shape.embeddings(),
                "head": shape.head(),
                "norms": shape.norms(),
                "rest": shape.rest(),
            },
            "block": linears,
            "group_size": self.group_size,
            "lora_rank": self.lora_rank,
            "sizes": sizes.collect::<Vec<_>>(),
            "trainable": trainable.collect::<Vec<_>>(),
            "training": training.collect::<Vec<_>>(),
            "training_formula": format!(
                "stored weights and adapters + {TRAINING_BYTES} bytes x trainable parameters"
            ),
        })
    }

    fn as_text(&self) -> String {
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = self.write_counts(&mut text);
        let _ = self.write_sizes(&mut text);
        let _ = self.write_trainable(&mut text);
        let _ = self.write_training(&mut text);
        text
    }

    fn write_counts(&self, text: &mut String) -> std::fmt::Result {
        let shape = &self.shape;
        let head = if shape.config().tied { "head (the embedding again)" } else { "head" };
        writeln!(text, "{} of {} blocks", shape.config().model_type, shape.blocks())?;
        writeln!(text, "\n{:<36}{:>18}{:>13}", "parameters", "count", "share")?;
        let rows = [
            ("linears of the blocks", shape.linear_weights()),
            ("their biases", shape.biases()),
            ("embeddings", shape.embeddings()),
            (head, shape.head()),
            ("norms", shape.norms()),
            ("rest", shape.rest()),
            ("all", shape.parameters()),
        ];
        for (label, count) in rows {
            let percent = 100.0 * share(count, shape);
            writeln!(text, "  {label:<34}{:>18}{percent:>11.2} %", digits(count))?;
        }
        Ok(())
    }

    fn write_sizes(&self, text: &mut String) -> std::fmt::Result {
        let groups = self.group_size.map_or(String::new(), |size| format!("groups of {size}"));
        let header = format!("{:<36}{:>18}{groups:>26}", "size in GB (1e9 bytes)", "per channel");
        writeln!(text, "\n{}", header.trim_end())?;
        for size in &self.sizes {
            let label = format!("linears of {} bits", size.bits);
            let groups = size.per_group.map_or(String::new(), |bytes| self.gigabytes(bytes));
            let row = format!("  {label:<34}{:>18}{groups:>26}", self.gigabytes(size.per_channel));
            writeln!(text, "{}", row.trim_end())?;
        }
        writeln!(
            text,
            "  below 16 bits with a 16-bit scale and a zero point of so many bits for each"
        )?;
        writeln!(text, "  channel or group; everything else stays at 16 bits")
    }

    fn write_trainable(&self, text: &mut String) -> std::fmt::Result {
        let head = ("trainable", "parameters", "f16 MB", "f32 MB");
        writeln!(text, "\n{:<36}{:>18}{:>13}{:>13}", head.0, head.1, head.2, head.3)?;
        for Tuning { label, parameters, .. } in &self.trainable {
            let megabytes = |width: u64| (width * parameters) as f64 / 1e6;
            let (f16, f32) = (megabytes(2), megabytes(4));
            writeln!(text, "  {label:<34}{:>18}{f16:>13.3}{f32:>13.3}", digits(*parameters))?;
        }
        Ok(())
    }

    fn write_training(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n{:<36}{:>18}", "memory in training", "GB")?;
        for Training { label, bytes, .. } in &self.training {
            writeln!(text, "  {label:<34}{:>18}", self.gigabytes(*bytes))?;
        }
        writeln!(
            text,
            "  stored weights and adapters, and {TRAINING_BYTES} bytes for each trainable parameter"
        )?;
        writeln!(text, "  (its gradient and two moments of Adam in f32); without activations")
    }

    /// Three decimals, or six where the whole model is a fraction of a gigabyte.
    fn gigabytes(&self, bytes: u64) -> String {
        let decimals = if self.shape.parameters() < 50_000_000 { 6 } else { 3 };
        format!("{:.decimals$}", bytes as f64 / 1e9)
    }
}

fn trainable(shape: &ModelShape, group_size: Option<u64>, rank: u64) -> Result<Vec<Tuning>> {
    let mut rows = Vec::new();
    let mut add = |method: String, label: String, group_size, what| {
        let parameters = shape.trainable(what)?;
        rows.push(Tuning { method, label, group_size, parameters });
        Ok::<_, Error>(())
    };
    for (size, per) in granularities(group_size) {
        let what = Trainable::Scales { group_size: size };
        add("peqa".into(), format!("PEQA: scales per {per}"), size, what)?;
        let what = Trainable::LargestAlphas { group_size: size };
        add("alphatuning".into(), format!("AlphaTuning: alphas per {per}"), size, what)?;
        for bits in ALPHA_BITS {
            let what = Trainable::Alphas { bits, group_size: size };
            let label = format!("all alphas of {bits} bits per {per}");
            add(format!("alphas_{bits}bit"), label, size, what)?;
        }
    }
    let lora = format!("LoRA of rank {rank} on");
    add("lora_qv".into(), format!("{lora} q and v"), None, Trainable::LoraQueryValue { rank })?;
    add("lora_all".into(), format!("{lora} all linears"), None, Trainable::LoraAll { rank })?;
    add(
        "full_linears".into(),
        "full: linears of the blocks".into(),
        None,
        Trainable::BlockLinears,
    )?;
    add("full".into(), "full: everything".into(), None, Trainable::Everything)?;
    Ok(rows)
}

fn training(shape: &ModelShape, group_size: Option<u64>, rank: u64) -> Result<Vec<Training>> {
    let mut rows = Vec::new();
    let mut add = |method, label: String, bits, group_size, what| {
        let bytes = shape.training_bytes(bits, group_size, what)?;
        rows.push(Training { method, label, bits, group_size, bytes });
        Ok::<_, Error>(())
    };
    for (size, per) in granularities(group_size) {
        let label = format!("PEQA on {PEQA_BITS} bits per {per}");
        add("peqa", label, PEQA_BITS, size, Trainable::Scales { group_size: size })?;
    }
    let lora = format!("LoRA of rank {rank} on");
    add("lora_qv", format!("{lora} q and v"), 16, None, Trainable::LoraQueryValue { rank })?;
    add("lora_all", format!("{lora} all linears"), 16, None, Trainable::LoraAll { rank })?;
    let label = "full: linears of the blocks".into();
    add("full_linears", label, 16, None, Trainable::BlockLinears)?;
    add("full", "full: everything".into(), 16, None, Trainable::Everything)?;
    Ok(rows)
}

/// Per output channel always, per group where a size is given.
fn granularities(group_size: Option<u64>) -> impl Iterator<Item = (Option<u64>, &'static str)> {
    std::iter::once((None, "channel")).chain(group_size.map(|size| (Some(size), "group")))
}

fn share(count: u64, shape: &ModelShape) -> f64 {
    count as f64 / shape.parameters() as f64
}

/// `6,738,415,616`.
fn digits(number: u64) -> String {
    let plain = number.to_string();
    let mut text = String::new();
    for (place, digit) in plain.chars().enumerate() {
        if place > 0 && (plain.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
