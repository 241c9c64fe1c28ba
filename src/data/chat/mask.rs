//! Which part of a conversation is learned: what a template writes for the turns of the model.
//!
//! A turn of the model begins where the text of the messages before it ends, the opening of an answer
//! (`add_generation_prompt`) included: so it is learned behind the very text behind which the model will be
//! asked. It ends where the text of the messages up to it ends, whatever follows. Both are found by rendering
//! those messages alone, which needs no knowledge of any template. Where a template writes a turn otherwise
//! once others follow it, that is found, and refused.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Chat, ChatTemplate};
use crate::error::{Error, Result};

/// What of a conversation is learned.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, JsonSchema, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainOn {
    /// Every turn of the model.
    #[default]
    Assistant,
    /// The last of them.
    Last,
    /// Every one, each as the end of an example of its own: for templates that write a turn otherwise
    /// once others follow it.
    Each,
    /// Every token.
    All,
}

impl TrainOn {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Assistant, Self::Last, Self::Each, Self::All];

    /// Its name in recipes and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Assistant => "assistant",
            Self::Last => "last",
            Self::Each => "each",
            Self::All => "all",
        }
    }
}

/// A piece of an example's text.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Part {
    /// The text.
    pub text: String,
    /// Whether it is learned.
    pub learned: bool,
}

/// The examples of a conversation, each as its parts in order; none where the model says nothing in it.
/// `added` are the texts that the tokenizer takes as one token: no part ends within one.
///
/// # Errors
/// What the template raises, and when it writes a turn of the model otherwise once others follow.
pub fn parts(
    template: &ChatTemplate,
    chat: &Chat,
    train_on: TrainOn,
    added: &[String],
) -> Result<Vec<Vec<Part>>> {
    let answers: Vec<usize> = chat.answers().filter(|index| is_said(chat, *index)).collect();
    let mut renderer = Renderer { template, chat, added, texts: BTreeMap::new() };
    let Some(last) = answers.last().copied() else {
        if train_on != TrainOn::All {
            return Ok(Vec::new());
        }
        let text = template.render(chat, false)?;
        return Ok(vec![vec![Part { text, learned: true }]]);
    };
    match train_on {
        TrainOn::All => {
            let text = template.render(chat, false)?;
            Ok(vec![vec![Part { text, learned: true }]])
        }
        TrainOn::Assistant => Ok(renderer.example(last, &answers)?.into_iter().collect()),
        TrainOn::Last => Ok(renderer.example(last, &[last])?.into_iter().collect()),
        TrainOn::Each => {
            let each = answers.iter().map(|index| renderer.example(*index, &[*index]));
            Ok(each.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
        }
    }
}

/// Whether a turn of the model says or does anything.
fn is_said(chat: &Chat, index: usize) -> bool {
    let filled = |key: &str| match chat.messages[index].get(key) {
        None | Some(Value::Null) => false,
        Some(Value::String(text)) => !text.is_empty(),
        Some(Value::Array(list)) => !list.is_empty(),
        Some(_) => true,
    };
    ["content", "reasoning_content", "tool_calls"].iter().any(|key| filled(key))
}

/// The texts of the beginnings of a conversation, each rendered once.
struct Renderer<'a> {
    template: &'a ChatTemplate,
    chat: &'a Chat,
    added: &'a [String],
    texts: BTreeMap<(usize, bool), String>,
}

impl Renderer<'_> {
    /// The text of the first `count` messages.
    fn text(&mut self, count: usize, prompt: bool) -> Result<String> {
        if let Some(text) = self.texts.get(&(count, prompt)) {
            return Ok(text.clone());
        }
        let text = self.template.render_first(self.chat, count, prompt)?;
        self.texts.insert((count, prompt), text.clone());
        Ok(text)
    }

    /// The example that ends with message `last`, of which the turns `learned` are learned. `None` where
    /// nothing comes before the only one of them, or the template writes nothing for them.
    fn example(&mut self, last: usize, learned: &[usize]) -> Result<Option<Vec<Part>>> {
        let whole = self.text(last + 1, false)?;
        let (mut parts, mut at) = (Vec::new(), 0);
        // A turn that nothing comes before answers nobody.
        for index in learned.iter().copied().filter(|index| *index > 0) {
            let (start, end) = self.span(index, &whole)?;
            if start < at || end < start {
                return Err(self.rewritten(index, &whole, at));
            }
            parts.push(Part { text: whole[at..start].to_owned(), learned: false });
            parts.push(Part { text: whole[start..end].to_owned(), learned: true });
            at = end;
        }
        parts.push(Part { text: whole[at..].to_owned(), learned: false });
        parts.retain(|part| !part.text.is_empty());
        Ok(parts.iter().any(|part| part.learned).then_some(parts))
    }

    /// Where turn `index` begins and ends in the whole text, in bytes.
    fn span(&mut self, index: usize, whole: &str) -> Result<(usize, usize)> {
        let through = self.text(index + 1, false)?;
        let end = match self.text(index + 1, true) {
            Ok(prompted) => self.common(&through, &prompted),
            // Some templates open no answer behind an answer.
            Err(_) => through.len(),
        };
        if !whole.starts_with(&through[..end]) {
            let at = common_bytes(whole, &through);
            return Err(self.rewritten(index, whole, at));
        }
        let before = self.text(index, true)?;
        if whole.starts_with(&before) {
            return Ok((before.len(), end));
        }
        // The opening says more than the turn will (`<think>` for instance): what both have is given.
        let shared = self.common(&before, whole);
        let closed = self.text(index, false)?;
        if shared < self.common(&closed, &before) {
            return Err(self.rewritten(index, whole, shared));
        }
        Ok((shared, end))
    }

    /// How far two texts agree, in bytes, up to the beginning of a token.
    fn common(&self, one: &str, other: &str) -> usize {
        let mut at = common_bytes(one, other);
        if at == one.len() || at == other.len() {
            return at;
        }
        // Again from the start: what begins before it may lie in another.
        while let Some(start) = [one, other]
            .iter()
            .flat_map(|text| self.added.iter().filter_map(|added| within(text, added, at)))
            .min()
        {
            at = start;
        }
        at
    }

    fn rewritten(&self, index: usize, whole: &str, at: usize) -> Error {
        let mut from = at.min(whole.len());
        while !whole.is_char_boundary(from) {
            from -= 1;
        }
        let shown: String = whole[from..].chars().take(40).collect();
        Error::preflight(format!(
            "the chat template writes message {} (assistant) otherwise once others follow it, from {:?} on",
            index + 1,
            shown
        ))
        .at(self.template.place())
        .fix(
            "train_on = \"each\" (every answer ends an example of its own) or \"last\"; or messages without \
             reasoning",
        )
    }
}

/// Where the text of a token that goes over byte `at` begins.
fn within(text: &str, added: &str, at: usize) -> Option<usize> {
    let first = (at + 1).saturating_sub(added.len());
    (first..at).find(|start| text.as_bytes()[*start..].starts_with(added.as_bytes()))
}

fn common_bytes(one: &str, other: &str) -> usize {
    let same = one.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
    (0..=same)
        .rev()
        .find(|at| one.is_char_boundary(*at) && other.is_char_boundary(*at))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const CHATML: &str = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '<e>\n' }}{% endfor %}\
        {% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}";

    fn chat(turns: &[(&str, &str)]) -> Chat {
        let messages = turns
            .iter()
            .map(|(role, content)| serde_json::json!({"role": role, "content": content}));
        Chat::of_messages(&messages.collect()).unwrap()
    }

    /// The examples with what is learned in brackets.
    fn marked(source: &str, turns: &[(&str, &str)], train_on: TrainOn) -> Result<Vec<String>> {
        let template = ChatTemplate::new(source, BTreeMap::new(), "t").unwrap();
        let added = ["<s>", "<e>", "<|end|>", "<|user|>", "<|endoftext|>"].map(str::to_owned);
        let examples = parts(&template, &chat(turns), train_on, &added)?;
        let show = |part: &Part| {
            if part.learned { format!("[{}]", part.text) } else { part.text.clone() }
        };
        Ok(examples.iter().map(|parts| parts.iter().map(show).collect()).collect())
    }

    const TURNS: [(&str, &str); 5] =
        [("system", "S"), ("user", "A"), ("assistant", "1"), ("user", "B"), ("assistant", "2")];

    #[test]
    fn turns_of_the_model_are_learned_behind_their_opening() {
        let all = marked(CHATML, &TURNS, TrainOn::Assistant).unwrap();
        let start = "<s>system\nS<e>\n<s>user\nA<e>\n<s>assistant\n";
        let middle = "<s>user\nB<e>\n<s>assistant\n";
        assert_eq!(all, [format!("{start}[1<e>\n]{middle}[2<e>\n]")]);
        let last = marked(CHATML, &TURNS, TrainOn::Last).unwrap();
        assert_eq!(last, [format!("{start}1<e>\n{middle}[2<e>\n]")]);
        let each = marked(CHATML, &TURNS, TrainOn::Each).unwrap();
        assert_eq!(each, [format!("{start}[1<e>\n]"), last[0].clone()]);
        let every = marked(CHATML, &TURNS, TrainOn::All).unwrap();
        assert_eq!(every, [format!("[{start}1<e>\n{middle}2<e>\n]")]);
    }

    #[test]
    fn what_teaches_nothing_is_left_out() {
        // Whoever asks last is not answered; who is answered with nothing, neither.
        let asked = [("user", "A"), ("assistant", ""), ("user", "B")];
        assert_eq!(marked(CHATML, &asked, TrainOn::Assistant).unwrap(), [""; 0]);
        let opens = [("assistant", "1")];
        assert_eq!(marked(CHATML, &opens, TrainOn::Assistant).unwrap(), [""; 0]);
        let opens = [("assistant", "1"), ("user", "A"), ("assistant", "2"), ("user", "B")];
        assert_eq!(
            marked(CHATML, &opens, TrainOn::Assistant).unwrap(),
            ["<s>assistant\n1<e>\n<s>user\nA<e>\n<s>assistant\n[2<e>\n]"]
        );
    }

    /// Phi-3's template closes a text that opens no answer.
    #[test]
    fn what_closes_a_text_is_not_taken_for_the_end_of_a_turn() {
        let phi = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}";
        assert_eq!(
            marked(phi, &TURNS[1..], TrainOn::Assistant).unwrap(),
            [
                "<|user|>\nA<|end|>\n<|assistant|>\n[1<|end|>\n]<|user|>\nB<|end|>\n<|assistant|>\n[2<|end|>\n]\
              <|endoftext|>"
            ]
        );
    }

    /// DeepSeek's opens an answer with a tag that it does not write in the turn.
    #[test]
    fn an_opening_may_say_more_than_the_turn() {
        let think = CHATML.replace("'<s>assistant\n' }}", "'<s>assistant\n<think>' }}");
        assert_ne!(think, CHATML);
        let found = marked(&think, &TURNS[1..3], TrainOn::Assistant).unwrap();
        assert_eq!(found, ["<s>user\nA<e>\n<s>assistant\n[1<e>\n]"]);
    }

    #[test]
    fn a_template_that_rewrites_history_is_refused() {
        let last = "{% for m in messages %}{{ '<s>' + m.role + '\n' }}\
            {{ '<think></think>' if loop.last and m.role == 'assistant' }}{{ m.content + '<e>\n' }}{% endfor %}\
            {% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}";
        let error = marked(last, &TURNS, TrainOn::Assistant).unwrap_err();
        assert_eq!(error.kind().exit_code(), 3);
        assert_eq!(
            error.to_string(),
            "the chat template writes message 3 (assistant) otherwise once others follow it, from \
             \"1<e>\\n<s>user\\nB<e>\\n<s>assistant\\n<think></\" on\n  at   t\n  try  train_on = \"each\" \
             (every answer ends an example of its own) or \"last\"; or messages without reasoning"
        );
        let start = "<s>system\nS<e>\n<s>user\nA<e>\n<s>assistant\n";
        let each = marked(last, &TURNS, TrainOn::Each).unwrap();
        assert_eq!(each[0], format!("{start}[<think></think>1<e>\n]"));
        assert!(each[1].ends_with("B<e>\n<s>assistant\n[<think></think>2<e>\n]"), "{}", each[1]);
        assert_eq!(marked(last, &TURNS, TrainOn::Last).unwrap(), each[1..]);
        // What is written of the question changes too: then not even the last answer can be told apart.
        let count = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
        assert!(marked(count, &TURNS, TrainOn::Last).is_err());
    }

    #[test]
    fn texts_part_where_tokens_do() {
        let added = ["<|end|>".to_owned(), "<|user|>".to_owned()];
        let template = ChatTemplate::new("", BTreeMap::new(), "t").unwrap();
        let chat = Chat::default();
        let renderer =
            Renderer { template: &template, chat: &chat, added: &added, texts: BTreeMap::new() };
        assert_eq!(renderer.common("a<|end|>", "a<|user|>"), 1);
        assert_eq!(renderer.common("a<|e", "a<|e"), 4);
        assert_eq!(renderer.common("a\u{e9}", "a\u{ea}"), 1, "not within a letter");
        assert_eq!(renderer.common("abc", "abd"), 2);
    }
}
