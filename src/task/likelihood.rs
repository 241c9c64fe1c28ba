//! Log-likelihoods of continuations behind their contexts.
//!
//! Requests are sorted by their tokens and packed, so that what several of them begin with (few-shot
//! examples, a question with several answers) is computed once, and nothing is padded. Logits are computed
//! where a token of a continuation is predicted, once for all continuations that go on from there.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use super::kind::Bench;
use crate::error::{Error, Result};
use crate::model::{CausalLm, Forward, Positions};
use crate::ops::{self, Forest};

/// Tokens of a forward pass.
const TOKENS_PER_BATCH: usize = 4096;
/// Where scores and masks are whole tensors, which grow with their square.
const TOKENS_PER_MASKED_BATCH: usize = 1024;
/// Logits held at once.
const LOGITS_PER_CHUNK: usize = 1 << 24;

/// A context and its continuation, as a model reads them.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Request {
    /// Both, one behind the other.
    tokens: Vec<u32>,
    /// Tokens of the continuation.
    scored: usize,
}

impl Request {
    /// Joins a context, of which at least one token stands before the continuation, and the latter, which may
    /// be empty. What does not fit into a window of `length` tokens is cut from the left; the last token is
    /// only predicted.
    pub(super) fn new(context: &[u32], continuation: &[u32], length: usize) -> Self {
        let mut tokens = [context, continuation].concat();
        tokens.drain(..tokens.len().saturating_sub(length + 1));
        let scored = continuation.len().min(tokens.len().saturating_sub(1));
        Self { tokens, scored }
    }

    /// Tokens of the continuation that are predicted.
    pub(super) fn scored(&self) -> usize {
        self.scored
    }

    /// What the model reads: all but the last.
    fn read(&self) -> &[u32] {
        &self.tokens[..self.tokens.len().saturating_sub(1)]
    }
}

/// The sum of the log-probabilities of each continuation's tokens, nats. `progress` counts requests.
///
/// # Errors
/// When the model gives a value that is not finite, weights cannot be read, or a signal came.
pub(super) fn log_likelihoods(
    requests: &[Request],
    bench: &Bench<'_>,
    model: &dyn Forward,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<f64>> {
    let Bench { device, stop, .. } = *bench;
    let config = &*model.ends().config;
    let limit = if ops::has_kernel(&model.ends().embed.val()) {
        TOKENS_PER_BATCH
    } else {
        TOKENS_PER_MASKED_BATCH
    };
    let anew = |request: &Request| config.rotates_anew(1, request.read().len());
    let batches = batches(requests, limit, &anew);
    let mut found = vec![0.0; requests.len()];
    let mut done = 0;
    for batches in batches.chunks(model.batches_at_once(limit)) {
        stop.check()?;
        progress(done, requests.len() as u64);
        let dtype = model.ends().dtype();
        let at = |batch: &Batch| {
            let forest = Arc::new(Forest::new(&batch.parents));
            Positions::of_forest(config, &forest, dtype, device)
        };
        let positions: Vec<Positions> = batches.iter().map(at).collect();
        let tokens = batches.iter().map(|batch| CausalLm::tokens(&[&batch.tokens], device));
        let streams = model.streams(tokens.zip(&positions).collect())?;
        for (batch, hidden) in batches.iter().zip(streams) {
            batch.score(model.ends(), hidden, device, &mut found);
            done += batch.requests as u64;
        }
    }
    if let Some(value) = found.iter().find(|value| !value.is_finite()) {
        return Err(Error::failed(format!("the model's log-likelihood of an answer is {value}"))
            .fix("fewbit inspect on the model, or a smaller learning_rate"));
    }
    Ok(found)
}

/// Requests in one packed sequence.
#[derive(Default)]
struct Batch {
    tokens: Vec<u32>,
    /// The token that each one stands behind.
    parents: Vec<Option<usize>>,
    /// By the token behind which it is: what is predicted there, and for which request.
    predicted: BTreeMap<usize, Vec<(u32, usize)>>,
    requests: usize,
}

/// Packs all requests, those with the same beginnings side by side, into batches of at most `limit` tokens
/// or one request. A batch holds only such as `kind` says the same of.
fn batches(requests: &[Request], limit: usize, kind: &dyn Fn(&Request) -> bool) -> Vec<Batch> {
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|index| (kind(&requests[*index]), requests[*index].read()));
    let mut batches: Vec<Batch> = Vec::new();
    // Where the tokens of the last request lie in the last batch.
    let mut path: Vec<usize> = Vec::new();
    let mut last: Option<&Request> = None;
    for index in order {
        let request = &requests[index];
        let read = request.read();
        let before = last.filter(|last| kind(last) == kind(request)).map_or(&[][..], Request::read);
        let mut shared = read.iter().zip(before).take_while(|(a, b)| a == b).count();
        let room = batches.last().map(|batch| limit.saturating_sub(batch.tokens.len()));
        let other = last.is_some_and(|last| kind(last) != kind(request));
        if other || room.is_none_or(|room| read.len() - shared > room) {
            batches.push(Batch::default());
            shared = 0;
        }
        last = Some(request);
        path.truncate(shared);
        let Some(batch) = batches.last_mut() else { continue };
        for token in &read[shared..] {
            batch.parents.push(path.last().copied());
            path.push(batch.tokens.len());
            batch.tokens.push(*token);
        }
        let first = read.len() - request.scored;
        for (place, token) in path[first..].iter().zip(&request.tokens[first + 1..]) {
            batch.predicted.entry(*place).or_default().push((*token, index));
        }
        batch.requests += 1;
    }
    batches
}

impl Batch {
    /// Adds the log-probabilities of what is predicted to those of its requests. `hidden` is
    /// `[1, tokens, width]`.
    fn score(&self, model: &CausalLm, hidden: Tensor<3>, device: &Device, found: &mut [f64]) {
        let width = hidden.dims()[2];
        let hidden: Tensor<2> = hidden.reshape([self.tokens.len(), width]);
        let places: Vec<(&usize, &Vec<(u32, usize)>)> = self.predicted.iter().collect();
        for places in places.chunks((LOGITS_PER_CHUNK / model.vocab()).max(1)) {
            let rows: Vec<i32> =
                places.iter().map(|(row, _)| (**row as u32).cast_signed()).collect();
            let rows = TensorData::new(rows, [places.len()]);
            let rows = Tensor::<1, Int>::from_data(rows, device);
            let logits = model.logits(hidden.clone().select(0, rows));
            let targets: Vec<Vec<u32>> = places
                .iter()
                .map(|(_, all)| all.iter().map(|(token, _)| *token).collect())
                .collect();
            let losses = ops::negative_log_likelihoods(logits, &targets);
            for ((_, all), losses) in places.iter().zip(losses) {
                for ((_, request), loss) in all.iter().zip(losses) {
                    found[*request] -= f64::from(loss);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(context: &[u32], continuation: &[u32]) -> Request {
        Request::new(context, continuation, 100)
    }

    #[test]
    fn a_long_context_loses_its_beginning() {
        let whole = Request::new(&[1, 2, 3], &[4, 5], 4);
        assert_eq!((whole.read(), whole.scored), (&[1, 2, 3, 4][..], 2));
        let cut = Request::new(&[1, 2, 3], &[4, 5], 2);
        assert_eq!((cut.read(), cut.scored), (&[3, 4][..], 2));
        let less = Request::new(&[1], &[4, 5, 6], 2);
        assert_eq!((less.read(), less.scored), (&[4, 5][..], 2));
    }

    #[test]
    fn what_requests_share_is_packed_once() {
        let requests = [
            request(&[7, 8], &[1, 2]),
            request(&[7, 8], &[1, 3]),
            request(&[7, 9], &[4]),
            request(&[7, 8], &[5]),
        ];
        let batches = batches(&requests, 100, &|_| false);
        assert_eq!(batches.len(), 1);
        assert_eq!(batches[0].tokens, [7, 8, 1, 9]);
        assert_eq!(batches[0].parents, [None, Some(0), Some(1), Some(0)]);
        let predicted: Vec<_> = batches[0].predicted.clone().into_iter().collect();
        assert_eq!(
            predicted,
            [(1, vec![(5, 3), (1, 0), (1, 1)]), (2, vec![(2, 0), (3, 1)]), (3, vec![(4, 2)])]
        );
    }

    #[test]
    fn batches_are_of_one_kind_and_no_larger_than_asked() {
        let requests: Vec<Request> =
            (0..20).map(|i| request(&[1, 2, 3, i], &[i; 2][..=i as usize % 2])).collect();
        let long = |request: &Request| request.scored == 2;
        let batches = batches(&requests, 8, &long);
        assert_eq!(batches.iter().map(|batch| batch.requests).sum::<usize>(), 20);
        assert!(batches.iter().all(|batch| batch.tokens.len() <= 8));
        for batch in &batches {
            let counts = batch.predicted.values().flatten().map(|(_, request)| *request);
            let kinds: Vec<bool> = counts.map(|request| long(&requests[request])).collect();
            assert!(kinds.windows(2).all(|pair| pair[0] == pair[1]));
        }
    }
}
