//! The prompts of a data file with their instructions.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::instruction::Instruction;
use crate::data::{Columns, Row, read_rows};
use crate::error::{Error, Result};

const COLUMNS: Columns =
    Columns { names: &["key", "prompt", "instruction_id_list", "kwargs"], telling: "prompt" };

/// A prompt and what its answer has to follow.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// How the data names it, as it stands there.
    pub(super) key: Value,
    pub(super) prompt: String,
    pub(super) names: Vec<String>,
    pub(super) instructions: Vec<Instruction>,
}

impl Asked {
    fn of(row: &Row) -> Result<Self, String> {
        let field = |key: &str| row.fields.get(key).ok_or_else(|| format!("the row has no {key}"));
        let prompt = field("prompt")?.as_str().ok_or("its prompt is not a text")?.to_owned();
        let list = |key: &str| {
            let list = field(key)?.as_array();
            list.ok_or_else(|| format!("its {key} is not a list"))
        };
        let names = list("instruction_id_list")?;
        let keys = list("kwargs")?;
        if names.len() != keys.len() {
            let (names, keys) = (names.len(), keys.len());
            return Err(format!("it has {names} instructions and {keys} kwargs"));
        }
        if names.is_empty() {
            return Err("it has no instruction".to_owned());
        }
        let none = Map::new();
        let mut asked = Self {
            key: row.fields.get("key").cloned().unwrap_or(Value::Null),
            prompt,
            names: Vec::new(),
            instructions: Vec::new(),
        };
        for (name, keys) in names.iter().zip(keys) {
            let name = name.as_str().ok_or("an instruction's name is not a text")?;
            let keys = match keys {
                Value::Object(keys) => keys,
                Value::Null => &none,
                _ => return Err(format!("the kwargs of {name} are no object")),
            };
            asked.instructions.push(Instruction::parse(name, keys)?);
            asked.names.push(name.to_owned());
        }
        Ok(asked)
    }
}

/// The prompts of files.
///
/// # Errors
/// When a file holds no rows, or an instruction cannot be read.
pub(super) fn asked(files: &[PathBuf]) -> Result<Vec<Asked>> {
    let mut all = Vec::new();
    for path in files {
        for row in read_rows(path, COLUMNS)? {
            let asked = Asked::of(&row).map_err(|what| {
                Error::preflight(what).at(path.display()).at(&row.place).fix(
                    "rows of IFEval: {\"prompt\": …, \"instruction_id_list\": […], \"kwargs\": [{…}]}",
                )
            });
            all.push(asked?);
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(row: &str) -> Result<Vec<Asked>, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, row).unwrap();
        asked(&[path]).map_err(|error| error.what().to_owned())
    }

    #[test]
    fn rows_are_prompts_with_instructions() {
        let row = r#"{"key": 7, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma",
            "startend:quotation"], "kwargs": [{}, {"num_words": null}]}"#;
        let found = read(&row.replace('\n', " ")).unwrap();
        assert_eq!(found[0].names, ["punctuation:no_comma", "startend:quotation"]);
        assert_eq!((found[0].key.as_i64(), found[0].instructions.len()), (Some(7), 2));
    }

    #[test]
    fn what_is_wrong_with_a_row_is_named() {
        let refused = |names: &str, kwargs: &str| {
            let row = format!(
                "{{\"prompt\": \"x\", \"instruction_id_list\": {names}, \"kwargs\": {kwargs}}}"
            );
            read(&row).unwrap_err()
        };
        assert_eq!(refused("[]", "[]"), "it has no instruction");
        assert_eq!(refused("[\"startend:quotation\"]", "[]"), "it has 1 instructions and 0 kwargs");
        assert_eq!(refused("\"x\"", "[]"), "its instruction_id_list is not a list");
        let missing = refused("[\"detectable_format:number_bullet_lists\"]", "[null]");
        assert_eq!(missing, "detectable_format:number_bullet_lists has no num_bullets");
        assert_eq!(read("{\"a\": 1}").unwrap_err(), "the row has no prompt");
    }
}
