//! Every method at 4, 3 and 2 bits on the embedded model: the table in README.
//!
//! `cargo bench --bench compare` prints it and fails when an order that must hold does not; words
//! after `--` choose rows by substring. Same data, steps and protocol as the anchors; one scale per
//! output row unless the row says otherwise; seconds are those of the quantizing stages, one run
//! after the other.
#![allow(clippy::print_stdout)] // a report is what this program is for

#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use support::{EVALUATE, Outcome, filters, head, run};

const MODEL: &str = "tinystories-656k";
/// Block-wise methods: 200 steps of 8 windows for each block.
const BLOCKWISE: &str = "steps = 200\nbatch = 8\n";
const MEAN: &str = "objective.mse = { reduction = \"mean\" }\n";
/// End-to-end methods: 600 steps of 8 windows.
const END_TO_END: &str = "objective.jsd = {}\nsteps = 600\nbatch = 8\nlearning_rate = 2e-3\n";

/// A method, the stage it runs in, and what the stage says besides.
struct Row {
    name: &'static str,
    stage: Stage,
    keys: String,
    widths: &'static [u8],
}

#[derive(Clone, Copy)]
enum Stage {
    Calibrate,
    Reconstruct,
    Distill,
    /// FlexRound at 4 bits, then distillation.
    Upq,
}

const ALL: [u8; 3] = [4, 3, 2];
const TWO: [u8; 1] = [2];

fn rows() -> Vec<Row> {
    let row = |name, stage, keys: &str, widths| Row { name, stage, keys: keys.to_owned(), widths };
    let solve = |name, keys: &str| row(name, Stage::Calibrate, keys, &ALL);
    let blockwise =
        |name, keys: &str| row(name, Stage::Reconstruct, &format!("{keys}\n{BLOCKWISE}"), &ALL);
    let uniquanf = format!(
        "method.uniquanf = {{}}\ninput_prob = 0.5\n{MEAN}\
         learning_rate = {{ scale = 1.5e-2, rounding = 1.5e-2, levels = 1.5e-3 }}"
    );
    let block_ap = format!(
        "method.block_ap = {{}}\n{MEAN}learning_rate = {{ scale = 5e-3, weight = 1e-3 }}\n\
         schedule.cosine = {{ final_ratio = 0.05 }}"
    );
    vec![
        solve("rtn", "method.rtn = {}"),
        solve("rtn, MSE clip", "method.rtn = {}\nobserver.mse = {}"),
        solve("adadim", "method.adadim = {}"),
        solve("awq", "method.awq = {}"),
        solve("gptq", "method.gptq = {}"),
        solve("bcq", "method.bcq = {}"),
        blockwise("lwc", &format!("method.lwc = {{}}\n{MEAN}learning_rate = 5e-2")),
        blockwise(
            "signround",
            "method.signround = {}\noptimizer = { rule = \"sign\" }\nschedule.linear = {}\n\
             learning_rate = 5e-3",
        ),
        blockwise("lrq", "method.lrq = {}\nlearning_rate = 1e-2"),
        blockwise("flexround", "method.flexround = {}\nlearning_rate = 1e-2"),
        blockwise("uniquanf", &uniquanf),
        blockwise("block_ap", &block_ap),
        row("lsq, JSD", Stage::Distill, &format!("method.lsq = {{}}\n{END_TO_END}"), &ALL),
        row(
            "seq, JSD",
            Stage::Distill,
            &format!("method.seq = {{ start = \"mse\" }}\n{END_TO_END}"),
            &TWO,
        ),
        row(
            "UPQ",
            Stage::Upq,
            &format!("method.seq = {{ start = \"mse\" }}\nstart_from = \"rounded\"\n{END_TO_END}"),
            &TWO,
        ),
    ]
}

fn main() -> anyhow::Result<()> {
    let filters = filters();
    let mut found: BTreeMap<(&str, u8), Outcome> = BTreeMap::new();
    println!("| method | W4 | W3 | W2 | block MSE W4 / W3 / W2 | seconds |");
    println!("|---|---|---|---|---|---|");
    for row in rows() {
        if !filters.iter().all(|filter| row.name.contains(filter.as_str())) {
            continue;
        }
        for bits in row.widths {
            found.insert((row.name, *bits), run(&recipe(&row, *bits))?);
        }
        println!("{}", line(&row, &found));
    }
    let faults = orders(&found);
    anyhow::ensure!(faults.is_empty(), "{}", faults.join("\n"));
    Ok(())
}

fn recipe(row: &Row, bits: u8) -> String {
    let stage = match row.stage {
        Stage::Calibrate => "calibrate",
        Stage::Reconstruct => "reconstruct",
        Stage::Distill | Stage::Upq => "distill",
    };
    let int4 = match row.stage {
        Stage::Upq => format!(
            "[[stage]]\n[stage.reconstruct]\nbits = 4\nmethod.flexround = {{}}\n\
             learning_rate = 1e-2\n{BLOCKWISE}"
        ),
        _ => String::new(),
    };
    let head = head(MODEL);
    format!(
        "{head}[quant]\nbits = {bits}\n{int4}[[stage]]\n[stage.{stage}]\n{}\n{EVALUATE}",
        row.keys
    )
}

fn line(row: &Row, found: &BTreeMap<(&str, u8), Outcome>) -> String {
    let cells = |show: &dyn Fn(&Outcome) -> String| {
        ALL.map(|bits| found.get(&(row.name, bits)).map_or("-".to_owned(), show))
    };
    let [w4, w3, w2] = cells(&|outcome| format!("{:.2}", outcome.perplexity));
    // A block error that an earlier stage reported is not this method's.
    let mse = match row.stage {
        Stage::Upq | Stage::Distill => "-".to_owned(),
        _ => cells(&|o| o.block_mse.map_or("-".to_owned(), |mse| format!("{mse:.3}"))).join(" / "),
    };
    let seconds = cells(&|outcome| format!("{:.1}", outcome.seconds));
    let seconds: Vec<&str> = seconds.iter().map(String::as_str).filter(|s| *s != "-").collect();
    format!("| {} | {w4} | {w3} | {w2} | {mse} | {} |", row.name, seconds.join(" / "))
}

/// Learned rounding below GPTQ below round-to-nearest at 4 and 3 bits; UPQ below every method
/// without learning at 2.
fn orders(found: &BTreeMap<(&str, u8), Outcome>) -> Vec<String> {
    let mut faults = Vec::new();
    let mut below = |less: (&'static str, u8), more: (&'static str, u8)| {
        if let (Some(a), Some(b)) = (found.get(&less), found.get(&more))
            && a.perplexity >= b.perplexity
        {
            let (a, b) = (a.perplexity, b.perplexity);
            faults.push(format!("{} w{} has {a}, {} has {b}", less.0, less.1, more.0));
        }
    };
    for bits in [4, 3] {
        for learned in ["flexround", "lrq", "uniquanf", "signround", "block_ap"] {
            below((learned, bits), ("gptq", bits));
        }
        below(("gptq", bits), ("rtn", bits));
    }
    for solver in ["rtn", "rtn, MSE clip", "adadim", "awq", "gptq", "bcq"] {
        below(("UPQ", 2), (solver, 2));
    }
    faults
}
