//! Packed codes on a learned grid: weights, products, and gradients of inputs and grid.

use burn::tensor::{Device, Tensor};
use fewbit::ops::{CodedKind, CodedMatrix, FrozenGrid, PackedCodes, continuing};
use proptest::prelude::*;

use crate::{Dice, Matrix, Outcome, Sum, cases, close, host, place, same};

#[derive(Debug)]
struct Case {
    /// `[rows, columns]`, as stored.
    codes: Vec<u8>,
    shape: [usize; 2],
    group_len: usize,
    width: u8,
    kind: CodedKind,
    transposed: bool,
    /// x, scale, shift.
    inputs: [Matrix; 3],
    upstream: Vec<f32>,
}

const TOKENS: usize = 3;

impl Case {
    fn new(kind: CodedKind, width: u8, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let part = dice.one_of(&[1, 5, 16, 33]);
        let rows = 1 + dice.below(5);
        let columns = part * (1 + dice.below(3));
        // Parts of rows, rows, or the whole matrix.
        let group_len = dice.one_of(&[part, columns, columns, rows * columns]);
        let transposed = dice.below(3) == 0;
        let [inputs, out] = if transposed { [rows, columns] } else { [columns, rows] };
        let groups = rows * columns / group_len;
        let size = dice.one_of(&[1.0, 1e3, 1e-3]);
        let (scale, shift) = match kind {
            CodedKind::Uniform => {
                let steps = (0..groups).map(|_| size * (0.1 + dice.unit())).collect();
                let zeros = (0..groups).map(|_| dice.below(1 << width) as f32).collect();
                (Matrix::column(steps), Matrix::column(zeros))
            }
            CodedKind::BinaryCoding | CodedKind::Codebook(_) => {
                let planes = [groups, usize::from(width)];
                (dice.matrix(planes, size), dice.matrix([groups, 1], size))
            }
        };
        Self {
            codes: (0..rows * columns).map(|_| dice.below(1 << width) as u8).collect(),
            shape: [rows, columns],
            group_len,
            width,
            kind,
            transposed,
            inputs: [dice.matrix([TOKENS, inputs], 1.0), scale, shift],
            upstream: dice.noise(TOKENS * out, 1.0),
        }
    }

    fn matrix(&self, device: &Device) -> CodedMatrix {
        let codes = PackedCodes::pack(&self.codes, self.shape[1], self.width);
        CodedMatrix::new(codes, self.group_len, self.kind, self.transposed, device)
    }

    /// What multiplies a grid's scale in stored weight `i`, plane by plane.
    fn factors(&self, i: usize) -> Vec<f32> {
        let code = self.codes[i];
        match self.kind {
            CodedKind::Uniform => {
                vec![f32::from(code) - self.inputs[2].values[i / self.group_len]]
            }
            CodedKind::BinaryCoding | CodedKind::Codebook(_) => (0..self.width)
                .map(|plane| if code >> plane & 1 == 1 { 1.0 } else { -1.0 })
                .collect(),
        }
    }

    /// Stored weight `i`, in the order of operations of the format.
    fn value(&self, i: usize) -> f32 {
        let [_, scale, shift] = &self.inputs;
        let group = i / self.group_len;
        let factors = self.factors(i);
        let terms = factors.iter().zip(scale.row(group)).map(|(factor, scale)| scale * factor);
        let sum = terms.reduce(|sum, term| sum + term).unwrap();
        match self.kind {
            CodedKind::Uniform => sum,
            CodedKind::BinaryCoding | CodedKind::Codebook(_) => sum + shift.values[group],
        }
    }

    /// Stored weight of output `o` and input `k`.
    fn place(&self, o: usize, k: usize) -> usize {
        let [row, column] = if self.transposed { [k, o] } else { [o, k] };
        row * self.shape[1] + column
    }

    fn sizes(&self) -> (usize, usize) {
        let inputs = self.inputs[0].shape[1];
        (inputs, self.codes.len() / inputs)
    }

    /// Output, and gradients of x, scale and shift.
    fn exact(&self) -> (Vec<Sum>, [Vec<Sum>; 3]) {
        let (inputs, out) = self.sizes();
        let [x, scale, shift] = &self.inputs;
        let weight = |o: usize, k: usize| f64::from(self.value(self.place(o, k)));
        let up = |n: usize, o: usize| f64::from(self.upstream[n * out + o]);
        let output = (0..TOKENS * out)
            .map(|i| (0..inputs).map(|k| x.at(i / out, k) * weight(i % out, k)).collect())
            .collect();
        let of_x = (0..TOKENS * inputs)
            .map(|i| (0..out).map(|o| up(i / inputs, o) * weight(o, i % inputs)).collect())
            .collect();
        let mut of_scale = vec![Sum::default(); scale.values.len()];
        let mut of_shift = vec![Sum::default(); shift.values.len()];
        for o in 0..out {
            for k in 0..inputs {
                let place = self.place(o, k);
                let (group, factors) = (place / self.group_len, self.factors(place));
                for n in 0..TOKENS {
                    let term = up(n, o) * x.at(n, k);
                    of_shift[group].add(term);
                    for (plane, factor) in factors.iter().enumerate() {
                        of_scale[group * factors.len() + plane].add(term * f64::from(*factor));
                    }
                }
            }
        }
        (output, [of_x, of_scale, of_shift])
    }
}

fn check(case: &Case) {
    let (output, gradients) = case.exact();
    let learns = if case.kind == CodedKind::Uniform { 2 } else { 3 };
    let f = |[x, scale, shift]: [Tensor<2>; 3]| case.matrix(&x.device()).linear(x, scale, shift);
    for found in Outcome::both(&case.inputs, &case.upstream, f) {
        close("output", &found.values, &output, 3e-6);
        for (name, (found, exact)) in
            ["x", "scale", "shift"].iter().zip(found.gradients.iter().zip(&gradients)).take(learns)
        {
            close(name, found, exact, 2e-5);
        }
    }
    let (inputs, out) = case.sizes();
    // The next token of each text, on a grid that never changes: asked twice, for what it keeps.
    let device = place();
    let [x, scale, shift] = case.inputs.each_ref().map(|input| input.on(&device));
    let (x, matrix) = (x.reshape([TOKENS, 1, inputs]), case.matrix(&device));
    let frozen = FrozenGrid::default();
    for _ in 0..2 {
        let values = || [scale.clone(), shift.clone()];
        let found = continuing(&device, || matrix.linear_frozen(x.clone(), &frozen, values));
        assert_eq!(found.dims(), [TOKENS, 1, out]);
        for (i, (found, exact)) in host(found).iter().zip(&output).enumerate() {
            // Levels are sums of signs here, in which a weight that is small may be a difference.
            let levels = |i: usize| -> f64 {
                let group = case.place(i % out, 0) / case.group_len;
                let [_, scale, shift] = &case.inputs;
                let scales: f64 = scale.row(group).iter().map(|x| f64::from(x.abs())).sum();
                let shift = f64::from(shift.values[group].abs());
                match case.kind {
                    CodedKind::Uniform => scales * f64::from(1u16 << case.width),
                    CodedKind::BinaryCoding | CodedKind::Codebook(_) => scales + shift,
                }
            };
            let largest = (0..out).map(levels).fold(0.0, f64::max);
            let of_x: f64 = (0..inputs).map(|k| case.inputs[0].at(i / out, k).abs()).sum();
            let error = (f64::from(found - exact.value as f32)).abs();
            let allowed = 2e-6 * largest * of_x + 1e-6 * exact.size;
            assert!(error <= allowed, "{found} for {} beside {allowed}", exact.value);
        }
    }
    // The weights alone: the same bits in both forms, `[out, in]`.
    let expected: Vec<f32> =
        (0..out * inputs).map(|i| case.value(case.place(i / inputs, i % inputs))).collect();
    let grid = [case.inputs[1].clone(), case.inputs[2].clone()];
    let upstream: Vec<f32> = (0..out * inputs).map(|i| (i as f32 * 0.7).sin()).collect();
    let f = |[scale, shift]: [Tensor<2>; 2]| case.matrix(&scale.device()).weight(scale, shift);
    let mut of_scale = vec![Sum::default(); case.inputs[1].values.len()];
    for (i, up) in upstream.iter().enumerate() {
        let place = case.place(i / inputs, i % inputs);
        let factors = case.factors(place);
        for (plane, factor) in factors.iter().enumerate() {
            let sum = &mut of_scale[place / case.group_len * factors.len() + plane];
            sum.add(f64::from(*up) * f64::from(*factor));
        }
    }
    for found in Outcome::both(&grid, &upstream, f) {
        same("weights", &found.values, &expected);
        close("scale", &found.gradients[0], &of_scale, 2e-6);
    }
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn uniform_grids(width in 1u8..=8, seed in any::<u64>()) {
        check(&Case::new(CodedKind::Uniform, width, seed));
    }

    #[test]
    fn binary_coding_grids(width in 1u8..=8, seed in any::<u64>()) {
        check(&Case::new(CodedKind::BinaryCoding, width, seed));
    }

    /// Any rank of input is the product of its rows.
    #[test]
    fn ranks(width in 1u8..=8, seed in any::<u64>()) {
        let case = Case::new(CodedKind::Uniform, width, seed);
        let (inputs, out) = case.sizes();
        let f = |[x, scale, shift]: [Tensor<2>; 3]| {
            let x = x.reshape([1, TOKENS, inputs]);
            case.matrix(&x.device()).linear(x, scale, shift).reshape([TOKENS, out])
        };
        let (output, gradients) = case.exact();
        for found in Outcome::both(&case.inputs, &case.upstream, f) {
            close("output", &found.values, &output, 3e-6);
            close("scale", &found.gradients[1], &gradients[1], 2e-5);
        }
    }
}
