//! Texts continued to their ends, several together; one that has ended leaves the batch.

use burn::tensor::Device;

use super::batch::{Batch, Beginning, Prompt};
use super::{CausalLm, KvHeld, KvSetting, Sampler};
use crate::error::Result;

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
pub struct Memory(Beginning);

impl Memory {
    /// What its keys and values take.
    pub fn held(&self) -> KvHeld {
        KvHeld::of(self.0.caches())
    }
}

impl Generation<'_> {
    /// Continues `prompts` together, or where keys and values are held at mixed precision one after the
    /// other; calls `each` with the place of a prompt and its new token, end tokens aside, and ends a text
    /// for which it returns `false`. Gives why each ended.
    ///
    /// # Errors
    /// As [`finite`](super::finite), and what `each` says.
    pub fn batch(
        &self,
        prompts: &[Prompt<'_>],
        each: &mut dyn FnMut(usize, u32) -> Result<bool>,
    ) -> Result<Vec<Ended>> {
        if prompts.len() > 1 && self.model.kv.as_ref().is_some_and(KvSetting::is_mixed) {
            let alone = prompts.iter().enumerate().map(|(place, prompt)| {
                self.one(&mut Memory::default(), *prompt, &mut |token| each(place, token))
            });
            return alone.collect();
        }
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
        if self.max_new == 0 {
            return Ok(ended);
        }
        let room = self.model.config.max_positions;
        // Which prompt each text of the batch continues.
        let mut places: Vec<usize> = (0..prompts.len()).collect();
        places.retain(|place| {
            let fits = prompts[*place].tokens.len() <= room;
            if !fits {
                ended[*place] = Ended::Context;
            }
            fits
        });
        let Memory(beginning) = std::mem::take(memory);
        let batch = Batch::new(places.iter().map(|place| (prompts[*place], self.sampler)));
        let mut batch = batch.remembering(beginning);
        let mut added = 0;
        while !batch.is_empty() {
            added += 1;
            let mut next = Vec::with_capacity(places.len());
            let tokens = batch.next(self.model, self.device);
            for ((index, place), token) in places.iter().enumerate().zip(tokens) {
                let token = token?;
                let end = if self.ends.contains(&token) {
                    Some(Ended::Token(token))
                } else if !each(*place, token)? {
                    Some(Ended::Caller)
                } else if added == self.max_new {
                    Some(Ended::Length)
                } else {
                    (batch.tokens(index) >= room).then_some(Ended::Context)
                };
                next.push(end.is_none().then_some(token));
                if let Some(end) = end {
                    ended[*place] = end;
                }
            }
            if let ([_], [None]) = (prompts, &next[..]) {
                break;
            }
            batch.go_on(&next);
            let mut next = next.iter();
            places.retain(|_| next.next().is_some_and(Option::is_some));
        }
        if prompts.len() == 1 {
            memory.0 = batch.into_beginning();
        }
        Ok(ended)
    }
}
