//! A model as llama.cpp wants it: metadata keys, tensor names, and the order of rows.
//!
//! Hugging Face rotates a head's first half against its second, some of ggml's families rotate
//! neighbours. Rows of q and k (and their biases) are reordered within each head there. GPT-NeoX has
//! query, key and value of each head in turn, ggml all queries first. Both permute whole rows, codes
//! with their scales and zero points, so nothing is lost. What a family has of its own stands in its
//! file, behind `model::Gguf`.

use std::collections::BTreeMap;

use fewbit_gguf::{BlockType, Value, ValueKind};

use super::folder::describe;
use super::keys::Keys;
use super::names::tensor_name;
use super::scaling::yarn_attention;
use crate::error::{Error, Result};
use crate::model::{Gguf, GgufValue, LONG_FACTORS, ModelConfig, ROPE_FACTORS, Role, RopeScaling};

/// Version of ggml's block layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// How llama.cpp knows the model's family.
///
/// # Errors
/// When it does not, or the model has something that a file of the family cannot say: its metadata,
/// read back, must describe what the model computes.
pub fn family(config: &ModelConfig) -> Result<&'static Gguf> {
    let kind = &config.model_type;
    let refused = |what: String| Error::preflight(what).fix("format.fewbit or format.dequantized");
    let Some(gguf) = config.arch.gguf else {
        return Err(refused(format!("format.gguf does not know models of type {kind} yet")));
    };
    let within = format!("llama.cpp's `{}`", gguf.architecture);
    let theirs = |name: &str| gguf.parts().find(|(ours, _)| *ours == name);
    for (name, bias) in parts(config) {
        let Some((_, stored)) = theirs(&name) else {
            return Err(refused(format!("{within} has no {name}")));
        };
        if bias && !gguf.biased.contains(&stored) {
            return Err(refused(format!("{within} has no bias on {name}")));
        }
    }
    let wrong_head = gguf.tied.filter(|tied| *tied != config.tied);
    if let Some(tied) = wrong_head {
        let head = if tied { "the embedding as its head" } else { "a head of its own" };
        return Err(refused(format!("{within} has {head}; this {kind} has not")));
    }
    if gguf.square && config.n_heads * config.head_dim != config.d_model {
        return Err(refused(format!("{within} has heads that are as wide as the model together")));
    }
    let entries = entries(config, gguf)?;
    let divisors = rope_factors(config);
    let shapes = config.tensors().into_iter();
    let shapes = shapes.filter_map(|(name, shape)| Some((tensor_name(&name, config)?, shape)));
    let factors = divisors.iter().map(|(name, values)| ((*name).to_owned(), vec![values.len()]));
    let shapes = shapes.chain(factors).collect();
    let described = describe(Keys(&entries), &shapes, &divisors)?;
    match config.computes(&ModelConfig::parse(&described.config().to_string())?) {
        None => Ok(gguf),
        Some(what) => Err(refused(format!("{within} cannot say this of a {kind}: {what}"))),
    }
}

/// The parts that some block has, each once, and whether they carry a bias: all experts' linears of one kind
/// are one.
fn parts(config: &ModelConfig) -> BTreeMap<String, bool> {
    let norms = config.block_norms().map(|(name, _)| (name.to_owned(), false));
    let specs = (0..config.n_blocks).flat_map(|index| config.specs(index));
    let linears = specs.map(|spec| {
        let name = match spec.expert {
            Some(expert) => spec.name.replace(&format!(".{expert}."), "."),
            None => spec.name.to_owned(),
        };
        (name, spec.bias)
    });
    let routers = config.arch.experts.iter().map(|experts| (experts.router.to_owned(), false));
    norms.chain(linears).chain(routers).collect()
}

/// The model's metadata, without the tokenizer's; `mostly` is what most weights are stored in.
///
/// # Errors
/// As [`family`], and when a number of the configuration does not fit in the format's 32 bits.
pub fn metadata(
    config: &ModelConfig,
    name: &str,
    mostly: BlockType,
) -> Result<Vec<(String, Value)>> {
    let mut all = entries(config, family(config)?)?;
    let more: [(&str, Value); 3] = [
        ("general.name", name.into()),
        ("general.file_type", mostly.file_type().into()),
        ("general.quantization_version", QUANTIZATION_VERSION.into()),
    ];
    all.splice(2..2, more.map(|(key, value)| (key.to_owned(), value)));
    Ok(all)
}

fn entries(config: &ModelConfig, gguf: &Gguf) -> Result<Vec<(String, Value)>> {
    let architecture = gguf.architecture;
    let mut all: Vec<(String, Value)> = vec![
        ("general.architecture".to_owned(), architecture.into()),
        ("general.type".to_owned(), "model".into()),
    ];
    let rope = config.arch.spans[0].rope.as_ref();
    let heads = rope.map(|_| config.head_dim);
    for (key, count) in [
        ("vocab_size", Some(config.vocab)),
        ("context_length", Some(config.max_positions)),
        ("embedding_length", Some(config.d_model)),
        ("block_count", Some(config.n_blocks)),
        ("feed_forward_length", Some(config.d_ff)),
        ("attention.head_count", Some(config.n_heads)),
        ("attention.head_count_kv", Some(config.n_kv_heads)),
        ("attention.key_length", heads),
        ("attention.value_length", heads),
        ("rope.dimension_count", rope.map(|rope| rope.dims)),
    ] {
        let Some(count) = count else { continue };
        all.push((format!("{architecture}.{key}"), counted(key, count)?));
    }
    let epsilon = if gguf.layer_norms { "layer_norm_epsilon" } else { "layer_norm_rms_epsilon" };
    let key = format!("{architecture}.attention.{epsilon}");
    all.push((key, (config.arch.norm_eps as f32).into()));
    if let Some(rope) = rope {
        all.push((format!("{architecture}.rope.freq_base"), (rope.theta as f32).into()));
        for (key, value) in scaling(&rope.scaling, gguf) {
            all.push((format!("{architecture}.rope.scaling.{key}"), value));
        }
    }
    for (key, value) in (gguf.write)(config) {
        let value = match value {
            GgufValue::Count(count) => counted(key, count)?,
            GgufValue::Number(number) => (number as f32).into(),
            GgufValue::Truth(truth) => truth.into(),
            GgufValue::Truths(truths) => {
                Value::List(ValueKind::Bool, truths.into_iter().map(Value::Bool).collect())
            }
        };
        all.push((format!("{architecture}.{key}"), value));
    }
    Ok(all)
}

fn counted(key: &str, count: usize) -> Result<Value> {
    let count = u32::try_from(count).map_err(|_| {
        Error::preflight(format!("{key} is {count}, more than GGUF's 32 bits hold"))
    })?;
    Ok(count.into())
}

/// What a scaling of rotations adds below `rope.scaling`.
fn scaling(scaling: &RopeScaling, gguf: &Gguf) -> Vec<(&'static str, Value)> {
    let number = |number: f64| Value::from(number as f32);
    let context = |original: f64| Value::from(original as u32);
    match scaling {
        RopeScaling::Default | RopeScaling::Dynamic { .. } | RopeScaling::Llama3 { .. } => {
            Vec::new()
        }
        RopeScaling::Linear { factor } => {
            vec![("type", "linear".into()), ("factor", number(*factor))]
        }
        RopeScaling::Yarn { factor, original, turns, attention, .. } => {
            let mut all = vec![
                ("type", "yarn".into()),
                ("factor", number(*factor)),
                ("original_context_length", context(*original)),
            ];
            // llama.cpp multiplies its own factor with this one.
            let more = attention / yarn_attention(*factor);
            if (more - 1.0).abs() > 1e-9 {
                all.push(("attn_factor", number(more)));
            }
            let [fast, slow] = turns.map(number);
            for (key, value) in [("yarn_beta_fast", fast), ("yarn_beta_slow", slow)] {
                if gguf.keys.contains(&format!("rope.scaling.{key}").as_str()) {
                    all.push((key, value));
                }
            }
            all
        }
        RopeScaling::Long { original, attention, .. } => vec![
            ("type", "longrope".into()),
            ("original_context_length", context(*original)),
            ("attn_factor", number(*attention)),
        ],
    }
}

/// By what each rotation frequency is divided, `[dims / 2]`, by the names of the tensors; none for
/// scalings that metadata keys express.
pub fn rope_factors(config: &ModelConfig) -> Vec<(&'static str, Vec<f32>)> {
    let Some(rope) = config.arch.spans[0].rope.as_ref() else { return Vec::new() };
    match &rope.scaling {
        RopeScaling::Llama3 { .. } => {
            let mut plain = rope.clone();
            plain.scaling = RopeScaling::Default;
            let total = config.max_positions;
            let both = [&plain, rope].map(|rope| rope.inverse_frequencies(total));
            let divisors = both[0].iter().zip(&both[1]).map(|(plain, scaled)| plain / scaled);
            vec![(ROPE_FACTORS, divisors.collect())]
        }
        RopeScaling::Long { long, short, .. } => {
            let narrow = |divisors: &[f64]| divisors.iter().map(|d| *d as f32).collect();
            vec![(LONG_FACTORS[0], narrow(long)), (LONG_FACTORS[1], narrow(short))]
        }
        _ => Vec::new(),
    }
}

/// How a file orders the rows of a linear, weight and bias.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rows {
    /// Queries or keys of so many heads, rotated by neighbours.
    Neighbours(usize),
    /// Queries, keys and values of so many heads, which the model has head by head.
    ByHead(usize),
}

impl Rows {
    /// The order of rows that a tensor of the Hugging Face layout has in a file; `None` where it is
    /// the same.
    pub fn of(name: &str, config: &ModelConfig) -> Option<Self> {
        let (base, _) = name.rsplit_once('.')?;
        let gguf = config.arch.gguf?;
        let (_, inner) = config.inner(base)?;
        match config.linear(inner)?.role {
            Role::Query if gguf.neighbours => Some(Self::Neighbours(config.n_heads)),
            Role::Key if gguf.neighbours => Some(Self::Neighbours(config.n_kv_heads)),
            Role::QueryKeyValueByHead => Some(Self::ByHead(config.n_heads)),
            _ => None,
        }
    }

    /// Into the order of a file. `values` is `[rows, any width]`, so that weights, codes, scales, zero
    /// points and biases (of width 1) go through the same function.
    ///
    /// # Errors
    /// When `rows` are not those of so many heads, or do not divide `values`.
    pub fn stored<T: Copy>(self, values: &[T], rows: usize) -> Result<Vec<T>> {
        match self {
            Self::Neighbours(heads) => interleave(values, rows, heads),
            Self::ByHead(heads) => turned(values, rows, [heads, 3]),
        }
    }

    /// The inverse of [`Rows::stored`].
    ///
    /// # Errors
    /// As [`Rows::stored`].
    pub fn ours<T: Copy>(self, values: &[T], rows: usize) -> Result<Vec<T>> {
        match self {
            Self::Neighbours(heads) => split_halves(values, rows, heads),
            Self::ByHead(heads) => turned(values, rows, [3, heads]),
        }
    }
}

/// `[outer, inner, rows of a head]` as `[inner, outer, rows of a head]`.
fn turned<T: Copy>(values: &[T], rows: usize, [outer, inner]: [usize; 2]) -> Result<Vec<T>> {
    let parts = outer * inner;
    if parts == 0 || rows == 0 || !rows.is_multiple_of(parts) || !values.len().is_multiple_of(rows)
    {
        return Err(Error::failed(format!(
            "{} values in {rows} rows are not {outer} times {inner} heads",
            values.len()
        )));
    }
    let head = rows / parts;
    Ok(reordered(values, rows, |row| {
        let (part, within) = (row / head, row % head);
        (part % outer * inner + part / outer) * head + within
    }))
}

/// Rows for rotating neighbours from rows for rotating halves. `values` is `[rows, any width]`, so
/// that weights, codes, scales, zero points and biases (of width 1) go through the same function.
///
/// # Errors
/// When `rows` are not `heads` heads of an even size or do not divide `values`.
pub fn interleave<T: Copy>(values: &[T], rows: usize, heads: usize) -> Result<Vec<T>> {
    let half = half_head(values.len(), rows, heads)?;
    Ok(reordered(values, rows, |row| {
        let (head, within) = (row / (2 * half), row % (2 * half));
        head * 2 * half + within % 2 * half + within / 2
    }))
}

/// The inverse of [`interleave`].
///
/// # Errors
/// As [`interleave`].
pub fn split_halves<T: Copy>(values: &[T], rows: usize, heads: usize) -> Result<Vec<T>> {
    let half = half_head(values.len(), rows, heads)?;
    Ok(reordered(values, rows, |row| {
        let (head, within) = (row / (2 * half), row % (2 * half));
        head * 2 * half + within % half * 2 + within / half
    }))
}

fn half_head(len: usize, rows: usize, heads: usize) -> Result<usize> {
    let fits = rows > 0 && heads > 0 && rows.is_multiple_of(2 * heads) && len.is_multiple_of(rows);
    if !fits {
        return Err(Error::failed(format!(
            "{len} values in {rows} rows are not {heads} heads of an even number of rows"
        )));
    }
    Ok(rows / heads / 2)
}

/// Row `i` of the result is row `from(i)` of `values`.
fn reordered<T: Copy>(values: &[T], rows: usize, from: impl Fn(usize) -> usize) -> Vec<T> {
    let width = values.len() / rows;
    (0..rows).flat_map(|row| values[from(row) * width..][..width].iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(scaling: &str) -> ModelConfig {
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 12, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 4, "vocab_size": 10, "max_position_embeddings": 32, "rms_norm_eps": 1e-5,
            "bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {scaling}}}"#
        );
        ModelConfig::parse(&text).unwrap()
    }

    #[test]
    fn names() {
        let config = config("null");
        for (ours, theirs) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ] {
            assert_eq!(tensor_name(ours, &config).as_deref(), Some(theirs));
        }
        for other in ["lm_head.bias", "model.layers.x.mlp.up_proj.weight", "w", "a.scale"] {
            assert_eq!(tensor_name(other, &config), None, "{other}");
        }
    }

    #[test]
    fn rows_of_a_head() {
        // Two heads of four rows, width 1: (0 1 | 2 3) becomes 0 2 1 3.
        let rows: Vec<u8> = (0..8).collect();
        assert_eq!(interleave(&rows, 8, 2).unwrap(), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(interleave(&rows, 4, 1).unwrap(), [0, 1, 4, 5, 2, 3, 6, 7]);
        for (rows, heads) in [(24, 1), (24, 2), (24, 3), (24, 6), (24, 12)] {
            let values: Vec<u32> = (0..rows as u32 * 5).collect();
            let there = interleave(&values, rows, heads).unwrap();
            assert_eq!(split_halves(&there, rows, heads).unwrap(), values);
        }
        assert!(interleave(&rows, 8, 8).is_err());
        assert!(interleave(&rows, 0, 1).is_err());
        assert!(interleave(&rows, 6, 1).is_err());
    }

    #[test]
    fn only_q_and_k_turn() {
        let config = config("null");
        let rows = |inner| Rows::of(&format!("model.layers.0.self_attn.{inner}"), &config);
        assert_eq!(rows("q_proj.weight"), Some(Rows::Neighbours(2)));
        assert_eq!(rows("k_proj.bias"), Some(Rows::Neighbours(1)));
        assert_eq!(rows("v_proj.weight"), None);
    }

    #[test]
    fn heads_are_sorted_by_part() {
        // Two heads of two rows: q q k k v v | q q k k v v.
        let rows: Vec<u8> = (0..12).collect();
        let stored = Rows::ByHead(2).stored(&rows, 12).unwrap();
        assert_eq!(stored, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]);
        assert_eq!(Rows::ByHead(2).ours(&stored, 12).unwrap(), rows);
        let wide: Vec<u16> = (0..90).collect();
        let stored = Rows::ByHead(5).stored(&wide, 30).unwrap();
        assert_eq!(Rows::ByHead(5).ours(&stored, 30).unwrap(), wide);
        assert!(Rows::ByHead(5).stored(&rows, 12).is_err());
    }

    #[test]
    fn keys_and_factors() {
        let get = |config: &ModelConfig, key: &str| {
            let all = metadata(config, "m", BlockType::Q4_0).unwrap();
            all.into_iter().find(|(name, _)| name == key).map(|(_, value)| value)
        };
        let plain = config("null");
        assert_eq!(get(&plain, "general.file_type"), Some(Value::U32(2)));
        assert_eq!(get(&plain, "llama.attention.head_count_kv"), Some(Value::U32(1)));
        assert_eq!(get(&plain, "llama.rope.scaling.type"), None);
        assert_eq!(rope_factors(&plain), []);
        let linear = config(r#"{"rope_type": "linear", "factor": 2.0}"#);
        assert_eq!(get(&linear, "llama.rope.scaling.factor"), Some(Value::F32(2.0)));
        assert_eq!(rope_factors(&linear), []);
        // Wavelengths 6.3 and 628: the first is kept, the second divided.
        let llama3 = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#;
        assert_eq!(rope_factors(&config(llama3)), [(ROPE_FACTORS, vec![1.0, 8.0])]);
        let mut huge = plain;
        huge.vocab = 1 << 33;
        assert!(metadata(&huge, "m", BlockType::F32).is_err());
    }
}
