//! A name that nobody knows, and the known ones.

use super::explain::Advice;

/// Known names listed in one error before the list is cut.
const LISTED_NAMES: usize = 24;
/// Jaro-Winkler similarity from which a known name counts as what was meant.
const SIMILAR: f64 = 0.88;

/// The names serde lists; from the right, because the wrong name before them is the user's text.
pub(super) fn known_names(message: &str) -> Vec<&str> {
    let list = message.rsplit_once(", expected ").map_or("", |(_, list)| list);
    list.split('`').skip(1).step_by(2).collect()
}

pub(super) fn unknown(kind: &str, name: &str, known: &[&str]) -> Advice {
    let mut sorted = known.to_vec();
    sorted.sort_unstable();
    let more = if sorted.len() > LISTED_NAMES { ", …" } else { "" };
    let list = sorted.iter().take(LISTED_NAMES).copied().collect::<Vec<_>>().join(", ") + more;
    let fix = match nearest(name, &sorted) {
        Some(near) => format!("`{near}` (known here: {list})"),
        None if sorted.is_empty() => "remove it, there is nothing to set here".to_owned(),
        None => format!("one of: {list}"),
    };
    (format!("unknown {kind} `{name}`"), fix)
}

/// The known name that was probably meant: few edits away, or alike from its beginning.
pub(in crate::recipe) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let name = name.to_lowercase().replace('-', "_");
    let edits = |known: &str| strsim::damerau_levenshtein(&name, &known.to_lowercase());
    let near = known.iter().copied().min_by_key(|known| edits(known))?;
    if edits(near) <= (name.chars().count() / 3).max(1) {
        return Some(near);
    }
    let scored = known.iter().map(|known| (strsim::jaro_winkler(&name, known), *known));
    let (score, alike) = scored.max_by(|left, right| left.0.total_cmp(&right.0))?;
    (score >= SIMILAR).then_some(alike)
}

#[cfg(test)]
mod tests {
    use super::super::sample::{RECIPE, assert_error, read};
    use super::*;

    #[test]
    fn unknown_keys_show_line_caret_and_nearest() {
        assert_error(
            "steps",
            "stpes",
            &[
                "unknown key `stpes`",
                "  at   r.toml line 16:",
                "       16 | stpes = 100",
                "          | ^^^^^",
                "  try  `steps` (known here: betas, learning_rate, method, steps)",
            ],
        );
        assert_error(
            "[model]",
            "[model]\n\tcolour = 1 # ä",
            &[
                "unknown key `colour`",
                "  at   r.toml line 5:",
                "       5 | \tcolour = 1 # ä",
                "         | \t^^^^^^",
                "  try  one of: compute, packed, path",
            ],
        );
        assert_error(
            "[model]",
            "[modle]",
            &[
                "unknown key `modle`",
                "  at   r.toml line 4:",
                "       4 | [modle]",
                "         |  ^^^^^",
                "  try  `model` (known here: model, output, quant, seed, stage)",
            ],
        );
        assert_error(
            "{}",
            "{ clop = true }",
            &[
                "unknown key `clop`",
                "  at   r.toml line 15:",
                "       15 | method.flexround = { clop = true }",
                "          |                      ^^^^",
                "  try  `clip` (known here: clip)",
            ],
        );
        assert_error(
            "flexround = {}",
            "lrq = { \"r`k\" = 1 }",
            &[
                "unknown key `r`k`",
                "  at   r.toml line 15:",
                "       15 | method.lrq = { \"r`k\" = 1 }",
                "          |                ^^^^^",
                "  try  one of: rank",
            ],
        );
    }

    #[test]
    fn unknown_choices_name_what_they_are_for() {
        assert_error(
            "flexround",
            "flexrond",
            &[
                "unknown choice `flexrond` for `method`",
                "  at   r.toml line 15:",
                "       15 | method.flexrond = {}",
                "          |        ^^^^^^^^",
                "  try  `flexround` (known here: flexround, lrq, seq)",
            ],
        );
        assert_error(
            "stage.distill",
            "stage.distil",
            &[
                "unknown choice `distil` for `stage.1`",
                "  at   r.toml line 19:",
                "       19 | [stage.distil]",
                "          |        ^^^^^^",
                "  try  `distill` (known here: distill, reconstruct, tune_scales)",
            ],
        );
        assert_error(
            "\"toy\"",
            "\"toy\"\ncompute = \"bf61\"",
            &[
                "unknown choice `bf61` for `compute`",
                "  at   r.toml line 6:",
                "       6 | compute = \"bf61\"",
                "         |           ^^^^^^",
                "  try  `bf16` (known here: bf16, f32)",
            ],
        );
    }

    #[test]
    fn long_lists_and_long_values_are_cut() {
        let known: Vec<String> = (10..40).map(|i| format!("key_{i}")).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let fix = unknown("key", "zzz", &known).1;
        assert!(fix.ends_with("key_32, key_33, …"), "{fix}");
        let error = read(RECIPE, &[&format!("seed={}", "x".repeat(500))]).unwrap_err();
        assert!(error.what().len() < 100, "{error}");
    }

    #[test]
    fn nearest_accepts_slips_and_refuses_guesses() {
        let known = ["learning_rate", "steps", "batch", "bits"];
        assert_eq!(nearest("learning-rate", &known), Some("learning_rate"));
        assert_eq!(nearest("learn_rate", &known), Some("learning_rate"));
        assert_eq!(nearest("Batch", &known), Some("batch"));
        assert_eq!(nearest("momentum", &known), None);
        assert_eq!(nearest("x", &[]), None);
    }
}
