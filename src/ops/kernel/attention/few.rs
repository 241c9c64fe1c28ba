//! Attention of few queries over keys and values that are held, both rotated.
//!
//! Keys are taken in pieces of one length, which threads share among them, and what the pieces of a query come to
//! is put together in their order: the number of threads changes no bit.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::prelude::*;

use super::Shape;
use super::rows::{Sight, Tables, dot, rotate_neighbours, rotate_row};
use crate::ops::vector::{self, Level, at};

/// Keys of a piece.
const PIECE: usize = 256;
/// Products of queries with keys, feature by feature, below which waking other threads costs more than they save.
const SERIAL: usize = 1 << 16;

/// Keys or values of one key head of one sequence, `[past + seq, head_dim]`, by sequence and head.
pub(crate) type Held<'a> = dyn Fn(usize, usize) -> &'a [f32] + Sync + 'a;

/// What the queries of a key head find in a piece.
#[derive(Clone, Debug)]
struct Found {
    /// The largest score of each row; negative infinity where it sees none of the keys.
    largest: Vec<f32>,
    /// Its sum of `exp(score - largest)`.
    totals: Vec<f32>,
    /// The values times those, `[rows, head_dim]`.
    mixed: Vec<f32>,
}

/// `softmax(scale · q · k) v` of the last `shape.seq` of `past + shape.seq` positions.
///
/// # Shapes
/// - q: `[batch, heads, seq, head_dim]`
/// - result: `[batch, seq, heads * head_dim]`
pub(crate) fn few_attention(
    shape: &Shape,
    past: usize,
    q: &[f32],
    [keys, values]: [&Held<'_>; 2],
    starts: Option<&[u32]>,
) -> Vec<f32> {
    attention_at(Level::best(), shape, past, q, [keys, values], starts)
}

fn attention_at(
    level: Level,
    shape: &Shape,
    past: usize,
    q: &[f32],
    [keys, values]: [&Held<'_>; 2],
    starts: Option<&[u32]>,
) -> Vec<f32> {
    let Shape { batch, seq, heads, kv_heads, head_dim, .. } = *shape;
    let (total, rows) = (past + seq, shape.stack() * seq);
    let pieces = total.div_ceil(PIECE);
    let piece = |index: usize| {
        let (head, first) = (index / pieces, index % pieces * PIECE);
        let (sequence, end) = (head / kv_heads, total.min(first + PIECE));
        let starts = starts.map(|starts| &starts[sequence * seq..][..seq]);
        let sight = Sight { window: shape.window, starts };
        let q = &q[head * rows * head_dim..][..rows * head_dim];
        let [keys, values] = [keys, values]
            .map(|held| &held(sequence, head % kv_heads)[first * head_dim..end * head_dim]);
        at!(
            level,
            found(shape, q, [keys, values], |row| {
                // What of these keys the query of a row sees.
                let own = past + row % seq;
                let seen = sight.first_of(row % seq, own).max(first)..(own + 1).min(end);
                seen.start.min(end) - first..seen.end.max(first) - first
            })
        )
    };
    let count = batch * kv_heads * pieces;
    let found: Vec<Found> = if batch * heads * seq * total * head_dim < SERIAL {
        (0..count).map(piece).collect()
    } else {
        (0..count).into_par_iter().map(piece).collect()
    };
    let mut out = vec![0.0; q.len()];
    for (head, pieces) in found.chunks(pieces.max(1)).enumerate() {
        for row in 0..rows {
            let (sequence, position) = (head / kv_heads, row % seq);
            let query_head = head % kv_heads * shape.stack() + row / seq;
            let at = ((sequence * seq + position) * heads + query_head) * head_dim;
            together(pieces, row, &mut out[at..][..head_dim]);
        }
    }
    out
}

/// The rows of a key head over the keys of a piece, each over the part of them that `seen` names.
#[inline(always)]
fn found(
    shape: &Shape,
    q: &[f32],
    [keys, values]: [&[f32]; 2],
    seen: impl Fn(usize) -> std::ops::Range<usize>,
) -> Found {
    let width = shape.head_dim;
    let rows = q.len() / width.max(1);
    let (mut largest, mut totals) = (vec![f32::NEG_INFINITY; rows], vec![0.0; rows]);
    let mut mixed = vec![0.0; q.len()];
    let mut weights = [0.0; PIECE];
    for (row, (q, mixed)) in q.chunks_exact(width).zip(mixed.chunks_exact_mut(width)).enumerate() {
        let seen = seen(row);
        if seen.is_empty() {
            continue;
        }
        let weights = &mut weights[..seen.len()];
        let [keys, values] = [keys, values].map(|held| &held[seen.start * width..seen.end * width]);
        for (weight, key) in weights.iter_mut().zip(keys.chunks_exact(width)) {
            *weight = dot(q, key) * shape.scale;
        }
        if let Some(cap) = shape.cap {
            for weight in weights.iter_mut() {
                *weight = cap * (*weight / cap).tanh();
            }
        }
        let max = vector::max(weights);
        for weight in weights.iter_mut() {
            *weight = vector::exp(*weight - max);
        }
        for (weight, value) in weights.iter().zip(values.chunks_exact(width)) {
            add(mixed, *weight, value);
        }
        (largest[row], totals[row]) = (max, vector::sum(weights) as f32);
    }
    Found { largest, totals, mixed }
}

/// `sum += weight * value`.
#[inline(always)]
fn add(sum: &mut [f32], weight: f32, value: &[f32]) {
    for (sum, value) in sum.iter_mut().zip(value) {
        *sum += weight * value;
    }
}

/// What a row found in all pieces.
fn together(pieces: &[Found], row: usize, out: &mut [f32]) {
    let width = out.len();
    let largest = pieces.iter().fold(f32::NEG_INFINITY, |max, found| max.max(found.largest[row]));
    let mut total = 0.0;
    for found in pieces.iter().filter(|found| found.totals[row] != 0.0) {
        let factor = vector::exp(found.largest[row] - largest);
        total += factor * found.totals[row];
        add(out, factor, &found.mixed[row * width..][..width]);
    }
    for out in out {
        *out /= total;
    }
}

/// Turns heads by the angles of their positions.
///
/// # Shapes
/// - x, result: `[batch, heads, seq, head_dim]`
pub(crate) fn rotated(
    x: &[f32],
    [batch, heads, seq, head_dim]: [usize; 4],
    tables: Tables<'_>,
    neighbours: bool,
) -> Vec<f32> {
    let level = Level::best();
    let sequences = if tables.each { batch } else { 1 };
    let half = tables.cos.len().checked_div(seq * sequences).unwrap_or(0);
    let mut out = x.to_vec();
    let rows = x.chunks_exact(head_dim.max(1)).zip(out.chunks_exact_mut(head_dim.max(1)));
    for (row, (x, out)) in rows.enumerate() {
        let sequence = if tables.each { row / (heads * seq) } else { 0 };
        let first = (sequence * seq + row % seq) * half;
        let angles = [tables.cos, tables.sin].map(|table| &table[first..][..half]);
        let (x, out) = (&x[..2 * half], &mut out[..2 * half]);
        if neighbours {
            at!(level, rotate_neighbours(x, angles, 1.0, out));
        } else {
            at!(level, rotate_row(x, angles, 1.0, out));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::super::sample::noise;
    use super::*;

    struct Case {
        shape: Shape,
        past: usize,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        starts: Option<Vec<u32>>,
    }

    impl Case {
        fn new([batch, seq, past, heads, kv_heads, head_dim]: [usize; 6]) -> Self {
            let shape = Shape {
                batch,
                seq,
                heads,
                kv_heads,
                head_dim,
                neighbours: false,
                window: usize::MAX,
                scale: (head_dim as f32).powf(-0.5),
                cap: None,
            };
            let held = batch * kv_heads * (past + seq) * head_dim;
            Self {
                shape,
                past,
                q: noise(batch * heads * seq * head_dim, 0.1, 2.0),
                k: noise(held, 0.4, 2.0),
                v: noise(held, 0.6, 1.0),
                starts: None,
            }
        }

        fn run(&self, level: Level) -> Vec<f32> {
            let Shape { kv_heads, head_dim, seq, .. } = self.shape;
            let len = (self.past + seq) * head_dim;
            let keys =
                |sequence: usize, head: usize| &self.k[(sequence * kv_heads + head) * len..][..len];
            let values =
                |sequence: usize, head: usize| &self.v[(sequence * kv_heads + head) * len..][..len];
            let starts = self.starts.as_deref();
            attention_at(level, &self.shape, self.past, &self.q, [&keys, &values], starts)
        }

        /// By the definition, one query at a time.
        fn exact(&self) -> Vec<f64> {
            let Shape { batch, seq, heads, kv_heads, head_dim, window, .. } = self.shape;
            let total = self.past + seq;
            let mut out = Vec::new();
            for (sequence, position, head) in (0..batch)
                .flat_map(|b| (0..seq).flat_map(move |s| (0..heads).map(move |h| (b, s, h))))
            {
                let of = |x: &[f32], row: usize, i: usize| f64::from(x[row * head_dim + i]);
                let query = (sequence * heads + head) * seq + position;
                let key = |j: usize| (sequence * kv_heads + head / (heads / kv_heads)) * total + j;
                let own = self.past + position;
                let start = self.starts.as_ref().map_or(0, |all| all[sequence * seq + position]);
                let first = (start as usize).max((own + 1).saturating_sub(window));
                let score = |j: usize| {
                    let dot: f64 =
                        (0..head_dim).map(|i| of(&self.q, query, i) * of(&self.k, key(j), i)).sum();
                    let score = dot * f64::from(self.shape.scale);
                    let score = self
                        .shape
                        .cap
                        .map_or(score, |cap| f64::from(cap) * (score / f64::from(cap)).tanh());
                    score.exp()
                };
                let weights: Vec<f64> = (first..=own).map(score).collect();
                let sum: f64 = weights.iter().sum();
                out.extend((0..head_dim).map(|i| {
                    let terms = weights.iter().zip(first..);
                    terms.map(|(weight, j)| weight * of(&self.v, key(j), i)).sum::<f64>() / sum
                }));
            }
            out
        }
    }

    fn cases() -> Vec<Case> {
        let sizes = [
            [1, 1, 0, 1, 1, 2],
            [1, 1, 1, 2, 1, 6],
            [2, 1, 255, 4, 2, 16],
            [1, 1, 256, 3, 1, 64],
            [2, 3, 700, 6, 2, 32],
            [1, 4, 40, 3, 3, 8],
        ];
        let mut cases: Vec<Case> = sizes.map(Case::new).into();
        for size in sizes {
            let [batch, seq, past, ..] = size;
            let mut case = Case::new(size);
            case.shape.window = past / 2 + 1;
            case.shape.cap = Some(1.5);
            cases.push(case);
            let mut case = Case::new(size);
            // A window that begins behind the first piece, and padding that ends anywhere.
            case.shape.window = 300;
            case.starts = Some((0..batch * seq).map(|i| (i / seq * past / 2) as u32).collect());
            cases.push(case);
        }
        cases
    }

    #[test]
    fn attention_is_that_of_the_definition_at_every_level() {
        for case in cases() {
            let found = case.run(Level::Portable);
            for (found, exact) in found.iter().zip(case.exact()) {
                let error = (f64::from(*found) - exact).abs();
                assert!(error < 2e-6, "{found} for {exact} at {:?}, {}", case.shape, case.past);
            }
            for level in Level::available() {
                let other = case.run(level);
                let same = other.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{level:?} at {:?}, {}", case.shape, case.past);
            }
        }
    }

    #[test]
    fn every_number_of_threads_gives_the_same_bits() {
        for case in cases() {
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                let found = pool.install(|| case.run(Level::best()));
                found.iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            assert_eq!(on(1), on(3));
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let mut case = Case::new([1, 1, 20, 2, 1, 8]);
        case.k[3] = f32::NAN;
        assert!(case.run(Level::best()).iter().all(|x| x.is_nan()));
    }
}
