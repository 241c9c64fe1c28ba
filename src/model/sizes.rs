//! The size model: what a model of few bits, its adapters and its training take, from its shape.
//!
//! After PEQA (arXiv 2305.14152, table 4): every linear of the decoder blocks holds codes of b
//! bits, and for each output channel (or group along the inputs) a 16-bit scale and a zero point
//! of b bits; everything else stays at 16 bits. The width of the zero point is inferred: with it
//! the model gives the sizes of that table to two decimals.

use std::path::Path;

use super::arch::{LinearSpec, ModelConfig};
use crate::error::{Error, Result};

/// Bits of a scale, and of every parameter that is not quantized.
const FLOAT_BITS: u64 = 16;

/// Bytes in training for each parameter that learns, besides its value: gradient and two moments
/// of Adam in f32.
pub const TRAINING_BYTES: u64 = 12;

/// What fine-tuning may change. A group size of `None` is one group per output channel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Trainable {
    /// PEQA (arXiv 2305.14152): the scale of every group.
    Scales {
        /// Weights per group.
        group_size: Option<u64>,
    },
    /// AlphaTuning (arXiv 2210.03858): of binary-coded weights the largest alpha of every group.
    LargestAlphas {
        /// Weights per group.
        group_size: Option<u64>,
    },
    /// All alphas of binary-coded weights.
    Alphas {
        /// Bits, one alpha each.
        bits: u64,
        /// Weights per group.
        group_size: Option<u64>,
    },
    /// LoRA (arXiv 2106.09685) on the query and value projections, also where they are parts of a
    /// fused linear.
    LoraQueryValue {
        /// Rank of the two factors.
        rank: u64,
    },
    /// LoRA on every linear of the blocks as it is stored.
    LoraAll {
        /// Rank of the two factors.
        rank: u64,
    },
    /// The weights of the blocks' linears.
    BlockLinears,
    /// Every parameter.
    Everything,
}

/// Parameter counts of a model, from its `config.json` alone.
#[derive(Clone, Debug)]
pub struct ModelShape(ModelConfig);

impl ModelShape {
    /// Reads a `config.json`, or the one in a folder.
    ///
    /// # Errors
    /// When it cannot be read, and as [`ModelConfig::parse`].
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
    /// As [`ModelConfig::parse`].
    pub fn parse(text: &str) -> Result<Self> {
        ModelConfig::parse(text).map(Self)
    }

    /// What the config says.
    pub fn config(&self) -> &ModelConfig {
        &self.0
    }

    /// Number of decoder blocks.
    pub fn blocks(&self) -> u64 {
        self.0.n_blocks as u64
    }

    /// The linears of the last block, which has experts where some blocks do.
    pub fn linears(&self) -> &[LinearSpec] {
        self.0.specs(self.0.n_blocks - 1)
    }

    /// Weights of the linears of all decoder blocks, biases aside.
    pub fn linear_weights(&self) -> u64 {
        self.0.linears().map(|(_, spec)| product(&spec.shape)).sum()
    }

    /// Biases of the linears of all decoder blocks.
    pub fn biases(&self) -> u64 {
        let biases = self.0.linears().filter(|(_, spec)| spec.bias);
        biases.map(|(_, spec)| spec.shape[0] as u64).sum()
    }

    /// Parameters of the embeddings of tokens and, where they are learned, positions.
    pub fn embeddings(&self) -> u64 {
        let positions = self.0.arch.positions.as_ref();
        let learned = positions.map_or(0, |table| (table.rows * self.0.d_model) as u64);
        product(&self.0.head_shape()) + learned
    }

    /// Parameters that the head has of its own.
    pub fn head(&self) -> u64 {
        let bias = if self.0.arch.names.head_bias { self.0.vocab as u64 } else { 0 };
        bias + if self.0.tied { 0 } else { product(&self.0.head_shape()) }
    }

    /// Parameters in all; a tied head counts once.
    pub fn parameters(&self) -> u64 {
        self.0.tensors().iter().map(|(_, shape)| product(shape)).sum()
    }

    /// Parameters of all norms, of blocks and outside.
    pub fn norms(&self) -> u64 {
        let linears = self.linear_weights() + self.biases();
        self.parameters() - linears - self.embeddings() - self.head() - self.rest()
    }

    /// Everything that is none of these: projections of tokens of another width, routers to experts.
    pub fn rest(&self) -> u64 {
        let width = self.0.arch.token_width.unwrap_or(0);
        let experts = (0..self.0.n_blocks).filter_map(|index| self.0.experts(index));
        let routed: usize = experts.map(|experts| experts.count).sum();
        ((2 * width + routed) * self.0.d_model) as u64
    }

    /// `[out, in]` of the projections of queries and of values, alone or as parts of a fused one.
    fn queries_and_values(&self) -> [(&'static str, [usize; 2]); 2] {
        let (config, d) = (&self.0, self.0.d_model);
        [("q", config.n_heads), ("v", config.n_kv_heads)]
            .map(|(name, heads)| (name, [heads * config.head_dim, d]))
    }

    /// How many parameters learn. Counts of scales and of LoRA on q and v are those of PEQA (arXiv
    /// 2305.14152, table 4), of alphas those of AlphaTuning (arXiv 2210.03858).
    ///
    /// # Errors
    /// When the group size does not divide a linear's inputs, or the rank exceeds a linear.
    pub fn trainable(&self, what: Trainable) -> Result<u64> {
        match what {
            Trainable::Scales { group_size } | Trainable::LargestAlphas { group_size } => {
                self.groups(group_size)
            }
            Trainable::Alphas { bits, group_size } => Ok(bits * self.groups(group_size)?),
            Trainable::LoraQueryValue { rank } => {
                let blocks = 0..self.0.n_blocks;
                Self::lora(rank, blocks.flat_map(|_| self.queries_and_values()))
            }
            Trainable::LoraAll { rank } => {
                Self::lora(rank, self.0.linears().map(|(_, spec)| (spec.name, spec.shape)))
            }
            Trainable::BlockLinears => Ok(self.linear_weights()),
            Trainable::Everything => Ok(self.parameters()),
        }
    }

    /// Bytes of the model with linears of `bits` bits; 16 means that nothing is quantized.
    ///
    /// # Errors
    /// As [`ModelShape::trainable`].
    pub fn bytes(&self, bits: u64, group_size: Option<u64>) -> Result<u64> {
        let groups = self.groups(group_size)?;
        if bits >= FLOAT_BITS {
            return Ok(self.parameters() * FLOAT_BITS / 8);
        }
        let linears = self.linear_weights();
        let rest = self.parameters() - linears;
        let all = bits * linears + (FLOAT_BITS + bits) * groups + FLOAT_BITS * rest;
        Ok(all.div_ceil(8))
    }

    /// Bytes of weights, gradients and Adam's moments while `what` learns on a model of `bits`
    /// bits: the stored weights, adapters at 16 bits among them, and [`TRAINING_BYTES`] for each
    /// parameter that learns. Activations are not counted.
    ///
    /// # Errors
    /// As [`ModelShape::trainable`].
    pub fn training_bytes(
        &self,
        bits: u64,
        group_size: Option<u64>,
        what: Trainable,
    ) -> Result<u64> {
        let trainable = self.trainable(what)?;
        let added = match what {
            Trainable::LoraQueryValue { .. } | Trainable::LoraAll { .. } => trainable,
            // The others are among the stored weights already.
            _ => 0,
        };
        Ok(self.bytes(bits, group_size)? + added * FLOAT_BITS / 8 + trainable * TRAINING_BYTES)
    }

    /// Groups of all block linears.
    fn groups(&self, group_size: Option<u64>) -> Result<u64> {
        let mut groups = 0;
        for (_, linear) in self.0.linears() {
            let [out, inputs] = linear.shape.map(|side| side as u64);
            groups += match group_size {
                None => out,
                Some(size) if size > 0 && inputs.is_multiple_of(size) => out * (inputs / size),
                Some(size) => {
                    let common = self.0.linears().fold(size, |a, (_, l)| gcd(a, l.shape[1] as u64));
                    let what = format!("group size {size} does not divide in_features {inputs}");
                    return Err(Error::preflight(what).at(linear.name).fix(format!(
                        "{common}, which divides those of every linear, or one scale per channel"
                    )));
                }
            };
        }
        Ok(groups)
    }

    fn lora(rank: u64, targets: impl Iterator<Item = (&'static str, [usize; 2])>) -> Result<u64> {
        let mut adapters = 0;
        for (name, shape) in targets {
            let [out, inputs] = shape.map(|side| side as u64);
            if !(1..=out.min(inputs)).contains(&rank) {
                let what = format!("no adapter of rank {rank} for a linear of {out} x {inputs}");
                return Err(Error::preflight(what)
                    .at(name)
                    .fix(format!("a rank from 1 to {}", out.min(inputs))));
            }
            adapters += rank * (out + inputs);
        }
        Ok(adapters)
    }
}

fn product(shape: &[usize]) -> u64 {
    shape.iter().map(|side| *side as u64).product()
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
