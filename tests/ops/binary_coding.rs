//! Binary-coding grids: values of codes, nearest levels, and UniQuanF's mapping.

use burn::tensor::Tensor;
use fewbit::ops::{self, CodedKind, CodedMatrix, PackedCodes, Unified};
use proptest::prelude::*;

use crate::{Dice, Matrix, Outcome, Sum, both, cases, close, host, length, place, same};

fn codes(dice: &mut Dice, shape: [usize; 2], bits: usize) -> Matrix {
    Matrix::new(shape, (0..shape[0] * shape[1]).map(|_| dice.below(1 << bits) as f32).collect())
}

fn sign(code: f32, bit: usize) -> f32 {
    if code as usize >> bit & 1 == 1 { 1.0 } else { -1.0 }
}

/// The level of a code.
fn level(code: f32, alpha: &[f32]) -> f32 {
    alpha.iter().enumerate().map(|(bit, a)| sign(code, bit) * a).sum()
}

/// Scales of planes whose levels all differ, and that are sums without a rounding error.
fn planes(dice: &mut Dice, groups: usize, bits: usize) -> Matrix {
    let mut one = |i: usize| {
        let size = (1 << (i % bits)) as f32 + (dice.below(17) as f32 - 8.0) / 64.0;
        if dice.below(4) == 0 { -size } else { size }
    };
    Matrix::new([groups, bits], (0..groups * bits).map(&mut one).collect())
}

#[derive(Debug)]
pub(crate) struct UnifiedCase {
    weight: Matrix,
    codes: Matrix,
    /// log_scale, log_division, log_row, alpha.
    pub(crate) inputs: [Matrix; 4],
    zero_unified: Matrix,
    middle: Matrix,
    filter: bool,
    upstream: Vec<f32>,
}

impl UnifiedCase {
    pub(crate) fn new(len: usize, groups: usize, width: usize, filter: bool, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let shape = [groups, len];
        let log_step = dice.one_of(&[-27.0, -5.0, 0.0]);
        let log_scale = (0..groups).map(|_| log_step + 0.3 * dice.normal()).collect();
        let spread = dice.one_of(&[0.0, 0.2]);
        let mut sixteenths = || (0..groups).map(|_| dice.below(65) as f32 / 16.0 - 2.0).collect();
        let (zero_unified, middle) = (Matrix::column(sixteenths()), Matrix::column(sixteenths()));
        let mut case = Self {
            weight: Matrix::new(shape, vec![1.0; groups * len]),
            codes: codes(&mut dice, shape, width),
            inputs: [
                Matrix::column(log_scale),
                dice.matrix(shape, spread),
                dice.matrix([groups, 1], spread),
                planes(&mut dice, groups, width),
            ],
            zero_unified,
            middle,
            filter,
            upstream: dice.noise(groups * len, 1.0),
        };
        for i in 0..groups * len {
            let ratio = match dice.below(8) {
                0 => 0.0,
                1 => 1e4 * dice.normal(),
                _ => (1 << width) as f32 * dice.normal(),
            };
            case.weight.values[i] = (f64::from(ratio) / case.ratio(i)) as f32;
            if filter && dice.below(50) == 0 {
                case.weight.values[i] = f32::MAX; // its ratio is infinite where steps are small
            }
            // Beside a border the exponential's last bit decides.
            while case.weight.values[i] != 0.0 && case.beside_a_border(i) {
                case.weight.values[i] *= 1.02;
            }
        }
        case
    }

    /// `W / exp(δ + D + d)`.
    fn ratio(&self, i: usize) -> f64 {
        let [log_scale, log_division, log_row, _] = &self.inputs;
        let group = i / self.weight.shape[1];
        let log_step = log_scale.at(group, 0) + log_row.at(group, 0);
        f64::from(self.weight.values[i]) / (f64::from(log_division.values[i]) + log_step).exp()
    }

    fn shift(&self, group: usize) -> f64 {
        self.zero_unified.at(group, 0) - self.middle.at(group, 0)
    }

    /// Smallest plane of a group.
    fn reach(&self, group: usize) -> f64 {
        let alpha = self.inputs[3].row(group);
        f64::from(alpha.iter().fold(f32::INFINITY, |least, a| least.min(a.abs())))
    }

    /// A group's levels in order, each with its code.
    fn levels(&self, group: usize) -> Vec<(f32, f32)> {
        let alpha = self.inputs[3].row(group);
        let codes = (0..1 << alpha.len()).map(|code| code as f32);
        let mut levels: Vec<(f32, f32)> = codes.map(|code| (level(code, alpha), code)).collect();
        levels.sort_by(|a, b| a.0.total_cmp(&b.0));
        levels
    }

    fn beside_a_border(&self, i: usize) -> bool {
        let group = i / self.weight.shape[1];
        let position = self.ratio(i) + self.shift(group);
        let here = f64::from(level(self.codes.values[i], self.inputs[3].row(group)));
        let filter = ((position - here).abs() - self.reach(group)).abs();
        let levels = self.levels(group);
        let middles = levels.windows(2).map(|pair| f64::from(f32::midpoint(pair[0].0, pair[1].0)));
        middles.map(|middle| (position - middle).abs()).fold(filter, f64::min) < 1e-4
    }

    fn unified(&self, inputs: [Tensor<2>; 4]) -> Unified {
        let [log_scale, log_division, log_row, alpha] = inputs;
        let constant = |matrix: &Matrix| matrix.on(&alpha.device());
        let (zero_unified, middle) = (constant(&self.zero_unified), constant(&self.middle));
        Unified { log_scale, log_division, log_row, alpha, zero_unified, middle }
    }

    pub(crate) fn map(&self, inputs: [Tensor<2>; 4]) -> Tensor<2> {
        let device = inputs[0].device();
        let (weight, codes) = (self.weight.on(&device), self.codes.on(&device));
        self.unified(inputs).map(weight, &codes, self.filter)
    }

    /// The values, and what the codes stand for on the folded grid.
    fn dequantized(&self) -> [Vec<f32>; 2] {
        let inputs = || self.inputs.each_ref().map(Matrix::plain);
        let (alpha, offset) = self.unified(inputs()).folded();
        let [_, len] = self.codes.shape;
        let codes: Vec<u8> = self.codes.values.iter().map(|code| *code as u8).collect();
        let codes = PackedCodes::pack(&codes, len, alpha.dims()[1] as u8);
        let matrix = CodedMatrix::new(codes, len, CodedKind::BinaryCoding, false, &place());
        let dequantized = matrix.weight(alpha, offset);
        [self.map(inputs()), dequantized].map(host)
    }

    /// Values, and the gradients of the inputs, in f64.
    fn exact(&self) -> (Vec<Sum>, [Vec<Sum>; 4]) {
        let len = self.weight.shape[1];
        let mut values = Vec::new();
        let mut gradients =
            self.inputs.each_ref().map(|input| vec![Sum::default(); input.values.len()]);
        for (i, code) in self.codes.values.iter().enumerate() {
            let group = i / len;
            let alpha = self.inputs[3].row(group);
            let (scale, shift) = (self.inputs[0].at(group, 0).exp(), self.shift(group));
            let g = f64::from(self.upstream[i]);
            let terms = alpha.iter().enumerate().map(|(bit, a)| f64::from(sign(*code, bit) * a));
            let here: Sum = terms.chain([-shift]).collect();
            values.push(here.times(scale));
            gradients[0][group].add(g * scale * here.value);
            let (ratio, off) = (self.ratio(i), self.ratio(i) - here.value);
            if !self.filter || off.abs() <= self.reach(group) {
                for (input, at) in [(0, group), (1, i), (2, group)] {
                    gradients[input][at].add(-g * scale * ratio);
                }
                for bit in 0..alpha.len() {
                    let plane = group * alpha.len() + bit;
                    gradients[3][plane].add(g * scale * f64::from(sign(*code, bit)));
                }
            }
        }
        (values, gradients)
    }

    /// Codes of the nearest levels; with `around`, at most a neighbour in order.
    fn nearest(&self, around: bool) -> Vec<f32> {
        let nearest = |(i, present): (usize, &f32)| {
            let group = i / self.weight.shape[1];
            let position = self.ratio(i) + self.shift(group);
            let levels = self.levels(group);
            let rank =
                levels.iter().position(|(_, code)| code.to_bits() == present.to_bits()).unwrap();
            let candidates = if around {
                rank.saturating_sub(1)..(rank + 2).min(levels.len())
            } else {
                0..levels.len()
            };
            let distance = |rank: usize| (position - f64::from(levels[rank].0)).abs();
            // The last of two: the greater level wins a tie.
            levels[candidates.rev().min_by(|a, b| distance(*a).total_cmp(&distance(*b))).unwrap()].1
        };
        self.codes.values.iter().enumerate().map(nearest).collect()
    }
}

proptest! {
    #![proptest_config(cases(192))]

    #[test]
    fn mapping(
        len in length(),
        groups in 1usize..5,
        width in 1usize..=4,
        filter in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let case = UnifiedCase::new(len, groups, width, filter, seed);
        for [values, dequantized] in both(|| case.dequantized()) {
            let unsigned = |x: Vec<f32>| x.into_iter().map(|x| x + 0.0).collect::<Vec<f32>>();
            same("dequantized", &unsigned(values), &unsigned(dequantized)); // a zero's sign aside
        }
        let (values, gradients) = case.exact();
        for found in Outcome::both(&case.inputs, &case.upstream, |inputs| case.map(inputs)) {
            close("values", &found.values, &values, 1e-5);
            let names = ["log_scale", "log_division", "log_row", "alpha"];
            for (name, (found, exact)) in names.iter().zip(found.gradients.iter().zip(&gradients)) {
                close(name, found, exact, 1e-5);
            }
        }
    }

    #[test]
    fn nearest_levels(
        len in length(),
        groups in 1usize..5,
        width in 1usize..=4,
        seed in any::<u64>(),
    ) {
        let case = UnifiedCase::new(len, groups, width, false, seed);
        let unified = case.unified(case.inputs.each_ref().map(Matrix::plain));
        let present = case.codes.plain();
        for around in [None, Some(&present)] {
            let expected = case.nearest(around.is_some());
            for found in both(|| host(unified.nearest(case.weight.plain(), around))) {
                prop_assert_eq!(&found, &expected);
            }
        }
    }

    #[test]
    fn nearest_levels_at_ties(groups in 1usize..5, width in 1usize..=4, seed in any::<u64>()) {
        let alpha = planes(&mut Dice::new(seed), groups, width);
        let count = 1 << width;
        let mut middles = Vec::new();
        let mut expected = Vec::new();
        for group in 0..groups {
            let mut levels: Vec<(f32, f32)> =
                (0..count).map(|c| (level(c as f32, alpha.row(group)), c as f32)).collect();
            levels.sort_by(|a, b| a.0.total_cmp(&b.0));
            middles.extend(levels.windows(2).map(|pair| f32::midpoint(pair[0].0, pair[1].0)));
            expected.extend(levels[1..].iter().map(|(_, code)| *code));
        }
        let middles = Matrix::new([groups, count - 1], middles);
        for found in both(|| host(ops::nearest_codes(&middles.plain(), &alpha.plain(), None))) {
            prop_assert_eq!(&found, &expected);
        }
    }
}
