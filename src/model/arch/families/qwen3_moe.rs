//! Qwen3-MoE (arXiv 2505.09388): Qwen3 with experts in place of the MLP, in every block or some.

use super::qwen3::norm_heads;
use super::{ATTENTION, Defaults, GgufValue, HEAD_NORMS, INPUT_NORMS, PartNames, Keys, MAX_BLOCKS, MAX_ROWS, ModelConfig, Result, gated, llama_like, windows};
use crate::model::arch::experts::{Experts, gated_experts};
use crate::model::arch::QueryNorm;
use crate::model::arch::gguf::{Gguf, set};
use serde_json::json;

pub(super) static GGUF: Gguf = Gguf {
    architecture: "qwen3moe",
    blocks: &[ATTENTION, EXPERTS, HEAD_NORMS, INPUT_NORMS],
    keys: &["expert_count", "expert_used_count", "expert_feed_forward_length"],
    write: |config| {
        let Some(experts) = &config.arch.experts else { return Vec::new() };
        let counts = [experts.count, experts.active, experts.width].map(GgufValue::Count);
        GGUF.keys.iter().copied().zip(counts).collect()
    },
    read: |keys, config| {
        let [count, active, width] = GGUF.keys else { return Ok(()) };
        set(
            config,
            [
                ("model_type", "qwen3_moe".into()),
                ("num_experts", json!(keys.count(count)?)),
                ("num_experts_per_tok", json!(keys.count(active)?)),
                ("moe_intermediate_size", json!(keys.count(width)?)),
                // llama.cpp does so for every model of this architecture.
                ("norm_topk_prob", true.into()),
            ],
        );
        Ok(())
    },
    ..Gguf::PLAIN
};

/// llama.cpp's names; the experts' matrices of one kind are one tensor.
const EXPERTS: PartNames = &[
    ("mlp.gate", "ffn_gate_inp"),
    ("mlp.experts.gate_proj", "ffn_gate_exps"),
    ("mlp.experts.up_proj", "ffn_up_exps"),
    ("mlp.experts.down_proj", "ffn_down_exps"),
];

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
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
