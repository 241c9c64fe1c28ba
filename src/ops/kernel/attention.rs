//! Rotary, causal, grouped-query attention on the projections' own layout, with its gradients.
//!
//! Nothing of the size `seq²` is kept: the backward computes the scores again, a tile of queries
//! at a time. The query heads that share a key head are rows of one operand, so that they use its
//! keys and values together.

mod rows;

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

use self::rows::{
    dot, rotate_neighbours, rotate_row, share_out, softmax_backward_tile, softmax_tile,
};
use crate::ops::vector::{LANES, Level, at};

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
/// - cos, sin: `[seq, rotated / 2]`, of the first features of each head; result: `[batch, heads, seq]`
pub(crate) fn attention(
    shape: &Shape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    cos: &[f32],
    sin: &[f32],
    out: &mut [f32],
) -> Vec<f32> {
    debug_assert_eq!(out.len(), q.len());
    let problem = Problem::new(shape, [q, k, v], [cos, sin]);
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
    cos: &[f32],
    sin: &[f32],
    out: &[f32],
    log_sum_exp: &[f32],
    dq: &mut [f32],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    debug_assert!([d_out.len(), out.len(), dq.len()] == [q.len(); 3]);
    debug_assert!([dk.len(), dv.len()] == [k.len(); 2]);
    let problem = Problem::new(shape, [q, k, v], [cos, sin]);
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
                problem.rotate_back(0, &gradients.dk, &mut dk);
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

/// What one thread works in.
struct Scratch {
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
    fn new(shape: &Shape) -> Self {
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
struct GradientScratch {
    /// `[tile, stack, head_dim]`.
    d_out: Vec<f32>,
    /// `[tile, stack, keys]`.
    d_scores: Vec<f32>,
    /// Of the cap at each score, where there is one.
    slopes: Vec<f32>,
    /// Before the inverse rotation, `[padded, head_dim]`.
    dk: Vec<f32>,
    /// `[padded, head_dim]`.
    dv: Vec<f32>,
}

impl GradientScratch {
    fn new(shape: &Shape) -> Self {
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
struct Results<'a> {
    d_out: &'a [f32],
    out: &'a [f32],
    log_sum_exp: &'a [f32],
}

/// Queries `start..end` of a unit and the keys they may see.
struct Tile {
    start: usize,
    end: usize,
    /// Scores in the tile: positions times heads.
    rows: usize,
    /// The first key that is looked at, on a whole vector.
    first: usize,
    /// Keys from there up to the last query, in whole vectors.
    keys: usize,
}

impl Tile {
    /// Of the row of a position, the keys before its window and those up to itself, from the first
    /// key of the tile on.
    fn live(&self, position: usize, window: usize) -> (usize, usize) {
        let live = position + 1;
        (live.saturating_sub(window).saturating_sub(self.first), live - self.first)
    }
}

/// The operands.
struct Problem<'a> {
    shape: &'a Shape,
    level: Level,
    /// Pairs of rotated features.
    half: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    cos: &'a [f32],
    sin: &'a [f32],
}

impl<'a> Problem<'a> {
    fn new(shape: &'a Shape, [q, k, v]: [&'a [f32]; 3], [cos, sin]: [&'a [f32]; 2]) -> Self {
        let Shape { batch, seq, heads, kv_heads, head_dim, .. } = *shape;
        debug_assert!(heads.is_multiple_of(kv_heads) && head_dim.is_multiple_of(2));
        debug_assert_eq!(q.len(), batch * seq * heads * head_dim);
        debug_assert!([k.len(), v.len()] == [batch * seq * kv_heads * head_dim; 2]);
        let half = cos.len().checked_div(seq).unwrap_or(0);
        debug_assert!(cos.len() == sin.len() && 2 * half <= head_dim);
        Self { shape, level: Level::best(), half, q, k, v, cos, sin }
    }

    fn forward(
        &self,
        unit: usize,
        scratch: &mut Scratch,
        out: &mut [&mut [f32]],
        log_sum_exp: &mut [f32],
    ) {
        let Shape { seq, head_dim, .. } = *self.shape;
        let stack = self.shape.stack();
        self.load_keys(unit, scratch);
        for tile in self.tiles() {
            self.score(unit, &tile, scratch);
            let Scratch { scores, maxima, totals, mixed, v, .. } = &mut *scratch;
            let window = self.shape.window;
            at!(self.level, softmax_tile(&tile, stack, window, scores, maxima, totals));
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
    fn backward(
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
        for tile in self.tiles() {
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
            let window = self.shape.window;
            at!(
                self.level,
                softmax_backward_tile(&tile, stack, window, scores, d_scores, maxima, totals)
            );
            if self.shape.cap.is_some() {
                d_scores.iter_mut().zip(slopes.iter()).for_each(|(d, slope)| *d *= slope);
            }
            let (weights, slopes) = (matrix(scores, rows, keys), matrix(d_scores, rows, keys));
            product(&mut dv[skipped..], Accum::Add, weights.transpose(), outer, 1.0);
            let (queries, scale) = (matrix(q, rows, head_dim), self.shape.scale);
            product(&mut dk[skipped..], Accum::Add, slopes.transpose(), queries, scale);
            product(mixed, Accum::Replace, slopes, matrix(&k[skipped..], keys, head_dim), scale);
            self.rotate_back(start, mixed, &mut dq[start..tile.end]);
        }
    }

    fn tiles(&self) -> impl Iterator<Item = Tile> {
        let (seq, tile, stack) = (self.shape.seq, self.shape.tile(), self.shape.stack());
        (0..seq).step_by(tile.max(1)).map(move |start| {
            let end = (start + tile).min(seq);
            let first = (start + 1).saturating_sub(self.shape.window) / LANES * LANES;
            let keys = end.next_multiple_of(LANES) - first;
            Tile { start, end, rows: (end - start) * stack, first, keys }
        })
    }

    /// A unit's columns of one position.
    fn piece<'x>(&self, x: &'x [f32], unit: usize, position: usize, width: usize) -> &'x [f32] {
        let Shape { seq, kv_heads, .. } = *self.shape;
        let row = unit / kv_heads * seq + position;
        &x[(row * kv_heads + unit % kv_heads) * width..][..width]
    }

    /// A unit's rotated keys and its values.
    fn load_keys(&self, unit: usize, scratch: &mut Scratch) {
        let Shape { seq, head_dim, .. } = *self.shape;
        self.rotate(self.k, unit, 0..seq, head_dim, &mut scratch.k);
        for (position, packed) in scratch.v.chunks_exact_mut(head_dim).enumerate().take(seq) {
            packed.copy_from_slice(self.piece(self.v, unit, position, head_dim));
        }
    }

    /// The tile's rotated queries and its scores.
    fn score(&self, unit: usize, tile: &Tile, scratch: &mut Scratch) {
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
    fn load_d_out(
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
    fn rotate(
        &self,
        x: &[f32],
        unit: usize,
        positions: std::ops::Range<usize>,
        width: usize,
        packed: &mut [f32],
    ) {
        at!(self.level, {
            for (position, packed) in positions.zip(packed.chunks_exact_mut(width)) {
                let x = self.piece(x, unit, position, width);
                self.turn(x, position, 1.0, packed);
            }
        });
    }

    /// The inverse rotation of packed rows, from position `start` on, into a unit's columns.
    fn rotate_back(&self, start: usize, packed: &[f32], out: &mut [&mut [f32]]) {
        at!(self.level, {
            let mut rest = packed;
            for (position, out) in (start..).zip(out) {
                let (row, after) = rest.split_at(out.len());
                self.turn(row, position, -1.0, out);
                rest = after;
            }
        });
    }

    /// Rotates the heads of one position, side by side; the features behind the rotated ones pass.
    #[allow(clippy::inline_always)] // it must be compiled for the caller's instruction set
    #[inline(always)]
    fn turn(&self, x: &[f32], position: usize, turn: f32, out: &mut [f32]) {
        let (half, head_dim) = (self.half, self.shape.head_dim);
        let angles = [self.cos, self.sin].map(|table| &table[position * half..][..half]);
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

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [[usize; 5]; 6] = [
        [1, 1, 1, 1, 2],
        [1, 5, 2, 1, 4],
        [2, 17, 4, 2, 6],
        [1, 130, 8, 4, 16],
        [2, 70, 3, 3, 8],
        [1, 300, 20, 2, 32],
    ];

    struct Case {
        shape: Shape,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        cos: Vec<f32>,
        sin: Vec<f32>,
        d_out: Vec<f32>,
    }

    fn values(len: usize, seed: f32, size: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin() * size).collect()
    }

    impl Case {
        fn new([batch, seq, heads, kv_heads, head_dim]: [usize; 5], size: f32) -> Self {
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
            let (wide, narrow) =
                (batch * seq * heads * head_dim, batch * seq * kv_heads * head_dim);
            let angle =
                |i: usize| (i / (head_dim / 2)) as f32 * 0.3 / (i % (head_dim / 2) + 1) as f32;
            Self {
                shape,
                q: values(wide, 0.1, size),
                k: values(narrow, 0.4, size),
                v: values(narrow, 0.6, 1.0),
                cos: (0..seq * head_dim / 2).map(|i| angle(i).cos()).collect(),
                sin: (0..seq * head_dim / 2).map(|i| angle(i).sin()).collect(),
                d_out: values(wide, 0.8, 1.0),
            }
        }

        /// In each way that families differ: a window, a cap, neighbours, a part of each head, another
        /// scale; at last all of them.
        fn ways(shape: [usize; 5]) -> Vec<Self> {
            let way = |change: &dyn Fn(&mut Self)| {
                let mut case = Self::new(shape, 1.0);
                change(&mut case);
                case
            };
            let part = |case: &mut Self| {
                let pairs = case.shape.head_dim / 2;
                let kept = pairs.div_ceil(2);
                for table in [&mut case.cos, &mut case.sin] {
                    *table = table.chunks(pairs).flat_map(|row| row[..kept].to_vec()).collect();
                }
            };
            vec![
                way(&|_| ()),
                way(&|case| case.shape.window = 2),
                way(&|case| case.shape.window = 7),
                way(&|case| case.shape.window = 40),
                way(&|case| case.shape.cap = Some(1.5)),
                way(&|case| case.shape.neighbours = true),
                way(&|case| case.shape.scale = 0.7),
                way(&part),
                way(&|case| {
                    part(case);
                    let Shape { window, cap, neighbours, scale, .. } = &mut case.shape;
                    (*window, *cap, *neighbours, *scale) = (19, Some(2.0), true, 0.4);
                }),
            ]
        }

        /// out, log-sum-exp, dq, dk and dv.
        fn run(&self) -> [Vec<f32>; 5] {
            let Self { shape, q, k, v, cos, sin, d_out } = self;
            let (mut out, mut dq) = (vec![f32::NAN; q.len()], vec![f32::NAN; q.len()]);
            let (mut dk, mut dv) = (vec![f32::NAN; k.len()], vec![f32::NAN; k.len()]);
            let sums = attention(shape, q, k, v, cos, sin, &mut out);
            attention_backward(
                shape, d_out, q, k, v, cos, sin, &out, &sums, &mut dq, &mut dk, &mut dv,
            );
            [out, sums, dq, dk, dv]
        }

        /// What [`Case::run`] should give, in f64 and one query at a time.
        #[allow(clippy::many_single_char_names)] // the operands' own names
        fn reference(&self) -> [Vec<f64>; 5] {
            let Shape { batch, seq, heads, kv_heads, head_dim, window, scale, cap, .. } =
                self.shape;
            let [q, k] = [&self.q, &self.k].map(|x| self.turned(&widen(x), 1.0));
            let (v, d_out) = (widen(&self.v), widen(&self.d_out));
            let scale = f64::from(scale);
            let cap = cap.map(f64::from);
            let capped = |score: f64| cap.map_or(score, |cap| cap * (score / cap).tanh());
            let [mut out, mut dq] = [(); 2].map(|()| vec![0.0; q.len()]);
            let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; k.len()]);
            let mut sums = vec![0.0; batch * heads * seq];
            for (row, sum) in sums.iter_mut().enumerate() {
                let (b, head, t) = (row / seq / heads, row / seq % heads, row % seq);
                let wide = ((b * seq + t) * heads + head) * head_dim;
                let narrow = |key: usize| {
                    ((b * seq + key) * kv_heads + head / (heads / kv_heads)) * head_dim
                };
                let dot = |a: &[f64], at: usize, b: &[f64], bt: usize| -> f64 {
                    (0..head_dim).map(|i| a[at + i] * b[bt + i]).sum()
                };
                let seen = (t + 1).saturating_sub(window)..t + 1;
                let score = |key| capped(scale * dot(&q, wide, &k, narrow(key)));
                let scores: Vec<f64> = seen.clone().map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                *sum = max + scores.iter().map(|s| (s - max).exp()).sum::<f64>().ln();
                let weights: Vec<f64> = scores.iter().map(|s| (s - *sum).exp()).collect();
                let slopes: Vec<f64> =
                    seen.clone().map(|key| dot(&d_out, wide, &v, narrow(key))).collect();
                let mean: f64 = weights.iter().zip(&slopes).map(|(w, s)| w * s).sum();
                for (i, key) in seen.enumerate() {
                    let (weight, score) = (weights[i], scores[i]);
                    let slope = cap.map_or(1.0, |cap| 1.0 - (score / cap).powi(2));
                    let d_score = weight * (slopes[i] - mean) * scale * slope;
                    for i in 0..head_dim {
                        let at = narrow(key) + i;
                        out[wide + i] += weight * v[at];
                        dv[at] += weight * d_out[wide + i];
                        dq[wide + i] += d_score * k[at];
                        dk[at] += d_score * q[wide + i];
                    }
                }
            }
            [out, sums, self.turned(&dq, -1.0), self.turned(&dk, -1.0), dv]
        }

        fn turned(&self, x: &[f64], turn: f64) -> Vec<f64> {
            let Shape { batch, seq, head_dim, neighbours, .. } = self.shape;
            let (half, width) = (self.cos.len() / seq, x.len() / batch / seq);
            let turned = |i: usize| {
                let (position, feature) = (i / width % seq, i % head_dim);
                if feature >= 2 * half {
                    return x[i];
                }
                let (pair, first, step) = if neighbours {
                    (feature / 2, feature % 2 == 0, 1)
                } else {
                    (feature % half, feature < half, half)
                };
                let angle = position * half + pair;
                let (cos, sin) = (f64::from(self.cos[angle]), f64::from(self.sin[angle]) * turn);
                let sin_side = if first { -x[i + step] } else { x[i - step] };
                x[i] * cos + sin_side * sin
            };
            (0..x.len()).map(turned).collect()
        }
    }

    fn widen(x: &[f32]) -> Vec<f64> {
        x.iter().map(|x| f64::from(*x)).collect()
    }

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
