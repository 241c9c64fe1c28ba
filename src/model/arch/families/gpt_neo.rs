//! GPT-Neo: GPT-2 with separate projections, unscaled scores, and a window in every other layer.

use super::{Keys, MAX_ROWS, MAX_WIDTH, ModelConfig, Result, Role, Sizes, activation, linear, plain};
use crate::model::arch::{BlockNorms, LearnedPositions, Names, Span};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let d = keys.width(&["hidden_size"])?;
    let heads = keys.count(&["num_heads", "num_attention_heads"], MAX_WIDTH)?.unwrap_or(16);
    let positions = keys.needed(&["max_position_embeddings"], MAX_ROWS)?;
    let inner = keys.count(&["intermediate_size"], MAX_WIDTH)?.unwrap_or(4 * d);
    let sizes = Sizes { d, heads, inner, positions, tied: true };
    let mut config = plain(keys, &sizes, &["num_layers", "num_hidden_layers"])?;
    let window = keys.count(&["window_size"], MAX_ROWS)?.unwrap_or(256);
    let arch = &mut config.arch;
    arch.norm_eps = keys.positive("layer_norm_epsilon")?.unwrap_or(1e-5);
    arch.activation = activation(keys, "gelu_new")?;
    arch.norms = BlockNorms {
        attention_input: Some("ln_1"),
        mlp_input: Some("ln_2"),
        ..BlockNorms::default()
    };
    arch.linears = vec![
        linear("attn.attention.q_proj", Role::Query, [d, d], false),
        linear("attn.attention.k_proj", Role::Key, [d, d], false),
        linear("attn.attention.v_proj", Role::Value, [d, d], false),
        linear("attn.attention.out_proj", Role::Output, [d, d], true),
        linear("mlp.c_fc", Role::Up, [inner, d], true),
        linear("mlp.c_proj", Role::Down, [d, inner], true),
    ];
    arch.positions = Some(LearnedPositions { name: "wpe", rows: positions, offset: 0 });
    arch.names = Names { roots: &["transformer."], ..super::gpt2::NAMES };
    arch.attention_scale = Some(1.0);
    // Which layers look at a window: `[[[kinds], repetitions], ...]`.
    let local = match keys.nested_kinds("attention_types")? {
        None => (0..config.n_blocks).map(|index| index % 2 == 1).collect(),
        Some(kinds) if kinds.len() == config.n_blocks => {
            kinds.iter().map(|kind| kind == "local").collect::<Vec<bool>>()
        }
        Some(kinds) => {
            let fix = format!("{}, one for each layer", config.n_blocks);
            return Err(keys.refuse("attention_types", format!("{} layers", kinds.len()), &fix));
        }
    };
    config.arch.spans.push(Span { window: Some(window), rope: None });
    config.arch.span_of = local.into_iter().map(usize::from).collect();
    Ok(config)
}
