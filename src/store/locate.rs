//! From what a user types to a local path: a folder, a built-in file, a run, a hub id.

use std::path::{Path, PathBuf};

use super::{embedded, hub};
use crate::error::{Error, Result};

/// What a model may be, for a message.
const FORMS: &str =
    "a Hugging Face folder, a GGUF file, a fewbit run or export, or a hub id owner/name";

/// The folder of a model: an existing path, `embedded:NAME`, a fewbit run (its packed export), or
/// a hub id `owner/name[@revision]`. An existing path never touches the network.
///
/// # Errors
/// When nothing of this name is found.
pub fn model(name: &str) -> Result<PathBuf> {
    if let Some(built_in) = name.strip_prefix(embedded::SCHEME) {
        return embedded::extract(built_in);
    }
    let path = Path::new(name);
    if path.join("run.json").is_file() {
        return run_export(path);
    }
    if path.exists() {
        return Ok(path.to_owned());
    }
    match hub_id(name) {
        Some((owner, name, revision)) => {
            let near = near(path).map(|near| near.display().to_string());
            let revision = revision.unwrap_or("main");
            hub::snapshot(&hub::Id { owner, name, revision, near, is_data: false })
        }
        None => Err(no_such_folder(name)),
    }
}

/// Why a name that is no hub id leads nowhere.
fn no_such_folder(name: &str) -> Error {
    let path = Path::new(name);
    if name.contains("://") {
        // Not repeated: an address may hold an account and its password.
        return Error::usage("a model is named by a path or an id, not by an address")
            .at("model")
            .fix("the id alone: owner/name");
    }
    let error = |what: &str| Error::usage(what).at(name);
    if name.starts_with('~') {
        return error("there is no such folder: `~` is a name like another here")
            .fix("the path from / on; a shell replaces ~ only where it begins a word, unquoted");
    }
    match near(path) {
        Some(near) => error("there is no such folder").fix(near.display().to_string()),
        None if name.contains(['/', '\\']) => {
            error("there is no such folder").fix("check the path")
        }
        None => error("there is no such model").fix(FORMS),
    }
}

/// A path that exists and is spelt almost as this one, which does not.
fn near(path: &Path) -> Option<PathBuf> {
    let mut found = PathBuf::new();
    for part in path.components() {
        let exact = found.join(part);
        if exact.exists() {
            found = exact;
            continue;
        }
        let wanted = part.as_os_str().to_str()?.to_lowercase();
        let folder = if found.as_os_str().is_empty() { Path::new(".") } else { &found };
        let names = std::fs::read_dir(folder).ok()?.flatten();
        let names = names.filter_map(|entry| entry.file_name().into_string().ok());
        let edits = |name: &String| strsim::damerau_levenshtein(&wanted, &name.to_lowercase());
        let scored = names.map(|name| (edits(&name), name));
        let (edits, nearest) = scored.min()?;
        // A third of it may be wrong; of the shortest names nothing.
        if edits > wanted.chars().count() / 3 {
            return None;
        }
        found = found.join(nearest);
    }
    Some(found)
}

/// The path of a data file: an existing path or `embedded:NAME/FILE`.
///
/// # Errors
/// When there is no such file.
pub fn data(name: &str) -> Result<PathBuf> {
    if let Some(built_in) = name.strip_prefix(embedded::SCHEME) {
        return embedded::extract(built_in);
    }
    let path = PathBuf::from(name);
    if path.is_file() {
        return Ok(path);
    }
    let (what, fix) = if path.is_dir() {
        ("this is a folder, and data is a file", "a file in it, or a list of them")
    } else if path.exists() {
        ("this is a pipe or a device, and data is read more than once", "write it to a file first")
    } else {
        ("there is no such data file", "check the path")
    };
    Err(Error::usage(what).at(name).fix(fix))
}

/// The paths of data: a file, `embedded:NAME/FILE`, or files of a data set of the hub,
/// `hub:owner/name[@revision][/FILE]`.
///
/// # Errors
/// As [`data`], and those of the hub.
pub fn data_files(name: &str) -> Result<Vec<PathBuf>> {
    match name.strip_prefix(hub::SCHEME) {
        Some(id) => data_set(id).map_err(|error| error.or_at(Path::new(name))),
        None => data(name).map(|path| vec![path]),
    }
}

/// The files of a data set of the hub.
fn data_set(name: &str) -> Result<Vec<PathBuf>> {
    let mut parts = name.splitn(3, '/');
    let (owner, repository, files) = (parts.next(), parts.next(), parts.next());
    let id = format!("{}/{}", owner.unwrap_or_default(), repository.unwrap_or_default());
    let Some((owner, name, revision)) = hub_id(&id) else {
        return Err(Error::usage("this is no data set of the hub")
            .fix("hub:owner/name, or hub:owner/name@revision/FILE"));
    };
    let revision = revision.unwrap_or("main");
    hub::data_set(&hub::Id { owner, name, revision, near: None, is_data: true }, files)
}

/// Checks the path of a file to be written: it has a name, and the folder it goes to exists.
///
/// # Errors
/// A usage error that names the folder or the path.
pub fn output_file(path: &Path) -> Result<()> {
    if path.file_name().is_none() || path.is_dir() {
        return Err(Error::usage("the output needs the name of a file")
            .at(format!("{:?}", path.display().to_string()))
            .fix("end the path in a file name"));
    }
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
            Err(Error::usage("there is no such folder to write to")
                .at(folder.display())
                .fix("create it first, or check the path"))
        }
        _ => Ok(()),
    }
}

/// The folder that stands for a run: its packed export before its dense one.
fn run_export(run: &Path) -> Result<PathBuf> {
    ["fewbit", "dequantized"]
        .iter()
        .map(|format| run.join("export").join(format))
        .find(|path| path.is_dir())
        .ok_or_else(|| {
            Error::usage("this run has exported nothing yet")
                .at(run.display())
                .fix("the same `fewbit train` command to finish it")
        })
}

/// `owner/name[@revision]`, in the hub's alphabet; a path with more or fewer parts is no id.
fn hub_id(name: &str) -> Option<(&str, &str, Option<&str>)> {
    let (id, revision) = match name.split_once('@') {
        Some((id, revision)) => (id, Some(revision)),
        None => (name, None),
    };
    let (owner, repository) = id.split_once('/')?;
    let alphabet =
        |part: &str| part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c));
    let word = |part: &str| !part.is_empty() && !part.starts_with('.') && alphabet(part);
    // A revision may be a path (refs/pr/1), but not out of the cache.
    let branch = |revision: &str| revision.split('/').all(word);
    (word(owner) && word(repository) && revision.is_none_or(branch))
        .then_some((owner, repository, revision))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids() {
        assert_eq!(hub_id("meta/Llama-3.2-1B"), Some(("meta", "Llama-3.2-1B", None)));
        assert_eq!(hub_id("a/b@v1"), Some(("a", "b", Some("v1"))));
        assert_eq!(hub_id("a/b@refs/pr/1"), Some(("a", "b", Some("refs/pr/1"))));
        for no in ["a", "a/b/c", "./x", "../x", "/x/y", "a /b", "", "a/b@", "a/b@../../x", "a/b@/x"]
        {
            assert_eq!(hub_id(no), None, "{no}");
        }
    }

    #[test]
    fn a_missing_path_is_a_usage_error() {
        assert_eq!(model("no-such-model").unwrap_err().kind().exit_code(), 2);
        assert_eq!(data("no-such-file.json").unwrap_err().kind().exit_code(), 2);
    }

    #[test]
    fn the_nearest_path_is_one_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("models/llama-3")).unwrap();
        let near = |name: &str| near(&dir.path().join(name));
        let right = dir.path().join("models/llama-3");
        for wrong in ["modles/llama-3", "models/Lama-3", "model/llama3"] {
            assert_eq!(near(wrong).as_ref(), Some(&right), "{wrong}");
        }
        assert_eq!(near("models/qwen"), None);
        assert_eq!(near("data/x"), None);
    }

    #[test]
    fn an_address_is_not_repeated() {
        let error = model("https://me:hf_secret@huggingface.co/a/b").unwrap_err();
        assert!(!error.to_string().contains("hf_secret"), "{error}");
    }

    #[test]
    fn a_file_is_written_only_to_a_folder_that_exists() {
        let dir = tempfile::tempdir().unwrap();
        for good in [dir.path().join("new.toml"), PathBuf::from("new.toml")] {
            output_file(&good).unwrap();
        }
        for bad in [dir.path().join("none").join("new.toml"), dir.path().into(), "".into()] {
            assert_eq!(output_file(&bad).unwrap_err().kind().exit_code(), 2, "{}", bad.display());
        }
    }
}
