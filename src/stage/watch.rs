//! Whether a training is alive: rules over the numbers it reports anyway.
//!
//! Nothing here knows a model. The rules are about runs that cannot recover by themselves, not about
//! runs that could be better, and none of them speaks in the first [`GRACE`] steps, but for numbers
//! that are no longer finite.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::objective::ObjectiveConfig;
use crate::report::perplexity;

/// Steps whose medians are the reference: what the loss and the gradient are like at the start.
const FIRST: usize = 10;
/// Steps in which nothing but a number that is not finite is a failure.
const GRACE: u64 = 30;
/// Steps in a row that make a failure of a gradient, or of a loss, that one step may have by chance.
const IN_A_ROW: u64 = 20;
/// A gradient norm below this share of the first steps' is no gradient. A healthy run's falls by a
/// few powers of ten, a dead one's by ten and more.
const DEAD_RATIO: f64 = 1e-6;
/// A gradient norm below this teaches nothing whatever it began with: AdamW's epsilon is 1e-8.
const DEAD_NORM: f64 = 1e-10;
/// A loss (nats) below this has nothing left to learn, so its gradient may vanish.
const NOTHING_LEFT: f64 = 1e-3;
/// A loss below this share of the first steps' has been learned, so its gradient may vanish.
const LEARNED: f64 = 0.1;
/// A loss this near its objective's bound says that the student has nothing of its teacher.
const NEAR_BOUND: f64 = 0.9;
/// Steps whose losses are averaged before they are compared with others.
const WINDOW: u64 = 25;
/// Averages in a row that stand at the bound.
const WINDOWS: usize = 4;
/// Share of the bound that the averages have to fall by to be progress.
const PROGRESS: f64 = 0.01;
/// Below this share of the base rate (warm-up, the end of a schedule) no progress is no failure.
const SLOW: f64 = 0.1;
/// A loss is far above its start beyond twice that and this much more, nats.
const FAR_LOSS: f64 = 0.5;
/// A validation is far above its start at four times the perplexity: this much more, nats.
const FAR_NLL: f64 = 2.0 * std::f64::consts::LN_2;
/// Validations in a row that make a failure, ...
const FAR_VALIDATIONS: u64 = 3;
/// ... unless the last one is this much better than the one before it, nats: it recovers.
const RECOVERY: f64 = 0.2;

/// What ended the hope that a training recovers by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Failure {
    /// A number is no longer finite: what, and what it became.
    NotFinite(&'static str, f64),
    /// The gradient's norm is gone while the loss is not: norm now, norm at the start, loss.
    DeadGradient([f64; 3]),
    /// The loss stands at the largest value its objective has: loss, bound.
    AtBound([f64; 2]),
    /// The loss is far above the first steps': loss, loss at the start.
    LossDiverged([f64; 2]),
    /// The perplexity on the validation text is far above the start's: now, at the start.
    ValidationDiverged([f64; 2]),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotFinite(what, value) => write!(f, "{what} became {value}"),
            Self::DeadGradient([norm, first, loss]) => write!(
                f,
                "the gradient died: norm {norm:.1e}, {first:.1e} at the start, while the loss is \
                 {loss:.3}"
            ),
            Self::AtBound([loss, bound]) => write!(
                f,
                "the loss stands at {loss:.3}, and the objective cannot be above {bound:.3}: the \
                 student has nothing of its teacher, and the objective no slope to find it by"
            ),
            Self::LossDiverged([loss, first]) => {
                write!(f, "the loss diverged: {loss:.3}, {first:.3} at the start")
            }
            Self::ValidationDiverged([now, start]) => write!(
                f,
                "the model got far worse on the validation text: perplexity {}, {} at the start",
                perplexity(*now),
                perplexity(*start)
            ),
        }
    }
}

impl Failure {
    /// What to change in a recipe once smaller rates have not helped.
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::NotFinite(..) => "a smaller learning_rate, or optimizer.clip_norm = 1.0",
            Self::DeadGradient(_) | Self::AtBound(_) => {
                "a stage.reconstruct at these bits before this one, objective.adaptive (its \
                 gradient stays), or a smaller learning_rate"
            }
            Self::LossDiverged(_) | Self::ValidationDiverged(_) => {
                "a smaller learning_rate, a warmup, or optimizer.clip_norm = 1.0"
            }
        }
    }
}

/// One step as a [`Watch`] sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    /// Steps done, this one included.
    pub step: u64,
    /// The loss, nats.
    pub loss: f64,
    /// Global norm of the gradient.
    pub grad_norm: f64,
    /// The schedule's share of the base rate.
    pub factor: f64,
}

/// What the rules remember; part of a saved training state, so that a resumed run judges alike.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub(super) struct Watch {
    /// Losses and gradient norms of the first steps.
    first: Vec<[f64; 2]>,
    /// Steps in a row without a gradient.
    dead: u64,
    /// Steps in a row with a loss far above the start's.
    far: u64,
    /// Sum and number of losses of the window that is being filled.
    filling: (f64, u64),
    /// Mean losses of the last whole windows.
    means: Vec<f64>,
    /// The validation at the start, nats.
    start: Option<f64>,
    /// The latest validation, nats.
    last: Option<f64>,
    /// Validations in a row far above the start's.
    far_validations: u64,
    /// Loss and bound of the last step, where they are near each other.
    near_bound: Option<[f64; 2]>,
}

impl Watch {
    /// Judges a step. `bound`: the objective's largest value, see [`bound`].
    pub(super) fn step(&mut self, seen: &Seen, bound: Option<f64>) -> Option<Failure> {
        let Seen { step, loss, grad_norm, factor } = *seen;
        if !loss.is_finite() {
            return Some(Failure::NotFinite("the loss", loss));
        }
        if !grad_norm.is_finite() {
            return Some(Failure::NotFinite("the gradient norm", grad_norm));
        }
        if self.first.len() < FIRST {
            self.first.push([loss, grad_norm]);
        }
        let [first_loss, first_norm] = [0, 1].map(|of| self.median(of));
        let none = grad_norm < DEAD_NORM || grad_norm < DEAD_RATIO * first_norm;
        let learned = loss < NOTHING_LEFT || loss < LEARNED * first_loss;
        count(&mut self.dead, none && !learned);
        count(&mut self.far, loss > 2.0 * first_loss.abs() + FAR_LOSS);
        let near = bound.filter(|bound| loss > NEAR_BOUND * bound);
        self.near_bound = near.map(|bound| [loss, bound]);
        let stands = bound.filter(|bound| self.stands(loss, factor, *bound));
        if step <= GRACE {
            return None;
        }
        if self.dead >= IN_A_ROW {
            return Some(Failure::DeadGradient([grad_norm, first_norm, loss]));
        }
        if self.far >= IN_A_ROW {
            return Some(Failure::LossDiverged([loss, first_loss]));
        }
        stands.map(|bound| Failure::AtBound([loss, bound]))
    }

    /// Judges a validation after `step` steps by its mean loss, nats. The first one is the start.
    pub(super) fn validation(&mut self, step: u64, nll: f64) -> Option<Failure> {
        if !nll.is_finite() {
            return Some(Failure::NotFinite("the loss on the validation text", nll));
        }
        let start = *self.start.get_or_insert(nll);
        count(&mut self.far_validations, nll > start + FAR_NLL);
        let recovers = self.last.replace(nll).is_some_and(|last| nll < last - RECOVERY);
        let far = step > GRACE && self.far_validations >= FAR_VALIDATIONS && !recovers;
        // An objective that is flat where the student is has no other rate that would help.
        let diverged = Failure::ValidationDiverged([nll.exp(), start.exp()]);
        far.then(|| self.near_bound.map_or(diverged, Failure::AtBound))
    }

    /// Forgets what led to a failure, for a training that goes on from an earlier state; what the
    /// start was like stays.
    pub(super) fn go_back(&mut self) {
        let first = std::mem::take(&mut self.first);
        let first = if first.len() < FIRST { Vec::new() } else { first };
        *self = Self { first, start: self.start, ..Self::default() };
    }

    /// Forgets validations, for a training that goes on with other ones.
    pub(super) fn forget_validations(&mut self) {
        (self.start, self.last, self.far_validations) = (None, None, 0);
    }

    /// Whether the means of the last windows stand at the bound.
    fn stands(&mut self, loss: f64, factor: f64, bound: f64) -> bool {
        if factor < SLOW {
            self.filling = (0.0, 0);
            self.means.clear();
            return false;
        }
        let (sum, number) = &mut self.filling;
        *sum += loss;
        *number += 1;
        if *number < WINDOW {
            return false;
        }
        if self.means.len() == WINDOWS {
            self.means.remove(0);
        }
        self.means.push(*sum / *number as f64);
        self.filling = (0.0, 0);
        let (Some(oldest), Some(newest)) = (self.means.first(), self.means.last()) else {
            return false;
        };
        self.means.len() == WINDOWS
            && self.means.iter().all(|mean| *mean > NEAR_BOUND * bound)
            && oldest - newest < PROGRESS * bound
    }

    fn median(&self, of: usize) -> f64 {
        let mut values: Vec<f64> = self.first.iter().map(|pair| pair[of]).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    }
}

/// Counts how often in a row.
fn count(counter: &mut u64, again: bool) {
    *counter = if again { *counter + 1 } else { 0 };
}

/// The largest value an objective can have, nats: the entropy of the mixture's weights for the
/// Jensen–Shannon divergence, reached where student and teacher share no token. `None` for objectives
/// without one.
pub(super) fn bound(objective: &ObjectiveConfig) -> Option<f64> {
    match objective {
        ObjectiveConfig::Jsd(jsd) => {
            let term = |weight: f64| -weight * weight.ln();
            Some(term(jsd.beta) + term(1.0 - jsd.beta))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUND: f64 = std::f64::consts::LN_2;

    /// The step and the failure that a sequence of losses and norms ends with.
    fn watched(
        steps: u64,
        bound: Option<f64>,
        at: impl Fn(u64) -> (f64, f64),
    ) -> Option<(u64, Failure)> {
        let mut watch = Watch::default();
        (1..=steps).find_map(|step| {
            let (loss, grad_norm) = at(step);
            let seen = Seen { step, loss, grad_norm, factor: 1.0 };
            watch.step(&seen, bound).map(|failure| (step, failure))
        })
    }

    /// A little noise that is the same each time.
    fn noise(step: u64) -> f64 {
        (step as f64 * 12.9898).sin()
    }

    #[test]
    fn healthy_runs_pass() {
        let falling = |step: u64| {
            let part = step as f64 / 600.0;
            (0.55 * (-2.0 * part).exp() + 0.02 * noise(step), 0.3 * (-3.0 * part).exp())
        };
        assert_eq!(watched(600, Some(BOUND), falling), None);
        // Next-token loss that does not move much, and noisy.
        assert_eq!(watched(2000, None, |s| (3.0 + 0.4 * noise(s), 1.0 + 0.5 * noise(s))), None);
        // From near the bound downwards.
        let slow = |step: u64| (0.68 - 0.0002 * step as f64, 0.05);
        assert_eq!(watched(600, Some(BOUND), slow), None);
        // A gradient that falls by four powers of ten.
        assert_eq!(watched(600, None, |s| (0.5, 10f64.powf(-(s as f64) / 150.0))), None);
    }

    #[test]
    fn the_dead_run_is_found_early() {
        let norm = |step: u64| match step {
            0..=10 => 0.077,
            11..=15 => 1e-5,
            16..=29 => 2e-11,
            _ => 1e-13,
        };
        let loss = |step: u64| 0.66 + 0.02 * noise(step);
        let (step, failure) = watched(300, Some(BOUND), |s| (loss(s), norm(s))).unwrap();
        assert!(matches!(failure, Failure::DeadGradient(_)) && step < 40, "{step} {failure}");
        assert!(failure.to_string().starts_with("the gradient died: norm 1.0e-13, 7.7e-2 at the"));
        // Dead from the first step on: nothing to compare with, but nothing to learn by either.
        let (step, _) = watched(300, None, |s| (loss(s), 1e-13)).unwrap();
        assert_eq!(step, GRACE + 1);
    }

    #[test]
    fn a_student_that_is_its_teacher_is_no_failure() {
        assert_eq!(watched(600, Some(BOUND), |_| (0.0, 0.0)), None);
        assert_eq!(watched(600, Some(BOUND), |s| (1e-7 * (1.0 + noise(s)), 1e-12)), None);
        // Becomes its teacher: the gradient vanishes with the loss.
        let becomes = |step: u64| {
            let e = (-(step as f64) / 5.0).exp();
            (0.3 * e, 0.1 * e)
        };
        assert_eq!(watched(600, Some(BOUND), becomes), None);
    }

    #[test]
    fn a_plateau_at_the_bound() {
        let at = |step: u64| (0.66 + 0.02 * noise(step), 0.05);
        let (step, failure) = watched(300, Some(BOUND), at).unwrap();
        assert_eq!((step, WINDOW * WINDOWS as u64), (100, 100));
        assert!(matches!(failure, Failure::AtBound(_)), "{failure}");
        assert_eq!(watched(300, None, at), None, "no objective without a bound has one");
        assert_eq!(watched(300, Some(BOUND), |s| (0.5 + 0.02 * noise(s), 0.05)), None);
    }

    #[test]
    fn a_slow_schedule_may_stand_still() {
        let mut watch = Watch::default();
        for step in 1..=1000 {
            let seen = Seen { step, loss: 0.69, grad_norm: 0.05, factor: 0.05 };
            assert_eq!(watch.step(&seen, Some(BOUND)), None);
        }
    }

    #[test]
    fn divergence_of_loss_and_of_validation() {
        let grows = |step: u64| (3.0 + 0.1 * step as f64, 1.0);
        let (step, failure) = watched(300, None, grows).unwrap();
        assert!(matches!(failure, Failure::LossDiverged(_)) && step > 40, "{step} {failure}");
        assert_eq!(watched(300, None, |s| (if s % 7 == 0 { 50.0 } else { 3.0 }, 1.0)), None);

        let mut watch = Watch::default();
        let mut at = |step, nll| watch.validation(step, nll);
        assert_eq!([at(0, 7.7), at(20, 9.5), at(40, 9.9)], [None; 3]);
        assert!(matches!(at(60, 10.1), Some(Failure::ValidationDiverged(_))));
        let mut watch = Watch::default();
        let mut at = |step, nll| watch.validation(step, nll);
        // Thrown far, and on its way back.
        assert_eq!([at(0, 5.0), at(20, 11.0), at(40, 9.4), at(60, 7.8), at(80, 7.4)], [None; 5]);
        let failure = at(100, 7.3).unwrap().to_string();
        assert!(failure.ends_with("perplexity 1480, 148.4 at the start"), "{failure}");
        // Farther and farther where the objective is flat: the flatness is what to change.
        let mut watch = Watch::default();
        watch.step(&Seen { step: 60, loss: 0.67, grad_norm: 1e-8, factor: 1.0 }, Some(BOUND));
        let mut at = |step, nll| watch.validation(step, nll);
        assert_eq!([at(0, 70.0), at(40, 74.2), at(50, 74.3)], [None; 3]);
        assert!(matches!(at(60, 74.3), Some(Failure::AtBound(_))));
        let mut watch = Watch::default();
        let mut at = |step, nll| watch.validation(step, nll);
        assert_eq!([at(0, 15.8), at(50, 8.0), at(99, 4.0), at(150, 15.0)], [None; 4]);
        assert!(matches!(at(160, f64::NAN), Some(Failure::NotFinite(..))));
    }

    #[test]
    fn numbers_that_are_not_finite_are_found_at_once() {
        let (step, failure) =
            watched(9, None, |s| (if s == 3 { f64::NAN } else { 1.0 }, 1.0)).unwrap();
        assert_eq!((step, failure.to_string().as_str()), (3, "the loss became NaN"));
        assert!(watched(9, None, |_| (1.0, f64::INFINITY)).is_some());
    }

    #[test]
    fn short_runs_never_fail() {
        assert_eq!(watched(30, Some(BOUND), |_| (0.69, 0.0)), None);
        assert_eq!(watched(30, None, |s| (s as f64 * 100.0, 1e-13)), None);
    }

    #[test]
    fn going_back_starts_to_count_anew() {
        let mut watch = Watch::default();
        let dies = |watch: &mut Watch, from: u64| {
            (from..from + 200).find(|&step| {
                let grad_norm = if step <= 10 { 0.1 } else { 1e-12 };
                let seen = Seen { step, loss: 0.65, grad_norm, factor: 1.0 };
                watch.step(&seen, None).is_some()
            })
        };
        assert_eq!(dies(&mut watch, 1), Some(31));
        watch.go_back();
        assert_eq!(dies(&mut watch, 32), Some(51), "the start is remembered");
        let text = serde_json::to_string(&watch).unwrap();
        assert_eq!(serde_json::from_str::<Watch>(&text).unwrap(), watch);
    }
}
