//! Rotary, causal, grouped-query attention on the projections' own layout, with its gradients.
//!
//! Nothing of the size `seq²` is kept: the backward computes the scores again, a tile of queries
//! at a time. The query heads that share a key head are rows of one operand, so that they use its
//! keys and values together.

mod few;
mod forest;
#[cfg(test)]
mod reference;
mod rows;
mod unit;

use rayon::prelude::*;

pub(crate) use self::few::{Held, few_attention, rotated};
pub(crate) use self::forest::forest_attention;
pub(crate) use self::rows::Tables;
use self::unit::{GradientScratch, Problem, Results, Scratch};
use crate::ops::vector::LANES;

/// Rows of a tile of scores, where the query heads of a key head allow it.
const TILE_ROWS: usize = 64;

/// Sizes of one attention.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Sequences.
    pub batch: usize,
    /// Positions of a sequence.
    pub seq: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads, a divisor of the query heads.
    pub kv_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// Whether neighbours are rotated against each other, not one half against the other.
    pub neighbours: bool,
    /// Keys that a query sees, its own among them.
    pub window: usize,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Scores become `c tanh(score / c)`.
    pub cap: Option<f32>,
}

/// `softmax(scale · rotated q · rotated k) v`, causal. Returns the log-sum-exp of each row of scores,
/// for the backward.
///
/// # Shapes
/// - q, out: `[batch, seq, heads * head_dim]`; k, v: `[batch, seq, kv_heads * head_dim]`
/// - result: `[batch, heads, seq]`
pub(crate) fn attention(
    shape: &Shape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: Tables<'_>,
    out: &mut [f32],
) -> Vec<f32> {
    debug_assert_eq!(out.len(), q.len());
    let problem = Problem::new(shape, [q, k, v], tables);
    let mut log_sum_exp = vec![0.0; shape.batch * shape.heads * shape.seq];
    split(shape, out, shape.stack() * shape.head_dim)
        .into_par_iter()
        .zip(log_sum_exp.par_chunks_mut((shape.stack() * shape.seq).max(1)))
        .enumerate()
        .with_min_len(shape.min_units())
        .for_each_init(
            || Scratch::new(shape),
            |scratch, (unit, (mut out, log_sum_exp))| {
                problem.forward(unit, scratch, &mut out, log_sum_exp);
            },
        );
    log_sum_exp
}

/// The gradients of q, k and v, overwritten, from the forward's operands and results.
///
/// # Shapes
/// - those of [`attention`]; d_out, dq: as q; dk, dv: as k
#[allow(clippy::too_many_arguments)] // operands, results and gradients of one operation
pub(crate) fn attention_backward(
    shape: &Shape,
    d_out: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    tables: Tables<'_>,
    out: &[f32],
    log_sum_exp: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    debug_assert!([d_out.len(), out.len(), dq.len()] == [q.len(); 3]);
    debug_assert!([dk.len(), dv.len()] == [k.len(); 2]);
    let problem = Problem::new(shape, [q, k, v], tables);
    let width = shape.head_dim;
    split(shape, dq, shape.stack() * width)
        .into_par_iter()
        .zip(split(shape, dk, width).into_par_iter().zip(split(shape, dv, width)))
        .zip(log_sum_exp.par_chunks((shape.stack() * shape.seq).max(1)))
        .enumerate()
        .with_min_len(shape.min_units())
        .for_each_init(
            || (Scratch::new(shape), GradientScratch::new(shape)),
            |(scratch, gradients), (unit, ((mut dq, (mut dk, mut dv)), log_sum_exp))| {
                gradients.dk.fill(0.0);
                gradients.dv.fill(0.0);
                let results = Results { d_out, out, log_sum_exp };
                problem.backward(unit, scratch, gradients, &results, &mut dq);
                problem.rotate_back(unit, 0, &gradients.dk, &mut dk);
                for (out, sum) in dv.iter_mut().zip(gradients.dv.chunks_exact(width)) {
                    out.copy_from_slice(sum);
                }
            },
        );
}

impl Shape {
    /// Query heads that share a key head.
    fn stack(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Queries of a tile.
    fn tile(&self) -> usize {
        (TILE_ROWS / self.stack()).clamp(LANES, 4 * LANES).min(self.seq)
    }

    /// Positions in whole vectors: keys and values are padded with zeros up to here.
    fn padded(&self) -> usize {
        self.seq.next_multiple_of(LANES)
    }

    /// The least number of units worth a second thread: none where the whole work is small.
    fn min_units(&self) -> usize {
        let products = self.batch * self.heads * self.seq * self.seq * self.head_dim;
        if products < 1 << 19 { usize::MAX } else { 1 }
    }
}

/// The rows of each unit, which is one key head of one sequence: `seq` slices of `width`.
fn split<'a>(shape: &Shape, x: &'a mut [f32], width: usize) -> Vec<Vec<&'a mut [f32]>> {
    let Shape { batch, seq, kv_heads, .. } = *shape;
    let mut units: Vec<_> = (0..batch * kv_heads).map(|_| Vec::with_capacity(seq)).collect();
    for (i, piece) in x.chunks_exact_mut(width).enumerate() {
        units[i / (seq * kv_heads) * kv_heads + i % kv_heads].push(piece);
    }
    units
}

#[cfg(test)]
mod tests {
    use super::reference::Case;

    const SHAPES: [[usize; 5]; 6] = [
        [1, 1, 1, 1, 2],
        [1, 5, 2, 1, 4],
        [2, 17, 4, 2, 6],
        [1, 130, 8, 4, 16],
        [2, 70, 3, 3, 8],
        [1, 300, 20, 2, 32],
    ];

    #[test]
    fn values_and_gradients_are_those_of_the_definition() {
        for case in SHAPES.into_iter().flat_map(Case::ways) {
            let shape = case.shape;
            let names = ["out", "sums", "dq", "dk", "dv"];
            for ((found, exact), name) in case.run().iter().zip(case.reference()).zip(names) {
                // One key has no score to learn: its gradients are rounding alone.
                let size = exact.iter().fold(0.1f64, |a, b| a.max(b.abs()));
                for (found, exact) in found.iter().zip(exact) {
                    let error = (f64::from(*found) - exact).abs();
                    assert!(error <= 2e-6 * size, "{name} {found} for {exact} at {shape:?}");
                }
            }
        }
    }

    #[test]
    fn the_reference_has_the_slope_of_its_value() {
        for (way, case) in Case::ways(SHAPES[1]).iter().enumerate() {
            has_the_slope_of_its_value(case, way);
        }
    }

    fn has_the_slope_of_its_value(case: &Case, way: usize) {
        let [_, _, dq, dk, dv] = case.reference();
        let loss = |case: &Case| -> f64 {
            case.reference()[0].iter().zip(&case.d_out).map(|(o, d)| o * f64::from(*d)).sum()
        };
        let operands: [fn(&mut Case) -> &mut Vec<f32>; 3] =
            [|case| &mut case.q, |case| &mut case.k, |case| &mut case.v];
        for (operand, gradient) in operands.into_iter().zip([dq, dk, dv]) {
            for (i, slope) in gradient.iter().enumerate() {
                let moved = |by: f32| {
                    let mut case = Case::ways(SHAPES[1]).swap_remove(way);
                    operand(&mut case)[i] += by;
                    (f64::from(operand(&mut case)[i]), loss(&case))
                };
                let ((low, below), (high, above)) = (moved(-1e-3), moved(1e-3));
                assert!(((above - below) / (high - low) - slope).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn extreme_scores_stay_finite() {
        for size in [30.0, 1e4] {
            for shape in SHAPES {
                let found = Case::new(shape, size).run();
                assert!(found.iter().flatten().all(|x| x.is_finite()), "{size} at {shape:?}");
            }
        }
    }

    #[test]
    fn later_positions_change_nothing() {
        let case = Case::new(SHAPES[3], 1.0);
        let mut changed = Case::new(SHAPES[3], 1.0);
        changed.k[99 * 64..].fill(3.0);
        changed.v[99 * 64..].fill(1e30);
        let [out, changed] = [case.run(), changed.run()].map(|found| found[0].clone());
        assert_eq!(out[..99 * 128], changed[..99 * 128]);
        assert_ne!(out[99 * 128..], changed[99 * 128..]);
    }

    #[test]
    fn every_number_of_threads_gives_the_same_bits() {
        for shape in [[3, 40, 4, 2, 16], [1, 130, 8, 4, 16]] {
            let case = Case::new(shape, 2.0);
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| case.run().concat().iter().map(|x| x.to_bits()).collect::<Vec<_>>())
            };
            assert_eq!(on(1), on(2));
            assert_eq!(on(1), on(5));
        }
    }

    #[test]
    fn nothing_is_nothing() {
        for shape in [[0, 4, 2, 1, 4], [2, 0, 2, 1, 4]] {
            assert!(Case::new(shape, 1.0).run().iter().all(Vec::is_empty));
        }
    }
}
