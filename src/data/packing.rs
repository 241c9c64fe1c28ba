//! Examples packed whole into windows, and the reading of any data set into one stream.
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

use std::path::Path;

use super::documents::read_documents;
use super::examples::{DataFormat, Example, read_completions, read_instructions};
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
    /// Reads and tokenizes the data files `paths`, joined in order. Examples are packed into
    /// windows of `length` tokens; plain text has no windows yet and does not look at it.
    ///
    /// # Errors
    /// If a file cannot be read or is of another format, or nothing in it is supervised.
    pub fn load<P: AsRef<Path>>(
        paths: &[P],
        format: DataFormat,
        tokenizer: &Tokenizer,
        marks: Marks,
        length: usize,
    ) -> Result<Self> {
        let paths = paths.iter().map(AsRef::as_ref);
        let read = match format {
            DataFormat::Text => {
                let documents = joined(paths, read_documents)?;
                return Self::build(&documents, tokenizer, marks.bos);
            }
            DataFormat::Completion => read_completions,
            DataFormat::Instruction => read_instructions,
        };
        let names: Vec<String> = paths.clone().map(|path| path.display().to_string()).collect();
        let packed = Self::pack(joined(paths, read)?, tokenizer, marks, length);
        packed.map_err(|error| error.at(names.join(", ")))
    }

    /// Tokenizes `examples` and packs them greedily, in order and unsplit, into windows of `length`
    /// tokens; the rest of each window is filled with EOS, or 0. An example longer than a window is
    /// cut at its end.
    ///
    /// # Errors
    /// If `length` is below 2, the tokenizer fails, or nothing is supervised.
    pub fn pack(
        examples: Vec<Example>,
        tokenizer: &Tokenizer,
        marks: Marks,
        length: usize,
    ) -> Result<Self> {
        if length < 2 {
            return Err(Error::usage(format!("windows of {length} tokens predict nothing"))
                .fix("a length of at least 2 tokens"));
        }
        let documents = examples.len();
        let (prompts, completions): (Vec<String>, Vec<String>) =
            examples.into_iter().map(|example| (example.prompt, example.completion)).unzip();
        let prompts = tokenizer.encode_all(&prompts)?;
        let completions = tokenizer.encode_continuations(&completions)?;
        let mut packer = Packer { length, pad: marks.eos.unwrap_or(0), ..Packer::default() };
        for (prompt, completion) in prompts.iter().zip(&completions) {
            packer.push(prompt, completion, marks);
        }
        packer.fill();
        if !packer.supervised.contains(&true) {
            return Err(Error::preflight(format!(
                "the data set has zero supervised tokens: its {documents} completions are empty \
                 or lie beyond {length} tokens"
            ))
            .fix("completions that are not empty, shorter prompts, or longer windows"));
        }
        Ok(Self {
            tokens: packer.tokens,
            documents,
            supervised: Some(packer.supervised),
            packed: Some(length),
            starts: Some(packer.starts),
            cut: packer.cut,
        })
    }
}

fn joined<'p, T>(
    paths: impl Iterator<Item = &'p Path>,
    read: impl Fn(&Path) -> Result<Vec<T>>,
) -> Result<Vec<T>> {
    let mut all = Vec::new();
    for path in paths {
        all.extend(read(path)?);
    }
    Ok(all)
}

/// Windows being filled.
#[derive(Default)]
struct Packer {
    length: usize,
    pad: u32,
    tokens: Vec<u32>,
    supervised: Vec<bool>,
    starts: Vec<u32>,
    cut: usize,
}

impl Packer {
    fn push(&mut self, prompt: &[u32], completion: &[u32], marks: Marks) {
        let mut ids: Vec<u32> = marks.bos.into_iter().chain(prompt.iter().copied()).collect();
        let first = ids.len();
        ids.extend(completion.iter().copied().chain(marks.eos));
        if ids.len() > self.length {
            ids.truncate(self.length);
            self.cut += 1;
        }
        if self.tokens.len() % self.length + ids.len() > self.length {
            self.fill();
        }
        // Nothing predicts an example's first token.
        let counts = |at: usize| at >= first && !completion.is_empty() && at > 0;
        self.supervised.extend((0..ids.len()).map(counts));
        let start = (self.tokens.len() % self.length) as u32;
        self.tokens.extend(ids);
        self.starts.resize(self.tokens.len(), start);
    }

    /// Fills the window that is open.
    fn fill(&mut self) {
        let whole = self.tokens.len().next_multiple_of(self.length);
        self.starts.resize(whole, (self.tokens.len() % self.length) as u32);
        self.tokens.resize(whole, self.pad);
        self.supervised.resize(whole, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::tokenizer::tests::words;

    const MARKS: Marks = Marks { bos: Some(0), eos: Some(1) };

    fn pack(examples: &[(&str, &str)], marks: Marks, length: usize) -> Result<TokenStream> {
        let tokenizer = words(None).1.unwrap();
        let examples = examples.iter().map(|(prompt, completion)| Example {
            prompt: (*prompt).to_owned(),
            completion: (*completion).to_owned(),
        });
        TokenStream::pack(examples.collect(), &tokenizer, marks, length)
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
        let load = |paths: &[&Path], format| TokenStream::load(paths, format, &tokenizer, MARKS, 8);
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
