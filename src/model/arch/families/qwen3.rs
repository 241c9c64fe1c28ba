//! Qwen3 (arXiv 2505.09388): Llama with heads of a width of their own, and norms on queries and keys.

use super::qwen2::late_windows;
use super::{Defaults, HEAD_NORMS, INPUT_NORMS, Keys, LINEARS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::QueryNorm;
use crate::model::arch::gguf::{Gguf, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "qwen3",
    blocks: &[LINEARS, HEAD_NORMS, INPUT_NORMS],
    read: |_, config| {
        set(config, [("model_type", "qwen3".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

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
