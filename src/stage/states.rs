//! The states of an unfinished training in a stage's folder: numbered files, the newest last, written
//! while the training goes on.

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use super::training_state::{Snapshot, State};
use crate::error::{Error, Result};
use crate::report::{Event, Reporter};
use crate::store::folder::entries;
use crate::train::OptimizerConfig;

/// What a teacher that is asked once has said.
pub(super) const CACHE_FILE: &str = "teacher.cache";
/// How the names of states begin; a number of six digits follows.
const STATE: &str = "state-";
/// The state that a training may go back to.
const BEST_FILE: &str = "best.safetensors";
/// The pieces of a block that are fitted, for states of the next piece.
const PIECES_FILE: &str = "pieces.safetensors";

/// The states of one stage.
pub(super) struct States {
    dir: PathBuf,
    /// How many are kept.
    keep: usize,
    /// The newest one's number.
    newest: u64,
    /// At most one at a time: a state that is due waits for the one before it.
    writing: Option<JoinHandle<Result<()>>>,
}

impl States {
    /// Those of the stage whose folder is `dir`; the newest `keep` are kept.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub(super) fn of(dir: &Path, keep: usize) -> Result<Self> {
        let newest = numbered(dir)?.last().map_or(0, |(number, _)| *number);
        Ok(Self { dir: dir.to_owned(), keep, newest, writing: None })
    }

    /// The file of the state that a training may go back to.
    pub(super) fn best_file(&self) -> PathBuf {
        self.dir.join(BEST_FILE)
    }

    /// The file of the pieces of a block that are fitted.
    pub(super) fn pieces_file(&self) -> PathBuf {
        self.dir.join(PIECES_FILE)
    }

    /// The newest state that is whole, once damaged ones behind it are removed; `None` where there is no state
    /// at all.
    ///
    /// # Errors
    /// When the folder cannot be read, or each state is damaged.
    pub(super) fn newest(&self) -> Result<Option<Found>> {
        let mut damaged: Vec<(PathBuf, Error)> = Vec::new();
        for (number, path) in numbered(&self.dir)?.into_iter().rev() {
            match State::open(&path) {
                Ok(state) => {
                    // They would be kept in the place of whole ones.
                    for (path, _) in &damaged {
                        std::fs::remove_file(path).map_err(|e| Error::io("remove", path, &e))?;
                    }
                    let mark = mark(&self.dir, &name(number));
                    return Ok(Some(Found { state, mark, damaged }));
                }
                Err(error) => damaged.push((path, error)),
            }
        }
        damaged.into_iter().next().map_or(Ok(None), |(_, error)| Err(error))
    }

    /// Writes a state, in a thread of its own.
    ///
    /// # Errors
    /// Those of the state before it.
    pub(super) fn write(&mut self, state: Snapshot, report: &mut dyn Reporter) -> Result<()> {
        self.finish()?;
        self.newest += 1;
        let name = name(self.newest);
        report.emit(&Event::Saved { mark: mark(&self.dir, &name) });
        let path = self.dir.join(format!("{name}.safetensors"));
        let (dir, keep) = (self.dir.clone(), self.keep);
        self.spawn(move || {
            state.write(&path)?;
            prune(&dir, keep)
        })
    }

    /// Writes the state that a training may go back to, in a thread of its own.
    ///
    /// # Errors
    /// Those of the state before it.
    pub(super) fn write_best(&mut self, state: Snapshot) -> Result<()> {
        self.finish()?;
        let path = self.best_file();
        self.spawn(move || state.write(&path))
    }

    fn spawn(&mut self, write: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
        let thread = std::thread::Builder::new().name("state".to_owned()).spawn(write);
        let thread = thread.map_err(|e| Error::of_io(format!("cannot start a thread: {e}"), &e))?;
        self.writing = Some(thread);
        Ok(())
    }

    /// Waits until the last state is there.
    ///
    /// # Errors
    /// When it could not be written.
    pub(super) fn finish(&mut self) -> Result<()> {
        let ended = self.writing.take().map(JoinHandle::join);
        ended.unwrap_or(Ok(Ok(()))).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// The error of a state that could not be written, as soon as it is known.
    ///
    /// # Errors
    /// That error.
    pub(super) fn check(&mut self) -> Result<()> {
        match &self.writing {
            Some(thread) if thread.is_finished() => self.finish(),
            _ => Ok(()),
        }
    }
}

impl Drop for States {
    fn drop(&mut self) {
        // Nothing writes into the folder once its stage has ended; what ended it is the error to say.
        let _ = self.writing.take().map(JoinHandle::join);
    }
}

/// Bytes on the disk of so many states of a training of so many numbers, as `optimizer` holds
/// them and their moments.
pub(super) fn bytes(learned: u64, optimizer: &OptimizerConfig, states: u64) -> u64 {
    (optimizer.latents.bytes(learned) + optimizer.moments.bytes(learned)) * states
}

/// A state to go on from.
pub(super) struct Found {
    pub state: State,
    pub mark: String,
    /// What is wrong with newer ones.
    damaged: Vec<(PathBuf, Error)>,
}

impl Found {
    /// Says that newer states are damaged; behind [`Event::Resumed`].
    pub(super) fn warn(&self, report: &mut dyn Reporter) {
        for (path, error) in &self.damaged {
            let what = error.what();
            let text = format!("{}: {what}; the state before it is used", path.display());
            report.emit(&Event::Warning { text });
        }
    }
}

/// Removes the states of a stage whose result is saved.
///
/// # Errors
/// I/O errors.
pub fn remove_states(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    let states = numbered(dir)?.into_iter().map(|(_, path)| path);
    let files = [BEST_FILE, PIECES_FILE, CACHE_FILE].map(|name| dir.join(name));
    for state in states.chain(files) {
        if state.exists() {
            std::fs::remove_file(&state).map_err(|e| Error::io("remove", &state, &e))?;
        }
    }
    Ok(())
}

/// Whether a file in a stage's folder is a state of its training.
pub fn is_state(name: &str) -> bool {
    name.starts_with(STATE) || [BEST_FILE, PIECES_FILE, CACHE_FILE].contains(&name)
}

/// Whether there is a state in a stage's folder.
pub(super) fn has_states(dir: &Path) -> bool {
    dir.is_dir() && numbered(dir).is_ok_and(|states| !states.is_empty())
}

/// What a state in a stage's folder is called in reports.
pub fn mark(dir: &Path, state: &str) -> String {
    format!("{}/{state}", dir.file_name().unwrap_or_default().display())
}

fn name(number: u64) -> String {
    format!("{STATE}{number:06}")
}

/// The states in a folder by their numbers.
fn numbered(dir: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let number = |path: &Path| {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix(STATE)?.strip_suffix(".safetensors")?.parse().ok()
    };
    let states = entries(dir)?.into_iter().filter_map(|path| Some((number(&path)?, path)));
    let mut states: Vec<(u64, PathBuf)> = states.collect();
    states.sort();
    Ok(states)
}

/// Removes all but the newest states.
fn prune(dir: &Path, keep: usize) -> Result<()> {
    let states = numbered(dir)?;
    let old = states.len().saturating_sub(keep);
    for (_, path) in &states[..old] {
        std::fs::remove_file(path).map_err(|e| Error::io("remove", path, &e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use burn::nn::LinearConfig;
    use burn::tensor::Device;

    use super::*;
    use crate::report::Reporters;
    use crate::train::{Optimizer, OptimizerConfig};

    fn state() -> Snapshot {
        let linear = LinearConfig::new(3, 2).init(&Device::flex().autodiff());
        Snapshot::of(&linear, &Optimizer::new(&OptimizerConfig::default()), [])
    }

    #[test]
    fn a_damaged_state_takes_no_whole_one_s_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut report = Reporters::default();
        let write = |states: &mut States, report: &mut Reporters| {
            states.write(state(), report).unwrap();
            states.finish().unwrap();
        };
        let mut states = States::of(dir.path(), 2).unwrap();
        write(&mut states, &mut report);
        write(&mut states, &mut report);
        std::fs::write(dir.path().join("state-000002.safetensors"), b"torn").unwrap();
        let mut states = States::of(dir.path(), 2).unwrap();
        let found = states.newest().unwrap().unwrap();
        assert_eq!((found.mark.rsplit('/').next(), found.damaged.len()), (Some("state-000001"), 1));
        write(&mut states, &mut report);
        std::fs::write(dir.path().join("state-000003.safetensors"), b"torn too").unwrap();
        assert!(States::of(dir.path(), 2).unwrap().newest().unwrap().is_some());
    }
}
