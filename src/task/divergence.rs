//! How far a model is from a reference, token by token: what quantization changed, whatever a text's answers are.
//!
//! `kl` is the mean over tokens of `KL(reference ‖ model)`, nats, and `top1_agreement` the share of tokens of which
//! both find the same one likeliest. Windows and tokens are those of `task.ppl`.

use burn::tensor::{Tensor, TensorData};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Map;

use super::files::Source;
use super::kind::{Bench, Material, Number, Prepared, Refused, Score, Task};
use super::perplexity::{LOGITS_PER_CHUNK, PplConfig, TOKENS_PER_BATCH, chosen, flags, streams};
use crate::data::{ScoredWindow, TokenStream};
use crate::error::{Error, Result};
use crate::model::{CausalLm, Forward, ModelConfig, Positions};
use crate::ops;

/// `task.kl = { ... }`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct KlConfig {
    /// Window length; default the model's context, at most 2048.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context: Option<usize>,
    /// Use only this many windows, evenly spread; default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub windows: Option<usize>,
}

impl KlConfig {
    /// The perplexity with the same windows.
    fn windows(&self) -> PplConfig {
        PplConfig { context: self.context, windows: self.windows, ..PplConfig::default() }
    }
}

impl Task for KlConfig {
    fn numbers(&self) -> &'static [Number] {
        const {
            &[
                Number { name: "kl", tag: "eval/kl" },
                Number { name: "top1_agreement", tag: "eval/top1_agreement" },
            ]
        }
    }

    fn source(&self) -> Source<'_> {
        Source::Text
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn window(&self, model: &ModelConfig, packed: Option<usize>) -> Result<usize, Refused> {
        self.windows().window(model, packed)
    }

    fn limit(&mut self, windows: usize) {
        self.windows.get_or_insert(windows);
    }

    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>> {
        let text = material.text()?;
        let context = self.window(material.config, text.packed)?;
        let windows = chosen(text, [context, context], self.windows)?;
        Ok(Box::new(Compared { text, windows, context }))
    }

    fn protocol(&self, score: &Score) -> String {
        let of =
            |key: &str| score.protocol.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0);
        format!(
            "{} windows of {} tokens, KL(reference, model) in nats",
            of("windows"),
            of("context")
        )
    }

    fn marks(&self, score: &Score) -> Vec<[String; 2]> {
        let context =
            score.protocol.get("context").and_then(serde_json::Value::as_u64).unwrap_or(0);
        vec![[format!("context {context}"), format!("ctx {context}")]]
    }
}

/// Windows on which two models are compared.
struct Compared<'a> {
    text: &'a TokenStream,
    windows: Vec<ScoredWindow>,
    context: usize,
}

impl Prepared for Compared<'_> {
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score> {
        let Bench { device, stop, reference, .. } = *bench;
        let reference = reference.ok_or_else(|| {
            Error::usage("kl compares with a reference, and none is named")
                .at("--reference")
                .fix("--reference the float model")
        })?;
        let at = |model: &dyn Forward| {
            let ends = model.ends();
            Positions::new(&ends.config, 0, self.context, ends.dtype(), device)
        };
        let positions = [at(model), at(reference)];
        let batches: Vec<&[ScoredWindow]> =
            self.windows.chunks((TOKENS_PER_BATCH / self.context).max(1)).collect();
        let tokens = TOKENS_PER_BATCH.max(self.context);
        let at_once = model.batches_at_once(tokens).min(reference.batches_at_once(tokens));
        let (mut kl, mut top1, mut count, mut done) = (0.0, 0.0, 0_u64, 0);
        for batches in batches.chunks(at_once) {
            stop.check()?;
            progress(done, self.windows.len() as u64);
            let hidden = |model: &dyn Forward, positions: &Positions| {
                streams(model, self.text, batches, positions, device)
            };
            let pairs =
                hidden(model, &positions[0])?.into_iter().zip(hidden(reference, &positions[1])?);
            for (batch, (ours, theirs)) in batches.iter().zip(pairs) {
                done += batch.len() as u64;
                for (row, window) in batch.iter().enumerate() {
                    let models = [(model.ends(), &ours), (reference.ends(), &theirs)];
                    let found = self.compare(models, row, *window);
                    kl += found.0;
                    top1 += found.1;
                    count += found.2;
                }
            }
        }
        if count == 0 {
            return Err(Error::preflight("the data has zero supervised tokens")
                .fix("examples with completions that fit the windows"));
        }
        let [kl, top1] = [kl, top1].map(|sum| sum / count as f64);
        if !kl.is_finite() {
            return Err(Error::failed(format!("the divergence from the reference is {kl}"))
                .fix("fewbit inspect on both models"));
        }
        let mut protocol = Map::new();
        protocol.insert("context".to_owned(), self.context.into());
        protocol.insert("windows".to_owned(), self.windows.len().into());
        let numbers = [("kl", kl), ("top1_agreement", top1)];
        let numbers = numbers.map(|(name, value)| (name.to_owned(), value)).into();
        Ok(Score { numbers, tokens: count, protocol, ..Score::default() })
    }
}

impl Compared<'_> {
    /// Sums over a window's tokens of the divergence and of agreements, and how many tokens count. Models with
    /// the batch's hidden states, `[batch, context, width]`: the measured one and the reference.
    fn compare(
        &self,
        models: [(&CausalLm, &Tensor<3>); 2],
        row: usize,
        window: ScoredWindow,
    ) -> (f64, f64, u64) {
        let first = self.context - 1 - window.scored;
        let flags = flags(self.text, window, self.context);
        let chunk = (LOGITS_PER_CHUNK / models[0].0.vocab()).max(1);
        let (mut kl, mut top1, mut count) = (0.0, 0.0, 0);
        for start in (0..window.scored).step_by(chunk) {
            let len = chunk.min(window.scored - start);
            let [ours, theirs] = models.map(|(model, hidden)| {
                let width = hidden.dims()[2];
                let part = hidden.clone().narrow(0, row, 1).narrow(1, first + start, len);
                model.logits(part.reshape([len, width]))
            });
            let counts = |i: usize| flags.is_none_or(|flags| flags[start + i]);
            let weights: Vec<f32> = (0..len).map(|i| f32::from(u8::from(counts(i)))).collect();
            count += weights.iter().filter(|weight| **weight > 0.0).count() as u64;
            let weights = Tensor::from_data(TensorData::new(weights, [len, 1]), &ours.device());
            let found = ops::compare(ours, theirs, weights);
            kl += found.kl_forward;
            top1 += found.top1;
        }
        (kl, top1, count)
    }
}
