//! Perplexity, with the protocol that produced it.
//!
//! The default protocol: BOS before each document, documents joined into one stream, windows of
//! `context` tokens, stride equal to the context, positions from 0 in each window, the first token
//! of a window not predicted, the tail dropped.
//!
//! Packed examples have their windows already: they are the protocol's, stride and context are their
//! length, and of their tokens only the supervised ones count.
//!
//! `protocol = "wikitext2"` is that of the published tables of GPTQ, AWQ and OmniQuant: the lines of the text, each with
//! its line feed, joined by two more, tokenized as one text that only the tokenizer itself opens, in windows of
//! 2048 tokens.

use std::borrow::Cow;

use burn::tensor::{Device, Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::files::{DATA, Source};
use super::kind::{Bench, Material, Number, Prepared, Refused, Score, Task};
use super::pieces::{Cached, Pieces};
use crate::data::{Paths, ScoredWindow, TokenStream, read_documents};
use crate::error::{Error, Result};
use crate::model::{CausalLm, Forward, ModelConfig, Positions};
use crate::ops;
use crate::stop::StopFlag;

/// The context when neither the recipe nor the model says less.
const DEFAULT_CONTEXT: usize = 2048;
/// Tokens per forward pass: two windows of the default context, so that a model with an odd number of
/// key heads, each of which is one task of the attention, still keeps two threads busy.
pub(super) const TOKENS_PER_BATCH: usize = 4096;
/// Logits held at once.
pub(super) const LOGITS_PER_CHUNK: usize = 1 << 24;

/// `task.ppl = { ... }`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct PplConfig {
    /// Window length; default the model's context, at most 2048.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Tokens between window starts; default the context.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stride: Option<usize>,
    /// Use only this many windows, evenly spread; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub windows: Option<usize>,
    /// Tokens of a window that are read in one pass, whose keys and values then serve the others; only those
    /// count. Default half of the window where keys and values are held in a way of their own, else all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefill: Option<usize>,
    /// How many of the others are read together, which see each other as computed; default 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub piece: Option<usize>,
    /// How documents become one stream; absent: BOS before each of them, nothing between.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// The text of a named protocol, instead of the validation text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<Paths>,
}

/// A published way to make one stream of a text.
#[derive(Clone, Copy, Debug, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// That of GPTQ's evaluation on WikiText-2.
    Wikitext2,
}

/// A perplexity and the protocol it was measured with.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Perplexity {
    /// `exp(nll_per_token)`.
    pub perplexity: f64,
    /// Mean negative log-likelihood, nats.
    pub nll_per_token: f64,
    /// Tokens predicted and counted.
    pub tokens: u64,
    /// Window length.
    pub context: usize,
    /// Tokens between window starts.
    pub stride: usize,
    /// Windows used.
    pub windows: usize,
    /// Whether only completions of packed examples were counted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub completions_only: bool,
    /// How windows were read in pieces, where they were.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cached: Option<Cached>,
}

impl PplConfig {
    /// Window length and stride for a model, on data packed into windows of `packed` tokens if any.
    ///
    /// # Errors
    /// A usage error when they make no sense for it, or are not the packed windows.
    pub fn windows(
        &self,
        config: &ModelConfig,
        packed: Option<usize>,
    ) -> Result<(usize, usize), Refused> {
        let refused = |key, error| Err(Refused { key, error });
        for (key, asked) in [("context", self.context), ("stride", self.stride)] {
            if let (Some(asked), Some(packed)) = (asked, packed)
                && asked != packed
            {
                let error = Error::usage(format!(
                    "{key} = {asked}, but the examples are packed into windows of {packed} tokens"
                ));
                return refused(key, error.fix(format!("{key} = {packed}, or leave it out")));
            }
        }
        let default = packed.unwrap_or(config.max_positions.min(DEFAULT_CONTEXT));
        let context = self.context.unwrap_or(default);
        let stride = self.stride.unwrap_or(context);
        if context < 2 || context > config.max_positions {
            let error = Error::usage(format!(
                "context = {context} is not between 2 and the model's {}",
                config.max_positions
            ));
            let most = config.max_positions.min(DEFAULT_CONTEXT);
            return refused("context", error.fix(format!("context = {most}")));
        }
        if stride == 0 || stride > context {
            let error = Error::usage(format!("stride = {stride} is not between 1 and {context}"));
            return refused("stride", error.fix(format!("stride = {context}")));
        }
        if self.windows == Some(0) {
            let error = Error::usage("windows = 0 measures nothing");
            return refused("windows", error.fix("windows = 1"));
        }
        if let Some(pieces) = Pieces::asked([self.prefill, self.piece], false, context) {
            pieces.check(context, packed)?;
        }
        Ok((context, stride))
    }
}

impl Task for PplConfig {
    fn goes_on(&self) -> bool {
        true
    }

    fn numbers(&self) -> &'static [Number] {
        const {
            &[
                Number { name: "perplexity", tag: "eval/perplexity" },
                Number { name: "nll_per_token", tag: "eval/loss" },
            ]
        }
    }

    fn source(&self) -> Source<'_> {
        match self.protocol {
            None => Source::Text,
            Some(Protocol::Wikitext2) => Source::Rows(vec![(DATA, self.data.as_ref())]),
        }
    }

    fn check(&self) -> Result<(), Refused> {
        let refused = |what: &str, fix: &str| {
            Err(Refused { key: DATA, error: Error::usage(what).fix(fix.to_owned()) })
        };
        match (&self.protocol, &self.data) {
            (None, Some(_)) => refused(
                "only a named protocol has a text of its own",
                "protocol = \"wikitext2\", or the text as [data.validation]",
            ),
            (Some(_), None) => refused(
                "this protocol is measured on a text of its own, and none is named",
                "data = a file, for instance wiki.test.raw",
            ),
            _ => Ok(()),
        }
    }

    fn read(&mut self, data: &Paths) {
        if self.protocol.is_some() {
            self.data.get_or_insert_with(|| data.clone());
        }
    }

    fn window(&self, model: &ModelConfig, packed: Option<usize>) -> Result<usize, Refused> {
        self.windows(model, packed).map(|(context, _)| context)
    }

    fn limit(&mut self, windows: usize) {
        self.windows.get_or_insert(windows);
    }

    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>> {
        let text = match self.protocol {
            None => Cow::Borrowed(material.text()?),
            Some(Protocol::Wikitext2) => Cow::Owned(joined(material)?),
        };
        let (context, stride) = self.windows(material.config, text.packed)?;
        text.strided(context, stride)?;
        Ok(Box::new(Windowed { task: self, text }))
    }

    fn result(&self, score: &Score) -> String {
        let nll = score.number("nll_per_token").unwrap_or(f64::NAN);
        format!(
            "perplexity {:.4}   nll {nll:.5} per token over {} tokens",
            score.first(),
            score.tokens
        )
    }

    fn protocol(&self, score: &Score) -> String {
        let of = |key: &str| score.protocol.get(key).and_then(Value::as_u64).unwrap_or(0);
        let mut windows = format!(
            "{} windows of {} tokens, stride {}",
            of("windows"),
            of("context"),
            of("stride")
        );
        if let Some(cached) = Cached::of_entries(&score.protocol) {
            windows = format!("{windows},\n           {cached}");
        }
        match self.protocol {
            None => windows,
            Some(Protocol::Wikitext2) => {
                format!(
                    "wikitext2: lines joined by two line feeds, {windows},\n           the tail dropped"
                )
            }
        }
    }

    fn marks(&self, score: &Score) -> Vec<[String; 2]> {
        let of = |key: &str| score.protocol.get(key).and_then(Value::as_u64).unwrap_or(0);
        let (context, stride) = (of("context"), of("stride"));
        let mut marks = Vec::new();
        if score.protocol.contains_key("protocol") {
            marks.push(["wikitext2".to_owned(), "wikitext2".to_owned()]);
        }
        marks.push([format!("context {context}"), format!("ctx {context}")]);
        if stride != context {
            marks.push([format!("stride {stride}"), format!("stride {stride}")]);
        }
        if let Some(cached) = Cached::of_entries(&score.protocol) {
            marks.push(cached.marks());
        }
        if score.protocol.contains_key("completions_only") {
            marks.push(["completions only".to_owned(), "completions".to_owned()]);
        }
        marks
    }
}

/// The text of GPTQ's protocol as one stream.
fn joined(material: &Material<'_>) -> Result<TokenStream> {
    let mut lines = Vec::new();
    for path in material.files(DATA)? {
        let mut documents = read_documents(path)?;
        // A file of plain text is one document.
        if let [text] = &documents[..] {
            documents = lines_of(text);
        }
        lines.extend(documents);
    }
    let text = lines.join("\n\n");
    let tokens = material.tokenizer()?.encode_opened(&[text], None)?.concat();
    Ok(TokenStream { tokens, documents: 1, ..TokenStream::default() })
}

/// The rows of the data set on the hub: lines with their line feeds, those without a word as nothing.
fn lines_of(text: &str) -> Vec<String> {
    let row = |line: &str| if line.trim().is_empty() { String::new() } else { line.to_owned() };
    text.split_inclusive('\n').map(row).collect()
}

/// A text to measure perplexities on.
struct Windowed<'a> {
    task: &'a PplConfig,
    text: Cow<'a, TokenStream>,
}

impl Prepared for Windowed<'_> {
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score> {
        let Bench { device, stop, .. } = *bench;
        let config = &model.ends().config;
        let found = measure(model, config, &self.text, self.task, device, stop, progress)?;
        let mut protocol = Map::new();
        if let Some(Protocol::Wikitext2) = self.task.protocol {
            protocol.insert("protocol".to_owned(), "wikitext2".into());
        }
        protocol.insert("context".to_owned(), found.context.into());
        protocol.insert("stride".to_owned(), found.stride.into());
        protocol.insert("windows".to_owned(), found.windows.into());
        if found.completions_only {
            protocol.insert("completions_only".to_owned(), true.into());
        }
        if let Some(cached) = &found.cached {
            protocol.extend(cached.entries());
        }
        let numbers = [("perplexity", found.perplexity), ("nll_per_token", found.nll_per_token)];
        let numbers = numbers.map(|(name, value)| (name.to_owned(), value)).into();
        Ok(Score { numbers, tokens: found.tokens, protocol, ..Score::default() })
    }
}

/// Measures the perplexity of `model` on `stream`. `progress(done, of)` is called per batch.
///
/// # Errors
/// When the text is shorter than one window, the protocol does not fit the model, the model gives
/// a value that is not finite, or a signal came.
pub fn measure(
    model: &(impl Forward + ?Sized),
    config: &ModelConfig,
    stream: &TokenStream,
    task: &PplConfig,
    device: &Device,
    stop: &StopFlag,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Perplexity> {
    let (context, stride) = task.windows(config, stream.packed)?;
    let mut windows = chosen(stream, [context, stride], task.windows)?;
    let held = model.ends().kv.is_some();
    let pieces = Pieces::asked([task.prefill, task.piece], held, context);
    if let Some(pieces) = &pieces {
        pieces.check(context, stream.packed)?;
        for window in &mut windows {
            window.scored = pieces.scored(*window, context);
        }
    }
    let mut cached = None;
    let positions = Positions::new(config, 0, context, model.ends().dtype(), device);
    let mut nll = 0.0;
    let mut tokens = 0;
    let together = if pieces.is_some() { 1 } else { TOKENS_PER_BATCH / context };
    let batches: Vec<&[ScoredWindow]> = windows.chunks(together.max(1)).collect();
    let at_once = model.batches_at_once(TOKENS_PER_BATCH.max(context));
    let mut done = 0;
    for batches in batches.chunks(at_once) {
        stop.check()?;
        progress(done, windows.len() as u64);
        let hidden = match &pieces {
            None => streams(model, stream, batches, &positions, device)?,
            Some(pieces) => {
                let windows = batches.iter().flat_map(|batch| batch.iter());
                let tokens = windows.map(|window| &stream.tokens[window.start..][..context]);
                pieces.streams(model, tokens, device, stop, &mut cached)?
            }
        };
        for (batch, hidden) in batches.iter().zip(hidden) {
            done += batch.len() as u64;
            let losses = batch_nll(model.ends(), stream, batch, context, &hidden, device);
            for (window, mut losses) in batch.iter().zip(losses) {
                if let Some(flags) = flags(stream, *window, context) {
                    let mut counts = flags.iter();
                    losses.retain(|_| counts.next().is_some_and(|counts| *counts));
                }
                nll += losses.iter().map(|loss| f64::from(*loss)).sum::<f64>();
                tokens += losses.len() as u64;
            }
        }
    }
    if tokens == 0 {
        return Err(Error::preflight("the data has zero supervised tokens")
            .fix("examples with completions that fit the windows"));
    }
    let nll_per_token = nll / tokens as f64;
    if !nll_per_token.is_finite() {
        return Err(Error::failed(format!("the model's mean loss is {nll_per_token}"))
            .fix("fewbit inspect on the model, or a smaller learning_rate"));
    }
    Ok(Perplexity {
        perplexity: nll_per_token.exp(),
        nll_per_token,
        tokens,
        context,
        stride,
        windows: windows.len(),
        completions_only: stream.supervised.is_some(),
        cached,
    })
}

/// The windows of a text that are measured: those with a token that counts, of these no more than `limit`,
/// evenly spread.
///
/// # Errors
/// As [`TokenStream::strided`].
pub(super) fn chosen(
    stream: &TokenStream,
    [context, stride]: [usize; 2],
    limit: Option<usize>,
) -> Result<Vec<ScoredWindow>> {
    let mut windows = stream.strided(context, stride)?;
    windows.retain(|window| flags(stream, *window, context).is_none_or(|f| f.contains(&true)));
    if let Some(limit) = limit.filter(|limit| *limit < windows.len()) {
        windows = (0..limit).map(|i| windows[i * windows.len() / limit]).collect();
    }
    Ok(windows)
}

/// The final hidden states of windows, `[batch, context, width]` for each batch; at `positions`, or where
/// examples share windows at positions of their own.
///
/// # Errors
/// When weights cannot be read.
pub(super) fn streams(
    model: &(impl Forward + ?Sized),
    stream: &TokenStream,
    batches: &[&[ScoredWindow]],
    positions: &Positions,
    device: &Device,
) -> Result<Vec<Tensor<3>>> {
    let context = positions.len();
    let (config, dtype) = (&model.ends().config, model.ends().dtype());
    let own = |batch: &&[ScoredWindow]| {
        let all = stream.starts.as_deref()?;
        let starts: Vec<&[u32]> = batch.iter().map(|w| &all[w.start..][..context]).collect();
        Some(Positions::with_starts(config, 0, &starts, dtype, device))
    };
    let own: Vec<Option<Positions>> = batches.iter().map(own).collect();
    let inputs = batches.iter().zip(&own).map(|(batch, own)| {
        let rows: Vec<&[u32]> =
            batch.iter().map(|window| &stream.tokens[window.start..][..context]).collect();
        (CausalLm::tokens(&rows, device), own.as_ref().unwrap_or(positions))
    });
    model.streams(inputs.collect())
}

/// Which of a window's scored tokens count, `[scored]`; `None` where all do.
pub(super) fn flags(stream: &TokenStream, window: ScoredWindow, context: usize) -> Option<&[bool]> {
    let end = window.start + context;
    stream.supervised.as_deref().map(|flags| &flags[end - window.scored..end])
}

/// Negative log-likelihoods of the scored tokens of each window, from the batch's hidden states,
/// `[batch, context, d_model]`.
fn batch_nll(
    model: &CausalLm,
    stream: &TokenStream,
    batch: &[ScoredWindow],
    context: usize,
    hidden: &Tensor<3>,
    device: &Device,
) -> Vec<Vec<f32>> {
    let [_, _, d_model] = hidden.dims();
    batch
        .iter()
        .enumerate()
        .map(|(row, window)| {
            let tokens = &stream.tokens[window.start..][..context];
            // Position t predicts token t + 1.
            let first = context - 1 - window.scored;
            let hidden = hidden.clone().narrow(0, row, 1).narrow(1, first, window.scored);
            let hidden = hidden.reshape([window.scored, d_model]);
            let chunk = (LOGITS_PER_CHUNK / model.vocab()).max(1);
            let mut losses = Vec::with_capacity(window.scored);
            for start in (0..window.scored).step_by(chunk) {
                let len = chunk.min(window.scored - start);
                let logits: Tensor<2> = model.logits(hidden.clone().narrow(0, start, len));
                let next: Vec<i32> =
                    tokens[first + 1 + start..][..len].iter().map(|id| id.cast_signed()).collect();
                let next = Tensor::from_data(TensorData::new(next, [len, 1]), device);
                losses.extend(ops::negative_log_likelihood(logits, next));
            }
            losses
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/datasets/tinystories-656k");
        ModelConfig::read(std::path::Path::new(folder)).unwrap()
    }

    #[test]
    fn packed_windows_are_the_protocol() {
        let config = config();
        let protocol = |context, stride, packed| {
            let task = PplConfig { context, stride, ..PplConfig::default() };
            task.windows(&config, packed).map_err(Error::from)
        };
        assert_eq!(protocol(None, None, None).unwrap(), (512, 512));
        assert_eq!(protocol(None, None, Some(128)).unwrap(), (128, 128));
        assert_eq!(protocol(Some(128), Some(128), Some(128)).unwrap(), (128, 128));
        assert_eq!(protocol(Some(128), Some(64), None).unwrap(), (128, 64));
        let error = protocol(None, Some(64), Some(128)).unwrap_err();
        assert_eq!(error.kind().exit_code(), 2);
        assert_eq!(
            error.to_string(),
            "stride = 64, but the examples are packed into windows of 128 tokens\n  \
             try  stride = 128, or leave it out"
        );
        let error = protocol(Some(256), None, Some(128)).unwrap_err();
        assert!(error.what().starts_with("context = 256, but"), "{error}");
    }

    #[test]
    fn lines_keep_their_line_feeds_and_empty_ones_are_nothing() {
        let text = " \n = Title = \n \n A line . \nlast";
        assert_eq!(lines_of(text), ["", " = Title = \n", "", " A line . \n", "last"]);
    }

    #[test]
    fn only_supervised_tokens_are_flagged() {
        let text = TokenStream { tokens: (0..8).collect(), ..TokenStream::default() };
        let window = ScoredWindow { start: 4, scored: 3 };
        assert_eq!(flags(&text, window, 4), None);
        let supervised = [0, 0, 1, 1, 0, 1, 0, 1].map(|flag| flag == 1).to_vec();
        let packed = TokenStream { supervised: Some(supervised), packed: Some(4), ..text };
        assert_eq!(flags(&packed, window, 4).unwrap(), [true, false, true]);
    }
}
