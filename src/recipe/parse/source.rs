//! What an error may point at: the file's text and the overrides.

use std::ops::Range;

use super::overrides::Override;
use crate::error::Error;

/// The file's text followed, in positions only, by each override.
pub(super) struct Source<'a> {
    pub(super) text: &'a str,
    pub(super) file: &'a str,
    pub(super) overrides: Vec<Override<'a>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(text: &'a str, file: &'a str, overrides: &'a [String]) -> Self {
        // One position between neighbours keeps an empty range at an end unambiguous.
        let mut base = text.len() + 1;
        let place = |raw: &'a String| {
            let set = Override { raw, base };
            base += raw.len() + 1;
            set
        };
        Self { text, file, overrides: overrides.iter().map(place).collect() }
    }

    pub(super) fn override_at(&self, position: usize) -> Option<&Override<'a>> {
        self.overrides.iter().rev().find(|set| position >= set.base)
    }

    /// Where `span` lies: the override, or the line with carets under it. The document as a whole
    /// has an empty span at 0 and is named by its file alone.
    pub(super) fn place(&self, span: &Range<usize>) -> String {
        match self.override_at(span.start) {
            Some(set) => format!("--set {}", set.raw),
            None if *span == (0..0) => self.file.to_owned(),
            None => format!("{} {}", self.file, excerpt(self.text, span)),
        }
    }

    pub(super) fn broken_toml(&self, error: &toml::de::Error) -> Error {
        // An error at the very start must keep its excerpt, hence at least one position wide.
        let span = error.span().map_or(0..1, |span| span.start..span.end.max(span.start + 1));
        let (what, fix) = match error.message() {
            "duplicate key" => {
                let name = self.text.get(span.clone()).unwrap_or_default();
                (format!("the key `{name}` is set twice"), "keep one of them")
            }
            message => (
                format!("not valid TOML: {message}"),
                "put strings in double quotes, and check the brackets and `=` here and just before",
            ),
        };
        Error::usage(what).at(self.place(&span)).fix(fix)
    }
}

/// `line N:`, and below it that line with carets under the part of `span` that is on it.
fn excerpt(text: &str, span: &Range<usize>) -> String {
    let start = text.floor_char_boundary(span.start);
    let before = &text[..start];
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let number = 1 + before.matches('\n').count();
    // Tabs stay tabs, so that the carets stand right at any tab width.
    let column = before[line_start..].chars();
    let indent: String = column.map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    let marked = text[start..]
        .char_indices()
        .take_while(|(offset, c)| start + offset < span.end && !matches!(c, '\n' | '\r'));
    let carets = "^".repeat(marked.count().max(1));
    let gutter = " ".repeat(number.to_string().len());
    format!("line {number}:\n       {number} | {line}\n       {gutter} | {indent}{carets}")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{RECIPE, assert_error, read};

    #[test]
    fn broken_toml_points_at_the_place() {
        let quotes = "  try  put strings in double quotes, and check the brackets and `=` here and just before";
        assert_error(
            "[stage.distill]",
            "[stage.distill",
            &[
                "not valid TOML: unclosed table, expected `]`",
                "  at   r.toml line 19:",
                "       19 | [stage.distill",
                "          |               ^",
                quotes,
            ],
        );
        assert_error(
            "seed = 0",
            "= 0",
            &[
                "not valid TOML: unquoted keys cannot be empty, expected letters, numbers, `-`, `_`",
                "  at   r.toml line 1:",
                "       1 | = 0",
                "         | ^",
                quotes,
            ],
        );
        assert_error(
            "steps = 100",
            "steps = 100\r\nsteps = 2",
            &[
                "the key `steps` is set twice",
                "  at   r.toml line 17:",
                "       17 | steps = 2",
                "          | ^^^^^",
                "  try  keep one of them",
            ],
        );
    }

    #[test]
    fn errors_of_the_file_stay_errors_of_the_file_beside_overrides() {
        let error = read(&RECIPE.replacen("steps", "stpes", 1), &["seed=1"]).unwrap_err();
        assert!(error.to_string().contains("at   r.toml line 16:"), "{error}");
    }
}
