//! OPT (arXiv 2205.01068): learned positions from row 2 on, layer norms, ReLU; its 350M puts the norms
//! behind the sums and projects tokens of another width.

use super::{Keys, MAX_ROWS, MAX_WIDTH, ModelConfig, Result, Role, Sizes, activation, linear, plain};
use crate::model::arch::{BlockNorms, LearnedPositions, Names, NormKind, Residual};

/// Rows of the table of positions that stand for padding.
const OFFSET: usize = 2;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let d = keys.width(&["hidden_size"])?;
    let heads = keys.count(&["num_attention_heads"], MAX_WIDTH)?.unwrap_or(12);
    let inner = keys.width(&["ffn_dim"])?;
    let positions = keys.needed(&["max_position_embeddings"], MAX_ROWS)?;
    let sizes = Sizes { d, heads, inner, positions, tied: true };
    let mut config = plain(keys, &sizes, &["num_hidden_layers"])?;
    let bias = keys.flag("enable_bias", true)?;
    let before = keys.flag("do_layer_norm_before", true)?;
    let final_norm = before && !keys.flag("_remove_final_layer_norm", false)?;
    let affine = keys.flag("layer_norm_elementwise_affine", true)?;
    let width = keys.count(&["word_embed_proj_dim"], MAX_WIDTH)?.filter(|width| *width != d);
    let arch = &mut config.arch;
    arch.norm = if affine { NormKind::Layer } else { NormKind::LayerPlain };
    arch.activation = activation(keys, "relu")?;
    let [attention, mlp] = [Some("self_attn_layer_norm"), Some("final_layer_norm")];
    arch.norms = if before {
        BlockNorms { attention_input: attention, mlp_input: mlp, ..BlockNorms::default() }
    } else {
        arch.residual = Residual::NormedSum;
        BlockNorms { attention_output: attention, mlp_output: mlp, ..BlockNorms::default() }
    };
    arch.linears = vec![
        linear("self_attn.q_proj", Role::Query, [d, d], bias),
        linear("self_attn.k_proj", Role::Key, [d, d], bias),
        linear("self_attn.v_proj", Role::Value, [d, d], bias),
        linear("self_attn.out_proj", Role::Output, [d, d], bias),
        linear("fc1", Role::Up, [inner, d], bias),
        linear("fc2", Role::Down, [d, inner], bias),
    ];
    arch.positions = Some(LearnedPositions {
        name: "embed_positions",
        rows: positions + OFFSET,
        offset: OFFSET,
    });
    arch.token_width = width;
    arch.names = Names {
        roots: &["model.decoder.", "decoder."],
        root: "model.decoder.",
        norm: final_norm.then_some("final_layer_norm"),
        projections: width.map(|_| ["project_in", "project_out"]),
        ..Names::LLAMA
    };
    Ok(config)
}
