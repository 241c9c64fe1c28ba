//! Texts that are continued together, which others may join and leave at any token.
//!
//! Texts of a batch end at the same place: shorter ones stand behind padding that nothing sees
//! ([`Positions::with_starts`]). A text that joins brings its own keys and values, and those of the shorter
//! side get the padding; what stands before every text is let go of.

use burn::tensor::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::{CausalLm, KvCache, Positions, Sampler};
use crate::error::{Error, Result};
use crate::ops;

/// A text to be continued.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Its tokens; not empty.
    pub tokens: &'a [u32],
    /// Which row of the sampler's draws is its own.
    pub stream: u64,
}

/// Texts that are continued together.
#[derive(Debug, Default)]
pub struct Batch {
    rows: Vec<Row>,
    /// One for each block.
    caches: Vec<KvCache>,
    /// Positions in the caches, padding included.
    past: usize,
}

#[derive(Debug)]
struct Row {
    text: Vec<u32>,
    sampler: Sampler,
    draws: ChaCha8Rng,
    /// Padding before it.
    padding: usize,
}

impl Batch {
    /// Prompts of which nothing is computed yet.
    pub fn new<'a>(prompts: impl IntoIterator<Item = (Prompt<'a>, Sampler)>) -> Self {
        let row = |(prompt, sampler): (Prompt<'_>, Sampler)| Row {
            text: prompt.tokens.to_vec(),
            sampler,
            draws: sampler.draws(prompt.stream),
            padding: 0,
        };
        let mut rows: Vec<Row> = prompts.into_iter().map(row).collect();
        let longest = rows.iter().map(|row| row.text.len()).max().unwrap_or(0);
        for row in &mut rows {
            row.padding = longest - row.text.len();
        }
        Self { rows, caches: Vec::new(), past: 0 }
    }

    /// The same with keys and values of a text that the only one may begin like.
    pub(super) fn remembering(mut self, tokens: &[u32], caches: Vec<KvCache>) -> Self {
        if let ([row], false) = (&self.rows[..], caches.is_empty()) {
            let same = row.text.iter().zip(tokens).take_while(|(a, b)| a == b).count();
            // The last token has to be computed for its logits.
            self.past = same.min(row.text.len().saturating_sub(1));
            self.caches = caches;
            let past = self.past;
            self.caches.iter_mut().for_each(|cache| cache.truncate(past));
        }
        self
    }

    /// What of the only text is computed, with its keys and values.
    pub(super) fn into_memory(self) -> (Vec<u32>, Vec<KvCache>) {
        let mut text = self.rows.into_iter().next().map(|row| row.text).unwrap_or_default();
        text.truncate(self.past);
        (text, self.caches)
    }

    /// How many texts there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Tokens of text `index`, those of its prompt included.
    pub fn tokens(&self, index: usize) -> usize {
        self.rows.get(index).map_or(0, |row| row.text.len())
    }

    /// The token behind each text, which is not in the text yet.
    ///
    /// # Errors
    /// For a text, as [`finite`].
    pub fn next(&mut self, model: &CausalLm, device: &Device) -> Vec<Result<u32>> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let mut logits = ops::continuing(|| self.logits(model, device));
        let vocab = logits.len() / self.rows.len();
        let rows = self.rows.iter_mut().zip(logits.chunks_exact_mut(vocab.max(1)));
        let chosen = rows.map(|(row, logits)| {
            finite(logits)?;
            Ok(row.sampler.choose(logits, &row.text, &mut row.draws))
        });
        chosen.collect()
    }

    /// Goes on with the texts that get a token; the others leave.
    pub fn go_on(&mut self, tokens: &[Option<u32>]) {
        let kept: Vec<usize> = (0..self.rows.len())
            .filter(|index| tokens.get(*index).is_some_and(Option::is_some))
            .collect();
        for (row, token) in self.rows.iter_mut().zip(tokens) {
            row.text.extend(token);
        }
        self.keep(&kept);
    }

    /// Goes on with these texts, named in order.
    pub fn keep(&mut self, kept: &[usize]) {
        if kept.len() == self.rows.len() {
            return;
        }
        let mut index = 0;
        self.rows.retain(|_| {
            index += 1;
            kept.binary_search(&(index - 1)).is_ok()
        });
        if kept.is_empty() {
            (self.caches, self.past) = (Vec::new(), 0);
            return;
        }
        let unused = self.rows.iter().map(|row| row.padding).min().unwrap_or(0).min(self.past);
        for row in &mut self.rows {
            row.padding -= unused;
        }
        self.past -= unused;
        for cache in &mut self.caches {
            cache.select(kept);
            cache.skip(unused);
        }
    }

    /// Takes in texts that have come as far: everything but their last tokens is computed, as of its own.
    pub fn join(&mut self, others: Vec<Self>) {
        let own = std::mem::take(self);
        let mut all: Vec<Self> = std::iter::once(own).chain(others).collect();
        all.retain(|batch| !batch.rows.is_empty());
        let past = all.iter().map(|batch| batch.past).max().unwrap_or(0);
        for batch in &mut all {
            batch.pad(past);
        }
        let mut all = all.into_iter();
        let Some(first) = all.next() else { return };
        *self = first;
        let mut caches = Vec::new();
        for mut other in all {
            self.rows.append(&mut other.rows);
            caches.push(other.caches.into_iter());
        }
        for cache in &mut self.caches {
            cache.join(caches.iter_mut().filter_map(Iterator::next));
        }
    }

    /// Padding before every text, up to `past` computed positions.
    fn pad(&mut self, past: usize) {
        let more = past - self.past;
        self.past = past;
        for row in &mut self.rows {
            row.padding += more;
        }
        for cache in &mut self.caches {
            cache.pad(more);
        }
    }

    /// Positions of the batch, padding included.
    fn total(&self) -> usize {
        self.rows.first().map_or(0, |row| row.padding + row.text.len())
    }

    /// The logits behind each text, `[rows, vocab]`.
    fn logits(&mut self, model: &CausalLm, device: &Device) -> Vec<f32> {
        let config = &model.config;
        let total = self.total();
        let anew =
            |row: &Row| config.rotates_anew(self.past.saturating_sub(row.padding), row.text.len());
        if self.rows.iter().any(anew) {
            // Keys in the cache were rotated for a shorter text.
            self.caches.clear();
            self.past = 0;
        }
        let past = self.past;
        let padded = self.rows.iter().any(|row| row.padding > 0);
        let place = |row: &Row, place: usize| {
            place.checked_sub(row.padding).map_or(0, |place| row.text[place])
        };
        let tokens: Vec<Vec<u32>> =
            self.rows.iter().map(|row| (past..total).map(|at| place(row, at)).collect()).collect();
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
        let tokens = CausalLm::tokens(&tokens, device);
        let hidden = model.go_on(tokens, &positions, &mut self.caches);
        let [rows, seq, d_model] = hidden.dims();
        let last: Tensor<2> = hidden.narrow(1, seq - 1, 1).reshape([rows, d_model]);
        let logits = model.logits(model.finish(last));
        logits.cast(DType::F32).into_data().iter::<f32>().collect()
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
