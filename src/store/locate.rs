//! From what a user types to a local path: a folder, a built-in file, a run, a hub id.

use std::path::{Path, PathBuf};

use hf_hub::HFClientSync;

use super::embedded;
use crate::error::{Error, Result};

/// Files of a hub repository that are worth downloading.
const HUB_PATTERNS: [&str; 4] = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"];

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
        Some((owner, repository, revision)) => download(owner, repository, revision),
        None => Err(Error::usage("there is no such model").at(name).fix(
            "a Hugging Face folder, a GGUF file, a fewbit run or export, or a hub id owner/name",
        )),
    }
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
    let word = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    (word(owner) && word(repository)).then_some((owner, repository, revision))
}

fn download(owner: &str, repository: &str, revision: Option<&str>) -> Result<PathBuf> {
    let offline = std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !v.is_empty() && v != "0");
    let fail = |error: hf_hub::HFError| {
        let error = Error::failed(format!("cannot get the model from the hub: {error}"))
            .at(format!("{owner}/{repository}"));
        error.fix(if offline {
            "HF_HUB_OFFLINE is set: unset it, or give a local folder"
        } else {
            "check the id, the network and HF_TOKEN, or give a local folder"
        })
    };
    let client = HFClientSync::new().map_err(fail)?;
    client
        .model(owner, repository)
        .snapshot_download()
        .maybe_revision(revision.map(str::to_owned))
        .allow_patterns(HUB_PATTERNS.map(str::to_owned).to_vec())
        .local_files_only(offline)
        .send()
        .map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids() {
        assert_eq!(hub_id("meta/Llama-3.2-1B"), Some(("meta", "Llama-3.2-1B", None)));
        assert_eq!(hub_id("a/b@v1"), Some(("a", "b", Some("v1"))));
        for no in ["a", "a/b/c", "./x", "../x", "/x/y", "a /b", ""] {
            assert_eq!(hub_id(no), None, "{no}");
        }
    }

    #[test]
    fn a_missing_path_is_a_usage_error() {
        assert_eq!(model("no-such-model").unwrap_err().kind().exit_code(), 2);
        assert_eq!(data("no-such-file.json").unwrap_err().kind().exit_code(), 2);
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
