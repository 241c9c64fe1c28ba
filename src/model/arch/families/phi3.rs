//! Phi-3, Phi-4 and Phi-4-mini (arXiv 2404.14219): Llama with queries, keys and values in one matrix,
//! gate and up in another, LongRoPE, and a share of each head rotated.

use serde_json::json;

use super::{Defaults, Keys, MAX_ROWS, ModelConfig, Result, Role, linear, llama_like};
use crate::model::arch::gguf::{LONG_FACTORS, Gguf, WINDOW, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "phi3",
    blocks: &[&[
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]],
    square: true,
    divisors: &LONG_FACTORS,
    // A window stands in files, but llama.cpp looks at everything: none is written.
    keys: &[WINDOW],
    read: |keys, config| {
        let window = json!(keys.count(WINDOW)?);
        set(config, [("model_type", "phi3".into()), ("sliding_window", window)]);
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { max_positions: 4096, norm_eps: 1e-5, ..Defaults::default() };
    let mut config = llama_like(keys, &defaults)?;
    let (d, ff) = (config.d_model, config.d_ff);
    let [q, kv] = [config.n_heads, config.n_kv_heads].map(|heads| heads * config.head_dim);
    config.arch.linears = vec![
        linear("self_attn.qkv_proj", Role::QueryKeyValue, [q + 2 * kv, d], false),
        linear("self_attn.o_proj", Role::Output, [d, q], false),
        linear("mlp.gate_up_proj", Role::GateUp, [2 * ff, d], false),
        linear("mlp.down_proj", Role::Down, [d, ff], false),
    ];
    config.arch.spans[0].window = keys.count(&["sliding_window"], MAX_ROWS)?;
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
