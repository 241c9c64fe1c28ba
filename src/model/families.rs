//! What a `config.json` says about a model's size: no weight is read, and the family need not be
//! one that fewbit can run. Keys and their defaults are those of each family's configuration in
//! transformers.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Bounds of what a config may say, so that no product of them leaves a `u64`.
const MAX_WIDTH: u64 = 1 << 20;
const MAX_ROWS: u64 = 1 << 26;
const MAX_BLOCKS: u64 = 1 << 12;

/// How a family reads its keys.
type Family = fn(&Keys) -> Result<ModelShape>;

/// Every family whose sizes are known, by `model_type`.
const FAMILIES: [(&str, Family); 10] = [
    ("llama", llama),
    ("mistral", mistral),
    ("qwen2", qwen2),
    ("qwen3", qwen3),
    ("gemma", gemma),
    ("gemma2", gemma2),
    ("gptj", gptj),
    ("gpt_neo", gpt_neo),
    ("gpt2", gpt2),
    ("opt", opt),
];

/// One linear of a decoder block.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct LinearShape {
    /// Its name within the block.
    pub name: &'static str,
    /// `[out, in]`; q, k and v in one matrix count as one linear.
    pub shape: [u64; 2],
    /// Whether it carries a bias, `[out]`.
    pub bias: bool,
}

/// Parameter counts of a decoder-only model whose blocks are all alike.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ModelShape {
    /// `model_type`.
    pub family: String,
    /// Number of decoder blocks.
    pub blocks: u64,
    /// The linears of one block.
    pub linears: Vec<LinearShape>,
    /// `[out, in]` of the query projection, alone or as a part of a fused one.
    pub query: [u64; 2],
    /// `[out, in]` of the value projection, alone or as a part of a fused one.
    pub value: [u64; 2],
    /// Parameters of the embeddings of tokens and, where they are learned, positions.
    pub embeddings: u64,
    /// Whether the head is the token embedding.
    pub tied: bool,
    /// Parameters that the head has of its own.
    pub head: u64,
    /// Parameters of all norms, of blocks and outside.
    pub norms: u64,
    /// Everything outside the blocks that is none of these.
    pub rest: u64,
}

impl ModelShape {
    /// Reads a `config.json`, or the one in a folder.
    ///
    /// # Errors
    /// When it cannot be read, and as [`ModelShape::parse`].
    pub fn read(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
        let text = std::fs::read_to_string(&path).map_err(|e| {
            Error::io("read", &path, &e).fix("a config.json, or a folder that holds one")
        })?;
        Self::parse(&text).map_err(|e| e.at(path.display()))
    }

    /// Reads the text of a `config.json`.
    ///
    /// # Errors
    /// When it is damaged, its `model_type` is unknown, or a key is missing or no plausible size;
    /// the key and the families that are known are named.
    pub fn parse(text: &str) -> Result<Self> {
        let values: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| refused(format!("config.json is not valid: {e}")))?;
        let Some(family) = values.get("model_type").and_then(Value::as_str) else {
            return Err(refused("config.json has no `model_type`".into()));
        };
        let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == family) else {
            let what = format!("model_type `{family}` is not among those with known sizes");
            return Err(refused(what));
        };
        read(&Keys { values: &values, family })
    }

    /// Weights of the linears of all decoder blocks, biases aside.
    pub fn linear_weights(&self) -> u64 {
        self.blocks * self.linears.iter().map(|l| l.shape[0] * l.shape[1]).sum::<u64>()
    }

    /// Biases of the linears of all decoder blocks.
    pub fn biases(&self) -> u64 {
        self.blocks * self.linears.iter().filter(|l| l.bias).map(|l| l.shape[0]).sum::<u64>()
    }

    /// Parameters in all; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.linear_weights() + self.biases() + self.embeddings + self.head + self.norms + self.rest
    }
}

/// Where the families with RMS norms, rotary positions and a gated MLP differ.
struct Gated {
    /// Key and value heads where the config does not name the key; `None`: as many as query heads.
    kv_heads: Option<u64>,
    /// Width of a head where the config has none; `None`: the model's width over the heads.
    head_dim: Option<u64>,
    tied: bool,
    /// Of q, k and v; of o; of the MLP.
    biases: [bool; 3],
    /// Norms of the model's width in a block.
    norms: u64,
    /// Whether q and k have norms of a head's width.
    head_norms: bool,
}

impl Gated {
    const LLAMA: Self = Self {
        kv_heads: None,
        head_dim: None,
        tied: false,
        biases: [false; 3],
        norms: 2,
        head_norms: false,
    };
}

fn llama(keys: &Keys) -> Result<ModelShape> {
    let (attention, mlp) = (keys.flag("attention_bias", false)?, keys.flag("mlp_bias", false)?);
    gated(keys, &Gated { biases: [attention, attention, mlp], ..Gated::LLAMA })
}

fn mistral(keys: &Keys) -> Result<ModelShape> {
    gated(keys, &Gated { kv_heads: Some(8), ..Gated::LLAMA })
}

fn qwen2(keys: &Keys) -> Result<ModelShape> {
    let biases = [true, false, false];
    gated(keys, &Gated { kv_heads: Some(32), biases, ..Gated::LLAMA })
}

fn qwen3(keys: &Keys) -> Result<ModelShape> {
    let bias = keys.flag("attention_bias", false)?;
    let biases = [bias, bias, false];
    let (kv_heads, head_dim) = (Some(32), Some(128));
    gated(keys, &Gated { kv_heads, head_dim, biases, head_norms: true, ..Gated::LLAMA })
}

fn gemma(keys: &Keys) -> Result<ModelShape> {
    let bias = keys.flag("attention_bias", false)?;
    let biases = [bias, bias, false];
    let (kv_heads, head_dim) = (Some(16), Some(256));
    gated(keys, &Gated { kv_heads, head_dim, tied: true, biases, ..Gated::LLAMA })
}

fn gemma2(keys: &Keys) -> Result<ModelShape> {
    let bias = keys.flag("attention_bias", false)?;
    let biases = [bias, bias, false];
    let (kv_heads, head_dim) = (Some(4), Some(256));
    gated(keys, &Gated { kv_heads, head_dim, tied: true, biases, norms: 4, ..Gated::LLAMA })
}

fn gated(keys: &Keys, family: &Gated) -> Result<ModelShape> {
    let d = keys.width(&["hidden_size"])?;
    let ff = keys.width(&["intermediate_size"])?;
    let blocks = keys.needed(&["num_hidden_layers"], MAX_BLOCKS)?;
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    let heads = keys.width(&["num_attention_heads"])?;
    let kv_heads = match keys.number(&["num_key_value_heads"], MAX_WIDTH)? {
        Some(heads) => heads,
        // An explicit null means one per query head in every family.
        None if keys.values.contains_key("num_key_value_heads") => heads,
        None => family.kv_heads.unwrap_or(heads),
    };
    if !heads.is_multiple_of(kv_heads) {
        let what =
            format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}");
        return Err(Error::preflight(what).fix("a number of heads that does"));
    }
    let head_dim = keys.number(&["head_dim"], MAX_WIDTH)?;
    let head_dim = head_dim.or(family.head_dim).unwrap_or(d / heads);
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    if q == 0 || q > MAX_WIDTH {
        let what = format!("{heads} heads of width {head_dim} fit no model of width {d}");
        return Err(Error::preflight(what)
            .at("num_attention_heads, head_dim")
            .fix(format!("heads that together are from 1 to {MAX_WIDTH} wide")));
    }
    let tied = keys.flag("tie_word_embeddings", family.tied)?;
    let [qkv_bias, o_bias, mlp_bias] = family.biases;
    Ok(ModelShape {
        family: keys.family.to_owned(),
        blocks,
        linears: vec![
            LinearShape { name: "self_attn.q_proj", shape: [q, d], bias: qkv_bias },
            LinearShape { name: "self_attn.k_proj", shape: [kv, d], bias: qkv_bias },
            LinearShape { name: "self_attn.v_proj", shape: [kv, d], bias: qkv_bias },
            LinearShape { name: "self_attn.o_proj", shape: [d, q], bias: o_bias },
            LinearShape { name: "mlp.gate_proj", shape: [ff, d], bias: mlp_bias },
            LinearShape { name: "mlp.up_proj", shape: [ff, d], bias: mlp_bias },
            LinearShape { name: "mlp.down_proj", shape: [d, ff], bias: mlp_bias },
        ],
        query: [q, d],
        value: [kv, d],
        embeddings: vocab * d,
        tied,
        head: if tied { 0 } else { vocab * d },
        norms: blocks * (family.norms * d + if family.head_norms { 2 * head_dim } else { 0 }) + d,
        rest: 0,
    })
}

/// Rotary positions, attention and MLP side by side behind one norm, and a head with a bias.
fn gptj(keys: &Keys) -> Result<ModelShape> {
    let d = keys.width(&["n_embd", "hidden_size"])?;
    let inner = keys.number(&["n_inner"], MAX_WIDTH)?.unwrap_or(4 * d);
    let blocks = keys.needed(&["n_layer", "num_hidden_layers"], MAX_BLOCKS)?;
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    let tied = keys.flag("tie_word_embeddings", false)?;
    Ok(ModelShape {
        family: keys.family.to_owned(),
        blocks,
        linears: vec![
            LinearShape { name: "attn.q_proj", shape: [d, d], bias: false },
            LinearShape { name: "attn.k_proj", shape: [d, d], bias: false },
            LinearShape { name: "attn.v_proj", shape: [d, d], bias: false },
            LinearShape { name: "attn.out_proj", shape: [d, d], bias: false },
            LinearShape { name: "mlp.fc_in", shape: [inner, d], bias: true },
            LinearShape { name: "mlp.fc_out", shape: [d, inner], bias: true },
        ],
        query: [d, d],
        value: [d, d],
        embeddings: vocab * d,
        tied,
        head: vocab + if tied { 0 } else { vocab * d },
        norms: (blocks + 1) * 2 * d,
        rest: 0,
    })
}

fn gpt_neo(keys: &Keys) -> Result<ModelShape> {
    let d = keys.width(&["hidden_size"])?;
    let inner = keys.number(&["intermediate_size"], MAX_WIDTH)?.unwrap_or(4 * d);
    let blocks = keys.needed(&["num_layers", "num_hidden_layers"], MAX_BLOCKS)?;
    let linears = vec![
        LinearShape { name: "attn.attention.q_proj", shape: [d, d], bias: false },
        LinearShape { name: "attn.attention.k_proj", shape: [d, d], bias: false },
        LinearShape { name: "attn.attention.v_proj", shape: [d, d], bias: false },
        LinearShape { name: "attn.attention.out_proj", shape: [d, d], bias: true },
        LinearShape { name: "mlp.c_fc", shape: [inner, d], bias: true },
        LinearShape { name: "mlp.c_proj", shape: [d, inner], bias: true },
    ];
    learned_positions(keys, d, blocks, linears, &["max_position_embeddings"])
}

fn gpt2(keys: &Keys) -> Result<ModelShape> {
    let d = keys.width(&["n_embd", "hidden_size"])?;
    let inner = keys.number(&["n_inner"], MAX_WIDTH)?.unwrap_or(4 * d);
    let blocks = keys.needed(&["n_layer", "num_hidden_layers"], MAX_BLOCKS)?;
    let linears = vec![
        LinearShape { name: "attn.c_attn", shape: [3 * d, d], bias: true },
        LinearShape { name: "attn.c_proj", shape: [d, d], bias: true },
        LinearShape { name: "mlp.c_fc", shape: [inner, d], bias: true },
        LinearShape { name: "mlp.c_proj", shape: [d, inner], bias: true },
    ];
    learned_positions(keys, d, blocks, linears, &["n_positions", "max_position_embeddings"])
}

/// What GPT-2 and GPT-Neo share: a row per position, two norms a block and one after them, each
/// with a bias, and a head without one.
fn learned_positions(
    keys: &Keys,
    d: u64,
    blocks: u64,
    linears: Vec<LinearShape>,
    positions: &[&str],
) -> Result<ModelShape> {
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    let positions = keys.needed(positions, MAX_ROWS)?;
    let tied = keys.flag("tie_word_embeddings", true)?;
    Ok(ModelShape {
        family: keys.family.to_owned(),
        blocks,
        linears,
        query: [d, d],
        value: [d, d],
        embeddings: (vocab + positions) * d,
        tied,
        head: if tied { 0 } else { vocab * d },
        norms: (2 * blocks + 1) * 2 * d,
        rest: 0,
    })
}

fn opt(keys: &Keys) -> Result<ModelShape> {
    let d = keys.width(&["hidden_size"])?;
    let ff = keys.width(&["ffn_dim"])?;
    let blocks = keys.needed(&["num_hidden_layers"], MAX_BLOCKS)?;
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    // The first two rows of the table stand for padding.
    let positions = keys.needed(&["max_position_embeddings"], MAX_ROWS)? + 2;
    let token = keys.number(&["word_embed_proj_dim"], MAX_WIDTH)?.unwrap_or(d);
    let tied = keys.flag("tie_word_embeddings", true)?;
    let bias = keys.flag("enable_bias", true)?;
    let final_norm = keys.flag("do_layer_norm_before", true)?
        && !keys.flag("_remove_final_layer_norm", false)?;
    let norm = if keys.flag("layer_norm_elementwise_affine", true)? { 2 * d } else { 0 };
    Ok(ModelShape {
        family: keys.family.to_owned(),
        blocks,
        linears: vec![
            LinearShape { name: "self_attn.q_proj", shape: [d, d], bias },
            LinearShape { name: "self_attn.k_proj", shape: [d, d], bias },
            LinearShape { name: "self_attn.v_proj", shape: [d, d], bias },
            LinearShape { name: "self_attn.out_proj", shape: [d, d], bias },
            LinearShape { name: "fc1", shape: [ff, d], bias },
            LinearShape { name: "fc2", shape: [d, ff], bias },
        ],
        query: [d, d],
        value: [d, d],
        embeddings: vocab * token + positions * d,
        tied,
        head: if tied { 0 } else { vocab * token },
        norms: (2 * blocks + u64::from(final_norm)) * norm,
        // Tokens of another width go through a matrix on the way in and one on the way out.
        rest: if token == d { 0 } else { 2 * token * d },
    })
}

/// The keys of one config.
struct Keys<'a> {
    values: &'a Map<String, Value>,
    family: &'a str,
}

impl Keys<'_> {
    fn width(&self, names: &[&str]) -> Result<u64> {
        self.needed(names, MAX_WIDTH)
    }

    /// The number under the first of `names` that is there.
    fn needed(&self, names: &[&str], max: u64) -> Result<u64> {
        self.number(names, max)?.ok_or_else(|| {
            let name = names.first().copied().unwrap_or_default();
            refused(format!("config.json of type {} has no `{name}`", self.family))
        })
    }

    /// As [`Keys::needed`], with `None` for a key that is missing or null.
    fn number(&self, names: &[&str], max: u64) -> Result<Option<u64>> {
        let found = names.iter().find_map(|name| {
            self.values.get(*name).filter(|value| !value.is_null()).map(|value| (name, value))
        });
        let Some((name, value)) = found else { return Ok(None) };
        match value.as_u64().filter(|number| (1..=max).contains(number)) {
            Some(number) => Ok(Some(number)),
            None => Err(Error::preflight(format!("`{name}` is {value}"))
                .fix(format!("a whole number from 1 to {max}"))),
        }
    }

    fn flag(&self, name: &str, default: bool) -> Result<bool> {
        match self.values.get(name) {
            None | Some(Value::Null) => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => {
                Err(Error::preflight(format!("`{name}` is {value}")).fix("true or false"))
            }
        }
    }
}

fn refused(what: String) -> Error {
    let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
    Error::preflight(what).fix(format!("a complete config.json of: {}", known.join(", ")))
}
