//! The files of an exported folder against its manifest: each as it was written, and no other among them.

use std::collections::BTreeMap;
use std::path::Path;

use super::manifest::{Manifest, is_weights};
use crate::error::{Error, Result};
use crate::store::folder::{entries, sha256_file};

impl Manifest {
    /// Refuses a folder with a file that the manifest does not name, or whose hash of it is another.
    /// Files whose names begin with a dot are others' business.
    ///
    /// # Errors
    /// Names the file.
    pub fn check_files(&self, dir: &Path) -> Result<()> {
        self.check_small_files(dir)?;
        self.check_weight_files(dir)
    }

    /// All but the files of weights, whose damage the hashes of tensors name more closely.
    ///
    /// # Errors
    /// As [`Manifest::check_files`].
    pub fn check_small_files(&self, dir: &Path) -> Result<()> {
        for path in entries(dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if !name.starts_with('.') && !self.covers(&name) {
                let what = "the folder holds a file that its manifest does not name";
                return Err(Error::damaged(what, "move it away, or export the run again")
                    .at(path.display()));
            }
        }
        check(self.files.iter().filter(|(name, _)| !is_weights(name)), dir)
    }

    /// The files of weights; older manifests have no hashes of them.
    ///
    /// # Errors
    /// As [`Manifest::check_files`].
    pub fn check_weight_files(&self, dir: &Path) -> Result<()> {
        check(self.files.iter().filter(|(name, _)| is_weights(name)), dir)
    }
}

fn check<'a>(files: impl Iterator<Item = (&'a String, &'a String)>, dir: &Path) -> Result<()> {
    for (name, sha256) in files {
        let path = dir.join(name);
        let here = Path::new(name).file_name().is_some_and(|own| own == name.as_str());
        if !here || !path.is_file() {
            return Err(damaged("a file that the manifest names is missing", dir, name));
        }
        if sha256_file(&path)? != *sha256 {
            return Err(damaged("a file does not match its hash", dir, name));
        }
    }
    Ok(())
}

/// The hashes of a written folder's files of weights.
///
/// # Errors
/// When one cannot be read.
pub(super) fn weight_files(dir: &Path) -> Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for path in entries(dir)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if is_weights(&name) {
            hashes.insert(name, sha256_file(&path)?);
        }
    }
    Ok(hashes)
}

fn damaged(what: &str, dir: &Path, name: &str) -> Error {
    Error::damaged(what, "export the run again").at(dir.display()).at(name)
}
