//! Several data sets as one, in shares that weights say.
//!
//! A mix holds the windows of every source once, and a list of which is visited when. At each place of that
//! list stands the source whose share is furthest behind, so that any beginning of it has the shares, to
//! within one window; within a source windows come in an order of their own, and again from the start when
//! it is through. The list ends where every source has been seen whole. It is a function of the sources and
//! the weights alone; the seed of a run shuffles it as it shuffles the windows of any data set.

use serde::Serialize;

use super::order::permutation;
use super::windows::TokenStream;
use crate::error::{Error, Result};

/// Most entries of the list.
const MOST_VISITS: usize = 1 << 24;

/// A source of a mix, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SourceShare {
    /// What it goes by in reports.
    pub name: String,
    /// Its weight as given.
    pub weight: f64,
    /// Its documents.
    pub documents: usize,
    /// Its tokens, filled windows included.
    pub tokens: usize,
    /// Those that are trained.
    pub supervised: usize,
    /// Documents that were cut.
    pub cut: usize,
    /// Documents that teach nothing.
    pub empty: usize,
    /// Its windows.
    pub windows: usize,
    /// How often one of them is visited before the mix begins anew.
    pub visits: usize,
}

impl Eq for SourceShare {}

impl TokenStream {
    /// Mixes sources, each a name, a weight and a stream; windows have `length` tokens.
    ///
    /// # Errors
    /// When a weight is no number above 0, or a source has no whole window.
    pub fn mix(sources: Vec<(String, f64, Self)>, length: usize) -> Result<Self> {
        let total: f64 = sources.iter().map(|(_, weight, _)| weight).sum();
        let mut mixed = Self { packed: Some(length), ..Self::default() };
        let flagged = sources.iter().any(|(_, _, stream)| stream.supervised.is_some());
        let mut flags = Vec::new();
        let mut starts = Vec::new();
        for (name, weight, stream) in sources {
            if !(weight > 0.0 && weight.is_finite() && total.is_finite()) {
                return Err(Error::usage(format!(
                    "weight = {weight} of {name} is no number above 0"
                ))
                .fix("weight = 1, or leave the source out"));
            }
            let windows = stream.windows(length);
            if windows == 0 {
                let what =
                    format!("{name} has {} tokens, no window of {length}", stream.tokens.len());
                return Err(Error::preflight(what).fix("more text, or a shorter length"));
            }
            let kept = windows * length;
            // A window's first token is never predicted.
            let every = || (0..kept).map(|at| at % length > 0).collect();
            let own: Vec<bool> = stream.supervised.map_or_else(every, |own| own[..kept].to_vec());
            starts.extend(stream.starts.map_or_else(|| vec![0; kept], |own| own[..kept].to_vec()));
            mixed.tokens.extend_from_slice(&stream.tokens[..kept]);
            mixed.documents += stream.documents;
            mixed.cut += stream.cut;
            mixed.empty += stream.empty;
            mixed.lengths.extend(stream.lengths);
            mixed.sources.push(SourceShare {
                name,
                weight,
                documents: stream.documents,
                tokens: kept,
                supervised: own.iter().filter(|counts| **counts).count(),
                cut: stream.cut,
                empty: stream.empty,
                windows,
                visits: 0,
            });
            flags.extend(own);
        }
        if flagged {
            mixed.supervised = Some(flags);
            mixed.starts = Some(starts);
        }
        let visits = visits(&mut mixed.sources, total);
        mixed.visits = Some(visits);
        Ok(mixed)
    }
}

/// Which window is visited when.
fn visits(sources: &mut [SourceShare], total: f64) -> Vec<u32> {
    let needed = |source: &SourceShare| (source.windows as f64 * total / source.weight).ceil();
    let most = sources.iter().map(needed).fold(0.0, f64::max);
    let length = (most as usize).min(MOST_VISITS);
    let mut first = Vec::new();
    let mut before = 0;
    for source in sources.iter() {
        first.push(before);
        before += source.windows;
    }
    let mut orders: Vec<Vec<u32>> = vec![Vec::new(); sources.len()];
    let mut visits = Vec::with_capacity(length);
    for place in 0..length {
        let behind = |source: &SourceShare| {
            (place + 1) as f64 * source.weight / total - source.visits as f64
        };
        // The first of equals.
        let furthest = (0..sources.len())
            .rev()
            .max_by(|a, b| behind(&sources[*a]).total_cmp(&behind(&sources[*b])));
        let index = furthest.unwrap_or(0);
        let (pass, within) = (
            sources[index].visits / sources[index].windows,
            sources[index].visits % sources[index].windows,
        );
        if within == 0 {
            orders[index] =
                permutation(0, &format!("mix {index}"), pass as u64, sources[index].windows);
        }
        visits.push((first[index] + orders[index][within] as usize) as u32);
        sources[index].visits += 1;
    }
    visits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(name: &str, weight: f64, windows: usize, first: u32) -> (String, f64, TokenStream) {
        let tokens = (0..windows * 4).map(|at| first + (at / 4) as u32).collect();
        (name.to_owned(), weight, TokenStream { tokens, documents: 1, ..TokenStream::default() })
    }

    #[test]
    fn any_beginning_has_the_shares_and_all_is_seen() {
        for weights in [[1.0, 1.0], [3.0, 1.0], [0.1, 0.9]] {
            let sources = vec![source("a", weights[0], 10, 0), source("b", weights[1], 3, 100)];
            let mix = TokenStream::mix(sources, 4).unwrap();
            let windows = mix.windows(4);
            let share = weights[0] / (weights[0] + weights[1]);
            let seen: Vec<u32> = (0..windows).map(|index| mix.window(index, 4)[0]).collect();
            for count in 1..=windows {
                let own = seen[..count].iter().filter(|id| **id < 100).count() as f64;
                assert!((own - share * count as f64).abs() <= 1.0, "{weights:?} {count}");
            }
            let mut all = seen.clone();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), 13, "{weights:?}");
            assert_eq!(mix.sources[0].visits + mix.sources[1].visits, windows);
            // Each window of a source once before any comes again.
            let own: Vec<u32> = seen.iter().copied().filter(|id| *id >= 100).collect();
            for pass in own.chunks_exact(3) {
                let mut pass = pass.to_vec();
                pass.sort_unstable();
                assert_eq!(pass, [100, 101, 102]);
            }
        }
    }

    #[test]
    fn samples_of_a_mix_have_its_shares() {
        let sources = vec![source("a", 1.0, 50, 0), source("b", 1.0, 50, 100)];
        let mix = TokenStream::mix(sources, 4).unwrap();
        let some = mix.spread(20, 4).unwrap();
        let own = some.iter().filter(|index| mix.window(**index, 4)[0] < 100).count();
        assert_eq!((own, some.len()), (10, 20));
    }

    #[test]
    fn text_beside_examples_counts_everywhere() {
        let (name, weight, mut examples) = source("b", 1.0, 2, 100);
        examples.supervised = Some(vec![false, true, false, true, false, false, true, false]);
        examples.starts = Some(vec![0, 0, 2, 2, 0, 0, 0, 3]);
        let mix =
            TokenStream::mix(vec![source("a", 1.0, 1, 0), (name, weight, examples)], 4).unwrap();
        let index = (0..mix.windows(4)).find(|index| mix.window(*index, 4)[0] == 0).unwrap();
        assert_eq!(mix.supervision(index, 4).unwrap(), [false, true, true, true]);
        assert_eq!(mix.starts(index, 4).unwrap(), [0; 4]);
        let index = (0..mix.windows(4)).find(|index| mix.window(*index, 4)[0] == 101).unwrap();
        assert_eq!(mix.supervision(index, 4).unwrap(), [false, false, true, false]);
        assert_eq!(mix.starts(index, 4).unwrap(), [0, 0, 0, 3]);
        assert_eq!(mix.sources[0].supervised, 3);
    }

    #[test]
    fn weights_and_windows_that_mean_nothing_are_refused() {
        for weight in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let error = TokenStream::mix(vec![source("a", weight, 1, 0)], 4).unwrap_err();
            assert_eq!(error.kind().exit_code(), 2, "{weight}");
        }
        let error = TokenStream::mix(vec![source("a", 1.0, 0, 0)], 4).unwrap_err();
        assert_eq!(error.what(), "a has 0 tokens, no window of 4");
    }
}
