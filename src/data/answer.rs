//! A text that comes token by token: its characters as they are complete, and where it stops.

use super::Tokenizer;
use crate::error::Result;

/// Tokens of the prompt that new ones are decoded behind: some tokenizers drop the space at the
/// beginning of whatever they decode.
const LEAD: usize = 6;

/// The text that continues a prompt.
#[derive(Debug)]
pub struct Answer<'a> {
    tokenizer: &'a Tokenizer,
    stops: &'a [String],
    ids: Vec<u32>,
    /// Tokens of the prompt at the beginning of `ids`.
    lead: usize,
    /// What is decoded together with the next token, and how much of that is in the text already.
    window: [usize; 2],
    text: String,
    stopped: bool,
}

impl<'a> Answer<'a> {
    /// An empty text behind `prompt`, which ends before the first of `stops` that it holds.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], stops: &'a [String]) -> Self {
        let ids = prompt[prompt.len().saturating_sub(LEAD)..].to_vec();
        let lead = ids.len();
        let text = String::new();
        Self { tokenizer, stops, ids, lead, window: [0, lead], text, stopped: false }
    }

    /// Takes the next token; `false` when the text has met one of its stops.
    ///
    /// # Errors
    /// When the tokenizer cannot decode it.
    pub fn push(&mut self, token: u32) -> Result<bool> {
        self.ids.push(token);
        self.take(false)?;
        Ok(!self.stopped)
    }

    /// Takes what was held back: bytes that never became a character.
    ///
    /// # Errors
    /// As [`Answer::push`].
    pub fn finish(&mut self) -> Result<()> {
        if self.stopped { Ok(()) } else { self.take(true) }
    }

    fn take(&mut self, all: bool) -> Result<()> {
        let [start, known] = self.window;
        let before = self.tokenizer.decode(&self.ids[start..known], true)?;
        let now = self.tokenizer.decode(&self.ids[start..], true)?;
        let new = now.get(before.len()..).unwrap_or_default();
        if new.is_empty() || (!all && new.ends_with(char::REPLACEMENT_CHARACTER)) {
            return Ok(());
        }
        // A stop may have begun in what is there.
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let mut from = self.text.len().saturating_sub(longest);
        while !self.text.is_char_boundary(from) {
            from -= 1;
        }
        self.text.push_str(new);
        self.window = [known, self.ids.len()];
        let found = |stop: &String| self.text[from..].find(stop.as_str()).map(|at| from + at);
        if let Some(at) = self.stops.iter().filter_map(found).min() {
            self.text.truncate(at);
            self.stopped = true;
        }
        Ok(())
    }

    /// The text so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The text without an end that may become a stop.
    pub fn settled(&self) -> &str {
        if self.stopped {
            return &self.text;
        }
        let begins = |at: usize| {
            let end = &self.text[at..];
            self.stops.iter().any(|stop| stop.starts_with(end))
        };
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let places = self.text.char_indices().map(|(at, _)| at);
        let open = places.filter(|at| self.text.len() - at < longest).find(|at| begins(*at));
        &self.text[..open.unwrap_or(self.text.len())]
    }

    /// The tokens of the answer.
    pub fn tokens(&self) -> &[u32] {
        &self.ids[self.lead..]
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn tokenizer(model: &str) -> Tokenizer {
        let folder = format!("{}/datasets/{model}", env!("CARGO_MANIFEST_DIR"));
        Tokenizer::load(Path::new(&folder)).unwrap()
    }

    #[test]
    fn the_pieces_are_the_whole() {
        for model in ["tinystories-656k", "stories260k"] {
            let tokenizer = tokenizer(model);
            // The first has no bytes to fall back on.
            let foreign = if model == "stories260k" { " Hé, 你好 🙂!" } else { " Hey!" };
            for text in [foreign, " a big dog.\n\nIt said: \"Oh!\"", "x", "", "  two  spaces "] {
                let prompt = tokenizer.encode("Lily saw").unwrap();
                let ids = tokenizer.encode_continuations(&[text.to_owned()]).unwrap().remove(0);
                let mut answer = Answer::new(&tokenizer, &prompt, &[]);
                for id in &ids {
                    assert!(answer.push(*id).unwrap());
                    assert!(text.starts_with(answer.text()), "{model}: {:?}", answer.text());
                }
                answer.finish().unwrap();
                assert_eq!((answer.text(), answer.tokens()), (text, &ids[..]), "{model}");
            }
        }
    }

    #[test]
    fn it_ends_before_the_first_stop() {
        let tokenizer = tokenizer("tinystories-656k");
        let stops = ["Question:".to_owned(), "\n\n".to_owned()];
        let prompt = tokenizer.encode("Lily saw").unwrap();
        let run = |text: &str| {
            let ids = tokenizer.encode_continuations(&[text.to_owned()]).unwrap().remove(0);
            let mut answer = Answer::new(&tokenizer, &prompt, &stops);
            let mut shown = String::new();
            for id in ids {
                let more = answer.push(id).unwrap();
                let settled = answer.settled();
                assert!(settled.starts_with(&shown), "{settled:?} after {shown:?}");
                shown = settled.to_owned();
                if !more {
                    break;
                }
            }
            answer.finish().unwrap();
            (answer.text().to_owned(), shown)
        };
        assert_eq!(run(" a dog.\nIt sat.\n\nThe end. Question: x").0, " a dog.\nIt sat.");
        assert_eq!(run(" a dog. Question: x\n\n").0, " a dog. ");
        let (text, shown) = run(" a dog. Quest");
        assert_eq!((text.as_str(), shown.as_str()), (" a dog. Quest", " a dog. "));
    }
}
