//! The tokenizer's special pieces and chat templates, into a file and out of one.

use fewbit_gguf::Value;
use serde_json::{Value as Json, json};

use super::keys::{Keys, MODEL, TOKENS, missing};
use super::pieces::{Pieces, TokenizerMetadata};
use crate::error::{Error, Result};
use crate::model::ModelConfig;

/// Ids of the special pieces, and which of them are put around a text.
pub(super) fn put_special(
    made: &mut TokenizerMetadata,
    tokenizer: &Json,
    settings: &Json,
    config: &ModelConfig,
    pieces: &Pieces,
) {
    let around = Around::of(tokenizer);
    let named = |key: &str| {
        let token = &settings[key];
        pieces.id(token.as_str().or_else(|| token["content"].as_str())?)
    };
    let bos = around.as_ref().and_then(|around| around.first).or_else(|| named("bos_token"));
    let bos = bos.or(config.bos);
    let eos = named("eos_token").or_else(|| config.eos.first().copied());
    let unknown = tokenizer["model"]["unk_token"].as_str().and_then(|text| pieces.id(text));
    let ids = [
        ("bos_token_id", bos),
        ("eos_token_id", eos),
        ("unknown_token_id", unknown.or_else(|| named("unk_token"))),
        ("padding_token_id", named("pad_token")),
    ];
    for (key, id) in ids {
        if let Some(id) = id {
            made.set(key, id);
        }
    }
    // The template is what tokenizer.json does; the settings only say what Python would do.
    let says = |key: &str| settings[key].as_bool().unwrap_or(false);
    let (first, last) = match &around {
        Some(around) => (around.first.is_some(), around.last.is_some()),
        None => (says("add_bos_token"), says("add_eos_token")),
    };
    if let Some(Around { last: Some(last), .. }) = around
        && Some(last) != eos
    {
        made.notes.push(format!(
            "the tokenizer ends a text with piece {last}, which is not its end-of-text piece; \
             llama.cpp adds no other"
        ));
    }
    made.set("add_bos_token", first && bos.is_some());
    made.set("add_eos_token", last && eos.is_some());
}

/// What the post-processor's template puts before and after one text.
struct Around {
    first: Option<u32>,
    last: Option<u32>,
}

impl Around {
    /// `None` when there is no template.
    fn of(tokenizer: &Json) -> Option<Self> {
        let top = &tokenizer["post_processor"];
        let single = std::slice::from_ref(top);
        let mut parts = top["processors"].as_array().map_or(single, Vec::as_slice).iter();
        let template = parts.find(|part| part["type"] == "TemplateProcessing")?;
        let id = |step: Option<&Json>| {
            let name = step?["SpecialToken"]["id"].as_str()?;
            let ids = &template["special_tokens"][name]["ids"];
            ids[0].as_u64().and_then(|id| u32::try_from(id).ok())
        };
        let steps = template["single"].as_array()?;
        Some(Self { first: id(steps.first()), last: id(steps.last()) })
    }
}

/// Chat templates: one, or several with names of which `default` is the main one.
pub(super) fn put_templates(made: &mut TokenizerMetadata, settings: &Json) {
    let mut put = |name: &str, text: &str| {
        let suffix = if name == "default" { String::new() } else { format!(".{name}") };
        made.entries.push((format!("tokenizer.chat_template{suffix}"), text.into()));
    };
    match &settings["chat_template"] {
        Json::String(text) => put("default", text),
        Json::Array(several) => {
            let mut others = Vec::new();
            for one in several {
                let (Some(name), Some(text)) = (one["name"].as_str(), one["template"].as_str())
                else {
                    continue;
                };
                put(name, text);
                if name != "default" {
                    others.push(name.to_owned());
                }
            }
            if !others.is_empty() {
                let key = "tokenizer.chat_templates".to_owned();
                made.entries.push((key, Value::texts(others)));
            }
        }
        _ => {}
    }
}

/// Ids of special pieces.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Special {
    /// Begins a text.
    pub(super) bos: Option<u32>,
    /// Ends a text.
    pub(super) eos: Option<u32>,
    /// Ends a turn or a message, where that is another piece.
    pub(super) other_ends: Vec<u32>,
    pub(super) unknown: Option<u32>,
    pub(super) padding: Option<u32>,
}

impl Special {
    /// The ids in a file, with llama.cpp's defaults for the kind `llama`. `vocab` is the model's.
    pub(super) fn read(keys: Keys<'_>, vocab: usize) -> Result<Self> {
        let vocab = keys.get(TOKENS).and_then(Value::as_list).map_or(vocab, <[_]>::len);
        let id = |name: &str, default: Option<u32>| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            let default = default.filter(|id| (*id as usize) < vocab);
            let found = keys.id(&key)?;
            match found.filter(|id| *id as usize >= vocab) {
                // What converters write for "none"; and nothing is ever padded.
                Some(found) if found == u32::MAX || name == "padding" => Ok(None),
                Some(found) => Err(Error::preflight(format!(
                    "`{key}` is {found}, beyond the vocabulary of {vocab} pieces"
                ))),
                None => Ok(found.or(default)),
            }
        };
        let spaced = keys.text(MODEL)? == Some("llama");
        let default = |id: u32| spaced.then_some(id);
        let eos = id("eos", default(2))?;
        let mut other_ends = Vec::new();
        for end in [id("eot", None)?, id("eom", None)?].into_iter().flatten() {
            if Some(end) != eos && !other_ends.contains(&end) {
                other_ends.push(end);
            }
        }
        Ok(Self {
            bos: id("bos", default(1))?,
            eos,
            other_ends,
            unknown: id("unknown", default(0))?,
            padding: id("padding", None)?,
        })
    }

    /// What ends a text, `eos` first: a number, a list, or null.
    pub(super) fn ends(&self) -> Json {
        let ends: Vec<u32> = self.eos.iter().chain(&self.other_ends).copied().collect();
        match ends.as_slice() {
            [] => Json::Null,
            [one] => json!(one),
            several => json!(several),
        }
    }
}

/// The `chat_template` of a tokenizer_config.json; `None` when the file has no template.
pub(super) fn templates(keys: Keys<'_>) -> Result<Option<Json>> {
    const MAIN: &str = "tokenizer.chat_template";
    let main = keys.text(MAIN)?;
    let Some(names) = keys.texts("tokenizer.chat_templates")? else {
        return Ok(main.map(|text| json!(text)));
    };
    let mut all: Vec<Json> =
        main.iter().map(|text| json!({ "name": "default", "template": text })).collect();
    for name in names {
        let key = format!("{MAIN}.{name}");
        let text = keys.text(&key)?.ok_or_else(|| missing(&key))?;
        all.push(json!({ "name": name, "template": text }));
    }
    Ok(Some(Json::Array(all)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        let put = |settings: Json| {
            let mut made = TokenizerMetadata { entries: Vec::new(), notes: Vec::new() };
            put_templates(&mut made, &settings);
            made.entries
        };
        let main = ("tokenizer.chat_template".to_owned(), Value::from("x"));
        assert_eq!(put(json!({ "chat_template": "x" })), std::slice::from_ref(&main));
        assert_eq!(put(Json::Null), []);
        let several = put(json!({ "chat_template": [
            { "name": "default", "template": "x" },
            { "name": "rag", "template": "y" },
        ] }));
        assert_eq!(several[0], main);
        assert_eq!(several[1], ("tokenizer.chat_template.rag".to_owned(), "y".into()));
        assert_eq!(several[2].1, Value::texts(["rag".to_owned()]));
    }

    #[test]
    fn ids_of_a_file() {
        let ids = |model: &str, more: &[(&str, u32)]| {
            let more = more.iter().map(|(name, id)| (format!("{name}_token_id"), Value::U32(*id)));
            let first = [("model".to_owned(), Value::from(model))];
            let entries: Vec<_> = first
                .into_iter()
                .chain(more)
                .map(|(name, value)| (format!("tokenizer.ggml.{name}"), value))
                .collect();
            Special::read(Keys(&entries), 10)
        };
        let found = ids("llama", &[("eos", 5), ("eot", 5), ("eom", 6), ("padding", 10)]).unwrap();
        assert_eq!((found.bos, found.unknown, found.padding), (Some(1), Some(0), None));
        assert_eq!(found.ends(), json!([5, 6]));
        let found = ids("gpt2", &[("bos", u32::MAX)]).unwrap();
        assert_eq!(found, Special::default());
        assert_eq!(found.ends(), Json::Null);
        let error = ids("gpt2", &[("eot", 10)]).unwrap_err().to_string();
        assert!(error.contains("`tokenizer.ggml.eot_token_id` is 10"), "{error}");
    }

    #[test]
    fn pieces_around_a_text() {
        let step = |name: &str| json!({ "SpecialToken": { "id": name } });
        let text = json!({ "Sequence": { "id": "A" } });
        let around = |single: Json| {
            let template = json!({
                "type": "TemplateProcessing",
                "single": single,
                "special_tokens": { "<s>": { "ids": [7] }, "</s>": { "ids": [8] } },
            });
            let processors = json!([{ "type": "ByteLevel" }, template]);
            let both = json!({ "type": "Sequence", "processors": processors });
            Around::of(&json!({ "post_processor": both })).map(|found| (found.first, found.last))
        };
        assert_eq!(around(json!([step("<s>"), text])), Some((Some(7), None)));
        assert_eq!(around(json!([step("<s>"), text, step("</s>")])), Some((Some(7), Some(8))));
        assert_eq!(around(json!([text])), Some((None, None)));
        assert!(Around::of(&json!({ "post_processor": { "type": "ByteLevel" } })).is_none());
    }
}
