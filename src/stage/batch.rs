//! Windows of text on the device, and an objective on them.
//!
//! The head is frozen, so the loss's gradient is brought back to the hidden state chunk by chunk,
//! and nothing of size `[tokens, vocab]` outlives its chunk.

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::logits::{chunks, flat};
use crate::data::TokenStream;
use crate::error::{Error, Result};
use crate::model::{CausalLm, Positions};
use crate::objective::{ObjectiveConfig, Targets};
use crate::ops::{self, Closeness};

/// Token windows on the device.
pub(super) struct Batch {
    tokens: Tensor<2, Int>,
    next: Tensor<2, Int>,
    next_weights: Tensor<2>,
    weights: Tensor<2>,
}

impl Batch {
    pub(super) fn new(
        stream: &TokenStream,
        windows: &[u32],
        length: usize,
        device: &Device,
    ) -> Self {
        let rows: Vec<&[u32]> =
            windows.iter().map(|w| stream.window(*w as usize, length)).collect();
        let count = rows.len() * length;
        let last = |i: usize| i % length == length - 1;
        let flat: Vec<i32> =
            rows.iter().flat_map(|row| row.iter().map(|id| id.cast_signed())).collect();
        let next = (0..count).map(|i| if last(i) { 0 } else { flat[i + 1] }).collect();
        let supervised: Vec<Option<&[bool]>> =
            windows.iter().map(|w| stream.supervision(*w as usize, length)).collect();
        // Whether the token after position `i` is predicted and counts.
        let counts = |i: usize| {
            !last(i) && supervised[i / length].is_none_or(|window| window[i % length + 1])
        };
        let predicted = (0..count).filter(|i| counts(*i)).count().max(1) as f32;
        let weights = (0..count).map(|i| if counts(i) { 1.0 / predicted } else { 0.0 }).collect();
        // Text is compared with a teacher everywhere, examples where they are supervised.
        let compared = |i: usize| supervised[i / length].is_none() || counts(i);
        let total = (0..count).filter(|i| compared(*i)).count().max(1) as f32;
        let all = (0..count).map(|i| if compared(i) { 1.0 / total } else { 0.0 }).collect();
        let column = |values: Vec<f32>| TensorData::new(values, [count, 1]);
        Self {
            tokens: CausalLm::tokens(&rows, device),
            next: Tensor::from_data(TensorData::new::<i32, _>(next, [count, 1]), device),
            next_weights: Tensor::from_data(column(weights), device),
            weights: Tensor::from_data(column(all), device),
        }
    }

    /// The teacher's confidence, a sum over tokens, in parts.
    pub(super) fn confidences(
        &self,
        teacher: &CausalLm,
        positions: &Positions,
    ) -> impl Iterator<Item = f64> {
        let hidden = flat(teacher.hidden(self.tokens.clone(), positions));
        chunks(hidden.dims()[0], teacher.vocab()).map(move |range| {
            let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
            ops::confidence(teacher.logits(part(&hidden)), part(&self.weights))
        })
    }

    /// The objective on this batch, joined to the student's tape at its hidden state.
    pub(super) fn loss(
        &self,
        student: &CausalLm,
        teacher: Option<&CausalLm>,
        positions: &Positions,
        objective: &ObjectiveConfig,
        compare: bool,
    ) -> Result<(Tensor<1>, Option<Closeness>)> {
        let hidden = flat(student.hidden(self.tokens.clone(), positions));
        let free = hidden.clone().inner();
        let goal = teacher.map(|teacher| flat(teacher.hidden(self.tokens.clone(), positions)));
        let [count, _] = free.dims();
        let mut value: Option<Tensor<1>> = None;
        let mut gradients = Vec::new();
        let mut closeness = (compare && teacher.is_some()).then(Closeness::default);
        for range in chunks(count, student.vocab()) {
            let part = |tensor: &Tensor<2>| tensor.clone().slice_dim(0, range.clone());
            let logits = student.logits(part(&free)).inner();
            let targets = Targets {
                teacher: teacher.zip(goal.as_ref()).map(|(t, goal)| t.logits(part(goal))),
                next: self.next.clone().slice_dim(0, range.clone()),
                next_weights: part(&self.next_weights),
                weights: part(&self.weights),
            };
            if let (Some(sum), Some(teacher)) = (closeness.as_mut(), targets.teacher.clone()) {
                add(sum, ops::compare(logits.clone(), teacher, targets.weights.clone()));
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

/// Adds what was measured on a part of the tokens.
fn add(sum: &mut Closeness, part: Closeness) {
    sum.jsd += part.jsd;
    sum.kl_forward += part.kl_forward;
    sum.kl_reverse += part.kl_reverse;
    sum.top1 += part.top1;
}
