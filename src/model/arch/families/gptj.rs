//! GPT-J: attention and MLP side by side behind one layer norm, neighbours rotated, a head with bias.

use super::{
    Keys, MAX_ROWS, MAX_WIDTH, ModelConfig, Result, Role, RopeDefaults, Sizes, activation, linear,
    plain,
};
use crate::model::arch::{BlockNorms, Names, Residual, Rope};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let d = keys.width(&["n_embd", "hidden_size"])?;
    let heads = keys.count(&["n_head", "num_attention_heads"], MAX_WIDTH)?.unwrap_or(16);
    let positions = keys.count(&["n_positions", "max_position_embeddings"], MAX_ROWS)?;
    let positions = positions.unwrap_or(2048);
    let inner = keys.count(&["n_inner"], MAX_WIDTH)?.unwrap_or(4 * d);
    let sizes = Sizes { d, heads, inner, positions, tied: false };
    let mut config = plain(keys, &sizes, &["n_layer", "num_hidden_layers"])?;
    let head_dim = config.head_dim;
    let dims = keys.count(&["rotary_dim"], MAX_WIDTH)?.unwrap_or(64.min(head_dim));
    let defaults = RopeDefaults {
        head_dim,
        theta: 10_000.0,
        partial: dims as f64 / head_dim as f64,
        max_positions: positions,
    };
    let rope = Rope { neighbours: true, ..Rope::read(keys, "full_attention", &defaults)? };
    let arch = &mut config.arch;
    arch.spans[0].rope = Some(rope);
    arch.norm_eps = keys.positive("layer_norm_epsilon")?.unwrap_or(1e-5);
    arch.activation = activation(keys, "gelu_new")?;
    arch.residual = Residual::Parallel;
    arch.norms = BlockNorms { attention_input: Some("ln_1"), ..BlockNorms::default() };
    arch.linears = vec![
        linear("attn.q_proj", Role::Query, [d, d], false),
        linear("attn.k_proj", Role::Key, [d, d], false),
        linear("attn.v_proj", Role::Value, [d, d], false),
        linear("attn.out_proj", Role::Output, [d, d], false),
        linear("mlp.fc_in", Role::Up, [inner, d], true),
        linear("mlp.fc_out", Role::Down, [d, inner], true),
    ];
    arch.names = Names { roots: &["transformer."], head_bias: true, ..super::gpt2::NAMES };
    Ok(config)
}
