//! EXAONE 4 (arXiv 2507.11407): norms on outputs and on the heads of queries and keys; three layers
//! with a window to one that sees everything and is not rotated.

use super::qwen3::norm_heads;
use super::{Defaults, HEAD_NORMS, Keys, LINEARS, MAX_ROWS, ModelConfig, OUTPUT_NORMS, Result, gated, llama_like, windows};
use crate::model::arch::QueryNorm;
use crate::model::arch::gguf::{ROPE_FACTORS, Gguf, PATTERN, WINDOW, read_windows, set, write_windows};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "exaone4",
    blocks: &[LINEARS, HEAD_NORMS, OUTPUT_NORMS],
    square: true,
    divisors: &[ROPE_FACTORS],
    keys: &[WINDOW, PATTERN],
    write: |config| write_windows(config, 4),
    read: |keys, config| {
        set(config, [("model_type", "exaone4".into()), ("sliding_window", serde_json::Value::Null)]);
        // llama.cpp has windows in the model of 64 blocks, and in no other.
        if config["num_hidden_layers"] == 64 {
            read_windows(keys, config, Some(4096), 4)?;
        }
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { norm_eps: 1e-5, kv_heads: Some(32), ..Defaults::default() };
    let mut config = gated(llama_like(keys, &defaults)?, [false; 3]);
    config.arch.norms = super::olmo2::OUTPUTS;
    norm_heads(&mut config, QueryNorm::Head);
    let window = match keys.count(&["sliding_window"], MAX_ROWS)? {
        None if !keys.has("sliding_window") => Some(4096),
        window => window,
    };
    // A number, or a text such as LLLG with L for a window.
    let pattern: Vec<bool> = match keys.text(&["sliding_window_pattern"]) {
        Ok(Some(text)) if !text.is_empty() => text.chars().map(|kind| kind == 'L').collect(),
        Ok(_) => vec![true, true, true, false],
        Err(_) => {
            let every = keys.count(&["sliding_window_pattern"], MAX_ROWS)?.unwrap_or(4);
            (1..=every).map(|place| place < every).collect()
        }
    };
    let slides = |index: usize| window.is_some() && pattern[index % pattern.len()];
    windows(keys, &mut config, window, slides)?;
    // Rotation goes with the window; without windows every layer has it.
    if window.is_some() {
        let span_of = config.arch.span_of.clone();
        let spans = config.arch.spans.clone();
        config.without_rope(|index| spans[span_of[index]].window.is_none());
    }
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
