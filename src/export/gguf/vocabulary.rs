//! A tokenizer out of a file's metadata, as a `tokenizer.json` that cuts text as llama.cpp does.
//!
//! The kind `gpt2` carries its merges. The kind `llama` has a score per piece instead, which
//! [`merges`](super::merges) makes merges of.

use std::collections::BTreeSet;

use serde_json::{Map, Value as Json, json};

use super::keys::{Keys, MODEL, TOKENS, missing};
use super::merges::{Merges, SCORES, merges, merges_of_scores};
use super::pieces::PieceKind;
use super::pretokenizer::{Way, way};
use super::special::{Special, templates};
use crate::error::{Error, Result};

const KINDS: &str = "tokenizer.ggml.token_type";
/// Stands for a space.
const SPACE: &str = "▁";

/// A tokenizer as a file describes it.
pub(super) struct Vocabulary {
    pieces: Vec<String>,
    kinds: Vec<PieceKind>,
    rules: Rules,
    special: Special,
    /// Whether `special.bos` and `special.eos` are put around a text.
    around: (bool, bool),
}

enum Rules {
    /// Bytes under stand-in letters, with merges.
    Bytes { way: &'static Way, merges: Merges },
    /// Characters, with merges made from scores.
    Spaced { merges: Merges, prefix: bool },
}

impl Vocabulary {
    /// `None` when the file has no tokenizer.
    ///
    /// # Errors
    /// When the tokenizer is of another kind, or damaged: names the key.
    pub(super) fn read(keys: Keys<'_>, special: &Special, vocab: usize) -> Result<Option<Self>> {
        let spaced = match keys.text(MODEL)? {
            None | Some("none" | "no_vocab") => return Ok(None),
            Some("gpt2") => false,
            Some("llama") => true,
            Some(other) => {
                return Err(Error::preflight(format!(
                    "the file's tokenizer is of kind `{}` ({MODEL}); fewbit reads byte-pair encoding: \
                     gpt2 (byte-level with merges) and llama (SentencePiece with scores)",
                    other.escape_debug()
                ))
                .fix("a model with one of these tokenizers"));
            }
        };
        let pieces = pieces(keys, vocab)?;
        let kinds = kinds(keys, pieces.len())?;
        let (rules, begins) = if spaced {
            let prefix = keys.truth("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
            let merges = merges_of_scores(&pieces, &kinds, &scores(keys, pieces.len())?)?;
            (Rules::Spaced { merges, prefix }, true)
        } else {
            // llama.cpp would fall back on a way that no model was trained with.
            let name = keys.text("tokenizer.ggml.pre")?;
            let way = way(name.ok_or_else(|| missing("tokenizer.ggml.pre"))?)?;
            (Rules::Bytes { way, merges: merges(keys, &pieces)? }, way.begins)
        };
        let around = |name: &str, id: Option<u32>, default: bool| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            match (keys.truth(&key)?, id) {
                (Some(true), None) => Err(Error::preflight(format!(
                    "`{key}` is true, but the file has no `tokenizer.ggml.{name}_token_id`"
                ))),
                (says, id) => Ok(says.unwrap_or(default) && id.is_some()),
            }
        };
        let around = (around("bos", special.bos, begins)?, around("eos", special.eos, false)?);
        Ok(Some(Self { pieces, kinds, rules, special: special.clone(), around }))
    }

    /// The `tokenizer.json`.
    pub(super) fn tokenizer(&self) -> Json {
        let ids = self.pieces.iter().enumerate();
        let vocab: Map<_, _> = ids.map(|(id, piece)| (piece.clone(), json!(id))).collect();
        let (normalizer, cut, decoder, unknown, merges) = match &self.rules {
            Rules::Bytes { way, merges } => {
                let decoder = json!({
                    "type": "ByteLevel",
                    "add_prefix_space": true,
                    "trim_offsets": true,
                    "use_regex": true,
                });
                (Json::Null, way.pre_tokenizer(), decoder, None, merges)
            }
            Rules::Spaced { merges, prefix } => {
                let unknown = self.special.unknown.and_then(|id| self.pieces.get(id as usize));
                (spaced_normalizer(*prefix), Json::Null, spaced_decoder(*prefix), unknown, merges)
            }
        };
        let whole_words = matches!(&self.rules, Rules::Bytes { way, .. } if way.whole_words);
        json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": self.added(),
            "normalizer": normalizer,
            "pre_tokenizer": cut,
            "post_processor": self.post_processor(),
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": unknown.is_some(),
                "byte_fallback": self.kinds.contains(&PieceKind::Byte),
                "ignore_merges": whole_words,
                "vocab": vocab,
                "merges": merges,
            },
        })
    }

    /// The `tokenizer_config.json`; `context` is the longest text in tokens.
    pub(super) fn settings(&self, keys: Keys<'_>, context: usize) -> Result<Json> {
        let mut settings = Map::new();
        settings.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
        settings.insert("model_max_length".to_owned(), json!(context));
        settings.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
        settings.insert("add_bos_token".to_owned(), json!(self.around.0));
        settings.insert("add_eos_token".to_owned(), json!(self.around.1));
        let Special { bos, eos, unknown, padding, .. } = self.special;
        for (key, id) in
            [("bos_token", bos), ("eos_token", eos), ("unk_token", unknown), ("pad_token", padding)]
        {
            if let Some(piece) = id.and_then(|id| self.pieces.get(id as usize)) {
                settings.insert(key.to_owned(), json!(piece));
            }
        }
        if let Some(templates) = templates(keys)? {
            settings.insert("chat_template".to_owned(), templates);
        }
        Ok(Json::Object(settings))
    }

    /// Pieces that are found in a text before anything else is done to it.
    fn added(&self) -> Vec<Json> {
        let all = self.pieces.iter().zip(&self.kinds).enumerate();
        all.filter_map(|(id, (piece, kind))| {
            let special = match kind {
                PieceKind::Control | PieceKind::Unknown => true,
                PieceKind::UserDefined => false,
                PieceKind::Normal | PieceKind::Unused | PieceKind::Byte => return None,
            };
            Some(json!({
                "id": id,
                "content": piece,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": special,
            }))
        })
        .collect()
    }

    fn post_processor(&self) -> Json {
        let piece = |wanted: bool, id: Option<u32>| {
            let id = id.filter(|_| wanted)?;
            Some((id, self.pieces.get(id as usize)?))
        };
        let (first, last) =
            (piece(self.around.0, self.special.bos), piece(self.around.1, self.special.eos));
        if first.is_none() && last.is_none() {
            return Json::Null;
        }
        let one = |name: &str, type_id: u32| {
            let step = |piece| json!({ "SpecialToken": { "id": piece, "type_id": type_id } });
            let mut steps: Vec<Json> = first.iter().map(|(_, piece)| step(piece)).collect();
            steps.push(json!({ "Sequence": { "id": name, "type_id": type_id } }));
            steps.extend(last.iter().map(|(_, piece)| step(piece)));
            steps
        };
        let tokens = first.iter().chain(&last).map(|(id, piece)| {
            ((*piece).clone(), json!({ "id": piece, "ids": [id], "tokens": [piece] }))
        });
        let pair = [one("A", 0), one("B", 1)].concat();
        json!({
            "type": "TemplateProcessing",
            "single": one("A", 0),
            "pair": pair,
            "special_tokens": tokens.collect::<Map<_, _>>(),
        })
    }
}

fn spaced_normalizer(prefix: bool) -> Json {
    let replace = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    if !prefix {
        return replace;
    }
    let prepend = json!({ "type": "Prepend", "prepend": SPACE });
    json!({ "type": "Sequence", "normalizers": [prepend, replace] })
}

fn spaced_decoder(prefix: bool) -> Json {
    let mut steps = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        steps.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    json!({ "type": "Sequence", "decoders": steps })
}

/// The texts of all pieces, each of them once.
fn pieces(keys: Keys<'_>, vocab: usize) -> Result<Vec<String>> {
    let texts = keys.texts(TOKENS)?.ok_or_else(|| missing(TOKENS))?;
    if texts.len() > vocab {
        return Err(Error::preflight(format!(
            "`{TOKENS}` has {} pieces, but the model's vocabulary is {vocab}",
            texts.len()
        )));
    }
    // Ids count, texts of empty pieces do not: they get the name that llama.cpp gives them.
    let named = texts.into_iter().enumerate();
    let pieces: Vec<String> = named
        .map(|(id, text)| if text.is_empty() { format!("[EMPTY_{id}]") } else { text.to_owned() })
        .collect();
    let mut taken = BTreeSet::new();
    match pieces.iter().enumerate().find(|(_, piece)| !taken.insert(*piece)) {
        None => Ok(pieces),
        Some((id, piece)) => Err(Error::preflight(format!(
            "`{TOKENS}` has the piece `{}` twice, the second time at {id}",
            piece.escape_debug()
        ))),
    }
}

fn kinds(keys: Keys<'_>, count: usize) -> Result<Vec<PieceKind>> {
    let Some(ids) = keys.whole(KINDS)? else { return Ok(vec![PieceKind::Normal; count]) };
    same_length(KINDS, ids.len(), count)?;
    let kind = |id: u64| {
        PieceKind::from_id(id)
            .ok_or_else(|| Error::preflight(format!("`{KINDS}` has a kind {id}; 0 to 6 are known")))
    };
    ids.into_iter().map(kind).collect()
}

fn scores(keys: Keys<'_>, count: usize) -> Result<Vec<f32>> {
    let scores = keys.floats(SCORES)?.ok_or_else(|| missing(SCORES))?;
    same_length(SCORES, scores.len(), count)?;
    Ok(scores)
}

fn same_length(key: &str, found: usize, count: usize) -> Result<()> {
    if found == count {
        return Ok(());
    }
    Err(Error::preflight(format!("`{key}` has {found} values for {count} pieces")))
}

#[cfg(test)]
mod tests {
    use fewbit_gguf::Value;
    use tokenizers::Tokenizer;

    use super::*;

    type Entry = (&'static str, Value);

    fn entries(own: Vec<Entry>) -> Vec<(String, Value)> {
        own.into_iter().map(|(key, value)| (format!("tokenizer.{key}"), value)).collect()
    }

    fn texts(texts: &[&str]) -> Value {
        Value::texts(texts.iter().map(|text| (*text).to_owned()))
    }

    fn spaced() -> Vec<Entry> {
        let pieces = [
            "<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "▁ab",
            "aa", "<t>",
        ];
        let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -3.0, -2.0, -1.0, -4.0, 0.0];
        vec![
            ("ggml.model", "llama".into()),
            ("ggml.tokens", texts(&pieces)),
            ("ggml.token_type", Value::integers([2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 4])),
            ("ggml.scores", Value::floats(scores)),
        ]
    }

    fn bytes() -> Vec<Entry> {
        let pieces = ["a", "b", "Ġ", "1", "ab", "Ġab", "abab", "<|end|>", "<t>", "Ċ"];
        vec![
            ("ggml.model", "gpt2".into()),
            ("ggml.pre", "llama-bpe".into()),
            ("ggml.tokens", texts(&pieces)),
            ("ggml.token_type", Value::integers([1, 1, 1, 1, 1, 1, 1, 3, 4, 1])),
            ("ggml.merges", texts(&["a b", "Ġ ab", "a b"])),
            ("ggml.bos_token_id", Value::U32(7)),
        ]
    }

    fn read(own: Vec<Entry>) -> Result<(Json, Json)> {
        let entries = entries(own);
        let keys = Keys(&entries);
        let special = Special::read(keys, 20)?;
        let vocabulary = Vocabulary::read(keys, &special, 20)?.unwrap();
        Ok((vocabulary.tokenizer(), vocabulary.settings(keys, 64)?))
    }

    fn loaded(json: &Json) -> Tokenizer {
        Tokenizer::from_bytes(json.to_string()).unwrap()
    }

    #[test]
    fn scores_become_merges() {
        let (json, settings) = read(spaced()).unwrap();
        let merges = json!([["▁a", "b"], ["▁", "ab"], ["▁", "a"], ["a", "b"], ["a", "a"]]);
        assert_eq!(json["model"]["merges"], merges);
        let tokenizer = loaded(&json);
        let ids = |text: &str, special| tokenizer.encode(text, special).unwrap().get_ids().to_vec();
        assert_eq!(ids("ab aab", false), [11, 10, 9]);
        assert_eq!(ids("ab\né<t>a</s>", true), [1, 11, 3, 4, 5, 13, 10, 2]);
        assert_eq!(ids("z", false), [6, 0]);
        assert_eq!(ids("", false), [0_u32; 0]);
        assert_eq!(tokenizer.decode(&[1, 11, 10, 4, 5], true).unwrap(), "ab aé");
        assert_eq!(
            (&settings["bos_token"], &settings["unk_token"]),
            (&json!("<s>"), &json!("<unk>"))
        );
        assert_eq!(settings["add_bos_token"], json!(true));
        let mut bare = spaced();
        bare.push(("ggml.add_space_prefix", false.into()));
        bare.push(("ggml.add_bos_token", false.into()));
        bare.push(("ggml.add_eos_token", true.into()));
        let tokenizer = loaded(&read(bare).unwrap().0);
        assert_eq!(tokenizer.encode("ab a", true).unwrap().get_ids(), [9, 10, 2]);
        assert_eq!(tokenizer.decode(&[10, 9], true).unwrap(), " aab");
    }

    #[test]
    fn merges_stay() {
        let (json, settings) = read(bytes()).unwrap();
        assert_eq!(json["model"]["merges"], json!([["a", "b"], ["Ġ", "ab"]]));
        let tokenizer = loaded(&json);
        let ids = |text: &str, special| tokenizer.encode(text, special).unwrap().get_ids().to_vec();
        // `abab` has no merge, but is a whole word.
        assert_eq!(ids("abab ab1<t>", true), [7, 6, 5, 3, 8]);
        assert_eq!(ids("a<|end|>\n", false), [0, 7, 9]);
        assert_eq!(tokenizer.decode(&[7, 6, 5, 9], true).unwrap(), "abab ab\n");
        assert_eq!(settings["bos_token"], json!("<|end|>"));
        assert_eq!(settings.get("eos_token"), None);
        let mut plain = bytes();
        plain[1].1 = "qwen2".into();
        let (json, settings) = read(plain).unwrap();
        assert_eq!(settings["add_bos_token"], json!(false));
        let ids = loaded(&json).encode("abab", true).unwrap().get_ids().to_vec();
        assert_eq!(ids, [4, 4]);
    }

    #[test]
    fn equal_scores_have_an_order() {
        let mut tied = spaced();
        tied[3].1 = Value::floats([0.0; 13].into_iter().chain([1.0]));
        let error = read(tied.clone()).unwrap_err().to_string();
        assert!(error.contains("`tokenizer.ggml.scores` gives every piece the same"), "{error}");
        let mut scores = [0.0; 14];
        scores[12] = 1.0;
        tied[3].1 = Value::floats(scores);
        let (json, _) = read(tied).unwrap();
        let merges = json!([["a", "a"], ["a", "b"], ["▁", "a"], ["▁a", "b"], ["▁", "ab"]]);
        assert_eq!(json["model"]["merges"], merges);
    }

    #[test]
    fn templates_by_name() {
        let mut one = bytes();
        one.push(("chat_template", "x".into()));
        assert_eq!(read(one.clone()).unwrap().1["chat_template"], json!("x"));
        one.push(("chat_templates", texts(&["rag"])));
        let error = read(one.clone()).unwrap_err().to_string();
        assert!(error.contains("`tokenizer.chat_template.rag`"), "{error}");
        one.push(("chat_template.rag", "y".into()));
        let both = json!([
            { "name": "default", "template": "x" },
            { "name": "rag", "template": "y" },
        ]);
        assert_eq!(read(one).unwrap().1["chat_template"], both);
    }

    #[test]
    fn empty_pieces_get_names() {
        let mut own = spaced();
        own[1].1 =
            texts(&["<unk>", "<s>", "", "", "x", "y", "a", "b", "c", "d", "e", "f", "g", "h"]);
        let (json, _) = read(own).unwrap();
        assert_eq!(json["model"]["vocab"]["[EMPTY_3]"], json!(3));
    }

    #[test]
    fn damaged_tokenizers_are_refused() {
        let with = |mut own: Vec<Entry>, key: &'static str, value: Option<Value>| {
            own.retain(|(name, _)| *name != key);
            own.extend(value.map(|value| (key, value)));
            read(own).unwrap_err().to_string()
        };
        for (error, part) in [
            (with(spaced(), "ggml.model", Some("t5".into())), "`t5` (tokenizer.ggml.model)"),
            (with(spaced(), "ggml.tokens", None), "`tokenizer.ggml.tokens`"),
            (with(spaced(), "ggml.tokens", Some(texts(&["a"; 14]))), "`a` twice"),
            (with(spaced(), "ggml.tokens", Some(Value::floats([1.0]))), "a list of texts"),
            (with(spaced(), "ggml.tokens", Some(texts(&["a"; 21]))), "vocabulary is 20"),
            (with(spaced(), "ggml.scores", None), "`tokenizer.ggml.scores`"),
            (with(spaced(), "ggml.scores", Some(Value::floats([0.0]))), "1 values for 14"),
            (with(spaced(), "ggml.scores", Some(Value::floats([f32::NAN]))), "finite"),
            (with(spaced(), "ggml.token_type", Some(Value::integers([9; 14]))), "a kind 9"),
            (with(spaced(), "ggml.eos_token_id", Some(Value::U32(14))), "beyond the vocabulary"),
            (with(bytes(), "ggml.pre", None), "`tokenizer.ggml.pre`"),
            (with(bytes(), "ggml.pre", Some("bloom".into())), "`bloom` (tokenizer.ggml.pre)"),
            (with(bytes(), "ggml.merges", None), "`tokenizer.ggml.merges`"),
            (with(bytes(), "ggml.merges", Some(texts(&["ab"]))), "0, `ab`, is no pair"),
            (with(bytes(), "ggml.merges", Some(texts(&[" "]))), "is no pair"),
            (with(bytes(), "ggml.merges", Some(texts(&["b a"]))), "lacks"),
            (with(bytes(), "ggml.add_eos_token", Some(true.into())), "eos_token_id"),
            (with(bytes(), "ggml.add_bos_token", Some(1_u32.into())), "a truth value"),
            (
                with(spaced(), "ggml.tokens", Some(texts(&[&"a".repeat(2000)]))),
                "14 values for 1 pieces",
            ),
        ] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let mut long = spaced();
        long[1].1 = texts(&[&"a".repeat(2000)]);
        long[2].1 = Value::integers([1]);
        long[3].1 = Value::floats([0.0]);
        assert!(read(long).unwrap_err().to_string().contains("2000 bytes"));
    }
}
