//! GGUF: one file that llama.cpp and its kin run.
//!
//! What was trained is what is stored: [`fewbit_gguf::choose`] picks a block type that gives back every
//! weight exactly, or refuses in a sentence; nothing is rounded on the way.
//!
//! Files of other programs are read as well: [`folder_files`] makes the small files of a Hugging Face
//! folder out of their metadata, and [`fewbit_gguf::decode`] knows block types that are never written.
//!
//! The container and the blocks are the crate `fewbit-gguf`, which knows no model; here is what does.

mod check;
mod error;
pub mod folder;
mod generation;
mod keys;
pub mod llama;
mod merges;
pub mod model;
mod names;
mod own;
mod pieces;
mod pretokenizer;
mod rotation;
mod scaling;
mod sizes;
mod special;
pub mod tokenizer;
mod vocabulary;

pub use fewbit_gguf::{Reader, Value};
pub use folder::folder_files;
pub use model::{alone, is_gguf};
