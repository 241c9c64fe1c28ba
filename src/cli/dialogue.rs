//! A conversation with a model in the words of its chat template.

use clap::Args;
use serde_json::{Map, Value, json};

use super::Session;
use crate::data::chat::{Chat, ChatTemplate};
use crate::error::{Error, Result};

/// Flags of commands that talk to a model.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct TemplateArgs {
    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    pub(super) system: Option<String>,
    /// Values for names in the chat template, as JSON: {"enable_thinking": false}
    #[arg(long, value_name = "JSON", value_parser = kwargs)]
    pub(super) chat_template_kwargs: Option<Map<String, Value>>,
}

/// The value of `--chat-template-kwargs`.
pub(super) fn kwargs(text: &str) -> Result<Map<String, Value>, String> {
    let object = "a JSON object, as in '{\"enable_thinking\": false}'";
    serde_json::from_str(text).map_err(|error| format!("{error}; expected {object}"))
}

impl TemplateArgs {
    /// Whether any of them is given.
    pub(super) fn are_given(&self) -> bool {
        self.system.is_some() || self.chat_template_kwargs.is_some()
    }

    /// The model's template with these names; `None` where the model has none.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn template(&self, session: &Session) -> Result<Option<ChatTemplate>> {
        let Some(template) = session.opened.chat_template()? else { return Ok(None) };
        let kwargs = self.chat_template_kwargs.clone().unwrap_or_default();
        template.with_kwargs(kwargs).map(Some).map_err(|e| e.at("--chat-template-kwargs"))
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
