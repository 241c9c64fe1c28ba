//! Text in, token windows out: documents, tokenizer, windows, and the order they are visited in.
//!
//! Nothing here knows a model or a device. Token ids are `u32`; a window is a slice of one stream.

mod answer;
pub mod documents;
pub mod examples;
mod growth;
pub mod order;
pub mod packing;
mod paths;
pub mod tokenizer;
pub mod windows;

pub use answer::Answer;
pub use documents::{read_documents, sha256_of};
pub use examples::{DataFormat, Example, read_completions, read_instructions};
pub use order::{Order, coin_flips, seed_of};
pub use packing::Marks;
pub use paths::Paths;
pub use tokenizer::Tokenizer;
pub use windows::{ScoredWindow, TokenStream};
