//! Values of a row by column, in the forms in which data sets have them.

use std::fmt;

use serde_json::{Map, Value};

/// What is wrong with a row, a sentence without a full stop.
#[derive(Debug)]
pub(super) struct Wrong(String);

impl Wrong {
    pub(super) fn new(what: impl Into<String>) -> Self {
        Self(what.into())
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The columns of a row.
pub(super) struct Fields<'a>(pub(super) &'a Map<String, Value>);

/// A question, its answers, and the right one.
pub(super) type Found = (String, Vec<String>, usize);

impl Fields<'_> {
    pub(super) fn has(&self, key: &str) -> bool {
        self.0.get(key).is_some_and(|value| !value.is_null())
    }

    fn value(&self, key: &str) -> Result<&Value, Wrong> {
        self.0.get(key).filter(|value| !value.is_null()).ok_or_else(|| {
            let keys: Vec<&str> = self.0.keys().map(String::as_str).collect();
            let found = if keys.is_empty() { "nothing".to_owned() } else { keys.join(", ") };
            Wrong::new(format!("the row has no `{key}` column (found: {found})"))
        })
    }

    pub(super) fn text(&self, key: &str) -> Result<String, Wrong> {
        let value = self.value(key)?;
        let text = value.as_str().map(str::to_owned);
        text.ok_or_else(|| Wrong::new(format!("`{key}` is {value}, expected a text")))
    }

    /// A list of texts; in CSV as JSON.
    pub(super) fn list(&self, key: &str) -> Result<Vec<String>, Wrong> {
        texts(self.value(key)?).ok_or_else(|| Wrong::new(format!("`{key}` is no list of texts")))
    }

    /// The number of an answer, from 0.
    pub(super) fn number(&self, key: &str, answers: usize) -> Result<usize, Wrong> {
        self.answer(key, answers, 0)
    }

    /// The number of an answer, from 1.
    pub(super) fn counted(&self, key: &str, answers: usize) -> Result<usize, Wrong> {
        self.answer(key, answers, 1)
    }

    fn answer(&self, key: &str, answers: usize, first: i64) -> Result<usize, Wrong> {
        let value = self.value(key)?;
        let text = value.as_str().map(str::trim);
        if text == Some("") {
            return Err(Wrong::new(format!("the row has no answer: `{key}` is empty")));
        }
        let number = value.as_i64().or_else(|| text?.parse().ok());
        match number {
            None => Err(Wrong::new(format!("`{key}` is {value}, expected a number"))),
            Some(-1) => Err(Wrong::new(format!("the row has no answer: `{key}` is -1"))),
            Some(number) => usize::try_from(number - first)
                .ok()
                .filter(|right| *right < answers)
                .ok_or_else(|| {
                    let what = format!("`{key}` is {number}, and there are {answers} answers");
                    Wrong::new(format!("{what}, from {first}"))
                }),
        }
    }

    /// An answer by its number from 0, or by its letter from A.
    pub(super) fn number_or_letter(&self, key: &str, answers: usize) -> Result<usize, Wrong> {
        let text = self.value(key)?.as_str().map(str::trim).unwrap_or_default();
        match text.as_bytes() {
            [letter] if letter.is_ascii_uppercase() => {
                let right = usize::from(letter - b'A');
                if right < answers {
                    return Ok(right);
                }
                Err(Wrong::new(format!("`{key}` is {text}, and there are {answers} answers")))
            }
            _ => self.number(key, answers),
        }
    }

    pub(super) fn truth(&self, key: &str) -> Result<bool, Wrong> {
        match self.value(key)? {
            Value::Bool(truth) => Ok(*truth),
            Value::String(text) if text.eq_ignore_ascii_case("true") => Ok(true),
            Value::String(text) if text.eq_ignore_ascii_case("false") => Ok(false),
            value => Err(Wrong::new(format!("`{key}` is {value}, expected true or false"))),
        }
    }

    /// A question as a text, or as the object of the original ARC files.
    pub(super) fn stem(&self, key: &str) -> Result<String, Wrong> {
        let inner = self.0.get("question").and_then(|question| question.get("stem"));
        match inner.and_then(Value::as_str) {
            Some(stem) => Ok(stem.to_owned()),
            None => self.text(key),
        }
    }

    /// Answers under `choices` with the one that `answerKey` names.
    pub(super) fn labelled_answers(&self) -> Result<(Vec<String>, usize), Wrong> {
        let inner = self.0.get("question").and_then(|question| question.get("choices"));
        let choices = match inner {
            Some(choices) => choices.clone(),
            None => match self.value("choices")? {
                Value::String(text) => serde_json::from_str(text).unwrap_or_default(),
                choices => choices.clone(),
            },
        };
        let wrong = || Wrong::new("`choices` has no `text` and `label` lists");
        let column = |key: &str| match &choices {
            Value::Array(all) => {
                all.iter().map(|choice| Some(choice.get(key)?.as_str()?.to_owned())).collect()
            }
            choices => texts(choices.get(key)?),
        };
        let answers = column("text").ok_or_else(wrong)?;
        let labels: Vec<String> = column("label").ok_or_else(wrong)?;
        let key = self.text("answerKey")?;
        let key = key.trim();
        if key.is_empty() {
            return Err(Wrong::new("the row has no answer: `answerKey` is empty"));
        }
        let right = labels.iter().position(|label| label == key);
        let right = right.filter(|right| *right < answers.len()).ok_or_else(|| {
            let labels = labels.join(", ");
            Wrong::new(format!("`answerKey` is {key}, and the answers are labelled {labels}"))
        })?;
        Ok((answers, right))
    }

    /// The question and answers of a row with `instruction` and `answer`, as commonsense data sets are given to
    /// train adapters: a sentence that ends in `NOUN: `, the question, a blank line, and the answers behind
    /// `WORD1: `, `WORD2: `, ...; what `columns` gives where the row has no `instruction`.
    pub(super) fn instruction_or(
        &self,
        noun: &str,
        word: &str,
        columns: impl FnOnce() -> Result<Found, Wrong>,
    ) -> Result<Found, Wrong> {
        if !self.has("instruction") {
            return columns();
        }
        let text = self.text("instruction")?;
        let wrong = || {
            let what = format!("`instruction` does not ask a {noun} with answers behind {word}1:");
            Wrong::new(what)
        };
        let (_, text) = text.split_once(&format!("{noun}: ")).ok_or_else(wrong)?;
        let (question, mut rest) = text.split_once(&format!("\n\n{word}1: ")).ok_or_else(wrong)?;
        let end = format!("{word} format: ");
        let end = rest.rfind(&end).or_else(|| rest.rfind("Answer format: ")).ok_or_else(wrong)?;
        rest = &rest[..end];
        rest = rest.strip_suffix("\n\n").or_else(|| rest.strip_suffix(' ')).unwrap_or(rest);
        let mut answers = Vec::new();
        for number in 2.. {
            let marks = [format!("\n\n{word}{number}: "), format!(" {word}{number}: ")];
            let Some((answer, after)) = marks.iter().find_map(|mark| rest.split_once(&mark[..]))
            else {
                answers.push(rest.to_owned());
                break;
            };
            answers.push(answer.to_owned());
            rest = after;
        }
        let key = self.text("answer")?;
        let number = key.trim_start_matches(|c: char| !c.is_ascii_digit()).parse::<usize>();
        let right = number.ok().and_then(|n| n.checked_sub(1)).filter(|n| *n < answers.len());
        let right = right.ok_or_else(|| {
            Wrong::new(format!("`answer` is {key:?}, and there are {} answers", answers.len()))
        })?;
        Ok((question.to_owned(), answers, right))
    }
}

/// A list of texts, or the JSON of one.
fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(all) => all.iter().map(|text| Some(text.as_str()?.to_owned())).collect(),
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    }
}
