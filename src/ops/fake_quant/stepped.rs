//! Codes of a weight in units of a step, by rule.

use std::ops::{Div, Mul};

use burn::tensor::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Output, every_row};
use crate::ops::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use crate::ops::bridge::{Rows, fused};
#[cfg(feature = "gpu")]
use crate::ops::cube;
#[cfg(feature = "flex")]
use crate::ops::kernel::fake_quant::{self as kernel, InPlace};

/// Which way the stretched elastic grid sends an exact tie. A zero weight is such a tie, and
/// INT4 weights are full of zeros, so the rule moves a sixth of them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum TieRule {
    /// Ties to even, as PyTorch and burn round: a zero goes to `+1/4`.
    #[default]
    HalfEven,
    /// `floor(x + 1/2)`: the exact bit nesting `code >> 2` of INT4 codes.
    HalfUp,
}

/// How a weight in units of its step, `u = W / Δ (+ V)`, becomes a code. The value is
/// `scale · (code - zero)`; its gradient to u is Δ or 0 everywhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// `clamp(round(u) + z, 0, L)`, scale Δ. Gradients: straight-through round, true clamp.
    Affine {
        /// L.
        max_code: f32,
    },
    /// LSQ (Esser et al. 2020, eq. 1): `round(clamp(u, -m, m - 1)) + m`, scale Δ. The clamp comes
    /// before the round, and stops the gradient there.
    Lsq {
        /// `m = 2^(bits - 1)`.
        middle: f32,
    },
    /// Stretched elastic quantization's four levels (ParetoQ):
    /// `round(2 clamp(u, ±(1 - ε)) - 1/2) + 2`, scale Δ/2, zero 3/2. No level is zero.
    Seq {
        /// ε.
        margin: f32,
        /// Where ties go.
        ties: TieRule,
    },
    /// ParetoQ's three levels: `round(3/2 clamp(u, ±(1 - ε))) + 1`, scale 2Δ/3,
    /// zero 1.
    Ternary {
        /// ε.
        margin: f32,
    },
    /// One bit: 1 where the weight is not negative, else 0; scale 2Δ, zero 1/2.
    /// The weight's gradient passes where `|u| <= 1`; the step's comes through the value alone.
    Sign,
}

impl Rule {
    /// The distance of neighbouring levels, from the step.
    pub fn scale(self, step: f32) -> f32 {
        self.spacing(step)
    }

    /// As [`Rule::scale`], of a tensor; the same bits.
    pub fn scales(self, step: Tensor<2>) -> Tensor<2> {
        self.spacing(step)
    }

    fn spacing<T: Mul<f32, Output = T> + Div<f32, Output = T>>(self, step: T) -> T {
        match self {
            Self::Affine { .. } | Self::Lsq { .. } => step,
            Self::Seq { .. } => step * 0.5,
            Self::Ternary { .. } => step / 1.5,
            Self::Sign => step * 2.0,
        }
    }

    /// The code of a weight at `u`, and where its gradient stops.
    fn composed(self, u: Tensor<2>, z: Tensor<2>) -> (Tensor<2>, Outside) {
        let beyond = |u: Tensor<2>, low: f32, high: f32| {
            u.clone().lower_elem(low).bool_or(u.greater_elem(high))
        };
        match self {
            Self::Affine { max_code } => {
                let code = u.round() + z;
                (code.clone().clamp(0.0, max_code), beyond(code, 0.0, max_code))
            }
            Self::Lsq { middle } => {
                let code = u.clone().clamp(-middle, middle - 1.0).round() + middle;
                (code, beyond(u, -middle, middle - 1.0))
            }
            Self::Seq { margin, ties } => {
                let x = u.clone().clamp(margin - 1.0, 1.0 - margin) * 2.0 - 0.5;
                let level = match ties {
                    TieRule::HalfEven => x.round(),
                    TieRule::HalfUp => (x + 0.5).floor(),
                };
                (level + 2.0, beyond(u, margin - 1.0, 1.0 - margin))
            }
            Self::Ternary { margin } => {
                let code = (u.clone().clamp(margin - 1.0, 1.0 - margin) * 1.5).round() + 1.0;
                (code, beyond(u, margin - 1.0, 1.0 - margin))
            }
            Self::Sign => (u.clone().greater_equal_elem(0.0).float(), beyond(u, -1.0, 1.0)),
        }
    }
}

type Outside = Tensor<2, burn::tensor::Bool>;

/// A quantizer whose codes follow from the weight in units of a step.
///
/// Gradients of the value v, given G: to the weight G where the rule lets it pass; to V that times
/// Δ; to Δ `Σ G (v/Δ - u)` with u alone where the gradient passes (and 0 for [`Rule::Sign`]); to
/// the zero point what moves the value at fixed u.
#[derive(Clone, Debug)]
pub struct Stepped {
    /// `[groups, group_len]`.
    pub weight: Tensor<2>,
    /// Δ, `[groups, 1]`.
    pub step: Tensor<2>,
    /// `[groups, 1]`, in code units.
    pub zero_point: Tensor<2>,
    /// V, offsets of the rounding in units of the step, `[groups, group_len]`.
    pub rounding: Option<Tensor<2>>,
    /// From weights to codes.
    pub rule: Rule,
    /// By what the step's gradient is multiplied.
    pub step_gradient: f64,
}

impl Stepped {
    /// Without offsets of the rounding, and the step's gradient as it is.
    pub fn new(weight: Tensor<2>, step: Tensor<2>, zero_point: Tensor<2>, rule: Rule) -> Self {
        Self { weight, step, zero_point, rounding: None, rule, step_gradient: 1.0 }
    }

    /// Of every so many groups the first.
    #[must_use]
    pub fn some_groups(self, every: usize) -> Self {
        let some = |x| every_row(x, every);
        Self {
            weight: some(self.weight),
            step: some(self.step),
            zero_point: some(self.zero_point),
            rounding: self.rounding.map(some),
            ..self
        }
    }

    /// Integers, `[groups, group_len]`, off the tape.
    pub fn codes(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Codes);
        tensor(operation.forward(inputs.map(bridge::off_tape)).0)
    }

    /// The values they stand for, `[groups, group_len]`.
    pub fn values(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Values);
        tensor(bridge::apply(operation, inputs))
    }

    fn prepare(self, output: Output) -> (SteppedOperation, [Plain; 4]) {
        let operation = SteppedOperation {
            rule: self.rule,
            step_gradient: self.step_gradient as f32,
            offsets: self.rounding.is_some(),
            output,
        };
        // A stand-in keeps the number of inputs fixed.
        let stand_in = || tensor(bridge::off_tape(self.zero_point.clone().into_dispatch()));
        let rounding = self.rounding.unwrap_or_else(stand_in);
        let inputs = [self.weight, self.step, self.zero_point, rounding];
        (operation, inputs.map(Tensor::into_dispatch))
    }
}

#[derive(Clone, Debug)]
struct SteppedOperation {
    rule: Rule,
    step_gradient: f32,
    /// Whether the fourth input is V, and not a stand-in that keeps their number fixed.
    offsets: bool,
    output: Output,
}

impl SteppedOperation {
    #[cfg(feature = "flex")]
    fn kernel<'a>(&self, inputs: &'a [Rows; 4]) -> kernel::Stepped<'a> {
        let [weight, step, zero_point, rounding] = inputs.each_ref().map(Rows::values);
        let rounding = if self.offsets { rounding } else { &[] };
        kernel::Stepped { weight, step, zero_point, rounding, rule: self.rule }
    }

    #[cfg(feature = "gpu")]
    fn on_device(&self, inputs: [Plain; 4]) -> cube::SteppedInputs {
        let [weight, step, zero_point, rounding] = inputs;
        let rounding = self.offsets.then_some(rounding);
        cube::SteppedInputs { weight, step, zero_point, rounding, rule: self.rule }
    }

    /// Code, u without V, and where the gradient stops.
    fn composed(&self, inputs: [Plain; 4]) -> (Tensor<2>, Tensor<2>, Outside) {
        let [weight, step, zero_point, rounding] = inputs.map(tensor::<2>);
        let ratio = weight / step;
        let u = if self.offsets { ratio.clone() + rounding } else { ratio.clone() };
        let (code, outside) = self.rule.composed(u, zero_point);
        (code, ratio, outside)
    }
}

impl Operation<4> for SteppedOperation {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 4]) -> (Plain, ()) {
        #[cfg(feature = "flex")]
        if fused(&inputs[0]) {
            let inputs = inputs.map(Rows::of);
            let out = self.kernel(&inputs).forward(self.output);
            return (inputs[0].like(out).plain(), ());
        }
        #[cfg(feature = "gpu")]
        if cube::reads(&inputs[0]) {
            return (cube::stepped(self.on_device(inputs), self.output), ());
        }
        let [_, step, zero_point, _] = inputs.clone().map(tensor::<2>);
        let (code, ..) = self.composed(inputs);
        let out = match self.output {
            Output::Codes => code,
            Output::Values => self.rule.scales(step) * (code - zero_point),
        };
        (out.into_dispatch(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 4],
        (): (),
        gradient: Plain,
        wanted: [bool; 4],
    ) -> [Option<Plain>; 4] {
        let [weight, _, _, rounding] = wanted;
        #[cfg(feature = "flex")]
        if fused(&inputs[0]) {
            let (inputs, mut gradient) = (inputs.map(Rows::of), Rows::of(gradient));
            let in_place = match (weight, rounding) {
                (true, _) => InPlace::Weight,
                (false, true) => InPlace::Rounding,
                (false, false) => InPlace::Neither,
            };
            let found = self.kernel(&inputs).backward(gradient.values_mut(), in_place);
            let mut step = found.step;
            for g in &mut step {
                *g *= self.step_gradient;
            }
            return [
                weight.then(|| gradient.clone().plain()),
                Some(inputs[1].like(step).plain()),
                Some(inputs[2].like(found.zero_point).plain()),
                rounding.then(|| {
                    let found = gradient.plain();
                    if !weight {
                        return found;
                    }
                    (tensor::<2>(found) * tensor(inputs[1].clone().plain())).into_dispatch()
                }),
            ];
        }
        #[cfg(feature = "gpu")]
        if cube::reads_rows(&inputs[0]) {
            let inputs = self.on_device(inputs);
            let [of_weight, of_step, of_zero, of_rounding] =
                cube::stepped_backward(inputs, gradient, self.step_gradient);
            let (of_weight, of_rounding) =
                (weight.then_some(of_weight), rounding.then_some(of_rounding));
            return [of_weight, Some(of_step), Some(of_zero), of_rounding];
        }
        let [_, step, zero_point, _] = inputs.clone().map(tensor::<2>);
        let (code, ratio, outside) = self.composed(inputs);
        let gradient = tensor::<2>(gradient);
        let passing = gradient.clone().mask_fill(outside.clone(), 0.0);
        let through_value = (gradient.clone() * (code - zero_point)).sum_dim(1);
        let mut of_step = through_value * self.rule.scale(1.0);
        if self.rule != Rule::Sign {
            // Outside the ratio may be infinite: no product with a zero.
            let through_code = (gradient.clone() * ratio).mask_fill(outside, 0.0);
            of_step = of_step - through_code.sum_dim(1);
        }
        let at_fixed_u = match self.rule {
            Rule::Affine { .. } => passing.clone() - gradient,
            _ => gradient.neg(),
        };
        let of_zero = at_fixed_u.sum_dim(1) * self.rule.scales(step.clone());
        [
            weight.then(|| passing.clone().into_dispatch()),
            Some((of_step * self.step_gradient).into_dispatch()),
            Some(of_zero.into_dispatch()),
            rounding.then(|| (passing * step).into_dispatch()),
        ]
    }
}
