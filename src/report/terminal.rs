//! Aligned lines on stderr, and a bar where stderr is a terminal.
//!
//! Position first, verb next, numbers in the same columns each time. Lines are shortened to the
//! width (`COLUMNS`, else 80 on a terminal and 120 elsewhere), never left for the terminal to wrap.

mod ending;
mod layout;
mod lines;
#[cfg(test)]
mod sample;

use std::cell::RefCell;
use std::env;
use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use self::layout::clean;
pub use self::lines::line;
use self::lines::value;
use super::{Event, Reporter, Thinning, jsonl};

/// How much of what happens is shown, and in which form.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Manner {
    /// Lines, and a bar where stderr is a terminal.
    #[default]
    Lines,
    /// Warnings, failures and the last line.
    Quiet,
    /// Every event as a line of JSON, as in `metrics.jsonl`, with progress about once a second.
    Json,
}

static MANNER: OnceLock<Manner> = OnceLock::new();

impl Manner {
    /// Decides for the whole process, before anything is shown; the first call counts.
    pub fn choose(self) {
        let _ = MANNER.set(self);
    }

    /// What was decided.
    pub fn chosen() -> Self {
        MANNER.get().copied().unwrap_or_default()
    }

    /// Whether an event is shown at all.
    fn shows(self, event: &Event) -> bool {
        match self {
            Self::Lines => true,
            Self::Quiet => match event {
                Event::Warning { .. } | Event::Retry { .. } | Event::Done { .. } => true,
                Event::Gate { passed, .. } => !passed,
                _ => false,
            },
            Self::Json => !matches!(event, Event::Text { .. }),
        }
    }
}

/// Time between two lines of JSON about progress.
const PROGRESS: Duration = Duration::from_secs(1);

/// Shows events on stderr.
pub struct Terminal {
    manner: Manner,
    width: usize,
    live: bool,
    colour: bool,
    thinning: Thinning,
    bar: Option<(String, ProgressBar)>,
    /// When progress was last told as JSON.
    told: Option<Instant>,
}

impl Terminal {
    /// A reporter on stderr in the [`Manner`] that was chosen: bar and colour only if it is a terminal
    /// (`TERM=dumb` is none), colour only without `NO_COLOR`.
    pub fn new() -> Self {
        let set = |name| env::var_os(name).is_some_and(|value| !value.is_empty());
        let live = io::stderr().is_terminal() && env::var_os("TERM").is_none_or(|t| t != "dumb");
        let columns = env::var("COLUMNS").ok().and_then(|text| text.parse().ok());
        let width = columns.filter(|&n| n >= 40).unwrap_or(if live { 80 } else { 120 });
        let colour = live && !set("NO_COLOR");
        let manner = Manner::chosen();
        let live = live && manner == Manner::Lines;
        Self { manner, width, live, colour, thinning: Thinning::default(), bar: None, told: None }
    }

    /// Shows a line of `run.log`, cut to this terminal's width, as the run showed it.
    pub fn replay(&mut self, line: &str) {
        if self.manner == Manner::Json {
            return self.print(&json!({ "event": "log", "text": line }).to_string());
        }
        self.print(&layout::refit(line, self.width));
    }

    /// Moves the bar to what an event says, without a line where there is no bar.
    pub fn show(&mut self, event: &Event) {
        if self.live {
            self.emit(event);
        }
    }

    fn print(&self, text: &str) {
        let text = if self.colour { paint(text) } else { text.to_owned() };
        // A closed stderr must not end the run.
        let write = || drop(writeln!(io::stderr().lock(), "{text}"));
        match &self.bar {
            Some((_, bar)) => bar.suspend(write),
            None => write(),
        }
    }

    /// Moves the bar; at its end it is gone, so that another one has its place.
    fn advance(&mut self, verb: &str, done: u64, of: u64, message: &[String]) {
        if done >= of {
            return self.clear();
        }
        if self.bar.as_ref().is_some_and(|(old, _)| old != verb) {
            self.clear();
        }
        let (_, bar) = self.bar.get_or_insert_with(|| {
            let bar = ProgressBar::with_draw_target(Some(of), ProgressDrawTarget::stderr());
            // The template is a constant; were it wrong, indicatif's own would do.
            if let Ok(style) = ProgressStyle::with_template(
                "{prefix:<11}  {bar:12}  {pos}/{len}  {eta:>3} left  {msg}",
            ) {
                bar.set_style(style.progress_chars("━╸─"));
            }
            bar.set_prefix(clean(verb));
            (verb.to_owned(), bar)
        });
        if done < bar.position() {
            bar.reset();
        }
        bar.set_length(of);
        // What stands before it: the template's columns, the position twice, and a time.
        let taken = 11 + 2 + 12 + 2 + 2 * of.to_string().len() + 1 + 2 + 4 + 5 + 2;
        bar.set_message(whole_fields(message, self.width.saturating_sub(taken)));
        bar.set_position(done);
    }

    /// Prints an event as JSON; progress not more often than need be.
    fn tell(&mut self, event: &Event) {
        if matches!(event, Event::Progress { done, of, .. } if done < of) {
            if self.told.is_some_and(|told| told.elapsed() < PROGRESS) {
                return;
            }
            self.told = Some(Instant::now());
        }
        if let Some(text) = jsonl::text(event) {
            // A closed stderr must not end the run.
            let _ = io::stderr().lock().write_all(text.as_bytes());
        }
    }

    fn clear(&mut self) {
        if let Some((_, bar)) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Default for Terminal {
    fn default() -> Self {
        Self::new()
    }
}

impl Reporter for Terminal {
    fn emit(&mut self, event: &Event) {
        if !self.manner.shows(event) {
            return;
        }
        if self.manner == Manner::Json {
            return self.tell(event);
        }
        match event {
            Event::Failed { .. } => self.clear(),
            Event::Progress { verb, done, of, detail } if self.live => {
                self.advance(verb, *done, *of, &[clean(detail)]);
            }
            Event::Step { verb, step, of, values, .. } if self.live => {
                let values: Vec<String> = values.iter().map(|(tag, v)| value(tag, *v)).collect();
                self.advance(verb, *step, *of, &values);
            }
            _ => {
                if matches!(
                    event,
                    Event::StageStart { .. } | Event::StageEnd { .. } | Event::Done { .. }
                ) {
                    self.clear();
                }
                if self.thinning.passes(event)
                    && let Some(text) = line(event, self.width)
                {
                    self.print(&text);
                }
            }
        }
    }
}

/// A bar of something that is no event of a run.
pub struct Bar {
    screen: RefCell<Terminal>,
    verb: &'static str,
    detail: &'static str,
}

impl Bar {
    /// A bar that is not there before it moves.
    pub fn new(verb: &'static str, detail: &'static str) -> Self {
        Self { screen: RefCell::new(Terminal::new()), verb, detail }
    }

    /// Moves it.
    pub fn at(&self, done: u64, of: u64) {
        let (verb, detail) = (self.verb.to_owned(), self.detail.to_owned());
        self.screen.borrow_mut().emit(&Event::Progress { verb, done, of, detail });
    }

    /// Takes it off the screen, for lines to be printed there.
    pub fn clear(&self) {
        self.screen.borrow_mut().clear();
    }
}

/// As many fields as have room, side by side: a number that is cut reads as another one.
fn whole_fields(fields: &[String], width: usize) -> String {
    let joined = |count: usize| fields[..count].join("  ").trim_end().to_owned();
    let mut texts = (0..=fields.len()).rev().map(joined);
    texts.find(|text| text.chars().count() <= width).unwrap_or_default()
}

/// Colours the label of the two lines that should catch the eye.
fn paint(line: &str) -> String {
    // A run that is over is not always a good one.
    let done = if line.contains("this model is broken") { "31" } else { "32" };
    for (label, colour) in [("warning", "33"), ("done", done)] {
        if let Some(rest) = line.strip_prefix(label) {
            return format!("\x1b[1;{colour}m{label}\x1b[0m{rest}");
        }
    }
    line.to_owned()
}

#[cfg(test)]
mod tests {
    use super::sample::step;
    use super::*;

    #[test]
    fn the_bar_cuts_no_number() {
        let values = ["loss 2.314", "lr 2.00e-5", "grad 0.5000"].map(str::to_owned);
        assert_eq!(whole_fields(&values, 80), "loss 2.314  lr 2.00e-5  grad 0.5000");
        assert_eq!(whole_fields(&values, 34), "loss 2.314  lr 2.00e-5");
        assert_eq!(whole_fields(&values, 9), "");
    }

    #[test]
    fn thins_steps() {
        let mut thinning = Thinning::default();
        let passed = (1..=2000).filter(|&n| thinning.passes(&step(n))).count();
        assert_eq!(passed, 21);
        assert!(!thinning.passes(&step(2000)));
        thinning.passes(&Event::StageStart { stage: 1, of: 4, name: "distill".into() });
        assert!(thinning.passes(&step(1)));
    }

    #[test]
    fn colours_only_the_label() {
        assert_eq!(paint("warning   x"), "\x1b[1;33mwarning\x1b[0m   x");
        assert_eq!(paint("note      x"), "note      x");
    }
}
