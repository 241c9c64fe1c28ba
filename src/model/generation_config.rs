//! `generation_config.json`: the tokens that end a text, and how the model's makers sample.

use std::path::Path;

use serde_json::Value;

use super::Sampler;
use crate::error::{Error, Result};

const SETTINGS: &str = "the generation_config.json of the same model";

/// What a model's makers say of generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text.
    pub ends: Vec<u32>,
    /// The whole file; null where there is none.
    json: Value,
}

impl GenerationConfig {
    /// Reads `generation_config.json` of a folder; without one nothing is said. `ends` as for
    /// [`GenerationConfig::parse`].
    ///
    /// # Errors
    /// As [`GenerationConfig::parse`], and when the file cannot be read.
    pub fn of_folder(dir: &Path, ends: impl IntoIterator<Item = u32>) -> Result<Self> {
        let path = dir.join("generation_config.json");
        let read = || std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e));
        let text = path.is_file().then(read).transpose()?;
        Self::parse(text.as_deref(), ends).map_err(|error| error.at(dir.display()))
    }

    /// Reads the file's text; without one nothing is said.
    ///
    /// `ends` are those that the model is known to have besides.
    ///
    /// # Errors
    /// When the text is no JSON.
    pub fn parse(text: Option<&str>, ends: impl IntoIterator<Item = u32>) -> Result<Self> {
        let json = text.map_or(Ok(Value::Null), serde_json::from_str).map_err(|error| {
            Error::damaged(format!("generation_config.json is not valid JSON: {error}"), SETTINGS)
        })?;
        let mut all: Vec<u32> = ends.into_iter().chain(end_tokens(&json)).collect();
        all.sort_unstable();
        all.dedup();
        Ok(Self { ends: all, json })
    }

    /// How they sample; greedy where they say nothing.
    ///
    /// # Errors
    /// When a number that counts makes no sense.
    pub fn sampler(&self) -> Result<Sampler> {
        sampler(&self.json)
    }
}

/// The tokens that a `generation_config.json` lists as ends: one, several or none.
pub fn end_tokens(json: &Value) -> Vec<u32> {
    let ids = match &json["eos_token_id"] {
        Value::Array(list) => &list[..],
        one => std::slice::from_ref(one),
    };
    ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok()).collect()
}

fn sampler(json: &Value) -> Result<Sampler> {
    let number = |key: &str, fits: fn(f64) -> bool, otherwise: f64| match &json[key] {
        Value::Null => Ok(otherwise),
        value => value.as_f64().filter(|value| fits(*value)).ok_or_else(|| {
            Error::damaged(
                format!("{key} = {value} in generation_config.json makes no sense"),
                SETTINGS,
            )
        }),
    };
    // As in transformers: without `do_sample` it is greedy, and nothing but the penalty counts; with it, what
    // is not said leaves 50 tokens and cuts nothing else.
    let repetition_penalty = number("repetition_penalty", |value| value > 0.0, 1.0)? as f32;
    let greedy = Sampler { repetition_penalty, ..Sampler::default() };
    if json["do_sample"] != Value::Bool(true) {
        return Ok(greedy);
    }
    Ok(Sampler {
        temperature: number("temperature", |value| value >= 0.0, 1.0)? as f32,
        top_k: number("top_k", |value| value >= 0.0, 50.0)? as usize,
        top_p: number("top_p", |value| value > 0.0 && value <= 1.0, 1.0)? as f32,
        min_p: number("min_p", |value| (0.0..=1.0).contains(&value), 0.0)? as f32,
        ..greedy
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_joined_and_sampling_is_read() {
        let read = |text| GenerationConfig::parse(text, [2]).unwrap();
        let none = read(None);
        assert_eq!((none.sampler().unwrap(), none.ends), (Sampler::default(), vec![2]));
        let config = read(Some(
            r#"{"eos_token_id": [7, 2, 5], "do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20}"#,
        ));
        assert_eq!(config.ends, [2, 5, 7]);
        let sampler = Sampler { temperature: 0.7, top_k: 20, top_p: 0.8, ..Sampler::default() };
        assert_eq!(config.sampler().unwrap(), sampler);
        // What does not count may say anything.
        let greedy = read(Some(r#"{"eos_token_id": 5, "temperature": 0.7, "top_p": 0}"#));
        assert_eq!((greedy.sampler().unwrap(), greedy.ends), (Sampler::default(), vec![2, 5]));
        assert_eq!(read(Some(r#"{"do_sample": true}"#)).sampler().unwrap().top_k, 50);
        let wrong = ["top_p\": 7", "top_k\": -1", "temperature\": \"warm\""];
        let wrong = wrong.map(|said| {
            let text = format!("{{\"do_sample\": true, \"{said}}}");
            GenerationConfig::parse(Some(&text), []).unwrap().sampler()
        });
        let errors = wrong.into_iter().map(Result::unwrap_err);
        for error in errors.chain([GenerationConfig::parse(Some("{"), []).unwrap_err()]) {
            assert_eq!(error.kind().exit_code(), 3);
            assert!(error.what().contains("generation_config.json"), "{error}");
        }
    }
}
