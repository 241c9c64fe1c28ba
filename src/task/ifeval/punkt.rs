//! Sentences of an English text by Punkt (Kiss and Strunk, "Unsupervised Multilingual Sentence Boundary
//! Detection", Computational Linguistics 32, 2006), with the parameters that NLTK trained on the Wall
//! Street Journal and its way of cutting tokens, so that the sentences are NLTK's.
//!
//! The parameters are those of NLTK's data package `punkt_tab` (English; by Jan Strunk and Tibor Kiss, Apache-2.0
//! as NLTK itself), taken over by `tests/golden/ifeval.py --punkt`. Of what was seen of a word in training, `punkt.txt` keeps what can change a decision: words never seen
//! in lower case are as good as unknown, the others fall into three classes ([`Seen`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::LazyLock;

use regex::Regex;

use super::python;

/// What was learned from text. Words are in lower case, numbers are `##number##`.
struct Parameters {
    abbreviations: BTreeSet<&'static str>,
    /// Two words that belong together, the first one ending in a period.
    collocations: BTreeSet<(&'static str, &'static str)>,
    /// Words that often begin a sentence.
    starters: BTreeSet<&'static str>,
    seen: BTreeMap<&'static str, Seen>,
}

/// How a word was seen in training that was seen in lower case at all.
#[derive(Clone, Copy, PartialEq)]
enum Seen {
    /// Capitalized at most where sentences begin: a capital then says that one begins.
    UpperStarts,
    /// The same, and in lower case where sentences begin, never with a capital.
    Either,
    /// Capitalized inside sentences too: a capital says nothing.
    UpperInside,
}

static PARAMETERS: LazyLock<Parameters> = LazyLock::new(|| {
    let mut parameters = Parameters {
        abbreviations: BTreeSet::new(),
        collocations: BTreeSet::new(),
        starters: BTreeSet::new(),
        seen: BTreeMap::new(),
    };
    let mut section = "";
    for line in include_str!("punkt.txt").split_terminator('\n') {
        match line {
            "[abbreviations]" | "[collocations]" | "[starters]" | "[upper_starts]" | "[either]"
            | "[upper_inside]" => section = line,
            _ => parameters.add(section, line),
        }
    }
    parameters
});

impl Parameters {
    fn add(&mut self, section: &str, line: &'static str) {
        match section {
            "[abbreviations]" => drop(self.abbreviations.insert(line)),
            "[starters]" => drop(self.starters.insert(line)),
            "[upper_starts]" => drop(self.seen.insert(line, Seen::UpperStarts)),
            "[either]" => drop(self.seen.insert(line, Seen::Either)),
            "[upper_inside]" => drop(self.seen.insert(line, Seen::UpperInside)),
            _ => {
                if let Some(pair) = line.split_once('\t') {
                    self.collocations.insert(pair);
                }
            }
        }
    }
}

/// The sentences of a text, without the space between them.
pub(super) fn sentences(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let slices = slices(text);
    // Closing quotes and brackets behind a period belong to the sentence before them.
    let mut moved = 0;
    for (index, slice) in slices.iter().enumerate() {
        let start = slice.start + moved;
        let next = slices.get(index + 1);
        let closed = next.and_then(|next| Some((next, closing(part(text, next))?)));
        if let Some((next, (closed, all))) = closed {
            found.push(part(text, &(start..next.start + closed)));
            moved = all;
            continue;
        }
        moved = 0;
        if start < slice.end {
            found.push(&text[start..slice.end]);
        }
    }
    found
}

/// A slice of a text, empty where it ends before it begins.
fn part<'a>(text: &'a str, slice: &Range<usize>) -> &'a str {
    text.get(slice.clone()).unwrap_or_default()
}

/// Bytes of the closing marks that a text begins with, without and with the space behind them.
fn closing(text: &str) -> Option<(usize, usize)> {
    let mut at = 0;
    for character in text.chars() {
        if !matches!(character, '"' | '\'' | ')' | ']' | '}' | '‘' | '’' | '“' | '”' | '«' | '»')
        {
            return None;
        }
        at += character.len_utf8();
        let behind = &text[at..];
        let space = behind.len() - behind.trim_start().len();
        if space > 0 || behind.is_empty() || behind.starts_with("--") {
            return Some((at, at + space));
        }
    }
    None
}

/// Where sentences lie, before closing marks are moved.
fn slices(text: &str) -> Vec<Range<usize>> {
    let mut slices = Vec::new();
    let mut start = 0;
    for candidate in candidates(text) {
        if breaks(&text[candidate.word..candidate.behind]) {
            slices.push(start..candidate.end);
            start = candidate.next.unwrap_or(candidate.end);
        }
    }
    slices.push(start..text.trim_end_matches(python::is_space).len());
    slices
}

/// A mark that may end a sentence, with what stands around it; byte positions.
struct Candidate {
    /// Where the word before it begins.
    word: usize,
    /// Behind the mark.
    end: usize,
    /// Behind what follows: a mark, or space and the next token.
    behind: usize,
    /// Where the next token begins, if space comes first.
    next: Option<usize>,
}

/// Every mark that may end a sentence; of several in one word the last.
fn candidates(text: &str) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = Vec::new();
    // The word before the last mark, up to that mark.
    let mut last = 0..0;
    let mut kept = false;
    for (at, _) in text.char_indices().filter(|(_, mark)| is_end(*mark)) {
        let end = at + 1;
        let Some((behind, next)) = follow(text, end) else { continue };
        let spaces = |c: char| matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c');
        let word = match text[last.end..at].rfind(spaces) {
            None | Some(0) => last.start,
            Some(space) => last.end + space + 1,
        };
        // A mark in the same word as the one before takes its place.
        if kept && last.end > word {
            found.pop();
        }
        found.push(Candidate { word, end, behind, next });
        kept = true;
        last = word..at;
    }
    found
}

/// What makes a mark that ends at `end` a candidate: another mark behind it, or space and a token. Gives
/// the end of that, and where the token begins.
fn follow(text: &str, end: usize) -> Option<(usize, Option<usize>)> {
    let rest = &text[end..];
    let first = rest.chars().next()?;
    if is_no_word(first) {
        return Some((end + first.len_utf8(), None));
    }
    let token = rest.trim_start();
    let next = end + rest.len() - token.len();
    if next == end || token.is_empty() {
        return None;
    }
    let length = token.find(char::is_whitespace).unwrap_or(token.len());
    Some((next + length, Some(next)))
}

fn is_end(character: char) -> bool {
    matches!(character, '.' | '?' | '!')
}

/// Characters that are in no word.
fn is_no_word(character: char) -> bool {
    ")\";}]*:@'({[‘’“”«»?!".contains(character)
}

/// A token and what is thought of it.
struct Token<'a> {
    text: &'a str,
    /// In lower case, numbers as `##number##`.
    kind: String,
    breaks: bool,
    abbreviation: bool,
    ellipsis: bool,
}

impl<'a> Token<'a> {
    /// A token by itself: what its word alone says.
    fn new(text: &'a str) -> Self {
        static NUMBER: LazyLock<Regex> =
            LazyLock::new(|| python::compile(r"^-?[.,]?\d[\d,.-]*\.?$"));
        let lower = text.to_lowercase();
        let kind = if NUMBER.is_match(&lower) { "##number##".to_owned() } else { lower };
        let mut token = Self { text, kind, breaks: false, abbreviation: false, ellipsis: false };
        if matches!(text, "." | "?" | "!") {
            token.breaks = true;
        } else if text.len() > 1 && text.bytes().all(|byte| byte == b'.') {
            token.ellipsis = true;
        } else if let Some(word) = text.strip_suffix('.').filter(|word| !word.ends_with('.')) {
            let word = word.to_lowercase();
            let known = |word: &str| PARAMETERS.abbreviations.contains(word);
            let last = word.rsplit('-').next().unwrap_or_default();
            token.abbreviation = known(&word) || known(last);
            token.breaks = !token.abbreviation;
        }
        token
    }

    fn kind_without_period(&self) -> &str {
        match self.kind.strip_suffix('.') {
            Some(kind) if !kind.is_empty() => kind,
            _ => &self.kind,
        }
    }

    /// The kind; where the token ends a sentence, without its period.
    fn kind_inside(&self) -> &str {
        if self.breaks { self.kind_without_period() } else { &self.kind }
    }

    /// One letter and a period.
    fn is_initial(&self) -> bool {
        static LETTER: LazyLock<Regex> = LazyLock::new(|| python::compile(r"^[\w--\d]\.$"));
        LETTER.is_match(self.text)
    }

    fn first(&self) -> char {
        self.text.chars().next().unwrap_or_default()
    }

    /// Whether case says that the token begins a sentence; nothing where it says neither.
    fn begins_by_case(&self) -> Option<bool> {
        if matches!(self.text, ";" | ":" | "," | "." | "!" | "?") {
            return Some(false);
        }
        let seen = PARAMETERS.seen.get(self.kind_inside()).copied();
        let first = self.first();
        if first.is_uppercase() && matches!(seen, Some(Seen::UpperStarts | Seen::Either)) {
            return Some(true);
        }
        (first.is_lowercase() && seen != Some(Seen::Either)).then_some(false)
    }

    /// Thinks again, knowing the token behind.
    fn revise(&mut self, next: &Token<'_>) {
        if !self.text.ends_with('.') {
            return;
        }
        let next_kind = next.kind_inside();
        let initial = self.is_initial();
        if PARAMETERS.collocations.contains(&(self.kind_without_period(), next_kind)) {
            (self.breaks, self.abbreviation) = (false, true);
            return;
        }
        if (self.abbreviation || self.ellipsis) && !initial {
            let starter = next.first().is_uppercase() && PARAMETERS.starters.contains(next_kind);
            if starter || next.begins_by_case() == Some(true) {
                self.breaks = true;
                return;
            }
        }
        if initial || self.kind_without_period() == "##number##" {
            let name =
                initial && next.first().is_uppercase() && !PARAMETERS.seen.contains_key(next_kind);
            let inside = next.begins_by_case().map_or(name, |begins| !begins);
            if inside {
                (self.breaks, self.abbreviation) = (false, true);
            }
        }
    }
}

/// Whether a sentence ends in a text, and goes on behind it.
fn breaks(text: &str) -> bool {
    let lines = text.split('\n').filter(|line| !python::strip(line).is_empty());
    let mut tokens: Vec<Token<'_>> = lines.flat_map(tokens).map(Token::new).collect();
    for at in 1..tokens.len() {
        let (before, behind) = tokens.split_at_mut(at);
        before[at - 1].revise(&behind[0]);
    }
    let inner = tokens.len().saturating_sub(1);
    tokens[..inner].iter().any(|token| token.breaks)
}

/// The tokens of a line: words with their periods, and punctuation.
fn tokens(line: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = line.trim_start();
    while let Some(first) = rest.chars().next() {
        let mut length = first.len_utf8();
        if let Some(marks) = marks(rest) {
            length = marks;
        } else if !"(\"`{[:;&#*@)}]-,".contains(first) {
            length = rest
                .char_indices()
                .map(|(at, _)| at)
                .chain([rest.len()])
                .skip(1)
                .find(|at| ends_word(&rest[*at..]))
                .unwrap_or(rest.len());
        }
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

/// Whether a word is over where a text begins.
fn ends_word(rest: &str) -> bool {
    let over = |rest: &str| {
        let first = rest.chars().next();
        first.is_none_or(|first| first.is_whitespace() || is_no_word(first))
            || marks(rest).is_some()
    };
    over(rest) || rest.strip_prefix(',').is_some_and(over)
}

/// Bytes of the dashes, dots or spaced dots that a text begins with.
fn marks(text: &str) -> Option<usize> {
    for mark in ['-', '.'] {
        let length = text.len() - text.trim_start_matches(mark).len();
        if length > 1 {
            return Some(length);
        }
    }
    // Three dots or more with a space between any two.
    let mut dots = 0;
    let mut end = 0;
    let mut rest = text;
    while let Some(behind) = rest.strip_prefix('.') {
        dots += 1;
        end = text.len() - behind.len();
        match behind.chars().next().filter(|c| c.is_whitespace()) {
            Some(space) => rest = &behind[space.len_utf8()..],
            None => break,
        }
    }
    (dots > 2).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_those_of_nltk() {
        let text = "Dr. J. Bach paid $3.50 to Mr. Smith. \"Why?\" he asked. (It was 5 p.m. already.) \
                    Then... nothing! See e.g. No. 5.";
        assert_eq!(
            sentences(text),
            [
                "Dr. J. Bach paid $3.50 to Mr. Smith.",
                "\"Why?\"",
                "he asked.",
                "(It was 5 p.m.",
                "already.)",
                "Then... nothing!",
                "See e.g.",
                "No.",
                "5.",
            ]
        );
        assert!(sentences("").is_empty() && sentences(" \n ").is_empty());
    }

    #[test]
    fn tokens_keep_periods_and_lose_other_marks() {
        let found = tokens("U.S.A., don't--wait . . . (so-called) 1,000.5!");
        let expected = [
            "U.S.A.",
            ",",
            "don",
            "'t",
            "--",
            "wait",
            ". . .",
            "(",
            "so-called",
            ")",
            "1,000.5",
            "!",
        ];
        assert_eq!(found, expected);
    }
}
