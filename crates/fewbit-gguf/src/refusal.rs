//! Why a weight is not stored.

use crate::types::BlockType;

/// The obstacle to storing a weight exactly. The text is one sentence without a full stop; what to do
/// instead depends on where the weight comes from, so that is for the caller to say.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// The weight contradicts itself.
    #[error("{0}")]
    Unsound(String),
    /// The type asked for is one that is only read.
    #[error("{0} is a block type that fewbit reads but does not write")]
    ReadOnly(BlockType),
    /// Rows end inside a block of the type asked for.
    #[error("rows of {inputs} weights are no whole blocks of {} ({kind})", .kind.block_len())]
    PartialBlocks {
        /// The type.
        kind: BlockType,
        /// Weights in a row.
        inputs: usize,
    },
    /// A block of the type asked for would give other weights back.
    #[error(
        "{kind} does not hold this weight exactly (row {row}, columns from {column}: scale \
         {scale:e}, zero point {zero})"
    )]
    Inexact {
        /// The type.
        kind: BlockType,
        /// The block's row.
        row: usize,
        /// Its first column.
        column: usize,
        /// The first scale in it.
        scale: f32,
        /// The first zero point in it.
        zero: f32,
    },
    /// A plain number is none of the type asked for.
    #[error("{value:e} is not exactly a number of type {kind}")]
    InexactValue {
        /// The type.
        kind: BlockType,
        /// The number.
        value: f32,
    },
    /// Rows are no whole blocks of any packed type.
    #[error("rows of {inputs} weights are no whole blocks of 32, the smallest in GGUF")]
    Rows {
        /// Weights in a row.
        inputs: usize,
    },
    /// No packed type, because scales are no f16 values.
    #[error(
        "{inexact} of {of} scales are no f16 values, which is what GGUF stores; rounding them would \
         change weights by up to {}", in_words(*.change)
    )]
    Scales {
        /// How many.
        inexact: usize,
        /// Of how many.
        of: usize,
        /// The largest relative change of a scale by rounding; infinite beyond the range of f16.
        change: f64,
    },
    /// No packed type, because a zero point lies elsewhere than on a code or between two.
    #[error(
        "zero point {zero} is no multiple of a half, and the {bits}-bit grid's offset, scale times \
         zero point, is no f16 value either; GGUF has no other place for it"
    )]
    ZeroPoint {
        /// The zero point.
        zero: f32,
        /// Width of a code.
        bits: u8,
    },
    /// No packed type, because groups are smaller than the smallest block.
    #[error(
        "groups of {group_len} are smaller than 32, the smallest in GGUF with a scale of its own"
    )]
    Groups {
        /// Weights that share a scale.
        group_len: usize,
    },
    /// No packed type, though each property by itself would do.
    #[error(
        "no block type of GGUF holds a {bits}-bit grid with these zero points (for instance {zero}) \
         in groups of {group_len}"
    )]
    Grid {
        /// Width of a code.
        bits: u8,
        /// The zero point farthest from the middle of the codes.
        zero: f32,
        /// Weights that share a scale.
        group_len: usize,
    },
}

fn in_words(change: f64) -> String {
    if change.is_finite() {
        format!("{:.2} %", 100.0 * change)
    } else {
        "all there is (a scale is beyond 65504, the largest f16)".to_owned()
    }
}
