//! The tensor types of ggml that are known here: ids, names and block sizes.

use std::fmt;

/// How the rows of a tensor are stored: blocks of [`BlockType::block_len`] weights in
/// [`BlockType::block_bytes`] bytes each. Scales inside a block are f16.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum BlockType {
    /// Plain 32-bit floats.
    F32,
    /// Plain 16-bit floats.
    F16,
    /// Plain bfloat16.
    Bf16,
    /// `d·t`, t in -8..=7; a scale per 32 weights.
    Q4_0,
    /// `d·q + m`, q in 0..=15; scale and minimum per 32 weights.
    Q4_1,
    /// `d·t`, t in -128..=127; a scale per 32 weights.
    Q8_0,
    /// `d·t`, t in -1..=2; a scale per 64 weights. A fork of llama.cpp stores blocks of 128 under
    /// the same id; here it is llama.cpp's.
    Q2_0,
    /// `d·sc·q - dmin·m`, q in 0..=3; 4-bit sc and m per 16 weights.
    Q2K,
    /// `d·sc·t`, t in -4..=3; 6-bit signed sc per 16 weights.
    Q3K,
    /// `d·sc·q - dmin·m`, q in 0..=15; 6-bit sc and m per 32 weights.
    Q4K,
    /// `d·t`, t in -1..=1; a scale per 256 weights.
    Tq2_0,
    /// `±d`; a scale per 128 weights. Read, not written.
    Q1_0,
    /// `d·t`, t in -1..=1, five to a byte; a scale per 256 weights. Read, not written.
    Tq1_0,
    /// `d·v`, v one of the 16 values of a four-bit float, d a power of two; a scale per 32 weights.
    /// Read, not written.
    Mxfp4,
    /// `d·sc·v`, v one of 16 values; 6-bit signed sc per 32 weights. Read, not written.
    Iq4Xs,
    /// `d·v`, v one of 16 values; a scale per 32 weights. Read, not written.
    Iq4Nl,
    /// `d·t`, t in -16..=15; a scale per 32 weights. Read, not written.
    Q5_0,
    /// `d·sc·q - dmin·m`, q in 0..=31; 6-bit sc and m per 32 weights. Read, not written.
    Q5K,
    /// `d·q + m`, q in 0..=31; scale and minimum per 32 weights. Read, not written.
    Q5_1,
    /// `d·sc·t`, t in -32..=31; 8-bit signed sc per 16 weights.
    Q6K,
}

impl BlockType {
    /// The types that are written, smallest first; of two equal ones the more widely read first.
    pub const WRITTEN: [Self; 12] = [
        Self::Tq2_0,
        Self::Q2_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4_0,
        Self::Q4K,
        Self::Q4_1,
        Self::Q6K,
        Self::Q8_0,
        Self::F16,
        Self::Bf16,
        Self::F32,
    ];

    /// Every type that is read: those of [`BlockType::WRITTEN`], then those of other programs,
    /// which round to find their scales.
    pub const ALL: [Self; 20] = [
        Self::Tq2_0,
        Self::Q2_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4_0,
        Self::Q4K,
        Self::Q4_1,
        Self::Q6K,
        Self::Q8_0,
        Self::F16,
        Self::Bf16,
        Self::F32,
        Self::Q1_0,
        Self::Tq1_0,
        Self::Mxfp4,
        Self::Iq4Xs,
        Self::Iq4Nl,
        Self::Q5_0,
        Self::Q5K,
        Self::Q5_1,
    ];

    /// Whether it is written, not only read.
    pub fn is_written(self) -> bool {
        Self::WRITTEN.contains(&self)
    }

    /// The number that stands for it in a file.
    pub fn id(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q5_0 => 6,
            Self::Q5_1 => 7,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
            Self::Q5K => 13,
            Self::Q6K => 14,
            Self::Iq4Nl => 20,
            Self::Iq4Xs => 23,
            Self::Bf16 => 30,
            Self::Tq1_0 => 34,
            Self::Tq2_0 => 35,
            Self::Mxfp4 => 39,
            Self::Q1_0 => 41,
            Self::Q2_0 => 42,
        }
    }

    /// The type of an id; `None` for one that is not known here.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }

    /// ggml's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2_0 => "Q2_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
            Self::Tq2_0 => "TQ2_0",
            Self::Q1_0 => "Q1_0",
            Self::Tq1_0 => "TQ1_0",
            Self::Mxfp4 => "MXFP4",
            Self::Iq4Xs => "IQ4_XS",
            Self::Iq4Nl => "IQ4_NL",
            Self::Q5_0 => "Q5_0",
            Self::Q5K => "Q5_K",
            Self::Q5_1 => "Q5_1",
            Self::Q6K => "Q6_K",
        }
    }

    /// Weights per block.
    pub fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::Bf16 => 1,
            Self::Q4_0
            | Self::Q4_1
            | Self::Q5_0
            | Self::Q5_1
            | Self::Q8_0
            | Self::Iq4Nl
            | Self::Mxfp4 => 32,
            Self::Q2_0 => 64,
            Self::Q1_0 => 128,
            Self::Q2K
            | Self::Q3K
            | Self::Q4K
            | Self::Q5K
            | Self::Q6K
            | Self::Iq4Xs
            | Self::Tq1_0
            | Self::Tq2_0 => 256,
        }
    }

    /// Bytes per block.
    pub fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Mxfp4 => 17,
            Self::Q4_0 | Self::Q2_0 | Self::Q1_0 | Self::Iq4Nl => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Iq4Xs => 136,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::Tq1_0 => 54,
            Self::Tq2_0 => 66,
        }
    }

    /// Bytes of a row of `columns` weights; `None` when they are no whole blocks or the count
    /// overflows.
    pub fn row_bytes(self, columns: usize) -> Option<usize> {
        let whole = columns.is_multiple_of(self.block_len());
        whole.then(|| (columns / self.block_len()).checked_mul(self.block_bytes())).flatten()
    }

    /// Bytes of a tensor of `shape`, outermost size first (a scalar is one weight); `None` as for
    /// [`BlockType::row_bytes`].
    pub fn tensor_bytes(self, shape: &[usize]) -> Option<usize> {
        let (&columns, outer) = shape.split_last().unwrap_or((&1, &[]));
        outer.iter().try_fold(self.row_bytes(columns)?, |bytes, &size| bytes.checked_mul(size))
    }

    /// llama.cpp's number for a file that mostly holds this type (`general.file_type`).
    pub fn file_type(self) -> u32 {
        match self {
            Self::F32 => 0,
            Self::F16 => 1,
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 7,
            Self::Q5_0 => 8,
            Self::Q5_1 => 9,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 14,
            Self::Q5K => 16,
            Self::Q6K => 18,
            Self::Iq4Nl => 25,
            Self::Iq4Xs => 30,
            Self::Bf16 => 32,
            Self::Tq1_0 => 36,
            Self::Tq2_0 => 37,
            Self::Mxfp4 => 38,
            Self::Q1_0 => 40,
            Self::Q2_0 => 41,
        }
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_lead_back() {
        for kind in BlockType::ALL {
            assert_eq!(BlockType::from_id(kind.id()), Some(kind));
        }
        assert_eq!(BlockType::from_id(4), None);
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(BlockType::ALL[..BlockType::WRITTEN.len()], BlockType::WRITTEN);
        let read = BlockType::ALL.into_iter().filter(|kind| !kind.is_written());
        let ids: Vec<_> = read.map(BlockType::id).collect();
        assert_eq!(ids, [41, 34, 39, 23, 20, 6, 13, 7]);
    }

    #[test]
    fn sizes_are_ordered_and_checked() {
        let bits = BlockType::WRITTEN.map(|kind| 8 * kind.block_bytes() * 256 / kind.block_len());
        assert!(bits.is_sorted(), "{bits:?}");
        assert_eq!(BlockType::Q4_0.tensor_bytes(&[3, 64]), Some(108));
        assert_eq!(BlockType::Q4_0.tensor_bytes(&[3, 48]), None);
        assert_eq!(BlockType::F32.tensor_bytes(&[]), Some(4));
        assert_eq!(BlockType::F32.tensor_bytes(&[usize::MAX, 2]), None);
    }
}
