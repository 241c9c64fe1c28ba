//! Values and types in the words of a TOML file.

use toml::de::DeValue;

/// Characters of a wrong string shown in an error.
const SHOWN_CHARS: usize = 40;

/// A value in an error: its type, and the value where it is short.
pub(super) fn found_words(value: &DeValue<'_>) -> String {
    match value {
        DeValue::String(text) if text.chars().count() > SHOWN_CHARS => {
            format!("string {:?}…", text.chars().take(SHOWN_CHARS).collect::<String>())
        }
        DeValue::String(text) => format!("string {text:?}"),
        DeValue::Integer(number) => format!("integer {number}"),
        DeValue::Float(number) => format!("float {number}"),
        DeValue::Boolean(value) => format!("boolean {value}"),
        DeValue::Datetime(date) => format!("date {date}"),
        DeValue::Array(_) => "a list".to_owned(),
        DeValue::Table(_) => "a table".to_owned(),
    }
}

/// A Rust type's name in serde's message, in the words of a TOML file. Where the type fits but the
/// value does not, the range matters.
pub(super) fn expected_words(expected: &str, found: &DeValue<'_>, out_of_range: bool) -> String {
    let words = match expected {
        "u8" if out_of_range => "an integer from 0 to 255",
        "u32" if out_of_range => "an integer from 0 to 4294967295",
        "u64" | "usize" if out_of_range => "an integer of at least 0",
        // An integer where one is wanted: it passed the 64 bits that serde asks for first.
        "u8" | "u16" | "u32" | "u64" | "usize" | "i8" | "i16" | "i32" | "i64" | "isize" => {
            if found.is_integer() { "a 64-bit integer" } else { "an integer" }
        }
        "f32" | "f64" => "a number",
        "a boolean" => "true or false",
        "path string" => "a path",
        "a sequence" => "a list",
        "a map" => "a table",
        _ if expected.starts_with("struct ") => "a table",
        _ if expected.starts_with("a nonzero u") => "an integer of at least 1",
        _ => expected,
    };
    words.to_owned()
}
