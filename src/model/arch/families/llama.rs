//! Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and the many models that are saved as it.

use super::{Defaults, Keys, ModelConfig, Result, gated, llama_like};
use crate::model::arch::gguf::{ALL_FACTORS, Gguf, read_biases, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "llama",
    blocks: NAMES,
    biased: BIASED,
    neighbours: true,
    divisors: ALL_FACTORS,
    read: |keys, config| {
        read_biases(keys, config);
        set(config, [("model_type", "llama".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

/// Linears that may carry biases, by llama.cpp's names.
pub(super) const BIASED: &[&str] =
    &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];

/// llama.cpp's names of the parts that most families share.
pub(super) const NAMES: &[(&str, &str)] = &[
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

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let config = llama_like(keys, &Defaults::default())?;
    let mut config = gated(config, [attention, attention, mlp]);
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
