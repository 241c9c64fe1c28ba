//! Evaluation tasks: one protocol for the dense, the fake-quantized and the packed model.
//!
//! A task gives named numbers ([`Score`]) with the protocol that produced them. The kinds are the `tasks!`
//! list in `config.rs`, one file each.

mod config;
mod gauge;
mod kind;
mod perplexity;
pub mod recorded;

pub use config::{NAMES, TaskConfig};
pub use gauge::{Gauge, GaugeText, Gauged};
pub use kind::{Bench, Number, Refused, Score, Task};
pub use perplexity::{Perplexity, PplConfig, measure};
