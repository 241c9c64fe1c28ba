//! What the records of a data file are: the formats, and how a record of each is read.
//!
//! An instruction that does not go through a chat template becomes this prompt, its output the completion
//! right behind it:
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

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::chat::Chat;
use super::documents::kind_of;
use super::rows::{self, Kind, Row};
use crate::error::{Error, Result};

/// What the documents of a data set are.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum DataFormat {
    /// Plain text, every token of which counts.
    #[default]
    Text,
    /// Conversations; what the model says in them counts.
    Messages,
    /// Objects with `instruction`, `input` and `output`; only the output counts.
    Instruction,
    /// Objects with `prompt` and `completion`; only the completion counts.
    Completion,
    /// Token ids, with labels where some do not count.
    Tokens,
    /// The one that the first record shows.
    Auto,
}

/// A format's names of keys, by which it is told: any of these sets, all of its names there.
type Marks = &'static [&'static [&'static str]];

impl DataFormat {
    /// Every format.
    pub const ALL: [Self; 6] =
        [Self::Text, Self::Messages, Self::Instruction, Self::Completion, Self::Tokens, Self::Auto];

    /// Its name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Messages => "messages",
            Self::Instruction => "instruction",
            Self::Completion => "completion",
            Self::Tokens => "tokens",
            Self::Auto => "auto",
        }
    }

    /// Whether documents are examples that are packed whole into windows.
    pub fn is_packed(self) -> bool {
        self != Self::Text
    }

    fn marks(self) -> Marks {
        match self {
            Self::Text => &[&["text"]],
            Self::Messages => &[&["messages"], &["conversations"], &["conversation"]],
            Self::Instruction => &[&["instruction", "output"]],
            Self::Completion => &[&["prompt", "completion"]],
            Self::Tokens => &[&["input_ids"]],
            Self::Auto => &[],
        }
    }

    /// A record as a remedy shows it.
    fn shape(self) -> &'static str {
        match self {
            Self::Text | Self::Auto => "{\"text\": \"…\"}",
            Self::Messages => "{\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, …]}",
            Self::Instruction => "{\"instruction\": \"…\", \"output\": \"…\"}",
            Self::Completion => "{\"prompt\": \"…\", \"completion\": \"…\"}",
            Self::Tokens => "{\"input_ids\": [1, …], \"labels\": [-100, …]}",
        }
    }

    /// What to give, where records are not of this format.
    pub(super) fn fix(self) -> String {
        format!("give {} on each line, or a JSON list of such objects", self.shape())
    }

    /// The formats whose keys an object has.
    fn fitting(object: &Map<String, Value>) -> Vec<Self> {
        let has =
            |keys: &&[&str]| keys.iter().all(|key| object.get(*key).is_some_and(|v| !v.is_null()));
        Self::ALL.into_iter().filter(|format| format.marks().iter().any(&has)).collect()
    }

    /// The format of a file: this one, or where it is [`DataFormat::Auto`] the one of the first record.
    ///
    /// # Errors
    /// When the file cannot be read, or its first record fits none or several.
    pub fn of(self, path: &Path) -> Result<Self> {
        if self != Self::Auto {
            return Ok(self);
        }
        let named = super::documents::is_named_json(path);
        match rows::kind(path)? {
            Kind::Text if !named => return Ok(Self::Text),
            Kind::Object if !named && !rows::opens_with_an_object(path)? => return Ok(Self::Text),
            Kind::List if !named && !rows::is_json(path)? => return Ok(Self::Text),
            _ => {}
        }
        let (mut found, mut seen) = (None, false);
        let shapes =
            "format = \"text\", \"messages\", \"instruction\", \"completion\" or \"tokens\"";
        let first = rows::each(path, shapes, &mut |row| {
            seen = true;
            found = Some(Self::of_row(&row).map_err(|what| {
                let error = Error::preflight(what).at(path.display()).at(row.place());
                error.fix(shapes)
            })?);
            Err(Error::failed("enough"))
        });
        match (found, first) {
            (Some(format), _) => Ok(format),
            (None, Err(error)) => Err(error),
            (None, Ok(())) if !seen => {
                Err(Error::preflight("the file holds no records").at(path.display()).fix(shapes))
            }
            (None, Ok(())) => Ok(Self::Text),
        }
    }

    fn of_row(row: &Row) -> Result<Self, String> {
        let object = match &row.value {
            Value::String(_) => return Ok(Self::Text),
            Value::Object(object) => object,
            other => {
                return Err(format!("the {} is {}, which no format is", row.unit, kind_of(other)));
            }
        };
        match Self::fitting(object)[..] {
            [one] => Ok(one),
            [] => Err(format!("no format has keys such as these: {}", listed(object))),
            [one, other, ..] => Err(format!(
                "the {} fits format \"{}\" and \"{}\"",
                row.unit,
                one.name(),
                other.name()
            )),
        }
    }
}

/// The keys of an object, for a message.
fn listed(object: &Map<String, Value>) -> String {
    let keys: Vec<_> = object.keys().map(String::as_str).take(12).collect();
    if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") }
}

/// A prompt and what is to follow it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Example {
    /// What is given.
    pub prompt: String,
    /// What is to be learned, right behind the prompt with nothing between.
    pub completion: String,
}

/// What a record stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Document {
    /// A text.
    Text(String),
    /// A prompt and its completion.
    Example(Example),
    /// A conversation.
    Chat(Chat),
    /// Tokens, and which of them count.
    Tokens(Vec<u32>, Vec<bool>),
}

/// Reads the records of `path` as `format`, in file order. `chat`: examples become conversations of two
/// messages.
///
/// # Errors
/// If the file cannot be read, holds no record, or has one of another shape: the error names the file and
/// the line, and the format that fits where there is one. And what `take` refuses, with the record's place.
pub(super) fn each(
    path: &Path,
    format: DataFormat,
    chat: bool,
    take: &mut dyn FnMut(Document, &str) -> Result<()>,
) -> Result<()> {
    let fix = format.fix();
    let mut any = false;
    rows::each(path, &fix, &mut |row| {
        any = true;
        let document = of_row(&row, format, chat).map_err(|what| {
            let fix = other_format(&row, format).unwrap_or_else(|| fix.clone());
            Error::preflight(what).at(path.display()).at(row.place()).fix(fix)
        })?;
        let place = row.place();
        take(document, &place).map_err(|error| error.at(path.display()).at(place))
    })?;
    if any {
        return Ok(());
    }
    Err(Error::preflight("the file holds no examples").at(path.display()).fix(fix))
}

/// What to say where a record is of another format.
pub(super) fn other_format(row: &Row, format: DataFormat) -> Option<String> {
    let object = row.value.as_object()?;
    let fitting = DataFormat::fitting(object);
    let other = fitting.iter().find(|other| **other != format)?;
    let alone = !fitting.contains(&format);
    alone.then(|| format!("format = \"{}\": the {} has its keys", other.name(), row.unit))
}

fn of_row(row: &Row, format: DataFormat, chat: bool) -> Result<Document, String> {
    let Value::Object(object) = &row.value else {
        return Err(format!("the {} is {}, expected an object", row.unit, kind_of(&row.value)));
    };
    let fields = Fields { object, unit: row.unit };
    Ok(match format {
        DataFormat::Text | DataFormat::Auto => Document::Text(fields.required("text")?.to_owned()),
        DataFormat::Messages => Document::Chat(conversation(&fields)?),
        DataFormat::Tokens => tokens(&fields)?,
        DataFormat::Completion if chat => {
            let [prompt, completion] = [fields.required("prompt")?, fields.required("completion")?];
            Document::Chat(Chat::of_pair(prompt, completion))
        }
        DataFormat::Instruction if chat => {
            Document::Chat(Chat::of_pair(&asked(&fields)?, fields.required("output")?))
        }
        DataFormat::Completion => Document::Example(completion(&fields)?),
        DataFormat::Instruction => Document::Example(instruction(&fields)?),
    })
}

/// Reads the examples of `path`, objects with `prompt` and `completion`, in file order.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, holds no example, or has an entry of another shape;
/// the error names the file and the line, or the entry of a list.
pub fn read_completions(path: &Path) -> Result<Vec<Example>> {
    read(path, DataFormat::Completion)
}

/// Reads the examples of `path`, objects with `instruction`, `input` and `output`, in file order.
///
/// # Errors
/// As [`read_completions`].
pub fn read_instructions(path: &Path) -> Result<Vec<Example>> {
    read(path, DataFormat::Instruction)
}

fn read(path: &Path, format: DataFormat) -> Result<Vec<Example>> {
    let mut all = Vec::new();
    each(path, format, false, &mut |document, _| {
        if let Document::Example(example) = document {
            all.push(example);
        }
        Ok(())
    })?;
    Ok(all)
}

/// Reads the conversations of `path`, in file order.
///
/// # Errors
/// As [`read_completions`].
pub fn read_conversations(path: &Path) -> Result<Vec<Chat>> {
    let mut all = Vec::new();
    each(path, DataFormat::Messages, true, &mut |document, _| {
        if let Document::Chat(chat) = document {
            all.push(chat);
        }
        Ok(())
    })?;
    Ok(all)
}

/// One object of a file.
pub(super) struct Fields<'a> {
    pub(super) object: &'a Map<String, Value>,
    /// What holds the object: `line` or `entry`.
    pub(super) unit: &'static str,
}

impl Fields<'_> {
    fn value(&self, key: &str) -> Result<&Value, String> {
        let found = listed(self.object);
        self.object
            .get(key)
            .ok_or_else(|| format!("the {} has no `{key}` key (found: {found})", self.unit))
    }

    pub(super) fn required(&self, key: &str) -> Result<&str, String> {
        string(key, self.value(key)?)
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
    let prompt = format!("{}\n\nAnswer:\n", asked(fields)?);
    Ok(Example { prompt, completion: fields.required("output")?.to_owned() })
}

/// An instruction, its input behind it where there is one.
pub(super) fn asked(fields: &Fields<'_>) -> Result<String, String> {
    let instruction = fields.required("instruction")?;
    Ok(match fields.optional("input")? {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n\n{input}"),
    })
}

/// A conversation under any of its names, with the tools and documents beside it.
pub(super) fn conversation(fields: &Fields<'_>) -> Result<Chat, String> {
    let names = ["messages", "conversations", "conversation"];
    let there = names.iter().find(|name| fields.object.get(**name).is_some_and(|v| !v.is_null()));
    let mut chat = Chat::of_messages(fields.value(there.unwrap_or(&names[0]))?)?;
    if let Some(tools) = fields.object.get("tools") {
        chat.set_tools(tools)?;
    }
    if let Some(documents) = fields.object.get("documents") {
        chat.set_documents(documents)?;
    }
    // ShareGPT keeps the system's words beside the conversation.
    if let Some(Value::String(system)) = fields.object.get("system")
        && !system.is_empty()
        && chat.messages.first().and_then(|first| first.get("role")?.as_str()) != Some("system")
    {
        chat.messages.insert(0, serde_json::json!({"role": "system", "content": system}));
    }
    Ok(chat)
}

/// The label of a token that does not count.
const IGNORED: i64 = -100;

/// Token ids with `labels`, or a `loss_mask` or `completion_mask` of 0 and 1; all count where there is none.
/// An `attention_mask` takes padding away.
fn tokens(fields: &Fields<'_>) -> Result<Document, String> {
    let ids = integers("input_ids", fields.value("input_ids")?)?;
    let beside = |key: &str| -> Result<Option<Vec<i64>>, String> {
        let Some(value) = fields.object.get(key).filter(|value| !value.is_null()) else {
            return Ok(None);
        };
        let list = integers(key, value)?;
        if list.len() == ids.len() {
            return Ok(Some(list));
        }
        Err(format!("`{key}` has {} entries, and `input_ids` {}", list.len(), ids.len()))
    };
    let mut counts = vec![true; ids.len()];
    if let Some(labels) = beside("labels")? {
        for (at, label) in labels.iter().enumerate() {
            if *label != IGNORED && *label != ids[at] {
                return Err(format!(
                    "label {} is {label} and token {}: a label is {IGNORED} or the token of its own place",
                    at + 1,
                    ids[at]
                ));
            }
            counts[at] = *label != IGNORED;
        }
    }
    for key in ["loss_mask", "completion_mask"] {
        for (at, flag) in beside(key)?.into_iter().flatten().enumerate() {
            counts[at] &= flag != 0;
        }
    }
    let attended = beside("attention_mask")?;
    let kept = |at: &usize| attended.as_ref().is_none_or(|mask| mask[*at] != 0);
    let kept: Vec<usize> = (0..ids.len()).filter(kept).collect();
    let id = |at: usize| {
        u32::try_from(ids[at])
            .map_err(|_| format!("`input_ids` holds {}, which is no token", ids[at]))
    };
    let ids: Result<_, String> = kept.iter().map(|at| id(*at)).collect();
    Ok(Document::Tokens(ids?, kept.iter().map(|at| counts[*at]).collect()))
}

fn integers(key: &str, value: &Value) -> Result<Vec<i64>, String> {
    let Value::Array(list) = value else {
        return Err(format!("`{key}` is {}, expected a list of numbers", kind_of(value)));
    };
    let number = |value: &Value| value.as_i64().or_else(|| Some(i64::from(value.as_bool()?)));
    let numbers = list.iter().map(|value| {
        number(value)
            .ok_or_else(|| format!("`{key}` holds {}, expected whole numbers", kind_of(value)))
    });
    numbers.collect()
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
