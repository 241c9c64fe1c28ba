//! The quantizer core: what a grid is, how it is observed, and how codes are stored.
//!
//! The vocabulary, in one place:
//!
//! * a weight is `[out, in]`; a *group* is a run of weights that share one scale, and every tensor
//!   of this layer is in grouped form `[groups, group_len]` (see [`GroupLayout`]);
//! * `codes` are the stored integers `0..2^bits`; a uniform grid means
//!   `w = scale * (code - zero_point)`, binary coding that each bit of the code adds or subtracts
//!   one of the group's scales;
//! * the *zero kind* says what a zero point may be: an integer, an integer plus a half (SEQ's
//!   zero-free 2-bit grid), or any real number. It decides which file formats can hold the weight.

pub mod activation;
pub mod bcq;
pub mod codebook;
mod coded;
pub mod gptq;
mod grid;
mod hessian;
mod nested;
mod observer;
mod scales;
mod spec;

pub use crate::ops::{Additive, PackedCodes, bits};
pub use activation::{
    ActivationConfig, ActivationQuant, ActivationScheme, InputGrid, KvCacheConfig,
};
pub(crate) use coded::Once;
pub use coded::{CodedWeight, Learned, LearnedScales};
pub use grid::{CodeHistogram, Grid, QuantizedWeight, Repr, ZeroKind};
pub use hessian::Hessian;
pub use nested::no_width;
pub use observer::{MinMaxConfig, MseConfig, ObserverConfig, QuantParams, SCALE_FLOOR};
pub use scales::{ScaleDType, ScaleDigits};
pub use spec::{Bits, GroupAxis, GroupLayout, GroupSize, QuantSpec, Symmetry};
