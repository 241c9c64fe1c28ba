//! The size model: what a model of few bits, its adapters and its training take, from its shape.
//!
//! After PEQA (arXiv 2305.14152, table 4): every linear of the decoder blocks holds codes of b
//! bits, and for each output channel (or group along the inputs) a 16-bit scale and a zero point
//! of b bits; everything else stays at 16 bits. The width of the zero point is inferred: with it
//! the model gives the sizes of that table to two decimals.

use super::families::ModelShape;
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

impl ModelShape {
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
                self.lora(rank, [("q", self.query), ("v", self.value)].into_iter())
            }
            Trainable::LoraAll { rank } => {
                self.lora(rank, self.linears.iter().map(|linear| (linear.name, linear.shape)))
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
        for linear in &self.linears {
            let [out, inputs] = linear.shape;
            groups += match group_size {
                None => out,
                Some(size) if size > 0 && inputs.is_multiple_of(size) => out * (inputs / size),
                Some(size) => {
                    let common = self.linears.iter().fold(size, |a, l| gcd(a, l.shape[1]));
                    let what = format!("group size {size} does not divide in_features {inputs}");
                    return Err(Error::preflight(what).at(linear.name).fix(format!(
                        "{common}, which divides those of every linear, or one scale per channel"
                    )));
                }
            };
        }
        Ok(self.blocks * groups)
    }

    fn lora(
        &self,
        rank: u64,
        targets: impl Iterator<Item = (&'static str, [u64; 2])>,
    ) -> Result<u64> {
        let mut adapters = 0;
        for (name, [out, inputs]) in targets {
            if !(1..=out.min(inputs)).contains(&rank) {
                let what = format!("no adapter of rank {rank} for a linear of {out} x {inputs}");
                return Err(Error::preflight(what)
                    .at(name)
                    .fix(format!("a rank from 1 to {}", out.min(inputs))));
            }
            adapters += rank * (out + inputs);
        }
        Ok(self.blocks * adapters)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}
