//! HyperCLOVA X SEED: Llama with multipliers, and norms on what attention and MLP add where
//! `use_post_norm` asks for them.

use super::{Defaults, Keys, ModelConfig, Result, gated, llama_like};
use crate::model::arch::Multipliers;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let mut config =
        gated(llama_like(keys, &Defaults::default())?, [attention, attention, mlp]);
    config.arch.attention_scale = keys.positive("attention_multiplier")?;
    config.arch.multipliers = Multipliers {
        embedding: keys.positive("embedding_multiplier")?.unwrap_or(1.0),
        residual: keys.positive("residual_multiplier")?.unwrap_or(1.0),
        logits: keys.positive("logits_scaling")?.unwrap_or(1.0),
    };
    if keys.flag("use_post_norm", false)? {
        config.arch.norms.attention_output = Some("post_norm1");
        config.arch.norms.mlp_output = Some("post_norm2");
    }
    Ok(config)
}
