//! Phi-3, Phi-4 and Phi-4-mini (arXiv 2404.14219): Llama with queries, keys and values in one matrix,
//! gate and up in another, LongRoPE, and a share of each head rotated.

use super::{Defaults, Keys, MAX_ROWS, ModelConfig, Result, Role, linear, llama_like};

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
    Ok(config)
}
