//! What a file has to have, and must not have, to be a plain model of its family.

use std::collections::BTreeSet;

use super::keys::Keys;
use super::names::tensor_name;
use super::own::{File, architecture, plain, title};
use crate::error::{Error, Result};
use crate::model::ModelConfig;

pub(super) const EMBEDDING: &str = "token_embd.weight";

/// Parts of a block that may carry biases: attention's, then the MLP's. All of a row, or none.
const BIASES: [&[&str]; 2] = [
    &["attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"],
    &["ffn_gate", "ffn_up", "ffn_down"],
];

/// Whether the file is a whole language model of a known architecture.
pub(super) fn check_kind(keys: Keys<'_>) -> Result<()> {
    let gguf = architecture(keys)?;
    let plain = plain(gguf);
    if let Some(kind) = keys.text("general.type")?.filter(|kind| *kind != "model") {
        return Err(Error::preflight(format!(
            "the file is no model but of type `{}` (general.type)",
            kind.escape_debug()
        ))
        .fix(plain));
    }
    if let Some(parts) = keys.count_or_zero("split.count")?.filter(|parts| *parts > 1) {
        return Err(Error::preflight(format!("the file is one of {parts} parts (split.count)"))
            .fix(
                "join the parts with llama.cpp: llama-gguf-split --merge FIRST_PART JOINED_FILE",
            ));
    }
    Ok(())
}

/// Settings that change what a model computes, with the value that changes nothing.
const SETTINGS: [(&str, f64); 14] = [
    ("expert_count", 0.0),
    ("attention.scale", 0.0),
    ("attention.sliding_window", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.temperature_scale", 0.0),
    ("attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", 0.0),
    ("nextn_predict_layers", 0.0),
    ("logit_scale", 1.0),
    ("embedding_scale", 1.0),
    ("residual_scale", 1.0),
    ("rope.scaling.yarn_log_multiplier", 0.0),
    ("rope.scaling.alpha", 0.0),
];

impl File<'_> {
    pub(super) fn check_settings(&self) -> Result<()> {
        for (name, neutral) in SETTINGS {
            if self.gguf.keys.contains(&name) {
                continue;
            }
            // llama.cpp takes 0 as absent for every one of them.
            let changes = |value: &f64| *value != 0.0 && (value - neutral).abs() > 0.0;
            if let Some(value) = self.number(name)?.filter(changes) {
                return Err(self.refused(format!(
                    "`{}` is {value}, which a plain {} does not have",
                    self.key(name),
                    title(self.gguf)
                )));
            }
        }
        let causal = self.key("attention.causal");
        match self.keys.truth(&causal)? {
            Some(false) => {
                Err(self.refused(format!("`{causal}` is false: the file is no language model")))
            }
            _ => Ok(()),
        }
    }

    /// Every part of every block must be there; gives the linears that carry biases.
    pub(super) fn check_parts(&self, blocks: usize) -> Result<BTreeSet<&'static str>> {
        for name in [EMBEDDING, "output_norm.weight"] {
            self.shapes.get(name).ok_or_else(|| self.lacks(name))?;
        }
        // Ends at the first missing one, however many blocks are claimed.
        for block in 0..blocks {
            for (_, inner) in self.gguf.parts() {
                let name = format!("blk.{block}.{inner}.weight");
                self.shapes.get(&name).ok_or_else(|| self.lacks(&name))?;
            }
        }
        let mut biased = BTreeSet::new();
        for group in BIASES {
            let parts: Vec<&str> =
                group.iter().copied().filter(|part| self.gguf.biased.contains(part)).collect();
            let holds =
                |part: &str, block| self.shapes.contains_key(&format!("blk.{block}.{part}.bias"));
            let found = parts.iter().map(|part| (0..blocks).filter(|b| holds(part, *b)).count());
            let (found, all) = (found.sum::<usize>(), parts.len() * blocks);
            if found != 0 && found != all {
                return Err(self.refused(format!(
                    "{found} of {all} biases of {} are there; fewbit's {} has all of them or none",
                    parts.join(", "),
                    title(self.gguf)
                )));
            }
            biased.extend(parts.into_iter().filter(|_| found > 0));
        }
        Ok(biased)
    }

    /// Every tensor of the model must be there, and no other.
    pub(super) fn check_names(&self, model: &ModelConfig) -> Result<()> {
        let names = model.tensors().into_iter();
        let mut known: BTreeSet<String> =
            names.filter_map(|(name, _)| tensor_name(&name, model)).collect();
        for name in &known {
            self.shapes.get(name).ok_or_else(|| self.lacks(name))?;
        }
        known.extend(self.gguf.divisors.iter().map(|name| (*name).to_owned()));
        match self.shapes.keys().find(|name| !known.contains(*name)) {
            None => Ok(()),
            Some(name) => Err(self
                .refused(format!(
                    "a plain {} of {} blocks has no such tensor, and fewbit does not know what it \
                     does",
                    title(self.gguf),
                    model.n_blocks
                ))
                .at(name)),
        }
    }
}
