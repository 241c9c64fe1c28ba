//! Keys and values of prompts that were computed before, for prompts that begin alike: one system message, the
//! turns of a conversation so far, examples.

use std::collections::VecDeque;

use crate::model::{Batch, Beginning, Prompt, Sampler};

/// A beginning of fewer tokens is not worth a copy.
const SHORTEST: usize = 16;

/// Beginnings of one adapter's or width's prompts, the last used first.
pub(super) struct Beginnings {
    kept: VecDeque<Beginning>,
    /// The most tokens that are kept, over all of them.
    limit: usize,
}

impl Beginnings {
    /// Keeps at most `limit` tokens.
    pub(super) fn new(limit: usize) -> Self {
        Self { kept: VecDeque::new(), limit }
    }

    /// The prompt as a text of its own, with as much of it as was computed before, and how many tokens that is.
    pub(super) fn batch(&mut self, prompt: Prompt<'_>, sampler: Sampler) -> (Batch, usize) {
        let batch = Batch::new([(prompt, sampler)]);
        let shared = |beginning: &Beginning| beginning.shared(prompt.tokens);
        let best = (0..self.kept.len()).max_by_key(|index| shared(&self.kept[*index]));
        let best = best.filter(|index| shared(&self.kept[*index]) >= SHORTEST);
        let Some(beginning) = best.and_then(|index| self.kept.remove(index)) else {
            return (batch, 0);
        };
        let batch = batch.remembering(beginning.clone());
        self.kept.push_front(beginning);
        let known = batch.computed();
        (batch, known)
    }

    /// Keeps what of a lone text is computed, in place of what it goes on from.
    pub(super) fn keep(&mut self, batch: &Batch) {
        let Some(new) =
            batch.beginning().filter(|new| (SHORTEST..=self.limit).contains(&new.len()))
        else {
            return;
        };
        self.kept.retain(|old| old.shared(new.tokens()) < old.len());
        self.kept.push_front(new);
        let mut tokens = 0;
        self.kept.retain(|beginning| {
            tokens += beginning.len();
            tokens <= self.limit
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::KvCache;

    fn kept(beginnings: &Beginnings) -> Vec<usize> {
        beginnings.kept.iter().map(Beginning::len).collect()
    }

    #[test]
    fn the_last_used_stay_and_a_longer_one_takes_the_place_of_its_beginning() {
        let mut beginnings = Beginnings::new(100);
        let text = |first: u32, len: u32| (first..first + len).collect::<Vec<_>>();
        let keep = |beginnings: &mut Beginnings, tokens: &[u32]| {
            let beginning = Beginning::new(tokens.to_vec(), vec![KvCache::default()]);
            let prompt = [tokens, &[9999]].concat();
            let prompt = Prompt { tokens: &prompt, stream: 0 };
            let batch = Batch::new([(prompt, Sampler::default())]).remembering(beginning);
            beginnings.keep(&batch);
        };
        keep(&mut beginnings, &text(0, 15));
        assert!(beginnings.kept.is_empty(), "too short");
        keep(&mut beginnings, &text(0, 20));
        keep(&mut beginnings, &text(1000, 30));
        keep(&mut beginnings, &text(0, 40));
        assert_eq!(kept(&beginnings), [40, 30]);
        keep(&mut beginnings, &text(2000, 50));
        assert_eq!(kept(&beginnings), [50, 40], "90 of 100 tokens");
        keep(&mut beginnings, &text(3000, 101));
        assert_eq!(kept(&beginnings), [50, 40], "too long");
    }
}
