//! `fewbit export`: another format of a packed model, with an adapter's scales or its own.

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args};

use super::{AdaptedArgs, Arithmetic, ModelArgs, Session, data_format, output};
use crate::data::{DataFormat, Reading, TokenStream, sha256_of};
use crate::error::{Error, Result};
use crate::export::{Exported, Format, FormatsConfig, Gate, Manifest, OpenModel, write_opened};
use crate::model::WeightSource;
use crate::quant::Bits;
use crate::report::size;
use crate::report::terminal::Bar;
use crate::stage::PARITY_WINDOWS;
use crate::stop::StopFlag;
use crate::store::folder::entries;
use crate::store::locate;
use crate::task::{GaugeText, Gauged, Perplexity, PplConfig};

/// Arguments of `export`.
#[derive(Args, Debug)]
#[command(group(ArgGroup::new("source").required(true).args(["run", "model"])))]
pub(super) struct ExportArgs {
    /// A finished run, whose packed export is read
    #[arg(long, value_name = "DIR")]
    run: Option<PathBuf>,
    /// Any model: a folder, whoever packed it, a GGUF file, a run, or a hub id
    #[arg(long, value_name = "DIR")]
    model: Option<String>,
    /// A scale adapter to put in place of the model's own scales
    #[arg(long, value_name = "FILE")]
    adapter: Option<PathBuf>,
    /// The format to write
    #[arg(long, value_parser = formats())]
    format: Format,
    #[command(flatten)]
    target: TargetArgs,
}

/// Where an export goes, and how it is checked.
#[derive(Args, Debug)]
pub(super) struct TargetArgs {
    /// The folder to write; an export that is there is replaced once the new one is checked
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// Sets a key of the format, as under [stage.export]: embeddings=8 (or 6, 4) of gguf and mlx,
    /// embeddings=f16 (or bf16) of all but fewbit and dequantized, scales=f16 of mlx and
    /// compressed_tensors, version=1 of gptq, precisions=[1,2] of bcq, dtype=bf16 of dequantized, lossy=true where weights may
    /// change; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Text to measure the perplexity on, before and after; codes and weights are compared anyway
    #[arg(long, value_name = "FILE")]
    data: Option<String>,
    /// What the data holds: text, completion or instruction [default: what the model's manifest
    /// says of this data, else text]
    #[arg(long, value_name = "FORMAT", value_parser = data_format)]
    data_format: Option<DataFormat>,
    /// The width that is written of a model of several (method.anybcq) [default: the widest, and all of them
    /// in fewbit's own format]
    #[arg(long, value_name = "N", value_parser = super::bits)]
    bits: Option<Bits>,
    /// Where to measure: auto, cpu, cuda[:i], metal, rocm[:i], vulkan, wgpu
    #[arg(long, default_value = "auto")]
    device: String,
}

/// The formats by name, for clap.
pub(super) fn formats() -> impl TypedValueParser<Value = Format> {
    let known = Format::ALL.map(|format| PossibleValue::new(format.name()).help(format.about()));
    PossibleValuesParser::new(known).map(|name| {
        let named = Format::ALL.into_iter().find(|format| format.name() == name);
        // The parser lets no other name pass.
        named.unwrap_or(Format::Fewbit)
    })
}

pub(super) fn run(args: &ExportArgs, stop: &StopFlag) -> Result<()> {
    let model = match (&args.run, &args.model) {
        (Some(run), _) => packed_export(run)?.display().to_string(),
        // Without a run, clap has seen to a model.
        (None, model) => model.clone().unwrap_or_default(),
    };
    write(&model, args.adapter.as_deref(), args.format, &args.target, stop)
}

/// The packed export of a run.
fn packed_export(run: &Path) -> Result<PathBuf> {
    if !run.join("run.json").is_file() {
        return Err(Error::usage("this is no run's folder: it has no run.json")
            .at(run.display())
            .fix("a folder that `fewbit train` wrote, or --model for another packed folder"));
    }
    let packed = run.join("export").join(Format::Fewbit.name());
    if packed.is_dir() {
        return Ok(packed);
    }
    Err(Error::usage("this run has no packed export")
        .at(run.display())
        .fix("finish it with `fewbit train`; its recipe needs [stage.export] format.fewbit = {}"))
}

/// Writes `model` with the scales of `adapter`, and prints what was written and checked.
pub(super) fn write(
    model: &str,
    adapter: Option<&Path>,
    format: Format,
    args: &TargetArgs,
    stop: &StopFlag,
) -> Result<()> {
    let options = FormatsConfig::of(format, &args.set)?;
    let device = args.device.clone();
    // What `verify` measures in.
    let model =
        ModelArgs { model: model.to_owned(), device, compute: Arithmetic::F32, bits: args.bits };
    let session = AdaptedArgs { model, adapter: adapter.map(Path::to_owned) }.open()?;
    let data = args.data.as_deref().map(locate::data).transpose()?;
    let inputs = [Some(&session.opened.dir), session.adapter.as_ref(), data.as_ref()];
    check_output(&args.output, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
    let text = data.map(|data| Text::load(&session, &data, args.data_format)).transpose()?;
    let bar = Bar::new("export", "comparing with what was read");
    let progress = |done, of| bar.at(done, of);
    let gauge = session.gauge(text.as_ref().map(Text::gauge), stop, &progress)?;
    let opened = &session.opened;
    let decoded = Decoded(opened);
    let source: &dyn WeightSource = if format == Format::Fewbit { opened } else { &decoded };
    let trained = gauge.measure(&opened.config, source, opened.tap())?;
    let gate = Gate { gauge: &gauge, trained: &trained };
    let device = &session.device.name;
    let exported = write_opened(opened, format, &options, &args.output, &gate, device)?;
    bar.clear();
    print(&session, format, &exported, &trained)
}

fn print(session: &Session, format: Format, exported: &Exported, trained: &Gauged) -> Result<()> {
    let adapter = session.opened.adapter.as_ref().map_or_else(String::new, |adapter| {
        let head = adapter.head();
        format!("adapter    {}, trained by {} on {}\n", head.name, head.method, head.base)
    });
    let checked = match (&trained.perplexity, &exported.gauged.perplexity) {
        (Some(before), Some(after)) if exported.lossy => format!(
            "perplexity {:.4} became {:.4} (context {})",
            before.perplexity, after.perplexity, after.context
        ),
        _ if exported.lossy => "--data FILE compares a perplexity".to_owned(),
        (Some(Perplexity { perplexity, context, .. }), _) => format!(
            "every weight, prompts' logits and perplexity {perplexity:.4} (context {context}) equal"
        ),
        (None, _) => {
            "every weight and prompts' logits equal; --data FILE compares a perplexity too"
                .to_owned()
        }
    };
    let (bytes, bits) = (size(exported.bytes), exported.bits_per_weight);
    let whole = exported.bits_per_parameter;
    let bits = if bits > 0.0 { format!("{bits:.2} bits/weight, ") } else { String::new() };
    output::line(&format!(
        "exported   {}\n\
         format     {}, {bytes}, {bits}{whole:.2} bits a parameter in all\n\
         {adapter}{}checked    {checked}",
        exported.path.display(),
        format.name(),
        losses(exported, trained),
    ))
}

/// What was changed of each linear; nothing where nothing was.
fn losses(exported: &Exported, trained: &Gauged) -> String {
    if !exported.lossy {
        return String::new();
    }
    let each = exported.losses.iter().map(|(name, loss)| {
        let (percent, largest) = (100.0 * loss.relative, loss.largest);
        format!("           {percent:8.4} %  at most {largest:.2e}  {name}\n")
    });
    let same = trained.next_tokens() == exported.gauged.next_tokens();
    let tokens = if same { "equal" } else { "differ" };
    format!(
        "lossy      tensors changed: {}\n{}\
         logits     differ by at most {:.3}; likeliest next tokens of the prompts {tokens}\n",
        exported.losses.len(),
        each.collect::<String>(),
        trained.logits_differ(&exported.gauged),
    )
}

/// Refuses to replace anything but an export, or a folder that something is read from.
fn check_output(output: &Path, inputs: &[&PathBuf]) -> Result<()> {
    let refused =
        |what: &str, at: &Path| Err(Error::usage(what).at(at.display()).fix("another --output"));
    if output.as_os_str().is_empty() || output.is_file() {
        return refused("the output is no folder", output);
    }
    if !output.is_dir() {
        return Ok(());
    }
    let real = |path: &Path| path.canonicalize().map_err(|e| Error::io("resolve", path, &e));
    let target = real(output)?;
    for input in inputs {
        if real(input)?.starts_with(&target) {
            return refused("the output folder would replace what is read", input);
        }
    }
    let manifest = Manifest::read(output).ok().flatten();
    let ours = |name: &str| manifest.as_ref().is_some_and(|manifest| manifest.covers(name));
    for path in entries(output)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !path.is_file() || !ours(&name) {
            return refused("the output folder holds files of something else", &path);
        }
    }
    Ok(())
}

/// A packed model as the weights that its codes stand for.
struct Decoded<'a>(&'a OpenModel);

impl WeightSource for Decoded<'_> {
    fn weight(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.0.weight(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }

    fn overrides(&self, name: &str) -> bool {
        self.0.overrides(name)
    }
}

/// The text that the gate measures a perplexity on.
struct Text {
    stream: TokenStream,
    task: PplConfig,
    sha256: String,
    reading: Reading,
}

impl Text {
    fn load(session: &Session, data: &Path, format: Option<DataFormat>) -> Result<Self> {
        let sha256 = sha256_of(&[data])?;
        let recorded = session.opened.manifest.as_ref().and_then(|m| m.parity.as_ref());
        let recorded = recorded.filter(|parity| parity.data_sha256 == sha256);
        let reading = match (format, recorded) {
            (None, Some(parity)) => parity.reading.clone(),
            (format, _) => Reading::from(format.unwrap_or_default()).resolved(&[data])?,
        };
        let recorded = recorded.filter(|parity| parity.reading == reading);
        let task = PplConfig {
            context: recorded.map(|parity| parity.context),
            stride: recorded.and_then(|parity| parity.stride),
            windows: recorded.and_then(|parity| parity.windows).or(Some(PARITY_WINDOWS)),
            ..PplConfig::default()
        };
        let config = &session.opened.config;
        let (context, _) =
            PplConfig { context: task.context, ..PplConfig::default() }.windows(config, None)?;
        let tokenizer = session.tokenizer()?;
        let marks = session.marks(&tokenizer)?;
        let stream = session.read(&[data.to_owned()], &reading, &tokenizer, marks, context)?;
        let (context, stride) = task.windows(config, stream.packed)?;
        stream.strided(context, stride).map_err(|e| e.at(data.display()))?;
        Ok(Self { stream, task, sha256, reading })
    }

    fn gauge(&self) -> GaugeText<'_> {
        let Self { stream, task, sha256, reading } = self;
        let (task, sha256, reading) = (task.clone(), sha256.clone(), reading.clone());
        GaugeText { stream, task, sha256, reading }
    }
}
