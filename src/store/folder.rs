//! Files and folders that appear either whole or not at all.
//!
//! A file is written under a temporary name in its own folder, synced and renamed. A folder is
//! filled beside its target and moved into place by [`StagedFolder::commit`]. Killing the process
//! or cutting the power at any moment leaves the old content, the new content, or a leftover that
//! the next [`StagedFolder::create`] cleans up.

mod file;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

pub use self::file::{bytes_below, free_bytes, sha256_file, write_atomic};
use self::file::{parent_of, sync_folder, utf8_name};
pub(crate) use self::file::{sha256_with, write_atomic_with};
use crate::error::{Error, Result};

/// Staged folders of this process, so that a leftover whose process id happens to be ours (usual
/// in containers) is told from a folder that another thread is filling.
static STAGED: Mutex<BTreeSet<PathBuf>> = Mutex::new(BTreeSet::new());

/// A folder that is filled out of sight and takes the target's place in one step.
///
/// Dropped without [`StagedFolder::commit`], it is removed and the target stays as it was.
#[derive(Debug)]
pub struct StagedFolder {
    staged: PathBuf,
    old: PathBuf,
    target: PathBuf,
}

impl StagedFolder {
    /// Makes `.<name>.partial-<pid>` beside `final_path`, with the parents it needs. Leftovers of
    /// runs that ended are cleaned first; a target that such a run had moved away is put back.
    ///
    /// # Errors
    /// When the target exists and is no folder, when this process is already filling the same
    /// target, and on I/O errors.
    pub fn create(final_path: &Path) -> Result<Self> {
        let target = resolve(final_path)?;
        let name = utf8_name(&target)?;
        let pid = std::process::id();
        let staged = target.with_file_name(format!(".{name}.partial-{pid}"));
        let old = target.with_file_name(format!(".{name}.old-{pid}"));
        {
            let mut live = STAGED.lock().unwrap_or_else(PoisonError::into_inner);
            if !live.insert(staged.clone()) {
                return Err(Error::failed("this run is already writing the folder")
                    .at(target.display())
                    .fix("give each output its own folder"));
            }
        }
        // From here on `Drop` gives the claim back, also when the next lines fail.
        let folder = Self { staged, old, target };
        clean_leftovers(&folder.target)?;
        fs::create_dir(&folder.staged)
            .map_err(|source| Error::io("create", &folder.staged, &source))?;
        Ok(folder)
    }

    /// The folder to fill.
    pub fn path(&self) -> &Path {
        &self.staged
    }

    /// Syncs every file, then replaces the target.
    ///
    /// # Errors
    /// On I/O errors; the target is then as it was and the staged folder is removed.
    pub fn commit(self) -> Result<()> {
        sync_tree(&self.staged)?;
        swap_in(&self.staged, &self.target, &self.old)?;
        sync_folder(parent_of(&self.target))?;
        // The new folder is in place; an old one that resists is cleaned by the next `create`.
        let _ = remove_any(&self.old);
        Ok(())
    }
}

impl Drop for StagedFolder {
    fn drop(&mut self) {
        // After a commit nothing is left under this name.
        let _ = remove_any(&self.staged);
        STAGED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.staged);
    }
}

/// The real path of a target folder: its parent exists afterwards, and a link to a folder is
/// followed, so that the folder is replaced on the disk where it lies and not the link.
fn resolve(final_path: &Path) -> Result<PathBuf> {
    let name = utf8_name(final_path)?;
    let parent = parent_of(final_path);
    fs::create_dir_all(parent).map_err(|source| Error::io("create", parent, &source))?;
    let parent = parent.canonicalize().map_err(|source| Error::io("resolve", parent, &source))?;
    let mut target = parent.join(name);
    if target.is_symlink() {
        target = target.canonicalize().map_err(|source| Error::io("resolve", &target, &source))?;
    }
    if exists(&target) && !target.is_dir() {
        return Err(Error::failed("the output exists and is not a folder")
            .at(target.display())
            .fix("choose another output folder, or move this file away"));
    }
    Ok(target)
}

/// Removes what dead runs left beside `target`. If the target itself is gone, the newest folder
/// that a dead run had moved away is put back first.
fn clean_leftovers(target: &Path) -> Result<()> {
    let name = utf8_name(target)?;
    let parent = parent_of(target);
    let failed = |source| Error::io("read", parent, &source);
    let (mut partial, mut old) = (Vec::new(), Vec::new());
    for entry in fs::read_dir(parent).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let file_name = entry.file_name();
        let Some(file_name) = file_name.to_str() else { continue };
        if leftover_pid(file_name, name, ".partial-").is_some_and(is_dead) {
            partial.push(entry.path());
        } else if leftover_pid(file_name, name, ".old-").is_some_and(is_dead) {
            let modified = entry.metadata().and_then(|data| data.modified());
            old.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), entry.path()));
        }
    }
    old.sort();
    if !exists(target)
        && let Some((_, newest)) = old.pop()
    {
        fs::rename(&newest, target).map_err(|source| Error::io("restore", &newest, &source))?;
    }
    for leftover in partial.iter().chain(old.iter().map(|(_, path)| path)) {
        remove_any(leftover).map_err(|source| Error::io("remove", leftover, &source))?;
    }
    Ok(())
}

/// The process id in `.<name><marker><pid>`; `None` for any other name.
fn leftover_pid(file_name: &str, name: &str, marker: &str) -> Option<u32> {
    let digits = file_name.strip_prefix('.')?.strip_prefix(name)?.strip_prefix(marker)?;
    let pid: u32 = digits.parse().ok()?;
    // Only our own spelling: no sign, no leading zeros.
    (pid.to_string() == digits).then_some(pid)
}

/// Whether leftovers of process `pid` belong to nobody. Our own id counts as dead, since
/// [`STAGED`] has already told that no other thread is at it.
fn is_dead(pid: u32) -> bool {
    pid == std::process::id() || !is_running(pid)
}

#[cfg(unix)]
pub(crate) fn is_running(pid: u32) -> bool {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else {
        return false;
    };
    // "No permission" also means that the process exists.
    rustix::process::test_kill_process(pid) != Err(rustix::io::Errno::SRCH)
}

/// Where processes cannot be asked for, leftovers are kept: that costs space, never data.
#[cfg(not(unix))]
pub(crate) fn is_running(_pid: u32) -> bool {
    true
}

/// Moves `target` to `old` if it exists, and `staged` to `target`. If the second move fails, the
/// first is undone.
fn swap_in(staged: &Path, target: &Path, old: &Path) -> Result<()> {
    let failed = |source| Error::io("replace", target, &source);
    let replaces = exists(target);
    if replaces {
        fs::rename(target, old).map_err(failed)?;
    }
    fs::rename(staged, target).map_err(|source| {
        let error = failed(source);
        if replaces && fs::rename(old, target).is_err() {
            return error.fix(format!("rename {} back by hand", old.display()));
        }
        error
    })
}

/// Syncs every file and folder under `folder`, and `folder` itself. Links are left alone.
fn sync_tree(folder: &Path) -> Result<()> {
    let failed = |source| Error::io("read", folder, &source);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let (path, kind) = (entry.path(), entry.file_type().map_err(failed)?);
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            sync_file(&path).map_err(|source| Error::io("sync", &path, &source))?;
        }
    }
    sync_folder(folder)
}

/// Windows syncs only handles that may write.
fn sync_file(path: &Path) -> io::Result<()> {
    let file = if cfg!(windows) {
        fs::OpenOptions::new().write(true).open(path)?
    } else {
        File::open(path)?
    };
    file.sync_all()
}

/// The paths in a folder, sorted.
///
/// # Errors
/// When the folder cannot be read.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths = fs::read_dir(folder).and_then(|entries| {
        entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<PathBuf>>>()
    });
    let mut paths = paths.map_err(|source| Error::io("list", folder, &source))?;
    paths.sort();
    Ok(paths)
}

/// Whether anything has this name, a broken link included.
fn exists(path: &Path) -> bool {
    path.symlink_metadata().is_ok()
}

fn remove_any(path: &Path) -> io::Result<()> {
    match path.symlink_metadata() {
        Ok(data) if data.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;
    use crate::error::Kind;
    use crate::store::sample::names;

    /// Above the largest process id that Linux (2^22) and macOS hand out.
    const DEAD: u32 = 4_194_400;

    fn folder_with(path: &Path, content: &str) {
        fs::create_dir(path).unwrap();
        fs::write(path.join("file"), content).unwrap();
    }

    #[test]
    fn unwritable_places_are_errors_that_name_the_path() {
        let dir = tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let below = dir.path().join("file").join("out");
        assert!(write_atomic(&below, b"x").unwrap_err().to_string().contains("out"));
        assert!(StagedFolder::create(&below).unwrap_err().to_string().contains("file"));
        assert_eq!(write_atomic(Path::new("/"), b"x").unwrap_err().kind(), Kind::Usage);
        // Read-only even for root.
        #[cfg(target_os = "linux")]
        {
            write_atomic(Path::new("/proc/fewbit-test"), b"x").unwrap_err();
            StagedFolder::create(Path::new("/proc/fewbit-test")).unwrap_err();
        }
    }

    #[test]
    fn commit_creates_and_replaces() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("deep").join("out");
        for content in ["one", "two"] {
            let staged = StagedFolder::create(&target).unwrap();
            fs::create_dir(staged.path().join("sub")).unwrap();
            fs::write(staged.path().join("sub").join(content), content).unwrap();
            staged.commit().unwrap();
            assert_eq!(names(&target.join("sub")), [content]);
            assert_eq!(names(&dir.path().join("deep")), ["out"]);
        }
    }

    #[test]
    fn drop_without_commit_leaves_the_target() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        folder_with(&target, "old");
        let staged = StagedFolder::create(&target).unwrap();
        fs::write(staged.path().join("file"), "new").unwrap();
        let partial = format!(".out.partial-{}", std::process::id());
        assert_eq!(names(dir.path()), [partial.as_str(), "out"]);
        drop(staged);
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "old");
    }

    #[test]
    fn a_failed_swap_is_undone() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        folder_with(&target, "old");
        let missing = dir.path().join("missing");
        swap_in(&missing, &target, &dir.path().join(".out.old-1")).unwrap_err();
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "old");
    }

    #[test]
    fn one_target_is_staged_once_at_a_time() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        let first = StagedFolder::create(&target).unwrap();
        fs::write(first.path().join("file"), "first").unwrap();
        let error = StagedFolder::create(&target).unwrap_err();
        assert_eq!(error.what(), "this run is already writing the folder");
        first.commit().unwrap();
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "first");
        StagedFolder::create(&target).unwrap();
    }

    #[cfg(unix)]
    #[test]
    fn leftovers_of_dead_runs_go_and_all_else_stays() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        folder_with(&target, "current");
        let own = std::process::id();
        let gone = [
            format!(".out.partial-{DEAD}"),
            format!(".out.old-{DEAD}"),
            format!(".out.partial-{own}"),
            format!(".out.old-{own}"),
        ];
        let kept = [
            ".out.partial-1".to_owned(), // the first process always runs
            format!(".out.partial-0{DEAD}"),
            format!(".out.partial-{DEAD}.bak"),
            format!(".out2.partial-{DEAD}"),
            format!("out.old-{DEAD}"),
        ];
        for name in gone.iter().chain(&kept) {
            folder_with(&dir.path().join(name), "left");
        }
        drop(StagedFolder::create(&target).unwrap());
        let mut expected = kept.to_vec();
        expected.push("out".into());
        expected.sort();
        assert_eq!(names(dir.path()), expected);
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "current");
    }

    #[cfg(unix)]
    #[test]
    fn a_target_lost_between_the_two_renames_is_restored() {
        let dir = tempdir().unwrap();
        folder_with(&dir.path().join(format!(".out.old-{DEAD}")), "old");
        folder_with(&dir.path().join(format!(".out.partial-{DEAD}")), "new");
        let target = dir.path().join("out");
        drop(StagedFolder::create(&target).unwrap());
        assert_eq!(names(dir.path()), ["out"]);
        assert_eq!(fs::read_to_string(target.join("file")).unwrap(), "old");
    }

    #[test]
    fn a_file_in_the_targets_place_is_refused() {
        let dir = tempdir().unwrap();
        let target = dir.path().join("out");
        fs::write(&target, "precious").unwrap();
        let error = StagedFolder::create(&target).unwrap_err();
        assert_eq!(error.what(), "the output exists and is not a folder");
        assert_eq!(names(dir.path()), ["out"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_followed() {
        let dir = tempdir().unwrap();
        let real = dir.path().join("real");
        folder_with(&real, "old");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let staged = StagedFolder::create(&link).unwrap();
        fs::write(staged.path().join("file"), "new").unwrap();
        staged.commit().unwrap();
        assert!(link.is_symlink());
        assert_eq!(fs::read_to_string(real.join("file")).unwrap(), "new");
        assert_eq!(names(dir.path()), ["link", "real"]);
    }
}
