//! A model as llama.cpp wants it: metadata keys, tensor names, and the order of q and k rows.
//!
//! Hugging Face rotates a head's first half against its second, ggml's `llama` rotates neighbours.
//! Rows of q and k (and their biases) are therefore reordered within each head. That permutes whole
//! rows, codes with their scales and zero points, so nothing is lost. Other families keep their rows.

use super::types::BlockType;
use super::value::Value;
use crate::error::{Error, Result};
use crate::model::{Gguf, ModelConfig, NormKind, Role, RopeScaling};

/// The tensor of rotation factors, `[head_dim / 2]`, F32; written for Llama 3.1's scaling only.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Version of ggml's block layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// How llama.cpp knows the model's family.
///
/// # Errors
/// When it does not, or the model has something that its metadata cannot say.
pub fn family(config: &ModelConfig) -> Result<&'static Gguf> {
    let kind = &config.model_type;
    let refused = |what: String| Error::preflight(what).fix("format.fewbit or format.dequantized");
    let Some(gguf) = config.arch.gguf else {
        return Err(refused(format!("format.gguf does not know models of type {kind} yet")));
    };
    for span in &config.arch.spans {
        if span.window.is_some() {
            return Err(refused(format!("format.gguf has no window of attention for {kind}")));
        }
        match span.rope.as_ref().map(|rope| &rope.scaling) {
            None
            | Some(
                RopeScaling::Default | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. },
            ) => {}
            Some(_) => {
                let what = "format.gguf holds rotations that are plain, linear or Llama 3.1's";
                return Err(refused(what.to_owned()));
            }
        }
    }
    Ok(gguf)
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
    let Gguf { architecture, .. } = family(config)?;
    let mut all: Vec<(String, Value)> = vec![
        ("general.architecture".to_owned(), (*architecture).into()),
        ("general.type".to_owned(), "model".into()),
        ("general.name".to_owned(), name.into()),
        ("general.file_type".to_owned(), mostly.file_type().into()),
        ("general.quantization_version".to_owned(), QUANTIZATION_VERSION.into()),
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
        let count = u32::try_from(count).map_err(|_| {
            Error::preflight(format!("{key} is {count}, more than GGUF's 32 bits hold"))
        })?;
        all.push((format!("{architecture}.{key}"), count.into()));
    }
    let epsilon = match config.arch.norm {
        NormKind::Rms | NormKind::RmsPlusOne => "layer_norm_rms_epsilon",
        NormKind::Layer | NormKind::LayerPlain => "layer_norm_epsilon",
    };
    let key = format!("{architecture}.attention.{epsilon}");
    all.push((key, (config.arch.norm_eps as f32).into()));
    if let Some(rope) = rope {
        all.push((format!("{architecture}.rope.freq_base"), (rope.theta as f32).into()));
        if let RopeScaling::Linear { factor } = rope.scaling {
            all.push((format!("{architecture}.rope.scaling.type"), "linear".into()));
            all.push((format!("{architecture}.rope.scaling.factor"), (factor as f32).into()));
        }
    }
    Ok(all)
}

/// By what each rotation frequency is divided, `[head_dim / 2]`: the values of [`ROPE_FACTORS`].
/// `None` for scalings that metadata keys express.
pub fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    let rope = config.arch.spans[0].rope.as_ref()?;
    let RopeScaling::Llama3 { .. } = rope.scaling else { return None };
    let mut plain = rope.clone();
    plain.scaling = RopeScaling::Default;
    let total = config.max_positions;
    let (frequencies, scaled) = (plain.inverse_frequencies(total), rope.inverse_frequencies(total));
    Some(frequencies.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
}

/// The name in a GGUF file of a tensor of the Hugging Face layout; `None` for one that the family does
/// not have.
pub fn tensor_name(name: &str, config: &ModelConfig) -> Option<String> {
    let (base, part) = name.rsplit_once('.')?;
    if part != "weight" && part != "bias" {
        return None;
    }
    let (gguf, names) = (config.arch.gguf?, &config.arch.names);
    let biased = config.arch.norm.vectors() == 2;
    if base == config.head() {
        return (part == "weight" || names.head_bias).then(|| format!("output.{part}"));
    }
    let Some((block, inner)) = config.inner(base) else {
        let top = base.strip_prefix(names.root)?;
        let positions = config.arch.positions.as_ref().map(|table| table.name);
        return match top {
            _ if top == names.embedding && part == "weight" => Some("token_embd.weight".to_owned()),
            _ if Some(top) == positions && part == "weight" => {
                Some("position_embd.weight".to_owned())
            }
            _ if Some(top) == names.norm && (part == "weight" || biased) => {
                Some(format!("output_norm.{part}"))
            }
            _ => None,
        };
    };
    let (_, theirs) = gguf.blocks.iter().find(|(ours, _)| *ours == inner)?;
    Some(format!("blk.{block}.{theirs}.{part}"))
}

/// The number of heads whose rows must be reordered in a tensor of the Hugging Face layout: q and k
/// projections, weight and bias, of a family that ggml rotates by neighbours. `None` for every other.
pub fn rotated_heads(name: &str, config: &ModelConfig) -> Option<usize> {
    let (base, _) = name.rsplit_once('.')?;
    let spec = config.arch.gguf.filter(|gguf| gguf.neighbours)?;
    let (_, inner) = config.inner(base).filter(|_| spec.neighbours)?;
    match config.linear(inner)?.role {
        Role::Query => Some(config.n_heads),
        Role::Key => Some(config.n_kv_heads),
        _ => None,
    }
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
        let heads = |inner| rotated_heads(&format!("model.layers.0.self_attn.{inner}"), &config);
        assert_eq!(heads("q_proj.weight"), Some(2));
        assert_eq!(heads("k_proj.bias"), Some(1));
        assert_eq!(heads("v_proj.weight"), None);
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
        assert_eq!(rope_factors(&plain), None);
        let linear = config(r#"{"rope_type": "linear", "factor": 2.0}"#);
        assert_eq!(get(&linear, "llama.rope.scaling.factor"), Some(Value::F32(2.0)));
        assert_eq!(rope_factors(&linear), None);
        // Wavelengths 6.3 and 628: the first is kept, the second divided.
        let llama3 = r#"{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 32}"#;
        assert_eq!(rope_factors(&config(llama3)).unwrap(), [1.0, 8.0]);
        let mut huge = plain;
        huge.vocab = 1 << 33;
        assert!(metadata(&huge, "m", BlockType::F32).is_err());
    }
}
