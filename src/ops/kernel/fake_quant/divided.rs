//! FlexRound's and LRQ's quantizer: codes of a weight divided by learned factors.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use rayon::iter::ParallelIterator;
use rayon::slice::ParallelSlice;

use super::super::rows;
use super::{affine_code, reduce_rows};
use crate::ops::fake_quant::Output;
use crate::ops::vector::{self, Level, at};

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

#[cfg(test)]
mod tests {
    use super::super::sample::{SHAPES, ratios};
    use super::*;
    use crate::ops::kernel::sample::{assert_same, bits, noise};

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
                    forwards.iter().chain(&gradients).map(|values| bits(values)).collect::<Vec<_>>()
                });
            }
        }
    }
}
