//! Examples packed whole into windows.
//!
//! An example is BOS, prompt, completion and EOS, where the model has the two. Its prompt is
//! tokenized alone, as it will be when the model is asked, and its completion as a text that goes
//! on ([`Tokenizer::encode_continuations`]): so the boundary lies between two tokens, and a
//! tokenizer that puts a space before every text puts none between the two.
//!
//! Only the completion and the EOS behind it are supervised, which is to say predicted and counted.
//! A completion that is empty supervises nothing, not even its EOS: it is a fault of the data, and
//! should not teach a model to be silent. Nor is an example's first token, which nothing predicts.
//! Examples that share a window do not see each other: each counts its positions from its own start.

use super::examples::{DataFormat, Example};
use super::tokenizer::Tokenizer;
use super::windows::TokenStream;
use crate::error::{Error, Result};

/// The special tokens around documents.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Marks {
    /// Before each document or example.
    pub bos: Option<u32>,
    /// Behind each example; plain text has none. Rests of windows are filled with it.
    pub eos: Option<u32>,
}

impl TokenStream {
    /// Refuses examples of which nothing is supervised.
    ///
    /// # Errors
    /// When that is so.
    pub(super) fn that_teaches(self, format: DataFormat, length: usize) -> Result<Self> {
        let nothing = || !self.supervised.iter().flatten().any(|counts| *counts);
        if format.is_packed() && nothing() {
            return Err(self.teaches_nothing(format, length));
        }
        Ok(self)
    }

    /// Why a data set without a supervised token is none.
    fn teaches_nothing(&self, format: DataFormat, length: usize) -> Error {
        let documents = self.documents;
        let (what, fix) = match format {
            DataFormat::Messages => (
                format!("its {documents} conversations have no answer of an assistant within"),
                "conversations with turns of the role assistant behind others, or longer windows",
            ),
            DataFormat::Tokens => (
                format!("all labels of its {documents} records are -100 within"),
                "labels that are the token where it is to be learned, or longer windows",
            ),
            _ => (
                format!("its {documents} completions are empty or lie beyond"),
                "completions that are not empty, shorter prompts, or longer windows",
            ),
        };
        Error::preflight(format!("the data set has zero supervised tokens: {what} {length} tokens"))
            .fix(fix)
    }
}

/// Windows being filled.
#[derive(Default)]
pub(super) struct Packer {
    length: usize,
    marks: Marks,
    stream: TokenStream,
    supervised: Vec<bool>,
    starts: Vec<u32>,
}

impl Packer {
    /// One for windows of `length` tokens.
    ///
    /// # Errors
    /// If `length` is below 2.
    pub(super) fn new(length: usize, marks: Marks) -> Result<Self> {
        if length < 2 {
            return Err(Error::usage(format!("windows of {length} tokens predict nothing"))
                .fix("a length of at least 2 tokens"));
        }
        Ok(Self { length, marks, ..Self::default() })
    }

    /// Tokenizes and packs prompts with their completions.
    pub(super) fn push_examples(
        &mut self,
        examples: Vec<Example>,
        tokenizer: &Tokenizer,
    ) -> Result<()> {
        let (prompts, completions): (Vec<String>, Vec<String>) =
            examples.into_iter().map(|example| (example.prompt, example.completion)).unzip();
        let prompts = tokenizer.encode_all(&prompts)?;
        let completions = tokenizer.encode_continuations(&completions)?;
        let Marks { bos, eos } = self.marks;
        for (prompt, completion) in prompts.iter().zip(&completions) {
            let mut ids: Vec<u32> = bos.into_iter().chain(prompt.iter().copied()).collect();
            let first = ids.len();
            ids.extend(completion.iter().copied().chain(eos));
            let counts = |at: usize| at >= first && !completion.is_empty();
            let counts = (0..ids.len()).map(counts).collect();
            self.push(ids, counts, true);
        }
        Ok(())
    }

    /// Packs an example, cut where it is longer than a window. One of which nothing counts then is left
    /// out, unless `keep`.
    pub(super) fn push(&mut self, mut ids: Vec<u32>, mut counts: Vec<bool>, keep: bool) {
        self.stream.documents += 1;
        self.stream.lengths.push(ids.len() as u32);
        if ids.len() > self.length {
            ids.truncate(self.length);
            counts.truncate(self.length);
            self.stream.cut += 1;
        }
        let teaches = counts.contains(&true);
        self.stream.empty += usize::from(!teaches);
        if ids.is_empty() || !teaches && !keep {
            return;
        }
        if self.stream.tokens.len() % self.length + ids.len() > self.length {
            self.fill();
        }
        let start = self.stream.tokens.len() % self.length;
        // Nothing predicts an example's first token.
        counts[0] = false;
        self.supervised.extend(counts);
        self.starts.extend(std::iter::repeat_n(start as u32, ids.len()));
        self.stream.tokens.extend(ids);
    }

    /// Fills the window that is open.
    fn fill(&mut self) {
        let from = self.stream.tokens.len();
        let whole = from.next_multiple_of(self.length);
        self.stream.tokens.resize(whole, self.marks.eos.unwrap_or(0));
        self.supervised.resize(whole, false);
        self.starts.resize(whole, (from % self.length) as u32);
    }

    /// What was packed.
    pub(super) fn finish(mut self) -> TokenStream {
        self.fill();
        TokenStream {
            supervised: Some(self.supervised),
            starts: Some(self.starts),
            packed: Some(self.length),
            ..self.stream
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::data::chat::ChatTemplate;
    use crate::data::reading::{Reader, Reading};
    use crate::data::tokenizer::tests::words;

    const MARKS: Marks = Marks { bos: Some(0), eos: Some(1) };

    #[test]
    fn every_token_knows_where_its_example_starts() {
        let stream = pack(&[("a", "a"), ("b", "b"), ("c", "c c"), ("a", "b")], MARKS, 9).unwrap();
        let starts = stream.starts.as_ref().unwrap();
        assert_eq!(starts[..9], [0, 0, 0, 0, 4, 4, 4, 4, 8], "the filling is one of its own");
        assert_eq!(stream.starts(1, 9).unwrap(), [0, 0, 0, 0, 0, 5, 5, 5, 5]);
        assert_eq!((stream.lengths, stream.empty), (vec![4, 4, 5, 4], 0));
    }

    fn pack(examples: &[(&str, &str)], marks: Marks, length: usize) -> Result<TokenStream> {
        let tokenizer = words(None).1.unwrap();
        let examples = examples.iter().map(|(prompt, completion)| Example {
            prompt: (*prompt).to_owned(),
            completion: (*completion).to_owned(),
        });
        let mut packer = Packer::new(length, marks)?;
        packer.push_examples(examples.collect(), &tokenizer)?;
        packer.finish().that_teaches(DataFormat::Completion, length)
    }

    /// The supervised positions.
    fn supervised(stream: &TokenStream) -> Vec<usize> {
        let flags = stream.supervised.as_ref().unwrap();
        assert_eq!(flags.len(), stream.tokens.len());
        (0..flags.len()).filter(|at| flags[*at]).collect()
    }

    #[test]
    fn an_example_is_bos_prompt_completion_eos() {
        let stream = pack(&[("a b", "c")], MARKS, 8).unwrap();
        assert_eq!(stream.tokens, [0, 3, 4, 5, 1, 1, 1, 1]);
        assert_eq!(supervised(&stream), [3, 4]);
        assert_eq!((stream.documents, stream.packed, stream.cut), (1, Some(8), 0));
        assert_eq!(stream.counted(), 2);
        let bare = pack(&[("a b", "c")], Marks::default(), 4).unwrap();
        assert_eq!((&bare.tokens[..], supervised(&bare)), (&[3, 4, 5, 0][..], vec![2]));
    }

    #[test]
    fn examples_are_packed_whole_and_in_order() {
        let examples = [("a", "a"), ("b", "b"), ("c", "c c"), ("a", "b")];
        let stream = pack(&examples, MARKS, 9).unwrap();
        let expected = [[0, 3, 3, 1, 0, 4, 4, 1, 1], [0, 5, 5, 5, 1, 0, 3, 4, 1]].concat();
        assert_eq!(stream.tokens, expected);
        assert_eq!(supervised(&stream), [2, 3, 6, 7, 11, 12, 13, 16, 17]);
        // Padding is by itself too.
        assert_eq!(stream.starts(0, 9).unwrap(), [0, 0, 0, 0, 4, 4, 4, 4, 8]);
        assert_eq!(stream.starts(1, 9).unwrap(), [0, 0, 0, 0, 0, 5, 5, 5, 5]);
        assert_eq!(stream.windows(9), 2);
        assert_eq!(stream.supervision(1, 9).unwrap(), &stream.supervised.as_ref().unwrap()[9..]);
        // One that fits exactly leaves nothing to fill.
        assert_eq!(pack(&examples[..2], MARKS, 8).unwrap().tokens.len(), 8);
    }

    #[test]
    fn a_long_example_is_cut_at_its_end() {
        let examples = [("a", "b"), ("a b c", "a b c"), ("c", "c"), ("a b c a b c", "a")];
        let stream = pack(&examples, MARKS, 6).unwrap();
        assert_eq!(stream.cut, 2);
        assert_eq!(
            stream.tokens,
            [[0, 3, 4, 1, 1, 1], [0, 3, 4, 5, 3, 4], [0, 5, 5, 1, 1, 1], [0, 3, 4, 5, 3, 4]]
                .concat()
        );
        assert_eq!(supervised(&stream), [2, 3, 10, 11, 14, 15]);
    }

    #[test]
    fn nothing_that_is_not_predicted_is_supervised() {
        // Without BOS and prompt the completion's first token opens the example, and nothing stands
        // before it, whatever the window holds.
        let marks = Marks { bos: None, eos: Some(1) };
        let stream = pack(&[("", "a b"), ("", "c")], marks, 5).unwrap();
        assert_eq!(stream.tokens, [3, 4, 1, 5, 1]);
        assert_eq!(supervised(&stream), [1, 2, 4]);
        assert_eq!(stream.starts(0, 5).unwrap(), [0, 0, 0, 3, 3]);
        // An empty completion teaches nothing beside one that is not.
        let stream = pack(&[("a", ""), ("b", "c")], MARKS, 8).unwrap();
        assert_eq!(supervised(&stream), [5, 6]);
    }

    #[test]
    fn zero_supervised_tokens_are_refused() {
        let error = pack(&[("a", ""), ("b c", "")], MARKS, 8).unwrap_err();
        assert_eq!(error.kind().exit_code(), 3);
        assert_eq!(
            error.to_string(),
            "the data set has zero supervised tokens: its 2 completions are empty or lie beyond 8 \
             tokens\n  try  completions that are not empty, shorter prompts, or longer windows"
        );
        assert!(pack(&[("a b c", "a")], MARKS, 4).is_err(), "cut before the completion");
        assert!(pack(&[("", "a")], Marks::default(), 2).is_err(), "only a window's first token");
        assert_eq!(pack(&[("a", "b")], MARKS, 1).unwrap_err().kind().exit_code(), 2);
    }

    #[test]
    fn files_are_joined_and_plain_text_has_no_windows() {
        let folder = tempfile::tempdir().unwrap();
        let [one, two, text, empty] =
            ["1.jsonl", "2.json", "3.txt", "4.jsonl"].map(|name| folder.path().join(name));
        std::fs::write(&one, "{\"prompt\": \"a\", \"completion\": \"b\"}").unwrap();
        std::fs::write(&two, "[{\"prompt\": \"b\", \"completion\": \"c\"}]").unwrap();
        std::fs::write(&text, "a b c").unwrap();
        std::fs::write(&empty, "{\"prompt\": \"a\", \"completion\": \"\"}").unwrap();
        let tokenizer = words(None).1.unwrap();
        let template = &|| Ok(None::<ChatTemplate>);
        let (marks, length, vocab) = (MARKS, 8, tokenizer.vocab_size());
        let reader = Reader { tokenizer: &tokenizer, template, marks, length, vocab };
        let load = |paths: &[&Path], format| {
            reader.read(paths, &Reading::from(format).resolved(paths).unwrap())
        };
        let stream = load(&[&one, &two], DataFormat::Completion).unwrap();
        assert_eq!(stream.tokens, [0, 3, 4, 1, 0, 4, 5, 1]);
        assert_eq!(stream.documents, 2);
        let stream = load(&[&text], DataFormat::Text).unwrap();
        assert_eq!((&stream.tokens[..], stream.counted()), (&[0, 3, 4, 5][..], 4));
        assert_eq!((stream.packed, stream.supervision(0, 4)), (None, None));
        assert_eq!(stream.starts(0, 4), None);
        let error = load(&[&empty], DataFormat::Completion).unwrap_err().to_string();
        assert!(error.contains("\n  at   ") && error.contains("4.jsonl"), "{error}");
    }
}
