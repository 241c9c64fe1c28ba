//! OLMo 2 (arXiv 2501.00656): norms on what attention and MLP add and none before, norms over the
//! whole width of queries and keys.

use super::qwen3::norm_heads;
use super::{Defaults, HEAD_NORMS, Keys, LINEARS, ModelConfig, OUTPUT_NORMS, Result, gated, llama_like};
use crate::model::arch::gguf::{Gguf, set};
use crate::model::arch::{BlockNorms, QueryNorm};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "olmo2",
    blocks: &[LINEARS, HEAD_NORMS, OUTPUT_NORMS],
    tied: Some(false),
    square: true,
    read: |_, config| {
        set(config, [("model_type", "olmo2".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

/// Norms on outputs only.
pub(super) const OUTPUTS: BlockNorms = BlockNorms {
    attention_input: None,
    attention_output: Some("post_attention_layernorm"),
    mlp_input: None,
    mlp_output: Some("post_feedforward_layernorm"),
    query: None,
    key: None,
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    read_with(keys, 10_000.0)
}

pub(super) fn read_with(keys: &Keys<'_>, theta: f64) -> Result<ModelConfig> {
    let defaults = Defaults { norm_eps: 1e-5, theta, ..Defaults::default() };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    config.arch.norms = OUTPUTS;
    norm_heads(&mut config, QueryNorm::Width);
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
