//! `fewbit eval`: a number and the protocol that produced it.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;

use super::{ModelArgs, output};
use crate::data::{TokenStream, read_documents, sha256_of};
use crate::error::Result;
use crate::model::ModelConfig;
use crate::report::Event;
use crate::report::Reporter;
use crate::report::terminal::Terminal;
use crate::stop::StopFlag;
use crate::store::locate;
use crate::task::{self, PplConfig};

/// Arguments of `eval`.
#[derive(Args, Debug)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// What to measure
    #[arg(long, value_enum, default_value = "ppl")]
    task: Task,
    /// Text: JSONL with "text", a JSON list of strings, or plain text; several are joined in order
    #[arg(long, value_name = "FILE", required = true)]
    data: Vec<String>,
    /// Window length in tokens [default: the model's context, at most 2048]
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
    let session = args.model.open()?;
    let task = PplConfig { context: args.context, stride: args.stride, windows: args.windows };
    let config = &session.opened.config;
    let (context, stride) = protocol(&task, config)?;
    let paths: Vec<PathBuf> = args.data.iter().map(|d| locate::data(d)).collect::<Result<_>>()?;
    let mut documents = Vec::new();
    for path in &paths {
        documents.extend(read_documents(path)?);
    }
    let tokenizer = session.tokenizer()?;
    let bos = if args.no_bos { None } else { session.bos(&tokenizer)? };
    let stream = TokenStream::build(&documents, &tokenizer, bos)?;
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
    if args.json {
        return output::json(&json!({
            "task": "ppl",
            "perplexity": result.perplexity,
            "nll_per_token": result.nll_per_token,
            "tokens": result.tokens,
            "context": result.context,
            "stride": result.stride,
            "windows": result.windows,
            "bos": bos.is_some(),
            "data_sha256": data_sha256,
            "model": args.model.model,
            "device": session.device.name,
        }));
    }
    output::line(&format!(
        "perplexity {:.4}   nll {:.5} per token over {} tokens\n\
         protocol   {} windows of {} tokens, stride {},\n           \
         first token of a window not predicted, {}\n\
         data       {} sha256 {}\n\
         model      {} on {}",
        result.perplexity,
        result.nll_per_token,
        result.tokens,
        result.windows,
        result.context,
        result.stride,
        if bos.is_some() { "BOS before each document" } else { "no BOS" },
        args.data.join(" + "),
        &data_sha256[..12],
        args.model.model,
        session.device.name,
    ))
}

/// Window length and stride; an error names the option to blame, which is why they are tried one
/// after the other.
fn protocol(task: &PplConfig, config: &ModelConfig) -> Result<(usize, usize)> {
    let context = PplConfig { context: task.context, ..PplConfig::default() };
    context.protocol(config).map_err(|error| error.at("--context"))?;
    let stride = PplConfig { stride: task.stride, ..context };
    stride.protocol(config).map_err(|error| error.at("--stride"))?;
    task.protocol(config)
}
