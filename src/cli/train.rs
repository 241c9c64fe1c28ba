//! `fewbit train` and `fewbit check`.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use serde_json::json;

use super::output;
use super::sizes::{self, SizesArgs};
use crate::error::Result;
use crate::report::terminal::{self, Terminal};
use crate::report::{Event, Reporter, Reporters};
use crate::run::{self, Options, Prepared, RunRecord};
use crate::stage::Measured;
use crate::stop::StopFlag;

/// What `train` and `check` may change in a recipe.
#[derive(Args, Debug)]
struct Changes {
    /// Override a key: a.b=value; a stage by its name (stage.distill.steps=100) or by its index, from 0
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The run's folder, instead of the recipe's `output`
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu; instead of the recipe's `device`
    #[arg(long)]
    device: Option<String>,
    /// Take over the finished stages of another run, as far as both recipes are the same
    #[arg(long, value_name = "RUN")]
    reuse: Option<PathBuf>,
    /// Time one block with the recipe's shapes before anything begins (seconds), and estimate by that
    #[arg(long)]
    probe: bool,
    /// What an hour of this machine costs; the estimate is then given in money, too
    #[arg(long, value_name = "X", value_parser = price)]
    price_per_hour: Option<f64>,
}

impl Changes {
    fn options(self, recipe: String, fresh: bool) -> Options {
        let Self { set, output, device, reuse, probe, price_per_hour } = self;
        Options { recipe, set, output, device, fresh, reuse, probe, price_per_hour }
    }
}

fn price(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "a number, for instance 2.50".to_owned())?;
    if value.is_finite() && value >= 0.0 {
        Ok(value)
    } else {
        Err("a price of 0 or more".to_owned())
    }
}

/// Arguments of `train`.
#[derive(Args, Debug)]
pub(super) struct TrainArgs {
    /// A recipe's path, or a name in recipes/ or among the built-in ones
    #[arg(long, value_name = "R")]
    recipe: String,
    #[command(flatten)]
    changes: Changes,
    /// Start over, removing what an earlier run left in the output folder
    #[arg(long)]
    fresh: bool,
    /// Stop after the preflight
    #[arg(long)]
    dry_run: bool,
}

/// Arguments of `check`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("what").required(true).args(["recipe", "config"])))]
pub(super) struct CheckArgs {
    /// A recipe's path, or a name in recipes/ or among the built-in ones
    #[arg(long, value_name = "R")]
    recipe: Option<String>,
    #[command(flatten)]
    sizes: SizesArgs,
    #[command(flatten)]
    changes: Changes,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn train(args: TrainArgs, stop: &StopFlag) -> Result<()> {
    let options = args.changes.options(args.recipe, args.fresh);
    if args.dry_run {
        return print_check(&Prepared::to_look_at(&options, stop)?, false);
    }
    let report = Reporters::new(vec![Box::new(Terminal::new())]);
    let record = run::train(&options, report, stop)?;
    output::print(&results_table(&record))
}

pub(super) fn check(args: CheckArgs, stop: &StopFlag) -> Result<()> {
    if let Some(config) = &args.sizes.config {
        return sizes::run(config, &args.sizes, args.json);
    }
    // Without a config, clap has seen to a recipe.
    let recipe = args.recipe.unwrap_or_default();
    let prepared = Prepared::to_look_at(&args.changes.options(recipe, false), stop)?;
    print_check(&prepared, args.json)
}

pub(super) fn print_check(prepared: &Prepared, json: bool) -> Result<()> {
    if json {
        return output::json(&check_json(prepared));
    }
    let mut lines = Lines(String::new());
    run::announce(prepared, &mut lines);
    for stage in prepared.plan.stages.iter().filter(|stage| !stage.kept.is_empty()) {
        let (name, kept) = (stage.config.name(), stage.kept.len());
        let text = format!("{name} leaves {kept} linears as an earlier stage made them");
        lines.emit(&Event::Note { text });
    }
    output::print(&lines.0)
}

fn check_json(prepared: &Prepared) -> serde_json::Value {
    let plan = &prepared.plan;
    let stages: Vec<_> = plan
        .stages
        .iter()
        .map(|stage| {
            json!({
                "name": stage.config.name(),
                "linears": stage.specs.len(),
                "kept": stage.kept,
                "steps": stage.config.stage().steps(prepared.model.config.n_blocks),
            })
        })
        .collect();
    json!({
        "ok": true,
        "plan": plan.summary(),
        "model": prepared.model.name,
        "blocks": prepared.model.config.n_blocks,
        "quantized": plan.quantized().len(),
        "kept": prepared.kept(),
        "device": prepared.device.name,
        "needs": prepared.needs,
        "target": prepared.target,
        "stages": stages,
        "output": plan.recipe.output,
    })
}

/// Terminal lines as text.
struct Lines(String);

impl Reporter for Lines {
    fn emit(&mut self, event: &Event) {
        const WIDTH: usize = 100;
        if let Some(line) = terminal::line(event, WIDTH) {
            self.0 += &line;
            self.0.push('\n');
        }
    }
}

/// A number with four digits behind the point, in a column's width.
fn four_digits(number: f64) -> String {
    if number.abs() < 1e4 { format!("{number:.4}") } else { format!("{number:.4e}") }
}

/// Evaluations by task and in order of measurement: the first number with its standard error where there is one,
/// beside the float model's, and the share of answers that differ from its.
fn results_table(record: &RunRecord) -> String {
    let measured = &record.results.measured;
    // Nothing fails to be written to a string.
    let mut table = String::new();
    let mut told: Vec<&Measured> = Vec::new();
    for first in measured {
        if told.iter().any(|m| m.task == first.task) {
            continue;
        }
        told.push(first);
        let all = || measured.iter().filter(|m| m.task == first.task);
        let Some((number, _)) = first.result.numbers.first() else { continue };
        let has = |name: &str| all().any(|m| m.result.number(name).is_some());
        let error = format!("{number}_stderr");
        let label = first.task.label();
        let heading =
            if label == first.task.name() { number.clone() } else { format!("{label} {number}") };
        let _ = write!(table, "{:<24}{heading:>22}", "model");
        let columns = [(has(&error), "stderr"), (true, "x float"), (has("flipped"), "flipped")];
        for (_, name) in columns.iter().filter(|(there, _)| *there) {
            let _ = write!(table, " {name:>9}");
        }
        table.push('\n');
        let float = all().find(|m| m.what == "float").map(|m| m.result.first());
        let float = float.filter(|float| *float != 0.0); // of nothing right
        for m in all() {
            let _ = write!(table, "{:<24}{:>22}", m.what, four_digits(m.result.first()));
            let ratio = float.map(|float| m.result.first() / float);
            let numbers = [m.result.number(&error), ratio, m.result.number("flipped")];
            for ((there, _), number) in columns.iter().zip(numbers) {
                let number = number.map_or_else(String::new, four_digits);
                if *there {
                    let _ = write!(table, " {number:>9}");
                }
            }
            table.truncate(table.trim_end().len());
            table.push('\n');
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::four_digits;

    #[test]
    fn numbers_of_any_size_fit_a_column() {
        for (number, text) in [
            (2.5, "2.5000"),
            (9999.9999, "9999.9999"),
            (56_104.212, "5.6104e4"),
            (3.7e32, "3.7000e32"),
            (f64::INFINITY, "inf"),
            (f64::NAN, "NaN"),
        ] {
            assert_eq!(four_digits(number), text);
            assert!(text.len() <= 9, "{text}");
        }
    }
}
