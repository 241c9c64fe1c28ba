//! `fewbit recipes list | show NAME | copy NAME PATH`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output;
use crate::error::{Error, Result};
use crate::recipe::{builtins, find};
use crate::store::locate;

/// Arguments of `recipes`.
#[derive(Args, Debug)]
pub(super) struct RecipesArgs {
    #[command(subcommand)]
    command: RecipesCommand,
}

#[derive(Debug, Subcommand)]
enum RecipesCommand {
    /// Names, and what each does
    List {
        /// Print one JSON object
        #[arg(long)]
        json: bool,
    },
    /// Print a recipe
    Show {
        /// Its name
        name: String,
    },
    /// Copy a recipe to a file, to change it
    Copy {
        /// Its name
        name: String,
        /// The new file; an existing one is left alone
        path: PathBuf,
    },
}

pub(super) fn run(args: RecipesArgs) -> Result<()> {
    match args.command {
        RecipesCommand::List { json: true } => {
            let recipes: Vec<_> = builtins()
                .iter()
                .map(|recipe| json!({ "name": recipe.name, "about": recipe.about() }))
                .collect();
            output::json(&json!({ "recipes": recipes }))
        }
        RecipesCommand::List { json: false } => {
            let widest = builtins().iter().map(|recipe| recipe.name.len()).max().unwrap_or(0);
            let lines = builtins()
                .iter()
                .map(|recipe| format!("{:<widest$}  {}\n", recipe.name, recipe.about()));
            output::print(&lines.collect::<String>())
        }
        RecipesCommand::Show { name } => output::print(&find(&name)?.0),
        RecipesCommand::Copy { name, path } => {
            let (text, _) = find(&name)?;
            if !path.exists() {
                locate::output_file(&path)?;
            }
            let mut file = match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    return Err(Error::usage("there is such a file already")
                        .at(path.display())
                        .fix("another name"));
                }
                Err(e) => return Err(Error::io("create", &path, &e)),
            };
            file.write_all(text.as_bytes()).map_err(|e| Error::io("write", &path, &e))
        }
    }
}
