//! `fewbit runs`: runs, how they stand and what came out.

use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::json;

use super::output;
use crate::error::Result;
use crate::report::{duration, perplexity, size};
use crate::run::Standing;

/// Arguments of `runs`.
#[derive(Args, Debug)]
pub(super) struct RunsArgs {
    /// Where runs lie, in folders and in folders of those
    #[arg(value_name = "DIR", default_value = "runs")]
    folder: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &RunsArgs) -> Result<()> {
    let runs = Standing::all(&args.folder)?;
    if args.json {
        return output::json(&json!({ "runs": runs }));
    }
    if runs.is_empty() {
        output::aside(&format!("no run in {}\n", args.folder.display()));
        return Ok(());
    }
    let heading =
        ["run", "state", "at", "perplexity", "x float", "bits", "size", "time", "last sign"];
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    let row = |run: &Standing| {
        let inside = run.path.strip_prefix(&args.folder).unwrap_or(&run.path);
        let name = if inside.as_os_str().is_empty() { &run.path } else { inside };
        let number =
            |number: Option<f64>| number.map_or_else(String::new, |number| format!("{number:.2}"));
        vec![
            name.display().to_string(),
            run.state.name().to_owned(),
            run.position.clone(),
            run.perplexity.map_or_else(String::new, perplexity),
            number(run.ratio_to_float),
            number(run.bits_per_weight),
            run.bytes.map_or_else(String::new, size),
            if run.seconds > 0.0 { duration(run.seconds) } else { String::new() },
            ago(now.saturating_sub(run.changed)),
        ]
    };
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    rows.extend(runs.iter().map(row));
    output::table(&rows)
}

fn ago(seconds: u64) -> String {
    if seconds == 0 { "now".to_owned() } else { format!("{} ago", duration(seconds as f64)) }
}
