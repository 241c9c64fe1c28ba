//! Words and patterns that a row of the data brings, searched as Python's `re` does without regard to case.

use regex::Regex;

use super::python;

/// Characters by which a word becomes a pattern.
const META: &[char] = &['\\', '.', '^', '$', '*', '+', '?', '{', '}', '[', ']', '|', '(', ')'];

/// A word or a pattern of Python's `re`.
#[derive(Clone, Debug)]
pub(super) struct Pattern {
    regex: Regex,
    edges: Edges,
}

/// Whether a match has to begin and end at a word's edge, and who looks.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Edges {
    Any,
    /// The expression itself, in a text where its notion of a word is Python's.
    InExpression,
    /// We do: the word has one length.
    Checked,
}

impl Pattern {
    /// `text` in any case.
    ///
    /// # Errors
    /// Words on what of it cannot be read.
    pub(super) fn ignoring_case(text: &str) -> Result<Self, String> {
        Self::new(text, &format!("(?i){}", folded(text)), Edges::Any)
    }

    /// `text` in any case, as a word.
    ///
    /// # Errors
    /// As [`Pattern::ignoring_case`].
    pub(super) fn word(text: &str) -> Result<Self, String> {
        if text.contains(META) {
            return Self::new(text, &format!(r"(?i)\b{text}\b"), Edges::InExpression);
        }
        Self::new(text, &format!("(?i){}", folded(text)), Edges::Checked)
    }

    /// `text` as it stands, between two patterns of ours.
    ///
    /// # Errors
    /// As [`Pattern::ignoring_case`].
    pub(super) fn between(before: &str, text: &str, behind: &str) -> Result<Self, String> {
        Self::new(text, &format!("{before}{text}{behind}"), Edges::Any)
    }

    fn new(text: &str, pattern: &str, edges: Edges) -> Result<Self, String> {
        let regex = Regex::new(pattern).map_err(|error| {
            // The crate's message draws the pattern over several lines; its last one says what is wrong.
            let reason = error.to_string();
            let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
            format!("{text:?} is not a pattern that can be searched for: {reason}")
        })?;
        Ok(Self { regex, edges })
    }

    /// Whether it is in a text.
    pub(super) fn is_in(&self, text: &str) -> bool {
        match self.edges {
            Edges::Any => return self.regex.is_match(text),
            Edges::InExpression => return self.regex.is_match(&python::with_words(text)),
            Edges::Checked => {}
        }
        let mut from = 0;
        while let Some(found) = self.regex.find_at(text, from) {
            if python::is_boundary(text, found.start()) && python::is_boundary(text, found.end()) {
                return true;
            }
            // The next one may overlap this one.
            let Some(first) = found.as_str().chars().next() else { break };
            from = found.start() + first.len_utf8();
        }
        false
    }

    /// How often it is in a text, without overlaps.
    pub(super) fn count(&self, text: &str) -> u64 {
        python::count(&self.regex, text) as u64
    }
}

/// A word as a pattern for itself in either case; a pattern as it is. Python takes all four letters i
/// for one.
fn folded(text: &str) -> String {
    if text.contains(META) {
        return text.to_owned();
    }
    let one = |character: char| match character {
        'i' | 'I' | 'ı' | 'İ' => "[iıİ]".to_owned(),
        other => regex::escape(other.encode_utf8(&mut [0; 4])),
    };
    text.chars().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_in_any_case_and_patterns_are_patterns() {
        let kiwi = Pattern::ignoring_case("Kiwi").unwrap();
        assert!(kiwi.is_in("a \u{212a}IW\u{130}!") && kiwi.count("kiwikiwi") == 2);
        let pattern = Pattern::ignoring_case("e.g").unwrap();
        assert!(pattern.is_in("EXG") && !pattern.is_in("eg"));
        let refused = Pattern::ignoring_case("(?=a)").unwrap_err();
        assert!(refused.contains("look-around"), "{refused}");
    }

    #[test]
    fn words_have_edges() {
        let kiwi = Pattern::word("kiwi").unwrap();
        assert!(kiwi.is_in("xkiwi KIWI") && !kiwi.is_in("kiwis") && kiwi.is_in("kiwi\u{301}"));
        // Overlapping candidates are all tried.
        assert!(Pattern::word("a-a").unwrap().is_in("xa-a-a"));
        let pattern = Pattern::word("k..i").unwrap();
        assert!(pattern.is_in("k\u{93f}wi\u{301}") && !pattern.is_in("kiwi½"));
        assert!(
            Pattern::word("k.wi").unwrap().is_in("a kawi")
                && !Pattern::word("k.wi").unwrap().is_in("kiwis")
        );
    }
}
