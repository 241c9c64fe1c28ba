//! A few windows of the validation text, on which a model is measured again and again: while it is
//! trained, when a stage is done, and before it is exported.

use burn::tensor::{Device, Int, Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::context::StageContext;
use super::corpus::Corpus;
use super::logits::{chunks, flat};
use super::results::Quality;
use crate::error::{Error, Result};
use crate::model::{CausalLm, Forward, ModelConfig, Positions};
use crate::ops;
use crate::stop::StopFlag;

/// Tokens of a forward pass.
const TOKENS_PER_BATCH: usize = 2048;

/// `validate = { ... }` of a stage that trains the whole model: what it does about itself. It needs
/// `[data.validation]`; without that text, steps are watched by their losses and gradients alone.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct ValidateConfig {
    /// Steps between validations, beside those at the start and the end; 0: none at all. Default: a
    /// tenth of the stage's steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// Windows of the validation text, evenly spread; 4.
    pub windows: usize,
    /// Tokens in a window; 256. (Packed examples have their own windows.)
    pub length: usize,
    /// Leave the state with the lowest validation (divergence from the teacher where there is one,
    /// else loss) when the last one is worse by more than noise; `true`.
    pub keep_best: bool,
    /// End the training after this many validations in a row that were not the best so far; needs
    /// `keep_best`. Absent: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub patience: Option<u32>,
    /// How often a training that fails goes back to its best state with half the rate; 3.
    pub retries: u32,
}

impl Default for ValidateConfig {
    fn default() -> Self {
        Self { every: None, windows: 4, length: 256, keep_best: true, patience: None, retries: 3 }
    }
}

impl ValidateConfig {
    /// Whether nothing was said, which a resolved recipe leaves out.
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn check(&self) -> Result<()> {
        if self.windows == 0 {
            return Err(Error::usage("validate.windows = 0 measures nothing")
                .fix("validate.windows = 4, or validate.every = 0"));
        }
        if self.patience == Some(0) {
            let what = "validate.patience = 0 ends a training before it begins";
            return Err(Error::usage(what).fix("validate.patience = 3"));
        }
        if self.patience.is_some() && (!self.keep_best || self.every == Some(0)) {
            let what = "validate.patience waits for a better state, and none is looked for";
            return Err(
                Error::usage(what).fix("validate.keep_best = true, and validate.every not 0")
            );
        }
        if self.length < 2 {
            let what = format!("validate.length = {} predicts nothing", self.length);
            return Err(Error::usage(what).fix("validate.length = 256"));
        }
        Ok(())
    }

    /// Whether there may be a state to go back to.
    pub(super) fn keeps(&self) -> bool {
        self.retries > 0 || self.keep_best && self.every != Some(0)
    }

    /// Steps between validations of a training of `steps`; 0: none.
    pub(super) fn interval(&self, steps: u64) -> u64 {
        self.every.unwrap_or((steps / 10).max(1))
    }
}

/// What a model is like on a slice of the validation text.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Serialize)]
pub struct Point {
    /// Mean negative log-likelihood of a token, nats.
    pub nll: f64,
    /// `KL(teacher‖student)` of a token, nats, where there is a teacher.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_forward: Option<f64>,
    /// Share of tokens on which student and teacher find the same token likeliest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub top1: Option<f64>,
}

/// Perplexities on a slice that differ by less than this factor's logarithm are the same.
pub(super) const NOISE_NLL: f64 = 0.02;
/// Divergences that differ by less than this share, or ...
const NOISE_KL: f64 = 0.02;
/// ... by less than this many nats, are the same.
const NOISE_KL_NATS: f64 = 1e-4;

impl Point {
    /// The number to compare by: the divergence from the teacher, else the loss.
    pub(super) fn value(&self) -> f64 {
        self.kl_forward.unwrap_or(self.nll)
    }

    /// Whether it is worse than another by more than noise; a value that is not a number always is.
    pub(super) fn is_worse_than(&self, other: &Self) -> bool {
        let noise = match other.kl_forward {
            Some(kl) => (NOISE_KL * kl).max(NOISE_KL_NATS),
            None => NOISE_NLL,
        };
        self.value().is_nan() || self.value() > other.value() + noise
    }
}

/// Whether a measurement has to end early, and who hears how far it is: parts done, of how many.
pub(super) type Watch<'a> = (&'a StopFlag, &'a dyn Fn(u64, u64));

/// Windows of a text.
pub(super) struct Slice {
    batches: Vec<Batch>,
    /// Tokens in a window.
    pub length: usize,
    /// Windows.
    pub windows: usize,
    /// Tokens that are predicted and count.
    pub tokens: u64,
}

struct Batch {
    rows: Vec<Vec<u32>>,
    /// Where the example of each token starts, where rows are packed with examples.
    starts: Option<Vec<Vec<u32>>>,
    /// The token after each position.
    next: Vec<i32>,
    /// Whether it is there and counts.
    counts: Vec<bool>,
}

impl Slice {
    /// The windows that `config` asks for, or what the text and the model have of them; `None` where
    /// that is nothing.
    pub(super) fn new(
        corpus: &Corpus,
        config: &ValidateConfig,
        model: &ModelConfig,
    ) -> Option<Self> {
        let stream = &corpus.stream;
        let shortest = config.length.min(model.max_positions).min(stream.tokens.len());
        let length = stream.packed.unwrap_or(shortest);
        if length < 2 {
            return None;
        }
        let supervised = |window: &usize| {
            stream.supervision(*window, length).is_none_or(|flags| flags[1..].contains(&true))
        };
        let all: Vec<usize> = (0..stream.windows(length)).filter(supervised).collect();
        let number = config.windows.min(all.len());
        let windows: Vec<usize> = (0..number).map(|i| all[i * all.len() / number]).collect();
        let batches: Vec<Batch> = windows
            .chunks((TOKENS_PER_BATCH / length).max(1))
            .map(|windows| {
                let starts = windows.iter().map(|window| stream.starts(*window, length));
                let mut batch = Batch {
                    rows: Vec::new(),
                    starts: starts.map(|starts| starts.map(<[u32]>::to_vec)).collect(),
                    next: Vec::new(),
                    counts: Vec::new(),
                };
                for window in windows {
                    let row = stream.window(*window, length);
                    let flags = stream.supervision(*window, length);
                    let counts = |i: usize| i < length && flags.is_none_or(|flags| flags[i]);
                    batch.next.extend(row[1..].iter().map(|id| id.cast_signed()).chain([0]));
                    batch.counts.extend((1..=length).map(counts));
                    batch.rows.push(row.to_vec());
                }
                batch
            })
            .collect();
        let tokens = batches.iter().flat_map(|batch| &batch.counts).filter(|c| **c).count() as u64;
        (tokens > 0).then_some(Self { batches, length, windows: number, tokens })
    }

    /// A model called `what` with a mean loss of `nll` on these windows.
    pub(super) fn quality(&self, ctx: &StageContext<'_>, what: &str, nll: f64) -> Quality {
        let corpus = ctx.data.validation.as_ref();
        Quality {
            stage: ctx.stage,
            what: what.to_owned(),
            nll_per_token: nll.is_finite().then_some(nll),
            tokens: self.tokens,
            windows: self.windows,
            length: self.length,
            data_sha256: corpus.map(|corpus| corpus.sha256.clone()).unwrap_or_default(),
            made_by: String::new(),
        }
    }

    /// What a measurement tells of itself: every batch through the blocks, and then through the head.
    fn passes(&self) -> u64 {
        2 * self.batches.len() as u64
    }

    /// The final hidden states of `model`, `[batch * length, d_model]` for each batch: of a teacher, to
    /// be kept. They are far smaller than its logits.
    ///
    /// # Errors
    /// When weights cannot be read, or a signal came.
    pub(super) fn hidden(
        &self,
        model: &dyn Forward,
        config: &ModelConfig,
        device: &Device,
        (stop, progress): Watch<'_>,
    ) -> Result<Vec<Tensor<2>>> {
        let dtype = model.ends().dtype();
        let positions = Positions::new(config, 0, self.length, dtype, device);
        let own = |batch: &Batch| {
            let starts: Vec<&[u32]> = batch.starts.as_ref()?.iter().map(Vec::as_slice).collect();
            Some(Positions::with_starts(config, 0, &starts, dtype, device))
        };
        let own: Vec<Option<Positions>> = self.batches.iter().map(own).collect();
        let input = |index: usize| {
            let rows: Vec<&[u32]> = self.batches[index].rows.iter().map(Vec::as_slice).collect();
            (CausalLm::tokens(&rows, device), own[index].as_ref().unwrap_or(&positions))
        };
        let at_once = model.batches_at_once(TOKENS_PER_BATCH.max(self.length));
        let mut all = Vec::new();
        let indices: Vec<usize> = (0..self.batches.len()).collect();
        for batches in indices.chunks(at_once) {
            stop.check()?;
            progress(all.len() as u64, self.passes());
            let hidden = model.streams(batches.iter().map(|index| input(*index)).collect())?;
            all.extend(hidden.into_iter().map(flat));
        }
        Ok(all)
    }

    /// Measures `model`, off the tape, beside a teacher and its [`Slice::hidden`] where there is one.
    /// The numbers may be no numbers; that is the caller's to judge.
    ///
    /// # Errors
    /// When weights cannot be read, or a signal came.
    pub(super) fn measure(
        &self,
        model: &dyn Forward,
        teacher: Option<(&CausalLm, &[Tensor<2>])>,
        config: &ModelConfig,
        device: &Device,
        (stop, progress): Watch<'_>,
    ) -> Result<Point> {
        let (mut nll, mut kl, mut top1) = (0.0, 0.0, 0.0);
        let all = self.hidden(model, config, device, (stop, progress))?;
        for (index, hidden) in all.into_iter().enumerate() {
            stop.check()?;
            progress((self.batches.len() + index) as u64, self.passes());
            let Batch { next, counts, .. } = &self.batches[index];
            let [count, _] = hidden.dims();
            for range in chunks(count, model.ends().vocab()) {
                let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
                let logits = model.ends().logits(part(&hidden));
                let rows = range.len();
                let targets = TensorData::new(next[range.clone()].to_vec(), [rows, 1]);
                let targets = Tensor::<2, Int>::from_data(targets, device);
                let counts = &counts[range.clone()];
                let losses = ops::negative_log_likelihood(logits.clone(), targets);
                let counted = losses.iter().zip(counts).filter(|(_, counts)| **counts);
                nll += counted.map(|(loss, _)| f64::from(*loss)).sum::<f64>();
                if let Some((teacher, hidden)) = teacher {
                    let weights = counts.iter().map(|c| f32::from(u8::from(*c))).collect();
                    let weights: Vec<f32> = weights;
                    let weights = Tensor::from_data(TensorData::new(weights, [rows, 1]), device);
                    let goal = teacher.logits(part(&hidden[index]));
                    let closeness = ops::compare(logits, goal, weights);
                    kl += closeness.kl_forward;
                    top1 += closeness.top1;
                }
            }
        }
        progress(self.passes(), self.passes());
        let mean = |sum: f64| sum / self.tokens as f64;
        Ok(Point {
            nll: mean(nll),
            kl_forward: teacher.map(|_| mean(kl)),
            top1: teacher.map(|_| mean(top1)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::TokenStream;

    fn corpus(stream: TokenStream) -> Corpus {
        Corpus {
            stream,
            reading: crate::data::Reading::default(),
            template: None,
            sha256: String::new(),
            name: String::new(),
            samples: None,
            length: 8,
        }
    }

    fn model() -> ModelConfig {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/datasets/tinystories-656k");
        ModelConfig::read(std::path::Path::new(folder)).unwrap()
    }

    #[test]
    fn windows_are_spread_and_shrink_with_the_text() {
        let text = |tokens: u32| {
            corpus(TokenStream { tokens: (0..tokens).collect(), ..TokenStream::default() })
        };
        let config = ValidateConfig { windows: 4, length: 16, ..ValidateConfig::default() };
        let slice = Slice::new(&text(160), &config, &model()).unwrap();
        assert_eq!((slice.windows, slice.length, slice.tokens), (4, 16, 60));
        let starts: Vec<u32> = slice.batches[0].rows.iter().map(|row| row[0]).collect();
        assert_eq!(starts, [0, 32, 80, 112]);
        assert_eq!(slice.batches[0].next[..2], [1, 2]);
        let slice = Slice::new(&text(10), &config, &model()).unwrap();
        assert_eq!((slice.windows, slice.length, slice.tokens), (1, 10, 9));
        assert!(Slice::new(&text(1), &config, &model()).is_none());
    }

    #[test]
    fn only_supervised_tokens_of_packed_examples_count() {
        let supervised = (0..16).map(|i| i == 9 || i == 11 || i == 8).collect();
        let packed = TokenStream {
            tokens: (0..16).collect(),
            supervised: Some(supervised),
            packed: Some(8),
            ..TokenStream::default()
        };
        let slice = Slice::new(&corpus(packed), &ValidateConfig::default(), &model()).unwrap();
        // The first token of a window is never predicted.
        assert_eq!((slice.windows, slice.tokens), (1, 2));
        assert_eq!(slice.batches[0].rows[0][0], 8);
    }

    #[test]
    fn worse_is_beyond_noise() {
        let point = |nll, kl_forward| Point { nll, kl_forward, top1: None };
        assert!(!point(3.01, None).is_worse_than(&point(3.0, None)));
        assert!(point(3.05, None).is_worse_than(&point(3.0, None)));
        assert!(point(f64::NAN, None).is_worse_than(&point(3.0, None)));
        assert!(!point(9.0, Some(0.10001)).is_worse_than(&point(3.0, Some(0.1))));
        assert!(point(3.0, Some(0.2)).is_worse_than(&point(9.0, Some(0.1))));
        assert!(!point(3.0, Some(2e-5)).is_worse_than(&point(3.0, Some(1e-6))));
    }
}
