//! The sizes of a model, out of a file's metadata, and the `config.json` that says them.

use serde_json::{Map, Value as Json, json};

use super::check::EMBEDDING;
use super::keys::missing;
use super::own::{File, positive, title};
use crate::error::{Error, Result};

const HEAD: &str = "output.weight";

pub(super) struct Sizes {
    pub(super) width: usize,
    pub(super) inner: usize,
    pub(super) blocks: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) rotated: usize,
    pub(super) vocab: usize,
    pub(super) context: usize,
    pub(super) eps: f64,
    pub(super) theta: f64,
}

impl Sizes {
    pub(super) fn read(file: &File<'_>) -> Result<Self> {
        let key = |key: &str| file.key(key);
        let width = file.needed_count("embedding_length")?;
        let heads = file.needed_count("attention.head_count")?;
        let kv_heads = file.count("attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::preflight(format!(
                "`{}` is {kv_heads}, which does not divide the {heads} heads of `{}`",
                key("attention.head_count_kv"),
                key("attention.head_count")
            )));
        }
        let head_dim = match file.count("attention.key_length")? {
            Some(size) => size,
            None if width.is_multiple_of(heads) => width / heads,
            None => {
                return Err(Error::preflight(format!(
                    "`{}` is {width}, no multiple of the {heads} heads of `{}`, and there is no `{}`",
                    key("embedding_length"),
                    key("attention.head_count"),
                    key("attention.key_length")
                )));
            }
        };
        let rotated = file.count("rope.dimension_count")?.unwrap_or(head_dim);
        // Reordered rows are those of whole heads.
        let whole =
            [("attention.value_length", true), ("rope.dimension_count", file.gguf.neighbours)];
        for (name, _) in whole.into_iter().filter(|(_, whole)| *whole) {
            if let Some(other) = file.count(name)?.filter(|other| *other != head_dim) {
                return Err(file.refused(format!(
                    "`{}` is {other}, but heads are {head_dim} wide; a {}'s are the same",
                    key(name),
                    title(file.gguf)
                )));
            }
        }
        let [vocab, columns] = matrix(file, EMBEDDING)?;
        if columns != width {
            return Err(Error::preflight(format!(
                "the tensor has rows of {columns}, but `{}` is {width}",
                key("embedding_length")
            ))
            .at(EMBEDDING));
        }
        let inner = match file.count("feed_forward_length")? {
            Some(inner) => inner,
            None => matrix(file, "blk.0.ffn_down.weight")?[1],
        };
        let epsilon = if file.gguf.layer_norms { "layer_norm" } else { "layer_norm_rms" };
        let epsilon = key(&format!("attention.{epsilon}_epsilon"));
        let theta = "rope.freq_base";
        Ok(Self {
            width,
            inner,
            blocks: file.needed_count("block_count")?,
            heads,
            kv_heads,
            head_dim,
            rotated,
            vocab,
            context: file.needed_count("context_length")?,
            eps: positive(&epsilon, file.keys.number(&epsilon)?.ok_or_else(|| missing(&epsilon))?)?,
            theta: positive(&key(theta), file.number(theta)?.unwrap_or(10_000.0))?,
        })
    }

    /// A config with the keys of Llama's.
    pub(super) fn config(&self, file: &File<'_>) -> Map<String, Json> {
        let epsilon = if file.gguf.layer_norms { "layer_norm_eps" } else { "rms_norm_eps" };
        let mut config = Map::new();
        for (key, value) in [
            ("model_type", json!("")),
            ("hidden_act", json!("silu")),
            ("hidden_size", json!(self.width)),
            ("intermediate_size", json!(self.inner)),
            ("num_hidden_layers", json!(self.blocks)),
            ("num_attention_heads", json!(self.heads)),
            ("num_key_value_heads", json!(self.kv_heads)),
            ("head_dim", json!(self.head_dim)),
            ("vocab_size", json!(self.vocab)),
            ("max_position_embeddings", json!(self.context)),
            (epsilon, json!(self.eps)),
            ("rope_theta", json!(self.theta)),
            ("rope_scaling", Json::Null),
            ("tie_word_embeddings", json!(!file.shapes.contains_key(HEAD))),
            ("torch_dtype", json!("float32")),
        ] {
            config.insert(key.to_owned(), value);
        }
        if self.rotated != self.head_dim {
            // The share that gives back this count when it is cut to a whole one.
            let mut share = self.rotated as f64 / self.head_dim as f64;
            if ((self.head_dim as f64 * share) as usize) < self.rotated {
                share = share.next_up();
            }
            config.insert("partial_rotary_factor".to_owned(), json!(share));
        }
        config
    }
}

fn matrix(file: &File<'_>, name: &str) -> Result<[usize; 2]> {
    let shape = file.shapes.get(name).ok_or_else(|| file.lacks(name))?;
    <[usize; 2]>::try_from(shape.as_slice()).map_err(|_| {
        Error::preflight(format!("the tensor has shape {shape:?}, which is no matrix")).at(name)
    })
}
