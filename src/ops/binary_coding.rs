//! Binary-coding grids on the device: levels, nearest codes, and UniQuanF's mapping. Everything in
//! grouped form; `alpha` is `[groups, bits]`, other per-group parameters `[groups, 1]`.

use burn::tensor::{Tensor, TensorData};

use super::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use super::bridge::{Rows, fused, reads};
use super::fake_quant::exp;
#[cfg(feature = "flex")]
use super::kernel::binary_coding as kernel;

/// The sign planes of codes, `bits` tensors of ±1, `[groups, group_len]`; bit `i` set is +1.
pub(super) fn sign_planes(codes: &Tensor<2>, bits: u8) -> Vec<Tensor<2>> {
    let mut rest = codes.clone();
    (0..bits)
        .map(|_| {
            let half = (rest.clone() * 0.5).floor();
            let bit = rest.clone() - half.clone() * 2.0;
            rest = half;
            bit * 2.0 - 1.0
        })
        .collect()
}

pub(super) fn plane_sum(planes: &[Tensor<2>], alpha: &Tensor<2>, offset: Tensor<2>) -> Tensor<2> {
    let terms = planes.iter().enumerate().map(|(i, b)| b.clone() * alpha.clone().narrow(1, i, 1));
    match terms.reduce(|sum, term| sum + term) {
        Some(sum) => sum + offset,
        None => offset,
    }
}

/// `Σ gradient · (±1)` of each plane, `[groups, bits]`.
pub(super) fn plane_gradients(planes: &[Tensor<2>], gradient: &Tensor<2>) -> Tensor<2> {
    let sums = planes.iter().map(|plane| (gradient.clone() * plane.clone()).sum_dim(1));
    Tensor::cat(sums.collect(), 1)
}

/// Codes of the nearest levels `Σ ±alpha_i`; the greater level at a tie. With `around`, only the
/// level of that code and its two neighbours in order of value are candidates.
///
/// # Shapes
/// - position: `[groups, group_len]`, in the unit of `alpha`
/// - around, result: `[groups, group_len]`, integers as floats
pub fn nearest_codes(
    position: &Tensor<2>,
    alpha: &Tensor<2>,
    around: Option<&Tensor<2>>,
) -> Tensor<2> {
    let [groups, bits] = alpha.dims();
    #[cfg(feature = "flex")]
    if reads(position) {
        let rows = |tensor: &Tensor<2>| Rows::of(bridge::frozen(tensor.clone()));
        let (position, alpha, around) = (rows(position), rows(alpha), around.map(rows));
        let around = around.as_ref().map(Rows::values);
        let codes = kernel::nearest_codes(position.values(), alpha.values(), bits, around);
        return tensor(position.like(codes).plain());
    }
    let device = alpha.device();
    let count = 1usize << bits;
    let signs: Vec<f32> = (0..bits)
        .flat_map(|bit| (0..count).map(move |code| if code >> bit & 1 == 1 { 1.0 } else { -1.0 }))
        .collect();
    let signs = Tensor::<2>::from_data(TensorData::new(signs, [bits, count]), &device);
    let levels = alpha.clone().matmul(signs);
    let (levels, code_of_rank) = levels.sort_with_indices(1);
    // Ranks are kept as floats: backends do not agree on the type of indices.
    let code_of_rank = code_of_rank.float();
    let middles = (levels.clone().narrow(1, 0, count - 1) + levels.narrow(1, 1, count - 1)) * 0.5;
    let rank = match around {
        None => (0..count - 1).fold(position.zeros_like(), |rank, i| {
            let middle = middles.clone().narrow(1, i, 1);
            rank + position.clone().greater_equal(middle).float()
        }),
        Some(codes) => {
            let rank_of_code = code_of_rank.clone().argsort(1).float();
            let rank = rank_of_code.gather(1, codes.clone().int());
            let end = |value: f32| Tensor::<2>::full([groups, 1], value, &device);
            let bounds = Tensor::cat(vec![end(f32::NEG_INFINITY), middles, end(f32::INFINITY)], 1);
            let below = bounds.clone().gather(1, rank.clone().int());
            let above = bounds.gather(1, (rank.clone() + 1.0).int());
            let up = position.clone().greater_equal(above).float();
            let down = position.clone().lower(below).float();
            rank + up - down
        }
    };
    code_of_rank.gather(1, rank.int())
}

/// UniQuanF's parameters for one weight.
#[derive(Clone, Debug)]
pub struct Unified {
    /// `ln Δ`, `[groups, 1]`.
    pub log_scale: Tensor<2>,
    /// `[groups, group_len]`.
    pub log_division: Tensor<2>,
    /// `[groups, 1]`.
    pub log_row: Tensor<2>,
    /// Scales of the planes in unit steps, `[groups, bits]`.
    pub alpha: Tensor<2>,
    /// `z_U`, `[groups, 1]`.
    pub zero_unified: Tensor<2>,
    /// `z_B + c`, `[groups, 1]`.
    pub middle: Tensor<2>,
}

impl Unified {
    /// The folded grid (unification theorem): scales of the planes, `[groups, bits]`, and offset,
    /// `[groups, 1]`, in weight units.
    pub fn folded(&self) -> (Tensor<2>, Tensor<2>) {
        let scale = exp(self.log_scale.clone());
        let offset = scale.clone() * (self.middle.clone() - self.zero_unified.clone());
        (scale * self.alpha.clone(), offset)
    }

    /// The codes of the levels nearest to where the transform puts each weight, from the middle of
    /// the levels in unit steps: `W / exp(δ + D + d) + z_U - (z_B + c)`. Off the tape; see
    /// [`nearest_codes`].
    pub fn nearest(&self, weight: Tensor<2>, around: Option<&Tensor<2>>) -> Tensor<2> {
        let inner = |tensor: &Tensor<2>| tensor_off_tape(tensor.clone());
        let log_step = inner(&self.log_scale) + inner(&self.log_row);
        let divisor = exp(inner(&self.log_division) + log_step);
        let position = weight / divisor + (self.zero_unified.clone() - self.middle.clone());
        nearest_codes(&position, &inner(&self.alpha), around)
    }

    /// The weights on the levels of `codes`, `[groups, group_len]`.
    ///
    /// The value is that of the folded grid. Gradients: straight through the
    /// mapping to the position, and to `alpha` through the chosen level, both dropped with `filter`
    /// where the position lies further from its level than the smallest plane; and to the outer
    /// step through the value.
    pub fn map(&self, weight: Tensor<2>, codes: &Tensor<2>, filter: bool) -> Tensor<2> {
        let shift = self.zero_unified.clone() - self.middle.clone();
        let operation = MappedOperation {
            weight: bridge::frozen(weight),
            shift: bridge::frozen(shift),
            codes: bridge::frozen(codes.clone()),
            filter,
        };
        let inputs = [&self.log_scale, &self.log_division, &self.log_row, &self.alpha];
        tensor(bridge::apply(operation, inputs.map(|input| input.clone().into_dispatch())))
    }
}

fn tensor_off_tape(on: Tensor<2>) -> Tensor<2> {
    tensor(bridge::off_tape(on.into_dispatch()))
}

#[derive(Clone, Debug)]
struct MappedOperation {
    weight: Plain,
    shift: Plain,
    codes: Plain,
    filter: bool,
}

impl MappedOperation {
    /// Levels of the codes in unit steps from the middle of the levels, and the planes.
    fn levels(&self, alpha: &Tensor<2>) -> (Tensor<2>, Vec<Tensor<2>>) {
        let [_, bits] = alpha.dims();
        let planes = sign_planes(&tensor(self.codes.clone()), bits as u8);
        (plane_sum(&planes, alpha, tensor::<2>(self.shift.clone()).zeros_like()), planes)
    }
}

impl Operation<4> for MappedOperation {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 4]) -> (Plain, ()) {
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = MappedRows::new(self, inputs);
            let values = rows.kernel(self.filter).forward();
            return (rows.weight.like(values).plain(), ());
        }
        let [log_scale, _, _, alpha] = inputs.map(tensor::<2>);
        let scale = log_scale.exp();
        let offset = scale.clone() * tensor::<2>(self.shift.clone()).neg();
        let (_, planes) = self.levels(&alpha);
        (plane_sum(&planes, &(scale * alpha), offset).into_dispatch(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 4],
        (): (),
        gradient: Plain,
        _: [bool; 4],
    ) -> [Option<Plain>; 4] {
        #[cfg(feature = "flex")]
        if fused(&self.weight) {
            let rows = MappedRows::new(self, inputs);
            let found = rows.kernel(self.filter).backward(Rows::of(gradient).values());
            return [
                (found.log_scale, &rows.log_scale),
                (found.log_division, &rows.log_division),
                (found.log_row, &rows.log_row),
                (found.alpha, &rows.alpha),
            ]
            .map(|(values, like)| Some(like.like(values).plain()));
        }
        let [log_scale, log_division, log_row, alpha] = inputs.map(tensor::<2>);
        let (gradient, shift) = (tensor::<2>(gradient), tensor::<2>(self.shift.clone()));
        let (level, planes) = self.levels(&alpha);
        let ratio =
            tensor::<2>(self.weight.clone()) / (log_division + (log_scale.clone() + log_row)).exp();
        let scale = log_scale.exp();
        let mut moved = gradient.clone() * scale.clone();
        let mut division = (moved.clone() * ratio.clone()).neg();
        if self.filter {
            let beyond = (ratio + shift.clone() - level.clone()).abs();
            let beyond = beyond.greater(alpha.abs().min_dim(1));
            moved = moved.mask_fill(beyond.clone(), 0.0);
            // There the ratio may be infinite: no product with a zero.
            division = division.mask_fill(beyond, 0.0);
        }
        let row = division.clone().sum_dim(1);
        let value = (gradient * (level - shift)).sum_dim(1) * scale;
        let alpha = plane_gradients(&planes, &moved);
        [value + row.clone(), division, row, alpha].map(|found| Some(found.into_dispatch()))
    }
}

#[cfg(feature = "flex")]
struct MappedRows {
    weight: Rows,
    shift: Rows,
    codes: Rows,
    log_scale: Rows,
    log_division: Rows,
    log_row: Rows,
    alpha: Rows,
}

#[cfg(feature = "flex")]
impl MappedRows {
    fn new(operation: &MappedOperation, inputs: [Plain; 4]) -> Self {
        let [log_scale, log_division, log_row, alpha] = inputs.map(Rows::of);
        let [weight, shift, codes] =
            [&operation.weight, &operation.shift, &operation.codes].map(|t| Rows::of(t.clone()));
        Self { weight, shift, codes, log_scale, log_division, log_row, alpha }
    }

    fn kernel(&self, filter: bool) -> kernel::Mapped<'_> {
        kernel::Mapped {
            weight: self.weight.values(),
            log_division: self.log_division.values(),
            log_scale: self.log_scale.values(),
            log_row: self.log_row.values(),
            alpha: self.alpha.values(),
            shift: self.shift.values(),
            codes: self.codes.values(),
            filter,
        }
    }
}
