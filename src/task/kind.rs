//! What every task says of itself, and measures.

use std::path::PathBuf;

use burn::tensor::Device;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use super::files::{Files, Source};
use crate::data::{ChatTemplate, Paths, TokenStream, Tokenizer};
use crate::error::{Error, Result};
use crate::model::{Forward, ModelConfig};
use crate::stop::StopFlag;

/// A task: the keys of `task.NAME`, which are its protocol.
pub trait Task {
    /// Its numbers, the first the one that models are compared by. A score may lack some of them.
    fn numbers(&self) -> &'static [Number];

    /// What it is measured on.
    fn source(&self) -> Source<'_>;

    /// Whether it compares with another model: [`Bench::reference`].
    fn needs_reference(&self) -> bool {
        false
    }

    /// Whether it can go on from keys and values of earlier tokens, so that it measures how those are held.
    fn goes_on(&self) -> bool {
        false
    }

    /// Refuses keys that make no sense whatever the model.
    ///
    /// # Errors
    /// Names the key.
    fn check(&self) -> Result<(), Refused> {
        Ok(())
    }

    /// Of a task on text, the length of its windows for a model; examples are packed for them, unless
    /// they are `packed` into windows already.
    ///
    /// # Errors
    /// When its keys make no sense for the model, or for those windows.
    fn window(&self, model: &ModelConfig, packed: Option<usize>) -> Result<usize, Refused> {
        Ok(packed.unwrap_or(model.max_positions))
    }

    /// Sets the files of its rows, where its keys name none.
    fn read(&mut self, _data: &Paths) {}

    /// Measures no more than this many windows or rows, unless its keys say how many.
    fn limit(&mut self, _count: usize) {}

    /// What it has a model write, at most: what an evaluation takes follows from it.
    ///
    /// # Errors
    /// When its files cannot be read as rows.
    fn writes(&self, _files: &Files) -> Result<Option<Writes>> {
        Ok(None)
    }

    /// Reads and checks what it is measured on; no weight is read for it.
    ///
    /// # Errors
    /// When a text is too short, a file lacks a column, a row has no answer, or the model has no tokenizer
    /// where one is needed.
    fn prepare<'a>(&'a self, material: &Material<'a>) -> Result<Box<dyn Prepared + 'a>>;

    /// Adds to a score what its samples say beside those of the reference model.
    fn compare(&self, _score: &mut Score, _reference: &[Value]) {}

    /// The numbers of a score in words, for a line.
    fn result(&self, score: &Score) -> String {
        let number = |(name, value): &(String, f64)| format!("{name} {value:.4}");
        let numbers: Vec<String> = score.numbers.iter().map(number).collect();
        format!("{} over {} tokens", numbers.join("   "), score.tokens)
    }

    /// The protocol of a score in words, for a line.
    fn protocol(&self, score: &Score) -> String {
        let words: Vec<String> =
            score.protocol.iter().map(|(key, value)| format!("{key} {value}")).collect();
        words.join(", ")
    }

    /// What of the protocol has to stand beside a number, in words and in fewer.
    fn marks(&self, _score: &Score) -> Vec<[String; 2]> {
        Vec::new()
    }
}

/// A task that has its material, to be put to one model after the other.
pub trait Prepared {
    /// Measures a model. `progress(done, of)` is called now and then.
    ///
    /// # Errors
    /// When the model gives a value that is not finite, weights cannot be read, or a signal came.
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score>;
}

/// Texts that a task has a model write.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Writes {
    /// How many.
    pub texts: usize,
    /// How many of them together.
    pub together: usize,
    /// Tokens of one at most.
    pub tokens: usize,
}

/// A number that a task gives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Number {
    /// Its name in results.
    pub name: &'static str,
    /// Its curve in TensorBoard.
    pub tag: &'static str,
}

/// What a task is prepared from.
#[derive(Clone, Copy)]
pub struct Material<'a> {
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// The text of a task that is measured on text.
    pub text: Option<&'a TokenStream>,
    /// The files of a task with rows.
    pub files: &'a Files,
    /// The model's tokenizer, where it has one and it is asked for.
    pub tokenizer: Option<&'a Tokenizer>,
    /// The model's chat template, where it has one and it is asked for.
    pub template: Option<&'a ChatTemplate>,
    /// Tokens that end a text of the model's.
    pub ends: &'a [u32],
}

impl<'a> Material<'a> {
    /// The text.
    ///
    /// # Errors
    /// When none was given.
    pub fn text(&self) -> Result<&'a TokenStream> {
        self.text.ok_or_else(|| Error::usage("this task is measured on text").fix("a text file"))
    }

    /// The files that a key names.
    ///
    /// # Errors
    /// When it names none.
    pub fn files(&self, key: &str) -> Result<&'a [PathBuf]> {
        self.files.of(key).ok_or_else(|| {
            Error::usage("this task is measured on rows, and no file of them is named")
                .at(key)
                .fix(format!("{key} = a file of rows, or a list of them"))
        })
    }

    /// The model's tokenizer.
    ///
    /// # Errors
    /// When it has none.
    pub fn tokenizer(&self) -> Result<&'a Tokenizer> {
        self.tokenizer.ok_or_else(|| {
            Error::preflight("this task reads text, and the model has no tokenizer")
                .fix("the tokenizer.json that belongs to this model, beside its weights")
        })
    }
}

/// Where and how a model is measured.
pub struct Bench<'a> {
    /// Where tensors live.
    pub device: &'a Device,
    /// Set by signals.
    pub stop: &'a StopFlag,
    /// The model to compare with: the float one in recipes.
    pub reference: Option<&'a dyn Forward>,
}

/// What a task says of a model, and under which protocol.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Score {
    /// Numbers by name, in the task's order.
    pub numbers: Vec<(String, f64)>,
    /// Tokens that counted.
    pub tokens: u64,
    /// The protocol, by key.
    pub protocol: Map<String, Value>,
    /// What was found row by row, one object each; it is no part of [`Score::entries`].
    pub samples: Vec<Value>,
}

impl Score {
    /// What [`Score::entries`] gave for a score of `task`.
    pub fn of_entries(task: &dyn Task, mut entries: Map<String, Value>) -> Self {
        let tokens = entries.remove("tokens").and_then(|tokens| tokens.as_u64()).unwrap_or(0);
        let mut number = |Number { name, .. }: &Number| {
            Some(((*name).to_owned(), entries.remove(*name)?.as_f64()?))
        };
        let numbers = task.numbers().iter().filter_map(&mut number).collect();
        Self { numbers, tokens, protocol: entries, samples: Vec::new() }
    }

    /// A number by its name.
    pub fn number(&self, name: &str) -> Option<f64> {
        self.numbers.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }

    /// The number that models are compared by; not a number where there is none.
    pub fn first(&self) -> f64 {
        self.numbers.first().map_or(f64::NAN, |(_, value)| *value)
    }

    /// Numbers, tokens and protocol, by name.
    pub fn entries(&self) -> Map<String, Value> {
        let mut entries = Map::new();
        entries.extend(self.numbers.iter().map(|(name, value)| (name.clone(), (*value).into())));
        entries.insert("tokens".to_owned(), self.tokens.into());
        entries.extend(self.protocol.clone());
        entries
    }
}

impl Serialize for Score {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.entries().serialize(serializer)
    }
}

/// A refusal that one key of a task is to blame for.
#[derive(Debug)]
pub struct Refused {
    /// The key.
    pub key: &'static str,
    /// What is wrong.
    pub error: Error,
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        refused.error
    }
}
