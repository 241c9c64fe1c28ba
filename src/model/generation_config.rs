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
    /// How they sample; greedy where they say nothing.
    pub sampler: Sampler,
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
    /// When the text is no JSON, or a number makes no sense.
    pub fn parse(text: Option<&str>, ends: impl IntoIterator<Item = u32>) -> Result<Self> {
        let json = text.map_or(Ok(Value::Null), serde_json::from_str).map_err(|error| {
            Error::damaged(format!("generation_config.json is not valid JSON: {error}"), SETTINGS)
        })?;
        let listed = match &json["eos_token_id"] {
            Value::Array(list) => list.clone(),
            one => vec![one.clone()],
        };
        let listed = listed.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok());
        let mut all: Vec<u32> = ends.into_iter().chain(listed).collect();
        all.sort_unstable();
        all.dedup();
        Ok(Self { ends: all, sampler: sampler(&json)? })
    }
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
    // As in transformers: what is not said of sampling is 1, and without `do_sample` it is greedy.
    let samples = json["do_sample"].as_bool().unwrap_or(false);
    let temperature = number("temperature", |value| value.is_finite() && value >= 0.0, 1.0)?;
    Ok(Sampler {
        temperature: if samples { temperature as f32 } else { 0.0 },
        top_k: number("top_k", |value| value >= 0.0, if samples { 50.0 } else { 0.0 })? as usize,
        top_p: number("top_p", |value| value > 0.0 && value <= 1.0, 1.0)? as f32,
        min_p: number("min_p", |value| (0.0..=1.0).contains(&value), 0.0)? as f32,
        repetition_penalty: number("repetition_penalty", |value| value > 0.0, 1.0)? as f32,
        seed: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_joined_and_sampling_is_read() {
        let read = |text| GenerationConfig::parse(text, [2]).unwrap();
        assert_eq!(read(None), GenerationConfig { ends: vec![2], sampler: Sampler::default() });
        let config = read(Some(
            r#"{"eos_token_id": [7, 2, 5], "do_sample": true, "temperature": 0.7, "top_p": 0.8, "top_k": 20}"#,
        ));
        assert_eq!(config.ends, [2, 5, 7]);
        let sampler = Sampler { temperature: 0.7, top_k: 20, top_p: 0.8, ..Sampler::default() };
        assert_eq!(config.sampler, sampler);
        let greedy = read(Some(r#"{"eos_token_id": 5, "temperature": 0.7}"#));
        assert_eq!((greedy.ends, greedy.sampler.temperature), (vec![2, 5], 0.0));
        assert_eq!(read(Some(r#"{"do_sample": true}"#)).sampler.top_k, 50);
        for wrong in ["{", r#"{"top_p": 7}"#, r#"{"temperature": "warm"}"#] {
            let error = GenerationConfig::parse(Some(wrong), []).unwrap_err();
            assert_eq!(error.kind().exit_code(), 3);
            assert!(error.what().contains("generation_config.json"), "{error}");
        }
    }
}
