//! `fewbit bench`: a model of random weights, of a published model's shape or of any config.json.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Map, Value, json};

use super::output;
use crate::error::{Error, Result};
use crate::model::{known_config, write_random};
use crate::report::size;
use crate::stop::StopFlag;

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub(super) struct BenchArgs {
    /// The shape of a published model, for instance llama-3.2-1b, with random weights; or a config.json
    #[arg(long, value_name = "SHAPE")]
    like: String,
    /// Write the random model as a folder in bf16
    #[arg(long, value_name = "DIR")]
    write: PathBuf,
    /// Of the random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &BenchArgs, stop: &StopFlag) -> Result<()> {
    let config = config_of(&args.like)?;
    let bytes = write_random(&config, args.seed, &args.write, stop, &mut |_, _| ())?;
    let path = args.write.display().to_string();
    if args.json {
        return output::json(&json!({ "written": path, "like": args.like, "bytes": bytes }));
    }
    output::line(&format!("{path}   {} of random weights like {}", size(bytes), args.like))
}

/// The config of a known shape, or of a file or folder.
fn config_of(like: &str) -> Result<Map<String, Value>> {
    let path = Path::new(like);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    if !path.is_file() {
        return known_config(like).map_err(|error| error.at(format!("--like {like}")));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::preflight(format!("config.json is not valid: {e}"))
            .at(path.display())
            .fix("the model's own config.json")
    })
}
