//! GGUF: one file that llama.cpp and its kin run.
//!
//! What was trained is what is stored: [`choose`] picks a block type that gives back every weight
//! exactly, or refuses in a sentence; nothing is rounded on the way.

pub mod blocks;
pub mod choose;
pub mod decode;
pub mod file;
pub mod llama;
pub(super) mod model;
mod pretokenizer;
pub mod reader;
mod special;
pub mod tokenizer;
pub mod types;
pub mod value;

pub use blocks::{Affine, Refusal};
pub use file::{Header, Writer};
pub use reader::Reader;
pub use types::BlockType;
pub use value::{Value, ValueKind};
