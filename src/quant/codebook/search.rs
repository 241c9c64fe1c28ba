//! The search for codes: one code of a row at a time, the others fixed, with the best few of the rows so
//! far kept (beam search; with one kept, iterated conditional modes).
//!
//! With `e` what is left of a row and `g = H e`, putting centroid `k` in the place of the present one, `d = a
//! (C_k - C)`, changes the squared output error by `dᵀ H_cc d - 2 dᵀ g_c`: of every centroid, a sum over the
//! vector's few inputs. Only a code that changes moves `g`.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::prelude::*;

use super::LONGEST;
use super::state::{Problem, State};
use crate::ops::vectorized;

/// Vectors whose codes a task finds.
const TASK: usize = 1 << 11;
/// Rows that take turns at a run of inputs, so that its part of the Hessian is read once.
const ROWS: usize = 8;
/// The most beams.
pub const MOST: usize = 16;

/// The centroid nearest to each vector, the first at a tie.
///
/// # Shapes
/// - vectors: `[count, vector]`
/// - book: `[centroids, vector]`
pub(super) fn nearest(vectors: &[f32], book: &[f32], vector: usize) -> Vec<u8> {
    let columns = transposed(book, vector);
    let half: Vec<f32> =
        book.chunks_exact(vector).map(|c| c.iter().map(|c| c * c).sum::<f32>() * 0.5).collect();
    let mut codes = vec![0; vectors.len() / vector];
    let tasks = codes.par_chunks_mut(TASK).zip(vectors.par_chunks(TASK * vector));
    tasks.for_each(|(codes, vectors)| {
        let mut scores = vec![0.0; half.len()];
        vectorized(
            #[inline(always)]
            || {
                for (code, x) in codes.iter_mut().zip(vectors.chunks_exact(vector)) {
                    scores.copy_from_slice(&half);
                    subtract(&mut scores, &columns, x);
                    *code = least(&scores).0 as u8;
                }
            },
        );
    });
    codes
}

/// A codebook as `[vector, centroids]`.
fn transposed(book: &[f32], vector: usize) -> Vec<f32> {
    let count = book.len() / vector;
    (0..book.len()).map(|at| book[at % count * vector + at / count]).collect()
}

/// Takes `Σ_t x_t columns[t]` off the scores.
#[inline(always)]
fn subtract(scores: &mut [f32], columns: &[f32], x: &[f32]) {
    for (column, x) in columns.chunks_exact(scores.len()).zip(x) {
        for (score, value) in scores.iter_mut().zip(column) {
            *score -= x * value;
        }
    }
}

/// The least score and its place, the first at a tie.
#[inline(always)]
fn least(scores: &[f32]) -> (usize, f32) {
    const LANES: usize = 16;
    let mut lanes = [f32::INFINITY; LANES];
    let mut chunks = scores.chunks_exact(LANES);
    for chunk in &mut chunks {
        for (lane, score) in lanes.iter_mut().zip(chunk) {
            *lane = if *score < *lane { *score } else { *lane };
        }
    }
    let lower = |least: f32, score: &f32| if *score < least { *score } else { least };
    let least = chunks.remainder().iter().fold(lanes.iter().fold(f32::INFINITY, lower), lower);
    (scores.iter().position(|score| score.to_bits() == least.to_bits()).unwrap_or(0), least)
}

/// A row on its way.
#[derive(Clone)]
struct Beam {
    codes: Vec<u8>,
    /// `H e`, `[inputs]`.
    gradient: Vec<f32>,
    loss: f64,
}

/// A code that a beam may get.
#[derive(Clone, Copy)]
struct Choice {
    loss: f64,
    beam: usize,
    code: u8,
}

/// What all rows share.
struct Shared<'a> {
    problem: &'a Problem<'a>,
    state: &'a State,
    /// `[books, vector, centroids]`.
    columns: Vec<f32>,
    /// `C_kᵀ H_cc C_k`, `[inputs / vector, books, centroids]`.
    lengths: Vec<f32>,
    beams: usize,
}

/// Codes of no greater error, after one look at each; `gradient` and `losses` are those of the present ones.
pub(super) fn improve(
    problem: &Problem<'_>,
    state: &State,
    gradient: &[f32],
    losses: &[f64],
    beams: usize,
) -> Vec<u8> {
    let (vector, each) = (problem.additive.vector, problem.centroids * problem.additive.vector);
    let shared = Shared {
        problem,
        state,
        columns: state.books.chunks_exact(each).flat_map(|book| transposed(book, vector)).collect(),
        lengths: lengths(problem, &state.books),
        beams,
    };
    let (inputs, codes) = (problem.inputs, problem.codes());
    let mut found = vec![0; state.codes.len()];
    let blocks = found.par_chunks_mut(ROWS * codes).enumerate();
    blocks.for_each(|(block, found)| {
        let rows: Vec<usize> = (block * ROWS..).take(found.len() / codes).collect();
        let mut kept: Vec<Vec<Beam>> = rows
            .iter()
            .map(|row| {
                let codes = state.codes[row * codes..][..codes].to_vec();
                let gradient = gradient[row * inputs..][..inputs].to_vec();
                vec![Beam { codes, gradient, loss: losses[*row] }]
            })
            .collect();
        let mut scores = vec![0.0; problem.centroids];
        vectorized(
            #[inline(always)]
            || {
                for place in 0..codes {
                    for (row, beams) in rows.iter().zip(&mut kept) {
                        shared.step(*row, place, beams, &mut scores);
                    }
                }
            },
        );
        for (beams, found) in kept.iter().zip(found.chunks_exact_mut(codes)) {
            let best = beams.iter().min_by(|a, b| a.loss.total_cmp(&b.loss));
            found.copy_from_slice(best.map_or(&[][..], |beam| &beam.codes));
        }
    });
    found
}

/// `C_kᵀ H_cc C_k` of every centroid at every run of inputs.
fn lengths(problem: &Problem<'_>, books: &[f32]) -> Vec<f32> {
    let (vector, size) = (problem.additive.vector, problem.inputs);
    let each = books.len() / vector;
    let mut lengths = vec![0.0; size / vector * each];
    lengths.par_chunks_exact_mut(each).enumerate().for_each(|(chunk, lengths)| {
        for (length, centroid) in lengths.iter_mut().zip(books.chunks_exact(vector)) {
            for (t, value) in centroid.iter().enumerate() {
                let row = &problem.hessian[(chunk * vector + t) * size + chunk * vector..];
                *length += value * row.iter().zip(centroid).map(|(h, c)| h * c).sum::<f32>();
            }
        }
    });
    lengths
}

impl Shared<'_> {
    /// One code of a row.
    #[inline(always)]
    fn step(&self, row: usize, place: usize, beams: &mut Vec<Beam>, scores: &mut [f32]) {
        let Problem { additive, inputs, group, centroids, ref hessian, .. } = *self.problem;
        let vector = additive.vector;
        let (chunk, book) = (place / additive.books, place % additive.books);
        let start = chunk * vector;
        let scale = self.state.scale[(row * inputs + start) / group];
        let books = &self.state.books[book * centroids * vector..][..centroids * vector];
        let columns = &self.columns[book * centroids * vector..][..centroids * vector];
        let lengths = &self.lengths[place * centroids..][..centroids];
        let mut choices: [Choice; MOST] = [Choice { loss: f64::INFINITY, beam: 0, code: 0 }; MOST];
        let mut count = 0;
        let mut toward = [0.0f32; LONGEST];
        let toward = &mut toward[..vector];
        for (index, beam) in beams.iter().enumerate() {
            let now = beam.codes[place];
            let centroid = &books[usize::from(now) * vector..][..vector];
            for (t, toward) in toward.iter_mut().enumerate() {
                let row = &hessian[(start + t) * inputs + start..][..vector];
                let own: f32 = row.iter().zip(centroid).map(|(h, c)| h * c).sum();
                *toward = 2.0 * scale * (beam.gradient[start + t] + scale * own);
            }
            let square = scale * scale;
            for (score, length) in scores.iter_mut().zip(lengths) {
                *score = square * length;
            }
            subtract(scores, columns, toward);
            let present = scores[usize::from(now)];
            for _ in 0..self.beams {
                let (code, score) = least(scores);
                if score.is_nan() || score == f32::INFINITY {
                    break;
                }
                scores[code] = f32::INFINITY;
                let loss = beam.loss + f64::from(score - present);
                let choice = Choice { loss, beam: index, code: code as u8 };
                if count == self.beams && choice.loss >= choices[count - 1].loss {
                    break;
                }
                if choices[..count].iter().any(|other| same(beams, place, *other, choice)) {
                    continue;
                }
                count = (count + 1).min(self.beams);
                choices[count - 1] = choice;
                let mut at = count - 1;
                while at > 0 && choices[at].loss < choices[at - 1].loss {
                    choices.swap(at, at - 1);
                    at -= 1;
                }
            }
        }
        let choices = &choices[..count];
        if let ([choice], [beam]) = (choices, &mut beams[..]) {
            self.take(beam, place, *choice, scale, books);
            return;
        }
        let taken = choices.iter().map(|choice| {
            let mut beam = beams[choice.beam].clone();
            self.take(&mut beam, place, *choice, scale, books);
            beam
        });
        *beams = taken.collect();
    }

    /// Puts a code in its place.
    #[inline(always)]
    fn take(&self, beam: &mut Beam, place: usize, choice: Choice, scale: f32, books: &[f32]) {
        let Problem { additive, inputs, ref hessian, .. } = *self.problem;
        let (vector, now) = (additive.vector, beam.codes[place]);
        beam.loss = choice.loss;
        if now == choice.code {
            return;
        }
        beam.codes[place] = choice.code;
        let [old, new] = [now, choice.code].map(|code| &books[usize::from(code) * vector..]);
        let start = place / additive.books * vector;
        for t in 0..vector {
            let change = scale * (new[t] - old[t]);
            let row = &hessian[(start + t) * inputs..][..inputs];
            for (g, h) in beam.gradient.iter_mut().zip(row) {
                *g -= change * h;
            }
        }
    }
}

/// Whether two choices make the same row.
#[inline(always)]
fn same(beams: &[Beam], place: usize, a: Choice, b: Choice) -> bool {
    if a.beam == b.beam || a.code != b.code {
        return false;
    }
    let (a, b) = (&beams[a.beam].codes, &beams[b.beam].codes);
    a[..place] == b[..place] && a[place + 1..] == b[place + 1..]
}
