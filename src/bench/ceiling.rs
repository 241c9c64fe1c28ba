//! What a device reaches at most: large and small matrix products, and memory.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use serde::Serialize;

use crate::error::Result;
use crate::ops;
use crate::stop::StopFlag;

/// Side of a product that the caches hold.
const SMALL: usize = 256;
/// Side of a product that they do not.
const LARGE: usize = 2048;
/// Values of a tensor that no cache holds.
const WIDE: usize = 1 << 24;
/// What one measurement may take, roughly.
const SECONDS: f64 = 0.4;

/// What a device reaches at most in one type.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ceiling {
    /// Operations per second of the best product; a multiplication and an addition are two.
    pub flops: f64,
    /// Side of the small matrices.
    pub small_side: usize,
    /// Operations per second of their product.
    pub small_flops: f64,
    /// Side of the large matrices.
    pub large_side: usize,
    /// Operations per second of their product.
    pub large_flops: f64,
    /// Bytes per second that adding two large tensors reads and writes.
    pub bytes: f64,
}

impl Ceiling {
    /// The best of several runs.
    ///
    /// # Errors
    /// A signal.
    pub fn measure(device: &Device, dtype: DType, stop: &StopFlag) -> Result<Self> {
        let flops = |side: usize| -> Result<f64> {
            let random = || Tensor::<2>::random([side, side], Distribution::Default, device);
            let (a, b) = (random().cast(dtype), random().cast(dtype));
            // As the model multiplies: with a weight that lies `[out, in]`.
            let seconds = fastest(stop, &|| ops::linear(a.clone(), b.clone().transpose()))?;
            Ok(2.0 * (side as f64).powi(3) / seconds)
        };
        let small_flops = flops(SMALL)?;
        // On a device that is slow in this type the large product would take minutes.
        let mut large_side = LARGE;
        while large_side > SMALL && 2.0 * (large_side as f64).powi(3) / small_flops > SECONDS {
            large_side /= 2;
        }
        let large_flops = if large_side == SMALL { small_flops } else { flops(large_side)? };
        let random = || Tensor::<2>::random([WIDE >> 12, 1 << 12], Distribution::Default, device);
        let (a, b) = (random().cast(dtype), random().cast(dtype));
        let seconds = fastest(stop, &|| a.clone() + b.clone())?;
        let bytes = (3 * dtype.size() * WIDE) as f64 / seconds;
        let flops = small_flops.max(large_flops);
        Ok(Self { flops, small_side: SMALL, small_flops, large_side, large_flops, bytes })
    }
}

/// Seconds of the fastest of some runs.
fn fastest(stop: &StopFlag, work: &dyn Fn() -> Tensor<2>) -> Result<f64> {
    /// Work that is queued on the device before it is waited for.
    const QUEUED: u32 = 4;
    let finish = |tensor: Tensor<2>| drop(tensor.slice([0..1, 0..1]).into_data());
    finish(work());
    let (start, mut best) = (Instant::now(), f64::INFINITY);
    while best.is_infinite() || start.elapsed().as_secs_f64() < SECONDS {
        stop.check()?;
        let start = Instant::now();
        for _ in 1..QUEUED {
            drop(work());
        }
        finish(work());
        best = best.min(start.elapsed().as_secs_f64() / f64::from(QUEUED));
    }
    Ok(best)
}
