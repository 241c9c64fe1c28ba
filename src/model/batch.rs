//! Texts that are continued together, which others may join and leave at any token.
//!
//! Texts of a batch end at the same place: shorter ones stand behind padding that nothing sees
//! ([`Positions::with_starts`]). A text that joins brings its own keys and values, and those of the shorter
//! side get the padding; what stands before every text is let go of.

use burn::tensor::{DType, Device, Tensor};
use rand_chacha::ChaCha8Rng;

use super::{CausalLm, KvCache, Logprobs, Positions, Sampler};
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
    /// Tokens of the text that keys in the caches were rotated for, where that is another one.
    rotated_for: usize,
}

/// The beginning of a text, with its keys and values.
#[derive(Clone, Debug, Default)]
pub struct Beginning {
    tokens: Vec<u32>,
    caches: Vec<KvCache>,
}

impl Beginning {
    /// Of these tokens, with a cache for each block.
    pub fn new(tokens: Vec<u32>, caches: Vec<KvCache>) -> Self {
        Self { tokens, caches }
    }

    /// Its tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Its keys and values, by block.
    pub fn caches(&self) -> &[KvCache] {
        &self.caches
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// How many of its tokens `text` begins with.
    pub fn shared(&self, text: &[u32]) -> usize {
        text.iter().zip(&self.tokens).take_while(|(a, b)| a == b).count()
    }
}

#[derive(Debug)]
struct Row {
    text: Vec<u32>,
    /// Tokens of it that were not chosen here.
    prompt: usize,
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
            prompt: prompt.tokens.len(),
            sampler,
            draws: sampler.draws(prompt.stream),
            padding: 0,
        };
        let mut rows: Vec<Row> = prompts.into_iter().map(row).collect();
        let longest = rows.iter().map(|row| row.text.len()).max().unwrap_or(0);
        for row in &mut rows {
            row.padding = longest - row.text.len();
        }
        Self { rows, caches: Vec::new(), past: 0, rotated_for: 0 }
    }

    /// The same with keys and values of a text that the only one may begin like.
    #[must_use]
    pub fn remembering(mut self, beginning: Beginning) -> Self {
        if let ([row], false) = (&self.rows[..], beginning.caches.is_empty()) {
            // The last token has to be computed for its logits.
            self.past = beginning.shared(&row.text).min(row.text.len().saturating_sub(1));
            self.rotated_for = beginning.len();
            self.caches = beginning.caches;
            let past = self.past;
            self.caches.iter_mut().for_each(|cache| cache.truncate(past));
        }
        self
    }

    /// What of the only text is computed, with its keys and values.
    pub fn beginning(&self) -> Option<Beginning> {
        let [Row { text, padding: 0, .. }] = &self.rows[..] else { return None };
        Some(Beginning::new(text[..self.past].to_vec(), self.caches.clone()))
    }

    /// As [`Batch::beginning`], without a copy.
    pub(super) fn into_beginning(self) -> Beginning {
        let mut tokens = self.rows.into_iter().next().map(|row| row.text).unwrap_or_default();
        tokens.truncate(self.past);
        Beginning { tokens, caches: self.caches }
    }

    /// Positions that are computed, padding included.
    pub fn computed(&self) -> usize {
        self.past
    }

    /// Positions that [`Batch::next`] has to compute first.
    pub fn unread(&self) -> usize {
        self.total() - self.past
    }

    /// Computes the next `count` positions of what [`Batch::next`] would, but for its last one: prompts in pieces.
    /// Nothing, where the beginning of such a text looks different by itself (longrope).
    pub fn read(&mut self, model: &CausalLm, device: &Device, count: usize) {
        let total = self.total();
        let to = (self.past + count).min(total.saturating_sub(1));
        let anew = |row: &Row| model.config.rotates_anew(to - row.padding.min(to), row.text.len());
        if to > self.past && !self.rows.iter().any(anew) {
            ops::continuing(device, || self.hidden(model, device, to));
        }
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
        let next = self.next_with_logprobs(model, device, |_| None);
        next.into_iter().map(|next| next.map(|(token, _)| token)).collect()
    }

    /// As [`Batch::next`], with how likely each token was, where `count` asks for so many of the likeliest beside it.
    ///
    /// # Errors
    /// As [`Batch::next`].
    pub fn next_with_logprobs(
        &mut self,
        model: &CausalLm,
        device: &Device,
        count: impl Fn(usize) -> Option<usize>,
    ) -> Vec<Result<(u32, Option<Logprobs>)>> {
        if self.rows.is_empty() {
            return Vec::new();
        }
        let mut logits = ops::continuing(device, || self.logits(model, device));
        let vocab = logits.len() / self.rows.len();
        let rows = self.rows.iter_mut().zip(logits.chunks_exact_mut(vocab.max(1)));
        let chosen = rows.enumerate().map(|(index, (row, logits))| {
            finite(logits)?;
            let said = row.text.split_at(row.prompt);
            // Choosing changes them.
            let asked = count(index).map(|count| (logits.to_vec(), count));
            let token = row.sampler.choose(logits, said, &mut row.draws);
            Ok((token, asked.map(|(logits, count)| Logprobs::of(&logits, token, count))))
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
        let hidden = self.hidden(model, device, self.total());
        let [rows, seq, d_model] = hidden.dims();
        let last: Tensor<2> = hidden.narrow(1, seq - 1, 1).reshape([rows, d_model]);
        let logits = model.logits(model.finish(last));
        logits.cast(DType::F32).into_data().iter::<f32>().collect()
    }

    /// Hidden states of the positions that are not computed yet, up to `total`, `[rows, positions, d_model]`.
    fn hidden(&mut self, model: &CausalLm, device: &Device, total: usize) -> Tensor<3> {
        let config = &model.config;
        let anew = |row: &Row| {
            let len = row.text.len();
            // Keys in the cache were rotated for a shorter text, or for a longer one that began alike.
            config.rotates_anew(self.past.saturating_sub(row.padding), len)
                || config.rotates_anew(len, self.rotated_for)
        };
        if self.rows.iter().any(anew) {
            self.caches.clear();
            self.past = 0;
        }
        self.rotated_for = 0;
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
        model.go_on(tokens, &positions, &mut self.caches)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::{Loader, open_folder};

    #[test]
    fn a_beginning_serves_texts_on_either_side_of_where_rotations_change() {
        // LongRoPE: other rotations from 17 tokens on.
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity/phi3");
        let (config, source) = open_folder(&folder).unwrap();
        let device = Device::flex();
        let loader =
            Loader { config: &config, source: &source, device: &device, dtype: DType::F32 };
        let model = loader.model().unwrap();
        let tokens: Vec<u32> = (0..40).map(|i| 3 + i * 11 % 60).collect();
        let batch = |len: usize| {
            let prompt = Prompt { tokens: &tokens[..len], stream: 0 };
            Batch::new([(prompt, Sampler::default())])
        };
        for (known, len) in [(30, 10), (10, 30), (30, 40), (12, 8), (17, 16), (16, 17)] {
            let mut before = batch(known);
            before.logits(&model, &device);
            let beginning = before.beginning().unwrap();
            let found = batch(len).remembering(beginning).logits(&model, &device);
            let expected = batch(len).logits(&model, &device);
            let gap = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
            let gap = gap.fold(0.0, f32::max);
            assert!(gap < 1e-5, "{known} tokens, then {len}: {gap}");
        }
    }
}
