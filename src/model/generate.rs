//! Text generation with a key and value cache: a smoke test with real text.

use burn::tensor::{DType, Device, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{CausalLm, KvCache, ModelConfig, Positions};
use crate::error::{Error, Result};

/// How the next token is chosen.
#[derive(Clone, Copy, Debug)]
pub struct Sampler {
    /// 0 is greedy; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

/// Continues `prompt` by at most `max_new` tokens; calls `each` with every new token. Stops at an
/// end token, when the context is full, or when `each` returns `false`.
///
/// `prompt` must not be empty.
///
/// # Errors
/// As [`finite`].
pub fn generate(
    model: &CausalLm,
    config: &ModelConfig,
    device: &Device,
    prompt: &[u32],
    max_new: usize,
    sampler: Sampler,
    mut each: impl FnMut(u32) -> bool,
) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(sampler.seed);
    let mut caches = vec![KvCache::default(); model.blocks.len()];
    let mut past = 0;
    let mut all: Vec<u32> = prompt.to_vec();
    let mut next: Vec<u32> = prompt.to_vec();
    for _ in 0..max_new {
        if past + next.len() > config.max_positions {
            break;
        }
        if config.rotates_anew(past, past + next.len()) {
            // Keys in the cache were rotated for a shorter text.
            caches.fill(KvCache::default());
            (past, next) = (0, all.clone());
        }
        let positions = Positions::new(config, past, next.len(), model.dtype(), device);
        past += next.len();
        let logits = step(model, &next, &positions, &mut caches, device);
        finite(&logits)?;
        let token = sampler.choose(&logits, &mut rng);
        if config.eos.contains(&token) || !each(token) {
            break;
        }
        all.push(token);
        next = vec![token];
    }
    Ok(())
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

/// Logits after the last of `tokens`.
fn step(
    model: &CausalLm,
    tokens: &[u32],
    positions: &Positions,
    caches: &mut [KvCache],
    device: &Device,
) -> Vec<f32> {
    let mut hidden = model.embed(CausalLm::tokens(&[tokens], device), positions);
    for (index, (block, cache)) in model.blocks.iter().zip(caches).enumerate() {
        let tap = |site, x| model.tap.apply(index, site, x);
        hidden = block.forward_tapped(hidden, positions, Some(cache), &tap);
    }
    let [_, seq, d_model] = hidden.dims();
    let last: Tensor<2> = hidden.narrow(1, seq - 1, 1).reshape([1, d_model]);
    let logits = model.logits(model.finish(last));
    logits.cast(DType::F32).into_data().iter::<f32>().collect()
}

impl Sampler {
    fn choose(&self, logits: &[f32], rng: &mut impl Rng) -> u32 {
        let by_logit = |a: &usize, b: &usize| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b));
        let mut order: Vec<usize> = (0..logits.len()).collect();
        if self.temperature <= 0.0 {
            return order.into_iter().min_by(by_logit).unwrap_or(0) as u32;
        }
        order.sort_unstable_by(by_logit);
        let top = logits[order[0]];
        let weights: Vec<f64> =
            order.iter().map(|i| f64::from((logits[*i] - top) / self.temperature).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut kept = 0.0;
        let mut count = 0;
        while count < weights.len() && (count == 0 || kept < f64::from(self.top_p) * total) {
            kept += weights[count];
            count += 1;
        }
        let mut draw = rng.random::<f64>() * kept;
        for (index, weight) in order[..count].iter().zip(&weights) {
            draw -= weight;
            if draw < 0.0 {
                return *index as u32;
            }
        }
        order[count - 1] as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greedy_takes_the_first_of_the_highest() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let greedy = Sampler { temperature: 0.0, top_p: 1.0, seed: 0 };
        assert_eq!(greedy.choose(&[0.0, 2.0, 2.0, -1.0], &mut rng), 1);
    }

    #[test]
    fn a_small_top_p_is_greedy_and_draws_follow_the_probabilities() {
        let mut rng = ChaCha8Rng::seed_from_u64(0);
        let narrow = Sampler { temperature: 1.0, top_p: 1e-6, seed: 0 };
        assert!((0..50).all(|_| narrow.choose(&[0.0, 2.0, 1.0], &mut rng) == 1));
        let fair = Sampler { temperature: 1.0, top_p: 1.0, seed: 0 };
        let hits = (0..4000).filter(|_| fair.choose(&[0.0, 0.0], &mut rng) == 0).count();
        assert!((1800..2200).contains(&hits), "{hits}");
    }
}
