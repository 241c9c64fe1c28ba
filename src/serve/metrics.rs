//! What the server has done, as Prometheus reads it.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Over how long tokens per second are counted.
const SPAN: Duration = Duration::from_secs(10);

/// Counts since the start.
#[derive(Debug, Default)]
pub(super) struct Metrics {
    /// By path and status.
    requests: Mutex<BTreeMap<(&'static str, u16), u64>>,
    /// By why they ended.
    texts: Mutex<BTreeMap<&'static str, u64>>,
    /// When how many tokens were written.
    recent: Mutex<VecDeque<(Instant, u64)>>,
    pub(super) prompt_tokens: AtomicU64,
    /// Of them those that were computed before, for another prompt.
    pub(super) prompt_tokens_known: AtomicU64,
    pub(super) generated_tokens: AtomicU64,
    pub(super) steps: AtomicU64,
    pub(super) switches: AtomicU64,
    /// Microseconds from a request to the end of its answer, and how many of them.
    answers: [AtomicU64; 2],
    /// To its first token.
    firsts: [AtomicU64; 2],
}

impl Metrics {
    pub(super) fn request(&self, path: &'static str, status: u16) {
        *locked(&self.requests).entry((path, status)).or_default() += 1;
    }

    pub(super) fn text(&self, ended: &'static str) {
        *locked(&self.texts).entry(ended).or_default() += 1;
    }

    /// A step gave these many tokens.
    pub(super) fn step(&self, tokens: usize) {
        let (now, tokens) = (Instant::now(), tokens as u64);
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.generated_tokens.fetch_add(tokens, Ordering::Relaxed);
        let mut recent = locked(&self.recent);
        recent.push_back((now, tokens));
        forget(&mut recent, now);
    }

    pub(super) fn answered(&self, took: Duration) {
        add(&self.answers, took);
    }

    pub(super) fn begun(&self, took: Duration) {
        add(&self.firsts, took);
    }

    fn tokens_per_second(&self) -> f64 {
        let mut recent = locked(&self.recent);
        forget(&mut recent, Instant::now());
        recent.iter().map(|(_, tokens)| *tokens as f64).sum::<f64>() / SPAN.as_secs_f64()
    }

    /// All of it, with the texts that run and wait now.
    pub(super) fn text_of(&self, [running, waiting]: [usize; 2]) -> String {
        let mut page = Page::default();
        page.head("requests_total", "counter", "Requests answered, by path and status.");
        for ((path, status), count) in locked(&self.requests).iter() {
            page.line(&format!("requests_total{{path=\"{path}\",status=\"{status}\"}}"), *count);
        }
        page.head("texts_total", "counter", "Texts that ended, by why they did.");
        for (ended, count) in locked(&self.texts).iter() {
            page.line(&format!("texts_total{{ended=\"{ended}\"}}"), *count);
        }
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        page.one("texts_running", "gauge", "Texts that are continued now.", running);
        page.one("texts_waiting", "gauge", "Texts that wait for their turn.", waiting);
        let (prompts, generated) = (read(&self.prompt_tokens), read(&self.generated_tokens));
        page.one("prompt_tokens_total", "counter", "Tokens of prompts.", prompts);
        let help = "Tokens of prompts that an earlier prompt began with, and that were not computed again.";
        page.one("prompt_tokens_known_total", "counter", help, read(&self.prompt_tokens_known));
        page.one("generated_tokens_total", "counter", "Tokens written.", generated);
        let help = "Tokens written in the last ten seconds, by the second.";
        page.one("tokens_per_second", "gauge", help, self.tokens_per_second());
        page.one("steps_total", "counter", "Passes over the model.", read(&self.steps));
        let switches = read(&self.switches);
        page.one("adapter_switches_total", "counter", "Changes of the scales.", switches);
        for (name, help, [took, count]) in [
            ("request_seconds", "From a request to the end of its answer.", &self.answers),
            ("first_token_seconds", "From a request to its first token.", &self.firsts),
        ] {
            page.head(name, "summary", help);
            page.line(&format!("{name}_sum"), read(took) as f64 / 1e6);
            page.line(&format!("{name}_count"), read(count));
        }
        page.0
    }
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Nothing fails on a string.
        let _ = writeln!(self.0, "# HELP fewbit_{name} {help}\n# TYPE fewbit_{name} {kind}");
    }

    fn line(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.0, "fewbit_{name} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: impl std::fmt::Display) {
        self.head(name, kind, help);
        self.line(name, value);
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn add([sum, count]: &[AtomicU64; 2], took: Duration) {
    sum.fetch_add(u64::try_from(took.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    count.fetch_add(1, Ordering::Relaxed);
}

fn forget(recent: &mut VecDeque<(Instant, u64)>, now: Instant) {
    while recent.front().is_some_and(|(at, _)| now.duration_since(*at) > SPAN) {
        recent.pop_front();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_prometheus() {
        let metrics = Metrics::default();
        metrics.request("/v1/models", 200);
        metrics.text("stop");
        metrics.step(30);
        metrics.begun(Duration::from_millis(250));
        let text = metrics.text_of([1, 2]);
        for line in text.lines().filter(|line| !line.starts_with("# ")) {
            let (name, value) = line.rsplit_once(' ').unwrap();
            assert!(name.starts_with("fewbit_") && value.parse::<f64>().is_ok(), "{line}");
        }
        for line in [
            "fewbit_requests_total{path=\"/v1/models\",status=\"200\"} 1",
            "fewbit_texts_waiting 2",
            "fewbit_tokens_per_second 3",
            "fewbit_first_token_seconds_sum 0.25",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} is not in {text}");
        }
    }
}
