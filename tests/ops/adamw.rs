//! AdamW's step and the norm that clips its gradients.

use burn::tensor::Tensor;
use fewbit::ops::{self, AdamWStep, Moments};
use proptest::prelude::*;

use crate::{Dice, Matrix, Sum, bits, both, cases, close, host, length, on_processor, place};

const STEPS: u64 = 5;

#[derive(Debug)]
struct Case {
    parameter: Matrix,
    gradients: Vec<Matrix>,
    numbers: AdamWStep,
    /// Whether the parameter is the transposed view of a row-major matrix.
    transposed: bool,
}

impl Case {
    fn new(shape: [usize; 2], transposed: bool, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let parameter = dice.matrix(shape, 0.5);
        let mut gradients = Vec::new();
        for _ in 0..STEPS {
            let size = dice.one_of(&[1e-3, 1.0, 100.0]);
            let mut gradient = dice.matrix(shape, size);
            gradient.values.iter_mut().for_each(|g| *g *= dice.one_of(&[0.0, 1.0, 1.0, 1e-18]));
            gradients.push(gradient);
        }
        let numbers = AdamWStep {
            shrink: dice.one_of(&[1.0, 0.031]),
            beta1: 0.9,
            beta2: dice.one_of(&[0.95, 0.999]),
            epsilon: 1e-8,
            rate: dice.one_of(&[1e-4, 1e-2]),
            weight_decay: dice.one_of(&[0.0, 0.1]),
            step: 0,
            restraint: None,
        };
        Self { parameter, gradients, numbers, transposed }
    }

    fn lay(&self, matrix: &Matrix) -> Tensor<2> {
        let tensor = matrix.plain();
        if self.transposed { tensor.transpose() } else { tensor }
    }

    /// The parameter and its moments at the end.
    fn run(&self) -> [Vec<f32>; 3] {
        let mut parameter = self.lay(&self.parameter);
        let mut moments: Option<Moments> = None;
        for (gradient, step) in self.gradients.iter().zip(1..) {
            let numbers = AdamWStep { step, ..self.numbers.clone() };
            let (next, means) =
                ops::adamw_step(&numbers, parameter, self.lay(gradient), moments.take());
            (parameter, moments) = (next, Some(means));
        }
        let back = |x: Tensor<2>| host(if self.transposed { x.transpose() } else { x });
        let device = place();
        let [first, second] = moments.unwrap().tensors::<2>().map(Tensor::into_data);
        [parameter, Tensor::from_data(first, &device), Tensor::from_data(second, &device)].map(back)
    }

    fn exact(&self) -> [Vec<Sum>; 3] {
        let AdamWStep { shrink, beta1, beta2, epsilon, rate, weight_decay, .. } = self.numbers;
        let mut all = [const { Vec::new() }; 3];
        for (i, p) in self.parameter.values.iter().enumerate() {
            let [mut p, mut m, mut v] = [Sum::from(f64::from(*p)), Sum::default(), Sum::default()];
            for (gradient, step) in self.gradients.iter().zip(1..) {
                let g = f64::from(gradient.values[i]) * shrink;
                m = m.times(beta1);
                m.add((1.0 - beta1) * g);
                v = v.times(beta2);
                v.add((1.0 - beta2) * g * g);
                let [first, second] = [beta1, beta2].map(|beta| 1.0 - beta.powi(step));
                let size = (p.size + rate) * (1.0 - rate * weight_decay);
                let root = (v.value / second).sqrt() + epsilon;
                p = p.times(1.0 - rate * weight_decay);
                p.add(-rate * m.value / first / root);
                p.size = size.max(p.size);
            }
            [p, m, v].into_iter().zip(&mut all).for_each(|(sum, to)| to.push(sum));
        }
        all
    }
}

proptest! {
    #![proptest_config(cases(96))]

    #[test]
    fn several_steps(
        rows in length(),
        columns in length(),
        transposed in any::<bool>(),
        seed in any::<u64>(),
    ) {
        // A column's transpose is read at other places by burn's fused kernels (CONTRIBUTING, GPU backends).
        prop_assume!(on_processor() || columns > 1);
        let case = Case::new([rows, columns], transposed, seed);
        let exact = case.exact();
        for found in both(|| case.run()) {
            for (name, i) in [("parameter", 0), ("first moment", 1), ("second moment", 2)] {
                close(name, &found[i], &exact[i], 3e-6);
            }
        }
        if on_processor() {
            // The layout changes nothing.
            let found = case.run().map(|x| bits(&x));
            let other = Case { transposed: !transposed, ..case };
            prop_assert_eq!(found, other.run().map(|x| bits(&x)));
        }
    }

    #[test]
    fn norms(rows in length(), columns in length(), seed in any::<u64>()) {
        let mut dice = Dice::new(seed);
        let size = dice.one_of(&[1e-12, 1.0, 1e12]);
        let x = dice.matrix([rows, columns], size);
        let exact: f64 = x.values.iter().map(|x| f64::from(*x).powi(2)).sum();
        for found in both(|| [x.plain(), x.plain().transpose()].map(|x| ops::squared_norm(x).values()[0])) {
            for norm in found {
                prop_assert!((norm - exact).abs() <= 2e-6 * exact, "{norm} for {exact}");
            }
        }
    }
}

#[test]
fn what_others_hold_stays_as_it_is() {
    let mut dice = Dice::new(3);
    for transposed in [false, true] {
        let case = Case::new([33, 17], transposed, 4);
        let (parameter, gradient) = (case.lay(&case.parameter), case.lay(&case.gradients[0]));
        let held = parameter.clone();
        let numbers = AdamWStep { step: 1, ..case.numbers.clone() };
        let (next, moments) = ops::adamw_step(&numbers, parameter, gradient.clone(), None);
        let (kept, kept_moments) = (next.clone(), moments.clone());
        let (before, [first, second]) =
            (host(next.clone()), moments.tensors::<2>().map(Tensor::into_data));
        let numbers = AdamWStep { step: 2, ..case.numbers.clone() };
        let _ = ops::adamw_step(&numbers, next, gradient, Some(moments));
        assert_eq!(bits(&host(held)), bits(&host(case.lay(&case.parameter))));
        assert_eq!(bits(&host(kept)), bits(&before));
        assert_eq!(kept_moments.tensors::<2>().map(Tensor::into_data), [first, second]);
    }
    // A part of a tensor: the rest is not touched.
    let whole = dice.matrix([8, 16], 1.0);
    let tensor = whole.plain();
    let part = tensor.clone().narrow(0, 2, 3);
    let gradient = dice.matrix([3, 16], 1.0).plain();
    let numbers = AdamWStep { step: 1, ..Case::new([1, 1], false, 0).numbers };
    let (stepped, _) = ops::adamw_step(&numbers, part, gradient, None);
    assert_eq!(stepped.dims(), [3, 16]);
    assert_eq!(bits(&host(tensor)), bits(&whole.values));
}

/// Rates in units of a weight's groups, by the kernel and composed, however the weight lies.
#[test]
fn units_belong_to_runs_of_the_row_major_weight() {
    for transposed in [false, true] {
        // `[in, out]`, in groups of 2 inputs.
        let [inputs, outputs] = if transposed { [6, 4] } else { [4, 6] };
        let case = Case::new([4, 6], transposed, 5);
        let numbers = AdamWStep { step: 1, weight_decay: 0.0, ..case.numbers.clone() };
        let mut dice = Dice::new(7);
        let mut units = dice.matrix([12, 1], 1.0);
        units.values.iter_mut().for_each(|unit| *unit = unit.abs() + 0.5);
        // From zero, so that a step is all there is.
        let mut zero = dice.matrix([4, 6], 1.0);
        zero.values.fill(0.0);
        let start = || case.lay(&zero);
        let slope = dice.matrix([4, 6], 1.0);
        let gradient = || case.lay(&slope);
        let (plain, _) = ops::adamw_step(&numbers, start(), gradient(), None);
        let plain = host(plain);
        for found in both(|| {
            let (next, _) =
                ops::adamw_step_in_units(&numbers, units.plain(), start(), gradient(), None);
            host(next)
        }) {
            for (at, (found, plain)) in found.iter().zip(&plain).enumerate() {
                let (input, output) = (at / outputs, at % outputs);
                let expected = plain * units.values[output * (inputs / 2) + input / 2];
                assert!(
                    (found - expected).abs() <= 1e-5 * expected.abs(),
                    "{at}: {found} for {expected}"
                );
            }
        }
    }
}
