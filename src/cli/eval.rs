//! `fewbit eval`: numbers and the protocols that produced them.

mod ask;
mod show;

use std::path::{Path, PathBuf};

use clap::Args;

use self::ask::Asked;
use self::show::{Adapter, Found};
use super::data::ReadingArgs;
use super::kv::KvArgs;
use super::{AdaptedArgs, Arithmetic, ModelArgs, Session, output};
use crate::data::{Marks, Reading, TokenStream, Tokenizer, sha256_of};
use crate::error::{Error, Result};
use crate::model::{Forward, KvMode, KvSetting};
use crate::report::Event;
use crate::report::Reporter;
use crate::report::terminal::Terminal;
use crate::stop::StopFlag;
use crate::store::folder::{sha256_file, write_atomic};
use crate::store::locate;
use crate::task::{Bench, Files, Material, Prepared, Source, TaskConfig};

/// Arguments of `eval`.
#[derive(Args, Debug)]
pub(super) struct EvalArgs {
    #[command(flatten)]
    source: AdaptedArgs,
    /// What to measure, and on which file where not on --data; repeatable
    #[arg(long, value_name = "TASK[=FILE]", default_value = "ppl", value_parser = ask::asked)]
    task: Vec<Asked>,
    /// Text (JSONL with "text", a JSON list of strings, or plain text), or examples of the
    /// --data-format; several are joined in order. For tasks with rows: a file of them, or a folder
    #[arg(long, value_name = "FILE")]
    data: Vec<String>,
    #[command(flatten)]
    reading: ReadingArgs,
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
    /// Use only this many rows, the first ones
    #[arg(long, value_name = "ROWS")]
    limit: Option<usize>,
    /// Sets a key of the task, as under task.NAME of a recipe; of one among several: TASK.KEY=VALUE;
    /// repeatable
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Put no BOS token before documents
    #[arg(long)]
    no_bos: bool,
    /// The float model to compare with: kl needs it, and other tasks tell what it answers differently
    #[arg(long, value_name = "MODEL")]
    reference: Option<String>,
    #[command(flatten)]
    kv: KvArgs,
    /// Write what was found row by row, one JSON object a line
    #[arg(long, value_name = "FILE")]
    samples: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &EvalArgs, stop: &StopFlag) -> Result<()> {
    let tasks = args.tasks()?;
    if let Some(samples) = &args.samples {
        locate::output_file(samples)?;
    }
    let session = args.source.open()?;
    let kv = args.kv.setting(&session)?;
    let ready: Vec<Ready> = {
        let ready = tasks.into_iter().zip(&args.task);
        ready.map(|(task, asked)| args.ready(&session, task, asked)).collect::<Result<_>>()?
    };
    let config = &session.opened.config;
    let tokenizer = ready.iter().any(|ready| ready.is_on_rows() && session.opened.has_tokenizer());
    let tokenizer = tokenizer.then(|| session.tokenizer()).transpose()?;
    let template = tokenizer.is_some().then(|| session.opened.chat_template()).transpose()?;
    let template = template.flatten();
    let ends = session.opened.generation()?.ends;
    // Before the weights are read.
    let prepared: Vec<Box<dyn Prepared + '_>> = ready
        .iter()
        .map(|ready| {
            let Ready { task, text, files, names } = ready;
            let text = text.as_ref().map(|text| &text.stream);
            let (tokenizer, template, ends) = (tokenizer.as_ref(), template.as_ref(), &ends[..]);
            let material = Material { config, text, files, tokenizer, template, ends };
            task.task().prepare(&material).map_err(|error| error.at(names.join(", ")))
        })
        .collect::<Result<_>>()?;
    let reference = args.reference(&session)?;
    let model = session.load()?.with_kv(kv);
    let reference = reference.as_ref().map(Session::load).transpose()?;
    // By the same protocol, and as computed.
    let reference = reference.map(|model| model.with_kv(kv.map(|_| KvSetting::new(KvMode::Full))));
    let mut terminal = Terminal::new();
    let reference = reference.as_ref().map(|model| -> &dyn Forward { model });
    let bench = Bench { device: &session.device.device, stop, reference };
    let mut found = Vec::new();
    for (prepared, ready) in prepared.iter().zip(&ready) {
        let mut measure = |model: &dyn Forward, verb: &str| {
            let mut progress = |done, of| {
                let verb = format!("{verb} {}", ready.task.label());
                terminal.emit(&Event::Progress { verb, done, of, detail: String::new() });
            };
            prepared.measure(&bench, model, &mut progress)
        };
        let task = ready.task.task();
        let beside = reference.filter(|_| !task.needs_reference());
        let reference = beside.map(|model| measure(model, "reference")).transpose()?;
        let mut score = measure(&model, "eval")?;
        if let Some(reference) = &reference {
            task.compare(&mut score, &reference.samples);
        }
        found.push(Found { ready, score, reference });
    }
    terminal.flush();
    if let Some(path) = &args.samples {
        write_atomic(path, show::samples(&found).as_bytes())?;
    }
    let adapter = adapter_of(&session)?;
    let model =
        show::Model { name: &args.source.model.model, device: &session.device.name, adapter };
    if args.json {
        return output::json(&show::json(&found, &model));
    }
    output::line(&show::text(&found, &model))
}

/// A task and what it is measured on.
struct Ready {
    task: TaskConfig,
    text: Option<Text>,
    files: Files,
    /// What was asked for, as it was spelt.
    names: Vec<String>,
}

/// A text as it is measured.
struct Text {
    stream: TokenStream,
    marks: Marks,
    reading: Reading,
    sha256: String,
}

impl Ready {
    fn is_on_rows(&self) -> bool {
        self.text.is_none()
    }
}

impl EvalArgs {
    /// The tasks with their keys.
    fn tasks(&self) -> Result<Vec<TaskConfig>> {
        let mut tasks = ask::tasks(&self.task, &self.keys(), &self.set)?;
        for (task, asked) in tasks.iter_mut().zip(&self.task) {
            let data = asked.file.as_ref().map_or_else(|| self.data.clone(), |f| vec![f.clone()]);
            if !data.is_empty() {
                task.task_mut().read(&crate::data::Paths(data));
            }
            if let (Source::Rows(_), Some(limit)) = (task.task().source(), self.limit) {
                task.task_mut().limit(limit);
            }
        }
        Ok(tasks)
    }

    /// Keys that options of their own set, of tasks on text.
    fn keys(&self) -> Vec<String> {
        let keys = [("context", self.context), ("stride", self.stride), ("windows", self.windows)];
        let keys = keys.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
        keys.collect()
    }

    /// The model to compare with, opened.
    fn reference(&self, session: &Session) -> Result<Option<Session>> {
        let Some(name) = &self.reference else { return Ok(None) };
        let ModelArgs { device, compute, .. } = &self.source.model;
        // A float model has no codes, and is what rounding is compared with.
        let compute = if *compute == Arithmetic::Int8 { Arithmetic::F32 } else { *compute };
        let device = device.clone();
        let args = ModelArgs { model: name.clone(), device, compute, bits: None };
        let opened = args.open().map_err(|error| error.at("--reference"))?;
        let [ours, theirs] = [session, &opened].map(|session| session.opened.config.vocab);
        if ours != theirs {
            return Err(Error::preflight(format!(
                "the reference has {theirs} tokens, and the model {ours}"
            ))
            .at(format!("--reference {name}"))
            .fix("the float model that this one was made from"));
        }
        Ok(Some(opened))
    }

    fn ready(&self, session: &Session, task: TaskConfig, asked: &Asked) -> Result<Ready> {
        let option = |key: &str| if self.set.is_empty() { format!("--{key}") } else { key.into() };
        task.task().check().map_err(|refused| refused.error.at(option(refused.key)))?;
        if self.kv.is_given() && !task.task().goes_on() {
            let what =
                format!("{} reads texts in one pass and holds no keys and values", task.label());
            return Err(Error::usage(what).at("--kv-cache").fix("ppl, gsm8k or ifeval"));
        }
        if task.task().needs_reference() && self.reference.is_none() {
            let what = format!("{} compares with a reference, and none is named", task.label());
            return Err(Error::usage(what).fix("--reference the float model"));
        }
        let names = asked.file.as_ref().map_or_else(|| self.data.clone(), |f| vec![f.clone()]);
        let files = Files::find(&task.task().source())?;
        let text = match task.task().source() {
            Source::Rows(_) => None,
            Source::Text => Some(self.text(session, &task, &names)?),
        };
        Ok(Ready { task, text, files, names })
    }

    fn text(&self, session: &Session, task: &TaskConfig, names: &[String]) -> Result<Text> {
        let config = &session.opened.config;
        let window = |packed| {
            let window = task.task().window(config, packed);
            // Keys of pieces have no option of their own.
            let place = |key: &str| match key {
                "prefill" | "piece" => format!("--set {key}"),
                key => format!("--{key}"),
            };
            window.map_err(|refused| refused.error.at(place(refused.key)))
        };
        let length = window(None)?;
        if names.is_empty() {
            return Err(Error::usage(format!(
                "{} is measured on text, and none is named",
                task.label()
            ))
            .at("--data")
            .fix(format!("--data FILE, or --task {}=FILE", task.label())));
        }
        let mut paths: Vec<PathBuf> = Vec::new();
        for name in names {
            paths.extend(locate::data_files(name)?);
        }
        let reading = self.reading.reading().resolved(&paths)?;
        window(reading.format.is_packed().then_some(length))?;
        let tokenizer: Tokenizer = session.tokenizer()?;
        let mut marks = session.marks(&tokenizer)?;
        marks.bos = marks.bos.filter(|_| !self.no_bos);
        let stream = session.read(&paths, &reading, &tokenizer, marks, length)?;
        Ok(Text { stream, marks, reading, sha256: sha256_of(&paths)? })
    }
}

fn adapter_of(session: &Session) -> Result<Option<Adapter>> {
    let Some((adapter, path)) = session.opened.adapter.as_ref().zip(session.adapter.as_ref())
    else {
        return Ok(None);
    };
    let (name, sha256) = (adapter.head().name.clone(), sha256_file(Path::new(path))?);
    Ok(Some(Adapter { name, path: path.clone(), sha256 }))
}
