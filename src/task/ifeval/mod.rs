//! Scoring of IFEval ("Instruction-Following Evaluation for Large Language Models", Zhou et al. 2023,
//! arXiv:2311.07911): 25 kinds of instructions whose following a program can check.
//!
//! Every decision is that of the reference implementation as lm-evaluation-harness ships it (version 4.0
//! of its task, NLTK 3.10), except for languages, which it guesses at random.

mod check;
mod followed;
mod instruction;
mod json;
mod language;
mod pattern;
mod punkt;
mod python;
mod rows;
mod task;
mod words;

pub use followed::{Followed, check};
pub use instruction::{Count, Instruction, Word};
pub use task::IfevalConfig;
