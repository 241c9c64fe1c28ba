//! fewbit trains language models into 4-, 3- and 2-bit weights.

pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod export;
pub mod method;
pub mod model;
pub mod objective;
pub mod ops;
pub mod quant;
pub mod recipe;
pub mod report;
pub mod run;
pub mod stage;
pub mod stop;
pub mod store;
pub mod task;
pub mod train;
