//! Shapes of published models: the facts of their `config.json`, to measure with, without a download.
//!
//! A test compares every one with the number of parameters that its publisher gives.

use serde_json::{Map, Value, json};

use super::arch::ModelConfig;
use crate::error::{Error, Result};

/// What a `config.json` says of a model.
struct Shape {
    name: &'static str,
    model_type: &'static str,
    /// Width, width of the MLP, blocks.
    sizes: [usize; 3],
    /// Query heads, key and value heads, width of a head.
    heads: [usize; 3],
    vocab: usize,
    context: usize,
    eps: f64,
    theta: f64,
    tied: bool,
    /// First and last token of a text.
    ends: [u32; 2],
    /// Further keys.
    more: More,
}

/// Keys that only some models have.
enum More {
    Nothing,
    /// Llama 3's long contexts, stretched by this factor.
    Stretched(f64),
    /// Gemma 2: its window, caps and scale of scores.
    Gemma2,
    /// Gemma 3: its window, base of local rotations and scale of scores.
    Gemma3,
}

const LLAMA_3: Shape = Shape {
    name: "",
    model_type: "llama",
    sizes: [0; 3],
    heads: [0; 3],
    vocab: 128_256,
    context: 131_072,
    eps: 1e-5,
    theta: 500_000.0,
    tied: false,
    ends: [128_000, 128_001],
    more: More::Stretched(8.0),
};

const SMOLLM2: Shape = Shape {
    vocab: 49_152,
    context: 8192,
    theta: 100_000.0,
    tied: true,
    ends: [0, 0],
    more: More::Nothing,
    ..LLAMA_3
};

const QWEN2: Shape = Shape {
    model_type: "qwen2",
    vocab: 151_936,
    context: 32_768,
    eps: 1e-6,
    theta: 1_000_000.0,
    tied: true,
    ends: [151_643, 151_643],
    more: More::Nothing,
    ..LLAMA_3
};

const QWEN3: Shape =
    Shape { model_type: "qwen3", context: 40_960, ends: [151_643, 151_645], ..QWEN2 };

#[rustfmt::skip] // a model a line
const SHAPES: &[Shape] = &[
    Shape { name: "smollm2-135m", sizes: [576, 1536, 30], heads: [9, 3, 64], ..SMOLLM2 },
    Shape { name: "smollm2-360m", sizes: [960, 2560, 32], heads: [15, 5, 64], ..SMOLLM2 },
    Shape { name: "smollm2-1.7b", sizes: [2048, 8192, 24], heads: [32, 32, 64], theta: 130_000.0, ..SMOLLM2 },
    Shape { name: "qwen2.5-0.5b", sizes: [896, 4864, 24], heads: [14, 2, 64], ..QWEN2 },
    Shape { name: "qwen2.5-1.5b", sizes: [1536, 8960, 28], heads: [12, 2, 128], context: 131_072, ..QWEN2 },
    Shape { name: "qwen2.5-3b", sizes: [2048, 11_008, 36], heads: [16, 2, 128], ..QWEN2 },
    Shape { name: "qwen2.5-7b", sizes: [3584, 18_944, 28], heads: [28, 4, 128], vocab: 152_064, context: 131_072, tied: false, ..QWEN2 },
    Shape { name: "qwen3-0.6b", sizes: [1024, 3072, 28], heads: [16, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-1.7b", sizes: [2048, 6144, 28], heads: [16, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-4b", sizes: [2560, 9728, 36], heads: [32, 8, 128], ..QWEN3 },
    Shape { name: "qwen3-8b", sizes: [4096, 12_288, 36], heads: [32, 8, 128], tied: false, ..QWEN3 },
    Shape { name: "llama-3.2-1b", sizes: [2048, 8192, 16], heads: [32, 8, 64], tied: true, more: More::Stretched(32.0), ..LLAMA_3 },
    Shape { name: "llama-3.2-3b", sizes: [3072, 8192, 28], heads: [24, 8, 128], tied: true, more: More::Stretched(32.0), ..LLAMA_3 },
    Shape { name: "llama-3.1-8b", sizes: [4096, 14_336, 32], heads: [32, 8, 128], ..LLAMA_3 },
    Shape { name: "llama-3.1-70b", sizes: [8192, 28_672, 80], heads: [64, 8, 128], ..LLAMA_3 },
    Shape { name: "llama-2-7b", sizes: [4096, 11_008, 32], heads: [32, 32, 128], vocab: 32_000, context: 4096, theta: 10_000.0, ends: [1, 2], more: More::Nothing, ..LLAMA_3 },
    Shape { name: "llama-2-13b", sizes: [5120, 13_824, 40], heads: [40, 40, 128], vocab: 32_000, context: 4096, theta: 10_000.0, ends: [1, 2], more: More::Nothing, ..LLAMA_3 },
    Shape { name: "mistral-7b", model_type: "mistral", sizes: [4096, 14_336, 32], heads: [32, 8, 128], vocab: 32_768, context: 32_768, theta: 1_000_000.0, ends: [1, 2], more: More::Nothing, ..LLAMA_3 },
    Shape { name: "gemma-2-2b", model_type: "gemma2", sizes: [2304, 9216, 26], heads: [8, 4, 256], vocab: 256_000, context: 8192, eps: 1e-6, theta: 10_000.0, tied: true, ends: [2, 1], more: More::Gemma2 },
    Shape { name: "gemma-3-1b", model_type: "gemma3_text", sizes: [1152, 6912, 26], heads: [4, 1, 256], vocab: 262_144, context: 32_768, eps: 1e-6, theta: 1_000_000.0, tied: true, ends: [2, 1], more: More::Gemma3 },
];

/// The published models whose shape is known, by family and size.
pub fn known_shapes() -> impl Iterator<Item = &'static str> {
    SHAPES.iter().map(|shape| shape.name)
}

/// What the `config.json` of a published model says of its shape; for instance of `llama-3.2-1b`.
///
/// # Errors
/// A usage error that lists the known ones.
pub fn known_config(name: &str) -> Result<Map<String, Value>> {
    let wanted = name.to_lowercase();
    let Some(shape) = SHAPES.iter().find(|shape| shape.name == wanted) else {
        let known: Vec<&str> = known_shapes().collect();
        return Err(Error::usage(format!("the shape of `{name}` is not known"))
            .fix(format!("one of: {}; or a config.json", known.join(", "))));
    };
    Ok(shape.config())
}

impl Shape {
    fn config(&self) -> Map<String, Value> {
        let gemma = matches!(self.more, More::Gemma2 | More::Gemma3);
        let Value::Object(mut config) = json!({
            "model_type": self.model_type,
            "hidden_size": self.sizes[0],
            "intermediate_size": self.sizes[1],
            "num_hidden_layers": self.sizes[2],
            "num_attention_heads": self.heads[0],
            "num_key_value_heads": self.heads[1],
            "head_dim": self.heads[2],
            "vocab_size": self.vocab,
            "max_position_embeddings": self.context,
            "hidden_act": if gemma { "gelu_pytorch_tanh" } else { "silu" },
            "rms_norm_eps": self.eps,
            "rope_theta": self.theta,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.ends[0],
            "eos_token_id": self.ends[1],
            "torch_dtype": "bfloat16",
        }) else {
            return Map::new();
        };
        let more = match self.more {
            More::Nothing => json!({}),
            More::Stretched(factor) => json!({ "rope_scaling": {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            } }),
            More::Gemma2 => json!({
                "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": 4096,
                "attn_logit_softcapping": 50.0,
                "final_logit_softcapping": 30.0,
                "query_pre_attn_scalar": 256,
            }),
            More::Gemma3 => json!({
                "hidden_activation": "gelu_pytorch_tanh",
                "sliding_window": 512,
                "sliding_window_pattern": 6,
                "rope_local_base_freq": 10_000.0,
                "query_pre_attn_scalar": 256,
            }),
        };
        let architecture = match self.model_type {
            "qwen2" => "Qwen2ForCausalLM",
            "qwen3" => "Qwen3ForCausalLM",
            "mistral" => "MistralForCausalLM",
            "gemma2" => "Gemma2ForCausalLM",
            "gemma3_text" => "Gemma3ForCausalLM",
            _ => "LlamaForCausalLM",
        };
        config.insert("architectures".to_owned(), json!([architecture]));
        if let Value::Object(more) = more {
            config.extend(more);
        }
        config
    }
}

impl ModelConfig {
    /// The shape of a published model, see [`known_config`].
    ///
    /// # Errors
    /// A usage error that lists the known ones.
    pub fn like(name: &str) -> Result<Self> {
        Self::parse(&Value::Object(known_config(name)?).to_string())
    }

    /// Values of all its tensors, a tied head counted once.
    pub fn parameters(&self) -> u64 {
        let sizes = self.tensors().into_iter();
        sizes.map(|(_, shape)| shape.iter().map(|&size| size as u64).product::<u64>()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the publishers' files hold.
    const PARAMETERS: [(&str, u64); 20] = [
        ("smollm2-135m", 134_515_008),
        ("smollm2-360m", 361_821_120),
        ("smollm2-1.7b", 1_711_376_384),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-2-7b", 6_738_415_616),
        ("llama-2-13b", 13_015_864_320),
        ("mistral-7b", 7_248_023_552),
        ("gemma-2-2b", 2_614_341_888),
        ("gemma-3-1b", 999_885_952),
    ];

    #[test]
    fn every_shape_has_the_published_number_of_parameters() {
        let found: Vec<(&str, u64)> = known_shapes()
            .map(|name| (name, ModelConfig::like(name).unwrap().parameters()))
            .collect();
        assert_eq!(found, PARAMETERS);
    }

    #[test]
    fn an_unknown_name_lists_the_known_ones() {
        let error = known_config("llama-4").unwrap_err();
        assert_eq!(error.kind().exit_code(), 2);
        assert!(error.to_string().contains("qwen2.5-0.5b, "), "{error}");
        assert!(known_config("Llama-3.2-1B").is_ok());
    }
}
