//! Packed codes on a device with kernels of ours: decoded there, or multiplied as they are.

use burn::backend::DispatchAutodiffContext;
use burn::tensor::{DType, Int, Tensor};

use super::{CodedKind, CodedMatrix};
use crate::ops::bridge::{off_tape, tensor};
use crate::ops::continuing::is_continuing;
use crate::ops::cube::{self, Decoded};

impl CodedMatrix {
    /// What a kernel of the device they are on makes of the codes; `None` where there is none.
    pub(super) fn decoded(
        &self,
        decoded: Decoded,
        scale: &Tensor<2>,
        shift: &Tensor<2>,
    ) -> Option<Tensor<2>> {
        let words = self.words.as_ref()?;
        let grid = [scale, shift].map(|x| x.clone().into_dispatch());
        if !grid.iter().all(cube::reads) {
            return None;
        }
        let shape = [self.codes.rows(), self.codes.columns()];
        Some(tensor(cube::decode(words.clone(), shape, self.codes.bits(), decoded, grid)))
    }

    /// The words, where a product with `x`, which nobody wants a gradient of, is computed on them: inside
    /// [`continuing`](crate::ops::continuing()), of few activations.
    pub(super) fn words_for<const D: usize>(&self, x: &Tensor<D>) -> Option<&Tensor<2, Int>> {
        let words = self.words.as_ref()?;
        let n: usize = x.dims()[..D - 1].iter().product();
        let plain = x.clone().into_dispatch();
        let reads = is_continuing()
            && !self.transposed
            && (1..=cube::FEW).contains(&n)
            && self.has_whole_groups()
            && plain.autodiff == DispatchAutodiffContext::Disabled
            && cube::add_rows(&plain);
        reads.then_some(words)
    }

    /// Whether what a unit of a kernel reads at a time lies in one group.
    fn has_whole_groups(&self) -> bool {
        let weights = match self.kind {
            CodedKind::Uniform | CodedKind::BinaryCoding => cube::codes_in_piece(self.codes.bits()),
            CodedKind::Codebook(additive) => additive.vector,
        };
        self.group_len.is_multiple_of(weights) || self.group_len.is_multiple_of(self.columns())
    }

    /// `x Wᵀ` on the words, in f32; the result is of the type of `x`.
    pub(super) fn on_words<const D: usize>(
        &self,
        x: Tensor<D>,
        words: &Tensor<2, Int>,
        grid: [Tensor<2>; 2],
    ) -> Tensor<D> {
        let (mut shape, dtype) = (x.dims(), x.dtype());
        let n = shape[..D - 1].iter().product();
        let x: Tensor<2> = x.reshape([n, shape[D - 1]]).cast(DType::F32);
        let [scale, shift] = grid.map(|x| tensor(off_tape(x.into_dispatch())));
        let (inputs, words, bits) = ([x, scale, shift], words.clone(), self.codes.bits());
        let y: Tensor<2> = tensor(match self.kind {
            CodedKind::Uniform => cube::product(inputs, words, bits, Decoded::Uniform),
            CodedKind::BinaryCoding => cube::product(inputs, words, bits, Decoded::BinaryCoding),
            CodedKind::Codebook(additive) => {
                cube::product_of_codebooks(inputs, words, bits, additive)
            }
        });
        shape[D - 1] = self.codes.rows();
        y.reshape(shape).cast(dtype)
    }
}
