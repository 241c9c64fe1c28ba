//! The grid of each group that is nearest to its weights, among candidates.

use burn::tensor::Tensor;

use super::Rule;
#[cfg(feature = "flex")]
use super::bridge::{Rows, off_tape, reads, tensor};
#[cfg(feature = "flex")]
use super::kernel::search::Search;

/// Between which numbers the weights of a group lie.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// The smallest weight.
    pub low: f32,
    /// The largest weight.
    pub high: f32,
}

impl Extent {
    /// The largest magnitude.
    pub fn reach(self) -> f32 {
        if -self.low > self.high { -self.low } else { self.high }
    }
}

/// A grid that a group may get.
#[derive(Clone, Copy, Debug)]
pub struct Candidate {
    /// Step.
    pub step: f32,
    /// Zero point, in code units.
    pub zero_point: f32,
}

/// Step and zero point of each group for which `Σ |w - ŵ|^power` is least, `[groups, 1]` each;
/// `candidates` appends what a group of some extent may get, at least one, and the first one wins a
/// tie. `None` where no kernel reads the weight: the search then has to be composed.
///
/// # Shapes
/// - weight: `[groups, group_len]`
pub fn nearest_grids(
    weight: &Tensor<2>,
    rule: Rule,
    power: f32,
    candidates: impl Fn(Extent, &mut Vec<Candidate>) + Sync,
) -> Option<(Tensor<2>, Tensor<2>)> {
    #[cfg(feature = "flex")]
    if reads(weight) {
        let [groups, len] = weight.dims();
        let rows = Rows::of(off_tape(weight.clone().into_dispatch()));
        let search = Search { weight: rows.values(), len, rule, power };
        let (steps, zeros) = search.best(candidates);
        let column = |values| tensor(Rows::new(values, [groups, 1]).plain());
        return Some((column(steps), column(zeros)));
    }
    #[cfg(not(feature = "flex"))]
    let _ = (weight, rule, power, candidates);
    None
}
