//! What a recipe may say, told by the types that read it: a JSON schema for editors, and every key with its
//! meaning for people.

use std::collections::BTreeSet;

use serde_json::{Map, Number, Value, json};

use super::Recipe;
use super::parse::nearest;
use crate::error::{Error, Result};

/// The JSON schema (2020-12) of recipes, as editors check TOML by.
pub fn schema() -> Value {
    let mut schema = schemars::schema_for!(Recipe).to_value();
    plain(&mut schema);
    if let Some(root) = schema.as_object_mut() {
        root.insert("title".to_owned(), json!("fewbit recipe"));
    }
    schema
}

/// Turns doc comments into sentences for people: no line breaks, no links into the source.
fn plain(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if let Some(Value::String(text)) = map.get_mut("description") {
                *text = sentence(text);
            }
            // TOML has no null: a key is there or it is not.
            if map.get("default").is_some_and(Value::is_null) {
                map.remove("default");
            }
            if let Some(default) = map.get_mut("default") {
                write_short(default);
            }
            map.values_mut().for_each(plain);
            merge_choices(map);
        }
        Value::Array(list) => list.iter_mut().for_each(plain),
        _ => {}
    }
}

/// Numbers of 32 bits as people write them: 0.999, not the 0.9990000128746033 that it is in 64 bits.
fn write_short(value: &mut Value) {
    match value {
        Value::Number(number) if number.is_f64() => {
            let wide = number.as_f64().unwrap_or_default();
            let narrow = wide as f32;
            if f64::from(narrow).to_bits() == wide.to_bits()
                && let Some(short) = narrow.to_string().parse().ok().and_then(Number::from_f64)
            {
                *number = short;
            }
        }
        Value::Object(map) => map.values_mut().for_each(write_short),
        Value::Array(list) => list.iter_mut().for_each(write_short),
        _ => {}
    }
}

/// Tables of which one is chosen become one table that takes one of their keys: an editor then points at the key
/// that is wrong in it, not at the whole.
fn merge_choices(schema: &mut Map<String, Value>) {
    let Some(Value::Array(parts)) = schema.get_mut("oneOf") else { return };
    let mut tables = Map::new();
    parts.retain_mut(|part| {
        let single = part["properties"].as_object().is_some_and(|properties| properties.len() == 1)
            && part["required"].as_array().is_some_and(|names| names.len() == 1);
        if !single {
            return true;
        }
        let about = part["description"].take();
        if let Some(Value::Object(properties)) = part.get_mut("properties") {
            for (name, mut table) in std::mem::take(properties) {
                if about.is_string() {
                    table["description"] = about.clone();
                }
                tables.insert(name, table);
            }
        }
        false
    });
    if tables.is_empty() {
        return;
    }
    let chosen = json!({
        "type": "object",
        "properties": tables,
        "additionalProperties": false,
        "minProperties": 1,
        "maxProperties": 1,
    });
    if !parts.is_empty() {
        parts.push(chosen);
        return;
    }
    schema.remove("oneOf");
    if let Value::Object(chosen) = chosen {
        schema.extend(chosen);
    }
}

fn sentence(text: &str) -> String {
    let text = text.replace("[`", "`").replace("`]", "`");
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// A key of a recipe.
#[derive(Clone, Debug, PartialEq)]
pub struct Key {
    /// Where it stands, lists left out: `stage.distill.objective.jsd.beta`.
    pub path: String,
    /// What it means.
    pub about: String,
    /// What may be written, in words: `a number`, `true or false`.
    pub value: String,
    /// The value that it has when it is left out, as TOML; absent where there is none, or where
    /// what is left out is decided by the rest of the recipe.
    pub default: Option<String>,
    /// Whether it has to be written.
    pub required: bool,
    /// Words or tables to choose from, each with its meaning.
    pub choices: Vec<[String; 2]>,
}

impl Key {
    /// The table that it stands in; empty at the top.
    pub fn table(&self) -> &str {
        self.path.rsplit_once('.').map_or("", |(table, _)| table)
    }

    /// Its last name.
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or_default()
    }
}

/// Every key, tables before what is in them, in the order of the types.
pub fn keys() -> Vec<Key> {
    let schema = schema();
    let mut walk = Walk { defs: &schema["$defs"], open: Vec::new(), keys: Vec::new() };
    walk.inside(&schema, "");
    walk.keys
}

/// The keys that somebody may mean by `name`: the path itself, or the end of paths; list positions
/// (`stage.0.distill`) are passed over.
///
/// # Errors
/// A usage error with the nearest name.
pub fn explain(name: &str) -> Result<Vec<Key>> {
    let wanted = name.trim_matches(['[', ']', ' ']);
    let parts = wanted.split('.').filter(|part| part.parse::<usize>().is_err());
    let wanted = parts.collect::<Vec<_>>().join(".");
    let keys = keys();
    let exact: Vec<Key> = keys.iter().filter(|key| key.path == wanted).cloned().collect();
    if !exact.is_empty() {
        return Ok(exact);
    }
    let end = format!(".{wanted}");
    let ending: Vec<Key> = keys.iter().filter(|key| key.path.ends_with(&end)).cloned().collect();
    if !ending.is_empty() && !wanted.is_empty() {
        return Ok(ending);
    }
    let paths: BTreeSet<&str> = keys.iter().map(|key| key.path.as_str()).collect();
    let names: BTreeSet<&str> = keys.iter().map(Key::name).collect();
    let known: Vec<&str> = if wanted.contains('.') { paths } else { names }.into_iter().collect();
    let fix = match nearest(&wanted, &known) {
        Some(near) => format!("`{near}`, or `fewbit explain` for the sections"),
        None => "`fewbit explain` for the sections".to_owned(),
    };
    Err(Error::usage(format!("no key of a recipe is called `{name}`"))
        .at("the keys that recipes have")
        .fix(fix))
}

/// The keys that stand right inside of a table.
pub fn inside(table: &str) -> Vec<Key> {
    keys().into_iter().filter(|key| key.table() == table).collect()
}

struct Walk<'a> {
    defs: &'a Value,
    /// Definitions that are being walked: an objective may hold objectives.
    open: Vec<String>,
    keys: Vec<Key>,
}

impl<'a> Walk<'a> {
    /// The definition that a schema stands for, in the end.
    fn resolve(&self, mut schema: &'a Value) -> &'a Value {
        while let Some(name) = referred(schema) {
            schema = &self.defs[name];
        }
        schema
    }

    /// What a value may be, one by one; no null.
    fn alternatives(&self, schema: &'a Value) -> Vec<&'a Value> {
        let schema = self.resolve(schema);
        let lists = ["oneOf", "anyOf", "allOf"].iter().filter_map(|key| schema[*key].as_array());
        let parts: Vec<&Value> = lists.flatten().collect();
        if parts.is_empty() {
            return if schema["type"] == "null" { Vec::new() } else { vec![schema] };
        }
        parts.into_iter().flat_map(|part| self.alternatives(part)).collect()
    }

    /// The keys of the tables that a value may be.
    fn inside(&mut self, schema: &'a Value, path: &str) {
        let name = referred(schema).map(str::to_owned);
        if let Some(name) = &name {
            if self.open.contains(name) {
                return;
            }
            self.open.push(name.clone());
        }
        let resolved = self.resolve(schema);
        let parts = ["oneOf", "anyOf", "allOf"].iter().filter_map(|key| resolved[*key].as_array());
        for part in parts.flatten() {
            self.inside(part, path);
        }
        self.inside_items(resolved, path);
        if let Some(properties) = resolved["properties"].as_object() {
            self.properties(resolved, properties, path);
        }
        if name.is_some() {
            self.open.pop();
        }
    }

    /// A list's keys stand where the list does: `[[stage]]`.
    fn inside_items(&mut self, schema: &'a Value, path: &str) {
        if schema["items"].is_object() {
            self.inside(&schema["items"], path);
        }
    }

    fn properties(&mut self, owner: &'a Value, properties: &'a Map<String, Value>, path: &str) {
        let required =
            |name: &str| owner["required"].as_array().is_some_and(|all| all.contains(&json!(name)));
        for (name, schema) in properties {
            let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            let about = schema["description"].as_str();
            let about = about.or_else(|| self.resolve(schema)["description"].as_str());
            self.keys.push(Key {
                path: path.clone(),
                about: about.unwrap_or_default().to_owned(),
                value: self.words(schema),
                default: schema.get("default").and_then(toml_of),
                required: required(name),
                choices: self.choices(schema),
            });
            self.inside(schema, &path);
        }
    }

    /// What may be written, in words.
    fn words(&self, schema: &'a Value) -> String {
        let mut words: Vec<String> = Vec::new();
        for part in self.alternatives(schema) {
            if part["properties"].is_object() {
                words.push(
                    if part["maxProperties"] == 1 { "one of its tables" } else { "a table" }
                        .to_owned(),
                );
                continue;
            }
            let kinds: Vec<&str> = match &part["type"] {
                Value::String(kind) => vec![kind],
                Value::Array(kinds) => kinds.iter().filter_map(Value::as_str).collect(),
                _ => Vec::new(),
            };
            let constant = part.get("const").map(|value| vec![value.clone()]);
            let listed = constant.or_else(|| part["enum"].as_array().cloned());
            if let Some(listed) = listed {
                words.extend(listed.iter().filter_map(toml_of));
                continue;
            }
            for kind in kinds {
                words.extend(match kind {
                    "integer" => Some(whole(part)),
                    "number" => Some("a number".to_owned()),
                    "boolean" => Some("true or false".to_owned()),
                    "string" => Some("a text".to_owned()),
                    "array" => Some(format!("a list of: {}", self.words(&part["items"]))),
                    "object" => Some("a table".to_owned()),
                    _ => None,
                });
            }
        }
        words.dedup();
        words.join(", or ").replace(", or \"", ", \"")
    }

    /// Words and tables to choose from.
    fn choices(&self, schema: &'a Value) -> Vec<[String; 2]> {
        let about = |part: &Value| part["description"].as_str().unwrap_or_default().to_owned();
        let mut choices = Vec::new();
        for part in self.alternatives(schema) {
            if part["items"].is_object() {
                choices.extend(self.choices(&part["items"]));
            } else if let Some(word) = part.get("const").and_then(toml_of) {
                choices.push([word, about(part)]);
            } else if part["maxProperties"] == 1 {
                let tables = part["properties"].as_object().into_iter().flatten();
                choices.extend(tables.map(|(name, table)| [name.clone(), about(table)]));
            }
        }
        choices
    }
}

fn referred(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.strip_prefix("#/$defs/")
}

fn whole(schema: &Value) -> String {
    match (schema["minimum"].as_f64(), schema["maximum"].as_f64()) {
        (Some(least), Some(most)) if most <= f64::from(u16::MAX) => {
            format!("an integer from {least} to {most}")
        }
        (Some(least), _) if least > 0.0 => format!("an integer of at least {least}"),
        _ => "an integer".to_owned(),
    }
}

/// A value as it is written in TOML; nothing for tables that say nothing.
fn toml_of(value: &Value) -> Option<String> {
    let value = toml::Value::try_from(value).ok()?;
    match &value {
        toml::Value::Table(table) if table.is_empty() => Some("{}".to_owned()),
        value => Some(value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{builtins, parse};

    /// Paths of a TOML value, lists left out.
    fn paths(value: &toml::Value, path: &str, found: &mut BTreeSet<String>) {
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    let path =
                        if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    found.insert(path.clone());
                    paths(value, &path, found);
                }
            }
            toml::Value::Array(list) => list.iter().for_each(|value| paths(value, path, found)),
            _ => {}
        }
    }

    #[test]
    fn every_key_of_every_recipe_is_explained() {
        let known: BTreeSet<String> = keys().into_iter().map(|key| key.path).collect();
        for recipe in builtins() {
            let (_, table) = parse::<Recipe>(recipe.text, recipe.name, &[]).unwrap();
            let mut found = BTreeSet::new();
            paths(&toml::Value::Table(table), "", &mut found);
            let strange: Vec<_> = found.difference(&known).collect();
            assert!(strange.is_empty(), "{}: {strange:?}", recipe.name);
        }
    }

    #[test]
    fn every_key_says_what_it_means_and_takes() {
        let keys = keys();
        assert!(keys.len() > 200, "{} keys", keys.len());
        for key in keys {
            assert!(!key.about.is_empty(), "{} says nothing", key.path);
            assert!(!key.value.is_empty(), "{} takes nothing", key.path);
            assert!(!key.about.contains("[`"), "{}: {}", key.path, key.about);
        }
    }

    #[test]
    fn keys_have_values_defaults_and_choices() {
        let one = |path: &str| {
            let found = explain(path).unwrap();
            assert_eq!(found.len(), 1, "{path}");
            found.into_iter().next().unwrap()
        };
        let bits = one("quant.bits");
        assert_eq!((bits.value.as_str(), bits.required), ("an integer from 1 to 8", true));
        let group = one("quant.group_size");
        assert_eq!(group.value, "\"tensor\", \"channel\", or an integer of at least 1");
        assert_eq!(group.default.as_deref(), Some("\"channel\""));
        assert_eq!(group.choices.len(), 2);
        let beta = one("[stage.0.distill.objective.jsd.beta]");
        assert_eq!((beta.value.as_str(), beta.default.as_deref()), ("a number", Some("0.5")));
        let decay = one("stage.distill.optimizer.beta2");
        assert_eq!(decay.default.as_deref(), Some("0.999"));
        let stage = one("stage");
        assert!(stage.choices.iter().any(|[name, about]| name == "distill" && !about.is_empty()));
        assert!(!one("stage.distill").required);
    }

    #[test]
    fn the_end_of_a_path_is_enough_and_a_slip_gets_the_nearest() {
        assert!(explain("learning_rate").unwrap().len() > 2);
        let error = explain("learning_rat").unwrap_err();
        assert!(error.to_string().contains("try  `learning_rate`"), "{error}");
        assert_eq!(error.kind().exit_code(), 2);
        let error = explain("stage.distil.steps").unwrap_err();
        assert!(error.to_string().contains("`stage.distill.steps`"), "{error}");
        explain("").unwrap_err();
    }

    #[test]
    fn the_schema_knows_what_it_refers_to() {
        fn check(value: &Value, defs: &Value) {
            if let Some(name) = referred(value) {
                assert!(defs[name].is_object(), "{name}");
            }
            match value {
                Value::Object(map) => map.values().for_each(|value| check(value, defs)),
                Value::Array(list) => list.iter().for_each(|value| check(value, defs)),
                _ => {}
            }
        }
        let schema = schema();
        check(&schema, &schema["$defs"]);
        assert_eq!(schema["additionalProperties"], false);
        assert_eq!(schema["required"], json!(["output", "model", "quant", "stage"]));
    }
}
