//! The texts of a recipe, tokenized.

use crate::data::{ChatTemplate, Reading, TokenStream, Tokenizer};
use crate::error::{Error, Result};

/// One data set, tokenized.
pub struct Corpus {
    /// The stream.
    pub stream: TokenStream,
    /// How its documents became tokens; of a mix that of its first source.
    pub reading: Reading,
    /// SHA-256 of its files.
    pub sha256: String,
    /// SHA-256 of the chat template, where the recipe names a file.
    pub template: Option<String>,
    /// How it goes by in reports.
    pub name: String,
    /// Windows to draw; all of them when absent.
    pub samples: Option<usize>,
    /// Window length; examples are packed for it.
    pub length: usize,
}

/// The data sets of a recipe.
#[derive(Default)]
pub struct Data {
    /// For reconstruct.
    pub calibration: Option<Corpus>,
    /// For distill.
    pub train: Option<Corpus>,
    /// For validation while training, evaluate and the gates.
    pub validation: Option<Corpus>,
    /// Token put before documents.
    pub bos: Option<u32>,
    /// The model's tokenizer, where a stage tokenizes as it runs.
    pub tokenizer: Option<Tokenizer>,
    /// The model's chat template, where a stage may need it and there is one.
    pub template: Option<ChatTemplate>,
    /// Tokens that end what the model writes.
    pub ends: Vec<u32>,
}

impl Data {
    /// A data set that a stage cannot do without.
    ///
    /// # Errors
    /// A usage error that names the table to add.
    pub fn need<'a>(corpus: Option<&'a Corpus>, role: &str) -> Result<&'a Corpus> {
        corpus.ok_or_else(|| {
            Error::usage(format!("the recipe has no [data.{role}]"))
                .fix(format!("[data.{role}] with a path"))
        })
    }

    /// The calibration text is there and long enough.
    pub(super) fn check_calibration(&self) -> Result<()> {
        let corpus = Self::need(self.calibration.as_ref(), "calibration")?;
        let windows = corpus.stream.spread(corpus.samples.unwrap_or(1), corpus.length);
        windows.map(drop).map_err(|e| e.at("data.calibration"))
    }

    /// The training text is there and long enough.
    pub(super) fn check_train(&self) -> Result<()> {
        let corpus = Self::need(self.train.as_ref(), "train")?;
        corpus.stream.spread(1, corpus.length).map(drop).map_err(|e| e.at("data.train"))
    }
}
