//! What a model is made of, said once: the description that loading, sizes, forward, activation sites,
//! adapters, balancing, exports and the preflight all read.
//!
//! A family is one file here: it reads its `config.json` and fills an [`Arch`]. Nothing else in the
//! source names a projection, a norm or the prefix of a block.

mod experts;
mod families;
mod gguf;
mod keys;
mod places;
mod rope;

use std::path::Path;

use serde::{Deserialize, Serialize};

pub use experts::Experts;
pub use families::model_types;
pub use gguf::{Gguf, GgufKeys, GgufValue, LONG_FACTORS, PartNames, ROPE_FACTORS};
pub use places::{Place, Places};
pub use rope::{Rope, RopeScaling};

use crate::error::{Error, Result};

/// A decoder-only model, resolved from `config.json`.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type`.
    pub model_type: String,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of decoder blocks.
    pub n_blocks: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Longest context the model was made for.
    pub max_positions: usize,
    /// Whether embedding and head are one matrix.
    pub tied: bool,
    /// Token put before a document.
    pub bos: Option<u32>,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    /// How its parts are put together.
    pub arch: Arch,
}

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

impl ModelConfig {
    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// When the file is missing or damaged, a needed key is absent, or the model uses something
    /// that is not supported; the key is named.
    pub fn read(dir: &Path) -> Result<Self> {
        if dir.is_file() {
            return Err(Error::usage("this is a file, and a model's folder is needed here")
                .at(dir.display())
                .fix("the Hugging Face folder that the file was made from"));
        }
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
        Self::parse(&text).map_err(|e| e.at(path.display()))
    }

    /// From the text of a `config.json`.
    ///
    /// # Errors
    /// As [`ModelConfig::read`].
    pub fn parse(text: &str) -> Result<Self> {
        families::read(text)
    }

    /// The first thing in which two models compute differently, or have other names for the same.
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        let rotations = self.arch.spans == other.arch.spans;
        let names = self.tensors() == other.tensors();
        let exact = [("its rotations", rotations), ("the names of its tensors", names)];
        self.computes(other)
            .or_else(|| exact.into_iter().find_map(|(what, same)| (!same).then_some(what)))
    }

    /// With the names that a checkpoint has: some were saved with another root.
    #[must_use]
    pub fn with_names_of(mut self, contains: impl Fn(&str) -> bool) -> Self {
        let names = self.arch.names.clone();
        let holds = |root: &&&str| {
            contains(&format!("{root}{}.weight", names.embedding))
                || contains(&format!(
                    "{root}{}.0.{}.weight",
                    names.blocks, self.arch.linears[0].name
                ))
        };
        if let Some(root) = names.roots.iter().find(holds) {
            self.arch.names.root = root;
        }
        self
    }

    /// Whether a text that grows from `past` to `total` positions gets other rotations from its first
    /// position on.
    pub fn rotates_anew(&self, past: usize, total: usize) -> bool {
        let ropes = self.arch.spans.iter().filter_map(|span| span.rope.as_ref());
        let long = |rope: &Rope| match rope.scaling {
            RopeScaling::Long { original, .. } => {
                past > 0 && past as f64 <= original && total as f64 > original
            }
            _ => false,
        };
        ropes.into_iter().any(long)
    }

    /// The token embedding's name.
    pub fn embedding(&self) -> String {
        self.outside(self.arch.names.embedding, "weight")
    }

    /// The output head's name as a linear.
    pub fn head(&self) -> &'static str {
        self.arch.names.head
    }

    /// `[out, in]` of the head, and of the embedding.
    pub fn head_shape(&self) -> [usize; 2] {
        [self.vocab, self.arch.token_width.unwrap_or(self.d_model)]
    }

    /// A part outside the blocks by its full name.
    pub fn outside(&self, part: &str, vector: &str) -> String {
        format!("{}{part}.{vector}", self.arch.names.root)
    }

    /// The name of block `index`'s tensors, for instance `model.layers.INDEX`.
    pub fn block_prefix(&self, index: usize) -> String {
        format!("{}{}.{index}", self.arch.names.root, self.arch.names.blocks)
    }

    /// The block that a tensor or a linear of this full name belongs to.
    pub fn block_of(&self, name: &str) -> Option<usize> {
        let (index, _) = self.inner(name)?;
        Some(index)
    }

    /// Block and name within it.
    pub fn inner<'n>(&self, name: &'n str) -> Option<(usize, &'n str)> {
        let rest = name.strip_prefix(self.arch.names.root)?;
        let rest = rest.strip_prefix(self.arch.names.blocks)?.strip_prefix('.')?;
        let (index, inner) = rest.split_once('.')?;
        Some((index.parse().ok()?, inner))
    }

    /// A block's linear by its name within it.
    pub fn linear(&self, inner: &str) -> Option<&LinearSpec> {
        let experts = self.arch.experts.iter().flat_map(|experts| &experts.linears);
        self.arch.linears.iter().chain(experts).find(|spec| spec.name == inner)
    }

    /// Width of what a token is to the MLP between its linears, over all experts that it goes to.
    pub fn inner_width(&self) -> usize {
        let experts = self.arch.experts.as_ref();
        experts.map_or(self.d_ff, |experts| self.d_ff.max(experts.active * experts.width))
    }

    /// The experts of block `index`.
    pub fn experts(&self, index: usize) -> Option<&Experts> {
        let experts = self.arch.experts.as_ref()?;
        experts.blocks.get(index).copied().unwrap_or(false).then_some(experts)
    }

    /// The linears of block `index`, in the order of execution.
    pub fn specs(&self, index: usize) -> &[LinearSpec] {
        self.experts(index).map_or(&self.arch.linears, |experts| &experts.linears)
    }

    /// Every linear of the decoder blocks by full name, in the order of execution.
    pub fn linears(&self) -> impl Iterator<Item = (String, &LinearSpec)> {
        (0..self.n_blocks).flat_map(move |index| {
            let prefix = self.block_prefix(index);
            let full = move |spec: &'_ LinearSpec| format!("{prefix}.{}", spec.name);
            self.specs(index).iter().map(move |spec| (full(spec), spec))
        })
    }

    /// Every linear of the decoder blocks by full name, with its `[out, in]`.
    pub fn linear_shapes(&self) -> Vec<(String, [usize; 2])> {
        self.linears().map(|(name, spec)| (name, spec.shape)).collect()
    }

    /// Names of the weights that checkpoints hold as `[in, out]`.
    pub fn stored_by_columns(&self) -> impl Iterator<Item = String> {
        self.linears().filter(|(_, spec)| spec.columns).map(|(name, _)| weight_name(&name))
    }

    /// Every tensor of the model by name, with its shape as `[out, in]`. A tied head is not among them.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (arch, d) = (&self.arch, self.d_model);
        let mut all = vec![(self.embedding(), self.head_shape().to_vec())];
        if let Some(table) = &arch.positions {
            all.push((self.outside(table.name, "weight"), vec![table.rows, d]));
        }
        if let (Some([into, out]), Some(width)) = (arch.names.projections, arch.token_width) {
            all.push((self.outside(into, "weight"), vec![d, width]));
            all.push((self.outside(out, "weight"), vec![width, d]));
        }
        for index in 0..self.n_blocks {
            let prefix = self.block_prefix(index);
            for (norm, width) in self.block_norms() {
                all.extend(self.norm_vectors(&format!("{prefix}.{norm}"), width));
            }
            if let Some(experts) = self.experts(index) {
                let router = format!("{prefix}.{}.weight", experts.router);
                all.push((router, vec![experts.count, d]));
            }
            for spec in self.specs(index) {
                all.push((format!("{prefix}.{}.weight", spec.name), spec.shape.to_vec()));
                if spec.bias {
                    all.push((format!("{prefix}.{}.bias", spec.name), vec![spec.shape[0]]));
                }
            }
        }
        if let Some(norm) = arch.names.norm {
            all.extend(self.norm_vectors(&format!("{}{norm}", arch.names.root), d));
        }
        if !self.tied {
            all.push((weight_name(self.head()), self.head_shape().to_vec()));
        }
        if arch.names.head_bias {
            all.push((format!("{}.bias", self.head()), vec![self.vocab]));
        }
        all
    }

    /// The norms of one block by their names in it, with their widths.
    pub fn block_norms(&self) -> impl Iterator<Item = (&'static str, usize)> {
        let norms = self.arch.norms;
        let stream =
            [norms.attention_input, norms.attention_output, norms.mlp_input, norms.mlp_output];
        let heads = [(norms.query, self.n_heads), (norms.key, self.n_kv_heads)];
        let width = |heads: usize| match self.arch.query_norm {
            Some(QueryNorm::Width) => heads * self.head_dim,
            _ => self.head_dim,
        };
        let of_heads = heads.map(|(name, heads)| name.map(|name| (name, width(heads))));
        let d = self.d_model;
        stream
            .into_iter()
            .flatten()
            .map(move |name| (name, d))
            .chain(of_heads.into_iter().flatten())
    }

    fn norm_vectors(&self, name: &str, width: usize) -> Vec<(String, Vec<usize>)> {
        let vectors = ["weight", "bias"].into_iter().take(self.arch.norm.vectors());
        vectors.map(|vector| (format!("{name}.{vector}"), vec![width])).collect()
    }
}

/// The checkpoint name of a linear's weight.
pub fn weight_name(linear: &str) -> String {
    format!("{linear}.weight")
}
