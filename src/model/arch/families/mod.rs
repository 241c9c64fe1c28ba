//! The families that fewbit knows, one file each, and what most of them share with Llama.
//!
//! Keys and their defaults are those of each family's configuration in transformers.

use serde_json::{Map, Value};

use super::gguf::{Gguf, GgufValue, PartNames};
use super::keys::{Keys, MAX_BLOCKS, MAX_LINEARS, MAX_ROWS, MAX_WIDTH};
use super::rope::{Rope, RopeDefaults};
use super::{
    Activation, Arch, BlockNorms, LinearSpec, ModelConfig, Multipliers, Names, NormKind, Residual,
    Role, Span,
};
use crate::error::{Error, Result};

/// How a family reads its config.
type Read = fn(&Keys<'_>) -> Result<ModelConfig>;

/// Declares the modules and the list of `model_type`s, in alphabetical order.
macro_rules! families {
    ($($module:ident: $($model_type:literal),+;)+) => {
        $(mod $module;)+
        const FAMILIES: &[(&str, Read)] = &[$($(($model_type, $module::read as Read)),+),+];
    };
}

families! {
    exaone4: "exaone4";
    gemma: "gemma";
    gemma2: "gemma2";
    gemma3: "gemma3_text", "gemma3";
    gpt2: "gpt2";
    gpt_neo: "gpt_neo";
    gpt_neox: "gpt_neox";
    gptj: "gptj";
    granite: "granite";
    hyperclovax: "hyperclovax";
    llama: "llama";
    ministral3: "ministral3";
    mistral: "mistral";
    olmo2: "olmo2";
    olmo3: "olmo3";
    opt: "opt";
    phi: "phi";
    phi3: "phi3";
    qwen2: "qwen2";
    qwen3: "qwen3";
    qwen3_moe: "qwen3_moe";
    smollm3: "smollm3";
}

/// The families that llama.cpp knows, each under an architecture of its own.
pub(super) const GGUF: &[&Gguf] = &[
    &exaone4::GGUF,
    &gemma::GGUF,
    &gemma2::GGUF,
    &gemma3::GGUF,
    &gpt2::GGUF,
    &gpt_neox::GGUF,
    &granite::GGUF,
    &llama::GGUF,
    &ministral3::GGUF,
    &olmo2::GGUF,
    &phi::GGUF,
    &phi3::GGUF,
    &qwen2::GGUF,
    &qwen3::GGUF,
    &qwen3_moe::GGUF,
    &smollm3::GGUF,
];

/// Every `model_type` that is known.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Reads the text of a `config.json`.
pub(super) fn read(text: &str) -> Result<ModelConfig> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let values: Map<String, Value> = serde_json::from_str(text).map_err(|e| {
        let error = Error::preflight(format!("config.json is not valid: {e}"));
        match ["Infinity", "NaN"].iter().find(|word| text.contains(*word)) {
            Some(word) => {
                error.fix(format!("a number in place of `{word}`, which JSON does not have"))
            }
            None => error.fix("the model's own config.json"),
        }
    })?;
    let keys = Keys::new(&values);
    let model_type = keys.text(&["model_type"])?.ok_or_else(|| keys.missing("model_type"))?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        let known: Vec<&str> = model_types().collect();
        return Err(Error::preflight(format!("model_type `{model_type}` is not supported"))
            .fix(format!("a model of type {}", known.join(", "))));
    };
    let config = read(&keys)?;
    keys.refuse_unread(model_type)?;
    check_count(&config)?;
    Ok(config)
}

/// Refuses a model of more linears than any has: a few bytes of JSON must not ask for gigabytes of names.
fn check_count(config: &ModelConfig) -> Result<()> {
    let count: usize = (0..config.n_blocks).map(|index| config.specs(index).len()).sum();
    if count <= MAX_LINEARS {
        return Ok(());
    }
    Err(Error::preflight(format!("{count} linears, of {} blocks", config.n_blocks))
        .at("num_hidden_layers, num_experts")
        .fix(format!("blocks and experts of {MAX_LINEARS} linears at most")))
}

/// What families like Llama take for granted where their config is silent.
struct Defaults {
    /// Key and value heads; `None`: as many as query heads.
    kv_heads: Option<usize>,
    /// Width of a head; `None`: the model's width over the heads.
    head_dim: Option<usize>,
    tied: bool,
    max_positions: usize,
    norm_eps: f64,
    theta: f64,
    partial: f64,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            kv_heads: None,
            head_dim: None,
            tied: false,
            max_positions: 2048,
            norm_eps: 1e-6,
            theta: 10_000.0,
            partial: 1.0,
        }
    }
}

/// Sizes, rotary positions, RMS norms before attention and MLP; linears are added by
/// [`gated`] or the family.
fn llama_like(keys: &Keys<'_>, defaults: &Defaults) -> Result<ModelConfig> {
    let d_model = keys.width(&["hidden_size"])?;
    let d_ff = keys.width(&["intermediate_size"])?;
    let n_heads = keys.width(&["num_attention_heads"])?;
    let n_blocks = keys.needed(&["num_hidden_layers"], MAX_BLOCKS)?;
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    let n_kv_heads = match keys.count(&["num_key_value_heads"], MAX_WIDTH)? {
        Some(heads) => heads,
        // An explicit null means one per query head in every family.
        None if keys.has("num_key_value_heads") => n_heads,
        None => defaults.kv_heads.unwrap_or(n_heads),
    };
    let head_dim = keys.count(&["head_dim"], MAX_WIDTH)?;
    let head_dim = match head_dim.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None => d_model / n_heads,
    };
    check_heads(d_model, [n_heads, n_kv_heads], head_dim)?;
    if !head_dim.is_multiple_of(2) {
        return Err(Error::preflight(format!("head_dim {head_dim} is not even"))
            .fix("heads of an even width, which rotations need"));
    }
    let max_positions =
        keys.count(&["max_position_embeddings"], MAX_ROWS)?.unwrap_or(defaults.max_positions);
    let rope =
        RopeDefaults { head_dim, theta: defaults.theta, partial: defaults.partial, max_positions };
    let rope = Rope::read(keys, "full_attention", &rope)?;
    Ok(ModelConfig {
        model_type: keys.text(&["model_type"])?.unwrap_or_default().to_owned(),
        d_model,
        d_ff,
        n_blocks,
        n_heads,
        n_kv_heads,
        head_dim,
        vocab,
        max_positions,
        tied: keys.flag("tie_word_embeddings", defaults.tied)?,
        bos: keys.tokens("bos_token_id", vocab)?.first().copied(),
        eos: keys.tokens("eos_token_id", vocab)?,
        arch: Arch {
            norm: NormKind::Rms,
            norm_eps: keys.positive("rms_norm_eps")?.unwrap_or(defaults.norm_eps),
            residual: Residual::Sequential,
            norms: BlockNorms {
                attention_input: Some("input_layernorm"),
                mlp_input: Some("post_attention_layernorm"),
                ..BlockNorms::default()
            },
            linears: Vec::new(),
            experts: None,
            attention_scale: None,
            score_cap: None,
            query_norm: None,
            activation: activation(keys, "silu")?,
            spans: vec![Span { window: None, rope: Some(rope) }],
            span_of: vec![0; n_blocks],
            positions: None,
            query_scaling: None,
            multipliers: Multipliers::default(),
            logit_cap: None,
            token_width: None,
            names: Names::LLAMA,
            gguf: None,
        },
    })
}

/// Refuses heads that do not divide, or widths that no product holds.
fn check_heads(d_model: usize, [heads, kv_heads]: [usize; 2], head_dim: usize) -> Result<()> {
    if !heads.is_multiple_of(kv_heads) {
        let what =
            format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}");
        return Err(Error::preflight(what).fix("a number of heads that does"));
    }
    if head_dim == 0 || heads * head_dim > MAX_WIDTH {
        let what = format!("{heads} heads of width {head_dim} fit no model of width {d_model}");
        return Err(Error::preflight(what)
            .at("num_attention_heads, head_dim")
            .fix(format!("heads that together are from 1 to {MAX_WIDTH} wide")));
    }
    Ok(())
}

/// The activation under the first key that a family has for it.
fn activation(keys: &Keys<'_>, default: &str) -> Result<Activation> {
    const NAMES: [&str; 3] = ["hidden_activation", "hidden_act", "activation_function"];
    let name = keys.text(&NAMES)?.unwrap_or(default);
    match name {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(Activation::GeluTanh),
        "relu" => Ok(Activation::Relu),
        other => Err(keys.refuse("hidden_act", other, "a model with silu, gelu, gelu_new or relu")),
    }
}

/// Whether q, k and v, whether o, and whether the MLP's linears carry biases.
type Biases = [bool; 3];

/// The linears of grouped-query attention with a gated MLP, under Llama's names.
fn gated(mut config: ModelConfig, biases: Biases) -> ModelConfig {
    let (d, ff) = (config.d_model, config.d_ff);
    let [q, kv] = [config.n_heads, config.n_kv_heads].map(|heads| heads * config.head_dim);
    let [qkv, o, mlp] = biases;
    config.arch.linears = vec![
        linear("self_attn.q_proj", Role::Query, [q, d], qkv),
        linear("self_attn.k_proj", Role::Key, [kv, d], qkv),
        linear("self_attn.v_proj", Role::Value, [kv, d], qkv),
        linear("self_attn.o_proj", Role::Output, [d, q], o),
        linear("mlp.gate_proj", Role::Gate, [ff, d], mlp),
        linear("mlp.up_proj", Role::Up, [ff, d], mlp),
        linear("mlp.down_proj", Role::Down, [d, ff], mlp),
    ];
    config
}

fn linear(name: &'static str, role: Role, shape: [usize; 2], bias: bool) -> LinearSpec {
    LinearSpec { name, role, shape, bias, columns: false, expert: None }
}

/// The kinds of attention of a model whose `layer_types` say which blocks look at a window only;
/// `slides` is what a config without the key means.
fn windows(
    keys: &Keys<'_>,
    config: &mut ModelConfig,
    window: Option<usize>,
    slides: impl Fn(usize) -> bool,
) -> Result<()> {
    let n_blocks = config.n_blocks;
    let slides: Vec<bool> = match keys.texts("layer_types")? {
        None => (0..n_blocks).map(slides).collect(),
        Some(types) if types.len() == n_blocks => types
            .iter()
            .map(|kind| match *kind {
                "sliding_attention" => Ok(true),
                "full_attention" => Ok(false),
                other => {
                    let fix = "layers of full_attention and sliding_attention";
                    Err(keys.refuse("layer_types", other, fix))
                }
            })
            .collect::<Result<_>>()?,
        Some(types) => {
            let fix = format!("{n_blocks}, one for each of num_hidden_layers");
            return Err(keys.refuse("layer_types", format!("{} entries", types.len()), &fix));
        }
    };
    let Some(window) = window.filter(|_| slides.iter().any(|slides| *slides)) else {
        return Ok(());
    };
    let full = config.arch.spans[0].clone();
    config.arch.spans.push(Span { window: Some(window), ..full });
    config.arch.span_of = slides.into_iter().map(usize::from).collect();
    Ok(())
}

/// The rotations of layers with a window, where those of the others differ: a table of their own, or in
/// folders of transformers 4 a base that nothing scales.
fn local_rope(keys: &Keys<'_>, config: &mut ModelConfig, theta: f64) -> Result<()> {
    let (head_dim, max_positions) = (config.head_dim, config.max_positions);
    let Some(span) = config.arch.spans.get_mut(1) else { return Ok(()) };
    let nested = keys.table(&["rope_parameters"])?.is_some_and(|table| table.holds_tables());
    let defaults = RopeDefaults { head_dim, theta, partial: 1.0, max_positions };
    span.rope = Some(if nested {
        Rope::read(keys, "sliding_attention", &defaults)?
    } else {
        Rope::plain(theta, head_dim)
    });
    Ok(())
}

/// llama.cpp's names of the linears that [`gated`] makes.
const LINEARS: PartNames = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// Of attention's alone.
const ATTENTION: PartNames = &[
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
];

/// Of norms before attention and the MLP.
const INPUT_NORMS: PartNames =
    &[("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];

/// Of norms on what they add.
const OUTPUT_NORMS: PartNames = &[
    ("post_attention_layernorm", "post_attention_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// Of norms on both sides.
const SANDWICH_NORMS: PartNames = &[
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "post_attention_norm"),
    ("pre_feedforward_layernorm", "ffn_norm"),
    ("post_feedforward_layernorm", "post_ffw_norm"),
];

/// Of norms on queries and keys.
const HEAD_NORMS: PartNames =
    &[("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm")];

/// Sizes of families that name them differently.
struct Sizes {
    d: usize,
    heads: usize,
    inner: usize,
    positions: usize,
    tied: bool,
}

/// A model with layer norms and as many key heads as query heads, without rotary positions; the family
/// names its parts.
fn plain(keys: &Keys<'_>, sizes: &Sizes, blocks: &[&str]) -> Result<ModelConfig> {
    let Sizes { d, heads, inner, positions, tied } = *sizes;
    let n_blocks = keys.needed(blocks, MAX_BLOCKS)?;
    let vocab = keys.needed(&["vocab_size"], MAX_ROWS)?;
    if !d.is_multiple_of(heads) {
        return Err(Error::preflight(format!("{heads} heads do not divide a width of {d}"))
            .fix("a number of heads that does"));
    }
    check_heads(d, [heads, heads], d / heads)?;
    Ok(ModelConfig {
        model_type: keys.text(&["model_type"])?.unwrap_or_default().to_owned(),
        d_model: d,
        d_ff: inner,
        n_blocks,
        n_heads: heads,
        n_kv_heads: heads,
        head_dim: d / heads,
        vocab,
        max_positions: positions,
        tied: keys.flag("tie_word_embeddings", tied)?,
        bos: keys.tokens("bos_token_id", vocab)?.first().copied(),
        eos: keys.tokens("eos_token_id", vocab)?,
        arch: Arch {
            norm: NormKind::Layer,
            norm_eps: 1e-5,
            residual: Residual::Sequential,
            norms: BlockNorms::default(),
            linears: Vec::new(),
            experts: None,
            attention_scale: None,
            score_cap: None,
            query_norm: None,
            activation: Activation::GeluTanh,
            spans: vec![Span { window: None, rope: None }],
            span_of: vec![0; n_blocks],
            positions: None,
            query_scaling: None,
            multipliers: Multipliers::default(),
            logit_cap: None,
            token_width: None,
            names: Names::LLAMA,
            gguf: None,
        },
    })
}
