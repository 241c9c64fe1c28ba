//! Evaluation tasks: one protocol for the dense, the fake-quantized and the packed model.

mod perplexity;

pub use perplexity::{Perplexity, PplConfig, measure};
