//! Texts continued token by token, several together, with a key and value cache.
//!
//! Texts of a batch end at the same place: shorter ones stand behind padding that nothing sees
//! ([`Positions::with_starts`]), and one that has ended leaves the batch.

use burn::tensor::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::{CausalLm, KvCache, Positions, Sampler};
use crate::error::{Error, Result};
use crate::ops;

/// How texts are continued.
#[derive(Clone, Copy, Debug)]
pub struct Generation<'a> {
    /// By which model.
    pub model: &'a CausalLm,
    /// Where it lives.
    pub device: &'a Device,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Tokens that are added to a text at most.
    pub max_new: usize,
    /// Tokens that end a text.
    pub ends: &'a [u32],
}

/// A text to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Its tokens; not empty.
    pub tokens: &'a [u32],
    /// Which row of the sampler's draws is its own.
    pub stream: u64,
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ended {
    /// The model said so, with this token.
    Token(u32),
    /// It has all the tokens it may have.
    Length,
    /// The model's context is full.
    Context,
    /// The caller said so.
    Caller,
}

impl Ended {
    /// How it goes by in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Token(_) => "end",
            Self::Length => "length",
            Self::Context => "context",
            Self::Caller => "stop",
        }
    }
}

/// A text whose keys and values are kept, so that a longer one that begins like it costs less.
#[derive(Debug, Default)]
pub struct Memory {
    tokens: Vec<u32>,
    caches: Vec<KvCache>,
}

impl Generation<'_> {
    /// Continues `prompts` together; calls `each` with the place of a prompt and its new token, end
    /// tokens aside, and ends a text for which it returns `false`. Gives why each ended.
    ///
    /// # Errors
    /// As [`finite`], and what `each` says.
    pub fn batch(
        &self,
        prompts: &[Prompt<'_>],
        each: &mut dyn FnMut(usize, u32) -> Result<bool>,
    ) -> Result<Vec<Ended>> {
        self.go_on(&mut Memory::default(), prompts, each)
    }

    /// Continues one prompt, the keys and values of whose beginning may be in `memory`, which is then
    /// of the text as it was continued.
    ///
    /// # Errors
    /// As [`Generation::batch`].
    pub fn one(
        &self,
        memory: &mut Memory,
        prompt: Prompt<'_>,
        each: &mut dyn FnMut(u32) -> Result<bool>,
    ) -> Result<Ended> {
        let ended = self.go_on(memory, &[prompt], &mut |_, token| each(token))?;
        Ok(ended.first().copied().unwrap_or(Ended::Caller))
    }

    fn go_on(
        &self,
        memory: &mut Memory,
        prompts: &[Prompt<'_>],
        each: &mut dyn FnMut(usize, u32) -> Result<bool>,
    ) -> Result<Vec<Ended>> {
        let mut ended = vec![Ended::Length; prompts.len()];
        if self.max_new == 0 || prompts.is_empty() {
            return Ok(ended);
        }
        let mut batch = Batch::new(self, memory, prompts);
        while !batch.rows.is_empty() {
            let full = |row: &Row| row.text.len() > self.model.config.max_positions;
            let fitting: Vec<usize> =
                (0..batch.rows.len()).filter(|index| !full(&batch.rows[*index])).collect();
            for row in batch.rows.iter().filter(|row| full(row)) {
                ended[row.place] = Ended::Context;
            }
            batch.keep(&fitting);
            if batch.rows.is_empty() {
                break;
            }
            let mut logits = ops::continuing(|| batch.step(self));
            let vocab = logits.len() / batch.rows.len();
            let mut kept = Vec::with_capacity(batch.rows.len());
            for (index, logits) in logits.chunks_exact_mut(vocab).enumerate() {
                finite(logits)?;
                let row = &mut batch.rows[index];
                let token = self.sampler.choose(logits, &row.text, &mut row.draws);
                let end = if self.ends.contains(&token) {
                    Some(Ended::Token(token))
                } else {
                    row.text.push(token);
                    row.added += 1;
                    let more = each(row.place, token)?;
                    let long = row.added == self.max_new;
                    (!more).then_some(Ended::Caller).or(long.then_some(Ended::Length))
                };
                match end {
                    Some(end) => ended[row.place] = end,
                    None => kept.push(index),
                }
            }
            batch.keep(&kept);
        }
        if let [prompt] = prompts {
            memory.caches = batch.caches;
            memory.tokens = batch.alone.unwrap_or_else(|| prompt.tokens.to_vec());
            memory.tokens.truncate(batch.past);
        }
        Ok(ended)
    }
}

/// A text of a batch.
struct Row {
    /// Which prompt it continues.
    place: usize,
    text: Vec<u32>,
    added: usize,
    draws: ChaCha8Rng,
    /// Padding before it.
    padding: usize,
}

struct Batch {
    rows: Vec<Row>,
    caches: Vec<KvCache>,
    /// Positions in the caches, padding included.
    past: usize,
    /// The text of a batch of one, when it has ended.
    alone: Option<Vec<u32>>,
}

impl Batch {
    fn new(how: &Generation<'_>, memory: &mut Memory, prompts: &[Prompt<'_>]) -> Self {
        let longest = prompts.iter().map(|prompt| prompt.tokens.len()).max().unwrap_or(0);
        let row = |(place, prompt): (usize, &Prompt<'_>)| Row {
            place,
            text: prompt.tokens.to_vec(),
            added: 0,
            draws: how.sampler.draws(prompt.stream),
            padding: longest - prompt.tokens.len(),
        };
        let rows: Vec<Row> = prompts.iter().enumerate().map(row).collect();
        let mut past = 0;
        let mut caches = std::mem::take(&mut memory.caches);
        if let ([row], false) = (&rows[..], caches.is_empty()) {
            let same = row.text.iter().zip(&memory.tokens).take_while(|(a, b)| a == b).count();
            // The last token has to be computed for its logits.
            past = same.min(row.text.len().saturating_sub(1));
        }
        for cache in &mut caches {
            cache.truncate(past);
        }
        caches.resize(how.model.blocks.len(), KvCache::default());
        Self { rows, caches, past, alone: None }
    }

    /// Positions of the batch, padding included.
    fn total(&self) -> usize {
        self.rows.first().map_or(0, |row| row.padding + row.text.len())
    }

    /// The logits behind each text, `[rows, vocab]`.
    fn step(&mut self, how: &Generation<'_>) -> Vec<f32> {
        let Generation { model, device, .. } = how;
        let config = &model.config;
        let total = self.total();
        if self
            .rows
            .iter()
            .any(|row| config.rotates_anew(self.past.saturating_sub(row.padding), row.text.len()))
        {
            // Keys in the cache were rotated for a shorter text.
            self.caches.fill(KvCache::default());
            self.past = 0;
        }
        let past = self.past;
        let padded = self.rows.iter().any(|row| row.padding > 0);
        let tokens: Vec<Vec<u32>> = self
            .rows
            .iter()
            .map(|row| {
                (past..total)
                    .map(|place| place.checked_sub(row.padding).map_or(0, |place| row.text[place]))
                    .collect()
            })
            .collect();
        let positions = if padded {
            let starts: Vec<Vec<u32>> = self
                .rows
                .iter()
                .map(|row| (past..total).map(|place| place.min(row.padding) as u32).collect())
                .collect();
            let starts: Vec<&[u32]> = starts.iter().map(Vec::as_slice).collect();
            Positions::with_starts(config, past, &starts, model.dtype(), device)
        } else {
            Positions::new(config, past, total - past, model.dtype(), device)
        };
        self.past = total;
        let tokens: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
        let mut hidden = model.embed(CausalLm::tokens(&tokens, device), &positions);
        for (index, (block, cache)) in model.blocks.iter().zip(&mut self.caches).enumerate() {
            let tap = |site, x| model.tap.apply(index, site, x);
            hidden = block.forward_tapped(hidden, &positions, Some(cache), &tap);
        }
        let [rows, seq, d_model] = hidden.dims();
        let last: Tensor<2> = hidden.narrow(1, seq - 1, 1).reshape([rows, d_model]);
        let logits = model.logits(model.finish(last));
        logits.cast(DType::F32).into_data().iter::<f32>().collect()
    }

    /// Goes on with some rows.
    fn keep(&mut self, kept: &[usize]) {
        if kept.len() == self.rows.len() {
            return;
        }
        let mut index = 0;
        if let ([row], []) = (&mut self.rows[..], kept) {
            self.alone = Some(std::mem::take(&mut row.text));
        }
        self.rows.retain(|_| {
            index += 1;
            kept.contains(&(index - 1))
        });
        if !kept.is_empty() {
            for cache in &mut self.caches {
                cache.select(kept);
            }
        }
    }
}

/// Refuses logits that are no numbers: the weights are damaged, or too large for the type of activations.
///
/// # Errors
/// Names the first one.
pub fn finite(logits: &[f32]) -> Result<()> {
    match logits.iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::damaged(
            format!("the model computes {value} in place of a logit"),
            "another copy of the model: its weights are damaged; or --compute f32",
        )),
    }
}
