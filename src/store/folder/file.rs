//! One file that appears whole, its hash, and the room that there is for it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::store::hex;

/// Replaces the file at `path` by `bytes`.
///
/// # Errors
/// On I/O errors; the old file is then untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_with(path, |file| {
        file.write_all(bytes).map_err(|source| Error::io("write", path, &source))
    })
}

/// Replaces the file at `path` by what `fill` writes. On failure the old file is untouched and the
/// temporary one is removed.
pub(crate) fn write_atomic_with(
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<()>,
) -> Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = utf8_name(path)?;
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    let temporary = path.with_file_name(format!(".{name}.tmp-{}-{count}", std::process::id()));
    write_and_rename(&temporary, path, fill).inspect_err(|_| {
        // The first error is the one to report; a leftover does no harm.
        let _ = fs::remove_file(&temporary);
    })
}

fn write_and_rename(
    temporary: &Path,
    path: &Path,
    fill: impl FnOnce(&mut File) -> Result<()>,
) -> Result<()> {
    let failed = |verb| move |source: io::Error| Error::io(verb, path, &source);
    let mut output = File::create(temporary).map_err(failed("create"))?;
    fill(&mut output)?;
    // Synced before the rename: a power cut must not leave the new name on empty content.
    output.sync_all().map_err(failed("sync"))?;
    drop(output);
    fs::rename(temporary, path).map_err(failed("replace"))?;
    sync_folder(parent_of(path))
}

/// SHA-256 of a file's content in lowercase hex, read piece by piece.
///
/// # Errors
/// When the file cannot be read.
pub fn sha256_file(path: &Path) -> Result<String> {
    sha256_with(path, &mut |_| Ok(()))
}

/// The same, telling `progress` of the bytes read so far.
pub(crate) fn sha256_with(
    path: &Path,
    progress: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<String> {
    let failed = |source| Error::io("read", path, &source);
    let mut file = File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let (mut buffer, mut done) = (vec![0; 1 << 20], 0);
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hex(&hasher.finalize())),
            Ok(count) => {
                hasher.update(&buffer[..count]);
                done += count as u64;
                progress(done)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed(error)),
        }
    }
}

/// Bytes of all files below a folder, links not followed; what cannot be read counts nothing.
pub fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(data) if data.is_dir() => bytes_below(&entry.path()),
        Ok(data) if data.is_file() => data.len(),
        _ => 0,
    });
    bytes.sum()
}

/// Bytes that an ordinary user may still write on the disk of `path`, which need not exist yet:
/// its nearest existing parent counts. `None` where the system does not say.
#[cfg(unix)]
pub fn free_bytes(path: &Path) -> Option<u64> {
    let path = std::path::absolute(path).ok()?;
    let existing = path.ancestors().find(|parent| parent.exists())?;
    let disk = rustix::fs::statvfs(existing).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

/// Bytes that may still be written on the disk of `path`: unknown on this system.
#[cfg(not(unix))]
pub fn free_bytes(_path: &Path) -> Option<u64> {
    None
}

/// Makes renames in `folder` survive a power cut.
#[cfg(unix)]
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    match File::open(folder).and_then(|handle| handle.sync_all()) {
        // Some network file systems cannot sync folders; there is nothing more to do about it.
        Err(error)
            if !matches!(
                error.kind(),
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported
            ) =>
        {
            Err(Error::io("sync", folder, &error))
        }
        _ => Ok(()),
    }
}

/// Folders cannot be synced on this system.
#[cfg(not(unix))]
#[allow(clippy::unnecessary_wraps)] // the unix twin can fail
pub(super) fn sync_folder(_folder: &Path) -> Result<()> {
    Ok(())
}

/// The folder of `path`; `.` for a bare name.
pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The last component, which temporary names are built from.
pub(super) fn utf8_name(path: &Path) -> Result<&str> {
    path.file_name().and_then(|name| name.to_str()).ok_or_else(|| {
        Error::usage("the output path has no name to write to")
            .at(path.display())
            .fix("end the path in a plain UTF-8 name")
    })
}

#[cfg(test)]
mod tests {
    use tempfile::tempdir;

    use super::*;
    use crate::error::Kind;
    use crate::store::sample::names;

    #[test]
    fn write_atomic_replaces_and_leaves_nothing_else() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one").unwrap();
        write_atomic(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn a_failed_fill_keeps_the_old_file() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one").unwrap();
        let result = write_atomic_with(&path, |file| {
            file.write_all(b"half").unwrap();
            Err(Error::failed("stop"))
        });
        assert_eq!(result.unwrap_err().what(), "stop");
        assert_eq!(fs::read(&path).unwrap(), b"one");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_keeps_the_old_file() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one").unwrap();
        let temporary = dir.path().join("full");
        std::os::unix::fs::symlink("/dev/full", &temporary).unwrap();
        let error = write_and_rename(&temporary, &path, |file| {
            file.write_all(b"two").map_err(|source| Error::io("write", &path, &source))
        })
        .unwrap_err();
        assert_eq!(error.kind(), Kind::Resources);
        assert!(error.to_string().contains("a.json"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }

    #[test]
    fn sha256_of_a_file() {
        let dir = tempdir().unwrap();
        let path = dir.path().join("abc");
        fs::write(&path, b"abc").unwrap();
        assert_eq!(
            sha256_file(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        let long = vec![7; (1 << 20) + 5];
        fs::write(&path, &long).unwrap();
        assert_eq!(sha256_file(&path).unwrap(), hex(&Sha256::digest(&long)));
        let error = sha256_file(&dir.path().join("none")).unwrap_err();
        assert!(error.to_string().contains("none"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn free_space_of_a_path_that_does_not_exist_yet() {
        let dir = tempdir().unwrap();
        assert!(free_bytes(&dir.path().join("a").join("b")).unwrap() > 0);
        assert!(free_bytes(Path::new("not-there-yet")).unwrap() > 0);
    }
}
