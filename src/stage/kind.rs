//! What every kind of stage says of itself, and does.

use std::path::Path;

use super::context::StageContext;
use super::corpus::Data;
use super::cost::{Cost, Scene};
use super::memory::Memory;
use super::state::ModelState;
use super::validate::ValidateConfig;
use crate::error::{Error, Result};
use crate::export::FormatsConfig;
use crate::method::MethodConfig;
use crate::model::ModelConfig;
use crate::quant::{ActivationQuant, Bits, GroupSize, ObserverConfig, Repr, ScaleDType, Symmetry};

/// A kind of stage: the keys of `[stage.NAME]`, which say what is to be done, and the doing. What is
/// left out has the answer of a stage that only looks at the model.
pub trait Stage {
    /// Refuses values that no type can refuse.
    ///
    /// # Errors
    /// Usage errors that name the key.
    fn check(&self) -> Result<()>;

    /// What it does to the linears.
    fn effect(&self) -> Effect<'_> {
        Effect::Nothing
    }

    /// Refuses a model that it cannot go on from.
    ///
    /// # Errors
    /// Usage errors where the order of stages is wrong, preflight errors where the model does not fit.
    fn follows(&self, _before: &Before<'_>) -> Result<()> {
        Ok(())
    }

    /// In plans, what stands behind the name in parentheses; `spec` is what linears without an override
    /// become.
    fn summary(&self, _spec: &str) -> String {
        String::new()
    }

    /// Whether it puts activations on fixed grids, where the recipe asks for them.
    fn calibrates(&self) -> bool {
        false
    }

    /// Whether it may start from latent weights that an earlier stage left.
    fn takes_latents(&self) -> bool {
        false
    }

    /// Whether it cannot do without the float model.
    fn needs_float(&self) -> bool {
        false
    }

    /// Whether it reads text that is tokenized as it runs.
    fn needs_tokenizer(&self) -> bool {
        false
    }

    /// What it reads that `[data]` does not name: what it goes by, and its SHA-256.
    ///
    /// # Errors
    /// When a file is not there.
    fn own_data(&self) -> Result<Vec<(String, String)>> {
        Ok(Vec::new())
    }

    /// Finds the texts it needs, and enough of them.
    ///
    /// # Errors
    /// A usage error that names the table to add, a preflight error for a text that is too short.
    fn check_data(&self, _model: &ModelState, _data: &Data) -> Result<()> {
        Ok(())
    }

    /// Optimizer steps in all.
    fn steps(&self, _blocks: usize) -> u64 {
        0
    }

    /// What it will need: an estimate.
    fn cost(&self, scene: &Scene<'_>) -> Cost;

    /// The width at which it reads linears whose planes serve several; absent: the widest.
    fn width(&self) -> Option<Bits> {
        None
    }

    /// Where what it trains is kept, where that is a choice; what the recipe leaves open is chosen by the room
    /// that there is.
    fn memory(&mut self) -> Option<&mut Option<Memory>> {
        None
    }

    /// The places that [`Stage::memory`] may name, the fastest first.
    fn places(&self) -> &'static [Memory] {
        &Memory::ALL
    }

    /// The formats it writes.
    fn exports(&self) -> Option<&FormatsConfig> {
        None
    }

    /// How the quality gate judges what it leaves; `None`: not at all.
    fn judged(&self) -> Option<Judged<'_>> {
        None
    }

    /// Sets the keys that change no result to their defaults, so that changing them goes on with a run.
    fn neutralize(&mut self) {}

    /// Whether an unfinished stage goes on from something in its folder `dir`, and says so itself.
    fn has_saved(&self, _dir: &Path) -> bool {
        false
    }

    /// Does it.
    ///
    /// # Errors
    /// Whatever goes wrong; what was saved before stays.
    fn run(&self, ctx: &mut StageContext<'_>) -> Result<()>;

    /// Brings back the model that it left when it was finished.
    ///
    /// # Errors
    /// When its checkpoints are missing or damaged.
    fn restore(&self, _ctx: &mut StageContext<'_>) -> Result<()> {
        Ok(())
    }
}

/// What a stage does to the linears.
#[derive(Clone, Copy, Debug)]
pub enum Effect<'a> {
    /// It leaves them as they are.
    Nothing,
    /// It makes codes of them.
    Codes(Codes<'a>),
    /// It tunes the grids of codes that are there.
    Grids {
        /// By this method.
        method: &'a MethodConfig,
        /// What scales are rounded to.
        dtype: ScaleDType,
    },
    /// It leaves floats.
    Floats,
}

/// How codes are made, and what differs from `[quant]`.
#[derive(Clone, Copy, Debug)]
pub struct Codes<'a> {
    /// The method.
    pub method: &'a MethodConfig,
    /// Instead of `quant.bits`.
    pub bits: Option<Bits>,
    /// Instead of `quant.group_size`.
    pub group_size: Option<GroupSize>,
    /// Instead of `quant.symmetric`.
    pub symmetric: Option<Symmetry>,
    /// Instead of `quant.observer`.
    pub observer: Option<&'a ObserverConfig>,
}

/// The [`Effect`] of a stage with the keys of a quantizing one.
macro_rules! codes {
    ($config:expr) => {
        $crate::stage::kind::Effect::Codes($crate::stage::kind::Codes {
            method: &$config.method,
            bits: $config.bits,
            group_size: $config.group_size,
            symmetric: $config.symmetric,
            observer: $config.observer.as_ref(),
        })
    };
}
pub(super) use codes;

impl<'a> Effect<'a> {
    /// How codes are made, where they are.
    pub fn codes(self) -> Option<Codes<'a>> {
        match self {
            Self::Codes(codes) => Some(codes),
            Self::Nothing | Self::Grids { .. } | Self::Floats => None,
        }
    }

    /// What the linears are after a stage, given what they are before: the typing rule.
    ///
    /// # Errors
    /// A usage error when its method needs other codes.
    pub(super) fn leaves(self, input: Repr) -> Result<Repr> {
        let method = match self {
            Self::Nothing => return Ok(input),
            Self::Floats => return Ok(Repr::Dense),
            Self::Codes(Codes { method, .. }) | Self::Grids { method, .. } => method,
        };
        let (takes, name) = (method.takes(), method.name());
        if takes == Repr::Dense || takes == input {
            return Ok(method.leaves());
        }
        Err(Error::usage(format!(
            "method.{name} goes on from {takes} codes, and the weights are {input} here"
        ))
        .fix("a stage before it that leaves such codes, for instance stage.calibrate"))
    }
}

/// What the model is when a stage's turn comes.
#[derive(Clone, Copy, Debug)]
pub struct Before<'a> {
    /// Its shape.
    pub model: &'a ModelConfig,
    /// What its linears are.
    pub repr: Repr,
    /// Whether a stage has changed float weights, which are no packed folder's.
    pub tuned: bool,
    /// What the recipe does to activations.
    pub activations: ActivationQuant,
    /// Whether a stage has put them on fixed grids.
    pub calibrated: bool,
}

/// How the quality gate judges what a stage leaves.
#[derive(Clone, Copy, Debug)]
pub struct Judged<'a> {
    /// On which windows; the default ones where the stage does not say.
    pub validate: Option<&'a ValidateConfig>,
    /// Whether a worse model passes, with a warning.
    pub allow_worse: bool,
    /// What may help, as a list of words; may be empty.
    pub advice: &'static str,
}
