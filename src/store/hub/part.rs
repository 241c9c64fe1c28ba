//! A file on its way: hashed as it comes, whole only when size and hash are right.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha1::Sha1;
use sha2::Sha256;
use sha2::digest::DynDigest;

use super::cache::make_parent;
use crate::error::{Error, Result};
use crate::store::hex;

/// A file as the hub lists it.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) name: String,
    pub(super) size: u64,
    /// SHA-256 of large files, git's SHA-1 of small ones.
    pub(super) hash: String,
}

impl Remote {
    fn hasher(&self) -> Box<dyn DynDigest> {
        if self.hash.len() == 64 {
            return Box::new(Sha256::default());
        }
        let mut git = Sha1::default();
        DynDigest::update(&mut git, format!("blob {}\0", self.size).as_bytes());
        Box::new(git)
    }
}

/// What has come of a file.
pub(super) struct Part<'a> {
    remote: &'a Remote,
    path: PathBuf,
    file: File,
    hasher: Box<dyn DynDigest>,
    have: u64,
    /// Whether some of it is an earlier process's.
    inherited: bool,
}

impl<'a> Part<'a> {
    /// Goes on with what lies at `path`, or begins.
    pub(super) fn open(remote: &'a Remote, path: PathBuf) -> Result<Self> {
        make_parent(&path)?;
        let open = OpenOptions::new().read(true).append(true).create(true).open(&path);
        let file = open.map_err(|e| Error::io("create", &path, &e))?;
        let mut part =
            Self { remote, path, file, hasher: remote.hasher(), have: 0, inherited: false };
        part.take_up().map_err(|e| Error::io("read", &part.path, &e))?;
        Ok(part)
    }

    fn take_up(&mut self) -> io::Result<()> {
        if self.file.metadata()?.len() > self.remote.size {
            return self.file.set_len(0);
        }
        let mut buffer = vec![0; 1 << 20];
        loop {
            let count = self.file.read(&mut buffer)?;
            if count == 0 {
                self.inherited = self.have > 0;
                return Ok(());
            }
            self.hasher.update(&buffer[..count]);
            self.have += count as u64;
        }
    }

    pub(super) fn have(&self) -> u64 {
        self.have
    }

    pub(super) fn is_full(&self) -> bool {
        self.have == self.remote.size
    }

    /// Forgets what has come.
    pub(super) fn restart(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|e| Error::io("write", &self.path, &e))?;
        (self.hasher, self.have, self.inherited) = (self.remote.hasher(), 0, false);
        Ok(())
    }

    /// Adds what comes until it is full, ends or breaks off; says how it broke off.
    pub(super) fn fill(
        &mut self,
        body: &mut dyn Read,
        mut progress: impl FnMut(u64),
    ) -> Result<Option<io::Error>> {
        let mut buffer = vec![0; 1 << 17];
        while !self.is_full() {
            let room = (self.remote.size - self.have).min(buffer.len() as u64) as usize;
            let count = match body.read(&mut buffer[..room]) {
                Ok(0) => return Ok(None),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Ok(Some(error)),
            };
            self.file
                .write_all(&buffer[..count])
                .map_err(|e| Error::io("write", &self.path, &e))?;
            self.hasher.update(&buffer[..count]);
            self.have += count as u64;
            progress(self.have);
        }
        Ok(None)
    }

    /// Puts it at `blob` if it is what the hub listed. If not, it is gone; `false` when it may have been
    /// spoiled before this process began, so that getting it again is worth a try.
    pub(super) fn finish(&mut self, blob: &Path) -> Result<bool> {
        let found = hex(&self.hasher.finalize_reset());
        if found == self.remote.hash {
            self.file.sync_all().map_err(|e| Error::io("sync", &self.path, &e))?;
            std::fs::rename(&self.path, blob).map_err(|e| Error::io("rename", &self.path, &e))?;
            return Ok(true);
        }
        if self.inherited {
            self.restart()?;
            return Ok(false);
        }
        let _ = std::fs::remove_file(&self.path);
        let name = if self.remote.hash.len() == 64 { "SHA-256" } else { "git SHA-1" };
        let what =
            format!("the file that came has {name} {found}, the hub lists {}", self.remote.hash);
        Err(Error::failed(what)
            .at(&self.remote.name)
            .fix("the same command again; if it stays so, something between changes files"))
    }
}
