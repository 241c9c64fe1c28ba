//! Answers that a model writes, greedily, as lm-evaluation-harness has them written (`generate_until`).

use serde_json::{Map, Value};

use super::kind::{Bench, Material, Refused, Score, Writes};
use crate::data::{Answer, Tokenizer};
use crate::error::{Error, Result};
use crate::model::{Ended, Forward, Generation, Prompt, Sampler};

/// How answers are written.
pub(super) struct Writing<'a> {
    tokenizer: &'a Tokenizer,
    /// Tokens that end an answer.
    ends: &'a [u32],
    /// Texts that end one; they are no part of it.
    stops: Vec<String>,
    /// Tokens of an answer at most.
    max_new: usize,
    /// Answers that are written together.
    batch: usize,
}

/// An answer.
pub(super) struct Written {
    /// Without special tokens and stops.
    pub(super) text: String,
    /// How many tokens it took.
    pub(super) tokens: usize,
    /// Why it ended.
    pub(super) ended: Ended,
}

/// Prompts as tokens.
pub(super) struct Prompts {
    tokens: Vec<Vec<u32>>,
    /// How many of them lost their beginning, since an answer has to fit behind.
    pub(super) cut: usize,
}

impl<'a> Writing<'a> {
    /// Checks that a model has a tokenizer and room for answers.
    ///
    /// # Errors
    /// When it has not.
    pub(super) fn new(
        material: &Material<'a>,
        stops: &[&str],
        max_new: usize,
        batch: usize,
    ) -> Result<Self> {
        let most = material.config.max_positions;
        if max_new >= most {
            return Err(Error::usage(format!(
                "max_new_tokens = {max_new} leaves no room for a prompt in the model's context of {most}"
            ))
            .at("max_new_tokens")
            .fix(format!("max_new_tokens = {}", (most / 2).max(1))));
        }
        let stops = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let tokenizer = material.tokenizer()?;
        Ok(Self { tokenizer, ends: material.ends, stops, max_new, batch })
    }

    /// The tokens of texts, each the last ones that an answer has room behind.
    ///
    /// # Errors
    /// When a text cannot be encoded, or has no tokens.
    pub(super) fn prompts(&self, texts: &[String], context: usize) -> Result<Prompts> {
        let mut tokens = self.tokenizer.encode_opened(texts, None)?;
        if let Some(row) = tokens.iter().position(Vec::is_empty) {
            return Err(Error::preflight(format!("the prompt of row {} has no tokens", row + 1))
                .fix("rows with a text in each"));
        }
        let room = context - self.max_new;
        let mut cut = 0;
        for tokens in &mut tokens {
            cut += usize::from(tokens.len() > room);
            tokens.drain(..tokens.len().saturating_sub(room));
        }
        Ok(Prompts { tokens, cut })
    }

    /// An answer to each prompt, in their order. `progress` counts them.
    ///
    /// # Errors
    /// When the model gives a value that is not finite, is not in memory whole, or a signal came.
    pub(super) fn write(
        &self,
        prompts: &Prompts,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<Written>> {
        let Some(model) = model.whole() else {
            return Err(Error::failed("answers are written by a model that is in memory whole"));
        };
        let Self { ends, max_new, .. } = *self;
        let sampler = Sampler::default();
        let how = Generation { model, device: bench.device, sampler, max_new, ends };
        let mut written: Vec<Option<Written>> = prompts.tokens.iter().map(|_| None).collect();
        // Prompts of like lengths together, the longest first: what does not fit in memory is known early.
        let mut order: Vec<usize> = (0..prompts.tokens.len()).collect();
        order.sort_by_key(|place| std::cmp::Reverse(prompts.tokens[*place].len()));
        for (batch, places) in order.chunks(self.batch).enumerate() {
            progress((batch * self.batch) as u64, order.len() as u64);
            let tokens: Vec<&[u32]> =
                places.iter().map(|place| &prompts.tokens[*place][..]).collect();
            let rows: Vec<Prompt<'_>> =
                tokens.iter().zip(0..).map(|(tokens, stream)| Prompt { tokens, stream }).collect();
            let mut answers: Vec<Answer<'_>> = tokens
                .iter()
                .map(|prompt| Answer::new(self.tokenizer, prompt, &self.stops))
                .collect();
            let ended = how.batch(&rows, &mut |row, token| {
                bench.stop.check()?;
                answers[row].push(token)
            })?;
            for ((place, answer), ended) in places.iter().zip(answers).zip(ended) {
                // As the harness does: decoded by itself, which may drop a space at the beginning.
                let tokens = answer.tokens();
                let text = self.tokenizer.decode(tokens, true)?;
                let text = self.before_stops(&text).to_owned();
                written[*place] = Some(Written { text, tokens: tokens.len(), ended });
            }
        }
        Ok(written.into_iter().flatten().collect())
    }

    fn before_stops<'t>(&self, text: &'t str) -> &'t str {
        let cut = |text: &'t str, stop: &String| text.split(stop.as_str()).next().unwrap_or(text);
        self.stops.iter().fold(text, cut)
    }

    /// What of the protocol is the writing's.
    pub(super) fn protocol(&self, prompts: &Prompts) -> Map<String, Value> {
        let mut protocol = Map::new();
        protocol.insert("max_new_tokens".to_owned(), self.max_new.into());
        protocol.insert("bos".to_owned(), self.tokenizer.opens().into());
        protocol.insert("cut".to_owned(), prompts.cut.into());
        protocol
    }
}

/// Refuses a task on rows that names none.
///
/// # Errors
/// Names the key.
pub(super) fn check(key: &'static str, is_there: bool, task: &str) -> Result<(), Refused> {
    if is_there {
        return Ok(());
    }
    let error = Error::usage(format!("{task} is measured on rows, and no file of them is named"));
    Err(Refused { key, error: error.fix(format!("{key} = a file or a folder of rows")) })
}

/// Refuses counts of nothing.
///
/// # Errors
/// Names the key.
pub(super) fn check_counts(
    limit: Option<usize>,
    max_new_tokens: usize,
    batch: usize,
) -> Result<(), Refused> {
    let counts =
        [("limit", limit.unwrap_or(1)), ("max_new_tokens", max_new_tokens), ("batch", batch)];
    match counts.into_iter().find(|(_, count)| *count == 0) {
        None => Ok(()),
        Some((key, _)) => {
            let error = Error::usage(format!("{key} = 0 measures nothing"));
            Err(Refused { key, error: error.fix(format!("{key} = 1 or more")) })
        }
    }
}

/// What is written for the first `limit` of some rows.
pub(super) fn writes(rows: usize, limit: Option<usize>, together: usize, tokens: usize) -> Writes {
    Writes { texts: rows.min(limit.unwrap_or(rows)), together, tokens }
}

/// The mean of numbers and its standard error; no error where one number says nothing of the spread.
pub(super) fn mean(values: &[f64]) -> (f64, Option<f64>) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (mean, (values.len() > 1).then(|| (squares / (count - 1.0) / count).sqrt()))
}

/// A mean and its error as numbers of a score.
pub(super) fn numbers(name: &str, (mean, error): (f64, Option<f64>)) -> Vec<(String, f64)> {
    let error = error.map(|error| (format!("{name}_stderr"), error));
    std::iter::once((name.to_owned(), mean)).chain(error).collect()
}

/// A number of the protocol.
pub(super) fn counted(score: &Score, key: &str) -> u64 {
    score.protocol.get(key).and_then(Value::as_u64).unwrap_or(0)
}

/// A number of a score with its error, in words.
pub(super) fn number_text(score: &Score, name: &str) -> String {
    let error = score.number(&format!("{name}_stderr"));
    let error = error.map_or_else(String::new, |error| format!(" ± {error:.4}"));
    format!("{name} {:.4}{error}", score.number(name).unwrap_or(f64::NAN))
}

/// How answers were written, in words.
pub(super) fn protocol_text(score: &Score) -> String {
    let is = |key: &str| score.protocol.get(key).and_then(Value::as_bool).unwrap_or(false);
    let template = match (is("chat_template"), score.protocol.get("multiturn")) {
        (false, _) => "no chat template",
        (true, Some(Value::Bool(false))) => "chat template, all in one turn",
        (true, _) => "chat template",
    };
    let bos = if is("bos") { "opened by BOS" } else { "no BOS" };
    let cut = match counted(score, "cut") {
        0 => String::new(),
        cut => format!(", {cut} prompts that lost their beginning"),
    };
    format!("greedy, at most {} tokens, {template}, {bos}{cut}", counted(score, "max_new_tokens"))
}

/// What of the protocol has to stand beside a number.
pub(super) fn marks(score: &Score) -> Vec<[String; 2]> {
    let rows = format!("{} rows", counted(score, "rows"));
    let template = match score.protocol.get("chat_template") {
        Some(Value::Bool(true)) => ["chat template", "chat"],
        _ => ["no chat template", "text"],
    };
    vec![[rows.clone(), rows], template.map(str::to_owned)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_has_the_error_of_a_sample() {
        let (half, error) = mean(&[1.0, 0.0, 1.0, 0.0]);
        assert!(
            (half - 0.5).abs() < 1e-12 && (error.unwrap() - (1.0_f64 / 12.0).sqrt()).abs() < 1e-12
        );
        assert_eq!(mean(&[1.0]), (1.0, None));
        assert_eq!(numbers("acc", (1.0, None)).len(), 1);
    }
}
