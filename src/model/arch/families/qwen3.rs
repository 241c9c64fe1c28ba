//! Qwen3 (arXiv 2505.09388): Llama with heads of a width of their own, and norms on queries and keys.

use super::qwen2::late_windows;
use super::{Defaults, Keys, ModelConfig, Result, gated, llama_like};
use crate::model::arch::QueryNorm;
use crate::model::arch::gguf::{Gguf, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "qwen3",
    blocks: NAMES,
    read: |_, config| {
        set(config, [("model_type", "qwen3".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

/// llama.cpp's names where queries and keys are normed.
pub(super) const NAMES: &[(&str, &str)] = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults {
        kv_heads: Some(32),
        head_dim: Some(128),
        max_positions: 32_768,
        ..Defaults::default()
    };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    norm_heads(&mut config, QueryNorm::Head);
    late_windows(keys, &mut config)?;
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}

/// Norms on queries and keys, under the names that they have everywhere.
pub(super) fn norm_heads(config: &mut ModelConfig, over: QueryNorm) {
    config.arch.query_norm = Some(over);
    config.arch.norms.query = Some("self_attn.q_norm");
    config.arch.norms.key = Some("self_attn.k_norm");
}
