//! Text as Python takes it apart: spaces, words, cases. Rust's notions differ in a few characters.

use std::borrow::Cow;
use std::sync::LazyLock;

use regex::Regex;

/// What `\s` of Python's `re` matches, to be put into a class of characters.
pub(super) const SPACE: &str = r"\s\x1c-\x1f";

/// `str.isspace` of a single character.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}

/// `str.strip` without an argument.
pub(super) fn strip(text: &str) -> &str {
    text.trim_matches(is_space)
}

/// `str.split` without an argument.
pub(super) fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// Whether there is a cased character and all of them are capitals (`str.isupper`).
pub(super) fn is_upper(text: &str) -> bool {
    let other = |c: char| c.is_lowercase() || is_title(c);
    text.chars().any(char::is_uppercase) && !text.chars().any(other)
}

/// Whether there is a cased character and none of them is a capital (`str.islower`).
pub(super) fn is_lower(text: &str) -> bool {
    let other = |c: char| c.is_uppercase() || is_title(c);
    text.chars().any(char::is_lowercase) && !text.chars().any(other)
}

/// Letters that are a capital and a small letter in one, such as `ǅ` (category Lt).
fn is_title(character: char) -> bool {
    let c = u32::from(character);
    matches!(c, 0x1c5 | 0x1c8 | 0x1cb | 0x1f2 | 0x1fbc | 0x1fcc | 0x1ffc)
        || matches!(c, 0x1f88..=0x1f8f | 0x1f98..=0x1f9f | 0x1fa8..=0x1faf)
}

/// Whether `\b` of Python's `re` matches at a byte of a text. Marks and joiners are no part of a word
/// there, numbers of any kind are.
pub(super) fn is_boundary(text: &str, at: usize) -> bool {
    static WORD: LazyLock<Regex> = LazyLock::new(|| compile(r"^[\p{L}\p{N}_]$"));
    let is_word = |c: char| WORD.is_match(c.encode_utf8(&mut [0; 4]));
    let before = text[..at].chars().next_back().is_some_and(is_word);
    let behind = text[at..].chars().next().is_some_and(is_word);
    before != behind
}

/// A text in which `\b` of our expressions matches where Python's would: other characters stand for those
/// on which the two differ.
pub(super) fn with_words(text: &str) -> Cow<'_, str> {
    static NO_WORD: LazyLock<Regex> = LazyLock::new(|| compile(r"[\w--[\p{L}\p{N}_]]"));
    static WORD: LazyLock<Regex> = LazyLock::new(|| compile(r"\p{No}"));
    match NO_WORD.replace_all(text, "\u{fffc}") {
        Cow::Borrowed(text) => WORD.replace_all(text, "ª"),
        Cow::Owned(text) => Cow::Owned(WORD.replace_all(&text, "ª").into_owned()),
    }
}

/// A pattern that is known to be right.
#[allow(clippy::expect_used)] // patterns are constants here, and each is compiled by a test
pub(super) fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern")
}

/// How often a pattern matches without overlaps.
pub(super) fn count(pattern: &Regex, text: &str) -> usize {
    pattern.find_iter(text).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn separators_are_spaces_and_marks_are_no_word() {
        assert_eq!(strip("\u{1f}\u{3000} a b\x1c\n"), "a b");
        assert_eq!(split(" a\u{1d}b\u{a0}").collect::<Vec<_>>(), ["a", "b"]);
        let boundaries = |text: &str| -> Vec<usize> {
            (0..=text.len())
                .filter(|at| text.is_char_boundary(*at) && is_boundary(text, *at))
                .collect()
        };
        assert_eq!(boundaries("a\u{301} x²_"), [0, 1, 4, 8]);
    }

    #[test]
    fn a_titlecase_letter_is_neither_upper_nor_lower() {
        assert!(is_upper("U.S. 42") && !is_upper("42") && !is_upper("Aǅ") && !is_upper("Ab"));
        assert!(is_lower("ab ª") && !is_lower("") && !is_lower("aǅ"));
    }
}
