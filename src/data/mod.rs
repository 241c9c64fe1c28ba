//! Text in, token windows out: documents, tokenizer, windows, and the order they are visited in.
//!
//! Nothing here knows a model or a device. Token ids are `u32`; a window is a slice of one stream.

mod answer;
pub mod chat;
pub mod documents;
pub mod examples;
mod growth;
mod mixing;
pub mod order;
pub mod packing;
#[cfg(feature = "parquet")]
mod parquet;
mod paths;
mod prompts;
mod reading;
mod rows;
pub mod table;
pub mod tokenizer;
pub mod windows;

pub use answer::Answer;
pub use chat::{Chat, ChatTemplate, TrainOn};
pub use documents::{read_documents, sha256_of};
pub use examples::{DataFormat, Example, read_completions, read_conversations, read_instructions};
pub use mixing::SourceShare;
pub use order::{Order, coin_flips, seed_of};
pub use packing::Marks;
pub use paths::Paths;
pub use prompts::{Asked, read_prompts};
pub(crate) use reading::is_default;
pub use reading::{Reader, Reading, TemplateChoice};
pub use table::{Columns, Row, read_rows};
pub use tokenizer::Tokenizer;
pub use windows::{ScoredWindow, TokenStream};
