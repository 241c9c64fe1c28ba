//! Granite 3: Llama with four multipliers.

use super::{Defaults, Keys, ModelConfig, Result, gated, llama_like};
use crate::model::arch::Multipliers;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let mut config =
        gated(llama_like(keys, &Defaults::default())?, [attention, attention, mlp]);
    config.arch.attention_scale = Some(keys.positive("attention_multiplier")?.unwrap_or(1.0));
    config.arch.multipliers = Multipliers {
        embedding: keys.positive("embedding_multiplier")?.unwrap_or(1.0),
        residual: keys.positive("residual_multiplier")?.unwrap_or(1.0),
        logits: 1.0 / keys.positive("logits_scaling")?.unwrap_or(1.0),
    };
    Ok(config)
}
