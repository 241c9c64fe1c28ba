//! Conversations as data sets hold them, in the form that templates know.

use serde_json::{Map, Value};

use crate::data::documents::kind_of;

/// Names of a turn's reasoning; the first is the one that templates read.
const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Who speaks in a message.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Role {
    /// The model.
    Assistant,
    /// Anybody else: system, user, tool.
    Other,
}

/// A conversation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chat {
    /// Objects with `role` and mostly `content`, without keys that are null.
    pub messages: Vec<Value>,
    /// Descriptions of tools, each an object.
    pub tools: Option<Vec<Value>>,
    /// Documents to answer from, each an object.
    pub documents: Option<Vec<Value>>,
}

impl Chat {
    /// A conversation of one pair: what is asked and what is answered.
    pub fn of_pair(user: &str, assistant: &str) -> Self {
        let message = |role: &str, content: &str| {
            let pairs = [("role", role), ("content", content)];
            Value::Object(pairs.map(|(k, v)| (k.to_owned(), Value::from(v))).into_iter().collect())
        };
        let messages = vec![message("user", user), message("assistant", assistant)];
        Self { messages, ..Self::default() }
    }

    /// From a list of messages, with `role` and `content` or in ShareGPT's words.
    ///
    /// # Errors
    /// What is wrong with it, a sentence.
    pub fn of_messages(list: &Value) -> Result<Self, String> {
        let Value::Array(list) = list else {
            return Err(format!("the messages are {}, expected a list", kind_of(list)));
        };
        if list.is_empty() {
            return Err("the list of messages is empty".to_owned());
        }
        let message = |(index, message): (usize, &Value)| {
            normal(message).map_err(|what| format!("message {}: {what}", index + 1))
        };
        let messages: Result<_, String> = list.iter().enumerate().map(message).collect();
        Ok(Self { messages: messages?, ..Self::default() })
    }

    /// Adds the tools of a column: a list of objects, or JSON text of one. Null and an empty list are none.
    ///
    /// # Errors
    /// What is wrong with it, a sentence.
    pub fn set_tools(&mut self, tools: &Value) -> Result<(), String> {
        self.tools = objects("tools", tools)?;
        Ok(())
    }

    /// Adds the documents of a column.
    ///
    /// # Errors
    /// As [`set_tools`](Self::set_tools).
    pub fn set_documents(&mut self, documents: &Value) -> Result<(), String> {
        self.documents = objects("documents", documents)?;
        Ok(())
    }

    /// Who speaks in message `index`.
    pub fn role(&self, index: usize) -> Role {
        match self.messages.get(index).and_then(|message| message.get("role")?.as_str()) {
            Some("assistant" | "model") => Role::Assistant,
            _ => Role::Other,
        }
    }

    /// The messages of the model.
    pub fn answers(&self) -> impl DoubleEndedIterator<Item = usize> + '_ {
        (0..self.messages.len()).filter(|index| self.role(*index) == Role::Assistant)
    }

    /// How much there is to render, in bytes, roughly.
    pub(in crate::data) fn bytes(&self) -> usize {
        let lists = [self.tools.as_deref(), self.documents.as_deref()];
        let more = lists.into_iter().flatten().flatten();
        self.messages.iter().chain(more).map(size).sum()
    }
}

fn size(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 8,
        Value::Array(list) => list.iter().map(size).sum::<usize>() + 8,
        Value::Object(map) => {
            map.iter().map(|(key, value)| key.len() + size(value)).sum::<usize>() + 8
        }
        _ => 8,
    }
}

fn objects(name: &str, value: &Value) -> Result<Option<Vec<Value>>, String> {
    let parsed;
    let value = match value {
        Value::String(text) if text.trim().is_empty() => &Value::Null,
        Value::String(text) => {
            let what = |error| format!("`{name}` is a string that is not JSON: {error}");
            parsed = serde_json::from_str(text).map_err(what)?;
            &parsed
        }
        other => other,
    };
    match value {
        Value::Null => Ok(None),
        Value::Array(list) if list.is_empty() => Ok(None),
        Value::Array(list) => match list.iter().find(|entry| !entry.is_object()) {
            Some(odd) => Err(format!("`{name}` holds {}, expected objects", kind_of(odd))),
            None => Ok(Some(list.clone())),
        },
        other => Err(format!("`{name}` is {}, expected a list of objects", kind_of(other))),
    }
}

/// A message with `role` and `content`, its nulls left out, its reasoning under the names that templates read.
fn normal(message: &Value) -> Result<Value, String> {
    let Value::Object(message) = message else {
        return Err(format!(
            "it is {}, expected an object with role and content",
            kind_of(message)
        ));
    };
    let kept = message.iter().filter(|(_, value)| !value.is_null());
    let mut kept: Map<String, Value> = kept.map(|(k, v)| (k.clone(), v.clone())).collect();
    if !kept.contains_key("role") && kept.contains_key("from") {
        share_gpt(&mut kept)?;
    }
    match kept.get("role") {
        Some(Value::String(role)) if !role.is_empty() => {}
        Some(other) => return Err(format!("`role` is {}, expected a name", kind_of(other))),
        None => {
            let keys: Vec<&str> = kept.keys().map(String::as_str).collect();
            return Err(format!("it has no `role` (found: {})", keys.join(", ")));
        }
    }
    match kept.get("content") {
        None | Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            if let Some(text) = joined(parts)? {
                kept.insert("content".to_owned(), Value::String(text));
            }
        }
        Some(other) => {
            return Err(format!(
                "`content` is {}, expected a string or a list of parts",
                kind_of(other)
            ));
        }
    }
    if let Some(reasoning) = REASONING.iter().find_map(|key| kept.get(*key)).cloned() {
        kept.entry("thinking").or_insert_with(|| reasoning.clone());
        kept.insert(REASONING[0].to_owned(), reasoning);
    }
    Ok(Value::Object(kept))
}

/// The text of parts that are all text.
fn joined(parts: &[Value]) -> Result<Option<String>, String> {
    let mut text = String::new();
    for part in parts {
        match (part.get("type").and_then(Value::as_str), part.get("text"), part) {
            (_, _, Value::String(part)) | (Some("text") | None, Some(Value::String(part)), _) => {
                text.push_str(part);
            }
            (Some(kind), ..) if kind != "text" => {
                return Err(format!(
                    "a part of `content` is of type `{kind}`, and only text is read"
                ));
            }
            _ => return Err("a part of `content` has no text".to_owned()),
        }
    }
    Ok(Some(text))
}

/// `from` and `value` as `role` and `content`.
fn share_gpt(message: &mut Map<String, Value>) -> Result<(), String> {
    let from = message.remove("from").unwrap_or_default();
    let Some(from) = from.as_str() else {
        return Err(format!("`from` is {}, expected a name", kind_of(&from)));
    };
    let role = match from.to_ascii_lowercase().as_str() {
        "system" => "system",
        "human" | "user" | "prompter" => "user",
        "gpt" | "chatgpt" | "bing" | "bard" | "assistant" | "model" => "assistant",
        "tool" | "observation" | "function_response" | "function" | "ipython" => "tool",
        _ => {
            let known = "system, human, gpt and tool are known";
            return Err(format!("`from` is `{from}`, and only {known}"));
        }
    };
    let value = message.remove("value");
    message.insert("role".to_owned(), Value::from(role));
    if let Some(value) = value {
        message.entry("content").or_insert(value);
    }
    Ok(())
}
