//! Stages: the only place where model, method, data, objective and export meet.
//!
//! A stage states what it takes, what it leaves and what it needs ([`Stage`]), so that a plan
//! type-checks before a weight is read, and it saves what it has done as it goes, so that a run that
//! was stopped goes on from there. The kinds are the `stages!` list in `config.rs`.

mod activations;
mod balance;
mod batch;
mod calibrate;
mod config;
mod context;
mod corpus;
mod cost;
mod depot;
mod distill;
mod evaluate;
mod export;
mod finetune;
mod found;
mod gate;
mod head;
mod inputs;
mod keys;
mod kind;
mod log_point;
mod logits;
mod lora;
mod memory;
mod monitor;
mod motion;
mod observed;
mod on_policy;
mod places;
mod probe;
mod reconstruct;
mod results;
mod session;
mod solve_block;
mod stand_in;
mod start;
mod state;
mod states;
mod step;
mod streams;
mod student;
mod teacher;
mod teacher_cache;
mod training_state;
mod tune_scales;
mod validate;
mod visits;
mod watch;

pub use activations::StreamType;
pub use batch::{Batch, Feed};
pub use calibrate::{CalibrateConfig, InputStream};
pub use config::StageConfig;
pub use context::StageContext;
pub use corpus::{Corpus, Data};
pub use cost::{Cost, Lever, Scene, Speed, TRAINED_WEIGHT_BYTES, tape_bytes};
pub use distill::DistillConfig;
pub use evaluate::{Baseline, EvaluateConfig};
pub use export::{ExportConfig, PARITY_WINDOWS};
pub use finetune::{FinetuneConfig, FinetuneMethod, FullConfig, LoraConfig, QloraConfig};
pub use kind::{Before, Codes, Effect, Judged, Stage};
pub use lora::{Target, Targets};
pub use memory::Memory;
pub use probe::{Line, Probe, attach};
pub use reconstruct::{ReconstructConfig, Within};
pub use results::{ExportRecord, Measured, Quality, Results, Setback};
pub use stand_in::StandIns;
pub use start::StartFrom;
pub use state::{BASE, LatentFile, ModelState};
pub use states::{is_state, mark, remove_states};
pub use tune_scales::{AdapterConfig, TuneScalesConfig};
pub use validate::{Point, ValidateConfig};
