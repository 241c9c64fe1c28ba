//! A distribution over many tokens as its likeliest ones and what is left.

use burn::tensor::{Device, Tensor, TensorData};
use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

/// What a rest of nothing weighs, in nats: finite, and no probability in f32.
const NOTHING: f64 = -1e4;

/// The likeliest tokens of rows of logits, each row's in ascending order of their ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Likely {
    /// How many of each row.
    pub k: usize,
    /// Their ids, `[rows * k]`.
    pub ids: Vec<u32>,
    /// Logarithms of their probabilities, `[rows * k]`.
    pub log_p: Vec<f32>,
    /// The logarithm of the probability of all others together, `[rows]`.
    pub log_rest: Vec<f32>,
}

/// The `k` likeliest tokens of each row at a temperature; of a tie the first ones. Sums in f64.
///
/// # Shapes
/// - logits: `[rows, vocab]`, off the tape
pub fn likeliest(logits: Tensor<2>, k: usize, temperature: f64) -> Likely {
    let [_, vocab] = logits.dims();
    let k = k.min(vocab);
    let logits: Vec<f32> = logits.into_data().iter::<f32>().collect();
    let rows: Vec<_> =
        logits.par_chunks(vocab.max(1)).map(|row| likeliest_of(row, k, temperature)).collect();
    let mut likely = Likely { k, ..Likely::default() };
    for (kept, rest) in rows {
        likely.ids.extend(kept.iter().map(|(id, _)| *id));
        likely.log_p.extend(kept.iter().map(|(_, log_p)| *log_p));
        likely.log_rest.push(rest);
    }
    likely
}

fn likeliest_of(row: &[f32], k: usize, temperature: f64) -> (Vec<(u32, f32)>, f32) {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let logit = |id: &u32| row[*id as usize];
    if k < ids.len() {
        ids.select_nth_unstable_by(k, |a, b| logit(b).total_cmp(&logit(a)).then(a.cmp(b)));
    }
    let (kept, others) = ids.split_at_mut(k);
    kept.sort_unstable();
    others.sort_unstable(); // a sum in one order
    let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let tempered = |id: &u32| (f64::from(logit(id)) - f64::from(most)) / temperature;
    let sum = |ids: &[u32]| ids.iter().map(|id| tempered(id).exp()).sum::<f64>();
    let (of_kept, of_others) = (sum(kept), sum(others));
    let all = (of_kept + of_others).ln();
    let log_p = kept.iter().map(|id| (*id, (tempered(id) - all) as f32)).collect();
    (log_p, (of_others.ln() - all).max(NOTHING) as f32)
}

impl Likely {
    /// Rows of it.
    pub fn rows(&self) -> usize {
        self.log_rest.len()
    }

    /// Adds the rows of another, of as many tokens each.
    pub fn extend(&mut self, other: &Self) {
        self.k = other.k;
        self.ids.extend_from_slice(&other.ids);
        self.log_p.extend_from_slice(&other.log_p);
        self.log_rest.extend_from_slice(&other.log_rest);
    }

    /// Logits of these rows at a temperature, for a comparison that keeps at most `k` of each row: the tokens
    /// that are kept have their probabilities, and all others share what is left evenly. That is less than
    /// any of the kept has, so a comparison keeps the same tokens, and its tail has the same mass.
    ///
    /// # Shapes
    /// - result: `[rows, vocab]`
    pub fn logits(
        &self,
        rows: std::ops::Range<usize>,
        vocab: usize,
        temperature: f64,
        device: &Device,
    ) -> Tensor<2> {
        let (k, count) = (self.k, rows.len());
        let mut logits = vec![0.0f32; count * vocab];
        let kept = rows.start * k..rows.end * k;
        let (ids, log_p) = (&self.ids[kept.clone()], &self.log_p[kept]);
        let others = (vocab.saturating_sub(k).max(1) as f64).ln();
        let of = logits.par_chunks_mut(vocab.max(1)).zip(&self.log_rest[rows]);
        let of = of.zip(ids.par_chunks(k.max(1))).zip(log_p.par_chunks(k.max(1)));
        of.for_each(|(((row, rest), ids), log_p)| {
            row.fill(((f64::from(*rest) - others) * temperature) as f32);
            for (id, log_p) in ids.iter().zip(log_p) {
                row[*id as usize] = (f64::from(*log_p) * temperature) as f32;
            }
        });
        Tensor::from_data(TensorData::new(logits, [count, vocab]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{Comparison, Divergence, divergence};

    fn noise(rows: usize, vocab: usize, seed: f32) -> Tensor<2> {
        let value = |i: usize| ((i as f32 + seed) * 12.9898).sin() * 43_758.547 % 6.0;
        let values: Vec<f32> = (0..rows * vocab).map(value).collect();
        Tensor::from_data(TensorData::new(values, [rows, vocab]), &Device::flex())
    }

    /// Loss and gradient over what is kept and a tail are those with the whole teacher, whatever is asked.
    #[test]
    fn what_is_kept_gives_the_same_loss_over_kept_tokens_and_tail() {
        let (rows, vocab, temperature) = (5, 300, 1.7);
        let [teacher, student] = [3.0, 8.0].map(|seed| noise(rows, vocab, seed));
        let device = teacher.device();
        let weights = Tensor::<2>::ones([rows, 1], &device) / rows as f64;
        let kept = likeliest(teacher.clone(), 40, temperature);
        let mass: f64 = (kept.log_p[..40].iter().chain([&kept.log_rest[0]]))
            .map(|log| f64::from(*log).exp())
            .sum();
        assert!((mass - 1.0).abs() < 1e-6, "{mass}");
        let again = kept.logits(0..rows, vocab, temperature, &device);
        for divergence_kind in [
            Divergence::KlForward,
            Divergence::KlReverse,
            Divergence::Jsd { beta: 0.5 },
            Divergence::Cakld { gamma: 0.3 },
            Divergence::Adaptive { near: 0.1, far: 0.5 },
        ] {
            for (k, tail) in [(40, true), (7, true), (40, false)] {
                if !tail
                    && matches!(divergence_kind, Divergence::KlReverse | Divergence::Cakld { .. })
                {
                    continue;
                }
                let comparison =
                    Comparison { divergence: divergence_kind, temperature, top_k: Some(k), tail };
                let of = |teacher: &Tensor<2>| {
                    let loss =
                        divergence(&comparison, student.clone(), teacher.clone(), weights.clone());
                    let gradient: Vec<f32> = loss.gradient.into_data().iter::<f32>().collect();
                    (loss.value.into_scalar::<f32>(), gradient)
                };
                let ((whole, of_whole), (kept, of_kept)) = (of(&teacher), of(&again));
                assert!(
                    (whole - kept).abs() < 2e-6 * whole.abs().max(1.0),
                    "{comparison:?}: {whole} {kept}"
                );
                for (a, b) in of_whole.iter().zip(&of_kept) {
                    assert!((a - b).abs() < 2e-6, "{comparison:?}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn a_small_vocabulary_is_kept_whole_and_a_tie_takes_the_first() {
        let row = Tensor::<2>::from_data([[1.0, 2.0, 2.0, 2.0]], &Device::flex());
        assert_eq!(likeliest(row.clone(), 2, 1.0).ids, [1, 2]);
        let all = likeliest(row, 9, 1.0);
        assert_eq!((all.k, &all.ids[..], all.log_rest[0]), (4, &[0, 1, 2, 3][..], NOTHING as f32));
    }
}
