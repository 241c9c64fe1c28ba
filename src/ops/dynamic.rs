//! The dynamic map of 8-bit numbers in 0..=1 or -1..=1 (Dettmers et al. 2022, "8-bit Optimizers via
//! Block-wise Quantization", section 2.1 and appendix F): leading zero bits are a decimal exponent, the
//! first set bit ends them, and what is left divides a decade's 0.1..1 into equal cells.
//!
//! A signed number has one bit for its sign; an unsigned one has it as another bit of the fraction. Codes are
//! numbered in the order of their values.

use std::sync::LazyLock;

/// The code of 0 of the signed map.
pub(super) const ZERO: u8 = 127;

/// Decades that the map has: seven bits can begin with no zero up to six of them.
const DECADES: i32 = 7;

/// Leading zero bits of a binary exponent that tables go down to; the smallest threshold is above 2^-23.
const OCTAVES: u32 = 24;
/// Bits of a mantissa that a table is indexed by: its bins are narrower than any two thresholds are apart.
const MANTISSA: u32 = 8;
const DROPPED: u32 = f32::MANTISSA_DIGITS - 1 - MANTISSA;
const FIRST: u32 = (127 - OCTAVES) << MANTISSA;
const LAST: u32 = OCTAVES << MANTISSA;

/// One of the two maps.
pub(super) struct Map {
    /// The value of each code.
    pub values: [f32; 256],
    /// The code of 0.
    pub zero: u8,
    /// Between magnitude `k` and `k + 1` of those that are not negative; infinite behind the last one.
    pub thresholds: [f32; 256],
    /// How many thresholds are not above the least number of each bin.
    bins: Box<[u8]>,
}

/// For the first moment.
pub(super) static SIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(6, true));
/// For the second moment.
pub(super) static UNSIGNED: LazyLock<Map> = LazyLock::new(|| Map::new(7, false));

impl Map {
    /// With so many bits of fraction in the largest decade.
    fn new(fraction: i32, signed: bool) -> Self {
        let mut magnitudes = vec![0.0];
        for decade in (0..DECADES).rev() {
            let cells = 1 << (fraction - decade);
            let centre = |cell: i32| 0.1 + 0.9 * (f64::from(cell) + 0.5) / f64::from(cells);
            magnitudes.extend((0..cells).map(|cell| centre(cell) * 10f64.powi(-decade)));
        }
        // A block's largest value is kept as it is.
        magnitudes.push(1.0);
        let mut thresholds = [f32::INFINITY; 256];
        for (threshold, pair) in thresholds.iter_mut().zip(magnitudes.windows(2)) {
            *threshold = f64::midpoint(pair[0], pair[1]) as f32;
        }
        let mut values = [0.0; 256];
        let zero = if signed { ZERO } else { 0 };
        let negative = usize::from(zero);
        for (code, value) in values.iter_mut().enumerate() {
            *value = match code.checked_sub(negative) {
                Some(magnitude) => magnitudes[magnitude] as f32,
                None => -magnitudes[negative - code] as f32,
            };
        }
        let bins = (0..=LAST).map(|bin| {
            let least = if bin == 0 { 0.0 } else { f32::from_bits((bin + FIRST) << DROPPED) };
            thresholds.iter().filter(|threshold| **threshold <= least).count() as u8
        });
        let bins = bins.collect();
        Self { values, zero, thresholds, bins }
    }

    /// Which magnitude is nearest to `x`, in 0..=1; the larger one of two.
    #[inline(always)]
    #[allow(clippy::inline_always)] // compiled for the caller's instruction set
    pub(super) fn magnitude(&self, x: f32) -> u8 {
        let bin = (x.to_bits() >> DROPPED).saturating_sub(FIRST).min(LAST);
        let k = self.bins[bin as usize];
        k + u8::from(x >= self.thresholds[usize::from(k)])
    }
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // exact by design
mod tests {
    use super::*;

    #[test]
    fn maps_are_the_papers() {
        for map in [&*SIGNED, &*UNSIGNED] {
            assert!(map.values.windows(2).all(|pair| pair[0] < pair[1]), "codes are not in order");
            assert_eq!(map.values[255], 1.0);
        }
        let zero = usize::from(ZERO);
        assert_eq!((SIGNED.values[zero], UNSIGNED.values[0]), (0.0, 0.0));
        for k in 1..=zero {
            assert_eq!(SIGNED.values[zero + k], -SIGNED.values[zero - k]);
        }
        // One bit is left of the last decade's fraction, or none: cells of 0.1..1 times a millionth.
        assert_eq!(UNSIGNED.values[1..3], [0.325e-6, 0.775e-6]);
        assert_eq!(SIGNED.values[zero + 1], 0.55e-6);
        // 64 and 128 cells in the largest.
        let gap = |map: &Map| f64::from(map.values[254] - map.values[253]);
        assert!((gap(&SIGNED) - 0.9 / 64.0).abs() < 1e-6);
        assert!((gap(&UNSIGNED) - 0.9 / 128.0).abs() < 1e-6);
    }

    #[test]
    fn the_nearest_magnitude_is_found() {
        for map in [&*SIGNED, &*UNSIGNED] {
            let counted = |x: f32| map.thresholds.iter().filter(|t| **t <= x).count();
            let mut tried = vec![0.0, f32::MIN_POSITIVE, 1e-30, 0.999_999_9, 1.0];
            for threshold in map.thresholds.iter().filter(|t| t.is_finite()) {
                tried.extend([threshold.next_down(), *threshold, threshold.next_up()]);
            }
            for bin in 0..LAST {
                let least = f32::from_bits((bin + FIRST) << DROPPED);
                tried.extend([least.next_down(), least, least.next_up()]);
            }
            for x in tried {
                assert_eq!(usize::from(map.magnitude(x)), counted(x), "{x}");
            }
        }
    }
}
