//! Every quantizer whose codes follow from the weight in units of a step.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set

use super::super::rows;
use super::{affine_code, reduce_rows};
use crate::ops::fake_quant::Output;
use crate::ops::vector::{self, Level, at};
use crate::ops::{Rule, TieRule};

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
pub(in crate::ops::kernel) fn code_of(rule: Rule, u: f32, z: f32) -> f32 {
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

/// The body for each rule by itself, so that the rule is matched once for a row, not for every weight.
macro_rules! by_rule {
    ($rule:ident, $body:expr) => {
        match $rule {
            Rule::Affine { max_code } => by_rule!($rule = Rule::Affine { max_code }, $body),
            Rule::Lsq { middle } => by_rule!($rule = Rule::Lsq { middle }, $body),
            Rule::Seq { margin, ties: TieRule::HalfEven } => {
                by_rule!($rule = Rule::Seq { margin, ties: TieRule::HalfEven }, $body)
            }
            Rule::Seq { margin, ties: TieRule::HalfUp } => {
                by_rule!($rule = Rule::Seq { margin, ties: TieRule::HalfUp }, $body)
            }
            Rule::Ternary { margin } => by_rule!($rule = Rule::Ternary { margin }, $body),
            Rule::Sign => by_rule!($rule = Rule::Sign, $body),
        }
    };
    ($rule:ident = $one:expr, $body:expr) => {{
        let $rule = $one;
        $body
    }};
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
    by_rule!(rule, {
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
    });
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
    by_rule!(rule, {
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
    })
}

#[cfg(test)]
mod tests {
    use super::super::sample::{SHAPES, ratios};
    use super::*;
    use crate::ops::kernel::sample::{assert_same, bits, noise};

    const RULES: [Rule; 6] = [
        Rule::Affine { max_code: 15.0 },
        Rule::Lsq { middle: 8.0 },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfEven },
        Rule::Seq { margin: 0.01, ties: TieRule::HalfUp },
        Rule::Ternary { margin: 0.01 },
        Rule::Sign,
    ];

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
                    forwards.iter().chain(&gradients).map(|values| bits(values)).collect::<Vec<_>>()
                });
            }
        }
    }
}
