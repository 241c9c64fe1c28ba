//! Prompts with their completions from a data file, and the one text an instruction becomes.
//!
//! Two shapes of object are read, from JSONL or from a JSON list: `prompt` and `completion`, or the
//! Alpaca form `instruction`, `input` (may be absent, null or empty) and `output`. Other keys are
//! ignored.
//!
//! An instruction becomes this prompt, its output the completion right behind it:
//!
//! ```text
//! INSTRUCTION
//!
//! INPUT
//!
//! Answer:
//! ```
//!
//! The paragraph of the input is left out where there is none, and a line feed ends the prompt.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::documents::{bare, decode_utf8, kind_of, refused};
use crate::error::{Error, Result};

/// What the documents of a data set are.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Plain text, every token of which counts.
    #[default]
    Text,
    /// Objects with `prompt` and `completion`; only the completion counts.
    Completion,
    /// Objects with `instruction`, `input` and `output`; only the output counts.
    Instruction,
}

impl DataFormat {
    /// Every format.
    pub const ALL: [Self; 3] = [Self::Text, Self::Completion, Self::Instruction];

    /// Its name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Completion => "completion",
            Self::Instruction => "instruction",
        }
    }

    /// Whether documents are examples that are packed whole into windows.
    pub fn is_packed(self) -> bool {
        self != Self::Text
    }
}

/// A prompt and what is to follow it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Example {
    /// What is given.
    pub prompt: String,
    /// What is to be learned, right behind the prompt with nothing between.
    pub completion: String,
}

/// Reads the examples of `path`, objects with `prompt` and `completion`, in file order.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, holds no example, or has an entry of another shape;
/// the error names the file and the line, or the entry of a list.
pub fn read_completions(path: &Path) -> Result<Vec<Example>> {
    read(path, &Shape { of: completion, keys: "{\"prompt\": \"…\", \"completion\": \"…\"}" })
}

/// Reads the examples of `path`, objects with `instruction`, `input` and `output`, in file order.
///
/// # Errors
/// As [`read_completions`].
pub fn read_instructions(path: &Path) -> Result<Vec<Example>> {
    read(path, &Shape { of: instruction, keys: "{\"instruction\": \"…\", \"output\": \"…\"}" })
}

struct Shape {
    /// The example of an object, or what is wrong with it.
    of: fn(&Fields<'_>) -> Result<Example, String>,
    /// The object as a remedy shows it.
    keys: &'static str,
}

impl Shape {
    fn fix(&self) -> String {
        format!("give {} on each line, or a JSON list of such objects", self.keys)
    }

    fn example(&self, value: &Value, unit: &'static str) -> Result<Example, String> {
        match value {
            Value::Object(object) => (self.of)(&Fields { object, unit }),
            other => Err(format!("the {unit} is {}, expected an object", kind_of(other))),
        }
    }
}

fn read(path: &Path, shape: &Shape) -> Result<Vec<Example>> {
    let bytes = std::fs::read(path).map_err(|source| Error::io("read", path, &source))?;
    let text = decode_utf8(bytes, path)?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    let examples = match text.trim_start().chars().next() {
        None => return Err(refused("the file is empty", path).fix(shape.fix())),
        Some('[') => list(text, path, shape)?,
        Some(_) => lines(text, path, shape)?,
    };
    if examples.is_empty() {
        return Err(refused("the file holds no examples", path).fix(shape.fix()));
    }
    Ok(examples)
}

fn list(text: &str, path: &Path, shape: &Shape) -> Result<Vec<Example>> {
    let entries: Vec<Value> = serde_json::from_str(text).map_err(|error| {
        refused(format!("the file is not valid JSON: {}", bare(&error)), path)
            .at(format!("line {}", error.line()))
            .fix(shape.fix())
    })?;
    let examples = entries.iter().enumerate().map(|(index, entry)| {
        shape
            .example(entry, "entry")
            .map_err(|what| refused(what, path).at(format!("entry {}", index + 1)).fix(shape.fix()))
    });
    examples.collect()
}

fn lines(text: &str, path: &Path, shape: &Shape) -> Result<Vec<Example>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let examples = lines.map(|(index, line)| {
        serde_json::from_str(line)
            .map_err(|error| format!("the line is not valid JSON: {}", bare(&error)))
            .and_then(|value| shape.example(&value, "line"))
            .map_err(|what| refused(what, path).at(format!("line {}", index + 1)).fix(shape.fix()))
    });
    examples.collect()
}

/// One object of a file.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// What holds the object: `line` or `entry`.
    unit: &'static str,
}

impl Fields<'_> {
    fn required(&self, key: &str) -> Result<&str, String> {
        if let Some(value) = self.object.get(key) {
            return string(key, value);
        }
        let keys: Vec<_> = self.object.keys().map(String::as_str).collect();
        let found = if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") };
        Err(format!("the {} has no `{key}` key (found: {found})", self.unit))
    }

    /// Empty where the key is absent or null.
    fn optional(&self, key: &str) -> Result<&str, String> {
        match self.object.get(key) {
            None | Some(Value::Null) => Ok(""),
            Some(value) => string(key, value),
        }
    }
}

fn string<'v>(key: &str, value: &'v Value) -> Result<&'v str, String> {
    value.as_str().ok_or_else(|| format!("`{key}` is {}, expected a string", kind_of(value)))
}

fn completion(fields: &Fields<'_>) -> Result<Example, String> {
    Ok(Example {
        prompt: fields.required("prompt")?.to_owned(),
        completion: fields.required("completion")?.to_owned(),
    })
}

fn instruction(fields: &Fields<'_>) -> Result<Example, String> {
    let instruction = fields.required("instruction")?;
    let prompt = match fields.optional("input")? {
        "" => format!("{instruction}\n\nAnswer:\n"),
        input => format!("{instruction}\n\n{input}\n\nAnswer:\n"),
    };
    Ok(Example { prompt, completion: fields.required("output")?.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_file<T>(
        content: impl AsRef<[u8]>,
        read: impl Fn(&Path) -> Result<T>,
    ) -> Result<T, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, content).unwrap();
        read(&path).map_err(|error| {
            assert_eq!(error.kind().exit_code(), 3);
            error.to_string().replace(&format!("{}/", folder.path().display()), "")
        })
    }

    fn pairs(content: impl AsRef<[u8]>) -> Vec<(String, String)> {
        let examples = with_file(content, read_completions).unwrap();
        examples.into_iter().map(|example| (example.prompt, example.completion)).collect()
    }

    fn refusal(content: impl AsRef<[u8]>) -> String {
        let message = with_file(content, read_completions).unwrap_err();
        message.lines().take(2).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn completions_come_from_lines_or_a_list() {
        let one = "{\"prompt\": \"a\\n\", \"completion\": \" b\", \"id\": 7}";
        let two = "{\"completion\": \"\", \"prompt\": \"c\"}";
        let expected = [("a\n".to_owned(), " b".to_owned()), ("c".to_owned(), String::new())];
        assert_eq!(pairs(format!("{one}\r\n\n{two}\n")), expected);
        assert_eq!(pairs(format!("\u{feff}[{one},\n {two}]")), expected);
    }

    #[test]
    fn instructions_become_the_documented_prompt() {
        let text = r#"[{"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hi", "id": 1},
            {"instruction": "Greet.", "input": null, "output": "Hi"},
            {"instruction": "Greet.", "output": "Hi"}]"#;
        let examples = with_file(text, read_instructions).unwrap();
        let add = Example { prompt: "Add.\n\n1 2\n\nAnswer:\n".into(), completion: "3".into() };
        let greet = Example { prompt: "Greet.\n\nAnswer:\n".into(), completion: "Hi".into() };
        assert_eq!(examples, [add, greet.clone(), greet.clone(), greet]);
    }

    #[test]
    fn a_wrong_entry_is_named() {
        let good = "{\"prompt\": \"x\", \"completion\": \"y\"}";
        assert_eq!(
            with_file(format!("{good}\n\n{{\"prompt\": \"x\", \"id\": 1}}"), read_completions)
                .unwrap_err(),
            "the line has no `completion` key (found: prompt, id)\n  at   a.jsonl, line 3\n  \
             try  give {\"prompt\": \"…\", \"completion\": \"…\"} on each line, or a JSON list of \
             such objects"
        );
        assert_eq!(
            refusal(format!("[{good}, {{\"prompt\": 5, \"completion\": \"y\"}}]")),
            "`prompt` is a number, expected a string\n  at   a.jsonl, entry 2"
        );
        assert_eq!(
            refusal(format!("[{good}, \"x\"]")),
            "the entry is a string, expected an object\n  at   a.jsonl, entry 2"
        );
        assert_eq!(
            refusal(format!("{good}\n{good}x")),
            "the line is not valid JSON: trailing characters\n  at   a.jsonl, line 2"
        );
        assert_eq!(
            refusal(format!("[{good},\n{good}")),
            "the file is not valid JSON: EOF while parsing a list\n  at   a.jsonl, line 2"
        );
        let error = with_file("{\"instruction\": \"x\", \"input\": 1}", read_instructions);
        assert!(error.unwrap_err().starts_with("`input` is a number, expected a string\n"));
        let error = with_file("{\"instruction\": \"x\"}", read_instructions).unwrap_err();
        assert!(error.starts_with("the line has no `output` key (found: instruction)\n"));
    }

    #[test]
    fn a_file_without_examples_is_refused() {
        assert_eq!(refusal(" \n"), "the file is empty\n  at   a.jsonl");
        assert_eq!(refusal("[]"), "the file holds no examples\n  at   a.jsonl");
        assert_eq!(refusal(b"\xff"), "the file is not valid UTF-8\n  at   a.jsonl, line 1");
        assert!(read_completions(Path::new("no/such/file")).is_err());
    }

    #[test]
    fn formats_go_by_one_name() {
        for format in DataFormat::ALL {
            let written = serde_json::to_string(&format).unwrap();
            assert_eq!(written, format!("\"{}\"", format.name()));
        }
        assert!(!DataFormat::default().is_packed());
    }
}
