//! GPT-NeoX and Pythia (arXiv 2204.06745): attention and MLP side by side behind a layer norm each,
//! queries, keys and values in one matrix head by head, a quarter of each head rotated.

use super::{Defaults, Keys, ModelConfig, Result, Role, activation, linear, llama_like};
use crate::model::arch::{BlockNorms, Names, NormKind, Residual};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let partial = keys.positive("rotary_pct")?.unwrap_or(0.25);
    let theta = keys.positive("rotary_emb_base")?.unwrap_or(10_000.0);
    let mut config = llama_like(keys, &Defaults { theta, partial, ..Defaults::default() })?;
    let (d, ff) = (config.d_model, config.d_ff);
    let bias = keys.flag("attention_bias", true)?;
    let arch = &mut config.arch;
    arch.norm = NormKind::Layer;
    arch.norm_eps = keys.positive("layer_norm_eps")?.unwrap_or(1e-5);
    if keys.flag("use_parallel_residual", true)? {
        arch.residual = Residual::Parallel;
    }
    arch.norms = BlockNorms {
        attention_input: Some("input_layernorm"),
        mlp_input: Some("post_attention_layernorm"),
        ..BlockNorms::default()
    };
    arch.activation = activation(keys, "gelu")?;
    arch.linears = vec![
        linear("attention.query_key_value", Role::QueryKeyValueByHead, [3 * d, d], bias),
        linear("attention.dense", Role::Output, [d, d], bias),
        linear("mlp.dense_h_to_4h", Role::Up, [ff, d], true),
        linear("mlp.dense_4h_to_h", Role::Down, [d, ff], true),
    ];
    arch.names = Names {
        roots: &["gpt_neox."],
        root: "gpt_neox.",
        embedding: "embed_in",
        norm: Some("final_layer_norm"),
        head: "embed_out",
        ..Names::LLAMA
    };
    Ok(config)
}
