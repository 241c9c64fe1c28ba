//! How llama.cpp knows a family: names, rows, and what its metadata says, in both directions.
//!
//! The keys that every family has are written and read by `export::gguf`; what a family adds stands in
//! its file, as a pair of functions. What a file says is never trusted to be everything: a model is
//! written only where its metadata, read back, describes the same computation ([`ModelConfig::computes`]).

use serde_json::{Map, Value, json};

use super::{ModelConfig, QueryNorm, Rope, RopeScaling, Span, families};
use crate::error::Result;

/// Names of parts of a block, ours and theirs.
pub type PartNames = &'static [(&'static str, &'static str)];

/// How llama.cpp knows a family.
#[derive(Debug)]
pub struct Gguf {
    /// `general.architecture`, and the prefix of its keys.
    pub architecture: &'static str,
    /// Names of a block's parts, ours and theirs.
    pub blocks: &'static [PartNames],
    /// Their names of the linears that may carry biases.
    pub biased: &'static [&'static str],
    /// Whether rows of queries and keys are reordered: ggml rotates neighbours there.
    pub neighbours: bool,
    /// Whether embedding and head are one matrix in every model, in none, or as the model has it.
    pub tied: Option<bool>,
    /// Whether its norms are layer norms, with a gain and a bias.
    pub layer_norms: bool,
    /// Whether heads together must be as wide as the model.
    pub square: bool,
    /// Tensors of divisors that may scale its rotations.
    pub divisors: &'static [&'static str],
    /// Keys that [`Gguf::read`] reads, without the prefix.
    pub keys: &'static [&'static str],
    /// The values of `keys` for a model.
    pub write: fn(&ModelConfig) -> Vec<(&'static str, GgufValue)>,
    /// Makes a `config.json` of the family, from one with the keys that Llama has.
    pub read: fn(&dyn GgufKeys, &mut Map<String, Value>) -> Result<()>,
}

impl Gguf {
    /// Nothing besides the keys that every family has; a base for the others.
    pub(super) const PLAIN: Self = Self {
        architecture: "",
        blocks: &[],
        biased: &[],
        neighbours: false,
        tied: None,
        layer_norms: false,
        square: false,
        divisors: &[],
        keys: &[],
        write: |_| Vec::new(),
        read: |_, _| Ok(()),
    };

    /// Names of a block's parts, ours and theirs.
    pub fn parts(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.blocks.iter().copied().flatten().copied()
    }

    /// The family that reads files of an architecture.
    pub fn of(architecture: &str) -> Option<&'static Self> {
        families::GGUF.iter().copied().find(|gguf| gguf.architecture == architecture)
    }

    /// The architectures that files may be of.
    pub fn architectures() -> impl Iterator<Item = &'static str> {
        families::GGUF.iter().map(|gguf| gguf.architecture)
    }
}

impl PartialEq for Gguf {
    fn eq(&self, other: &Self) -> bool {
        self.architecture == other.architecture
    }
}

/// A value of a file's metadata.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// A whole number.
    Count(usize),
    /// A number, kept in 32 bits.
    Number(f64),
    /// A truth value.
    Truth(bool),
    /// One for each block.
    Truths(Vec<bool>),
}

/// What a file says, under keys without the prefix of its architecture.
pub trait GgufKeys {
    /// A number.
    ///
    /// # Errors
    /// When the value is none.
    fn number(&self, key: &str) -> Result<Option<f64>>;

    /// A count of at least 1; 0 stands for nothing.
    ///
    /// # Errors
    /// When the value is none.
    fn count(&self, key: &str) -> Result<Option<usize>>;

    /// A truth value.
    ///
    /// # Errors
    /// When the value is none.
    fn truth(&self, key: &str) -> Result<Option<bool>>;

    /// A truth value for each block, from a list, or from a count `n` of which every last is false.
    ///
    /// # Errors
    /// When the value is neither.
    fn pattern(&self, key: &str) -> Result<Option<Vec<bool>>>;

    /// Whether a linear carries a bias; its name is theirs.
    fn biased(&self, part: &str) -> bool;
}

/// Divisors of frequencies, for Llama 3.1's scaling.
pub const ROPE_FACTORS: &str = "rope_freqs.weight";
/// LongRoPE's for long texts, and for short ones.
pub const LONG_FACTORS: [&str; 2] = ["rope_factors_long.weight", "rope_factors_short.weight"];
/// All that a family can have.
pub(super) const ALL_FACTORS: &[&str] = &[ROPE_FACTORS, LONG_FACTORS[0], LONG_FACTORS[1]];

/// Key of the width of windows.
pub(super) const WINDOW: &str = "attention.sliding_window";
/// Key of the blocks that have one.
pub(super) const PATTERN: &str = "attention.sliding_window_pattern";

/// Whether attention's and the MLP's linears carry biases, as most families' config says it.
pub(super) fn read_biases(keys: &dyn GgufKeys, config: &mut Map<String, Value>) {
    config.insert("attention_bias".to_owned(), json!(keys.biased("attn_q")));
    config.insert("mlp_bias".to_owned(), json!(keys.biased("ffn_up")));
}

/// The window of the blocks that have one, and which these are where it is not every block but each
/// `every`th.
pub(super) fn write_windows(config: &ModelConfig, every: usize) -> Vec<(&'static str, GgufValue)> {
    let slides: Vec<bool> = config.spans().map(|span| span.window.is_some()).collect();
    let Some(window) = config.spans().find_map(|span| span.window) else { return Vec::new() };
    let mut all = vec![(WINDOW, GgufValue::Count(window))];
    if slides.iter().enumerate().any(|(index, slides)| *slides != ((index + 1) % every != 0)) {
        all.push((PATTERN, GgufValue::Truths(slides)));
    }
    all
}

/// The inverse of [`write_windows`]: `sliding_window` and `layer_types`.
pub(super) fn read_windows(
    keys: &dyn GgufKeys,
    config: &mut Map<String, Value>,
    default: Option<usize>,
    every: usize,
) -> Result<()> {
    let blocks = config["num_hidden_layers"].as_u64().unwrap_or(0) as usize;
    let window = keys.count(WINDOW)?.or(default);
    let slides = keys.pattern(PATTERN)?;
    let slides = slides.unwrap_or_else(|| (1..=blocks).map(|at| at % every != 0).collect());
    let kind = |slides: bool| if slides { "sliding_attention" } else { "full_attention" };
    let kinds: Vec<&str> = slides.iter().map(|slides| kind(*slides && window.is_some())).collect();
    config.insert("sliding_window".to_owned(), json!(window));
    config.insert("layer_types".to_owned(), json!(kinds));
    Ok(())
}

/// Gives a setting the name that a family has for it.
pub(super) fn rename(config: &mut Map<String, Value>, names: &[(&str, &str)]) {
    for (from, to) in names {
        if let Some(value) = config.shift_remove(*from) {
            config.insert((*to).to_owned(), value);
        }
    }
}

/// Puts settings in, over others of the same name.
pub(super) fn set<const N: usize>(config: &mut Map<String, Value>, settings: [(&str, Value); N]) {
    config.extend(settings.map(|(key, value)| (key.to_owned(), value)));
}

/// The numbers of two models that are computed with in 32 bits are the same there.
fn same(a: f64, b: f64) -> bool {
    (a as f32).to_bits() == (b as f32).to_bits()
}

impl ModelConfig {
    /// The kind of attention of each block.
    pub fn spans(&self) -> impl Iterator<Item = &Span> {
        self.arch.span_of.iter().map(|index| &self.arch.spans[*index])
    }

    /// What a stored gain of a norm lacks of the one that is multiplied with: 1 in Gemma's, else 0.
    pub fn gain_offset(&self, tensor: &str) -> f32 {
        let Some(base) = tensor.strip_suffix(".weight") else { return 0.0 };
        let of_block = |inner: &str| self.block_norms().any(|(norm, _)| norm == inner);
        let is_norm = match self.inner(base) {
            Some((_, inner)) => of_block(inner),
            None => base.strip_prefix(self.arch.names.root) == self.arch.names.norm,
        };
        let shifted = self.arch.norm == super::NormKind::RmsPlusOne;
        if is_norm && shifted { 1.0 } else { 0.0 }
    }

    /// The first thing in which two models compute differently with the same weights, in 32 bits;
    /// what their parts are called does not count.
    pub fn computes(&self, other: &Self) -> Option<&'static str> {
        let (a, b) = (&self.arch, &other.arch);
        let sizes = |c: &Self| {
            let parts =
                [c.d_model, c.d_ff, c.n_blocks, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab];
            (parts, c.max_positions, c.arch.token_width, c.arch.positions.as_ref().map(|p| p.rows))
        };
        let scale =
            |c: &Self| c.arch.attention_scale.unwrap_or_else(|| 1.0 / (c.head_dim as f64).sqrt());
        let linears = |c: &Self| {
            let linear = |l: &super::LinearSpec| (l.role, l.shape, l.bias, l.expert);
            (0..c.n_blocks).flat_map(|at| c.specs(at).iter().map(linear)).collect::<Vec<_>>()
        };
        // Where it stands does not say what it is normed over, except for queries and keys.
        let norms = |c: &Self| {
            let n = c.arch.norms;
            [n.attention_input, n.attention_output, n.mlp_input, n.mlp_output, n.query, n.key]
                .map(|name| name.is_some())
        };
        let routing = |c: &Self| c.arch.experts.as_ref().map(|e| (e.active, e.normalized));
        let factors = |c: &Self| {
            let m = c.arch.multipliers;
            [m.embedding, m.residual, m.logits]
        };
        let all = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| same(*a, *b));
        let cap = |cap: Option<f64>| cap.unwrap_or(0.0);
        let growing = |c: &Self| c.arch.query_scaling.map_or([0.0; 2], |q| [q.beta, q.original]);
        let windows = |c: &Self| {
            let seen = |span: &Span| span.window.filter(|window| *window < c.max_positions);
            c.spans().map(seen).collect::<Vec<_>>()
        };
        let rotations = self.spans().zip(other.spans()).all(|(a, b)| match (&a.rope, &b.rope) {
            (Some(a), Some(b)) => a.turns_as(b, self.max_positions),
            (None, None) => true,
            _ => false,
        });
        let heads = |c: &Self| c.arch.query_norm.map(|norm| norm == QueryNorm::Head);
        let parts = [
            ("sizes", sizes(self) == sizes(other)),
            ("tie_word_embeddings", self.tied == other.tied),
            ("the kind of its norms", a.norm == b.norm && norms(self) == norms(other)),
            ("the epsilon of its norms", same(a.norm_eps, b.norm_eps)),
            ("norms on queries and keys", heads(self) == heads(other)),
            ("the order of its parts", a.residual == b.residual),
            ("its linears or their biases", linears(self) == linears(other)),
            ("how its tokens find their experts", routing(self) == routing(other)),
            ("the bias of its head", a.names.head_bias == b.names.head_bias),
            ("the scale of its scores", same(scale(self), scale(other))),
            ("the cap of its scores", same(cap(a.score_cap), cap(b.score_cap))),
            ("the cap of its logits", same(cap(a.logit_cap), cap(b.logit_cap))),
            ("its activation", a.activation == b.activation),
            ("its windows of attention", windows(self) == windows(other)),
            ("its rotations", rotations),
            ("queries that grow with their position", all(&growing(self), &growing(other))),
            ("its multipliers", all(&factors(self), &factors(other))),
        ];
        parts.into_iter().find_map(|(what, same)| (!same).then_some(what))
    }
}

impl Rope {
    /// Whether two rotations are the same up to rounding, in texts of up to `longest` positions.
    fn turns_as(&self, other: &Self, longest: usize) -> bool {
        /// What a scaling that was guessed from its divisors may be off.
        const ROUNDING: f32 = 1e-4;
        let close = |total: usize| {
            let both = [self, other].map(|rope| rope.inverse_frequencies(total));
            let apart = |(a, b): (&f32, &f32)| (a - b).abs() <= ROUNDING * a.abs();
            both[0].iter().zip(&both[1]).all(apart)
        };
        let switch = |rope: &Self| match &rope.scaling {
            RopeScaling::Long { original, .. } | RopeScaling::Dynamic { original, .. } => *original,
            _ => 0.0,
        };
        self.dims == other.dims
            && self.neighbours == other.neighbours
            && (self.attention_factor() / other.attention_factor() - 1.0).abs() < 1e-6
            && same(switch(self), switch(other))
            && close(1)
            && close(longest)
    }
}
