//! Observers: from a weight to the grid it starts on.
//!
//! Sources: the LRQ code's min-max and its clip search; OmniQuant's and
//! EfficientQAT's min-max without zero in range.

use burn::tensor::{Bool, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Bits, Symmetry};
use crate::error::Result;
use crate::ops::{self, Candidate, Extent, Rule};

/// No step is smaller than this (the LRQ code's floor).
pub const SCALE_FLOOR: f32 = 1e-8;

/// Step and zero point of each group, both `[groups, 1]`; zero points hold integers.
#[derive(Clone, Debug)]
pub struct QuantParams {
    /// Step.
    pub scale: Tensor<2>,
    /// Zero point in code units, `w = scale * (code - zero_point)`.
    pub zero_point: Tensor<2>,
}

impl QuantParams {
    /// The grid with zero in the middle that reaches `reach`, the largest magnitude, `[groups, 1]`.
    pub fn symmetric(reach: &Tensor<2>, bits: Bits, symmetry: Symmetry) -> Self {
        let middle = (bits.levels() / 2) as f32;
        let scale = if symmetry == Symmetry::FullRange {
            reach.clone() * 2.0 / f32::from(bits.max_code())
        } else {
            reach.clone() / (middle - 1.0)
        }
        .clamp_min(SCALE_FLOOR);
        let zero_point = scale.full_like(middle);
        Self { scale, zero_point }
    }

    /// Codes of a grouped weight on this grid, `[groups, group_len]`, as floats:
    /// `clamp(round(w / scale) + z, 0, L)`.
    pub fn codes(&self, weight: Tensor<2>, max_code: u8) -> Tensor<2> {
        ((weight / self.scale.clone()).round() + self.zero_point.clone())
            .clamp(0.0, f32::from(max_code))
    }

    /// The values those codes stand for.
    pub fn dequantize(&self, codes: Tensor<2>) -> Tensor<2> {
        self.scale.clone() * (codes - self.zero_point.clone())
    }
}

/// Which statistics choose the grid.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ObserverConfig {
    /// The group's smallest and largest weight.
    MinMax(MinMaxConfig),
    /// The clipping that minimizes `mean |W - W_hat|^p`.
    Mse(MseConfig),
}

impl Default for ObserverConfig {
    fn default() -> Self {
        Self::MinMax(MinMaxConfig::default())
    }
}

/// Keys of `observer.min_max`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MinMaxConfig {
    /// Widen the range until it holds zero, so that zero is a level. Off: OmniQuant's and
    /// EfficientQAT's form, where a one-sided group keeps all its levels on its side.
    pub zero_in_range: bool,
}

impl Default for MinMaxConfig {
    fn default() -> Self {
        Self { zero_in_range: true }
    }
}

/// Keys of `observer.mse`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct MseConfig {
    /// The `p` of the norm; the LRQ code's 2.4.
    pub power: f32,
    /// Thresholds tried, as fractions `i / grid` of the range.
    pub grid: u32,
}

impl Default for MseConfig {
    fn default() -> Self {
        Self { power: 2.4, grid: 100 }
    }
}

impl ObserverConfig {
    /// The starting grid of a grouped weight.
    ///
    /// # Shapes
    /// - weight: `[groups, group_len]`
    /// - result: `[groups, 1]` each
    ///
    /// # Errors
    /// None today; observers that need activations will have some.
    pub fn observe(
        &self,
        weight: &Tensor<2>,
        bits: Bits,
        symmetry: Symmetry,
    ) -> Result<QuantParams> {
        Ok(match (self, symmetry) {
            (Self::MinMax(config), Symmetry::Asymmetric) => {
                min_max(weight, bits, config.zero_in_range)
            }
            (Self::MinMax(_), _) => QuantParams::symmetric(&abs_max(weight), bits, symmetry),
            (Self::Mse(config), Symmetry::Asymmetric) => mse_asymmetric(config, weight, bits),
            (Self::Mse(config), _) => mse_symmetric(config, weight, bits, symmetry),
        })
    }
}

/// Largest magnitude of each group, `[groups, 1]`.
fn abs_max(weight: &Tensor<2>) -> Tensor<2> {
    weight.clone().abs().max_dim(1)
}

fn min_max(weight: &Tensor<2>, bits: Bits, zero_in_range: bool) -> QuantParams {
    let low = weight.clone().min_dim(1);
    let high = weight.clone().max_dim(1);
    if zero_in_range {
        from_range(low.clamp_max(0.0), high.clamp_min(0.0), bits)
    } else {
        let scale = step(low.clone(), high, bits);
        // The integer may lie outside 0..=L: then zero itself is no level of this group.
        let zero_point = (low / scale.clone()).round().neg();
        QuantParams { scale, zero_point }
    }
}

/// A range that holds zero to a step and a zero point in `0..=L`.
fn from_range(low: Tensor<2>, high: Tensor<2>, bits: Bits) -> QuantParams {
    let scale = step(low.clone(), high, bits);
    let zero_point = (low / scale.clone()).round().neg().clamp(0.0, f32::from(bits.max_code()));
    QuantParams { scale, zero_point }
}

fn step(low: Tensor<2>, high: Tensor<2>, bits: Bits) -> Tensor<2> {
    ((high - low) / f32::from(bits.max_code())).clamp_min(SCALE_FLOOR)
}

/// Keeps the candidate with the smallest error per group; the first one wins a tie.
struct Search<'a> {
    weight: &'a Tensor<2>,
    bits: Bits,
    power: f32,
    best: Option<(Tensor<2>, QuantParams)>,
}

impl Search<'_> {
    /// `excluded`, `[groups, 1]`: groups for which this candidate does not count.
    fn offer(&mut self, candidate: QuantParams, excluded: Option<Tensor<2, Bool>>) {
        let codes = candidate.codes(self.weight.clone(), self.bits.max_code());
        let error = (self.weight.clone() - candidate.dequantize(codes)).abs();
        let error = error.powf_scalar(self.power).mean_dim(1);
        let error = match excluded {
            Some(mask) => error.mask_fill(mask, f32::INFINITY),
            None => error,
        };
        self.best = Some(match self.best.take() {
            None => (error, candidate),
            Some((best_error, best)) => {
                let better = error.clone().lower(best_error.clone());
                (
                    best_error.mask_where(better.clone(), error),
                    QuantParams {
                        scale: best.scale.mask_where(better.clone(), candidate.scale),
                        zero_point: best.zero_point.mask_where(better, candidate.zero_point),
                    },
                )
            }
        });
    }

    fn into_best(self, otherwise: impl FnOnce() -> QuantParams) -> QuantParams {
        self.best.map_or_else(otherwise, |(_, best)| best)
    }
}

/// A step of at least the floor; the comparison leaves a damaged weight's NaN where it is.
fn floored(step: f32) -> f32 {
    if step < SCALE_FLOOR { SCALE_FLOOR } else { step }
}

/// The search in one pass over the weight, where a kernel reads it: `offer` appends the candidates
/// of a threshold, which is a fraction of a group's `reach`.
fn one_pass(
    config: &MseConfig,
    weight: &Tensor<2>,
    bits: Bits,
    reach: impl Fn(Extent) -> f32 + Sync,
    offer: impl Fn(Extent, f32, &mut Vec<Candidate>) + Sync,
) -> Option<QuantParams> {
    if config.grid == 0 {
        return None;
    }
    let rule = Rule::Affine { max_code: f32::from(bits.max_code()) };
    let found = ops::nearest_grids(weight, rule, config.power, |extent, candidates| {
        let reach = reach(extent);
        for i in 1..=config.grid {
            offer(extent, reach * (i as f32 / config.grid as f32), candidates);
        }
        if candidates.is_empty() {
            // A group of zeros: every grid holds it.
            candidates.push(Candidate { step: SCALE_FLOOR, zero_point: 0.0 });
        }
    });
    found.map(|(scale, zero_point)| QuantParams { scale, zero_point })
}

/// Thresholds times zero points. A one-sided group only counts candidates
/// whose range starts (or ends) at zero, which is the 1-D search of the source.
fn mse_asymmetric(config: &MseConfig, weight: &Tensor<2>, bits: Bits) -> QuantParams {
    let max_code = bits.max_code();
    let range_of = |Extent { low, high }: Extent| {
        (if high < 0.0 { 0.0 } else { high }) - (if low > 0.0 { 0.0 } else { low })
    };
    let in_one_pass = one_pass(config, weight, bits, range_of, |extent, threshold, candidates| {
        let delta = threshold / f32::from(max_code);
        for zero in 0..=max_code {
            let one_sided =
                (zero != 0 && extent.low >= 0.0) || (zero != max_code && extent.high <= 0.0);
            if !one_sided {
                let low = delta * -f32::from(zero);
                let step = floored((threshold + low - low) / f32::from(max_code));
                let zero_point = -(low / step).round_ties_even();
                let zero_point = zero_point.clamp(0.0, f32::from(max_code));
                candidates.push(Candidate { step, zero_point });
            }
        }
    });
    if let Some(found) = in_one_pass {
        return found;
    }
    let low = weight.clone().min_dim(1).clamp_max(0.0);
    let high = weight.clone().max_dim(1).clamp_min(0.0);
    let no_negative = low.clone().equal_scalar(0.0);
    let no_positive = high.clone().equal_scalar(0.0);
    let range = high - low;
    let mut search = Search { weight, bits, power: config.power, best: None };
    for i in 1..=config.grid {
        let threshold = range.clone() * (i as f32 / config.grid as f32);
        let delta = threshold.clone() / f32::from(max_code);
        for zero in 0..=max_code {
            let low = delta.clone() * -f32::from(zero);
            let high = threshold.clone() + low.clone();
            let mut excluded = None;
            if zero != 0 {
                excluded = Some(no_negative.clone());
            }
            if zero != max_code {
                excluded = Some(match excluded {
                    None => no_positive.clone(),
                    Some(mask) => mask.bool_or(no_positive.clone()),
                });
            }
            search.offer(from_range(low, high, bits), excluded);
        }
    }
    search.into_best(|| min_max(weight, bits, true))
}

fn mse_symmetric(
    config: &MseConfig,
    weight: &Tensor<2>,
    bits: Bits,
    symmetry: Symmetry,
) -> QuantParams {
    let middle = (bits.levels() / 2) as f32;
    let in_one_pass = one_pass(config, weight, bits, Extent::reach, |_, threshold, candidates| {
        let step = if symmetry == Symmetry::FullRange {
            threshold * 2.0 / f32::from(bits.max_code())
        } else {
            threshold / (middle - 1.0)
        };
        candidates.push(Candidate { step: floored(step), zero_point: middle });
    });
    if let Some(found) = in_one_pass {
        return found;
    }
    let reach = abs_max(weight);
    let mut search = Search { weight, bits, power: config.power, best: None };
    for i in 1..=config.grid {
        let threshold = reach.clone() * (i as f32 / config.grid as f32);
        search.offer(QuantParams::symmetric(&threshold, bits, symmetry), None);
    }
    search.into_best(|| QuantParams::symmetric(&reach, bits, symmetry))
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;

    /// Mean `|W - W_hat|^p` of each group, in f64.
    fn errors(weight: &Tensor<2>, grid: &QuantParams, bits: Bits, power: f64) -> Vec<f64> {
        let [_, len] = weight.dims();
        let w_hat = grid.dequantize(grid.codes(weight.clone(), bits.max_code()));
        let error = (weight.clone() - w_hat).abs().into_data().iter::<f64>().collect::<Vec<_>>();
        error.chunks(len).map(|group| group.iter().map(|e| e.powf(power)).sum()).collect()
    }

    #[test]
    fn the_search_in_one_pass_finds_no_worse_grids() {
        let (groups, len) = (24, 128);
        // Ordinary, one-sided, and empty groups.
        let wave = |i: usize| ((i as f32 + 0.3) * 12.9898).sin().powi(3) * 0.1;
        let value = |i: usize| match i / len % 6 {
            0 => wave(i).abs(),
            1 => -wave(i).abs(),
            2 if i / len == 2 => 0.0,
            _ => wave(i),
        };
        let values: Vec<f32> = (0..groups * len).map(value).collect();
        let device = Device::default();
        let weight = Tensor::<2>::from_data(TensorData::new(values, [groups, len]), &device);
        for bits in [2, 3, 4].map(|bits| Bits::new(bits).unwrap()) {
            for symmetry in [Symmetry::Asymmetric, Symmetry::FullRange, Symmetry::AbsMax] {
                for power in [2.0, 2.4] {
                    let config = ObserverConfig::Mse(MseConfig { power, grid: 40 });
                    let search = || config.observe(&weight, bits, symmetry).unwrap();
                    let of = |grid: QuantParams| errors(&weight, &grid, bits, f64::from(power));
                    let (found, composed) = (of(search()), of(ops::composed(search)));
                    for (found, composed) in found.iter().zip(&composed) {
                        assert!(
                            *found <= composed * (1.0 + 1e-6),
                            "{found} for {composed}, {bits} bits, {symmetry:?}, {power}"
                        );
                    }
                }
            }
        }
    }
}
