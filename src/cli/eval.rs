//! `fewbit eval`: a number and the protocol that produced it.

use std::path::PathBuf;

use clap::Args;
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use serde_json::{Value, json};

use super::{AdaptedArgs, Session, data_format, output};
use crate::data::{DataFormat, Marks, TokenStream, sha256_of};
use crate::error::Result;
use crate::recipe;
use crate::report::Event;
use crate::report::Reporter;
use crate::report::terminal::Terminal;
use crate::stop::StopFlag;
use crate::store::folder::sha256_file;
use crate::store::locate;
use crate::task::{self, Bench, Score, TaskConfig};

/// Arguments of `eval`.
#[derive(Args, Debug)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// What to measure
    #[arg(long, value_name = "TASK", default_value = "ppl", value_parser = PossibleValuesParser::new(task::NAMES))]
    task: String,
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
    /// Sets a key of the task, as under task.NAME of a recipe; repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Put no BOS token before documents
    #[arg(long)]
    no_bos: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EvalArgs, stop: &StopFlag) -> Result<()> {
    let session = args.source.open()?;
    let task = args.task()?;
    let config = &session.opened.config;
    let window = |packed| {
        let window = task.task().window(config, packed);
        window.map_err(|refused| refused.error.at(format!("--{}", refused.key)))
    };
    let length = window(None)?;
    window(args.format.is_packed().then_some(length))?;
    let paths: Vec<PathBuf> = args.data.iter().map(|d| locate::data(d)).collect::<Result<_>>()?;
    let tokenizer = session.tokenizer()?;
    let mut marks = session.marks(&tokenizer)?;
    marks.bos = marks.bos.filter(|_| !args.no_bos);
    let stream = TokenStream::load(&paths, args.format, &tokenizer, marks, length)?;
    // Before the weights are read.
    let check = task.task().check_text(config, &stream);
    check.map_err(|error| error.at(args.data.join(", ")))?;
    let model = session.load()?;
    let mut terminal = Terminal::new();
    let mut progress = |done, of| {
        let (verb, detail) = ("eval".to_owned(), String::new());
        terminal.emit(&Event::Progress { verb, done, of, detail });
    };
    let bench = Bench { config, text: &stream, device: &session.device.device, stop };
    let score = task.task().measure(&bench, &model, &mut progress)?;
    terminal.flush();
    let data_sha256 = sha256_of(&paths)?;
    let adapter = named_adapter(&session)?;
    if args.json {
        let rest = json!({
            "bos": marks.bos.is_some(),
            "format": args.format,
            "documents": stream.documents,
            "cut": stream.cut,
            "data_sha256": data_sha256,
            "model": args.source.model.model,
            "adapter": adapter,
            "device": session.device.name,
        });
        return output::json(&json!(Found { task: task.name(), score, rest }));
    }
    output::line(&format!(
        "{}\n\
         protocol   {},\n           \
         {}\n\
         data       {} sha256 {}\n\
         model      {} on {}{}",
        task.task().result(&score),
        task.task().protocol(&score),
        counted(&stream, marks),
        args.data.join(" + "),
        &data_sha256[..12],
        args.source.model.model,
        session.device.name,
        adapter.map_or_else(String::new, |adapter| adapter.line()),
    ))
}

impl EvalArgs {
    /// The task with its keys.
    fn task(&self) -> Result<TaskConfig> {
        let lengths =
            [("context", self.context), ("stride", self.stride), ("windows", self.windows)];
        let lengths =
            lengths.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        let keys = lengths.chain(self.set.iter().cloned());
        let set: Vec<String> = keys.map(|key| format!("{}.{key}", self.task)).collect();
        recipe::parse(&format!("[{}]\n", self.task), "--task", &set).map(|(task, _)| task)
    }
}

/// The JSON object, in its order.
#[derive(Serialize)]
struct Found {
    task: &'static str,
    #[serde(flatten)]
    score: Score,
    #[serde(flatten)]
    rest: Value,
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
