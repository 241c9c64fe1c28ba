//! Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in place of the MLP, in every block or some.

use super::qwen3::norm_heads;
use super::{Defaults, Keys, MAX_BLOCKS, MAX_ROWS, ModelConfig, Result, gated, llama_like, windows};
use crate::model::arch::experts::{Experts, gated_experts};
use crate::model::arch::QueryNorm;

/// Most experts of a block.
const MAX_EXPERTS: usize = 4096;

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { kv_heads: Some(4), max_positions: 32_768, ..Defaults::default() };
    let bias = keys.flag("attention_bias", false)?;
    // Biases are on all four of attention's linears.
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    norm_heads(&mut config, QueryNorm::Head);
    let slides = keys.flag("use_sliding_window", false)?;
    let window = keys.count(&["sliding_window"], MAX_ROWS)?.filter(|_| slides);
    windows(keys, &mut config, window, |_| slides)?;
    let count = keys.count(&["num_local_experts", "num_experts"], MAX_EXPERTS)?.unwrap_or(128);
    let active = keys.count(&["num_experts_per_tok"], MAX_EXPERTS)?.unwrap_or(8);
    if active > count {
        let fix = format!("{count} or less, the number of experts");
        return Err(keys.refuse("num_experts_per_tok", active, &fix));
    }
    let width = keys.width(&["moe_intermediate_size"])?;
    let every = keys.count(&["decoder_sparse_step"], MAX_BLOCKS)?.unwrap_or(1);
    let dense = keys.integers("mlp_only_layers")?.unwrap_or_default();
    let has = |block: usize| (block + 1).is_multiple_of(every) && !dense.contains(&(block as u64));
    let attention = config.arch.linears.iter().filter(|spec| spec.role.in_attention()).cloned();
    let parts = ["gate_proj", "up_proj", "down_proj"];
    let experts = gated_experts("mlp.experts", parts, count, [config.d_model, width]);
    config.arch.experts = Some(Experts {
        count,
        active,
        width,
        normalized: keys.flag("norm_topk_prob", false)?,
        router: "mlp.gate",
        blocks: (0..config.n_blocks).map(has).collect(),
        linears: attention.chain(experts).collect(),
    });
    Ok(config)
}
