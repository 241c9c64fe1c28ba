//! The scaling of a rotary embedding from the factors in a file.
//!
//! Llama 3.1's scaling reaches a file as one divisor per frequency: 1 for high frequencies, the
//! scaling's factor for low ones. Between them the inverse of a divisor is a straight line over the
//! frequency. The line says where it would reach either end, but not all four numbers of the
//! scaling: `low`, `high` and `original` may grow together. So `low` is taken to be 1, as it is in
//! every model of that family.

use std::f64::consts::TAU;

use crate::error::{Error, Result};
use crate::model::{Rope, RopeScaling};

/// Largest relative deviation of a divisor. Programs round frequencies differently, and a ramp makes
/// more of it by the factor.
const TOLERANCE: f64 = 5e-5;

/// The scaling that divides the frequencies of base `theta` by `divisors`, `[head_dim / 2]`.
///
/// # Errors
/// When no scaling that fewbit knows gives these divisors.
pub(super) fn scaling(divisors: &[f32], theta: f64, head_dim: usize) -> Result<RopeScaling> {
    let refuse = |what: String| {
        Err(Error::preflight(what)
            .fix("a model without rotation factors, or with those of Llama 3.1's scaling"))
    };
    if head_dim == 0 || divisors.len() != head_dim / 2 {
        return refuse(format!("{} rotation factors for heads of {head_dim}", divisors.len()));
    }
    if let Some(bad) = divisors.iter().find(|d| !d.is_finite() || **d <= 0.0) {
        return refuse(format!("a rotation factor is {bad}"));
    }
    let frequencies: Vec<f64> =
        Rope::plain(theta, head_dim).inverse_frequencies(0).into_iter().map(f64::from).collect();
    let mut found = candidates(divisors, &frequencies).into_iter();
    match found.find(|scaling| deviation(scaling, divisors, theta, head_dim) <= TOLERANCE) {
        Some(scaling) => Ok(scaling),
        None => refuse(format!(
            "the file scales its rotations by factors of its own, from {} to {}, which are not those \
             of Llama 3.1's scaling",
            divisors[0],
            divisors[divisors.len() - 1]
        )),
    }
}

/// What the divisors may come from, simplest first.
fn candidates(divisors: &[f32], frequencies: &[f64]) -> Vec<RopeScaling> {
    let most = divisors.iter().copied().fold(0.0, f32::max);
    let factor: f64 = most.to_string().parse().unwrap_or_else(|_| f64::from(most));
    let mut all = vec![RopeScaling::Default, RopeScaling::Linear { factor }];
    // What the models of the family have; on few frequencies others would give the same.
    all.push(RopeScaling::Llama3 { factor, low: 1.0, high: 4.0, original: 8192.0 });
    // How far up the ramp each frequency is: 1 where it is kept, 0 where it is divided.
    let height = |d: &f32| (1.0 / f64::from(*d) - 1.0 / factor) / (1.0 - 1.0 / factor);
    let heights: Vec<f64> = divisors.iter().map(height).collect();
    let Some((slope, zero)) = ramp(&heights, frequencies) else { return all };
    // height = (original / wavelength - low) / (high - low), and 1 / wavelength = frequency / 2π.
    let original = TAU / zero;
    let high = 1.0 + 1.0 / (slope * zero);
    let rounded = |value: f64, unit: f64| (value / unit).round() * unit;
    for (high, original) in [
        (high.round(), original.round()),
        (rounded(high, 0.125), original.round()),
        (high, original),
    ] {
        if high > 1.0 && original > 0.0 {
            all.push(RopeScaling::Llama3 { factor, low: 1.0, high, original });
        }
    }
    all
}

/// The line `height = slope * (frequency - zero)` through the points between the ends; where fewer
/// than two lie there, one that leaves the others at the ends. `None` when there is none.
fn ramp(heights: &[f64], frequencies: &[f64]) -> Option<(f64, f64)> {
    const END: f64 = 1e-4;
    let first = heights.iter().position(|height| *height < 1.0 - END)?;
    let last = heights.iter().rposition(|height| *height > END)?;
    // Frequencies fall, so the points on the ramp are first..=last.
    if first < last {
        let slope = (heights[first] - heights[last]) / (frequencies[first] - frequencies[last]);
        let zero = frequencies[last] - heights[last] / slope;
        return (slope > 0.0 && zero > 0.0).then_some((slope, zero));
    }
    let above = |index: usize| index.checked_sub(1).map(|before| frequencies[before]);
    let below = frequencies.get(last + 1).copied().unwrap_or(0.0);
    if first > last {
        // None: the ramp lies between two neighbours.
        let (above, gap) = (frequencies[last], frequencies[last] - below);
        return (gap > 0.0).then(|| (3.0 / gap, above - gap * 2.0 / 3.0));
    }
    // One: steep enough to be at the ends at its neighbours.
    let (height, here) = (heights[first], frequencies[first]);
    let up = above(first).map_or(0.0, |above| (1.0 - height) / (above - here));
    let slope = 1.5 * up.max(height / (here - below));
    (slope.is_finite() && slope > 0.0).then(|| (slope, here - height / slope))
}

/// The largest relative difference to the divisors that a scaling gives.
fn deviation(scaling: &RopeScaling, divisors: &[f32], theta: f64, head_dim: usize) -> f64 {
    let frequencies =
        |scaling| Rope { scaling, ..Rope::plain(theta, head_dim) }.inverse_frequencies(0);
    let plain = frequencies(RopeScaling::Default);
    let scaled = frequencies(scaling.clone());
    let pairs = plain.iter().zip(&scaled).zip(divisors);
    let off = |((plain, scaled), divisor): ((&f32, &f32), &f32)| {
        let ours = f64::from(*plain) / f64::from(*scaled);
        let off = (ours / f64::from(*divisor) - 1.0).abs();
        if off.is_nan() { f64::INFINITY } else { off }
    };
    pairs.map(off).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Divisors as llama.cpp's converter computes them, in f64.
    fn divisors(theta: f64, head_dim: usize, [factor, low, high, original]: [f64; 4]) -> Vec<f32> {
        let one = |i: usize| {
            let wavelength = TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
            let height = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - height) / factor + height)) as f32
        };
        (0..head_dim / 2).map(one).collect()
    }

    #[test]
    fn the_scalings_of_llama_3_come_back() {
        for (theta, head_dim, factor, high, original) in [
            (5e5, 128, 8.0, 4.0, 8192.0),
            (5e5, 64, 32.0, 4.0, 8192.0),
            (5e5, 128, 8.0, 2.5, 8192.0),
            (1e4, 128, 4.0, 8.0, 2048.0),
        ] {
            let found =
                scaling(&divisors(theta, head_dim, [factor, 1.0, high, original]), theta, head_dim);
            let wanted = RopeScaling::Llama3 { factor, low: 1.0, high, original };
            assert_eq!(found.unwrap(), wanted);
        }
    }

    /// Where the numbers are not determined, any that give the same divisors will do.
    #[test]
    fn few_points_and_other_lows_are_fitted() {
        let (mut fitted, mut ramps) = (0, [0; 3]);
        for head_dim in [4, 6, 8, 16, 32, 64] {
            for theta in [1e3, 1e4, 5e5] {
                for (low, high) in [(1.0, 4.0), (1.0, 1.5), (2.0, 5.0), (0.5, 3.3)] {
                    for original in [32.0, 100.0, 512.0, 8192.0] {
                        let wanted = divisors(theta, head_dim, [8.0, low, high, original]);
                        let inner = wanted.iter().filter(|d| **d > 1.0 && **d < 8.0).count();
                        ramps[inner.min(2)] += 1;
                        let found = scaling(&wanted, theta, head_dim);
                        assert!(
                            found.is_ok(),
                            "{head_dim} {theta} {low} {high} {original}: {wanted:?}"
                        );
                        fitted += 1;
                    }
                }
            }
        }
        assert_eq!(fitted, 288);
        assert!(ramps.iter().all(|count| *count > 20), "{ramps:?}");
    }

    #[test]
    fn plain_and_linear_factors() {
        assert_eq!(scaling(&[1.0; 4], 1e4, 8).unwrap(), RopeScaling::Default);
        assert_eq!(scaling(&[2.5; 4], 1e4, 8).unwrap(), RopeScaling::Linear { factor: 2.5 });
    }

    #[test]
    fn other_factors_are_refused() {
        let mut crooked = divisors(5e5, 128, [8.0, 1.0, 4.0, 8192.0]);
        let bent = crooked.iter().position(|d| *d > 3.0).unwrap();
        crooked[bent] *= 1.001;
        for (divisors, head_dim, part) in [
            (crooked, 128, "factors of its own, from 1 to 8"),
            (vec![8.0, 1.0, 1.0, 1.0], 8, "factors of its own"),
            (vec![0.5, 1.0], 4, "factors of its own"),
            (vec![1.0, 4.0, 2.0, 8.0], 8, "factors of its own"),
            (vec![1.0; 3], 8, "3 rotation factors for heads of 8"),
            (vec![1.0, f32::NAN], 4, "a rotation factor is NaN"),
            (vec![1.0, 0.0], 4, "a rotation factor is 0"),
            (Vec::new(), 0, "for heads of 0"),
        ] {
            let error = scaling(&divisors, 5e5, head_dim).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
