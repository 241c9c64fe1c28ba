//! Llama 2 and 3 (arXiv 2307.09288, 2407.21783), and the many models that are saved as it.

use super::{Defaults, INPUT_NORMS, Keys, LINEARS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::gguf::{ALL_FACTORS, Gguf, read_biases, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "llama",
    blocks: &[LINEARS, INPUT_NORMS],
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

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let config = llama_like(keys, &Defaults::default())?;
    let mut config = gated(config, [attention, attention, mlp]);
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
