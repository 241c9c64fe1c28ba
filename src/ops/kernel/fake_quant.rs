//! Fake-quantization of the uniform family: codes, values, and the gradients of what learns, one
//! pass over the weight each, group by group.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::{ParallelSlice, ParallelSliceMut};

use super::{parallel, rows};
use crate::ops::fake_quant::Output;
use crate::ops::vector::{self, Level, at};
use crate::ops::{Rule, TieRule};

/// FlexRound's and LRQ's quantizer: `Δ (clamp(round(W / (b exp(θ))) + z, 0, L) - z)`,
/// `Δ = b exp(δ)`, `θ = D + (δ + r) (+ c)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Divided<'a> {
    /// `[groups, group_len]`.
    pub weight: &'a [f32],
    /// D, `[groups, group_len]`.
    pub log_division: &'a [f32],
    /// b, `[groups]`; empty for ones.
    pub base: &'a [f32],
    /// δ, `[groups]`.
    pub log_scale: &'a [f32],
    /// r, `[groups]`, or shorter by a whole factor: so many groups then share an entry.
    pub log_row: &'a [f32],
    /// c, the entries of a row; empty for none.
    pub log_column: &'a [f32],
    /// z, `[groups]`.
    pub zero_point: &'a [f32],
    /// L.
    pub max_code: f32,
}

/// Gradients of [`Divided`].
#[derive(Debug)]
#[allow(clippy::struct_field_names)] // the parameters' names
pub(crate) struct DividedGradients {
    /// `[groups]`.
    pub log_scale: Vec<f32>,
    /// As long as `log_row`.
    pub log_row: Vec<f32>,
    /// As long as `log_column`.
    pub log_column: Vec<f32>,
}

impl<'a> Divided<'a> {
    fn groups(&self) -> usize {
        self.log_scale.len()
    }

    fn group_len(&self) -> usize {
        self.weight.len() / self.groups().max(1)
    }

    /// The columns of group `index`, if there are column factors.
    fn columns(&self, index: usize) -> Option<&'a [f32]> {
        let (row, len) = (self.log_column.len(), self.group_len());
        (row > 0).then(|| &self.log_column[index * len % row..][..len])
    }

    /// `δ + r` of group `index`.
    fn log_step(&self, index: usize) -> f32 {
        let sharing = self.groups() / self.log_row.len();
        self.log_scale[index] + self.log_row[index / sharing]
    }

    /// b of group `index`, and Δ.
    fn scale(&self, index: usize) -> [f32; 2] {
        let base = self.base.get(index).copied().unwrap_or(1.0);
        [base, base * vector::exp(self.log_scale[index])]
    }

    /// Codes or values, `[groups, group_len]`.
    pub(crate) fn forward(&self, output: Output) -> Vec<f32> {
        self.forward_at(Level::best(), output)
    }

    fn forward_at(&self, level: Level, output: Output) -> Vec<f32> {
        let len = self.group_len();
        let mut out = vec![0.0; self.weight.len()];
        let group = |(index, out): (usize, &mut [f32])| {
            let at = index * len;
            let (weight, division) = (&self.weight[at..][..len], &self.log_division[at..][..len]);
            let (z, top, log_step) = (self.zero_point[index], self.max_code, self.log_step(index));
            let [base, scale] = self.scale(index);
            let scale = match output {
                Output::Codes => None,
                Output::Values => Some(scale),
            };
            let columns = self.columns(index);
            at!(level, {
                divided_ratios(out, weight, division, columns, base, log_step);
                divided_row(out, z, top, scale);
            });
        };
        rows(&mut out, len, group);
        out
    }

    /// Gradients, given that of the values, which D's replaces; of the columns only if asked for.
    pub(crate) fn backward(&self, gradient: &mut [f32], columns: bool) -> DividedGradients {
        self.backward_at(Level::best(), gradient, columns)
    }

    fn backward_at(&self, level: Level, gradient: &mut [f32], columns: bool) -> DividedGradients {
        let len = self.group_len();
        let sums = reduce_rows(gradient, len, |scratch, index, gradient| {
            let at = index * len;
            let part = |values: &'a [f32]| &values[at..][..len];
            let (weight, division) = (part(self.weight), part(self.log_division));
            let (z, top, log_step) = (self.zero_point[index], self.max_code, self.log_step(index));
            let (columns, [base, scale]) = (self.columns(index), self.scale(index));
            at!(level, {
                divided_ratios(scratch, weight, division, columns, base, log_step);
                divided_row_backward(gradient, scratch, z, top, scale)
            })
        });
        let sharing = self.groups() / self.log_row.len();
        let log_column =
            if columns { column_sums(gradient, self.log_column.len()) } else { Vec::new() };
        DividedGradients {
            log_scale: sums.iter().map(|[value, division]| (value + division) as f32).collect(),
            log_row: sums
                .chunks(sharing)
                .map(|groups| groups.iter().map(|[_, division]| division).sum::<f64>() as f32)
                .collect(),
            log_column,
        }
    }
}

/// `e^x` of each.
pub(crate) fn exp(x: &[f32]) -> Vec<f32> {
    exp_at(Level::best(), x)
}

fn exp_at(level: Level, x: &[f32]) -> Vec<f32> {
    let mut out = x.to_vec();
    rows(&mut out, x.len().clamp(1, 1 << 12), |(_, part)| {
        at!(level, {
            for x in part {
                *x = vector::exp(*x);
            }
        });
    });
    out
}

/// Runs `group` on every row of `matrix`, with its index and a buffer of its length; the results in
/// the order of the rows.
fn reduce_rows<R: Send>(
    matrix: &mut [f32],
    len: usize,
    group: impl Fn(&mut [f32], usize, &mut [f32]) -> R + Sync,
) -> Vec<R> {
    let scratch = || vec![0.0; len];
    if parallel(matrix.len()) {
        let rows = matrix.par_chunks_exact_mut(len).enumerate();
        rows.map_init(scratch, |scratch, (index, row)| group(scratch, index, row)).collect()
    } else {
        let mut scratch = scratch();
        let rows = matrix.chunks_exact_mut(len).enumerate();
        rows.map(|(index, row)| group(&mut scratch, index, row)).collect()
    }
}

/// Sums of a matrix's columns, in f64 over blocks of rows that do not depend on the threads.
fn column_sums(matrix: &[f32], columns: usize) -> Vec<f32> {
    const ROWS: usize = 32;
    if columns == 0 {
        return Vec::new();
    }
    let partial: Vec<Vec<f32>> = matrix
        .par_chunks(columns * ROWS)
        .map(|block| {
            let mut sums = vec![0.0f32; columns];
            for row in block.chunks_exact(columns) {
                sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
            }
            sums
        })
        .collect();
    let mut total = vec![0.0f64; columns];
    for sums in partial {
        total.iter_mut().zip(sums).for_each(|(total, sum)| *total += f64::from(sum));
    }
    total.into_iter().map(|sum| sum as f32).collect()
}

/// Codes in the place of ratios, or with a scale their values.
#[inline(always)]
fn divided_row(out: &mut [f32], z: f32, top: f32, scale: Option<f32>) {
    match scale {
        None => {
            for out in out {
                *out = affine_code(*out, z, top);
            }
        }
        Some(scale) => {
            for out in out {
                *out = scale * (affine_code(*out, z, top) - z);
            }
        }
    }
}

/// `W / (b exp(D + (δ + r) (+ c)))`.
#[inline(always)]
fn divided_ratios(
    out: &mut [f32],
    weight: &[f32],
    division: &[f32],
    columns: Option<&[f32]>,
    base: f32,
    log_step: f32,
) {
    let entries = out.iter_mut().zip(weight).zip(division);
    match columns {
        None => {
            for ((out, w), d) in entries {
                *out = w / (base * vector::exp(d + log_step));
            }
        }
        Some(columns) => {
            for (((out, w), d), c) in entries.zip(columns) {
                *out = w / (base * vector::exp(d + (log_step + c)));
            }
        }
    }
}

#[inline(always)]
fn affine_code(u: f32, z: f32, top: f32) -> f32 {
    (u.round_ties_even() + z).clamp(0.0, top)
}

/// D's gradient in the place of that of the values; the sums over the group of the gradients of δ
/// through the value, and of D.
#[inline(always)]
fn divided_row_backward(
    gradient: &mut [f32],
    ratios: &[f32],
    z: f32,
    top: f32,
    scale: f32,
) -> [f64; 2] {
    let value = vector::sum_pairs(
        gradient,
        ratios,
        #[inline(always)]
        |g, ratio| g * (affine_code(ratio, z, top) - z),
    );
    for (gradient, ratio) in gradient.iter_mut().zip(ratios) {
        let code = ratio.round_ties_even() + z;
        let inside = code >= 0.0 && code <= top;
        // Outside the ratio may be infinite: no product with a zero.
        *gradient = if inside { -(*gradient * scale) * ratio } else { 0.0 };
    }
    [f64::from(scale) * value, vector::sum(gradient)]
}

/// Every quantizer whose codes follow from `u = W / Δ (+ V)`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stepped<'a> {
    /// `[groups, group_len]`.
    pub weight: &'a [f32],
    /// Δ, `[groups]`.
    pub step: &'a [f32],
    /// z, `[groups]`, in code units.
    pub zero_point: &'a [f32],
    /// V, `[groups, group_len]`; empty for none.
    pub rounding: &'a [f32],
    /// From u to the code.
    pub rule: Rule,
}

/// Which gradient of [`Stepped`] takes the place of that of the values.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum InPlace {
    /// The weight's.
    Weight,
    /// V's.
    Rounding,
    /// None is wanted: what is there then has no meaning.
    Neither,
}

/// Gradients of [`Stepped`].
#[derive(Debug)]
pub(crate) struct SteppedGradients {
    /// `[groups]`.
    pub step: Vec<f32>,
    /// `[groups]`.
    pub zero_point: Vec<f32>,
}

impl Stepped<'_> {
    fn group_len(&self) -> usize {
        self.weight.len() / self.step.len().max(1)
    }

    /// Codes or values, `[groups, group_len]`.
    pub(crate) fn forward(&self, output: Output) -> Vec<f32> {
        self.forward_at(Level::best(), output)
    }

    fn forward_at(&self, level: Level, output: Output) -> Vec<f32> {
        let len = self.group_len();
        let mut out = vec![0.0; self.weight.len()];
        let group = |(index, out): (usize, &mut [f32])| {
            let at = index * len;
            let weight = &self.weight[at..][..len];
            let rounding = self.rounding.get(at..at + len);
            let (step, z) = (self.step[index], self.zero_point[index]);
            at!(level, stepped_row(out, weight, rounding, step, z, self.rule, output));
        };
        rows(&mut out, len, group);
        out
    }

    /// Gradients, given that of the values, which is overwritten.
    pub(crate) fn backward(&self, gradient: &mut [f32], matrix: InPlace) -> SteppedGradients {
        self.backward_at(Level::best(), gradient, matrix)
    }

    fn backward_at(&self, level: Level, gradient: &mut [f32], matrix: InPlace) -> SteppedGradients {
        let len = self.group_len();
        let sums = reduce_rows(gradient, len, |scratch, index, gradient| {
            let at = index * len;
            let weight = &self.weight[at..][..len];
            let rounding = self.rounding.get(at..at + len);
            let (step, z) = (self.step[index], self.zero_point[index]);
            at!(level, {
                steps_of(scratch, weight, rounding, step);
                let sums = stepped_row_backward(gradient, scratch, weight, step, z, self.rule);
                if matrix == InPlace::Rounding {
                    for slope in gradient {
                        *slope *= step;
                    }
                }
                sums
            })
        });
        SteppedGradients {
            step: sums.iter().map(|[step, _]| *step as f32).collect(),
            zero_point: sums.iter().map(|[_, zero]| *zero as f32).collect(),
        }
    }
}

/// The code of a weight at `u`.
#[inline(always)]
pub(super) fn code_of(rule: Rule, u: f32, z: f32) -> f32 {
    match rule {
        Rule::Affine { max_code } => affine_code(u, z, max_code),
        Rule::Lsq { middle } => u.clamp(-middle, middle - 1.0).round_ties_even() + middle,
        Rule::Seq { margin, ties } => {
            let x = u.clamp(margin - 1.0, 1.0 - margin) * 2.0 - 0.5;
            let level = match ties {
                TieRule::HalfEven => x.round_ties_even(),
                TieRule::HalfUp => (x + 0.5).floor(),
            };
            level + 2.0
        }
        Rule::Ternary { margin } => {
            (u.clamp(margin - 1.0, 1.0 - margin) * 1.5).round_ties_even() + 1.0
        }
        Rule::Sign => f32::from(u8::from(u >= 0.0)),
    }
}

/// Whether a weight at `u` feels its gradient.
#[inline(always)]
fn inside(rule: Rule, u: f32, z: f32) -> bool {
    match rule {
        Rule::Affine { max_code } => {
            let code = u.round_ties_even() + z;
            code >= 0.0 && code <= max_code
        }
        Rule::Lsq { middle } => u >= -middle && u <= middle - 1.0,
        Rule::Seq { margin, .. } | Rule::Ternary { margin } => {
            u >= margin - 1.0 && u <= 1.0 - margin
        }
        Rule::Sign => (-1.0..=1.0).contains(&u),
    }
}

#[inline(always)]
fn stepped_row(
    out: &mut [f32],
    weight: &[f32],
    rounding: Option<&[f32]>,
    step: f32,
    z: f32,
    rule: Rule,
    output: Output,
) {
    steps_of(out, weight, rounding, step);
    // The rule is matched once for a row, not for every weight.
    macro_rules! of {
        ($rule:expr) => {{
            let rule = $rule;
            if output == Output::Codes {
                for out in out {
                    *out = code_of(rule, *out, z);
                }
            } else {
                let scale = rule.scale(step);
                for out in out {
                    *out = scale * (code_of(rule, *out, z) - z);
                }
            }
        }};
    }
    match rule {
        Rule::Affine { max_code } => of!(Rule::Affine { max_code }),
        Rule::Lsq { middle } => of!(Rule::Lsq { middle }),
        Rule::Seq { margin, ties: TieRule::HalfEven } => {
            of!(Rule::Seq { margin, ties: TieRule::HalfEven });
        }
        Rule::Seq { margin, ties: TieRule::HalfUp } => {
            of!(Rule::Seq { margin, ties: TieRule::HalfUp });
        }
        Rule::Ternary { margin } => of!(Rule::Ternary { margin }),
        Rule::Sign => of!(Rule::Sign),
    }
}

/// `u = W / Δ (+ V)`.
#[inline(always)]
fn steps_of(out: &mut [f32], weight: &[f32], rounding: Option<&[f32]>, step: f32) {
    match rounding {
        None => {
            for (out, w) in out.iter_mut().zip(weight) {
                *out = w / step;
            }
        }
        Some(rounding) => {
            for ((out, w), v) in out.iter_mut().zip(weight).zip(rounding) {
                *out = w / step + v;
            }
        }
    }
}

/// The gradient that passes in the place of that of the values; the sums over the group of the
/// gradients of Δ and of z.
#[inline(always)]
fn stepped_row_backward(
    gradient: &mut [f32],
    steps: &[f32],
    weight: &[f32],
    step: f32,
    z: f32,
    rule: Rule,
) -> [f64; 2] {
    let factor = rule.scale(1.0);
    macro_rules! of {
        ($rule:expr) => {{
            let rule = $rule;
            let through_value = vector::sum_pairs(
                gradient,
                steps,
                #[inline(always)]
                |g, u| g * (code_of(rule, u, z) - z),
            );
            // What moves the value at fixed u: where the code is clamped, z does, elsewhere the code
            // moves with it; codes that z is no part of never do.
            let at_fixed_u = match rule {
                Rule::Affine { .. } => vector::sum_pairs(
                    gradient,
                    steps,
                    #[inline(always)]
                    |g, u| if inside(rule, u, z) { 0.0 } else { g },
                ),
                _ => vector::sum(gradient),
            };
            for (g, u) in gradient.iter_mut().zip(steps) {
                *g = if inside(rule, *u, z) { *g } else { 0.0 };
            }
            let through_code = match rule {
                // Its codes do not depend on the step.
                Rule::Sign => 0.0,
                _ => vector::dot(gradient, weight) / f64::from(step),
            };
            [
                f64::from(factor) * through_value - through_code,
                -f64::from(rule.scale(step)) * at_fixed_u,
            ]
        }};
    }
    match rule {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups and their length; the last two are worth a second thread.
    const SHAPES: [[usize; 2]; 10] = [
        [4, 1],
        [2, 7],
        [2, 15],
        [4, 16],
        [6, 17],
        [4, 33],
        [2, 100],
        [8, 128],
        [300, 113],
        [1024, 33],
    ];

    const RULES: [Rule; 6] = [
        Rule::Affine { max_code: 15.0 },
        Rule::Lsq { middle: 8.0 },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfEven },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfUp },
        Rule::Ternary { margin: 0.01 },
        Rule::Sign,
    ];

    fn noise(len: usize, seed: f32, size: f32) -> Vec<f32> {
        (0..len).map(|i| ((i as f32 + seed) * 12.9898).sin() * size).collect()
    }

    /// In units of the step: zeros, ties, bounds and far outliers among ordinary ones.
    fn ratios(len: usize) -> Vec<f32> {
        let ordinary = noise(len, 0.3, 6.0);
        let special = [0.0, -0.0, 0.5, -1.5, 2.5, 7.0, -8.0, 1e4, -1e4, 0.99, 1e30];
        let pick = |(i, x)| if i % 3 == 0 { special[i / 3 % special.len()] } else { x };
        ordinary.into_iter().enumerate().map(pick).collect()
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|x| x.to_bits()).collect()
    }

    #[track_caller]
    fn assert_same(what: &str, results: impl Fn(Level) -> Vec<Vec<u32>> + Sync) {
        let portable = results(Level::Portable);
        for level in Level::available() {
            assert!(results(level) == portable, "{what}, {level:?}");
        }
        for threads in [1, 2] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let found = pool.install(|| results(Level::best()));
            assert!(found == portable, "{what}, {threads} threads");
        }
    }

    #[test]
    fn divided_gives_the_same_bits_at_every_level_and_number_of_threads() {
        for [groups, len] in SHAPES {
            let count = groups * len;
            let (log_scale, zero_point) = (noise(groups, 0.7, 2.0), vec![7.0; groups]);
            let weight: Vec<f32> =
                ratios(count).iter().zip(0..).map(|(u, i)| u * log_scale[i / len].exp()).collect();
            let (division, gradient) = (noise(count, 0.1, 0.2), noise(count, 0.9, 1.0));
            // Every group has an entry of its own, or two share one and there are columns.
            let column = noise(2 * len, 0.4, 0.2);
            let base = vec![0.7; groups];
            for (rows, column) in [(groups, &[][..]), (groups / 2, &column[..])] {
                let log_row = noise(rows, 0.6, 0.2);
                let divided = Divided {
                    weight: &weight,
                    log_division: &division,
                    base: if rows == groups { &[] } else { &base },
                    log_scale: &log_scale,
                    log_row: &log_row,
                    log_column: column,
                    zero_point: &zero_point,
                    max_code: 15.0,
                };
                assert_same(&format!("{groups} groups of {len}, {rows} rows"), |level| {
                    let mut division = gradient.clone();
                    let found = divided.backward_at(level, &mut division, true);
                    let gradients = [division, found.log_scale, found.log_row, found.log_column];
                    let forwards =
                        [Output::Codes, Output::Values].map(|what| divided.forward_at(level, what));
                    forwards.iter().chain(&gradients).map(|values| bits(values)).collect()
                });
            }
        }
    }

    #[test]
    fn stepped_gives_the_same_bits_at_every_level_and_number_of_threads() {
        for ([groups, len], rule) in SHAPES.iter().flat_map(|s| RULES.map(|rule| (*s, rule))) {
            let count = groups * len;
            let step: Vec<f32> = noise(groups, 0.7, 2.0).iter().map(|x| x.exp()).collect();
            let weight: Vec<f32> =
                ratios(count).iter().zip(0..).map(|(u, i)| u * step[i / len]).collect();
            let (zero_point, gradient) = (noise(groups, 0.2, 4.0), noise(count, 0.9, 1.0));
            let offsets = noise(count, 0.5, 0.5);
            for rounding in [&[][..], &offsets] {
                let stepped = Stepped {
                    weight: &weight,
                    step: &step,
                    zero_point: &zero_point,
                    rounding,
                    rule,
                };
                assert_same(&format!("{groups} groups of {len}, {rule:?}"), |level| {
                    let of = |matrix: InPlace| {
                        let mut gradient = gradient.clone();
                        let found = stepped.backward_at(level, &mut gradient, matrix);
                        (gradient, found.step, found.zero_point)
                    };
                    let (weight, step, zero) = of(InPlace::Weight);
                    let (rounding, ..) = of(InPlace::Rounding);
                    let (_, alone_step, alone_zero) = of(InPlace::Neither);
                    assert_eq!(bits(&alone_step), bits(&step));
                    assert_eq!(bits(&alone_zero), bits(&zero));
                    let gradients = [rounding, weight, step, zero];
                    let forwards =
                        [Output::Codes, Output::Values].map(|what| stepped.forward_at(level, what));
                    forwards.iter().chain(&gradients).map(|values| bits(values)).collect()
                });
            }
        }
    }

    #[test]
    fn exp_gives_the_same_bits_at_every_level_and_number_of_threads() {
        for [groups, len] in SHAPES {
            let x = noise(groups * len, 0.3, 100.0);
            assert_same("exp", |level| vec![bits(&exp_at(level, &x))]);
        }
    }
}
