//! A Hugging Face folder's tokenizer: text to token ids and back, without special tokens of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::chat::special_tokens;
use super::growth::excess;
use crate::error::{Error, Result};

/// Documents handed to the thread pool at once; bounds the memory of their encodings.
const BATCH: usize = 1024;
/// Letters of the crate's messages that are shown.
const LONGEST_CAUSE: usize = 200;
/// What to do about a `tokenizer.json` that cannot be used.
const ITS_OWN: &str = "the tokenizer.json that belongs to this model, downloaded again";
/// What to do about a `tokenizer_config.json` that is none.
const SETTINGS: &str = "the tokenizer_config.json that belongs to this model";
/// Texts that a continuation is tokenized behind: the first whose tokens stay as they are.
const LEADS: [&str; 3] = ["\n", ":", "."];

/// The tokenizer of a model folder.
///
/// Encoding never adds BOS or EOS and never truncates or pads: which special tokens a stream
/// carries is the caller's decision.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    folder: PathBuf,
    bos: Option<String>,
    eos: Option<String>,
    special: BTreeMap<String, String>,
}

impl Tokenizer {
    /// Loads `tokenizer.json` and, where there is one, `tokenizer_config.json` from the folder `dir`.
    ///
    /// # Errors
    /// If `tokenizer.json` is missing, or either file cannot be read or parsed.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.is_file() {
            return Err(Error::preflight("the model folder has no tokenizer.json").at(dir.display()).fix(
                "copy tokenizer.json into it; a folder with only tokenizer.model or vocab.json has to \
                 be converted with the transformers library first",
            ));
        }
        let bytes = std::fs::read(&path).map_err(|source| Error::io("read", &path, &source))?;
        let config = read_config(&dir.join("tokenizer_config.json"))?;
        Self::new(&bytes, &config, dir).map_err(|error| error.at(path.display()))
    }

    /// From the texts of `tokenizer.json` and `tokenizer_config.json`, which came from `place`.
    ///
    /// # Errors
    /// If either cannot be parsed.
    pub fn from_texts(json: &str, config: Option<&str>, place: &Path) -> Result<Self> {
        let config = config.map_or(Ok(Value::Null), serde_json::from_str).map_err(|error| {
            let what = format!("the tokenizer's settings are not valid JSON: {error}");
            Error::damaged(what, SETTINGS).at(place.display())
        })?;
        Self::new(json.as_bytes(), &config, place).map_err(|error| error.at(place.display()))
    }

    fn new(json: &[u8], config: &Value, folder: &Path) -> Result<Self> {
        if let Some(what) = excess(json) {
            return Err(Error::damaged(format!("the tokenizer is no real one: {what}"), ITS_OWN));
        }
        let mut inner = guarded("does not load", || tokenizers::Tokenizer::from_bytes(json))?;
        // A saved truncation would silently cut every document; saved padding would lengthen it.
        guarded("does not load", || inner.with_truncation(None).map(drop))?;
        inner.with_padding(None);
        let (bos, eos) = (special(config, "bos_token"), special(config, "eos_token"));
        let special = special_tokens(config, &Value::Null);
        Ok(Self { inner, folder: folder.to_owned(), bos, eos, special })
    }

    /// The token ids of `text`, no special tokens added.
    ///
    /// # Errors
    /// If the tokenizer's model cannot represent the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.guarded("cannot encode", || self.inner.encode_fast(text, false))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The token ids of each text, in order: [`encode`](Self::encode) on several threads.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_all(&self, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        let mut all = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH) {
            let batch: Vec<&str> = batch.iter().map(String::as_str).collect();
            let encodings =
                self.guarded("cannot encode", || self.inner.encode_batch_fast(batch, false))?;
            all.extend(encodings.iter().map(|encoding| encoding.get_ids().to_vec()));
        }
        Ok(all)
    }

    /// The token ids of each text as one that begins here, in order: opened (and closed) by the special
    /// tokens that the tokenizer itself puts there, unless `opened` says whether. A text that begins with the
    /// BOS token's own text gets none.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_opened(&self, texts: &[String], opened: Option<bool>) -> Result<Vec<Vec<u32>>> {
        let bos = self.bos.as_deref().or(self.eos.as_deref());
        let own = |text: &String| bos.is_some_and(|bos| text.starts_with(bos));
        let mut all = Vec::with_capacity(texts.len());
        for batch in texts.chunks(BATCH) {
            let texts: Vec<&str> = batch.iter().map(String::as_str).collect();
            let special = opened.unwrap_or(true);
            let encodings =
                self.guarded("cannot encode", || self.inner.encode_batch_fast(texts, special))?;
            for (text, encoding) in batch.iter().zip(encodings) {
                let own = if own(text) { Some(self.encode(text)?) } else { None };
                all.push(own.unwrap_or_else(|| encoding.get_ids().to_vec()));
            }
        }
        Ok(all)
    }

    /// Whether a text gets special tokens of the tokenizer's own.
    pub fn opens(&self) -> bool {
        self.inner.encode_fast("", true).is_ok_and(|encoding| !encoding.get_ids().is_empty())
    }

    /// The token ids of each text as it goes on behind another text, in order.
    ///
    /// Some tokenizers put a space before whatever they are given, which would come to stand in the
    /// middle of a text. So each text is tokenized behind a short lead, whose tokens are then taken
    /// off. Where the text's beginning melts into every lead, it is tokenized alone.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_continuations(&self, texts: &[String]) -> Result<Vec<Vec<u32>>> {
        let mut all = vec![Vec::new(); texts.len()];
        let mut open: Vec<usize> = (0..texts.len()).collect();
        for lead in LEADS {
            let head = self.encode(lead)?;
            let led: Vec<_> = open.iter().map(|index| format!("{lead}{}", texts[*index])).collect();
            let encoded = self.encode_all(&led)?;
            let mut melted = Vec::new();
            for (index, ids) in open.into_iter().zip(encoded) {
                match ids.strip_prefix(&head[..]) {
                    Some(rest) => all[index] = rest.to_vec(),
                    None => melted.push(index),
                }
            }
            open = melted;
        }
        for index in open {
            all[index] = self.encode(&texts[index])?;
        }
        Ok(all)
    }

    /// The text of `tokens`; `skip_special` leaves out BOS, EOS and their like.
    ///
    /// Ids the tokenizer does not know, such as padded vocabulary rows, give no text.
    ///
    /// # Errors
    /// If the tokenizer's decoder fails.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        self.guarded("cannot decode", || self.inner.decode(tokens, skip_special))
    }

    /// The special tokens that `tokenizer_config.json` names, as chat templates know them: `bos_token` and its
    /// like.
    pub fn special_texts(&self) -> &BTreeMap<String, String> {
        &self.special
    }

    /// The texts that are one token wherever they stand, such as `<|im_end|>`.
    pub fn added_texts(&self) -> Vec<String> {
        let added: BTreeMap<u32, _> = self.inner.get_added_tokens_decoder().into_iter().collect();
        added.into_values().map(|token| token.content).filter(|text| !text.is_empty()).collect()
    }

    /// The ids of special tokens: those that mark a text and are none of it.
    pub fn special_ids(&self) -> BTreeSet<u32> {
        let added = self.inner.get_added_tokens_decoder().into_iter();
        added.filter(|(_, token)| token.special).map(|(id, _)| id).collect()
    }

    /// Number of tokens, added ones included. A model's vocabulary may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Itself, for a model whose embedding has `rows`.
    ///
    /// # Errors
    /// When it has more tokens than that.
    pub fn fitting(self, rows: usize) -> Result<Self> {
        let tokens = self.vocab_size();
        if tokens <= rows {
            return Ok(self);
        }
        Err(Error::preflight(format!(
            "the tokenizer has {tokens} tokens, the model's embedding {rows}"
        ))
        .fix("the tokenizer.json that belongs to this model"))
    }

    /// The id of `tokenizer_config.json`'s `bos_token`; `None` where it names none.
    ///
    /// # Errors
    /// If the named token is not in the vocabulary.
    pub fn bos_id(&self) -> Result<Option<u32>> {
        self.special_id("bos_token", self.bos.as_deref())
    }

    /// The id of `tokenizer_config.json`'s `eos_token`; `None` where it names none.
    ///
    /// # Errors
    /// If the named token is not in the vocabulary.
    pub fn eos_id(&self) -> Result<Option<u32>> {
        self.special_id("eos_token", self.eos.as_deref())
    }

    fn special_id(&self, key: &str, token: Option<&str>) -> Result<Option<u32>> {
        let Some(token) = token else { return Ok(None) };
        match self.inner.token_to_id(token) {
            Some(id) => Ok(Some(id)),
            None => Err(Error::preflight(format!("{key} `{token}` is not in the vocabulary"))
                .at(self.folder.join("tokenizer_config.json").display())
                .fix("use the tokenizer.json and tokenizer_config.json of the same model")),
        }
    }

    fn guarded<T>(
        &self,
        what: &str,
        work: impl FnOnce() -> Result<T, tokenizers::Error>,
    ) -> Result<T> {
        guarded(what, work).map_err(|error| error.at(self.folder.join("tokenizer.json").display()))
    }
}

/// What the tokenizers crate does, its errors as ours. It panics over some damaged files, when they are
/// loaded or not before they are used.
fn guarded<T>(what: &str, work: impl FnOnce() -> Result<T, tokenizers::Error>) -> Result<T> {
    match std::panic::catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| {
            // Some of them quote the file, line feeds included.
            let error: String = error.to_string().chars().take(LONGEST_CAUSE).collect();
            let error = error.split_whitespace().collect::<Vec<_>>().join(" ");
            Error::damaged(format!("the tokenizer {what}: {error}"), ITS_OWN)
        }),
        Err(_) => Err(Error::damaged("the tokenizer.json is damaged", ITS_OWN)),
    }
}

/// The parsed file, or null where there is none.
fn read_config(path: &Path) -> Result<Value> {
    let text = match std::fs::read_to_string(path) {
        Ok(text) => text,
        Err(source) if source.kind() == std::io::ErrorKind::NotFound => return Ok(Value::Null),
        Err(source) => return Err(Error::io("read", path, &source)),
    };
    serde_json::from_str(&text).map_err(|error| {
        Error::damaged(format!("the file is not valid JSON: {error}"), SETTINGS).at(path.display())
    })
}

/// A special token, written as a string or as an object with `content`.
fn special(config: &Value, key: &str) -> Option<String> {
    let token = config.get(key)?;
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Words split at white space: `<s>` 0, `</s>` 1, `?` 2 (unknown), `a` 3, `b` 4, `c` 5.
    /// The saved truncation to one token must have no effect.
    pub(crate) fn words(config: Option<&str>) -> (tempfile::TempDir, Result<Tokenizer>) {
        let json = r#"{"version": "1.0",
            "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
            "padding": null, "normalizer": null, "decoder": null,
            "added_tokens": [
                {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
                 "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
            "model": {"type": "WordLevel", "unk_token": "?",
                "vocab": {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4, "c": 5}}}"#;
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        if let Some(config) = config {
            std::fs::write(folder.path().join("tokenizer_config.json"), config).unwrap();
        }
        let tokenizer = Tokenizer::load(folder.path());
        (folder, tokenizer)
    }

    #[test]
    fn encodes_whole_texts_without_special_tokens() {
        let tokenizer = words(None).1.unwrap();
        assert_eq!(tokenizer.encode("a b zzz c").unwrap(), [3, 4, 2, 5]);
        assert_eq!(tokenizer.encode("").unwrap(), [0_u32; 0]);
        assert_eq!(tokenizer.vocab_size(), 6);
        let texts: Vec<_> =
            (0..BATCH + 3).map(|i| if i % 2 == 0 { "a b" } else { "c" }.to_owned()).collect();
        let all = tokenizer.encode_all(&texts).unwrap();
        assert_eq!(all.len(), texts.len());
        assert_eq!(all[BATCH], [3, 4]);
        assert_eq!(all[BATCH + 1], [5]);
    }

    #[test]
    fn a_continuation_gets_no_space_before_it() {
        for model in ["tinystories-656k", "stories260k"] {
            let folder = format!("{}/datasets/{model}", env!("CARGO_MANIFEST_DIR"));
            let tokenizer = Tokenizer::load(Path::new(&folder)).unwrap();
            let prompt = "name: The Mill\nsay:";
            let texts =
                [" The Mill is a pub.", "The", "\n\nThe end", ": so", "", "  two", "5 of us"];
            let texts = texts.map(str::to_owned);
            let all = tokenizer.encode_continuations(&texts).unwrap();
            for (text, ids) in texts.iter().zip(all) {
                let joined = [tokenizer.encode(prompt).unwrap(), ids].concat();
                let found = tokenizer.decode(&joined, false).unwrap();
                assert_eq!(found, format!("{prompt}{text}"), "{model}");
            }
        }
        let tokenizer = words(None).1.unwrap();
        let texts = ["a b".to_owned(), String::new(), "c".to_owned()];
        assert_eq!(tokenizer.encode_continuations(&texts).unwrap(), [vec![3, 4], vec![], vec![5]]);
    }

    #[test]
    fn decodes_with_and_without_special_tokens() {
        let tokenizer = words(None).1.unwrap();
        assert_eq!(tokenizer.decode(&[0, 3, 4], true).unwrap(), "a b");
        assert_eq!(tokenizer.decode(&[0, 3, 4], false).unwrap(), "<s> a b");
        assert_eq!(tokenizer.decode(&[3, 4_000_000], false).unwrap(), "a");
    }

    #[test]
    fn special_tokens_come_from_the_config_file() {
        let tokenizer = words(None).1.unwrap();
        assert_eq!((tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap()), (None, None));
        let config = r#"{"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}}"#;
        let tokenizer = words(Some(config)).1.unwrap();
        assert_eq!((tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap()), (Some(0), Some(1)));
        let tokenizer = words(Some(r#"{"bos_token": null, "eos_token": "<end>"}"#)).1.unwrap();
        assert_eq!(tokenizer.bos_id().unwrap(), None);
        let error = tokenizer.eos_id().unwrap_err();
        assert_eq!(error.what(), "eos_token `<end>` is not in the vocabulary");
    }

    /// The crate behind it panics over these, over the first two as it loads them.
    #[test]
    fn what_the_crate_panics_over_is_a_damaged_file() {
        let whole = words(None).0;
        let text = std::fs::read_to_string(whole.path().join("tokenizer.json")).unwrap();
        let wordpiece = r#"{"type": "WordPiece", "unk_token": "?", "max_input_chars_per_word": 100,
            "continuing_subword_prefix": "", "vocab": {"?": 0, "a": 1}}"#;
        let model = text.find(r#"{"type": "WordLevel""#).unwrap();
        for damaged in [
            text.replace(r#""decoder": null"#, r#""decoder": {"type": 7}"#),
            text.replace(r#""normalizer": null"#, r#""normalizer": {"type": "WordPiece"}"#),
            text.replace(r#""decoder": null"#, r#""decoder": {"type": "Strip"}"#),
            format!("{}{wordpiece}}}", &text[..model]),
        ] {
            let loaded = Tokenizer::from_texts(&damaged, None, Path::new("t"));
            let used = loaded.and_then(|t| t.decode(&t.encode("ab a \u{e9}")?, false));
            if let Err(error) = used {
                assert_eq!(error.kind().exit_code(), 3);
                assert!(error.to_string().contains("\n  try  the tokenizer.json"), "{error}");
            }
        }
    }

    #[test]
    fn missing_and_broken_files_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = Tokenizer::load(folder.path()).unwrap_err();
        assert_eq!(error.what(), "the model folder has no tokenizer.json");
        assert_eq!(error.kind().exit_code(), 3);
        std::fs::write(folder.path().join("tokenizer.json"), "{").unwrap();
        let error = Tokenizer::load(folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("the tokenizer does not load: "), "{error}");
        let error = words(Some("{")).1.unwrap_err().to_string();
        assert!(error.contains("tokenizer_config.json"), "{error}");
    }
}
