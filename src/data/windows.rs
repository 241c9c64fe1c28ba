//! One stream of tokens, cut into windows.
//!
//! A text's stream is BOS and the tokens of each document, joined with nothing between; examples are
//! packed into windows as the stream is made. Windows start at multiples of their length and the
//! tail that does not fill one is dropped.

use crate::data::mixing::SourceShare;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};

/// The documents of a data set as one token stream.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct TokenStream {
    /// Token ids, BOS included.
    pub tokens: Vec<u32>,
    /// Number of documents joined, or of examples.
    pub documents: usize,
    /// Which tokens are predicted and counted, `[tokens]`; `None` for text, where all are.
    pub supervised: Option<Vec<bool>>,
    /// The window length that examples were packed for; `None` for text.
    pub packed: Option<usize>,
    /// Examples that were longer than a window and lost their end.
    pub cut: usize,
    /// Examples that teach nothing: nothing is answered in them, or only beyond the window's end.
    pub empty: usize,
    /// Where the example of each token starts in its window, `[tokens]`, counted from the window's first
    /// token; what fills up a window is one of its own. `None` for text.
    pub starts: Option<Vec<u32>>,
    /// Tokens of each document, those that were cut off included.
    pub lengths: Vec<u32>,
    /// Which stored window is visited when, in a mix; `None`: each once, in order.
    pub visits: Option<Vec<u32>>,
    /// The sources of a mix.
    pub sources: Vec<SourceShare>,
}

/// A window of the perplexity protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct ScoredWindow {
    /// Position of its first token in the stream.
    pub start: usize,
    /// How many of its last positions are predicted and counted.
    pub scored: usize,
}

impl TokenStream {
    /// Tokenizes and joins `documents`, each opened by `bos` where there is one.
    ///
    /// # Errors
    /// If the tokenizer fails on a document.
    pub fn build(documents: &[String], tokenizer: &Tokenizer, bos: Option<u32>) -> Result<Self> {
        let encoded = tokenizer.encode_all(documents)?;
        let length = encoded.iter().map(|ids| ids.len() + usize::from(bos.is_some())).sum();
        let mut tokens = Vec::with_capacity(length);
        for ids in &encoded {
            tokens.extend(bos);
            tokens.extend_from_slice(ids);
        }
        Ok(Self { tokens, documents: documents.len(), ..Self::default() })
    }

    /// Number of whole windows of `length` tokens; 0 for a `length` of 0. In a mix windows may come again.
    pub fn windows(&self, length: usize) -> usize {
        match &self.visits {
            Some(visits) if self.packed == Some(length) => visits.len(),
            _ => self.tokens.len().checked_div(length).unwrap_or(0),
        }
    }

    /// The first token of window `index`.
    fn first_of(&self, index: usize, length: usize) -> usize {
        let stored = match &self.visits {
            Some(visits) if self.packed == Some(length) => visits[index] as usize,
            _ => index,
        };
        stored * length
    }

    /// The tokens of window `index`, `[length]`.
    ///
    /// # Panics
    /// If `index` is not below [`windows(length)`](Self::windows).
    pub fn window(&self, index: usize, length: usize) -> &[u32] {
        &self.tokens[self.first_of(index, length)..][..length]
    }

    /// Which tokens of window `index` are predicted and counted, `[length]`; `None` where all are
    /// (but the first, which nothing predicts).
    ///
    /// # Panics
    /// As [`window`](Self::window).
    pub fn supervision(&self, index: usize, length: usize) -> Option<&[bool]> {
        let first = self.first_of(index, length);
        self.supervised.as_deref().map(|flags| &flags[first..][..length])
    }

    /// Where in window `index` the example of each token starts, `[length]`; `None` for text, whose
    /// documents are not kept apart.
    ///
    /// # Panics
    /// As [`window`](Self::window).
    pub fn starts(&self, index: usize, length: usize) -> Option<&[u32]> {
        self.starts.as_deref().map(|starts| &starts[self.first_of(index, length)..][..length])
    }

    /// Number of tokens that count: the supervised ones, or all.
    pub fn counted(&self) -> usize {
        match &self.supervised {
            Some(flags) => flags.iter().filter(|counts| **counts).count(),
            None => self.tokens.len(),
        }
    }

    /// `samples` window indices spread evenly over the `N` windows: `floor(i * N / samples)`; in a mix, whose
    /// windows are mixed already, the first ones.
    ///
    /// # Errors
    /// If the stream has fewer than `samples` windows, or `samples` or `length` is 0.
    pub fn spread(&self, samples: usize, length: usize) -> Result<Vec<usize>> {
        if samples == 0 || length == 0 {
            return Err(Error::preflight(format!(
                "samples = {samples} and length = {length} select no tokens"
            ))
            .fix("set both to at least 1"));
        }
        let windows = self.windows(length);
        if windows < samples {
            return Err(self.too_short(samples, length).fix(if windows == 0 {
                "add text, or shorten the windows".to_owned()
            } else {
                format!("add text, shorten the windows, or set samples to at most {windows}")
            }));
        }
        if self.visits.is_some() && self.packed == Some(length) {
            return Ok((0..samples).collect());
        }
        // u128: the product of two stream-sized numbers may pass 64 bits.
        let index = |i: usize| (i as u128 * windows as u128 / samples as u128) as usize;
        Ok((0..samples).map(index).collect())
    }

    /// The windows that score the stream: starts `0, stride, 2 * stride, …`, each of `context`
    /// tokens, the tail dropped. The first scores every position but its first; a later one scores
    /// its last `stride` positions, again never its first.
    ///
    /// With `stride == context` these are the plain, non-overlapping windows.
    ///
    /// # Errors
    /// If `context` is below 2, `stride` is not in `1..=context`, or the stream is shorter than
    /// `context`.
    pub fn strided(&self, context: usize, stride: usize) -> Result<Vec<ScoredWindow>> {
        if context < 2 {
            return Err(Error::usage(format!("a context of {context} tokens predicts nothing"))
                .fix("use a context of at least 2 tokens"));
        }
        if stride == 0 || stride > context {
            return Err(Error::usage(format!(
                "stride {stride} is outside 1 to {context}, the context"
            ))
            .fix(format!("use stride {context} for windows that do not overlap")));
        }
        let Some(last) = self.tokens.len().checked_sub(context) else {
            return Err(self.too_short(1, context).fix("add text, or use a shorter context"));
        };
        let scored = |start| if start == 0 { context - 1 } else { stride.min(context - 1) };
        let starts = (0..=last).step_by(stride);
        Ok(starts.map(|start| ScoredWindow { start, scored: scored(start) }).collect())
    }

    fn too_short(&self, windows: usize, length: usize) -> Error {
        let (found, needed) = (self.tokens.len(), windows.saturating_mul(length));
        let purpose = match windows {
            1 => format!("one window of {length} tokens needs"),
            _ => format!("{windows} windows of {length} tokens need"),
        };
        Error::preflight(format!("the data has {found} tokens, but {purpose} {needed}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::tests::words;

    fn stream(length: u32) -> TokenStream {
        TokenStream { tokens: (0..length).collect(), documents: 1, ..TokenStream::default() }
    }

    #[test]
    fn joins_documents_with_nothing_but_bos() {
        let tokenizer = words(None).1.unwrap();
        let documents = ["a b".to_owned(), String::new(), "c".to_owned()];
        let built = TokenStream::build(&documents, &tokenizer, Some(0)).unwrap();
        let tokens = vec![0, 3, 4, 0, 0, 5];
        assert_eq!(built, TokenStream { tokens, documents: 3, ..TokenStream::default() });
        let plain = TokenStream::build(&documents, &tokenizer, None).unwrap();
        assert_eq!(plain.tokens, [3, 4, 5]);
    }

    #[test]
    fn windows_drop_the_tail() {
        let stream = stream(11);
        assert_eq!(stream.windows(4), 2);
        assert_eq!(stream.window(0, 4), [0, 1, 2, 3]);
        assert_eq!(stream.window(1, 4), [4, 5, 6, 7]);
        assert_eq!((stream.windows(12), stream.windows(0)), (0, 0));
    }

    #[test]
    fn spread_is_the_floor_rule() {
        assert_eq!(stream(10).spread(4, 1).unwrap(), [0, 2, 5, 7]);
        assert_eq!(stream(12).spread(3, 4).unwrap(), [0, 1, 2]);
        let spread = stream(2827).spread(128, 1).unwrap();
        assert_eq!((spread[1], spread[2], spread[127]), (22, 44, 2804));
    }

    #[test]
    fn spread_says_how_many_tokens_are_missing() {
        let error = stream(1000).spread(8, 128).unwrap_err();
        assert_eq!(error.kind().exit_code(), 3);
        assert_eq!(
            error.to_string(),
            "the data has 1000 tokens, but 8 windows of 128 tokens need 1024\n  \
             try  add text, shorten the windows, or set samples to at most 7"
        );
        assert_eq!(
            stream(0).spread(1, 4).unwrap_err().to_string(),
            "the data has 0 tokens, but one window of 4 tokens needs 4\n  \
             try  add text, or shorten the windows"
        );
        assert!(stream(9).spread(0, 4).is_err());
        assert!(stream(9).spread(1, 0).is_err());
        assert!(stream(9).spread(usize::MAX, 2).is_err());
    }

    #[test]
    fn strided_counts_each_prediction_once() {
        let pairs = |length, context, stride| {
            let windows = stream(length).strided(context, stride).unwrap();
            windows.iter().map(|w| (w.start, w.scored)).collect::<Vec<_>>()
        };
        assert_eq!(pairs(11, 4, 4), [(0, 3), (4, 3)]);
        assert_eq!(pairs(11, 4, 3), [(0, 3), (3, 3), (6, 3)]);
        assert_eq!(pairs(9, 4, 2), [(0, 3), (2, 2), (4, 2)]);
        assert_eq!(pairs(4, 4, 1), [(0, 3)]);
        // Below the context, the scored positions tile the stream from its second token on.
        for stride in 1..8 {
            let windows = stream(50).strided(8, stride).unwrap();
            let scored = windows.iter().flat_map(|w| w.start + 8 - w.scored..w.start + 8);
            let end = windows[windows.len() - 1].start + 8;
            assert!(scored.eq(1..end), "stride {stride}");
        }
    }

    #[test]
    fn strided_refuses_what_scores_nothing() {
        for (context, stride) in [(1, 1), (4, 0), (4, 5)] {
            assert_eq!(stream(9).strided(context, stride).unwrap_err().kind().exit_code(), 2);
        }
        assert_eq!(
            stream(3).strided(4, 4).unwrap_err().what(),
            "the data has 3 tokens, but one window of 4 tokens needs 4"
        );
    }
}
