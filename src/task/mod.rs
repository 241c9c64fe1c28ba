//! Evaluation tasks: one protocol for the dense, the fake-quantized and the packed model.
//!
//! A task gives named numbers ([`Score`]) with the protocol that produced them. The kinds are the `tasks!`
//! list in `config.rs`, one file each.

mod choice;
mod config;
mod conversation;
mod divergence;
mod files;
mod gauge;
pub mod gsm8k;
pub mod ifeval;
mod kind;
mod likelihood;
mod perplexity;
mod pieces;
mod python_random;
pub mod recorded;
mod written;

pub use choice::{Benchmark, ChoiceConfig};
pub use config::{NAMES, TaskConfig, every_name, named};
pub use divergence::KlConfig;
pub use files::{DATA, Files, Source};
pub use gauge::{Gauge, GaugeText, Gauged};
pub use gsm8k::Gsm8kConfig;
pub use ifeval::IfevalConfig;
pub use kind::{Bench, Material, Number, Prepared, Refused, Score, Task, Writes};
pub use perplexity::{Perplexity, PplConfig, Protocol, measure};
pub use pieces::Cached;
