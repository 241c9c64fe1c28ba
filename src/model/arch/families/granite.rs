//! Granite 3: Llama with four multipliers.

use serde_json::json;

use super::{Defaults, GgufValue, INPUT_NORMS, Keys, LINEARS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::Multipliers;
use crate::model::arch::gguf::{ALL_FACTORS, Gguf, read_biases, set};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "granite",
    blocks: &[LINEARS, INPUT_NORMS],
    biased: super::llama::BIASED,
    neighbours: true,
    divisors: ALL_FACTORS,
    keys: &["attention.scale", "embedding_scale", "residual_scale", "logit_scale"],
    write: |config| {
        let Multipliers { embedding, residual, logits } = config.arch.multipliers;
        let scale = config.arch.attention_scale.map(|scale| ("attention.scale", scale));
        // Logits are divided by theirs.
        let others =
            [("embedding_scale", embedding), ("residual_scale", residual), ("logit_scale", 1.0 / logits)];
        scale.into_iter().chain(others).map(|(key, value)| (key, GgufValue::Number(value))).collect()
    },
    read: |keys, config| {
        read_biases(keys, config);
        // 0 stands for what llama.cpp does without the key.
        let number = |key: &str| -> Result<Option<f64>> {
            Ok(keys.number(key)?.filter(|value| *value != 0.0))
        };
        let heads = config["head_dim"].as_f64().unwrap_or(1.0).powf(-0.5);
        set(
            config,
            [
                ("model_type", "granite".into()),
                ("attention_multiplier", json!(number("attention.scale")?.unwrap_or(heads))),
                ("embedding_multiplier", json!(number("embedding_scale")?.unwrap_or(1.0))),
                ("residual_multiplier", json!(number("residual_scale")?.unwrap_or(1.0))),
                ("logits_scaling", json!(number("logit_scale")?.unwrap_or(1.0))),
            ],
        );
        Ok(())
    },
    ..Gguf::PLAIN
};

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    let mut config =
        gated(llama_like(keys, &Defaults::default())?, [attention, attention, mlp]);
    config.arch.attention_scale = Some(keys.positive("attention_multiplier")?.unwrap_or(1.0));
    config.arch.multipliers = Multipliers {
        embedding: keys.positive("embedding_multiplier")?.unwrap_or(1.0),
        residual: keys.positive("residual_multiplier")?.unwrap_or(1.0),
        logits: 1.0 / keys.positive("logits_scaling")?.unwrap_or(1.0),
    };
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}
