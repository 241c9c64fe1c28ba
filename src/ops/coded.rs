//! Linears whose weight is frozen codes, held packed, on a grid that may learn.
//!
//! `W_hat` is linear in the grid's parameters, so every gradient is exact and needs no
//! straight-through estimate: with one step per output channel,
//! `ds_j = Σ_n dY[n, j] Y[n, j] / s_j`, which never forms a gradient of the weight's size; with
//! groups, or with several planes, tiles of `dYᵀ X` are reduced as they are made.

use std::sync::Arc;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};

use super::additive::Additive;
use super::bits;
use super::bridge::{self, Operation, Plain, tensor};
#[cfg(feature = "flex")]
use super::bridge::{Rows, fused};
#[cfg(feature = "gpu")]
use super::cube::Decoded;
#[cfg(feature = "flex")]
use super::kernel::coded as kernel;

mod codebook;
#[cfg(feature = "gpu")]
mod device;
#[cfg(feature = "flex")]
mod few;
#[cfg(feature = "flex")]
pub use few::FrozenGrid;

/// A grid that never changes; only this machine's kernels know more of it than its values.
#[cfg(not(feature = "flex"))]
#[derive(Clone, Debug, Default)]
pub struct FrozenGrid(());

/// Codes of a matrix, packed row by row as [`bits`] says. Clones share the words.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct PackedCodes {
    words: Arc<[u32]>,
    bits: u8,
    rows: usize,
    columns: usize,
}

impl PackedCodes {
    /// Packs row-major codes, each below 2^`bits`, `columns` to a row.
    ///
    /// # Panics
    /// When `bits` is not in 1..=8 or `codes` is not a whole number of rows.
    pub fn pack(codes: &[u8], columns: usize, bits: u8) -> Self {
        let words = bits::pack_rows(codes, columns, bits);
        Self { words: words.into(), bits, rows: codes.len() / columns.max(1), columns }
    }

    /// Codes that are packed already; `None` when their number is not that of the shape, or bits
    /// behind the last code of a row are set.
    pub fn from_words(words: Vec<u32>, [rows, columns]: [usize; 2], bits: u8) -> Option<Self> {
        let stride = bits::words_per_row(columns, bits);
        if !(1..=8).contains(&bits) || words.len() != rows * stride {
            return None;
        }
        let used = columns * usize::from(bits) % 32;
        let clean =
            used == 0 || words.chunks_exact(stride.max(1)).all(|row| row[stride - 1] >> used == 0);
        clean.then(|| Self { words: words.into(), bits, rows, columns })
    }

    /// The words, `words_per_row` to each row.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    /// Width of a code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Codes in a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Number of codes.
    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes they take.
    pub fn bytes(&self) -> usize {
        self.words.len() * size_of::<u32>()
    }

    /// Every code, row-major.
    pub fn to_vec(&self) -> Vec<u8> {
        bits::unpack_rows(&self.words, self.columns, self.bits)
    }

    /// The lowest `bits` of every code, packed at that width.
    ///
    /// # Panics
    /// When `bits` is not in 1..=8.
    #[must_use]
    pub fn first_bits(&self, bits: u8) -> Self {
        let mut codes = self.to_vec();
        for code in &mut codes {
            *code &= u8::MAX >> (8 - bits);
        }
        Self::pack(&codes, self.columns, bits)
    }

    /// The codes of one row into `out`, `[columns]`.
    pub fn unpack_row(&self, row: usize, out: &mut [u8]) {
        let stride = bits::words_per_row(self.columns, self.bits);
        bits::unpack_into(out, &self.words[row * stride..][..stride], self.bits);
    }
}

/// What the grid of packed codes is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum CodedKind {
    /// `scale * (code - zero_point)`.
    Uniform,
    /// `±alpha_0 ± alpha_1 ... + offset`; bit `i` of a code is the sign of `alpha_i`.
    BinaryCoding,
    /// `scale * (C_0[code_0] + C_1[code_1] ...)`; codebooks come in the place of the shift.
    Codebook(Additive),
}

impl CodedKind {
    /// Weights in a row of so many codes.
    pub(super) fn weights(self, codes: usize) -> usize {
        match self {
            Self::Codebook(additive) => additive.inputs(codes),
            Self::Uniform | Self::BinaryCoding => codes,
        }
    }
}

/// A frozen matrix of codes and what its weights are grouped by; the grid itself comes with each
/// call.
#[derive(Clone, Debug)]
pub struct CodedMatrix {
    codes: PackedCodes,
    group_len: usize,
    kind: CodedKind,
    /// Whether the matrix holds the weight `[in, out]`, groups along the outputs, instead of
    /// `[out, in]`.
    transposed: bool,
    /// The words on a device that cannot read this machine's memory.
    words: Option<Tensor<2, Int>>,
    #[cfg(feature = "flex")]
    planes: few::SharedPlanes,
    /// Whether its products are those of rounded activations.
    #[cfg(feature = "flex")]
    integers: bool,
}

impl CodedMatrix {
    /// Codes `[out, in]`, or `[in, out]` when `transposed`, whose groups are runs of `group_len`
    /// along their rows, or of whole rows, for use on `device`.
    ///
    /// # Panics
    /// When groups neither divide rows nor are made of whole ones.
    pub fn new(
        codes: PackedCodes,
        group_len: usize,
        kind: CodedKind,
        transposed: bool,
        device: &Device,
    ) -> Self {
        let columns = kind.weights(codes.columns());
        assert!(
            group_len > 0
                && columns.is_multiple_of(group_len.min(columns))
                && group_len.is_multiple_of(columns.min(group_len)),
            "groups of {group_len} in rows of {columns}"
        );
        let device = device.clone().inner();
        let words = (!has_kernels(&Tensor::<1>::zeros([1], &device))).then(|| {
            let stride = bits::words_per_row(codes.columns(), codes.bits());
            let words = codes.words().iter().map(|word| word.cast_signed()).collect();
            let words = TensorData::new::<i32, _>(words, [codes.rows(), stride]);
            Tensor::from_data(words, (&device, DType::I32))
        });
        Self {
            codes,
            group_len,
            kind,
            transposed,
            words,
            #[cfg(feature = "flex")]
            planes: few::SharedPlanes::default(),
            #[cfg(feature = "flex")]
            integers: false,
        }
    }

    /// The same codes for products in integers; only this machine's kernels have such.
    #[cfg(not(feature = "flex"))]
    pub fn in_integers(&self) -> Option<Self> {
        None
    }

    /// The codes.
    pub fn codes(&self) -> &PackedCodes {
        &self.codes
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.codes.rows() * self.columns() / self.group_len
    }

    /// Weights in a stored row.
    fn columns(&self) -> usize {
        self.kind.weights(self.codes.columns())
    }

    /// The weights, `[out, in]`.
    ///
    /// # Shapes
    /// - scale: steps, `[groups, 1]`, or scales of the planes, `[groups, bits]`
    /// - shift: zero points, without gradient, or offsets, `[groups, 1]`; or codebooks, `[books * centroids,
    ///   vector]`
    pub fn weight(&self, scale: Tensor<2>, shift: Tensor<2>) -> Tensor<2> {
        let inputs = [scale, shift].map(Tensor::into_dispatch);
        let stored: Tensor<2> = tensor(bridge::apply(Weight(self.clone()), inputs));
        if self.transposed { stored.transpose() } else { stored }
    }

    /// `x Wᵀ`.
    ///
    /// # Shapes
    /// - x: `[.., in]`
    /// - scale, shift: as in [`CodedMatrix::weight`]
    /// - result: `[.., out]`
    pub fn linear<const D: usize>(
        &self,
        x: Tensor<D>,
        scale: Tensor<2>,
        shift: Tensor<2>,
    ) -> Tensor<D> {
        let grid = [scale, shift].map(Tensor::into_dispatch);
        let product = |x: Plain| {
            let [scale, shift] = grid;
            bridge::apply(Product(self.clone()), [x, scale, shift])
        };
        if has_kernels(&x) {
            return tensor(product(x.into_dispatch()));
        }
        // Composed operations have a rank.
        let mut shape = x.dims();
        let rows = shape[..D - 1].iter().product();
        let x: Tensor<2> = x.reshape([rows, shape[D - 1]]);
        let y: Tensor<2> = tensor(product(x.into_dispatch()));
        shape[D - 1] = y.dims()[1];
        y.reshape(shape)
    }

    /// As [`CodedMatrix::linear`], for a grid that is the same in every call: `values` gives its
    /// scale and shift. Inside [`continuing`](super::continuing()) few rows of `x` off the tape are multiplied with the
    /// packed codes; with [`CodedMatrix::in_integers`] any number of them is, everywhere.
    pub fn linear_frozen<const D: usize>(
        &self,
        x: Tensor<D>,
        grid: &FrozenGrid,
        values: impl FnOnce() -> [Tensor<2>; 2],
    ) -> Tensor<D> {
        #[cfg(feature = "flex")]
        if self.is_on_codes(&x) {
            return self.on_codes(x, grid, values);
        }
        #[cfg(not(feature = "flex"))]
        let _ = grid;
        let [scale, shift] = values();
        #[cfg(feature = "gpu")]
        if let Some(words) = self.words_for(&x) {
            return self.on_words(x, words, [scale, shift]);
        }
        self.linear(x, scale, shift)
    }

    /// Whether `ds_j = Σ_n dY Y / s_j` holds: a step for each row of the matrix.
    fn is_per_row(&self) -> bool {
        self.kind == CodedKind::Uniform && self.group_len == self.columns()
    }
}

/// Whether packed codes are read by a kernel there.
fn has_kernels<const D: usize>(like: &Tensor<D>) -> bool {
    #[cfg(feature = "flex")]
    return bridge::reads(like);
    #[cfg(not(feature = "flex"))]
    {
        let _ = like;
        false
    }
}

/// The weights themselves.
#[derive(Clone, Debug)]
struct Weight(CodedMatrix);

impl Operation<2> for Weight {
    type Saved = ();
    const CHEAP: bool = true;

    fn forward(&self, inputs: [Plain; 2]) -> (Plain, ()) {
        let matrix = &self.0;
        #[cfg(feature = "flex")]
        if fused(&inputs[0]) {
            let [scale, shift] = inputs.map(Rows::of);
            let weight = matrix.kernel(&scale, &shift).weight();
            let shape = [matrix.codes.rows(), matrix.columns()];
            return (Rows::new(weight, shape).plain(), ());
        }
        let [scale, shift] = inputs.map(tensor::<2>);
        (matrix.values(&scale, &shift).into_dispatch(), ())
    }

    fn backward(
        &self,
        inputs: [Plain; 2],
        (): (),
        gradient: Plain,
        wanted: [bool; 2],
    ) -> [Option<Plain>; 2] {
        let matrix = &self.0;
        let [scale, shift] = inputs.map(tensor::<2>);
        let (scale, offset) = matrix.grid_gradient(&tensor(gradient), &scale, &shift);
        [wanted[0].then_some(scale), wanted[1].then_some(offset)].map(to_plain)
    }
}

fn to_plain(gradient: Option<Tensor<2>>) -> Option<Plain> {
    gradient.map(Tensor::into_dispatch)
}

/// A product with the weights.
#[derive(Clone, Debug)]
struct Product(CodedMatrix);

impl Operation<3> for Product {
    /// The output, where the gradient of the steps is taken from it.
    type Saved = Option<Plain>;
    const CHEAP: bool = false;

    fn forward(&self, inputs: [Plain; 3]) -> (Plain, Option<Plain>) {
        let matrix = &self.0;
        let output = matrix.forward(inputs);
        let saved = (matrix.is_per_row() && !matrix.transposed).then(|| output.clone());
        (output, saved)
    }

    fn backward(
        &self,
        inputs: [Plain; 3],
        output: Option<Plain>,
        gradient: Plain,
        wanted: [bool; 3],
    ) -> [Option<Plain>; 3] {
        #[cfg(feature = "flex")]
        if fused(&gradient) {
            return self.0.backward(inputs, output.as_ref(), gradient, wanted);
        }
        drop(output);
        self.0.composed_backward(inputs, gradient, wanted)
    }
}

#[cfg(feature = "flex")]
impl CodedMatrix {
    fn kernel<'a>(&'a self, scale: &'a Rows, shift: &'a Rows) -> kernel::Coded<'a> {
        let Self { codes, group_len, kind, .. } = self;
        let (group_len, kind) = (*group_len, *kind);
        kernel::Coded { codes, group_len, kind, scale: scale.values(), shift: shift.values() }
    }

    fn backward(
        &self,
        inputs: [Plain; 3],
        output: Option<&Plain>,
        gradient: Plain,
        wanted: [bool; 3],
    ) -> [Option<Plain>; 3] {
        let ([x, scale, shift], gradient) = (inputs.map(Rows::of), Rows::of(gradient));
        let kernel = self.kernel(&scale, &shift);
        let [n, inputs] = x.matrix();
        let from_input = self.transposed && self.is_per_row() && wanted[1];
        let of_x = (wanted[0] || from_input).then(|| {
            if self.transposed {
                kernel.times_transposed(gradient.values(), n)
            } else {
                kernel.times(gradient.values(), n)
            }
        });
        let per_row = match (output, &of_x) {
            _ if !wanted[1] => None,
            (Some(output), _) => {
                let output = Rows::of(output.clone());
                let rows = self.codes.rows();
                Some(kernel::column_dots(gradient.values(), output.values(), rows))
            }
            (None, Some(of_x)) if from_input => Some(kernel::column_dots(x.values(), of_x, inputs)),
            _ => None,
        };
        let per_row = per_row.map(|mut found| {
            kernel::divide(&mut found, scale.values());
            found
        });
        let whole = (wanted[2] || wanted[1] && per_row.is_none()).then(|| {
            let (left, right) = if self.transposed { (&x, &gradient) } else { (&gradient, &x) };
            kernel.grid_gradient(left.values(), right.values(), n)
        });
        let (of_scale, offset) = whole.map_or((None, None), |g| (Some(g.scale), Some(g.shift)));
        let of_scale = per_row.or(of_scale).filter(|_| wanted[1]);
        let offset = offset.filter(|_| wanted[2]);
        [
            of_x.filter(|_| wanted[0]).map(|values| x.like(values).plain()),
            of_scale.map(|values| scale.like(values).plain()),
            offset.map(|values| shift.like(values).plain()),
        ]
    }
}

impl CodedMatrix {
    /// The product; also where no kernel runs.
    fn forward(&self, inputs: [Plain; 3]) -> Plain {
        #[cfg(feature = "flex")]
        if fused(&inputs[0]) {
            let [x, scale, shift] = inputs.map(Rows::of);
            let kernel = self.kernel(&scale, &shift);
            let [n, _] = x.matrix();
            let (y, out) = if self.transposed {
                (kernel.times(x.values(), n), self.columns())
            } else {
                (kernel.times_transposed(x.values(), n), self.codes.rows())
            };
            let mut shape = x.shape();
            if let Some(last) = shape.last_mut() {
                *last = out;
            }
            return Rows::new(y, shape).plain();
        }
        let [x, scale, shift] = inputs.map(tensor::<2>);
        let stored = self.values(&scale, &shift).cast(x.dtype());
        let weight = if self.transposed { stored } else { stored.transpose() };
        x.matmul(weight).into_dispatch()
    }

    fn composed_backward(
        &self,
        inputs: [Plain; 3],
        gradient: Plain,
        wanted: [bool; 3],
    ) -> [Option<Plain>; 3] {
        let ([x, scale, shift], gradient) = (inputs.map(tensor::<2>), tensor::<2>(gradient));
        let of_x = wanted[0].then(|| {
            let stored = self.values(&scale, &shift).cast(x.dtype());
            let weight = if self.transposed { stored.transpose() } else { stored };
            gradient.clone().matmul(weight).into_dispatch()
        });
        let mut found = (None, None);
        if wanted[1] || wanted[2] {
            let (left, right) = if self.transposed { (x, gradient) } else { (gradient, x) };
            let of_weight = left.transpose().matmul(right).cast(scale.dtype());
            let (of_scale, of_shift) = self.grid_gradient(&of_weight, &scale, &shift);
            found = (wanted[1].then_some(of_scale), wanted[2].then_some(of_shift));
        }
        [of_x, to_plain(found.0), to_plain(found.1)]
    }

    /// Gradients of scale and shift from that of the stored matrix.
    fn grid_gradient(
        &self,
        of_weight: &Tensor<2>,
        scale: &Tensor<2>,
        shift: &Tensor<2>,
    ) -> (Tensor<2>, Tensor<2>) {
        if let CodedKind::Codebook(additive) = self.kind {
            let places = self.places(additive, shift);
            return codebook::gradients(of_weight, scale, shift, (additive, &places));
        }
        let [groups, _] = shift.dims();
        let of_weight = of_weight.clone().reshape([groups, self.group_len]);
        let codes = self.unpacked(shift).reshape([groups, self.group_len]);
        match self.kind {
            CodedKind::Uniform => {
                ((of_weight * (codes - shift.clone())).sum_dim(1), shift.zeros_like())
            }
            CodedKind::BinaryCoding => {
                let planes = super::binary_coding::sign_planes(&codes, self.codes.bits());
                let scale = super::binary_coding::plane_gradients(&planes, &of_weight);
                (scale, of_weight.sum_dim(1))
            }
            CodedKind::Codebook(_) => (scale.zeros_like(), shift.zeros_like()),
        }
    }

    /// The weights as the codes are stored.
    fn values(&self, scale: &Tensor<2>, shift: &Tensor<2>) -> Tensor<2> {
        if let CodedKind::Codebook(additive) = self.kind {
            let places = self.places(additive, shift);
            let values = codebook::values(scale, shift, (additive, &places));
            return values.reshape([self.codes.rows(), self.columns()]);
        }
        #[cfg(feature = "gpu")]
        {
            let kind = match self.kind {
                CodedKind::Uniform => Decoded::Uniform,
                CodedKind::BinaryCoding | CodedKind::Codebook(_) => Decoded::BinaryCoding,
            };
            if let Some(values) = self.decoded(kind, scale, shift) {
                return values;
            }
        }
        let [groups, _] = shift.dims();
        let codes = self.unpacked(shift).reshape([groups, self.group_len]);
        let values = match self.kind {
            CodedKind::Uniform => scale.clone() * (codes - shift.clone()),
            CodedKind::BinaryCoding => {
                let planes = super::binary_coding::sign_planes(&codes, self.codes.bits());
                super::binary_coding::plane_sum(&planes, scale, shift.clone())
            }
            CodedKind::Codebook(_) => codes,
        };
        values.reshape([self.codes.rows(), self.codes.columns()])
    }

    /// Where in the codebooks, one after the other, the centroids lie whose sum each run of inputs is; `[runs]`
    /// of each codebook.
    fn places(&self, additive: Additive, books: &Tensor<2>) -> Vec<Tensor<1, Int>> {
        let [centroids, _] = books.dims();
        let runs = self.codes.len() / additive.books;
        let codes = self.unpacked(books).reshape([runs, additive.books]).int();
        (0..additive.books)
            .map(|book| {
                // Far below 2^31.
                let first = (book * centroids / additive.books) as u32;
                codes.clone().narrow(1, book, 1).reshape([runs]) + first
            })
            .collect()
    }

    /// Codes as floats, `[rows, columns]`, on the device of `like`.
    fn unpacked(&self, like: &Tensor<2>) -> Tensor<2> {
        #[cfg(feature = "gpu")]
        if let Some(codes) = self.decoded(Decoded::Codes, like, like) {
            return codes;
        }
        let (columns, device) = (self.codes.columns(), like.device());
        let Some(words) = &self.words else {
            let codes = self.codes.to_vec().into_iter().map(f32::from).collect();
            let codes = TensorData::new::<f32, _>(codes, [self.codes.rows(), columns]);
            return Tensor::from_data(codes, &device);
        };
        let bits = usize::from(self.codes.bits());
        let row = |f: &dyn Fn(usize) -> usize| -> Tensor<1, Int> {
            let values = (0..columns).map(|i| f(i * bits).cast_signed() as i32).collect();
            Tensor::from_data(TensorData::new::<i32, _>(values, [columns]), &device)
        };
        let last = words.dims()[1] - 1;
        // Of a code that straddles two words, the low part, and the high one; masks take away what
        // an arithmetic shift brings in.
        let low_bits = |at: usize| bits.min(32 - at % 32);
        let shift = row(&|at| at % 32).unsqueeze();
        let mask = row(&|at| (1 << low_bits(at)) - 1).unsqueeze();
        let low = words.clone().select(1, row(&|at| at / 32));
        let low = low.bitwise_right_shift(shift).bitwise_and(mask);
        let left = row(&|at| low_bits(at)).unsqueeze();
        let mask = row(&|at| (1 << (bits - low_bits(at))) - 1).unsqueeze();
        let high = words.clone().select(1, row(&|at| (at / 32 + 1).min(last)));
        let high = high.bitwise_and(mask).bitwise_left_shift(left);
        low.bitwise_or(high).float().cast(like.dtype())
    }
}
