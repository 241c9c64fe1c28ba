//! What a folder records of a model: where it came from, and each quantized linear.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::approximate::Loss;
use crate::quant::{Additive, Bits, CodeHistogram, Grid, GroupAxis, QuantizedWeight, ZeroKind};
use crate::store::{HostTensor, hex};

/// The manifest's name in a folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Version of the manifest and of the packed layout.
pub(super) const FORMAT_VERSION: u32 = 1;

/// Where the weights came from.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Provenance {
    /// The source model's name.
    pub model: String,
    /// SHA-256 over its config and weights.
    pub model_sha256: String,
    /// SHA-256 of each data set, by role.
    pub data_sha256: BTreeMap<String, String>,
    /// The resolved recipe.
    pub recipe: String,
    /// Seed of the run.
    pub seed: u64,
    /// Device it ran on.
    pub device: String,
}

/// One quantized linear.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LinearRecord {
    /// The method that trained it.
    pub method: String,
    /// Width of a code; of codebooks the bits of codes that a weight takes.
    pub bits: Bits,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Weights that share a scale.
    pub group_len: usize,
    /// Along which dimension they lie.
    pub axis: GroupAxis,
    /// What the codes stand for.
    pub grid: GridRecord,
    /// Narrower widths that the first planes of the codes serve, ascending.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nested: Vec<Bits>,
    /// Occurrences of each code.
    pub histogram: CodeHistogram,
    /// SHA-256 of each stored tensor's bytes, by tensor name.
    pub sha256: BTreeMap<String, String>,
    /// SHA-256 of the weights a reader computes, as little-endian f32, `[out, in]`.
    pub weights_sha256: String,
    /// What was changed of the trained weights, where that was allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<Loss>,
}

impl LinearRecord {
    /// Of a linear whose readers compute `decoded`, and whose tensors are these.
    pub(super) fn new(
        weight: &QuantizedWeight,
        method: &str,
        decoded: &[f32],
        tensors: &[(String, HostTensor)],
    ) -> Self {
        let sha256 = tensors.iter().map(|(name, tensor)| (name.clone(), tensor.sha256())).collect();
        let grid = match weight.grid {
            Grid::Uniform { zero_kind, .. } => GridRecord::Uniform { zero_kind },
            Grid::BinaryCoding { .. } => GridRecord::BinaryCoding {},
            Grid::Codebook { additive: Additive { books, vector }, .. } => {
                GridRecord::Codebook { books, vector, code_bits: weight.codes.bits() }
            }
        };
        Self {
            method: method.to_owned(),
            bits: weight.bits,
            shape: [weight.layout.out, weight.layout.inputs],
            group_len: weight.layout.group_len,
            axis: weight.layout.axis,
            grid,
            nested: weight.widths().into_iter().filter(|bits| *bits < weight.bits).collect(),
            histogram: weight.histogram(),
            sha256,
            weights_sha256: weights_sha256(decoded),
            loss: None,
        }
    }
}

/// The kind of a linear's grid.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GridRecord {
    /// `scale * (code - zero_point)`.
    Uniform {
        /// What the zero points are.
        zero_kind: ZeroKind,
    },
    /// `±alpha_0 ± alpha_1 ... + offset`, bit `i` of a code set where `alpha_i` is added.
    BinaryCoding {},
    /// `scale * (C_0[code_0] + C_1[code_1] ...)` of each run of inputs.
    Codebook {
        /// Codebooks.
        books: usize,
        /// Inputs of a run.
        vector: usize,
        /// Width of a code; `bits` of the linear are those of its codes for each weight.
        code_bits: u8,
    },
}

/// The names under which linear `name` is stored, on either grid.
pub(super) fn tensor_names(name: &str) -> [String; 6] {
    ["codes", "scales", "zero_points", "alphas", "offsets", "codebooks"]
        .map(|part| format!("{name}.{part}"))
}

/// The names under which scales and offsets of a narrower width of linear `name` are stored.
pub(super) fn nested_names(name: &str, bits: Bits) -> [String; 2] {
    ["alphas", "offsets"].map(|part| format!("{name}.{part}_{bits}"))
}

/// The names of everything that belongs to linear `name`.
pub fn all_tensor_names(name: &str) -> impl Iterator<Item = String> {
    let nested = (1..Bits::EIGHT.get()).filter_map(|bits| Bits::new(bits).ok());
    let nested: Vec<String> = nested.flat_map(|bits| nested_names(name, bits)).collect();
    tensor_names(name).into_iter().chain(nested)
}

/// SHA-256 of weights as little-endian f32.
pub fn weights_sha256(weights: &[f32]) -> String {
    let mut hash = Sha256::new();
    let mut bytes = [[0; 4]; 4096];
    for chunk in weights.chunks(bytes.len()) {
        let bytes = &mut bytes[..chunk.len()];
        for (bytes, weight) in bytes.iter_mut().zip(chunk) {
            *bytes = weight.to_le_bytes();
        }
        hash.update(bytes.as_flattened());
    }
    hex(&hash.finalize())
}
