//! Prompts of tasks whose answers are written: a question behind examples, as plain text or in the model's
//! chat template, as lm-evaluation-harness puts them together.

use serde_json::json;

use super::kind::{Material, Refused};
use crate::data::ChatTemplate;
use crate::data::chat::Chat;
use crate::error::{Error, Result};

/// A question, and what stands before it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Conversation {
    /// What is said to the model of its part; templates only.
    pub(super) system: Option<String>,
    /// Questions with their answers.
    pub(super) examples: Vec<(String, String)>,
    pub(super) question: String,
}

impl Conversation {
    /// As text that an answer goes on behind. With a template, examples are turns of their own where
    /// `multiturn` says so, and else stand in one turn with the question.
    ///
    /// # Errors
    /// When the template refuses it.
    pub(super) fn text(&self, template: Option<&ChatTemplate>, multiturn: bool) -> Result<String> {
        let Some(template) = template else { return Ok(self.plain()) };
        let message = |role: &str, content: &str| json!({ "role": role, "content": content });
        let mut messages: Vec<_> = self.system.iter().map(|text| message("system", text)).collect();
        if multiturn {
            for (question, answer) in &self.examples {
                messages.extend([message("user", question), message("assistant", answer)]);
            }
            messages.push(message("user", &self.question));
        } else {
            messages.push(message("user", &self.plain()));
        }
        template.render(&Chat { messages, ..Chat::default() }, true)
    }

    fn plain(&self) -> String {
        let example = |(question, answer): &(String, String)| format!("{question} {answer}\n\n");
        self.examples.iter().map(example).collect::<String>() + &self.question
    }
}

/// Refuses words for the system where there is no template to put them in.
///
/// # Errors
/// Names the key.
pub(super) fn check(chat_template: bool, system: Option<&str>) -> Result<(), Refused> {
    if chat_template || system.is_none() {
        return Ok(());
    }
    let error = Error::usage("a system's turn is part of a chat template, and none is used");
    Err(Refused { key: "system", error: error.fix("chat_template = true") })
}

/// The model's template, if it is to be used.
///
/// # Errors
/// When the model has none.
pub(super) fn template<'a>(
    wanted: bool,
    material: &Material<'a>,
) -> Result<Option<&'a ChatTemplate>> {
    if !wanted {
        return Ok(None);
    }
    let none = || {
        Error::preflight("the model has no chat template")
            .at("chat_template")
            .fix("chat_template = false, or a folder with chat_template.jinja")
    };
    material.template.map(Some).ok_or_else(none)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn examples_are_turns_or_stand_before_the_question() {
        let conversation = Conversation {
            system: Some("Be brief.".to_owned()),
            examples: vec![("Q: 1?".to_owned(), "one".to_owned())],
            question: "Q: 2?".to_owned(),
        };
        let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                      {% if add_generation_prompt %}<assistant>{% endif %}";
        let template = ChatTemplate::new(source, BTreeMap::new(), "test").unwrap();
        let text = |multiturn| conversation.text(Some(&template), multiturn).unwrap();
        let turns = "<system>Be brief.<user>Q: 1?<assistant>one<user>Q: 2?<assistant>";
        assert_eq!(text(true), turns);
        assert_eq!(text(false), "<system>Be brief.<user>Q: 1? one\n\nQ: 2?<assistant>");
        assert_eq!(conversation.text(None, true).unwrap(), "Q: 1? one\n\nQ: 2?");
    }
}
