//! Ministral 3: Mistral with YaRN and queries that grow with their position.

use super::{Defaults, GgufValue, INPUT_NORMS, Keys, LINEARS, MAX_ROWS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::QueryScaling;
use crate::model::arch::gguf::{ALL_FACTORS, Gguf, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "mistral3",
    blocks: &[LINEARS, INPUT_NORMS],
    neighbours: true,
    divisors: ALL_FACTORS,
    keys: &[
        GROWTH,
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    ],
    write: |config| {
        let beta = config.arch.query_scaling.map(|growing| GgufValue::Number(growing.beta));
        beta.map(|beta| (GROWTH, beta)).into_iter().collect()
    },
    read: |keys, config| {
        set(config, [("model_type", "ministral3".into())]);
        let beta = keys.number(GROWTH)?.filter(|beta| *beta != 0.0);
        if let (Some(beta), Some(scaling)) =
            (beta, config.get_mut("rope_scaling").and_then(|scaling| scaling.as_object_mut()))
        {
            scaling.insert("llama_4_scaling_beta".to_owned(), beta.into());
        }
        Ok(())
    },
    ..Gguf::PLAIN
};

/// By how much queries grow with their position.
const GROWTH: &str = "attention.temperature_scale";

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
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
