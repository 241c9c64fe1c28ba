//! What every task says of itself, and measures.

use burn::tensor::Device;
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};

use crate::data::TokenStream;
use crate::error::{Error, Result};
use crate::model::{Forward, ModelConfig};
use crate::stop::StopFlag;

/// A task: the keys of `task.NAME`, which are its protocol, and the measuring.
pub trait Task {
    /// Its numbers, the first the one that models are compared by.
    fn numbers(&self) -> &'static [Number];

    /// The length of its windows for a model; examples are packed for them, unless they are `packed`
    /// into windows already.
    ///
    /// # Errors
    /// When its keys make no sense for the model, or for those windows.
    fn window(&self, model: &ModelConfig, packed: Option<usize>) -> Result<usize, Refused>;

    /// Refuses a text that is too short for it.
    ///
    /// # Errors
    /// A preflight error.
    fn check_text(&self, model: &ModelConfig, text: &TokenStream) -> Result<()>;

    /// Measures no more than this many windows, unless its keys say how many.
    fn limit(&mut self, _windows: usize) {}

    /// Measures a model. `progress(done, of)` is called now and then.
    ///
    /// # Errors
    /// When the text does not fit the protocol, the model gives a value that is not finite, or a signal
    /// came.
    fn measure(
        &self,
        bench: &Bench<'_>,
        model: &dyn Forward,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Score>;

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

/// A number that a task gives.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Number {
    /// Its name in results.
    pub name: &'static str,
    /// Its curve in TensorBoard.
    pub tag: &'static str,
}

/// What a task measures on, the model aside.
pub struct Bench<'a> {
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// The text.
    pub text: &'a TokenStream,
    /// Where tensors live.
    pub device: &'a Device,
    /// Set by signals.
    pub stop: &'a StopFlag,
}

/// What a task says of a model, and under which protocol.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// Numbers by name, in the task's order.
    pub numbers: Vec<(String, f64)>,
    /// Tokens that counted.
    pub tokens: u64,
    /// The protocol, by key.
    pub protocol: Map<String, Value>,
}

impl Score {
    /// What [`Score::entries`] gave for a score of `task`.
    pub fn of_entries(task: &dyn Task, mut entries: Map<String, Value>) -> Self {
        let tokens = entries.remove("tokens").and_then(|tokens| tokens.as_u64()).unwrap_or(0);
        let mut number = |Number { name, .. }: &Number| {
            Some(((*name).to_owned(), entries.remove(*name)?.as_f64()?))
        };
        let numbers = task.numbers().iter().filter_map(&mut number).collect();
        Self { numbers, tokens, protocol: entries }
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
