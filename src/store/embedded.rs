//! Files built into the binary: the small real model and text of the default recipes.
//!
//! `embedded:NAME/...` in a recipe or on the command line stands for one of them. It is written
//! once into the user's cache folder, because readers want files, and checked on every use.

use std::path::{Path, PathBuf};

use super::folder::write_atomic;
use crate::error::{Error, Result};

/// What a path starts with to mean a built-in file.
pub const SCHEME: &str = "embedded:";

macro_rules! embed {
    ($($path:literal),* $(,)?) => {
        &[$(($path, include_bytes!(concat!("../../datasets/", $path)))),*]
    };
}

const FILES: &[(&str, &[u8])] = embed![
    "e2e_nlg/train.jsonl",
    "e2e_nlg/validation.jsonl",
    "tinyshakespeare/train.json",
    "tinyshakespeare/validation.json",
    "tinystories-656k/config.json",
    "tinystories-656k/generation_config.json",
    "tinystories-656k/model.safetensors",
    "tinystories-656k/special_tokens_map.json",
    "tinystories-656k/tokenizer.json",
    "tinystories-656k/tokenizer_config.json",
    "tinystories/calibration.json",
    "tinystories/train.json",
    "tinystories/validation.json",
];

/// The local path of `embedded:name`, written out first where needed.
///
/// # Errors
/// When nothing of this name is built in, or the cache folder cannot be written.
pub fn extract(name: &str) -> Result<PathBuf> {
    let name = name.trim_end_matches('/');
    let wanted: Vec<_> =
        FILES.iter().filter(|(path, _)| Path::new(path).starts_with(name)).collect();
    if wanted.is_empty() || name.is_empty() {
        let mut known: Vec<&str> = FILES.iter().map(|(path, _)| *path).collect();
        known.insert(0, "tinystories-656k");
        known.retain(|path| !path.starts_with("tinystories-656k/"));
        return Err(Error::usage(format!("nothing called `{name}` is built in"))
            .fix(format!("one of: {}", known.join(", "))));
    }
    let root = cache_root();
    write_out(&root, wanted.into_iter().map(|(path, bytes)| (*path, *bytes)))?;
    Ok(root.join(name))
}

/// The cache's folder `name` with these files in it, by name; what is there already and differs is
/// written anew.
///
/// # Errors
/// When the cache folder cannot be written.
pub fn cached<'a>(name: &str, files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<PathBuf> {
    let root = cache_root().join(name);
    write_out(&root, files)?;
    Ok(root)
}

fn write_out<'a>(root: &Path, files: impl Iterator<Item = (&'a str, &'a [u8])>) -> Result<()> {
    for (path, bytes) in files {
        let target = root.join(path);
        if std::fs::read(&target).is_ok_and(|found| found == bytes) {
            continue;
        }
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, &e))?;
        }
        write_atomic(&target, bytes)?;
    }
    Ok(())
}

/// `$XDG_CACHE_HOME/fewbit/VERSION`, or under `~/.cache`, or under the temporary folder.
pub(super) fn cache_root() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    set("XDG_CACHE_HOME")
        .or_else(|| set("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("fewbit")
        .join(env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_lists_what_there_is() {
        let error = extract("tinystores").unwrap_err().to_string();
        assert!(error.contains("tinystories-656k") && error.contains("train.json"), "{error}");
        assert!(extract("").is_err());
    }

    #[test]
    fn every_file_is_there_and_not_empty() {
        assert!(FILES.iter().all(|(_, bytes)| !bytes.is_empty()));
    }
}
