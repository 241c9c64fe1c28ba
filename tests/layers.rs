//! Direction: every module of `src` uses only the layers below it.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// Everyone may use these; among themselves they know only `error`.
const BASE: [&str; 4] = ["error", "device", "report", "stop"];

/// The layers from the top to the bottom, and which ones each may use besides [`BASE`].
/// `layer::Item` allows that one item.
const LAYERS: [(&str, &[&str]); 14] = [
    ("cli", &["run", "recipe", "stage", "task", "export", "model", "data", "quant", "store"]),
    ("run", &["recipe", "stage", "export", "model", "data", "quant", "store"]),
    ("recipe", &["stage", "method", "model", "data::DataFormat", "quant", "store"]),
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
        &["task", "method", "model", "data::DataFormat", "data::Tokenizer", "quant", "store"],
    ),
    ("task", &["model", "data", "ops", "store::hex"]),
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
