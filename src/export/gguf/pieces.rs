//! A vocabulary's pieces on their way into a file's metadata.

use std::collections::{BTreeMap, BTreeSet};

use fewbit_gguf::Value;
use serde_json::Value as Json;

use crate::error::{Error, Result};

/// Why a piece exists; the numbers in a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum PieceKind {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl PieceKind {
    /// The kind of a number in a file; 0 stands for pieces that nobody gave a kind.
    pub(super) fn from_id(id: u64) -> Option<Self> {
        Some(match id {
            0 | 1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => return None,
        })
    }
}

/// What goes into a file, and what a user should know about it.
#[derive(Clone, Debug)]
pub struct TokenizerMetadata {
    /// Keys with their values.
    pub entries: Vec<(String, Value)>,
    /// Sentences on where llama.cpp may tokenize differently; empty when it does not.
    pub notes: Vec<String>,
}

impl TokenizerMetadata {
    pub(super) fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.entries.push((format!("tokenizer.ggml.{key}"), value.into()));
    }
}

/// Pairs of pieces, best first.
pub(super) type Merges<'a> = Vec<(&'a str, &'a str)>;

/// The vocabulary by id.
pub(super) struct Pieces {
    texts: Vec<String>,
    kinds: Vec<PieceKind>,
}

impl Pieces {
    pub(super) fn read(tokenizer: &Json, size: usize) -> Result<Self> {
        let bad = |what: String| {
            Error::preflight(what).fix("the tokenizer.json that belongs to this model")
        };
        let place = |id: &Json, text: &str| {
            let id = id.as_u64().and_then(|id| usize::try_from(id).ok());
            id.filter(|id| *id < size).ok_or_else(|| {
                bad(format!("piece `{text}` is beyond the model's vocabulary of {size}"))
            })
        };
        let mut texts = vec![None; size];
        let mut kinds = vec![PieceKind::Normal; size];
        for (text, id) in tokenizer["model"]["vocab"].as_object().into_iter().flatten() {
            texts[place(id, text)?] = Some(text.clone());
        }
        for added in tokenizer["added_tokens"].as_array().into_iter().flatten() {
            let text = added["content"].as_str().unwrap_or_default();
            let id = place(&added["id"], text)?;
            let special = added["special"].as_bool().unwrap_or(false);
            kinds[id] = if special { PieceKind::Control } else { PieceKind::UserDefined };
            texts[id] = Some(text.to_owned());
        }
        let unknown = tokenizer["model"]["unk_token"].as_str();
        for (text, kind) in texts.iter().zip(&mut kinds) {
            match text.as_deref() {
                None => *kind = PieceKind::Unused,
                text if text == unknown => *kind = PieceKind::Unknown,
                Some(_) => {}
            }
        }
        let named = texts.into_iter().enumerate();
        let texts = named.map(|(id, text)| text.unwrap_or_else(|| format!("[PAD{id}]"))).collect();
        Ok(Self { texts, kinds })
    }

    /// `<0x0A>` and its like stand for bytes when the model falls back on them.
    pub(super) fn mark_bytes(&mut self, model: &Json) {
        if model["byte_fallback"].as_bool() != Some(true) {
            return;
        }
        for (text, kind) in self.texts.iter().zip(&mut self.kinds) {
            if *kind == PieceKind::Normal && is_byte(text) {
                *kind = PieceKind::Byte;
            }
        }
    }

    pub(super) fn put(&self, made: &mut TokenizerMetadata) {
        made.set("tokens", Value::texts(self.texts.iter().cloned()));
        made.set("token_type", Value::integers(self.kinds.iter().map(|kind| *kind as i32)));
    }

    pub(super) fn id(&self, text: &str) -> Option<u32> {
        self.texts.iter().position(|piece| piece == text).map(|id| id as u32)
    }

    /// A score per piece: minus the rank of its first merge. Pieces that no merge makes are single
    /// characters, bytes and special ones, whose scores are never looked at.
    pub(super) fn scores(&self, merges: &Merges<'_>) -> Value {
        let mut ranks = BTreeMap::new();
        for (rank, (left, right)) in merges.iter().enumerate() {
            ranks.entry([*left, *right].concat()).or_insert(rank);
        }
        let score = |text: &String| ranks.get(text).map_or(0.0, |rank| -(*rank as f32));
        Value::floats(self.texts.iter().map(score))
    }

    pub(super) fn spaced_notes(&self, merges: &Merges<'_>) -> Vec<String> {
        let mut notes = Vec::new();
        let pieces: BTreeSet<&str> = self.texts.iter().map(String::as_str).collect();
        let known: BTreeSet<(&str, &str)> = merges.iter().copied().collect();
        let splits = |text: &'_ str| {
            let cuts = text.char_indices().skip(1).map(|(cut, _)| text.split_at(cut));
            let apart = |pair: &(&str, &str)| {
                pieces.contains(pair.0) && pieces.contains(pair.1) && !known.contains(pair)
            };
            cuts.filter(apart).count()
        };
        let normal = self.texts.iter().zip(&self.kinds).filter(|(_, k)| **k == PieceKind::Normal);
        let more: usize = normal.map(|(text, _)| splits(text)).sum();
        if more > 0 {
            notes.push(format!(
                "llama.cpp may merge {more} pairs of pieces that are no merges of this tokenizer: \
                 some text may be cut differently there"
            ));
        }
        if !self.kinds.contains(&PieceKind::Byte) {
            notes.push(
                "the tokenizer has no byte pieces: llama.cpp fails on text with characters that \
                 are not in the vocabulary"
                    .to_owned(),
            );
        }
        notes
    }
}

fn is_byte(text: &str) -> bool {
    let digits = text.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|d| d.len() == 2 && u8::from_str_radix(d, 16).is_ok())
}
