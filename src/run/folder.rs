//! The run's folder: who may write there, what is kept, what starting over removes.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::record::{RECORD_FILE, RunRecord};
use super::{Prepared, Status};
use crate::error::{Error, Result};
use crate::export::Manifest;
use crate::page::PAGE_FILE;
use crate::recipe::to_toml;
use crate::store::folder::{entries, is_running, write_atomic};

/// Everything a run writes; starting over removes these and nothing else, the record last: a folder without
/// it is not a run's.
const CONTENTS: [&str; 10] = [
    PAGE_FILE,
    "recipe.toml",
    "metrics.jsonl",
    "run.log",
    "tensorboard",
    "checkpoints",
    "export",
    "adapters",
    "eval",
    RECORD_FILE,
];
const LOCK_FILE: &str = ".lock";
/// Time between two signs of life of the process that holds a folder.
const BEAT: Duration = Duration::from_mins(1);
/// Time without one after which a process on another machine counts as gone.
const GONE: Duration = Duration::from_mins(10);
/// Starts the name of the folder that removed things are moved to.
const ASIDE: &str = ".removed.tmp-";

/// A run's folder, held by this process.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: Lock,
}

impl RunFolder {
    /// Refuses what [`RunFolder::open`] would refuse, and changes nothing.
    ///
    /// # Errors
    /// As [`RunFolder::open`], but for a folder that another process works in.
    pub fn check(prepared: &Prepared, fresh: bool) -> Result<()> {
        let path = &prepared.plan.recipe.output;
        refuse_foreign(path)?;
        if fresh {
            refuse_strangers(path)?;
        }
        match RunRecord::read(path)? {
            Some(record) if !fresh => refuse_other(&record, prepared),
            _ => Ok(()),
        }
    }

    /// Opens the output folder for `prepared`: new, resumed, or (with `fresh`) started over.
    ///
    /// # Errors
    /// Exit 6 when it holds a run of another recipe, model or data; a usage error when it holds
    /// something else, or another process works in it.
    pub fn open(prepared: &Prepared, fresh: bool) -> Result<(Self, RunRecord)> {
        let path = prepared.plan.recipe.output.clone();
        refuse_foreign(&path)?;
        if fresh {
            refuse_strangers(&path)?;
        }
        std::fs::create_dir_all(&path).map_err(|e| Error::io("create", &path, &e))?;
        let folder = Self { _lock: lock(&path)?, path };
        // Under the lock nobody is writing: what a killed process left half written is of no use.
        for dir in ["", "checkpoints", "adapters", "eval"] {
            sweep(&folder.path.join(dir), dir == "checkpoints");
        }
        if fresh {
            folder.clear()?;
        }
        let names: Vec<&str> = prepared.plan.stages.iter().map(|s| s.config.name()).collect();
        let mut new = RunRecord::new(&names, prepared.needs.clone(), prepared.fingerprint.clone());
        let recipe = folder.path.join("recipe.toml");
        let write_recipe = || write_atomic(&recipe, to_toml(&prepared.plan.recipe)?.as_bytes());
        let Some(mut record) = RunRecord::read(&folder.path)? else {
            // The record first: it is what says that the folder is a run's.
            new.save(&folder.path)?;
            write_recipe()?;
            if let Some(reused) = &prepared.reused {
                reused.take_over(&folder, &mut new)?;
            }
            return Ok((folder, new));
        };
        refuse_other(&record, prepared)?;
        if !recipe.exists() {
            // Killed between the two.
            write_recipe()?;
        }
        if let (Status::Pending, Some(reused)) = (record.status, &prepared.reused) {
            // Killed before it had all of them.
            reused.take_over(&folder, &mut record)?;
        }
        record.reopen_lost(&folder.path, |index, name| folder.stage_dir(index, name));
        if record.status != Status::Done {
            record.needs = new.needs;
            record.fewbit = new.fewbit;
        }
        Ok((folder, record))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where stage `index` keeps its state.
    pub fn stage_dir(&self, index: usize, name: &str) -> PathBuf {
        stage_folder(&self.path, index, name)
    }

    /// Removes what a run wrote, all of it moved aside before any of it is gone.
    fn clear(&self) -> Result<()> {
        let aside = self.path.join(format!("{ASIDE}{}", std::process::id()));
        std::fs::create_dir_all(&aside).map_err(|e| Error::io("create", &aside, &e))?;
        for path in CONTENTS.map(|name| self.path.join(name)) {
            let Some(name) = path.file_name().filter(|_| path.exists()) else { continue };
            let to = aside.join(name);
            std::fs::rename(&path, to).map_err(|e| Error::io("move", &path, &e))?;
        }
        std::fs::remove_dir_all(&aside).map_err(|e| Error::io("remove", &aside, &e))
    }
}

/// Where stage `index` of the run in `run` keeps its state.
pub(super) fn stage_folder(run: &Path, index: usize, name: &str) -> PathBuf {
    run.join("checkpoints").join(format!("{index:02}-{name}"))
}

/// A file in the folders of a run that no run wrote: starting over would remove it.
fn stranger(run: &Path) -> Result<Option<PathBuf>> {
    let mut folders: Vec<PathBuf> = CONTENTS.iter().map(|name| run.join(name)).collect();
    while let Some(folder) = folders.pop() {
        if !folder.is_dir() {
            continue;
        }
        for path in entries(&folder)? {
            if path.is_dir() {
                folders.push(path);
            } else if !is_ours(run, &path) {
                return Ok(Some(path));
            }
        }
    }
    Ok(None)
}

/// Whether a run wrote a file in one of its folders.
fn is_ours(run: &Path, path: &Path) -> bool {
    let inside = path.strip_prefix(run).unwrap_or(path);
    let parts: Vec<_> = inside.iter().map(|part| part.to_string_lossy()).collect();
    let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
    let ends = |end: &str| path.extension().is_some_and(|extension| extension == end);
    let is_tensors = ends("safetensors");
    match parts[..] {
        // What a killed process left half written.
        [.., name] if name.starts_with('.') => true,
        ["checkpoints", stage, _] => {
            let index = stage.split_once('-').map(|(index, _)| index.parse::<u16>());
            // What a student wrote itself is JSON.
            matches!(index, Some(Ok(_))) && (is_tensors || ends("json"))
        }
        ["export", format, name] => {
            let manifest = Manifest::read(&run.join("export").join(format));
            manifest.is_ok_and(|manifest| manifest.is_some_and(|m| m.covers(name)))
        }
        ["adapters", _] => is_tensors,
        ["adapters", _, _] => is_tensors || ends("json"),
        ["tensorboard", .., name] => name.starts_with("events."),
        ["eval", _] => ends("json") || ends("jsonl"),
        _ => false,
    }
}

/// Removes the temporary files of processes that are gone, in `dir` and where asked for in the folders
/// in it. What cannot be removed stays: it only takes space.
fn sweep(dir: &Path, folders: bool) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        if name.starts_with(ASIDE) && path.is_dir() {
            let _ = std::fs::remove_dir_all(&path);
        } else if name.starts_with('.') && name.contains(".tmp-") && path.is_file() {
            let _ = std::fs::remove_file(&path);
        } else if folders && path.is_dir() {
            sweep(&path, false);
        }
    }
}

/// Checkpoints of another recipe, model or data are never mixed in.
fn refuse_other(record: &RunRecord, prepared: &Prepared) -> Result<()> {
    match record.fingerprint.difference(&prepared.fingerprint) {
        None => Ok(()),
        Some(difference) => Err(Error::mismatch(format!("{difference} since this run began"))
            .at(prepared.plan.recipe.output.display())
            .fix("the old one to go on, --output for a second run, or --fresh to start over")),
    }
}

/// A folder with files that no run wrote is not ours to write into.
fn refuse_foreign(path: &Path) -> Result<()> {
    if path.as_os_str().is_empty() {
        return Err(Error::usage("the output has no name")
            .at("output")
            .fix("the folder of the run; a variable of the shell may be empty"));
    }
    if path.is_file() {
        return Err(Error::usage("the output is a file")
            .at(path.display())
            .fix("another --output"));
    }
    if !path.is_dir() || path.join(RECORD_FILE).exists() {
        return Ok(());
    }
    for entry in entries(path)? {
        let name = entry.file_name().unwrap_or_default().to_string_lossy();
        if name != LOCK_FILE && !name.contains(".tmp-") {
            return Err(Error::usage("the output folder holds files of something else")
                .at(entry.display())
                .fix("another --output"));
        }
    }
    Ok(())
}

/// Starting over removes what a run wrote and nothing else.
fn refuse_strangers(path: &Path) -> Result<()> {
    match stranger(path)? {
        None => Ok(()),
        Some(file) => Err(Error::usage("--fresh would remove something that no run wrote")
            .at(file.display())
            .fix("move it elsewhere, or another --output")),
    }
}

/// Holds the folder for this process. The system lets go of a lock when its process ends, however it
/// ends; on a file system without locks, what the file says of the last process decides.
fn lock(path: &Path) -> Result<Lock> {
    let lock_path = path.join(LOCK_FILE);
    let open = File::options().create(true).read(true).write(true).truncate(false).open(&lock_path);
    let mut file = open.map_err(|e| Error::io("create", &lock_path, &e))?;
    let mut text = String::new();
    // Of an older fewbit, or half written: then nobody is known.
    let _ = file.read_to_string(&mut text);
    let holder: Option<Holder> = serde_json::from_str(&text).ok();
    let held = match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock) => true,
        Err(TryLockError::Error(_)) => holder
            .as_ref()
            .is_some_and(|holder| holder.may_live() && (holder.host == host() || beats(&file))),
    };
    if held {
        let who = holder.map_or(String::new(), |h| format!(": process {} on {}", h.pid, h.host));
        return Err(Error::usage(format!("another fewbit process is working in this folder{who}"))
            .at(path.display())
            .fix("wait for it, or another --output"));
    }
    let text = serde_json::to_string(&Holder::this()).unwrap_or_default();
    // Whoever cannot read it is told less.
    let _ =
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes()));
    Ok(Lock::new(file))
}

/// The process that works in a folder now, where one does.
pub(super) fn holder(path: &Path) -> Option<Holder> {
    let file = File::open(path.join(LOCK_FILE)).ok()?;
    let holder: Holder = serde_json::from_reader(&file).ok()?;
    let (is_here, may_live) = (holder.host == host(), holder.may_live());
    // Another process may have got the number since: a lock that can be had is nobody's.
    let alive = if is_here { may_live && file.try_lock_shared().is_err() } else { beats(&file) };
    alive.then_some(holder)
}

/// The lock of a folder; its file's time of change says that the holder lives, where locks do not reach.
#[derive(Debug)]
struct Lock {
    /// Held while it is open; closing the channel ends the beats.
    _file: File,
    _end: Sender<()>,
}

impl Lock {
    fn new(file: File) -> Self {
        let (end, ended) = channel();
        if let Ok(file) = file.try_clone() {
            let beat = move || {
                while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                    // Whoever looks takes the holder for gone; the work goes on.
                    let _ = file.set_modified(SystemTime::now());
                }
            };
            let _ = std::thread::Builder::new().name("lock".to_owned()).spawn(beat);
        }
        Self { _file: file, _end: end }
    }
}

/// Whether a lock's holder gave a sign of life not long ago; a clock that is wrong by less than that does no harm.
fn beats(lock: &File) -> bool {
    let changed = lock.metadata().and_then(|metadata| metadata.modified());
    changed.is_ok_and(|changed| {
        changed.elapsed().is_ok_and(|since| since < GONE) || changed > SystemTime::now()
    })
}

/// The process that works in a folder.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Holder {
    pub(super) pid: u32,
    pub(super) host: String,
}

impl Holder {
    fn this() -> Self {
        Self { pid: std::process::id(), host: host() }
    }

    /// Whether it may still be at work: not if it was on this machine and is gone.
    fn may_live(&self) -> bool {
        self.host != host() || self.pid != std::process::id() && is_running(self.pid)
    }
}

#[cfg(unix)]
fn host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(not(unix))]
fn host() -> String {
    std::env::var("COMPUTERNAME").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_on_another_machine_lives_as_long_as_it_beats() {
        let dir = tempfile::tempdir().unwrap();
        assert!(holder(dir.path()).is_none());
        let text = r#"{"pid": 1, "host": "somewhere else"}"#;
        let path = dir.path().join(LOCK_FILE);
        std::fs::write(&path, text).unwrap();
        assert!(holder(dir.path()).is_some_and(|holder| holder.host == "somewhere else"));
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::now() - 2 * GONE).unwrap();
        assert!(holder(dir.path()).is_none());
    }
}
