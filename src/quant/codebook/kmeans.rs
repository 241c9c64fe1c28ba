//! The start: scales that normalize each group, and codebooks by residual k-means on the normalized
//! vectors, one codebook after the other, each on what the ones before leave.

use rayon::prelude::*;

use super::search::nearest;
use super::state::{Problem, State};
use crate::quant::SCALE_FLOOR;

/// Vectors for each centroid that k-means looks at; all of them get a code in the end.
const SAMPLE: usize = 64;
/// Rounds of Lloyd's algorithm.
const ROUNDS: usize = 12;
/// Vectors whose codes a task finds.
const TASK: usize = 1 << 11;

/// Scales, codebooks and codes of the normalized weight, by squared error alone.
pub(super) fn start(problem: &Problem<'_>, seed: u64) -> State {
    let length = |group: &[f32]| {
        let squares: f64 = group.iter().map(|w| f64::from(*w).powi(2)).sum();
        ((squares / group.len() as f64).sqrt() as f32).max(SCALE_FLOOR)
    };
    let scale: Vec<f32> = problem.weight.par_chunks_exact(problem.group).map(length).collect();
    let groups = problem.weight.chunks_exact(problem.group).zip(&scale);
    let mut left: Vec<f32> =
        groups.flat_map(|(group, a)| group.iter().map(move |w| w / a)).collect();
    let (vector, count) = (problem.additive.vector, problem.additive.books);
    let mut codes = vec![0; problem.out * problem.codes()];
    let mut books = Vec::with_capacity(count * problem.centroids * vector);
    let mut draws = Draws(seed);
    for index in 0..count {
        let book = centroids(&left, vector, problem.centroids, &mut draws);
        let found = nearest(&left, &book, vector);
        for ((left, code), codes) in
            left.chunks_exact_mut(vector).zip(&found).zip(codes.chunks_exact_mut(count))
        {
            codes[index] = *code;
            for (left, value) in left.iter_mut().zip(&book[usize::from(*code) * vector..]) {
                *left -= value;
            }
        }
        books.extend(book);
    }
    State { codes, books, scale }
}

/// Centroids of `vectors`, `[count, vector]`.
fn centroids(vectors: &[f32], vector: usize, count: usize, draws: &mut Draws) -> Vec<f32> {
    let all = vectors.len() / vector;
    // Evenly spread over the matrix, each in a place of its own.
    let some = all.min(SAMPLE * count);
    let place = |i: usize, draw: f64| ((i as f64 + draw) * all as f64 / some as f64) as usize;
    let sample: Vec<f32> = (0..some)
        .flat_map(|i| {
            let at = if some == all { i } else { place(i, draws.next()).min(all - 1) };
            vectors[at * vector..][..vector].iter().copied()
        })
        .collect();
    let mut book = spread(&sample, vector, count, draws);
    for _ in 0..ROUNDS {
        let codes = nearest(&sample, &book, vector);
        let mut sums = vec![0.0f64; book.len()];
        let mut counts = vec![0u32; count];
        for (x, code) in sample.chunks_exact(vector).zip(&codes) {
            let code = usize::from(*code);
            counts[code] += 1;
            for (sum, x) in sums[code * vector..][..vector].iter_mut().zip(x) {
                *sum += f64::from(*x);
            }
        }
        let each = book.chunks_exact_mut(vector).zip(sums.chunks_exact(vector)).zip(&counts);
        for ((centroid, sums), count) in each.filter(|(_, count)| **count > 0) {
            for (value, sum) in centroid.iter_mut().zip(sums) {
                *value = (sum / f64::from(*count)) as f32;
            }
        }
    }
    book
}

/// Vectors far from each other: each drawn by its squared distance to those before it (k-means++).
fn spread(sample: &[f32], vector: usize, count: usize, draws: &mut Draws) -> Vec<f32> {
    let all = sample.len() / vector;
    let mut book: Vec<f32> = Vec::with_capacity(count * vector);
    let mut distances = vec![f32::INFINITY; all];
    let mut next = (draws.next() * all as f64) as usize;
    for _ in 0..count {
        let centroid = &sample[next.min(all - 1) * vector..][..vector];
        book.extend(centroid);
        distances.par_iter_mut().with_min_len(TASK).zip(sample.par_chunks_exact(vector)).for_each(
            |(distance, x)| {
                let new: f32 = x.iter().zip(centroid).map(|(x, c)| (x - c) * (x - c)).sum();
                *distance = distance.min(new);
            },
        );
        let total: f64 = distances.iter().map(|d| f64::from(*d)).sum();
        let mut rest = draws.next() * total;
        // Where all vectors are centroids already, any will do.
        next = distances
            .iter()
            .position(|distance| {
                rest -= f64::from(*distance);
                rest < 0.0
            })
            .unwrap_or((draws.next() * all as f64) as usize);
    }
    book
}

/// Numbers in 0..1 (SplitMix64).
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}
