//! Qwen2 and 2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values.

use super::{Defaults, INPUT_NORMS, Keys, LINEARS, MAX_BLOCKS, MAX_ROWS, ModelConfig, Result, gated, llama_like, windows};
use crate::model::arch::gguf::{Gguf, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "qwen2",
    blocks: &[LINEARS, INPUT_NORMS],
    biased: &["attn_q", "attn_k", "attn_v"],
    read: |_, config| {
        set(config, [("model_type", "qwen2".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { kv_heads: Some(32), max_positions: 32_768, ..Defaults::default() };
    let mut config = gated(llama_like(keys, &defaults)?, [true, false, false]);
    late_windows(keys, &mut config)?;
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}

/// Windows on the blocks from `max_window_layers` on, where `use_sliding_window` asks for them.
pub(super) fn late_windows(keys: &Keys<'_>, config: &mut ModelConfig) -> Result<()> {
    let used = keys.flag("use_sliding_window", false)?;
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.filter(|_| used);
    let first = keys.count(&["max_window_layers"], MAX_BLOCKS)?.unwrap_or(28);
    windows(keys, config, window, |index| index >= first)
}
