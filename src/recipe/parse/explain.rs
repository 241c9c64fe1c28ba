//! serde's sentence about a value in the product's words, with what to try.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::names::{known_names, nearest, unknown};
use super::overrides::Override;
use super::place::{Found, last_key, locate};
use super::source::Source;
use super::words::{expected_words, found_words};
use crate::error::Error;

/// What to try where nothing better is known.
const EXPLAINED: &str = "`fewbit recipes show upq_int2` explains each key";
/// What happened and what to try.
pub(super) type Advice = (String, String);

/// Puts serde's sentence into the product's words.
pub(super) fn explain(
    error: &toml::de::Error,
    root: &Spanned<DeValue<'_>>,
    source: &Source<'_>,
) -> Error {
    let mut span = error.span().unwrap_or(0..0);
    let root_found = Found { path: Vec::new(), value: root.get_ref(), is_key: false };
    let found = locate(root, &span, &mut Vec::new()).unwrap_or(root_found);
    let message = error.message();
    let name = found.name();
    let (what, fix) = if message.starts_with("unknown field ") {
        unknown("key", found.written(), &known_names(message))
    } else if message.starts_with("unexpected keys in table: ") {
        let known = message.rsplit_once(", available keys: ").map_or("", |(_, known)| known);
        let known: Vec<_> = known.split(", ").filter(|name| !name.is_empty()).collect();
        unknown("key", found.written(), &known)
    } else if message.starts_with("unknown variant ") {
        let owner = if found.is_key { last_key(&found.path[..found.path.len() - 1]) } else { name };
        let (what, fix) = unknown("choice", found.written(), &known_names(message));
        (format!("{what} for `{owner}`"), fix)
    } else if let Some(field) = message.strip_prefix("missing field ") {
        missing(field.trim_matches('`'), &found)
    } else if message.starts_with("wanted exactly 1 element") {
        let (blamed, advice) = not_one_choice(&found, source);
        span = blamed.unwrap_or(span);
        advice
    } else if message.starts_with("invalid type: unit variant, ") {
        bare_choice(&found, source.override_at(span.start))
    } else if message == "expected empty table" {
        (format!("`{name}` takes no settings"), format!("`{name} = {{}}`"))
    } else {
        wrong_value(message, &found, source, &span)
    };
    Error::usage(what).at(source.place(&span)).fix(fix)
}

fn missing(key: &str, found: &Found<'_, '_>) -> Advice {
    if found.path.is_empty() {
        return (format!("missing key `{key}`"), format!("add `{key}` to the file"));
    }
    let what = format!("missing key `{key}` in `{}`", found.name());
    (what, format!("add it to this table, or --set {}.{key}=…", found.path.join(".")))
}

/// The position to blame, where it is not the table's own, and the advice.
fn not_one_choice(found: &Found<'_, '_>, source: &Source<'_>) -> (Option<Range<usize>>, Advice) {
    let name = found.name();
    let keys: Vec<_> = found.value.as_table().into_iter().flat_map(DeTable::keys).collect();
    let choices: Vec<_> = keys.iter().map(|key| key.get_ref().as_ref()).collect();
    // The override that added a choice is to blame, though the table itself is in the file.
    let added = keys.iter().find(|key| source.override_at(key.span().start).is_some());
    // A slip of the pen, rather than another choice.
    let meant = added.and_then(|key| {
        let others: Vec<&str> =
            choices.iter().copied().filter(|choice| choice != key.get_ref()).collect();
        nearest(key.get_ref(), &others)
    });
    let fix = match (added, name.rsplit_once('.')) {
        _ if keys.is_empty() => "name the choice as a key of this table".to_owned(),
        // Both may be choices: lora and qlora.
        (Some(key), _) if let Some(meant) = meant => format!(
            "`{meant}`, which is there; instead of it: --set '{}={{ {key} = {{ … }} }}'",
            found.path.join(".")
        ),
        (Some(key), _) => {
            format!(
                "replace the whole table: --set '{}={{ {key} = {{ … }} }}'",
                found.path.join(".")
            )
        }
        (None, Some((list, _))) => format!("give each its own `[[{list}]]` entry"),
        (None, None) => "keep one of them".to_owned(),
    };
    let (count, list) = (choices.len(), choices.join(", "));
    let what = match count {
        0 => format!("`{name}` is empty, expected exactly one choice"),
        _ => format!("`{name}` has {count} choices ({list}), expected exactly one"),
    };
    (added.map(|key| key.span()), (what, fix))
}

/// `method = "lrq"` where the choice holds a table.
fn bare_choice(found: &Found<'_, '_>, set: Option<&Override<'_>>) -> Advice {
    let choice = found.value.as_str().unwrap_or_default();
    let fix = match set {
        Some(_) => format!("--set '{}={{ {choice} = {{}} }}'", found.path.join(".")),
        None => format!("`{}.{choice} = {{}}`", found.name()),
    };
    (format!("`{choice}` has settings, so it is written as a table"), fix)
}

fn wrong_value(
    message: &str,
    found: &Found<'_, '_>,
    source: &Source<'_>,
    span: &Range<usize>,
) -> Advice {
    let header = source.text.get(span.clone()).filter(|text| text.starts_with("[["));
    if let Some(header) = header.filter(|_| message.starts_with("invalid ")) {
        let name = header.trim_matches(['[', ']', ' ']);
        return (format!("`{name}` is one table, not a list"), format!("write [{name}]"));
    }
    let name = found.name();
    let named = |sentence: String| {
        // A type's own sentence may open with the key.
        let again = sentence.strip_prefix(&name).is_some_and(|rest| rest.starts_with(' '));
        if again || name.is_empty() { sentence } else { format!("`{name}`: {sentence}") }
    };
    let expected = match message.strip_prefix("invalid ") {
        _ if message == "wanted string or table" => Some("a name or a table".to_owned()),
        // From the right: the part before may quote any text of the user's.
        Some(invalid) if !invalid.starts_with("length") => {
            invalid.rsplit_once(", expected ").map(|(_, expected)| {
                expected_words(expected, found.value, invalid.starts_with("value"))
            })
        }
        _ => None,
    };
    let Some(expected) = expected else { return (named(message.to_owned()), remedy(message)) };
    let quotes = ["a string", "a path"].contains(&&*expected);
    let fix = match (source.override_at(span.start), found.value) {
        (_, DeValue::Array(_) | DeValue::Table(_)) => format!("write {expected}"),
        (Some(set), _) if quotes => {
            let (key, value) = set.raw.split_once('=').unwrap_or((set.raw, ""));
            format!("--set '{key}=\"{}\"'", value.trim())
        }
        (None, _) if quotes => "put the value in double quotes".to_owned(),
        (None, DeValue::String(_)) => format!("write {expected}, without quotes"),
        _ => format!("write {expected}"),
    };
    let sentence = format!("expected {expected}, found {}", found_words(found.value));
    (named(sentence), fix)
}

/// What to try after a type's own sentence, read from the sentence where it tells.
fn remedy(message: &str) -> String {
    let range = message.rsplit_once(" is not in ").and_then(|(_, range)| range.split_once("..="));
    match range {
        Some((low, high)) => format!("write a number from {low} to {high}"),
        None if message.ends_with(" is not a rate") => "write a number of at least 0".to_owned(),
        None => EXPLAINED.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::assert_error;
    use super::*;

    #[test]
    fn missing_keys_name_the_line_of_their_table() {
        assert_error(
            "steps = 100\n",
            "",
            &[
                "missing key `steps` in `reconstruct`",
                "  at   r.toml line 14:",
                "       14 | [stage.reconstruct]",
                "          | ^^^^^^^^^^^^^^^^^^^",
                "  try  add it to this table, or --set stage.0.reconstruct.steps=…",
            ],
        );
        assert_error(
            "flexround = {}",
            "lrq = {}",
            &[
                "missing key `rank` in `lrq`",
                "  at   r.toml line 15:",
                "       15 | method.lrq = {}",
                "          |              ^^",
                "  try  add it to this table, or --set stage.0.reconstruct.method.lrq.rank=…",
            ],
        );
        assert_error(
            "seed = 0",
            "",
            &["missing key `seed`", "  at   r.toml", "  try  add `seed` to the file"],
        );
    }

    #[test]
    fn wrong_types_say_expected_and_found() {
        let line_16 = |value: &str, what: &str, fix: &str| {
            let line = format!("       16 | steps = {value}");
            let carets = format!("          |         {}", "^".repeat(value.len()));
            let what = format!("`steps`: {what}");
            let fix = format!("  try  {fix}");
            let expected = [&what, "  at   r.toml line 16:", &line, &carets, &fix];
            assert_error("100", value, &expected);
        };
        let fix = "write an integer";
        line_16(
            "\"a, expected b\"",
            "expected an integer, found string \"a, expected b\"",
            "write an integer, without quotes",
        );
        line_16("1.5", "expected an integer, found float 1.5", fix);
        line_16("true", "expected an integer, found boolean true", fix);
        line_16("[1]", "expected an integer, found a list", fix);
        line_16("{ a = 1 }", "expected an integer, found a table", fix);
        line_16("2024-01-01", "expected an integer, found date 2024-01-01", fix);
        line_16(
            "-1",
            "expected an integer of at least 0, found integer -1",
            "write an integer of at least 0",
        );
        line_16(
            "99999999999999999999",
            "expected a 64-bit integer, found integer 99999999999999999999",
            "write a 64-bit integer",
        );
    }

    #[test]
    fn wrong_values_of_other_types() {
        assert_error(
            "32",
            "0",
            &[
                "`group_size`: expected an integer of at least 1, found integer 0",
                "  at   r.toml line 11:",
                "       11 | group_size = 0",
                "          |              ^",
                "  try  write an integer of at least 1",
            ],
        );
        assert_error(
            "= 4",
            "= 300",
            &[
                "`bits`: expected an integer from 0 to 255, found integer 300",
                "  at   r.toml line 8:",
                "       8 | bits = 300",
                "         |        ^^^",
                "  try  write an integer from 0 to 255",
            ],
        );
        assert_error(
            "\"toy\"",
            "5",
            &[
                "`path`: expected a string, found integer 5",
                "  at   r.toml line 5:",
                "       5 | path = 5",
                "         |        ^",
                "  try  put the value in double quotes",
            ],
        );
        assert_error(
            "steps = 100",
            "steps = 100\nbetas = [1, \"x\"]",
            &[
                "`betas.1`: expected a number, found string \"x\"",
                "  at   r.toml line 17:",
                "       17 | betas = [1, \"x\"]",
                "          |             ^^^",
                "  try  write a number, without quotes",
            ],
        );
        assert_error(
            "[quant]",
            "[[quant]]",
            &[
                "`quant` is one table, not a list",
                "  at   r.toml line 7:",
                "       7 | [[quant]]",
                "         | ^^^^^^^^^",
                "  try  write [quant]",
            ],
        );
    }

    #[test]
    fn a_types_own_sentence_gets_a_place_and_advice() {
        let at_11 = |value: &str, what: &str, fix: &str| {
            let line = format!("       11 | width = {value}");
            let carets = format!("          |         {}", "^".repeat(value.len()));
            let fix = format!("  try  {fix}");
            let expected = [what, "  at   r.toml line 11:", &line, &carets, &fix];
            assert_error("group_size = 32", &format!("width = {value}"), &expected);
        };
        at_11("9", "width = 9 is not in 1..=8", "write a number from 1 to 8");
        at_11("0", "width = 0 holds nothing", EXPLAINED);
        at_11("-1", "`width`: a width below 0", EXPLAINED);
        assert_eq!(remedy("learning_rate = -1 is not a rate"), "write a number of at least 0");
    }

    #[test]
    fn a_choice_is_exactly_one_table() {
        assert_error(
            "[[stage]]\n[stage.distill]",
            "[stage.distill]",
            &[
                "`stage.0` has 2 choices (reconstruct, distill), expected exactly one",
                "  at   r.toml line 13:",
                "       13 | [[stage]]",
                "          | ^^^^^^^^^",
                "  try  give each its own `[[stage]]` entry",
            ],
        );
        let at_15 = |method: &str, what: &str, carets: &str, fix: &str| {
            let line = format!("       15 | {method}");
            let carets = format!("          | {carets}");
            let fix = format!("  try  {fix}");
            let expected = [what, "  at   r.toml line 15:", &line, &carets, &fix];
            assert_error("method.flexround = {}", method, &expected);
        };
        at_15(
            "method = { lrq = {}, seq = {} }",
            "`method` has 2 choices (lrq, seq), expected exactly one",
            "         ^^^^^^^^^^^^^^^^^^^^^^",
            "keep one of them",
        );
        at_15(
            "method = {}",
            "`method` is empty, expected exactly one choice",
            "         ^^",
            "name the choice as a key of this table",
        );
        at_15(
            "method = \"lrq\"",
            "`lrq` has settings, so it is written as a table",
            "         ^^^^^",
            "`method.lrq = {}`",
        );
        at_15("method.seq.x = 1", "`seq` takes no settings", "       ^^^", "`seq = {}`");
        at_15(
            "method = 5",
            "`method`: expected a name or a table, found integer 5",
            "         ^",
            "write a name or a table",
        );
    }
}
