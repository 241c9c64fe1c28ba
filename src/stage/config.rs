//! The kinds of stage: one file, one line in the `stages!` list each.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::calibrate::CalibrateConfig;
use super::context::StageContext;
use super::distill::DistillConfig;
use super::evaluate::EvaluateConfig;
use super::export::ExportConfig;
use super::finetune::FinetuneConfig;
use super::kind::{Before, Effect, Stage};
use super::reconstruct::ReconstructConfig;
use super::tune_scales::TuneScalesConfig;
use super::{gate, head};
use crate::error::Result;
use crate::quant::Repr;

/// The enum of the kinds, and which keys and doings each has.
macro_rules! stages {
    ($($(#[$doc:meta])* $name:ident { $key:literal, $config:ty },)*) => {
        /// One entry of a recipe's stage list: `[stage.NAME]`.
        #[derive(Clone, Debug, Deserialize, JsonSchema, PartialEq, Serialize)]
        pub enum StageConfig {
            $($(#[$doc])* #[serde(rename = $key)] $name($config),)*
        }

        impl StageConfig {
            /// Name in recipes and folders.
            pub fn name(&self) -> &'static str {
                match self {
                    $(Self::$name(_) => $key,)*
                }
            }

            /// What it says of itself, and does.
            pub fn stage(&self) -> &dyn Stage {
                match self {
                    $(Self::$name(config) => config,)*
                }
            }

            /// As [`StageConfig::stage`], to decide what the recipe leaves open.
            pub fn stage_mut(&mut self) -> &mut dyn Stage {
                match self {
                    $(Self::$name(config) => config,)*
                }
            }
        }
    };
}

stages! {
    /// Observers only: grids without learning.
    Calibrate { "calibrate", CalibrateConfig },
    /// Block by block, each fitted to the float block's output.
    Reconstruct { "reconstruct", ReconstructConfig },
    /// The whole model at once, against a frozen teacher.
    Distill { "distill", DistillConfig },
    /// The scales of codes that an earlier stage left.
    TuneScales { "tune_scales", TuneScalesConfig },
    /// Float weights, by low-rank factors beside them or as they are.
    Finetune { "finetune", FinetuneConfig },
    /// Numbers with their protocol.
    Evaluate { "evaluate", EvaluateConfig },
    /// Packed files.
    Export { "export", ExportConfig },
}

impl StageConfig {
    /// What the linears are after this stage, given what the model is before.
    ///
    /// # Errors
    /// When this stage cannot follow.
    pub fn leaves(&self, before: &Before<'_>) -> Result<Repr> {
        let stage = self.stage();
        stage.follows(before)?;
        stage.effect().leaves(before.repr)
    }

    /// Whether it changes the model.
    pub fn changes_model(&self) -> bool {
        !matches!(self.stage().effect(), Effect::Nothing)
    }

    /// The configuration without what changes no result, so that changing it goes on with a run.
    #[must_use]
    pub fn neutral(mut self) -> Self {
        self.stage_mut().neutralize();
        self
    }

    /// Runs the stage.
    ///
    /// # Errors
    /// Whatever goes wrong; what was saved before stays.
    pub fn run(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        head::round(ctx)?;
        self.stage().run(ctx)
    }

    /// Brings back the model a finished stage left.
    ///
    /// # Errors
    /// When its checkpoints are missing or damaged.
    pub fn restore(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        head::round(ctx)?;
        self.stage().restore(ctx)
    }

    /// Whether what it leaves is judged by [`StageConfig::judge`].
    pub fn is_judged(&self) -> bool {
        self.stage().judged().is_some()
    }

    /// The quality gate behind a training stage, once what it leaves is saved.
    ///
    /// # Errors
    /// A gate error when the model is worse than at the stage's start or than plain rounding, and the
    /// recipe does not allow that.
    pub fn judge(&self, ctx: &mut StageContext<'_>) -> Result<()> {
        match self.stage().judged() {
            Some(judged) => gate::after(self.name(), &judged, ctx),
            None => Ok(()),
        }
    }
}
