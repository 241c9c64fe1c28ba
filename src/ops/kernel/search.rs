//! The grid of each group with the smallest error, among candidates: one pass over the groups, each
//! of which stays in the cache while all its candidates are tried.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSlice;

use super::fake_quant::code_of;
use super::min_tasks;
use crate::ops::search::{Candidate, Extent};
use crate::ops::vector::{self, Level, Power, at};
use crate::ops::{Rule, TieRule};

/// Weights after which a candidate that is worse already is given up. Errors only grow, so the
/// winner is the same.
const BLOCK: usize = 16 * vector::LANES;

/// What is minimized: `Σ |w - ŵ|^power` over a group on the grid of `rule`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Search<'a> {
    /// `[groups, group_len]`.
    pub weight: &'a [f32],
    /// `group_len`.
    pub len: usize,
    /// From weights to codes.
    pub rule: Rule,
    /// The norm's.
    pub power: f32,
}

impl Search<'_> {
    /// Steps and zero points of the best candidates, `[groups]` each; the first one wins a tie.
    /// `candidates` appends those of a group of some extent.
    pub(crate) fn best(
        &self,
        candidates: impl Fn(Extent, &mut Vec<Candidate>) + Sync,
    ) -> (Vec<f32>, Vec<f32>) {
        self.best_at(Level::best(), candidates)
    }

    fn best_at(
        &self,
        level: Level,
        candidates: impl Fn(Extent, &mut Vec<Candidate>) + Sync,
    ) -> (Vec<f32>, Vec<f32>) {
        let group = |buffer: &mut Vec<Candidate>, group: &[f32]| {
            buffer.clear();
            candidates(at!(level, extent(group)), buffer);
            let best = at!(level, self.best_of(group, buffer));
            (best.step, best.zero_point)
        };
        self.weight
            .par_chunks(self.len.max(1))
            .with_min_len(min_tasks(self.weight.len()))
            .map_init(Vec::new, group)
            .unzip()
    }

    #[inline(always)]
    fn best_of(&self, group: &[f32], candidates: &[Candidate]) -> Candidate {
        // The rule is matched once for a group, not for every weight.
        macro_rules! of {
            ($rule:expr) => {{
                let rule = $rule;
                if self.power.total_cmp(&2.0).is_eq() {
                    lowest(
                        group,
                        candidates,
                        #[inline(always)]
                        |w, step, scale, z| {
                            let error = w - scale * (code_of(rule, w / step, z) - z);
                            error * error
                        },
                        rule,
                    )
                } else {
                    let power = Power::new(self.power);
                    lowest(
                        group,
                        candidates,
                        #[inline(always)]
                        |w, step, scale, z| {
                            power.of((w - scale * (code_of(rule, w / step, z) - z)).abs())
                        },
                        rule,
                    )
                }
            }};
        }
        match self.rule {
            Rule::Affine { max_code } => of!(Rule::Affine { max_code }),
            Rule::Lsq { middle } => of!(Rule::Lsq { middle }),
            Rule::Seq { margin, ties: TieRule::HalfEven } => {
                of!(Rule::Seq { margin, ties: TieRule::HalfEven })
            }
            Rule::Seq { margin, ties: TieRule::HalfUp } => {
                of!(Rule::Seq { margin, ties: TieRule::HalfUp })
            }
            Rule::Ternary { margin } => of!(Rule::Ternary { margin }),
            Rule::Sign => of!(Rule::Sign),
        }
    }
}

/// The candidate with the smallest sum of `term` over a group; the first one wins a tie, and stays
/// where its error is no number.
#[inline(always)]
fn lowest(
    group: &[f32],
    candidates: &[Candidate],
    term: impl Fn(f32, f32, f32, f32) -> f32,
    rule: Rule,
) -> Candidate {
    let mut best = Candidate { step: f32::NAN, zero_point: f32::NAN };
    let mut least = f64::INFINITY;
    for (index, candidate) in candidates.iter().enumerate() {
        let (step, z) = (candidate.step, candidate.zero_point);
        let scale = rule.scale(step);
        let mut error = 0.0;
        for block in group.chunks(BLOCK) {
            error += vector::sum_pairs(
                block,
                block,
                #[inline(always)]
                |w, _| term(w, step, scale, z),
            );
            if error >= least {
                break;
            }
        }
        if index == 0 || error < least {
            (best, least) = (*candidate, error);
        }
    }
    best
}

/// The smallest and the largest weight; NaN if one is.
#[inline(always)]
fn extent(group: &[f32]) -> Extent {
    let (mut low, mut high) = ([f32::INFINITY; vector::LANES], [f32::NEG_INFINITY; vector::LANES]);
    let mut damaged = false;
    for chunk in group.chunks(vector::LANES) {
        for ((low, high), w) in low.iter_mut().zip(&mut high).zip(chunk) {
            *low = if *w < *low { *w } else { *low };
            *high = if *w > *high { *w } else { *high };
            damaged |= w.is_nan();
        }
    }
    if damaged {
        return Extent { low: f32::NAN, high: f32::NAN };
    }
    Extent {
        low: low.into_iter().fold(f32::INFINITY, f32::min),
        high: high.into_iter().fold(f32::NEG_INFINITY, f32::max),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: [(Rule, f32); 5] = [
        (Rule::Affine { max_code: 3.0 }, 1.0),
        (Rule::Affine { max_code: 15.0 }, 8.0),
        (Rule::Seq { margin: 0.01, ties: TieRule::HalfEven }, 1.5),
        (Rule::Seq { margin: 0.01, ties: TieRule::HalfUp }, 1.5),
        (Rule::Ternary { margin: 0.01 }, 1.0),
    ];

    fn weights(len: usize) -> Vec<f32> {
        let wave = |i: usize| ((i as f32 + 0.3) * 12.9898).sin().powi(3) * 0.1;
        (0..len).map(|i| if i % 11 == 0 { 0.0 } else { wave(i) }).collect()
    }

    fn fractions(zero_point: f32) -> impl Fn(Extent, &mut Vec<Candidate>) + Copy {
        move |extent, out| {
            let reach = extent.reach().max(1e-8); // a group of zeros
            out.extend((1..=40).map(|i| Candidate { step: reach * (i as f32 / 40.0), zero_point }));
        }
    }

    /// The error as the definition has it, in f64.
    fn error(group: &[f32], rule: Rule, power: f32, step: f32, z: f32) -> f64 {
        let value = |w: f32| rule.scale(step) * (code_of(rule, w / step, z) - z);
        let each = |w: &f32| f64::from((*w - value(*w)).abs()).powf(f64::from(power));
        group.iter().map(each).sum()
    }

    #[test]
    fn the_winner_has_the_least_error() {
        for ((rule, z), power) in RULES.iter().flat_map(|r| [2.0, 2.4, 1.0, 4.0].map(|p| (*r, p))) {
            for len in [1, 7, 16, 33, 100, 576, 1500] {
                let weight = weights(6 * len);
                let search = Search { weight: &weight, len, rule, power };
                let (steps, zeros) = search.best(fractions(z));
                for ((group, step), zero) in weight.chunks(len).zip(&steps).zip(&zeros) {
                    let mut all = Vec::new();
                    fractions(z)(extent(group), &mut all);
                    let of = |c: &Candidate| error(group, rule, power, c.step, c.zero_point);
                    let least = all.iter().map(of).fold(f64::INFINITY, f64::min);
                    let found = error(group, rule, power, *step, *zero);
                    assert!(found <= least * (1.0 + 1e-6), "{found} for {least}, {rule:?} {power}");
                }
            }
        }
    }

    #[test]
    fn the_first_of_equals_wins_and_damage_shows() {
        let search = |weight: &[f32]| {
            let rule = Rule::Affine { max_code: 3.0 };
            Search { weight, len: 4, rule, power: 2.4 }.best(|extent, out| {
                out.extend(
                    [4.0, 1.0, 2.0]
                        .map(|by| Candidate { step: extent.reach() / by, zero_point: 0.0 }),
                );
            })
        };
        // All three hold 0 and 4 exactly.
        assert_eq!(search(&[0.0, 4.0, 4.0, 0.0]).0, [4.0]);
        assert!(search(&[0.0, f32::NAN, 4.0, 0.0]).0[0].is_nan());
        assert!(search(&[]).0.is_empty());
    }

    #[test]
    fn every_instruction_set_and_number_of_threads_gives_the_same_bits() {
        for ((rule, z), power) in RULES.iter().flat_map(|r| [2.0, 2.4].map(|p| (*r, p))) {
            for (groups, len) in [(5, 1), (7, 33), (3, 300), (400, 128)] {
                let weight = weights(groups * len);
                let search = Search { weight: &weight, len, rule, power };
                let at = |level| {
                    let (steps, zeros) = search.best_at(level, fractions(z));
                    steps.iter().chain(&zeros).map(|x| x.to_bits()).collect::<Vec<_>>()
                };
                let portable = at(Level::Portable);
                for level in Level::available() {
                    assert_eq!(at(level), portable, "{level:?}");
                }
                for threads in [1, 2, 3] {
                    let pool =
                        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                    assert_eq!(pool.install(|| at(Level::best())), portable, "{threads} threads");
                }
            }
        }
    }
}
