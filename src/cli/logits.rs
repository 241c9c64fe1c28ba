//! `fewbit logits`: f32 logits `[1, seq, vocab]` of a token sequence, as safetensors.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;

use super::{AdaptedArgs, output};
use crate::error::{Error, Result};
use crate::model::{CausalLm, Positions, finite};
use crate::store::safetensors::write_file;
use crate::store::{HostTensor, locate};

/// Arguments of `logits`.
#[derive(Args, Debug)]
pub(super) struct LogitsArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// Token ids, separated by commas
    #[arg(long, value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// The file to write
    #[arg(long, value_name = "F.safetensors")]
    output: PathBuf,
}

pub(super) fn run(args: &LogitsArgs) -> Result<()> {
    locate::output_file(&args.output)?;
    let session = args.source.open()?;
    let config = &session.opened.config;
    if let Some(id) = args.tokens.iter().find(|id| **id as usize >= config.vocab) {
        return Err(Error::usage(format!("token {id} is not in the model's {}", config.vocab))
            .at("--tokens")
            .fix(format!("ids below {}", config.vocab)));
    }
    let seq = args.tokens.len();
    if seq > config.max_positions {
        return Err(Error::usage(format!(
            "{seq} tokens do not fit in the model's context {}",
            config.max_positions
        ))
        .at("--tokens")
        .fix(format!("at most {} tokens", config.max_positions)));
    }
    let model = session.load()?;
    let device = &session.device.device;
    let positions = Positions::new(config, 0, seq, model.dtype(), device);
    let hidden = model.hidden(CausalLm::tokens(&[&args.tokens], device), &positions);
    // Some models go back to the embedding's width before the head.
    let [_, _, width] = hidden.dims();
    let logits = model.logits(hidden.reshape([seq, width]));
    let values: Vec<f32> = logits.into_data().iter::<f32>().collect();
    finite(&values).map_err(|e| e.at(session.opened.dir.display()))?;
    let tensor = HostTensor::f32([1, seq, config.vocab], &values);
    write_file(&args.output, &[("logits".to_owned(), tensor)], &BTreeMap::new())?;
    output::line(&format!("{}  logits [1, {seq}, {}] f32", args.output.display(), config.vocab))
}
