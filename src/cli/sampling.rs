//! How much is written, and how its tokens are chosen.

use clap::Args;

use crate::model::Sampler;

/// Flags of every command that writes text.
#[derive(Args, Clone, Debug)]
pub(super) struct SamplingArgs {
    /// Tokens to add at most [default: 128; in an answer 512]
    #[arg(long, value_name = "N")]
    pub(super) max_new_tokens: Option<usize>,
    /// 0 is greedy
    #[arg(long, value_name = "T", value_parser = temperature)]
    temperature: Option<f32>,
    /// Keep this many of the likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Keep the smallest set of tokens that reaches this probability
    #[arg(long, value_name = "P", value_parser = share)]
    top_p: Option<f32>,
    /// Keep tokens at least this likely, as a share of the likeliest
    #[arg(long, value_name = "P", value_parser = share)]
    min_p: Option<f32>,
    /// Makes tokens that the text holds less likely; 1 does nothing
    #[arg(long, value_name = "F", value_parser = penalty)]
    repetition_penalty: Option<f32>,
    /// Taken off the logit of a token for each time that it was written
    #[arg(long, value_name = "X", value_parser = taken_off, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Taken off the logit of a token that was written at all
    #[arg(long, value_name = "X", value_parser = taken_off, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Seed of the draws
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(super) seed: u64,
    /// End a text before this; may be given several times
    #[arg(long, value_name = "TEXT", value_parser = clap::builder::NonEmptyStringValueParser::new())]
    pub(super) stop: Vec<String>,
}

impl SamplingArgs {
    /// The sampler, where a flag is not given as in `otherwise`.
    pub(super) fn sampler(&self, otherwise: Sampler) -> Sampler {
        Sampler {
            temperature: self.temperature.unwrap_or(otherwise.temperature),
            top_k: self.top_k.unwrap_or(otherwise.top_k),
            top_p: self.top_p.unwrap_or(otherwise.top_p),
            min_p: self.min_p.unwrap_or(otherwise.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(otherwise.repetition_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(otherwise.frequency_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(otherwise.presence_penalty),
            seed: self.seed,
        }
    }
}

fn number(text: &str, fits: fn(f32) -> bool, what: &str) -> Result<f32, String> {
    let value = text.parse().ok().filter(|value: &f32| value.is_finite() && fits(*value));
    value.ok_or_else(|| what.to_owned())
}

fn temperature(text: &str) -> Result<f32, String> {
    number(text, |value| value >= 0.0, "a number from 0 up")
}

fn share(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0 && value <= 1.0, "a number above 0, at most 1")
}

fn taken_off(text: &str) -> Result<f32, String> {
    number(text, |value| (-2.0..=2.0).contains(&value), "a number from -2 to 2")
}

fn penalty(text: &str) -> Result<f32, String> {
    number(text, |value| value > 0.0, "a number above 0")
}
