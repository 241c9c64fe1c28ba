//! What a model is made of, said once: the description that loading, sizes, forward, activation sites,
//! adapters, balancing, exports and the preflight all read.
//!
//! A family is one file here: it reads its `config.json` and fills an [`Arch`]. Nothing else in the
//! source names a projection, a norm or the prefix of a block.

mod config;
mod experts;
mod families;
mod gguf;
mod keys;
mod places;
mod rope;

use serde::{Deserialize, Serialize};

pub use config::ModelConfig;
pub use experts::Experts;
pub use families::model_types;
pub use gguf::{Gguf, GgufKeys, GgufValue, LONG_FACTORS, PartNames, ROPE_FACTORS};
pub use places::{Place, Places};
pub use rope::{Rope, RopeScaling};

/// How a family's blocks are built, and what its tensors are called.
#[derive(Clone, Debug, PartialEq)]
pub struct Arch {
    /// Kind of every norm.
    pub norm: NormKind,
    /// Added to the norms' mean squares.
    pub norm_eps: f64,
    /// How attention and MLP join the residual stream.
    pub residual: Residual,
    /// A block's norms by the names they have in it.
    pub norms: BlockNorms,
    /// A block's linears, in the order of execution; of one without experts.
    pub linears: Vec<LinearSpec>,
    /// What some blocks, or all, have in place of an MLP.
    pub experts: Option<Experts>,
    /// What scores are multiplied by; absent: one over the root of `head_dim`.
    pub attention_scale: Option<f64>,
    /// Scores become `c tanh(score / c)`.
    pub score_cap: Option<f64>,
    /// What normed queries and keys are normed over; absent where they are not.
    pub query_norm: Option<QueryNorm>,
    /// What an MLP does between its linears.
    pub activation: Activation,
    /// The kinds of attention that its blocks have.
    pub spans: Vec<Span>,
    /// Which of `spans` a block has, by its index.
    pub span_of: Vec<usize>,
    /// Learned positions, added to the embedded tokens.
    pub positions: Option<LearnedPositions>,
    /// Queries at late positions are scaled up.
    pub query_scaling: Option<QueryScaling>,
    /// Factors of the streams.
    pub multipliers: Multipliers,
    /// Logits become `c tanh(logit / c)`.
    pub logit_cap: Option<f64>,
    /// Width of the token embedding where it is not the model's.
    pub token_width: Option<usize>,
    /// Names outside the blocks.
    pub names: Names,
    /// How llama.cpp knows the family; absent where it does not, or fewbit cannot say it.
    pub gguf: Option<&'static Gguf>,
}

/// The kind of a norm.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum NormKind {
    /// Root mean square, times the gain.
    Rms,
    /// Root mean square, times one more than the stored gain (Gemma).
    RmsPlusOne,
    /// Layer norm with gain and bias.
    Layer,
    /// Layer norm with neither.
    LayerPlain,
}

impl NormKind {
    /// How many vectors it has: gain and bias.
    pub fn vectors(self) -> usize {
        match self {
            Self::Rms | Self::RmsPlusOne => 1,
            Self::Layer => 2,
            Self::LayerPlain => 0,
        }
    }
}

/// How attention and MLP join the residual stream.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Residual {
    /// One after the other: `h += attention(norm(h))`, `h += mlp(norm(h))`; norms on their outputs
    /// where [`BlockNorms`] names some.
    Sequential,
    /// Side by side: `h + attention(norm(h)) + mlp(norm(h))`; one norm for both where the MLP has none.
    Parallel,
    /// The norms on the outputs stand behind the sums: `h = norm(h + attention(h))`.
    NormedSum,
}

/// Names of a block's norms within it; absent where it has none.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct BlockNorms {
    /// Before attention.
    pub attention_input: Option<&'static str>,
    /// Behind attention.
    pub attention_output: Option<&'static str>,
    /// Before the MLP.
    pub mlp_input: Option<&'static str>,
    /// Behind the MLP.
    pub mlp_output: Option<&'static str>,
    /// Of queries.
    pub query: Option<&'static str>,
    /// Of keys.
    pub key: Option<&'static str>,
}

/// What the norms of queries and keys go over.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum QueryNorm {
    /// Each head by itself.
    Head,
    /// All heads at once.
    Width,
}

/// One linear of a block.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LinearSpec {
    /// Its name within the block.
    pub name: &'static str,
    /// What it computes.
    pub role: Role,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Whether it carries a bias, `[out]`.
    pub bias: bool,
    /// Whether checkpoints hold it as `[in, out]` (GPT-2's Conv1D).
    pub columns: bool,
    /// The expert that it is a part of.
    pub expert: Option<usize>,
}

impl LinearSpec {
    /// The site that feeds it.
    pub fn site(&self) -> Site {
        match (self.role.site(), self.expert) {
            (Site::Mlp, Some(expert)) => Site::Expert(expert),
            (Site::MlpOutput, Some(expert)) => Site::ExpertOutput(expert),
            (site, _) => site,
        }
    }
}

/// What a linear of a block computes.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Role {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// All queries, then all keys, then all values.
    QueryKeyValue,
    /// Query, key and value of each head in turn (GPT-NeoX).
    QueryKeyValueByHead,
    /// Output of attention.
    Output,
    /// Gate of the MLP.
    Gate,
    /// Into the MLP; in a plain one what the activation acts on.
    Up,
    /// Gate, then up.
    GateUp,
    /// Out of the MLP.
    Down,
}

impl Role {
    /// The site that feeds it in a block without experts.
    fn site(self) -> Site {
        match self {
            Self::Query
            | Self::Key
            | Self::Value
            | Self::QueryKeyValue
            | Self::QueryKeyValueByHead => Site::Attention,
            Self::Output => Site::AttentionOutput,
            Self::Gate | Self::Up | Self::GateUp => Site::Mlp,
            Self::Down => Site::MlpOutput,
        }
    }

    /// Whether it is a part of attention, not of the MLP.
    pub fn in_attention(self) -> bool {
        matches!(self.site(), Site::Attention | Site::AttentionOutput)
    }

    /// Whether what it gives enters scores and nothing else.
    pub fn feeds_scores(self) -> bool {
        matches!(self, Self::Query | Self::Key)
    }
}

/// A place in a block where a caller may look at, or replace, what flows through.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Site {
    /// Input of queries, keys and values, after the norm.
    Attention,
    /// Keys, before rotation.
    Keys,
    /// Values.
    Values,
    /// Input of attention's output linear.
    AttentionOutput,
    /// Input of gate and up, after the norm.
    Mlp,
    /// Input of down.
    MlpOutput,
    /// Input of an expert's gate and up: its tokens of the whole batch, `[1, tokens, d_model]`. An
    /// expert without any is not visited.
    Expert(usize),
    /// Input of an expert's down.
    ExpertOutput(usize),
}

impl Site {
    /// The expert that it is a part of.
    pub fn expert(self) -> Option<usize> {
        match self {
            Self::Expert(expert) | Self::ExpertOutput(expert) => Some(expert),
            _ => None,
        }
    }

    /// The sites that feed linears of a block without experts.
    pub const INPUTS: [Self; 4] =
        [Self::Attention, Self::AttentionOutput, Self::Mlp, Self::MlpOutput];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::Keys => "keys",
            Self::Values => "values",
            Self::AttentionOutput => "attention_output",
            Self::Mlp => "mlp",
            Self::MlpOutput => "mlp_output",
            Self::Expert(_) => "expert",
            Self::ExpertOutput(_) => "expert_output",
        }
    }
}

/// What an MLP does between its linears; with a gate, `f(gate) * up`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Activation {
    /// `x sigmoid(x)`.
    Silu,
    /// `x Φ(x)`.
    Gelu,
    /// Its approximation by a hyperbolic tangent.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
}

/// One kind of attention: how far it looks, and how it knows positions.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Keys that a query sees, its own among them; absent: all before it.
    pub window: Option<usize>,
    /// Rotary embedding; absent where queries and keys are not rotated.
    pub rope: Option<Rope>,
}

/// A learned embedding of positions.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct LearnedPositions {
    /// Its tensor's name.
    pub name: &'static str,
    /// Rows of the table.
    pub rows: usize,
    /// Row of position 0.
    pub offset: usize,
}

/// Queries at position `p` are multiplied by `1 + beta ln(1 + floor(p / original))` (Llama 4).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScaling {
    /// The factor.
    pub beta: f64,
    /// Context of pre-training.
    pub original: f64,
}

/// Factors of the streams; 1 where a family has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Of the embedded tokens.
    pub embedding: f64,
    /// Of what attention and MLP add to the residual stream.
    pub residual: f64,
    /// Of the logits.
    pub logits: f64,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

/// Names outside the blocks. All but the head's stand below [`Names::root`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Names {
    /// What checkpoints put before every name here; the first one found in a checkpoint is taken.
    pub roots: &'static [&'static str],
    /// The root of the checkpoint at hand.
    pub root: &'static str,
    /// Of the blocks, before their index.
    pub blocks: &'static str,
    /// The token embedding.
    pub embedding: &'static str,
    /// The final norm; absent where there is none.
    pub norm: Option<&'static str>,
    /// The head as a linear, without a root.
    pub head: &'static str,
    /// Whether the head carries a bias.
    pub head_bias: bool,
    /// Projections between the embedding's width and the model's.
    pub projections: Option<[&'static str; 2]>,
    /// What stands before the tensors of other models in the same file, an image encoder's for instance.
    pub beside: &'static [&'static str],
}

impl Names {
    /// Llama's, which most families took over.
    pub const LLAMA: Self = Self {
        roots: &["model."],
        root: "model.",
        blocks: "layers",
        embedding: "embed_tokens",
        norm: Some("norm"),
        head: "lm_head",
        head_bias: false,
        projections: None,
        beside: &[],
    };
}

/// The checkpoint name of a linear's weight.
pub fn weight_name(linear: &str) -> String {
    format!("{linear}.weight")
}
