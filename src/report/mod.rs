//! What the user sees while a run goes on.
//!
//! Stages say what happened as [`Event`]s; each [`Reporter`] shows them in its own way: lines and a
//! bar on the terminal ([`terminal`]), one JSON object a line ([`jsonl`]), the terminal's lines
//! with a time in `run.log` ([`log`]), and TensorBoard's event files ([`tensorboard`]).
//! Reporting never fails a run: a reporter that cannot write warns once and goes on.

mod event;
pub mod jsonl;
pub mod log;
pub mod memory;
mod numbers;
pub mod tensorboard;
pub mod terminal;

pub use event::{Event, Number, Setting};
pub use numbers::{duration, perplexity, size};

/// Shows or stores events. Never fails; a reporter in trouble warns once and goes on.
pub trait Reporter {
    /// Takes one event.
    fn emit(&mut self, event: &Event);

    /// Writes out what is still held back.
    fn flush(&mut self) {}
}

/// Hands each event to several reporters, in order.
#[derive(Default)]
pub struct Reporters(Vec<Box<dyn Reporter>>);

impl Reporters {
    /// Reporters to hand events to; the list may be empty.
    pub fn new(reporters: Vec<Box<dyn Reporter>>) -> Self {
        Self(reporters)
    }

    /// Adds one more.
    pub fn push(&mut self, reporter: impl Reporter + 'static) {
        self.0.push(Box::new(reporter));
    }
}

impl Reporter for Reporters {
    fn emit(&mut self, event: &Event) {
        for reporter in &mut self.0 {
            reporter.emit(event);
        }
    }

    fn flush(&mut self) {
        for reporter in &mut self.0 {
            reporter.flush();
        }
    }
}

/// Shows nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Reporter for Silent {
    fn emit(&mut self, _event: &Event) {}
}

/// Lets about 20 steps of each stage pass, and every other event.
#[derive(Debug, Default)]
struct Thinning {
    stage: Option<usize>,
    part: Option<u64>,
}

impl Thinning {
    fn passes(&mut self, event: &Event) -> bool {
        match event {
            // A training that goes back passes the same steps again.
            Event::StageStart { .. } | Event::Retry { .. } => {
                *self = Self::default();
                true
            }
            Event::Step { stage, step, of, .. } => {
                if self.stage != Some(*stage) {
                    *self = Self { stage: Some(*stage), part: None };
                }
                let part = Some(step.saturating_mul(20) / (*of).max(1));
                let passes = part > self.part;
                self.part = self.part.max(part);
                passes
            }
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;

    struct Count(Rc<RefCell<(usize, usize)>>);

    impl Reporter for Count {
        fn emit(&mut self, _event: &Event) {
            self.0.borrow_mut().0 += 1;
        }

        fn flush(&mut self) {
            self.0.borrow_mut().1 += 1;
        }
    }

    #[test]
    fn fans_out() {
        let count = Rc::new(RefCell::new((0, 0)));
        let mut all = Reporters::new(vec![Box::new(Count(count.clone())), Box::new(Silent)]);
        all.push(Count(count.clone()));
        all.emit(&Event::Note { text: "x".into() });
        all.flush();
        assert_eq!(*count.borrow(), (2, 2));
    }
}
