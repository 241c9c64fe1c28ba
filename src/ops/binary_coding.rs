//! Binary-coding grids on the device: levels, nearest codes, and UniQuanF's mapping. Everything in
//! grouped form; `alpha` is `[groups, bits]`, other per-group parameters `[groups, 1]`.

use burn::tensor::{Tensor, TensorData};

/// The sign planes of codes, `bits` tensors of ±1, `[groups, group_len]`; bit `i` set is +1.
pub fn sign_planes(codes: &Tensor<2>, bits: u8) -> Vec<Tensor<2>> {
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

/// `±alpha_0 ± alpha_1 ... + offset`, added in this order, which is the stored format's.
pub fn binary_coding(planes: &[Tensor<2>], alpha: &Tensor<2>, offset: Tensor<2>) -> Tensor<2> {
    let plane_sum = planes.iter().enumerate().fold(None, |sum: Option<Tensor<2>>, (i, plane)| {
        let term = plane.clone() * alpha.clone().narrow(1, i, 1);
        Some(match sum {
            None => term,
            Some(sum) => sum + term,
        })
    });
    match plane_sum {
        Some(sum) => sum + offset,
        None => offset,
    }
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
    /// Where the transform puts each weight, from the middle of the levels, in unit steps:
    /// `W / exp(δ + D + d) + z_U - (z_B + c)`.
    pub fn position(&self, weight: Tensor<2>) -> Tensor<2> {
        let divisor =
            (self.log_division.clone() + (self.log_scale.clone() + self.log_row.clone())).exp();
        weight / divisor + (self.zero_unified.clone() - self.middle.clone())
    }

    /// The folded grid (unification theorem): scales of the planes, `[groups, bits]`, and offset,
    /// `[groups, 1]`, in weight units.
    pub fn folded(&self) -> (Tensor<2>, Tensor<2>) {
        let scale = self.log_scale.clone().exp();
        let offset = scale.clone() * (self.middle.clone() - self.zero_unified.clone());
        (scale * self.alpha.clone(), offset)
    }

    /// The weights on their levels, `[groups, group_len]`.
    ///
    /// The value is that of the folded grid. Gradients (methods-core 5.2): straight through the
    /// mapping to the position, and to `alpha` through the chosen level, both dropped with `filter`
    /// where the position lies further from its level than the smallest plane; and to the outer
    /// step through the value.
    pub fn map(&self, weight: Tensor<2>, planes: &[Tensor<2>], filter: bool) -> Tensor<2> {
        let (alpha, offset) = self.folded();
        let value = binary_coding(planes, &alpha.detach(), offset.detach());
        let scale = self.log_scale.clone().exp();
        let zero = self.middle.clone() - self.zero_unified.clone();
        let level = binary_coding(planes, &self.alpha, zero.zeros_like());
        let position = self.position(weight);
        // Each of the brackets is an exact zero: it adds a gradient and no value.
        let mut moved = no_value(position.clone()) + no_value(level.clone());
        if filter {
            let reach = self.alpha.clone().detach().abs().min_dim(1);
            let beyond = (position - level.clone()).detach().abs().greater(reach);
            moved = moved.mask_fill(beyond, 0.0);
        }
        value + scale.clone().detach() * moved + no_value(scale) * (level.detach() + zero)
    }
}

/// Zero, with the gradient of `x`.
fn no_value(x: Tensor<2>) -> Tensor<2> {
    x.clone() - x.detach()
}
