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
        for start in (0..samples).step_by(SAMPLES_PER_PASS) {
            all.push(make(start..(start + SAMPLES_PER_PASS).min(samples))?);
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

    /// Every sample through `forward`.
    pub(super) fn map(
        &self,
        device: &Device,
        mut forward: impl FnMut(Tensor<3>) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        Self::collect(self.len(), |range| {
            let indices: Vec<u32> = range.map(|i| i as u32).collect();
            forward(self.batch(&indices, device))
        })
    }

    /// Mean squared difference to another stream, in f64.
    pub(super) fn mse(&self, other: &Self) -> f64 {
        let pairs = self.samples.iter().flatten().zip(other.samples.iter().flatten());
        let sum: f64 = pairs.map(|(a, b)| f64::from(a - b).powi(2)).sum();
        sum / (self.len() * self.shape[0] * self.shape[1]).max(1) as f64
    }
}
