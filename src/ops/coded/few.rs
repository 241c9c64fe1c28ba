//! Products of few activations with a frozen grid, on packed codes: what text is generated with.

use std::cell::Cell;
use std::sync::{Arc, OnceLock};

use burn::tensor::Tensor;

use super::CodedMatrix;
use crate::ops::bridge::{Rows, off_tape, reads_plain, tensor};
use crate::ops::kernel::lookup::{self, Coefficients, Planes};

/// Activations times bits of a code up to which looking sums up is faster than decoding weights for a
/// dense product (docs/performance.md).
const FEW: usize = 64;

/// Codes in the order of such products; clones of a matrix share them.
pub(super) type SharedPlanes = Arc<OnceLock<Planes>>;

/// A grid that never changes, in the order in which products of few activations read it. Made when
/// it is first needed; clones share it.
#[derive(Clone, Debug, Default)]
pub struct FrozenGrid(Arc<OnceLock<Coefficients>>);

thread_local! {
    static CONTINUING: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`, in which texts are continued: there a product of few activations with packed codes on a frozen
/// grid ([`CodedMatrix::linear_frozen`]) is computed on the codes, another order of the same sum. Elsewhere
/// weights are decoded, so that a packed model gives the bits of the dense one that it stands for. Holds for
/// the calling thread.
pub fn continuing<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            CONTINUING.set(self.0);
        }
    }
    let _restore = Restore(CONTINUING.replace(true));
    f()
}

impl CodedMatrix {
    /// Whether a product with `x` is one of few activations inside [`continuing`], which nobody wants a
    /// gradient of.
    pub(super) fn is_few<const D: usize>(&self, x: &Tensor<D>) -> bool {
        let n: usize = x.dims()[..D - 1].iter().product();
        CONTINUING.get()
            && !self.transposed
            && n * usize::from(self.codes.bits()) <= FEW
            && lookup::reads(self.codes.columns(), self.group_len)
            && reads_plain(x)
    }

    /// `x Wᵀ` on packed codes.
    pub(super) fn few<const D: usize>(
        &self,
        x: Tensor<D>,
        grid: &FrozenGrid,
        values: impl FnOnce() -> [Tensor<2>; 2],
    ) -> Tensor<D> {
        let mut shape = x.dims().to_vec();
        let x = Rows::of(x.into_dispatch());
        let planes = self.planes.get_or_init(|| Planes::of(&self.codes));
        let grid = grid.0.get_or_init(|| {
            let [scale, shift] = values().map(|values| Rows::of(off_tape(values.into_dispatch())));
            Coefficients::of(&self.kernel(&scale, &shift))
        });
        let [n, _] = x.matrix();
        shape[D - 1] = self.codes.rows();
        tensor(Rows::new(planes.times(grid, x.values(), n), shape).plain())
    }
}
