//! The positions of calibration windows.

use burn::tensor::{DType, Device};

use crate::data::TokenStream;
use crate::model::{ModelConfig, Positions};

/// Positions of some windows: alike in a text, in packed examples those of each window's own.
pub(super) struct Places {
    config: ModelConfig,
    device: Device,
    length: usize,
    alike: Positions,
    /// Where the example of each token starts, `[windows][length]`; `None` for text.
    starts: Option<Vec<Vec<u32>>>,
}

impl Places {
    /// Those of these windows of `length` tokens.
    pub(super) fn new(
        config: &ModelConfig,
        stream: &TokenStream,
        windows: &[usize],
        length: usize,
        device: &Device,
    ) -> Self {
        let starts =
            windows.iter().map(|window| stream.starts(*window, length).map(<[u32]>::to_vec));
        Self {
            config: config.clone(),
            device: device.clone(),
            length,
            alike: Positions::new(config, 0, length, DType::F32, device),
            starts: starts.collect(),
        }
    }

    /// Of a batch of windows, by their numbers among those given.
    pub(super) fn of(&self, samples: &[u32]) -> Positions {
        let Some(starts) = &self.starts else { return self.alike.clone() };
        let starts: Vec<&[u32]> =
            samples.iter().map(|sample| starts[*sample as usize].as_slice()).collect();
        Positions::with_starts(&self.config, 0, &starts, DType::F32, &self.device)
    }

    /// Tokens of a window.
    pub(super) fn length(&self) -> usize {
        self.length
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::{CausalLm, Loader, open_folder};
    use crate::stage::activations::{Activations, Keeping};

    const LENGTH: usize = 24;

    /// Windows of examples of these lengths, each window cut elsewhere.
    fn packed(windows: u32) -> TokenStream {
        let (mut tokens, mut starts) = (Vec::new(), Vec::new());
        for window in 0..windows {
            for place in 0..LENGTH as u32 {
                tokens.push((7 * place + 13 * window) % 50 + 3);
                let cuts = [0, 5 + window % 3, 15 + window % 5];
                starts.push(cuts.into_iter().rfind(|cut| *cut <= place).unwrap_or(0));
            }
        }
        let packed = Some(LENGTH);
        TokenStream { tokens, starts: Some(starts), packed, ..TokenStream::default() }
    }

    /// Behind a block, an example in a packed window is what it is alone: of rotated positions and
    /// of learned ones, over more windows than one pass takes.
    #[test]
    fn an_example_in_a_window_is_what_it_is_alone() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let device = Device::flex();
        for folder in ["datasets/stories260k", "tests/parity/gpt2"] {
            let (config, source) = open_folder(&root.join(folder)).unwrap();
            let loader =
                Loader { config: &config, source: &source, device: &device, dtype: DType::F32 };
            let (entrance, block) = (loader.entrance().unwrap(), loader.block(0).unwrap());
            let stream = packed(11);
            let windows: Vec<usize> = (0..11).rev().collect();
            let places = Places::new(&config, &stream, &windows, LENGTH, &device);
            let embedded =
                Activations::collect([windows.len(), LENGTH], &Keeping::default(), |range| {
                    let samples: Vec<u32> = range.clone().map(|i| i as u32).collect();
                    let rows: Vec<&[u32]> =
                        range.map(|i| stream.window(windows[i], LENGTH)).collect();
                    Ok(entrance.embed(CausalLm::tokens(&rows, &device), &places.of(&samples)))
                });
            let forward = |x, samples: &[u32]| Ok(block.forward(x, &places.of(samples)));
            let behind = embedded.unwrap().map(&device, forward).unwrap();
            for (sample, window) in windows.iter().enumerate() {
                let (row, starts) =
                    (stream.window(*window, LENGTH), stream.starts(*window, LENGTH).unwrap());
                let together = behind.batch(&[sample as u32], &device).unwrap();
                let size = together.clone().abs().max().into_scalar::<f32>();
                for range in starts.chunk_by(|a, b| a == b) {
                    let range = range[0] as usize..range[0] as usize + range.len();
                    let positions = Positions::new(&config, 0, range.len(), DType::F32, &device);
                    let tokens = CausalLm::tokens(&[&row[range.clone()]], &device);
                    let alone = block.forward(entrance.embed(tokens, &positions), &positions);
                    let change = together.clone().slice_dim(1, range) - alone;
                    let change = change.abs().max().into_scalar::<f32>();
                    assert!(change < 1e-5 * size, "{folder}: {change} of {size}");
                }
            }
        }
    }
}
