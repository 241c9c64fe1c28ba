//! `fewbit bench`: measured times of what users wait for; and models of random weights to measure with.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use clap::Args;
use serde_json::{Map, Value, json};

use super::{Arithmetic, arithmetic, no_integers, output};
use crate::bench::{Bench, Ceiling, Effort, Measured, Part, Refusal, Settings, Subject};
use crate::device;
use crate::error::{Error, Result};
use crate::model::{known_config, write_random, write_random_seed};
use crate::report::size;
use crate::stop::StopFlag;
use crate::store::locate;

/// What is measured where nothing else is asked for.
const BUILT_IN: &str = "embedded:tinystories-656k";

/// Arguments of `bench`.
#[derive(Args, Debug)]
pub(super) struct BenchArgs {
    /// The model to measure with: a folder, a GGUF file, a run, or a hub id [default: the built-in one]
    #[arg(long, value_name = "DIR", conflicts_with = "like")]
    model: Option<String>,
    /// Instead, random weights of a published model's shape, llama-3.2-1b for instance, or of a
    /// config.json; they are made as they are needed, nothing is downloaded
    #[arg(long, value_name = "SHAPE")]
    like: Option<String>,
    /// Of that shape only so many blocks
    #[arg(long, value_name = "BLOCKS", requires = "like", value_parser = positive())]
    layers: Option<u32>,
    /// Measure nothing, but write those random weights as a folder: config.json, bf16 safetensors, and
    /// the built-in tokenizer where its vocabulary fits
    #[arg(long, value_name = "DIR", requires = "like", conflicts_with_all = ["part", "method", "batch", "length"])]
    write: Option<PathBuf>,
    /// With --write: the seed in the place of the weights, which any command then makes as it reads them.
    /// A folder of a few kilobytes, to rehearse a run with
    #[arg(long, requires = "write")]
    seed_only: bool,
    /// What to measure: block, distill, load, prompt, generate, export [default: all that fit]
    #[arg(long, value_name = "PART", value_delimiter = ',')]
    part: Vec<String>,
    /// Texts at once [default: 2; in generation 1 and 8]
    #[arg(long, value_name = "TEXTS", value_parser = positive())]
    batch: Option<u32>,
    /// Tokens of a text [default: 256, or the model's context]
    #[arg(long, value_name = "TOKENS", value_parser = positive())]
    length: Option<u32>,
    /// What learns [default: flexround in block and export, seq in distill]
    #[arg(long, value_name = "METHOD")]
    method: Option<String>,
    /// Measure each part for so many seconds
    #[arg(long, default_value_t = 2.0, conflicts_with = "repeat", value_parser = seconds)]
    seconds: f64,
    /// Measure each part so often instead, after a first time that does not count
    #[arg(long, value_name = "TIMES", value_parser = positive())]
    repeat: Option<u32>,
    /// Where to run: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto")]
    device: String,
    /// Type of activations: f32 or bf16, or int8 (see `generate`) in prompt and generate; block is always
    /// f32, as in a run
    #[arg(long, value_name = "TYPE", default_value = "f32", value_parser = arithmetic)]
    compute: Arithmetic,
    /// Of the random weights
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn positive() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..)
}

fn seconds(text: &str) -> Result<f64, String> {
    let value: f64 = text.parse().map_err(|_| "a number of seconds".to_owned())?;
    if value.is_finite() && value > 0.0 { Ok(value) } else { Err("seconds above 0".to_owned()) }
}

pub(super) fn run(args: &BenchArgs, stop: &StopFlag) -> Result<()> {
    let asked = args.parts()?;
    let method = args.method.as_deref().map(Settings::method).transpose()?;
    let shape = |like| config_of(like).and_then(|config| with_layers(config, args.layers));
    let like = args.like.as_deref().map(|like| shape(like).map(|config| (like, config)));
    let like = like.transpose()?;
    if let (Some(target), Some((like, config))) = (&args.write, &like) {
        return write(args, target, like, config, stop);
    }
    let device = device::open(&args.device)?;
    let subject = if let Some((like, config)) = &like {
        Subject::random(like, config, args.seed)?
    } else {
        let model = args.model.as_deref().unwrap_or(BUILT_IN);
        Subject::open(model, locate::model(model)?)?
    };
    let settings = Settings { method, ..args.settings(&subject)? };
    if asked.contains(&Part::Load) {
        subject.path()?;
    }
    let parts = if asked.is_empty() { default_parts(&subject) } else { asked.clone() };
    // What was asked for is refused before anything is measured.
    let refused: Vec<Refusal> = {
        let of = |part: &Part| Refusal::of(&subject, *part, &settings, &device);
        parts.iter().filter_map(of).collect()
    };
    if let (Some(refusal), false) = (refused.first(), asked.is_empty()) {
        return Err(refusal.error());
    }
    let fits = |part: &Part| refused.iter().all(|refusal| refusal.part != *part);
    let parts: Vec<Part> = parts.into_iter().filter(fits).collect();
    let serving = parts.iter().any(|part| matches!(part, Part::Prompt | Part::Generate));
    if settings.integers && serving && !subject.has_integer_products(&device.device)? {
        return Err(no_integers(&device));
    }
    let ceiling = Ceiling::measure(&device.device, settings.dtype, stop)?;
    let bench =
        Bench { subject: &subject, device: &device, settings: &settings, ceiling: &ceiling, stop };
    let mut all = Vec::new();
    if !args.json {
        output::print(&head(&bench))?;
    }
    // Each line as soon as it is known: a large model takes minutes.
    let waiting = |text: &str| {
        if !args.json && std::io::stderr().is_terminal() {
            output::aside(text);
        }
    };
    waiting("measuring ...\r");
    bench.run(&parts, &mut |measured| {
        if !args.json {
            output::line(&line(&measured))?;
        }
        waiting("measuring ...\r");
        all.push(measured);
        Ok(())
    })?;
    waiting("             \r");
    if args.json {
        return output::json(&as_json(&bench, &all, &refused));
    }
    for Refusal { part, needs, free, fits } in &refused {
        let (needs, free) = (size(*needs), size(*free));
        let name = part.name();
        output::line(&format!("{name:<8} left out: about {needs} needed, {free} free"))?;
        output::line(&format!("         try {fits}"))?;
    }
    Ok(())
}

/// Random weights are in no file that could be read.
fn default_parts(subject: &Subject) -> Vec<Part> {
    Part::ALL.into_iter().filter(|part| *part != Part::Load || !subject.is_random()).collect()
}

impl BenchArgs {
    fn parts(&self) -> Result<Vec<Part>> {
        let find = |name: &String| {
            Part::ALL.into_iter().find(|part| part.name() == name).ok_or_else(|| {
                let known = Part::ALL.map(Part::name).join(", ");
                Error::usage(format!("there is no part `{name}`"))
                    .at(format!("--part {}", self.part.join(",")))
                    .fix(format!("one of: {known}"))
            })
        };
        let asked: Vec<Part> = self.part.iter().map(find).collect::<Result<_>>()?;
        Ok(Part::ALL.into_iter().filter(|part| asked.contains(part)).collect())
    }

    /// All but the method.
    fn settings(&self, subject: &Subject) -> Result<Settings> {
        let context = subject.config.max_positions;
        let length = self.length.map_or(256.min(context), |length| length as usize);
        if length > context {
            return Err(Error::usage(format!("the model's context has {context} tokens"))
                .at(format!("--length {length}"))
                .fix(format!("--length {context}")));
        }
        Ok(Settings {
            batch: self.batch.map_or(2, |batch| batch as usize),
            length,
            batch_given: self.batch.is_some(),
            method: None,
            dtype: self.compute.dtype(),
            integers: self.compute == Arithmetic::Int8,
            effort: Effort {
                seconds: self.seconds,
                repeat: self.repeat.map(|repeat| repeat as usize),
            },
        })
    }
}

/// The type of activations, as its flag says it.
fn compute(settings: &Settings) -> &'static str {
    match settings.dtype {
        DType::F32 if settings.integers => "int8",
        DType::F32 => "f32",
        _ => "bf16",
    }
}

fn head(bench: &Bench<'_>) -> String {
    let Bench { subject, device, settings, ceiling, .. } = bench;
    let config = &subject.config;
    let random = if subject.is_random() { ", random weights" } else { "" };
    let compute = compute(settings);
    let giga = |flops: f64| flops / 1e9;
    format!(
        "model     {}{random}\n          {} blocks of width {}, {} parameters\n\
         device    {}, {compute}\n\
         ceiling   {:.1} GFLOP/s at {}, {:.1} at {}; memory {:.1} GB/s\n\n\
         {:<8} {:<22} {:>9} {:>6} {:>10} {:>6} {:>4} {:>7}\n",
        subject.name,
        config.n_blocks,
        config.d_model,
        short(config.parameters() as f64),
        device.name,
        giga(ceiling.small_flops),
        ceiling.small_side,
        giga(ceiling.large_flops),
        ceiling.large_side,
        ceiling.bytes / 1e9,
        "part",
        "",
        "median",
        "spread",
        "a second",
        "GFLOPS",
        "of",
        "memory",
    )
}

fn line(measured: &Measured) -> String {
    let Measured { part, what, seconds, unit, per_second, flops, of_ceiling, peak_bytes, .. } =
        measured;
    let or = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    format!(
        "{:<8} {what:<22} {:>9} {:>6} {:>10} {:>6} {:>4} {:>7}",
        part.name(),
        time(seconds.median),
        or((seconds.repeats > 1).then(|| format!("{:.1} %", 100.0 * seconds.relative()))),
        format!("{}{}", short(*per_second), brief(unit)),
        or(flops.map(|flops| format!("{:.1}", flops / 1e9))),
        or(of_ceiling.map(|part| format!("{:.0} %", 100.0 * part))),
        or(peak_bytes.map(size)),
    )
}

/// A unit in few letters.
fn brief(unit: &str) -> &'static str {
    match unit {
        "tokens" => " tok",
        "bytes" => "B",
        _ => " w",
    }
}

/// Seconds with a unit that suits them.
fn time(seconds: f64) -> String {
    match seconds {
        0.0..1e-3 => format!("{:.1} us", 1e6 * seconds),
        1e-3..1.0 => format!("{:.2} ms", 1e3 * seconds),
        _ => format!("{seconds:.2} s"),
    }
}

/// A count in three digits or so.
fn short(count: f64) -> String {
    match count {
        0.0..1e2 => format!("{count:.2}"),
        1e2..1e4 => format!("{count:.0}"),
        1e4..1e6 => format!("{:.1} k", count / 1e3),
        1e6..1e9 => format!("{:.1} M", count / 1e6),
        _ => format!("{:.2} G", count / 1e9),
    }
}

fn as_json(bench: &Bench<'_>, parts: &[Measured], refused: &[Refusal]) -> Value {
    let Bench { subject, device, settings, ceiling, .. } = bench;
    let config = &subject.config;
    json!({
        "fewbit": env!("CARGO_PKG_VERSION"),
        "model": {
            "name": subject.name,
            "model_type": config.model_type,
            "random": subject.is_random(),
            "blocks": config.n_blocks,
            "width": config.d_model,
            "parameters": config.parameters(),
        },
        "device": device.name,
        "compute": compute(settings),
        "batch": settings.batch,
        "length": settings.length,
        "ceiling": ceiling,
        "parts": parts,
        "left_out": refused,
    })
}

fn write(
    args: &BenchArgs,
    target: &Path,
    like: &str,
    config: &Map<String, Value>,
    stop: &StopFlag,
) -> Result<()> {
    let shown = std::io::stderr().is_terminal();
    let mut told = 0;
    let bytes = if args.seed_only {
        write_random_seed(config, args.seed, target)?;
        0
    } else {
        write_random(config, args.seed, target, stop, &mut |done, of| {
            let percent = 100 * done / of.max(1);
            if shown && percent > told {
                told = percent;
                output::aside(&format!("\r{percent:>3} %\r"));
            }
        })?
    };
    let path = target.display().to_string();
    if args.json {
        let seed = args.seed;
        return output::json(
            &json!({ "written": path, "like": like, "seed": seed, "bytes": bytes }),
        );
    }
    if args.seed_only {
        let seed = args.seed;
        return output::line(&format!("{path}   seed {seed} of random weights like {like}"));
    }
    output::line(&format!("{path}   {} of random weights like {like}", size(bytes)))
}

/// A config of fewer blocks.
fn with_layers(mut config: Map<String, Value>, layers: Option<u32>) -> Result<Map<String, Value>> {
    const KEYS: [&str; 3] = ["num_hidden_layers", "n_layer", "num_layers"];
    let Some(layers) = layers else { return Ok(config) };
    let own = KEYS.into_iter().find_map(|key| Some((key, config.get(key)?.as_u64()?)));
    let Some((key, _)) = own.filter(|(_, own)| u64::from(layers) <= *own) else {
        let has = own.map_or_else(|| "no number of them".to_owned(), |(_, own)| format!("{own}"));
        return Err(Error::usage(format!("--layers {layers}, and the shape has {has}"))
            .at("--layers")
            .fix(own.map_or_else(String::new, |(_, own)| format!("--layers {own}, or fewer"))));
    };
    config.insert(key.to_owned(), layers.into());
    if let Some(Value::Array(kinds)) = config.get_mut("layer_types") {
        kinds.truncate(layers as usize);
    }
    Ok(config)
}

/// The config of a known shape, or of a file or folder.
fn config_of(like: &str) -> Result<Map<String, Value>> {
    let path = Path::new(like);
    let path = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    if !path.is_file() {
        return known_config(like).map_err(|error| error.at(format!("--like {like}")));
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io("read", &path, &e))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::preflight(format!("config.json is not valid: {e}"))
            .at(path.display())
            .fix("the model's own config.json")
    })
}
