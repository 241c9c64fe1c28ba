//! Quantizers whose codes follow from the step.

use burn::tensor::Tensor;
use fewbit::ops::{Rule, Stepped, TieRule};
use proptest::prelude::*;

use crate::{Dice, Matrix, Outcome, Sum, bits, both, cases, close, host, length, same};

/// Sums of f32 products without an exponential.
const TOLERANCE: f64 = 2e-6;
pub(crate) const MARGIN: f32 = 0.01;

#[derive(Debug)]
pub(crate) struct SteppedCase {
    rule: Rule,
    /// weight, step, zero point, offsets of the rounding.
    pub(crate) inputs: [Matrix; 4],
    offsets: bool,
    step_gradient: f64,
    upstream: Vec<f32>,
}

impl SteppedCase {
    pub(crate) fn new(rule: Rule, len: usize, groups: usize, offsets: bool, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let real_zero = dice.below(2) == 0;
        // Quotients by a power of two are exact, so that ties and bounds are met.
        let step = dice.one_of(&[0.25, 0.25, 0.013, 3e-4, 1e-12]);
        let steps: Vec<f32> = match step {
            0.25 => (0..groups).map(|_| dice.one_of(&[0.0625, 0.25, 1.0])).collect(),
            _ => (0..groups).map(|_| step * (0.5 + dice.unit())).collect(),
        };
        let zero = |dice: &mut Dice| match rule {
            Rule::Affine { max_code } if real_zero => max_code * dice.unit(),
            Rule::Affine { max_code } => dice.below(max_code as usize + 1) as f32,
            Rule::Lsq { middle } => middle,
            Rule::Seq { .. } => 1.5,
            Rule::Ternary { .. } => 1.0,
            Rule::Sign => 0.5,
        };
        let zeros = (0..groups).map(|_| zero(&mut dice)).collect();
        let (special, wide) = Self::special(rule);
        let ratio = |dice: &mut Dice| match dice.below(8) {
            0 => 0.0,
            1 => 1e4 * dice.normal(),
            2 | 3 => dice.one_of(&special),
            _ => wide * dice.normal(),
        };
        let weight = |i: usize| match dice.below(50) {
            0 => f32::MAX, // its ratio is infinite where steps are small
            _ => ratio(&mut dice) * steps[i / len],
        };
        let weight = (0..groups * len).map(weight).collect();
        let offset = |dice: &mut Dice| match dice.below(4) {
            0 => dice.one_of(&[-0.5, 0.0, 0.5]),
            _ => 0.25 * dice.normal(),
        };
        let offset_values = (0..groups * len).map(|_| offset(&mut dice)).collect();
        Self {
            rule,
            inputs: [
                Matrix::new([groups, len], weight),
                Matrix::column(steps),
                Matrix::column(zeros),
                Matrix::new([groups, len], offset_values),
            ],
            offsets,
            step_gradient: dice.one_of(&[1.0, 0.037]),
            upstream: dice.noise(groups * len, 1.0),
        }
    }

    /// Ratios on ties and bounds, and the size of ordinary ones.
    fn special(rule: Rule) -> (Vec<f32>, f32) {
        match rule {
            Rule::Affine { max_code } => {
                let tie = max_code.min(8.0) - 0.5;
                (vec![-tie, -1.5, -0.5, 0.5, 2.5, tie, max_code, -max_code], 0.4 * max_code)
            }
            Rule::Lsq { middle } => {
                (vec![-middle - 0.5, -middle, -0.5, 1.5, middle - 1.0, middle - 0.5], 0.6 * middle)
            }
            Rule::Seq { .. } | Rule::Ternary { .. } => {
                let bound = 1.0 - MARGIN;
                (vec![-bound, -0.5, -1.0 / 3.0, 1.0 / 3.0, 0.25, 0.5, bound, 1.0], 0.6)
            }
            Rule::Sign => (vec![-1.0, -0.0, 1.0, 1e-30, -1e-30], 0.8),
        }
    }

    pub(crate) fn operation(&self, inputs: [Tensor<2>; 4]) -> Stepped {
        let [weight, step, zero_point, rounding] = inputs;
        Stepped {
            rounding: self.offsets.then_some(rounding),
            step_gradient: self.step_gradient,
            ..Stepped::new(weight, step, zero_point, self.rule)
        }
    }

    /// The code at `u`, and whether a gradient passes there. In f32 as in the definition, so that
    /// ties are where they are.
    fn code(&self, u: f32, z: f32) -> (f32, bool) {
        let bound = 1.0 - MARGIN;
        match self.rule {
            Rule::Affine { max_code } => {
                let code = u.round_ties_even() + z;
                (code.clamp(0.0, max_code), (0.0..=max_code).contains(&code))
            }
            Rule::Lsq { middle } => {
                let bounds = -middle..=middle - 1.0;
                let code = u.clamp(*bounds.start(), *bounds.end()).round_ties_even() + middle;
                (code, bounds.contains(&u))
            }
            Rule::Seq { ties, .. } => {
                let x = u.clamp(-bound, bound) * 2.0 - 0.5;
                let level = match ties {
                    TieRule::HalfEven => x.round_ties_even(),
                    TieRule::HalfUp => (x + 0.5).floor(),
                };
                (level + 2.0, u.abs() <= bound)
            }
            Rule::Ternary { .. } => {
                ((u.clamp(-bound, bound) * 1.5).round_ties_even() + 1.0, u.abs() <= bound)
            }
            Rule::Sign => (if u < 0.0 { 0.0 } else { 1.0 }, u.abs() <= 1.0),
        }
    }

    /// Codes, values, and the gradients of the inputs.
    fn exact(&self) -> (Vec<f32>, Vec<Sum>, [Vec<Sum>; 4]) {
        let [weight, step, zero_point, rounding] = &self.inputs;
        // Of the distance of levels to the step.
        let factor = match self.rule {
            Rule::Affine { .. } | Rule::Lsq { .. } => 1.0,
            Rule::Seq { .. } => 0.5,
            Rule::Ternary { .. } => 2.0 / 3.0,
            Rule::Sign => 2.0,
        };
        let (mut codes, mut values) = (Vec::new(), Vec::new());
        let mut gradients =
            self.inputs.each_ref().map(|input| vec![Sum::default(); input.values.len()]);
        for (i, w) in weight.values.iter().enumerate() {
            let group = i / weight.shape[1];
            let (delta, z) = (step.values[group], zero_point.values[group]);
            let u = if self.offsets { w / delta + rounding.values[i] } else { w / delta };
            let (code, inside) = self.code(u, z);
            let [w, delta, z, level] = [*w, delta, z, code].map(f64::from);
            let g = f64::from(self.upstream[i]);
            codes.push(code);
            values.push([level, -z].into_iter().collect::<Sum>().times(factor * delta));
            gradients[1][group].add(g * factor * level * self.step_gradient);
            gradients[1][group].add(-g * factor * z * self.step_gradient);
            if inside {
                gradients[0][i].add(g);
                gradients[3][i].add(g * delta);
                if self.rule != Rule::Sign {
                    gradients[1][group].add(-g * w / delta * self.step_gradient);
                }
            }
            if !(inside && matches!(self.rule, Rule::Affine { .. })) {
                gradients[2][group].add(-g * factor * delta);
            }
        }
        (codes, values, gradients)
    }

    fn check(&self) {
        let (codes, values, mut gradients) = self.exact();
        if !self.offsets {
            gradients[3].clear();
        }
        let plain = || self.operation(self.inputs.each_ref().map(Matrix::plain));
        let [fused, composed] = both(|| host(plain().codes()));
        assert_eq!(bits(&fused), bits(&composed), "codes");
        assert_eq!(fused, codes);
        let stands_for = |(i, code): (usize, &f32)| {
            let group = i / self.inputs[0].shape[1];
            let [_, step, zero_point, _] = &self.inputs;
            self.rule.scale(step.values[group]) * (code - zero_point.values[group])
        };
        let dequantized: Vec<f32> = fused.iter().enumerate().map(stands_for).collect();
        let f = |inputs: [Tensor<2>; 4]| self.operation(inputs).values();
        let [fused, composed] = Outcome::both(&self.inputs, &self.upstream, f);
        same("values", &fused.values, &composed.values);
        same("what codes stand for", &fused.values, &dequantized);
        for (i, name) in [(0, "weight"), (3, "rounding")] {
            same(name, &fused.gradients[i], &composed.gradients[i]);
        }
        for (form, found) in [("fused", fused), ("composed", composed)] {
            close(&format!("{form} values"), &found.values, &values, TOLERANCE);
            for (i, name) in ["weight", "step", "zero point", "rounding"].iter().enumerate() {
                close(&format!("{form} {name}"), &found.gradients[i], &gradients[i], TOLERANCE);
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn stepped(
        rule in prop::sample::select(vec![
            Rule::Affine { max_code: 3.0 },
            Rule::Affine { max_code: 15.0 },
            Rule::Affine { max_code: 255.0 },
            Rule::Lsq { middle: 2.0 },
            Rule::Lsq { middle: 8.0 },
            Rule::Seq { margin: MARGIN, ties: TieRule::HalfEven },
            Rule::Seq { margin: MARGIN, ties: TieRule::HalfUp },
            Rule::Ternary { margin: MARGIN },
            Rule::Sign,
        ]),
        len in length(),
        groups in 1usize..5,
        offsets in any::<bool>(),
        seed in any::<u64>(),
    ) {
        SteppedCase::new(rule, len, groups, offsets, seed).check();
    }
}
