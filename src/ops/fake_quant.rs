//! Straight-through rounding and the fake-quantizers of the uniform family. Weights are in grouped
//! form `[groups, group_len]`, with per-group parameters `[groups, 1]`.
//!
//! A quantizer gives codes (off the tape, to be stored) or the values they stand for (on it). Both
//! come from one function, so what is trained is what is exported. On this machine's processor it
//! is one pass over the weight each way; elsewhere it is composed. Either way the tape holds the
//! inputs alone.

use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use super::bridge::{Rows, fused};
#[cfg(feature = "flex")]
use super::kernel::fake_quant::{self as kernel, InPlace};

/// `round(x)`, ties to even, with gradient 1 (straight-through estimator).
///
/// The forward value is exactly the integer: `x + (round(x) - x)` cancels without a rounding
/// error (Sterbenz).
pub fn round_ste<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let rounding = (x.clone().round() - x.clone()).detach();
    x + rounding
}

/// `x` unchanged, with its gradient multiplied by `factor` (LSQ's step-size gradient scale).
///
/// Adds an exact zero, so the forward value keeps every bit.
pub fn scale_gradient<const D: usize>(x: Tensor<D>, factor: f64) -> Tensor<D> {
    let scaled = x.clone() * factor;
    x.detach() + (scaled.clone() - scaled.detach())
}

/// `clamp(x, low, high)` with gradient 1 everywhere: what lies outside can come back.
///
/// The forward value is exactly the clamp's.
pub fn clamp_ste<const D: usize>(x: Tensor<D>, low: f32, high: f32) -> Tensor<D> {
    x.clone().clamp(low, high).detach() + (x.clone() - x.detach())
}

/// The nearest numbers of `significant` bits, fewer than f32's 24 (Veltkamp's splitting); the
/// gradient is 1.
pub fn shorten_ste<const D: usize>(x: Tensor<D>, significant: u32) -> Tensor<D> {
    let factor = f64::from(1_u32 << (f32::MANTISSA_DIGITS - significant)) + 1.0;
    let split = x.clone() * factor;
    let short = split.clone() - (split - x.clone());
    // The difference is exact, and so is the sum.
    x.clone() + (short - x).detach()
}

/// The values of a tensor that may be on the tape, off it.
pub fn off_tape(x: Tensor<2>) -> Tensor<2> {
    tensor(bridge::off_tape(x.into_dispatch()))
}

/// A weight in any float rank-2 layout as `[groups, group_len]`; free when it is contiguous.
pub fn reshape_grouped(weight: Tensor<2>, grouped: [usize; 2]) -> Tensor<2> {
    if weight.dims() == grouped { weight } else { weight.reshape(grouped) }
}

/// `e^x`: the step of a quantizer from its logarithm. The same function as inside the quantizers,
/// bit for bit.
///
/// # Shapes
/// - x, result: any of rank 2
pub fn exp(x: Tensor<2>) -> Tensor<2> {
    tensor(bridge::apply(Exp, [x.into_dispatch()]))
}

#[derive(Clone, Debug)]
struct Exp;

impl Operation<1> for Exp {
    type Saved = Plain;
    const CHEAP: bool = true;

    fn forward(&self, [x]: [Plain; 1]) -> (Plain, Plain) {
        #[cfg(feature = "flex")]
        if fused(&x) {
            let x = Rows::of(x);
            let y = x.like(kernel::exp(x.values())).plain();
            return (y.clone(), y);
        }
        let y = tensor::<2>(x).exp().into_dispatch();
        (y.clone(), y)
    }

    fn backward(&self, _: [Plain; 1], y: Plain, g: Plain, _: [bool; 1]) -> [Option<Plain>; 1] {
        [Some((tensor::<2>(g) * tensor::<2>(y)).into_dispatch())]
    }
}

/// What a quantizer gives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Output {
    /// Integer codes.
    Codes,
    /// The values they stand for.
    Values,
}

/// FlexRound's quantizer (Lee et al. 2023, eq. 2, in the log form of the released code) and LRQ's
/// (Lee et al. 2024): `Δ (clamp(round(W / (base exp(θ))) + z, 0, L) - z)` with
/// `Δ = base exp(log_scale)` and `θ = log_division + (log_scale + log_row) (+ log_column)`.
///
/// Gradients: true clamp (1 inside and on the bounds, 0 outside), straight-through round. The
/// paper's bounds `[-z, L - z]` on the integer differ by row; with `z` added they do not.
#[derive(Clone, Debug)]
pub struct Divided {
    /// The weight, `[groups, group_len]`; frozen.
    pub weight: Tensor<2>,
    /// What steps are relative to, `[groups, 1]`; frozen. Absent: 1. A grid that is there already is
    /// met exactly so, which the exponential of a logarithm is not.
    pub base: Option<Tensor<2>>,
    /// `[groups, 1]`.
    pub log_scale: Tensor<2>,
    /// `[groups, group_len]`.
    pub log_division: Tensor<2>,
    /// `[groups, 1]`, or `[out, 1]`: one for all groups of an output row.
    pub log_row: Tensor<2>,
    /// `[1, in]`, where every input has a factor.
    pub log_column: Option<Tensor<2>>,
    /// Integers, `[groups, 1]`; frozen.
    pub zero_point: Tensor<2>,
    /// L.
    pub max_code: u8,
}

impl Divided {
    /// Integers in `0..=max_code`, `[groups, group_len]`, off the tape.
    pub fn codes(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Codes);
        tensor(operation.forward(inputs.map(bridge::off_tape)).0)
    }

    /// The values they stand for, `[groups, group_len]`.
    pub fn values(self) -> Tensor<2> {
        let (operation, inputs) = self.prepare(Output::Values);
        tensor(bridge::apply(operation, inputs))
    }

    /// Steps, `[groups, 1]`: the same bits as inside.
    pub fn scales(&self) -> Tensor<2> {
        let scale = exp(self.log_scale.clone());
        match &self.base {
            Some(base) => base.clone() * scale,
            None => scale,
        }
    }

    /// The weight as it is divided by all but the step, `[groups, group_len]`, off the tape: what
    /// rounding to the step gives the codes, but for the order of operations.
    pub fn latent(self) -> Tensor<2> {
        let [groups, len] = self.weight.dims();
        let mut theta = self.log_division;
        let [out, _] = self.log_row.dims();
        let sharing = groups / out;
        theta = theta + self.log_row.repeat_dim(1, sharing).reshape([groups, 1]);
        if let Some(column) = self.log_column {
            theta = theta + column.reshape([sharing, len]).repeat_dim(0, out);
        }
        off_tape(self.weight) / off_tape(theta).exp()
    }

    fn prepare(self, output: Output) -> (DividedOperation, [Plain; 4]) {
        let operation = DividedOperation {
            weight: bridge::frozen(self.weight),
            base: self.base.map(bridge::frozen),
            zero_point: bridge::frozen(self.zero_point),
            max_code: f32::from(self.max_code),
            columns: self.log_column.is_some(),
            output,
        };
        // A stand-in keeps the number of inputs fixed.
        let column = self.log_column.unwrap_or_else(|| tensor(operation.zero_point.clone()));
        let inputs = [self.log_scale, self.log_division, self.log_row, column];
        (operation, inputs.map(Tensor::into_dispatch))
    }
}

#[derive(Clone, Debug)]
struct DividedOperation {
    weight: Plain,
    base: Option<Plain>,
    zero_point: Plain,
    max_code: f32,
    columns: bool,
    output: Output,
}

impl Operation<4> for DividedOperation {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 4]) -> (Plain, ()) {
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = DividedRows::new(self, inputs);
            let out = rows.kernel().forward(self.output);
            return (Rows::new(out, rows.weight.shape()).plain(), ());
        }
        let parts = self.composed(inputs);
        let out = match self.output {
            Output::Codes => parts.code,
            Output::Values => parts.scale * (parts.code - parts.zero_point),
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
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = DividedRows::new(self, inputs);
            let mut gradient = Rows::of(gradient);
            let found = rows.kernel().backward(gradient.values_mut(), wanted[3]);
            return [
                Some(rows.log_scale.like(found.log_scale).plain()),
                Some(gradient.plain()),
                Some(rows.log_row.like(found.log_row).plain()),
                wanted[3].then(|| rows.log_column.like(found.log_column).plain()),
            ];
        }
        let [out, _] = tensor::<2>(inputs[2].clone()).dims();
        let parts = self.composed(inputs);
        let [groups, len] = parts.code.dims();
        let gradient = tensor::<2>(gradient);
        let outside = parts
            .ratio_code
            .clone()
            .lower_elem(0.0)
            .bool_or(parts.ratio_code.greater_elem(self.max_code));
        let division = (gradient.clone() * parts.scale.clone() * parts.ratio).neg();
        let division = division.mask_fill(outside, 0.0);
        let value = (gradient * (parts.code - parts.zero_point)).sum_dim(1) * parts.scale;
        let through_division = division.clone().sum_dim(1);
        let row = through_division.clone().reshape([out, groups / out]).sum_dim(1);
        let column =
            wanted[3].then(|| division.clone().reshape([out, groups / out * len]).sum_dim(0));
        [
            Some((value + through_division).into_dispatch()),
            Some(division.into_dispatch()),
            Some(row.into_dispatch()),
            column.map(Tensor::into_dispatch),
        ]
    }
}

/// Intermediate results of the composed form.
struct DividedParts {
    ratio: Tensor<2>,
    /// Before the clamp.
    ratio_code: Tensor<2>,
    code: Tensor<2>,
    scale: Tensor<2>,
    zero_point: Tensor<2>,
}

impl DividedOperation {
    fn composed(&self, inputs: [Plain; 4]) -> DividedParts {
        let [log_scale, log_division, log_row, log_column] = inputs.map(tensor::<2>);
        let weight = tensor::<2>(self.weight.clone());
        let zero_point = tensor::<2>(self.zero_point.clone());
        let ([groups, len], [out, _]) = (weight.dims(), log_row.dims());
        let sharing = groups / out;
        let log_row = log_row.repeat_dim(1, sharing).reshape([groups, 1]);
        let mut theta = log_scale.clone() + log_row;
        if self.columns {
            theta = theta + log_column.reshape([sharing, len]).repeat_dim(0, out);
        }
        let base = self.base.clone().map(tensor::<2>);
        let based = |x: Tensor<2>| match &base {
            Some(base) => x * base.clone(),
            None => x,
        };
        let ratio = weight / based((log_division + theta).exp());
        let ratio_code = ratio.clone().round() + zero_point.clone();
        let code = ratio_code.clone().clamp(0.0, self.max_code);
        DividedParts { ratio, ratio_code, code, scale: based(log_scale.exp()), zero_point }
    }
}

#[cfg(feature = "flex")]
struct DividedRows {
    weight: Rows,
    base: Option<Rows>,
    zero_point: Rows,
    log_scale: Rows,
    log_division: Rows,
    log_row: Rows,
    log_column: Rows,
    max_code: f32,
    columns: bool,
}

#[cfg(feature = "flex")]
impl DividedRows {
    fn new(operation: &DividedOperation, inputs: [Plain; 4]) -> Self {
        let [log_scale, log_division, log_row, log_column] = inputs.map(Rows::of);
        Self {
            weight: Rows::of(operation.weight.clone()),
            base: operation.base.clone().map(Rows::of),
            zero_point: Rows::of(operation.zero_point.clone()),
            log_scale,
            log_division,
            log_row,
            log_column,
            max_code: operation.max_code,
            columns: operation.columns,
        }
    }

    fn kernel(&self) -> kernel::Divided<'_> {
        kernel::Divided {
            weight: self.weight.values(),
            base: self.base.as_ref().map_or(&[], Rows::values),
            log_division: self.log_division.values(),
            log_scale: self.log_scale.values(),
            log_row: self.log_row.values(),
            log_column: if self.columns { self.log_column.values() } else { &[] },
            zero_point: self.zero_point.values(),
            max_code: self.max_code,
        }
    }
}

/// Which way the stretched elastic grid sends an exact tie. A zero weight is such a tie, and
/// INT4 weights are full of zeros, so the rule moves a sixth of them.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
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
        match self {
            Self::Affine { .. } | Self::Lsq { .. } => step,
            Self::Seq { .. } => step * 0.5,
            Self::Ternary { .. } => step / 1.5,
            Self::Sign => step * 2.0,
        }
    }

    /// As [`Rule::scale`], of a tensor; the same bits.
    pub fn scales(self, step: Tensor<2>) -> Tensor<2> {
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
