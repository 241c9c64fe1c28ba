//! `fewbit eval`: a number and the protocol that produced it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::json;

use super::{AdaptedArgs, Session, data_format, output};
use crate::data::{DataFormat, Marks, TokenStream, sha256_of};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::report::Event;
use crate::report::Reporter;
use crate::report::terminal::Terminal;
use crate::stop::StopFlag;
use crate::store::folder::sha256_file;
use crate::store::locate;
use crate::task::{self, PplConfig};

/// Arguments of `eval`.
#[derive(Args, Debug)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// What to measure
    #[arg(long, value_enum, default_value = "ppl")]
    task: Task,
    /// Text (JSONL with "text", a JSON list of strings, or plain text), or examples of the --format;
    /// several are joined in order
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// What the data holds: text, completion ("prompt", "completion") or instruction
    /// ("instruction", "input", "output"); of examples only completions count
    #[arg(long, default_value = "text", value_parser = data_format)]
    format: DataFormat,
    /// Window length in tokens, which examples are packed into whole [default: the model's context,
    /// at most 2048]
    #[arg(long)]
    context: Option<usize>,
    /// Tokens between window starts [default: the context]
    #[arg(long)]
    stride: Option<usize>,
    /// Use only this many windows, evenly spread
    #[arg(long)]
    windows: Option<usize>,
    /// Put no BOS token before documents
    #[arg(long)]
    no_bos: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Task {
    /// Perplexity per token
    Ppl,
}

pub(super) fn run(args: &EvalArgs, stop: &StopFlag) -> Result<()> {
    let Task::Ppl = args.task;
    let session = args.source.open()?;
    let task = PplConfig { context: args.context, stride: args.stride, windows: args.windows };
    let config = &session.opened.config;
    let (context, stride) = protocol(&task, config, args.format)?;
    let paths: Vec<PathBuf> = args.data.iter().map(|d| locate::data(d)).collect::<Result<_>>()?;
    let tokenizer = session.tokenizer()?;
    let mut marks = session.marks(&tokenizer)?;
    marks.bos = marks.bos.filter(|_| !args.no_bos);
    let stream = TokenStream::load(&paths, args.format, &tokenizer, marks, context)?;
    // Before the weights are read.
    stream.strided(context, stride).map_err(|error| error.at(args.data.join(", ")))?;
    let model = session.load()?;
    let mut terminal = Terminal::new();
    let mut progress = |done, of| {
        let (verb, detail) = ("eval".to_owned(), String::new());
        terminal.emit(&Event::Progress { verb, done, of, detail });
    };
    let device = &session.device.device;
    let result = task::measure(&model, config, &stream, &task, device, stop, &mut progress)?;
    terminal.flush();
    let data_sha256 = sha256_of(&paths)?;
    let adapter = named_adapter(&session)?;
    if args.json {
        return output::json(&json!({
            "task": "ppl",
            "perplexity": result.perplexity,
            "nll_per_token": result.nll_per_token,
            "tokens": result.tokens,
            "context": result.context,
            "stride": result.stride,
            "windows": result.windows,
            "bos": marks.bos.is_some(),
            "format": args.format,
            "documents": stream.documents,
            "cut": stream.cut,
            "data_sha256": data_sha256,
            "model": args.source.model.model,
            "adapter": adapter,
            "device": session.device.name,
        }));
    }
    output::line(&format!(
        "perplexity {:.4}   nll {:.5} per token over {} tokens\n\
         protocol   {} windows of {} tokens, stride {},\n           \
         {}\n\
         data       {} sha256 {}\n\
         model      {} on {}{}",
        result.perplexity,
        result.nll_per_token,
        result.tokens,
        result.windows,
        result.context,
        result.stride,
        counted(&stream, marks),
        args.data.join(" + "),
        &data_sha256[..12],
        args.source.model.model,
        session.device.name,
        adapter.map_or_else(String::new, |adapter| adapter.line()),
    ))
}

/// The adapter that was measured with the model.
#[derive(Serialize)]
struct NamedAdapter {
    name: String,
    path: PathBuf,
    sha256: String,
}

impl NamedAdapter {
    fn line(&self) -> String {
        let Self { name, path, sha256 } = self;
        format!("\nadapter    {name} {} sha256 {}", path.display(), &sha256[..12])
    }
}

fn named_adapter(session: &Session) -> Result<Option<NamedAdapter>> {
    let Some((adapter, path)) = session.opened.adapter.as_ref().zip(session.adapter.as_ref())
    else {
        return Ok(None);
    };
    let (name, sha256) = (adapter.head().name.clone(), sha256_file(path)?);
    Ok(Some(NamedAdapter { name, path: path.clone(), sha256 }))
}

/// Which tokens of the windows count, and what stands around documents.
fn counted(stream: &TokenStream, marks: Marks) -> String {
    let bos = if marks.bos.is_some() { "BOS before each document" } else { "no BOS" };
    let Some(length) = stream.packed else {
        return format!("first token of a window not predicted, {bos}");
    };
    let bos = bos.replace("document", "example");
    let eos = if marks.eos.is_some() { "EOS behind it" } else { "no EOS" };
    let cut = match stream.cut {
        0 => String::new(),
        cut => format!(", {cut} of them cut at {length} tokens"),
    };
    format!(
        "completion tokens only, {bos}, {eos},\n           {} examples packed whole{cut}",
        stream.documents
    )
}

/// Window length and stride; an error names the option to blame, which is why they are tried one
/// after the other.
fn protocol(task: &PplConfig, config: &ModelConfig, format: DataFormat) -> Result<(usize, usize)> {
    let context = PplConfig { context: task.context, ..PplConfig::default() };
    let (length, _) = context.protocol(config, None).map_err(|error| error.at("--context"))?;
    let packed = format.is_packed().then_some(length);
    let stride = PplConfig { stride: task.stride, ..context };
    stride.protocol(config, packed).map_err(|error| error.at("--stride"))?;
    task.protocol(config, packed)
}
