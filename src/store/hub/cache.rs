//! The cache that the hub's own tools share: content under its hash, snapshots of links to it, and the commit
//! that each revision stood for.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};

use super::Id;
use crate::error::{Error, Result};
use crate::store::folder::write_atomic;

/// The folder of one model in the cache.
pub(super) struct Cache {
    root: PathBuf,
    locks: PathBuf,
}

impl Cache {
    pub(super) fn of(id: &Id<'_>) -> Self {
        let hub = variable("HF_HUB_CACHE")
            .or_else(|| variable("HUGGINGFACE_HUB_CACHE"))
            .map_or_else(|| home().join("hub"), PathBuf::from);
        let kind = if id.is_data { "datasets" } else { "models" };
        let name = format!("{kind}--{}--{}", id.owner, id.name);
        Self { locks: hub.join(".locks").join(&name), root: hub.join(name) }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// The snapshot that a revision stood for when it was last got.
    pub(super) fn snapshot_of(&self, revision: &str) -> Option<PathBuf> {
        let commit = std::fs::read_to_string(self.reference(revision)).ok();
        let commit = commit.as_deref().map_or(revision, str::trim);
        let snapshot = self.snapshot(commit);
        (is_commit(commit) && snapshot.is_dir()).then_some(snapshot)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// Where content of this hash lies once it is whole.
    pub(super) fn blob(&self, hash: &str) -> PathBuf {
        self.root.join("blobs").join(hash)
    }

    /// Where it lies until then.
    pub(super) fn part(&self, hash: &str) -> PathBuf {
        self.root.join("blobs").join(format!("{hash}.incomplete"))
    }

    /// Keeps other processes from the same content for as long as the file is held.
    pub(super) fn lock(&self, hash: &str, waiting: impl FnOnce()) -> Result<File> {
        let path = self.locks.join(format!("{hash}.lock"));
        make_parent(&path)?;
        let file = File::create(&path).map_err(|e| Error::io("create", &path, &e))?;
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            waiting();
            file.lock().map_err(|e| Error::io("lock", &path, &e))?;
        }
        Ok(file)
    }

    /// Gives a blob its name in a snapshot.
    pub(super) fn link(&self, commit: &str, name: &str, hash: &str) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        make_parent(&path)?;
        if path.is_file() {
            return Ok(());
        }
        let _ = std::fs::remove_file(&path); // a link to what is gone
        let linked = link_or_copy(&self.blob(hash), &path, name, hash);
        linked.map_err(|e| Error::io("create", &path, &e))
    }

    /// Notes which commit a revision stands for.
    pub(super) fn note(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.reference(revision);
        make_parent(&path)?;
        write_atomic(&path, commit.as_bytes())
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.root.join("refs").join(revision)
    }
}

pub(super) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(path);
    std::fs::create_dir_all(parent).map_err(|e| Error::io("create", parent, &e))
}

/// Whether a word is a commit's full hash.
pub(super) fn is_commit(word: &str) -> bool {
    word.len() == 40 && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The token: `HF_TOKEN`, or what `hf auth login` left.
pub(super) fn token() -> Option<String> {
    if variable("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some() {
        return None;
    }
    let file = || {
        let path = variable("HF_TOKEN_PATH").map_or_else(|| home().join("token"), PathBuf::from);
        std::fs::read_to_string(path).ok()
    };
    let token = variable("HF_TOKEN").or_else(|| variable("HUGGING_FACE_HUB_TOKEN"));
    let token = token.or_else(file)?.trim().to_owned();
    (!token.is_empty()).then_some(token)
}

/// An environment variable that is set to something.
pub(super) fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.trim().is_empty())
}

/// `$HF_HOME`, or `huggingface` in the user's cache folder.
fn home() -> PathBuf {
    let cache = || {
        variable("XDG_CACHE_HOME")
            .map(PathBuf::from)
            .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
            .unwrap_or_else(std::env::temp_dir)
            .join("huggingface")
    };
    variable("HF_HOME").map_or_else(cache, PathBuf::from)
}

/// Relative, so that the cache may be moved.
#[cfg(unix)]
fn link_or_copy(_blob: &Path, path: &Path, name: &str, hash: &str) -> std::io::Result<()> {
    // From the file's folder to the model's.
    let up = "../".repeat(2 + name.matches('/').count());
    std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(hash), path)
}

/// Links need a privilege on this system.
#[cfg(not(unix))]
fn link_or_copy(blob: &Path, path: &Path, _name: &str, _hash: &str) -> std::io::Result<()> {
    let part = path.with_extension("incomplete");
    std::fs::copy(blob, &part)?;
    std::fs::rename(part, path)
}
