//! The line in which texts wait for the thread that owns the model.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use super::refusal::Refusal;
use crate::model::{Ended, Logprobs, Sampler};

/// What happens to a text.
#[derive(Debug)]
pub(super) enum Event {
    /// It goes on with this token, which was so likely.
    Token(u32, Option<Logprobs>),
    /// It has ended.
    Ended(Ended),
    /// It cannot go on.
    Failed(Refusal),
}

/// A text to be continued.
#[derive(Debug)]
pub(super) struct Text {
    /// The prompt; not empty.
    pub(super) tokens: Vec<u32>,
    pub(super) sampler: Sampler,
    /// How many of the likeliest tokens are told with each of its own; none where nobody asked.
    pub(super) logprobs: Option<usize>,
    /// Which row of the sampler's draws is its own.
    pub(super) stream: u64,
    /// Tokens that it gets at most; above 0.
    pub(super) max_new: usize,
    /// Whose: 0 for the model's own scales, then the adapters in order, then narrower widths.
    pub(super) model: usize,
    /// Who hears of it, and as which of the request's texts.
    pub(super) events: UnboundedSender<(usize, Event)>,
    pub(super) index: usize,
    /// Set by who asked, when it has enough.
    pub(super) enough: Arc<AtomicBool>,
    pub(super) asked: Instant,
}

impl Text {
    /// Whether nobody listens any more.
    pub(super) fn is_left(&self) -> bool {
        self.enough.load(Ordering::Relaxed) || self.events.is_closed()
    }

    pub(super) fn tell(&self, event: Event) {
        // Who asked may have left.
        let _ = self.events.send((self.index, event));
    }
}

#[derive(Clone, Copy, Debug, Default, Eq, Ord, PartialEq, PartialOrd)]
enum Phase {
    #[default]
    Open,
    /// Nothing new is taken; what runs goes on.
    Closed,
    /// What runs ends as well.
    Cut,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Text>,
    /// Texts that were taken and have not ended.
    running: usize,
    phase: Phase,
}

/// The texts that wait, first come first served.
#[derive(Debug)]
pub(super) struct Line {
    state: Mutex<State>,
    changed: Condvar,
    parallel: usize,
    queue: usize,
}

/// What the line has for the thread that owns the model.
pub(super) enum Taken {
    /// Texts whose turn it is, as many as there is room for.
    Texts(Vec<Text>),
    /// Nothing will come any more, and what runs has to end.
    Cut,
}

impl Line {
    /// A line of `queue` texts before `parallel` that are continued together.
    pub(super) fn new(parallel: usize, queue: usize) -> Self {
        Self { state: Mutex::default(), changed: Condvar::new(), parallel, queue }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most texts that a request may ask for.
    pub(super) fn most(&self) -> usize {
        self.parallel + self.queue
    }

    /// Texts that run and texts that wait.
    pub(super) fn lengths(&self) -> [usize; 2] {
        let state = self.state();
        [state.running, state.waiting.len()]
    }

    /// All of a request's texts, or none.
    pub(super) fn push(&self, texts: Vec<Text>) -> Result<(), Refusal> {
        let mut state = self.state();
        if state.phase != Phase::Open {
            return Err(Refusal::stopping());
        }
        state.waiting.retain(|text| !text.is_left());
        let before = state.running + state.waiting.len();
        if before + texts.len() > self.most() {
            return Err(Refusal::full(before));
        }
        state.waiting.extend(texts);
        drop(state);
        self.changed.notify_one();
        Ok(())
    }

    /// The texts whose turn it is, with `ended` that have made room; waits for one where none runs.
    pub(super) fn take(&self, ended: usize) -> Taken {
        let mut state = self.state();
        state.running = state.running.saturating_sub(ended);
        loop {
            state.waiting.retain(|text| !text.is_left());
            let room = self.parallel.saturating_sub(state.running).min(state.waiting.len());
            match state.phase {
                Phase::Cut => return Taken::Cut,
                Phase::Closed | Phase::Open if room > 0 || state.running > 0 => {
                    let texts: Vec<Text> = state.waiting.drain(..room).collect();
                    state.running += texts.len();
                    return Taken::Texts(texts);
                }
                Phase::Closed | Phase::Open => {}
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes nothing new and refuses what waits.
    pub(super) fn close(&self) {
        let mut state = self.state();
        state.phase = state.phase.max(Phase::Closed);
        for text in state.waiting.drain(..) {
            text.tell(Event::Failed(Refusal::stopping()));
        }
    }

    /// Ends what runs as well.
    pub(super) fn cut(&self) {
        self.close();
        self.state().phase = Phase::Cut;
        self.changed.notify_all();
    }
}
