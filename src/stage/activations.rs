//! Block inputs: the float stream and the quantized stream, kept apart on the host.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::error::Result;

/// Samples per forward-only pass.
const SAMPLES_PER_PASS: usize = 8;

/// One stream of hidden states, `[samples][seq * d_model]`.
#[derive(Clone, Debug, Default)]
pub(super) struct Activations {
    samples: Vec<Vec<f32>>,
    shape: [usize; 2],
}

impl Activations {
    /// From `make(range)`, which gives the hidden states of a run of samples, `[n, seq, d_model]`.
    pub(super) fn collect(
        samples: usize,
        mut make: impl FnMut(std::ops::Range<usize>) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        let mut all = Self::default();
        for range in runs(samples) {
            all.push(make(range)?);
        }
        Ok(all)
    }

    /// Adds samples, `[n, seq, d_model]`; gives their values, row by row.
    pub(super) fn push(&mut self, hidden: Tensor<3>) -> Vec<f32> {
        let [_, seq, d_model] = hidden.dims();
        self.shape = [seq, d_model];
        let values: Vec<f32> = hidden.cast(DType::F32).into_data().iter::<f32>().collect();
        self.samples.extend(values.chunks_exact(seq * d_model).map(<[f32]>::to_vec));
        values
    }

    /// Adds another's samples, of the same shape.
    pub(super) fn append(&mut self, other: Self) {
        self.shape = other.shape;
        self.samples.extend(other.samples);
    }

    /// Whether there are no samples.
    pub(super) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Mean magnitude of each feature over all tokens, `[d_model]`.
    pub(super) fn mean_magnitude(&self) -> Vec<f32> {
        let [seq, d_model] = self.shape;
        let mut sums = vec![0.0f64; d_model];
        for row in self.samples.iter().flat_map(|sample| sample.chunks_exact(d_model)) {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += f64::from(x.abs());
            }
        }
        let count = (self.samples.len() * seq).max(1) as f64;
        sums.into_iter().map(|sum| (sum / count) as f32).collect()
    }

    /// Number of samples.
    pub(super) fn len(&self) -> usize {
        self.samples.len()
    }

    /// Some samples as a batch, `[batch, seq, d_model]`.
    pub(super) fn batch(&self, indices: &[u32], device: &Device) -> Tensor<3> {
        let [seq, d_model] = self.shape;
        let mut values = Vec::with_capacity(indices.len() * seq * d_model);
        for index in indices {
            values.extend_from_slice(&self.samples[*index as usize]);
        }
        Tensor::from_data(TensorData::new(values, [indices.len(), seq, d_model]), device)
    }

    /// Gives every sample to `take`, some at a time, `[n, seq, d_model]`, with their numbers.
    pub(super) fn each(
        &self,
        device: &Device,
        mut take: impl FnMut(Tensor<3>, &[u32]) -> Result<()>,
    ) -> Result<()> {
        runs(self.len()).try_for_each(|range| {
            let indices: Vec<u32> = range.map(|i| i as u32).collect();
            take(self.batch(&indices, device), &indices)
        })
    }

    /// Every sample through `forward`, which is told their numbers.
    pub(super) fn map(
        &self,
        device: &Device,
        mut forward: impl FnMut(Tensor<3>, &[u32]) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        Self::collect(self.len(), |range| {
            let indices: Vec<u32> = range.map(|i| i as u32).collect();
            forward(self.batch(&indices, device), &indices)
        })
    }

    /// Mean squared difference to another stream, in f64.
    pub(super) fn mse(&self, other: &Self) -> f64 {
        let sum = squares(0.0, self.samples.iter().flatten(), other.samples.iter().flatten());
        self.mean(sum)
    }

    /// Mean squared difference between every sample through `forward` and `target`; nothing of the
    /// outputs is kept.
    pub(super) fn mse_through(
        &self,
        device: &Device,
        target: &Self,
        mut forward: impl FnMut(Tensor<3>, &[u32]) -> Result<Tensor<3>>,
    ) -> Result<f64> {
        let (mut sum, mut done) = (0.0, 0);
        self.each(device, |x, samples| {
            let mut part = Self::default();
            part.push(forward(x, samples)?);
            let goal = target.samples[done..][..part.len()].iter().flatten();
            sum = squares(sum, part.samples.iter().flatten(), goal);
            done += part.len();
            Ok(())
        })?;
        Ok(target.mean(sum))
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / (self.len() * self.shape[0] * self.shape[1]).max(1) as f64
    }
}

/// `sum` and the squared differences of `a` and `b`, added one after the other.
fn squares<'a>(
    sum: f64,
    a: impl Iterator<Item = &'a f32>,
    b: impl Iterator<Item = &'a f32>,
) -> f64 {
    a.zip(b).map(|(a, b)| f64::from(a - b).powi(2)).fold(sum, |sum, square| sum + square)
}

/// The samples of each forward-only pass.
fn runs(samples: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..samples)
        .step_by(SAMPLES_PER_PASS)
        .map(move |start| start..(start + SAMPLES_PER_PASS).min(samples))
}
