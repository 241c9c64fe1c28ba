//! Gemma (arXiv 2403.08295): gains of one more than stored, embeddings times the root of the width,
//! tanh-approximated GELU.

use super::{Defaults, INPUT_NORMS, Keys, LINEARS, ModelConfig, Result, gated, llama_like};
use crate::model::arch::gguf::{Gguf, set};
use crate::model::arch::{Activation, NormKind};

pub(super) static GGUF: Gguf = Gguf {
    architecture: "gemma",
    blocks: &[LINEARS, INPUT_NORMS],
    tied: Some(true),
    read: |_, config| {
        set(config, [("model_type", "gemma".into()), ("hidden_act", TANH.into())]);
        Ok(())
    },
    ..Gguf::PLAIN
};

/// The activation of all Gemmas.
pub(super) const TANH: &str = "gelu_pytorch_tanh";

pub(super) fn read(keys: &Keys<'_>) -> Result<ModelConfig> {
    let defaults = Defaults { kv_heads: Some(16), ..Defaults::gemma() };
    let bias = keys.flag("attention_bias", false)?;
    let mut config = gated(llama_like(keys, &defaults)?, [bias, bias, false]);
    config.as_gemma();
    // Folders of the first release say `hidden_act: gelu` and mean the approximation.
    if keys.text(&["hidden_activation"])?.is_none() {
        config.arch.activation = Activation::GeluTanh;
    }
    config.arch.gguf = Some(&GGUF);
    Ok(config)
}

impl Defaults {
    /// What all Gemmas share.
    pub(super) fn gemma() -> Self {
        Self { head_dim: Some(256), tied: true, max_positions: 8192, ..Self::default() }
    }
}

impl ModelConfig {
    /// Norms and embeddings of all Gemmas.
    pub(super) fn as_gemma(&mut self) {
        self.arch.norm = NormKind::RmsPlusOne;
        self.arch.multipliers.embedding = f64::from((self.d_model as f32).sqrt());
    }
}
