//! AdamW with moments of 8 bits.

use burn::tensor::{Tensor, TensorData};
use fewbit::ops::{self, AdamWStep, Moments, Values};
use proptest::prelude::*;

use crate::{Dice, Matrix, bits, both, cases, host, on_processor, place};

/// Values that share a scale.
const BLOCK: usize = 256;

/// A matrix with at least the 4096 values that moments in 8 bits are for.
#[derive(Debug)]
struct Case {
    parameter: Matrix,
    gradients: Vec<Matrix>,
    numbers: AdamWStep,
    /// Whether the parameter is the transposed view of a row-major matrix.
    transposed: bool,
    /// A unit for each group of the parameter's transpose.
    units: Option<Matrix>,
}

/// Everything that a training has of a parameter: values, codes, scales.
#[derive(Debug, PartialEq)]
struct State {
    parameter: Vec<u32>,
    saved: Vec<(String, Vec<usize>, Vec<u32>)>,
}

impl State {
    /// Says where the first difference is: all of it is too long.
    #[track_caller]
    fn assert_is(&self, other: &Self, what: &str) {
        let same = |name: &str, found: &[u32], expected: &[u32]| {
            assert_eq!(found.len(), expected.len(), "{what}: {name}");
            let at = found.iter().zip(expected).position(|(a, b)| a != b);
            assert!(
                at.is_none(),
                "{what}: {name}[{at:?}] {:?}",
                at.map(|i| [found[i], expected[i]])
            );
        };
        for ((name, shape, found), expected) in self.saved.iter().zip(&other.saved) {
            assert_eq!((name, shape), (&expected.0, &expected.1), "{what}");
            same(name, found, &expected.2);
        }
        same("parameter", &self.parameter, &other.parameter);
    }
}

impl Case {
    fn new(shape: [usize; 2], transposed: bool, groups: Option<usize>, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let parameter = dice.matrix(shape, 0.5);
        let gradients = (0..4).map(|_| {
            let size = dice.one_of(&[1e-3, 1.0, 100.0]);
            let mut gradient = dice.matrix(shape, size);
            gradient
                .values
                .iter_mut()
                .for_each(|g| *g *= dice.one_of(&[0.0, 1.0, 1.0, 1e-4, 1e-18]));
            gradient
        });
        let gradients = gradients.collect();
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
        let units = groups.map(|groups| {
            let mut units = dice.matrix([groups, 1], 1.0);
            units.values.iter_mut().for_each(|unit| *unit = unit.abs() + 0.1);
            units
        });
        Self { parameter, gradients, numbers, transposed, units }
    }

    fn lay(&self, matrix: &Matrix) -> Tensor<2> {
        let tensor = matrix.plain();
        if self.transposed { tensor.transpose() } else { tensor }
    }

    fn start(&self) -> (Tensor<2>, Moments) {
        let parameter = self.lay(&self.parameter);
        let moments = Moments::int8(&parameter, self.units.is_some()).unwrap();
        (parameter, moments)
    }

    /// Takes step `i`.
    fn step(&self, (parameter, moments): (Tensor<2>, Moments), i: usize) -> (Tensor<2>, Moments) {
        let numbers = AdamWStep { step: i as u64 + 1, ..self.numbers.clone() };
        let gradient = self.lay(&self.gradients[i]);
        match &self.units {
            None => ops::adamw_step(&numbers, parameter, gradient, Some(moments)),
            Some(units) => {
                let units = units.plain();
                ops::adamw_step_in_units(&numbers, units, parameter, gradient, Some(moments))
            }
        }
    }

    fn run(&self) -> State {
        let end = (0..self.gradients.len()).fold(self.start(), |state, i| self.step(state, i));
        self.seen(&end)
    }

    fn seen(&self, (parameter, moments): &(Tensor<2>, Moments)) -> State {
        let parameter = parameter.clone();
        let parameter = if self.transposed { parameter.transpose() } else { parameter };
        let saved = parts(moments).into_iter().map(|(name, data)| {
            let bits = match data.dtype() {
                burn::tensor::DType::U8 => data.iter::<u8>().map(u32::from).collect(),
                _ => data.iter::<f32>().map(f32::to_bits).collect(),
            };
            // The layout is in the name alone.
            (name.replace("_transposed", ""), data.shape().to_vec(), bits)
        });
        State { parameter: bits(&host(parameter)), saved: saved.collect() }
    }
}

fn parts(moments: &Moments) -> Vec<(String, TensorData)> {
    let parts = moments.parts(2).into_iter().map(|part| {
        let data = match part.values {
            Values::F32(read) | Values::Bf16(read) => TensorData::new(read().unwrap(), part.shape),
            Values::U8(read) => TensorData::new(read().unwrap(), part.shape),
        };
        (part.name, data)
    });
    parts.collect()
}

proptest! {
    #![proptest_config(cases(24))]

    /// The last block is short, groups end inside blocks, and a saved state goes on as if nothing had been.
    #[test]
    fn kernel_and_composed_form_give_the_same_codes(
        groups in 1usize..5,
        len in 30usize..90,
        rows in 40usize..60,
        transposed in any::<bool>(),
        in_units in any::<bool>(),
        seed in any::<u64>(),
    ) {
        // A weight `[in, out]` in `groups` for each of its outputs; row-major it is `[in, out]` too.
        let [inputs, outputs] = [groups * len, rows + 100];
        let shape = if transposed { [outputs, inputs] } else { [inputs, outputs] };
        let case = Case::new(shape, transposed, in_units.then_some(outputs * groups), seed);
        let [fused, composed] = both(|| case.run());
        fused.assert_is(&composed, "composed");
        // One after the other, and rebuilt from what is saved.
        let (mut state, device) = (case.start(), place());
        for i in 0..case.gradients.len() {
            state = if i % 2 == 0 { ops::composed(|| case.step(state, i)) } else { case.step(state, i) };
            let mut saved = parts(&state.1);
            let part = |name: &str| {
                let at = saved.iter().position(|(found, _)| found == name)?;
                Some(saved.remove(at).1)
            };
            let (moments, rank) = Moments::from_parts(part, &device).unwrap();
            prop_assert_eq!(rank, 2);
            state.1 = moments;
        }
        case.seen(&state).assert_is(&fused, "saved");
        if !in_units && on_processor() {
            // The layout changes nothing.
            let other = Case { transposed: !transposed, ..case };
            other.run().assert_is(&fused, "layout");
        }
    }
}

/// After one step the moments are known: `(1 - beta) g` and `(1 - beta) g²`.
#[test]
fn codes_are_as_near_as_the_map_allows() {
    let case = Case::new([64, 100], false, None, 11);
    for (_, moments) in both(|| case.step(case.start(), 0)) {
        let [first, second] = moments.tensors::<2>().map(host);
        let g: Vec<f64> = (case.gradients[0].values.iter())
            .map(|g| f64::from(*g) * case.numbers.shrink)
            .collect();
        let exact = [
            g.iter().map(|g| (1.0 - case.numbers.beta1) * g).collect::<Vec<_>>(),
            g.iter().map(|g| (1.0 - case.numbers.beta2) * g * g).collect::<Vec<_>>(),
        ];
        // Half of the widest gap: a cell of the largest decade.
        for (found, exact, cells) in [(&first, &exact[0], 64.0), (&second, &exact[1], 128.0)] {
            let mut used = 0.0f64;
            for (found, exact) in found.chunks(BLOCK).zip(exact.chunks(BLOCK)) {
                let largest = exact.iter().fold(0.0f64, |max, x| max.max(x.abs()));
                for (found, exact) in found.iter().zip(exact) {
                    // The negative maximum is half a cell from the last code.
                    let allowed = 0.5001 * 0.9 / cells * largest;
                    let gap = (f64::from(*found) - exact).abs();
                    assert!(gap <= allowed, "{found} for {exact} of {largest}");
                    used = used.max(gap / allowed);
                }
                assert!(found.iter().zip(exact).all(|(f, e)| f64::from(*f) * e >= 0.0));
            }
            assert!(used > 0.5, "the bound says nothing: {used}");
        }
        // A tiny mean of squares is overestimated, never nothing.
        for (found, exact) in second.iter().zip(&exact[1]) {
            assert!(*found > 0.0 || *exact < 1e-40, "{exact} became nothing");
        }
    }
}

#[test]
fn what_others_hold_stays_and_small_parameters_stay_f32() {
    let case = Case::new([64, 100], true, None, 12);
    let first = case.step(case.start(), 0);
    let held = (first.0.clone(), first.1.clone());
    let before = case.seen(&held);
    let after = case.seen(&case.step(first, 1));
    assert_eq!(case.seen(&held), before);
    assert_ne!(after, before);
    let sized = |len| Moments::int8(&Tensor::<1>::zeros([len], &place()), false).is_some();
    assert!(!sized(4095) && sized(4096));
}
