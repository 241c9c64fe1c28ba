//! A file without a name: gone with the process that made it, however that ends.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Bytes on the disk that only this process sees, written and read at places of its own choosing.
#[derive(Debug)]
pub struct Scratch {
    file: File,
    /// Where it is, for errors.
    dir: PathBuf,
}

impl Scratch {
    /// An empty one on the disk of `dir`.
    ///
    /// # Errors
    /// When none can be made there.
    pub fn new(dir: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(dir);
        let file = file.map_err(|e| failed("make", dir, &e))?;
        Ok(Self { file, dir: dir.to_owned() })
    }

    /// Writes all of `bytes` at a place.
    ///
    /// # Errors
    /// I/O errors, a full disk among them.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        write_all_at(&self.file, bytes, at).map_err(|e| failed("write", &self.dir, &e))
    }

    /// `len` bytes from a place.
    ///
    /// # Errors
    /// I/O errors; when there is nothing so far behind.
    pub fn read(&self, at: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        read_exact_at(&self.file, &mut bytes, at).map_err(|e| failed("read", &self.dir, &e))?;
        Ok(bytes)
    }

    /// Gives back what lies behind a place.
    ///
    /// # Errors
    /// I/O errors.
    pub fn cut(&self, at: u64) -> Result<()> {
        self.file.set_len(at).map_err(|e| failed("cut", &self.dir, &e))
    }

    /// Waits until everything is on the disk.
    ///
    /// # Errors
    /// I/O errors.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| failed("sync", &self.dir, &e))
    }

    /// Asks the system to drop its copy in memory of what is on the disk; whether it took that.
    pub fn forget(&self) -> bool {
        #[cfg(target_os = "linux")]
        return rustix::fs::fadvise(&self.file, 0, None, rustix::fs::Advice::DontNeed).is_ok();
        #[cfg(not(target_os = "linux"))]
        false
    }
}

/// An error of a file that has no name.
fn failed(verb: &str, dir: &Path, source: &std::io::Error) -> Error {
    Error::of_io(format!("cannot {verb} a scratch file: {source}"), source).at(dir.display())
}

#[cfg(unix)]
use std::os::unix::fs::FileExt;

#[cfg(unix)]
fn write_all_at(file: &File, bytes: &[u8], at: u64) -> std::io::Result<()> {
    file.write_all_at(bytes, at)
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], at: u64) -> std::io::Result<()> {
    file.read_exact_at(bytes, at)
}

#[cfg(windows)]
use std::os::windows::fs::FileExt;

#[cfg(windows)]
fn write_all_at(file: &File, mut bytes: &[u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let written = file.seek_write(bytes, at)?;
        bytes = &bytes[written..];
        at += written as u64;
    }
    Ok(())
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut at: u64) -> std::io::Result<()> {
    while !bytes.is_empty() {
        match file.seek_read(bytes, at)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            read => {
                bytes = &mut bytes[read..];
                at += read as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_back_from_where_they_were_put_and_nothing_is_left_in_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path()).unwrap();
        scratch.write(5, b"behind").unwrap();
        scratch.write(0, b"front").unwrap();
        assert_eq!(scratch.read(3, 4).unwrap(), b"ntbe");
        assert!(scratch.read(8, 4).is_err());
        scratch.cut(6).unwrap();
        assert_eq!(scratch.read(3, 3).unwrap(), b"ntb");
        assert!(scratch.read(3, 4).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let error = Scratch::new(&dir.path().join("missing")).unwrap_err().to_string();
        assert!(error.contains("missing"), "{error}");
    }
}
