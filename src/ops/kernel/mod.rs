//! Kernels over slices of f32, row-major. Nothing here knows burn.

use rayon::iter::{IndexedParallelIterator, ParallelIterator};
use rayon::slice::ParallelSliceMut;

pub(super) mod adamw;
pub(super) mod attention;
pub(super) mod binary_coding;
pub(super) mod coded;
pub(super) mod fake_quant;
pub(super) mod integer;
mod lanes;
pub(super) mod linear;
pub(super) mod lookup;
pub(super) mod loss;
pub(super) mod moments;
pub(super) mod mse;
pub(super) mod narrow;
pub(super) mod norm;
pub(super) mod psumbook;
#[cfg(test)]
mod sample;
pub(super) mod search;
pub(super) mod stochastic;
pub(super) mod swiglu;

/// Elements below which waking other threads costs more than they save.
const SERIAL: usize = 1 << 15;

/// Whether work on so many elements is worth several threads.
fn parallel(elements: usize) -> bool {
    elements >= SERIAL
}

/// The least number of tasks worth a second thread: none where the whole work is small.
fn min_tasks(elements: usize) -> usize {
    if parallel(elements) { 1 } else { usize::MAX }
}

/// Runs `group` on every row of `out`, with its index.
fn rows(out: &mut [f32], len: usize, group: impl Fn((usize, &mut [f32])) + Send + Sync) {
    if parallel(out.len()) {
        out.par_chunks_mut(len).enumerate().for_each(group);
    } else {
        out.chunks_mut(len).enumerate().for_each(group);
    }
}
