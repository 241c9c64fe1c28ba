//! Additive codebooks: a run of `vector` inputs of a row is a sum of centroids, one of each codebook,
//! times the scale of its group (AQLM, arXiv 2401.06118, in the layout of CodeGEMM, arXiv 2512.17970).
//!
//! `Ŵ[j, v c + t] = a[j, group(c)] Σ_i C_i[code_i[j, c], t]`. [`solve`] finds codes, codebooks and scales of
//! small output error `|X Wᵀ - X Ŵᵀ|²`: residual k-means on normalized vectors, then in turns least
//! squares for codebooks and scales, and a beam search over codes, one code at a time.

mod fit;
mod kmeans;
mod search;
mod solve;
mod state;

use half::f16;

pub use search::MOST as MOST_BEAMS;
pub use solve::{CodebookOptions, Solved, solve};

use crate::error::{Error, Result};

/// The most codebooks.
pub const MOST: usize = 8;

/// The most inputs that a centroid stands for.
pub const LONGEST: usize = 32;

/// The nearest numbers of half precision, which codebooks are stored as.
///
/// # Errors
/// When one lies beyond its largest number.
pub fn short(values: &mut [f32]) -> Result<()> {
    for value in values {
        let half = f16::from_f32(*value);
        if !half.is_finite() {
            let what = format!("a centroid holds {value:e}, which half precision does not");
            return Err(Error::failed(what));
        }
        *value = half.to_f32();
    }
    Ok(())
}

#[cfg(test)]
mod tests;
