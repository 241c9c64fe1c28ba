//! How the next token is chosen.

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens that are sorted first: mostly the ones that are drawn are among them.
const FIRST_SORTED: usize = 256;

/// How the next token is chosen: penalties on what was said, then temperature, top-k, top-p and min-p, in
/// the order of the transformers library.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the likeliest tokens, this many; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely, as a share of the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Logits of tokens that the text holds are divided by it where they are positive, multiplied by it
    /// where they are negative; 1 leaves them.
    pub repetition_penalty: f32,
    /// Taken off the logit of a token for each time that it was chosen, the prompt aside; 0 leaves it.
    pub frequency_penalty: f32,
    /// Taken off the logit of a token that was chosen at all, the prompt aside; 0 leaves it.
    pub presence_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampler {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            seed: 0,
        }
    }
}

impl Sampler {
    /// The draws of one text: another row of them for each `stream`.
    pub(super) fn draws(&self, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(stream);
        rng
    }

    /// The token after a prompt and the tokens that were chosen behind it, from its logits, which are changed.
    pub(super) fn choose(
        &self,
        logits: &mut [f32],
        (prompt, chosen): (&[u32], &[u32]),
        rng: &mut impl Rng,
    ) -> u32 {
        self.penalize(logits, prompt, chosen);
        if self.temperature <= 0.0 {
            let best = (0..logits.len()).min_by(|a, b| before(logits, *a, *b));
            return best.unwrap_or(0) as u32;
        }
        let mut ranks = Ranks::new(logits);
        let top = logits[ranks.at(0)];
        let weight = |i: usize| f64::from((logits[i] - top) / self.temperature).exp();
        let most = if self.top_k == 0 { logits.len() } else { self.top_k.min(logits.len()) };
        let total: f64 = if most == logits.len() {
            (0..logits.len()).map(weight).sum()
        } else {
            (0..most).map(|rank| weight(ranks.at(rank))).sum()
        };
        let mut kept = 0.0;
        let mut count = 0;
        while count < most && (count == 0 || kept < f64::from(self.top_p) * total) {
            let next = weight(ranks.at(count));
            if next < f64::from(self.min_p) {
                break;
            }
            kept += next;
            count += 1;
            if self.top_p >= 1.0 && self.min_p <= 0.0 {
                // Nothing is cut: the sum is known, and nobody has to walk to the end for it.
                (kept, count) = (total, most);
            }
        }
        let mut draw = rng.random::<f64>() * kept;
        for rank in 0..count {
            let index = ranks.at(rank);
            draw -= weight(index);
            if draw < 0.0 {
                return index as u32;
            }
        }
        ranks.at(count - 1) as u32
    }

    fn penalize(&self, logits: &mut [f32], prompt: &[u32], chosen: &[u32]) {
        let [frequency, presence] = [self.frequency_penalty, self.presence_penalty];
        if frequency != 0.0 || presence != 0.0 {
            let mut chosen = chosen.to_vec();
            chosen.sort_unstable();
            for same in chosen.chunk_by(|a, b| a == b) {
                if let Some(logit) = logits.get_mut(same[0] as usize) {
                    *logit -= frequency.mul_add(same.len() as f32, presence);
                }
            }
        }
        if (self.repetition_penalty - 1.0).abs() < f32::EPSILON {
            return;
        }
        let mut said = [prompt, chosen].concat();
        said.sort_unstable();
        said.dedup();
        for token in said {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = if *logit > 0.0 {
                    *logit / self.repetition_penalty
                } else {
                    *logit * self.repetition_penalty
                };
            }
        }
    }
}

/// How likely a token was: natural logarithms of the model's own probabilities, before penalties, temperature and cuts.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, in order.
    pub top: Vec<(u32, f32)>,
}

impl Logprobs {
    /// Of `token`, and the `count` likeliest, from logits that nothing was done to.
    pub(super) fn of(logits: &[f32], token: u32, count: usize) -> Self {
        let count = count.min(logits.len());
        let mut ranks = Ranks::new(logits);
        let top = logits.get(ranks.at(0)).copied().unwrap_or_default();
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
        let of = |index: usize| (f64::from(logits[index] - top) - sum.ln()) as f32;
        let ranked = (0..count).map(|rank| ranks.at(rank)).collect::<Vec<_>>();
        Self {
            chosen: of(token as usize),
            top: ranked.into_iter().map(|index| (index as u32, of(index))).collect(),
        }
    }
}

/// The higher logit first, of equal ones the first.
fn before(logits: &[f32], a: usize, b: usize) -> std::cmp::Ordering {
    logits[b].total_cmp(&logits[a]).then(a.cmp(&b))
}

/// Tokens by their logits, sorted as far as they are asked for.
struct Ranks<'a> {
    logits: &'a [f32],
    order: Vec<usize>,
    sorted: usize,
}

impl<'a> Ranks<'a> {
    fn new(logits: &'a [f32]) -> Self {
        Self { logits, order: (0..logits.len()).collect(), sorted: 0 }
    }

    fn at(&mut self, rank: usize) -> usize {
        while rank >= self.sorted {
            let more = self.sorted.max(FIRST_SORTED).min(self.order.len() - self.sorted);
            let (logits, rest) = (self.logits, &mut self.order[self.sorted..]);
            if more < rest.len() {
                rest.select_nth_unstable_by(more, |a, b| before(logits, *a, *b));
            }
            rest[..more].sort_unstable_by(|a, b| before(logits, *a, *b));
            self.sorted += more;
        }
        self.order[rank]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(sampler: Sampler, logits: &[f32], text: &[u32], rng: &mut impl Rng) -> u32 {
        sampler.choose(&mut logits.to_vec(), (text, &[]), rng)
    }

    /// The tokens that are ever drawn.
    fn drawn(sampler: Sampler, logits: &[f32]) -> Vec<u32> {
        let mut rng = sampler.draws(0);
        let mut all: Vec<u32> = (0..4000).map(|_| choose(sampler, logits, &[], &mut rng)).collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let greedy = Sampler::default();
        assert_eq!(choose(greedy, &[0.0, 2.0, 2.0, -1.0], &[], &mut greedy.draws(0)), 1);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let fair = Sampler { temperature: 1.0, ..Sampler::default() };
        let mut rng = fair.draws(0);
        let hits = (0..4000).filter(|_| choose(fair, &[0.0, 0.0], &[], &mut rng) == 0).count();
        assert!((1800..2200).contains(&hits), "{hits}");
        // e² is 7.39, of which temperature 2 leaves e.
        let warm = Sampler { temperature: 2.0, ..fair };
        let hits = (0..4000).filter(|_| choose(warm, &[0.0, 2.0], &[], &mut rng) == 1).count();
        assert!((2800..3050).contains(&hits), "{hits} of 2924");
    }

    #[test]
    fn cuts_keep_what_they_say() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [0.0, 2f32.ln(), 0.0, 4f32.ln()];
        let warm = Sampler { temperature: 1.0, ..Sampler::default() };
        assert_eq!(drawn(warm, &logits), [0, 1, 2, 3]);
        assert_eq!(drawn(Sampler { top_k: 2, ..warm }, &logits), [1, 3]);
        assert_eq!(drawn(Sampler { top_p: 0.5, ..warm }, &logits), [3]);
        assert_eq!(drawn(Sampler { top_p: 0.51, ..warm }, &logits), [1, 3]);
        assert_eq!(drawn(Sampler { top_p: 1e-6, ..warm }, &logits), [3]);
        assert_eq!(drawn(Sampler { min_p: 0.4, ..warm }, &logits), [1, 3]);
        assert_eq!(drawn(Sampler { min_p: 1.0, ..warm }, &logits), [3]);
        // Of the two that top-k leaves, the first has two thirds.
        assert_eq!(drawn(Sampler { top_k: 2, top_p: 0.6, ..warm }, &logits), [3]);
    }

    #[test]
    fn logprobs_are_logarithms_of_probabilities() {
        // Probabilities 0.25, 0.5, 0.125, 0.125.
        let logits = [7.0 + 2f32.ln(), 7.0 + 4f32.ln(), 7.0, 7.0];
        let found = Logprobs::of(&logits, 3, 2);
        assert!((found.chosen - 0.125f32.ln()).abs() < 1e-6, "{found:?}");
        let top: Vec<u32> = found.top.iter().map(|(token, _)| *token).collect();
        assert_eq!(top, [1, 0]);
        assert!((found.top[1].1 - 0.25f32.ln()).abs() < 1e-6, "{found:?}");
        assert_eq!(Logprobs::of(&logits, 0, 9).top.len(), 4);
    }

    #[test]
    fn a_penalty_turns_to_what_was_not_said() {
        let shy = Sampler { repetition_penalty: 1.5, ..Sampler::default() };
        let mut rng = shy.draws(0);
        assert_eq!(choose(shy, &[2.0, 1.5, -1.0], &[0, 0, 7], &mut rng), 1);
        assert_eq!(choose(shy, &[-1.0, -1.4], &[0], &mut rng), 1);
    }

    #[test]
    fn penalties_count_what_was_chosen_and_not_the_prompt() {
        let penalized = |sampler: Sampler| {
            let mut logits = [1.0, 1.0, 1.0];
            sampler.penalize(&mut logits, &[2, 2], &[0, 1, 0, 9]);
            logits.to_vec()
        };
        let none = Sampler::default();
        assert_eq!(penalized(Sampler { frequency_penalty: 0.5, ..none }), [0.0, 0.5, 1.0]);
        assert_eq!(penalized(Sampler { presence_penalty: 0.5, ..none }), [0.5, 0.5, 1.0]);
        let both = Sampler { frequency_penalty: -0.5, presence_penalty: 0.25, ..none };
        assert_eq!(penalized(both), [1.75, 1.25, 1.0]);
    }

    #[test]
    fn the_order_is_that_of_a_whole_sort() {
        let logits: Vec<f32> = (0..3000u32).map(|i| (i * 7919 % 1013) as f32).collect();
        let mut whole: Vec<usize> = (0..logits.len()).collect();
        whole.sort_by(|a, b| before(&logits, *a, *b));
        let mut ranks = Ranks::new(&logits);
        assert_eq!(ranks.at(700), whole[700]);
        assert!((0..logits.len()).all(|rank| ranks.at(rank) == whole[rank]));
    }

    #[test]
    fn streams_are_rows_of_draws_of_their_own() {
        let warm = Sampler { temperature: 1.0, ..Sampler::default() };
        let row = |stream| {
            let mut rng = warm.draws(stream);
            (0..20).map(|_| choose(warm, &[0.0; 50], &[], &mut rng)).collect::<Vec<_>>()
        };
        assert_eq!(row(3), row(3));
        assert_ne!(row(3), row(4));
    }
}
