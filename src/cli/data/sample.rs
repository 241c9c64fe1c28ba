//! Samples of a data set, their trained tokens marked.

use serde_json::{Value, json};
use unicode_width::UnicodeWidthChar;

use super::WIDTH;
use crate::data::{TokenStream, Tokenizer};
use crate::error::Result;

/// Tokens of a sample that are shown.
const MOST_TOKENS: usize = 400;
/// What stands before each line.
const MARGIN: &str = "  ";
/// Spaces that a tab is shown as.
const TAB: usize = 4;

/// Where examples begin and end in the stored tokens.
pub(super) fn runs(starts: &[u32], length: usize) -> Vec<(usize, usize)> {
    let begins = |at: &usize| starts[*at] as usize == at % length;
    let mut firsts: Vec<usize> = (0..starts.len()).filter(begins).collect();
    firsts.push(starts.len());
    firsts.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// Tokens of a stream that are shown.
pub(super) struct Piece {
    from: usize,
    to: usize,
}

/// `count` examples of a stream, or beginnings of windows where it is text.
pub(super) fn samples(stream: &TokenStream, length: usize, count: usize) -> Vec<Piece> {
    let all: Vec<(usize, usize)> =
        if let (Some(starts), Some(counts)) = (&stream.starts, &stream.supervised) {
            let runs = runs(starts, length).into_iter();
            runs.filter(|(from, to)| counts[*from..*to].contains(&true)).collect()
        } else {
            let end = stream.tokens.len();
            (0..end).step_by(length.max(1)).map(|from| (from, (from + length).min(end))).collect()
        };
    let count = count.min(all.len());
    (0..count)
        .map(|index| all[index * all.len() / count])
        .map(|(from, to)| Piece { from, to })
        .collect()
}

impl Piece {
    /// Its text in runs that are trained or not.
    pub(super) fn told(&self, stream: &TokenStream, tokenizer: &Tokenizer) -> Result<Sample> {
        let to = self.to.min(self.from + MOST_TOKENS);
        let ids = &stream.tokens[self.from..to];
        let counts: Vec<bool> = match &stream.supervised {
            Some(flags) => flags[self.from..to].to_vec(),
            None => vec![true; ids.len()],
        };
        let whole = tokenizer.decode(ids, false)?;
        let (mut spans, mut begun) = (Vec::new(), 0);
        for at in 1..=ids.len() {
            if at < ids.len() && counts[at] == counts[at - 1] {
                continue;
            }
            // The text up to here, as part of the whole: a decoder may treat a text's first space apart.
            let text = if at == ids.len() {
                whole.clone()
            } else {
                tokenizer.decode(&ids[..at], false)?
            };
            let same = whole.bytes().zip(text.bytes()).take_while(|(a, b)| a == b).count();
            let end =
                (begun..=same).rev().find(|end| whole.is_char_boundary(*end)).unwrap_or(begun);
            spans.push((whole[begun..end].to_owned(), counts[at - 1]));
            begun = end;
        }
        Ok(Sample {
            spans,
            tokens: self.to - self.from,
            shown: ids.len(),
            plain: stream.supervised.is_none(),
        })
    }
}

/// A piece as text.
pub(super) struct Sample {
    /// Texts, and whether their tokens are trained.
    spans: Vec<(String, bool)>,
    tokens: usize,
    shown: usize,
    /// A text, of which everything is trained: marks would say nothing.
    plain: bool,
}

impl Sample {
    pub(super) fn json(&self) -> Value {
        let spans =
            self.spans.iter().map(|(text, trained)| json!({"text": text, "trained": trained}));
        json!({"tokens": self.tokens, "shown": self.shown, "spans": spans.collect::<Vec<_>>()})
    }

    pub(super) fn lines(&self, number: usize, of: usize, mark: [&str; 2]) -> String {
        let mut out = format!("sample {number} of {of}, {} tokens", self.tokens);
        let mark = if self.plain { [""; 2] } else { mark };
        if self.plain {
            out += ", all trained";
        }
        let mut open = false;
        // Colours end with the line, so that the margin has none; brackets stay open, and take room.
        let coloured = mark[0].starts_with('\x1b');
        let room = if coloured { 0 } else { mark.concat().len() };
        for (line, goes_on) in self.wrapped(WIDTH - MARGIN.len() - room) {
            out = out + "\n" + MARGIN;
            for (c, trained) in &line {
                if *trained != open {
                    out += mark[usize::from(open)];
                    open = *trained;
                }
                out.push(*c);
            }
            if open && (coloured || !goes_on) {
                out += mark[1];
                open = false;
            }
        }
        if open {
            out += mark[1];
        }
        if self.tokens > self.shown {
            out = format!("{out}\n  … {} more tokens", self.tokens - self.shown);
        }
        out
    }

    /// Its letters in lines of so many columns, broken at spaces where there are any, and whether a
    /// line's end is trained.
    fn wrapped(&self, columns: usize) -> Vec<(Vec<(char, bool)>, bool)> {
        let letters =
            self.spans.iter().flat_map(|(text, trained)| text.chars().map(|c| (c, *trained)));
        let letters: Vec<(char, bool)> = letters.collect();
        let mut lines = Vec::new();
        for line in letters.split_inclusive(|(c, _)| *c == '\n') {
            let (line, end) = match line {
                [line @ .., ('\n', trained)] => (line, *trained),
                line => (line, false),
            };
            let mut rest: Vec<(char, bool)> = line.iter().copied().flat_map(shown).collect();
            while let Some(most) = overflow(&rest, columns) {
                let space = rest[..=most].iter().rposition(|(c, _)| *c == ' ').filter(|at| *at > 0);
                let mut tail = rest.split_off(space.unwrap_or(most));
                if space.is_some() {
                    // The break stands for it.
                    tail.remove(0);
                    if tail.is_empty() {
                        break;
                    }
                }
                let goes_on = tail.first().is_some_and(|(_, trained)| *trained);
                lines.push((std::mem::replace(&mut rest, tail), goes_on));
            }
            lines.push((rest, end));
        }
        while lines.last().is_some_and(|(line, _)| line.is_empty()) {
            lines.pop();
        }
        lines
    }
}

/// The first letter that lies beyond so many columns.
fn overflow(letters: &[(char, bool)], columns: usize) -> Option<usize> {
    let mut taken = 0;
    letters.iter().position(|(c, _)| {
        taken += c.width().unwrap_or(0);
        taken > columns
    })
}

/// A letter as it is shown: a tab as spaces, and nothing in data steers a terminal.
fn shown((c, trained): (char, bool)) -> impl Iterator<Item = (char, bool)> + use<> {
    let (c, times) = match c {
        '\t' => (' ', TAB),
        c if c.is_control() => ('\u{fffd}', 1),
        c => (c, 1),
    };
    std::iter::repeat_n((c, trained), times)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(spans: &[(&str, bool)]) -> Sample {
        let spans = spans.iter().map(|(text, trained)| ((*text).to_owned(), *trained)).collect();
        Sample { spans, tokens: 5, shown: 5, plain: false }
    }

    #[test]
    fn lines_fit_marks_and_wide_letters_included() {
        let word = "word ".repeat(40);
        let wide = "猫".repeat(60);
        for mark in [["[[", "]]"], ["\x1b[7m", "\x1b[0m"]] {
            let text = sample(&[(&word, false), (&wide, true), ("\tend", false)]).lines(1, 1, mark);
            let bare = text.replace(mark[0], "").replace(mark[1], "");
            let widest = |text: &str| text.lines().map(unicode_width::UnicodeWidthStr::width).max();
            assert!(widest(if mark[0] == "[[" { &text } else { &bare }) <= Some(WIDTH), "{text}");
            assert_eq!(text.matches('猫').count(), 60);
            assert!(bare.lines().last().is_some_and(|line| line.ends_with("    end")), "{text}");
            let broken = bare.lines().filter(|line| line.contains("word"));
            assert!(broken.clone().count() > 2);
            assert!(broken.clone().all(|line| !line.ends_with(' ')), "{text}");
        }
    }

    #[test]
    fn a_space_at_the_end_is_no_line() {
        let exact = "x".repeat(WIDTH - MARGIN.len());
        let text = sample(&[(&format!("{exact} "), true)]).lines(1, 1, ["\x1b[7m", "\x1b[0m"]);
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}
