//! Evaluation tasks: one protocol for the dense, the fake-quantized and the packed model.

mod gauge;
mod perplexity;

pub use gauge::{Gauge, GaugeText, Gauged};
pub use perplexity::{Perplexity, PplConfig, measure};
