//! Vector code: one portable body per kernel, compiled for several instruction sets, the best of
//! which is chosen at run time.
//!
//! A kernel is plain Rust over slices, written so that the compiler vectorizes it. Nothing here uses
//! fused multiply-add and every sum has the same sixteen lanes, so all instruction sets give the
//! same bits: a model trained on one machine folds to the same codes on another.
//!
//! AArch64 needs no choice, its baseline has NEON.

#![allow(clippy::inline_always)] // compiled for the caller's instruction set
#![allow(clippy::many_single_char_names)] // x, n, r, q: a polynomial's usual names

use std::sync::OnceLock;

/// Lanes of every reduction, whatever the registers hold.
pub(crate) const LANES: usize = 16;

/// An instruction set that kernels are compiled for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Level {
    /// What the target guarantees: SSE2 on x86-64, NEON on AArch64.
    Portable,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    /// Every level that this machine can run, the best one last.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn available() -> Vec<Self> {
        let mut levels = vec![Self::Portable];
        if is_x86_feature_detected!("avx2") {
            levels.push(Self::Avx2);
        }
        let wide = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        if wide && is_x86_feature_detected!("avx2") {
            levels.push(Self::Avx512);
        }
        levels
    }

    /// Every level that this machine can run, the best one last.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn available() -> Vec<Self> {
        vec![Self::Portable]
    }

    /// The best level of this machine.
    pub(crate) fn best() -> Self {
        static BEST: OnceLock<Level> = OnceLock::new();
        *BEST.get_or_init(|| Self::available().last().copied().unwrap_or(Self::Portable))
    }

    /// The name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "aarch64")]
            Self::Portable => "NEON",
            #[cfg(target_arch = "x86_64")]
            Self::Portable => "SSE2",
            #[cfg(not(any(target_arch = "aarch64", target_arch = "x86_64")))]
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "AVX2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "AVX-512",
        }
    }

    /// Runs `kernel` compiled for this level. What it calls has to be `#[inline(always)]` to be
    /// compiled for it too.
    ///
    /// Only levels from [`Level::available`] and [`Level::best`] may run.
    #[allow(unsafe_code)]
    pub(crate) fn run<R>(self, kernel: impl FnOnce() -> R) -> R {
        match self {
            Self::Portable => kernel(),
            // SAFETY: this level was only handed out after the processor was found to have it.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(kernel) },
        }
    }
}

/// Runs an expression at a level; what it calls has to be `#[inline(always)]`. (Without the
/// attribute the closure of a large body is not inlined, and runs at the lowest level.)
macro_rules! at {
    ($level:expr, $body:expr) => {
        $level.run(
            #[inline(always)]
            || $body,
        )
    };
}
pub(crate) use at;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<R>(kernel: impl FnOnce() -> R) -> R {
    kernel()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
fn avx512<R>(kernel: impl FnOnce() -> R) -> R {
    kernel()
}

/// `e^x`, within 1.5 units in the last place; results below about `2^-125` are 0 (subnormal numbers
/// are slow everywhere).
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // x = n ln 2 + r, with ln 2 in two parts of which the first times n is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0;
    // Beyond these the result is 0 or infinity; a NaN stays one.
    let bounded = x.clamp(-87.5, 88.8);
    // Adding 1.5 * 2^23 rounds to an integer, ties to even, and leaves it in the low bits: a cast
    // to i32 saturates, which no vector instruction does.
    let rounded = bounded * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = (bounded - n * LN2_HIGH) - n * LN2_LOW;
    // Minimax on |r| <= ln 2 / 2, relative error 3e-9.
    let q = 0.499_999_93
        + r * (0.166_665_2 + r * (0.041_668_39 + r * (0.008_368_75 + r * 0.001_381_45)));
    let y = 1.0 + (r + r * r * q);
    // 2^n as 2 * 2^(n - 1): n reaches 128, which is no exponent, and at -126 the rest is 0.
    let n = rounded.to_bits().wrapping_sub(ROUND.to_bits());
    y * 2.0 * f32::from_bits(n.wrapping_add(126) << 23)
}

/// `ln x` for positive normal `x`, within 2 units in the last place.
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // x = 2^n m with m in sqrt(1/2)..sqrt(2).
    let bits = x.to_bits().wrapping_sub(0x3f35_04f3);
    let n = (bits.cast_signed() >> 23) as f32;
    let m = f32::from_bits((bits & 0x007f_ffff) + 0x3f35_04f3);
    let f = m - 1.0;
    // ln(1 + f) = f - f^2/2 + f^3 p(f); minimax, relative error 1e-9.
    let p = 0.142_195_52
        + f * (-0.124_055_89 + f * (0.118_881_62 + f * (-0.116_756_52 + f * 0.067_466_4)));
    let p = 0.333_333_13 + f * (-0.250_000_1 + f * (0.200_021_19 + f * (-0.166_679_96 + f * p)));
    let square = f * f;
    let tail = f * square * p + n * LN2_LOW - 0.5 * square;
    (f + tail) + n * LN2_HIGH
}

/// A power's exponent, ready for [`Power::of`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Power {
    exponent: f32,
    /// Its first bits, so few that a binary exponent times them is exact.
    high: f32,
    /// The rest.
    low: f32,
}

impl Power {
    /// The power of this exponent.
    pub(crate) fn new(exponent: f32) -> Self {
        let high = f32::from_bits(exponent.to_bits() & 0xffff_ff00);
        Self { exponent, high, low: exponent - high }
    }

    /// `x^exponent` for `x >= 0` and an exponent in `0..=8`, within 4 units in the last place;
    /// subnormal `x` count as 0.
    #[inline(always)]
    pub(crate) fn of(self, x: f32) -> f32 {
        const ROUND: f32 = 12_582_912.0;
        // x = 2^n m with m in sqrt(1/2)..sqrt(2), so x^p = 2^(n p) e^(p ln m). The exponent of 2
        // in an integer and a fraction: what is lost there would be an error of every x.
        let bits = x.to_bits().wrapping_sub(0x3f35_04f3);
        let n = (bits.cast_signed() >> 23) as f32;
        let m = f32::from_bits((bits & 0x007f_ffff) + 0x3f35_04f3);
        let whole = (n * self.high).clamp(-252.0, 254.0);
        let rounded = whole + ROUND;
        let fraction = (whole - (rounded - ROUND)) + n * self.low;
        let y = exp(fraction * std::f32::consts::LN_2 + self.exponent * ln(m));
        // Two factors, each of them a normal number.
        let n = rounded.to_bits().wrapping_sub(ROUND.to_bits()).cast_signed();
        let power_of_two = |n: i32| f32::from_bits((n + 127).cast_unsigned() << 23);
        let y = y * power_of_two(n >> 1) * power_of_two(n - (n >> 1));
        if x < f32::MIN_POSITIVE { 0.0 } else { y }
    }
}

/// The sum of `values`; see [`sum_pairs`].
#[inline(always)]
pub(crate) fn sum(values: &[f32]) -> f64 {
    sum_pairs(
        values,
        values,
        #[inline(always)]
        |value, _| value,
    )
}

/// The sum of products; see [`sum_pairs`].
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    sum_pairs(
        a,
        b,
        #[inline(always)]
        |a, b| a * b,
    )
}

/// The sum of `term` over the pairs of two slices of one length, in lanes and blocks so that its
/// error does not grow with the length: each block is summed in f32 lanes, the blocks in f64. A
/// `term` that is more than an operation has to be `#[inline(always)]` itself.
#[inline(always)]
pub(crate) fn sum_pairs(a: &[f32], b: &[f32], term: impl Fn(f32, f32) -> f32) -> f64 {
    const BLOCK: usize = 64 * LANES;
    let mut total = 0.0;
    for (a, b) in a.chunks(BLOCK).zip(b.chunks(BLOCK)) {
        let mut lanes = [0.0f32; LANES];
        let (a, b) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
        let rest = a.remainder().iter().zip(b.remainder());
        for (a, b) in a.zip(b) {
            for ((sum, a), b) in lanes.iter_mut().zip(a).zip(b) {
                *sum += term(*a, *b);
            }
        }
        for (sum, (a, b)) in lanes.iter_mut().zip(rest) {
            *sum += term(*a, *b);
        }
        total += fold_lanes(lanes);
    }
    total
}

/// The sum of lanes, pairwise.
#[inline(always)]
pub(crate) fn fold_lanes(lanes: [f32; LANES]) -> f64 {
    let mut pairs = [0.0f64; LANES / 2];
    for (i, pair) in pairs.iter_mut().enumerate() {
        *pair = f64::from(lanes[i]) + f64::from(lanes[i + LANES / 2]);
    }
    ((pairs[0] + pairs[4]) + (pairs[2] + pairs[6]))
        + ((pairs[1] + pairs[5]) + (pairs[3] + pairs[7]))
}

/// The largest value; negative infinity for none, NaN ignored.
#[inline(always)]
pub(crate) fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let chunks = values.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (max, value) in lanes.iter_mut().zip(chunk) {
            *max = if *value > *max { *value } else { *max };
        }
    }
    rest.iter().chain(&lanes).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a })
}

#[cfg(test)]
#[allow(clippy::float_cmp)] // exact by design
mod tests {
    use super::*;

    fn ulps(found: f32, exact: f64) -> f64 {
        let unit = f64::from(f32::from_bits((exact as f32).abs().to_bits() + 1))
            - f64::from((exact as f32).abs());
        (f64::from(found) - exact).abs() / unit
    }

    #[test]
    fn exp_and_ln_are_accurate() {
        let mut worst = [0.0f64; 2];
        for i in 0..400_000 {
            let x = -86.5 + i as f32 * (175.0 / 400_000.0);
            worst[0] = worst[0].max(ulps(exp(x), f64::from(x).exp()));
            let x = f32::from_bits(0x0080_0000 + i * 5300);
            worst[1] = worst[1].max(ulps(ln(x), f64::from(x).ln()));
        }
        assert!(worst[0] < 1.5 && worst[1] < 2.0, "{worst:?} units in the last place");
    }

    #[test]
    fn exp_at_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-200.0), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(89.0), f32::INFINITY);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert!(exp(f32::NAN).is_nan());
        assert_eq!(exp(-87.5), 0.0);
        assert!(exp(-86.6) > f32::MIN_POSITIVE);
        assert!(exp(88.7) < f32::INFINITY);
        assert_eq!(ln(1.0), 0.0);
    }

    #[test]
    fn powers_are_accurate() {
        for exponent in [0.5f32, 1.0, 2.0, 2.4, 3.7, 8.0] {
            let (power, mut worst) = (Power::new(exponent), 0.0f64);
            for i in 0..100_000 {
                let x = f32::from_bits(0x0080_0000 + i * 21_000);
                let exact = f64::from(x).powf(f64::from(exponent));
                if (1e-37..1e38).contains(&exact) {
                    worst = worst.max(ulps(power.of(x), exact));
                }
            }
            assert!(worst < 4.0 + 0.5 * f64::from(exponent), "{worst} at {exponent}");
            assert_eq!(power.of(0.0), 0.0);
            assert_eq!(power.of(1.0), 1.0);
        }
        assert_eq!(Power::new(2.4).of(1e30), f32::INFINITY);
        assert!(Power::new(8.0).of(1e-30) < 1e-37);
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let x: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.37).sin() * 30.0).collect();
        let kernel = |level: Level| {
            level.run(|| {
                let each: Vec<f32> = x.iter().map(|x| ln(exp(*x) + 1.0)).collect();
                let total = sum_pairs(&x[3..], &each[3..], |x, y| exp(x) - y);
                (each.iter().map(|x| x.to_bits()).collect::<Vec<_>>(), total.to_bits(), max(&x))
            })
        };
        let portable = kernel(Level::Portable);
        for level in Level::available() {
            assert_eq!(kernel(level), portable, "{level:?}");
        }
    }

    #[test]
    fn sums_hold_at_any_length() {
        for len in [0, 1, 15, 16, 17, 1023, 1024, 1025, 128_256] {
            let term = |i: usize| 1.0 / (i as f32 + 1.0);
            let terms: Vec<f32> = (0..len).map(term).collect();
            let exact: f64 = terms.iter().copied().map(f64::from).sum();
            assert!((sum(&terms) - exact).abs() <= 3e-7 * exact, "{len}");
            let values: Vec<f32> = (0..len).map(|i| -(i as f32 - 7.0).abs()).collect();
            let exact = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(max(&values).to_bits(), exact.to_bits(), "{len}");
        }
    }
}
