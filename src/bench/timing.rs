//! Work done again and again, and how long it took.

use std::time::Instant;

use serde::Serialize;

use crate::error::Result;
use crate::stop::StopFlag;

/// How long something is measured.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Until so many seconds have passed.
    pub seconds: f64,
    /// So often, whatever it takes.
    pub repeat: Option<usize>,
}

/// Times that a median is taken of, at least.
const LEAST: usize = 3;

/// Seconds that repeated work took.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Half of them took less.
    pub median: f64,
    /// A quarter of them took less.
    pub lower_quartile: f64,
    /// A quarter of them took more.
    pub upper_quartile: f64,
    /// The fastest.
    pub fastest: f64,
    /// The slowest.
    pub slowest: f64,
    /// How often it was measured.
    pub repeats: usize,
}

impl Spread {
    /// Of some times; not empty.
    pub fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let quantile = |share: f64| {
            let place = share * times.len().saturating_sub(1) as f64;
            let (low, part) = (place.floor() as usize, place.fract());
            let at = |index: usize| times.get(index).or(times.last()).copied().unwrap_or(f64::NAN);
            at(low) + part * (at(low + 1) - at(low))
        };
        Self {
            median: quantile(0.5),
            lower_quartile: quantile(0.25),
            upper_quartile: quantile(0.75),
            fastest: quantile(0.0),
            slowest: quantile(1.0),
            repeats: times.len(),
        }
    }

    /// Distance of the quartiles, as a part of the median.
    pub fn relative(&self) -> f64 {
        (self.upper_quartile - self.lower_quartile) / self.median
    }
}

impl Effort {
    /// Runs `work`, which gives the seconds that count, until the effort is spent; the first time, in
    /// which caches fill and memory is fetched, does not count.
    ///
    /// # Errors
    /// Whatever `work` returns; a signal.
    pub(super) fn measure(
        &self,
        stop: &StopFlag,
        mut work: impl FnMut() -> Result<f64>,
    ) -> Result<Spread> {
        stop.check()?;
        let first = work()?;
        let mut times = Vec::new();
        let start = Instant::now();
        loop {
            stop.check()?;
            let spent = start.elapsed().as_secs_f64() >= self.seconds;
            let enough = spent && times.len() >= LEAST;
            // Of what takes longer than all may, one time has to do.
            let long = first > self.seconds && !times.is_empty();
            let done = self.repeat.map_or(enough || long, |repeat| times.len() >= repeat.max(1));
            if done {
                return Ok(Spread::of(times));
            }
            times.push(work()?);
        }
    }
}

/// The seconds that `work` takes.
///
/// # Errors
/// Whatever `work` returns.
pub(super) fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quartiles_lie_between_the_times() {
        let spread = Spread::of(vec![5.0, 1.0, 3.0, 2.0, 4.0]);
        let Spread { median, lower_quartile, upper_quartile, fastest, slowest, repeats } = spread;
        assert_eq!((lower_quartile, median, upper_quartile), (2.0, 3.0, 4.0));
        assert_eq!((fastest, slowest, repeats), (1.0, 5.0, 5));
        assert!((Spread::of(vec![1.0, 2.0]).median - 1.5).abs() < 1e-12);
        assert!(Spread::of(vec![2.0]).relative().abs() < 1e-12);
    }

    #[test]
    fn the_first_time_does_not_count_and_long_work_is_measured_once() {
        let stop = StopFlag::default();
        let mut calls = 0.0;
        let count = |calls: &mut f64| {
            *calls += 1.0;
            Ok(*calls)
        };
        let effort = Effort { seconds: 1e9, repeat: Some(3) };
        let spread = effort.measure(&stop, || count(&mut calls)).unwrap();
        assert_eq!((spread.fastest, spread.slowest, spread.repeats), (2.0, 4.0, 3));
        let spread =
            Effort { seconds: 0.0, repeat: None }.measure(&stop, || count(&mut calls)).unwrap();
        assert_eq!((spread.median, spread.repeats), (6.0, 1));
        stop.set(2);
        assert!(effort.measure(&stop, || count(&mut calls)).is_err());
    }
}
