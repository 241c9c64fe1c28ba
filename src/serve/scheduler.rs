//! The thread that owns the model: which texts are continued, by whose scales, and who hears of it.
//!
//! Texts of one adapter, or of one width, form a lane with a batch of its own. Lanes with texts take turns; scales
//! change with the turn, keys and values stay with the lane.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use burn::tensor::Device;

use super::Language;
use super::beginnings::Beginnings;
use super::line::{Event, Line, Taken, Text};
use super::metrics::Metrics;
use super::refusal::Refusal;
use crate::error::Result;
use crate::exhausted;
use crate::export::Adapters;
use crate::model::{Batch, CausalLm, Ended, Logprobs, Prompt};

/// How long a lane goes on while another one waits.
const TURN: Duration = Duration::from_millis(500);

/// Owns the model.
pub(super) struct Scheduler {
    voice: Voice,
    adapters: Adapters,
    /// The model at narrower widths.
    widths: Vec<CausalLm>,
    /// Of each lane.
    whose: Vec<Whose>,
    lanes: Vec<Lane>,
    /// Whose turn it is, and since when.
    on: usize,
    since: Instant,
    line: Arc<Line>,
    /// Tokens of prompts that are computed between two tokens of those who have begun.
    piece: usize,
}

/// Whom the texts of a lane ask.
enum Whose {
    /// The model with an adapter's scales, or with its own.
    Scales(Option<String>),
    /// The model at a narrower width.
    Width(usize),
}

/// The texts of one adapter or width.
struct Lane {
    batch: Batch,
    /// Those of the batch, in its order.
    texts: Vec<Running>,
    /// Those whose prompts are not computed.
    coming: VecDeque<Coming>,
    beginnings: Beginnings,
}

/// A text whose prompt is not computed, or in part.
struct Coming {
    text: Text,
    begun: Option<Batch>,
}

/// A text in a batch.
struct Running {
    text: Text,
    added: usize,
}

/// What the model says.
struct Voice {
    model: CausalLm,
    device: Device,
    ends: Vec<u32>,
    context: usize,
    metrics: Arc<Metrics>,
}

impl Scheduler {
    pub(super) fn new(
        (model, adapters, widths): (CausalLm, Adapters, Vec<CausalLm>),
        device: Device,
        language: &Language,
        (prefix_tokens, piece): (usize, usize),
        line: &Arc<Line>,
        metrics: &Arc<Metrics>,
    ) -> Self {
        let of_adapters = adapters.names().map(|name| Whose::Scales(Some(name.to_owned())));
        let of_widths = (0..widths.len()).map(Whose::Width);
        let whose: Vec<Whose> =
            std::iter::once(Whose::Scales(None)).chain(of_adapters).chain(of_widths).collect();
        let voice = Voice {
            model,
            device,
            ends: language.ends.clone(),
            context: language.context,
            metrics: Arc::clone(metrics),
        };
        Self {
            voice,
            adapters,
            widths,
            lanes: whose.iter().map(|_| Lane::new(prefix_tokens / whose.len())).collect(),
            whose,
            on: 0,
            since: Instant::now(),
            line: Arc::clone(line),
            piece,
        }
    }

    /// Goes on until the line is cut.
    pub(super) fn run(mut self) {
        let mut before = 0;
        loop {
            let ended = before - self.lanes.iter().map(Lane::len).sum::<usize>();
            let Taken::Texts(texts) = self.line.take(ended) else { break };
            for text in texts {
                if let Some(lane) = self.lanes.get_mut(text.model) {
                    lane.coming.push_back(Coming { text, begun: None });
                }
            }
            before = self.lanes.iter().map(Lane::len).sum();
            self.lanes.iter_mut().for_each(Lane::leave);
            if let Some(lane) = self.turn() {
                self.advance(lane);
            }
        }
        for lane in &mut self.lanes {
            lane.fail(&Refusal::stopping());
        }
    }

    /// Whose turn it is.
    fn turn(&self) -> Option<usize> {
        let busy = |lane: &usize| self.lanes[*lane].len() > 0;
        let count = self.lanes.len();
        let other = (1..count).map(|step| (self.on + step) % count).find(busy);
        let own = Some(self.on).filter(busy);
        if self.since.elapsed() < TURN { own.or(other) } else { other.or(own) }
    }

    /// A token for each text of a lane, and the first one for those that come to it.
    fn advance(&mut self, lane: usize) {
        if lane != self.on || self.since.elapsed() >= TURN {
            (self.on, self.since) = (lane, Instant::now());
        }
        if let Err(error) = self.switch(lane) {
            return self.lanes[lane].fail(&error.into());
        }
        let model = match self.whose[lane] {
            Whose::Scales(_) => &self.voice.model,
            Whose::Width(index) => &self.widths[index],
        };
        let Lane { batch, texts, coming, beginnings } = &mut self.lanes[lane];
        self.voice.advance(model, batch, texts, |_| {});
        let (mut joining, mut room) = (Vec::new(), self.piece);
        while room > 0
            && let Some(Coming { text, begun }) = coming.pop_front()
        {
            let mut alone = begun.unwrap_or_else(|| self.voice.begin(&text, beginnings));
            if alone.unread() > room {
                let read = self.voice.read(model, &mut alone, room);
                match read {
                    // A text that cannot be read in part has nothing less to compute.
                    Ok(true) => {
                        coming.push_front(Coming { text, begun: Some(alone) });
                        break;
                    }
                    Ok(false) => {}
                    Err(refusal) => {
                        text.tell(Event::Failed(refusal));
                        continue;
                    }
                }
            }
            room = room.saturating_sub(alone.unread());
            let mut running = vec![Running { text, added: 0 }];
            self.voice.advance(model, &mut alone, &mut running, |read| beginnings.keep(read));
            if !alone.is_empty() {
                joining.push(alone);
                texts.append(&mut running);
            }
        }
        batch.join(joining);
    }

    /// Puts the lane's scales in the model.
    fn switch(&mut self, lane: usize) -> Result<()> {
        let Whose::Scales(name) = &self.whose[lane] else { return Ok(()) };
        let name = name.as_deref();
        if self.adapters.on() != name {
            self.adapters.switch(&mut self.voice.model, name)?;
            self.voice.metrics.switches.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Lane {
    /// Without texts; `prefix_tokens` of prompts are kept.
    fn new(prefix_tokens: usize) -> Self {
        let beginnings = Beginnings::new(prefix_tokens);
        Self { batch: Batch::default(), texts: Vec::new(), coming: VecDeque::new(), beginnings }
    }

    fn len(&self) -> usize {
        self.texts.len() + self.coming.len()
    }

    /// Lets go of texts that nobody listens to.
    fn leave(&mut self) {
        self.coming.retain(|coming| !coming.text.is_left());
        // Asked once: the answer may change at any time.
        let stay: Vec<bool> = self.texts.iter().map(|running| !running.text.is_left()).collect();
        let kept: Vec<usize> = (0..stay.len()).filter(|index| stay[*index]).collect();
        self.batch.keep(&kept);
        let mut stay = stay.iter();
        self.texts.retain(|_| stay.next().is_some_and(|stay| *stay));
    }

    fn fail(&mut self, refusal: &Refusal) {
        self.batch = Batch::default();
        let running = self.texts.drain(..).map(|running| running.text);
        for text in running.chain(self.coming.drain(..).map(|coming| coming.text)) {
            text.tell(Event::Failed(refusal.clone()));
        }
    }
}

impl Voice {
    /// A prompt by itself, with what is known of it.
    fn begin(&self, text: &Text, beginnings: &mut Beginnings) -> Batch {
        let prompt = Prompt { tokens: &text.tokens, stream: text.stream };
        let (batch, known) = beginnings.batch(prompt, text.sampler);
        self.metrics.prompt_tokens_known.fetch_add(known as u64, Ordering::Relaxed);
        batch
    }

    /// The next tokens of a prompt, `count` of them; whether any could be read.
    fn read(&self, model: &CausalLm, batch: &mut Batch, count: usize) -> Result<bool, Refusal> {
        let before = batch.computed();
        let read = catch_unwind(AssertUnwindSafe(|| batch.read(model, &self.device, count)));
        read.map_err(|panic| of_panic(panic.as_ref()))?;
        Ok(batch.computed() > before)
    }

    /// The next token of each text of a batch; those that end by it leave. `read` sees the batch before.
    fn advance(
        &self,
        model: &CausalLm,
        batch: &mut Batch,
        texts: &mut Vec<Running>,
        read: impl FnOnce(&Batch),
    ) {
        if texts.is_empty() {
            return;
        }
        let next = {
            let asked = |index: usize| texts.get(index).and_then(|running| running.text.logprobs);
            catch_unwind(AssertUnwindSafe(|| batch.next_with_logprobs(model, &self.device, asked)))
        };
        let next = match next {
            Ok(next) => next,
            Err(panic) => {
                let refusal = of_panic(panic.as_ref());
                *batch = Batch::default();
                for running in texts.drain(..) {
                    running.text.tell(Event::Failed(refusal.clone()));
                }
                return;
            }
        };
        read(batch);
        self.metrics.step(next.len());
        let mut tokens = Vec::with_capacity(next.len());
        for (index, (running, token)) in texts.iter_mut().zip(next).enumerate() {
            tokens.push(self.tell(running, batch.tokens(index), token));
        }
        batch.go_on(&tokens);
        let mut tokens = tokens.iter();
        texts.retain(|_| tokens.next().is_some_and(Option::is_some));
    }

    /// Tells who asked; the token, where the text goes on.
    fn tell(
        &self,
        running: &mut Running,
        length: usize,
        next: Result<(u32, Option<Logprobs>)>,
    ) -> Option<u32> {
        let Running { text, added } = running;
        let (token, logprobs) = match next {
            Ok(next) => next,
            Err(error) => {
                text.tell(Event::Failed(Refusal::failed(error.what())));
                return None;
            }
        };
        if *added == 0 {
            self.metrics.prompt_tokens.fetch_add(length as u64, Ordering::Relaxed);
            self.metrics.begun(text.asked.elapsed());
        }
        let end = if self.ends.contains(&token) {
            Some(Ended::Token(token))
        } else {
            text.tell(Event::Token(token, logprobs));
            *added += 1;
            let long = (*added == text.max_new).then_some(Ended::Length);
            long.or((length >= self.context).then_some(Ended::Context))
        };
        match end {
            None => Some(token),
            Some(end) => {
                text.tell(Event::Ended(end));
                None
            }
        }
    }
}

/// What was said when a computation broke off.
fn of_panic(panic: &(dyn Any + Send)) -> Refusal {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or_default();
    match exhausted::error_of(text) {
        Some(error) => Refusal::failed(error.what()),
        None => Refusal::failed(format!("internal error: {text}")),
    }
}
