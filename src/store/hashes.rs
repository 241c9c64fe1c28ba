//! Hashes of large files, read once: remembered in the user's cache for as long as size, times and inode of
//! the file stay as they were.

use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::embedded::cache_root;
use super::folder::{sha256_with, write_atomic};
use super::hex;
use crate::error::Result;

/// Smaller ones are hashed faster than it is worth.
const LARGE: u64 = 64 << 20;
/// A file may change again within the tick of the clock that its time was taken from.
const SETTLED: Duration = Duration::from_secs(1);

#[derive(Deserialize, Serialize)]
struct Entry {
    path: PathBuf,
    stamp: String,
    sha256: String,
}

/// The SHA-256 of a large file that has not changed since it was last asked for.
pub fn remembered(path: &Path) -> Option<String> {
    let (path, stamp, _) = looked_at(path)?;
    let entry: Entry = serde_json::from_slice(&std::fs::read(place(&path)).ok()?).ok()?;
    (entry.path == path && entry.stamp == stamp).then_some(entry.sha256)
}

/// The SHA-256 of a file, read and remembered; `progress` hears of the bytes read and may stop it.
///
/// # Errors
/// When the file cannot be read, and what `progress` says.
pub fn sha256(path: &Path, progress: &mut dyn FnMut(u64) -> Result<()>) -> Result<String> {
    let before = looked_at(path);
    let sha256 = sha256_with(path, progress)?;
    // A file that changed meanwhile is not what was read.
    if let Some((path, stamp, changed)) =
        before.filter(|before| looked_at(path).as_ref() == Some(before))
        && changed.elapsed().is_ok_and(|age| age > SETTLED)
    {
        let place = place(&path);
        let entry = Entry { path, stamp, sha256: sha256.clone() };
        // A cache that cannot be written costs time and nothing else.
        let written = place.parent().is_some_and(|folder| std::fs::create_dir_all(folder).is_ok());
        if let Some(text) = serde_json::to_vec(&entry).ok().filter(|_| written) {
            let _ = write_atomic(&place, &text);
        }
    }
    Ok(sha256)
}

/// The real path of a large file, what would be different if its content were, and its last change.
fn looked_at(path: &Path) -> Option<(PathBuf, String, SystemTime)> {
    let path = path.canonicalize().ok()?;
    let data = path.metadata().ok().filter(|data| data.is_file() && data.len() >= LARGE)?;
    let (stamp, changed) = stamp(&data)?;
    Some((path, stamp, changed))
}

/// With the time of the last change of the inode, which no program sets.
#[cfg(unix)]
fn stamp(data: &Metadata) -> Option<(String, SystemTime)> {
    use std::os::unix::fs::MetadataExt;
    let (size, device, inode) = (data.len(), data.dev(), data.ino());
    let (modified, changed) = (
        format!("{}.{:09}", data.mtime(), data.mtime_nsec()),
        format!("{}.{:09}", data.ctime(), data.ctime_nsec()),
    );
    let since = Duration::new(u64::try_from(data.ctime()).ok()?, data.ctime_nsec() as u32);
    let stamp = format!("{size} {modified} {changed} {device}:{inode}");
    Some((stamp, SystemTime::UNIX_EPOCH + since))
}

#[cfg(not(unix))]
fn stamp(data: &Metadata) -> Option<(String, SystemTime)> {
    let modified = data.modified().ok()?;
    Some((format!("{} {modified:?}", data.len()), modified))
}

fn place(path: &Path) -> PathBuf {
    let name = hex(&Sha256::digest(path.as_os_str().as_encoded_bytes()));
    cache_root().join("hashes").join(format!("{name}.json"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Seek, SeekFrom, Write};

    use super::*;

    #[test]
    #[cfg(unix)]
    fn a_hash_is_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("large");
        let mut file = File::create(&path).unwrap();
        file.set_len(LARGE).unwrap();
        let mut heard = 0;
        let first = sha256(&path, &mut |bytes| {
            heard = bytes;
            Ok(())
        });
        assert_eq!(heard, LARGE);
        // Just written: it may change within the tick.
        assert_eq!(remembered(&path), None);
        std::thread::sleep(SETTLED + Duration::from_millis(200));
        assert_eq!(sha256(&path, &mut |_| Ok(())).unwrap(), first.as_deref().unwrap());
        assert_eq!(remembered(&path), first.ok());
        // In place, and with the old time.
        let modified = path.metadata().unwrap().modified().unwrap();
        file.seek(SeekFrom::Start(5)).unwrap();
        file.write_all(b"x").unwrap();
        file.set_modified(modified).unwrap();
        assert_eq!(remembered(&path), None);
    }

    #[test]
    fn a_small_file_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        std::fs::write(&path, "abc").unwrap();
        assert!(sha256(&path, &mut |_| Ok(())).unwrap().starts_with("ba7816bf"));
        assert_eq!(remembered(&path), None);
    }
}
