//! The work of one thread on a unit, which is one key head of one sequence, tile by tile.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};

use super::Shape;
use super::rows::{
    Sight, Tables, Tile, dot, rotate_neighbours, rotate_row, share_out, softmax_backward_tile,
    softmax_tile,
};
use crate::ops::vector::{LANES, Level, at};

/// What one thread works in.
pub(super) struct Scratch {
    /// Rotated, `[tile, stack, head_dim]`.
    q: Vec<f32>,
    /// Rotated, `[padded, head_dim]`.
    k: Vec<f32>,
    /// `[padded, head_dim]`.
    v: Vec<f32>,
    /// `[tile, stack, keys]`, then probabilities.
    scores: Vec<f32>,
    /// Of the output, or of q's gradient, `[tile, stack, head_dim]`.
    mixed: Vec<f32>,
    /// Of each row the maximum, then the log-sum-exp.
    maxima: Vec<f32>,
    /// Of each row the sum of exponentials; in the backward, what its slopes are shifted by.
    totals: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(shape: &Shape) -> Self {
        let rows = shape.tile() * shape.stack();
        let [tile, keys] = [rows, shape.padded()].map(|n| vec![0.0; n * shape.head_dim]);
        Self {
            q: tile.clone(),
            k: keys.clone(),
            v: keys,
            scores: vec![0.0; rows * shape.padded()],
            mixed: tile,
            maxima: vec![0.0; rows],
            totals: vec![0.0; rows],
        }
    }
}

/// What the backward works in besides.
pub(super) struct GradientScratch {
    /// `[tile, stack, head_dim]`.
    d_out: Vec<f32>,
    /// `[tile, stack, keys]`.
    d_scores: Vec<f32>,
    /// Of the cap at each score, where there is one.
    slopes: Vec<f32>,
    /// Before the inverse rotation, `[padded, head_dim]`.
    pub(super) dk: Vec<f32>,
    /// `[padded, head_dim]`.
    pub(super) dv: Vec<f32>,
}

impl GradientScratch {
    pub(super) fn new(shape: &Shape) -> Self {
        let rows = shape.tile() * shape.stack();
        Self {
            d_out: vec![0.0; rows * shape.head_dim],
            d_scores: vec![0.0; rows * shape.padded()],
            slopes: vec![0.0; if shape.cap.is_some() { rows * shape.padded() } else { 0 }],
            dk: vec![0.0; shape.padded() * shape.head_dim],
            dv: vec![0.0; shape.padded() * shape.head_dim],
        }
    }
}

/// What the backward is given of the forward's results: all of the outputs, a unit's sums.
pub(super) struct Results<'a> {
    pub(super) d_out: &'a [f32],
    pub(super) out: &'a [f32],
    pub(super) log_sum_exp: &'a [f32],
}

/// The operands.
pub(super) struct Problem<'a> {
    shape: &'a Shape,
    pub(super) level: Level,
    /// Pairs of rotated features.
    half: usize,
    pub(super) q: &'a [f32],
    pub(super) k: &'a [f32],
    v: &'a [f32],
    tables: Tables<'a>,
    /// Of the angles between one sequence and the next; 0 where they share them.
    angles: usize,
}

impl<'a> Problem<'a> {
    pub(super) fn new(shape: &'a Shape, [q, k, v]: [&'a [f32]; 3], tables: Tables<'a>) -> Self {
        let Shape { batch, seq, heads, kv_heads, head_dim, .. } = *shape;
        debug_assert!(heads.is_multiple_of(kv_heads) && head_dim.is_multiple_of(2));
        debug_assert_eq!(q.len(), batch * seq * heads * head_dim);
        debug_assert!([k.len(), v.len()] == [batch * seq * kv_heads * head_dim; 2]);
        let sequences = if tables.each { batch } else { 1 };
        let half = tables.cos.len().checked_div(seq * sequences).unwrap_or(0);
        debug_assert!(tables.cos.len() == tables.sin.len() && 2 * half <= head_dim);
        debug_assert!(tables.starts.is_none_or(|starts| starts.len() == batch * seq));
        let angles = if tables.each { seq * half } else { 0 };
        Self { shape, level: Level::best(), half, q, k, v, tables, angles }
    }

    pub(super) fn forward(
        &self,
        unit: usize,
        scratch: &mut Scratch,
        out: &mut [&mut [f32]],
        log_sum_exp: &mut [f32],
    ) {
        let Shape { seq, head_dim, .. } = *self.shape;
        let stack = self.shape.stack();
        self.load_keys(unit, scratch);
        let sight = self.sight(unit);
        for tile in self.tiles(sight) {
            self.score(unit, &tile, scratch);
            let Scratch { scores, maxima, totals, mixed, v, .. } = &mut *scratch;
            at!(self.level, softmax_tile(&tile, stack, sight, scores, maxima, totals));
            for (row, sum) in maxima[..tile.rows].iter().enumerate() {
                log_sum_exp[row % stack * seq + tile.start + row / stack] = *sum;
            }
            let weights = matrix(scores, tile.rows, tile.keys);
            let values = matrix(&v[tile.first * head_dim..], tile.keys, head_dim);
            product(mixed, Accum::Replace, weights, values, 1.0);
            at!(self.level, share_out(mixed, totals, head_dim, &mut out[tile.start..tile.end]));
        }
    }

    /// Writes q's gradient and adds to those of the rotated keys and the values.
    pub(super) fn backward(
        &self,
        unit: usize,
        scratch: &mut Scratch,
        gradients: &mut GradientScratch,
        results: &Results<'_>,
        dq: &mut [&mut [f32]],
    ) {
        let Shape { seq, head_dim, .. } = *self.shape;
        let stack = self.shape.stack();
        let GradientScratch { d_out, d_scores, slopes, dk, dv } = gradients;
        self.load_keys(unit, scratch);
        let sight = self.sight(unit);
        for tile in self.tiles(sight) {
            let Tile { start, rows, first, keys, .. } = tile;
            self.load_d_out(unit, &tile, results, d_out, &mut scratch.totals);
            self.score(unit, &tile, scratch);
            let Scratch { q, k, v, scores, mixed, maxima, totals } = &mut *scratch;
            let outer = matrix(d_out, rows, head_dim);
            let skipped = first * head_dim;
            let values = matrix(&v[skipped..], keys, head_dim).transpose();
            product(d_scores, Accum::Replace, outer, values, 1.0);
            if let Some(cap) = self.shape.cap {
                cap_slopes(&scores[..rows * keys], cap, slopes);
            }
            for (row, sum) in maxima[..rows].iter_mut().enumerate() {
                *sum = results.log_sum_exp[row % stack * seq + start + row / stack];
            }
            at!(
                self.level,
                softmax_backward_tile(&tile, stack, sight, scores, d_scores, maxima, totals)
            );
            if self.shape.cap.is_some() {
                d_scores.iter_mut().zip(slopes.iter()).for_each(|(d, slope)| *d *= slope);
            }
            let (weights, slopes) = (matrix(scores, rows, keys), matrix(d_scores, rows, keys));
            product(&mut dv[skipped..], Accum::Add, weights.transpose(), outer, 1.0);
            let (queries, scale) = (matrix(q, rows, head_dim), self.shape.scale);
            product(&mut dk[skipped..], Accum::Add, slopes.transpose(), queries, scale);
            product(mixed, Accum::Replace, slopes, matrix(&k[skipped..], keys, head_dim), scale);
            self.rotate_back(unit, start, mixed, &mut dq[start..tile.end]);
        }
    }

    /// Whom a unit's queries see.
    fn sight(&self, unit: usize) -> Sight<'a> {
        let Shape { seq, kv_heads, window, .. } = *self.shape;
        let starts = self.tables.starts.map(|starts| &starts[unit / kv_heads * seq..][..seq]);
        Sight { window, starts }
    }

    fn tiles(&self, sight: Sight<'a>) -> impl Iterator<Item = Tile> {
        let (seq, tile, stack) = (self.shape.seq, self.shape.tile(), self.shape.stack());
        (0..seq).step_by(tile.max(1)).map(move |start| {
            let end = (start + tile).min(seq);
            let first = sight.first(start) / LANES * LANES;
            let keys = end.next_multiple_of(LANES) - first;
            Tile { start, end, rows: (end - start) * stack, first, keys }
        })
    }

    /// A unit's columns of one position.
    pub(super) fn piece<'x>(
        &self,
        x: &'x [f32],
        unit: usize,
        position: usize,
        width: usize,
    ) -> &'x [f32] {
        let Shape { seq, kv_heads, .. } = *self.shape;
        let row = unit / kv_heads * seq + position;
        &x[(row * kv_heads + unit % kv_heads) * width..][..width]
    }

    /// A unit's rotated keys and its values.
    pub(super) fn load_keys(&self, unit: usize, scratch: &mut Scratch) {
        let Shape { seq, head_dim, .. } = *self.shape;
        self.rotate(self.k, unit, 0..seq, head_dim, &mut scratch.k);
        for (position, packed) in scratch.v.chunks_exact_mut(head_dim).enumerate().take(seq) {
            packed.copy_from_slice(self.piece(self.v, unit, position, head_dim));
        }
    }

    /// The tile's rotated queries and its scores.
    pub(super) fn score(&self, unit: usize, tile: &Tile, scratch: &mut Scratch) {
        let width = self.shape.head_dim;
        let positions = tile.start..tile.end;
        self.rotate(self.q, unit, positions, self.shape.stack() * width, &mut scratch.q);
        let queries = matrix(&scratch.q, tile.rows, width);
        let keys = matrix(&scratch.k[tile.first * width..], tile.keys, width);
        let scale = self.shape.scale;
        product(&mut scratch.scores, Accum::Replace, queries, keys.transpose(), scale);
        if let Some(cap) = self.shape.cap {
            for score in &mut scratch.scores[..tile.rows * tile.keys] {
                *score = cap * (*score / cap).tanh();
            }
        }
    }

    /// The output's gradient, and of each row its product with the output: what the softmax's
    /// gradient subtracts.
    pub(super) fn load_d_out(
        &self,
        unit: usize,
        tile: &Tile,
        results: &Results<'_>,
        d_out: &mut [f32],
        shifts: &mut [f32],
    ) {
        let (stack, head_dim) = (self.shape.stack(), self.shape.head_dim);
        let width = stack * head_dim;
        at!(self.level, {
            let packed = d_out.chunks_exact_mut(width).zip(shifts.chunks_exact_mut(stack));
            for (position, (packed, shifts)) in (tile.start..tile.end).zip(packed) {
                packed.copy_from_slice(self.piece(results.d_out, unit, position, width));
                let out = self.piece(results.out, unit, position, width);
                let heads = packed.chunks_exact(head_dim).zip(out.chunks_exact(head_dim));
                for (shift, (d_out, out)) in shifts.iter_mut().zip(heads) {
                    *shift = dot(d_out, out);
                }
            }
        });
    }

    /// Rotates a unit's columns of some positions into `packed`.
    pub(super) fn rotate(
        &self,
        x: &[f32],
        unit: usize,
        positions: std::ops::Range<usize>,
        width: usize,
        packed: &mut [f32],
    ) {
        let sequence = unit / self.shape.kv_heads;
        at!(self.level, {
            for (position, packed) in positions.zip(packed.chunks_exact_mut(width)) {
                let x = self.piece(x, unit, position, width);
                self.turn(x, [sequence, position], 1.0, packed);
            }
        });
    }

    /// The inverse rotation of packed rows, from position `start` on, into a unit's columns.
    pub(super) fn rotate_back(
        &self,
        unit: usize,
        start: usize,
        packed: &[f32],
        out: &mut [&mut [f32]],
    ) {
        let sequence = unit / self.shape.kv_heads;
        at!(self.level, {
            let mut rest = packed;
            for (position, out) in (start..).zip(out) {
                let (row, after) = rest.split_at(out.len());
                self.turn(row, [sequence, position], -1.0, out);
                rest = after;
            }
        });
    }

    /// Rotates the heads of one position, side by side; the features behind the rotated ones pass.
    #[allow(clippy::inline_always)] // it must be compiled for the caller's instruction set
    #[inline(always)]
    pub(super) fn turn(
        &self,
        x: &[f32],
        [sequence, position]: [usize; 2],
        turn: f32,
        out: &mut [f32],
    ) {
        let (half, head_dim) = (self.half, self.shape.head_dim);
        let Tables { cos, sin, .. } = self.tables;
        let at = sequence * self.angles + position * half;
        let angles = [cos, sin].map(|table| &table[at..][..half]);
        if 2 * half == head_dim && !self.shape.neighbours {
            return rotate_row(x, angles, turn, out);
        }
        for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
            let ((x, passing), (out, passed)) = (x.split_at(2 * half), out.split_at_mut(2 * half));
            if self.shape.neighbours {
                rotate_neighbours(x, angles, turn, out);
            } else {
                rotate_row(x, angles, turn, out);
            }
            passed.copy_from_slice(passing);
        }
    }
}

/// `1 - (score / cap)²`: the slope of the cap at a capped score.
fn cap_slopes(scores: &[f32], cap: f32, slopes: &mut [f32]) {
    for (slope, score) in slopes.iter_mut().zip(scores) {
        *slope = 1.0 - (score / cap) * (score / cap);
    }
}

/// The first `rows * columns` values as a matrix.
fn matrix(x: &[f32], rows: usize, columns: usize) -> MatRef<'_, f32> {
    MatRef::from_row_major_slice(&x[..rows * columns], rows, columns)
}

/// `out (+)= factor * left * right`, on this thread.
fn product(
    out: &mut [f32],
    accumulate: Accum,
    left: MatRef<'_, f32>,
    right: MatRef<'_, f32>,
    factor: f32,
) {
    let (rows, columns) = (left.nrows(), right.ncols());
    let out = MatMut::from_row_major_slice_mut(&mut out[..rows * columns], rows, columns);
    matmul(out, accumulate, left, right, factor, Par::Seq);
}
