//! Rounding to bf16 up or down by chance, so that what is lost is right on average: a weight that is moved by
//! less than half of what its neighbours in bf16 are apart would else never move (Gupta et al. 2015, *Deep
//! Learning with Limited Numerical Precision*, section 3).

use burn::tensor::{Device, Tensor, TensorData};

#[cfg(feature = "flex")]
use super::bridge::{Rows, reads};
#[cfg(any(feature = "flex", feature = "gpu"))]
use super::bridge::{frozen, tensor};
#[cfg(feature = "gpu")]
use super::cube;
#[cfg(feature = "flex")]
use super::kernel::stochastic as kernel;

/// Rounds of [`Chance`]'s network.
pub(super) const ROUNDS: usize = 6;
/// Magnitudes below this become 0; no weight is so small.
pub(super) const LEAST: f32 = f32::from_bits(27 << 23); // 2^-100

/// Sixteen bits for each place of a tensor, a function of a seed and the place alone: a Feistel network over
/// the place's two halves, in products of fewer than 31 bits, so that any device computes it in its integers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Chance {
    /// Of each round an odd factor below 2^15, and what is added first, below 2^16.
    rounds: [[u32; 2]; ROUNDS],
}

impl Chance {
    /// Draws of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        let mut state = seed;
        let rounds = std::array::from_fn(|_| {
            // SplitMix64 (Steele, Lea, Flood 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let bits = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let bits = bits ^ (bits >> 31);
            // A factor of at least 2^14 brings every bit to both halves of the product.
            [(bits as u32 & 0x3fff) | 0x4001, (bits >> 32) as u32 & 0xffff]
        });
        Self { rounds }
    }

    /// Of each round its odd factor below 2^15, and what is added first, below 2^16.
    #[cfg(feature = "gpu")]
    pub(super) fn rounds(&self) -> [[u32; 2]; ROUNDS] {
        self.rounds
    }

    /// The draw of a place.
    #[inline(always)]
    #[allow(clippy::inline_always)] // compiled for the caller's instruction set
    pub(super) fn at(&self, place: u32) -> u32 {
        let (mut left, mut right) = (place >> 16, place & 0xffff);
        for [factor, added] in self.rounds {
            let product = ((right + added) & 0xffff) * factor;
            (left, right) = (right, left ^ ((product ^ (product >> 15)) & 0xffff));
        }
        right
    }

    /// As [`Chance::at`] of the places from 0 on, `[len]`. Drawn here: some of 90,300 draws by the same network in burn's
    /// integers were others on software Vulkan.
    fn draws(&self, len: usize, device: &Device) -> Tensor<1> {
        let draws: Vec<f32> = (0..len).map(|place| self.at(place as u32) as f32).collect();
        Tensor::from_data(TensorData::new(draws, [len]), device)
    }
}

/// Values as bf16 has them: each becomes one of its two neighbours there, the nearer one the more probably,
/// so that the mean of many such roundings is the value itself. What bf16 holds stays as it is; magnitudes
/// below 2^-100 become 0. A function of the seed, the values and their places in the row-major `[out, in]`
/// matrix, wherever it is computed.
///
/// # Shapes
/// - x, result: `[in, out]` of a linear's weight, or `[n]`; off the tape, f32
pub fn round_to_bf16<const D: usize>(x: Tensor<D>, seed: u64) -> Tensor<D> {
    let chance = Chance::new(seed);
    let orient = |x: Tensor<D>| if D == 2 { x.transpose() } else { x };
    #[cfg(feature = "flex")]
    if reads(&x) {
        let mut rows = Rows::of(frozen(orient(x)));
        kernel::round(rows.values_mut(), &chance);
        return orient(tensor::<D>(rows.plain()));
    }
    let x = orient(x);
    let shape = x.dims();
    #[cfg(feature = "gpu")]
    if cube::reads(&x.clone().into_dispatch()) {
        return orient(tensor(cube::round_to_bf16(frozen(x), shape.into(), &chance)));
    }
    let len = shape.iter().product();
    let draws = chance.draws(len, &x.device());
    orient(composed(x.reshape([len]), draws).reshape(shape))
}

/// The rounding by comparisons and by products with powers of two, all of them exact.
fn composed(x: Tensor<1>, draws: Tensor<1>) -> Tensor<1> {
    let magnitude = x.clone().abs();
    let large = magnitude.clone().greater_elem(1.0);
    // From 1 up to 2^128, whatever the size.
    let lifted = magnitude.clone() * 101f32.exp2();
    let mut share = lifted.mask_where(large.clone(), magnitude.clone());
    let mut unit = x.zeros_like().add_scalar((-101f32).exp2()).mask_fill(large, 1.0);
    for power in [64f32, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0] {
        let above = share.clone().greater_equal_elem(power.exp2());
        share = share.clone().mask_where(above.clone(), share * (-power).exp2());
        unit = unit.clone().mask_where(above, unit * power.exp2());
    }
    // The mantissa in 24 bits, of which 8 stay.
    let kept = (share.clone() * 7f32.exp2()).floor();
    let lost = share * 23f32.exp2() - kept.clone() * 16f32.exp2();
    let up = (lost + draws).greater_equal_elem(16f32.exp2()).float();
    let rounded = (kept + up) * (-7f32).exp2() * unit;
    let rounded = rounded.clone().mask_where(x.clone().lower_elem(0.0), rounded.neg());
    let rounded = rounded.mask_fill(magnitude.clone().lower_elem(LEAST), 0.0);
    // Neither infinite values nor NaN are below this.
    let finite = magnitude.lower_equal_elem(f32::MAX);
    x.mask_where(finite, rounded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(values: Vec<f32>) -> Tensor<1> {
        let len = values.len();
        Tensor::from_data(TensorData::new(values, [len]), &Device::flex())
    }

    fn bits<const D: usize>(x: Tensor<D>) -> Vec<u32> {
        x.into_data().iter::<f32>().map(f32::to_bits).collect()
    }

    /// Over 2^16 neighbouring places a value is rounded up as often as it should be, within five deviations of
    /// a fair draw; and a place's draws of neighbouring seeds do not know each other.
    #[test]
    fn the_mean_of_many_roundings_is_the_value() {
        const MANY: u32 = 1 << 16;
        let many = f64::from(MANY);
        for seed in [0, 1, 2, 99, u64::MAX] {
            for share in [1u32, 300, 9_000, 32_768, 65_000] {
                let value = f32::from_bits(0x3f35_0000 + share);
                let mean = |first: u32| {
                    let chance = Chance::new(seed);
                    let up = (first..first + MANY).filter(|i| chance.at(*i) + share >= 1 << 16);
                    up.count() as f64 / many
                };
                let expected = f64::from(share) / 65_536.0;
                let far = 5.0 * (expected * (1.0 - expected) / many).sqrt() + 1.5 / many;
                for first in [0, 5 * MANY, 70_001] {
                    let found = mean(first);
                    assert!((found - expected).abs() <= far, "{seed} {share}: {found} {expected}");
                }
                assert!(value.is_finite());
            }
            // Neighbours, rows of usual lengths and seeds.
            let centred = |draw: u32| f64::from(draw) / 65_536.0 - 0.5;
            let [one, other] = [Chance::new(seed), Chance::new(seed.wrapping_add(1))];
            for lag in [1, 2, 64, 576, 4096, 1 << 16] {
                let pairs = (0..MANY).map(|i| centred(one.at(i)) * centred(one.at(i + lag)));
                let correlation = 12.0 * pairs.sum::<f64>() / many;
                assert!(correlation.abs() < 5.0 / many.sqrt(), "{seed}, {lag}: {correlation}");
            }
            let pairs = (0..MANY).map(|i| centred(one.at(i)) * centred(other.at(i)));
            let correlation = 12.0 * pairs.sum::<f64>() / many;
            assert!(correlation.abs() < 5.0 / many.sqrt(), "{seed}: {correlation}");
        }
    }

    /// A weight that steps of a hundredth of its neighbours' distance move goes where f32 goes.
    #[test]
    fn small_steps_add_up() {
        const LEN: usize = 1 << 16;
        let mut x = column(vec![1.0; LEN]);
        for step in 0..200 {
            x = round_to_bf16(x + 2f32.powi(-7) / 100.0, step);
        }
        let values: Vec<f32> = x.into_data().iter::<f32>().collect();
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / LEN as f64;
        // Five deviations: of each weight 200 draws of a hundredth, in steps of 2^-7.
        assert!((mean - 1.015_625).abs() < 2.2e-4, "{mean}");
        assert!(values.iter().all(|v| v.to_bits().trailing_zeros() >= 16));
    }

    /// The composed form gives the kernel's bits for every size and sign, and for what is no number.
    #[test]
    fn both_forms_give_the_same_bits() {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state
        };
        let mut values: Vec<f32> = (0..40_000).map(|_| f32::from_bits(random())).collect();
        values.extend((0..4_000).map(|_| (random() >> 8) as f32 / 8_388_608.0 - 1.0));
        values.extend([0.0, -0.0, 1.0, -1.0, 2.0, LEAST, -LEAST, f32::MAX, f32::MIN, 1e-45]);
        values.extend([f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(LEAST.to_bits() - 1)]);
        values.retain(|value| !value.is_nan());
        for seed in [0, 7] {
            let kernel = bits(round_to_bf16(column(values.clone()), seed));
            let composed = super::super::composed(|| round_to_bf16(column(values.clone()), seed));
            for ((value, kernel), composed) in values.iter().zip(kernel).zip(bits(composed)) {
                assert_eq!(kernel, composed, "{value:e}");
            }
        }
        let nan = super::super::composed(|| round_to_bf16(column(vec![f32::NAN]), 0));
        assert!(nan.into_scalar::<f32>().is_nan());
    }

    #[test]
    fn a_matrix_is_rounded_by_its_place_whatever_its_layout() {
        let values: Vec<f32> = (0..3000).map(|i| (i as f32 * 0.37).sin()).collect();
        let rows = Tensor::<2>::from_data(TensorData::new(values, [50, 60]), &Device::flex());
        // `[in, out]` once as the transposed view of `[out, in]`, once lying so itself.
        let view = rows.clone().transpose();
        let data =
            TensorData::new(view.clone().into_data().iter::<f32>().collect::<Vec<f32>>(), [60, 50]);
        let lying = Tensor::<2>::from_data(data, &Device::flex());
        let [a, b] = [view, lying].map(|x| bits(round_to_bf16(x, 3)));
        assert_eq!(a, b);
        let flat = bits(round_to_bf16(rows.reshape([3000]), 3));
        assert_eq!(flat[1], a[50], "row-major [out, in]");
    }
}
