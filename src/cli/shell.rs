//! `fewbit completions` and `fewbit man`: what shells and readers of manuals want to know of the
//! command line, from the command line itself.

use std::path::{Path, PathBuf};

use clap::{Args, Command};
use clap_complete::Shell;
use clap_mangen::Man;

use super::output;
use crate::error::{Error, Result};
use crate::store::folder::write_atomic;

/// Arguments of `completions`.
#[derive(Args, Debug)]
pub(super) struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

/// Arguments of `man`.
#[derive(Args, Debug)]
pub(super) struct ManArgs {
    /// The folder for the pages, made if need be: fewbit.1, fewbit-train.1 and so on
    #[arg(value_name = "DIR")]
    folder: PathBuf,
}

/// Prints a shell's completion script.
pub(super) fn completions(mut command: Command, args: &CompletionsArgs) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut command, "fewbit", &mut script);
    output::print(&String::from_utf8_lossy(&script))
}

/// Writes a manual page for the program and for each command, and prints their paths.
pub(super) fn man(mut command: Command, args: &ManArgs) -> Result<()> {
    let folder = &args.folder;
    std::fs::create_dir_all(folder).map_err(|e| Error::io("create", folder, &e))?;
    // Global flags and usage lines go down to the commands.
    command.build();
    write_pages(&command, "fewbit", folder)
}

fn write_pages(command: &Command, name: &str, folder: &Path) -> Result<()> {
    let path = folder.join(format!("{name}.1"));
    let mut page = Vec::new();
    // Clap wants a name for as long as the program runs; there are a few dozen.
    let command = command.clone().name(&*name.to_owned().leak()).bin_name(name.replace('-', " "));
    Man::new(command.clone()).render(&mut page).map_err(|e| Error::io("write", &path, &e))?;
    write_atomic(&path, &page)?;
    output::line(&path.display().to_string())?;
    command
        .get_subcommands()
        .filter(|inner| !inner.is_hide_set() && inner.get_name() != "help")
        .try_for_each(|inner| write_pages(inner, &format!("{name}-{}", inner.get_name()), folder))
}
