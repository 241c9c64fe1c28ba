//! `fewbit generate`: a smoke test with real text.

use clap::Args;

use super::{ModelArgs, output};
use crate::error::{Error, Result};
use crate::model::{self, Sampler};
use crate::stop::StopFlag;

/// Arguments of `generate`.
#[derive(Args, Debug)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// Tokens to add at most
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, default_value_t = 0.0)]
    temperature: f32,
    /// Keep the smallest set of tokens that reaches this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub(super) fn run(args: &GenerateArgs, stop: &StopFlag) -> Result<()> {
    let session = args.model.open()?;
    let tokenizer = session.tokenizer()?;
    let mut text = tokenizer.encode(&args.prompt)?;
    let prompt: Vec<u32> = session.bos(&tokenizer)?.into_iter().chain(text.clone()).collect();
    let limit = session.opened.config.max_positions;
    if prompt.is_empty() || prompt.len() >= limit {
        return Err(Error::usage(format!(
            "the prompt has {} tokens, and the model's context {limit}",
            prompt.len()
        ))
        .at("--prompt")
        .fix("a prompt of another length"));
    }
    let model = session.load()?;
    let sampler = Sampler { temperature: args.temperature, top_p: args.top_p, seed: args.seed };
    let (config, device) = (&session.opened.config, &session.device.device);
    let mut shown = 0;
    let mut outcome = Ok(());
    let mut each = |token: u32| {
        text.push(token);
        outcome = stop.check().and_then(|()| show(&tokenizer.decode(&text, true)?, &mut shown));
        outcome.is_ok()
    };
    model::generate(&model, config, device, &prompt, args.max_new_tokens, sampler, &mut each);
    outcome?;
    let whole = tokenizer.decode(&text, true)?;
    output::line(whole.get(shown..).unwrap_or_default())
}

/// Prints what is new of `text`, but a character whose bytes have not all come.
fn show(text: &str, shown: &mut usize) -> Result<()> {
    let ready = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
    if let Some(new) = ready.get(*shown..) {
        output::print(new)?;
        *shown = ready.len().max(*shown);
    }
    Ok(())
}
