//! Kernels over slices of f32, row-major. Nothing here knows burn.

pub(super) mod adamw;
pub(super) mod attention;
pub(super) mod binary_coding;
pub(super) mod fake_quant;
pub(super) mod linear;
pub(super) mod loss;
pub(super) mod mse;
pub(super) mod norm;
pub(super) mod swiglu;

/// Elements below which waking other threads costs more than they save.
const SERIAL: usize = 1 << 15;

/// Whether work on so many elements is worth several threads.
fn parallel(elements: usize) -> bool {
    elements >= SERIAL
}
