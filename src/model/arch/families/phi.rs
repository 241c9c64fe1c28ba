//! Phi-1, 1.5 and 2 (arXiv 2306.11644): attention and MLP side by side behind one layer norm, biases
//! everywhere, half of each head rotated.

use super::{Defaults, Keys, ModelConfig, Result, Role, activation, linear, llama_like};
use crate::model::arch::gguf::{Gguf, set};
use crate::model::arch::{BlockNorms, Names, NormKind, QueryNorm, Residual};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "phi2",
    blocks: &[&[
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.dense", "attn_output"),
        ("mlp.fc1", "ffn_up"),
        ("mlp.fc2", "ffn_down"),
        ("input_layernorm", "attn_norm"),
    ]],
    biased: &["attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down"],
    tied: Some(false),
    layer_norms: true,
    square: true,
    read: |_, config| {
        // A whole head where no share is said.
        config.entry("partial_rotary_factor").or_insert(1.0.into());
        set(config, [("model_type", "phi".into()), ("hidden_act", "gelu_new".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

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
    arch.gguf = Some(&GGUF);
    Ok(config)
}
