//! The files of a task with rows of its own.

use std::path::{Path, PathBuf};

use crate::data::{Paths, sha256_of};
use crate::error::{Error, Result};
use crate::store::folder::entries;
use crate::store::locate;

/// How files of rows end.
const ENDINGS: [&str; 5] = ["csv", "json", "jsonl", "ndjson", "parquet"];

/// The key of a task that names its rows.
pub const DATA: &str = "data";

/// What a task is measured on.
#[derive(Clone, Debug)]
pub enum Source<'a> {
    /// The validation text: `Material::text`.
    Text,
    /// Rows of files of its own, by the key that names them: `Material::files`. The key [`DATA`] names
    /// what is measured; nothing but the command line may fill it.
    Rows(Vec<(&'static str, Option<&'a Paths>)>),
}

/// The files of a task's rows, found.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Files {
    keys: Vec<(&'static str, Vec<PathBuf>)>,
    /// SHA-256 of all of them; empty where there is none.
    pub sha256: String,
    /// What the measured rows go by in reports.
    pub name: String,
}

impl Files {
    /// Finds and hashes what a task names; nothing for one on text. A folder stands for its files of rows,
    /// by name.
    ///
    /// # Errors
    /// When nothing is called so, a folder holds no rows, or a file cannot be read.
    pub fn find(source: &Source<'_>) -> Result<Self> {
        let Source::Rows(keys) = source else { return Ok(Self::default()) };
        let mut found = Self::default();
        for (key, paths) in keys {
            let Some(paths) = paths else { continue };
            let files = paths.0.iter().map(|name| files_of(name));
            let files: Vec<Vec<PathBuf>> =
                files.collect::<Result<_>>().map_err(|error| error.at(*key))?;
            found.keys.push((key, files.concat()));
            if *key == DATA {
                found.name = name_of(paths);
            }
        }
        let all: Vec<&PathBuf> = found.keys.iter().flat_map(|(_, files)| files).collect();
        if !all.is_empty() {
            found.sha256 = sha256_of(&all)?;
        }
        Ok(found)
    }

    /// The files that a key names.
    pub fn of(&self, key: &str) -> Option<&[PathBuf]> {
        self.keys.iter().find(|(known, _)| *known == key).map(|(_, files)| &files[..])
    }
}

/// The last parts of the names, joined.
fn name_of(paths: &Paths) -> String {
    let last = |path: &String| {
        let path = path.trim_end_matches('/');
        path.rsplit('/').next().unwrap_or(path).to_owned()
    };
    paths.0.iter().map(last).collect::<Vec<_>>().join("+")
}

fn files_of(name: &str) -> Result<Vec<PathBuf>> {
    let folder = Path::new(name);
    if !folder.is_dir() {
        return Ok(vec![locate::data(name)?]);
    }
    let mut files = entries(folder)?;
    let known = |path: &PathBuf| {
        let ending = path.extension().and_then(|ending| ending.to_str());
        path.is_file() && ending.is_some_and(|ending| ENDINGS.contains(&ending))
    };
    files.retain(known);
    files.sort();
    if files.is_empty() {
        return Err(Error::usage("the folder holds no rows")
            .at(folder.display())
            .fix(format!("a folder with files of these kinds: {}", ENDINGS.join(", "))));
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_stands_for_its_files() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.csv", "a.csv", "notes.md"] {
            std::fs::write(dir.path().join(name), name).unwrap();
        }
        let paths = Paths(vec![dir.path().display().to_string()]);
        let found = Files::find(&Source::Rows(vec![(DATA, Some(&paths))])).unwrap();
        let expected = [dir.path().join("a.csv"), dir.path().join("b.csv")];
        assert_eq!(found.of(DATA).unwrap(), expected);
        assert_eq!(found.of("examples"), None);
        assert_eq!(found.sha256, sha256_of(&expected).unwrap());
        std::fs::remove_file(&expected[0]).unwrap();
        std::fs::remove_file(&expected[1]).unwrap();
        let error = Files::find(&Source::Rows(vec![(DATA, Some(&paths))])).unwrap_err();
        assert_eq!(error.what(), "the folder holds no rows");
        assert_eq!(Files::find(&Source::Text).unwrap(), Files::default());
    }
}
