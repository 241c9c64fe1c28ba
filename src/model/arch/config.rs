//! A model's sizes and description, and the names of its parts that follow from them.

use std::path::Path;

use super::{Arch, Experts, LinearSpec, QueryNorm, Rope, RopeScaling, families, weight_name};
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
