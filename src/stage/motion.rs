//! How far a step moves what learns, as log points tell it: norms of gradients and updates by block, codes
//! that became others, and scales.
//!
//! Nothing of it is part of a saved state. A share since the last log point would have to be, for a run
//! that was stopped between two of them; so one is of the log point's own step, and the other since the
//! stage's start, which a run that goes on finds again.

use burn::tensor::Tensor;

use super::student::Student;
use crate::error::Result;
use crate::method::{self, Glimpse};
use crate::model::Block;
use crate::ops::Numbers;
use crate::train::Noted;

/// Weights of a linear whose codes are looked at: as good as all of them for a share, and nothing beside
/// a step.
const LOOKED_AT: usize = 1 << 14;

/// What there was to see of the linears at the stage's start, and what log points found since.
#[derive(Default)]
pub(super) struct Motion {
    /// By block.
    start: Vec<Vec<Glimpse>>,
    moved: Moved,
}

/// What a step moved; numbers that may be waited for.
#[derive(Default)]
pub(super) struct Moved {
    /// Norms of the gradients and of the updates, a number for each block.
    norms: [Vec<Numbers>; 2],
    /// Codes that the step changed, and those that are not the start's any more, by linear.
    codes: [Vec<Numbers>; 2],
    /// Codes that were looked at.
    looked_at: usize,
    /// Relative change of the scales since the start, by linear.
    scales: Vec<Numbers>,
}

impl Motion {
    /// Of a student that has not learned yet.
    ///
    /// # Errors
    /// When a block cannot be read.
    pub(super) fn of(student: &Student) -> Result<Self> {
        let mut start = Vec::new();
        student.visit_blocks(|_, block| {
            start.push(glimpses(block).collect());
            Ok(())
        })?;
        Ok(Self { start, moved: Moved::default() })
    }

    /// Notes a block behind a step; `before` are its [`codes`] before it.
    pub(super) fn note(&mut self, index: usize, before: &[Tensor<2>], block: &Block) {
        let Some(start) = self.start.get(index) else { return };
        let mut before = before.iter();
        let moved = &mut self.moved;
        for (now, start) in glimpses(block).zip(start) {
            moved.scales.push(relative(&now.scales, &start.scales));
            let codes = now.codes.zip(start.codes.as_ref()).zip(before.next());
            let Some(((now, start), before)) = codes else { continue };
            let [some, len] = now.dims();
            moved.looked_at += some * len;
            for (list, other) in moved.codes.iter_mut().zip([before, start]) {
                list.push(Numbers::of(now.clone().not_equal(other.clone()).float().sum()));
            }
        }
    }

    /// What was noted, with what the optimizer noted of the same step.
    pub(super) fn take(&mut self, noted: Option<Noted>) -> Moved {
        let moved = std::mem::take(&mut self.moved);
        let Some(Noted { gradients, updates }) = noted else { return moved };
        let blocks = self.start.len();
        let norms = [gradients, updates].map(|squares| squares.norms_of_blocks(blocks));
        Moved { norms, ..moved }
    }
}

impl Moved {
    /// Everything that may be waited for.
    pub(super) fn numbers_mut(&mut self) -> impl Iterator<Item = &mut Numbers> {
        self.norms.iter_mut().chain(&mut self.codes).chain([&mut self.scales]).flatten()
    }

    /// Tags and values of the whole model.
    pub(super) fn values(&self) -> Vec<(&'static str, f64)> {
        let sum = |list: &[Numbers]| list.iter().map(one).sum::<f64>();
        let mut values = Vec::new();
        if self.looked_at > 0 {
            let shares = self.codes.each_ref().map(|list| sum(list) / self.looked_at as f64);
            values.extend(["codes/flipped", "codes/changed"].into_iter().zip(shares));
        }
        if !self.scales.is_empty() {
            values.push(("scales/changed", sum(&self.scales) / self.scales.len() as f64));
        }
        values
    }

    /// Groups of tags, and a value for each block.
    pub(super) fn by_block(&self) -> Vec<(&'static str, Vec<f64>)> {
        let norms = self.norms.iter().map(|list| list.iter().map(one).collect());
        ["grad_norm", "update_norm"].into_iter().zip(norms).collect()
    }
}

/// The codes of a block that are looked at, linear by linear.
pub(super) fn codes(block: &Block) -> Vec<Tensor<2>> {
    glimpses(block).filter_map(|glimpse| glimpse.codes).collect()
}

fn glimpses(block: &Block) -> impl Iterator<Item = Glimpse> {
    block.linears().filter_map(|(_, linear)| method::glimpse(&linear.weight, LOOKED_AT))
}

/// `Σ |now - start| / Σ |start|`, one number.
fn relative(now: &Tensor<2>, start: &Tensor<2>) -> Numbers {
    let size = start.clone().abs().sum().clamp_min(f32::MIN_POSITIVE);
    Numbers::of((now.clone() - start.clone()).abs().sum() / size)
}

fn one(numbers: &Numbers) -> f64 {
    numbers.values().first().copied().unwrap_or_default()
}
