//! Quantization methods: one file, one line in the `methods!` list each.
//!
//! A method sees one weight in grouped form `[groups, group_len]` and knows neither models nor
//! files. There are three kinds:
//!
//! * a [`WeightMethod`] sits on a stock `nn::Linear`'s weight as a burn `Reparameterization`: what it
//!   learns are ordinary parameters, the optimizer and the records see them, and every forward reads
//!   the fake-quantized weight. There is no second kind of linear;
//! * a [`Solver`] learns nothing: it turns a weight, and if it asks for them statistics of the
//!   linear's inputs, into codes and a grid at once;
//! * a [`Tuner`] goes on from codes that an earlier stage left: they stay packed
//!   ([`CodedWeight`](crate::quant::CodedWeight)), and only their grid learns.

mod adadim;
mod alphatuning;
mod anybcq;
mod aqlm;
mod aqlm_ft;
mod attach;
mod awq;
mod bcq;
mod block_ap;
mod e2e_qp;
mod flexround;
mod gptq;
mod kinds;
mod list;
mod lrq;
mod lsq;
mod lwc;
mod peqa;
mod quantizer;
mod rtn;
mod seq;
mod sign;
mod signround;
mod ternary;
mod uniquanf;

use std::collections::BTreeSet;

use burn::module::Module;
use burn::tensor::Tensor;
use serde::{Deserialize, Serialize};

pub use adadim::{AdaDim, AdaDimConfig};
pub use alphatuning::{AlphaTuning, AlphaTuningConfig, LearnedAlphas};
pub use anybcq::{AnyBcq, AnyBcqConfig};
pub use aqlm::{Aqlm, AqlmConfig};
pub use aqlm_ft::{AqlmFt, AqlmFtConfig, LearnedCodebooks};
pub use attach::{
    FakeQuant, Glimpse, Latent, attach, attached, between_steps, coarseness, fold, glimpse,
    is_carried, latent, materialize, measures, quantize, role_of, shorten_all,
};
pub use awq::{Awq, AwqConfig};
pub use bcq::{Bcq, BcqConfig, BcqSolve};
pub use block_ap::{BlockAp, BlockApConfig, BlockApStart};
pub use e2e_qp::{E2eQp, E2eQpConfig};
pub use flexround::{FlexRound, FlexRoundConfig};
pub use gptq::{Gptq, GptqConfig};
pub use kinds::{
    GridKind, LeftGrid, Moment, Needs, OutputError, Problem, Solver, Start, Tuner, Units,
    WeightMethod,
};
pub use lrq::{Division, FullDivision, LowRankDivision, Lrq, LrqConfig, Rank};
pub use lsq::{Lsq, LsqConfig, LsqGradientScale, LsqStart};
pub use lwc::{Lwc, LwcConfig};
pub use peqa::{Peqa, PeqaConfig};
pub use quantizer::{Folded, Quantizer};
pub use rtn::{Rtn, RtnConfig};
pub use seq::{Seq, SeqConfig, SeqStart};
pub use sign::{Sign, SignConfig};
pub use signround::{SignRound, SignRoundConfig};
pub use ternary::{Ternary, TernaryConfig};
pub use uniquanf::{UniQuanF, UniQuanFConfig};

use list::{TUNED, methods};

use crate::error::{Error, Result};
use crate::quant::{Bits, Learned, QuantSpec, QuantizedWeight, Repr};
use crate::train::Role;

methods! {
    learned {
        /// Round-to-nearest: nothing learned, the baseline.
        Rtn { "rtn", RtnConfig },
        /// FlexRound: element-wise division factors.
        FlexRound { "flexround", FlexRoundConfig },
        /// UniQuanF: FlexRound's transform and learned binary-coding levels.
        UniQuanF { "uniquanf", UniQuanFConfig },
        /// LRQ: FlexRound's division factors as a low-rank product.
        Lrq { "lrq", LrqConfig },
        /// LWC: learned clipping of each group's range.
        Lwc { "lwc", LwcConfig },
        /// Block-AP: latent weights, steps and zero points learned.
        BlockAp { "block_ap", BlockApConfig },
        /// Stretched elastic quantization, 2 bits, latent weights and steps learned.
        Seq { "seq", SeqConfig },
        /// SignRound: bounded rounding offsets and range factors, by signed descent.
        SignRound { "signround", SignRoundConfig },
        /// LSQ and LSQ+: latent weights and steps learned, zero in the middle or shifted.
        Lsq { "lsq", LsqConfig },
        /// Three levels, latent weights and steps learned.
        Ternary { "ternary", TernaryConfig },
        /// Signs, 1 bit, latent weights and steps learned.
        Sign { "sign", SignConfig },
    }
    solvers {
        /// Binary coding: sign planes with a scale each, fitted to the weight.
        Bcq { "bcq", BcqConfig },
        /// AnyBCQ: binary coding at several widths that share their planes.
        AnyBcq { "anybcq", AnyBcqConfig },
        /// AQLM: runs of inputs as sums of centroids, fitted to the layer's outputs.
        Aqlm { "aqlm", AqlmConfig },
        /// GPTQ: each column's rounding error is made up for by the columns after it.
        Gptq { "gptq", GptqConfig },
        /// AWQ: input channels balanced by activation, and clipping searched.
        Awq { "awq", AwqConfig },
        /// AdaDim: groups along the inputs or the outputs, chosen for each linear.
        AdaDim { "adadim", AdaDimConfig },
    }
    tuners {
        /// PEQA: the scales of codes that an earlier stage left.
        Peqa { "peqa", PeqaConfig },
        /// AlphaTuning: the scales of sign planes that an earlier stage left.
        AlphaTuning { "alphatuning", AlphaTuningConfig },
        /// E2E-QP: the steps of codes that an earlier stage left.
        E2eQp { "e2e_qp", E2eQpConfig },
        /// AQLM's fine-tuning: the codebooks and scales of codes that an earlier stage left.
        AqlmFt { "aqlm_ft", AqlmFtConfig },
    }
}

impl MethodConfig {
    /// The keys of AQLM's solver.
    pub(crate) fn codebook(&self) -> Option<&AqlmConfig> {
        if let Self::Aqlm(config) = self { Some(config) } else { None }
    }

    /// The widths at which codes of `bits` that it makes can be read, where those are several.
    pub fn widths(&self, bits: Bits) -> BTreeSet<Bits> {
        let Self::AnyBcq(config) = self else { return BTreeSet::new() };
        (config.lowest.get()..=bits.get()).filter_map(|bits| Bits::new(bits).ok()).collect()
    }
}
