//! Attention over sequences that share their beginnings: forward alone.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::Shape;
use super::rows::{Sight, Tables, Tile, share_out, softmax_tile};
use super::unit::Problem;
use crate::ops::forest::{Branch, Forest};
use crate::ops::vector::{LANES, at};

/// As [`super::attention`] of one sequence, each token behind those that the forest has before it. The rows of
/// the tables are the tokens'.
pub(crate) fn forest_attention(
    shape: &Shape,
    forest: &Forest,
    [q, k, v]: [&[f32]; 3],
    tables: Tables<'_>,
    out: &mut [f32],
) {
    debug_assert!(shape.batch == 1 && shape.seq == forest.len && out.len() == q.len());
    let problem = Problem::new(shape, [q, k, v], tables);
    let keys = rotated_keys(&problem, shape);
    let width = shape.heads * shape.head_dim;
    let pieces = pieces(shape, forest);
    let mut rest = out;
    let mut tasks = Vec::with_capacity(pieces.len());
    for (branch, queries) in pieces {
        let (own, after) = rest.split_at_mut(queries.len() * width);
        tasks.push((branch, queries, own));
        rest = after;
    }
    tasks.into_par_iter().with_min_len(shape.min_units()).for_each_init(
        Scratch::default,
        |scratch, (branch, queries, out)| {
            let attending = Attending { problem: &problem, shape, keys: &keys, values: v };
            attending.piece(branch, queries, scratch, out);
        },
    );
}

/// The queries of each branch, a tile at a time, in the order of their tokens.
fn pieces<'a>(shape: &Shape, forest: &'a Forest) -> Vec<(&'a Branch, Range<usize>)> {
    let tile = shape.tile().max(1);
    let of = |branch: &'a Branch| {
        let Range { start, end } = branch.tokens;
        (start..end).step_by(tile).map(move |from| (branch, from..(from + tile).min(end)))
    };
    forest.branches.iter().flat_map(of).collect()
}

/// All keys, rotated, `[kv_heads, seq, head_dim]`.
fn rotated_keys(problem: &Problem<'_>, shape: &Shape) -> Vec<f32> {
    /// Tokens that a thread takes at once.
    const PART: usize = 256;
    let Shape { seq, kv_heads, head_dim, .. } = *shape;
    let mut keys = vec![0.0; kv_heads * seq * head_dim];
    let parts: Vec<_> = keys
        .chunks_exact_mut((seq * head_dim).max(1))
        .enumerate()
        .flat_map(|(head, keys)| {
            let parts = keys.chunks_mut(PART * head_dim).enumerate();
            parts.map(move |(part, keys)| (head, part * PART, keys))
        })
        .collect();
    parts.into_par_iter().with_min_len(shape.min_units()).for_each(|(head, start, keys)| {
        let positions = start..start + keys.len() / head_dim;
        problem.rotate(problem.k, head, positions, head_dim, keys);
    });
    keys
}

/// What one thread works in.
#[derive(Default)]
struct Scratch {
    /// Rotated, `[tile, stack, head_dim]`.
    q: Vec<f32>,
    /// `[tile, stack, keys]`, then probabilities.
    scores: Vec<f32>,
    /// `[tile, stack, head_dim]`.
    mixed: Vec<f32>,
    maxima: Vec<f32>,
    totals: Vec<f32>,
}

struct Attending<'a> {
    problem: &'a Problem<'a>,
    shape: &'a Shape,
    keys: &'a [f32],
    values: &'a [f32],
}

impl Attending<'_> {
    /// The output of a branch's queries, `[queries, heads * head_dim]`.
    fn piece(
        &self,
        branch: &Branch,
        queries: Range<usize>,
        scratch: &mut Scratch,
        out: &mut [f32],
    ) {
        let Shape { kv_heads, head_dim, scale, cap, window, .. } = *self.shape;
        let stack = self.shape.stack();
        let sight = Sight { window, starts: None };
        let start = branch.depth + queries.start - branch.tokens.start;
        let end = start + queries.len();
        let (rows, keys) = (queries.len() * stack, end.next_multiple_of(LANES));
        let tile = Tile { start, end, rows, first: 0, keys };
        scratch.q.resize(rows * head_dim, 0.0);
        scratch.scores.resize((rows * keys).max(scratch.scores.len()), 0.0);
        scratch.mixed.resize(rows * head_dim, 0.0);
        scratch.maxima.resize(rows, 0.0);
        scratch.totals.resize(rows, 0.0);
        let Scratch { q, scores, mixed, maxima, totals } = scratch;
        let scores = &mut scores[..rows * keys];
        let own = branch.tokens.start..queries.end;
        for head in 0..kv_heads {
            self.problem.rotate(self.problem.q, head, queries.clone(), stack * head_dim, q);
            let turned = MatRef::from_row_major_slice(q, rows, head_dim);
            let mut column = 0;
            for seen in branch.before.iter().chain([&own]) {
                let into = MatMut::from_row_major_slice_mut(scores, rows, keys);
                let into = into.subcols_mut(column, seen.len());
                let keys = self.keys_of(head, seen).transpose();
                matmul(into, Accum::Replace, turned, keys, scale, Par::Seq);
                column += seen.len();
            }
            if let Some(cap) = cap {
                for score in scores.iter_mut() {
                    *score = cap * (*score / cap).tanh();
                }
            }
            at!(self.problem.level, softmax_tile(&tile, stack, sight, scores, maxima, totals));
            let (mut column, mut accumulate) = (0, Accum::Replace);
            for seen in branch.before.iter().chain([&own]) {
                let weights = MatRef::from_row_major_slice(scores, rows, keys);
                let weights = weights.subcols(column, seen.len());
                let into = MatMut::from_row_major_slice_mut(mixed, rows, head_dim);
                matmul(into, accumulate, weights, self.values_of(head, seen), 1.0, Par::Seq);
                column += seen.len();
                accumulate = Accum::Add;
            }
            let mut out: Vec<&mut [f32]> =
                out.chunks_exact_mut(stack * head_dim).skip(head).step_by(kv_heads).collect();
            at!(self.problem.level, share_out(mixed, totals, head_dim, &mut out));
        }
    }

    /// `[tokens, head_dim]`.
    fn keys_of(&self, head: usize, tokens: &Range<usize>) -> MatRef<'_, f32> {
        let Shape { seq, head_dim, .. } = *self.shape;
        let keys = &self.keys[(head * seq + tokens.start) * head_dim..][..tokens.len() * head_dim];
        MatRef::from_row_major_slice(keys, tokens.len(), head_dim)
    }

    /// `[tokens, head_dim]`, as they lie between the other heads'.
    fn values_of(&self, head: usize, tokens: &Range<usize>) -> MatRef<'_, f32> {
        let Shape { kv_heads, head_dim, .. } = *self.shape;
        let width = kv_heads * head_dim;
        let values = &self.values[tokens.start * width..][..tokens.len() * width];
        let values = MatRef::from_row_major_slice(values, tokens.len(), width);
        values.subcols(head * head_dim, head_dim)
    }
}

#[cfg(test)]
mod tests {
    use super::super::reference::Case;
    use super::*;

    /// Sequences of a tree of 150 tokens: a trunk, and branches on it that part again.
    fn forest() -> Forest {
        let mut parents: Vec<Option<usize>> = (0..60).map(|i: usize| i.checked_sub(1)).collect();
        for (from, len) in [(59, 7), (40, 30), (65, 3), (59, 1), (90, 25), (10, 4)] {
            let start = parents.len();
            parents.push(Some(from));
            parents.extend((start..start + len - 1).map(Some));
        }
        parents.extend([None, Some(130)]);
        Forest::new(&parents)
    }

    fn tables(case: &Case) -> Tables<'_> {
        Tables { each: false, cos: &case.cos, sin: &case.sin, starts: None }
    }

    /// Every sequence by itself, from a case's rows of its tokens.
    #[test]
    fn each_sequence_is_as_by_itself() {
        let forest = forest();
        let ways = Case::ways([1, forest.len, 6, 2, 16]).into_iter();
        // A forest has no other documents than its sequences.
        for mut case in ways.filter(|case| case.starts.is_none()) {
            let half = case.cos.len() / forest.len;
            // A token is turned by its place in its sequence.
            let depths = forest.depths();
            let sources = [case.cos.clone(), case.sin.clone()];
            for (table, from) in [&mut case.cos, &mut case.sin].into_iter().zip(&sources) {
                for (token, depth) in depths.iter().enumerate() {
                    table[token * half..][..half].copy_from_slice(&from[depth * half..][..half]);
                }
            }
            let mut out = vec![0.0; case.q.len()];
            let operands = [&case.q[..], &case.k, &case.v];
            forest_attention(&case.shape, &forest, operands, tables(&case), &mut out);
            for branch in &forest.branches {
                let path: Vec<usize> = branch
                    .before
                    .iter()
                    .cloned()
                    .chain([branch.tokens.clone()])
                    .flatten()
                    .collect();
                let rows = |x: &[f32]| -> Vec<f32> {
                    let width = x.len() / forest.len;
                    path.iter().flat_map(|t| x[t * width..][..width].to_vec()).collect()
                };
                let alone = Case {
                    shape: Shape { seq: path.len(), ..case.shape },
                    q: rows(&case.q),
                    k: rows(&case.k),
                    v: rows(&case.v),
                    cos: rows(&case.cos),
                    sin: rows(&case.sin),
                    each: false,
                    starts: None,
                    d_out: rows(&case.d_out),
                };
                for (found, exact) in rows(&out).iter().zip(&alone.run()[0]) {
                    assert!((found - exact).abs() <= 2e-6, "{found} for {exact}");
                }
            }
        }
    }

    #[test]
    fn every_number_of_threads_gives_the_same_bits() {
        let forest = forest();
        let case = Case::new([1, forest.len, 6, 2, 16], 2.0);
        let on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![0.0; case.q.len()];
            let operands = [&case.q[..], &case.k, &case.v];
            let run = || forest_attention(&case.shape, &forest, operands, tables(&case), &mut out);
            pool.install(run);
            out.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(on(1), on(3));
    }
}
