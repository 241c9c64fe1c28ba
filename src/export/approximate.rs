//! The nearest thing to a weight that a format holds, for who allows a loss.

use std::num::NonZeroUsize;

use burn::tensor::{Device, Tensor, TensorData};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};
use crate::method::{self, MethodConfig, RtnConfig};
use crate::quant::{
    Bits, GroupAxis, GroupLayout, GroupSize, MseConfig, ObserverConfig, QuantSpec, QuantizedWeight,
    ScaleDigits, Symmetry,
};

/// Group lengths that every format has, for weights whose own it has not.
pub(super) const GROUPS: [usize; 3] = [128, 64, 32];

/// By how much weights were changed on their way into a format.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Loss {
    /// Weights that differ.
    pub changed: usize,
    /// Euclidean norm of the change over that of the weights.
    pub relative: f64,
    /// The largest change.
    pub largest: f32,
}

impl Loss {
    /// Between weights as trained and as stored; `None` where nothing changed.
    pub fn between(trained: &[f32], stored: &[f32]) -> Option<Self> {
        if trained == stored {
            return None;
        }
        let (mut changed, mut largest) = (0, 0_f32);
        let (mut squares, mut all) = (0.0, 0.0);
        for (trained, stored) in trained.iter().zip(stored) {
            let difference = (trained - stored).abs();
            changed += usize::from(difference > 0.0);
            largest = largest.max(difference);
            squares += f64::from(difference).powi(2);
            all += f64::from(*trained).powi(2);
        }
        let relative = (squares / all.max(f64::MIN_POSITIVE)).sqrt();
        (changed > 0).then_some(Self { changed, relative, largest })
    }
}

/// `weight`, or what is nearest to it of what the format `accepts`: first with the same codes and
/// shorter scales, then rounded to the nearest again at the same width, at 8 bits, and at 4.
///
/// # Errors
/// Why the format refuses the weight itself, when it accepts nothing.
pub(super) fn nearest(
    weight: &QuantizedWeight,
    device: &Device,
    accepts: &dyn Fn(&QuantizedWeight) -> Result<()>,
) -> Result<QuantizedWeight> {
    let Err(refused) = accepts(weight) else { return Ok(weight.clone()) };
    if refused.kind() != Kind::Preflight {
        // Not what the weight is, but what was asked for.
        return Err(refused);
    }
    for scales in [ScaleDigits::F16, ScaleDigits::Bits7] {
        if let Ok(short) = weight.clone().with_scales(scales)
            && accepts(&short).is_ok()
        {
            return Ok(short);
        }
    }
    let trained = weight.dequantize();
    for bits in [weight.bits, Bits::EIGHT, Bits::new(4)?] {
        let mut best: Option<(f64, QuantizedWeight)> = None;
        for rounded in rounded(weight.layout, &trained, bits, device)? {
            if accepts(&rounded).is_err() {
                continue;
            }
            let error = Loss::between(&trained, &rounded.dequantize()).map_or(0.0, |l| l.relative);
            if best.as_ref().is_none_or(|(least, _)| error < *least) {
                best = Some((error, rounded));
            }
        }
        if let Some((_, best)) = best {
            return Ok(best);
        }
    }
    Err(refused)
}

/// `values` rounded to the nearest in every grouping that may fit, symmetric and not.
fn rounded(
    layout: GroupLayout,
    values: &[f32],
    bits: Bits,
    device: &Device,
) -> Result<Vec<QuantizedWeight>> {
    let own = (layout.axis == GroupAxis::In).then_some(layout.group_len.min(layout.inputs));
    let mut groups: Vec<usize> = own.into_iter().chain(GROUPS).collect();
    groups.retain(|group| layout.inputs.is_multiple_of(*group));
    groups.dedup();
    let symmetries = [Symmetry::FullRange, Symmetry::Asymmetric];
    let all = groups.iter().flat_map(|group| symmetries.map(|symmetry| (*group, symmetry)));
    let shape = [layout.out, layout.inputs];
    all.map(|(group, symmetry)| round_to_nearest(values, shape, group, (bits, symmetry), device))
        .collect()
}

/// `values`, `[out, inputs]`, rounded to the nearest in groups of `group` inputs, with scales in half
/// precision.
///
/// # Errors
/// When a value is not finite, or `group` does not divide the inputs.
pub(super) fn round_to_nearest(
    values: &[f32],
    shape: [usize; 2],
    group: usize,
    (bits, symmetry): (Bits, Symmetry),
    device: &Device,
) -> Result<QuantizedWeight> {
    let Some(group) = NonZeroUsize::new(group) else {
        return Err(Error::failed("groups of no weights"));
    };
    let spec = QuantSpec { bits, group_size: GroupSize::Of(group), symmetry };
    let layout = spec.layout(shape)?;
    let weight = Tensor::from_data(TensorData::new(values.to_vec(), shape), device);
    // The search tries every zero point: too many of them at greater widths, where it gains little.
    let observer = if bits.get() <= 3 || symmetry.is_symmetric() {
        ObserverConfig::Mse(MseConfig { power: 2.0, ..MseConfig::default() })
    } else {
        ObserverConfig::default()
    };
    let rtn = MethodConfig::Rtn(RtnConfig {});
    method::quantize(&rtn, &spec, &observer, layout, &weight)?.with_scales(ScaleDigits::F16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Grid, ZeroKind};

    fn weight(scale: f32, zero: f32, zero_kind: ZeroKind) -> QuantizedWeight {
        let layout =
            GroupLayout { out: 2, inputs: 64, groups: 2, group_len: 64, axis: GroupAxis::In };
        let grid = Grid::Uniform { scale: vec![scale; 2], zero_point: vec![zero; 2], zero_kind };
        let codes: Vec<u8> = (0..128).map(|i| i % 16).collect();
        QuantizedWeight::new(&codes, grid, Bits::new(4).unwrap(), layout).unwrap()
    }

    fn refuse(what: &str) -> Result<()> {
        Err(Error::preflight(what))
    }

    fn scale(weight: &QuantizedWeight) -> f32 {
        weight.grid.scales()[0]
    }

    #[test]
    fn the_least_change_that_is_accepted() {
        let long = weight(0.1, 8.0, ZeroKind::Integer);
        let same = nearest(&long, &Device::flex(), &|_| Ok(())).unwrap();
        assert_eq!(same, long);
        let half = nearest(&long, &Device::flex(), &|w| {
            let short = half::f16::from_f32(scale(w)).to_f32().to_bits() == scale(w).to_bits();
            if short { Ok(()) } else { refuse("long") }
        });
        let half = half.unwrap();
        assert_eq!((&half.codes, half.layout), (&long.codes, long.layout));
        let loss = Loss::between(&long.dequantize(), &half.dequantize()).unwrap();
        assert!(loss.changed == 120 && loss.relative < 5e-4 && loss.largest < 5e-4, "{loss:?}");
        let real = weight(0.1, 7.3, ZeroKind::Real);
        let integer = |w: &QuantizedWeight| match &w.grid {
            Grid::Uniform { zero_kind: ZeroKind::Integer, .. } => Ok(()),
            _ => refuse("real"),
        };
        let integer = nearest(&real, &Device::flex(), &integer).unwrap();
        assert_eq!(integer.bits.get(), 4);
        let wide = |w: &QuantizedWeight| if w.bits == Bits::EIGHT { Ok(()) } else { refuse("4") };
        let wide = nearest(&real, &Device::flex(), &wide).unwrap();
        let change = |w: &QuantizedWeight| {
            Loss::between(&real.dequantize(), &w.dequantize()).unwrap().relative
        };
        let (wide, integer) = (change(&wide), change(&integer));
        assert!(wide < 5e-3 && wide < integer, "{wide} {integer}");
        let refused = nearest(&real, &Device::flex(), &|_| refuse("never")).unwrap_err();
        assert_eq!(refused.what(), "never");
        let asked = nearest(&real, &Device::flex(), &|_| Err(Error::usage("asked")));
        assert_eq!(asked.unwrap_err().what(), "asked");
    }

    #[test]
    fn groups_that_do_not_fit_are_made_smaller() {
        let fits = |w: &QuantizedWeight| {
            if w.layout.group_len == 32 { Ok(()) } else { refuse("groups") }
        };
        let stored = nearest(&weight(0.5, 8.0, ZeroKind::Integer), &Device::flex(), &fits).unwrap();
        assert_eq!((stored.layout.group_len, stored.bits.get()), (32, 4));
    }
}
