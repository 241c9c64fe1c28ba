//! docs/methods.md and docs/recipes.md say what the source says; commands of the pages run, and links lead somewhere.
//!
//! `UPDATE_DOCS=1 cargo test --release --test docs` writes the reference anew.
#![allow(clippy::unwrap_used)] // a test may fail by panicking, its helpers too

#[path = "docs/recipes.rs"]
mod recipes_page;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::{Path, PathBuf};

/// What every head comment states, in this order.
const FIELDS: [&str; 5] = ["What it learns", "Formula", "Start", "Recipe keys", "Export"];

#[test]
fn the_reference_is_what_the_head_comments_say() {
    is_as_the_source_says("methods.md", "methods", &reference());
}

#[test]
fn every_key_of_a_recipe_is_on_its_page() {
    is_as_the_source_says("recipes.md", "keys", &recipes_page::reference());
}

/// A page says between its marks what is made from the source, or is made to.
fn is_as_the_source_says(page: &str, marks: &str, reference: &str) {
    let [begin, end] = ["begin", "end"].map(|mark| format!("<!-- {marks}:{mark} -->"));
    let path = root().join("docs").join(page);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(&begin).unwrap();
    let (_, after) = rest.split_once(&end).unwrap();
    let expected = format!("{before}{begin}\n\n{reference}{end}{after}");
    if std::env::var_os("UPDATE_DOCS").is_some_and(|value| value == "1") {
        std::fs::write(&path, &expected).unwrap();
        return;
    }
    let differs = text.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    assert!(
        text == expected,
        "docs/{page} differs from what the source says at {differs:?}; \
         UPDATE_DOCS=1 cargo test --release --test docs writes it"
    );
}

#[test]
fn every_method_is_a_file_a_row_and_a_recipe() {
    let keys = keys();
    let listed: BTreeSet<String> = keys.iter().cloned().collect();
    let helpers = ["mod", "attach", "kinds", "list", "quantizer"];
    let files = stems("src/method", "rs").into_iter().filter(|stem| !helpers.contains(&&**stem));
    assert_eq!(files.collect::<BTreeSet<_>>(), listed);
    let text = std::fs::read_to_string(root().join("docs/methods.md")).unwrap();
    let used: BTreeSet<String> = recipes().into_values().flatten().collect();
    for key in keys {
        assert!(used.contains(&key), "no recipe uses method.{key}");
        let rows = text.lines().filter(|line| line.starts_with(&format!("| `{key}` |"))).count();
        assert_eq!(rows, 1, "rows of {key} in the table of docs/methods.md");
    }
}

/// What a reader is told to type works as it stands: fences marked `sh`, each page in a folder of its own. Those that
/// need something that is not here are marked `console`.
#[cfg(unix)]
#[test]
fn the_commands_of_the_pages_run() {
    let place = tempfile::tempdir().unwrap();
    let programs = Path::new(env!("CARGO_BIN_EXE_fewbit")).parent().unwrap().to_owned();
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths([programs].into_iter().chain(std::env::split_paths(&path)));
    let path = path.unwrap();
    let mut run = BTreeSet::new();
    for page in stems("docs", "md") {
        let folder = place.path().join(&page);
        std::fs::create_dir(&folder).unwrap();
        for commands in fences(&text(&format!("docs/{page}.md"))) {
            let mut shell = std::process::Command::new("sh");
            let shell = shell.args(["-ec", &commands]).current_dir(&folder).env("PATH", &path);
            let shell = shell.env("XDG_CACHE_HOME", place.path().join("cache"));
            let ended = shell.env("HF_HUB_OFFLINE", "1").output().unwrap();
            let said = String::from_utf8_lossy(&ended.stderr);
            assert!(ended.status.success(), "docs/{page}.md:\n{commands}\n{said}");
            run.insert(page.clone());
        }
    }
    assert!(run.contains("get-started"), "docs/get-started.md shows no command");
}

#[test]
fn every_page_is_in_the_book() {
    let mut pages = stems("docs", "md");
    assert!(pages.remove("SUMMARY"));
    let pages: BTreeSet<String> = pages.into_iter().map(|page| format!("{page}.md")).collect();
    assert_eq!(links(&text("docs/SUMMARY.md")).into_iter().collect::<BTreeSet<_>>(), pages);
}

#[test]
fn links_lead_somewhere() {
    let pages = stems("docs", "md").into_iter().map(|page| format!("docs/{page}.md"));
    let mut broken = Vec::new();
    for page in pages.chain(["README.md".to_owned(), "CONTRIBUTING.md".to_owned()]) {
        for link in links(&text(&page)) {
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((&link, ""));
            let target = match file {
                "" => root().join(&page),
                file => root().join(&page).parent().unwrap().join(file),
            };
            let leads = target.exists()
                && (anchor.is_empty()
                    || anchors(&std::fs::read_to_string(&target).unwrap()).contains(anchor));
            if !leads {
                broken.push(format!("{page}: {link}"));
            }
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
}

/// What stands in the fences of a page that are marked `sh`.
#[cfg(unix)]
fn fences(page: &str) -> Vec<String> {
    let fences = page.split("\n```sh\n").skip(1);
    fences.map(|rest| rest.split("\n```").next().unwrap().to_owned()).collect()
}

/// A page without its fences.
fn prose(page: &str) -> String {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in page.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// Where the links of a page lead, those in code left out.
fn links(page: &str) -> Vec<String> {
    let prose: String = prose(page).split('`').step_by(2).collect();
    let ends = prose.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    ends.map(|(to, _)| to.to_owned()).collect()
}

/// The names of a page's headings as mdBook and GitHub make them.
fn anchors(page: &str) -> BTreeSet<String> {
    let mut anchors = BTreeSet::new();
    for title in prose(page).lines().filter(|line| line.starts_with('#')) {
        let kept = title.trim_start_matches('#').trim().chars().filter_map(|c| match c {
            '_' | '-' => Some(c),
            c if c.is_whitespace() => Some('-'),
            c => c.is_alphanumeric().then(|| c.to_ascii_lowercase()),
        });
        let name: String = kept.collect();
        let others = (1..).map(|n| format!("{name}-{n}"));
        let free = [name.clone()].into_iter().chain(others).find(|name| !anchors.contains(name));
        anchors.extend(free);
    }
    anchors
}

/// A file of the repository.
fn text(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap()
}

/// One section per method, in the order of the `methods!` list.
fn reference() -> String {
    let recipes = recipes();
    let mut text = String::new();
    for key in keys() {
        let head = head(&key);
        let (title, rest) = head.split_once("\n\n").unwrap_or_else(|| panic!("{key}.rs: no text"));
        let name = title.split([':', ',']).next().unwrap().split(" (").next().unwrap();
        let _ = write!(text, "### {name}: `{key}`\n\n{title}\n\n");
        let (body, more) = rest.split_once("\n\n").unwrap_or((rest, ""));
        for (field, words) in fields(&key, body) {
            let _ = writeln!(text, "- *{field}:* {words}");
        }
        if !more.is_empty() {
            let _ = write!(text, "\n{more}\n");
        }
        let used_by = recipes.iter().filter(|(_, methods)| methods.contains(&key));
        let used_by: Vec<String> =
            used_by.map(|(name, _)| format!("recipes/{name}.toml")).collect();
        let _ = write!(text, "\nRecipe: {}\n\n", used_by.join(", "));
    }
    text
}

/// The fields of a head comment's second paragraph.
fn fields<'a>(key: &str, body: &'a str) -> Vec<(&'static str, &'a str)> {
    let mut starts = Vec::new();
    for field in FIELDS {
        let mark = format!("*{field}:* ");
        let at = body.find(&mark);
        let at = at.unwrap_or_else(|| panic!("src/method/{key}.rs: no {mark:?} in its head"));
        starts.push((field, at, at + mark.len()));
    }
    assert!(starts.is_sorted_by_key(|(_, at, _)| *at), "src/method/{key}.rs: fields out of order");
    assert_eq!(starts[0].1, 0, "src/method/{key}.rs: text before the first field");
    let ends = starts[1..].iter().map(|(_, at, _)| *at).chain([body.len()]);
    starts.iter().zip(ends).map(|((field, _, from), to)| (*field, body[*from..to].trim())).collect()
}

/// A file's head comment: each paragraph one line.
fn head(key: &str) -> String {
    let text = std::fs::read_to_string(root().join(format!("src/method/{key}.rs"))).unwrap();
    let lines = text.lines().map_while(|line| line.strip_prefix("//!")).map(str::trim);
    let lines: Vec<&str> = lines.collect();
    let paragraphs = lines.split(|line| line.is_empty()).map(|lines| lines.join(" "));
    paragraphs.collect::<Vec<String>>().join("\n\n")
}

/// Recipe keys in the order of the `methods!` list.
fn keys() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("src/method/mod.rs")).unwrap();
    let (_, list) = text.split_once("\nmethods! {").unwrap();
    let rows = list.lines().filter(|line| line.trim_end().ends_with("Config },"));
    let keys: Vec<String> = rows.map(|row| row.split('"').nth(1).unwrap().to_owned()).collect();
    assert!(!keys.is_empty());
    keys
}

/// The methods that each recipe names.
fn recipes() -> BTreeMap<String, BTreeSet<String>> {
    let mut recipes = BTreeMap::new();
    for name in stems("recipes", "toml") {
        let text = std::fs::read_to_string(root().join(format!("recipes/{name}.toml"))).unwrap();
        let methods = text.lines().filter_map(|line| line.strip_prefix("method."));
        let methods = methods.map(|line| line.split(' ').next().unwrap().to_owned()).collect();
        recipes.insert(name, methods);
    }
    recipes
}

/// Names of the files in a folder, without their extension.
fn stems(folder: &str, extension: &str) -> BTreeSet<String> {
    let entries = std::fs::read_dir(root().join(folder)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let paths = paths.filter(|path| path.extension().is_some_and(|found| found == extension));
    paths.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}
