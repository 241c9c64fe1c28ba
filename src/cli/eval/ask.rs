//! What is asked for on the command line, as tasks with their keys.

use crate::error::{Error, Result};
use crate::recipe;
use crate::task::{self, TaskConfig};

/// One `--task`.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    /// The task's name in recipes.
    task: &'static str,
    /// What it was called.
    name: String,
    /// Keys that the name stands for.
    keys: Vec<String>,
    /// Its own file.
    pub(super) file: Option<String>,
}

/// Reads `NAME` or `NAME=FILE`.
pub(super) fn asked(text: &str) -> Result<Asked, String> {
    let (name, file) = match text.split_once('=') {
        Some((name, file)) => (name, Some(file.to_owned())),
        None => (text, None),
    };
    let Some((task, keys)) = task::named(name) else {
        return Err(format!("one of {}", task::every_name().join(", ")));
    };
    Ok(Asked { task, name: name.to_owned(), keys, file })
}

/// The tasks with what their names, options and `--set` say. `keys` are those of options of their own,
/// `set` those of `--set`: with the task's name in front, or without where there is one task.
///
/// # Errors
/// A usage error for a key that no task has, or that may be meant for several.
pub(super) fn tasks(all: &[Asked], keys: &[String], set: &[String]) -> Result<Vec<TaskConfig>> {
    let own = |set: &str, asked: &Asked| {
        let rest = set.strip_prefix(&asked.name).or_else(|| set.strip_prefix(asked.task));
        rest.and_then(|rest| rest.strip_prefix('.')).map(str::to_owned)
    };
    for set in set {
        if all.len() > 1 && all.iter().all(|asked| own(set, asked).is_none()) {
            return Err(Error::usage("several tasks are measured, and this may be any one's key")
                .at(format!("--set {set}"))
                .fix(format!("--set {}.{set}", all[0].name)));
        }
    }
    let task = |asked: &Asked| {
        let set = set
            .iter()
            .filter_map(|set| own(set, asked).or_else(|| (all.len() == 1).then(|| set.clone())));
        let has = |key: &&String| match asked.task {
            "ppl" => true,
            "kl" => !key.starts_with("stride"),
            _ => false,
        };
        let options = keys.iter().filter(has).cloned();
        let keys = asked.keys.iter().cloned().chain(options).chain(set);
        let set: Vec<String> = keys.map(|key| format!("{}.{key}", asked.task)).collect();
        recipe::parse(&format!("[{}]\n", asked.task), "--task", &set).map(|(task, _)| task)
    };
    all.iter().map(task).collect()
}
