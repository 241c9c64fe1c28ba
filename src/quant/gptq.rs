//! GPTQ: rounding column by column, each column's error made good in the columns after it.
//!
//! Frantar et al. (arXiv 2210.17323). With `U` the upper factor of the inverse Hessian, column `j`
//! is rounded, its error is divided by `U_jj`, and `error * U_jk` is taken off every later column
//! `k`. The updates are lazy: within a block of columns they are made at once, row by row; the
//! columns behind the block get them together as one matrix product. The arithmetic is f64, only
//! the rounding itself is the f32 rounding of round-to-nearest, so with the identity as the
//! Hessian the codes are exactly those of round-to-nearest.

use std::ops::Range;

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatMut, MatRef, Par};
use rayon::prelude::*;

use super::hessian::Hessian;
use super::{GroupAxis, GroupLayout};
use crate::error::{Error, Result};

/// Settings of [`gptq`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// Added to the Hessian's diagonal, in units of its mean; the paper's 0.01.
    pub damping: f64,
    /// Rounds the inputs with the largest second moment first.
    pub act_order: bool,
    /// Takes the scales of all groups from the original weight, before anything is updated.
    pub static_groups: bool,
    /// Columns updated at once; changes the speed, not the result. The paper's 128.
    pub block: usize,
}

/// A weight on its grid.
#[derive(Clone, Debug, PartialEq)]
pub struct Solved {
    /// `[out, in]` row-major, in the original order of the columns.
    pub codes: Vec<u8>,
    /// One step per group, `[groups]`.
    pub scale: Vec<f32>,
    /// One zero point per group, `[groups]`.
    pub zero_point: Vec<f32>,
}

/// Chooses grids: weights `[groups, group_len]` row-major, and their shape, to one scale and one
/// zero point for each group.
pub type Observe<'a> = dyn Fn(Vec<f32>, [usize; 2]) -> Result<(Vec<f32>, Vec<f32>)> + Sync + 'a;

/// Rounds `weight`, `[out, in]` row-major, to codes in `0..=max_code`.
///
/// When a group is a whole row or more, `observe` sees the original weight, once. Smaller groups
/// are observed one column of groups at a time, from the updated weights when their first column
/// comes up, unless `options.static_groups`.
///
/// # Errors
/// Groups along the outputs, `act_order` with groups inside a row that are not static, a block of
/// zero columns, lengths that do not agree, a Hessian that is not positive definite, and what
/// `observe` returns.
pub fn gptq(
    weight: &[f32],
    layout: &GroupLayout,
    max_code: u8,
    hessian: &Hessian,
    options: &GptqOptions,
    observe: &Observe<'_>,
) -> Result<Solved> {
    let within_rows = layout.group_len < layout.inputs;
    check(weight, layout, hessian, options, within_rows)?;
    let diagonal = hessian.diagonal();
    let mut order: Vec<usize> = (0..layout.inputs).collect();
    if options.act_order {
        order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    }
    let dynamic = within_rows && !options.static_groups;
    let mut walk = Walk {
        layout,
        max_code,
        upper: hessian.inverse_factor(options.damping, &order)?,
        weight: arranged(weight, &order, &diagonal),
        order,
        error: vec![0.0; layout.out * options.block.min(layout.inputs)],
        solved: Solved {
            codes: vec![0; layout.len()],
            scale: vec![1.0; layout.groups],
            zero_point: vec![0.0; layout.groups],
        },
    };
    if !dynamic {
        let (scale, zero_point) = observed(observe, weight.to_vec(), layout.grouped())?;
        (walk.solved.scale, walk.solved.zero_point) = (scale, zero_point);
    }
    let group = dynamic.then_some(layout.group_len);
    for block in blocks(layout.inputs, options.block, group) {
        for start in block.clone().step_by(group.unwrap_or(block.len())) {
            if group.is_some_and(|group| start.is_multiple_of(group)) {
                walk.observe_groups_at(start, observe)?;
            }
            let end = group.map_or(block.end, |group| block.end.min(start + group));
            walk.round_columns(&(start..end), &block);
        }
        walk.update_behind(&block);
    }
    Ok(walk.solved)
}

fn check(
    weight: &[f32],
    layout: &GroupLayout,
    hessian: &Hessian,
    options: &GptqOptions,
    within_rows: bool,
) -> Result<()> {
    if layout.axis != GroupAxis::In {
        return Err(Error::usage(
            "GPTQ rounds groups along the inputs only, not along the outputs",
        )
        .fix("groups along the inputs"));
    }
    if options.act_order && within_rows && !options.static_groups {
        return Err(Error::usage(format!(
            "act_order with groups of {} weights in rows of {} needs static groups: the columns \
             of a group are not rounded one after the other",
            layout.group_len, layout.inputs
        ))
        .fix("static_groups = true"));
    }
    if options.block == 0 {
        return Err(Error::usage("block = 0 columns cannot be updated").fix("block = 128"));
    }
    if weight.len() != layout.len() {
        return Err(Error::failed(format!(
            "{} numbers for a weight of {} x {}",
            weight.len(),
            layout.out,
            layout.inputs
        )));
    }
    if hessian.size() != layout.inputs {
        return Err(Error::failed(format!(
            "the Hessian is of {} inputs, the weight has {}",
            hessian.size(),
            layout.inputs
        )));
    }
    Ok(())
}

/// The weight in f64 with its columns in `order`; zero where the input is dead.
fn arranged(weight: &[f32], order: &[usize], diagonal: &[f64]) -> Vec<f64> {
    let mut arranged = vec![0.0; weight.len()];
    let columns = order.len().max(1);
    let rows = arranged.par_chunks_mut(columns).zip(weight.par_chunks(columns));
    rows.for_each(|(to, from)| {
        for (w, column) in to.iter_mut().zip(order) {
            *w = if diagonal[*column] == 0.0 { 0.0 } else { f64::from(from[*column]) };
        }
    });
    arranged
}

/// Cuts `0..columns` into blocks of at most `block` columns. With dynamic groups a block holds
/// whole groups or lies within one: no group begins before all its columns are up to date.
fn blocks(columns: usize, block: usize, group: Option<usize>) -> Vec<Range<usize>> {
    let (span, width) = match group {
        Some(group) if group < block => (columns, block / group * group),
        Some(group) => (group, block),
        None => (columns, block),
    };
    let spans = (0..columns).step_by(span.max(1)).map(|start| start..columns.min(start + span));
    spans
        .flat_map(|span| {
            let end = span.end;
            span.step_by(width).map(move |start| start..end.min(start + width))
        })
        .collect()
}

/// Calls `observe` and checks what it says.
fn observed(
    observe: &Observe<'_>,
    weight: Vec<f32>,
    shape: [usize; 2],
) -> Result<(Vec<f32>, Vec<f32>)> {
    let (scale, zero_point) = observe(weight, shape)?;
    if scale.len() != shape[0] || zero_point.len() != shape[0] {
        return Err(Error::failed(format!(
            "the observer gave {} scales and {} zero points for {} groups",
            scale.len(),
            zero_point.len(),
            shape[0]
        )));
    }
    if let Some(s) = scale.iter().find(|s| !(s.is_finite() && **s > 0.0)) {
        return Err(Error::failed(format!("scale {s} is not a positive number")));
    }
    Ok((scale, zero_point))
}

/// The state of one pass over the columns. Columns are counted in `order`, except in `solved`.
struct Walk<'a> {
    layout: &'a GroupLayout,
    max_code: u8,
    upper: Mat<f64>,
    /// What is still to be rounded, `[out, in]` row-major, updated up to the current block.
    weight: Vec<f64>,
    order: Vec<usize>,
    /// The scaled errors of the current block, `[out, block]` row-major.
    error: Vec<f64>,
    solved: Solved,
}

impl Walk<'_> {
    /// Takes the grids of the groups that begin at column `start`, one in each row, from the
    /// weights as they now are. Columns are in their own order here.
    fn observe_groups_at(&mut self, start: usize, observe: &Observe<'_>) -> Result<()> {
        let GroupLayout { out, inputs, group_len, .. } = *self.layout;
        let rows = self.weight.chunks(inputs);
        let updated = rows.flat_map(|row| &row[start..start + group_len]).map(|w| *w as f32);
        let (scale, zero_point) = observed(observe, updated.collect(), [out, group_len])?;
        for (row, (scale, zero_point)) in scale.into_iter().zip(zero_point).enumerate() {
            let group = (row * inputs + start) / group_len;
            self.solved.scale[group] = scale;
            self.solved.zero_point[group] = zero_point;
        }
        Ok(())
    }

    /// Rounds `columns` in every row and makes their errors good in the rest of `block`.
    fn round_columns(&mut self, columns: &Range<usize>, block: &Range<usize>) {
        let GroupLayout { inputs, group_len, .. } = *self.layout;
        // The block's corner of U by rows: the inner loop runs along them.
        let width = block.len();
        let corner: Vec<f64> = (0..width * width)
            .map(|at| self.upper[(block.start + at / width, block.start + at % width)])
            .collect();
        let Solved { codes, scale, zero_point } = &mut self.solved;
        let (order, max_code) = (&self.order, f32::from(self.max_code));
        let rows = self.weight.par_chunks_mut(inputs).zip(codes.par_chunks_mut(inputs));
        let rows = rows.zip(self.error.par_chunks_mut(width));
        rows.enumerate().for_each(|(row, ((weight, codes), errors))| {
            let weight = &mut weight[block.clone()];
            for place in columns.start - block.start..columns.end - block.start {
                let column = order[block.start + place];
                let group = (row * inputs + column) / group_len;
                let (scale, zero_point) = (scale[group], zero_point[group]);
                let w = weight[place];
                let code = (w as f32 / scale).round_ties_even() + zero_point;
                let code = code.clamp(0.0, max_code);
                codes[column] = code as u8;
                let along = &corner[place * width..][..width];
                let error = (w - f64::from(scale * (code - zero_point))) / along[place];
                errors[place] = error;
                for (w, u) in weight[place + 1..].iter_mut().zip(&along[place + 1..]) {
                    *w -= error * u;
                }
            }
        });
    }

    /// Makes the errors of `block` good in all columns behind it.
    fn update_behind(&mut self, block: &Range<usize>) {
        let GroupLayout { out, inputs, .. } = *self.layout;
        let (behind, width) = (inputs - block.end, block.len());
        if behind == 0 {
            return;
        }
        let weight = MatMut::from_row_major_slice_mut(&mut self.weight, out, inputs);
        matmul(
            weight.subcols_mut(block.end, behind),
            Accum::Add,
            MatRef::from_row_major_slice(&self.error[..out * width], out, width),
            self.upper.as_ref().submatrix(block.start, block.end, width, behind),
            -1.0,
            Par::rayon(0),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: GptqOptions =
        GptqOptions { damping: 0.01, act_order: false, static_groups: false, block: 128 };

    /// Min-max grid of 8 levels with zero in the range.
    #[allow(clippy::needless_pass_by_value, clippy::unnecessary_wraps)] // the shape of `Observe`
    fn min_max(weight: Vec<f32>, [groups, len]: [usize; 2]) -> Result<(Vec<f32>, Vec<f32>)> {
        assert_eq!(weight.len(), groups * len);
        let grid = |group: &[f32]| {
            let (low, high) = group.iter().fold((0f32, 0f32), |(l, h), w| (l.min(*w), h.max(*w)));
            let scale = ((high - low) / 7.0).max(1e-8);
            (scale, (-(low / scale).round_ties_even()).clamp(0.0, 7.0))
        };
        Ok(weight.chunks(len).map(grid).unzip())
    }

    /// Numbers in -1..1 that need no generator crate.
    fn noise(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn layout(out: usize, inputs: usize, group_len: usize) -> GroupLayout {
        GroupLayout {
            out,
            inputs,
            groups: out * inputs / group_len,
            group_len,
            axis: GroupAxis::In,
        }
    }

    /// Inputs that share a few directions, each with its own size.
    fn correlated(inputs: usize, tokens: usize) -> Vec<f32> {
        let (shared, own) = (noise(tokens * 4, 5), noise(tokens * inputs, 6));
        let (mix, size) = (noise(inputs * 4, 7), noise(inputs, 8));
        let value = |t: usize, j: usize| {
            let common: f32 = (0..4).map(|k| shared[t * 4 + k] * mix[j * 4 + k]).sum();
            (common + 0.3 * own[t * inputs + j]) * (0.2 + size[j].abs())
        };
        (0..tokens * inputs).map(|at| value(at / inputs, at % inputs)).collect()
    }

    fn hessian(inputs: usize, rows: &[f32]) -> Hessian {
        let mut hessian = Hessian::new(inputs);
        hessian.add(rows);
        hessian
    }

    fn dequantized(solved: &Solved, layout: &GroupLayout) -> Vec<f32> {
        let value = |(at, code): (usize, &u8)| {
            let group = at / layout.group_len;
            solved.scale[group] * (f32::from(*code) - solved.zero_point[group])
        };
        solved.codes.iter().enumerate().map(value).collect()
    }

    fn rtn(weight: &[f32], layout: &GroupLayout) -> Solved {
        let (scale, zero_point) = min_max(weight.to_vec(), layout.grouped()).unwrap();
        let code = |(at, w): (usize, &f32)| {
            let group = at / layout.group_len;
            ((w / scale[group]).round_ties_even() + zero_point[group]).clamp(0.0, 7.0) as u8
        };
        let codes = weight.iter().enumerate().map(code).collect();
        Solved { codes, scale, zero_point }
    }

    fn output_error(weight: &[f32], solved: &Solved, layout: &GroupLayout, h: &Hessian) -> f64 {
        let values = dequantized(solved, layout);
        let error: Vec<f32> = weight.iter().zip(values).map(|(w, v)| w - v).collect();
        h.weighted_error(&error, layout.out)
    }

    #[test]
    fn two_columns_by_hand() {
        let h = hessian(2, &[1.0, 0.8, 0.5, 0.9, 1.2, 1.0]);
        let grid = |_: Vec<f32>, _: [usize; 2]| Ok((vec![0.5], vec![8.0]));
        let (w, layout) = ([0.34, -0.62], layout(1, 2, 2));
        let solved = gptq(&w, &layout, 15, &h, &PLAIN, &grid).unwrap();
        assert_eq!(dequantized(&solved, &layout), [0.5, -1.0]);
        // Over three tokens, without the Hessian's factor 2/3.
        assert!((output_error(&w, &solved, &layout, &h) * 1.5 - 0.124_724).abs() < 1e-6);
        let nearest = Solved { codes: vec![9, 7], ..solved };
        assert!((output_error(&w, &nearest, &layout, &h) * 1.5 - 0.198_224).abs() < 1e-6);
    }

    #[test]
    fn without_correlation_it_is_round_to_nearest() {
        let (out, inputs) = (9, 24);
        let unit: Vec<f32> =
            (0..inputs * inputs).map(|at| f32::from(u8::from(at % (inputs + 1) == 0))).collect();
        let (weight, h) = (noise(out * inputs, 1), hessian(inputs, &unit));
        for group_len in [4, 24, out * inputs] {
            let layout = layout(out, inputs, group_len);
            for (static_groups, act_order) in [(false, false), (true, false), (true, true)] {
                for block in [1, 5, 128] {
                    let options = GptqOptions { act_order, static_groups, block, ..PLAIN };
                    let solved = gptq(&weight, &layout, 7, &h, &options, &min_max).unwrap();
                    assert_eq!(solved, rtn(&weight, &layout), "{options:?}");
                }
            }
        }
    }

    #[test]
    fn the_output_error_is_below_that_of_round_to_nearest() {
        let (out, inputs) = (24, 96);
        let (weight, h) = (noise(out * inputs, 2), hessian(inputs, &correlated(inputs, 400)));
        for (group_len, act_order) in [(96, false), (96, true), (16, false), (16, true)] {
            let layout = layout(out, inputs, group_len);
            let options = GptqOptions { act_order, static_groups: act_order, ..PLAIN };
            let solved = gptq(&weight, &layout, 7, &h, &options, &min_max).unwrap();
            let found = output_error(&weight, &solved, &layout, &h);
            let nearest = output_error(&weight, &rtn(&weight, &layout), &layout, &h);
            assert!(found < 0.7 * nearest, "{found} {nearest}");
        }
    }

    #[test]
    fn act_order_is_a_permutation_of_the_columns() {
        let (out, inputs) = (7, 32);
        let (weight, rows) = (noise(out * inputs, 3), correlated(inputs, 200));
        let h = hessian(inputs, &rows);
        let mut order: Vec<usize> = (0..inputs).collect();
        let diagonal = h.diagonal();
        order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
        let permuted = |values: &[f32]| -> Vec<f32> {
            values.chunks(inputs).flat_map(|row| order.iter().map(|j| row[*j])).collect()
        };
        let layout = layout(out, inputs, inputs);
        let ordered = GptqOptions { act_order: true, ..PLAIN };
        let found = gptq(&weight, &layout, 7, &h, &ordered, &min_max).unwrap();
        let by_hand = hessian(inputs, &permuted(&rows));
        let by_hand = gptq(&permuted(&weight), &layout, 7, &by_hand, &PLAIN, &min_max).unwrap();
        for (row, expected) in found.codes.chunks(inputs).zip(by_hand.codes.chunks(inputs)) {
            assert!(order.iter().zip(expected).all(|(j, code)| row[*j] == *code));
        }
    }

    #[test]
    fn blocks_change_nothing() {
        let (out, inputs) = (5, 240);
        let (weight, h) = (noise(out * inputs, 4), hessian(inputs, &correlated(inputs, 300)));
        for group_len in [6, 48, 80, 120, 240] {
            let layout = layout(out, inputs, group_len);
            let solve = |block| {
                let options = GptqOptions { block, ..PLAIN };
                gptq(&weight, &layout, 7, &h, &options, &min_max).unwrap()
            };
            let expected = solve(1);
            for block in [7, 50, 128, 1000] {
                let found = solve(block);
                assert_eq!(found.codes, expected.codes, "groups of {group_len}, blocks of {block}");
            }
        }
    }

    #[test]
    fn blocks_never_cut_into_a_group_and_beyond() {
        assert_eq!(blocks(10, 4, None), [0..4, 4..8, 8..10]);
        assert_eq!(blocks(12, 5, Some(2)), [0..4, 4..8, 8..12]);
        assert_eq!(blocks(12, 4, Some(6)), [0..4, 4..6, 6..10, 10..12]);
        assert_eq!(blocks(12, 4, Some(4)), [0..4, 4..8, 8..12]);
    }

    #[test]
    fn a_dead_column_becomes_zero_and_disturbs_nothing() {
        let (out, inputs, dead) = (4, 16, 5);
        let mut rows = correlated(inputs, 100);
        rows.iter_mut().skip(dead).step_by(inputs).for_each(|x| *x = 0.0);
        let (mut weight, h) = (noise(out * inputs, 9), hessian(inputs, &rows));
        let layout = layout(out, inputs, inputs);
        let grid = |_: Vec<f32>, shape: [usize; 2]| Ok((vec![0.3; shape[0]], vec![4.0; shape[0]]));
        let found = gptq(&weight, &layout, 7, &h, &PLAIN, &grid).unwrap();
        assert!(found.codes.iter().skip(dead).step_by(inputs).all(|code| *code == 4));
        weight.iter_mut().skip(dead).step_by(inputs).for_each(|w| *w = 100.0);
        assert_eq!(gptq(&weight, &layout, 7, &h, &PLAIN, &grid).unwrap(), found);
    }

    #[test]
    fn wrong_settings_are_said() {
        let (weight, h) = (noise(16, 1), hessian(8, &noise(800, 2)));
        let ask = |layout: &GroupLayout, options: &GptqOptions, weight: &[f32]| {
            gptq(weight, layout, 7, &h, options, &min_max).unwrap_err().to_string()
        };
        let ordered = GptqOptions { act_order: true, ..PLAIN };
        let text = ask(&layout(2, 8, 4), &ordered, &weight);
        assert!(text.contains("static_groups = true"), "{text}");
        let across = GroupLayout { axis: GroupAxis::Out, ..layout(2, 8, 2) };
        assert!(ask(&across, &PLAIN, &weight).contains("along the inputs only"));
        let text = ask(&layout(2, 8, 4), &GptqOptions { block: 0, ..PLAIN }, &weight);
        assert!(text.contains("block"), "{text}");
        assert!(ask(&layout(2, 8, 8), &PLAIN, &weight[1..]).contains("15 numbers"));
        assert!(ask(&layout(4, 4, 4), &PLAIN, &weight).contains("Hessian is of 8 inputs"));
        let bad = |_: Vec<f32>, shape: [usize; 2]| Ok((vec![0.0; shape[0]], vec![0.0; shape[0]]));
        let error = gptq(&weight, &layout(2, 8, 8), 7, &h, &PLAIN, &bad).unwrap_err();
        assert!(error.to_string().contains("not a positive number"));
    }
}
