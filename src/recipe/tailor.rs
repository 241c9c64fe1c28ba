//! A recipe's text with some keys set, its comments kept: what `recipes copy --for MODEL` writes.

use toml_edit::{DocumentMut, InlineTable, Item, Table, Value};

use crate::error::{Error, Result};

/// A recipe's text with keys set (`a.b.0.c=value`, as in `--set`); comments and order stay.
///
/// # Errors
/// A usage error for a text that is no TOML, and for a key that leads through something else than tables and lists.
pub fn with_settings(text: &str, settings: &[String]) -> Result<String> {
    let mut document: DocumentMut =
        text.parse().map_err(|e| Error::usage(format!("the recipe is no TOML: {e}")))?;
    for setting in settings {
        let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
        // A bare word is a text.
        let value = value.parse::<Value>().unwrap_or_else(|_| Value::from(value));
        let path: Vec<&str> = key.split('.').collect();
        set(document.as_item_mut(), &path, value)
            .ok_or_else(|| Error::usage(format!("`{key}` leads nowhere in this recipe")))?;
    }
    Ok(document.to_string())
}

/// Puts a value at the end of a path; tables that are missing are made.
fn set(item: &mut Item, path: &[&str], mut value: Value) -> Option<()> {
    let [name, rest @ ..] = path else {
        // What stands beside a value, spaces and a comment, belongs to its place.
        match item.as_value().map(|old| old.decor().clone()) {
            Some(decor) => *value.decor_mut() = decor,
            None => value.decor_mut().set_prefix(" "),
        }
        *item = Item::Value(value);
        return Some(());
    };
    if let Some(list) = item.as_array_of_tables_mut() {
        let table = list.get_mut(name.parse().ok()?)?;
        return in_table(table, rest.split_first()?, value);
    }
    match item {
        Item::Table(table) => in_table(table, (name, rest), value),
        Item::Value(Value::InlineTable(table)) => in_inline(table, (name, rest), value),
        _ => None,
    }
}

fn in_table(table: &mut Table, (name, rest): (&&str, &[&str]), value: Value) -> Option<()> {
    let missing = if rest.is_empty() { Item::None } else { Item::Table(implicit()) };
    set(table.entry(name).or_insert(missing), rest, value)
}

fn in_inline(table: &mut InlineTable, (name, rest): (&&str, &[&str]), value: Value) -> Option<()> {
    let mut inside =
        Item::Value(table.get(name).cloned().unwrap_or_else(|| InlineTable::new().into()));
    set(&mut inside, rest, value)?;
    table.insert(*name, inside.into_value().ok()?);
    Some(())
}

/// A table without a heading of its own until something stands in it.
fn implicit() -> Table {
    let mut table = Table::new();
    table.set_implicit(true);
    table.set_dotted(true);
    table
}

/// The settings that a recipe's head comment gives for a real model: those of the command under `A real model`
/// that name values, not places to fill in.
pub fn real_model_settings(text: &str) -> Vec<String> {
    let head = text.lines().map_while(|line| line.strip_prefix('#'));
    let mut command = String::new();
    for line in head.skip_while(|line| !line.trim_start().starts_with("A real model")) {
        let line = line.trim().trim_start_matches("A real model").trim();
        let whole = command.is_empty() && !line.starts_with("fewbit train");
        if whole {
            return Vec::new();
        }
        command += line.trim_end_matches('\\');
        command.push(' ');
        if !line.ends_with('\\') {
            break;
        }
    }
    let mut words = command.split_whitespace();
    let mut settings = Vec::new();
    while let Some(word) = words.next() {
        if word != "--set" {
            continue;
        }
        let Some(setting) = words.next() else { break };
        let value = setting.split_once('=').map_or("", |(_, value)| value);
        if !value.starts_with(|letter: char| letter.is_ascii_uppercase()) {
            settings.push(setting.to_owned());
        }
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Recipe, builtins, parse};

    const TEXT: &str = r#"# Head.
seed = 0 # of everything
[model]
path = "a"    # a folder

[[stage]]
[stage.distill]
method.seq = { start = "mse" }
steps = 5      # few
"#;

    #[test]
    fn keys_are_set_where_they_stand_and_comments_stay() {
        let sets = [
            "model.path=b/c",
            "stage.0.distill.steps=7",
            "stage.0.distill.method.seq.start=\"max\"",
        ];
        let found = with_settings(TEXT, &sets.map(str::to_owned)).unwrap();
        let expected = TEXT
            .replace("path = \"a\"", "path = \"b/c\"")
            .replace("steps = 5", "steps = 7")
            .replace("\"mse\"", "\"max\"");
        assert_eq!(found, expected);
    }

    #[test]
    fn keys_that_are_missing_are_made() {
        let sets = ["model.compute=bf16", "data.train.path=t.jsonl"].map(str::to_owned);
        let found = with_settings(TEXT, &sets).unwrap();
        let table: toml::Table = found.parse().unwrap();
        assert_eq!(table["model"]["compute"].as_str(), Some("bf16"));
        assert_eq!(table["data"]["train"]["path"].as_str(), Some("t.jsonl"));
        assert!(found.starts_with("# Head.\n"), "{found}");
        with_settings(TEXT, &["stage.4.distill.steps=1".to_owned()]).unwrap_err();
        with_settings(TEXT, &["seed.a=1".to_owned()]).unwrap_err();
    }

    #[test]
    fn every_recipe_takes_its_own_advice() {
        let mut advised = 0;
        for recipe in builtins() {
            let settings = real_model_settings(recipe.text);
            advised += usize::from(!settings.is_empty());
            let text = with_settings(recipe.text, &settings).unwrap();
            let (by_text, _) = parse::<Recipe>(&text, recipe.name, &[]).unwrap();
            let (by_set, _) = parse::<Recipe>(recipe.text, recipe.name, &settings).unwrap();
            assert_eq!(by_text, by_set, "{}", recipe.name);
            assert_eq!(
                text.matches('#').count(),
                recipe.text.matches('#').count(),
                "{}",
                recipe.name
            );
        }
        assert!(advised >= 3, "{advised} recipes with settings for a real model");
    }
}
