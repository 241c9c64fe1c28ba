//! `fewbit generate`: a smoke test with real text.

use clap::Args;

use super::{AdaptedArgs, Session, output};
use crate::data::Tokenizer;
use crate::error::{Error, Result};
use crate::model::{self, CausalLm, Sampler};
use crate::stop::StopFlag;

/// Arguments of `generate`.
#[derive(Args, Debug)]
pub(super) struct GenerateArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    #[command(flatten)]
    sampling: SamplingArgs,
}

/// How much is written, and how its tokens are chosen.
#[derive(Args, Clone, Debug)]
pub(super) struct SamplingArgs {
    /// Tokens to add at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_new_tokens: usize,
    /// 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = temperature)]
    temperature: f32,
    /// Keep the smallest set of tokens that reaches this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = top_p)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(super) seed: u64,
}

fn temperature(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| value.is_finite() && *value >= 0.0);
    value.ok_or_else(|| "a number from 0 up".to_owned())
}

fn top_p(text: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| *value > 0.0 && *value <= 1.0);
    value.ok_or_else(|| "a number above 0, at most 1".to_owned())
}

pub(super) fn run(args: &GenerateArgs, stop: &StopFlag) -> Result<()> {
    let session = args.source.open()?;
    let tokenizer = session.tokenizer()?;
    let writer = Writer { session: &session, tokenizer: &tokenizer, stop };
    let prompt = writer.prompt(&args.prompt).map_err(|e| e.at("--prompt"))?;
    let model = session.load()?;
    writer.go_on(&model, prompt, true, &args.sampling)
}

/// Continues prompts on stdout.
pub(super) struct Writer<'a> {
    /// The opened model.
    pub(super) session: &'a Session,
    /// Its tokenizer.
    pub(super) tokenizer: &'a Tokenizer,
    /// Asked at every token.
    pub(super) stop: &'a StopFlag,
}

/// A text that fits in the model's context, as tokens without the one put before it.
pub(super) struct Prompt(Vec<u32>);

impl Writer<'_> {
    /// The tokens of `text`.
    ///
    /// # Errors
    /// A usage error when there are none, or too many to add one.
    pub(super) fn prompt(&self, text: &str) -> Result<Prompt> {
        let text = self.tokenizer.encode(text)?;
        let tokens = text.len() + usize::from(self.session.bos(self.tokenizer)?.is_some());
        let limit = self.session.opened.config.max_positions;
        if tokens == 0 || tokens >= limit {
            let what = format!("the prompt has {tokens} tokens, and the model's context {limit}");
            return Err(Error::usage(what).fix("a prompt of another length"));
        }
        Ok(Prompt(text))
    }

    /// Prints the continuation of `prompt` as it comes, and the prompt itself where `echo` says so.
    ///
    /// # Errors
    /// When a signal came, or stdout cannot be written.
    pub(super) fn go_on(
        &self,
        model: &CausalLm,
        Prompt(mut text): Prompt,
        echo: bool,
        sampling: &SamplingArgs,
    ) -> Result<()> {
        let Self { session, tokenizer, stop } = self;
        let prompt: Vec<u32> = session.bos(tokenizer)?.into_iter().chain(text.clone()).collect();
        let mut shown = if echo { 0 } else { ready(&tokenizer.decode(&text, true)?).len() };
        let SamplingArgs { max_new_tokens, temperature, top_p, seed } = *sampling;
        let sampler = Sampler { temperature, top_p, seed };
        let (config, device) = (&session.opened.config, &session.device.device);
        let mut outcome = Ok(());
        let mut each = |token: u32| {
            text.push(token);
            outcome = stop.check().and_then(|()| show(&tokenizer.decode(&text, true)?, &mut shown));
            outcome.is_ok() && !output::is_closed()
        };
        let (most, each) = (max_new_tokens, &mut each);
        let computed = model::generate(model, config, device, &prompt, most, sampler, each);
        outcome?;
        computed.map_err(|e| e.at(session.opened.dir.display()))?;
        let whole = tokenizer.decode(&text, true)?;
        output::line(whole.get(shown..).unwrap_or_default())
    }
}

/// A text but for a character at its end whose bytes have not all come.
fn ready(text: &str) -> &str {
    text.trim_end_matches(char::REPLACEMENT_CHARACTER)
}

/// Prints what is new of `text`.
fn show(text: &str, shown: &mut usize) -> Result<()> {
    let ready = ready(text);
    if let Some(new) = ready.get(*shown..) {
        output::print(new)?;
        *shown = ready.len().max(*shown);
    }
    Ok(())
}
