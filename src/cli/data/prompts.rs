//! Prompts for `fewbit data generate`.

use std::path::Path;

use serde_json::Value;

use crate::data::chat::Chat;
use crate::error::{Error, Result};

const SHAPES: &str =
    "objects with messages, conversations, instruction or prompt, or a prompt a line";

/// What a model is asked.
pub(super) enum Asked {
    /// A text.
    Text(String),
    /// A conversation, its last answer left out.
    Chat(Chat),
}

/// The prompts of a file, in order.
///
/// # Errors
/// When it cannot be read, or an entry is none; names the line or the entry.
pub(super) fn read(path: &Path) -> Result<Vec<Asked>> {
    let text = std::fs::read(path).map_err(|e| Error::io("read", path, &e))?;
    let refused = |what: String| Error::preflight(what).at(path.display()).fix(SHAPES);
    let text =
        String::from_utf8(text).map_err(|_| refused("the file is no UTF-8 text".to_owned()))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    if text.trim_start().starts_with('[')
        && let Ok(Value::Array(entries)) = serde_json::from_str(text)
    {
        let numbered = entries.iter().zip(1..);
        return numbered
            .map(|(entry, at)| asked(entry).map_err(|what| refused(what).at(format!("entry {at}"))))
            .collect();
    }
    let json = text.trim_start().starts_with('{');
    let lines = text.lines().zip(1..).filter(|(line, _)| !line.trim().is_empty());
    lines
        .map(|(line, at)| {
            if !json {
                return Ok(Asked::Text(line.to_owned()));
            }
            let parsed = serde_json::from_str::<Value>(line)
                .map_err(|e| format!("the line is no JSON: {e}"));
            parsed
                .and_then(|value| asked(&value))
                .map_err(|what| refused(what).at(format!("line {at}")))
        })
        .collect()
}

/// The prompt of an entry.
fn asked(entry: &Value) -> Result<Asked, String> {
    if let Value::String(text) = entry {
        return Ok(Asked::Text(text.clone()));
    }
    let Value::Object(object) = entry else {
        return Err("an entry is no object and no text".to_owned());
    };
    let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default();
    if let Some(list) = object.get("messages").or_else(|| object.get("conversations")) {
        let mut chat = Chat::of_messages(list)?;
        if chat.answers().next_back() == Some(chat.messages.len() - 1) {
            chat.messages.pop();
        }
        if chat.messages.is_empty() {
            return Err("the conversation has nothing but an answer".to_owned());
        }
        for (column, set) in [
            ("tools", Chat::set_tools as fn(&mut Chat, &Value) -> Result<(), String>),
            ("documents", Chat::set_documents),
        ] {
            object.get(column).map_or(Ok(()), |value| set(&mut chat, value))?;
        }
        return Ok(Asked::Chat(chat));
    }
    match (text("instruction"), text("input"), text("prompt")) {
        ("", _, "") => {
            let found: Vec<&str> = object.keys().map(String::as_str).collect();
            Err(format!("an entry has no prompt (found: {})", found.join(", ")))
        }
        ("", _, prompt) => Ok(Asked::Text(prompt.to_owned())),
        (instruction, "", _) => Ok(Asked::Text(instruction.to_owned())),
        (instruction, input, _) => Ok(Asked::Text(format!("{instruction}\n\n{input}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(content: &str) -> Result<Vec<String>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts");
        std::fs::write(&path, content).unwrap();
        let asked = read(&path).map_err(|error| error.to_string())?;
        Ok(asked
            .into_iter()
            .map(|asked| match asked {
                Asked::Text(text) => text,
                Asked::Chat(chat) => format!("{} messages", chat.messages.len()),
            })
            .collect())
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
        let lonely = r#"{"messages": [{"role": "assistant", "content": "y"}]}"#;
        assert!(texts(lonely).unwrap_err().contains("nothing but an answer"));
    }
}
