//! Gemma 2 (arXiv 2408.00118): norms on both sides of attention and MLP, capped scores and logits, a
//! window in every other layer.

use super::{Defaults, Keys, MAX_ROWS, ModelConfig, Result, gated, llama_like, windows};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { kv_heads: Some(4), ..Defaults::gemma() };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    config.as_gemma();
    config.arch.norms = SANDWICH;
    let capped = |name: &str, default: f64| -> Result<Option<f64>> {
        Ok(match keys.positive(name)? {
            None if !keys.has(name) => Some(default),
            cap => cap,
        })
    };
    config.arch.score_cap = capped("attn_logit_softcapping", 50.0)?;
    config.arch.logit_cap = capped("final_logit_softcapping", 30.0)?;
    let scalar = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.arch.attention_scale = Some(scalar.powf(-0.5));
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.unwrap_or(4096);
    windows(keys, &mut config, Some(window), |index| index % 2 == 0)?;
    Ok(config)
}

use crate::model::arch::BlockNorms;

/// Norms on both sides of attention and MLP.
pub(super) const SANDWICH: BlockNorms = BlockNorms {
    attention_input: Some("input_layernorm"),
    attention_output: Some("post_attention_layernorm"),
    mlp_input: Some("pre_feedforward_layernorm"),
    mlp_output: Some("post_feedforward_layernorm"),
    query: None,
    key: None,
};
