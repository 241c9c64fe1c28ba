//! What this machine and its devices can do: right numbers ([`Check`]), ceilings ([`Ceiling`], [`Disk`]),
//! and what the work that users wait for takes ([`Bench`]).
//!
//! What is measured is made of the pieces that stages, generation and exports are made of.

mod attach;
mod ceiling;
mod check;
mod disk;
mod needs;
mod parts;
mod serving;
mod subject;
mod timing;
mod training;

pub use ceiling::Ceiling;
pub use check::{Check, Numbers, reference};
pub use disk::Disk;
pub use needs::Refusal;
pub use parts::{Bench, Measured, Part, Settings};
pub use subject::Subject;
pub use timing::{Effort, Spread};

pub use crate::ops::{DeviceKernels, device_kernels, vector_level};
