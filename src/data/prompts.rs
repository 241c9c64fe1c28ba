//! Prompts for a model to answer.

use std::path::Path;

use serde_json::Value;

use super::chat::Chat;
use super::documents::{decode_utf8, kind_of, refused};
use super::examples::{Fields, asked, conversation};
use super::rows::{self, Kind, Row};
use crate::error::{Error, Result};

const SHAPES: &str =
    "objects with messages, conversations, instruction or prompt, or a prompt a line";

/// What a model is asked.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    /// A text.
    Text(String),
    /// A conversation, its last answer left out.
    Chat(Chat),
}

/// The prompts of a file, in order: of the records of every format that has any, answers left out; of plain
/// text the lines that are not blank.
///
/// # Errors
/// When it cannot be read, or a record has no prompt; names the line or the entry.
pub fn read_prompts(path: &Path) -> Result<Vec<Asked>> {
    let mut all = Vec::new();
    match rows::kind(path)? {
        Kind::Text => {
            let bytes = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
            let text = decode_utf8(bytes, path)?;
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            let lines = text.lines().filter(|line| !line.trim().is_empty());
            all.extend(lines.map(|line| Asked::Text(line.to_owned())));
        }
        _ => rows::each(path, SHAPES, &mut |row| {
            let prompt = of_row(&row);
            all.push(prompt.map_err(|what| refused(what, path).at(row.place()).fix(SHAPES))?);
            Ok(())
        })?,
    }
    Ok(all)
}

fn of_row(row: &Row) -> Result<Asked, String> {
    let object = match &row.value {
        Value::String(text) => return Ok(Asked::Text(text.clone())),
        Value::Object(object) => object,
        other => return Err(format!("the {} is {}", row.unit, kind_of(other))),
    };
    let fields = Fields { object, unit: row.unit };
    let has = |key: &str| object.get(key).is_some_and(|value| !value.is_null());
    if ["messages", "conversations", "conversation"].into_iter().any(has) {
        let mut chat = conversation(&fields)?;
        if chat.answers().next_back() == Some(chat.messages.len() - 1) {
            chat.messages.pop();
        }
        if chat.messages.is_empty() {
            return Err("the conversation has nothing but an answer".to_owned());
        }
        return Ok(Asked::Chat(chat));
    }
    if has("instruction") {
        return asked(&fields).map(Asked::Text);
    }
    fields.required("prompt").map(|prompt| Asked::Text(prompt.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(content: &str) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts");
        std::fs::write(&path, content).unwrap();
        let asked = read_prompts(&path).map_err(|error| {
            assert_eq!(error.kind().exit_code(), 3);
            error.to_string()
        })?;
        let told = |asked| match asked {
            Asked::Text(text) => text,
            Asked::Chat(chat) => format!("{} messages", chat.messages.len()),
        };
        Ok(asked.into_iter().map(told).collect())
    }

    #[test]
    fn prompts_come_in_every_shape() {
        assert_eq!(texts("a\n\nb c\n").unwrap(), ["a", "b c"]);
        assert_eq!(texts("[\"a\", {\"prompt\": \"b\"}]").unwrap(), ["a", "b"]);
        let lines = r#"{"instruction": "Add.", "input": "1 2", "output": "3"}
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
            {"conversations": [{"from": "human", "value": "x"}]}"#;
        assert_eq!(texts(lines).unwrap(), ["Add.\n\n1 2", "1 messages", "1 messages"]);
    }

    #[test]
    fn an_entry_without_a_prompt_is_named() {
        let error = texts("{\"prompt\": \"a\"}\n{\"answer\": \"b\"}").unwrap_err();
        assert!(error.contains("found: answer") && error.contains("line 2"), "{error}");
        assert!(texts("{\"prompt\": \"a\"}\n{").unwrap_err().contains("line 2"));
        assert!(texts("[7]").unwrap_err().contains("entry 1"));
        assert!(texts("").unwrap_err().contains("the file is empty"));
        assert!(texts("\u{1f}\u{8b}").is_ok(), "prose may begin like that");
        let lonely = r#"{"messages": [{"role": "assistant", "content": "y"}]}"#;
        assert!(texts(lonely).unwrap_err().contains("nothing but an answer"));
    }
}
