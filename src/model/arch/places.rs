//! What the tensors of a checkpoint are to its model: used, left out, another's, or a fault.

use std::collections::BTreeSet;

use super::{ModelConfig, weight_name};

/// What a tensor of a checkpoint is to its model.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Place {
    /// A part of it, or of a linear's packed form.
    Used,
    /// Nothing: a table that is computed, or the second copy of a tied head.
    Unused,
    /// A part of another model in the same file.
    Beside,
    /// Something that the model would have, were it another one.
    Unknown,
}

/// Ends of the names of tables that every implementation computes for itself.
const COMPUTED: [&str; 8] = [
    ".rotary_emb.inv_freq",
    ".rotary_emb.cos_cached",
    ".rotary_emb.sin_cached",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
    ".embeddings.position_ids",
];

/// A linear's parts in some packed format.
const PACKED: [&str; 17] = [
    "alpha",
    "alphas",
    "biases",
    "codebooks",
    "codes",
    "g_idx",
    "offset",
    "offsets",
    "qweight",
    "qzeros",
    "scales",
    "weight_g_idx",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "zero_points",
];

/// Tells what the tensors of a checkpoint are to a model.
pub struct Places<'a> {
    config: &'a ModelConfig,
    used: BTreeSet<String>,
}

impl<'a> Places<'a> {
    /// Of the tensors of `config`'s model.
    pub fn new(config: &'a ModelConfig) -> Self {
        Self { config, used: config.tensors().into_iter().map(|(name, _)| name).collect() }
    }

    /// What a tensor of this name is.
    pub fn of(&self, name: &str) -> Place {
        if self.used.contains(name) {
            return Place::Used;
        }
        let head = name == weight_name(self.config.head());
        if head || COMPUTED.iter().any(|end| name.ends_with(end)) {
            return Place::Unused;
        }
        if self.config.arch.names.beside.iter().any(|start| name.starts_with(start)) {
            return Place::Beside;
        }
        let packed = |(dot, _): (usize, &str)| {
            let part = name[dot + 1..].split('.').next().unwrap_or_default();
            // Several precisions in one file say which in the name.
            let kind = part.trim_end_matches(|c: char| c.is_ascii_digit()).trim_end_matches('_');
            // Of a narrower width that the same planes serve: `alphas_2`.
            let kind = kind.trim_end_matches(|c: char| c.is_ascii_digit());
            PACKED.contains(&kind.trim_end_matches('_')) && self.is_matrix(&name[..dot])
        };
        if name.match_indices('.').any(packed) { Place::Used } else { Place::Unknown }
    }

    fn is_matrix(&self, linear: &str) -> bool {
        self.used.contains(&weight_name(linear)) || linear == self.config.head()
    }
}
