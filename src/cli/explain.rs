//! `fewbit explain`: what a key of a recipe means.

use std::fmt::Write;

use clap::Args;
use serde_json::json;

use super::output;
use crate::error::Result;
use crate::recipe::{self, Key, builtins};

/// Examples from the built-in recipes that are shown with a key.
const EXAMPLES: usize = 3;
/// Columns of a paragraph.
const WIDTH: usize = 80;

/// Arguments of `explain`.
#[derive(Args, Debug)]
pub(super) struct ExplainArgs {
    /// A key by its path, as in --set, or by the end of it: quant.bits, stage.distill.steps,
    /// learning_rate; none: the sections
    #[arg(value_name = "KEY")]
    key: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ExplainArgs) -> Result<()> {
    let keys = match &args.key {
        Some(key) => recipe::explain(key)?,
        None => recipe::inside(""),
    };
    if args.json {
        let keys: Vec<_> = keys
            .iter()
            .map(|key| {
                let choices: Vec<_> = key
                    .choices
                    .iter()
                    .map(|[name, about]| json!({ "name": name, "about": about }))
                    .collect();
                json!({
                    "path": key.path,
                    "about": key.about,
                    "value": key.value,
                    "default": key.default,
                    "required": key.required,
                    "choices": choices,
                })
            })
            .collect();
        return output::json(&json!({ "keys": keys }));
    }
    if args.key.is_none() {
        let rows = keys.iter().flat_map(|key| {
            let stages = key
                .choices
                .iter()
                .map(|[name, about]| (format!("{}.{name}", key.path), about.clone()));
            let section = (key.path.clone(), key.about.clone());
            std::iter::once(section)
                .chain(stages.filter(|_| key.path == "stage"))
                .collect::<Vec<_>>()
        });
        return output::print(&list(rows));
    }
    let texts: Vec<String> = together(keys).iter().map(|(paths, key)| text(paths, key)).collect();
    output::print(&texts.join("\n"))
}

/// Keys that say the same, with all their paths.
fn together(keys: Vec<Key>) -> Vec<(Vec<String>, Key)> {
    let mut found: Vec<(Vec<String>, Key)> = Vec::new();
    for key in keys {
        let same = |other: &Key| {
            (&other.about, &other.value, &other.default) == (&key.about, &key.value, &key.default)
        };
        match found.iter_mut().find(|(_, other)| same(other)) {
            Some((paths, _)) => paths.push(key.path),
            None => found.push((vec![key.path.clone()], key)),
        }
    }
    found
}

/// A key as a few lines: where it stands, what it means, what it takes.
fn text(paths: &[String], key: &Key) -> String {
    let mut text = paths.join("\n") + "\n";
    let mut say = |label: &str, what: &str| {
        if !what.is_empty() {
            text += &hanging(label, what);
        }
    };
    say("", &key.about);
    say("value", &key.value);
    match &key.default {
        Some(default) => say("default", default),
        None if key.required => say("default", "none: it has to be there"),
        None => {}
    }
    say("such as", &examples(paths).join("; "));
    if !key.choices.is_empty() {
        text +=
            &list(key.choices.iter().map(|[name, about]| (format!("    {name}"), about.clone())));
    }
    let inside = recipe::inside(&paths[0]);
    if key.choices.is_empty() && !inside.is_empty() {
        text += &list(inside.iter().map(|key| (format!("    {}", key.name()), key.about.clone())));
    }
    text
}

/// Names and what they are, in two columns.
fn list(rows: impl Iterator<Item = (String, String)>) -> String {
    let rows: Vec<(String, String)> = rows.collect();
    let widest =
        rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or_default().min(30) + 2;
    let mut text = String::new();
    for (name, about) in rows {
        let mut lines = output::wrapped(&about, WIDTH.saturating_sub(widest)).into_iter();
        let gap = widest.saturating_sub(name.chars().count()).max(1);
        let first = format!("{name}{}{}", " ".repeat(gap), lines.next().unwrap_or_default());
        // Nothing fails to be written to a string.
        let _ = writeln!(text, "{}", first.trim_end());
        for line in lines {
            let _ = writeln!(text, "{}{line}", " ".repeat(widest));
        }
    }
    text
}

/// A label and a paragraph beside it.
fn hanging(label: &str, what: &str) -> String {
    let mut text = String::new();
    for (index, line) in output::wrapped(what, WIDTH - 12).iter().enumerate() {
        // Nothing fails to be written to a string.
        let _ = writeln!(text, "  {:<8}  {line}", if index == 0 { label } else { "" });
    }
    text
}

/// How built-in recipes set a key: `0.005 (upq_int2)`.
fn examples(paths: &[String]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for recipe in builtins() {
        let Ok(table) = recipe.text.parse::<toml::Table>() else { continue };
        let mut values = Vec::new();
        for path in paths {
            collect(
                &toml::Value::Table(table.clone()),
                &path.split('.').collect::<Vec<_>>(),
                &mut values,
            );
        }
        for value in values {
            let known = found.iter().any(|known| known.starts_with(&format!("{value} (")));
            if !known && found.len() < EXAMPLES {
                found.push(format!("{value} ({})", recipe.name));
            }
        }
    }
    found
}

/// The plain values at the end of a path, lists passed through.
fn collect(value: &toml::Value, path: &[&str], found: &mut Vec<String>) {
    match (value, path) {
        (toml::Value::Table(_), []) => {}
        (toml::Value::Table(table), [name, rest @ ..]) => {
            if let Some(inside) = table.get(*name) {
                collect(inside, rest, found);
            }
        }
        (toml::Value::Array(list), [_, ..]) => {
            for value in list {
                collect(value, path, found);
            }
        }
        (value, []) => found.push(value.to_string()),
        _ => {}
    }
}
