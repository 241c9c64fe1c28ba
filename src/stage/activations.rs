//! Block inputs: the float stream and the quantized stream, kept apart on the host.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::error::Result;

/// Samples per forward-only pass.
const SAMPLES_PER_PASS: usize = 8;

/// One stream of hidden states, `[samples][seq * d_model]`.
#[derive(Clone, Debug)]
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
        let mut all = Vec::with_capacity(samples);
        let mut shape = [0, 0];
        for start in (0..samples).step_by(SAMPLES_PER_PASS) {
            let hidden = make(start..(start + SAMPLES_PER_PASS).min(samples))?;
            let [_, seq, d_model] = hidden.dims();
            shape = [seq, d_model];
            let values: Vec<f32> = hidden.cast(DType::F32).into_data().iter::<f32>().collect();
            all.extend(values.chunks_exact(seq * d_model).map(<[f32]>::to_vec));
        }
        Ok(Self { samples: all, shape })
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
