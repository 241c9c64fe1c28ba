//! GPT-2: learned positions, layer norms, queries, keys and values in one matrix, a plain MLP; its
//! matrices are stored as `[in, out]`.

use super::{Keys, MAX_ROWS, MAX_WIDTH, ModelConfig, Result, Role, Sizes, activation, linear, plain};
use crate::model::arch::gguf::{Gguf, rename, set};
use crate::model::arch::{BlockNorms, LearnedPositions, LinearSpec, Names};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "gpt2",
    blocks: &[&[
        ("attn.c_attn", "attn_qkv"),
        ("attn.c_proj", "attn_output"),
        ("mlp.c_fc", "ffn_up"),
        ("mlp.c_proj", "ffn_down"),
        ("ln_1", "attn_norm"),
        ("ln_2", "ffn_norm"),
    ]],
    biased: &["attn_qkv", "attn_output", "ffn_up", "ffn_down"],
    layer_norms: true,
    square: true,
    read: |_, config| {
        rename(
            config,
            &[
                ("hidden_size", "n_embd"),
                ("num_attention_heads", "n_head"),
                ("num_hidden_layers", "n_layer"),
                ("max_position_embeddings", "n_positions"),
                ("intermediate_size", "n_inner"),
                ("layer_norm_eps", "layer_norm_epsilon"),
            ],
        );
        // Heads and positions are not of Llama's kind.
        for key in ["hidden_act", "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling"] {
            config.shift_remove(key);
        }
        set(config, [("model_type", "gpt2".into()), ("activation_function", "gelu_new".into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let d = keys.width(&["n_embd", "hidden_size"])?;
    let heads = keys.width(&["n_head", "num_attention_heads"])?;
    let positions = keys.needed(&["n_positions", "max_position_embeddings"], MAX_ROWS)?;
    let inner = keys.count(&["n_inner", "intermediate_size"], MAX_WIDTH)?.unwrap_or(4 * d);
    let sizes = Sizes { d, heads, inner, positions, tied: true };
    let mut config = plain(keys, &sizes, &["n_layer", "num_hidden_layers"])?;
    let columns = |name, role, shape| LinearSpec { columns: true, ..linear(name, role, shape, true) };
    let arch = &mut config.arch;
    arch.norm_eps = keys.positive("layer_norm_epsilon")?.unwrap_or(1e-5);
    arch.activation = activation(keys, "gelu_new")?;
    arch.norms = BlockNorms {
        attention_input: Some("ln_1"),
        mlp_input: Some("ln_2"),
        ..BlockNorms::default()
    };
    arch.linears = vec![
        columns("attn.c_attn", Role::QueryKeyValue, [3 * d, d]),
        columns("attn.c_proj", Role::Output, [d, d]),
        columns("mlp.c_fc", Role::Up, [inner, d]),
        columns("mlp.c_proj", Role::Down, [d, inner]),
    ];
    arch.positions = Some(LearnedPositions { name: "wpe", rows: positions, offset: 0 });
    arch.names = NAMES;
    if !keys.flag("scale_attn_weights", true)? {
        arch.attention_scale = Some(1.0);
    }
    arch.gguf = Some(&GGUF);
    Ok(config)
}

/// Some folders were saved from the model without its head, and have no root.
pub(super) const NAMES: Names = Names {
    roots: &["transformer.", ""],
    root: "transformer.",
    blocks: "h",
    embedding: "wte",
    norm: Some("ln_f"),
    ..Names::LLAMA
};
