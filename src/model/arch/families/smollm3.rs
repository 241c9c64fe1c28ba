//! SmolLM3: Llama without rotary positions in every fourth layer.

use super::qwen2::late_windows;
use super::{Defaults, INPUT_NORMS, Keys, LINEARS, MAX_BLOCKS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::Span;
use crate::model::arch::gguf::{Gguf, read_biases, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "smollm3",
    blocks: &[LINEARS, INPUT_NORMS],
    neighbours: true,
    read: |keys, config| {
        read_biases(keys, config);
        // llama.cpp knows no other.
        set(config, [("model_type", "smollm3".into()), ("no_rope_layer_interval", 4.into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults {
        kv_heads: Some(4),
        max_positions: 32_768,
        theta: 2_000_000.0,
        tied: true,
        ..Defaults::default()
    };
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let mut config = gated(llama_like(keys, &defaults)?, [attention, attention, mlp]);
    late_windows(keys, &mut config)?;
    let interval = keys.count(&["no_rope_layer_interval"], MAX_BLOCKS)?.unwrap_or(4);
    // 1 where a layer rotates.
    let rotates: Vec<bool> = match keys.integers("no_rope_layers")? {
        Some(list) if list.len() == config.n_blocks => list.iter().map(|flag| *flag != 0).collect(),
        Some(list) if !list.is_empty() => {
            let fix = format!("{}, one for each layer", config.n_blocks);
            return Err(keys.refuse("no_rope_layers", format!("{} entries", list.len()), &fix));
        }
        _ => (0..config.n_blocks).map(|index| (index + 1) % interval != 0).collect(),
    };
    config.without_rope(|index| !rotates[index]);
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}

impl ModelConfig {
    /// Takes rotation from some blocks.
    pub(super) fn without_rope(&mut self, none: impl Fn(usize) -> bool) {
        let arch = &mut self.arch;
        for index in 0..self.n_blocks {
            if none(index) {
                let bare = Span { rope: None, ..arch.spans[arch.span_of[index]].clone() };
                let known = arch.spans.iter().position(|span| *span == bare);
                arch.span_of[index] = known.unwrap_or_else(|| {
                    arch.spans.push(bare);
                    arch.spans.len() - 1
                });
            }
        }
    }
}
