//! fewbit trains language models into 4-, 3- and 2-bit weights.
//!
//! The map of the house, from the top down; `tests/layers.rs` holds the rule of who may use whom.
//!
//! | Module | What lives there |
//! |---|---|
//! | [`cli`] | the command line, one file per command |
//! | [`mod@bench`] | what this machine and its devices can do, measured |
//! | [`run`] | one execution of a plan in one folder: preflight, resume, `run.json` |
//! | [`serve`] | a model behind an endpoint that speaks OpenAI's language |
//! | [`recipe`] | the TOML surface, its errors, its resolution into a plan |
//! | [`stage`] | calibrate, reconstruct, distill, evaluate, export |
//! | [`export`] | packed formats, the folder writer, the parity gate |
//! | [`task`] | evaluation tasks and their protocols |
//! | [`method`] | quantization methods: one weight in, codes and a grid out |
//! | [`objective`] | training objectives that a recipe may name |
//! | [`train`] | the step loop, AdamW, schedules |
//! | [`model`] | the decoder, from a Hugging Face folder to logits |
//! | [`data`] | documents, tokens, windows and the order they are visited in |
//! | [`ops`] | tensor operations of our own behind front functions |
//! | [`quant`] | bits, groups, grids, observers, bit packing |
//! | [`store`] | safetensors, crash-safe files, where a name leads to |
//! | [`report`] | what the user sees: terminal, `metrics.jsonl`, TensorBoard |
//! | [`page`] | a run as one HTML page |
//! | [`error`], [`device`], [`stop`], [`exhausted`], `schema` | used by all |
//!
//! A recipe is run from Rust as `fewbit train` runs it:
//!
//! ```no_run
//! use fewbit::report::{Reporters, Silent};
//! use fewbit::run::{Options, train};
//! use fewbit::stop::StopFlag;
//!
//! # fn main() -> fewbit::error::Result<()> {
//! let options = Options {
//!     recipe: "upq_int2".to_owned(),
//!     set: vec!["model.path=models/Llama-3.2-1B".to_owned()],
//!     output: Some("runs/mine".into()),
//!     device: Some("auto".to_owned()),
//!     fresh: false,
//!     probe: false,
//!     reuse: None,
//!     price_per_hour: None,
//! };
//! let record = train(&options, Reporters::new(vec![Box::new(Silent)]), &StopFlag::default())?;
//! for export in &record.results.exports {
//!     println!("{}: {} bytes", export.path.display(), export.bytes);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! `examples/` has that, a method from outside, and a packed linear in a module of one's own.

pub mod bench;
pub mod cli;
pub mod data;
pub mod device;
pub mod error;
pub mod exhausted;
pub mod export;
pub mod method;
pub mod model;
pub mod objective;
pub mod ops;
pub mod page;
pub mod quant;
pub mod recipe;
pub mod report;
pub mod run;
mod schema;
pub mod serve;
pub mod stage;
pub mod stop;
pub mod store;
pub mod task;
pub mod train;
