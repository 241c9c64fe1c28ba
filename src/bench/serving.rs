//! What users of a model wait for: reading it, prompts, tokens.

use std::time::Instant;

use super::parts::{Bench, Part, Work};
use super::timing::{Spread, timed};
use super::training::{note, wait};
use crate::error::{Error, Result};
use crate::export::open_model;
use crate::model::{CausalLm, Generation, Loader, Prompt, Sampler};

/// Tokens that a text starts with when generation is measured.
const START: usize = 16;
/// Tokens that are generated of each text.
const NEW: usize = 33;

/// Parts that share a model.
pub(super) struct Serving<'a> {
    bench: &'a Bench<'a>,
    model: Option<CausalLm>,
}

impl<'a> Serving<'a> {
    pub(super) fn new(bench: &'a Bench<'a>) -> Self {
        Self { bench, model: None }
    }

    pub(super) fn drop_model(&mut self) {
        self.model = None;
    }

    /// Reading the model onto the device.
    pub(super) fn load(&mut self) -> Result<(Work, Spread)> {
        let bench = self.bench;
        note(bench, Part::Load);
        let path = bench.subject.path()?;
        let (device, dtype) = (&bench.device.device, bench.settings.dtype);
        let bytes: u64 = open_model(path)?.checkpoint.total_bytes();
        self.drop_model();
        let seconds = bench.settings.effort.measure(bench.stop, || {
            timed(|| {
                let opened = open_model(path)?;
                let model =
                    Loader { config: &opened.config, source: &opened, device, dtype }.model()?;
                wait(bench)?;
                drop(model);
                Ok(())
            })
        })?;
        let what = "from files".to_owned();
        Ok((Work { what, unit: "bytes", amount: bytes as f64, operations: None }, seconds))
    }

    fn model(&mut self) -> Result<&CausalLm> {
        let bench = self.bench;
        let (config, source) = (&bench.subject.config, bench.subject.source());
        let (device, dtype) = (&bench.device.device, bench.settings.dtype);
        if self.model.is_none() {
            let mut model = Loader { config, source, device, dtype }.model()?;
            if bench.settings.integers {
                model.multiply_in_integers();
            }
            self.model = Some(model);
        }
        self.model.as_ref().ok_or_else(|| Error::failed("the model is gone"))
    }

    /// From prompts to their first tokens.
    pub(super) fn prompt(&mut self) -> Result<(Work, Spread)> {
        let bench = self.bench;
        note(bench, Part::Prompt);
        let (batch, length) = (bench.settings.batch, bench.settings.length);
        let model = self.model()?;
        let generation = generation(bench, model, 1);
        let tokens = bench.tokens(batch * length);
        let prompts = prompts(&tokens, length);
        let seconds = bench.settings.effort.measure(bench.stop, || {
            timed(|| generation.batch(&prompts, &mut |_, _| Ok(true)).map(drop))
        })?;
        let count = (batch * length) as f64;
        let subject = bench.subject;
        let attention = subject.attention_products(batch as u64 * length as u64, length as u64);
        // The head reads the last position of each text alone.
        let operations = 2.0 * subject.active_weights() as f64 * count
            + 2.0 * subject.head_weights() as f64 * batch as f64
            + 2.0 * attention;
        let what = format!("{batch}x{length}");
        Ok((Work { what, unit: "tokens", amount: count, operations: Some(operations) }, seconds))
    }

    /// Tokens of texts that go on together, from their first new one.
    pub(super) fn generate(&mut self, batch: usize) -> Result<(Work, Spread)> {
        let bench = self.bench;
        note(bench, Part::Generate);
        let context = bench.subject.config.max_positions;
        let start = START.min(context / 2).max(1);
        let new = NEW.min(context - start).max(2);
        let model = self.model()?;
        let generation = generation(bench, model, new);
        let tokens = bench.tokens(batch * start);
        let prompts = prompts(&tokens, start);
        let seconds = bench.settings.effort.measure(bench.stop, || {
            let (mut first, mut last) = (None, Instant::now());
            let mut seen = 0;
            generation.batch(&prompts, &mut |_, _| {
                seen += 1;
                // The last text's first token ends the prompts.
                if seen == batch {
                    first = Some(Instant::now());
                }
                last = Instant::now();
                Ok(true)
            })?;
            let first = first.ok_or_else(|| Error::failed("nothing was generated"))?;
            Ok((last - first).as_secs_f64() / (new - 1) as f64)
        })?;
        let subject = bench.subject;
        let weights = subject.active_weights() + subject.head_weights();
        let operations = 2.0 * weights as f64 * batch as f64;
        let what = format!("{batch} at once");
        let amount = batch as f64;
        Ok((Work { what, unit: "tokens", amount, operations: Some(operations) }, seconds))
    }
}

fn generation<'a>(bench: &'a Bench<'_>, model: &'a CausalLm, max_new: usize) -> Generation<'a> {
    let device = &bench.device.device;
    Generation { model, device, sampler: Sampler::default(), max_new, ends: &[] }
}

fn prompts(tokens: &[u32], length: usize) -> Vec<Prompt<'_>> {
    let texts = tokens.chunks(length).zip(0..);
    texts.map(|(tokens, stream)| Prompt { tokens, stream }).collect()
}
