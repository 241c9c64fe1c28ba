//! Phi-1, 1.5 and 2 (arXiv 2306.11644): attention and MLP side by side behind one layer norm, biases
//! everywhere, half of each head rotated.

use super::{Defaults, Keys, ModelConfig, Result, Role, activation, linear, llama_like};
use crate::model::arch::{BlockNorms, Names, NormKind, QueryNorm, Residual};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let mut config = llama_like(keys, &Defaults { partial: 0.5, ..Defaults::default() })?;
    let (d, ff) = (config.d_model, config.d_ff);
    let [q, kv] = [config.n_heads, config.n_kv_heads].map(|heads| heads * config.head_dim);
    let arch = &mut config.arch;
    arch.norm = NormKind::Layer;
    arch.norm_eps = keys.positive("layer_norm_eps")?.unwrap_or(1e-5);
    arch.residual = Residual::Parallel;
    arch.norms =
        BlockNorms { attention_input: Some("input_layernorm"), ..BlockNorms::default() };
    arch.activation = activation(keys, "gelu_new")?;
    arch.linears = vec![
        linear("self_attn.q_proj", Role::Query, [q, d], true),
        linear("self_attn.k_proj", Role::Key, [kv, d], true),
        linear("self_attn.v_proj", Role::Value, [kv, d], true),
        linear("self_attn.dense", Role::Output, [d, q], true),
        linear("mlp.fc1", Role::Up, [ff, d], true),
        linear("mlp.fc2", Role::Down, [d, ff], true),
    ];
    if keys.flag("qk_layernorm", false)? {
        arch.query_norm = Some(QueryNorm::Head);
        arch.norms.query = Some("self_attn.q_layernorm");
        arch.norms.key = Some("self_attn.k_layernorm");
    }
    arch.names = Names { norm: Some("final_layernorm"), head_bias: true, ..Names::LLAMA };
    Ok(config)
}
