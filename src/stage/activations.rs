//! Hidden states of the calibration set: the float stream and the quantized stream, in main memory or in a
//! file, in f32 or bf16.

mod samples;

use std::rc::Rc;

use burn::tensor::{DType, Device, Tensor, TensorData};

pub(super) use self::samples::Keeping;
use self::samples::Samples;
pub use self::samples::StreamType;
use crate::error::Result;

/// Most samples of a forward-only pass.
const SAMPLES_PER_PASS: usize = 8;
/// Most tokens of a forward-only pass of several samples: what lies between the linears of a block is wider than
/// a hidden state, and all of it is there at once.
const TOKENS_PER_PASS: usize = 4096;

/// Samples of a forward-only pass over samples of so many tokens.
pub(super) fn samples_per_pass(length: usize) -> usize {
    (TOKENS_PER_PASS / length.max(1)).clamp(1, SAMPLES_PER_PASS)
}

/// One stream of hidden states, `[samples][seq, d_model]`. Clones share it.
#[derive(Clone, Debug)]
pub(super) struct Activations {
    samples: Rc<Samples>,
    /// Features of a token.
    width: usize,
}

impl Activations {
    /// None yet, kept so.
    pub(super) fn none(keeping: &Keeping) -> Self {
        Self { samples: Rc::new(Samples::none(keeping)), width: 1 }
    }

    /// From `make(range)`, which gives the hidden states of a run of `samples` of `length` tokens,
    /// `[n, seq, d_model]`.
    pub(super) fn collect(
        [samples, length]: [usize; 2],
        keeping: &Keeping,
        mut make: impl FnMut(std::ops::Range<usize>) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        let mut all = Self::none(keeping);
        let each = samples_per_pass(length);
        for start in (0..samples).step_by(each) {
            all.push(make(start..(start + each).min(samples))?)?;
        }
        Ok(all)
    }

    /// Adds samples, `[n, seq, d_model]`.
    pub(super) fn push(&mut self, hidden: Tensor<3>) -> Result<()> {
        let shape = hidden.dims();
        self.add(&values_of(hidden), shape)
    }

    /// Adds the values of samples of this shape, `[n, seq, d_model]`.
    pub(super) fn add(&mut self, values: &[f32], [n, seq, d_model]: [usize; 3]) -> Result<()> {
        self.width = d_model;
        if values.is_empty() {
            return Ok(()); // an expert that no token went to
        }
        debug_assert_eq!(values.len(), n * seq * d_model);
        let samples = self.own();
        values.chunks_exact(seq * d_model).try_for_each(|sample| samples.push(sample))
    }

    /// The samples, which nobody else has.
    fn own(&mut self) -> &mut Samples {
        if Rc::get_mut(&mut self.samples).is_none() {
            self.samples = Rc::new(Samples::none(self.samples.keeping()));
        }
        // Nobody else has heard of it yet.
        Rc::make_mut(&mut self.samples)
    }

    /// How they are kept.
    pub(super) fn keeping(&self) -> &Keeping {
        self.samples.keeping()
    }

    /// Whether there are no samples.
    pub(super) fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Mean magnitude of each feature over all tokens, `[d_model]`.
    pub(super) fn mean_magnitude(&self) -> Result<Vec<f32>> {
        let mut sums = vec![0.0f64; self.width];
        for run in self.runs() {
            for row in self.samples.read(&run)?.chunks_exact(self.width) {
                for (sum, x) in sums.iter_mut().zip(row) {
                    *sum += f64::from(x.abs());
                }
            }
        }
        let count = (self.samples.values() / self.width).max(1) as f64;
        Ok(sums.into_iter().map(|sum| (sum / count) as f32).collect())
    }

    /// Number of samples.
    pub(super) fn len(&self) -> usize {
        self.samples.len()
    }

    /// Some samples of one length as a batch, `[batch, seq, d_model]`.
    pub(super) fn batch(&self, indices: &[u32], device: &Device) -> Result<Tensor<3>> {
        let values = self.samples.read(indices)?;
        let seq = values.len() / (indices.len() * self.width).max(1);
        Ok(Tensor::from_data(TensorData::new(values, [indices.len(), seq, self.width]), device))
    }

    /// Begins to read a batch that will be asked for next; nothing to do in main memory.
    pub(super) fn ahead(&self, indices: &[u32]) -> Result<()> {
        self.samples.ahead(indices)
    }

    /// Runs of samples for forward-only passes; those of one run have one length.
    fn runs(&self) -> Vec<Vec<u32>> {
        let mut runs: Vec<Vec<u32>> = Vec::new();
        let length = |index: u32| self.samples.length(index);
        for index in 0..self.len() as u32 {
            let most = samples_per_pass(length(index) / self.width);
            match runs.last_mut() {
                Some(run) if run.len() < most && length(run[0]) == length(index) => run.push(index),
                _ => runs.push(vec![index]),
            }
        }
        runs
    }

    /// Gives every sample to `take`, some at a time, `[n, seq, d_model]`, with their numbers.
    pub(super) fn each(
        &self,
        device: &Device,
        mut take: impl FnMut(Tensor<3>, &[u32]) -> Result<()>,
    ) -> Result<()> {
        let runs = self.runs();
        for (at, run) in runs.iter().enumerate() {
            let batch = self.batch(run, device)?;
            if let Some(next) = runs.get(at + 1) {
                self.ahead(next)?;
            }
            take(batch, run)?;
        }
        Ok(())
    }

    /// Every sample through `forward`, which is told their numbers.
    pub(super) fn map(
        &self,
        device: &Device,
        mut forward: impl FnMut(Tensor<3>, &[u32]) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        let mut all = Self::none(self.samples.keeping());
        self.each(device, |x, samples| all.push(forward(x, samples)?))?;
        Ok(all)
    }

    /// As [`Activations::map`], in the place of what goes in where nobody else has that.
    pub(super) fn replace(
        mut self,
        device: &Device,
        mut forward: impl FnMut(Tensor<3>, &[u32]) -> Result<Tensor<3>>,
    ) -> Result<Self> {
        if Rc::get_mut(&mut self.samples).is_none() {
            return self.map(device, forward);
        }
        let runs = self.runs();
        for (at, run) in runs.iter().enumerate() {
            let batch = self.batch(run, device)?;
            if let Some(next) = runs.get(at + 1) {
                self.ahead(next)?;
            }
            let values = values_of(forward(batch, run)?);
            let each = values.len() / run.len();
            let samples = Rc::make_mut(&mut self.samples);
            for (index, sample) in run.iter().zip(values.chunks_exact(each)) {
                samples.set(*index, sample)?;
            }
        }
        Ok(self)
    }

    /// Mean squared difference to another stream, in f64.
    pub(super) fn mse(&self, other: &Self) -> Result<f64> {
        let mut sum = 0.0;
        let runs = self.runs();
        for (at, run) in runs.iter().enumerate() {
            let (own, others) = (self.samples.read(run)?, other.samples.read(run)?);
            if let Some(next) = runs.get(at + 1) {
                self.ahead(next)?;
                other.ahead(next)?;
            }
            sum = squares(sum, &own, &others);
        }
        Ok(self.mean(sum))
    }

    /// Mean squared difference between every sample through `forward` and `target`; nothing of the
    /// outputs is kept.
    pub(super) fn mse_through(
        &self,
        device: &Device,
        target: &Self,
        mut forward: impl FnMut(Tensor<3>, &[u32]) -> Result<Tensor<3>>,
    ) -> Result<f64> {
        let mut sum = 0.0;
        self.each(device, |x, samples| {
            target.ahead(samples)?;
            let values = values_of(forward(x, samples)?);
            sum = squares(sum, &values, &target.samples.read(samples)?);
            Ok(())
        })?;
        Ok(target.mean(sum))
    }

    fn mean(&self, sum: f64) -> f64 {
        sum / self.samples.values().max(1) as f64
    }
}

/// The values of hidden states in f32, row by row.
pub(super) fn values_of(hidden: Tensor<3>) -> Vec<f32> {
    hidden.cast(DType::F32).into_data().iter::<f32>().collect()
}

/// `sum` and the squared differences of `a` and `b`, added one after the other.
fn squares(sum: f64, a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).fold(sum, |sum, square| sum + square)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Distribution;

    use super::*;

    /// Streams in memory and in a file give the same bits, whatever is done with them.
    #[test]
    fn a_file_gives_the_bits_that_memory_gives() {
        let device = Device::flex();
        let dir = tempfile::tempdir().unwrap();
        let values = Tensor::<3>::random([11, 6, 4], Distribution::Normal(0.0, 3.0), &device);
        for dtype in [StreamType::F32, StreamType::Bf16] {
            let memory = Keeping { dtype, dir: None };
            let disk = Keeping { dtype, dir: Some(dir.path().to_owned()) };
            let [memory, disk] = [memory, disk].map(|keeping| {
                let from = |range| Ok(values.clone().slice_dim(0, range));
                Activations::collect([11, 6], &keeping, from).unwrap()
            });
            let changed = |x: &Activations| {
                let halved = |x: Tensor<3>, _: &[u32]| Ok(x * 0.3);
                let new = x.map(&device, halved).unwrap();
                let own = x.map(&device, |x, _| Ok(x)).unwrap().replace(&device, halved).unwrap();
                let bits = |x: &Activations| -> Vec<u32> {
                    let batch = [7, 0, 10];
                    x.ahead(&batch).unwrap();
                    let read = values_of(x.batch(&batch, &device).unwrap());
                    read.into_iter().map(f32::to_bits).collect()
                };
                assert_eq!(bits(&new), bits(&own));
                let through = x.mse_through(&device, &new, halved).unwrap();
                (bits(x), bits(&new), x.mse(&new).unwrap().to_bits(), through.to_bits())
            };
            assert_eq!(changed(&memory), changed(&disk));
            let (first, ..) = changed(&disk);
            let expected: Vec<u32> = values_of(values.clone().slice_dim(0, 7..8))
                .iter()
                .map(|x| match dtype {
                    StreamType::F32 => x.to_bits(),
                    StreamType::Bf16 => half::bf16::from_f32(*x).to_f32().to_bits(),
                })
                .collect();
            assert_eq!(first[..expected.len()], expected);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_replaced_is_still_there_for_others() {
        let device = Device::flex();
        let ones = |_| Ok(Tensor::<3>::ones([2, 3, 1], &device));
        let first = Activations::collect([2, 3], &Keeping::default(), ones).unwrap();
        let second = first.clone().replace(&device, |x, _| Ok(x * 2.0)).unwrap();
        assert!(
            values_of(first.batch(&[1], &device).unwrap())
                .iter()
                .all(|x| x.to_bits() == 1f32.to_bits())
        );
        assert!(
            values_of(second.batch(&[1], &device).unwrap())
                .iter()
                .all(|x| x.to_bits() == 2f32.to_bits())
        );
    }

    /// Experts see other numbers of tokens in each pass.
    #[test]
    fn samples_of_several_lengths_do_not_share_a_pass() {
        let device = Device::flex();
        let mut all = Activations::none(&Keeping::default());
        for tokens in [3, 3, 5, 0, 3] {
            all.push(Tensor::ones([1, tokens, 2], &device)).unwrap();
        }
        let mut seen = Vec::new();
        let take = |x: Tensor<3>, samples: &[u32]| {
            seen.push((x.dims(), samples.to_vec()));
            Ok(())
        };
        all.each(&device, take).unwrap();
        let expected = [([2, 3, 2], vec![0, 1]), ([1, 5, 2], vec![2]), ([1, 3, 2], vec![3])];
        assert_eq!(seen, expected);
        assert_eq!(all.mean_magnitude().unwrap(), [1.0, 1.0]);
    }
}
