//! The number that an answer gives, and whether it is the right one: the filters and the metric of
//! lm-evaluation-harness, task `gsm8k`, version 3.0.

use std::sync::LazyLock;

use regex::Regex;

/// What stands for a number that was not found.
pub const INVALID: &str = "[invalid]";

/// A pattern that is known to be right.
#[allow(clippy::expect_used)] // constants, compiled by a test
fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a constant pattern")
}

/// The number behind the first `#### `, as the examples write it (filter `strict-match`).
pub fn strict(answer: &str) -> &str {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| compile(r"#### (-?[0-9.,]+)"));
    let found = NUMBER.captures(answer).and_then(|found| found.get(1));
    found.map_or(INVALID, |number| number.as_str())
}

/// The last number anywhere (filter `flexible-extract`).
pub fn flexible(answer: &str) -> &str {
    static NUMBER: LazyLock<Regex> = LazyLock::new(|| compile(r"-?[$0-9.,]{2,}|-?[0-9]+"));
    NUMBER.find_iter(answer).last().map_or(INVALID, |number| number.as_str())
}

/// Whether a number that was found is the one that a row's answer ends with.
pub fn is_right(found: &str, target: &str) -> bool {
    bare(found) == bare(target)
}

/// What is compared: no commas and dollars, nothing up to the last `#### `, no period at the end, in lower
/// case.
fn bare(text: &str) -> String {
    let text = text.replace([',', '$'], "");
    let text = text.rsplit("#### ").next().unwrap_or_default();
    let (text, end) = text.strip_suffix('\n').map_or((text, ""), |text| (text, "\n"));
    let lower = format!("{}{end}", text.strip_suffix('.').unwrap_or(text)).to_lowercase();
    // What lies behind the text in an array is zeros, too.
    lower.trim_end_matches('\0').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_behind_the_mark_or_at_the_end() {
        let answer = "5 * 3 = 15.\n#### 1,015.\n#### 7 so it costs $20.00!";
        assert_eq!((strict(answer), flexible(answer)), ("1,015.", "$20.00"));
        assert_eq!((strict("####7"), flexible("none")), (INVALID, INVALID));
        // Two marks in a row are a number there, as is one digit.
        assert_eq!((flexible("7 and so on..."), flexible("a 7.")), ("...", "7."));
    }

    #[test]
    fn marks_around_a_number_do_not_count() {
        let target = "She pays $5.\n#### 1,015";
        assert!(is_right("1,015.", target) && is_right("$1015", target));
        assert!(!is_right("1015.0", target) && !is_right(INVALID, target));
        assert!(is_right("5", "5.\n#### 5."));
    }
}
