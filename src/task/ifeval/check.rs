//! Whether an answer follows an instruction.

use std::sync::LazyLock;

use regex::Regex;

use super::instruction::{Instruction, Word};
use super::python::{self, SPACE, count, strip};
use super::{json, language, punkt, words};

/// The sentences of a constrained answer.
const OPTIONS: [&str; 3] = ["My answer is yes.", "My answer is no.", "My answer is maybe."];

/// Compiled once, and by a test.
macro_rules! pattern {
    ($pattern:expr) => {{
        static PATTERN: LazyLock<Regex> = LazyLock::new(|| python::compile(&$pattern));
        &*PATTERN
    }};
}

/// Whether an answer, as it stands, follows an instruction. One that is nothing but space follows none.
pub(super) fn follows(instruction: &Instruction, answer: &str) -> bool {
    if strip(answer).is_empty() {
        return false;
    }
    match instruction {
        Instruction::Keywords(all) => all.iter().all(|Word(word)| word.is_in(answer)),
        Instruction::KeywordFrequency(Word(word), count) => count.holds(word.count(answer)),
        Instruction::Forbidden(none) => !none.iter().any(|Word(word)| word.is_in(answer)),
        Instruction::LetterFrequency(letter, count) => {
            let lower = answer.to_lowercase();
            count.holds(lower.chars().filter(|c| c == letter).count() as u64)
        }
        Instruction::Language(code) => language::is_in(answer, code),
        Instruction::Sentences(count) => count.holds(punkt::sentences(answer).len() as u64),
        Instruction::Paragraphs(wanted) => paragraphs(answer) == Some(*wanted),
        Instruction::Words(wanted) => wanted.holds(count(pattern!(r"\w+"), answer) as u64),
        Instruction::FirstWord { paragraphs, nth, word } => {
            first_word(answer, *paragraphs, *nth).is_some_and(|found| found == *word)
        }
        Instruction::Placeholders(least) => count(pattern!(r"\[.*?\]"), answer) as u64 >= *least,
        Instruction::Postscript(Word(marker)) => marker.is_in(&answer.to_lowercase()),
        Instruction::Bullets(wanted) => bullets(answer) == *wanted,
        Instruction::Constrained => OPTIONS.iter().any(|option| answer.contains(option)),
        Instruction::Highlights(least) => highlights(answer) >= *least,
        Instruction::Sections(Word(heading), least) => heading.count(answer) >= *least,
        Instruction::Json => json::is_json(strip(unfenced(strip(answer)))),
        Instruction::Title => has_title(answer),
        Instruction::TwoResponses => has_two_responses(answer),
        Instruction::Repeat(prompt) => strip(answer).to_lowercase().starts_with(prompt),
        Instruction::End(phrase) => {
            strip(answer).trim_matches('"').to_lowercase().ends_with(phrase)
        }
        Instruction::Quotation => {
            let answer = strip(answer);
            answer.len() > 1 && answer.starts_with('"') && answer.ends_with('"')
        }
        Instruction::CapitalWords(count) => {
            let capitals = words::tokens(answer).into_iter().filter(|word| python::is_upper(word));
            count.holds(capitals.count() as u64)
        }
        Instruction::Capitals => python::is_upper(answer) && language::is_in(answer, "en"),
        Instruction::SmallLetters => python::is_lower(answer) && language::is_in(answer, "en"),
        Instruction::NoComma => !answer.contains(','),
    }
}

/// How many paragraphs `***` separates; none where one between two others is empty.
fn paragraphs(answer: &str) -> Option<u64> {
    let parts: Vec<&str> = pattern!(format!(r"[{SPACE}]?\*\*\*[{SPACE}]?")).split(answer).collect();
    let empty = |part: &str| strip(part).is_empty();
    let outer = |index: usize| index == 0 || index == parts.len() - 1;
    let mut count = 0;
    for (index, part) in parts.iter().enumerate() {
        match (empty(part), outer(index)) {
            (false, _) => count += 1,
            (true, true) => {}
            (true, false) => return None,
        }
    }
    Some(count)
}

/// The first word of the `nth` of so many paragraphs, in lower case and up to its first mark.
fn first_word(answer: &str, wanted: u64, nth: u64) -> Option<String> {
    let parts: Vec<&str> = answer.split("\n\n").map(strip).collect();
    let count = parts.iter().filter(|part| !part.is_empty()).count() as u64;
    if count != wanted || nth == 0 || nth > count {
        return None;
    }
    // Empty ones count here.
    let word = python::split(parts[nth as usize - 1]).next()?;
    let word = word.trim_start_matches('\'').trim_start_matches('"');
    let end = word.find(['.', ',', '?', '!', '\'', '"']).unwrap_or(word.len());
    Some(word[..end].chars().flat_map(char::to_lowercase).collect())
}

/// Lines that begin with one star, or with a dash.
fn bullets(answer: &str) -> u64 {
    let stars = pattern!(format!(r"(?m)^[{SPACE}]*\*[^*].*$"));
    let dashes = pattern!(format!(r"(?m)^[{SPACE}]*-.*$"));
    (count(stars, answer) + count(dashes, answer)) as u64
}

/// Texts between stars, and once more those between two stars on each side.
fn highlights(answer: &str) -> u64 {
    let single = pattern!(r"\*[^\n*]*\*").find_iter(answer);
    let single = single.filter(|found| !strip(found.as_str().trim_matches('*')).is_empty());
    let double = pattern!(r"\*\*[^\n*]*\*\*").find_iter(answer);
    let double = double.filter(|found| {
        let found = found.as_str();
        !strip(&found[2..found.len() - 2]).is_empty()
    });
    (single.count() + double.count()) as u64
}

/// A text without the fence of a code block; each of its forms is taken away once, in this order.
fn unfenced(mut text: &str) -> &str {
    for fence in ["```json", "```Json", "```JSON", "```"] {
        text = text.strip_prefix(fence).unwrap_or(text);
    }
    text.strip_suffix("```").unwrap_or(text)
}

fn has_title(answer: &str) -> bool {
    let inner = |title: &str| -> bool {
        !strip(title.trim_start_matches('<').trim_end_matches('>')).is_empty()
    };
    pattern!(r"<<[^\n]+>>").find_iter(answer).any(|title| inner(title.as_str()))
}

/// Two answers that differ, with six stars between them; stars before and behind do no harm.
fn has_two_responses(answer: &str) -> bool {
    let parts: Vec<&str> = answer.split("******").map(strip).collect();
    let inner_empty = parts.len() > 2 && parts[1..parts.len() - 1].contains(&"");
    let parts: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    !inner_empty && matches!(parts[..], [one, other] if one != other)
}
