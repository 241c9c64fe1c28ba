//! Mistral (arXiv 2310.06825): Llama with a window on every layer.

use super::{Defaults, Keys, MAX_ROWS, ModelConfig, Result, gated, llama_like};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults =
        Defaults { kv_heads: Some(8), max_positions: 4096 * 32, ..Defaults::default() };
    let mut config = gated(llama_like(keys, &defaults)?, [false; 3]);
    config.arch.spans[0].window = match keys.count(&["sliding_window"], MAX_ROWS)? {
        None if !keys.has("sliding_window") => Some(4096),
        window => window,
    };
    // llama.cpp has it as a Llama, which has no windows.
    config.arch.gguf = Some(&super::llama::GGUF);
    Ok(config)
}
