//! The command line: one match arm per command. Results go to stdout, everything else to stderr.

mod adapter;
mod bench;
mod chat;
mod data;
mod dialogue;
mod doctor;
mod eval;
mod explain;
mod export;
mod generate;
mod inspect;
mod kv;
mod logits;
mod output;
mod recipes;
mod report;
mod runs;
mod sampling;
mod serve;
mod shell;
mod sizes;
mod train;
mod verify;
mod watch;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use burn::tensor::DType;
use clap::{Args, CommandFactory, Parser, Subcommand};
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::bench::DeviceKernels;
use crate::data::{DataFormat, Marks, Reader, Reading, TokenStream, Tokenizer};
use crate::device::{self, NamedDevice};
use crate::error::{Error, Result};
use crate::exhausted;
use crate::export::{Adapter, OpenModel, open_model};
use crate::model::{CausalLm, Loader};
use crate::quant::Bits;
use crate::recipe::Compute;
use crate::report::terminal::Manner;
use crate::stop::StopFlag;
use crate::store::folder::entries;
use crate::store::locate;
use crate::store::safetensors::Checkpoint;
use crate::task::{Gauge, GaugeText};

/// Train language models into 4-, 3- and 2-bit weights.
#[derive(Debug, Parser)]
#[command(
    name = "fewbit",
    version,
    long_version = doctor::version(),
    max_term_width = 100,
    arg_required_else_help = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Show warnings, failures and results only
    #[arg(long, short, global = true, conflicts_with = "log_format")]
    quiet: bool,
    /// What stderr is written in: text, or json, an object a line
    #[arg(long, global = true, value_name = "FORMAT", value_parser = ["text", "json"])]
    log_format: Option<String>,
}

impl Cli {
    fn manner(&self) -> Manner {
        match self.log_format.as_deref() {
            Some("json") => Manner::Json,
            _ if self.quiet => Manner::Quiet,
            _ => Manner::Lines,
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every stage of a recipe; an unfinished run goes on by itself
    Train(train::TrainArgs),
    /// Find everything `train` would refuse, and estimate memory, disk and time; or, from a
    /// config.json alone, sizes and what there is to train
    Check(train::CheckArgs),
    /// List, show or copy the built-in recipes; print the schema that editors check recipes by
    Recipes(recipes::RecipesArgs),
    /// Say what a key of a recipe means, what it takes and what it is when left out
    Explain(explain::ExplainArgs),
    /// List runs: how they stand and what came out
    Runs(runs::RunsArgs),
    /// Look on while a run goes on somewhere else
    Watch(watch::WatchArgs),
    /// Show what a data set becomes
    Data(data::DataArgs),
    /// Measure a model, with the protocol beside the number
    Eval(eval::EvalArgs),
    /// Write a format from a run's packed export, or from any model that can be read
    Export(export::ExportArgs),
    /// Show and compare scale adapters, or write a base with one as a model of its own
    Adapter(adapter::AdapterArgs),
    /// Re-open an export and check hashes, codes, scales, shapes and parity
    Verify(verify::VerifyArgs),
    /// Show tensors, grids, bits per weight, sizes and histograms of codes
    Inspect(inspect::InspectArgs),
    /// Write a run, or several side by side, as one HTML page
    Report(report::ReportArgs),
    /// Continue prompts, or answer them by the model's chat template
    Generate(generate::GenerateArgs),
    /// Talk with a model, switching adapters in between
    ///
    /// Every line of the input is said to the model in the words of its chat template, and the
    /// conversation is remembered. A model without a template, or --plain, continues each line as a text
    /// of its own. Temperature and cuts are those of the model's generation_config.json unless given.
    /// Lines that begin with / are commands; /help lists them.
    Chat(chat::ChatArgs),
    /// Answer OpenAI's requests over HTTP: chat and plain completions, many at once
    ///
    /// GET /v1/models, POST /v1/chat/completions and POST /v1/completions answer as OpenAI's API does,
    /// in one piece or as server-sent events; GET /health and GET /metrics (Prometheus) say how it goes.
    /// Temperature and cuts are those of the model's generation_config.json unless a request says
    /// otherwise. The line with the address is printed when it listens. docs/generation.md lists what of
    /// a request is read, ignored and refused.
    Serve(serve::ServeArgs),
    /// Write the logits of a token sequence, for parity checks against other runtimes
    Logits(logits::LogitsArgs),
    /// Measure training steps, prompts, generation, loading and packing; or write random weights of a
    /// published model's shape, to measure with
    Bench(bench::BenchArgs),
    /// Say what was built in and found, check that every device computes right, and measure its speed
    Doctor(doctor::DoctorArgs),
    /// Print a shell's completion script
    Completions(shell::CompletionsArgs),
    /// Write manual pages
    Man(shell::ManArgs),
}

/// Parses the command line, runs it, prints at most one error, and chooses the exit code.
pub fn main() -> ExitCode {
    silence_panics();
    let cli = Cli::parse();
    cli.manner().choose();
    init_logging();
    let command = cli.command;
    let outcome = std::panic::catch_unwind(|| run(command)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(of_panic(&text.unwrap_or_default()))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error);
            ExitCode::from(u8::try_from(error.kind().exit_code()).unwrap_or(1))
        }
    }
}

/// A panic as an error: a device without memory panics where an operation runs.
fn of_panic(text: &str) -> Error {
    exhausted::error_of(text).unwrap_or_else(|| {
        Error::failed(format!("internal error: {text}"))
            .fix("RUST_LOG=debug for the place, and report it; what was saved is kept")
    })
}

fn run(command: Command) -> Result<()> {
    let stop = StopFlag::from_signals()?;
    choose_kernels()?;
    match command {
        Command::Train(args) => train::train(args, &stop),
        Command::Check(args) => train::check(args, &stop),
        Command::Recipes(args) => recipes::run(args, &stop),
        Command::Explain(args) => explain::run(&args),
        Command::Runs(args) => runs::run(&args),
        Command::Watch(args) => watch::run(&args, &stop),
        Command::Data(args) => data::run(&args, &stop),
        Command::Eval(args) => eval::run(&args, &stop),
        Command::Export(args) => export::run(&args, &stop),
        Command::Adapter(args) => adapter::run(&args, &stop),
        Command::Verify(args) => verify::run(&args, &stop),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args, &stop),
        Command::Generate(args) => generate::run(&args, &stop),
        Command::Chat(args) => chat::run(&args, &stop),
        Command::Serve(args) => serve::run(&args, &stop),
        Command::Logits(args) => logits::run(&args),
        Command::Bench(args) => bench::run(&args, &stop),
        Command::Doctor(args) => doctor::run(&args, &stop),
        Command::Completions(args) => shell::completions(Cli::command(), &args),
        Command::Man(args) => shell::man(Cli::command(), &args),
    }
}

/// Which kernels of ours run on devices: `off` for a driver that cannot take them, `all` where more is asked of a
/// software device than its backend promises.
const KERNELS: &str = "FEWBIT_DEVICE_KERNELS";

fn choose_kernels() -> Result<()> {
    let Some(text) = std::env::var_os(KERNELS).filter(|text| !text.is_empty()) else {
        return Ok(());
    };
    let known = DeviceKernels::NAMES;
    let Some((_, choice)) = known.into_iter().find(|(name, _)| text == *name) else {
        return Err(Error::usage(format!("no choice of kernels: `{}`", text.display()))
            .at(format!("environment variable {KERNELS}"))
            .fix(format!("one of: {}", known.map(|(name, _)| name).join(", "))));
    };
    choice.choose();
    Ok(())
}

fn init_logging() {
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("fewbit=warn,off"));
    // The HTTP client logs requests byte by byte, with the token and signed addresses in them.
    let without_secrets = filter_fn(|line| !line.target().starts_with("ureq"));
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines =
        tracing_subscriber::fmt::layer().with_ansi(colour).with_target(false).without_time();
    let lines = lines.with_writer(std::io::stderr);
    let lines: Box<dyn Layer<_> + Send + Sync> = match Manner::chosen() {
        Manner::Json => lines.event_format(output::JsonLine).boxed(),
        Manner::Lines | Manner::Quiet => lines.boxed(),
    };
    // A second call only happens in tests.
    let _ =
        tracing_subscriber::registry().with(filter).with(without_secrets).with(lines).try_init();
}

/// A panic becomes an error like any other; where it happened is a debug message.
fn silence_panics() {
    std::panic::set_hook(Box::new(|info| tracing::debug!("{info}")));
}

/// `--model` and what is needed to load it.
#[derive(Args, Debug)]
struct ModelArgs {
    /// A Hugging Face folder, a GGUF file, a fewbit run or export, embedded:NAME, or a hub id
    /// owner/name[@rev]
    #[arg(long, value_name = "DIR")]
    model: String,
    /// Where to run: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of activations: f32 or bf16; int8 is f32 but in products with packed codes, before which they
    /// are rounded to 8 bits (cpu)
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = arithmetic)]
    compute: Arithmetic,
    /// The width at which a model of several is read (method.anybcq) [default: the widest]
    #[arg(long, value_name = "N", value_parser = bits)]
    bits: Option<Bits>,
}

/// A model, and the adapter whose scales it gets.
#[derive(Args, Debug)]
struct AdaptedArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// A scale adapter for the model, which is then the packed base it was trained on: a file, or
    /// a run that left one
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
}

fn compute(text: &str) -> Result<Compute, String> {
    match text {
        "f32" => Ok(Compute::F32),
        "bf16" => Ok(Compute::Bf16),
        _ => Err("f32 or bf16".to_owned()),
    }
}

/// How activations are held, and how they are multiplied with packed codes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Arithmetic {
    /// Held and multiplied in a type.
    Float(Compute),
    /// Held in f32, and rounded to 8 bits for products with packed codes.
    Int8,
}

impl Arithmetic {
    const F32: Self = Self::Float(Compute::F32);

    fn dtype(self) -> DType {
        match self {
            Self::Float(compute) => compute.dtype(),
            Self::Int8 => DType::F32,
        }
    }

    /// Has a model compute so.
    ///
    /// # Errors
    /// A usage error where no linear of it has integer products.
    fn apply(self, model: &mut CausalLm, device: &NamedDevice) -> Result<()> {
        if self == Self::Int8 && model.multiply_in_integers() == 0 {
            return Err(no_integers(device));
        }
        Ok(())
    }
}

/// Nothing would be computed as `--compute int8` says.
fn no_integers(device: &NamedDevice) -> Error {
    let what = if device.name == "cpu" {
        "the model has no packed codes on a uniform grid: nothing would be rounded"
    } else {
        "products in integers are the processor's"
    };
    let fix = if device.name == "cpu" {
        "--compute f32, or a packed export of the model"
    } else {
        "--device cpu, or --compute f32"
    };
    Error::usage(what).at("--compute int8").fix(fix)
}

fn arithmetic(text: &str) -> Result<Arithmetic, String> {
    match text {
        "int8" => Ok(Arithmetic::Int8),
        _ => compute(text).map(Arithmetic::Float).map_err(|_| "f32, bf16 or int8".to_owned()),
    }
}

fn bits(text: &str) -> Result<Bits, String> {
    let bits = text.parse::<i64>().map_err(|_| "a number of bits, 1 to 8".to_owned())?;
    Bits::try_from(bits)
}

fn data_format(text: &str) -> Result<DataFormat, String> {
    let known = DataFormat::ALL.into_iter().find(|format| format.name() == text);
    known.ok_or_else(|| DataFormat::ALL.map(DataFormat::name).join(", "))
}

/// A model opened for a command.
struct Session {
    opened: OpenModel,
    /// The file of the adapter that it was opened with.
    adapter: Option<PathBuf>,
    device: NamedDevice,
    compute: Arithmetic,
}

impl ModelArgs {
    fn open(&self) -> Result<Session> {
        let opened = open_model(&locate::model(&self.model)?)?;
        Ok(Session {
            device: device::open(&self.device)?,
            opened: match self.bits {
                Some(bits) => opened.at_width(bits)?,
                None => opened,
            },
            adapter: None,
            compute: self.compute,
        })
    }
}

impl AdaptedArgs {
    fn open(&self) -> Result<Session> {
        // A wrong path is found before a model is looked for.
        let adapter = self.adapter.as_deref().map(read_adapter).transpose()?;
        let session = self.model.open()?;
        Ok(match adapter {
            None => session,
            Some((path, adapter)) => Session {
                opened: session.opened.with_adapter(adapter)?,
                adapter: Some(path),
                ..session
            },
        })
    }
}

/// The adapter that a path stands for, with its file: the file itself, or the only one of a run or
/// of its `adapters/`.
fn read_adapter(path: &Path) -> Result<(PathBuf, Adapter)> {
    let file = if path.is_dir() { adapter_of(path)? } else { path.to_owned() };
    Ok((file.clone(), Adapter::read(&file)?))
}

fn adapter_of(folder: &Path) -> Result<PathBuf> {
    let inside = folder.join("adapters");
    let place = if inside.is_dir() { &inside } else { folder };
    let mut files = entries(place)?;
    files.retain(|path| {
        path.extension().is_some_and(|extension| extension == "safetensors")
            && Checkpoint::open_file(path)
                .is_ok_and(|file| Adapter::is_described_by(file.file_metadata()))
    });
    let error = |what: &str| Error::usage(what).at(folder.display());
    match &files[..] {
        [one] => Ok(one.clone()),
        [] => {
            Err(error("the folder holds no adapter")
                .fix("a file under a run's adapters/, or the run"))
        }
        [first, ..] => {
            let count = files.len();
            Err(error(&format!("the folder holds {count} adapters"))
                .fix(format!("one of them: {}", first.display())))
        }
    }
}

impl Session {
    fn load(&self) -> Result<CausalLm> {
        let (config, device) = (&self.opened.config, &self.device.device);
        let dtype = self.compute.dtype();
        let mut model = Loader { config, source: &self.opened, device, dtype }.model()?;
        self.compute.apply(&mut model, &self.device)?;
        Ok(model.with_tap(self.opened.tap()))
    }

    /// The model read at each narrower width that it has; what is not codes is `widest`'s own.
    fn narrower(&self, widest: &CausalLm) -> Result<Vec<(Bits, CausalLm)>> {
        let mut widths = self.opened.widths();
        widths.pop_last();
        let head = widest.config.head();
        let coded_head = self.opened.linears().any(|(name, _)| name == head);
        let read = |bits: Bits| -> Result<(Bits, CausalLm)> {
            let opened = open_model(&self.opened.dir)?.at_width(bits)?;
            let (config, device) = (&opened.config, &self.device.device);
            let loader = Loader { config, source: &opened, device, dtype: self.compute.dtype() };
            let mut model = loader.model()?.with_tap(opened.tap());
            model.embed = widest.embed.clone();
            if !coded_head {
                model.head.clone_from(&widest.head);
            }
            Ok((bits, model))
        };
        widths.into_iter().rev().map(read).collect()
    }

    fn tokenizer(&self) -> Result<Tokenizer> {
        self.opened.tokenizer()
    }

    /// Reads data with the model's tokenizer and chat template.
    fn read(
        &self,
        paths: &[PathBuf],
        reading: &Reading,
        tokenizer: &Tokenizer,
        marks: Marks,
        length: usize,
    ) -> Result<TokenStream> {
        let (template, vocab) = (&|| self.opened.chat_template(), self.opened.config.vocab);
        Reader { tokenizer, template, marks, length, vocab }.read(paths, reading)
    }

    /// What an export must not change of this model.
    fn gauge<'a>(
        &'a self,
        text: Option<GaugeText<'a>>,
        stop: &'a StopFlag,
        progress: &'a dyn Fn(u64, u64),
    ) -> Result<Gauge<'a>> {
        let tokenizer = self.opened.has_tokenizer().then(|| self.tokenizer()).transpose()?;
        let prompts = Gauge::prompts(tokenizer.as_ref(), &self.opened.config);
        let device = &self.device.device;
        Ok(Gauge { device, dtype: self.compute.dtype(), prompts, text, stop, progress })
    }

    /// The token put before a text, where the model has one.
    fn bos(&self, tokenizer: &Tokenizer) -> Result<Option<u32>> {
        match self.opened.config.bos {
            Some(bos) => Ok(Some(bos)),
            None => tokenizer.bos_id(),
        }
    }

    /// The tokens put around documents.
    fn marks(&self, tokenizer: &Tokenizer) -> Result<Marks> {
        Ok(Marks { bos: self.bos(tokenizer)?, eos: self.opened.config.eos.first().copied() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
