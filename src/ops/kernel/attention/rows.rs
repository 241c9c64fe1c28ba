//! What is done to the rows of a tile, compiled for the caller's instruction set.
#![allow(clippy::inline_always)]

use crate::ops::vector::{self, LANES};

/// Features taken at once, as heads may be short.
const SHORT: usize = 8;

type Vector = [f32; LANES];

/// How positions are turned, and which keys their queries see.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables<'a> {
    /// Whether sequences differ in their cosines and sines.
    pub(crate) each: bool,
    /// Cosines of the first features of each head, `[seq, rotated / 2]`, or `[batch, seq, rotated / 2]`
    /// where they differ.
    pub(crate) cos: &'a [f32],
    /// Sines, as the cosines.
    pub(crate) sin: &'a [f32],
    /// The first key that a query may see, not falling along a sequence, `[batch, seq]`; none: 0.
    pub(crate) starts: Option<&'a [u32]>,
}

/// Whom the queries of one sequence see.
#[derive(Clone, Copy)]
pub(super) struct Sight<'a> {
    /// Keys up to its own.
    pub(super) window: usize,
    /// The first of them, `[seq]`.
    pub(super) starts: Option<&'a [u32]>,
}

impl Sight<'_> {
    /// The first key that the query at a position sees.
    pub(super) fn first(self, position: usize) -> usize {
        self.first_of(position, position)
    }

    /// The first key that query `index` sees, which is itself the key at `position`.
    pub(super) fn first_of(self, index: usize, position: usize) -> usize {
        let start = self.starts.map_or(0, |starts| starts[index] as usize);
        (position + 1).saturating_sub(self.window).max(start)
    }
}

/// Queries `start..end` of a unit and the keys they may see.
pub(super) struct Tile {
    pub(super) start: usize,
    pub(super) end: usize,
    /// Scores in the tile: positions times heads.
    pub(super) rows: usize,
    /// The first key that is looked at, on a whole vector.
    pub(super) first: usize,
    /// Keys from there up to the last query, in whole vectors.
    pub(super) keys: usize,
}

impl Tile {
    /// Of the row of a position, the keys before those it sees and the keys up to itself, from the
    /// first key of the tile on.
    fn live(&self, position: usize, sight: Sight<'_>) -> (usize, usize) {
        (sight.first(position).saturating_sub(self.first), position + 1 - self.first)
    }
}

/// Turns heads side by side: their first half `f` and second half `s` to `f cos - s sin` and
/// `s cos + f sin`, the other way where `turn` is -1.
#[inline(always)]
pub(super) fn rotate_row(x: &[f32], [cos, sin]: [&[f32]; 2], turn: f32, out: &mut [f32]) {
    let half = cos.len();
    let (cos_chunks, cos_rest) = cos.as_chunks::<SHORT>();
    let (sin_chunks, sin_rest) = sin.as_chunks::<SHORT>();
    for (x, out) in x.chunks_exact(2 * half).zip(out.chunks_exact_mut(2 * half)) {
        let ((first, second), (a, b)) = (x.split_at(half), out.split_at_mut(half));
        let ((first, first_rest), (second, second_rest)) = (first.as_chunks(), second.as_chunks());
        let ((a, a_rest), (b, b_rest)) = (a.as_chunks_mut(), b.as_chunks_mut());
        let angles = cos_chunks.iter().zip(sin_chunks);
        for ((a, b), ((f, s), angles)) in
            a.iter_mut().zip(b).zip(first.iter().zip(second).zip(angles))
        {
            [*a, *b] = rotate_lanes(*f, *s, *angles.0, *angles.1, turn);
        }
        let angles = cos_rest.iter().zip(sin_rest);
        for ((a, b), ((f, s), angles)) in
            a_rest.iter_mut().zip(b_rest).zip(first_rest.iter().zip(second_rest).zip(angles))
        {
            [[*a], [*b]] = rotate_lanes([*f], [*s], [*angles.0], [*angles.1], turn);
        }
    }
}

/// As [`rotate_row`], each feature against its neighbour, of one head.
#[inline(always)]
pub(super) fn rotate_neighbours(x: &[f32], [cos, sin]: [&[f32]; 2], turn: f32, out: &mut [f32]) {
    let (pairs, _) = x.as_chunks::<2>();
    let (turned, _) = out.as_chunks_mut::<2>();
    for ((out, [f, s]), (cos, sin)) in turned.iter_mut().zip(pairs).zip(cos.iter().zip(sin)) {
        let [[a], [b]] = rotate_lanes([*f], [*s], [*cos], [*sin], turn);
        *out = [a, b];
    }
}

/// Turns each row of scores to `exp(score - its maximum)`, 0 for keys after the query. Leaves the
/// sums of these in `totals`, the logarithms of the rows' sums of `exp(score)` in `sums`.
#[inline(always)]
pub(super) fn softmax_tile(
    tile: &Tile,
    stack: usize,
    sight: Sight<'_>,
    scores: &mut [f32],
    sums: &mut [f32],
    totals: &mut [f32],
) {
    let (sums, totals) = (&mut sums[..tile.rows], &mut totals[..tile.rows]);
    let rows = scores.chunks_exact_mut(tile.keys).zip(sums.iter_mut().zip(totals.iter_mut()));
    for (row, (scores, (sum, total))) in rows.enumerate() {
        let (early, live) = tile.live(tile.start + row / stack, sight);
        let (scores, live, early) = without_early(scores, live, early);
        let (whole, last, later) = live_vectors(scores, live);
        hide_early(whole, last, early, f32::NEG_INFINITY);
        let live = hide(*last, later, f32::NEG_INFINITY);
        let max = fold(whole, live, |a, b| if b > a { b } else { a });
        for weights in whole.iter_mut() {
            *weights = exp_lanes(*weights, max);
        }
        *last = hidden_exp_lanes(*last, later, max);
        hide_early(whole, last, early, 0.0);
        *sum = max;
        *total = fold(whole, *last, |a, b| a + b);
    }
    for (sum, total) in sums.iter_mut().zip(totals) {
        *sum += vector::ln(*total);
    }
}

/// Turns scores to probabilities, and their slopes to the scores' own: `p (slope - shift)`.
#[inline(always)]
pub(super) fn softmax_backward_tile(
    tile: &Tile,
    stack: usize,
    sight: Sight<'_>,
    scores: &mut [f32],
    slopes: &mut [f32],
    log_sums: &[f32],
    shifts: &[f32],
) {
    let rows = scores.chunks_exact_mut(tile.keys).zip(slopes.chunks_exact_mut(tile.keys));
    let rows = rows.zip(log_sums.iter().zip(shifts)).take(tile.rows);
    for (row, ((scores, slopes), (&log_sum, &shift))) in rows.enumerate() {
        let (early, live) = tile.live(tile.start + row / stack, sight);
        let (slopes, ..) = without_early(slopes, live, early);
        let (scores, live, early) = without_early(scores, live, early);
        let (whole, last, later) = live_vectors(scores, live);
        let (whole_slopes, last_slopes, _) = live_vectors(slopes, live);
        for (weights, slopes) in whole.iter_mut().zip(whole_slopes.iter_mut()) {
            *weights = exp_lanes(*weights, log_sum);
            *slopes = d_softmax_lanes(*weights, *slopes, shift);
        }
        *last = hidden_exp_lanes(*last, later, log_sum);
        *last_slopes = d_softmax_lanes(*last, *last_slopes, shift);
        hide_early(whole, last, early, 0.0);
        hide_early(whole_slopes, last_slopes, early, 0.0);
    }
}

/// `out = mixed / total` of each row, to heads side by side.
#[inline(always)]
pub(super) fn share_out(mixed: &[f32], totals: &[f32], head_dim: usize, out: &mut [&mut [f32]]) {
    let mut rows = mixed.chunks_exact(head_dim).zip(totals);
    for out in out {
        for (out, (mixed, total)) in out.chunks_exact_mut(head_dim).zip(&mut rows) {
            let share = 1.0 / total;
            let ((mixed, mixed_rest), (out, out_rest)) =
                (mixed.as_chunks::<SHORT>(), out.as_chunks_mut::<SHORT>());
            for (out, mixed) in out.iter_mut().zip(mixed) {
                *out = mixed.map(|x| x * share);
            }
            for (out, mixed) in out_rest.iter_mut().zip(mixed_rest) {
                *out = mixed * share;
            }
        }
    }
}

/// The sum of products.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<SHORT>(), b.as_chunks::<SHORT>());
    let mut lanes = [0.0; SHORT];
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

#[inline(always)]
fn rotate_lanes<const N: usize>(
    f: [f32; N],
    s: [f32; N],
    cos: [f32; N],
    sin: [f32; N],
    turn: f32,
) -> [[f32; N]; 2] {
    let (mut a, mut b) = ([0.0; N], [0.0; N]);
    for i in 0..N {
        let sin = sin[i] * turn;
        a[i] = f[i] * cos[i] - s[i] * sin;
        b[i] = s[i] * cos[i] + f[i] * sin;
    }
    [a, b]
}

/// A row's vectors of live keys alone, the last vector, which has some, and how many keys of that
/// come later than the query. What follows is set to 0.
#[inline(always)]
fn live_vectors(row: &mut [f32], live: usize) -> (&mut [Vector], &mut Vector, u32) {
    let (vectors, _) = row.as_chunks_mut();
    let (whole, rest) = vectors.split_at_mut((live - 1) / LANES);
    let (last, unused) = rest.split_at_mut(1);
    unused.fill([0.0; LANES]);
    let later = (whole.len() + 1) * LANES - live;
    (whole, &mut last[0], later as u32)
}

/// A row without the whole vectors of keys that it does not see yet, which become 0: the rest, how many of it
/// are live, and how many lanes of its first vector stand before the window.
#[inline(always)]
fn without_early(row: &mut [f32], live: usize, early: usize) -> (&mut [f32], usize, usize) {
    let skipped = early / LANES * LANES;
    let (before, row) = row.split_at_mut(skipped);
    before.fill(0.0);
    (row, live - skipped, early - skipped)
}

/// Puts `value` in the first lanes of the first vector.
#[inline(always)]
fn hide_early(whole: &mut [Vector], last: &mut Vector, early: usize, value: f32) {
    if early > 0 {
        whole.first_mut().unwrap_or(last)[..early].fill(value);
    }
}

/// As [`exp_lanes`], 0 for later keys. The exponential they get is that of 0: a processor may need
/// a hundred cycles for one that underflows.
#[inline(always)]
fn hidden_exp_lanes(scores: Vector, later: u32, shift: f32) -> Vector {
    hide(exp_lanes(hide(scores, later, shift), shift), later, 0.0)
}

/// Puts `value` in the lanes of later keys. By value: a write of single lanes would hold up the
/// next read of the vector.
#[inline(always)]
fn hide(mut scores: Vector, later: u32, value: f32) -> Vector {
    for (i, score) in (1..=LANES as u32).rev().zip(&mut scores) {
        *score = if i > later { *score } else { value };
    }
    scores
}

#[inline(always)]
fn exp_lanes(mut scores: Vector, shift: f32) -> Vector {
    for score in &mut scores {
        *score = vector::exp(*score - shift);
    }
    scores
}

#[inline(always)]
fn d_softmax_lanes(weights: Vector, mut slopes: Vector, shift: f32) -> Vector {
    for (slope, weight) in slopes.iter_mut().zip(weights) {
        *slope = weight * (*slope - shift);
    }
    slopes
}

/// All values combined with those of `lanes`, lane by lane and then by halves.
#[inline(always)]
fn fold(values: &[Vector], mut lanes: Vector, combine: impl Fn(f32, f32) -> f32) -> f32 {
    for chunk in values {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = combine(*lane, *value);
        }
    }
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = combine(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}
