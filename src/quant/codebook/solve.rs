//! Codes, codebooks and scales in turns.

use super::kmeans;
use super::short;
use super::state::{Problem, State};
use super::{fit, search};
use crate::error::{Error, Result};
use crate::ops::Additive;
use crate::quant::{Bits, GroupLayout, Hessian};

/// A round that gains less than this share of the error is the last one.
const TOLERANCE: f64 = 1e-3;
/// Steps of conjugate gradients in a round.
const STEPS: usize = 8;

/// What [`solve`] is to find.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CodebookOptions {
    /// Codebooks, and the inputs that a centroid stands for.
    pub additive: Additive,
    /// Width of a code: codebooks have `2^bits` centroids.
    pub bits: Bits,
    /// Rounds of alternation at most; none leaves residual k-means as it is.
    pub rounds: u32,
    /// Rows kept in the search for codes, at most 16.
    pub beam: usize,
    /// Added to the Hessian's diagonal, as a share of its mean.
    pub damping: f64,
    /// Of the start's draws.
    pub seed: u64,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Solved {
    /// `[out, inputs / vector, books]`.
    pub codes: Vec<u8>,
    /// `[books, centroids, vector]`, numbers of half precision.
    pub books: Vec<f32>,
    /// `[out, inputs / group_len]`.
    pub scale: Vec<f32>,
    /// The squared output error of the start and after each round, in units of the damped Hessian.
    pub errors: Vec<f64>,
}

/// Finds codes, codebooks and scales of `weight`, `[out, in]`, in groups of `layout`, for inputs with these
/// second moments. The error never grows from a round to the next.
///
/// # Errors
/// Lengths that do not divide each other, more centroids than vectors, and numbers that half precision does
/// not hold.
pub fn solve(
    weight: &[f32],
    layout: &GroupLayout,
    inputs: &Hessian,
    options: &CodebookOptions,
) -> Result<Solved> {
    let vector = options.additive.vector;
    let group = layout.group_len.min(layout.inputs);
    if weight.len() != layout.len() || inputs.size() != layout.inputs {
        return Err(Error::failed("the weight, its layout and the Hessian disagree"));
    }
    if !group.is_multiple_of(vector) || layout.group_len > layout.inputs {
        let what = format!("runs of {vector} inputs do not fill groups of {group}");
        return Err(Error::failed(what));
    }
    let centroids = options.bits.levels();
    if weight.len() / vector < centroids {
        let what = format!("{centroids} centroids for {} vectors", weight.len() / vector);
        return Err(Error::failed(what));
    }
    let shape = (options.additive, centroids);
    let problem = Problem::new(weight, layout, shape, inputs, options.damping);
    let mut state = kmeans::start(&problem, options.seed);
    short(&mut state.books)?;
    let aim = problem.times_hessian(weight, 0, problem.inputs);
    let (left, mut gradient) = problem.left(&state);
    let mut losses = problem.losses(&left, &gradient);
    let mut errors = vec![losses.iter().sum::<f64>()];
    for round in 0..options.rounds {
        let mut next = State { codes: Vec::new(), ..state.clone() };
        let beams = options.beam.clamp(1, search::MOST);
        next.codes = search::improve(&problem, &state, &gradient, &losses, beams);
        let found = problem.left(&next).1;
        fit::books(&problem, &mut next, &found, STEPS);
        short(&mut next.books)?;
        fit::scales(&problem, &mut next, &aim);
        let (left, found) = problem.left(&next);
        let found_losses = problem.losses(&left, &found);
        let (error, last) = (found_losses.iter().sum::<f64>(), errors[round as usize]);
        // Rounding may take away what little was gained.
        if error.is_nan() || error > last {
            break;
        }
        (state, gradient, losses) = (next, found, found_losses);
        errors.push(error);
        if last - error <= TOLERANCE * last {
            break;
        }
    }
    let State { codes, books, scale } = state;
    Ok(Solved { codes, books, scale, errors })
}
