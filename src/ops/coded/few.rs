//! Products with a frozen grid on packed codes: what text is generated with.

use std::sync::{Arc, OnceLock};

use burn::tensor::Tensor;

use super::{CodedKind, CodedMatrix};
use crate::ops::bridge::{Rows, off_tape, reads_plain, tensor};
use crate::ops::continuing::is_continuing;
use crate::ops::kernel::integer::{self, Steps};
use crate::ops::kernel::lookup::{self, Coefficients, Planes};
use crate::ops::kernel::psumbook::{Books, Codes};

/// Activations times bits of a code up to which looking sums up is faster than decoding weights for a
/// dense product (docs/performance.md).
const FEW: usize = 64;

/// Activations up to which looking inner products with centroids up is faster than decoding weights
/// (docs/performance.md).
const FEW_OF_CODEBOOKS: usize = 4;

/// Codes in the order of such products; clones of a matrix share them.
pub(super) type SharedPlanes = Arc<OnceLock<InOrder>>;

/// Codes in the order of such products.
#[derive(Clone, Debug)]
pub(super) enum InOrder {
    /// Of a grid of signs, as every grid of single weights is one.
    Planes(Planes),
    /// Of codebooks.
    Codes(Codes),
    /// For integer products.
    Integers(integer::Codes),
}

/// A grid in the order of such products.
#[derive(Clone, Debug)]
enum Frozen {
    Signs(Coefficients),
    Books(Books),
    Steps(Steps),
}

/// A grid that never changes, in the order in which products of few activations read it. Made when
/// it is first needed; clones share it.
#[derive(Clone, Debug, Default)]
pub struct FrozenGrid(Arc<OnceLock<Frozen>>);

impl CodedMatrix {
    /// The same codes for products in integers: what [`CodedMatrix::linear_frozen`] multiplies off the tape is
    /// rounded to 8 bits, in runs of 32 inputs that have a scale each. `None` where such products do not read the
    /// codes: of other grids than uniform ones, or on another device than this machine's processor.
    pub fn in_integers(&self) -> Option<Self> {
        let reads = self.kind == CodedKind::Uniform
            && !self.transposed
            && self.words.is_none()
            && integer::reads(self.codes.columns(), self.group_len);
        reads.then(|| Self { integers: true, planes: SharedPlanes::default(), ..self.clone() })
    }

    /// Whether a product with `x`, which nobody wants a gradient of, is computed on the codes: all those in
    /// integers, and inside [`continuing`](crate::ops::continuing) those of few activations.
    pub(super) fn is_on_codes<const D: usize>(&self, x: &Tensor<D>) -> bool {
        let n: usize = x.dims()[..D - 1].iter().product();
        let few = || match self.kind {
            CodedKind::Codebook(_) => n <= FEW_OF_CODEBOOKS,
            CodedKind::Uniform | CodedKind::BinaryCoding => {
                n * usize::from(self.codes.bits()) <= FEW
                    && lookup::reads(self.codes.columns(), self.group_len)
            }
        };
        (self.integers || is_continuing() && !self.transposed && few()) && reads_plain(x)
    }

    /// `x Wᵀ` on packed codes.
    pub(super) fn on_codes<const D: usize>(
        &self,
        x: Tensor<D>,
        grid: &FrozenGrid,
        values: impl FnOnce() -> [Tensor<2>; 2],
    ) -> Tensor<D> {
        let mut shape = x.dims().to_vec();
        let x = Rows::of(x.into_dispatch());
        let codes = self.planes.get_or_init(|| match self.kind {
            CodedKind::Codebook(_) => InOrder::Codes(Codes::of(&self.codes)),
            CodedKind::Uniform if self.integers => {
                InOrder::Integers(integer::Codes::of(&self.codes))
            }
            CodedKind::Uniform | CodedKind::BinaryCoding => {
                InOrder::Planes(Planes::of(&self.codes))
            }
        });
        let grid = grid.0.get_or_init(|| {
            let [scale, shift] = values().map(|values| Rows::of(off_tape(values.into_dispatch())));
            let held = self.kernel(&scale, &shift);
            match self.kind {
                CodedKind::Codebook(additive) => Frozen::Books(Books::of(&held, additive)),
                CodedKind::Uniform if self.integers => Frozen::Steps(Steps::of(&held)),
                CodedKind::Uniform | CodedKind::BinaryCoding => {
                    Frozen::Signs(Coefficients::of(&held))
                }
            }
        });
        let [n, _] = x.matrix();
        shape[D - 1] = self.codes.rows();
        let y = match (codes, grid) {
            (InOrder::Planes(planes), Frozen::Signs(grid)) => planes.times(grid, x.values(), n),
            (InOrder::Codes(codes), Frozen::Books(books)) => codes.times(books, x.values(), n),
            (InOrder::Integers(codes), Frozen::Steps(grid)) => codes.times(grid, x.values(), n),
            // Both were made for this kind of matrix.
            _ => vec![f32::NAN; n * self.codes.rows()],
        };
        tensor(Rows::new(y, shape).plain())
    }
}
