//! What we read of a Hugging Face `config.json`, in both spellings (transformers 4 and 5).

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};

/// A decoder-only model's shape, resolved from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub model_type: String,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the gated MLP.
    pub d_ff: usize,
    /// Number of decoder blocks.
    pub n_blocks: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest context the model was made for.
    pub max_positions: usize,
    /// Epsilon of the RMS norms.
    pub norm_eps: f64,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether embedding and head are one matrix.
    pub tied: bool,
    /// Whether q, k, v and o carry biases.
    pub attention_bias: bool,
    /// Whether gate, up and down carry biases.
    pub mlp_bias: bool,
    /// Token put before a document.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
}

/// Rotary position embedding: base and frequency scaling.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How frequencies are stretched.
    pub scaling: RopeScaling,
}

/// Frequency scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by a factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` count as low frequency.
        low: f64,
        /// Wavelengths below `original / high` count as high frequency.
        high: f64,
        /// Context of pre-training.
        original: f64,
    },
}

#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    num_hidden_layers: Option<usize>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    rope_parameters: Option<Value>,
    hidden_act: Option<String>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    bos_token_id: Option<Value>,
    eos_token_id: Option<Value>,
}

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or damaged, a needed key is absent, or the model uses something
    /// that is not supported; the key is named.
    pub fn read(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            return Err(Error::usage("this is a file, and a model's folder is needed here")
                .at(dir.display())
                .fix("the Hugging Face folder that the file was made from"));
        }
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
        Self::parse(&text).map_err(|e| e.at(path.display()))
    }

    /// From the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(text: &str) -> Result<Self> {
        let raw: Raw = serde_json::from_str(text)
            .map_err(|e| Error::preflight(format!("config.json is not valid: {e}")))?;
        let model_type = need(raw.model_type.clone(), "model_type")?;
        if model_type != "llama" {
            return Err(Error::preflight(format!("model_type `{model_type}` is not supported"))
                .fix("a model of type llama"));
        }
        if let Some(act) = raw.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(Error::preflight(format!("hidden_act `{act}` is not supported"))
                .fix("a model with hidden_act silu"));
        }
        let n_heads = need(raw.num_attention_heads, "num_attention_heads")?;
        let d_model = need(raw.hidden_size, "hidden_size")?;
        let config = Self {
            d_model,
            d_ff: need(raw.intermediate_size, "intermediate_size")?,
            n_blocks: need(raw.num_hidden_layers, "num_hidden_layers")?,
            n_heads,
            n_kv_heads: raw.num_key_value_heads.unwrap_or(n_heads),
            head_dim: raw.head_dim.unwrap_or(d_model / n_heads.max(1)),
            vocab: need(raw.vocab_size, "vocab_size")?,
            max_positions: raw.max_position_embeddings.unwrap_or(2048),
            norm_eps: raw.rms_norm_eps.unwrap_or(1e-6),
            rope: rope(&raw)?,
            tied: raw.tie_word_embeddings.unwrap_or(false),
            attention_bias: raw.attention_bias.unwrap_or(false),
            mlp_bias: raw.mlp_bias.unwrap_or(false),
            bos: ids(raw.bos_token_id.as_ref()).first().copied(),
            eos: ids(raw.eos_token_id.as_ref()),
            model_type,
        };
        if config.n_kv_heads == 0 || !config.n_heads.is_multiple_of(config.n_kv_heads) {
            return Err(Error::preflight(format!(
                "num_key_value_heads {} does not divide num_attention_heads {}",
                config.n_kv_heads, config.n_heads
            )));
        }
        if config.head_dim == 0 || !config.head_dim.is_multiple_of(2) {
            return Err(Error::preflight(format!("head_dim {} is not even", config.head_dim)));
        }
        Ok(config)
    }
}

fn need<T>(value: Option<T>, key: &str) -> Result<T> {
    value.ok_or_else(|| {
        Error::preflight(format!("config.json has no `{key}`"))
            .fix("a Hugging Face model folder with a complete config.json")
    })
}

/// Token ids from a number, a list of numbers, or nothing.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// transformers 5 writes `rope_parameters` with everything in it; older folders write
/// `rope_theta` and `rope_scaling`.
fn rope(raw: &Raw) -> Result<Rope> {
    let empty = Value::Null;
    let parameters = raw.rope_parameters.as_ref().or(raw.rope_scaling.as_ref()).unwrap_or(&empty);
    let number = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let needed = |key: &str| need(number(key), &format!("rope_parameters.{key}"));
    let theta = number("rope_theta").or(raw.rope_theta).unwrap_or(10_000.0);
    let kind = parameters.get("rope_type").or_else(|| parameters.get("type"));
    let scaling = match kind.and_then(Value::as_str).unwrap_or("default") {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: needed("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low: needed("low_freq_factor")?,
            high: needed("high_freq_factor")?,
            original: needed("original_max_position_embeddings")?,
        },
        other => {
            return Err(Error::preflight(format!("rope type `{other}` is not supported"))
                .fix("a model with rope type default, linear or llama3"));
        }
    };
    Ok(Rope { theta, scaling })
}

impl Rope {
    /// Inverse frequencies, `[head_dim / 2]`, in f32 as transformers computes them.
    pub fn inverse_frequencies(&self, head_dim: usize) -> Vec<f32> {
        (0..head_dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / head_dim as f32;
                self.scaling.apply(1.0 / (self.theta as f32).powf(exponent))
            })
            .collect()
    }
}

impl RopeScaling {
    fn apply(&self, frequency: f32) -> f32 {
        match *self {
            Self::Default => frequency,
            Self::Linear { factor } => frequency / factor as f32,
            Self::Llama3 { factor, low, high, original } => {
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(frequency);
                if wavelength < original / high {
                    frequency
                } else if wavelength > original / low {
                    frequency / factor as f32
                } else {
                    let ramp = ((original / wavelength - low) / (high - low)) as f32;
                    (1.0 - ramp) * frequency / factor as f32 + ramp * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = r#""model_type":"llama","hidden_size":8,"intermediate_size":16,
        "num_hidden_layers":1,"num_attention_heads":2,"vocab_size":32"#;

    #[test]
    fn both_spellings_of_rope() {
        let old = format!(
            "{{{BASE},\"rope_theta\":5e5,\"rope_scaling\":{{\"type\":\"linear\",\"factor\":2.0}}}}"
        );
        let new = format!(
            "{{{BASE},\"rope_parameters\":{{\"rope_theta\":5e5,\"rope_type\":\"linear\",\"factor\":2.0}}}}"
        );
        let (old, new) = (ModelConfig::parse(&old).unwrap(), ModelConfig::parse(&new).unwrap());
        assert_eq!(old, new);
        assert_eq!(old.rope.scaling, RopeScaling::Linear { factor: 2.0 });
        assert_eq!((old.n_kv_heads, old.head_dim), (2, 4));
    }

    #[test]
    fn what_is_not_supported_is_named() {
        for (text, part) in [
            ("{\"model_type\":\"mamba\"}".to_owned(), "mamba"),
            (format!("{{{BASE},\"hidden_act\":\"relu\"}}"), "relu"),
            (
                format!("{{{BASE},\"rope_scaling\":{{\"rope_type\":\"yarn\",\"factor\":2}}}}"),
                "yarn",
            ),
            (format!("{{{BASE},\"num_key_value_heads\":3}}"), "num_key_value_heads"),
            ("{\"model_type\":\"llama\"}".to_owned(), "num_attention_heads"),
        ] {
            let error = ModelConfig::parse(&text).unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn token_ids_may_be_a_number_or_a_list() {
        let text = format!("{{{BASE},\"bos_token_id\":1,\"eos_token_id\":[2,3]}}");
        let config = ModelConfig::parse(&text).unwrap();
        assert_eq!((config.bos, config.eos), (Some(1), vec![2, 3]));
    }
}
