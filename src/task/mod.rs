//! Evaluation tasks: one protocol for the dense, the fake-quantized and the packed model.
//!
//! A task gives named numbers ([`Score`]) with the protocol that produced them. The kinds are the `tasks!`
//! list in `config.rs`, one file each.

mod config;
mod files;
mod gauge;
pub mod gsm8k;
pub mod ifeval;
mod kind;
mod perplexity;
pub mod recorded;

pub use config::{NAMES, TaskConfig, every_name, is_on_text, named};
pub use files::Files;
pub use gauge::{Gauge, GaugeText, Gauged};
pub use kind::{Bench, DATA, Material, Number, Prepared, Refused, Score, Source, Task};
pub use perplexity::{Perplexity, PplConfig, measure};
