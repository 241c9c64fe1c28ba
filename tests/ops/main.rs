//! Every front operation, value and gradients, in its fused form against the one that is composed
//! of burn's operations, and both against straightforward loops in f64.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

mod adamw;
mod binary_coding;
mod block;
mod codebook;
mod coded;
#[cfg(any(
    feature = "cuda",
    feature = "metal",
    feature = "rocm",
    feature = "vulkan",
    feature = "wgpu"
))]
mod device;
mod divided;
mod laws;
mod losses;
mod moments;
mod stepped;

use burn::tensor::{Device, Tensor, TensorData};
use fewbit::ops::{self, DeviceKernels};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Where properties are tried: on this machine's processor, or on the device that
/// `FEWBIT_TEST_DEVICE` names to a binary that was built for it.
pub(crate) fn place() -> Device {
    let Ok(name) = std::env::var("FEWBIT_TEST_DEVICE") else { return Device::flex() };
    // The same for every test of this process.
    DeviceKernels::All.choose();
    fewbit::device::open(&name).unwrap().device
}

/// Whether that is the processor, of whose kernels some laws are.
pub(crate) fn on_processor() -> bool {
    std::env::var_os("FEWBIT_TEST_DEVICE").is_none()
}

/// How many cases a property is tried in, of `all`: every one of them compiles kernels on a device.
pub(crate) fn cases(all: u32) -> ProptestConfig {
    ProptestConfig::with_cases(if on_processor() { all } else { all.div_ceil(8) })
}

/// Group lengths around the width of vectors.
pub(crate) const LENGTHS: [usize; 8] = [1, 7, 15, 16, 17, 33, 100, 128];

pub(crate) fn length() -> impl Strategy<Value = usize> {
    prop::sample::select(LENGTHS.to_vec())
}

/// A matrix on the host, row-major.
#[derive(Clone, Debug)]
pub(crate) struct Matrix {
    pub(crate) shape: [usize; 2],
    pub(crate) values: Vec<f32>,
}

impl Matrix {
    pub(crate) fn new(shape: [usize; 2], values: Vec<f32>) -> Self {
        assert_eq!(values.len(), shape[0] * shape[1]);
        Self { shape, values }
    }

    /// One column.
    pub(crate) fn column(values: Vec<f32>) -> Self {
        Self::new([values.len(), 1], values)
    }

    pub(crate) fn on(&self, device: &Device) -> Tensor<2> {
        Tensor::from_data(TensorData::new(self.values.clone(), self.shape), device)
    }

    /// Off every tape.
    pub(crate) fn plain(&self) -> Tensor<2> {
        self.on(&place())
    }

    pub(crate) fn at(&self, row: usize, column: usize) -> f64 {
        f64::from(self.values[row * self.shape[1] + column])
    }

    pub(crate) fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.shape[1]..][..self.shape[1]]
    }
}

/// Where a case's numbers come from.
pub(crate) struct Dice(ChaCha8Rng);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    /// In 0..1.
    pub(crate) fn unit(&mut self) -> f32 {
        self.0.random()
    }

    /// Roughly normal with standard deviation 1.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    pub(crate) fn noise(&mut self, count: usize, size: f32) -> Vec<f32> {
        (0..count).map(|_| self.normal() * size).collect()
    }

    pub(crate) fn matrix(&mut self, shape: [usize; 2], size: f32) -> Matrix {
        let values = self.noise(shape[0] * shape[1], size);
        Matrix::new(shape, values)
    }

    pub(crate) fn below(&mut self, count: usize) -> usize {
        self.0.random_range(0..count)
    }

    pub(crate) fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }
}

pub(crate) fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The same bits; on a device, which may multiply and add at once, the same but for the last ones.
#[track_caller]
pub(crate) fn same(what: &str, found: &[f32], expected: &[f32]) {
    if on_processor() {
        assert_eq!(bits(found), bits(expected), "{what}");
    } else {
        let expected = expected.iter().map(|x| f64::from(*x)).collect();
        close(what, found, &alike(expected), 2e-6);
    }
}

/// What an operation gave, and the gradients of its inputs.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome<const N: usize> {
    pub(crate) values: Vec<f32>,
    pub(crate) gradients: [Vec<f32>; N],
}

impl<const N: usize> Outcome<N> {
    /// Of `f`, whose inputs are all tracked, given the gradient of its result; none of an input that
    /// it does not use.
    pub(crate) fn on<const D: usize>(
        device: &Device,
        inputs: &[Matrix; N],
        upstream: &[f32],
        f: impl Fn([Tensor<2>; N]) -> Tensor<D>,
    ) -> Self {
        let leaves = inputs.each_ref().map(|input| input.on(device).require_grad());
        let result = f(leaves.clone());
        let plain = device.clone().inner();
        let upstream = TensorData::new(upstream.to_vec(), result.dims());
        let upstream = Tensor::from_data(upstream, &plain);
        // Not by a sum of burn's: its kernel is one that software Vulkans have crashed on.
        let value = Tensor::zeros([1], &plain);
        let gradients = ops::with_gradient(result.clone(), value, upstream).backward();
        let gradients = leaves.map(|leaf| leaf.grad(&gradients).map(host).unwrap_or_default());
        Self { values: host(result), gradients }
    }

    /// In the fused and in the composed form.
    pub(crate) fn both<const D: usize>(
        inputs: &[Matrix; N],
        upstream: &[f32],
        f: impl Fn([Tensor<2>; N]) -> Tensor<D>,
    ) -> [Self; 2] {
        let device = place().autodiff();
        let fused = Self::on(&device, inputs, upstream, &f);
        [fused, ops::composed(|| Self::on(&device, inputs, upstream, &f))]
    }
}

/// What `f` gives in the fused and in the composed form.
pub(crate) fn both<R>(f: impl Fn() -> R) -> [R; 2] {
    [f(), ops::composed(&f)]
}

/// A sum in f64, with the sum of its terms' magnitudes, to which errors are relative.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum {
    pub(crate) value: f64,
    pub(crate) size: f64,
}

impl Sum {
    pub(crate) fn add(&mut self, term: f64) {
        self.value += term;
        self.size += term.abs();
    }

    pub(crate) fn times(self, factor: f64) -> Self {
        Self { value: self.value * factor, size: self.size * factor.abs() }
    }
}

impl From<f64> for Sum {
    fn from(value: f64) -> Self {
        Self { value, size: value.abs() }
    }
}

impl FromIterator<f64> for Sum {
    fn from_iter<I: IntoIterator<Item = f64>>(terms: I) -> Self {
        let mut sum = Self::default();
        terms.into_iter().for_each(|term| sum.add(term));
        sum
    }
}

/// Values whose errors are relative to the largest of them, and to 1 where all are smaller.
pub(crate) fn alike(values: Vec<f64>) -> Vec<Sum> {
    let size = values.iter().fold(1.0f64, |max, value| max.max(value.abs()));
    values.into_iter().map(|value| Sum { value, size }).collect()
}

#[track_caller]
pub(crate) fn close(what: &str, found: &[f32], exact: &[Sum], tolerance: f64) {
    assert_eq!(found.len(), exact.len(), "{what}");
    for (i, (found, Sum { value, size })) in found.iter().zip(exact).enumerate() {
        // What the smallest normal number hides.
        let allowed = tolerance * size + 1e-37;
        let gap = (f64::from(*found) - value).abs();
        assert!(gap <= allowed, "{what}[{i}]: {found} for {value}, of terms of {size}");
    }
}
