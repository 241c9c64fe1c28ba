//! GPT-NeoX and Pythia (arXiv 2204.06745): attention and MLP side by side behind a layer norm each,
//! queries, keys and values in one matrix head by head, a quarter of each head rotated.

use serde_json::json;

use super::{Defaults, GgufValue, Keys, ModelConfig, Result, Role, activation, linear, llama_like};
use crate::model::arch::gguf::{Gguf, rename, set};
use crate::model::arch::{BlockNorms, Names, NormKind, Residual};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "gptneox",
    blocks: &[&[
        ("attention.query_key_value", "attn_qkv"),
        ("attention.dense", "attn_output"),
        ("mlp.dense_h_to_4h", "ffn_up"),
        ("mlp.dense_4h_to_h", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ]],
    biased: &["attn_qkv", "attn_output", "ffn_up", "ffn_down"],
    tied: Some(false),
    layer_norms: true,
    square: true,
    keys: &[PARALLEL],
    write: |config| {
        vec![(PARALLEL, GgufValue::Truth(config.arch.residual == Residual::Parallel))]
    },
    read: |keys, config| {
        // A whole head where no share is said.
        config.entry("partial_rotary_factor").or_insert(json!(1.0));
        rename(
            config,
            &[("partial_rotary_factor", "rotary_pct"), ("rope_theta", "rotary_emb_base")],
        );
        set(
            config,
            [
                ("model_type", "gpt_neox".into()),
                ("hidden_act", "gelu".into()),
                ("attention_bias", json!(keys.biased("attn_qkv"))),
                ("use_parallel_residual", json!(keys.truth(PARALLEL)?.unwrap_or(true))),
            ],
        );
        Ok(())
    },
    ..Gguf::PLAIN
};

const PARALLEL: &str = "use_parallel_residual";

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
    arch.gguf = Some(&GGUF);
    Ok(config)
}
