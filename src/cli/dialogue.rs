//! A conversation with a model in the words of its chat template.

use clap::Args;
use serde_json::{Map, Value, json};

use super::Session;
use crate::data::chat::{Chat, ChatTemplate};
use crate::error::{Error, Result};

/// Flags of commands that talk to a model.
#[derive(Args, Clone, Debug)]
pub(super) struct TemplateArgs {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,
    /// A further name for the chat template, such as enable_thinking=false; repeatable
    #[arg(long, value_name = "NAME=VALUE", value_parser = pair)]
    template_arg: Vec<(String, Value)>,
}

/// `NAME=VALUE`; a value that is no JSON is a text.
fn pair(text: &str) -> Result<(String, Value), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| "NAME=VALUE".to_owned())?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
    if name.is_empty() { Err("NAME=VALUE".to_owned()) } else { Ok((name.to_owned(), value)) }
}

impl TemplateArgs {
    /// Whether any of them is given.
    pub(super) fn are_given(&self) -> bool {
        self.system.is_some() || !self.template_arg.is_empty()
    }

    /// The further names, and what they are.
    pub(super) fn arguments(&self) -> Map<String, Value> {
        self.template_arg.iter().cloned().collect()
    }

    /// The model's template with these names; `None` where the model has none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn template(&self, session: &Session) -> Result<Option<ChatTemplate>> {
        let Some(template) = session.opened.chat_template()? else { return Ok(None) };
        template.with_kwargs(self.arguments()).map(Some).map_err(|e| e.at("--template-arg"))
    }

    /// As [`TemplateArgs::template`], for who cannot do without.
    ///
    /// # Errors
    /// Also where the model has none.
    pub(super) fn need(&self, session: &Session) -> Result<ChatTemplate> {
        self.template(session)?.ok_or_else(|| {
            Error::preflight("the model has no chat template")
                .at(session.opened.dir.display())
                .fix("a model that was trained to chat, or its text without --chat and --system")
        })
    }
}

/// What was said so far.
pub(super) struct Dialogue {
    template: ChatTemplate,
    system: Option<String>,
    turns: Vec<Value>,
}

impl Dialogue {
    /// Nothing was said.
    pub(super) fn new(template: ChatTemplate, system: Option<String>) -> Self {
        Self { template, system, turns: Vec::new() }
    }

    /// Another beginning; what was said is forgotten.
    pub(super) fn begin(&mut self, system: Option<String>) {
        self.system = system;
        self.turns.clear();
    }

    /// What the model is told before the conversation.
    pub(super) fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// The user says something.
    pub(super) fn ask(&mut self, text: &str) {
        self.turns.push(json!({ "role": "user", "content": text }));
    }

    /// The model answered.
    pub(super) fn answered(&mut self, text: &str) {
        self.turns.push(json!({ "role": "assistant", "content": text }));
    }

    /// Takes back what the user said last.
    pub(super) fn take_back(&mut self) {
        self.turns.pop();
    }

    /// Forgets the first exchange; `false` when there is none but the last.
    pub(super) fn forget_first(&mut self) -> bool {
        let several = self.turns.len() > 2;
        if several {
            self.turns.drain(..2);
        }
        several
    }

    /// All of it as the model reads it, up to the opening of its answer.
    ///
    /// # Errors
    /// What the template raises.
    pub(super) fn text(&self) -> Result<String> {
        let system = self.system.iter().map(|text| json!({ "role": "system", "content": text }));
        let messages = system.chain(self.turns.iter().cloned()).collect();
        self.template.render(&Chat { messages, ..Chat::default() }, true)
    }
}
