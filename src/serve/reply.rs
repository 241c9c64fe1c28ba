//! What a request gets: OpenAI's objects, whole or in pieces.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};
use tokio::sync::mpsc::{Sender, UnboundedReceiver};
use tokio::time::error::Elapsed;
use tokio::time::{Instant, timeout, timeout_at};

use super::ask::{Ask, Kind};
use super::line::Event;
use super::metrics::Metrics;
use super::refusal::Refusal;
use crate::data::{Answer, Tokenizer};
use crate::error::Result;
use crate::model::{Ended, Logprobs};

/// After how long without a word a stream says that it is alive.
const SILENCE: Duration = Duration::from_secs(15);

/// A request whose texts are on their way.
pub(super) struct Reply {
    pub(super) ask: Ask,
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) events: UnboundedReceiver<(usize, Event)>,
    /// Of each text: set when it has all that is wanted.
    pub(super) enough: Vec<Arc<AtomicBool>>,
    pub(super) deadline: Instant,
}

/// One of its texts.
struct Choice<'a> {
    answer: Answer<'a>,
    /// Bytes that were sent.
    sent: usize,
    /// How likely each token was, where that was asked for.
    logprobs: Vec<Logprobs>,
    /// How many of those were sent.
    told: usize,
    ended: Option<&'static str>,
    /// Set when there is all that is wanted.
    enough: &'a AtomicBool,
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl Reply {
    /// The one object, when all texts have ended.
    pub(super) async fn whole(
        mut self,
        tokenizer: &Tokenizer,
        metrics: &Metrics,
    ) -> Result<Value, Refusal> {
        let Self { ask, events, enough, deadline, .. } = &mut self;
        let mut choices = choices(ask, tokenizer, enough);
        while choices.iter().any(|choice| choice.ended.is_none()) {
            let event = timeout_at(*deadline, events.recv()).await;
            take(&mut choices, event, metrics)?;
        }
        let texts: Vec<Value> = choices
            .iter_mut()
            .enumerate()
            .map(|(index, choice)| {
                let text = choice.answer.text();
                let mut object = match ask.kind {
                    Kind::Chat => json!({
                        "index": index,
                        "message": { "role": "assistant", "content": text, "refusal": null },
                    }),
                    Kind::Completion => json!({ "index": index, "text": text }),
                };
                object["logprobs"] = choice.logprobs(ask, tokenizer)?;
                object["finish_reason"] = choice.ended.into();
                Ok(object)
            })
            .collect::<Result<_>>()?;
        let usage = usage(ask, &choices);
        let mut object = self.head(false);
        object["choices"] = texts.into();
        object["usage"] = usage;
        Ok(object)
    }

    /// Its pieces as server-sent events, until there is nobody to read them.
    pub(super) async fn pieces(
        mut self,
        tokenizer: &Tokenizer,
        metrics: &Metrics,
        out: Sender<String>,
    ) {
        let head = self.head(true);
        let Self { ask, events, enough, deadline, .. } = &mut self;
        let piece = |choice: Option<Value>, usage: Option<Value>| {
            let mut object = head.clone();
            object["choices"] = choice.into_iter().collect();
            if ask.include_usage {
                object["usage"] = usage.unwrap_or_default();
            }
            format!("data: {object}\n\n")
        };
        let mut choices = choices(ask, tokenizer, enough);
        if ask.kind == Kind::Chat {
            for index in 0..choices.len() {
                let delta = json!({ "role": "assistant", "content": "" });
                let first = choice_of(ask.kind, index, &delta, None);
                if out.send(piece(Some(first), None)).await.is_err() {
                    return;
                }
            }
        }
        while choices.iter().any(|choice| choice.ended.is_none()) {
            let event = timeout(SILENCE, timeout_at(*deadline, events.recv()));
            let event = tokio::select! {
                event = event => event,
                () = out.closed() => return,
            };
            let Ok(event) = event else {
                let _ = out.send(": waiting\n\n".to_owned()).await;
                continue;
            };
            let changed = match take(&mut choices, event, metrics) {
                Ok(changed) => changed,
                Err(refusal) => {
                    let _ = out.send(format!("data: {}\n\n", refusal.json())).await;
                    return;
                }
            };
            for index in changed {
                let choice = &mut choices[index];
                let (new, ended) = (choice.new_text(), choice.ended);
                let mut said = Vec::new();
                // What a text that stopped had of the words that stopped it is told with its last piece.
                if !new.is_empty() || ended.is_some() && choice.told < choice.logprobs.len() {
                    let mut piece = choice_of(ask.kind, index, &json!({ "content": new }), None);
                    piece["logprobs"] = match choice.logprobs(ask, tokenizer) {
                        Ok(logprobs) => logprobs,
                        Err(error) => {
                            let refusal = Refusal::from(error);
                            let _ = out.send(format!("data: {}\n\n", refusal.json())).await;
                            return;
                        }
                    };
                    said.push(piece);
                }
                if ended.is_some() {
                    said.push(choice_of(ask.kind, index, &json!({}), ended));
                }
                for said in said {
                    if out.send(piece(Some(said), None)).await.is_err() {
                        return;
                    }
                }
            }
        }
        if ask.include_usage {
            let _ = out.send(piece(None, Some(usage(ask, &choices)))).await;
        }
        let _ = out.send("data: [DONE]\n\n".to_owned()).await;
    }

    /// What every object begins with.
    fn head(&self, piece: bool) -> Value {
        let object = match (self.ask.kind, piece) {
            (Kind::Chat, false) => "chat.completion",
            (Kind::Chat, true) => "chat.completion.chunk",
            (Kind::Completion, _) => "text_completion",
        };
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.ask.name,
            "system_fingerprint": concat!("fewbit-", env!("CARGO_PKG_VERSION")),
        })
    }
}

/// A piece of one text.
fn choice_of(kind: Kind, index: usize, delta: &Value, ended: Option<&str>) -> Value {
    let mut choice = match kind {
        Kind::Chat => json!({ "index": index, "delta": delta }),
        Kind::Completion => {
            let text = delta.get("content").cloned().unwrap_or_else(|| "".into());
            json!({ "index": index, "text": text })
        }
    };
    choice["logprobs"] = Value::Null;
    choice["finish_reason"] = ended.into();
    choice
}

fn choices<'a>(
    ask: &'a Ask,
    tokenizer: &'a Tokenizer,
    enough: &'a [Arc<AtomicBool>],
) -> Vec<Choice<'a>> {
    let copies = ask.prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt, ask.copies));
    let choice = |(prompt, enough): (&Vec<u32>, &'a Arc<AtomicBool>)| Choice {
        answer: Answer::new(tokenizer, prompt, &ask.stops),
        sent: 0,
        logprobs: Vec::new(),
        told: 0,
        ended: None,
        enough: enough.as_ref(),
    };
    copies.zip(enough).map(choice).collect()
}

/// What has come; gives the texts that it changed. Without an event the time is over.
fn take(
    choices: &mut [Choice<'_>],
    event: Result<Option<(usize, Event)>, Elapsed>,
    metrics: &Metrics,
) -> Result<Vec<usize>, Refusal> {
    let (index, event) = match event {
        Ok(Some(event)) => event,
        Ok(None) => return Err(Refusal::failed("the model's thread has ended")),
        Err(_) if choices.iter().all(|choice| choice.answer.tokens().is_empty()) => {
            return Err(Refusal::late());
        }
        Err(_) => {
            let open = |index: &usize| choices[*index].ended.is_none();
            let open: Vec<usize> = (0..choices.len()).filter(open).collect();
            for index in &open {
                choices[*index].end("length", "time", metrics)?;
            }
            return Ok(open);
        }
    };
    let choice = &mut choices[index];
    if choice.ended.is_some() {
        return Ok(Vec::new());
    }
    match event {
        Event::Failed(refusal) => {
            metrics.text("failed");
            return Err(refusal);
        }
        Event::Token(token, logprobs) => {
            choice.logprobs.extend(logprobs);
            if !choice.answer.push(token)? {
                choice.end("stop", "stop", metrics)?;
            }
        }
        Event::Ended(why) => {
            let reason = match why {
                Ended::Token(_) | Ended::Caller => "stop",
                Ended::Length | Ended::Context => "length",
            };
            choice.end(reason, why.name(), metrics)?;
        }
    }
    Ok(vec![index])
}

impl Choice<'_> {
    /// What was not sent of the text, as far as it is settled.
    fn new_text(&mut self) -> String {
        let ended = self.ended.is_some();
        let text = if ended { self.answer.text() } else { self.answer.settled() };
        let new = text.get(self.sent..).unwrap_or_default().to_owned();
        self.sent = text.len().max(self.sent);
        new
    }

    /// How likely the tokens were that were not told yet, as the endpoint says it; null where nobody asked.
    fn logprobs(&mut self, ask: &Ask, tokenizer: &Tokenizer) -> Result<Value> {
        if ask.logprobs.is_none() {
            return Ok(Value::Null);
        }
        let from = self.told;
        self.told = self.logprobs.len();
        let tokens = self.answer.tokens();
        // A token's text depends on whether it opens a text.
        let text = |index: usize, token: u32| -> Result<String> {
            let Some(before) = index.checked_sub(1).and_then(|before| tokens.get(before)) else {
                return tokenizer.decode(&[token], false);
            };
            let both = tokenizer.decode(&[*before, token], false)?;
            let one = tokenizer.decode(&[*before], false)?;
            match both.strip_prefix(one.as_str()) {
                Some(text) => Ok(text.to_owned()),
                None => tokenizer.decode(&[token], false),
            }
        };
        let mut all = Vec::new();
        for (index, logprobs) in self.logprobs.iter().enumerate().skip(from) {
            let Some(token) = tokens.get(index) else { break };
            let top = logprobs.top.iter().map(|(token, x)| Ok((text(index, *token)?, *x)));
            all.push((text(index, *token)?, logprobs.chosen, top.collect::<Result<Vec<_>>>()?));
        }
        let entry =
            |text: &str, x: f32| json!({ "token": text, "logprob": x, "bytes": text.as_bytes() });
        Ok(match ask.kind {
            Kind::Chat => {
                let content = all.iter().map(|(text, x, top)| {
                    let mut object = entry(text, *x);
                    object["top_logprobs"] = top.iter().map(|(text, x)| entry(text, *x)).collect();
                    object
                });
                json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
            }
            Kind::Completion => {
                let top = |top: &[(String, f32)]| {
                    top.iter().map(|(text, x)| (text.clone(), json!(x))).collect::<Map<_, _>>()
                };
                let mut offset = 0;
                let offsets = all.iter().map(|(text, ..)| {
                    offset += text.chars().count();
                    offset - text.chars().count()
                });
                json!({
                    "text_offset": offsets.collect::<Vec<_>>(),
                    "tokens": all.iter().map(|(text, ..)| text).collect::<Vec<_>>(),
                    "token_logprobs": all.iter().map(|(_, x, _)| x).collect::<Vec<_>>(),
                    "top_logprobs": all.iter().map(|(.., of)| top(of)).collect::<Vec<_>>(),
                })
            }
        })
    }

    fn end(&mut self, reason: &'static str, why: &'static str, metrics: &Metrics) -> Result<()> {
        metrics.text(why);
        self.enough.store(true, Ordering::Relaxed);
        self.ended = Some(reason);
        self.answer.finish()
    }
}

/// Tokens of the prompts, each counted once, and of what was written, end tokens aside.
fn usage(ask: &Ask, choices: &[Choice<'_>]) -> Value {
    let prompt: usize = ask.prompts.iter().map(Vec::len).sum();
    let written: usize = choices.iter().map(|choice| choice.answer.tokens().len()).sum();
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    })
}
