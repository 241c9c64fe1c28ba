//! `fewbit recipes list | show NAME | copy NAME PATH | schema`.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::{data_format, output};
use crate::data::DataFormat;
use crate::device;
use crate::error::{Error, Result};
use crate::export::open_model;
use crate::model::ModelConfig;
use crate::quant::GroupSize;
use crate::recipe::{self, Builtin, Recipe, builtins, find, real_model_settings, with_settings};
use crate::report::{duration, size};
use crate::run::{Options, Prepared};
use crate::stop::StopFlag;
use crate::store::locate;

/// Longest window that is filled in.
const LONGEST: usize = 2048;
/// Shortest group that is filled in.
const SMALLEST: usize = 16;

/// Arguments of `recipes`.
#[derive(Args, Debug)]
pub(super) struct RecipesArgs {
    #[command(subcommand)]
    command: RecipesCommand,
}

#[derive(Debug, Subcommand)]
enum RecipesCommand {
    /// Names, by what they are for
    List(ListArgs),
    /// Print a recipe
    Show {
        /// Its name
        name: String,
    },
    /// Copy a recipe to a file, to change it; with --for, filled in for a model
    Copy(CopyArgs),
    /// Print the JSON schema of recipes, by which editors complete and check them (docs/recipes.md)
    Schema,
}

#[derive(Args, Debug)]
struct ListArgs {
    /// A model: memory, disk and time that each recipe would take, filled in for it as by copy
    #[arg(long = "for", value_name = "MODEL")]
    model: Option<String>,
    /// Where it would run: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto", requires = "model")]
    device: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct CopyArgs {
    /// Its name
    name: String,
    /// The new file; an existing one is left alone
    path: PathBuf,
    /// A model's folder or hub id: its path, and what it and the device decide, is filled in
    #[arg(long = "for", value_name = "MODEL")]
    model: Option<String>,
    /// Where it will run: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto", requires = "model")]
    device: String,
    /// A text to train on
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
    /// A text to measure on
    #[arg(long, value_name = "FILE")]
    validation: Option<PathBuf>,
    /// What both are: text, messages, instruction, completion or tokens; auto: what their first record shows
    #[arg(long, value_parser = data_format, default_value = "auto")]
    format: DataFormat,
}

pub(super) fn run(args: RecipesArgs, stop: &StopFlag) -> Result<()> {
    match args.command {
        RecipesCommand::List(args) => args.run(stop),
        RecipesCommand::Show { name } => output::print(&find(&name)?.0),
        RecipesCommand::Copy(args) => args.run(stop),
        RecipesCommand::Schema => {
            let text = serde_json::to_string_pretty(&recipe::schema());
            output::line(&text.map_err(|e| Error::failed(format!("no schema: {e}")))?)
        }
    }
}

/// Widths that a recipe gives weights, widest first: `4, 2`.
fn bits(recipe: &Recipe) -> String {
    let json = serde_json::to_value(recipe).unwrap_or_default();
    let stages = json["stage"].as_array().into_iter().flatten().filter_map(Value::as_object);
    let of_stages = stages.flat_map(|stage| stage.values()).filter_map(|stage| stage.get("bits"));
    let overrides = json["quant"]["override"].as_array().into_iter().flatten();
    let mut bits: Vec<u64> = overrides
        .filter_map(|entry| entry.get("bits"))
        .chain(of_stages)
        .chain([&json["quant"]["bits"]])
        .filter_map(Value::as_u64)
        .collect();
    bits.sort_unstable();
    bits.dedup();
    let bits: Vec<String> = bits.iter().rev().map(u64::to_string).collect();
    bits.join(", ")
}

impl ListArgs {
    fn run(&self, stop: &StopFlag) -> Result<()> {
        let target =
            self.model.as_deref().map(|model| Target::open(model, &self.device)).transpose()?;
        let mut rows = Vec::new();
        for recipe in builtins() {
            stop.check()?;
            let (read, _) = recipe::parse::<Recipe>(recipe.text, recipe.name, &[])?;
            let needs =
                target.as_ref().map(|target| self.needs(recipe, target, stop)).transpose()?;
            rows.push((recipe, bits(&read), needs));
        }
        if self.json {
            let recipes: Vec<_> = rows
                .iter()
                .map(|(recipe, bits, needs)| {
                    let mut row = json!({
                        "name": recipe.name,
                        "about": recipe.about(),
                        "group": recipe.group,
                        "bits": bits,
                    });
                    match needs {
                        Some(Ok(prepared)) => row["needs"] = json!(prepared.needs),
                        Some(Err(error)) => row["refused"] = json!(error.what()),
                        None => {}
                    }
                    row
                })
                .collect();
            return output::json(&json!({ "recipes": recipes }));
        }
        let mut text = String::new();
        let widest = builtins().iter().map(|recipe| recipe.name.len()).max().unwrap_or(0);
        let mut group = "";
        for (recipe, bits, needs) in &rows {
            if recipe.group != group {
                let gap = if group.is_empty() { "" } else { "\n" };
                group = recipe.group;
                for part in [gap, group, "\n"] {
                    text.push_str(part);
                }
            }
            let beside = match needs {
                None => recipe.about().to_owned(),
                Some(Err(error)) => format!("refused: {}", error.what()),
                Some(Ok(prepared)) => {
                    let needs = &prepared.needs;
                    let device =
                        needs.device_bytes.map(|bytes| format!("{:>8} VRAM  ", size(bytes)));
                    format!(
                        "{}{:>8} RAM  {:>8} disk  about {}",
                        device.unwrap_or_default(),
                        size(needs.host_bytes),
                        size(needs.disk_bytes),
                        duration(needs.seconds),
                    )
                }
            };
            let head = format!("  {:<widest$}  {bits:<7}  ", recipe.name);
            let lines = output::wrapped(&beside, output::room().saturating_sub(head.len()).max(20));
            text += &head;
            text += &lines.join(&format!("\n{}", " ".repeat(head.len())));
            text.push('\n');
        }
        output::print(&text)
    }

    /// What the preflight says of a recipe as `copy` would fill it in; an error of it is an answer, too.
    fn needs(
        &self,
        recipe: &Builtin,
        target: &Target<'_>,
        stop: &StopFlag,
    ) -> Result<Result<Prepared>> {
        let mut options = options(recipe.name, &self.device);
        options.set = target.settings(recipe.text, recipe.name)?;
        // Never looked at as the continuation of a run that happens to lie there.
        options.fresh = true;
        options.output = Some(PathBuf::from("runs").join(format!(".{}-estimate", recipe.name)));
        Ok(Prepared::to_look_at(&options, stop))
    }
}

fn options(recipe: &str, device: &str) -> Options {
    Options {
        recipe: recipe.to_owned(),
        set: Vec::new(),
        output: None,
        device: Some(device.to_owned()),
        fresh: false,
        probe: false,
        reuse: None,
        price_per_hour: None,
    }
}

/// A text as a TOML value.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

impl CopyArgs {
    fn run(&self, stop: &StopFlag) -> Result<()> {
        let (text, file) = find(&self.name)?;
        let settings = self.settings(&text, &file)?;
        let text = with_settings(&text, &settings)?;
        if !self.path.exists() {
            locate::output_file(&self.path)?;
        }
        let mut file = match OpenOptions::new().write(true).create_new(true).open(&self.path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                return Err(Error::usage("there is such a file already")
                    .at(self.path.display())
                    .fix("another name"));
            }
            Err(e) => return Err(Error::io("create", &self.path, &e)),
        };
        file.write_all(text.as_bytes()).map_err(|e| Error::io("write", &self.path, &e))?;
        for setting in &settings {
            output::line(&format!("set       {}", setting.replacen('=', " = ", 1)))?;
        }
        if self.model.is_some() {
            self.check(stop)?;
        }
        Ok(())
    }

    /// What is filled in, as `--set` takes it.
    fn settings(&self, text: &str, file: &str) -> Result<Vec<String>> {
        let target =
            self.model.as_deref().map(|model| Target::open(model, &self.device)).transpose()?;
        let mut settings =
            target.map_or_else(|| Ok(Vec::new()), |target| target.settings(text, file))?;
        let (recipe, _) = recipe::parse::<Recipe>(text, file, &[])?;
        let data = &recipe.data;
        let sets = [
            ("train", &self.data, data.train.is_some()),
            (
                "calibration",
                &self.data,
                data.calibration.as_ref().is_some_and(|set| set.path.is_some()),
            ),
            ("validation", &self.validation, data.validation.is_some()),
        ];
        for (set, path, there) in sets {
            let Some(path) = path.as_ref().filter(|_| there) else { continue };
            settings.push(format!("data.{set}.path={}", quoted(&path.display().to_string())));
            settings.push(format!("data.{set}.format={}", quoted(self.format.name())));
        }
        Ok(settings)
    }

    /// What `fewbit check` says of the new file.
    fn check(&self, stop: &StopFlag) -> Result<()> {
        let path = self.path.display().to_string();
        let prepared = Prepared::to_look_at(&options(&path, &self.device), stop)?;
        for (what, set) in [("trains", &self.data), ("measures", &self.validation)] {
            if set.is_none() {
                let option = if what == "trains" { "--data" } else { "--validation" };
                output::aside(&format!(
                    "note      it {what} on the text that the recipe came with; {option} FILE names yours\n"
                ));
            }
        }
        super::train::print_check(&prepared, false)
    }
}

/// What a recipe is filled in for.
struct Target<'a> {
    model: &'a str,
    config: ModelConfig,
    on_cpu: bool,
}

impl<'a> Target<'a> {
    fn open(model: &'a str, device: &str) -> Result<Self> {
        let on_cpu = device::open(device)?.name == "cpu";
        let config = open_model(&locate::model(model)?)?.config;
        Ok(Self { model, config, on_cpu })
    }

    /// What the model and the device decide, as `--set` takes it.
    fn settings(&self, text: &str, file: &str) -> Result<Vec<String>> {
        let mut settings = vec![format!("model.path={}", quoted(self.model))];
        // On a CPU the lengths of a paper take days: there the recipe's own stay.
        if !self.on_cpu {
            settings.extend(real_model_settings(text));
        }
        let (recipe, _) = recipe::parse::<Recipe>(text, file, &settings)?;
        settings.extend(lengths(&recipe, self.config.max_positions));
        settings.extend(group_size(&recipe, &self.config));
        let (of, name) = (recipe.output.display(), self.model.trim_end_matches('/'));
        let name = name.rsplit(['/', ':']).next().unwrap_or(name);
        settings.push(format!("output={}", quoted(&format!("{of}-{name}"))));
        Ok(settings)
    }
}

/// Windows no longer than the model's context.
fn lengths(recipe: &Recipe, context: usize) -> Vec<String> {
    let data = &recipe.data;
    let sets = [
        ("calibration", &data.calibration),
        ("train", &data.train),
        ("validation", &data.validation),
    ];
    let long = sets.into_iter().filter(|(_, set)| {
        set.as_ref().and_then(|set| set.length).is_some_and(|length| length > context)
    });
    long.map(|(name, _)| format!("data.{name}.length={}", context.min(LONGEST))).collect()
}

/// A group size that divides the inputs of every linear, where the recipe's does not: a power of two, as formats
/// have them, or a row, where only tiny ones do.
fn group_size(recipe: &Recipe, config: &ModelConfig) -> Option<String> {
    let GroupSize::Of(size) = recipe.quant.group_size else { return None };
    let size = size.get();
    let inputs = config.linears().map(|(_, linear)| linear.shape[1]);
    let common = inputs.fold(0, gcd);
    if common == 0 || common % size == 0 {
        return None;
    }
    let powers = (0..=size.ilog2()).rev().map(|power| 1_usize << power);
    let fits = powers.take_while(|size| *size >= SMALLEST).find(|size| common % size == 0);
    let fits = fits.map_or_else(|| "\"channel\"".to_owned(), |size| size.to_string());
    Some(format!("quant.group_size={fits}"))
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_common_divisor() {
        assert_eq!([576, 1536, 192].into_iter().fold(0, gcd), 192);
        assert_eq!(gcd(0, 7), 7);
    }
}
