//! What an export must not change: logits of fixed prompts, and a perplexity where there is text.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use sha2::{Digest, Sha256};

use super::perplexity::{Perplexity, PplConfig, measure};
use crate::data::{Reading, TokenStream, Tokenizer};
use crate::error::{Error, Result};
use crate::model::{ByBlock, CausalLm, Forward, ModelConfig, ModelTap, Positions, WeightSource};
use crate::ops;
use crate::stop::StopFlag;
use crate::store::hex;

/// The texts whose continuation is compared.
const PROMPTS: [&str; 4] = [
    "One day, a girl named Lily went to the park with her mom.",
    "The capital of France is",
    "fn main() {\n    let numbers = [1, 2, 3];\n",
    "Q: What is 12 * 12?\nA:",
];
/// Tokens of a prompt that are used.
const MOST_TOKENS: usize = 32;

/// How a model is measured before and after it is written.
pub struct Gauge<'a> {
    /// Where.
    pub device: &'a Device,
    /// In what type.
    pub dtype: DType,
    /// Prompts as token ids, none empty.
    pub prompts: Vec<Vec<u32>>,
    /// Text to measure a perplexity on.
    pub text: Option<GaugeText<'a>>,
    /// Set by signals.
    pub stop: &'a StopFlag,
    /// Told how many blocks of a pass are behind, and how many there are.
    pub progress: &'a dyn Fn(u64, u64),
}

/// Text and protocol of a [`Gauge`].
pub struct GaugeText<'a> {
    /// Its tokens.
    pub stream: &'a TokenStream,
    /// The protocol.
    pub task: PplConfig,
    /// SHA-256 of the text.
    pub sha256: String,
    /// How its documents became tokens.
    pub reading: Reading,
}

/// What a [`Gauge`] says.
#[derive(Clone, Debug)]
pub struct Gauged {
    /// Logits behind the last token of each prompt, `[prompts, vocab]`.
    pub logits: Vec<Vec<f32>>,
    /// Mean negative log-likelihood of the prompts' tokens, nats, each prompt's first aside.
    pub prompts_nll: f64,
    /// On the gauge's text.
    pub perplexity: Option<Perplexity>,
}

impl Gauged {
    /// The likeliest token behind each prompt.
    pub fn next_tokens(&self) -> Vec<u32> {
        let likeliest = |logits: &Vec<f32>| {
            let best = logits.iter().enumerate().rev().max_by(|a, b| a.1.total_cmp(b.1));
            best.map_or(0, |(id, _)| id as u32)
        };
        self.logits.iter().map(likeliest).collect()
    }

    /// SHA-256 of the logits as little-endian f32.
    pub fn logits_sha256(&self) -> String {
        let mut hash = Sha256::new();
        for logits in &self.logits {
            hash.update(logits.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>());
        }
        hex(&hash.finalize())
    }

    /// The largest difference between logits.
    pub fn logits_differ(&self, other: &Self) -> f32 {
        let pairs = self.logits.iter().flatten().zip(other.logits.iter().flatten());
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }
}

impl Gauge<'_> {
    /// The fixed prompts as a model reads them: by its tokenizer, or where it has none as ids
    /// spread over its vocabulary.
    pub fn prompts(tokenizer: Option<&Tokenizer>, config: &ModelConfig) -> Vec<Vec<u32>> {
        let limit = MOST_TOKENS.min(config.max_positions);
        let vocab = config.vocab.max(1) as u64;
        let spread = |prompt: u64| -> Vec<u32> {
            let ids = (1..=limit as u64).map(|at| (at * 7919 + prompt * 104_729) % vocab);
            ids.map(|id| id as u32).collect()
        };
        let Some(tokenizer) = tokenizer else {
            return (0..PROMPTS.len() as u64).map(spread).collect();
        };
        let prompt = |(index, text): (usize, &&str)| {
            let mut ids: Vec<u32> = config.bos.into_iter().collect();
            // A small vocabulary may lack what a text is made of.
            let encoded = tokenizer.encode(text).unwrap_or_default();
            let empty = encoded.is_empty();
            ids.extend(encoded);
            ids.truncate(limit);
            // A tokenizer's ids may reach beyond a model that was cut down.
            let fits = !empty && ids.iter().all(|id| u64::from(*id) < vocab);
            if fits { ids } else { spread(index as u64) }
        };
        PROMPTS.iter().enumerate().map(prompt).collect()
    }

    /// Measures the model that `source` holds, block by block.
    ///
    /// # Errors
    /// When weights cannot be read, the text does not fit the protocol, or a signal came.
    pub fn measure(
        &self,
        config: &ModelConfig,
        source: &dyn WeightSource,
        tap: ModelTap,
    ) -> Result<Gauged> {
        let model =
            ByBlock::open(config, source, tap, self.device, self.dtype)?.telling(self.progress);
        self.stop.check()?;
        let (logits, prompts_nll) = self.prompted(config, &model)?;
        let perplexity = self.text.as_ref().map(|text| {
            let GaugeText { stream, task, .. } = text;
            measure(&model, config, stream, task, self.device, self.stop, &mut |_, _| ())
        });
        Ok(Gauged { logits, prompts_nll, perplexity: perplexity.transpose()? })
    }

    /// The logits behind the last token of each prompt, `[prompts, vocab]`, and the mean loss
    /// of the others. Shorter prompts are filled up at their end, which no earlier token sees.
    fn prompted(&self, config: &ModelConfig, model: &ByBlock<'_>) -> Result<(Vec<Vec<f32>>, f64)> {
        let length = self.prompts.iter().map(Vec::len).max().unwrap_or(0);
        let filled = |prompt: &Vec<u32>| {
            let mut row = prompt.clone();
            row.resize(length, 0);
            row
        };
        let rows: Vec<Vec<u32>> = self.prompts.iter().map(filled).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let tokens = CausalLm::tokens(&rows, self.device);
        let positions = Positions::new(config, 0, length, self.dtype, self.device);
        let (mut last, mut losses) = (Vec::new(), Vec::new());
        for hidden in model.hidden(vec![tokens], &positions)? {
            let width = hidden.dims()[2];
            for (row, prompt) in self.prompts.iter().enumerate() {
                let count = prompt.len();
                let hidden = hidden.clone().narrow(0, row, 1).narrow(1, 0, count);
                let logits = model.ends().logits(hidden.reshape([count, width]));
                let end = logits.clone().narrow(0, count - 1, 1);
                last.push(end.into_data().iter::<f32>().collect());
                if count > 1 {
                    let next: Vec<i32> = prompt[1..].iter().map(|id| id.cast_signed()).collect();
                    let next = TensorData::new(next, [count - 1, 1]);
                    let next = Tensor::<2, Int>::from_data(next, self.device);
                    let logits = logits.narrow(0, 0, count - 1);
                    losses.extend(ops::negative_log_likelihood(logits, next));
                }
            }
        }
        let sum: f64 = losses.iter().map(|loss| f64::from(*loss)).sum();
        let mean = sum / losses.len().max(1) as f64;
        if !mean.is_finite() {
            return Err(Error::failed(format!("the model's loss on the fixed prompts is {mean}"))
                .fix("fewbit inspect on the model, or a smaller learning_rate"));
        }
        Ok((last, mean))
    }
}
