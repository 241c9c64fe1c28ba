//! Gemma 2 (arXiv 2408.00118): norms on both sides of attention and MLP, capped scores and logits, a
//! window in every other layer.

use serde_json::json;

use super::gemma::TANH;
use super::{Defaults, GgufValue, Keys, LINEARS, MAX_ROWS, ModelConfig, Result, SANDWICH_NORMS, gated, llama_like, windows};
use crate::model::arch::BlockNorms;
use crate::model::arch::gguf::{Gguf, PATTERN, WINDOW, read_windows, rename, set, write_windows};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "gemma2",
    blocks: &[LINEARS, SANDWICH_NORMS],
    tied: Some(true),
    keys: &[WINDOW, PATTERN, SCORE_CAP, LOGIT_CAP],
    write: |config| {
        let mut all = write_windows(config, 2);
        for (key, cap) in [(SCORE_CAP, config.arch.score_cap), (LOGIT_CAP, config.arch.logit_cap)] {
            all.extend(cap.map(|cap| (key, GgufValue::Number(cap))));
        }
        all
    },
    read: |keys, config| {
        rename(config, &[("hidden_act", "hidden_activation")]);
        set(
            config,
            [
                ("model_type", "gemma2".into()),
                ("hidden_activation", TANH.into()),
                ("query_pre_attn_scalar", scalar(config, 46)),
                // llama.cpp's own where a file is silent.
                ("attn_logit_softcapping", json!(keys.number(SCORE_CAP)?.unwrap_or(50.0))),
                ("final_logit_softcapping", json!(keys.number(LOGIT_CAP)?.unwrap_or(30.0))),
            ],
        );
        read_windows(keys, config, Some(4096), 2)
    },
    ..Gguf::PLAIN
};

const SCORE_CAP: &str = "attn_logit_softcapping";
pub(super) const LOGIT_CAP: &str = "final_logit_softcapping";

/// The scale of scores is in no key: it follows from the width of a head, and in the largest model,
/// which llama.cpp tells by its blocks, from the model's.
pub(super) fn scalar(config: &serde_json::Map<String, serde_json::Value>, largest: u64) -> serde_json::Value {
    let count = |key: &str| config[key].as_u64().unwrap_or(1);
    json!(if count("num_hidden_layers") == largest {
        count("hidden_size") / count("num_attention_heads")
    } else {
        count("head_dim")
    })
}

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { kv_heads: Some(4), ..Defaults::gemma() };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    config.as_gemma();
    config.arch.norms = SANDWICH;
    let capped = |name: &str, default: f64| -> Result<Option<f64>> {
        Ok(match keys.positive(name)? {
            None if !keys.has(name) => Some(default),
            cap => cap,
        })
    };
    config.arch.score_cap = capped("attn_logit_softcapping", 50.0)?;
    config.arch.logit_cap = capped("final_logit_softcapping", 30.0)?;
    let scalar = keys.positive("query_pre_attn_scalar")?.unwrap_or(256.0);
    config.arch.attention_scale = Some(scalar.powf(-0.5));
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.unwrap_or(4096);
    windows(keys, &mut config, Some(window), |index| index % 2 == 0)?;
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}

/// Norms on both sides of attention and MLP.
pub(super) const SANDWICH: BlockNorms = BlockNorms {
    attention_input: Some("input_layernorm"),
    attention_output: Some("post_attention_layernorm"),
    mlp_input: Some("pre_feedforward_layernorm"),
    mlp_output: Some("post_feedforward_layernorm"),
    query: None,
    key: None,
};
