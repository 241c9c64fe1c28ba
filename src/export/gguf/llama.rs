//! A Llama as llama.cpp wants it: metadata keys, tensor names, and the order of q and k rows.
//!
//! Hugging Face rotates a head's first half against its second, ggml's `llama` rotates neighbours.
//! Rows of q and k (and their biases) are therefore reordered within each head. That permutes whole
//! rows, codes with their scales and zero points, so nothing is lost.

use super::types::BlockType;
use super::value::Value;
use crate::error::{Error, Result};
use crate::export::matrix::Affine;
use crate::model::{ModelConfig, RopeScaling};

/// The tensor of rotation factors, `[head_dim / 2]`, F32; written for Llama 3.1's scaling only.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Version of ggml's block layouts.
const QUANTIZATION_VERSION: u32 = 2;

/// Names below `model.layers.N.`, without `weight` or `bias`.
pub(super) const BLOCK_NAMES: [(&str, &str); 9] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// The model's metadata, without the tokenizer's; `mostly` is what most weights are stored in.
///
/// # Errors
/// When a number of the configuration does not fit in the format's 32 bits.
pub fn metadata(
    config: &ModelConfig,
    name: &str,
    mostly: BlockType,
) -> Result<Vec<(String, Value)>> {
    let mut all: Vec<(String, Value)> = vec![
        ("general.architecture".to_owned(), "llama".into()),
        ("general.type".to_owned(), "model".into()),
        ("general.name".to_owned(), name.into()),
        ("general.file_type".to_owned(), mostly.file_type().into()),
        ("general.quantization_version".to_owned(), QUANTIZATION_VERSION.into()),
    ];
    for (key, count) in [
        ("vocab_size", config.vocab),
        ("context_length", config.max_positions),
        ("embedding_length", config.d_model),
        ("block_count", config.n_blocks),
        ("feed_forward_length", config.d_ff),
        ("attention.head_count", config.n_heads),
        ("attention.head_count_kv", config.n_kv_heads),
        ("attention.key_length", config.head_dim),
        ("attention.value_length", config.head_dim),
        ("rope.dimension_count", config.head_dim),
    ] {
        let count = u32::try_from(count).map_err(|_| {
            Error::preflight(format!("{key} is {count}, more than GGUF's 32 bits hold"))
        })?;
        all.push((format!("llama.{key}"), count.into()));
    }
    for (key, number) in [
        ("attention.layer_norm_rms_epsilon", config.norm_eps),
        ("rope.freq_base", config.rope.theta),
    ] {
        all.push((format!("llama.{key}"), (number as f32).into()));
    }
    if let RopeScaling::Linear { factor } = config.rope.scaling {
        all.push(("llama.rope.scaling.type".to_owned(), "linear".into()));
        all.push(("llama.rope.scaling.factor".to_owned(), (factor as f32).into()));
    }
    Ok(all)
}

/// By what each rotation frequency is divided, `[head_dim / 2]`: the values of [`ROPE_FACTORS`].
/// `None` for scalings that metadata keys express.
pub fn rope_factors(config: &ModelConfig) -> Option<Vec<f32>> {
    let RopeScaling::Llama3 { .. } = config.rope.scaling else { return None };
    let mut plain = config.rope.clone();
    plain.scaling = RopeScaling::Default;
    let frequencies = plain.inverse_frequencies(config.head_dim);
    let scaled = config.rope.inverse_frequencies(config.head_dim);
    Some(frequencies.iter().zip(scaled).map(|(plain, scaled)| plain / scaled).collect())
}

/// The name in a GGUF file of a tensor of the Hugging Face layout; `None` for one that a Llama does
/// not have.
pub fn tensor_name(name: &str) -> Option<String> {
    let (base, part) = name.rsplit_once('.')?;
    if part != "weight" && part != "bias" {
        return None;
    }
    let top = match base {
        "model.embed_tokens" => Some("token_embd"),
        "model.norm" => Some("output_norm"),
        "lm_head" => Some("output"),
        _ => None,
    };
    if let Some(top) = top {
        return (part == "weight").then(|| format!("{top}.weight"));
    }
    let (block, inner) = base.strip_prefix("model.layers.")?.split_once('.')?;
    let block: usize = block.parse().ok()?;
    let (_, theirs) = BLOCK_NAMES.iter().find(|(ours, _)| *ours == inner)?;
    Some(format!("blk.{block}.{theirs}.{part}"))
}

/// The number of heads whose rows must be reordered in a tensor of the Hugging Face layout: q and k
/// projections, weight and bias. `None` for every other tensor.
pub fn rotated_heads(name: &str, config: &ModelConfig) -> Option<usize> {
    let (base, _) = name.rsplit_once('.')?;
    if base.ends_with(".self_attn.q_proj") {
        Some(config.n_heads)
    } else if base.ends_with(".self_attn.k_proj") {
        Some(config.n_kv_heads)
    } else {
        None
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

/// A quantized weight with its rows interleaved.
#[derive(Clone, Debug)]
pub struct Interleaved {
    codes: Vec<u8>,
    scale: Vec<f32>,
    zero: Vec<f32>,
}

impl Interleaved {
    /// [`interleave`] on codes, scales and zero points of the linear `name`.
    ///
    /// # Errors
    /// As [`interleave`] and [`Affine::check`].
    pub fn new(name: &str, weight: &Affine<'_>, heads: usize) -> Result<Self> {
        weight.check(name)?;
        Ok(Self {
            codes: interleave(weight.codes, weight.out, heads)?,
            scale: interleave(weight.scale, weight.out, heads)?,
            zero: interleave(weight.zero, weight.out, heads)?,
        })
    }

    /// The weight that it was made of, in the new order.
    pub fn affine<'a>(&'a self, weight: &Affine<'a>) -> Affine<'a> {
        let Self { codes, scale, zero } = self;
        Affine { codes, scale, zero, ..*weight }
    }
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
    use crate::model::Rope;
    use crate::quant::ZeroKind;

    fn config(scaling: RopeScaling) -> ModelConfig {
        ModelConfig {
            model_type: "llama".to_owned(),
            d_model: 8,
            d_ff: 16,
            n_blocks: 2,
            n_heads: 2,
            n_kv_heads: 1,
            head_dim: 4,
            vocab: 10,
            max_positions: 32,
            norm_eps: 1e-5,
            rope: Rope { theta: 1e4, scaling },
            tied: false,
            attention_bias: false,
            mlp_bias: false,
            bos: Some(1),
            eos: vec![2],
        }
    }

    #[test]
    fn names() {
        for (ours, theirs) in [
            ("model.embed_tokens.weight", "token_embd.weight"),
            ("lm_head.weight", "output.weight"),
            ("model.norm.weight", "output_norm.weight"),
            ("model.layers.11.self_attn.q_proj.bias", "blk.11.attn_q.bias"),
            ("model.layers.0.mlp.down_proj.weight", "blk.0.ffn_down.weight"),
            ("model.layers.0.post_attention_layernorm.weight", "blk.0.ffn_norm.weight"),
        ] {
            assert_eq!(tensor_name(ours).as_deref(), Some(theirs));
        }
        for other in ["lm_head.bias", "model.layers.x.mlp.up_proj.weight", "w", "a.scale"] {
            assert_eq!(tensor_name(other), None, "{other}");
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
    fn codes_take_their_scales_along() {
        let (codes, scale) = ([0, 1, 2, 3, 4, 5, 6, 7], [1.0, 2.0, 3.0, 4.0]);
        let zero = [5.0, 6.0, 7.0, 8.0];
        let weight = Affine {
            out: 4,
            inputs: 2,
            group_len: 2,
            bits: 3,
            codes: &codes,
            scale: &scale,
            zero: &zero,
            zero_kind: ZeroKind::Integer,
        };
        let interleaved = Interleaved::new("q", &weight, 1).unwrap();
        let affine = interleaved.affine(&weight);
        assert_eq!(affine.codes, [0, 1, 4, 5, 2, 3, 6, 7]);
        assert_eq!(
            (affine.scale, affine.zero),
            (&[1.0, 3.0, 2.0, 4.0][..], &[5.0, 7.0, 6.0, 8.0][..])
        );
        assert!(Interleaved::new("q", &weight, 4).is_err());
    }

    #[test]
    fn only_q_and_k_turn() {
        let config = config(RopeScaling::Default);
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
        let plain = config(RopeScaling::Default);
        assert_eq!(get(&plain, "general.file_type"), Some(Value::U32(2)));
        assert_eq!(get(&plain, "llama.attention.head_count_kv"), Some(Value::U32(1)));
        assert_eq!(get(&plain, "llama.rope.scaling.type"), None);
        assert_eq!(rope_factors(&plain), None);
        let linear = config(RopeScaling::Linear { factor: 2.0 });
        assert_eq!(get(&linear, "llama.rope.scaling.factor"), Some(Value::F32(2.0)));
        assert_eq!(rope_factors(&linear), None);
        // Wavelengths 6.3 and 628: the first is kept, the second divided.
        let llama3 = RopeScaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 32.0 };
        assert_eq!(rope_factors(&config(llama3)).unwrap(), [1.0, 8.0]);
        let mut huge = plain;
        huge.vocab = 1 << 33;
        assert!(metadata(&huge, "m", BlockType::F32).is_err());
    }
}
