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
use crate::stop::StopFlag;

/// What `train` and `check` may change in a recipe.
#[derive(Args, Debug)]
struct Changes {
    /// Override a key: a.b=value, list entries by index (stage.0.reconstruct.steps=100)
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// The run's folder, instead of the recipe's `output`
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu; instead of the recipe's `device`
    #[arg(long)]
    device: Option<String>,
}

impl Changes {
    fn options(self, recipe: String, fresh: bool) -> Options {
        let Self { set, output, device } = self;
        Options { recipe, set, output, device, fresh }
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

fn print_check(prepared: &Prepared, json: bool) -> Result<()> {
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

/// Evaluations in order of measurement by their first number, beside the float model's.
fn results_table(record: &RunRecord) -> String {
    let measured = &record.results.measured;
    // Nothing fails to be written to a string.
    let mut table = String::new();
    let mut heading = "";
    for m in measured {
        let Some((number, value)) = m.result.numbers.first() else { continue };
        if number != heading {
            heading = number;
            let _ = writeln!(table, "{:<24}{heading:>12}{:>10}", "model", "x float");
        }
        let float = measured.iter().find(|f| f.what == "float" && f.task == m.task);
        let ratio = float.map_or(String::new(), |f| format!("{:.4}", value / f.result.first()));
        let _ = writeln!(table, "{:<24}{value:>12.4}{ratio:>10}", m.what);
    }
    table
}
