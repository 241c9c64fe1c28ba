//! GGUF, the files that llama.cpp and its kin run: reading, writing, and ggml's blocks of weights.
//!
//! * [`Header`] and [`Writer`] write the container, tensor by tensor; [`Reader`] reads it and checks every length
//!   against what is left of the file before anything of that length is made.
//! * [`choose`] picks the smallest block type that gives a weight on a uniform grid back exactly, [`encode`] writes
//!   it; nothing is rounded on the way. What does not fit is refused, and the [`Refusal`] names the obstacle.
//! * [`decode`] gives the weights of a block, of types that are never written too.
//!
//! No model is known here: names of tensors, keys and tokenizers are the caller's.
//!
//! ```
//! use std::io::Cursor;
//! use std::path::Path;
//!
//! use fewbit_gguf::{BlockType, Header, Reader, UniformWeight, Value, choose, encode};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Two rows of 32 codes of four bits, each with a scale and a zero point.
//! let codes: Vec<u8> = (0..64).map(|i| i % 16).collect();
//! let weight = UniformWeight {
//!     out: 2,
//!     inputs: 32,
//!     group_len: 32,
//!     bits: 4,
//!     codes: &codes,
//!     scale: &[0.5, 0.25],
//!     zero: &[8.0, 8.0],
//! };
//! let kind = choose(&weight)?;
//! assert_eq!(kind, BlockType::Q4_0);
//!
//! // A file says what it will hold before it holds it.
//! let mut header = Header::new();
//! header.set("general.architecture", "llama")?;
//! header.announce("blk.0.attn_q.weight", &[2, 32], kind)?;
//! let path = Path::new("small.gguf"); // for errors; the file stays in memory here
//! let mut writer = header.start(Vec::new(), path)?;
//! writer.write("blk.0.attn_q.weight", &encode(&weight, kind)?)?;
//! let file = writer.finish()?;
//!
//! let mut reader = Reader::new(Cursor::new(file), path)?;
//! assert_eq!(reader.get("general.architecture").and_then(Value::as_text), Some("llama"));
//! assert_eq!(reader.read_f32("blk.0.attn_q.weight")?[..3], [-4.0, -3.5, -3.0]);
//! # Ok(())
//! # }
//! ```

mod blocks;
mod choose;
mod decode;
mod error;
mod file;
mod reader;
mod refusal;
mod types;
mod value;
mod weight;

pub use blocks::{encode, encode_dense, fits};
pub use choose::{choose, choose_dense};
pub use decode::{Levels, decode, decode_levels};
pub use error::{Error, Result};
pub use file::{Header, Writer};
pub use reader::{Reader, TensorInfo};
pub use refusal::Refusal;
pub use types::BlockType;
pub use value::{Value, ValueKind};
pub use weight::UniformWeight;
