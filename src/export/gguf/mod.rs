//! GGUF: one file that llama.cpp and its kin run.
//!
//! What was trained is what is stored: [`choose`] picks a block type that gives back every weight
//! exactly, or refuses in a sentence; nothing is rounded on the way.
//!
//! Files of other programs are read as well: [`folder_files`] makes the small files of a Hugging Face
//! folder out of their metadata, and [`decode`] knows block types that are never written.

pub mod blocks;
pub mod choose;
pub mod decode;
pub mod file;
pub mod folder;
mod keys;
pub mod llama;
pub mod model;
mod names;
mod own;
mod pieces;
mod pretokenizer;
pub mod reader;
mod rotation;
mod scaling;
mod special;
pub mod tokenizer;
pub mod types;
pub mod value;
mod vocabulary;

pub use file::Header;
pub use folder::folder_files;
pub use model::{alone, is_gguf};
pub use reader::Reader;
pub use types::BlockType;
pub use value::Value;
