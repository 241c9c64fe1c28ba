//! docs/recipes.md: every key of a recipe, from the types that read it.

use std::fmt::Write;

use fewbit::recipe::{Key, keys};

/// Tables that are alike, wherever they stand.
struct Section {
    paths: Vec<String>,
    keys: Vec<Key>,
}

impl Section {
    fn is_like(&self, path: &str, keys: &[Key]) -> bool {
        let last = |path: &str| path.rsplit('.').next().unwrap().to_owned();
        let same = |a: &Key, b: &Key| {
            (a.name(), &a.about, &a.value, &a.default, a.required)
                == (b.name(), &b.about, &b.value, &b.default, b.required)
        };
        let data = |path: &str| path.starts_with("data.");
        (last(path) == last(&self.paths[0]) || data(path) && data(&self.paths[0]))
            && keys.len() == self.keys.len()
            && keys.iter().zip(&self.keys).all(|(a, b)| same(a, b))
    }

    /// What its paths end with alike; one path stands whole.
    fn title(&self) -> String {
        let parts: Vec<Vec<&str>> =
            self.paths.iter().map(|path| path.split('.').rev().collect()).collect();
        let alike = (0..parts[0].len())
            .take_while(|&at| parts.iter().all(|path| path.get(at) == parts[0].get(at)))
            .count();
        let mut end: Vec<&str> = parts[0][..alike].to_vec();
        end.reverse();
        if end.is_empty() { "data.*".to_owned() } else { end.join(".") }
    }
}

/// The sections of the page, in the order of the types.
pub(crate) fn reference() -> String {
    let mut sections: Vec<Section> = Vec::new();
    let mut tables: Vec<(String, Vec<Key>)> = Vec::new();
    for key in keys() {
        let table = key.table().to_owned();
        match tables.iter_mut().find(|(path, _)| *path == table) {
            Some((_, keys)) => keys.push(key),
            None => tables.push((table, vec![key])),
        }
    }
    for (path, keys) in tables {
        match sections.iter_mut().find(|section| section.is_like(&path, &keys)) {
            Some(section) => section.paths.push(path),
            None => sections.push(Section { paths: vec![path], keys }),
        }
    }
    let mut text = String::new();
    for section in &sections {
        let title = section.title();
        if title.is_empty() {
            text.push_str("### At the top\n\n");
        } else {
            let _ = write!(text, "### `{title}`\n\n");
        }
        if section.paths.len() > 1 {
            let places: Vec<String> =
                section.paths.iter().map(|path| format!("`{path}`")).collect();
            let _ = write!(text, "At {}.\n\n", places.join(", "));
        }
        text.push_str("| key | what it takes | left out | what it means |\n|---|---|---|---|\n");
        for key in &section.keys {
            let default = match &key.default {
                Some(default) => format!("`{default}`"),
                None if key.required => "has to be there".to_owned(),
                None => String::new(),
            };
            let mut about = key.about.clone();
            // Tables to choose from have sections of their own.
            let words =
                key.choices.iter().filter(|[word, about]| !about.is_empty() && is_value(word));
            for [word, meaning] in words {
                let _ = write!(about, " `{word}`: {meaning}");
            }
            let cells = [format!("`{}`", key.name()), key.value.clone(), default, about];
            let cells = cells.map(|cell| cell.replace('|', "\\|"));
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text.push('\n');
    }
    text
}

/// Whether a choice is a value, not the name of a table.
fn is_value(word: &str) -> bool {
    word.starts_with('"') || word == "true" || word == "false"
}
