//! Adapting to another text: scales alone, low-rank factors, or every weight. The tables in
//! docs/fine-tuning.md.
//!
//! `cargo bench --bench peft` prints them and fails when PEQA or AlphaTuning miss what PyTorch reaches
//! at the same number of steps; words after `--` choose rows by substring. Protocol: AdamW without
//! weight decay, rate falling to 0 on a straight line, 8 windows of 128 tokens a step (256 for the
//! examples), next-token cross-entropy, f32, seed 0; perplexity on the other text's validation part,
//! BOS before each document, 256-token windows, first token of a window not predicted (of examples,
//! completions alone). Every row is a process of its own, one after the other: its peak memory and
//! its seconds per step are what `run.json` says.
#![allow(clippy::print_stdout)] // a report is what this program is for

#[path = "../support/mod.rs"]
#[allow(dead_code)] // of the other benches
mod support;

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use support::{filters, run_and};

const S260: &str = "stories260k";
const S656: &str = "tinystories-656k";

/// What the model adapts to.
#[derive(Clone, Copy, PartialEq)]
enum Domain {
    Shakespeare,
    Restaurants,
}

/// A way to adapt.
struct Way {
    name: &'static str,
    bits: u8,
    /// The stages before training.
    base: &'static str,
    /// The training stage.
    tune: &'static str,
}

const RTN: &str = "[[stage]]\n[stage.calibrate]\nmethod.rtn = {}\n";
const BCQ: &str =
    "[[stage]]\n[stage.calibrate]\nmethod.bcq = { offset = false, uniform_start = false }\n";
const PEQA: &str = "tune_scales]\nmethod.peqa = {}";
const ALPHA: &str = "tune_scales]\nmethod.alphatuning = {}";
/// Rates as relative steps: one for scales of any size.
const PEQA_RELATIVE: &str = "tune_scales]\nmethod.peqa = { relative = true }";
const ALPHA_RELATIVE: &str = "tune_scales]\nmethod.alphatuning = { relative = true }";
const MEASURE: &str = "[[stage]]\n[stage.evaluate]\ntask.ppl = { context = 256 }\nbaselines = []\n";
const RELATIVE_RATE: &str = "8e-2";

/// Model, bits, base, method as published and with relative steps, steps, and the perplexity that
/// PyTorch reaches at a rate of 3e-3.
type Anchor = (&'static str, u8, &'static str, [&'static str; 2], u32, f64);

const ANCHORS: [Anchor; 4] = [
    (S260, 4, RTN, [PEQA, PEQA_RELATIVE], 200, 27.8),
    (S260, 3, BCQ, [ALPHA, ALPHA_RELATIVE], 200, 29.7),
    (S656, 4, RTN, [PEQA, PEQA_RELATIVE], 100, 130.0),
    (S656, 3, BCQ, [ALPHA, ALPHA_RELATIVE], 100, 206.0),
];

/// Each at the best of a few rates tried.
const WAYS: &[(Way, &str)] = &[
    (Way { name: "PEQA W4", bits: 4, base: RTN, tune: PEQA_RELATIVE }, RELATIVE_RATE),
    (Way { name: "PEQA W3", bits: 3, base: RTN, tune: PEQA_RELATIVE }, RELATIVE_RATE),
    (Way { name: "AlphaTuning W3", bits: 3, base: BCQ, tune: ALPHA_RELATIVE }, RELATIVE_RATE),
    (
        Way {
            name: "AlphaTuning W3, all alphas",
            bits: 3,
            base: BCQ,
            tune: "tune_scales]\nmethod.alphatuning = { learn = \"all\", relative = true }",
        },
        RELATIVE_RATE,
    ),
    (
        Way {
            name: "LoRA rank 4, q and v",
            bits: 4,
            base: "",
            tune: "finetune]\nmethod.lora = { rank = 4, alpha = 8 }",
        },
        "5e-2",
    ),
    (
        Way {
            name: "LoRA rank 4, all linears",
            bits: 4,
            base: "",
            tune: "finetune]\nmethod.lora = { rank = 4, alpha = 8, targets = \"all\" }",
        },
        "2e-2",
    ),
    (
        Way {
            name: "QLoRA rank 4, all linears",
            bits: 4,
            base: "",
            tune: "finetune]\nmethod.qlora = { rank = 4, alpha = 8, targets = \"all\" }",
        },
        "2e-2",
    ),
    (
        Way {
            name: "every weight of the blocks",
            bits: 4,
            base: "",
            tune: "finetune]\nmethod.full = {}",
        },
        "1e-2",
    ),
];

/// What a run gave.
struct Found {
    before: f64,
    after: f64,
    trainable: Option<u64>,
    adapter_bytes: Option<u64>,
    peak_gib: f64,
    seconds_per_step: f64,
}

fn main() -> Result<()> {
    let filters = filters();
    let wanted = |label: &str| filters.iter().all(|filter| label.contains(filter.as_str()));
    let mut missed = 0;
    println!("| model | method | steps | rate | before | after | PyTorch | ours / theirs |");
    println!("|---|---|---|---|---|---|---|---|");
    for (model, bits, base, methods, steps, anchor) in &ANCHORS {
        let names = ["", ", relative"].map(|form| match bits {
            4 => format!("PEQA W4{form}"),
            _ => format!("AlphaTuning W3{form}"),
        });
        let tries = names.iter().zip(methods).zip(["3e-3", RELATIVE_RATE]);
        for ((name, tune), rate) in tries {
            if !wanted(&format!("anchor {model} {name}")) {
                continue;
            }
            let way = Way { name: "", bits: *bits, base, tune };
            let found = run(model, Domain::Shakespeare, &way, *steps, rate)?;
            let kept = found.after <= *anchor;
            missed += usize::from(rate == RELATIVE_RATE && !kept);
            println!(
                "| {model} | {name} | {steps} | {rate} | {:.1} | {:.2} | {anchor} | {:.3} |",
                found.before,
                found.after,
                found.after / anchor,
            );
        }
    }
    for (domain, name) in
        [(Domain::Shakespeare, "tiny Shakespeare"), (Domain::Restaurants, "E2E NLG")]
    {
        println!("\n{name}, {S656}, 400 steps\n");
        println!(
            "| method | rate | before | after | learned numbers | adapter | peak | ms a step |"
        );
        println!("|---|---|---|---|---|---|---|---|");
        for (way, rate) in WAYS {
            if !wanted(&format!("{name} {}", way.name)) {
                continue;
            }
            let found = run(S656, domain, way, 400, rate)?;
            let size = |bytes: u64| format!("{:.1} kB", bytes as f64 / 1e3);
            println!(
                "| {} | {rate} | {:.1} | {:.2} | {} | {} | {:.0} MiB | {:.1} |",
                way.name,
                found.before,
                found.after,
                found.trainable.map_or("-".to_owned(), |n| n.to_string()),
                found.adapter_bytes.map_or("-".to_owned(), size),
                found.peak_gib * 1024.0,
                found.seconds_per_step * 1e3,
            );
        }
    }
    anyhow::ensure!(missed == 0, "{missed} rows miss what PyTorch reaches");
    Ok(())
}

fn run(model: &str, domain: Domain, way: &Way, steps: u32, rate: &str) -> Result<Found> {
    let (folder, format) = match domain {
        Domain::Shakespeare => ("tinyshakespeare", ""),
        Domain::Restaurants => ("e2e_nlg", "format = \"completion\"\n"),
    };
    let (extension, length) = if format.is_empty() { ("json", 128) } else { ("jsonl", 256) };
    let data = |role: &str, length: u32| {
        let path = format!("embedded:{folder}/{role}.{extension}");
        format!("[data.{role}]\npath = \"{path}\"\nlength = {length}\n{format}")
    };
    let recipe = format!(
        "seed = 0\noutput = \"run\"\ndevice = \"cpu\"\n\
         [model]\npath = \"{}/datasets/{model}\"\n{}{}[quant]\nbits = {}\n{}{MEASURE}\
         [[stage]]\n[stage.{}\nsteps = {steps}\nbatch = 8\nlearning_rate = {rate}\n{MEASURE}",
        env!("CARGO_MANIFEST_DIR"),
        data("train", length),
        data("validation", 256),
        way.bits,
        way.base,
        way.tune,
    );
    run_and(&recipe, |run| found(run, steps))
}

fn found(run: &Path, steps: u32) -> Result<Found> {
    let record: Value = serde_json::from_str(&std::fs::read_to_string(run.join("run.json"))?)?;
    let measured = record["results"]["measured"].as_array().context("it measured nothing")?;
    let perplexity = |index: usize| {
        measured.get(index).and_then(|m| m["result"]["perplexity"].as_f64()).context("perplexity")
    };
    let stages = record["stages"].as_array().context("it lists no stages")?;
    let mut training = stages.iter().filter(|stage| stage["name"] != "evaluate");
    let seconds =
        training.next_back().and_then(|stage| stage["seconds"].as_f64()).context("seconds")?;
    let trainable = record["results"]["trainable"].as_object();
    Ok(Found {
        before: perplexity(0)?,
        after: perplexity(measured.len() - 1)?,
        trainable: trainable.and_then(|all| all.values().next()?.as_u64()),
        adapter_bytes: largest_file(&run.join("adapters")),
        peak_gib: record["peak_gib"].as_f64().context("no peak")?,
        seconds_per_step: seconds / f64::from(steps),
    })
}

/// The weights among an adapter's files.
fn largest_file(folder: &Path) -> Option<u64> {
    let entries = std::fs::read_dir(folder).ok()?.flatten();
    entries
        .filter_map(|entry| {
            let data = entry.metadata().ok()?;
            if data.is_dir() { largest_file(&entry.path()) } else { Some(data.len()) }
        })
        .max()
}
