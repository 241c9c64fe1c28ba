//! Quantizers with learned division, FlexRound's and LRQ's, and the exponential they share.

use burn::tensor::{Device, Tensor};
use fewbit::ops::{self, Divided};
use proptest::prelude::*;

use crate::{
    Dice, Matrix, Outcome, Sum, both, cases, close, host, length, on_processor, place, same,
};

/// Of values and gradients, relative: `e^x` and its argument are rounded.
const TOLERANCE: f64 = 1e-5;
/// What codes may come out differently by, relative: ratios nearer to a tie are moved.
const TIE: f64 = 3e-5;

/// FlexRound's parameters, or LRQ's.
#[derive(Debug)]
pub(crate) struct DividedCase {
    weight: Matrix,
    zero_point: Matrix,
    max_code: u8,
    /// log_scale, log_division, log_row, and log_column where there are columns.
    pub(crate) inputs: [Matrix; 4],
    columns: bool,
    /// Of the values.
    upstream: Vec<f32>,
}

impl DividedCase {
    /// `out` rows of `sharing` groups each.
    pub(crate) fn new(len: usize, out: usize, sharing: usize, columns: bool, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let groups = out * sharing;
        let max_code = dice.one_of(&[3u8, 7, 15, 255]);
        let zero_point = (0..groups).map(|_| dice.below(usize::from(max_code) + 1) as f32);
        let zero_point = Matrix::column(zero_point.collect());
        let log_step = dice.one_of(&[-27.0, -6.0, -3.5, 0.0]);
        let log_scale = (0..groups).map(|_| log_step + 0.5 * dice.normal()).collect();
        let spread = dice.one_of(&[0.0, 0.1, 0.5]);
        let mut case = Self {
            inputs: [
                Matrix::column(log_scale),
                dice.matrix([groups, len], spread),
                dice.matrix([out, 1], spread),
                dice.matrix([1, sharing * len], spread),
            ],
            weight: Matrix::new([groups, len], vec![1.0; groups * len]),
            zero_point,
            max_code,
            columns,
            upstream: dice.noise(groups * len, 1.0),
        };
        for i in 0..groups * len {
            let wide = 0.3 * f32::from(max_code);
            let ratio = match dice.below(8) {
                0 => 0.0,
                1 => 1e4 * dice.normal(),
                _ => wide * dice.normal(),
            };
            case.weight.values[i] = (f64::from(ratio) / case.ratio(i)) as f32;
            if dice.below(50) == 0 {
                case.weight.values[i] = f32::MAX; // its ratio is infinite where steps are small
            }
            // A ratio in reach of the codes, but beside a tie, may round either way.
            while {
                let ratio = case.ratio(i).abs();
                ratio < 600.0 && (ratio.fract() - 0.5).abs() < TIE * ratio.max(1.0)
            } {
                case.weight.values[i] *= 1.05;
            }
        }
        case
    }

    /// `W / exp(θ)`.
    fn ratio(&self, i: usize) -> f64 {
        let [log_scale, log_division, log_row, log_column] = &self.inputs;
        let len = self.weight.shape[1];
        let sharing = self.weight.shape[0] / log_row.shape[0];
        let group = i / len;
        let mut theta = f64::from(log_division.values[i]) + log_scale.at(group, 0);
        theta += log_row.at(group / sharing, 0);
        if self.columns {
            theta += log_column.at(0, group % sharing * len + i % len);
        }
        f64::from(self.weight.values[i]) / theta.exp()
    }

    pub(crate) fn operation(&self, device: &Device, inputs: [Tensor<2>; 4]) -> Divided {
        let [log_scale, log_division, log_row, log_column] = inputs;
        Divided {
            weight: self.weight.on(device),
            base: None,
            log_scale,
            log_division,
            log_row,
            log_column: self.columns.then_some(log_column),
            zero_point: self.zero_point.on(device),
            max_code: self.max_code,
        }
    }

    fn plain(&self) -> Divided {
        self.operation(&place(), self.inputs.each_ref().map(Matrix::plain))
    }

    fn codes(&self) -> Vec<f32> {
        host(self.plain().codes())
    }

    /// The values, and what codes, scale and zero point stand for.
    fn dequantized(&self) -> [Vec<f32>; 2] {
        let scale = host(ops::exp(self.inputs[0].plain()));
        let stands_for = |(i, code): (usize, f32)| {
            let group = i / self.weight.shape[1];
            scale[group] * (code - self.zero_point.values[group])
        };
        let codes = self.codes().into_iter().enumerate();
        [host(self.plain().values()), codes.map(stands_for).collect()]
    }

    /// Values, and the gradients of the inputs, in f64.
    fn exact(&self) -> (Vec<Sum>, [Vec<Sum>; 4]) {
        let [groups, len] = self.weight.shape;
        let sharing = groups / self.inputs[2].shape[0];
        let top = f64::from(self.max_code);
        let mut values = Vec::new();
        let mut gradients =
            self.inputs.each_ref().map(|input| vec![Sum::default(); input.values.len()]);
        for i in 0..groups * len {
            let group = i / len;
            let (scale, z) = (self.inputs[0].at(group, 0).exp(), self.zero_point.at(group, 0));
            let (ratio, g) = (self.ratio(i), f64::from(self.upstream[i]));
            let code = ratio.round_ties_even() + z;
            values.push(Sum::from(scale * (code.clamp(0.0, top) - z)));
            gradients[0][group].add(g * scale * (code.clamp(0.0, top) - z));
            if (0.0..=top).contains(&code) {
                let division = -g * scale * ratio;
                let column = group % sharing * len + i % len;
                for (input, at) in [(0, group), (1, i), (2, group / sharing), (3, column)] {
                    gradients[input][at].add(division);
                }
            }
        }
        (values, gradients)
    }

    fn check(&self) {
        let [codes, composed] = both(|| self.codes());
        assert_eq!(codes, composed);
        for [values, dequantized] in both(|| self.dequantized()) {
            same("dequantized", &values, &dequantized);
        }
        let device = place().autodiff();
        let f = |inputs: [Tensor<2>; 4]| self.operation(&device, inputs).values();
        let (values, mut gradients) = self.exact();
        if !self.columns {
            gradients[3].clear();
        }
        for (form, found) in
            ["fused", "composed"].iter().zip(Outcome::both(&self.inputs, &self.upstream, f))
        {
            close(&format!("{form} values"), &found.values, &values, TOLERANCE);
            let names = ["log_scale", "log_division", "log_row", "log_column"];
            for (name, (found, exact)) in names.iter().zip(found.gradients.iter().zip(&gradients)) {
                close(&format!("{form} {name}"), found, exact, TOLERANCE);
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn flexround(len in length(), out in 1usize..4, sharing in 1usize..4, seed in any::<u64>()) {
        DividedCase::new(len, out * sharing, 1, false, seed).check();
        DividedCase::new(len, out, sharing, false, seed).check();
    }

    #[test]
    fn lrq(len in length(), out in 1usize..4, sharing in 1usize..4, seed in any::<u64>()) {
        DividedCase::new(len, out, sharing, true, seed).check();
    }

    #[test]
    fn exponential(len in length(), rows in 1usize..4, seed in any::<u64>()) {
        let mut dice = Dice::new(seed);
        let size = dice.one_of(&[0.1, 3.0, 25.0]);
        let mut x = dice.matrix([rows, len], size);
        x.values.iter_mut().for_each(|x| *x = x.clamp(-85.0, 85.0));
        let upstream = dice.noise(rows * len, 1.0);
        let exact: Vec<f64> = x.values.iter().map(|x| f64::from(*x).exp()).collect();
        let values: Vec<Sum> = exact.iter().map(|y| Sum::from(*y)).collect();
        let gradient = exact.iter().zip(&upstream).map(|(y, g)| Sum::from(y * f64::from(*g)));
        let gradient: Vec<Sum> = gradient.collect();
        // Vulkan asks no more of a device than 3 + 2 |x| units in the last place.
        let largest = x.values.iter().fold(0.0f32, |max, x| max.max(x.abs()));
        let of_vulkan = f64::from((3.0 + 2.0 * largest) * f32::EPSILON);
        let tolerance = if on_processor() { 3e-7 } else { of_vulkan };
        for found in Outcome::both(&[x], &upstream, |[x]| ops::exp(x)) {
            close("values", &found.values, &values, tolerance);
            close("gradient", &found.gradients[0], &gradient, tolerance);
        }
    }
}
