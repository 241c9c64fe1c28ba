//! Windows of text on the device, and an objective on them.
//!
//! The head is frozen, so the loss's gradient is brought back to the hidden state chunk by chunk,
//! and nothing of size `[tokens, vocab]` outlives its chunk.

use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::context::StageContext;
use super::corpus::Corpus;
use super::logits::{chunks, flat};
use super::on_policy::Sample;
use crate::data::TokenStream;
use crate::error::{Error, Result};
use crate::model::{CausalLm, ModelConfig, Positions};
use crate::objective::{ObjectiveConfig, Targets};
use crate::ops::{self, Likely, Numbers};

/// Token windows on the device.
pub struct Batch {
    tokens: Tensor<2, Int>,
    positions: Positions,
    next: Tensor<2, Int>,
    next_weights: Tensor<2>,
    weights: Tensor<2>,
    /// What a teacher that is not there has said of its tokens.
    said: Option<Said>,
}

/// What a teacher that is not there has said of the tokens of a batch.
pub(super) struct Said {
    /// Of each token.
    pub likely: Likely,
    /// At this temperature.
    pub temperature: f64,
}

/// Where batches come from and go to.
#[derive(Clone, Copy)]
pub struct Feed<'a> {
    /// The text.
    pub stream: &'a TokenStream,
    /// Tokens of its windows.
    pub length: usize,
    /// Their positions, where they are all alike.
    pub positions: &'a Positions,
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// The type of activations.
    pub dtype: DType,
    /// Where tensors live.
    pub device: &'a Device,
}

impl<'a> Feed<'a> {
    /// What the batches of a stage are made from.
    pub(super) fn new(
        ctx: &'a StageContext<'_>,
        corpus: &'a Corpus,
        positions: &'a Positions,
    ) -> Self {
        Self {
            stream: &corpus.stream,
            length: corpus.length,
            positions,
            config: &ctx.model.config,
            dtype: ctx.compute,
            device: &ctx.device.device,
        }
    }

    /// Some windows of the text.
    pub fn windows(&self, windows: &[u32]) -> Batch {
        let Self { stream, length, .. } = *self;
        let windows: Vec<usize> = windows.iter().map(|window| *window as usize).collect();
        let rows: Vec<&[u32]> = windows.iter().map(|w| stream.window(*w, length)).collect();
        let supervised: Vec<Option<&[bool]>> =
            windows.iter().map(|w| stream.supervision(*w, length)).collect();
        // Whether the token after position `i` is predicted and counts.
        let last = |i: usize| i % length == length - 1;
        let counts = |i: usize| {
            !last(i) && supervised[i / length].is_none_or(|window| window[i % length + 1])
        };
        // Text is compared with a teacher everywhere, examples where they are supervised.
        let compared = |i: usize| supervised[i / length].is_none() || counts(i);
        let starts: Option<Vec<&[u32]>> =
            windows.iter().map(|w| stream.starts(*w, length)).collect();
        let positions = match starts {
            None => self.positions.clone(),
            Some(starts) => {
                Positions::with_starts(self.config, 0, &starts, self.dtype, self.device)
            }
        };
        Batch::new(&rows, positions, counts, compared, self.device)
    }

    /// Texts that a model wrote, each behind its prompt: compared with a teacher where they were
    /// written, and nowhere an example to follow.
    pub(super) fn written(&self, samples: &[&Sample]) -> Batch {
        let length = samples.iter().map(|sample| sample.tokens().count()).max().unwrap_or(0);
        let rows: Vec<Vec<u32>> = samples
            .iter()
            .map(|sample| {
                let mut row: Vec<u32> = sample.tokens().collect();
                row.resize(length, 0);
                row
            })
            .collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        // The position before each token that was written.
        let compared = |i: usize| {
            let sample = samples[i / length];
            let first = sample.prompt.len();
            (first..first + sample.answer.len()).contains(&(i % length + 1))
        };
        let positions = Positions::new(self.config, 0, length, self.dtype, self.device);
        Batch::new(&rows, positions, |_| false, compared, self.device)
    }
}

impl Batch {
    /// Rows of one length. `counts` says of a position whether the token after it is an example to
    /// follow, `compared` whether student and teacher are compared there.
    fn new(
        rows: &[&[u32]],
        positions: Positions,
        counts: impl Fn(usize) -> bool,
        compared: impl Fn(usize) -> bool,
        device: &Device,
    ) -> Self {
        let flat: Vec<i32> = rows.concat().iter().map(|id| id.cast_signed()).collect();
        let count = flat.len();
        let next = (0..count).map(|i| if counts(i) { flat[i + 1] } else { 0 }).collect();
        let shares = |which: &dyn Fn(usize) -> bool| {
            let all = (0..count).filter(|i| which(*i)).count().max(1) as f32;
            let share = |i| if which(i) { 1.0 / all } else { 0.0 };
            let values: Vec<f32> = (0..count).map(share).collect();
            Tensor::from_data(TensorData::new(values, [count, 1]), device)
        };
        Self {
            tokens: CausalLm::tokens(rows, device),
            positions,
            next: Tensor::from_data(TensorData::new::<i32, _>(next, [count, 1]), device),
            next_weights: shares(&counts),
            weights: shares(&compared),
            said: None,
        }
    }

    /// With what a teacher has said of its tokens.
    #[must_use]
    pub(super) fn with_said(self, said: Said) -> Self {
        Self { said: Some(said), ..self }
    }

    /// Tokens.
    pub(super) fn len(&self) -> usize {
        self.tokens.dims().iter().product()
    }

    /// The tokens, `[rows, length]`.
    pub(super) fn tokens(&self) -> Tensor<2, Int> {
        self.tokens.clone()
    }

    /// Their positions.
    pub(super) fn positions(&self) -> &Positions {
        &self.positions
    }

    /// The teacher's confidence, a sum over tokens, from its final hidden states.
    ///
    /// # Shapes
    /// - hidden: `[batch, seq, width]`
    pub(super) fn confidence(&self, teacher: &CausalLm, hidden: Tensor<3>) -> f64 {
        let hidden = flat(hidden);
        let part =
            |tensor: &Tensor<2>, range: &Range<usize>| tensor.clone().slice_dim(0, range.clone());
        let parts = chunks(hidden.dims()[0], teacher.vocab()).map(|range| {
            ops::confidence(teacher.logits(part(&hidden, &range)), part(&self.weights, &range))
        });
        parts.sum()
    }

    /// The objective on this batch, joined to the student's tape at its hidden state.
    ///
    /// # Errors
    /// For an empty batch.
    pub fn loss(
        &self,
        student: &CausalLm,
        teacher: Option<&CausalLm>,
        objective: &ObjectiveConfig,
        compare: bool,
    ) -> Result<(Tensor<1>, Option<Numbers>)> {
        let positions = &self.positions;
        let hidden = student.hidden(self.tokens.clone(), positions);
        let goal = teacher.map(|teacher| (teacher, teacher.hidden(self.tokens.clone(), positions)));
        self.loss_at(student, hidden, goal, objective, compare)
    }

    /// As [`Batch::loss`], from what the heads of student and teacher read. Without a teacher the objective's
    /// is what the batch knows of one.
    ///
    /// # Errors
    /// As [`Batch::loss`].
    ///
    /// # Shapes
    /// - hidden, and the teacher's: `[batch, seq, width]`
    pub(super) fn loss_at(
        &self,
        student: &CausalLm,
        hidden: Tensor<3>,
        teacher: Option<(&CausalLm, Tensor<3>)>,
        objective: &ObjectiveConfig,
        compare: bool,
    ) -> Result<(Tensor<1>, Option<Numbers>)> {
        let hidden = flat(hidden);
        let free = hidden.clone().inner();
        let teacher = teacher.map(|(teacher, goal)| (teacher, flat(goal)));
        let [count, _] = free.dims();
        let mut value: Option<Tensor<1>> = None;
        let mut gradients = Vec::new();
        let mut closeness: Option<Numbers> = None;
        for range in chunks(count, student.vocab()) {
            let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
            let logits = student.logits(part(&free)).inner();
            let said = self.said.as_ref().map(|said| {
                let (vocab, device) = (student.vocab(), logits.device());
                said.likely.logits(range.clone(), vocab, said.temperature, &device)
            });
            let asked = teacher.as_ref().map(|(teacher, goal)| teacher.logits(part(goal)));
            let targets = Targets {
                teacher: asked.or(said),
                next: self.next.clone().slice_dim(0, range.clone()),
                next_weights: part(&self.next_weights),
                weights: part(&self.weights),
            };
            if let (true, Some(teacher)) = (compare, targets.teacher.clone()) {
                let part = ops::compare_later(logits.clone(), teacher, targets.weights.clone());
                closeness = Some(match closeness {
                    Some(sum) => sum.plus(part),
                    None => part,
                });
            }
            let loss = objective.on_logits(logits.clone(), &targets)?;
            value = Some(match value {
                Some(sum) => sum + loss.value,
                None => loss.value,
            });
            gradients.push(student.head_gradient(loss.gradient, &logits).inner());
        }
        let value = value.ok_or_else(|| Error::failed("an empty batch"))?;
        let loss = ops::with_gradient(hidden, value, Tensor::cat(gradients, 0));
        Ok((loss, closeness))
    }
}
