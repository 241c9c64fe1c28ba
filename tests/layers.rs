//! Direction: every module of `src` uses only the layers below it.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Everyone may use these; among themselves they know only `error`.
const BASE: [&str; 6] = ["error", "device", "exhausted", "report", "schema", "stop"];

/// The layers from the top to the bottom, and which ones each may use besides [`BASE`].
/// `layer::Item` allows that one item.
const LAYERS: [(&str, &[&str]); 17] = [
    (
        "cli",
        &[
            "bench", "run", "page", "serve", "recipe", "stage", "task", "export", "model", "data",
            "quant", "store",
        ],
    ),
    // What is measured is what runs: the pieces that stages are made of.
    (
        "bench",
        &[
            "run",
            "stage",
            "export",
            "method",
            "model",
            "objective",
            "data",
            "train",
            "quant",
            "ops",
            "store",
        ],
    ),
    ("run", &["page", "recipe", "stage", "export", "model", "data", "quant", "store"]),
    // A page knows a run by its files alone.
    ("page", &["store::folder"]),
    // It opens nothing: a loaded model with its words and adapters is brought to it.
    (
        "serve",
        &[
            "export::Adapters",
            "model",
            "data::Answer",
            "data::Chat",
            "data::ChatTemplate",
            "data::Tokenizer",
        ],
    ),
    (
        "recipe",
        &[
            "stage",
            "export::Format",
            "method",
            "model",
            "data::DataFormat",
            "data::Paths",
            "data::Reading",
            "data::TemplateChoice",
            "data::TrainOn",
            "quant",
            "store",
        ],
    ),
    (
        "stage",
        &[
            "task",
            "export",
            "method",
            "model",
            "objective",
            "data",
            "train",
            "quant",
            "ops",
            "store",
        ],
    ),
    // The gate measures what tasks measure; a loss that is allowed is round-to-nearest's.
    (
        "export",
        &[
            "task",
            "method",
            "model",
            "data::ChatTemplate",
            "data::Reading",
            "data::Tokenizer",
            "quant",
            "store",
        ],
    ),
    ("task", &["model", "data", "ops", "store::folder", "store::hex", "store::locate"]),
    // The role of a parameter is the word both sides share: method says it, train reads rates by it.
    ("method", &["train::Measure", "train::Role", "quant", "ops"]),
    // A linear may be held as codes: the one form of quantization that a forward computes with.
    ("model", &["quant::CodedWeight", "quant::Learned", "quant::QuantizedWeight", "ops", "store"]),
    ("objective", &["ops"]),
    // Hashing a file is one function for all.
    ("data", &["store::folder", "store::hex"]),
    ("train", &["ops"]),
    ("quant", &["ops"]),
    ("ops", &[]),
    ("store", &[]),
];

#[test]
fn lower_layers_do_not_know_upper_ones() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = String::new();
    for file in rust_files(&src) {
        let name = file.strip_prefix(&src).unwrap().to_str().unwrap().replace('\\', "/");
        if name == "lib.rs" || name == "main.rs" {
            continue;
        }
        let layer = name.split('/').next().unwrap().trim_end_matches(".rs");
        let text = std::fs::read_to_string(&file).unwrap();
        for used in uses(&text).iter().filter(|used| !is_allowed(layer, used)) {
            let used = used.split("::").next().unwrap_or_default();
            let _ = writeln!(faults, "`{name}` uses `{used}`: {}", lesson(layer, used));
        }
    }
    assert!(faults.is_empty(), "\n{faults}");
}

#[test]
fn the_table_itself_points_downwards() {
    for (place, (layer, allowed)) in LAYERS.iter().enumerate() {
        for used in *allowed {
            let used = used.split("::").next().unwrap();
            let at = LAYERS.iter().position(|(below, _)| *below == used).unwrap();
            assert!(at > place, "`{layer}` is allowed `{used}`, which stands above it");
        }
    }
}

#[test]
fn uses_are_found_in_every_spelling() {
    let text = "use crate::error::{Error, Result};\n\
                use crate::{quant::{Bits, Grid}, store::HostTensor};\n\
                fn f(x: crate::model::Block) {} // and crate::cli in a remark\n\
                //! or in [`crate::run`] of the documentation\n";
    let found: Vec<String> = uses(text).into_iter().collect();
    assert_eq!(
        found,
        [
            "error::Error",
            "error::Result",
            "model::Block",
            "quant::Bits",
            "quant::Grid",
            "store::HostTensor"
        ]
    );
    assert!(is_allowed("method", "train::Role") && !is_allowed("method", "train::step"));
    assert!(is_allowed("store", "error::Result") && !is_allowed("quant", "method::rtn"));
}

/// Folders of `src` whose files must not use each other in circles.
const WITHOUT_CIRCLES: [&str; 3] = ["export", "stage", "task"];

#[test]
fn files_of_a_folder_use_each_other_in_no_circle() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for folder in WITHOUT_CIRCLES {
        let root = src.join(folder);
        let texts = rust_files(&root).into_iter().map(|file| {
            let name = file.strip_prefix(&root).unwrap().to_str().unwrap().replace('\\', "/");
            let name = name.trim_end_matches(".rs").trim_end_matches("mod").trim_end_matches('/');
            (name.replace('/', "::"), std::fs::read_to_string(&file).unwrap())
        });
        let circle = circle(&used_files(folder, &texts.collect()));
        assert!(circle.is_empty(), "a circle in `{folder}`:\n{circle}");
    }
}

#[test]
fn circles_are_found() {
    let files = |texts: &[(&str, &str)]| -> String {
        let texts = texts.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        circle(&used_files("top", &texts.collect()))
    };
    assert_eq!(files(&[("", "mod a; pub use a::A;"), ("a", "use super::b::B;"), ("b", "")]), "");
    // A file that uses what its folder passes on uses everything there.
    let shared = [("", "pub use a::{A, B};"), ("a", "use super::{b::C, D};"), ("b", "")];
    assert_eq!(files(&shared), "`` uses `a`\n`a` uses ``\n");
    let deep = [
        ("a::b", "use super::super::c; fn f() -> crate::top::c::X {}"),
        ("c", "// use super::d::D\nfn f(x: super::a::b::Y) {}\n#[cfg(test)]\nmod tests {}"),
        ("d", "use super::c::X;\n#[cfg(test)]\nmod tests { use super::super::d::Z; }"),
    ];
    assert_eq!(files(&deep), "`a::b` uses `c`\n`c` uses `a::b`\n");
}

/// The files, by module path, that each file of a folder uses, tests aside.
fn used_files(
    folder: &str,
    texts: &BTreeMap<String, String>,
) -> BTreeMap<String, BTreeSet<String>> {
    // The file that a path leads to; an item of a folder's own is one of its `mod.rs`.
    let file = |path: &[&str]| {
        let prefixes = (0..=path.len()).rev().map(|end| path[..end].join("::"));
        prefixes.into_iter().find(|prefix| texts.contains_key(prefix))
    };
    let within = format!("crate::{folder}::");
    let uses = texts.iter().map(|(name, text)| {
        let code = text.split("\n#[cfg(test)]").next().unwrap_or_default();
        let code: Vec<&str> =
            code.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
        let code = code.join("\n");
        let mut used = BTreeSet::new();
        let mut add = |start: &[&str], rest: &str| {
            for path in paths(rest) {
                let (mut at, mut rest) = (start.to_vec(), path.split("::").peekable());
                while rest.next_if_eq(&"super").is_some() {
                    at.pop();
                }
                at.extend(rest);
                used.extend(file(&at).filter(|used| used != name));
            }
        };
        let own: Vec<&str> = name.split("::").filter(|part| !part.is_empty()).collect();
        for (at, _) in code.match_indices(&within) {
            add(&[], &code[at + within.len()..]);
        }
        for (at, _) in code.match_indices("super::") {
            if !code[..at].ends_with("::") {
                add(&own, &code[at..]);
            }
        }
        // What a `mod.rs` passes on of its children.
        for (at, _) in code.match_indices("use ") {
            let rest = &code[at + "use ".len()..];
            let child = rest.split("::").next().unwrap_or_default();
            if texts.contains_key(&[&own[..], &[child]].concat().join("::")) {
                add(&own, rest);
            }
        }
        (name.clone(), used)
    });
    uses.collect()
}

/// The uses that are part of circles, one a line; nothing where there is none.
fn circle(uses: &BTreeMap<String, BTreeSet<String>>) -> String {
    let mut left = uses.clone();
    loop {
        // A file that uses none of the others, or is used by none, is in no circle.
        let is_used = |name: &String| left.values().any(|used| used.contains(name));
        let out = |name: &String| left[name].is_empty() || !is_used(name);
        let Some(out) = left.keys().find(|name| out(name)).cloned() else { break };
        left.remove(&out);
        for used in left.values_mut() {
            used.remove(&out);
        }
    }
    let lines = left
        .iter()
        .flat_map(|(name, used)| used.iter().map(move |used| format!("`{name}` uses `{used}`\n")));
    lines.collect()
}

fn is_allowed(layer: &str, used: &str) -> bool {
    let module = used.split("::").next().unwrap_or_default();
    if module == layer || module == "error" {
        return true;
    }
    let row = LAYERS.iter().find(|(name, _)| *name == layer);
    row.is_some_and(|(_, allowed)| {
        BASE.contains(&module) || allowed.contains(&module) || allowed.contains(&used)
    })
}

/// What a forbidden use teaches.
fn lesson(layer: &str, used: &str) -> String {
    let place = |name: &str| LAYERS.iter().position(|(layer, _)| *layer == name);
    match (place(layer), place(used)) {
        _ if BASE.contains(&layer) => format!("`{layer}` stands below everything"),
        (None, _) => format!("`{layer}` is not in the table of tests/layers.rs, give it a row"),
        (_, None) => format!("`{used}` is not in the table of tests/layers.rs, give it a row"),
        (Some(above), Some(below)) if above > below => {
            "lower layers do not know upper ones".to_owned()
        }
        _ => format!("`{layer}` has no business there; if it has, say so in tests/layers.rs"),
    }
}

fn rust_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// `layer::Item` for everything that `text` names through `crate::`, comments aside.
fn uses(text: &str) -> BTreeSet<String> {
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n");
    let mut found = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        for path in paths(&code[at + "crate::".len()..]) {
            found.insert(path.split("::").take(2).collect::<Vec<_>>().join("::"));
        }
    }
    found
}

/// The paths a `use` tree stands for: `a::{b, c::d}` is `a::b` and `a::c::d`.
fn paths(tree: &str) -> Vec<String> {
    let word = |c: char| c.is_alphanumeric() || c == '_' || c == ':' || c == '*';
    let stem_end = tree.find(|c| !word(c)).unwrap_or(tree.len());
    let (stem, rest) = tree.split_at(stem_end);
    let Some(inside) = rest.strip_prefix('{') else {
        return vec![stem.trim_end_matches(':').to_owned()];
    };
    let branches = branches(inside);
    branches.iter().flat_map(|branch| paths(branch)).map(|path| format!("{stem}{path}")).collect()
}

/// The comma-separated parts up to the brace that closes.
fn branches(inside: &str) -> Vec<String> {
    let (mut depth, mut parts) = (0, vec![String::new()]);
    for c in inside.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => {
                parts.push(String::new());
                continue;
            }
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        parts.last_mut().unwrap().push(c);
    }
    parts.iter().map(|part| part.trim().to_owned()).filter(|part| !part.is_empty()).collect()
}
