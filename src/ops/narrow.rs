//! Products with a frozen dense matrix where texts are continued: one that bfloat16 can say is read as such.

use burn::tensor::Tensor;

use super::linear;

/// Activations up to which reading half the bytes is faster than the dense product (docs/performance.md).
#[cfg(feature = "flex")]
const FEW: usize = 4;

/// A frozen matrix in 16 bits, where that loses nothing. Made when it is first needed; clones share it.
#[derive(Clone, Debug, Default)]
pub struct NarrowCopy(
    #[cfg(feature = "flex")]
    std::sync::Arc<std::sync::OnceLock<Option<super::kernel::narrow::Narrow>>>,
);

/// As [`linear`], with a weight that is the same in every call. Inside [`super::continuing`] few rows of `x` off
/// the tape are multiplied with its copy in bfloat16 where it has one: the same numbers, summed in another order.
///
/// # Shapes
/// As [`linear`].
pub fn linear_narrow<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    copy: &NarrowCopy,
) -> Tensor<D> {
    #[cfg(feature = "flex")]
    {
        use super::bridge::{Rows, off_tape, reads, reads_plain, tensor};
        use super::kernel::narrow::Narrow;

        let n: usize = x.dims()[..D - 1].iter().product();
        if n <= FEW && super::continuing::is_continuing() && reads_plain(&x) && reads(&weight) {
            let narrow = copy.0.get_or_init(|| {
                let weight = Rows::of(off_tape(weight.clone().transpose().into_dispatch()));
                let [_, columns] = weight.matrix();
                Narrow::of(weight.values(), columns)
            });
            if let Some(narrow) = narrow {
                let mut shape = x.dims().to_vec();
                shape[D - 1] = weight.dims()[1];
                let x = Rows::of(x.into_dispatch());
                return tensor(Rows::new(narrow.times(x.values()), shape).plain());
            }
        }
    }
    #[cfg(not(feature = "flex"))]
    let _ = copy;
    linear(x, weight)
}
