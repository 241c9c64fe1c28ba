//! Gemma 3's text model (arXiv 2503.19786), alone or inside `Gemma3ForConditionalGeneration`: norms
//! on queries and keys, five layers with a window and a base of their own to one without.

use serde_json::json;

use super::gemma::TANH;
use super::gemma2::{LOGIT_CAP, SANDWICH, scalar};
use super::qwen3::norm_heads;
use super::{Defaults, GgufValue, HEAD_NORMS, Keys, LINEARS, MAX_BLOCKS, MAX_ROWS, ModelConfig, Result, SANDWICH_NORMS, gated, llama_like, local_rope, windows};
use crate::model::arch::gguf::{Gguf, PATTERN, WINDOW, read_windows, rename, set, write_windows};
use crate::model::arch::{Names, QueryNorm};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "gemma3",
    blocks: &[LINEARS, HEAD_NORMS, SANDWICH_NORMS],
    keys: &[WINDOW, PATTERN, LOGIT_CAP, LOCAL_BASE],
    write: |config| {
        let mut all = write_windows(config, 6);
        let local = config.spans().find(|span| span.window.is_some());
        if let Some(rope) = local.and_then(|span| span.rope.as_ref()) {
            all.push((LOCAL_BASE, GgufValue::Number(rope.theta)));
        }
        all.extend(config.arch.logit_cap.map(|cap| (LOGIT_CAP, GgufValue::Number(cap))));
        all
    },
    read: |keys, config| {
        rename(config, &[("hidden_act", "hidden_activation")]);
        set(
            config,
            [
                ("model_type", "gemma3_text".into()),
                ("hidden_activation", TANH.into()),
                ("query_pre_attn_scalar", scalar(config, 62)),
                ("final_logit_softcapping", json!(keys.number(LOGIT_CAP)?)),
                ("rope_local_base_freq", json!(keys.number(LOCAL_BASE)?.unwrap_or(10_000.0))),
            ],
        );
        read_windows(keys, config, None, 6)
    },
    ..Gguf::PLAIN
};

/// Base of the rotations of blocks with a window.
const LOCAL_BASE: &str = "rope.freq_base_swa";

/// What the text model's names start with: it depends on the release that saved the folder.
const ROOTS: &[&str] = &["language_model.model.", "model.language_model."];

/// The image encoder in the same file.
const BESIDE: &[&str] = &[
    "vision_tower.",
    "multi_modal_projector.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
];

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let Some(text) = keys.table(&["text_config"])? else { return read_text(keys) };
    let mut config = read_text(&text)?;
    text.refuse_unread("gemma3_text")?;
    config.arch.names =
        Names { roots: ROOTS, root: ROOTS[0], beside: BESIDE, ..config.arch.names };
    if config.bos.is_none() {
        config.bos = keys.tokens("bos_token_id", config.vocab)?.first().copied();
    }
    if config.eos.is_empty() {
        config.eos = keys.tokens("eos_token_id", config.vocab)?;
    }
    // The wrapped model caps no logits.
    config.arch.logit_cap = None;
    "gemma3".clone_into(&mut config.model_type);
    Ok(config)
}

fn read_text(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults {
        kv_heads: Some(4),
        max_positions: 131_072,
        theta: 1_000_000.0,
        ..Defaults::gemma()
    };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    config.as_gemma();
    config.arch.norms = SANDWICH;
    norm_heads(&mut config, QueryNorm::Head);
    // The first is a key of the family that no implementation applies.
    keys.positive("attn_logit_softcapping")?;
    config.arch.logit_cap = keys.positive("final_logit_softcapping")?;
    let scalar = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.arch.attention_scale = Some(scalar.powf(-0.5));
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.unwrap_or(4096);
    let pattern = keys.count(&["sliding_window_pattern", "_sliding_window_pattern"], MAX_BLOCKS)?;
    let pattern = pattern.unwrap_or(6);
    windows(keys, &mut config, Some(window), |index| (index + 1) % pattern != 0)?;
    let local = keys.positive("rope_local_base_freq")?.unwrap_or(10_000.0);
    local_rope(keys, &mut config, local)?;
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
