//! Ministral 3: Mistral with YaRN and queries that grow with their position.

use super::{Defaults, Keys, MAX_ROWS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::QueryScaling;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults {
        kv_heads: Some(8),
        head_dim: Some(128),
        max_positions: 262_144,
        norm_eps: 1e-5,
        ..Defaults::default()
    };
    let mut config = gated(llama_like(keys, &defaults)?, [false; 3]);
    config.arch.spans[0].window = keys.count(&["sliding_window"], MAX_ROWS)?;
    let rope = keys.table(&["rope_parameters", "rope_scaling"])?;
    if let Some(rope) = rope
        && let Some(beta) = rope.positive("llama_4_scaling_beta")?
    {
        let original = rope.needed_positive("original_max_position_embeddings")?;
        config.arch.query_scaling = Some(QueryScaling { beta, original });
    }
    Ok(config)
}
