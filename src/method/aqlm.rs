//! AQLM (Egiazarian et al., arXiv 2401.06118): each run of inputs of a row is a sum of centroids, one of
//! each codebook, in the layout of CodeGEMM (arXiv 2512.17970).
//!
//! *What it learns:* nothing; it looks at the inputs of each linear once. *Formula:* `W_hat[j, run] =
//! a[j, group] Σ_i C_i[code_i]`, with `codebooks * code_bits / vector` bits of codes for each weight, which
//! `bits` has to say. *Start:* groups scaled to a mean square of 1, and residual k-means. *Then*, in rounds: a
//! beam search over codes, one code at a time, for the least `|X Wᵀ - X W_hatᵀ|²` with `H = 2/N Σ x xᵀ + λI`;
//! least squares for codebooks (conjugate gradients) and for scales (a row's groups together). The error never
//! grows. One codebook of `vector = 1` is a lookup table of `2^bits` levels that k-means spaces (SqueezeLLM, arXiv
//! 2306.07629, has a table for each row; here a linear has one, and each group a scale); `rounds = 0` leaves
//! k-means as it is. *Recipe keys:* `codebooks`, `vector`, `code_bits`, `rounds`, `beam`, `damping`, `seed`.
//! Codebooks and scales learn on by `method.aqlm_ft`, by block and end to end. *Export:* fewbit's folder holds
//! codes and codebooks, `dequantized` the weights.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{GridKind, Needs, Problem, Solver};
use crate::error::{Error, Result};
use crate::quant::codebook::{CodebookOptions, LONGEST, MOST, MOST_BEAMS, solve};
use crate::quant::{
    Additive, Bits, Grid, GroupLayout, GroupSize, QuantSpec, QuantizedWeight, Repr,
};

/// `method.aqlm`.
#[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct AqlmConfig {
    /// Codebooks whose centroids are added, 1 to 8.
    pub codebooks: usize,
    /// Inputs that a centroid stands for, 1 to 32; divides groups. 1: a lookup table of single levels.
    pub vector: usize,
    /// Width of a code: a codebook has `2^code_bits` centroids.
    pub code_bits: Bits,
    /// Rounds of search and least squares at most; 0 leaves residual k-means as it is.
    pub rounds: u32,
    /// Rows kept in the search for codes, 1 to 16; 1 takes each code's best and goes on.
    pub beam: usize,
    /// Added to the Hessian's diagonal, as a share of its mean.
    pub damping: f64,
    /// Of the draws in k-means.
    pub seed: u64,
}

impl Default for AqlmConfig {
    fn default() -> Self {
        Self {
            codebooks: 1,
            vector: 4,
            code_bits: Bits::EIGHT,
            rounds: 10,
            beam: 2,
            damping: 0.01,
            seed: 0,
        }
    }
}

impl AqlmConfig {
    fn additive(&self) -> Additive {
        Additive { books: self.codebooks, vector: self.vector }
    }

    /// A weight of this kind without meaning: what formats are asked about.
    ///
    /// # Errors
    /// As [`Solver::accepts`].
    pub(crate) fn stand_in(
        &self,
        spec: &QuantSpec,
        layout: GroupLayout,
    ) -> Result<QuantizedWeight> {
        let additive = self.additive();
        let grid = Grid::Codebook {
            scale: vec![0.3; layout.groups],
            books: vec![0.5; self.codebooks * self.code_bits.levels() * self.vector],
            additive,
        };
        let codes = vec![0; layout.out * additive.codes(layout.inputs)];
        QuantizedWeight::of_codebooks(&codes, grid, self.code_bits, spec.bits, layout)
    }
}

/// The solver.
#[derive(Clone, Copy, Debug)]
pub struct Aqlm;

impl Solver for Aqlm {
    type Config = AqlmConfig;

    const LEAVES: Repr = Repr::Codebook;
    const GRID: GridKind = GridKind::Codebook;
    const NEEDS: Needs = Needs::Moments;

    fn accepts(config: &AqlmConfig, spec: &QuantSpec) -> Result<()> {
        let AqlmConfig { codebooks, vector, code_bits, beam, damping, .. } = *config;
        if !(1..=MOST).contains(&codebooks) {
            let what = format!("codebooks = {codebooks} is not in 1..={MOST}");
            return Err(Error::usage(what).fix("codebooks = 1"));
        }
        if !(1..=LONGEST).contains(&vector) {
            let what = format!("vector = {vector} is not in 1..={LONGEST}");
            return Err(Error::usage(what).fix("vector = 4"));
        }
        if !(1..=MOST_BEAMS).contains(&beam) {
            let what = format!("beam = {beam} is not in 1..={MOST_BEAMS}");
            return Err(Error::usage(what).fix("beam = 2"));
        }
        if !(damping.is_finite() && damping > 0.0) {
            let what = format!("damping = {damping} is not a share above 0");
            return Err(Error::usage(what).fix("damping = 0.01"));
        }
        let bits = codebooks * usize::from(code_bits.get());
        if bits != usize::from(spec.bits.get()) * vector {
            let what = format!(
                "{codebooks} codes of {code_bits} bits for {vector} weights are not bits = {} a weight",
                spec.bits
            );
            let fix = if bits.is_multiple_of(vector) && bits / vector <= 8 {
                format!("bits = {}", bits / vector)
            } else {
                "bits = 2, codebooks = 1, vector = 4 and code_bits = 8".to_owned()
            };
            return Err(Error::usage(what).fix(fix));
        }
        match spec.group_size {
            GroupSize::PerTensor => {
                let what = "a scale for the whole matrix does not go with codebooks";
                Err(Error::usage(what).fix("group_size = \"channel\" or a number"))
            }
            GroupSize::Of(size) if !size.get().is_multiple_of(vector) => {
                let what = format!("vector = {vector} does not divide group_size {size}");
                let near = size.get().next_multiple_of(vector);
                Err(Error::usage(what).fix(format!("group_size = {near}, or another vector")))
            }
            GroupSize::PerChannel | GroupSize::Of(_) => Ok(()),
        }
    }

    fn accepts_shape(config: &AqlmConfig, [out, inputs]: [usize; 2]) -> Result<()> {
        let AqlmConfig { codebooks, vector, code_bits, .. } = *config;
        if !inputs.is_multiple_of(vector) {
            let near = (1..=vector).rev().find(|v| inputs.is_multiple_of(*v)).unwrap_or(1);
            let what = format!("vector = {vector} does not divide in_features {inputs}");
            return Err(Error::preflight(what).fix(format!(
                "vector = {near} with codebooks and code_bits to match, or keep = true in a [[quant.override]]"
            )));
        }
        let (vectors, centroids) = (out * inputs / vector, code_bits.levels());
        if vectors >= centroids {
            return Ok(());
        }
        // The same bits a weight, in shorter runs or more codebooks.
        let bits = codebooks * usize::from(code_bits.get());
        let fits = |books: &usize| {
            bits.is_multiple_of(*books) && bits / books <= 8 && 1 << (bits / books) <= vectors
        };
        let what = format!(
            "{centroids} centroids for the {vectors} runs of {vector} inputs of a {out} x {inputs} matrix"
        );
        let books = (codebooks + 1..=MOST).find(fits);
        Err(Error::preflight(what).fix(match books {
            Some(books) => format!(
                "codebooks = {books} and code_bits = {}, the same bits a weight, or keep = true in a [[quant.override]]",
                bits / books
            ),
            None => "a smaller vector, or keep = true in a [[quant.override]]".to_owned(),
        }))
    }

    fn solve(config: &AqlmConfig, problem: &Problem<'_>) -> Result<QuantizedWeight> {
        let Problem { spec, layout, weight, .. } = *problem;
        let options = CodebookOptions {
            additive: config.additive(),
            bits: config.code_bits,
            rounds: config.rounds,
            beam: config.beam,
            damping: config.damping,
            seed: config.seed,
        };
        let values: Vec<f32> = weight.to_data().iter::<f32>().collect();
        let found = solve(&values, &layout, problem.need_inputs()?, &options)?;
        let additive = options.additive;
        let grid = Grid::Codebook { scale: found.scale, books: found.books, additive };
        QuantizedWeight::of_codebooks(&found.codes, grid, config.code_bits, spec.bits, layout)
    }
}
